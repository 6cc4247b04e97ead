"""Approximate neighbours against float64 brute force, on inputs where indexes fail, and what is refused."""

import json
import subprocess
import sys
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from test_exact_votes import brute_force

import leadline
from leadline import LeadlineError
from leadline.knn import Bank, Method, build_index, load_index, parse_method
from leadline.knn.arrays import Shards
from leadline.knn.methods import METHODS, resolve

pytest.importorskip("faiss")
FAISS = ("flat", "ivf-flat", "ivf-pq", "hnsw", "hnsw-sq8")
FAISS_HAS = {1, 2, 3, 4, 8, 12, 16, 20, 24, 28, 32, 40, 48, 56, 64, 96}  # pieces of PQ, on GPUs
needs_hnswlib = pytest.mark.skipif(find_spec("hnswlib") is None, reason="hnswlib is not installed")
HERE = [*FAISS, pytest.param("hnswlib", marks=needs_hnswlib)]
# Parameters with which few candidates are proposed, so that what is missing shows.
POOR = ["ivf-flat:nlist=64,nprobe=1", "ivf-pq:nlist=64,nprobe=1,m=2,bits=2,rerank=1", "hnsw:m=2,ef=1,efc=1"]


pytestmark = pytest.mark.usefixtures("one_thread")


def gaussian(n=600, width=12, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal((n, width)).astype(dtype)


def recall(found, true):
    return np.mean([len(np.intersect1d(a, b)) for a, b in zip(found, true, strict=True)]) / true.shape[1]


def check_form(found, bank, k, exclude=None):
    """k different rows of the bank in each query, ascending, without the excluded one."""
    assert found.dtype == np.int64 and found.shape[1] == k
    assert found.min() >= 0 and found.max() < len(bank)
    assert (np.diff(found, axis=1) > 0).all()
    if exclude is not None:
        assert not (found == exclude[:, None]).any()


APART = """
import sys
import numpy as np
from leadline import LeadlineError
from leadline.knn import build_index

package, method = sys.argv[1:]
sys.modules[package] = None
try:
    build_index(method, np.eye(40, dtype=np.float32))
except LeadlineError as error:
    print(error)
"""


def one_line_from(*arguments):
    """The line that a LeadlineError says where a package cannot be imported."""
    ran = subprocess.run([sys.executable, "-c", APART, *arguments], capture_output=True, text=True, check=True)
    assert ran.stdout.count("\n") == 1, ran.stdout + ran.stderr
    return ran.stdout


# Texts


@st.composite
def methods(draw):
    name = draw(st.sampled_from(list(METHODS)))
    keys = [key for key in METHODS[name] if draw(st.booleans())]
    return Method(name, tuple((key, draw(st.integers(*METHODS[name][key]))) for key in keys))


@given(methods(), st.randoms())
def test_a_method_is_read_as_it_is_written_in_any_order(method, random):
    assert parse_method(str(method)) == method
    shuffled = [f"{key}={value}" for key, value in method.parameters]
    random.shuffle(shuffled)
    assert parse_method(":".join([method.name, *([",".join(shuffled)] if shuffled else [])])) == method


@given(methods(), st.integers(1, 10**7), st.integers(1, 5000))
def test_a_resolved_method_has_every_parameter_within_its_range(method, n_bank, width):
    full = resolve(method, n_bank, width)
    assert [key for key, _ in full.parameters] == list(METHODS[method.name])
    for key, value in full.parameters:
        least, most = METHODS[method.name][key]
        assert least <= value <= most
    assert resolve(full, n_bank, width) == full
    if method.name == "ivf-pq":
        assert width % full["m"] == 0
    if method.name == "gpu-ivf-pq":
        assert width % full["m"] == 0 and full["m"] in FAISS_HAS
        assert full["nprobe"] <= 2048
    if "nlist" in dict(full.parameters):
        assert full["nprobe"] <= full["nlist"] <= n_bank


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("annoy", "allowed: exact, flat, ivf-flat"),
        ("", "allowed: exact, flat, ivf-flat"),
        ("flat:nlist=4", "allowed: none"),
        ("hnsw:nlist=4", "allowed: m, ef, efc"),
        ("hnsw:", "allowed: m, ef, efc"),
        ("hnsw:m=4,m=5", "each once"),
        ("hnsw:m=1", "allowed: m=2 to 512"),
        ("hnsw:m=-4", "allowed: m=2 to 512"),
        ("hnsw:m", "allowed: m=2 to 512"),
        ("ivf-pq:bits=9", "allowed: bits=1 to 8"),
        ("ivf-flat:nlist=1_000", "allowed: nlist=1 to 1048576"),
        ("gpu-ivf-pq:m=97", "allowed: m=1 to 96"),
        ("gpu-ivf-pq:nprobe=2049", "allowed: nprobe=1 to 2048"),
        ("gpu-ivf-pq:bits=4", "allowed: nlist, nprobe, m, rerank"),
    ],
)
def test_other_texts_are_refused_with_what_is_allowed(text, said):
    with pytest.raises(LeadlineError, match=said) as refused:
        parse_method(text)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("text", "n_bank", "width", "full"),
    [
        ("gpu-ivf-pq", 60_000, 784, "gpu-ivf-pq:nlist=979,nprobe=30,m=56,rerank=4"),
        ("gpu-ivf-pq:m=50", 60_000, 512, "gpu-ivf-pq:nlist=979,nprobe=30,m=32,rerank=4"),
        ("gpu-ivf-pq:m=96,rerank=9", 100, 96, "gpu-ivf-pq:nlist=2,nprobe=2,m=96,rerank=9"),
        ("gpu-ivf-pq:nlist=200000,nprobe=2048", 10**7, 7, "gpu-ivf-pq:nlist=200000,nprobe=2048,m=1,rerank=4"),
        ("gpu-ivf-pq:nlist=1000000", 10**8, 10, "gpu-ivf-pq:nlist=1000000,nprobe=2048,m=2,rerank=4"),
    ],
)
def test_pq_on_a_gpu_has_the_pieces_that_faiss_has_there(text, n_bank, width, full):
    assert str(resolve(parse_method(text), n_bank, width)) == full


