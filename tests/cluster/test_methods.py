"""Runs with indexes: their audit against a full comparison, what `auto` takes, resuming, damage, and kept banks."""

import io
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from rich.console import Console
from scipy.spatial.distance import cdist
from tiny import TINY, embedded, tables_of

import leadline
from leadline import LeadlineError
from leadline.cluster.units import audit, index, methods, reduce, trial, vote
from leadline.config import load_config
from leadline.knn.audit import draw
from leadline.points import open_points
from leadline.report import print_summary
from leadline.store.files import write_json
from leadline.store.verify import verify

pytest.importorskip("faiss")

COARSE = "ivf-flat:nlist=64,nprobe=1"
INDEXED = {
    **TINY,
    "method": COARSE,
    "audit": {"sample": 700, "seed": 3},
    "engine": {**TINY["engine"], "keep_indexes": True},
}


@pytest.fixture(scope="session")
def indexed_run(tmp_path_factory):
    """A run by a coarse index that keeps its banks; it was killed once, when indexes were built, and went on."""
    folder = tmp_path_factory.mktemp("indexed")
    run, config = folder / "run", folder / "tiny.yaml"
    config.write_text(yaml.safe_dump({**INDEXED, "engine": {**INDEXED["engine"], "scratch": str(folder / "scratch")}}))
    command = [str(Path(sys.executable).with_name("leadline")), "run", str(config), "--out", str(run)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as driver:
        deadline = time.monotonic() + 120
        while len(list(run.glob("units/index/*/*.json"))) < 2 and driver.poll() is None and time.monotonic() < deadline:
            time.sleep(0.001)
        driver.send_signal(signal.SIGKILL)
    assert json.loads((run / "run.json").read_text())["status"] == "running"
    time.sleep(1)  # Ray's processes notice that their driver is gone
    built = len(list(run.glob("units/index/*/*.json")))
    finished = subprocess.run(command, capture_output=True, text=True, check=True)
    assert built >= 2 and f"index  {built}/12 units are there already" in finished.stderr, finished.stderr
    assert "layers (high end" in finished.stdout
    return leadline.open(run)


@pytest.mark.slow
def test_the_audit_agrees_with_a_full_comparison(tiny_run, indexed_run):
    inside = []  # whether the truth is in the interval
    for member in ("mlp-0", "mlp-1", "mlp-2"):
        (row,) = indexed_run.sql(f"SELECT * FROM members WHERE member = '{member}'").to_pylist()
        found, exact = depths_of(indexed_run, member), depths_of(tiny_run, member)
        agreement, error = np.mean(found == exact), np.abs(found.astype(int) - exact).mean()
        inside.append(row["depth_agreement_low"] <= agreement <= row["depth_agreement_high"] < 1)
        inside.append(0 < row["depth_error_low"] <= error <= row["depth_error_high"])
        # The sample's own values, from the tables.
        sample, _ = draw(1797, 700, 3)
        assert row["audit_sample"] == 700
        assert row["depth_agreement"] == pytest.approx(np.mean(found[sample] == exact[sample]))
        assert row["depth_error"] == pytest.approx(np.abs(found[sample].astype(int) - exact[sample]).mean())
        equal = winners_of(indexed_run, member) == winners_of(tiny_run, member)
        probes = indexed_run.sql(f"SELECT * FROM probes WHERE member = '{member}' ORDER BY probe").to_pylist()
        for probe, right in zip(probes, equal.T, strict=True):
            assert probe["method"] == probe["plan"] == COARSE and probe["choice"] is None
            assert probe["vote_agreement"] == pytest.approx(right[sample].mean())
            inside.append(probe["vote_agreement_low"] <= right.mean() <= probe["vote_agreement_high"] < 1)
            assert 0.5 < probe["recall_low"] < probe["recall"] < probe["recall_high"] < 1
            assert probe["index_bytes"] > 4 * 1617 * probe["width"]
    assert len(inside) == 18 and sum(inside) >= 16  # of intervals of 95 %, one in 20 may miss
    assert verify(indexed_run.directory) == []


def depths_of(run, member):
    return run.sql(f"SELECT depth FROM depths WHERE member = '{member}' ORDER BY point_id")["depth"].to_numpy()


def winners_of(run, member):
    return np.stack(run.sql(f"SELECT winner FROM votes WHERE member = '{member}' ORDER BY point_id")[0].to_pylist())


@pytest.mark.slow
def test_the_error_bar_of_the_ensemble_is_the_mean_of_its_members(tiny_run, indexed_run):
    assert set(tiny_run.sql("SELECT depth_error_training FROM ensemble")[0].to_pylist()) == {0.0}
    checked = indexed_run.sql("""
        SELECT count(*) FROM (
            SELECT point_id, avg(depth_error_high) AS bar FROM depths JOIN members USING (member)
            WHERE NOT in_training GROUP BY point_id
        ) JOIN ensemble USING (point_id) WHERE abs(bar - depth_error_held_out) < 1e-12
    """)[0][0].as_py()
    assert checked == indexed_run.sql("SELECT count(*) FROM ensemble WHERE n_held_out > 0")[0][0].as_py() > 0


@pytest.mark.slow
def test_indexed_tables_do_not_depend_on_workers_or_kills(indexed_run, tmp_path):
    other = leadline.run({**INDEXED, "engine": {**INDEXED["engine"], "workers": 1}}, tmp_path / "run")
    assert tables_of(other.directory.root) == tables_of(indexed_run.directory.root)


@pytest.mark.slow
def test_kept_banks_tell_the_depths_of_points_and_of_embeddings(indexed_run):
    """Held-out points of a member are new to it, so the run knows their depths."""
    depths = indexed_run.sql("SELECT * FROM depths WHERE member = 'mlp-1' AND NOT in_training ORDER BY point_id")
    votes = indexed_run.sql("SELECT * FROM votes WHERE member = 'mlp-1' ORDER BY point_id")
    ids = depths["point_id"].to_numpy()
    inputs = open_points(load_config(TINY).points).read(ids)
    told = indexed_run.depth_of("mlp-1", inputs)
    for column in ("prediction", "depth", "unsettled"):
        assert told[column].to_pylist() == depths[column].to_pylist()
    for column in ("winner", "runner_up_votes"):
        assert told[column].to_pylist() == votes[column].combine_chunks().take(ids).to_pylist()
    kept = leadline.query.KeptMember(indexed_run.directory, indexed_run.manifest, "mlp-1")
    embeddings, predictions = kept.embed(inputs)
    assert indexed_run.depth_of("mlp-1", embeddings=embeddings, predictions=predictions).equals(told)
    with pytest.raises(LeadlineError, match="widths"):
        indexed_run.depth_of("mlp-1", embeddings=embeddings[1:], predictions=predictions)
    with pytest.raises(LeadlineError, match="lengths"):
        indexed_run.depth_of("mlp-1", embeddings=embeddings, predictions=predictions[1:])
    with pytest.raises(LeadlineError, match="probe softmax, point 1"):
        broken = embeddings[3].copy()
        broken[1, 2] = np.nan
        indexed_run.depth_of("mlp-1", embeddings=[*embeddings[:3], broken], predictions=predictions)
    with pytest.raises(LeadlineError, match="give points, or embeddings and predictions"):
        indexed_run.depth_of("mlp-1", inputs, predictions=predictions)
    with pytest.raises(LeadlineError, match=r"'mlp-9' is not in the run; there are mlp-0, mlp-1, mlp-2"):
        indexed_run.depth_of("mlp-9", inputs)


def test_a_run_without_kept_banks_says_so(tiny_run):
    assert not tiny_run.directory.indexes.exists()
    with pytest.raises(LeadlineError, match=r"engine\.keep_indexes: true"):
        tiny_run.depth_of("mlp-0", np.zeros((1, 1, 8, 8)))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mlp-1/002.index", "mlp-1/002.npy", "input/000.npy"])
def test_damage_to_what_is_kept_is_found_by_its_fingerprint(indexed_run, tmp_path, name):
    copy = leadline.open(shutil.copytree(indexed_run.directory.root, tmp_path / "run"))
    path = copy.directory.indexes / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert verify(copy.directory) == [f"{path}: damaged or changed (its SHA-256 is not the manifest's)"]
    with pytest.raises(LeadlineError, match=f"{name}.*SHA-256"):
        copy.depth_of("mlp-1", np.zeros((1, 1, 8, 8)))


@pytest.mark.slow
def test_auto_keeps_its_target_and_says_why(tiny_run, tmp_path):
    config = {
        **TINY,
        "votes": "until-decided",
        "method": {"[!h]*": "auto", "hidden.1": "ivf-flat:nlist=16,nprobe=12"},
        "audit": {"sample": 800, "depth_agreement": 0.97},
    }
    run = leadline.run(config, tmp_path / "run")
    assert verify(run.directory) == []
    assert not run.directory.indexes.exists()
    choices = {row["probe"]: row for row in run.sql("SELECT * FROM probes WHERE member = 'mlp-2'").to_pylist()}
    assert "share the search" in choices[0]["choice"] and choices[0]["method"] == "exact"
    assert choices[1]["method"] == "exact" and choices[1]["choice"] is None
    assert choices[2]["method"] == "ivf-flat:nlist=16,nprobe=12" and 0 < choices[2]["audit_sample"] < 800
    assert "exact" in choices[3]["choice"]
    for member in ("mlp-0", "mlp-1", "mlp-2"):
        found, exact = depths_of(run, member), depths_of(tiny_run, member)
        (row,) = run.sql(f"SELECT * FROM members WHERE member = '{member}'").to_pylist()
        assert (found == exact).mean() >= 0.97
        assert row["depth_agreement_low"] <= (found == exact).mean() <= row["depth_agreement_high"]
    # The first two members share the input, as in an exact run; the third may ask for points that they did not.
    assert run.sql("SELECT pairs FROM probes WHERE probe = 0 ORDER BY member")["pairs"].to_pylist()[1] == 0


# What follows is done in this process, unit by unit.


def one_member(**changes):
    return {**TINY, "members": [{**TINY["members"][0], "count": 1}], **changes}


def test_auto_takes_what_the_trial_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(methods, "candidates", lambda n_bank: [COARSE, "flat"])
    config = one_member(method="auto", audit={"sample": 500, "depth_agreement": 0.99})
    bench, directory, (member,) = embedded(config, tmp_path)
    for probe in range(4):
        trial(bench, member, probe)
        record = json.loads(directory.trial("mlp", probe).read_text())
        tried = {option["method"]: option for option in record["options"]}
        if "flat" in tried:  # it is not built where the first took longer to build than all of exact search
            assert tried["flat"]["changed"] == []
        assert tried[COARSE]["changed"] and min(record["exact_seconds"], tried[COARSE]["seconds"]) > 0
        # As if exact search were slow at two probes, and an index at the others.
        options = [
            {"method": COARSE, "seconds": 1.0, "changed": tried[COARSE]["changed"]},
            {"method": "flat", "seconds": 2.0, "changed": []},
        ]
        record = {"exact_seconds": 9.0 if probe in (1, 3) else 0.5, "reduced": [], "options": options}
        directory.trial("mlp", probe).write_text(json.dumps(record))
    for probe in range(4):
        index(bench, member, probe)
    records = [json.loads(directory.index_record(member.name, probe).read_text()) for probe in range(4)]
    assert [record["method"] for record in records] == ["exact", "flat", "exact", "flat"]
    assert all("exact is cheaper" in records[probe]["choice"] for probe in (0, 2))


def test_auto_leaves_room_for_what_a_given_method_changes(tmp_path):
    config = one_member(method={"hidden.0": COARSE, "hidden.1": "auto"}, audit={"sample": 500, "depth_agreement": 0.97})
    bench, directory, (member,) = embedded(config, tmp_path)
    for spent, expected in ((0, "flat"), (9, "exact")):
        for probe, method, changed in ((1, COARSE, list(range(spent))), (2, "flat", [100, 101])):
            option = {"method": method, "seconds": 1.0, "changed": changed}
            write_json(directory.trial("mlp", probe), {"exact_seconds": 9.0, "reduced": [], "options": [option]})
        index(bench, member, 2)
        assert json.loads(directory.index_record(member.name, 2).read_text())["method"] == expected


def test_a_damaged_index_is_found_by_its_fingerprint(tmp_path):
    bench, directory, (member,) = embedded(one_member(method=COARSE), tmp_path)
    index(bench, member, 1)
    path = directory.index(member.name, 1)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(LeadlineError, match=r"001\.index: missing, damaged or changed"):
        vote(bench, member, 1, 0)
    path.unlink()
    with pytest.raises(LeadlineError, match=r"001\.index: missing, damaged or changed"):
        vote(bench, member, 1, 0)


def test_exact_depths_of_the_sample_do_not_depend_on_what_approximate_votes_left_out(tmp_path):
    """With `until-decided`, an approximate vote may end a point's votes too early: the audit goes on."""
    methods = {"softmax": COARSE, "hidden.1": COARSE}
    config = one_member(votes="until-decided", method=methods, audit={"sample": 400, "seed": 1})
    bench, directory, (member,) = embedded(config, tmp_path)
    for probe in (3, 2, 1, 0):
        if probe in (2, 3):
            index(bench, member, probe)
        for block in range(len(bench.query_blocks)):
            vote(bench, member, probe, block)
    for probe in range(4):
        audit(bench, member, probe)
    reduce(bench, member)
    record = json.loads(directory.record("reduce", member.name).read_text())["audit"]
    rows = [bench.rows(member.name, probe, np.arange(1797))[:].astype(float) for probe in range(4)]
    depths = leadline.store.tables.read_table(directory.member_table("depths", member.name)).to_pydict()
    bank, labels = np.flatnonzero(depths["in_training"]), np.array(depths["label"])
    errors = []
    for point in bench.sample:
        depth = 0
        for probe in range(4):
            others = bank[bank != point]
            nearest = np.lexsort((others, cdist(rows[probe][[point]], rows[probe][others])[0]))[:10]
            if np.bincount(labels[others[nearest]]).argmax() != depths["prediction"][point]:
                depth = probe + 1
        errors.append(abs(depth - depths["depth"][point]))
    assert record["depth_error"] == pytest.approx(np.mean(errors)) and np.mean(errors) > 0
    assert record["depth_agreement"] == pytest.approx(np.mean(np.array(errors) == 0))


@pytest.mark.slow
def test_the_summary_tells_errors_where_there_are_any(tiny_run, indexed_run):
    said = {}
    for run in (tiny_run, indexed_run):
        console = Console(width=150, file=io.StringIO())
        print_summary(run, console)
        said[run] = console.file.getvalue()
    assert "recall" not in said[tiny_run] and "exact ones" not in said[tiny_run]
    assert COARSE in said[indexed_run] and "on 700 points of each" in said[indexed_run]
