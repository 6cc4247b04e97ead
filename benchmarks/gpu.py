"""On one GPU: checks, then times, then one JSON file, a section after another.

python benchmarks/gpu.py OUT.json [--only SECTION,SECTION] [--cifar10 FOLDER] [--commit ID]

checks    neighbours of hard inputs against float64 brute force
rates     all pairs at k = 30, in turns: the search with and without pruning, torch's matrix product of the same rows in
          bfloat16 (the machine's limit), torch mm + topk in bfloat16 (not exact) and float32, faiss GPU Flat where it
          is
layer     one layer of 1.33M x 1.28M rows of 2,048 values
apart     all pairs of rows in main memory: on one GPU, whole and in tiles, and on all GPUs where there are several
member    a full-width ResNet18 trained on CIFAR-10 (the Parquet files of FOLDER): its votes at all probes against the
          search on the CPU and against float64, then from a checkpoint to a table of depths
images    `gpu_images.py`; training: `gpu_members.py`

It needs torch, Triton, numpy, numba, pyarrow, scikit-learn and pillow, and what is missing is named in the file.
"""

import io
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import numpy as np
import pyarrow.parquet as pq
import torch
import typer
from PIL import Image

from leadline import machine, one_model, prediction_depth
from leadline.embedding import in_place
from leadline.errors import one_line
from leadline.full_precision import full_precision
from leadline.knn import Bank, SharedBank, count_votes, on_device
from leadline.knn.on_device import DeviceBank
from leadline.members.architectures import build
from leadline.members.train import train
from leadline.members.weights import load_weights, save_weights

K, ROUNDS = 30, 3
WIDTHS = (128, 512, 2048)
ROWS = 262_144
LAYER = (1_331_167, 1_281_167, 2048)
VOTING = (4000, 200)  # points of a bank, and of them queries, whose votes are compared with those on the CPU
DEVICE = torch.device("cuda")
SMI = ("nvidia-smi", "--query-gpu=name,driver_version,power.limit", "--format=csv,noheader")
PACKAGES = ("leadline", "torch", "triton", "numpy", "numba", "pyarrow")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "knn"))


def main(
    out: Path,
    only: str = "checks,rates,layer,apart,member,images,training",
    cifar10: Path = Path("../shared/data/cifar10"),
    commit: Annotated[str | None, typer.Option(help="what the figures are of, where there is no git")] = None,
) -> None:
    """Each section's figures are in the file as soon as it is done; one that fails says so and the others go on."""
    sections: dict[str, Callable[[], Any]] = {
        "checks": checks,
        "rates": rates,
        "layer": layer,
        "apart": apart,
        "member": lambda: member(cifar10),
        "images": images,
        "training": training,
    }
    found: dict[str, Any] = {"commit": commit, **about()}
    for name in only.split(","):
        started = time.perf_counter()
        try:
            found[name] = sections[name]()
        except Exception as error:
            found[name] = {"failed": one_line(error)}
        found[name]["section_seconds"] = round(time.perf_counter() - started, 1)
        print(name, json.dumps(found[name])[:3000], flush=True)
        out.write_text(json.dumps(found, indent=1) + "\n")
        torch.cuda.empty_cache()


def about() -> dict[str, Any]:
    """What the figures depend on, and what was not there to be measured."""
    return {
        **machine.stamp("python benchmarks/gpu.py", PACKAGES, torch.get_num_threads(), "cuda"),
        "cuda": torch.version.cuda,
        "driver": subprocess.run(SMI, capture_output=True, text=True).stdout.strip(),
        "gpu_memory": torch.cuda.get_device_properties(0).total_memory,
        "unmeasured": [
            *([] if _has_faiss() else ["faiss GPU (Flat, IVF-Flat, IVF-PQ, CAGRA): faiss is not installed"]),
            *([] if torch.cuda.device_count() > 1 else ["several GPUs: there is one"]),
        ],
    }


