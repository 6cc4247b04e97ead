"""The search on a GPU against brute force in float64, and its kernels against what they stand for.

On a machine without a GPU, Triton's interpreter runs the kernels (tests/conftest.py), a small bank in a second or so.
"""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_exact_votes import brute_force, hard_inputs, slow_votes, stacked
from triton.runtime.errors import OutOfResources, PTXASError

import leadline
from leadline import LeadlineError
from leadline.knn import Bank, DeviceBank, count_votes, fused, on_device
from leadline.knn.arrays import Shards
from leadline.knn.distance import squared_distance
from leadline.knn.fused import _error

HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"
needs_gpu = pytest.mark.skipif(not HAS_GPU, reason="there is no GPU")
K = 5
EXAMPLES = 60 if HAS_GPU else 6  # in the interpreter a second each


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def kernels(monkeypatch):
    """A small bank is searched as a large one would be, in cells; in the interpreter all tiles are small too."""
    for name, value in {"SMALL": 64, "OF_A_CELL": 300 if HAS_GPU else 40, "WORTH": 9, "SEEN_FIRST": 32}.items():
        monkeypatch.setattr(on_device, name, value)
    if HAS_GPU:
        return
    small = {
        "QUERIES": 4,
        "ON_HOPPER": {0: fused.Shape(32, 4, 3)},
        "DEPTH": 32,
        "RUN": 4,
        "CAPACITY": 128,
        "FLUSH": 1024,
        "GROUP": 2,
    }
    for name, value in small.items():
        monkeypatch.setattr(fused, name, value)
    # 20 ms a pair otherwise; test_squared_distances_are_numpys_bit_for_bit says that it makes no difference.
    monkeypatch.setattr(fused, "measure", lambda q, x, i, j, *tree: on_device._measured(q[i], x[j], *tree))


@pytest.fixture
def no_triton(monkeypatch):
    monkeypatch.setattr(on_device, "fused", None)


def tensor(array):
    """On the device; a copy, since two arguments of a kernel may not be one memory in the interpreter."""
    return torch.from_numpy(np.array(array)).to(DEVICE)


def few(bank):
    """As many rows as the interpreter takes in a second."""
    return bank if HAS_GPU else np.ascontiguousarray(bank[:: max(1, len(bank) // 90)][:100])


def asked_of(bank, n=6):
    """Some of its rows, and the row that each must not have: itself, or none."""
    ids = np.arange(100 if HAS_GPU else n)
    return bank[ids], np.where(ids % 2, ids, -1)


def check(bank, queries, k, exclude=None, ready=None):
    """The neighbours are those of brute force. Returns the bank made ready, and the cost."""
    ready = ready or DeviceBank(tensor(bank), DEVICE)
    found, cost = ready.search(tensor(queries), k, exclude)
    np.testing.assert_array_equal(found, brute_force(bank, queries, k, exclude))
    return ready, cost


def clustered(n, width=20, clusters=4, seed=0):
    """Rows of clusters far from each other, one after another in turn."""
    random = np.random.default_rng(seed)
    centres = random.standard_normal((clusters, width)) * 10
    return (centres[np.arange(n) % clusters] + random.standard_normal((n, width))).astype(np.float32)


FAST_INT8 = ("plain", "wide", "near ties", "far outlier", "tiny")
SLOW_DIRECT = ("float64", "offset by 1e4", "constant columns", "saturated softmax", "near ties", "all zero")


@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, "float16") for name in hard_inputs()]
    + [pytest.param(name, "int8", marks=[pytest.mark.slow] * (name not in FAST_INT8)) for name in hard_inputs()]
    + [pytest.param(name, "float32", marks=[pytest.mark.slow] * (name in SLOW_DIRECT)) for name in hard_inputs()],
)
def test_neighbours_are_those_of_float64_brute_force(kernels, monkeypatch, name, kind):
    bank = few(hard_inputs()[name])
    if kind != "float32":
        monkeypatch.setattr(on_device, "NARROW", 1)
    elif bank.shape[1] >= on_device.NARROW:
        pytest.skip("rows so wide are always rounded")
    queries, exclude = asked_of(bank)
    ready = DeviceBank(tensor(bank), DEVICE, screen="int8" if kind == "int8" else "float16")
    _, cost = check(bank, queries, K, exclude, ready)
    assert cost.certified + cost.reranked + cost.fell_through == len(queries)
    if name == "plain":
        assert cost.fell_through == 0
    scale = ready._whole._scale
    if 2.0**-100 < scale < 2.0**100 and (bank.dtype == np.float32 or kind != "float32"):
        assert kind in ready.plan
        assert cost.visits > 0
        assert ready.size_bytes > 0


@pytest.mark.parametrize("name", ["plain", "duplicated", "unequal clusters"])
def test_one_cell_does_as_well(kernels, monkeypatch, name):
    monkeypatch.setattr(on_device, "WORTH", 0)
    monkeypatch.setattr(on_device, "NARROW", 1)
    bank = few(hard_inputs()[name])
    ready, _ = check(bank, *_with_k(bank))
    assert "1 cell in" in ready.plan


def _with_k(bank):
    queries, exclude = asked_of(bank)
    return queries, K, exclude


