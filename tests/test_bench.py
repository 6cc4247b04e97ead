"""`leadline bench knn`: its figures against a slow computation, its files, and every mistake in one line."""

import json
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.neighbors import NearestNeighbors
from tiny import TINY

import leadline
from leadline import LeadlineError, bench, cli
from leadline.knn import build_index
from leadline.layers import open_layers
from leadline.report import plots

pytest.importorskip("faiss")

COARSE = "ivf-flat:nlist=24,nprobe=1"
N, K = 600, 7


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three layers of points without ties, a third of them held out, labels and a network's classes."""
    random, path = np.random.default_rng(4), tmp_path_factory.mktemp("embeddings") / "mine"
    path.mkdir()
    labels = random.integers(0, 5, N)
    for number, name in enumerate(["1-block", "2-block", "0-input"]):
        values = random.normal(size=(N, 2, 4 + number)) + labels[:, None, None] * (0.5 + number / 2)
        np.save(path / f"{name}.npy", values.astype(np.float64 if number else np.float32))
    np.save(path / "labels.npy", labels)
    np.save(path / "predictions.npy", np.where(random.random(N) < 0.9, labels, random.integers(0, 5, N)))
    np.save(path / "training.npy", random.random(N) < 0.67)
    return path


def compare(path, *methods, queries=None, k=K, member=None):
    comparison = bench.prepare(path, member, methods, queries, k, None, 1)
    return bench.bench_knn(comparison, lambda line: None)


@pytest.fixture(scope="module")
def full(folder):
    return compare(folder, "flat", COARSE)


def slow(folder, k=K):
    """Of each layer and method (exact, coarse): neighbours by scikit-learn and by the index, as ids, and votes."""
    labels, inside = np.load(folder / "labels.npy"), np.load(folder / "training.npy")
    bank_ids, found = np.flatnonzero(inside), {}
    for name in ("0-input", "1-block", "2-block"):
        rows = np.load(folder / f"{name}.npy").reshape(N, -1)
        near = NearestNeighbors(n_neighbors=k + 1, algorithm="brute").fit(rows[bank_ids].astype(np.float64))
        own = np.array([np.flatnonzero(bank_ids == i)[0] if inside[i] else -1 for i in range(N)])
        exact = [
            [bank_ids[row] for row in line if row != own[i]][:k]
            for i, line in enumerate(near.kneighbors(rows.astype(np.float64), return_distance=False))
        ]
        coarse, _ = build_index(COARSE, rows[bank_ids], threads=1).search(rows, k, own)
        for method, lines in (("exact", exact), (COARSE, bank_ids[coarse])):
            votes = [int(np.bincount(labels[line]).argmax()) for line in lines]
            found[name, method] = [set(map(int, line)) for line in lines], votes
    return found


def test_figures_are_those_of_a_slow_computation(folder, full):
    found, said = slow(folder), np.load(folder / "predictions.npy")
    layers = ["0-input", "1-block", "2-block"]
    assert [layer["layer"] for layer in full["layers"]] == layers
    assert [layer["width"] for layer in full["layers"]] == [12, 8, 10]
    recalls, agreements = [], []
    for layer in full["layers"]:
        row = next(row for row in layer["methods"] if row["method"] == COARSE)
        (near, votes), (right, exact) = found[layer["layer"], COARSE], found[layer["layer"], "exact"]
        recalls.append(np.mean([len(a & b) / K for a, b in zip(near, right, strict=True)]))
        agreements.append(np.mean([a == b for a, b in zip(votes, exact, strict=True)]))
        assert row["recall"] == pytest.approx(recalls[-1], abs=1e-6) and 0.3 < row["recall"] < 0.99
        assert row["vote_agreement"] == pytest.approx(agreements[-1]) and row["vote_agreement"] < 1

    def depth(method, point):
        wrong = [place for place, name in enumerate(layers) if found[name, method][1][point] != said[point]]
        return 1 + wrong[-1] if wrong else 0

    depths = np.array([[depth(method, point) for point in range(N)] for method in ("exact", COARSE)])
    row = next(row for row in full["methods"] if row["method"] == COARSE)
    assert row["recall"] == pytest.approx(np.mean(recalls), abs=1e-6)
    assert row["vote_agreement"] == pytest.approx(np.mean(agreements))
    assert row["depth_agreement"] == pytest.approx(np.mean(depths[0] == depths[1])) and row["depth_agreement"] < 1
    assert row["depth_error"] == pytest.approx(np.abs(depths[0] - depths[1]).mean())


