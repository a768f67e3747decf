"""The page, in a real browser without a window: a book is read, asked, forked and summarised, also with a key."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipelines.serving.auth import Key, new_key
from tests.pipelines.serving_http import Running, running, written

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (shutil.which("chromium") and shutil.which("chromedriver")), reason="no chromium and chromedriver here"
    ),
]

FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--window-size=1000,1300"),
)
BOOK = "It is a truth universally acknowledged, that a single man in possession of a good fortune. " * 12
KEY, LINE = new_key("reader")
SHOTS = os.environ.get("RMT_SCREENSHOTS")  # a directory: pictures of the page at each stage are put there


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(keys=[Key(*LINE.split(":"))], key=KEY) as server:
        yield server


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(shutil.which("chromedriver"))
    browser = webdriver.Chrome(options, service)
    yield browser
    browser.quit()


def wait(browser: Any, expression: str) -> Any:
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(browser, 30).until(lambda browser: browser.execute_script(f"return {expression}"))


def text(browser: Any, name: str) -> str:
    return browser.execute_script(f"return document.getElementById('{name}').textContent")


def click(browser: Any, name: str) -> None:
    browser.find_element("id", name).click()


def shoot(browser: Any, name: str) -> None:
    if SHOTS:
        browser.save_screenshot(str(Path(SHOTS) / f"{name}.png"))


def last_answer(browser: Any, number: int) -> str:
    return wait(browser, f"document.querySelectorAll('.turn[data-done]')[{number}]?.lastChild.textContent")


def test_a_book_is_read_asked_forked_and_summarised(server: Running, browser: Any, tmp_path: Path) -> None:
    book = tmp_path / "book.txt"
    book.write_text(BOOK)
    browser.get(server.url.replace("//", f"//reader:{KEY}@") + "/")
    wait(browser, "document.getElementById('model').textContent == 'tiny'")
    shoot(browser, "1-open")

    browser.find_element("id", "file").send_keys(str(book))
    wait(browser, "document.getElementById('stage').textContent.includes('last token')")
    model = server.http.get("/v1/models").json()["data"][0]
    num_tokens = len(BOOK.encode())
    assert text(browser, "tokens") == f"{num_tokens:,}"
    assert text(browser, "segments") == f"{num_tokens // model['segment_len']:,}"
    assert text(browser, "state") == f"{model['state_bytes']:,}"
    assert model["kv_bytes_per_token"] * num_tokens > model["state_bytes"]
    assert text(browser, "speed") != "0"
    shoot(browser, "2-read")

    browser.find_element("id", "question").send_keys("Who?")
    click(browser, "fork")
    wait(browser, "document.querySelectorAll('.tab').length == 2")
    click(browser, "ask")  # the fork
    document = BOOK + "\n\nWho?\n"
    assert last_answer(browser, 0) == written(document.encode(), 200)
    browser.find_elements("css selector", ".tab")[0].click()
    click(browser, "ask")  # the session, which the fork's question has not changed
    assert last_answer(browser, 1) == written(document.encode(), 200)

    click(browser, "summarise")
    wait(browser, "document.getElementById('summaryStage').textContent == 'succeeded'")
    assert text(browser, "summary")
    shoot(browser, "3-asked")
    assert text(browser, "error") == ""
    assert not [line for line in browser.get_log("browser") if line["level"] == "SEVERE"]


def test_what_goes_wrong_is_shown(server: Running, browser: Any, tmp_path: Path) -> None:
    picture = tmp_path / "picture.txt"
    picture.write_bytes(b"\x89PNG\0\0")
    browser.get(server.url + "/")
    wait(browser, "document.getElementById('model').textContent == 'tiny'")
    browser.find_element("id", "file").send_keys(str(picture))
    wait(browser, "document.getElementById('error').textContent.includes('UTF-8')")
    assert text(browser, "stage") == "failed"
    shoot(browser, "4-error")