@pytest.mark.parametrize("name", ["plain", "near ties", "one column", "wide"])
def test_without_triton_small_pieces_do_as_well(no_triton, monkeypatch, name):
    monkeypatch.setattr(on_device, "BYTES", 1 << 17)
    bank = hard_inputs()[name]
    check(bank, bank[:20], K, np.arange(20))


@pytest.mark.parametrize("name", hard_inputs())
@pytest.mark.parametrize("leave_out", [False, True])
def test_without_triton_all_is_done_in_float64(no_triton, name, leave_out):
    bank = hard_inputs()[name]
    queries = bank[:200]
    ready, cost = check(bank, queries, 30, np.arange(200)[: len(queries)] if leave_out else None)
    assert ready.plan == "float64"
    assert cost.fell_through == len(queries)


@pytest.mark.parametrize("kind", ["float16", "float32"])
def test_tiles_that_no_query_needs_are_left_out(kernels, monkeypatch, kind):
    monkeypatch.setattr(on_device, "NARROW", 1 if kind == "float16" else 64)
    bank = clustered(6000 if HAS_GPU else 160)
    queries, exclude = asked_of(bank)
    costs = []
    for pruned in (False, True):
        monkeypatch.setattr(on_device, "PRUNED", pruned)
        ready, cost = check(bank, queries, K, exclude)
        assert len(ready._whole._centres) > 1
        costs.append(cost)
    assert costs[1].visits < costs[0].visits
    assert costs[1].pairs < costs[0].pairs


@pytest.mark.parametrize("narrow", [1, 64])
def test_many_small_pieces_do_as_well(kernels, monkeypatch, narrow):
    """All that is done in steps takes several: rounds over the tiles, queries of a round, groups, lists, rows."""
    steps = {"BUFFER": 1, "BYTES": 1 << 11, "GROWTH": 2, "SEEN_FIRST": 1, "OF_A_CELL": 300 if HAS_GPU else 50}
    for name, value in {**steps, "NARROW": narrow}.items():
        monkeypatch.setattr(on_device, name, value)
    monkeypatch.setattr(fused, "STEP", 8)
    bank = np.round(clustered(6000 if HAS_GPU else 160, 20) * 2) / 2
    queries, exclude = asked_of(bank, 10)
    rounds = []
    screen = fused.screen
    monkeypatch.setattr(fused, "screen", lambda q, *about, **how: rounds.append(q) or screen(q, *about, **how))
    check(bank, queries, 2, exclude)
    assert len(rounds) >= 3 * len({q.limit.data_ptr() for q in rounds}) >= 6


@pytest.mark.parametrize("way", ["kernels", "no_triton"])
@pytest.mark.parametrize("width", [20, 70])
def test_queries_may_be_finer_than_the_bank(request, way, width):
    """In float32 they would be other points: the bank is far from the origin, and small."""
    request.getfixturevalue(way)
    random = np.random.default_rng(11)
    bank = (1e6 + random.integers(-2, 3, (100, width)) / 16).astype(np.float32)
    queries = bank[:12] + random.uniform(-0.03, 0.03, (12, width))
    assert (brute_force(bank, queries, K) != brute_force(bank, queries.astype(np.float32), K)).any()
    check(bank, queries, K)


@pytest.mark.parametrize("ready", [True, False])
def test_rows_and_queries_may_have_gaps(kernels, ready):
    bank = few(hard_inputs()["plain"])
    queries, exclude = asked_of(bank)
    wide = tensor(np.concatenate([queries, queries + 1], axis=1))[:, : bank.shape[1]]
    assert not wide.is_contiguous()
    made = DeviceBank(tensor(bank), DEVICE) if ready else DeviceBank(tensor(bank.T).T, DEVICE)
    found, _ = made.search(wide, K, exclude)
    np.testing.assert_array_equal(found, brute_force(bank, queries, K, exclude))


@given(st.lists(st.integers(0, 50), min_size=1, max_size=60), st.integers(1, 120))
def test_runs_of_numbers_are_all_of_them_and_no_sum_is_much_above(numbers, most):
    runs = on_device._runs_of(torch.tensor(numbers), most)
    assert [i for run in runs for i in range(len(numbers))[run]] == list(range(len(numbers)))
    assert all(sum(numbers[run]) < most + 50 for run in runs)


