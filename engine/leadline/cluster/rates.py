"""How fast a worker is: measured in a few seconds, or assumed of a GPU that is not at hand."""

import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from leadline.cluster.common import own_neighbours
from leadline.cluster.graph import Graph, Outline
from leadline.config import ImageFolder, MemberConfig, PointsConfig
from leadline.embedding import embed_batch
from leadline.embedding.extract import embed_resident
from leadline.embedding.principal import Directions
from leadline.embedding.reductions import Reducer, make_reducers, parse_reduction, stored_width
from leadline.knn import bank_on, count_votes
from leadline.knn.arrays import Array
from leadline.knn.votes import Votes
from leadline.members.architectures import build
from leadline.members.probes import Probe, read_probes
from leadline.members.splits import path_of_seed
from leadline.members.train import train
from leadline.members.weights import load_weights
from leadline.points import TRAIN, open_points
from leadline.store.files import read_json, write_json, writing_rows
from leadline.store.schemas import VOTE_FIELDS, vote_columns, votes_schema
from leadline.store.tables import ROWS, write_table

SECONDS_OF_TRAINING = 3.0  # of all architectures together, as of embedding
SECONDS_OF_EMBEDDING = 4.0
WARM = 3  # training steps that are not counted
QUERIES = 1024  # that a sample search is asked
LARGEST, SMALLEST, OF_ALL = 16_384, 2048, 131_072  # rows of a probe's sample search, and of all probes' together
SAMPLED = 512 << 20  # bytes of embeddings that sample searches are made with
FILES = 20
WRITTEN = 64 << 20  # bytes that are written to see how fast that goes
IMAGES, IMAGE = 32, (500, 375)  # made up where there are none: about ImageNet's usual size, in pixels
FIRST = 1.0  # seconds of a worker's first search, at most: what is more is compiling, which stays in its cache
BACKWARD = 3  # times the forward pass: a step of training, with its backward pass


def _product_flops(into: Sequence[int], left: Sequence[int], right: Sequence[int], **_: Any) -> int:
    """Of a product [n, m] with [m, p] that is added to what is there; torch counts only those that are not in place."""
    return 2 * math.prod(left) * right[1]


IN_PLACE = {torch.ops.aten.addmm_: _product_flops}


@dataclass(frozen=True)
class Gpu:
    """A GPU that is not at hand, and a node's share for each. bfloat16, float32: FLOP/s, dense; bandwidth: bytes/s of
    its memory; memory, of the GPU, host, of the node, and scratch, its disks: bytes; cpus: of the node.
    """

    bfloat16: float
    float32: float
    bandwidth: float
    memory: float
    cpus: int
    host: float
    scratch: float
    node: str


# Limits from NVIDIA's data sheets; nodes as AWS rents them.
GPUS = {
    "h100": Gpu(989e12, 67e12, 3.35e12, 80e9, 24, 256 * 2**30, 3.84e12, "p5.48xlarge"),
    "h200": Gpu(989e12, 67e12, 4.8e12, 141e9, 24, 256 * 2**30, 3.84e12, "p5en.48xlarge"),
}
# What is assumed of them: shares of those limits, bytes/s to and from the host and of a disk for each GPU, seconds
# until workers are there, and bytes of a worker that has done nothing yet. Only a search is measured (OF_BFLOAT16,
# PAIR: benchmarks/results/gpu-h100.json).
OF_BFLOAT16, OF_TRAINING, OF_FLOAT32, OF_BANDWIDTH = 0.6, 0.3, 0.5, 0.7
COPIED, STORED = 20e9, 1.5e9
START = 60.0
FILE = 0.01
WORKER = 2 << 30
PAIR = 3  # bytes that a pair of a query and a bank row moves, or takes as long as, beside its product


@dataclass(frozen=True)
class Network:
    """An architecture. flops: of a point's embedding, reductions and all; forward: of its forward pass; weights: bytes;
    saved: bytes of a point that training keeps until the backward pass, 0 where nothing is trained.
    """

    flops: int
    forward: int
    weights: int
    saved: int


@dataclass(frozen=True)
class Law:
    """Seconds that were measured with a bank of `rows`, and the power by which they grow with it."""

    rows: int
    seconds: float
    power: float

    def at(self, n_bank: int) -> float:
        return float(self.seconds * (n_bank / self.rows) ** self.power)


