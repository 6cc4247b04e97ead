"""Votes against brute force in float64, and against scikit-learn, on inputs where a careless search goes wrong."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier

import leadline
from leadline import LeadlineError
from leadline.knn import Bank, cells, exact
from leadline.knn.distance import squared_distance


def search(bank, queries, k, exclude=None):
    return Bank(bank).search(queries, k, exclude)


@pytest.fixture(params=["as it comes", "plain", "cells", "cells in float32", "narrow", "narrow in cells"])
def way(request, monkeypatch):
    """Each of the ways that a search can go, whatever the size of the bank and the processor."""
    if request.param != "as it comes":
        # All distances side by side are for rows of up to 128 values.
        monkeypatch.setattr(exact, "NARROW", 129 if "narrow" in request.param else 1)
    monkeypatch.setattr(cells, "SMALLEST", 1 if "cells" in request.param else 10**9)
    dtype = torch.float32 if request.param == "cells in float32" else torch.bfloat16
    monkeypatch.setattr(cells, "low_precision", lambda: dtype)


def brute_force(bank, queries, k, exclude=None):
    """The definition: all distances in float64, sorted by (distance, row)."""
    bank = bank.astype(np.float64)
    nearest = []
    for i, query in enumerate(queries.astype(np.float64)):
        distances = np.square(query - bank).sum(axis=1)
        if exclude is not None and exclude[i] >= 0:
            distances[exclude[i]] = np.inf
        nearest.append(np.sort(np.lexsort((np.arange(len(bank)), distances))[:k]))
    return np.array(nearest).reshape(len(queries), k)


def slow_votes(labels, neighbours):
    """Winner, its votes, runner-up and its votes by counting one query at a time."""
    rows = []
    for row in neighbours:
        counts = {}
        for label in labels[row]:
            counts[label] = counts.get(label, 0) + 1
        ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
        rows.append((*ranked[0], *(ranked[1] if len(ranked) > 1 else (-1, 0))))
    return np.array(rows)


def stacked(votes):
    return np.stack([votes.winner, votes.winner_votes, votes.runner_up, votes.runner_up_votes], axis=1)


def hard_inputs():
    """Names and banks [M, D]; every one is queried by its own first rows."""
    random = np.random.default_rng(0)
    plain = random.standard_normal((1500, 24)).astype(np.float32)
    logits = np.exp(20 * plain[:, :10].astype(np.float64))
    saturated = (logits / logits.sum(axis=1, keepdims=True)).astype(np.float32)
    constant = plain.copy()
    constant[:, 5:20] = 3.0
    near_ties = np.repeat(plain[:1], 1500, axis=0)
    near_ties[:, 3] = np.nextafter(near_ties[:, 3], np.float32(9)) * (1 + random.integers(0, 3, 1500) * 2.0**-22)
    clusters = np.concatenate([plain[:3] * 50, plain[3:1400] * 1e-3 + 100, plain[1400:]])
    return {
        "plain": plain,
        "float64": plain.astype(np.float64),
        "offset by 1e4": (plain + 1e4).astype(np.float32),
        "offset by 1e6": (plain + 1e6).astype(np.float32),
        "duplicated": np.repeat(plain[:50], 30, axis=0),
        "constant columns": constant,
        "all equal": np.ones((300, 7), np.float32),
        "all zero": np.zeros((300, 7), np.float32),
        "saturated softmax": saturated,
        "small integers": random.integers(0, 3, (1500, 12)).astype(np.float32),
        "tiny": plain * np.float32(1e-30),
        "huge": plain * np.float32(1e30),
        "near ties": near_ties.astype(np.float32),
        "unequal clusters": clusters.astype(np.float32),
        "far outlier": np.concatenate([plain, plain[:5] * 1e8]).astype(np.float32),
        "one column": plain[:, :1].copy(),
        "wide": random.standard_normal((80, 3000)).astype(np.float32),
    }


@pytest.mark.parametrize("name", hard_inputs())
@pytest.mark.parametrize("leave_out", [False, True])
def test_neighbours_are_those_of_float64_brute_force(way, name, leave_out):
    bank = hard_inputs()[name]
    queries = bank[:200]
    exclude = np.arange(len(queries)) if leave_out else None
    found, cost = search(bank, queries, 30, exclude)
    np.testing.assert_array_equal(found, brute_force(bank, queries, 30, exclude))
    assert cost.certified + cost.reranked + cost.fell_through == len(queries)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**32 - 1),
    n_bank=st.integers(2, 200),
    n_queries=st.integers(1, 20),
    width=st.integers(1, 300),
    k=st.integers(1, 40),
    levels=st.sampled_from([1, 2, 5, 1000]),
    offset=st.sampled_from([0.0, 1.0, 1e6]),
    scale=st.sampled_from([1e-25, 1.0, 1e25]),
    dtype=st.sampled_from([np.float32, np.float64]),
)
def test_votes_of_any_input_are_those_of_brute_force(
    way, seed, n_bank, n_queries, width, k, levels, offset, scale, dtype
):  # fmt: skip
    random = np.random.default_rng(seed)
    bank = ((random.integers(0, levels, (n_bank, width)) + offset) * scale).astype(dtype)
    queries = np.concatenate([bank, ((random.integers(0, levels, (n_queries, width)) + offset) * scale).astype(dtype)])
    queries = queries[-n_queries:]
    labels = random.integers(0, 4, n_bank)
    exclude = random.integers(-1, n_bank, n_queries)
    k = min(k, n_bank - 1)
    votes = leadline.knn_votes(bank, labels, queries, k=k, exclude=exclude)
    np.testing.assert_array_equal(stacked(votes), slow_votes(labels, brute_force(bank, queries, k, exclude)))


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x,
        lambda x: np.concatenate([x, x]),
        lambda x: np.concatenate([x, np.full((len(x), 5), 7.0, np.float32)], axis=1),
        lambda x: x + np.float32(1e4),
    ],
    ids=["plain", "duplicated", "constant columns", "offset"],
)
def test_votes_of_digits_equal_scikit_learn(change):
    # A small jitter leaves no ties of distance, which scikit-learn breaks by luck.
    data, labels = load_digits(return_X_y=True)
    jitter = np.random.default_rng(1).integers(0, 512, data.shape) / 2.0**12
    points = change(((data + jitter) / 16).astype(np.float32))
    labels = np.tile(labels, len(points) // len(labels))
    held_out = np.arange(len(points)) % 10 == 0
    bank, bank_labels = points[~held_out], labels[~held_out]
    classifier = KNeighborsClassifier(30, algorithm="brute").fit(bank.astype(np.float64), bank_labels)
    votes = leadline.knn_votes(bank, bank_labels, points[held_out])
    expected = classifier.predict(points[held_out].astype(np.float64))
    agree = votes.winner == expected
    # Duplicates tie, but share their label.
    assert agree.all()
    shares = classifier.predict_proba(points[held_out].astype(np.float64))
    np.testing.assert_array_equal(votes.winner_votes, np.round(shares.max(axis=1) * 30))


def test_leave_one_out_equals_scikit_learn_without_the_point():
    data, labels = load_digits(return_X_y=True)
    data = (data + np.random.default_rng(2).integers(0, 512, data.shape) / 2.0**12).astype(np.float32)[:400]
    labels = labels[:400]
    votes = leadline.knn_votes(data, labels, data, k=30, exclude=np.arange(400))
    for i in range(0, 400, 7):
        others = np.arange(400) != i
        classifier = KNeighborsClassifier(30, algorithm="brute").fit(data[others].astype(np.float64), labels[others])
        assert votes.winner[i] == classifier.predict(data[i : i + 1].astype(np.float64))[0]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("tiles", [(512, 4096), (7, 64), (64, 130)])
def test_tiles_and_threads_do_not_change_the_answer(way, monkeypatch, threads, tiles):
    random = np.random.default_rng(3)
    bank = random.integers(0, 5, (700, 9)).astype(np.float32)
    expected = brute_force(bank, bank[:300], 30)
    monkeypatch.setattr(exact, "QUERY_TILE", tiles[0])
    monkeypatch.setattr(exact, "BANK_TILE", tiles[1])
    monkeypatch.setattr(cells, "QUERY_TILE", tiles[0])
    monkeypatch.setattr(cells, "ROW_TILE", 1024 if tiles[1] == 4096 else 128)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found, _ = search(bank, bank[:300], 30)
    finally:
        torch.set_num_threads(before)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("name", ["plain", "saturated softmax", "duplicated", "small integers", "offset by 1e4"])
def test_selection_by_torch_gives_the_same_neighbours(monkeypatch, name):
    # The selection that a GPU uses, run here on the CPU.
    monkeypatch.setitem(exact._KEEP, "cpu", exact._keep_on_gpu)
    monkeypatch.setattr(exact, "NARROW", 1)
    bank = hard_inputs()[name]
    found, _ = search(bank, bank[:100], 30)
    np.testing.assert_array_equal(found, brute_force(bank, bank[:100], 30))


def test_fast_matmul_settings_do_not_change_the_answer(way):
    bank = hard_inputs()["offset by 1e4"]
    torch.set_float32_matmul_precision("medium")
    try:
        found, _ = search(bank, bank[:200], 30)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    np.testing.assert_array_equal(found, brute_force(bank, bank[:200], 30))


def test_bound_holds_for_every_pair():
    """score <= true score <= score + slack, for the rows and queries of hard inputs, in exact rational terms."""
    for name in ("plain", "offset by 1e4", "saturated softmax", "unequal clusters", "wide", "tiny"):
        bank = hard_inputs()[name]
        queries = bank[:40]
        centre, longest = exact._survey(bank)
        frame = exact._frame(centre, longest, bank.shape[1])
        rounded, norms = frame.place(queries)
        slack = np.empty(len(bank))
        nobody = np.full(len(queries), -1)
        tiles = exact._screen(bank, frame, rounded, nobody, slack, "cpu")
        scores = np.concatenate([scores.numpy().copy() for _, _, scores in tiles], axis=1).astype(np.longdouble)
        wide = (bank.astype(np.longdouble) - frame.centre) * frame.scale
        true = np.square(wide[:40, None] - wide[None]).sum(axis=2) - np.square(wide[:40]).sum(axis=1)[:, None]
        # The query's own error is the same for all its rows and left out of the scores.
        error = frame.slack_queries * norms[:, None]
        assert (scores - error <= true).all(), name
        assert (true <= scores + slack + error).all(), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_bounds_of_cells_hold_for_every_candidate(monkeypatch, dtype):
    """low <= true squared distance <= high, in extended precision, for what the products of hard inputs let through."""
    for name in ("plain", "offset by 1e4", "saturated softmax", "unequal clusters", "wide", "tiny", "near ties"):
        bank = hard_inputs()[name]
        queries = bank[:60]
        centre, longest = exact._survey(bank)
        scale = exact._scale(4 * longest)
        cut = cells.cut(bank, scale, centre, dtype)
        size = min(100, len(bank))
        found = cells.screen(cut, queries, 10, np.full(len(queries), -1), size)
        there = found.rows >= 0
        differences = (queries[:, None].astype(np.longdouble) - bank[found.rows]) * scale
        true = np.square(differences).sum(axis=2)
        assert there.sum() >= 10 * len(queries)
        assert (found.lows <= true)[there].all(), name
        assert (true <= found.highs)[there].all(), name


def test_distance_is_numpys_float64_bit_for_bit():
    random = np.random.default_rng(4)
    for width in [*range(1, 140), 255, 256, 257, 784, 1000, 4097, 65536]:
        query, row = random.standard_normal((2, width)).astype(np.float32) * 100
        assert squared_distance(query, row) == np.square(query.astype(np.float64) - row).sum()


def test_torch_tensors_and_images_are_flattened():
    random = np.random.default_rng(5)
    images = random.integers(0, 255, (60, 3, 4, 4), dtype=np.uint8)
    labels = random.integers(0, 3, 60)
    flat = leadline.knn_votes(images.reshape(60, -1).astype(np.float32), labels, images.reshape(60, -1), k=5)
    whole = leadline.knn_votes(torch.from_numpy(images), torch.from_numpy(labels), torch.from_numpy(images), k=5)
    np.testing.assert_array_equal(stacked(flat), stacked(whole))


def test_unanimous_votes_have_no_runner_up():
    votes = leadline.knn_votes(np.zeros((5, 2), np.float32), np.full(5, 3), np.zeros((1, 2), np.float32), k=5)
    assert stacked(votes).tolist() == [[3, 5, -1, 0]]


def test_ties_of_the_vote_go_to_the_lower_class():
    bank = np.zeros((6, 1), np.float32)
    votes = leadline.knn_votes(bank, np.array([9, 4, 9, 4, 2, 2]), bank[:1], k=6)
    assert stacked(votes).tolist() == [[2, 2, 4, 2]]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"bank": np.full((40, 2), np.nan)}, "bank row 0.*not finite"),
        ({"queries": np.array([[0.0, 0.0], [np.inf, 0.0]])}, "query 1.*not finite"),
        ({"labels": np.full(40, -1)}, "labels: row 0 has label -1"),
        ({"labels": np.zeros(39, int)}, r"labels.*\(40,\)"),
        ({"labels": np.zeros(40)}, "labels.*integers"),
        ({"k": 41}, "40 rows are too few for k=41"),
        ({"k": 40, "exclude": np.array([0, 1, 2])}, "too few for k=40"),
        ({"k": 0}, "k: 0"),
        ({"queries": np.zeros((3, 5))}, "queries: rows of 5"),
        ({"exclude": np.array([0, 1, 40])}, "exclude: query 2 has 40"),
        ({"method": "magic"}, "'magic'.*exact"),
        ({"bank": np.zeros(40)}, "bank: 1 dimensions"),
        ({"bank": np.array([["a", "b"]] * 40)}, "real numbers"),
        ({"device": "meta"}, "device: meta"),
    ],
)
def test_bad_input_is_named(change, words):
    arguments = {"bank": np.zeros((40, 2)), "labels": np.zeros(40, int), "queries": np.zeros((3, 2)), **change}
    with pytest.raises(LeadlineError, match=words) as error:
        leadline.knn_votes(**arguments)
    assert "\n" not in str(error.value)


def test_several_k_are_the_single_ones():
    random = np.random.default_rng(6)
    bank = random.integers(0, 4, (500, 6)).astype(np.float32)
    labels = random.integers(0, 5, 500)
    together = leadline.knn_votes(bank, labels, bank[:80], k=[10, 30, 100], exclude=np.arange(80))
    assert list(together) == [10, 30, 100]
    for k, votes in together.items():
        expected = slow_votes(labels, brute_force(bank, bank[:80], k, np.arange(80)))
        np.testing.assert_array_equal(stacked(votes), expected)


def test_neighbours_come_nearest_first_with_their_distances():
    random = np.random.default_rng(7)
    bank = random.integers(0, 5, (400, 7)).astype(np.float32)
    found = leadline.knn_votes(bank, np.zeros(400, int), bank[:50], k=20, return_neighbours=True).neighbours
    distances = np.sqrt(np.square(bank[:50, None].astype(np.float64) - bank).sum(axis=2))
    for i in range(50):
        order = np.lexsort((np.arange(400), distances[i]))[:20]
        np.testing.assert_array_equal(found.rows[i], order)
        np.testing.assert_array_equal(found.distances[i], distances[i][order])


def test_the_graph_serves_scikit_learn_as_a_precomputed_one():
    data, labels = load_digits(return_X_y=True)
    data = (data + np.random.default_rng(8).random(data.shape) / 100).astype(np.float32)
    votes = leadline.knn_votes(data[:1000], labels[:1000], data[1000:], k=15, return_neighbours=True)
    graph = votes.neighbours.to_csr()
    classifier = KNeighborsClassifier(15, metric="precomputed")
    classifier.fit(np.zeros((1000, 1000)), labels[:1000])
    np.testing.assert_array_equal(classifier.predict(graph), votes.winner)
    theirs = KNeighborsClassifier(15, algorithm="brute").fit(data[:1000].astype(np.float64), labels[:1000])
    expected = theirs.kneighbors_graph(data[1000:].astype(np.float64), mode="distance")
    np.testing.assert_allclose(graph.toarray(), expected.toarray(), rtol=1e-6)


def test_a_large_k_is_answered():
    random = np.random.default_rng(9)
    bank = random.standard_normal((1500, 8)).astype(np.float32)
    found, _ = search(bank, bank[:30], 1000, np.arange(30))
    np.testing.assert_array_equal(found, brute_force(bank, bank[:30], 1000, np.arange(30)))
