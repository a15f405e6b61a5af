"""The report page in a browser."""

from __future__ import annotations

import io
import json
import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import plotly.graph_objects as go
import pytest
from PIL import Image
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.support.select import Select
from selenium.webdriver.support.wait import WebDriverWait

from ptq161.report.__main__ import main
from tests.report.browser import chromium
from tests.report.synthetic import N_BLOCKS, write_records

N_RUNS, SECONDS_TO_LOAD = 1000, 10
SECTIONS = ["results", "bits", "sweeps", "loss", "preprocessing", "error", "salient", "cost", "problems", "runs"]


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of 45 runs, and of what is damaged in the ways in which records are."""
    folder = tmp_path_factory.mktemp("page")
    write_records(folder / "sweep", 45, with_metrics=45)
    with (folder / "sweep" / "0" / "metrics.jsonl").open("a") as stream:
        stream.write('{"time": 1.0, "name": "preprocess_loss", "value": 3.0, "round": 0, "step": 1}\n')
        stream.write('{"time": 1.0, "name": "lo')
    for name, manifest in {
        "old": {"schema_version": 0},
        "<b>on": {"schema_version": 1, "exit_state": "running"},
    }.items():
        (folder / "sweep" / name).mkdir()
        (folder / "sweep" / name / "manifest.json").write_text(json.dumps(manifest))
    assert main([str(folder / "sweep"), "--out", str(folder / "out")]) == 0
    return folder / "out" / "index.html"


@pytest.fixture(scope="module")
def browser() -> Iterator[Chrome]:
    with chromium() as started:
        yield started


@pytest.fixture
def page(browser: Chrome, page_file: Path) -> Chrome:
    browser.set_window_size(1280, 1000)
    browser.get(page_file.as_uri())
    return browser


def column(page: Chrome, heading: str) -> list[str]:
    headings = [button.text for button in page.find_elements(By.CSS_SELECTOR, "#results-table thead button")]
    script = (
        "return [...document.querySelectorAll('tbody.quantized tr')].map((row) => row.cells[arguments[0]].innerText)"
    )
    return page.execute_script(script, headings.index(heading))


def click(page: Chrome, heading: str) -> None:
    buttons = page.find_elements(By.CSS_SELECTOR, "#results-table thead button")
    next(button for button in buttons if button.text == heading).click()


def drawn(page: Chrome, section: str) -> None:
    page.execute_script("document.getElementById(arguments[0]).scrollIntoView()", section)
    WebDriverWait(page, 20).until(lambda b: b.find_elements(By.CSS_SELECTOR, f"#{section} .main-svg"))


def test_every_section_is_there_and_nothing_is_fetched(page: Chrome, page_file: Path) -> None:
    assert [s.get_attribute("id") for s in page.find_elements(By.CSS_SELECTOR, "main > section")] == SECTIONS
    assert page.execute_script("return performance.getEntriesByType('resource').length") == 0
    text = page_file.read_text()
    outside = text.split("<script>")[0] + text.split("</script>")[-1]
    assert not re.search(r"(src|href)\s*=\s*[\"']?(https?:)?//", outside)


def test_every_figure_is_drawn_without_a_word_on_the_console(page: Chrome) -> None:
    for section in SECTIONS[1:8]:
        drawn(page, section)
    assert page.get_log("browser") == []
    assert len(page.find_elements(By.CSS_SELECTOR, "#error .heatmaplayer image")) == 1


def test_a_heading_sorts_best_first_and_full_precision_stays(page: Chrome) -> None:
    click(page, "ppl/boolq@512")
    values = [float(text.split()[0]) for text in column(page, "ppl/boolq@512")]
    assert len(values) == 15 and values == sorted(values)
    heading = page.find_element(By.CSS_SELECTOR, "th[aria-sort=ascending]")
    assert heading.text.startswith("ppl/boolq@512")
    click(page, "ppl/boolq@512")
    assert [float(t.split()[0]) for t in column(page, "ppl/boolq@512")] == values[::-1]
    click(page, "piqa acc %")
    accuracies = [float(text.split()[0]) for text in column(page, "piqa acc %")]
    assert accuracies == sorted(accuracies, reverse=True)
    click(page, "method")
    assert column(page, "method") == sorted(column(page, "method"))
    first = page.find_element(By.CSS_SELECTOR, "#results-table tbody tr")
    assert first.text.startswith("full precision")


def test_the_best_is_bold_and_seeds_are_one_row(page: Chrome) -> None:
    ppl = column(page, "ppl/boolq@512")
    assert set(column(page, "seeds")) == {"3"}
    assert all(re.fullmatch(r"[\d.]+ \[[\d.]+, [\d.]+\]", text) for text in ppl)
    bold = [element.text for element in page.find_elements(By.CSS_SELECTOR, "tbody.quantized strong")]
    assert min(ppl, key=lambda text: float(text.split()[0])).split()[0] in bold


def test_rows_are_filtered(page: Chrome) -> None:
    page.find_element(By.ID, "filter").send_keys("billm")
    shown = [row.text for row in page.find_elements(By.CSS_SELECTOR, "tbody.quantized tr") if row.is_displayed()]
    assert len(shown) == 3 and all(text.startswith("billm") for text in shown)
    assert page.find_element(By.ID, "shown").text == "3 of 15 results"


def test_another_chart_of_a_figure_is_chosen(page: Chrome) -> None:
    drawn(page, "error")
    select = Select(page.find_element(By.CSS_SELECTOR, "#error select"))
    assert len(select.options) == 40  # of 45 runs
    z = "return JSON.stringify([...document.querySelector('#error .chart').calcdata[0][0].z].map((row) => [...row]))"
    before = page.execute_script(z)
    select.select_by_index(3)
    WebDriverWait(page, 10).until(lambda b: b.execute_script(z) != before)
    assert len(json.loads(page.execute_script(z))[0]) == N_BLOCKS


def test_the_runs_behind_a_figure_tell_their_configuration_and_commit(page: Chrome) -> None:
    page.find_element(By.CSS_SELECTOR, "#loss details.behind summary").click()
    WebDriverWait(page, 10).until(lambda b: b.find_elements(By.CSS_SELECTOR, "#loss details.behind tbody tr"))
    rows = page.find_elements(By.CSS_SELECTOR, "#loss details.behind tbody tr")
    assert len(rows) == 40
    assert "01234567" in rows[0].text and "method.name=ptq161" in rows[0].text and "sweep/0" in rows[0].text
    shared = page.find_element(By.CSS_SELECTOR, "#runs dl").get_attribute("textContent")
    assert "calib.n_samples" in shared


def test_what_could_not_be_read_is_shown_as_text(page: Chrome) -> None:
    problems = page.find_element(By.ID, "problems").text
    assert "schema_version 0" in problems and "truncated or no JSON object" in problems
    assert "<b>on is skipped: it has no results (state: running)" in problems


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_screenshot_is_not_blank(page: Chrome, scheme: str) -> None:
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    drawn(page, "bits")
    image = np.asarray(Image.open(io.BytesIO(page.get_screenshot_as_png())).convert("L"), dtype=float)
    assert (np.median(image) > 200) == (scheme == "light")
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    chart = page.find_element(By.CSS_SELECTOR, "#bits .chart").screenshot_as_png
    pixels = np.asarray(Image.open(io.BytesIO(chart)).convert("RGB")).reshape(-1, 3)
    assert len(np.unique(pixels, axis=0)) > 50


def test_a_narrow_page_does_not_overflow(page: Chrome) -> None:
    page.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 400, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    )
    drawn(page, "bits")
    WebDriverWait(page, 10).until(lambda b: b.execute_script("return document.documentElement.scrollWidth") <= 400)
    page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_charts_are_what_plotly_knows(page_file: Path) -> None:
    scripts = re.findall(r'<script type="application/json" class="charts">(.*?)</script>', page_file.read_text())
    charts = [chart for script in scripts for chart in json.loads(script)]
    assert len(charts) > 80
    for chart in charts[::7]:
        go.Figure(chart)  # refuses unknown attributes and wrong values


@pytest.mark.slow
def test_a_thousand_runs_are_a_page_in_no_more_than_three_times_ten_runs(tmp_path: Path, browser: Chrome) -> None:
    write_records(tmp_path / "few", 10, with_metrics=10)
    write_records(tmp_path / "many", N_RUNS, with_metrics=100)
    # The processor's seconds, beside those of a small page: what else a machine does, and how fast it is, count twice.
    few = seconds_of_a_report(tmp_path / "few", tmp_path / "small")
    assert seconds_of_a_report(tmp_path / "many", tmp_path / "out") < 3 * few
    file = tmp_path / "out" / "index.html"
    assert file.stat().st_size < 8e6
    browser.get(file.as_uri())
    drawn(browser, "bits")
    load = "return performance.getEntriesByType('navigation')[0].loadEventEnd"
    assert browser.execute_script(load) < 1000 * SECONDS_TO_LOAD
    assert browser.find_element(By.ID, "shown").text == "334 of 334 results"
    assert browser.get_log("browser") == []


def seconds_of_a_report(runs: Path, out: Path) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "ptq161.report", str(runs), "--out", str(out)], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
