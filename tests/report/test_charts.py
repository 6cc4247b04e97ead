"""What charts are drawn of, against pandas over the stored tables; and that the marks are drawn."""

from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest

import leadline
from leadline.report.charts import CELLS, plane_chart
from leadline.study.plane import plane_of

SVG = "{http://www.w3.org/2000/svg}"


def data_of(chart):
    """The values of a chart's first layer."""
    tree = chart.to_dict()
    while "values" not in tree.get("data", {}):
        tree = tree["layer"][0]
    return pd.DataFrame(tree["data"]["values"])


@pytest.fixture(scope="module")
def depths(studied_run):
    frame = pd.concat(
        pd.read_parquet(path).assign(member=path.parent.name.removeprefix("member="))
        for path in sorted(studied_run.directory.table("depths").rglob("*.parquet"))
    )
    return frame[~frame["member"].str.contains("-at-")]


def test_shares_of_depths(studied_run, depths):
    found = data_of(studied_run.plot.depths("mlp")).set_index(["split", "depth"])
    for inside, split in ((True, "training"), (False, "held out")):
        counts = depths.loc[depths["in_training"] == inside, "depth"].value_counts()
        assert found.loc[split, "points"].to_dict() == counts.to_dict()
        assert found.loc[split, "share"].to_dict() == pytest.approx((counts / counts.sum()).to_dict())


def test_probe_accuracies_are_the_table_s_means(studied_run):
    found = data_of(studied_run.plot.probe_accuracy("mlp"))
    probes = pd.read_parquet(studied_run.directory.table("probes"))
    probes = probes[probes["architecture"] == "mlp"]
    for split, column in (("training", "train_accuracy"), ("held out", "held_out_accuracy")):
        of_split = found[found["split"] == split]
        assert of_split["value"].tolist() == pytest.approx(probes.groupby("probe")[column].mean().tolist())
        assert ((of_split["low"] < of_split["value"]) & (of_split["value"] < of_split["high"])).all()
    assert found["probe"].tolist()[:4] == ["0 input", "1 hidden.0", "2 hidden.1", "3 softmax"]


def test_measures_by_depth_are_means_of_members_means(studied_run, depths):
    held_out = depths[~depths["in_training"]]
    ensemble = pd.read_parquet(studied_run.directory.table("ensemble"))
    consensus = ensemble[ensemble["architecture"] == "mlp"].set_index("point_id")["consensus_class"]
    with_peers = held_out.groupby("point_id")["member"].transform("count") > 1
    values = {
        "accuracy": held_out["prediction"] == held_out["label"],
        "consistency": (held_out["prediction"] == held_out["point_id"].map(consensus)).where(with_peers),
        "entropy": held_out["entropy"].astype(float),
    }
    for measure, value in values.items():
        by_member = held_out.assign(value=value.astype(float)).groupby(["depth", "member"])["value"].mean()
        expected = by_member.groupby("depth").mean()
        found = data_of(studied_run.plot.by_depth(measure, "mlp")).set_index("depth")
        assert found["value"].to_dict() == pytest.approx(expected.to_dict(), rel=1e-6), measure
        assert found["n"].to_dict() == held_out[value.notna()]["depth"].value_counts().to_dict()


def test_every_point_of_the_plane_is_in_the_cell_of_its_means(studied_run):
    ensemble = pd.read_parquet(studied_run.directory.table("ensemble"))
    ensemble = ensemble[ensemble["architecture"] == "mlp"].dropna(subset=["mean_depth_held_out", "mean_depth_training"])
    cells = data_of(studied_run.plot.plane("mlp"))
    assert cells["points"].sum() == len(ensemble) > 1000
    for cell in cells.to_dict("records"):
        x, y = ensemble["mean_depth_held_out"], ensemble["mean_depth_training"]
        inside = (cell["x"] <= x) & (x < cell["x2"]) & (cell["y"] <= y) & (y < cell["y2"])
        assert inside.sum() == cell["points"]


@pytest.mark.parametrize("n_probes", [2, 5, 17, 60])
def test_a_plane_of_many_points_has_few_cells(n_probes):
    random = np.random.default_rng(n_probes)
    held_out, training = random.uniform(0, n_probes, (2, 50_000))
    cells = data_of(plane_chart(plane_of(held_out, training), n_probes))
    assert cells["points"].sum() == 50_000 and len(cells) <= CELLS**2
    assert np.isfinite(cells.to_numpy()).all()


def test_classes_by_mean_depth(studied_run):
    ensemble = pd.read_parquet(studied_run.directory.table("ensemble"))
    ensemble = ensemble[ensemble["architecture"] == "mlp"]
    found = data_of(studied_run.plot.classes("mlp"))
    for split, column in (("held out", "mean_depth_held_out"), ("training", "mean_depth_training")):
        expected = ensemble.groupby("label")[column].mean()
        of_split = found[found["split"] == split].set_index("class")["depth"]
        assert of_split.to_dict() == pytest.approx({str(label): depth for label, depth in expected.items()})
    deepest = found.loc[found["split"] == "held out", "depth"].tolist()
    assert deepest == sorted(deepest, reverse=True)


def test_a_dot_for_each_member(studied_run, depths):
    found = data_of(studied_run.plot.members("mlp")).set_index("member")
    held_out = depths[~depths["in_training"]]
    assert found["depth"].to_dict() == pytest.approx(held_out.groupby("member")["depth"].mean().to_dict())
    right = (held_out["prediction"] == held_out["label"]).groupby(held_out["member"]).mean()
    assert found["accuracy"].to_dict() == pytest.approx(right.to_dict())


def test_charts_are_drawn(studied_run, tmp_path):
    plot = studied_run.plot
    cells = len(data_of(plot.plane()))
    marks = {
        "plane": (plot.plane(), "rect mark", cells), "members": (plot.members(), "point", 4),
        "stages": (plot.stages(), "bar", len(studied_run.manifest["stages"])),
    }  # fmt: skip
    for name, (chart, role, n) in marks.items():
        chart.properties(width=300).save(str(tmp_path / f"{name}.svg"))
        paths = ElementTree.parse(tmp_path / f"{name}.svg").getroot().iter(f"{SVG}path")
        assert sum(path.get("aria-roledescription") == role for path in paths) == n, name


def test_what_a_run_has_not_got_is_refused(studied_run, tiny_run):
    with pytest.raises(leadline.LeadlineError, match="'resnet' is not in the run; mlp"):
        studied_run.plot.plane("resnet")
    with pytest.raises(leadline.LeadlineError, match="'margins' is none; allowed: accuracy, consistency, entropy"):
        tiny_run.plot.by_depth("margins")
