"""The explorer's page in a real browser: what is drawn, what a brushed region does, and that names stay text."""

import json
import shutil
import urllib.request
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

SCRIPT = "<script>alert(1)</script>"
IMAGE = "<img src=x onerror=alert(2)>"
RECTS = "#plane svg .layer_0_marks path"


@pytest.fixture(scope="module")
def by(browser):
    """selenium's words, where there is a browser."""
    from selenium.webdriver.common.by import By

    return By.CSS_SELECTOR


@pytest.fixture(scope="module")
def ensemble(explored_run):
    return pd.read_parquet(explored_run.directory.root / "ensemble.parquet")


@pytest.fixture(scope="module")
def address(explored_run, explore):
    with explore(explored_run.directory.root) as opened:
        yield opened


@pytest.fixture
def page(browser, by, address):
    """A newly opened page, all of it there; nothing may complain until the test ends."""
    opened = Page(browser, by)
    opened.open(address)
    yield opened
    assert browser.console() == []


class Page:
    def __init__(self, browser, by):
        self.browser, self.by = browser, by

    def open(self, address):
        self.browser.console()
        self.browser.get(address)
        self.until(lambda: self.all("#gallery .card") and self.all(RECTS))

    def until(self, true, seconds=60):
        from selenium.common.exceptions import StaleElementReferenceException
        from selenium.webdriver.support.ui import WebDriverWait

        wait = WebDriverWait(self.browser, seconds, ignored_exceptions=[StaleElementReferenceException])
        return wait.until(lambda _: true())

    def all(self, selector):
        return self.browser.find_elements(self.by, selector)

    def one(self, selector):
        return self.browser.find_element(self.by, selector)

    def text(self, selector):
        return self.one(selector).text

    def keys(self):
        """Of the points in the gallery."""
        return self.browser.execute_script(
            "return [...document.querySelectorAll('#gallery .card')].map((card) => card.title)"
        )

    def choose(self, name, text):
        from selenium.webdriver.support.ui import Select

        Select(self.one(name)).select_by_visible_text(text)

    def brush(self, begin, end):
        """Drag over the plane, between places that are shares of it from its left and its top."""
        from selenium.webdriver.common.action_chains import ActionChains

        middle = self.one("#plane svg .background")  # the outermost one, of the plane itself
        width, height = middle.size["width"], middle.size["height"]
        places = [((x - 0.5) * width, (y - 0.5) * height) for x, y in (begin, end)]
        (x, y), (to_x, to_y) = places
        moves = ActionChains(self.browser).move_to_element_with_offset(middle, int(x), int(y)).click_and_hold()
        moves.move_by_offset(int((to_x - x) / 2), int((to_y - y) / 2))
        moves.move_by_offset(int((to_x - x) / 2), int((to_y - y) / 2)).release().perform()

    def loaded(self, selector):
        """Whether all pictures there, one at least, have pixels."""
        return self.browser.execute_script(
            "const found = [...document.querySelectorAll(arguments[0])];"
            "found.forEach((image) => { image.loading = 'eager'; });"
            "return found.length > 0 && found.every((image) => image.complete && image.naturalWidth > 0)",
            selector,
        )


def points(n):
    return f"{n:,} point{'' if n == 1 else 's'}"


def asked(address, path):
    with urllib.request.urlopen(f"{address.rstrip('/')}{path}", timeout=60) as answer:
        return json.load(answer)


def test_the_page_draws_the_plane_the_kinds_and_the_points(page, address, ensemble):
    plane = asked(address, "/plane?architecture=mlp")
    rects = page.all(RECTS)
    assert len(rects) == len(plane["bins"]) > 5
    assert len({rect.get_attribute("fill") for rect in rects}) > 2  # more points, another colour
    assert len(page.all("#plane svg .layer_1_marks line, #plane svg .layer_2_marks line")) == 2  # the thresholds
    assert page.text("#gallery-title") == "1,797 points" and len(page.keys()) == 48
    rows = [[cell.text for cell in row.find_elements(page.by, "td")] for row in page.all("#kinds tbody tr")]
    assert [row[-1] for row in rows] == [f"{n:,}" for n in plane["kinds"]]
    both = ensemble[["mean_depth_held_out", "mean_depth_training"]].notna().all(axis=1)
    assert sum(plane["kinds"]) == both.sum() and points((~both).sum()) in page.text("#unplaced")
    page.until(lambda: page.loaded("#gallery img"))
    assert "1,797 points" in page.text("#about") and "k = 10" in page.text("#about")


def test_all_that_the_page_needs_comes_from_its_server(page, address):
    names = page.browser.execute_script("return performance.getEntries().map((entry) => entry.name)")
    fetched = [name for name in names if "://" in name]
    assert any(name.endswith("vega.js") for name in fetched) and all(name.startswith(address) for name in fetched)