@pytest.mark.parametrize("width", [64, 2048])
@pytest.mark.parametrize("memory", [1, 10**6, 10**9, 10**11])
def test_tiles_are_as_large_as_there_is_room_for(width, memory):
    n = 3_000_000
    step = on_device._rows_of_a_tile(n, width, memory)

    def needed(rows):
        return rows * (24 * width + 12 * on_device._n_cells(rows))

    assert step == 1 or needed(step) <= memory
    assert step == n or memory == 1 or needed(step * 5 // 4) > memory


def memory_of(bank, n_tiles):
    """Bytes that so many tiles of the bank need, each of one cell."""
    return -(-len(bank) // n_tiles) * (24 * bank.shape[1] + 12)


def test_a_bank_that_does_not_fit_is_searched_in_tiles(kernels, monkeypatch):
    monkeypatch.setattr(on_device, "SMALL", 32)
    n = 900 if HAS_GPU else 120
    part = np.random.default_rng(0).integers(0, 4, (n // 3, 70)).astype(np.float32)
    bank = np.concatenate([part, part, part])  # all ties are across tiles
    queries, exclude = asked_of(bank)
    ready = DeviceBank(Shards([bank[:50], bank[50:]]), DEVICE, memory=memory_of(bank, 3))
    assert ready.plan == f"3 tiles of {n // 3} rows"
    assert ready.size_bytes == 0
    found, cost = ready.search(queries, K, exclude)
    np.testing.assert_array_equal(found, brute_force(bank, queries, K, exclude))
    assert cost.visits > 0
    expected = Bank(bank).by_distance(queries, found)
    for ours, theirs in zip(ready.by_distance(queries, found), expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("n_tiles", [6, 12])
def test_tiles_may_have_as_few_rows_as_neighbours_are_asked_for(kernels, monkeypatch, n_tiles):
    """Of twelve tiles of 12 rows the last has one row; of six of ten rows a query leaves one out."""
    monkeypatch.setattr(on_device, "SMALL", 8 if n_tiles == 6 else 64)
    n = 60 if n_tiles == 6 else 133
    bank = np.random.default_rng(1).integers(0, 3, (n, 70)).astype(np.float32)
    queries, exclude = bank[:4], np.array([-1, 1, 2, n - 1])
    ready = DeviceBank(bank, DEVICE, memory=memory_of(bank, n_tiles))
    assert len(list(ready._tiles())) == n_tiles
    check(bank, queries, 10, exclude, ready)


def test_queries_go_through_tiles_in_parts(no_triton, monkeypatch):
    monkeypatch.setattr(on_device, "free_memory", lambda *_: 0)
    random = np.random.default_rng(2)
    bank = random.integers(0, 3, (300, 6)).astype(np.float32)
    queries = random.integers(0, 3, (2500, 6)).astype(np.float32)
    exclude = random.integers(-1, 300, 2500)
    ready = DeviceBank(bank, DEVICE, memory=memory_of(bank, 4))
    assert len(list(ready._parts(queries))) == 3
    found, _ = ready.search(queries, 10, exclude)
    np.testing.assert_array_equal(found, brute_force(bank, queries, 10, exclude))
    ordered, squares = ready.by_distance(queries, found)
    distances = np.square(queries[:, None].astype(np.float64) - bank).sum(axis=2)
    distances[np.flatnonzero(exclude >= 0), exclude[exclude >= 0]] = np.inf
    nearest = np.array([np.lexsort((np.arange(300), row))[:10] for row in distances])
    np.testing.assert_array_equal(ordered, nearest)
    np.testing.assert_array_equal(squares, np.take_along_axis(distances, nearest, axis=1))


@pytest.mark.parametrize("whole", [True, False])
def test_neighbours_come_with_their_distances(no_triton, whole):
    bank = np.random.default_rng(3).integers(0, 3, (200, 9)).astype(np.float32)
    ready = DeviceBank(tensor(bank) if whole else bank, DEVICE, memory=1 << 30 if whole else memory_of(bank, 3))
    found, _ = ready.nearest(tensor(bank[:50]), 7, np.arange(50))
    rows, squares = ready.by_distance(tensor(bank[:50]), found.cpu().numpy())
    np.testing.assert_array_equal(np.sort(rows, axis=1), brute_force(bank, bank[:50], 7, np.arange(50)))
    np.testing.assert_array_equal(squares, np.square(bank[:50, None] - bank[rows].astype(np.float64)).sum(axis=2))


def test_lists_that_run_over_are_searched_in_float64(kernels, monkeypatch):
    bank = few(hard_inputs()["plain"])
    queries, exclude = asked_of(bank)
    _, roomy = check(bank, queries, K, exclude)
    monkeypatch.setattr(fused, "CAPACITY", 4)
    _, cost = check(bank, queries, K, exclude)
    assert roomy.fell_through == 0
    assert cost.fell_through > 0


def test_queries_with_many_open_rows_are_searched_in_float64(kernels, monkeypatch):
    bank = few(hard_inputs()["plain"])
    bank[len(bank) // 2 :] = bank[0]
    queries, exclude = asked_of(bank)
    monkeypatch.setattr(on_device, "MOST_ROWS", (4, 16))
    _, cost = check(bank, queries, K, exclude)
    assert 0 < cost.fell_through < len(queries)


@pytest.mark.parametrize("far", [1e3, 1e6, 1e12, 1e35])
def test_queries_far_from_the_bank_are_answered(kernels, far):
    bank = np.random.default_rng(10).standard_normal((1000 if HAS_GPU else 100, 70)).astype(np.float32)
    queries = (bank[:6] * np.float32(far)).astype(np.float32)
    queries[:2] = bank[:2]
    _, cost = check(bank, queries, K, np.arange(6))
    assert cost.fell_through <= 4


@pytest.mark.parametrize("k", [1, 40, 101])
def test_any_k_is_answered(kernels, k):
    bank = hard_inputs()["constant columns"][: 1500 if HAS_GPU else 110]
    check(bank, bank[:4], k, np.arange(4))


def test_no_queries_have_no_neighbours(kernels):
    bank = few(hard_inputs()["plain"])
    found, cost = DeviceBank(tensor(bank), DEVICE).search(tensor(bank[:0]), K)
    assert found.shape == (0, K)
    assert cost.certified + cost.reranked + cost.fell_through == 0


@settings(deadline=None, max_examples=EXAMPLES, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**32 - 1),
    n_bank=st.integers(64, 120),
    width=st.integers(1, 150),
    levels=st.sampled_from([1, 2, 5, 1000]),
    offset=st.sampled_from([0.0, 1.0, 1e6]),
    scale=st.sampled_from([1e-25, 1.0, 1e25]),
    narrow=st.sampled_from([1, 64]),
    screen=st.sampled_from(["float16", "int8"]),
)
def test_ties_of_any_input_go_to_the_lower_row(kernels, seed, n_bank, width, levels, offset, scale, narrow, screen):
    _check_ties(seed, n_bank, width, levels, offset, scale, np.float32, narrow, screen)


@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**32 - 1),
    n_bank=st.integers(2, 200),
    width=st.integers(1, 300),
    levels=st.sampled_from([1, 2, 5, 1000]),
    offset=st.sampled_from([0.0, 1.0, 1e6]),
    scale=st.sampled_from([1e-25, 1.0, 1e25]),
    dtype=st.sampled_from([np.float32, np.float64]),
)
def test_ties_go_to_the_lower_row_without_triton_too(no_triton, seed, n_bank, width, levels, offset, scale, dtype):
    _check_ties(seed, n_bank, width, levels, offset, scale, dtype, 64)


def _check_ties(seed, n_bank, width, levels, offset, scale, dtype, narrow, screen="float16"):
    random = np.random.default_rng(seed)
    rows = ((random.integers(0, levels, (n_bank + 3, width)) + offset) * scale).astype(dtype)
    bank, queries = rows[:n_bank], rows[-5:]  # two of the bank's own
    exclude = random.integers(-1, n_bank, 5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(on_device, "NARROW", narrow)
        ready = DeviceBank(tensor(bank), DEVICE, screen=screen)
        check(bank, queries, int(random.integers(1, n_bank)), exclude, ready)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("way", ["kernels", "no_triton"])
@pytest.mark.parametrize("width", [20, 70])
def test_a_search_changes_neither_bank_nor_queries(request, dtype, way, width):
    request.getfixturevalue(way)
    rows = np.random.default_rng(4).standard_normal((100, width)).astype(dtype) + 3
    bank, queries = tensor(rows), tensor(rows[:5])
    ready = DeviceBank(bank, DEVICE)
    ready.search(queries, K, np.arange(5))
    ready.by_distance(queries, np.zeros((5, 2), np.int64))
    np.testing.assert_array_equal(bank.cpu().numpy(), rows)
    np.testing.assert_array_equal(queries.cpu().numpy(), rows[:5])


@pytest.mark.parametrize(
    ("bank", "queries", "k", "words"),
    [
        (np.full((40, 2), np.nan), np.zeros((3, 2)), 5, "bank row 0.*not finite"),
        (np.zeros((40, 2)), np.array([[0.0, 0.0], [np.inf, 0.0]]), 5, "query 1.*not finite"),
        (np.zeros((40, 2)), np.array([[0.0, 0.0], [1e200, 0.0]]), 5, "query 1.*beyond"),
        (np.zeros((40, 2), np.float32), np.full((1, 2), np.nan, np.float32), 5, "query 0.*not finite"),
        (np.zeros((40, 2)), np.zeros((3, 5)), 5, "queries: rows of 5"),
        (np.zeros((40, 2)), np.zeros((3, 2)), 41, "40 rows are too few for k=41"),
    ],
)
@pytest.mark.parametrize("memory", [1 << 30, 100])
def test_bad_input_is_named(bank, queries, k, words, memory):
    with pytest.raises(LeadlineError, match=words) as error:
        DeviceBank(bank, DEVICE, memory).search(queries, k)
    assert "\n" not in str(error.value)


# How products are cut


@pytest.mark.parametrize("shape", [fused.Shape(32, 4, 1), fused.Shape(64, 8, 2)] if not HAS_GPU else fused.SHAPES)
def test_every_shape_finds_the_same(kernels, monkeypatch, shape):
    monkeypatch.setattr(fused, "shape_of", lambda device, width: shape)
    bank = few(hard_inputs()["wide"])
    try:
        ready, cost = check(bank, *_with_k(bank))
    except OutOfResources:
        assert HAS_GPU
    else:
        assert f"tiles of {shape.rows}," in ready.plan
        assert cost.fell_through == 0


@pytest.mark.parametrize(
    ("generation", "kind", "name"),
    [(8, "float16", "plain"), (8, "float16", "wide"), (8, "int8", "plain"), (10, "float16", "near ties")],
)
def test_gpus_of_other_generations_find_the_same(kernels, monkeypatch, name, kind, generation):
    """Before Hopper values are read by their addresses; on a Blackwell sums are added to another."""
    asked = []
    monkeypatch.setattr(fused, "_generation", lambda device: asked.append(device) or generation)
    monkeypatch.setattr(on_device, "NARROW", 1)
    bank = few(hard_inputs()[name])
    _, cost = check(bank, *_with_k(bank), ready=DeviceBank(tensor(bank), DEVICE, screen=kind))
    assert asked and cost.fell_through == 0


def test_the_fastest_shape_that_has_room_is_taken(kernels, monkeypatch):
    shapes = [fused.Shape(rows, 4, 1) for rows in ((128, 256) if HAS_GPU else (32, 64, 128))]
    monkeypatch.setattr(fused, "SHAPES", shapes)
    monkeypatch.setattr(fused, "TRIED", 2)
    flagged, multiply = [], fused._multiply

    def watched(q, r, *about):
        if r.shape.rows == shapes[1].rows and not HAS_GPU:
            raise OutOfResources(200_000, 100_000, "shared memory")
        multiply(q, r, *about)
        flagged.append(about[-2].any().item())

    monkeypatch.setattr(fused, "_multiply", watched)
    # As of a GPU that no table has; rows of two values are as wide as what one step multiplies.
    monkeypatch.setattr(fused, "is_known", lambda device: False)
    fused.fastest.cache_clear()
    assert fused.shape_of(torch.device(DEVICE), 2) in shapes
    assert flagged == [False] * 4 * 2  # of two shapes; no row was within a limit
    fused.fastest.cache_clear()


@pytest.mark.parametrize(
    "error",
    [
        OutOfResources(200_000, 100_000, "shared memory"), RuntimeError("no such target"),
        PTXASError("no such target"),
    ],
)  # fmt: skip
def test_where_no_shape_can_be_had_a_warning_says_why(monkeypatch, error):
    def launch(*_, **__):
        raise error

    monkeypatch.setattr(fused, "_launch", launch)
    fused.fastest.cache_clear()
    with pytest.warns(RuntimeWarning, match=r"shared memory|no such target"):
        assert fused.fastest(torch.device(DEVICE), 40) is None
    fused.fastest.cache_clear()


def test_a_fault_of_the_device_is_no_matter_of_shapes(monkeypatch):
    def launch(*_, **__):
        raise torch.OutOfMemoryError("no memory is left")

    monkeypatch.setattr(fused, "_launch", launch)
    fused.fastest.cache_clear()
    with pytest.raises(torch.OutOfMemoryError):
        fused.fastest(torch.device(DEVICE), 40)


def test_where_no_shape_has_room_all_is_done_in_float64(kernels, monkeypatch):
    monkeypatch.setattr(fused, "shape_of", lambda device, width: None)
    bank = few(hard_inputs()["wide"])
    ready, cost = check(bank, *_with_k(bank))
    assert ready.plan == "float64"
    assert cost.fell_through == 6 or HAS_GPU


# The distance that decides


@pytest.mark.parametrize("width", [1, 7, 8, 9, 127, 128, 129, 136, 1000, 1027, 3000])
@pytest.mark.parametrize("way", ["kernel", "torch"])
def test_squared_distances_are_numpys_bit_for_bit(monkeypatch, width, way):
    if way == "torch":
        monkeypatch.setattr(on_device, "fused", None)
    monkeypatch.setattr(on_device, "NARROW", 1)
    random = np.random.default_rng(width)
    for dtype in (np.float32, np.float64):
        rows = (random.standard_normal((6, width)) * 100).astype(dtype)
        queries = (random.standard_normal((3, width)) * 10.0 ** random.integers(-3, 3, (3, width))).astype(dtype)
        i, j = np.array([0, 2, 1, 1]), np.array([5, 0, 3, 4])
        tile = on_device.Tile(tensor(rows), 0, prepared=False)
        assert on_device._has_kernels(tile.rows) == (way == "kernel")
        found = tile.squares(tensor(queries), tensor(i), tensor(j)).cpu().numpy()
        expected = [np.square(queries[a].astype(np.float64) - rows[b]).sum() for a, b in zip(i, j, strict=True)]
        ours = [squared_distance(queries[a], rows[b]) for a, b in zip(i, j, strict=True)]
        np.testing.assert_array_equal(found.view(np.uint64), np.array(expected).view(np.uint64))
        np.testing.assert_array_equal(found.view(np.uint64), np.array(ours).view(np.uint64))


# What the kernels prove


@triton.jit
def _errors(out, a, lam, rho, slip, longest, lost, n, gamma, SLACK: tl.constexpr, BLOCK: tl.constexpr):  # noqa: N803
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    error = _error(
        tl.load(a + at, mask=inside, other=0), tl.load(lam + at, mask=inside, other=0),
        tl.load(rho + at, mask=inside, other=0), tl.load(slip + at, mask=inside, other=0),
        tl.load(longest + at, mask=inside, other=0), tl.load(lost + at, mask=inside, other=0), gamma, SLACK,
    )  # fmt: skip
    tl.store(out + at, error, mask=inside)


def estimated(monkeypatch, bank, queries, screen="float16"):
    """Of all queries and rows [Q, M]: the kernel's squared distance, what it may be off by, and the true one."""
    monkeypatch.setattr(fused, "RUN", 1)
    monkeypatch.setattr(fused, "CAPACITY", 2048 if HAS_GPU else 512)
    for name in ("bound", "refine"):  # no limit is ever set
        monkeypatch.setattr(fused, name, lambda *_: None)
    tile = DeviceBank(tensor(bank), DEVICE, screen=screen)._whole
    made = tile._made
    none = torch.full((len(queries),), -1, device=DEVICE)
    q, order, _, _ = tile._screened(tensor(queries), 1, none)
    there = (order >= 0).nonzero()[:, 0]
    assert (q.counts[there] == len(bank)).all()
    place = there.repeat_interleave(len(bank))
    slot = q.candidates[there, : len(bank)].flatten().long()
    of = slot // made.shape.rows
    a = q.far[made.cell[of].long(), place].contiguous()
    of_query = [values[place].contiguous() for values in (q.length, q.lost, q.slip)]
    of_tile = [values[of].contiguous() for values in (made.longest, made.lost)]
    error = torch.empty_like(a)
    block = 4096
    _errors[(triton.cdiv(len(a), block),)](
        error,
        a,
        *of_query,
        *of_tile,
        len(a),
        fused.roundoff(bank.shape[1], made.values.dtype),
        SLACK=fused.SLACK,
        BLOCK=block,
    )
    i, j = order[place].cpu().numpy(), tile._order[slot].cpu().numpy()
    found, errors = np.full((2, len(queries), len(bank)), np.nan)
    found[i, j] = q.estimates[there, : len(bank)].flatten().cpu().numpy()
    errors[i, j] = error.cpu().numpy()
    differences = queries[:, None].astype(np.longdouble) - bank
    return found, errors, np.square(differences * tile._scale).sum(axis=2)


def _values(name, n, width):
    random = np.random.default_rng(5)
    if name == "clusters":
        return clustered(n, width)
    rows = random.standard_normal((n, width))
    if name == "subnormal":
        rows[:, 1:] *= 10.0 ** -random.integers(4, 12, (n, width - 1))
    return rows.astype(np.float32)


@pytest.mark.parametrize("width", [24, 1100])
@pytest.mark.parametrize("far", [1, 30, 1e6])
@pytest.mark.parametrize("name", ["normal", "clusters", "subnormal"])
@pytest.mark.parametrize("screen", ["float16", "int8"])
def test_estimates_err_by_no_more_than_they_say(kernels, monkeypatch, name, far, width, screen):
    monkeypatch.setattr(on_device, "NARROW", 1)
    bank = _values(name, 80, width)
    queries = (bank[:5] * np.float32(far)).astype(np.float32)
    queries[2:] += _values(name, 3, width)
    found, error, true = estimated(monkeypatch, bank, queries, screen)
    assert (np.abs(found - true) <= error).all()
    if far == 1 and name != "subnormal":
        assert error.max() < 0.05 * true.max()  # and they say something


@pytest.mark.parametrize("of", ["rows", "queries"])
def test_rounding_to_levels_that_lies_along_the_other_vector_is_counted_in_full(kernels, monkeypatch, of):
    """The same in int8, where the largest value of a row decides between which levels the others lie."""
    monkeypatch.setattr(on_device, "WORTH", 0)
    random, width, n = np.random.default_rng(6), 256, 60
    rounded = random.integers(20, 120, (n, width)) + random.uniform(0.2, 0.45, (n, 1))
    whole = np.repeat(random.integers(60, 127, (n, 1)), width, axis=1).astype(float)
    rounded[:, 0] = whole[:, 0] = 127
    bank, queries = (rounded, whole) if of == "rows" else (whole, rounded)
    bank = np.concatenate([bank, -bank] * (2 if HAS_GPU else 1)).astype(np.float32) / 128
    found, error, true = estimated(monkeypatch, bank, queries[:6].astype(np.float32) / 128, "int8")
    off = np.abs(found - true)
    assert (off <= error).all()
    assert (off / error).max() > 0.7


@pytest.mark.parametrize("of", ["rows", "queries"])
@pytest.mark.parametrize("longer", [0.5, 1, 4])
def test_rounding_that_lies_along_the_other_vector_is_counted_in_full(kernels, monkeypatch, of, longer):
    """Rows that lose the same share of float16's unit in every value, and queries that lose nothing, in that direction;
    or the other way round."""
    monkeypatch.setattr(on_device, "WORTH", 0)
    random, width, unit = np.random.default_rng(6), 256, 2.0**-15
    n = 30
    rounded = random.integers(1024, 2047, (n, width)) + random.uniform(0.2, 0.45, (n, 1))
    rounded = (rounded * unit).astype(np.float32)
    whole = np.repeat(random.integers(1024, 2047, (n, 1)) * unit, width, axis=1).astype(np.float32)
    bank, queries = (rounded, whole) if of == "rows" else (whole, rounded)
    bank = np.concatenate([bank, -bank] * (2 if HAS_GPU else 1) + ([] if HAS_GPU else [bank[:4], -bank[:4]]))
    found, error, true = estimated(monkeypatch, bank, queries[:6] * np.float32(longer if of == "rows" else 1))
    off = np.abs(found - true)
    assert (off <= error).all()
    assert (off / error).max() > 0.7  # so that less would not do


def listed(q, made, order):
    """Rows of the lists, as places of a bool [P, places of rows]."""
    has = np.zeros((len(q.counts), len(order)), bool)
    runs = made.shape.rows // fused.RUN
    lists = [values.cpu().numpy() for values in (q.counts, q.candidates, q.masks)]
    for i, (count, candidates, masks) in enumerate(zip(*lists, strict=True)):
        assert count <= fused.CAPACITY
        for run, mask in zip(candidates[: max(0, count)], masks, strict=False):
            tile, inside = divmod(run, runs)
            eighth, lane = divmod(inside, 8)
            for bit in range(fused.RUN):
                if mask >> bit & 1:
                    has[i, tile * made.shape.rows + (eighth * fused.RUN + bit) * 8 + lane] = True
    return has


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("in a plane", "float32"),
        ("in a plane", "float16"),
        ("in a plane", "int8"),
        *((name, "int8") for name in ("plain", "unequal clusters")),
        *((name, "float16") for name in ("plain", "offset by 1e4", "saturated softmax", "unequal clusters")),
        *((name, "float32") for name in ("plain", "unequal clusters", "near ties")),
    ],
)
def test_no_row_within_the_limit_is_left_out(kernels, monkeypatch, name, kind):
    """With the true distance of a row as the limit of a query, that row and all nearer ones are in its list.

    In a plane many queries lie near the border of a cell, and their neighbours beyond it.
    """
    monkeypatch.setattr(on_device, "NARROW", 64 if kind == "float32" else 1)
    in_plane = name == "in a plane"
    if in_plane:
        monkeypatch.setattr(on_device, "OF_A_CELL", 20)
        bank = np.random.default_rng(12).uniform(0, 1, (2000 if HAS_GPU else 300, 2)).astype(np.float32)
    else:
        bank = few(hard_inputs()[name])
    queries = bank[: 40 if in_plane else 12]
    tile = DeviceBank(tensor(bank), DEVICE, screen="int8" if kind == "int8" else "float16")._whole
    differences = queries[:, None].astype(np.longdouble) - bank
    true = np.square(differences * tile._scale).sum(axis=2).astype(np.float64)
    limits = np.array([np.sort(row)[(1, 3, 10, 30)[i % 4]] for i, row in enumerate(true)])
    asked = tensor(queries)
    order = tile._tiled(asked, fused.QUERIES).order
    limit = tensor(np.nextafter(limits.astype(np.float32), np.float32(np.inf)))[order.clamp(min=0)]
    limit[order < 0] = -1

    monkeypatch.setattr(fused, "bound", lambda q, *_: q.limit.copy_(limit))
    monkeypatch.setattr(fused, "refine", lambda *_: None)
    q, order, _, _ = tile._screened(asked, 1, torch.full((len(queries),), -1, device=DEVICE))
    found, order, rows = listed(q, tile._made, tile._order), order.cpu().numpy(), tile._order.cpu().numpy()
    n_within = n_found = 0
    for place in np.flatnonzero(order >= 0):
        within = np.flatnonzero(true[order[place]] <= limits[order[place]])
        has = rows[found[place]]
        assert (has >= 0).all()
        assert np.isin(within, has).all(), (order[place], np.setdiff1d(within, has))
        n_within, n_found = n_within + len(within), n_found + len(has)
    assert n_within <= n_found
    if name in ("plain", "saturated softmax"):
        assert n_found <= 1.5 * n_within  # and the limit is one


@pytest.mark.parametrize("width", [3, 70, 1100])
def test_rows_are_rounded_about_their_centres(width):
    random = np.random.default_rng(7)
    rows = (random.standard_normal((9, width)) * 10.0 ** random.integers(-9, 3, (9, width))).astype(np.float32)
    order, cell = np.array([3, -1, 8, 0]), np.array([1, 0, 0, 1], np.int32)
    centre, centres, scale = random.standard_normal(width), random.standard_normal((2, width)), 0.25
    values, _, squares, lost = fused.round_rows(
        tensor(rows), tensor(order), tensor(cell), tensor(centre), scale, tensor(centres)
    )
    placed = (rows[order].astype(np.float64) - centre) * scale - centres[cell]
    placed[1] = 0
    rounded = np.clip((placed * 4096).astype(np.float32), -65504, 65504).astype(np.float16)
    np.testing.assert_array_equal(values.cpu().numpy()[:, :width], rounded)
    assert not values[:, width:].any()
    np.testing.assert_allclose(squares.cpu().numpy(), np.square(placed).sum(axis=1), rtol=1e-12)
    rest = np.square(placed - rounded.astype(np.float64) / 4096).sum(axis=1)
    np.testing.assert_allclose(lost.cpu().numpy(), rest, rtol=1e-12)


@pytest.mark.parametrize("width", [3, 70, 1100])
def test_rows_are_rounded_to_levels_of_their_own(width):
    random = np.random.default_rng(8)
    rows = (random.standard_normal((9, width)) * 10.0 ** random.integers(-9, 3, (9, 1))).astype(np.float32)
    rows[2] = 1e-30  # all of it is lost
    order, cell = np.array([3, -1, 8, 0, 2]), np.zeros(5, np.int32)
    nothing, scale = np.zeros((1, width)), 0.25
    given = [tensor(values) for values in (rows, order, cell, nothing[0])]
    made = fused.round_rows(*given, scale, tensor(nothing), torch.int8)
    values, steps, squares, lost = (of_all.cpu().numpy() for of_all in made)
    placed = rows[order].astype(np.float64) * scale
    placed[1] = 0
    assert values.dtype == np.int8
    assert values.shape[1] % 16 == 0
    assert not values[:, width:].any()
    levels, largest = values[:, :width].astype(np.float64), np.abs(placed).max(axis=1)
    np.testing.assert_array_equal(np.abs(levels[[0, 2, 3]]).max(axis=1), 127)
    assert not levels[[1, 4]].any()
    np.testing.assert_allclose(steps[[0, 2, 3]], largest[[0, 2, 3]] / 127, rtol=1e-6)
    rest = placed - levels * steps[:, None].astype(np.float64)
    assert (np.abs(rest[[0, 2, 3]]) <= 0.5001 * steps[[0, 2, 3], None]).all()
    np.testing.assert_allclose(squares, np.square(placed).sum(axis=1), rtol=1e-12)
    np.testing.assert_allclose(lost, np.square(rest).sum(axis=1), rtol=1e-12)


def test_rows_too_wide_for_sums_in_int32_are_rounded_to_float16(kernels, monkeypatch):
    monkeypatch.setattr(fused, "WIDEST", 69)
    bank = np.random.default_rng(13).standard_normal((100, 70)).astype(np.float32)
    for width, kind in ((69, "int8"), (70, "float16")):
        rows = np.ascontiguousarray(bank[:, :width])
        ready, _ = check(rows, rows[:4], K, None, DeviceBank(tensor(rows), DEVICE, screen="int8"))
        assert f" {kind}," in ready.plan
    assert fused.LEVELS**2 * 133_144 < 2**31


# Votes


@pytest.mark.parametrize(
    ("labels", "k"),
    [
        (np.arange(10), 7),
        (np.arange(3000), 12),
        (np.array([2**31 - 1, 0, 2**31 - 2]), 5),
        (np.array([6]), 4),
        (np.array([0, 3]), 1),
    ],
)
@pytest.mark.parametrize("counted", [1, 64 << 20])
def test_votes_are_counted_as_a_loop_counts_them(monkeypatch, labels, k, counted):
    monkeypatch.setattr("leadline.knn.votes.COUNTED", counted)
    random = np.random.default_rng(8)
    neighbours = random.choice(labels, (60, k))
    neighbours[:20] = np.sort(neighbours[:20] % (labels.max() + 1))
    rows = np.arange(60)[:, None]
    np.testing.assert_array_equal(stacked(count_votes(neighbours)), slow_votes(neighbours.ravel(), rows * k + range(k)))
    on_tensors = count_votes(tensor(neighbours))
    np.testing.assert_array_equal(stacked(on_tensors), stacked(count_votes(neighbours)))
    assert on_tensors.winner.dtype == np.int32
    assert len(count_votes(neighbours[:0])) == 0


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64])
def test_votes_on_a_gpu_are_those_on_the_cpu(dtype):
    random = np.random.default_rng(9)
    rows = clustered(6000, 70)
    bank = torch.from_numpy(rows * 2**20 if dtype == torch.int64 else rows).to(dtype)
    labels, exclude = random.integers(0, 6, len(bank)), np.arange(500)
    there = {"bank": bank.cuda(), "queries": bank[:500].cuda()}
    for arguments in (
        {},
        {"return_neighbours": True},
        {"k": [1, 10, 100]},
        {"k": 300},
        {"winners_only": True},
        {"k": [3, 9], "return_neighbours": True},
    ):
        ours = leadline.knn_votes(bank, labels, bank[:500], exclude=exclude, device="cpu", **arguments)
        for given_ in (there, {"bank": bank, "queries": bank[:500], "device": "cuda"}):
            theirs = leadline.knn_votes(labels=labels, exclude=exclude, **given_, **arguments)
            for a, b in zip(
                *(votes.values() if isinstance(votes, dict) else [votes] for votes in (ours, theirs)), strict=True
            ):
                np.testing.assert_array_equal(a.winner, b.winner)
                if "winners_only" not in arguments:
                    np.testing.assert_array_equal(stacked(a), stacked(b))
                if "return_neighbours" in arguments:
                    np.testing.assert_array_equal(a.neighbours.rows, b.neighbours.rows)
                    np.testing.assert_array_equal(a.neighbours.distances, b.neighbours.distances)


