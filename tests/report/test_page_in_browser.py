"""The report in a real browser, opened from disk: charts are drawn, and names of the user's stay text."""

import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from leadline.query import open_run
from leadline.report.page import write_report

SCRIPT = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def run(tiny_run, tmp_path_factory):
    """The tiny run, with a class whose name is markup."""
    root = tmp_path_factory.mktemp("runs") / "named"
    shutil.copytree(tiny_run.directory.root, root)
    table = pq.ParquetFile(root / "points.parquet").read()
    names = [SCRIPT if name == "3" else name for name in table["label_name"].to_pylist()]
    place = table.column_names.index("label_name")
    pq.write_table(table.set_column(place, "label_name", pa.array(names)), root / "points.parquet")
    return open_run(root)


@pytest.fixture(params=["light", "dark"])
def opened(request, browser, run, tmp_path):
    """The browser with the page in it, on a screen as wide as a phone's where it is dark."""
    write_report(run, tmp_path / "page.html")
    browser.console()
    dark = {"features": [{"name": "prefers-color-scheme", "value": request.param}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", dark)
    browser.set_window_size(420 if request.param == "dark" else 1200, 900)
    browser.get((tmp_path / "page.html").as_uri())
    yield browser, request.param
    assert browser.console() == []
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    browser.set_window_size(1280, 1000)


def test_every_chart_has_its_marks_and_nothing_is_cut_off(opened):
    from selenium.webdriver.support.ui import WebDriverWait

    browser, scheme = opened
    marks_of = "at => at.querySelectorAll('svg .mark-symbol path, svg .mark-rect path').length"
    drawn = f"return [...document.querySelectorAll('.chart')].map({marks_of})"
    WebDriverWait(browser, 60).until(lambda _: min(browser.execute_script(drawn)) > 0)
    marks = browser.execute_script(drawn)
    titles = browser.execute_script("return [...document.querySelectorAll('figcaption h3')].map(at => at.textContent)")
    found = dict(zip(titles, marks, strict=True))
    assert len(found) == 9
    assert found["How right is each layer?"] >= 2 * 5  # two lines over five probes
    assert found["How do members differ?"] >= 3 and found["Which classes are deep?"] >= 2 * 10
    assert found["Easy, ambiguous, or like another class?"] > 3
    # No chart and no table is wider than the page, but for those that scroll in their own place.
    assert browser.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
    ground, text = browser.execute_script(
        "const of = getComputedStyle(document.body); return [of.backgroundColor, of.color]"
    )
    lightness = [sum(map(int, colour[4:-1].split(",")[:3])) for colour in (ground, text)]
    assert (lightness[0] < lightness[1]) == (scheme == "dark")


def test_a_label_s_name_is_text(opened):
    browser, _ = opened
    assert SCRIPT in browser.execute_script("return document.querySelector('.images').parentElement.innerText")
    scripts = browser.execute_script("return [...document.scripts].map(at => at.textContent)")
    assert not any(text.startswith("alert") for text in scripts)
    assert browser.execute_script("return typeof window.vegaEmbed") == "function"


def test_a_report_of_clothes_shows_them(browser, clothes_run, tmp_path):
    from selenium.webdriver.support.ui import WebDriverWait

    write_report(clothes_run, tmp_path / "page.html")
    browser.console()
    browser.get((tmp_path / "page.html").as_uri())
    browser.execute_script("document.querySelectorAll('img').forEach((image) => { image.loading = 'eager'; })")
    shown = "return [...document.images].map((image) => image.complete && image.naturalWidth)"
    WebDriverWait(browser, 60).until(lambda _: set(browser.execute_script(shown)) == {28})
    kinds = browser.execute_script("return document.querySelectorAll('.images').length")
    assert kinds == 4 and len(browser.execute_script(shown)) > 24
    drawn = "return document.querySelectorAll('.chart svg .mark-rect path').length"
    WebDriverWait(browser, 60).until(lambda _: browser.execute_script(drawn) > 10)
    assert browser.console() == []