def test_exact_and_flat_lose_nothing(full):
    assert [row["method"] for row in full["methods"]] == ["exact", "flat", COARSE]
    for row in full["methods"][:2]:
        assert row["recall"] == row["vote_agreement"] == row["depth_agreement"] == 1 and row["depth_error"] == 0


def test_a_full_comparison_has_no_intervals_and_sums_add_up(full):
    assert not full["is_sample"] and full["queries"] == full["points"] == N and full["bank"] < N
    for i, total in enumerate(full["methods"]):
        rows = [layer["methods"][i] for layer in full["layers"]]
        for key in ("build_seconds", "search_seconds", "seconds", "index_bytes"):
            assert total[key] == pytest.approx(sum(row[key] for row in rows)) and total[key] > 0
        assert total["seconds"] == pytest.approx(total["build_seconds"] + total["search_seconds"])
        assert not any(key.endswith(("_low", "_high")) for row in [total, *rows] for key in row)
        assert all(row["warm_up_seconds"] > 0 for row in rows)


def test_a_sample_has_intervals_that_hold_the_truth_and_its_search_is_scaled(folder, full):
    sampled = compare(folder, COARSE, queries=200)
    assert sampled["is_sample"] and sampled["queries"] == 200
    row, truth = sampled["methods"][1], full["methods"][2]
    for name in ("recall", "vote_agreement", "depth_agreement", "depth_error"):
        assert row[f"{name}_low"] <= row[name] <= row[f"{name}_high"]
        assert row[f"{name}_low"] <= truth[name] <= row[f"{name}_high"]
    assert row["seconds"] == pytest.approx(row["build_seconds"] + 3 * row["search_seconds"])
    assert "recall_low" not in sampled["methods"][0]  # exact search is compared with itself


def test_without_predictions_there_are_no_depths_and_all_points_are_the_bank(folder, tmp_path):
    for name in ("labels", "0-input"):
        np.save(tmp_path / f"{name}.npy", np.load(folder / f"{name}.npy"))
    result = compare(tmp_path, COARSE)
    assert result["bank"] == N and "depth_agreement" not in result["methods"][1]
    assert set(result["methods"][1]["pareto"]) == {"recall", "vote_agreement"}
    plots.save_chart(leadline_chart(result), tmp_path / "chart.png")


def leadline_chart(result):
    from leadline.report.bench import knn_chart

    return knn_chart(result)


def test_exact_votes_of_a_member_are_those_that_its_run_stored(tiny_run):
    comparison = bench.prepare(tiny_run.directory.root, "mlp-1", ["flat"], None, None, None, 1)
    layers = open_layers(comparison.path, comparison.member)
    votes = tiny_run.sql("SELECT winner FROM votes WHERE member = 'mlp-1' ORDER BY point_id")["winner"].to_pylist()
    assert comparison.k == TINY["k"] and layers.names == ["input", "hidden.0", "hidden.1", "softmax"]
    for layer in range(4):
        measured = bench.measure(comparison, layers, layer)
        # Another number of threads may round an embedding otherwise, and with it a vote between equals.
        assert np.mean(measured.winners[0] == np.array(votes)[:, layer]) > 0.998


@pytest.mark.slow
def test_a_members_layers_are_reduced_as_its_run_reduced_them(tmp_path):
    tree = {
        **TINY,
        "members": [{**TINY["members"][0], "count": 1}],
        "reduction": {"hidden.0": "pca:8", "hidden.1": "jl:8"},
        "engine": {**TINY["engine"], "keep_indexes": True},
    }
    run = leadline.run(tree, tmp_path / "run")
    layers = open_layers(tmp_path / "run")
    assert layers.widths == [64, 8, 8, 10]
    for layer in (1, 2, 3):
        with layers.rows(layer) as values:
            kept = np.load(run.directory.bank("mlp-0", layer))
            np.testing.assert_allclose(values[layers.bank_ids], kept, rtol=1e-4, atol=1e-5)