def test_a_brushed_region_changes_the_gallery(page, ensemble):
    before = page.keys()
    page.brush((0.3, 0.05), (0.98, 0.6))
    page.until(lambda: page.text("#gallery-title") != "1,797 points")
    sides = {
        name: float(page.one(f"#region [name={name}]").get_attribute("value"))
        for name in ("held_out_from", "held_out_to", "training_from", "training_to")
    }
    assert 0 < sides["held_out_from"] < sides["held_out_to"] and 0 < sides["training_from"] < sides["training_to"]
    chosen = ensemble[
        ensemble.mean_depth_held_out.between(sides["held_out_from"], sides["held_out_to"])
        & ensemble.mean_depth_training.between(sides["training_from"], sides["training_to"])
    ]
    assert 0 < len(chosen) < len(ensemble)
    page.until(lambda: page.text("#gallery-title") == points(len(chosen)))
    assert page.keys() != before and set(page.keys()) <= {f"train/{point:05d}" for point in chosen.point_id}
    assert "held_out_from" in page.one("#csv").get_attribute("href")
    page.one("#whole").click()
    page.until(lambda: page.text("#gallery-title") == "1,797 points")
    page.until(lambda: page.keys() == before)


def test_images_of_clothes_are_shown_and_a_brush_changes_which(browser, by, clothes_run, explore):
    page = Page(browser, by)
    with explore(clothes_run.directory.root) as address:
        page.open(address)
        page.until(lambda: page.loaded("#gallery img"))
        size = "return [...document.querySelectorAll('#gallery img')].map((image) => image.naturalWidth)"
        assert set(browser.execute_script(size)) == {28}
        before = page.keys()
        page.brush((0.3, 0.05), (0.98, 0.6))
        page.until(lambda: page.text("#gallery-title") != "1,200 points" and page.keys() != before)
        page.until(lambda: page.loaded("#gallery img"))
        assert browser.console() == []


def test_a_region_can_be_typed_and_is_drawn(page, ensemble):
    from selenium.webdriver.common.keys import Keys

    page.one("#region [name=held_out_from]").send_keys("2", Keys.TAB)
    n = int((ensemble.mean_depth_held_out >= 2).sum())
    page.until(lambda: page.text("#gallery-title") == points(n))
    page.until(lambda: any(mark.size["width"] > 20 for mark in page.all("#plane svg [class*=region_brush] path")))


def test_filters_order_and_pages(page, ensemble):
    page.choose("#filters [name=label]", "7")
    of_class = ensemble[ensemble.label == 7]
    page.until(lambda: page.text("#gallery-title") == points(len(of_class)))
    page.choose("#sort", "id")
    page.choose("#descending", "smallest first")
    keys = [f"train/{point:05d}" for point in sorted(of_class.point_id)]
    page.until(lambda: page.keys() == keys[:48])
    page.one("#after").click()
    page.until(lambda: page.keys() == keys[48:96])
    assert page.text("#shown") == "49 to 96"
    page.one("#before").click()
    page.until(lambda: page.keys() == keys[:48])
    assert not page.one("#filters [name=depth]").is_enabled()
    page.choose("#filters [name=member]", "mlp-0")
    page.choose("#filters [name=probe]", "1 hidden.0")
    page.until(lambda: page.text("#gallery-title") != points(len(of_class)))
    page.one("#all").click()
    page.until(lambda: page.text("#gallery-title") == "1,797 points")


def test_a_point_shows_its_votes_its_learning_and_its_neighbours(page, address, explored_run):
    from selenium.webdriver.common.keys import Keys

    page.one("#gallery .card").click()
    page.until(lambda: page.all("#point[open] .trail td"))
    point = int(page.text("#point-title").rpartition(" ")[2])
    found = asked(address, f"/points/{point}?architecture=mlp")
    cells = [[cell.text for cell in row.find_elements(page.by, "td")[3:]] for row in page.all(".trail tbody tr")]
    assert cells == [
        [f"{winner} {votes}" for winner, votes in zip(member["winner"], member["winner_votes"], strict=True)]
        for member in found["members"]
    ]
    page.until(lambda: page.loaded("#point .head img"))
    marks = ".chart svg .mark-symbol path"
    page.until(lambda: len(page.all(f"#point {marks}")) >= len(found["learning"]) > 10)
    lines = [line.get_attribute("d") for line in page.all("#point .chart svg .mark-line path")]
    assert lines and all("L" in line and "NaN" not in line for line in lines)
    page.one("#find").click()
    page.until(lambda: len(page.all("#point .neighbours .card")) == 10)
    page.until(lambda: page.loaded("#point .neighbours img"))
    member = found["members"][0]["member"]
    expected = asked(address, f"/neighbours?point_id={point}&member={member}&probe=0")
    depths = pd.read_parquet(explored_run.directory.root / "depths" / f"member={member}").set_index("point_id")
    assert all(depths.in_training[row["point_id"]] and row["point_id"] != point for row in expected)
    page.all("#point .neighbours .card")[0].click()  # a neighbour is a point too
    page.until(lambda: page.text("#point-title").endswith(f"point {expected[0]['point_id']}"))
    page.browser.switch_to.active_element.send_keys(Keys.ESCAPE)
    page.until(lambda: not page.all("#point[open]"))