# Neighbours


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_flat_finds_all_neighbours_of_random_rows(dtype):
    bank = gaussian(dtype=dtype)
    queries, exclude = np.concatenate([gaussian(50, seed=1, dtype=dtype), bank]), np.r_[np.full(50, -1), : len(bank)]
    found, cost = build_index("flat", bank).search(queries, 10, exclude)
    assert (found == brute_force(bank, queries, 10, exclude)).all()
    assert (cost.reranked, cost.fell_through) == (len(queries), 0)


@pytest.mark.parametrize("method", FAISS)
def test_an_offset_or_a_large_scale_hides_no_neighbours(method):
    """In float32 as they are, all rows would be one, or their squares infinite."""
    values = gaussian(dtype=np.float64)
    true = brute_force(values, values[:40], 10)
    for bank in (values + 1e7, values * 1e100, values * 1e-100):
        assert recall(build_index(method, bank).search(bank[:40], 10)[0], true) > 0.9


@pytest.mark.parametrize("method", HERE)
def test_recall_on_digits(method):
    digits = load_digits().data
    own = np.arange(len(digits))
    index = build_index(method, digits)
    found, _ = index.search(digits, 30, own)
    check_form(found, digits, 30, own)
    assert recall(found, Bank(digits).search(digits, 30, own)[0]) > 0.98
    assert index.method == str(resolve(parse_method(method), *digits.shape))
    assert (index.n_bank, index.width) == digits.shape and index.size_bytes > 0


@pytest.mark.parametrize("method", [*HERE, *POOR])
def test_candidates_are_ranked_by_the_exact_distance_and_ties_go_to_the_lower_row(method):
    """Every row four times: whatever is proposed, of equal rows none is taken before a lower one that was proposed."""
    bank = np.concatenate([gaussian(60, 4)] * 4)
    index = build_index(method, bank)
    for k in (3, 4, 6):
        found, _ = index.search(bank[:60], k)
        check_form(found, bank, k)
        if method in ("flat", "hnswlib"):
            assert (found == brute_force(bank, bank[:60], k)).all()


def test_of_the_candidates_the_nearest_are_taken(monkeypatch):
    """The engine proposes known rows, some twice, one that is none, and the query's own."""
    bank = np.arange(10.0).reshape(-1, 1)
    index = build_index("flat", bank)
    monkeypatch.setattr(
        index, "_engine", type("Fixed", (), {"search": lambda *_: np.array([[9, 2, 2, -1, 1, 4, 7, 0, 99]])})()
    )
    found, cost = index.search(np.array([[3.0]]), 3, np.array([4]))
    assert found.tolist() == [[0, 1, 2]]  # 3, 5 and 6 were not proposed, 4 is the query's own
    assert cost.measured == 5


@pytest.mark.parametrize("method", [*HERE, *POOR])
def test_duplicates_and_rows_that_are_not_reached_do_not_leave_a_query_short(method):
    bank = np.repeat(gaussian(50, 8), 30, axis=0)
    own = np.arange(len(bank))
    found, _ = build_index(method, bank).search(bank, 40, own)
    check_form(found, bank, 40, own)