def checks() -> dict[str, Any]:
    """Neighbours of the hard inputs of the tests, also as if they were large and wide."""
    from test_exact_votes import brute_force, hard_inputs

    rows, wrong = [], []
    before = {name: getattr(on_device, name) for name in ("SMALL", "OF_A_CELL", "SEEN_FIRST", "NARROW")}
    try:
        on_device.SMALL, on_device.OF_A_CELL, on_device.SEEN_FIRST = 64, 300, 512
        for name, bank in hard_inputs().items():
            for narrow in (64, 4) if bank.shape[1] < 64 else (64,):
                on_device.NARROW = narrow
                for leave_out, screen in product((False, True), ("float16", "int8")):
                    queries, exclude = bank[:40], np.arange(40) if leave_out else None
                    ready = DeviceBank(torch.from_numpy(bank).to(DEVICE), DEVICE, screen=screen)
                    chosen, cost = ready.search(torch.from_numpy(queries).to(DEVICE), 10, exclude)
                    case = f"{name}, {screen}, narrow below {narrow}, leave one out: {leave_out}"
                    if not np.array_equal(chosen, brute_force(bank, queries, 10, exclude)):
                        wrong.append(case)
                    rows.append([case, ready.plan, cost.certified, cost.reranked, cost.fell_through])
    finally:
        for name, value in before.items():
            setattr(on_device, name, value)
    return {"cases": len(rows), "wrong": wrong, "certified_reranked_fell_through": rows}


def rates() -> dict[str, Any]:
    """All pairs of ROWS rows, Gaussian and of few intrinsic dimensions."""
    found = {}
    for kind in ("gaussian", "latent"):
        for width in WIDTHS:
            rows = gaussian(ROWS, width) if kind == "gaussian" else latent(ROWS, width)
            # Of wide noise int8 leaves so many rows that all queries would be searched in float64.
            found[f"{kind}, D = {width}"] = _rates_of(rows, in_int8=kind == "latent" or width == min(WIDTHS))
            print(kind, width, json.dumps(found[f"{kind}, D = {width}"]), flush=True)
            del rows
            torch.cuda.empty_cache()
    return found