@dataclass(frozen=True)
class Search:
    """Of one probe. ready: making a bank ready; ask: a query and its vote; memory: bytes of a bank row."""

    ready: Law
    ask: Law
    memory: float


@dataclass(frozen=True)
class Rates:
    """What a worker takes, in seconds. read: a point, with decoding; move: a byte of embeddings, to its place or from
    it; file, opened: a small file, flushed to disk, and one that is read; step: of training, and embed: a point, by
    architecture; first: the first search, beside what the others take; search: by architecture and probe; pick: a
    point's neighbours from those that were found for several banks; reduce: a vote's way into its table; start: until
    workers are there. memory: bytes of a worker beside what its units take. said: where all this is from.
    """

    read: float
    move: float
    file: float
    opened: float
    step: Mapping[str, float]
    embed: Mapping[str, float]
    first: float
    search: Mapping[tuple[str, int], Search]
    pick: float
    reduce: float
    start: float
    memory: int
    said: tuple[str, ...]


def networks_of(graph: Graph, points: Outline) -> dict[str, Network]:
    """What there is to know of each architecture before it runs, by one example."""
    return {entry.label: _network_of(entry, graph.probes[entry.label], points) for entry in graph.config.members}


def _network_of(entry: MemberConfig, probes: list[Probe], points: Outline) -> Network:
    model = _built(entry, points)
    examples = torch.from_numpy(points.read(np.zeros(2, np.int64)))
    with FlopCounterMode(display=False) as counted:
        read_probes(model, probes, examples[:1])
    forward = counted.get_total_flops()
    with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as counted:
        for probe, reduce in zip(probes, _reducers(probes, "meta"), strict=True):
            reduce(torch.empty(1, probe.width, device="meta"))  # without its memory
    weights = sum(tensor.nbytes for tensor in model.state_dict().values())
    saved = _saved_bytes(model, examples) // 2 if entry.training else 0
    return Network(forward + counted.get_total_flops(), forward, weights, saved)


