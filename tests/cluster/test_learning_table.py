"""The table of learning that a watched training leaves: the network's own predictions, and measures made of them."""

import math
from itertools import pairwise

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from tiny import TINY, WATCHED, embedded

import leadline
from leadline import LeadlineError
from leadline.cluster.units import embedding
from leadline.config import Training, load_config
from leadline.embedding import batch_logits
from leadline.learning_table import LearningTable, el2n_steps
from leadline.members.architectures import build
from leadline.members.splits import training_ids
from leadline.members.train import train
from leadline.points import open_points
from leadline.store.schemas import LEARNING, LOGGED
from leadline.store.tables import open_table, read_table
from leadline.store.verify import verify

STEPS = [0, 1, 2, 3, 6, 10, 12, 18, 25, 32, 38, 50, 56, 60]  # 10^(i/4), and the halves of epochs of 25 steps


def learning(run, member):
    return run.sql(f"SELECT * EXCLUDE member FROM learning WHERE member = '{member}' ORDER BY point_id")


def test_a_watched_run_is_sound_and_has_the_table_of_the_watched_alone(watched_run):
    assert verify(watched_run.directory) == []
    table = watched_run.learning.to_table()
    assert set(table["member"].to_pylist()) == {"mlp-0", "mlp-1"}
    assert table.schema.names == [*LEARNING.names, "member"]
    assert watched_run.sql("SELECT DISTINCT steps FROM learning")["steps"].to_pylist() == [STEPS]
    paths = [watched_run.directory.member_table("learning", member) for member in ("mlp-0", "mlp-1")]
    assert watched_run.directory.files("learning") == paths
    assert "learning/member=mlp-1/part-0.parquet" in watched_run.manifest["files"]


def test_the_last_predictions_are_those_of_the_depths(watched_run):
    for member in ("mlp-0", "mlp-1"):
        depths = watched_run.sql(f"SELECT * FROM depths WHERE member = '{member}' ORDER BY point_id")
        table = learning(watched_run, member)
        assert [said[-1] for said in table["predictions"].to_pylist()] == depths["prediction"].to_pylist()
        for column in ("point_id", "label", "in_training"):
            assert table[column].to_pylist() == depths[column].to_pylist()


def test_who_is_watched_is_the_same_member(watched_run):
    """Weights and depths of the first, watched, and of the same member, that nobody looked at."""
    rows = watched_run.sql("SELECT * EXCLUDE (member, architecture) FROM members ORDER BY member").to_pylist()
    assert rows[0] == rows[2] != rows[1]
    first, plain = (
        watched_run.sql(f"SELECT * EXCLUDE member FROM depths WHERE member = '{name}' ORDER BY point_id")
        for name in ("mlp-0", "plain-0")
    )
    assert first == plain


def test_measures_are_those_of_networks_that_were_trained_so_far(watched_run, one_thread):
    """Each checkpoint trained from the beginning, with nobody looking on; measures by loops in float64."""
    config = load_config(WATCHED)
    points, entry = open_points(config.points), config.members[0]
    ids = training_ids(entry.split, points.parts, seed=1)
    logits = []
    for step in STEPS:
        model = build("mlp", entry.parameters, points.input_shape, 10, seed=1)
        recipe = {**WATCHED["members"][0]["training"], "steps": step, "learning": None}
        train(model, points, ids, Training(**recipe), 1, "cpu")
        with torch.no_grad():
            parts = torch.from_numpy(points.read(np.arange(len(points)))).split(64)
            logits.append(torch.cat([model(part) for part in parts]).double().numpy())
    logits = np.stack(logits)  # [T, N, 10]
    said = logits.argmax(axis=2)
    rows = learning(watched_run, "mlp-1").to_pylist()
    assert len(rows) == 1797
    for point in [*range(0, 1797, 7), int(np.argmin((said == points.labels).sum(axis=0)))]:
        row, own, label = rows[point], logits[:, point], points.labels[point]
        assert row["predictions"] == said[:, point].tolist()
        differing = [i for i in range(len(STEPS)) if said[i, point] != said[-1, point]]
        assert row["iteration_learned"] == (STEPS[differing[-1] + 1] if differing else 0)
        right = (said[1:, point] == label).tolist()
        assert row["forgetting_events"] == sum(a and not b for a, b in pairwise(right))
        assert row["never_learned"] == (not any(right)) and row["in_training"] == (point in ids)
        shares = [np.exp(z - z.max()) / np.exp(z - z.max()).sum() for z in own]
        margins = [z[label] - max(np.delete(z, label)) for z in own[1:]]
        assert row["aum"] == pytest.approx(sum(margins) / 13, abs=1e-5)
        of_label = [share[label] for share in shares[1:]]
        mean = sum(of_label) / 13
        assert row["mean_label_probability"] == pytest.approx(mean, abs=1e-6)
        spread = math.sqrt(sum((p - mean) ** 2 for p in of_label) / 13)
        assert row["std_label_probability"] == pytest.approx(spread, abs=1e-6)
        errors = [math.sqrt(sum((p - (j == label)) ** 2 for j, p in enumerate(share))) for share in shares]
        early = [error for step, error in zip(STEPS, errors, strict=True) if 1 <= step <= 6]  # a tenth of 60
        assert row["el2n"] == pytest.approx(sum(early) / 4, abs=1e-6)