def _rates_of(rows: torch.Tensor, in_int8: bool) -> dict[str, Any]:
    """Seconds of each way, medians of ROUNDS in turns. The search makes the bank ready too."""
    half, n = rows.bfloat16(), len(rows)
    some = slice(0, n // 8)  # of the queries, for what is slow
    ways: dict[str, tuple[Callable[[], Any], float]] = {
        "matrix product in bfloat16": (lambda: _product(half, half), 1),
        "leadline, without pruning": (lambda: _search(rows, pruned=False), 1),
        "leadline": (lambda: _search(rows), 1),
        "torch mm + topk in bfloat16": (lambda: _mm_topk(half[some], half), 8),
        "torch mm + topk in float32": (lambda: _mm_topk(rows[some], rows), 8),
    }
    if in_int8:
        ways["leadline in int8, without pruning"] = (lambda: _search(rows, pruned=False, screen="int8"), 1)
        ways["leadline in int8"] = (lambda: _search(rows, screen="int8"), 1)
    if _has_faiss():
        ways["faiss GPU Flat"] = (lambda: _faiss(rows[some], rows), 8)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    first = {}
    with full_precision():
        for number in range(ROUNDS + 1):
            for name, (way, share) in ways.items():
                took = share * _timed(way)
                if number:
                    seconds[name].append(took)
                else:
                    first[name] = took  # kernels are compiled, or read from where they are kept
    medians = {name: statistics.median(each) for name, each in seconds.items()}
    limit, ours = medians["matrix product in bfloat16"], medians["leadline, without pruning"]
    ready = DeviceBank(rows, DEVICE)
    _, cost = ready.nearest(rows, K, np.arange(n))
    truth = _agreement(rows, rows, np.arange(n), ready, 64)
    return {
        "medians": medians, "each": seconds, "first": first,
        "tflops_of_product": 2 * n * n * rows.shape[1] / limit / 1e12,
        "fraction_of_product": limit / ours, "fraction_with_pruning": limit / medians["leadline"],
        "certified": cost.certified, "reranked": cost.reranked, "fell_through": cost.fell_through,
        "rows_measured_a_query": cost.measured / n, "pairs_of_all": cost.pairs / n / n,
        "equal_to_float64": truth, "plan": ready.plan, "in_int8": _cost_in_int8(rows) if in_int8 else None,
    }  # fmt: skip


def _cost_in_int8(rows: torch.Tensor) -> dict[str, float]:
    _, cost = DeviceBank(rows, DEVICE, screen="int8").nearest(rows, K, np.arange(len(rows)))
    return {"rows_measured_a_query": cost.measured / len(rows), "fell_through": cost.fell_through}


def layer() -> dict[str, Any]:
    """The votes of one layer as wide as ImageNet's last but one, of all its points."""
    n_queries, n_bank, width = LAYER
    found = {}
    for kind in ("latent", "gaussian"):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        rows = gaussian(n_queries, width) if kind == "gaussian" else latent(n_queries, width)
        exclude = np.concatenate([np.arange(n_bank), np.full(n_queries - n_bank, -1)])
        labels = torch.randint(1000, (n_bank,), device=DEVICE)
        torch.cuda.synchronize()
        started = time.perf_counter()
        ready = DeviceBank(rows[:n_bank], DEVICE)
        torch.cuda.synchronize()
        made = time.perf_counter()
        nearest, cost = ready.nearest(rows, K, exclude)
        count_votes(labels[nearest])
        torch.cuda.synchronize()
        done = time.perf_counter()
        found[kind] = {
            "queries": n_queries, "bank": n_bank, "width": width, "seconds": done - started,
            "ready_seconds": made - started, "peak_bytes": torch.cuda.max_memory_allocated(), "plan": ready.plan,
            "rows_bytes": rows.nbytes, "tflops_as_all_pairs": 2 * n_queries * n_bank * width / (done - started) / 1e12,
            "pairs_of_all": cost.pairs / n_queries / n_bank, "rows_measured_a_query": cost.measured / n_queries,
            "certified": cost.certified, "reranked": cost.reranked, "fell_through": cost.fell_through,
            "equal_to_float64": _agreement(rows[:n_bank], rows, exclude, ready, 64),
        }  # fmt: skip
        print(kind, json.dumps(found[kind]), flush=True)
        del rows, ready, nearest
    return found


def apart() -> dict[str, Any]:
    """Rows in main memory: a bank that is brought to the device once, one that passes through it in tiles, and one that
    several devices share."""
    given = latent(ROWS, 2048).cpu().numpy()
    every, n_devices = np.arange(ROWS), torch.cuda.device_count()
    devices = [torch.device("cuda", i) for i in range(n_devices)]
    quarter = 24 * given.size // 4 + 12 * len(given) * 128  # and what rows are from the centres of cells
    ways: dict[str, Callable[[], Any]] = {
        "whole": lambda: DeviceBank(given, DEVICE),
        "in four tiles": lambda: DeviceBank(given, DEVICE, quarter),
    }
    if n_devices > 1:
        ways[f"whole on each of {n_devices}"] = lambda: SharedBank(given, devices)
        ways[f"shared by {n_devices}"] = lambda: SharedBank(given, devices, 12 * given.size - 1)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    found = {}
    for number in range(ROUNDS + 1):
        for name, way in ways.items():
            started = time.perf_counter()
            found[name], _ = way().search(given, K, every)
            if number:
                seconds[name].append(time.perf_counter() - started)
    return {
        "rows": ROWS, "width": 2048, "medians": {name: statistics.median(each) for name, each in seconds.items()},
        "each": seconds, "same": all(np.array_equal(rows, found["whole"]) for rows in found.values()),
        "plans": {name: way().plan for name, way in ways.items()},
    }  # fmt: skip


def member(folder: Path) -> dict[str, Any]:
    """A ResNet18 of full width, all of CIFAR-10 (JPEG), eleven probes."""
    inputs, labels, n_train = cifar10(folder)
    model = build("resnet18", {"width": 64}, inputs.shape[1:], 10, seed=0)
    recipe = SimpleNamespace(
        steps=300, batch=128, learning_rate=0.04, milestones=(220,), decay=0.2, momentum=0.9, precision="bfloat16"
    )
    points = SimpleNamespace(
        labels=labels.numpy(), input_shape=inputs.shape[1:], read_on=lambda ids, device: inputs[ids].to(device)
    )
    started = time.perf_counter()
    train(model, points, np.arange(n_train), recipe, 0, DEVICE)  # type: ignore[arg-type]
    found: dict[str, Any] = {"training_seconds": time.perf_counter() - started}
    checkpoint = Path("member.safetensors")
    save_weights(model, checkpoint)
    bank = torch.utils.data.TensorDataset(inputs[:n_train], labels[:n_train])
    held_out = torch.utils.data.TensorDataset(inputs[n_train:], labels[n_train:])
    found["votes"] = _against_cpu(model, inputs, labels.numpy())
    print(json.dumps(found), flush=True)
    prediction_depth(model, torch.utils.data.Subset(bank, range(min(4096, n_train))))  # compiles
    found["end_to_end"] = _from_checkpoint(checkpoint, inputs.shape[1:], bank, held_out)
    return found


def _from_checkpoint(
    checkpoint: Path, shape: tuple[int, ...], bank: Any, held_out: Any
) -> dict[str, Any]:  # fmt: skip
    """Depths of all points of both sets, and where the time went."""
    parts = {"decode and copy": 0.0, "forward": 0.0, "search": 0.0, "write": 0.0}
    torch.cuda.reset_peak_memory_stats()
    with (
        _counted(one_model, "_read", parts, "decode and copy"),
        _counted(in_place, "embed_resident", parts, "forward"),
        _counted(one_model, "knn_votes", parts, "search"),
        _counted(pq, "write_table", parts, "write"),
    ):
        started = time.perf_counter()
        model = build("resnet18", {"width": 64}, shape, 10, seed=1)
        load_weights(model, checkpoint)
        model.to(DEVICE).eval()
        tables = {}
        for name, asked in (("training", None), ("held out", held_out)):
            tables[name] = prediction_depth(model, bank, asked)
            pq.write_table(tables[name], f"depths-{name.replace(' ', '-')}.parquet")
        seconds = time.perf_counter() - started
    tables_ = {
        name: {
            "points": len(table),
            "mean_depth": float(table["depth"].to_numpy().mean()),
            "accuracy": float((table["prediction"].to_numpy() == table["label"].to_numpy()).mean()),
        }
        for name, table in tables.items()
    }
    other = seconds - sum(parts.values())
    return {
        "seconds": seconds, "parts": {**parts, "other": other}, "peak_bytes": torch.cuda.max_memory_allocated(),
        "shares": {name: took / seconds for name, took in {**parts, "other": other}.items()}, "tables": tables_,
    }  # fmt: skip


def _against_cpu(model: torch.nn.Module, inputs: torch.Tensor, labels: Any) -> list[dict[str, Any]]:
    """At every probe: the votes of VOTING on the GPU, the CPU and in float64."""
    (n_bank, n_queries), rows = VOTING, []
    some = torch.utils.data.TensorDataset(inputs[:n_bank], torch.from_numpy(labels[:n_bank]))
    points = one_model._Points(some, "bank", DEVICE, 256)
    placed = one_model.place_probes(model, "auto", inputs[:1].to(DEVICE))
    placed = one_model.choose_reductions("none", placed)
    exclude = np.arange(n_queries)
    for probe in placed:
        reducers = one_model.make_reducers(placed, {})
        (embedded,), _ = in_place.embed_in_place(model, placed, reducers, [probe.index], points.batches, n_bank, "bank")
        asked = embedded[:n_queries].clone()
        on_gpu, _ = DeviceBank(embedded, DEVICE).search(asked, K, exclude)
        on_cpu, _ = Bank(embedded.cpu().numpy()).search(asked.cpu().numpy(), K, exclude)
        truth = _brute_force(embedded, asked, exclude)
        votes = [count_votes(labels[found]) for found in (on_gpu, on_cpu, truth)]
        equal = [all(np.array_equal(getattr(votes[0], f), getattr(v, f)) for f in FIELDS) for v in votes[1:]]
        rows.append({"probe": probe.name, "width": probe.width, "as_cpu": equal[0], "as_float64": equal[1]})
    return rows


FIELDS = ("winner", "winner_votes", "runner_up", "runner_up_votes")


def images() -> dict[str, Any]:
    """Images a second."""
    import gpu_images

    return dict(gpu_images.measure(DEVICE, compiles=False))


def training() -> dict[str, Any]:
    """Steps a second of members."""
    import gpu_members

    return dict(gpu_members.measure(DEVICE))


def gaussian(n: int, width: int) -> torch.Tensor:
    """float32 [n, width] on the device."""
    return torch.randn((n, width), device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(0))


def latent(n: int, width: int, dimensions: int = 16) -> torch.Tensor:
    """Rows of so many intrinsic dimensions: a Gaussian about one of 10 centres, through two random ReLU layers, with
    noise, as `inputs.DeepLayer` has them: float32 [n, width] on the device."""
    random = torch.Generator(DEVICE).manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=DEVICE, generator=random)

    centres, first = 3 * normal(10, dimensions), normal(dimensions, width) * dimensions**-0.5
    second, biases = normal(width, width) * (2 / width) ** 0.5, normal(2, width)
    rows = torch.empty((n, width), device=DEVICE)
    for start in range(0, n, 65_536):
        part = rows[start : start + 65_536]
        classes = torch.randint(10, (len(part),), device=DEVICE, generator=random)
        hidden = torch.relu((centres[classes] + normal(len(part), dimensions)) @ first + biases[0])
        part[:] = torch.relu(hidden @ second + biases[1]) + 1e-3 * normal(len(part), width)
    return rows