@pytest.mark.parametrize("method", [*POOR, pytest.param("hnswlib:m=2,ef=1,efc=1", marks=needs_hnswlib)])
def test_queries_with_fewer_than_k_proposals_are_searched_exactly(method):
    bank = gaussian(256, 8)
    queries = gaussian(40, 8, seed=2)
    found, cost = build_index(method, bank).search(queries, 200)
    assert cost.fell_through > 0 and cost.fell_through + cost.reranked == len(queries)
    if cost.reranked == 0:
        assert (found == brute_force(bank, queries, 200)).all()
    check_form(found, bank, 200)


@pytest.mark.parametrize("method", [*HERE, "ivf-flat:nlist=5000,nprobe=700", "ivf-pq:nlist=64,m=7,bits=8"])
@pytest.mark.parametrize("n", [1, 2, 9])
def test_banks_smaller_than_the_parameters(method, n):
    bank = gaussian(n, 10)
    found, _ = build_index(method, bank).search(gaussian(5, 10, seed=1), n)
    assert (found == np.arange(n)).all()
    if n > 1:
        found, _ = build_index(method, bank).search(bank, n - 1, np.arange(n))
        check_form(found, bank, n - 1, np.arange(n))


@pytest.mark.parametrize("method", HERE)
def test_the_same_rows_and_seed_give_the_same_answers(method):
    """Whole or in shards, with one thread or two."""
    bank = gaussian(800, 8)
    found = [
        build_index(method, rows, threads=threads, seed=3).search(bank[:300], 10)[0]
        for rows in (bank, Shards([bank[:300], bank[300:]]))
        for threads in (1, 2)
    ]
    assert all((other == found[0]).all() for other in found)


@pytest.mark.parametrize("method", ["hnsw", "hnsw-sq8", pytest.param("hnswlib", marks=needs_hnswlib)])
def test_threads_do_not_change_a_graph(method, tmp_path):
    bank, seen = gaussian(3000, 8), set()
    for threads in (4, 4, 1):
        build_index(method, bank, threads=threads).save(tmp_path / "index")
        seen.add((tmp_path / "index").read_bytes())
    assert len(seen) == 1
    build_index(method, bank, seed=7).save(tmp_path / "index")
    assert (tmp_path / "index").read_bytes() not in seen


@pytest.mark.parametrize("method", HERE)
def test_rows_are_read_in_slices(method, monkeypatch):
    bank, read = gaussian(2000, 16), []

    class Watched:
        shape = bank.shape

        def __getitem__(self, index):
            rows = bank[index]
            read.append(len(rows))
            return rows

    monkeypatch.setattr("leadline.knn.engines.SLICE", 100 * 16 * 8)
    index = build_index(method, Watched(), memory_budget=bank.nbytes)
    assert max(read) <= 100
    assert recall(index.search(bank[:50], 5)[0], brute_force(bank, bank[:50], 5)) > 0.8


def test_queries_of_another_world_are_answered():
    bank = gaussian()
    far = np.full((2, 12), 1e100)
    for method in FAISS:
        check_form(build_index(method, bank).search(far, 10)[0], bank, 10)


def test_threads_of_faiss_are_as_before():
    import faiss

    before = faiss.omp_get_max_threads()
    build_index("ivf-flat", gaussian(), threads=before + 1).search(gaussian(), 3)
    assert faiss.omp_get_max_threads() == before


# Errors


@pytest.mark.parametrize("method", ["flat", "ivf-flat", "hnsw"])
def test_what_exact_search_refuses_is_refused_in_the_same_words(method):
    bank, broken = gaussian(20), gaussian(20)
    broken[7, 3] = np.nan
    index = build_index(method, bank)
    exact = Bank(bank)
    for arguments in ((broken, 3), (bank[:, :5], 3), (bank, 21), (bank, 20, np.arange(20))):
        said = []
        for search in (exact.search, index.search):
            with pytest.raises(LeadlineError) as refused:
                search(*arguments)
            said.append(str(refused.value))
        assert said[0] == said[1]
    with pytest.raises(LeadlineError, match="bank row 7"):
        build_index(method, broken)


def test_no_rows_and_exact_have_no_index():
    with pytest.raises(LeadlineError, match="0 rows"):
        build_index("flat", np.empty((0, 3), np.float32))
    with pytest.raises(LeadlineError, match=r"leadline\.knn\.Bank"):
        build_index("exact", gaussian())