@settings(deadline=None, max_examples=100)
@given(st.lists(st.tuples(st.integers(1, 5), st.integers(0, 4)), min_size=1, max_size=12))
def test_the_front_is_that_of_brute_force(pairs):
    marked = bench.pareto([seconds for seconds, _ in pairs], [value for _, value in pairs])
    for (seconds, value), is_on in zip(pairs, marked, strict=True):
        faster_and_no_worse = any(s < seconds and v >= value for s, v in pairs)
        better_and_no_slower = any(v > value and s <= seconds for s, v in pairs)
        assert is_on == (not faster_and_no_worse and not better_and_no_slower)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.floats(0, 400), st.floats(0, 300)), min_size=1, max_size=11))
def test_names_in_a_chart_keep_apart(points):
    text, width, height = "ivf-flat nprobe=8", 460, 300
    half, tall = plots.CHARACTER * len(text) / 2, plots.FONT_SIZE / 2
    places = plots.place_labels(points, [text] * len(points), width, height)
    for i, (x, y) in enumerate(places):
        assert half <= x <= width - half and tall <= y <= height - tall
        assert all(abs(x - a) >= 2 * half or abs(y - b) >= 2 * tall for a, b in places[:i])
        assert all(abs(x - a) >= half or abs(y - b) >= tall for a, b in points)


def test_names_leave_out_what_a_family_has_in_common():
    methods = ["exact", "ivf-flat:nlist=8,nprobe=1", "ivf-flat:nlist=8,nprobe=4", "hnsw:m=16", "ivf-pq", "ivf-pq:m=4"]
    short = ["exact", "ivf-flat nprobe=1", "ivf-flat nprobe=4", "hnsw", "ivf-pq", "ivf-pq m=4"]
    assert plots.short_names(methods) == short


