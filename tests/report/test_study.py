"""The page of a study: that all it shows is there, and says what the tables say."""

import csv
import re
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from leadline import LeadlineError
from leadline.query import open_run
from leadline.report.plots import finished, save_chart
from leadline.report.study import COLUMNS, TILE, _lines, write_study
from leadline.study.analyses import ANALYSES, material_of
from leadline.study.ensembles import read_ensembles
from leadline.study.networks import Networks

ONLY = ("kinds", "layers", "members", "convergence")
SVG = "{http://www.w3.org/2000/svg}"
TABLES = {
    "claims", "kinds", "kinds_by_layer", "probe_accuracy", "how_many_members", "probes_by_step", "depth_by_step",
    "step_of_convergence",
}  # fmt: skip


@pytest.fixture(scope="module")
def study(studied_run, tmp_path_factory):
    """The folder of a study, and the lines that were told."""
    folder, told = tmp_path_factory.mktemp("studies") / "new" / "studied", []
    assert write_study(studied_run, folder, ONLY, tell=told.append) == folder / "page.md"
    assert sorted(told) == sorted(ONLY)
    return folder


def test_all_that_the_page_names_is_there_and_nothing_else(study):
    text = (study / "page.md").read_text()
    links = re.findall(r"\]\(([^)]*)\)", text)
    assert {link for link in links if link.endswith(".csv")} == {f"{name}.csv" for name in TABLES}
    assert len(set(links)) == len(links)
    assert {place.name for place in study.iterdir()} == {*links, "page.md", "tables"}
    assert all((study / link).stat().st_size for link in links)
    head = text.split("## ")[0]
    for words in ("# Study of studied", "1,797 points", "359 labels corrupted", "k = 30", "mlp-at-20: 4 members"):
        assert words in head, head
    assert "nan" not in text.lower() and "None" not in text


def test_every_figure_is_an_svg_with_lines(study):
    figures = list(study.glob("*.svg"))
    assert {figure.stem for figure in figures} == TABLES - {"claims", "kinds", "step_of_convergence"}
    for figure in figures:
        root = ElementTree.parse(figure).getroot()
        assert root.tag == f"{SVG}svg"
        drawn = [path.get("d") for path in root.iter(f"{SVG}path") if path.get("aria-roledescription") == "line mark"]
        assert drawn and all("L" in line and "NaN" not in line for line in drawn), figure


def test_files_hold_the_tables_and_the_page_their_values(study, studied_run, tmp_path):
    networks = Networks(studied_run, tmp_path, lambda line: None)
    material = material_of(read_ensembles(studied_run), networks)
    text = (study / "page.md").read_text()
    for name in ("kinds", "layers", "convergence"):
        for table, expected in ANALYSES[name](material).items():
            with (study / f"{table}.csv").open(newline="") as file:
                rows = list(csv.DictReader(file))
            assert len(rows) == len(expected)
            for row, told in zip(rows, expected.to_pylist(), strict=True):
                for key, value in told.items():
                    if isinstance(value, float) and key not in ("low", "high"):
                        assert float(row[key]) == pytest.approx(value, rel=1e-5)
                    elif not isinstance(value, float):
                        assert row[key] == ("" if value is None else str(value))
    last = ANALYSES["convergence"](material)["step_of_convergence"].to_pylist()[-1]
    assert re.search(rf"\| mlp \| 3 \| softmax \| {last['value']:.4g} \([^)]* to [^)]*\) \| 4 \|", text)


def test_typical_images_are_a_line_for_each_kind(study):
    with Image.open(study / "kinds-mlp.png") as sheet:
        assert sheet.size == (TILE * COLUMNS, TILE * 4)
        for line in range(4):
            assert len(np.unique(sheet.crop((0, line * TILE, TILE, (line + 1) * TILE)))) > 3


def test_a_study_again_replaces_the_page(tiny_run, tmp_path):
    first = write_study(tiny_run, tmp_path, ["members"], tell=lambda line: None).read_text()
    assert write_study(tiny_run, tmp_path, ["members"], tell=lambda line: None).read_text() == first
    assert "corrupted" not in first and sorted(place.name for place in tmp_path.iterdir()) == [
        "how_many_members.csv", "how_many_members.svg", "page.md", "tables",
    ]  # fmt: skip


def test_an_analysis_made_alone_leaves_the_others_in_the_page(tiny_run, tmp_path):
    def page(*only, run=tiny_run):
        return write_study(run, tmp_path, only, tell=lambda line: None).read_text()

    both = page("kinds", "members")
    assert page("members") == both and "## Kinds of difficulty" in both and "## How many members" in both
    other = open_run(tiny_run.directory.root)
    other.manifest = {**other.manifest, "files": {**other.manifest["files"], "learning/new": "0"}}
    assert "## Kinds of difficulty" not in page("members", run=other)


def test_an_unknown_analysis_is_refused(tiny_run, tmp_path):
    with pytest.raises(LeadlineError, match=r"--only: 'magic' is no analysis; allowed: relations, .*, accuracy") as no:
        write_study(tiny_run, tmp_path / "study", ["kinds", "magic"])
    assert len(str(no.value).splitlines()) == 1 and not (tmp_path / "study").exists()


def test_runs_trained_again_are_refused_where_nobody_compares_them(tiny_run, tmp_path):
    with pytest.raises(LeadlineError, match=r"--again.*name it in --only"):
        write_study(tiny_run, tmp_path / "study", ["kinds"], [tiny_run], tell=lambda line: None)
    assert not (tmp_path / "study").exists()


def test_more_lines_than_colours_that_all_eyes_tell_apart_are_told_apart(tmp_path):
    rows = [
        {"x": x, "value": layer + x, "low": None, "layer": f"{layer} of many", "panel of": panel}
        for panel in ("second", "first")
        for layer in range(11)
        for x in (0, 1)
    ]
    save_chart(finished(_lines(rows, "x", "layer", ["panel of"], "y"), "many", []), tmp_path / "many.svg")
    svg = ElementTree.parse(tmp_path / "many.svg").getroot()
    lines = [path for path in svg.iter(f"{SVG}path") if path.get("aria-roledescription") == "line mark"]
    assert len(lines) == 22 and len({line.get("stroke") for line in lines}) == 11
    headers = [text.text for text in svg.iter(f"{SVG}text") if text.text in ("first", "second")]
    assert headers == ["second", "first"]


def test_a_run_that_is_not_this_one_again_is_refused_at_once(studied_run, tiny_run, tmp_path):
    told = []
    with pytest.raises(LeadlineError, match="tiny: no architecture"):
        write_study(studied_run, tmp_path, others=[tiny_run], tell=told.append)
    assert told == []
