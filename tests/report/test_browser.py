"""The page in a real browser: it draws, its switches work, and nothing is requested."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from report.conftest import Home

from sweeper.report.write import write_report

pytestmark = pytest.mark.browser

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
PHONE = (390, 844)
DESKTOP = (1400, 900)

Open = Callable[..., Any]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A headless Chromium; the test is skipped, with the reason, where there is none."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    binary, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if binary is None or driver is None:
        pytest.skip("chromium and chromedriver are not both on the PATH")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    found = webdriver.Chrome(service=webdriver.ChromeService(driver), options=options)
    yield found
    found.quit()


@pytest.fixture(scope="module")
def written(home: Home, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A study's page, written once."""

    @functools.cache
    def write(name: str) -> Path:
        folder = tmp_path_factory.mktemp(name)
        return write_report(home.data(name), home.settings, out=folder).page

    return write


@pytest.fixture
def opened(browser: Any, written: Callable[[str], Path]) -> Open:
    """Opens a study's report as high as it is, so that every figure is in view and drawn."""

    def open_(name: str, size: tuple[int, int] = DESKTOP, *, dark: bool = False) -> Any:
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        _resize(browser, *size)
        browser.get(written(name).as_uri())
        _resize(browser, size[0], browser.execute_script("return document.body.scrollHeight"))
        _wait(
            browser,
            "return [...document.querySelectorAll('.chart')].every("
            "(chart) => chart.layout && chart.layout.font && chart.layout.font.color)",
        )
        return browser

    return open_


def _resize(browser: Any, width: int, height: int) -> None:
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600},
    )


def _wait(browser: Any, script: str) -> None:
    from selenium.webdriver.support.wait import WebDriverWait

    WebDriverWait(browser, 30).until(lambda each: each.execute_script(script))


@pytest.mark.parametrize("name", ["factor", "sweep", "colour"])
def test_every_figure_is_drawn_and_nothing_is_requested(opened: Open, name: str) -> None:
    page = opened(name)
    charts = page.execute_script("return document.querySelectorAll('.chart').length")
    assert charts >= 2
    assert page.execute_script("return document.querySelectorAll('.chart.failed').length") == 0
    assert page.execute_script("return document.querySelectorAll('.main-svg').length") >= charts
    assert page.execute_script("return performance.getEntriesByType('resource').length") == 0
    loud = [entry for entry in page.get_log("browser") if entry["level"] != "INFO"]
    assert loud == []
    assert page.execute_script("return [...document.images].every((i) => i.naturalWidth > 0)")


@pytest.mark.parametrize("name", ["factor", "colour"])
def test_what_a_study_or_its_classes_are_called_runs_nowhere(opened: Open, name: str) -> None:
    """Descriptions, notes and class names hold scripts; every element is the page's own."""
    page = opened(name)
    assert "window.owned=1" in page.find_element("tag name", "body").get_attribute("textContent")
    assert page.execute_script("return typeof window.owned") == "undefined"
    scripts = "return document.querySelectorAll('script:not([type])').length"
    assert page.execute_script(scripts) == 2  # Plotly's and the page's
    strange = "return document.querySelectorAll('[onerror], [onload], img:not([src^=data])').length"
    assert page.execute_script(strange) == 0


@pytest.mark.parametrize("size", [PHONE, DESKTOP])
def test_the_page_is_no_wider_than_the_screen(opened: Open, size: tuple[int, int]) -> None:
    page = opened("factor", size)
    assert page.execute_script("return document.documentElement.scrollWidth") <= size[0]
    assert page.execute_script(
        "return [...document.querySelectorAll('.chart')].every((chart) => "
        "chart.querySelector('.svg-container').offsetWidth <= chart.offsetWidth + 1)"
    )


def test_colours_follow_the_system(opened: Open) -> None:
    ink = "return document.querySelector('.chart').layout.font.color"
    paper = "return getComputedStyle(document.body).backgroundColor"
    light = opened("factor")
    assert (light.execute_script(ink), light.execute_script(paper)) == (
        "#1b2228",
        "rgb(255, 255, 255)",
    )
    dark = opened("factor", dark=True)
    assert (dark.execute_script(ink), dark.execute_script(paper)) == ("#e5e9ed", "rgb(20, 24, 28)")


def test_the_legend_hides_a_line_in_all_four_figures(opened: Open) -> None:
    page = opened("factor")
    shown = (
        "return [...document.querySelectorAll('#curves .chart')].map((chart) => chart.data.filter("
        "(trace) => trace.visible !== false && trace.legendgroup === 'line0').length)"
    )
    assert page.execute_script(shown) == [2, 2, 2, 2]  # the line and its band
    button = page.find_element("css selector", "[data-line=line0]")
    button.click()
    assert page.execute_script(shown) == [0, 0, 0, 0]
    assert button.get_attribute("aria-pressed") == "false"
    button.click()
    assert page.execute_script(shown) == [2, 2, 2, 2]


def test_the_log_switches_turn_the_losses_axes(opened: Open) -> None:
    page = opened("factor")
    axes = (
        "return [...document.querySelectorAll('#curves .chart')].map("
        "(chart) => [chart.layout.xaxis.type, chart.layout.yaxis.type])"
    )
    assert page.execute_script(axes)[0] == ["linear", "linear"]
    page.find_element("css selector", "[data-axis=y]").click()
    assert [y for _, y in page.execute_script(axes)] == ["log", "log", "linear", "linear"]
    page.find_element("css selector", "[data-axis=x]").click()
    assert [x for x, _ in page.execute_script(axes)] == ["log"] * 4


def test_an_axis_keeps_its_range_when_a_line_is_hidden(opened: Open) -> None:
    """Losses of lines that diverged are cut by a range, which must outlive the first click."""
    page = opened("factor")
    chart = "document.getElementById('curves-train-loss')"
    page.execute_script(f"return Plotly.relayout({chart}, {{'yaxis.range': [0.5, 3]}})")
    page.find_element("css selector", "[data-line=line0]").click()
    assert page.execute_script(f"return {chart}.layout.yaxis.range") == [0.5, 3]
    page.find_element("css selector", "[data-axis=y]").click()
    low, high = page.execute_script(f"return {chart}.layout.yaxis.range")
    assert (10**low, 10**high) == pytest.approx((0.5, 3))


def test_a_click_on_a_heading_sorts_and_a_second_turns_round(opened: Open) -> None:
    page = opened("factor")
    column = "return [...document.querySelectorAll('#table-leaderboard tbody tr')].map("
    column += "(line) => line.children[1].textContent)"
    button = page.find_element("css selector", "#table-leaderboard thead th:nth-child(2) .sort")
    button.click()
    assert page.execute_script(column) == ["2", "4"]
    button.click()
    assert page.execute_script(column) == ["4", "2"]
    head = page.find_element("css selector", "#table-leaderboard th[aria-sort]")
    assert head.get_attribute("aria-sort") == "descending"
