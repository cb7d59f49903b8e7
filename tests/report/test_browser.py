"""The report in a real browser: every figure drawn, no error, no request; skipped where there is no chromium."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browsers import needs_browser, open_browser, requests, show
from report_runs import EXPERTS, LAYERS, write_run

from perilune.pretrain.report import page

pytestmark = needs_browser
LINE_PLOTS = 11

# What a curve shows: its path leads somewhere, or it has dots. What a heat map shows: more than one colour.
DRAWN = """
return [...document.querySelectorAll('figure')].map(figure => {
  const curves = [...figure.querySelectorAll('path.curve')].map(path => Math.max(path.getBBox().width,
    path.nextSibling.getBBox().width));
  const canvas = figure.querySelector('canvas');
  let colours = 0;
  if (canvas) {
    const pen = new OffscreenCanvas(canvas.width, canvas.height).getContext('2d', {willReadFrequently: true});
    pen.drawImage(canvas, 0, 0);
    colours = new Set(new Uint32Array(pen.getImageData(0, 0, canvas.width, canvas.height).data.buffer)).size;
  }
  return {title: figure.querySelector('b').textContent, curves, colours, drawn: +figure.dataset.drawn,
    labels: [...figure.querySelectorAll('.drawing text')].map(text => text.textContent)};
});
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with open_browser(tmp_path_factory.mktemp("profile")) as driver:
        yield driver


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A run longer than its plot has buckets, with skipped steps and a restart, and a short one, of other lengths."""
    home = tmp_path_factory.mktemp("runs")
    skipped = {step: {"loss": None, "grad_norm": None, "skipped": True} for step in (500, 501, 502, 900)}
    starts = [{"step": 0}, {"step": 600}]
    return [
        write_run(home / "long", 1500, "optim.lr=0.002", changes=skipped, starts=starts),
        write_run(home / "<i>short", 30, seed=1),
    ]


def _settle(browser: Any) -> None:
    """Until the page has heard of another width or other colours: a browser tells it with the next frame."""
    browser.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(arguments[0]))")


def _assert_quiet(browser: Any, file: Path) -> None:
    """Nothing on the console, no figure failed, and nothing asked for but the page."""
    assert browser.get_log("browser") == []
    assert browser.execute_script("return document.documentElement.dataset.fault ?? null") is None
    assert requests(browser) <= {file.as_uri()}


def _assert_drawn(browser: Any, line_plots: int, curves: int, heat_maps: int) -> list[dict[str, Any]]:
    figures: list[dict[str, Any]] = browser.execute_script(DRAWN)
    lines = [figure for figure in figures if figure["colours"] == 0]
    assert len(lines) == line_plots and len(figures) - len(lines) == heat_maps
    assert sum(len(figure["curves"]) for figure in lines) == curves
    for figure in figures:
        assert figure["drawn"] > 0, figure["title"]
        assert all(width > 5 for width in figure["curves"]), f"{figure['title']}: a curve that shows nothing"
        assert len(figure["labels"]) >= 4, f"{figure['title']}: axes without numbers"
        assert not {"NaN", "Infinity", "undefined"} & set(figure["labels"]), figure
    for figure in figures[len(lines) :]:
        assert figure["colours"] != 1, f"{figure['title']}: one colour only"
    return figures


def test_every_figure_of_a_run_is_drawn(browser: Any, runs: list[Path]) -> None:
    file = page.write_report(runs[0])
    show(browser, file)
    _assert_drawn(browser, LINE_PLOTS, curves=13, heat_maps=1 + LAYERS)
    marks = browser.execute_script("return ['.skip', '.start', '.band'].map(c => document.querySelectorAll(c).length)")
    assert marks == [LINE_PLOTS, LINE_PLOTS, 11]  # bands: not where each bucket is one step, as in validation
    spans = browser.execute_script("return document.querySelector('.skip').getAttribute('d').split('M').length - 1")
    assert spans == 2
    _assert_quiet(browser, file)


def test_every_figure_of_a_comparison_is_drawn_and_runs_can_be_hidden(browser: Any, runs: list[Path]) -> None:
    file = page.write_report(runs[0], runs[1:], runs[0].parent / "comparison.html")
    show(browser, file)
    _assert_drawn(browser, LINE_PLOTS, curves=26, heat_maps=2 * (1 + LAYERS))
    assert browser.execute_script("return document.querySelectorAll('i:not([class])[style], main i > *').length") == 0
    boxes = browser.find_elements("css selector", "#runs input")
    assert [box.find_element("xpath", "..").text for box in boxes] == ["long", "<i>short"]
    boxes[0].click()
    figures = browser.execute_script(DRAWN)
    assert sum(len(figure["curves"]) for figure in figures) == 13
    assert "30" in figures[0]["labels"], "the axis ends with the run that is left"
    _assert_quiet(browser, file)


def test_zoom_tooltip_smoothing_tokens_and_logarithm(browser: Any, runs: list[Path]) -> None:
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.support.ui import Select

    file = page.write_report(runs[0])
    show(browser, file)
    plot = browser.find_element("css selector", "figure .drawing svg")
    ActionChains(browser).move_to_element(plot).perform()
    tip = browser.find_element("id", "tip").text
    assert "step" in tip and "tokens" in tip and "next token" in tip and "nats/token" in tip
    assert len(browser.find_elements("css selector", ".cursor[visibility=visible]")) == LINE_PLOTS + 1 + LAYERS
    heat = browser.find_element("css selector", "[data-load] figure .drawing svg")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", heat)
    ActionChains(browser).move_to_element(heat).perform()
    assert "× the even share" in browser.find_element("id", "tip").text
    assert "expert " in browser.find_element("id", "tip").text

    plot = browser.find_element("css selector", "figure .drawing svg")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", plot)
    ActionChains(browser).move_to_element_with_offset(plot, -50, 0).click_and_hold().move_by_offset(
        100, 0
    ).release().perform()
    low, high = browser.execute_script("return view.zoom")
    assert 400 < low < high < 1000
    _assert_drawn(browser, LINE_PLOTS, curves=13, heat_maps=1 + LAYERS)
    browser.find_element("id", "reset").click()
    assert browser.execute_script("return view.zoom") is None

    before = browser.execute_script("return document.querySelector('.curve').getAttribute('d')")
    browser.execute_script("smooth.value = 0.9; smooth.dispatchEvent(new Event('input'))")
    assert browser.execute_script("return document.querySelector('.curve').getAttribute('d')") != before
    Select(browser.find_element("id", "along")).select_by_value("tokens")
    figures = _assert_drawn(browser, LINE_PLOTS, curves=13, heat_maps=1 + LAYERS)
    assert all("6M" in figure["labels"] for figure in figures), "1,500 steps of 4,096 tokens: 6.1M"
    for button in browser.find_elements("css selector", "figcaption button"):
        browser.execute_script("arguments[0].click()", button)
    _assert_drawn(browser, LINE_PLOTS, curves=13, heat_maps=1 + LAYERS)
    _assert_quiet(browser, file)


def test_dark_narrow_and_printed(browser: Any, runs: list[Path]) -> None:
    file = page.write_report(runs[0])
    show(browser, file)
    look = "return [document.body, document.querySelector('figure')].map(e => getComputedStyle(e).backgroundColor)"
    colours = "return document.querySelector('[data-load] canvas').toDataURL()"
    light, map_light = browser.execute_script(look), browser.execute_script(colours)
    dark = {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", dark)
    _settle(browser)
    try:
        assert browser.execute_script(look) != light
        assert browser.execute_script(colours) != map_light, "heat maps are drawn in the new colours"
        for width in (480, 1200):
            browser.set_window_size(width, 1200)
            _settle(browser)
            _assert_drawn(browser, LINE_PLOTS, curves=13, heat_maps=1 + LAYERS)
            wide = browser.execute_script("return document.documentElement.scrollWidth - window.innerWidth")
            assert wide <= 0, "the page does not scroll sideways"
    finally:
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    _assert_quiet(browser, file)


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_the_first_steps_are_shown(browser: Any, tmp_path: Path, steps: int) -> None:
    file = page.write_report(write_run(tmp_path / "run", steps, planned=10))
    show(browser, file)
    figures = browser.execute_script(DRAWN)
    assert len(figures) == (LINE_PLOTS - 2 + 1 + LAYERS if steps else 0)  # not validated yet
    assert all(figure["drawn"] > 0 and all(width > 3 for width in figure["curves"]) for figure in figures)
    _assert_quiet(browser, file)


def test_a_run_of_nulls_and_one_of_zeros_make_no_error(browser: Any, tmp_path: Path) -> None:
    keys = (
        "loss",
        "mtp_loss",
        "aux_loss",
        "grad_norm",
        "lr",
        "mfu",
        "data_wait_s",
        "max_vio_mean",
        "max_vio_max",
        "memory",
    )
    nulls = write_run(tmp_path / "nulls", 3, changes={s: dict.fromkeys(keys) for s in (1, 2, 3)})
    zeros = write_run(tmp_path / "zeros", 50, changes={s: dict.fromkeys(keys, 0) for s in range(1, 51)})
    empty = [[0] * EXPERTS] * LAYERS
    (zeros / "expert_load.jsonl").write_text(
        "".join(json.dumps({"step": s, "load": empty}) + "\n" for s in range(1, 51))
    )
    for runs in ([nulls], [zeros], [nulls, zeros]):
        file = page.write_report(runs[0], runs[1:], tmp_path / "out.html")
        show(browser, file)
        figures = browser.execute_script(DRAWN)
        assert figures and not any("NaN" in figure["labels"] for figure in figures)
        _assert_quiet(browser, file)


def test_a_figure_that_fails_is_named(browser: Any, tmp_path: Path) -> None:
    """So that the tests above can fail: a page with damaged data says so, on the page and on the console."""
    file = page.write_report(write_run(tmp_path / "run", 5))
    file.write_text(file.read_text().replace('"maxVio":', '"maxVia":'))
    show(browser, file)
    assert "could not be drawn" in browser.find_element("id", "fault").text
    assert [line["level"] for line in browser.get_log("browser")] == ["SEVERE"]
