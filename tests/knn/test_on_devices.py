"""One search on several devices: without GPUs the CPU stands for each, in a thread of its own, all in float64."""

import numpy as np
import pytest
import torch
from test_exact_votes import brute_force, hard_inputs, stacked

import leadline
from leadline import LeadlineError
from leadline.knn import Bank, SharedBank, bank_on, on_device
from leadline.knn.arrays import Shards

HAS_GPU = torch.cuda.is_available()
N = max(3, torch.cuda.device_count())
DEVICES = [torch.device("cuda", i % torch.cuda.device_count()) if HAS_GPU else torch.device("cpu") for i in range(N)]


@pytest.fixture
def no_triton(monkeypatch):
    """Its interpreter is of one thread alone."""
    if not HAS_GPU:
        monkeypatch.setattr(on_device, "fused", None)


pytestmark = pytest.mark.usefixtures("one_thread", "no_triton")


def shared(bank, room, shards=False):
    """Made ready on all devices, each of which has room for all rows, for a share of them, or for tiles of a share."""
    memory = 12 * bank.size - 1 if room == "share" else 12 * bank.size * N if room == "all" else 5 * bank.size // N
    rows = Shards([bank[:7], bank[7:]]) if shards else bank
    ready = SharedBank(rows, DEVICES, memory)
    assert f"{N} devices with {'all' if room == 'all' else 'a share of the'} rows each" in ready.plan
    assert ("tiles" in ready.plan) == (room == "tiles")
    return ready


@pytest.mark.parametrize("room", ["all", "share", "tiles"])
@pytest.mark.parametrize("name", ["plain", "duplicated", "near ties", "wide", "all zero", "float64"])
def test_several_devices_find_what_brute_force_finds(name, room):
    bank = hard_inputs()[name][:300]
    queries = bank[:40]
    exclude = np.where(np.arange(40) % 3, np.arange(40), -1)
    ready = shared(bank, room)
    found, cost = ready.search(queries, 7, exclude)
    np.testing.assert_array_equal(found, brute_force(bank, queries, 7, exclude))
    assert cost.full_flops == 2 * 40 * bank.size
    for ours, theirs in zip(ready.by_distance(queries, found), Bank(bank).by_distance(queries, found), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("room", ["all", "share", "tiles"])
@pytest.mark.parametrize("n_queries", [0, 1, 2, 50])
def test_rows_and_queries_may_lie_in_several_pieces(room, n_queries):
    """All ties are of rows that different devices have."""
    part = np.random.default_rng(0).integers(0, 3, (20, 70)).astype(np.float32)
    bank = np.concatenate([part, part, part])
    queries = np.concatenate([bank, bank])[:n_queries]
    exclude = np.arange(n_queries)
    ready = shared(bank, room, shards=True)
    found, _ = ready.search(Shards([queries[:1], queries[1:]]) if n_queries else queries, 30, exclude)
    np.testing.assert_array_equal(found, brute_force(bank, queries, 30, exclude))


def test_a_device_may_have_fewer_rows_than_neighbours_are_asked_for():
    bank = np.random.default_rng(1).integers(0, 3, (10, 70)).astype(np.float32)
    found, _ = shared(bank, "share").search(bank, 9, np.arange(10))
    np.testing.assert_array_equal(found, brute_force(bank, bank, 9, np.arange(10)))
    few = SharedBank(bank[:2], DEVICES, memory=1)
    np.testing.assert_array_equal(few.search(bank, 2)[0], [[0, 1]] * 10)


@pytest.mark.parametrize("room", ["all", "share", "tiles"])
def test_values_that_are_not_finite_are_named_by_their_place_in_the_whole(room):
    bank = np.ones((90, 70), np.float32)
    broken = bank.copy()
    broken[77, 3] = np.nan
    with pytest.raises(LeadlineError, match="bank row 77"):
        shared(broken, room).search(bank, 3)
    with pytest.raises(LeadlineError, match="query 77"):
        shared(bank, room).search(broken, 3)
    with pytest.raises(LeadlineError, match="too few for k=90"):
        shared(bank, room).search(bank, 90, np.arange(90))


@pytest.mark.parametrize(
    ("device", "words"),
    [
        ("foo", "device: foo is not known to torch; allowed: cpu, cuda"),
        ("meta", "device: meta has no search; allowed: cpu, cuda"),
        (["cpu", "cpu"], "device: cpu, cpu has no search"),
        (["cpu", "cuda"], "device: cpu, cuda has no search"),
        ([], "device: none has no search"),
        ("cuda:99", f"device: cuda:99: torch sees {torch.cuda.device_count()} GPUs here"),
    ],
)
def test_devices_that_cannot_search_are_refused_in_one_line(device, words):
    bank = np.ones((4, 3), np.float32)
    for ask in (lambda: bank_on(bank, device), lambda: leadline.knn_votes(bank, np.zeros(4, int), bank, device=device)):
        with pytest.raises(LeadlineError) as told:
            ask()
        assert words in str(told.value)
        assert "\n" not in str(told.value)


def test_on_the_cpu_a_bank_is_searched_by_its_own_way():
    assert isinstance(bank_on(torch.zeros(4, 2), "cpu"), Bank)
    assert isinstance(bank_on(np.zeros((4, 2)), ["cpu"]), Bank)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are no two GPUs")
@pytest.mark.parametrize("on_gpu", [True, False])
def test_votes_of_several_gpus_are_those_on_the_cpu(on_gpu):
    bank = np.random.default_rng(2).standard_normal((9000, 96)).astype(np.float32)
    labels, exclude = np.arange(9000) % 7, np.arange(9000)
    ours = leadline.knn_votes(bank, labels, bank, exclude=exclude)
    rows = torch.from_numpy(bank).to("cuda:1") if on_gpu else bank
    for device in (["cuda:0", "cuda:1"], "cuda:1"):
        theirs = leadline.knn_votes(rows, labels, rows, exclude=exclude, device=device)
        np.testing.assert_array_equal(stacked(ours), stacked(theirs))