@pytest.mark.parametrize(
    ("package", "method", "extra"),
    [
        ("faiss", "hnsw", "leadline[cpu]"),
        ("faiss", "gpu-flat", "leadline[cuda12]"),
        ("faiss", "gpu-ivf-pq", "leadline[cuda12]"),
        ("faiss", "cagra", "leadline[cuda13]"),
        ("hnswlib", "hnswlib", "leadline[hnswlib]"),
    ],
)
def test_a_missing_package_is_named_with_what_installs_it(package, method, extra):
    said = one_line_from(package, method)
    assert f"{method} needs {package}" in said and f"pip install '{extra}'" in said


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("method", ["gpu-flat", "gpu-ivf-flat:nlist=4", "gpu-ivf-pq:m=4", "cagra"])
def test_methods_for_a_gpu_are_refused_without_one(method):
    with pytest.raises(LeadlineError, match=r"not in the faiss that is installed|needs a GPU") as refused:
        build_index(method, gaussian())
    assert "\n" not in str(refused.value)


# Files


@pytest.mark.parametrize("method", HERE)
def test_a_loaded_index_gives_the_same_answers(method, tmp_path):
    bank, queries = gaussian(800, dtype=np.float64) + 1000, gaussian(60, seed=1) + 1000
    index = build_index(method, bank, seed=5)
    index.save(tmp_path / "index")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index", "index.json"]
    loaded = load_index(tmp_path / "index", bank)
    assert loaded.method == index.method and loaded.size_bytes == index.size_bytes
    assert index.size_bytes == (tmp_path / "index").stat().st_size
    (found, cost), (again, same) = index.search(queries, 7), loaded.search(queries, 7)
    assert (found == again).all() and cost == same


def test_damaged_and_foreign_files_are_refused_in_one_line(tmp_path):
    bank, path = gaussian(), tmp_path / "index"
    build_index("hnsw", bank).save(path)
    whole, about = path.read_bytes(), (tmp_path / "index.json").read_text()

    def refuse(said, rows=bank):
        with pytest.raises(LeadlineError, match=said) as refused:
            load_index(path, rows)
        assert "\n" not in str(refused.value)
        path.write_bytes(whole)
        (tmp_path / "index.json").write_text(about)

    refuse("bank has 599 of 12", bank[:-1])
    path.write_bytes(whole[: len(whole) // 2])
    refuse("damaged")
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    path.write_bytes(flipped)
    refuse("damaged")
    (tmp_path / "index.json").write_text(json.dumps({**json.loads(about), "scale": 3.0}))
    refuse("damaged")
    for text in ("", "[]", "{}", '{"sha256": 1'):
        (tmp_path / "index.json").write_text(text)
        refuse("build it again|build the index again")
    path.unlink()
    refuse("build it again")
    with pytest.raises(LeadlineError, match="cannot be written"):
        build_index("flat", bank).save(tmp_path / "nowhere" / "index")


# Votes and depths


@pytest.mark.parametrize("method", HERE)
def test_votes_and_several_k_and_winners(method):
    digits = load_digits()
    rows, labels, own = digits.data[:900], digits.target[:900], np.arange(900)
    exact = leadline.knn_votes(rows, labels, rows, exclude=own, k=[10, 30])
    votes = leadline.knn_votes(rows, labels, rows, exclude=own, k=[10, 30], method=method)
    for k in (10, 30):
        assert (votes[k].winner == exact[k].winner).mean() > 0.98
    alone = leadline.knn_votes(rows, labels, rows, exclude=own, k=30, method=method, winners_only=True)
    assert (alone.winner == votes[30].winner).all()
    near = leadline.knn_votes(rows, labels, rows[:5], k=4, method=method, return_neighbours=True).neighbours
    assert (np.diff(near.distances, axis=1) >= 0).all() and (near.rows[:, 0] == np.arange(5)).all()


def test_depths_with_an_index_and_a_method_that_is_refused_before_any_work():
    rows = torch.from_numpy(gaussian(120, 6))
    points = [(row, i % 3) for i, row in enumerate(rows)]
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    exact = leadline.prediction_depth(model, points, k=5)
    assert leadline.prediction_depth(model, points, k=5, method="flat").equals(exact)
    with pytest.raises(LeadlineError, match="method"):
        leadline.prediction_depth(model, None, method="flat:k=1")


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 60), st.integers(1, 6), st.sampled_from(FAISS), st.data())
def test_any_small_bank(n, width, method, data):
    """Few different values, so that most rows are equal to others."""
    random = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    bank = random.integers(0, 2, (n, width)).astype(np.float32)
    k = data.draw(st.integers(1, n))
    found, _ = build_index(method, bank, threads=1).search(bank, k)
    check_form(found, bank, k)
