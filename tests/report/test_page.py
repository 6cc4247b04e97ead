"""The report: one page that needs nothing else, and says what the tables say."""

import io
import json
import re
import shutil
from base64 import b64decode
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from sklearn.datasets import load_digits

import leadline
from leadline.query import open_run
from leadline.report.page import HARDEST, write_report
from leadline.study.kinds import KINDS


class Page(HTMLParser):
    """Every tag with its attributes, and text by the tag that it stands in."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.texts, self.open = [], {}, []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.open.append(tag)

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data):
        if self.open:
            self.texts.setdefault(self.open[-1], []).append(data)


@pytest.fixture(scope="module")
def text(studied_run, tmp_path_factory):
    place = tmp_path_factory.mktemp("report") / "new" / "page.html"
    write_report(studied_run, place)
    assert [path.name for path in place.parent.iterdir()] == ["page.html"]
    return place.read_text()


def test_the_page_needs_nothing_else(text):
    page = Page(text)
    for tag, attributes in page.tags:
        for name in ("src", "href", "srcset", "action"):
            assert attributes.get(name, "data:").startswith("data:"), (tag, attributes)
        assert tag not in ("link", "iframe", "object") and "http-equiv" not in attributes
    assert "@import" not in text.split("</style>")[0] and "url(" not in text.split("</style>")[0]
    assert len(text) < 8e6


def test_every_chart_has_a_sentence_and_data(text):
    charts = [json.loads(found) for found in re.findall(r'<script type="application/json">(.*?)</script>', text, re.S)]
    # Two architectures further along training, the final one, and the time by stage.
    assert len(charts) == 8 * 3 + 1
    assert len(re.findall(r"<figcaption><h3>[^<]+</h3><p>[^<]{40,}</p></figcaption>", text)) == len(charts)
    assert all('"values": [{' in json.dumps(chart) for chart in charts)


def test_pictures_are_those_of_the_points(text):
    images = [attributes for tag, attributes in Page(text).tags if tag == "img"]
    assert len(images) > 3 * HARDEST
    digits = load_digits().images
    for image in images[:20]:
        point = int(image["alt"].removeprefix("point "))
        pixels = np.asarray(Image.open(io.BytesIO(b64decode(image["src"].partition("base64,")[2]))))[:, :, 0]
        np.testing.assert_allclose(pixels, digits[point] * (255 / digits[point].max()), atol=1)


def test_kinds_and_hardest_points_are_those_of_the_tables(text, studied_run):
    chapter = text.split("<h2>mlp: kinds of points</h2>")[1].split("<h2>mlp-at-0")[0]
    ensemble = pd.read_parquet(studied_run.directory.table("ensemble"))
    ensemble = ensemble[ensemble["architecture"] == "mlp"].set_index("point_id")
    placed = ensemble.dropna(subset=["mean_depth_held_out", "mean_depth_training"])
    deep = [placed[f"mean_depth_{split}"] for split in ("held_out", "training")]
    deep = [depths > np.quantile(depths, 0.75) for depths in deep]
    for number, name in enumerate(KINDS):
        n = ((deep[0] == bool(number // 2)) & (deep[1] == bool(number % 2))).sum()
        assert f'{name} <span class="soft">· {n:,} points</span>' in chapter
    rows = re.findall(r"<tr><td title=.*?</tr>", chapter, re.S)
    assert len(rows) == HARDEST
    deepest = ensemble.sort_values("mean_depth_held_out", ascending=False)["mean_depth_held_out"].head(HARDEST)
    assert [f"<td>{depth:.2f}</td>" in row for depth, row in zip(deepest, rows, strict=True)] == [True] * HARDEST


def test_the_time_of_every_stage_is_told(text, studied_run):
    table = text.split("<h2>The run</h2>")[1].split("</table>")[0]
    rows = re.findall(r"<tr><td>(.*?)</td><td>(.*?)</td><td>(.*?)</td>\s*<td>(.*?)</td><td>(.*?)</td></tr>", table)
    assert [row[0] for row in rows] == list(studied_run.manifest["stages"])
    for row, told in zip(rows, studied_run.manifest["stages"].values(), strict=True):
        assert row[1:3] == (f"{told['units']:,}", f"{told['work']:,} {told['measure']}")
        assert [float(value.replace(",", "")) for value in row[3:]] == pytest.approx(
            [told["worker_seconds"], told["seconds"]], abs=0.051
        )


def test_the_trail_of_votes_is_that_of_a_loop(text, studied_run):
    chapter = text.split("<h2>mlp: the hardest points</h2>")[1].split("<h2>")[0]
    row = re.findall(r"<tr><td title=.*?</tr>", chapter, re.S)[0]
    point = int(re.search(r'alt="point (\d+)"', row)[1])
    cells = re.findall(r'<td class="vote [a-z]+">(\S+) <span class="soft">(\d+)/(\d+)</span></td>', row)
    winners = []
    for seed in range(4):
        depths, votes = (
            pd.read_parquet(studied_run.directory.member_table(name, f"mlp-{seed}")).set_index("point_id").loc[point]
            for name in ("depths", "votes")
        )
        if not depths["in_training"]:
            winners.append(list(votes["winner"]))
    expected = []
    for of_probe in zip(*winners, strict=True):
        most = max(sorted(set(of_probe)), key=of_probe.count)
        expected.append((str(most), str(of_probe.count(most)), str(len(winners))))
    assert cells == expected


def test_names_are_text(tmp_path, tiny_run):
    """A class whose name is markup."""
    shutil.copytree(tiny_run.directory.root, tmp_path / "run")
    name, bad = tmp_path / "run" / "points.parquet", "<script>alert(1)</script>"
    table = pq.ParquetFile(name).read()
    names = pa.array([bad] * len(table), pa.string())
    pq.write_table(table.set_column(table.column_names.index("label_name"), "label_name", names), name)
    write_report(open_run(tmp_path / "run"), tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert bad not in text and "alert(1)" in text


def test_without_its_data_a_report_has_no_pictures_and_says_why(tiny_run, tmp_path):
    run = open_run(tiny_run.directory.root)
    gone = {"source": "npy", "inputs": str(tmp_path / "gone.npy"), "labels": str(tmp_path / "gone.npy")}
    run.manifest = {**run.manifest, "configuration": {**run.manifest["configuration"], "points": gone}}
    write_report(run, tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert "There are no pictures of points" in text and "gone.npy" in text and 'alt="point ' not in text


def test_an_unfinished_run_is_refused(tiny_run, tmp_path):
    run = open_run(tiny_run.directory.root)
    run.manifest = {**run.manifest, "status": "running"}
    with pytest.raises(leadline.LeadlineError, match="the run is running; finish it"):
        write_report(run, tmp_path / "page.html")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("table", ["points.parquet", "ensemble.parquet", "depths/member=mlp-1/part-0.parquet"])
def test_a_damaged_table_is_told_in_a_line(tiny_run, tmp_path, table):
    root = tmp_path / "run"
    shutil.copytree(tiny_run.directory.root, root)
    (root / table).write_bytes((root / table).read_bytes()[:-100])
    with pytest.raises(leadline.LeadlineError) as told:
        write_report(open_run(root), tmp_path / "page.html")
    assert table in str(told.value) and "\n" not in str(told.value)
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize("part", ["configuration", "versions", "stages"])
def test_a_manifest_that_has_lost_a_part_is_told_in_a_line(tiny_run, tmp_path, part):
    run = open_run(tiny_run.directory.root)
    run.manifest = {key: value for key, value in run.manifest.items() if key != part}
    with pytest.raises(leadline.LeadlineError, match=rf"run.json: damaged \(no {part}\); restore it"):
        write_report(run, tmp_path / "page.html")
    assert not list(tmp_path.iterdir())


def test_a_run_without_points_has_a_page(tiny_run, tmp_path):
    root = tmp_path / "run"
    shutil.copytree(tiny_run.directory.root, root)
    for name in ("points.parquet", "ensemble.parquet"):
        table = pq.ParquetFile(root / name).read()
        pq.write_table(table.slice(0, 0), root / name)
    write_report(open_run(root), tmp_path / "page.html")
    assert "<dd>0, 0 of them in part test, 0 classes</dd>" in (tmp_path / "page.html").read_text()


def test_a_run_in_a_bucket_has_the_same_report(s3, bucket, tiny_run, tmp_path):
    root = tiny_run.directory.root
    for path in (path for path in root.rglob("*") if path.suffix in (".parquet", ".json")):
        s3.upload_file(str(path), bucket, f"run/{path.relative_to(root)}")
    write_report(open_run(f"s3://{bucket}/run"), tmp_path / "bucket.html")
    write_report(tiny_run, tmp_path / "here.html")
    assert (tmp_path / "bucket.html").read_text() == (tmp_path / "here.html").read_text()