NORMS = {
    "architecture": "vgg16",
    "parameters": {"width": 4, "norm": "batch"},
    "training": {"steps": 40, "batch": 64, "learning": {"per_decade": 1}},
}


@pytest.mark.parametrize("keeps", [True, False], ids=["inputs kept", "inputs read again"])
def test_batch_norm_labels_as_given_and_predictions_as_embedded(tmp_path, monkeypatch, one_thread, keeps):
    monkeypatch.setattr(embedding, "is_resident", lambda *about: keeps)
    points = {"source": "digits", "corrupt": {"share": 0.5}}
    bench, directory, (member,) = embedded({**TINY, "points": points, "members": [NORMS]}, tmp_path)
    table = read_table(directory.member_table("learning", member.name))
    np.testing.assert_array_equal(table["label"].to_numpy(), bench.points.labels)
    assert (bench.points.labels != bench.points.clean_labels).mean() > 0.4
    last = np.array(table["predictions"].to_pylist())[:, -1]
    np.testing.assert_array_equal(last, bench.outputs(member)[:]["prediction"])
    assert table["steps"][0].as_py() == [0, 1, 10, 25, 40] and len(np.unique(last)) > 2
    np.testing.assert_array_equal(table["in_training"].to_numpy().nonzero()[0], bench.training_ids(member))


def test_logits_that_are_not_finite_are_named():
    class Broken(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x) / (x.sum(1, keepdim=True) - 3)

    model = Broken(1, 2)
    torch.nn.init.ones_(model.bias)
    with pytest.raises(LeadlineError, match="member odd-0, probe logits: not finite at point 43"):
        batch_logits(model, torch.arange(5.0)[:, None], 40, "odd-0")


@pytest.mark.parametrize(
    ("steps", "expected"),
    [([0], (1, 0)), ([0, 1, 5, 60], (1, 6)), ([0, 30, 60], (1, 30)), ([200, 400], (1, 200)), ([0, 1, 2000], (1, 200))],
)
def test_el2n_is_of_a_tenth_of_the_steps(steps, expected):
    assert el2n_steps(steps) == expected


def test_a_table_of_several_row_groups(tmp_path, monkeypatch):
    """Points beyond those that are in memory together, in the order of their ids; measures not given are null."""
    monkeypatch.setattr("leadline.learning_table.LISTED", 20)
    random, n = np.random.default_rng(0), 23
    labels, said = random.integers(0, 3, n), random.integers(0, 3, (4, n))
    table = LearningTable(labels, labels > 0, [0, 5, 9, 30])
    for step, prediction in zip([0, 5, 9, 30], said, strict=True):
        table.add(step, prediction)
    table.write(tmp_path / "t.parquet", {}, LOGGED, said[-1])
    with open_table(tmp_path / "t.parquet") as file:
        assert file.num_row_groups == 5
    found = pq.read_table(tmp_path / "t.parquet")
    assert found["predictions"].to_pylist() == said.T.tolist()
    assert found["steps"].to_pylist() == [[0, 5, 9, 30]] * n
    assert found["point_id"].to_pylist() == list(range(n)) and found["label"].to_pylist() == labels.tolist()
    assert found["aum"].null_count == found["el2n"].null_count == n
    learned = [[0, 5, 9, 30][max((i + 1 for i in range(4) if column[i] != column[-1]), default=0)] for column in said.T]
    assert found["iteration_learned"].to_pylist() == learned


def test_a_run_without_the_table_says_so(watched_run, tmp_path):
    """Where a writer has made its folder too."""
    (tmp_path / "run" / "learning" / "member=mlp-0").mkdir(parents=True)
    for file in watched_run.directory.root.glob("*.*"):
        (tmp_path / "run" / file.name).write_bytes(file.read_bytes())
    run = leadline.open(tmp_path / "run")
    with pytest.raises(LeadlineError, match=r"no table learning.*training\.learning"):
        _ = run.learning
    with pytest.raises(LeadlineError, match="learning"):
        run.sql("SELECT * FROM learning")
    assert run.sql("SELECT count(*) FROM points")[0][0].as_py() == 1797
