"""Claims about the page in a real browser: what is seen, at which width, and what a keyboard alone can do."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from openai.types import Batch
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement

from batchllm.offline.stats import JobStats
from batchllm.server import LiveNumbers
from batchllm.trace.latency import LiveLatency
from batchllm.trace.steps import STEP_DTYPE, StepArray
from tests.server.api_rows import begin, counts_of, jsonl, row, rows_of, until, upload, wait_for, wait_for_rows
from tests.server.conftest import Serve
from tests.server.instant_server import Api

KEY = "sk-page"
HOSTILE_ID = "<img src=x onerror=document.title='run'>"
WIDTHS = (400, 1600)
_MAX_TABS = 100
_PROGRAMS = ("chromium", "chromedriver")


@pytest.fixture(scope="module")
def downloads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("downloads")


@pytest.fixture(scope="module")
def browser(downloads: Path) -> Iterator[webdriver.Chrome]:
    """One for all tests; a machine without it fails them, and they say what to do."""
    missing = [name for name in _PROGRAMS if shutil.which(name) is None]
    if missing:
        pytest.fail(
            f"{' and '.join(missing)}: not found; run scripts/setup as root, or install it (Debian: apt install "
            "chromium chromium-driver)"
        )
    options = webdriver.ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    driver.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(downloads)})
    yield driver
    driver.quit()


@pytest.fixture(autouse=True)
def _clean(browser: webdriver.Chrome) -> Iterator[None]:
    """Nothing of a test before it, and nothing that the browser had to complain of."""
    browser.execute_cdp_cmd("Network.clearBrowserCookies", {})
    browser.get_log("browser")
    yield
    complaints = [entry["message"] for entry in browser.get_log("browser") if "status of 4" not in entry["message"]]
    browser.get("about:blank")
    assert not complaints


def set_width(browser: webdriver.Chrome, width: int) -> None:
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


def steps() -> StepArray:
    made = np.zeros(50, STEP_DTYPE)
    made["duration_s"], made["start_s"] = 0.1, time.monotonic() - 10 + np.arange(50) * 0.1
    made["kv_pinned_tokens"], made["kv_private_tokens"], made["kv_free_tokens"] = 300, 200, 500
    made["num_prefill_tokens"], made["num_live_prefill_tokens"], made["num_decode_tokens"] = 30, 10, 70
    return made


def numbers() -> LiveNumbers:
    """Of an engine that does something; the real ones are those of `test_launch_server`."""
    latency = LiveLatency()
    latency.first_token.add(0.05, now_s=time.monotonic())
    stats = JobStats(num_prompt_tokens=1000, num_optimal_prompt_tokens=100, num_computed_prompt_tokens=125)
    return LiveNumbers(job_stats=lambda: stats, steps=steps, latency=latency, kv_limit_tokens=900)


def text_of(browser: webdriver.Chrome, selector: str) -> str:
    """In one go: the page replaces its parts."""
    script = "return document.querySelector(arguments[0])?.innerText ?? String()"
    return str(browser.execute_script(script, selector))


def focused(browser: webdriver.Chrome) -> WebElement:
    return browser.switch_to.active_element


def press(browser: webdriver.Chrome, *keys: str) -> None:
    ActionChains(browser).send_keys(*keys).perform()


def tab_to(browser: webdriver.Chrome, is_it: Callable[[WebElement], bool]) -> WebElement:
    """Presses Tab until an element has the focus, and sees that it shows it."""
    for _ in range(_MAX_TABS):
        press(browser, Keys.TAB)
        found = focused(browser)
        if found.tag_name != "body":
            assert found.value_of_css_property("outline-style") == "solid", found.get_attribute("outerHTML")
        if is_it(found):
            return found
    raise AssertionError("the keyboard does not reach it")


def has_text(text: str) -> Callable[[WebElement], bool]:
    return lambda element: element.text == text


def has_id(name: str) -> Callable[[WebElement], bool]:
    return lambda element: element.get_attribute("id") == name


def shows_what_the_api_says(browser: webdriver.Chrome, url: str, batch: Batch) -> None:
    total, answered, failed = counts_of(batch)
    browser.get(f"{url}/batch/{batch.id}")
    assert text_of(browser, "h1") == batch.id
    assert text_of(browser, "#status") == batch.status.replace("_", " ")
    assert text_of(browser, "#progress") == (f"{answered + failed:,} of {total:,} rows" if total else "no rows")
    assert bool(browser.find_elements(By.ID, "failed")) == bool(failed)
    assert bool(browser.find_elements(By.ID, "results")) == bool(batch.output_file_id)
    assert bool(browser.find_elements(By.ID, "errors")) == bool(batch.error_file_id)


def test_what_is_shown_is_what_the_api_says(browser: webdriver.Chrome, serve: Serve) -> None:
    """Of batches that have ended in each way, in the list and each alone."""
    api = serve(engine={"batch": 2, "delay_s": 0.01})
    client = api.client
    failing = [*rows_of(5), row(90, prompt=[1, 999]), row(91, prompt=[])]
    ended = [begin(client, rows).id for rows in (rows_of(20), failing, [{"custom_id": "x"}])]
    batches = [wait_for(client, batch_id) for batch_id in ended]
    for batch in batches:
        shows_what_the_api_says(browser, api.url, batch)
    assert {batch.status for batch in batches} == {"completed", "failed"}
    assert "aborted" in text_of(browser, "#failures") or batches[-1].errors is not None
    browser.get(f"{api.url}/batch")
    rows = browser.find_elements(By.CSS_SELECTOR, "[data-batch]")
    listed = client.batches.list().data
    assert [one.get_attribute("data-batch") for one in rows] == [batch.id for batch in listed]
    for one, batch in zip(rows, listed, strict=True):
        total, answered, failed = counts_of(batch)
        assert batch.status in one.text and bool(re.search(rf"\b{failed:,} failed", one.text)) == bool(failed)
        assert f"{answered + failed:,} of {total:,} rows" in one.text or not total


def test_a_batch_that_runs_is_shown_as_it_goes_on_without_a_reload(browser: webdriver.Chrome, serve: Serve) -> None:
    """With the prefixes of its plan."""
    api = serve(engine={"batch": 2, "delay_s": 0.2})
    batch = wait_for_rows(api.client, begin(api.client, rows_of(60)).id, 2)
    browser.get(f"{api.url}/batch/{batch.id}")
    browser.execute_script("window.isSame = true")
    saved = browser.find_elements(By.CSS_SELECTOR, "#prefixes tbody tr")
    assert [one.find_element(By.CSS_SELECTOR, "th").text for one in saved] == ["18"] * 6
    before = text_of(browser, "#progress")
    until(lambda: text_of(browser, "#progress") != before, "the page goes on")
    assert browser.execute_script("return window.isSame")
    api.client.batches.cancel(batch.id)
    until(lambda: text_of(browser, "#status") == "cancelled", "the page sees the end")
    until(lambda: bool(browser.find_elements(By.ID, "results")), "the results can be downloaded")


def test_how_the_engine_does_is_shown(browser: webdriver.Chrome, serve: Serve) -> None:
    """Reuse, latency, step mix and the two charts."""
    browser.get(f"{serve(numbers=numbers()).url}/batch")
    shown = text_of(browser, "#numbers").replace("\N{NO-BREAK SPACE}", " ")
    for words in ("87.5%", "at best 90.0%", "time to first token", "planned prefill", "1,000", "3,500"):
        assert words in shown, words
    assert re.search(r"time to first token\s+(4[89]|5[012])[.0-9]* ms", shown)
    charts = browser.find_elements(By.CSS_SELECTOR, "svg.chart")
    assert ["KV pool" in str(chart.get_attribute("aria-label")) for chart in charts] == [True, False]
    assert all(len(chart.find_elements(By.CSS_SELECTOR, "path")) >= 3 for chart in charts)
    assert all(chart.size["width"] > 300 for chart in charts)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_the_window_and_can_be_read(browser: webdriver.Chrome, serve: Serve, width: int, scheme: str) -> None:
    """No scrolling sideways, whatever names there are; text stands out from what is behind it."""
    api = serve(numbers=numbers())
    unbroken = "x" * 400
    rows = [row(1, prompt=[1, 999]) | {"custom_id": unbroken}, row(2)]
    api.client.files.create(file=(unbroken, jsonl(rows)), purpose="batch")
    batch = wait_for(api.client, begin(api.client, rows, metadata={"k" * 64: "v" * 500}).id)
    set_width(browser, width)
    scheme_feature = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", scheme_feature)
    for path in ("/batch", f"/batch/{batch.id}", "/batch/batch_no"):
        browser.get(api.url + path)
        inside, outside = browser.execute_script(
            "let e = document.documentElement; return [e.scrollWidth, e.clientWidth]"
        )
        assert inside <= outside, path
        for selector in ("h1", "h2", "label", "dt", ".muted", "a", "button", ".bad"):
            for element in browser.find_elements(By.CSS_SELECTOR, selector):
                assert contrast(browser, element) >= 4.5, (path, selector, element.text)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def contrast(browser: webdriver.Chrome, element: WebElement) -> float:
    """Of a text to what is behind it, as WCAG counts it."""
    script = """
      let [e] = arguments, behind = e;
      const of = (node, name) => getComputedStyle(node)[name].match(/[\\d.]+/g).map(Number);
      while (behind.parentElement && of(behind, "backgroundColor")[3] === 0) behind = behind.parentElement;
      return [of(e, "color"), of(behind, "backgroundColor")];
    """
    colors = browser.execute_script(script, element)
    light, dark = sorted((luminance(color) for color in colors), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def luminance(color: list[float]) -> float:
    parts = [part / 255 for part in color[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("width", WIDTHS)
def test_a_keyboard_reaches_every_control(browser: webdriver.Chrome, serve: Serve, width: int) -> None:
    """In the order of the page, each with a name."""
    api = serve(engine={"batch": 1, "delay_s": 0.5}, page_key=KEY)
    upload(api.client, rows_of(2))
    running = wait_for_rows(api.client, begin(api.client, rows_of(90)).id, 1)
    set_width(browser, width)
    for path in ("sign-in", "/batch", f"/batch/{running.id}"):
        if path != "sign-in":
            browser.get(api.url + path)
        else:
            browser.get(f"{api.url}/batch")
        controls = browser.find_elements(By.CSS_SELECTOR, "a[href], button, input:not([type=hidden], [hidden]), select")
        assert controls and all(control.is_displayed() and control.accessible_name for control in controls)
        browser.execute_script("clearInterval(1); document.activeElement.blur()")
        reached: list[WebElement] = []
        for control in controls:
            tab_to(browser, lambda element, wanted=control: element == wanted)  # type: ignore[misc] # a default is not inferred
            reached.append(control)
        assert reached == controls
        if path == "sign-in":
            browser.find_element(By.ID, "key").send_keys(KEY, Keys.ENTER)
            until(lambda: bool(browser.find_elements(By.ID, "list")), "signed in")


def test_a_keyboard_alone_does_all_there_is_to_do(
    browser: webdriver.Chrome, serve: Serve, tmp_path: Path, downloads: Path
) -> None:
    """Sign in, upload, create, cancel, download results and errors."""
    api = serve(engine={"batch": 2, "delay_s": 0.1}, page_key=KEY)
    path = tmp_path / "mine.jsonl"
    path.write_bytes(jsonl(rows_of(400)))
    browser.get(f"{api.url}/batch")
    tab_to(browser, has_id("key"))
    press(browser, KEY, Keys.ENTER)
    until(lambda: bool(browser.find_elements(By.ID, "file")), "signed in")
    tab_to(browser, has_id("file"))
    focused(browser).send_keys(str(path))  # the system's own dialog is outside of the page
    tab_to(browser, has_text("Upload"))
    press(browser, Keys.ENTER)
    until(lambda: bool(browser.find_elements(By.CSS_SELECTOR, "[role=status]")), "uploaded")
    assert "mine.jsonl" in text_of(browser, "[role=status]")
    tab_to(browser, has_id("endpoint"))
    press(browser, Keys.DOWN)
    tab_to(browser, has_text("Create batch"))
    press(browser, Keys.ENTER)
    until(lambda: "/batch/batch_" in browser.current_url, "created")
    (batch,) = api.client.batches.list().data
    assert (batch.endpoint, batch.completion_window) == ("/v1/completions", "24h")
    wait_for_rows(api.client, batch.id, 4)
    until(lambda: text_of(browser, "#status") == "in progress", "it runs")
    tab_to(browser, has_text("Cancel batch"))
    press(browser, Keys.ENTER)
    batch = wait_for(api.client, batch.id, "cancelled")
    until(lambda: bool(browser.find_elements(By.ID, "errors")), "it has ended")
    for name, file_id in (("results", batch.output_file_id), ("errors", batch.error_file_id)):
        assert file_id is not None
        tab_to(browser, has_id(name))
        press(browser, Keys.ENTER)
        saved = downloads / api.client.files.retrieve(file_id).filename
        until(saved.exists, f"{name} are saved")
        assert saved.read_bytes() == api.client.files.content(file_id).content
    tab_to(browser, has_text("Sign out"))
    press(browser, Keys.ENTER)
    until(lambda: bool(browser.find_elements(By.ID, "key")), "signed out")


def test_hostile_names_are_text(browser: webdriver.Chrome, serve: Serve) -> None:
    """Of rows, files, reasons, metadata; also where the page brings itself up to date."""
    api = serve(engine={"batch": 1, "delay_s": 0.1})
    rows: list[Any] = [row(number, prompt=[number, 999]) | {"custom_id": f"{HOSTILE_ID}{number}"} for number in (1, 2)]
    rows += [row(number, model=HOSTILE_ID) for number in range(10, 40)]
    file = api.client.files.create(file=(HOSTILE_ID, jsonl(rows)), purpose="batch")
    batch = api.client.batches.create(
        input_file_id=file.id, endpoint="/v1/completions", completion_window="24h", metadata={HOSTILE_ID: HOSTILE_ID}
    )
    wait_for_rows(api.client, batch.id, 2)
    browser.get(f"{api.url}/batch/{batch.id}")
    before = text_of(browser, "#progress")
    until(lambda: text_of(browser, "#progress") != before, "the page goes on")
    for path in (f"/batch/{batch.id}", f"/batch?file={file.id}"):
        browser.get(api.url + path)
        assert HOSTILE_ID in text_of(browser, "main")
        assert browser.title != "run" and not browser.find_elements(By.CSS_SELECTOR, "img")
    wait_for(api.client, batch.id)
    browser.get(f"{api.url}/batch/{batch.id}")
    assert f"{HOSTILE_ID}1" in text_of(browser, "#failures") and not browser.find_elements(By.CSS_SELECTOR, "img")


def test_without_scripts_all_of_it_is_there(browser: webdriver.Chrome, serve: Serve, tmp_path: Path) -> None:
    api = serve()
    path = tmp_path / "plain.jsonl"
    path.write_bytes(jsonl(rows_of(3)))
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        browser.get(f"{api.url}/batch")
        browser.find_element(By.ID, "file").send_keys(str(path))
        browser.find_element(By.XPATH, "//button[text()='Upload']").click()
        option = "//option[text()='/v1/completions']"
        until(lambda: bool(browser.find_elements(By.XPATH, option)), "the file is there")
        browser.find_element(By.XPATH, option).click()
        browser.find_element(By.XPATH, "//button[text()='Create batch']").click()
        until(lambda: bool(browser.find_elements(By.LINK_TEXT, "Refresh")), "the batch is shown")
        (batch,) = api.client.batches.list().data
        shown = wait_for(api.client, batch.id)
        browser.find_element(By.LINK_TEXT, "Refresh").click()
        assert text_of(browser, "#status") == shown.status == "completed"
    finally:
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


def test_without_signing_in_the_browser_shows_nothing(browser: webdriver.Chrome, serve: Serve) -> None:
    """A key that is wrong says so and gets no further; the cookie is out of reach of scripts."""
    api: Api = serve(page_key=KEY)
    batch = wait_for(api.client, begin(api.client, rows_of(3)).id)
    for path in ("/batch", f"/batch/{batch.id}", f"/batch/files/{batch.output_file_id}"):
        browser.get(api.url + path)
        assert batch.id not in browser.page_source and "r1" not in browser.page_source
        assert browser.find_elements(By.ID, "key")
    browser.find_element(By.ID, "key").send_keys("sk-wrong", Keys.ENTER)
    until(lambda: bool(browser.find_elements(By.CSS_SELECTOR, "[role=alert]")), "it is refused")
    browser.find_element(By.ID, "key").send_keys(KEY, Keys.ENTER)
    until(lambda: batch.id in browser.page_source, "it is shown")
    assert browser.execute_script("return document.cookie") == ""
    assert [cookie["httpOnly"] for cookie in browser.get_cookies()] == [True]