def cifar10(folder: Path) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Inputs float32 [60000, 3, 32, 32] and labels int64, training first, and how many those are."""
    tables = [pq.read_table(folder / f"{part}.parquet") for part in ("train", "test")]

    def decoded(encoded: dict[str, bytes]) -> Any:
        return np.asarray(Image.open(io.BytesIO(encoded["bytes"])).convert("RGB"))

    with ThreadPoolExecutor() as pool:
        pixels = [np.stack(list(pool.map(decoded, table.column(0).to_pylist()))) for table in tables]
    inputs = torch.from_numpy(np.concatenate(pixels)).permute(0, 3, 1, 2).float().div_(255).sub_(0.5).div_(0.25)
    labels = np.concatenate([table.column(1).to_numpy() for table in tables]).astype(np.int64)
    return inputs.contiguous(), torch.from_numpy(labels), len(tables[0])


def _search(rows: torch.Tensor, pruned: bool = True, screen: str = "float16") -> None:
    on_device.PRUNED = pruned
    try:
        DeviceBank(rows, DEVICE, screen=screen).nearest(rows, K, np.arange(len(rows)))
    finally:
        on_device.PRUNED = True


def _product(queries: torch.Tensor, rows: torch.Tensor) -> None:
    """All products, in a buffer that is used again and again."""
    out = torch.empty((8192, len(rows)), dtype=rows.dtype, device=DEVICE)
    for first in range(0, len(queries), 8192):
        torch.mm(queries[first : first + 8192], rows.T, out=out)


def _mm_topk(queries: torch.Tensor, rows: torch.Tensor) -> None:
    squares = rows.float().square().sum(dim=1) / 2
    for first in range(0, len(queries), 4096):
        (queries[first : first + 4096] @ rows.T).float().sub_(squares).topk(K + 1, dim=1)


def _faiss(queries: torch.Tensor, rows: torch.Tensor) -> None:
    import faiss

    index = faiss.GpuIndexFlatL2(faiss.StandardGpuResources(), rows.shape[1])
    index.add(rows.cpu().numpy())
    index.search(queries.cpu().numpy(), K + 1)


def _has_faiss() -> bool:
    try:
        import faiss
    except ImportError:
        return False
    return hasattr(faiss, "GpuIndexFlatL2")


def _agreement(rows: torch.Tensor, queries: torch.Tensor, exclude: Any, ready: DeviceBank, n: int) -> bool:
    """Whether the neighbours of some queries are those of float64 brute force."""
    which = np.random.default_rng(0).choice(len(queries), n, replace=False)
    asked = queries[torch.from_numpy(which).to(DEVICE)]
    found, _ = ready.search(asked, K, exclude[which])
    return bool(np.array_equal(found, _brute_force(rows, asked, exclude[which])))


def _brute_force(rows: torch.Tensor, queries: torch.Tensor, exclude: Any) -> Any:
    """The K nearest rows by sums of squared differences in float64, ties by the lower row; int64 [Q, K], ascending."""
    squares = torch.empty((len(queries), len(rows)), dtype=torch.float64, device=DEVICE)
    step = max(1, (1 << 27) // rows.shape[1])
    for i, query in enumerate(queries.double()):
        for first in range(0, len(rows), step):
            squares[i, first : first + step] = (rows[first : first + step] - query).square_().sum(dim=1)
    inside = torch.from_numpy(exclude >= 0).to(DEVICE)
    squares[inside, torch.from_numpy(exclude).to(DEVICE)[inside]] = torch.inf
    return squares.sort(dim=1, stable=True).indices[:, :K].sort(dim=1).values.cpu().numpy()


def _timed(work: Callable[[], Any]) -> float:
    torch.cuda.synchronize()
    started = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - started


@contextmanager
def _counted(module: Any, name: str, parts: dict[str, float], part: str) -> Iterator[None]:
    """Count what calls of a function take as a part; each waits for the device, so that they do not overlap."""
    function = getattr(module, name)

    def counted(*given: Any, **named: Any) -> Any:
        torch.cuda.synchronize()
        started = time.perf_counter()
        answer = function(*given, **named)
        torch.cuda.synchronize()
        parts[part] += time.perf_counter() - started
        return answer

    setattr(module, name, counted)
    try:
        yield
    finally:
        setattr(module, name, function)


if __name__ == "__main__":
    typer.run(main)