@pytest.fixture
def command(monkeypatch, capsys):
    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["leadline", "bench", "knn", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        printed = capsys.readouterr()
        return ended.value.code, printed.out, printed.err

    return call


def test_the_command_writes_table_json_and_pictures(command, folder, tmp_path):
    methods = ["--methods", f"flat {COARSE}", "--methods", "ivf-flat:nlist=24,nprobe=4"]
    code, out, err = command(folder, *methods, "--out", tmp_path, "--threads", 1, "-k", 5)
    assert code == 0 and err.count("4 methods in") == 3
    result = json.loads((tmp_path / "knn.json").read_text())
    assert [row["method"] for row in result["methods"]] == ["exact", "flat", COARSE, "ivf-flat:nlist=24,nprobe=4"]
    assert result["k"] == 5 and result["threads"] == 1 and "bench knn mine" in result["command"]
    assert str(folder) not in (tmp_path / "knn.json").read_text()
    assert {"leadline", "numpy", "torch"} <= result["versions"].keys() and "cores" in result["hardware"]
    table = (tmp_path / "knn.txt").read_text()
    for words in (COARSE, "2-block", "all layers", f"{result['methods'][2]['recall']:.4f}"):
        assert words in table and words in out
    with Image.open(tmp_path / "knn.png") as picture:
        picture.load()
        assert picture.width > 1000 and len(picture.convert("RGB").getcolors(1 << 24)) > 10
    drawn = "".join(ET.parse(tmp_path / "knn.svg").getroot().itertext())
    for words in ("recall@5", "votes as exact", "depths as exact", "MiB", "seconds", "ivf-flat nprobe=4"):
        assert words in drawn
    assert {file.name for file in tmp_path.iterdir()} == {"knn.json", "knn.txt", "knn.png", "knn.svg"}


def test_the_usual_methods_are_those_that_can_be_used(folder):
    comparison = bench.prepare(folder, None, [], None, None, None, 1)
    assert comparison.k == 30 and {"exact", "flat", "ivf-pq", "hnsw", "hnsw-sq8"} <= set(comparison.methods)
    assert sum(text.startswith("ivf-flat") for text in comparison.methods) > 1
    for text, why in comparison.left_out.items():
        assert text not in comparison.methods and why.startswith(f"method: {text} ")


def saved(name, array, allow_pickle=False):
    return lambda folder: np.save(folder / f"{name}.npy", array, allow_pickle=allow_pickle)


def broken(folder):
    values = np.load(folder / "0-input.npy")
    values[123, 0, 1] = np.nan
    np.save(folder / "0-input.npy", values)


@pytest.mark.parametrize(
    ("spoil", "arguments", "words"),
    [
        (lambda folder: (folder / "labels.npy").unlink(), [], ["neither a run", "labels.npy"]),
        (lambda folder: [file.unlink() for file in folder.glob("[0-9]*")], [], ["no layer", "NAME.npy"]),
        (saved("labels", np.zeros(N)), [], ["labels.npy", "float64", "integers"]),
        (saved("labels", np.full(N, -3)), [], ["labels.npy: point 0 has -3"]),
        (saved("predictions", np.zeros(N - 1, int)), [], ["predictions.npy", "(599,)", f"[{N}]"]),
        (saved("training", np.ones(N, int)), [], ["training.npy", "int64", "bool"]),
        (saved("1-block", np.zeros((N - 2, 4), np.float32)), [], ["1-block.npy", "(598, 4)", f"[{N}, width]"]),
        (saved("1-block", np.zeros(N, np.float32)), [], ["1-block.npy", "width"]),
        (saved("1-block", np.zeros((N, 3), np.float16)), [], ["1-block.npy", "float16", "float32"]),
        (saved("1-block", np.array([{}] * N), allow_pickle=True), [], ["1-block.npy", "cannot be read"]),
        (lambda folder: (folder / "1-block.npy").write_bytes(b"no array"), [], ["1-block.npy", "cannot be read"]),
        (broken, [], ["0-input.npy: point 123", "not finite"]),
        (saved("training", np.arange(N) < 7), [], ["7 rows are too few", "k=7"]),
        (None, ["--methods", "magic"], ["method", "'magic'"]),
        (None, ["--methods", "flat auto"], ["method", "'auto'"]),
        (None, ["--methods", "gpu-flat"], ["method: gpu-flat"]),
        (None, ["--member", "mlp-0"], ["--member", "no members"]),
        (None, ["--queries", 0], ["--queries", "greater than or equal to 1"]),
    ],
)  # fmt: skip
def test_mistakes_end_in_one_line(command, folder, tmp_path, spoil, arguments, words):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    if spoil:
        spoil(tmp_path)
    code, out, err = command(
        tmp_path, "--methods", "flat", "-k", K, "--threads", 1, "--out", tmp_path / "o", *arguments
    )
    lines = [line for line in err.splitlines() if "methods in" not in line]
    assert (code, out, len(lines)) == (2, "", 1), err
    for word in words:
        assert word in lines[0]
    assert not (tmp_path / "o").exists()


def test_a_run_must_be_finished_with_its_data_and_weights_as_they_were(tiny_run, tmp_path):
    root = tiny_run.directory.root

    def copied(name, change):
        copy = tmp_path / name
        for file in filter(Path.is_file, root.rglob("*")):
            place = copy / file.relative_to(root)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(file.read_bytes())
        manifest = json.loads((copy / "run.json").read_text())
        change(copy, manifest)
        (copy / "run.json").write_text(json.dumps(manifest))
        return copy

    def another(copy, manifest):
        (copy / "weights" / "mlp-0.safetensors").write_bytes((root / "weights" / "mlp-1.safetensors").read_bytes())

    for change, words in [
        (lambda copy, manifest: manifest.update(status="running"), "not finished"),
        (lambda copy, manifest: manifest["data"].update(fingerprint="0"), "data have changed"),
        (another, "weights"),
    ]:
        with pytest.raises(LeadlineError, match=words):
            compare(copied(words.replace(" ", "-"), change), "flat")
    with pytest.raises(LeadlineError, match="'mlp-7' is not in the run"):
        compare(root, "flat", member="mlp-7")