def test_typed_sql_is_answered_or_refused_as_text(page, ensemble):
    def ask(query):
        page.one("#query").clear()
        page.one("#query").send_keys(query)
        page.one("#ask").click()
        page.until(lambda: page.text("#answered") not in ("", "asking …"))

    ask("SELECT label, count(*) AS n FROM ensemble GROUP BY label ORDER BY label")
    rows = [[cell.text for cell in row.find_elements(page.by, "td")] for row in page.all("#answer tbody tr")]
    assert rows == [[str(label), str(n)] for label, n in ensemble.groupby("label").size().items()]
    assert page.text("#answered") == "10 rows"
    ask("SELECT point_id FROM depths")
    assert (
        page.text("#answered") == "the first 1,000 rows; there are more" and len(page.all("#answer tbody tr")) == 1000
    )
    ask(f"SELECT '{IMAGE}' AS \"{SCRIPT}\"")
    assert page.text("#answer th") == SCRIPT and page.text("#answer td") == IMAGE
    for query in ("SELECT * FROM read_text('/etc/passwd')", "COPY points TO '/tmp/leadline-written.csv'"):
        page.one("#query").clear()
        page.one("#query").send_keys(query)
        page.one("#ask").click()
        page.until(lambda: page.text("#answered").startswith("query: "))
        assert not page.all("#answer table")
    assert not Path("/tmp/leadline-written.csv").exists()
    # The browser tells of the answers 400 that were asked for.
    assert all("/sql" in line and "400" in line for line in page.browser.console())


def test_names_that_are_markup_show_as_text(browser, by, explored_run, explore, tmp_path):
    run = Path(shutil.copytree(explored_run.directory.root, tmp_path / "run"))
    table = pd.read_parquet(run / "points.parquet")
    table.loc[table.label == 3, "label_name"] = SCRIPT
    table["key"] = IMAGE + table.key
    table.to_parquet(run / "points.parquet")
    manifest = json.loads((run / "run.json").read_text())
    manifest["name"] = "a<b>&amp;"
    (run / "run.json").write_text(json.dumps(manifest))
    page = Page(browser, by)
    with explore(run) as address:
        page.open(address)
        assert page.text("#name") == "a<b>&amp;"
        page.choose("#filters [name=label]", SCRIPT)
        page.until(lambda: page.text("#gallery-title") == points(int((table.label == 3).sum())))
        assert {label.text for label in page.all("#gallery .label")} == {SCRIPT}
        page.one("#gallery .card").click()
        page.until(lambda: page.all("#point[open] .trail td"))
        assert IMAGE in page.text("#point-title") and SCRIPT in page.text("#point dl")
        scripts = browser.execute_script("return [...document.scripts].map((script) => script.src)")
        assert len(scripts) == 2 and all(source.startswith(address) for source in scripts)
        assert not page.all("img[src=x], [onerror]")
        with pytest.raises(Exception, match="no such alert"):
            browser.switch_to.alert  # noqa: B018
        assert browser.console() == []


def test_a_damaged_table_is_told_on_the_page(browser, by, explored_run, explore, tmp_path):
    run = Path(shutil.copytree(explored_run.directory.root, tmp_path / "run"))
    votes = run / "votes" / "member=mlp-0" / "part-0.parquet"
    votes.write_bytes(votes.read_bytes()[:-100])
    page = Page(browser, by)
    with explore(run) as address:
        page.open(address)
        page.one("#gallery .card").click()
        page.until(lambda: page.one("#said").is_displayed())
        assert "part-0.parquet" in page.text("#said") and "Traceback" not in page.text("#said")
    browser.console()


@pytest.mark.parametrize("look", ["light", "dark"])
def test_it_fits_a_phone_by_day_and_by_night(browser, by, address, look):
    page = Page(browser, by)
    try:
        browser.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride", {"width": 400, "height": 850, "deviceScaleFactor": 1, "mobile": True}
        )
        media = [{"name": "prefers-color-scheme", "value": look}]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": media})
        page.open(address)
        assert browser.execute_script("return document.documentElement.scrollWidth") <= 400
        assert (
            browser.execute_script("return document.querySelector('#plane svg').getBoundingClientRect().right") <= 400
        )
        page.one("#gallery .card").click()
        page.until(lambda: page.all("#point[open] .trail td"))
        assert browser.execute_script("return document.querySelector('#point').scrollWidth") <= 400
        colour = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
        brightness = np.mean([int(part) for part in colour.strip("rgb()").split(",")])
        assert (brightness < 80) == (look == "dark")
        assert browser.console() == []
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