@pytest.mark.parametrize(
    ("free", "reserved", "allocated", "share", "there"),
    [
        (70, 0, 0, 1.0, 70),
        (50, 20, 15, 1.0, 55),  # what the allocator holds and does not use is free as well
        (50, 20, 15, 0.25, 5),  # of a worker with others beside it: a fourth of 80
        (10, 20, 15, 0.25, 5),
        (2, 16, 15, 0.25, 3),  # the others have taken more than theirs
        (50, 40, 30, 0.25, 0),
    ],
)
def test_free_memory_of_a_process_and_of_its_share(monkeypatch, free, reserved, allocated, share, there):
    """In figures of a GPU of 80 bytes; the device has no number, as a run's."""
    answers = {
        "mem_get_info": lambda device: (1000 * free, 80_000),
        "memory_reserved": lambda device: 1000 * reserved,
        "memory_allocated": lambda device: 1000 * allocated,
        "get_per_process_memory_fraction": lambda device: {None: share}[device],
    }
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    found = on_device.free_memory(torch.device("cuda"))
    assert found == int(on_device.KEPT * 1000 * there)
    assert on_device.free_memory(torch.device("cuda"), 2000) == min(found, 2000)


@needs_gpu
def test_free_memory_keeps_to_the_share():
    torch.cuda.set_per_process_memory_fraction(0.25)
    try:
        total = torch.cuda.get_device_properties(0).total_memory
        assert 0 < on_device.free_memory(torch.device("cuda")) <= total / 4
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@needs_gpu
@pytest.mark.parametrize("method", ["flat", "hnswlib"])
def test_indexes_of_what_lies_on_a_gpu(method):
    pytest.importorskip("hnswlib" if method == "hnswlib" else "faiss")
    bank = torch.randn(300, 8, device="cuda")
    labels = torch.arange(300) % 5
    found = leadline.knn_votes(bank, labels, bank[:40], k=7, method=method)
    expected = leadline.knn_votes(bank.cpu(), labels, bank[:40].cpu(), k=7, method=method)
    assert np.array_equal(found.winner, expected.winner)
