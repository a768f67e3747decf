"""The Ray that the tests share: its workers see this project and keep to one thread."""

import os
from pathlib import Path


def test_workers_import_the_project_and_use_one_thread(local_ray: None) -> None:
    import ray

    @ray.remote
    def look() -> tuple[str, str | None, int]:
        import torch

        import pipelines

        return str(pipelines.__file__), os.environ.get("OMP_WAIT_POLICY"), torch.get_num_threads()

    where, policy, num_threads = ray.get(look.remote())
    assert Path(where) == Path(__file__).resolve().parents[1] / "pipelines" / "__init__.py"
    assert policy == "PASSIVE"
    assert num_threads == 1