def _saved_bytes(model: torch.nn.Module, inputs: torch.Tensor) -> int:
    """Bytes that a forward pass in training keeps for the backward one, beside the weights."""
    weights = {tensor.data_ptr() for tensor in model.state_dict().values()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in weights:
            kept[tensor.data_ptr()] = tensor.nbytes
        return tensor

    model.train()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(inputs.clone())
    del output
    return sum(kept.values())


def _reducers(probes: list[Probe], device: str) -> list[Reducer]:
    """Reducers as members have them, with directions that nothing was fitted to."""
    directions = {}
    for probe in probes:
        reduction = parse_reduction(probe.reduction)
        if reduction.kind == "pca":
            mean = torch.zeros(probe.width, device=device)
            directions[probe.index] = Directions(mean, mean.new_zeros(probe.width, *reduction.size))
    return make_reducers(probes, directions)


def _built(entry: MemberConfig, points: Outline) -> torch.nn.Module:
    return build(entry.architecture, entry.parameters, points.input_shape, len(points.label_names), entry.seed)


def assumed(graph: Graph, networks: Mapping[str, Network], name: str, read: float) -> Rates:
    """The rates of a worker on its share of a GPU, by name; read: seconds a point, measured where this runs."""
    gpu, engine = GPUS[name], graph.config.engine
    share = min(1.0, engine.gpus)
    moved = OF_BANDWIDTH * gpu.bandwidth * share if graph.whole else COPIED  # bytes/s of a bank's rows, to be searched
    rounds = graph.config.precision == "bfloat16"
    training, float32 = OF_TRAINING * gpu.bfloat16 * share, OF_FLOAT32 * gpu.float32 * share
    step, embed, search = {}, {}, {}
    for entry in graph.config.members:
        network, probes = networks[entry.label], graph.probes[entry.label]
        recipe = entry.training
        if recipe:
            step[entry.label] = BACKWARD * network.forward * recipe.batch / training
        there, back = math.prod(probes[0].shape), sum(stored_width(probe) for probe in probes)
        if graph.whole:
            back = 0  # embeddings stay where they are made, and banks are made of them there
        forward, reductions = network.forward / (training if rounds else float32), network.flops - network.forward
        embed[entry.label] = forward + reductions / float32 + 4 * (there + back) / COPIED
        for probe in probes:
            width = stored_width(probe)
            pair = 2 * width / (OF_BFLOAT16 * gpu.bfloat16 * share) + PAIR / (OF_BANDWIDTH * gpu.bandwidth * share)
            search[entry.label, probe.index] = Search(Law(1, 4 * width / moved, 1), Law(1, pair, 1), 8 * width)
    return Rates(
        read=read,
        move=1 / STORED,
        file=FILE,
        opened=FILE / 10,
        step=step,
        embed=embed,
        first=FIRST,
        search=search,
        pick=1e-5,
        reduce=1e-6,
        start=START,
        memory=WORKER,
        said=(
            f"not measured: of an {name.upper()}'s {gpu.float32 / 1e12:g} TFLOP/s in float32 {OF_FLOAT32:.0%} are "
            f"reached by {'reductions' if rounds else 'embedding'}, of its {gpu.bfloat16 / 1e12:g} in bfloat16 "
            f"{OF_TRAINING:.0%} by {'forward passes and ' if rounds else ''}training",
            f"of these a search reaches {OF_BFLOAT16:.0%}, and a pair takes as long again as {PAIR} bytes at "
            f"{OF_BANDWIDTH:.0%} of {gpu.bandwidth / 1e12:g} TB/s",
            "searches as measured on one H100 (results/gpu-h100.json), with no pair left out: an upper bound",
            f"not measured: {COPIED / 1e9:g} GB/s between host and GPU, {STORED / 1e9:g} GB/s of scratch a worker, "
            f"{START:g} s until workers are there, {WORKER / 2**30:g} GiB a worker that has done nothing yet, "
            f"{FILE * 1000:g} ms for a small file, 1 µs for a vote's way into the tables",
            f"a node's share for each GPU, unless told otherwise: {gpu.cpus} CPUs, {gpu.host / 2**30:.0f} GiB of "
            f"memory, {gpu.scratch / 1e12:g} TB of scratch ({gpu.node} of AWS)",
        ),
    )


def measure_reading(config: PointsConfig, points: Outline, at_hand: bool) -> tuple[float, str]:
    """Seconds that one thread here takes to read and decode a point, and of what. at_hand: whether the points are."""
    if at_hand:
        return _seconds_of_reading(points), "reading and decoding points measured here"
    if not isinstance(config, ImageFolder):
        return _seconds_of_reading(points), "reading points measured here with numbers in memory"
    with tempfile.TemporaryDirectory() as folder:
        _make_images(Path(folder) / "train" / "any")
        keys = {"train": Path(folder) / "train", "test": None, "corrupt": None}
        images = open_points(config.model_copy(update=keys))
        text = f"decoding measured here on made-up JPEGs of {IMAGE[0]} x {IMAGE[1]} pixels, one thread"
        if config.decoder == "nvjpeg":
            text += " of Pillow: nvJPEG's rate is not known"
        return _seconds_of_reading(images), text


def _make_images(folder: Path) -> None:
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for number in range(IMAGES):
        coarse = generator.integers(0, 256, (IMAGE[1] // 4, IMAGE[0] // 4, 3), np.uint8)
        Image.fromarray(coarse).resize(IMAGE, Image.Resampling.BICUBIC).save(folder / f"{number}.jpg", quality=90)


def _seconds_of_reading(points: Outline) -> float:
    ids = np.arange(min(len(points), IMAGES))
    points.read(ids)  # opens what is opened once
    started = time.perf_counter()
    points.read(ids)
    return (time.perf_counter() - started) / len(ids)


def measure(graph: Graph, points: Outline, scratch: Path, tables: Path) -> Rates:
    """The rates of a worker in this process, by a little of everything that it would do.

    scratch, tables: folders where embeddings and a run's files would lie, or others on the same disks. Points that are
    not at hand are made up, and with them what bounds leave out of a search. Takes some 10 s, more the first time, when
    the search is compiled.
    """
    config = graph.config
    torch.set_num_threads(config.engine.threads)
    device = torch.device("cuda" if config.engine.gpus else "cpu")
    models = {entry.label: _ready(entry, points, device) for entry in config.members}
    started = time.perf_counter()
    _search_once(np.random.default_rng(0).standard_normal((QUERIES, 100), np.float32), graph, False, device)
    first = min(time.perf_counter() - started, FIRST)
    step = {
        entry.label: _seconds_of_a_step(entry, points, models[entry.label], device, len(config.members))
        for entry in config.members
        if entry.training
    }
    read, embed, search = 0.0, {}, {}
    for number, entry in enumerate(config.members):
        probes = graph.probes[entry.label]
        batch = _embed(graph, entry.label, points, models[entry.label], device, np.arange(1))
        if number == 0:
            memory = resident_bytes()[0]
        del batch
        rows, read, embed[entry.label] = _sample(graph, entry.label, points, models[entry.label], device)
        for probe, values in zip(probes, rows, strict=True):
            shared = probe.index == 0 and graph.common.pays
            search[entry.label, probe.index] = _search_rates(values, graph, shared, device)
    with tempfile.TemporaryDirectory(dir=scratch) as place:
        move = _seconds_of_a_byte(Path(place))
    with tempfile.TemporaryDirectory(dir=tables) as place:
        file, opened = _seconds_of_a_file(Path(place))
        reduce = _seconds_of_a_vote(Path(place), max(len(probes) for probes in graph.probes.values()))
    return Rates(
        read=read,
        move=move,
        file=file,
        opened=opened,
        step=step,
        embed=embed,
        first=first,
        search=search,
        pick=_seconds_of_picking(graph),
        reduce=reduce,
        start=0.0,
        memory=memory,
        said=(
            "measured before this was printed: training steps, forward passes, reading and decoding, writing, and "
            f"searches with up to {LARGEST:,} rows of each probe, beyond which they are taken to grow as from a fourth "
            "of these rows on; so is the share of pairs that bounds leave out",
            "compiled searches are taken to be in their cache already, as this plan leaves them on the nodes that it "
            "ran on",
        ),
    )


def _ready(entry: MemberConfig, points: Outline, device: torch.device) -> torch.nn.Module:
    """A network with the member's weights where they are given and at hand, else with random ones."""
    model = _built(entry, points)
    path = path_of_seed("weights", entry.weights, entry.seed) if entry.weights else None
    if path is not None and path.is_file():
        load_weights(model, path)
    return model.float().to(device)


class _EnoughError(Exception):
    """Training has been seen long enough."""


def _seconds_of_a_step(
    entry: MemberConfig, points: Any, model: torch.nn.Module, device: torch.device, of: int
) -> float:
    """Trains the model for a share of the time, so that its embeddings are no longer those of random weights."""
    assert entry.training is not None
    ids = np.flatnonzero(points.parts == TRAIN)[: 16 * entry.training.batch]
    times: list[float] = []  # at which steps began

    def look(model: torch.nn.Module, inputs: Any) -> None:
        times.append(time.perf_counter())
        if len(times) > WARM + 2 and times[-1] - times[0] > SECONDS_OF_TRAINING / of:
            raise _EnoughError

    recipe = entry.training.model_copy(update={"steps": max(entry.training.steps, WARM + 3)})
    with suppress(_EnoughError), model.register_forward_pre_hook(look):
        train(model, points, ids, recipe, entry.seed, device)
    return (times[-1] - times[WARM]) / (len(times) - 1 - WARM)


def _embed(
    graph: Graph, label: str, points: Outline, model: torch.nn.Module, device: torch.device, ids: Array
) -> list[Array]:
    probes = graph.probes[label]
    inputs = points.read_on(ids, device)
    reducers = _reducers(probes, str(device))
    return embed_batch(model, probes, inputs, 0, label, reducers, graph.config.precision).embeddings


def _sample(
    graph: Graph, label: str, points: Outline, model: torch.nn.Module, device: torch.device
) -> tuple[list[Any], float, float]:
    """Embeddings of some points at each probe, and the seconds for reading a point and for embedding it.

    They are arrays, or tensors that stay on the device where a run has them stay there.
    """
    config, probes = graph.config, graph.probes[label]
    batch_size = config.engine.batch_size
    every = sum(map(len, graph.probes.values()))
    most = min(max(SMALLEST, OF_ALL // every), LARGEST, SAMPLED // (4 * sum(stored_width(probe) for probe in probes)))
    n = min(len(points), max(most, 5 * config.k))
    ids = np.random.default_rng(0).permutation(len(points))[:n]
    place = device if graph.whole else "cpu"
    rows = [torch.empty((n, stored_width(probe)), device=place) for probe in probes]
    reducers = _reducers(probes, str(device))
    reading = embedding = 0.0
    done = 0
    while done < n and (done < 5 * config.k or reading + embedding < SECONDS_OF_EMBEDDING / len(config.members)):
        part = slice(done, min(done + batch_size, n))
        started = time.perf_counter()
        inputs = points.read_on(ids[part], device)
        reading += time.perf_counter() - started
        started = time.perf_counter()
        batch, _ = embed_resident(model, probes, inputs, 0, label, reducers, config.precision)
        for values, of_batch in zip(rows, batch, strict=True):
            values[part] = of_batch
        embedding += time.perf_counter() - started
        done = part.stop
    found = [values[:done] if values.is_cuda else values[:done].numpy() for values in rows]
    return found, reading / done, embedding / done


def _search_rates(rows: Any, graph: Graph, shared: bool, device: torch.device) -> Search:
    """Two sizes tell how the search grows with its bank; the first search of each has things to load, or to compile."""
    n, few = len(rows), len(rows) // 4
    _search_once(rows, graph, shared, device)
    reset_peak()
    before = resident_bytes()[0]
    ready, ask = _search_once(rows, graph, shared, device)
    taken = max(0, resident_bytes()[1] - before)
    powers = 1.0, 1.0
    if few > 2 * graph.config.k:
        _search_once(rows[:few], graph, shared, device)
        less = _search_once(rows[:few], graph, shared, device)
        powers = _power(ready, less[0], n / few, 1.5), _power(ask, less[1], n / few, 1.0)
    memory = 4 * rows.shape[1] + min(taken / n, 4 * rows.shape[1])
    return Search(Law(n, ready, powers[0]), Law(n, ask, powers[1]), memory)


def _power(more: float, less: float, ratio: float, most: float) -> float:
    return min(max(math.log(more / less) / math.log(ratio), 0.0), most)


def _search_once(rows: Any, graph: Graph, shared: bool, device: torch.device) -> tuple[float, float]:
    """Seconds to make a bank ready, and for each query, among rows that are all in the bank.

    shared: for the neighbours that members share, of which there are more, and in order.
    """
    n = min(QUERIES, len(rows))
    k = min(graph.common.k if shared else graph.config.k, len(rows) - 1)
    labels = np.arange(len(rows)) % 10
    started = time.perf_counter()
    bank = bank_on(rows, device, graph.config.engine.search_memory)
    ready = time.perf_counter() - started
    started = time.perf_counter()
    found, _ = bank.search(rows[:n], k, np.arange(n))
    if shared:
        bank.by_distance(rows[:n], found)
    count_votes(labels[found])
    return ready, (time.perf_counter() - started) / n


def _seconds_of_a_byte(folder: Path) -> float:
    values = np.zeros((WRITTEN >> 10, 256), np.float32)
    started = time.perf_counter()
    with writing_rows(folder / "rows.npy", *values.shape) as write:
        write(values)
    return (time.perf_counter() - started) / values.nbytes


def _seconds_of_a_file(folder: Path) -> tuple[float, float]:
    """To write it whole, and to read it."""
    started = time.perf_counter()
    for number in range(FILES):
        write_json(folder / f"{number}.json", {"number": number})
    written = time.perf_counter()
    for number in range(FILES):
        read_json(folder / f"{number}.json")
    return (written - started) / FILES, (time.perf_counter() - written) / FILES


def _seconds_of_a_vote(folder: Path, n_probes: int) -> float:
    """To its table, from its columns."""
    n = min(ROWS, WRITTEN // (16 * n_probes))
    votes = Votes(*np.random.default_rng(0).integers(0, 30, (len(VOTE_FIELDS), n), np.int32))
    started = time.perf_counter()
    table = pa.table({"point_id": np.arange(n), **vote_columns([votes] * n_probes)})
    write_table(folder / "votes.parquet", votes_schema(n_probes), [table], {})
    return (time.perf_counter() - started) / (n * n_probes)


def _seconds_of_picking(graph: Graph) -> float:
    generator = np.random.default_rng(0)
    neighbours = generator.integers(0, graph.points, (QUERIES, graph.common.k))
    inside = generator.random(graph.points) < 0.9
    started = time.perf_counter()
    own_neighbours(neighbours, inside, graph.config.k)
    return (time.perf_counter() - started) / QUERIES


def resident_bytes() -> tuple[int, int]:
    """Of this process in memory: now, and at most since `reset_peak`. (0, 0) where the system does not tell."""
    path = Path("/proc/self/status")
    told = dict(line.split(":", 1) for line in path.read_text().splitlines()) if path.is_file() else {}
    now, peak = (int(told[key].split()[0]) << 10 if key in told else 0 for key in ("VmRSS", "VmHWM"))
    return now, peak


def reset_peak() -> None:
    path = Path("/proc/self/clear_refs")
    if path.is_file():
        path.write_text("5")
