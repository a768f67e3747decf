"""Which kinds and compositions of memory are tested with the long tests: those whose parts are tested otherwise too."""

import pytest

FURTHER = {
    *("rmt+xl", "lamemo+rmt", "bmojo+rmt", "xl+memformer", "memformer+rmt", "xl+armt", "shm+rmt", "xl+rmt-open"),
    *("xl+infinity", "rmt-5-read", "rmt-open", "bmojo"),
}


@pytest.hookimpl(tryfirst=True)  # before what `-m` leaves out is chosen
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        case = getattr(item, "callspec", None)
        if case is not None and not FURTHER.isdisjoint(each for each in case.params.values() if isinstance(each, str)):
            item.add_marker(pytest.mark.long)
