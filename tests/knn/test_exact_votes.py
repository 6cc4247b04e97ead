"""Votes against brute force in float64, and against scikit-learn, on inputs where a careless search goes wrong."""

import os
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numba import njit
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier

import leadline
from leadline import LeadlineError
from leadline.knn import Bank, count_votes, exact, kernels, product, screen
from leadline.knn.arrays import Shards
from leadline.knn.distance import squared_distance

WAYS = {
    # What is patched in leadline.knn.screen so that a small bank is searched as a large one would be.
    "as it comes": {},
    "cells": {"SAMPLE": 64, "WORTH": 2},
    "cells in float32": {"SAMPLE": 64, "WORTH": 2, "precisions": lambda: [torch.float32]},
    "projected": {"SAMPLE": 64, "WIDTHS": (2, 5), "SCREENED": 1, "MEASURED": 0, "OF_A_VALUE": 0, "NARROW": 4},
    "projected in float32": {
        "SAMPLE": 64, "WIDTHS": (3,), "SCREENED": 1, "MEASURED": 0, "OF_A_VALUE": 0, "NARROW": 6,
        "precisions": lambda: [torch.float32],
    },
    "plain, in int16": {"SAMPLE": 64, "WIDTHS": (), "WORTH": 0, "precisions": lambda: [torch.int16, torch.float32]},
    "cells in int16": {"SAMPLE": 64, "WORTH": 2, "precisions": lambda: [torch.int16, torch.float32]},
    "plain, in int8": {"SAMPLE": 64, "WIDTHS": (), "WORTH": 0, "precisions": lambda: [torch.int8]},
    "in tiles": {},
}  # fmt: skip
HAS = {
    torch.float32: True,
    torch.int16: product.HAS_INT16,
    torch.bfloat16: product.HAS_BFLOAT16,
    torch.int8: product.HAS_INT8,
}


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    """Each of the ways that a search can go, whatever the size of the bank and the processor; `search` follows it."""
    for kind, has in (("int8", product.HAS_INT8), ("int16", product.HAS_INT16)):
        if kind in request.param and not has:
            pytest.skip(f"this processor does not multiply {kind}")
    for name, value in WAYS[request.param].items():
        monkeypatch.setattr(screen, name, value)
    if request.param != "as it comes":
        # Measured in the rows' own precision first, whatever their width.
        monkeypatch.setattr(exact, "NARROW", 1)
    if "in tiles" not in request.param:
        return lambda bank, queries, k, exclude=None: Bank(bank).search(queries, k, exclude)
    monkeypatch.setattr(kernels, "BLOCK", 48)
    return lambda bank, queries, k, exclude=None: Bank(
        Shards([bank[: len(bank) // 3], bank[len(bank) // 3 :]]), memory_budget=1
    ).search(queries, k, exclude)


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
    found, cost = way(bank, queries, 30, exclude)
    np.testing.assert_array_equal(found, brute_force(bank, queries, 30, exclude))
    assert cost.certified + cost.reranked + cost.fell_through == len(queries)


def _grid(random, n, width, levels):
    return random.integers(0, levels, (n, width)).astype(np.float64)


def _softmax(random, n, width, levels):
    logits = random.standard_normal((n, width)) * 10 * levels
    return np.exp(logits - logits.max(axis=1, keepdims=True))


def _near_ties(random, n, width, levels):
    """Rows on a sphere about the first, that differ from each other by a few units in the last place."""
    steps = random.standard_normal((n, width))
    steps /= np.linalg.norm(steps, axis=1, keepdims=True)
    return steps * (1 + random.integers(0, levels + 1, (n, 1)) * 2.0**-23)


def _unequal_clusters(random, n, width, levels):
    cluster = np.minimum(random.geometric(0.6, n), levels)
    return cluster[:, None] * 100.0 + random.standard_normal((n, width)) * 10.0 ** -cluster[:, None]


def _zeros(random, n, width, levels):
    return _grid(random, n, width, 2) * (random.random((n, 1)) < 1 / levels)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kind=st.sampled_from([_grid, _softmax, _near_ties, _unequal_clusters, _zeros]),
    seed=st.integers(0, 2**32 - 1),
    n_bank=st.integers(2, 200),
    n_queries=st.integers(1, 20),
    width=st.integers(1, 300),
    k=st.one_of(st.integers(1, 40), st.just(200)),
    levels=st.sampled_from([1, 2, 5, 1000]),
    offset=st.sampled_from([0.0, 1.0, 1e6]),
    scale=st.sampled_from([1e-25, 1.0, 1e25]),
    dtype=st.sampled_from([np.float32, np.float64]),
    leave_out=st.booleans(),
)
def test_votes_of_any_input_are_those_of_brute_force(
    way, kind, seed, n_bank, n_queries, width, k, levels, offset, scale, dtype, leave_out
):  # fmt: skip
    random = np.random.default_rng(seed)
    rows = ((kind(random, n_bank + n_queries, width, levels) + offset) * scale).astype(dtype)
    bank, queries = rows[:n_bank], rows[-n_queries - n_bank // 2 :][:n_queries]
    labels = random.integers(0, 4, n_bank)
    exclude = random.integers(-1, n_bank, n_queries) if leave_out else None
    k = min(k, n_bank - leave_out)  # of all rows, where it is large
    found, _ = way(bank, queries, k, exclude)
    expected = brute_force(bank, queries, k, exclude)
    np.testing.assert_array_equal(found, expected)
    votes = leadline.knn_votes(bank, labels, queries, k=k, exclude=exclude)
    np.testing.assert_array_equal(stacked(votes), slow_votes(labels, expected))


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


@pytest.mark.parametrize("far", [1e3, 1e12, 1e35])
def test_queries_far_from_the_bank_are_answered(way, far):
    random = np.random.default_rng(10)
    bank = random.standard_normal((1000, 70)).astype(np.float32)
    queries = (bank[:60] * far).astype(np.float32)
    found, _ = way(bank, queries, 30)
    np.testing.assert_array_equal(found, brute_force(bank, queries, 30))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_do_not_change_the_answer(way, threads):
    random = np.random.default_rng(3)
    bank = random.integers(0, 5, (700, 9)).astype(np.float32)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found, _ = way(bank, bank[:300], 30)
    finally:
        torch.set_num_threads(before)
    np.testing.assert_array_equal(found, brute_force(bank, bank[:300], 30))


def test_fast_matmul_settings_do_not_change_the_answer(way):
    bank = hard_inputs()["offset by 1e4"]
    torch.set_float32_matmul_precision("medium")
    try:
        found, _ = way(bank, bank[:200], 30)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    np.testing.assert_array_equal(found, brute_force(bank, bank[:200], 30))


BOUNDED = ("plain", "offset by 1e4", "saturated softmax", "unequal clusters", "wide", "tiny", "near ties")


@njit
def reached(packed, values, panel, bias, units, thresholds, of_queries):
    """Bit j of [i]: as `product.reach` has it for the queries 0 to GROUP - 1."""
    masks = np.zeros(product.GROUP, product.WORD)
    starts = np.zeros(product.GROUP, np.int32)
    if packed.itemsize == 1:
        for i in range(product.GROUP):
            starts[i] = -128 * np.int64(packed[i].sum())
    product.reach(packed, 0, values, panel, bias, units, thresholds, starts, of_queries, masks)
    return masks


def bits(masks):
    return np.array([[int(mask) >> j & 1 for j in range(product.PANEL)] for mask in masks], bool)


def drawn(dtype, random, n, width):
    """Random values [n, width], as numpy has them and as `reach` takes them."""
    most = screen.largest_integer(dtype, width)
    if most:
        whole = random.integers(-most, most + 1, (n, width)).astype(screen.PACKED[dtype][0])
        return whole.astype(np.float64), whole
    values = torch.from_numpy(random.standard_normal((n, width))).to(dtype)
    return values.double().numpy(), values.view(torch.uint16 if dtype == torch.bfloat16 else dtype).numpy()


@pytest.mark.parametrize("dtype", HAS)
@pytest.mark.parametrize("width", [4, 12, 36, 300, 20_000])
def test_products_reach_what_they_reach_in_float64(dtype, width):
    if not HAS[dtype]:
        pytest.skip(f"this processor does not multiply {dtype}")
    random = np.random.default_rng(width)
    rows, packed_rows = drawn(dtype, random, 3 * product.PANEL, width)
    queries, packed = drawn(dtype, random, product.GROUP, width)
    together = screen.PACKED[dtype][1]
    if dtype == torch.int8:
        packed_rows = packed_rows ^ np.int8(-128)
    values = packed_rows.reshape(3, product.PANEL, -1, together).transpose(0, 2, 1, 3)
    values = np.ascontiguousarray(values.reshape(3, -1, product.PANEL * together))
    bias = random.standard_normal((3, product.PANEL)).astype(np.float32)
    units = random.uniform(0.5, 2, (3, product.PANEL)).astype(np.float32)
    most = screen.largest_integer(dtype, width)
    of_queries = random.uniform(0.5, 2, product.GROUP).astype(np.float32) / np.float32(max(1, most) ** 2)
    thresholds = random.standard_normal(product.GROUP).astype(np.float32)
    for panel in range(3):
        masks = reached(packed, values, panel, bias, units, thresholds, of_queries)
        sums = queries @ rows[panel * product.PANEL : (panel + 1) * product.PANEL].T
        if most:
            sums = sums * of_queries[:, None] * units[panel]
        sums += bias[panel]
        clear = np.abs(sums - thresholds[:, None]) > 1e-4 * width**0.5
        assert clear.mean() > 0.9
        np.testing.assert_array_equal(bits(masks)[clear], (sums >= thresholds[:, None])[clear])


def test_the_largest_sum_of_int8_products_is_still_an_integer():
    if not product.HAS_INT8:
        pytest.skip("this processor does not multiply int8")
    width = product.LONGEST_INT8
    values = np.full((1, width // 4, product.PANEL * 4), np.int8(127) ^ np.int8(-128))
    packed = np.full((product.GROUP, width), 127, np.int8)
    packed[1] = -127
    sums = np.array([127 * 127 * width] + [-127 * 127 * width] + [127 * 127 * width] * 4, np.float64)
    none, one = np.zeros((1, product.PANEL), np.float32), np.ones((1, product.PANEL), np.float32)
    each = np.ones(product.GROUP, np.float32)
    assert bits(reached(packed, values, 0, none, one, (sums - 1e4).astype(np.float32), each)).all()
    assert not bits(reached(packed, values, 0, none, one, (sums + 1e4).astype(np.float32), each)).any()


@pytest.mark.parametrize("n_cells", [1, 3])
@pytest.mark.parametrize("dtype", [*HAS, "int16, as coarse as int8"])
def test_no_pair_within_the_limit_is_left_out(dtype, n_cells, monkeypatch):
    """With the true distance of a pair as the limit, its product reaches the threshold: in extended precision."""
    if isinstance(dtype, str):
        dtype = torch.int16
        monkeypatch.setattr(screen, "largest_integer", lambda *_: 127)
    if not HAS[dtype]:
        pytest.skip(f"this processor does not multiply {dtype}")
    left_out = tried = 0
    for name in BOUNDED:
        bank = hard_inputs()[name]
        ready = Bank(bank)
        cells = screen._cut(bank, ready._centre, ready._scale, n_cells, dtype)
        width = cells.values.shape[1] * cells.values.shape[2] // product.PANEL
        placed = [(bank.astype(np.longdouble) - centre) * ready._scale for centre in cells.centres]
        for c in range(n_cells):
            packed = np.zeros((product.GROUP, width), cells.values.dtype)
            floats = np.empty(bank.shape[1], np.float32)
            for query in range(0, 60, 7):
                alpha, lost, unit = kernels._round(
                    bank[query], cells.centres[c], ready._scale, floats, packed[0], cells.whole
                )
                of_queries = np.full(product.GROUP, unit, np.float32)
                for panel in range(cells.first[c], min(cells.first[c] + 2, cells.first[c + 1])):
                    rows = cells.order[panel * product.PANEL : (panel + 1) * product.PANEL]
                    there = np.flatnonzero(rows >= 0)
                    true = np.sqrt(np.square(placed[c][rows[there]] - placed[c][query]).sum(axis=1))
                    for share in (1, 0.99):
                        for j, distance in zip(there, true, strict=True):
                            limit = share * float(distance)
                            threshold = kernels._threshold(
                                alpha,
                                lost,
                                limit * (1 + 1e-15),
                                cells.lengths[c],
                                cells.residuals[c],
                                cells.smallest,
                                cells.usual,
                                width,
                            )
                            thresholds = np.full(product.GROUP, threshold, np.float32)
                            masks = reached(
                                packed, cells.values, panel, cells.bias, cells.units, thresholds, of_queries
                            )
                            if share == 1:
                                assert bits(masks)[0, j], (name, query, j)
                            else:
                                tried += 1
                                left_out += not bits(masks)[0, j]
    assert left_out > 0.1 * tried  # and the bound is not empty


@pytest.mark.parametrize("dtype", [torch.int16, torch.int8])
@pytest.mark.parametrize("offsets", [(0.25, 0.25), (0.1, 0.4)])
@pytest.mark.parametrize("longer", [0.5, 1, 2])
def test_rounding_that_lies_along_the_query_is_counted_in_full(dtype, offsets, longer, monkeypatch):
    """Rows that lose the same share of a unit in every value, and a query that loses nothing, in that direction."""
    if not HAS[dtype]:
        pytest.skip(f"this processor does not multiply {dtype}")
    monkeypatch.setattr(screen, "largest_integer", lambda *_: 127)
    random, width, unit = np.random.default_rng(0), 256, 2.0**-12
    whole = random.integers(-126, 127, (3 * product.PANEL, width))
    rows = (whole + random.uniform(*offsets, (len(whole), 1))).astype(np.float32) * np.float32(unit)
    rows[:, 0] = 127 * unit
    cells = screen._cut(rows, np.zeros(width), 1.0, 1, dtype)
    query = np.full(width, longer * cells.usual / width**0.5, np.float32)
    packed = np.zeros((product.GROUP, width), cells.values.dtype)
    alpha, lost, of_query = kernels._round(query, np.zeros(width), 1.0, np.empty(width, np.float32), packed[0], 127)
    true = np.sqrt(np.square(rows.astype(np.longdouble) - query).sum(axis=1)).astype(np.float64)
    for place, row in enumerate(cells.order):
        threshold = kernels._threshold(
            alpha, lost, true[row] * (1 + 1e-15), cells.lengths[0], cells.residuals[0], cells.smallest, cells.usual,
            width,
        )  # fmt: skip
        panel, j = divmod(place, product.PANEL)
        thresholds, units = np.full(product.GROUP, threshold, np.float32), np.full(product.GROUP, of_query, np.float32)
        masks = reached(packed, cells.values, panel, cells.bias, cells.units, thresholds, units)
        assert bits(masks)[0, j], place


@pytest.mark.parametrize("dtype", HAS)
def test_rounding_takes_away_no_more_than_it_says(dtype):
    kind = screen.PACKED[dtype][0]
    for name in BOUNDED:
        bank = hard_inputs()[name]
        ready, floats = Bank(bank), np.empty(bank.shape[1], np.float32)
        most = screen.largest_integer(dtype, bank.shape[1])
        for row in bank[:60:7]:
            packed = np.zeros(bank.shape[1], kind)
            square, lost, unit = kernels._round(row, ready._centre, ready._scale, floats, packed, most)
            whole = (row.astype(np.longdouble) - ready._centre) * ready._scale
            values = (packed.astype(np.int32) << 16).view(np.float32) if dtype == torch.bfloat16 else packed
            true = np.sqrt(np.square(whole - values.astype(np.longdouble) * unit).sum())
            assert true <= lost <= 1.01 * true + 1e-6 * np.sqrt(square), name
            np.testing.assert_allclose(square, np.square(whole).sum(), rtol=1e-12)


def test_projections_lengthen_nothing():
    for name in (*BOUNDED, "float64"):
        bank = hard_inputs()[name]
        ready = Bank(bank)
        matrix = torch.linalg.qr(torch.randn(bank.shape[1], 4, generator=torch.Generator().manual_seed(0))).Q
        axes = screen._contraction(matrix.contiguous())
        lengths = np.empty(len(bank))
        points = screen._project(bank, ready._centre, ready._scale, axes, lengths).astype(np.longdouble)
        placed = (bank.astype(np.longdouble) - ready._centre) * ready._scale
        assert (np.sqrt(np.square(placed).sum(axis=1)) <= lengths * (1 + 1e-9)).all()
        for i in range(0, 60, 7):
            true = np.sqrt(np.square(placed - placed[i]).sum(axis=1))
            seen = np.sqrt(np.square(points - points[i]).sum(axis=1))
            assert (seen <= axes.grow * true + axes.slip * (lengths + lengths[i])).all(), name
            # A vector within the plane is not shortened either.
        inside = (matrix @ torch.randn(4, 50)).T.numpy()
        seen = screen._project(inside, np.zeros(len(matrix)), 1.0, axes, np.empty(50))
        np.testing.assert_allclose(np.linalg.norm(seen, axis=1), np.linalg.norm(inside, axis=1), rtol=1e-5)


@pytest.mark.parametrize("far", [1, 30, 1e6])
def test_projected_queries_are_no_farther_than_their_slip_allows(far):
    random = np.random.default_rng(14)
    bank = random.standard_normal((300, 2000)).astype(np.float32)
    queries = (bank[:20] * far).astype(np.float32)
    ready = Bank(bank)
    matrix = torch.linalg.qr(torch.randn(2000, 128, generator=torch.Generator().manual_seed(0))).Q
    axes = screen._contraction(matrix)
    points = screen._project(bank, ready._centre, ready._scale, axes)
    projected = screen.Screen(
        ready._centre, ready._scale, axes, screen._cut(points, np.zeros(128), 1.0, 1, torch.float32), ""
    )
    ask = projected.ask(queries, np.full(20, -1), 30, 0.0, exact=False)
    for i in range(20):
        true = np.sqrt(np.square((queries[i].astype(np.longdouble) - bank) * ready._scale).sum(axis=1))
        seen = np.sqrt(np.square(ask.points[i].astype(np.longdouble) - points).sum(axis=1))
        assert (seen <= ask.grow * true + ask.slips[i]).all()
        # What float32 gets wrong is in proportion to the query's length, so the slip must be.
        assert ask.slips[i] > 1e-7 * np.linalg.norm(ask.points[i])


@pytest.mark.parametrize("width", [3, 100, 5000])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_measured_distances_err_by_no_more_than_they_say(width, dtype):
    random = np.random.default_rng(width)
    rows = ((random.standard_normal((200, width)) + 1e3) * 1e-3).astype(dtype)
    error = screen.error_of(width, dtype == np.float64, exact=False)
    for row in rows[1:]:
        true = np.square(rows[0].astype(np.longdouble) - row).sum()
        assert abs(kernels._measure(rows[0], row, 1.0, np.inf) - true) <= error * true
        assert kernels._measure(rows[0], row, 1.0, float(true) / 2) == np.inf or width <= kernels.CHUNK


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
        ({"k": [3, 5], "winners_only": True}, "winners_only"),
        ({"return_neighbours": True, "winners_only": True}, "winners_only"),
        ({"bank": [np.zeros((20, 2)), np.full((20, 2), np.inf)]}, "bank row 20.*not finite"),
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


def test_a_large_k_is_answered(way):
    random = np.random.default_rng(9)
    bank = random.standard_normal((1500, 8)).astype(np.float32)
    found, _ = way(bank, bank[:30], 1000, np.arange(30))
    np.testing.assert_array_equal(found, brute_force(bank, bank[:30], 1000, np.arange(30)))


@pytest.mark.parametrize("name", hard_inputs())
def test_winners_alone_are_those_of_the_whole_vote(way, monkeypatch, name):
    # A coarse measure leaves many rows open.
    real = screen.error_of
    monkeypatch.setattr(exact, "error_of", lambda *a, **b: max(real(*a, **b), 0.03))
    bank = hard_inputs()[name]
    labels = np.random.default_rng(0).integers(0, 4, len(bank)) * 3
    ready = Bank(bank)
    codes = np.unique(labels, return_inverse=True)[1]
    rows, cost = ready.search(bank[:20], 10, np.arange(20), winners_of=codes)
    expected = slow_votes(labels, brute_force(bank, bank[:20], 10, np.arange(20)))
    np.testing.assert_array_equal(count_votes(labels[rows]).winner, expected[:, 0])
    _, whole = ready.search(bank[:20], 10, np.arange(20))
    assert cost.reranked <= whole.reranked


def test_winners_alone_need_less():
    random = np.random.default_rng(11)
    bank = np.concatenate([random.standard_normal((500, 70)) + 4 * c for c in range(3)]).astype(np.float32)
    bank = np.round(bank * 2) / 2  # near ties
    labels = np.arange(1500) // 500
    votes = leadline.knn_votes(bank, labels + 2**31 - 3, bank, k=10, winners_only=True)
    whole = leadline.knn_votes(bank, labels + 2**31 - 3, bank, k=10)
    np.testing.assert_array_equal(votes.winner, whole.winner)
    assert (votes.winner_votes == -1).all()
    assert (votes.runner_up == -1).all()
    ready = Bank(bank.astype(np.float32))
    assert ready.search(bank, 10)[1].reranked > 100
    assert ready.search(bank, 10, winners_of=labels)[1].reranked < 10


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_banks_and_queries_may_lie_in_files(tmp_path, dtype):
    random = np.random.default_rng(12)
    bank = random.standard_normal((9000, 70)).astype(dtype)
    labels = random.integers(0, 5, 9000)
    np.save(tmp_path / "whole.npy", bank)
    for i, part in enumerate(np.split(bank, [10, 4000])):
        np.save(tmp_path / f"{i}.npy", part)
    whole = np.load(tmp_path / "whole.npy", mmap_mode="r")
    shards = [np.load(tmp_path / f"{i}.npy", mmap_mode="r") for i in range(3)]
    expected = slow_votes(labels, brute_force(bank, bank[:100], 30, np.arange(100)))
    for rows in (whole, shards):
        for budget in (1, 1 << 20, 1 << 30):
            asked = rows if isinstance(rows, list) else rows[:100]
            found = leadline.knn_votes(
                rows, labels, [*shards[:1], shards[1][:90]] if asked is rows else asked, k=30, exclude=np.arange(100),
                memory_budget=budget,
            )  # fmt: skip
            np.testing.assert_array_equal(stacked(found), expected)


@pytest.mark.slow
def test_the_size_of_a_bank_is_what_is_allocated_for_it():
    rows = np.random.default_rng(0).normal(size=(20_000, 24)).astype(np.float32)
    Bank(rows)  # compiles
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    bank = Bank(rows)
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert bank.size_bytes == pytest.approx(after - before, rel=0.02) and bank.size_bytes > 20_000 * 24
    assert Bank(Shards([rows]), memory_budget=1 << 20).size_bytes == 0


@pytest.mark.slow
def test_a_processor_with_avx2_alone_gives_the_same_answers():
    """The tests of this file again, compiled as for a processor of 2013."""
    if product.VECTORS == 1:
        pytest.skip("this processor has no AVX-512: that its own way is right is tested by all the others")
    features = "+avx2,+fma,+avx,+sse4.2,+sse4.1,+ssse3,+sse3,+sse2,+popcnt,+bmi,+bmi2,+lzcnt,+f16c,-avx512f"
    environment = os.environ | {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": features}
    command = [sys.executable, "-m", "pytest", __file__, "-q", "-m", "not slow"]
    again = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert again.returncode == 0, again.stdout[-3000:]
    assert "passed" in again.stdout
