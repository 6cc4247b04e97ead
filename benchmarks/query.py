"""How long questions to a large run take, beside the same tables with their rows shuffled; and what the tables weigh.

python benchmarks/query.py --out DIRECTORY      a made-up run, written by the store's own writer, and asked

The run: images in classes, one class after another as a folder of images has them; two architectures. Each point has a
difficulty that all members share, and each member its own noise. What is written stays in DIRECTORY, and is asked again
by the same command. Each question is asked by `Run.sql`, which opens the files anew; the files are in the system's
memory, as far as they fit. Writes benchmarks/results/query-POINTSxMEMBERSxPROBES-PROCESSOR.json.
"""

import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import typer
from record import stamp, write_result

import leadline
from leadline.cluster.work import blocks
from leadline.config import load_config
from leadline.depth import combine, is_unsettled
from leadline.depth.ensemble import MemberDepths
from leadline.knn import Votes
from leadline.query import named_queries
from leadline.report.explorer.data import Explorer, Page, Selection
from leadline.store import RunDirectory
from leadline.store.files import write_json
from leadline.store.schemas import DEPTHS, ENSEMBLE, MEMBERS, POINTS, PROBES, vote_columns, votes_schema
from leadline.store.tables import ROWS, nullable, read_table, write_table

PACKAGES = ("leadline", "duckdb", "pyarrow", "numpy")
ARCHITECTURES = ("narrow", "wide")
K, HELD_OUT, WARM = 30, 0.1, 5  # neighbours; share of a member's points; how often each question is asked again
THREADS = os.cpu_count() or 1
QUESTIONS = {
    "hardest 100 overall": """
        SELECT architecture, point_id, label, mean_depth_held_out, held_out_accuracy FROM ensemble
        ORDER BY mean_depth_held_out DESC NULLS LAST, held_out_accuracy, point_id, architecture LIMIT 100
    """,
    "mean depth by class": """
        SELECT label, avg(mean_depth_held_out) AS depth FROM ensemble GROUP BY label ORDER BY label
    """,
    "one point's trail over all members": """
        SELECT member, in_training, prediction, depth, winner, winner_votes
        FROM depths JOIN votes USING (member, point_id) WHERE point_id = {point} ORDER BY member
    """,
    "mean depth by class, from every member's depths": """
        SELECT label, avg(depth) AS depth FROM depths WHERE NOT in_training GROUP BY label ORDER BY label
    """,
    "one class, by member": """
        SELECT member, avg(depth) AS depth FROM depths WHERE label = {label} GROUP BY member ORDER BY member
    """,
}


class MadeUp:
    """What the points and members of a made-up run are drawn from."""

    def __init__(self, n_points: int, n_members: int, n_probes: int, n_classes: int) -> None:
        self.n_points, self.n_probes, self.n_classes = n_points, n_probes, n_classes
        random = np.random.default_rng(0)
        self.labels = np.sort(random.integers(0, n_classes, n_points).astype(np.int32))
        self.difficulty = random.standard_normal(n_points, np.float32) + 0.4 * random.standard_normal(n_classes)[
            self.labels
        ].astype(np.float32)
        self.rival = (self.labels + random.integers(1, n_classes, n_points)).astype(np.int32) % n_classes
        self.members = [f"{ARCHITECTURES[i * len(ARCHITECTURES) // n_members]}-{i:03d}" for i in range(n_members)]

    def depths(self, number: int) -> Iterator[pa.Table]:
        """One member's table, block by block."""
        for block, (first, stop) in enumerate(blocks(self.n_points, ROWS)):
            random, rows, n = np.random.default_rng((number, block)), slice(first, stop), stop - first
            effort = self.difficulty[rows] + 0.6 * random.standard_normal(n, np.float32)
            depth = np.minimum(self.n_probes / (1 + np.exp(0.8 - 1.5 * effort)), self.n_probes).astype(np.int16)
            is_wrong = effort + 0.5 * random.standard_normal(n, np.float32) > 1.4
            certainty = 1 / (1 + np.exp(2 * effort - 4 + 0.4 * random.standard_normal(n, np.float32)))
            margin = certainty * (0.9 + 0.1 * random.random(n, np.float32)) * certainty
            yield pa.table(
                {
                    "point_id": np.arange(first, stop),
                    "label": self.labels[rows],
                    "in_training": random.random(n) >= HELD_OUT,
                    "prediction": np.where(is_wrong, self.rival[rows], self.labels[rows]),
                    "confidence": certainty.astype(np.float32),
                    "margin": margin.astype(np.float32),
                    "entropy": ((1 - certainty) * 4 * (1 + 0.1 * random.standard_normal(n))).astype(np.float32),
                    "depth": depth,
                    "unsettled": is_unsettled(depth, self.n_probes),
                }
            )

    def votes(self, number: int, depths: pa.Table, first: int) -> pa.Table:
        """Those that depths [n] of one member come from: its prediction from the probe at the depth on, not before."""
        random, n = np.random.default_rng((number, first, 1)), len(depths)
        drawn = np.frombuffer(random.bytes(3 * n * self.n_probes), np.uint8).reshape(3, n, self.n_probes)
        kind, share, rest = drawn
        probe, depth = np.arange(self.n_probes), depths["depth"].to_numpy()[:, None]
        said = np.broadcast_to(depths["prediction"].to_numpy()[:, None], kind.shape)
        agrees = (probe >= depth) | ((probe < depth - 1) & (kind < 80))
        winner = np.where(agrees, said, (said + 1 + kind.astype(np.int32) ** 2 % 97) % self.n_classes)
        # The later the probe, the more of the neighbours agree.
        most = (4 + (K - 4) * (np.arange(256) / 255) ** (1.5 / (1 + probe[:, None]))).astype(np.int32)
        winner_votes = most[probe, share]
        runner_up_votes = np.minimum((K - winner_votes) * rest.astype(np.int32) // 256, winner_votes)
        runner_up = np.where(runner_up_votes > 0, (winner + 1 + kind % 23) % self.n_classes, -1)
        columns = [column.astype(np.int32).T for column in (winner, winner_votes, runner_up, runner_up_votes)]
        per_probe = [Votes(*(column[p] for column in columns)) for p in probe]
        return pa.table({"point_id": depths["point_id"], **vote_columns(per_probe)})


def write_run(made: MadeUp, directory: RunDirectory) -> None:
    names = np.array([f"class {label}" for label in range(made.n_classes)], object)
    ids, labels = np.arange(made.n_points), made.labels
    points = {
        "point_id": ids,
        "key": pa.array([f"train/{label:04d}/{i:07d}.jpg" for i, label in enumerate(labels.tolist())]),
        "label": labels,
        "label_name": pa.array(names[labels], pa.string()),
        "part": pa.array(["train"] * made.n_points),
        "clean_label": pa.nulls(made.n_points, pa.int32()),
    }
    write_table(directory.table("points"), POINTS, [pa.table(points)], {})
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(lambda number: _write_member(made, directory, number), range(len(made.members))))
    rows = [_member_row(made, member) for member in made.members]
    write_table(directory.table("members"), MEMBERS, [_filled(rows, MEMBERS)], {})
    rows = [row for member in made.members for row in _probe_rows(made, member)]
    write_table(directory.table("probes"), PROBES, [_filled(rows, PROBES)], {})
    write_table(directory.table("ensemble"), ENSEMBLE, _ensemble(made, directory), {})
    write_json(directory.manifest_path, _manifest(directory.root.name))


def _manifest(name: str) -> dict[str, Any]:
    """What an explorer asks of it; there are no inputs."""
    points = {"source": "npy", "inputs": "none.npy", "labels": "none.npy"}
    members = [{"architecture": "mlp", "name": one, "training": {"steps": 1}} for one in ARCHITECTURES]
    config = load_config({"name": name, "points": points, "members": members, "k": K})
    stamps = {"fingerprint": "made up", "data": {"fingerprint": "made up"}, "versions": {}, "files": {}, "stages": {}}
    return {"name": name, "status": "complete", "configuration": config.record(), **stamps}


def _write_member(made: MadeUp, directory: RunDirectory, number: int) -> None:
    depths, votes = (directory.member_table(name, made.members[number]) for name in ("depths", "votes"))
    write_table(depths, DEPTHS, made.depths(number), {})
    drawn = zip(made.depths(number), blocks(made.n_points, ROWS), strict=True)
    tables = (made.votes(number, table, first) for table, (first, _) in drawn)
    write_table(votes, votes_schema(made.n_probes), tables, {})


def _member_row(made: MadeUp, member: str) -> dict[str, Any]:
    return {"member": member, "architecture": member.partition("-")[0], "n_probes": made.n_probes}


def _probe_rows(made: MadeUp, member: str) -> Iterator[dict[str, Any]]:
    for probe in range(made.n_probes):
        yield {**_member_row(made, member), "probe": probe, "name": f"layer {probe}", "method": "exact", "k": K}


def _filled(rows: list[dict[str, Any]], schema: pa.Schema) -> pa.Table:
    """With null where nothing was made up."""
    return pa.Table.from_pylist(rows, schema)


def _ensemble(made: MadeUp, directory: RunDirectory) -> Iterator[pa.Table]:
    wanted = [field.name for field in fields(MemberDepths) if field.name in DEPTHS.names]
    for architecture in ARCHITECTURES:
        own = [member for member in made.members if member.startswith(architecture)]
        for block, (first, stop) in enumerate(blocks(made.n_points, ROWS)):
            tables = (read_table(directory.member_table("depths", member), block) for member in own)
            members = (MemberDepths(**{name: table[name].to_numpy() for name in wanted}) for table in tables)
            columns = combine(members, made.labels[first:stop], made.n_classes)
            rows = {name: nullable(values) for name, values in columns.items()}
            yield pa.table(
                {
                    "architecture": pa.array([architecture] * (stop - first)),
                    "point_id": np.arange(first, stop),
                    "label": made.labels[first:stop],
                    **rows,
                }
            ).select(ENSEMBLE.names)


def shuffle_run(directory: RunDirectory, shuffled: RunDirectory) -> None:
    """The same tables, the rows of each file in an order that says nothing."""

    def shuffle(path: Path) -> None:
        table = pq.read_table(path, partitioning=None)
        order = np.random.default_rng(len(path.parts)).permutation(len(table))
        target = shuffled.root / path.relative_to(directory.root)
        write_table(target, table.schema, [table.take(order)], {})

    files = sorted(directory.root.rglob("*.parquet"))
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(shuffle, files))
    write_json(shuffled.manifest_path, _manifest("shuffled"))


def weight(directory: RunDirectory, n_rows: dict[str, int]) -> dict[str, Any]:
    """Bytes of each table, and of each of its rows."""
    found = {}
    for name, rows in n_rows.items():
        size = sum(path.stat().st_size for path in directory.files(name))
        found[name] = {"bytes": size, "rows": rows, "bytes_a_row": size / rows}
    return found


def ask(directory: RunDirectory, queries: Iterable[str]) -> tuple[list[pa.Table], dict[str, float]]:
    """The answers, and seconds: of the first, and of the others the median and the least."""
    answers: list[pa.Table] = []
    return answers, timed(lambda query: answers.append(leadline.open(directory.root).sql(query)), queries)


def timed(answer: Callable[[Any], Any], asked: Iterable[Any]) -> dict[str, float]:
    times = []
    for one in asked:
        started = time.perf_counter()
        answer(one)
        times.append(time.perf_counter() - started)
    return {"first": times[0], "warm": statistics.median(times[1:]), "least": min(times[1:])}


def explore(directory: RunDirectory) -> dict[str, dict[str, float]]:
    """Seconds of what the explorer's page asks its server for."""
    explorer = Explorer(leadline.open(directory.root))
    again = range(1 + WARM)
    whole = [Selection(architecture=ARCHITECTURES[0]) for _ in again]
    chosen = [Selection(architecture=ARCHITECTURES[0], label=label) for label in again]
    pages = [Page(architecture=ARCHITECTURES[0], held_out_from=3.0, held_out_to=9.0, offset=48 * i) for i in again]
    return {
        "plane": timed(explorer.plane, whole),
        "plane of a class": timed(explorer.plane, chosen),
        "page of a region": timed(explorer.points, pages),
        "one point": timed(lambda label: explorer.point(97 * label, ARCHITECTURES[0]), again),
    }


def made_once(directory: RunDirectory, write: Callable[[], None]) -> float | None:
    """Seconds that it took to write a run; None where it was there."""
    if directory.manifest_path.exists():
        return None
    started = time.perf_counter()
    write()
    return time.perf_counter() - started


def main(
    out: Annotated[Path, typer.Option(help="a folder for the runs")],
    points: Annotated[int, typer.Option(min=1000)] = 1_280_000,
    members: Annotated[int, typer.Option(min=2)] = 100,
    probes: Annotated[int, typer.Option(min=2)] = 17,
    classes: Annotated[int, typer.Option(min=2)] = 1000,
) -> None:
    size = f"{points}x{members}x{probes}"
    made = MadeUp(points, members, probes, classes)
    run, shuffled = (RunDirectory(out.absolute() / f"{size}{kind}") for kind in ("", "-shuffled"))
    written = made_once(run, lambda: write_run(made, run))
    made_once(shuffled, lambda: shuffle_run(run, shuffled))
    pairs = points * members
    rows = {"points": points, "ensemble": len(ARCHITECTURES) * points, "depths": pairs, "votes": pairs}
    weights, times = {}, {}
    for kind, directory in (("sorted", run), ("shuffled", shuffled)):
        weights[kind] = weight(directory, rows)
        for name, table in weights[kind].items():
            print(f"{kind:8}  {name:8}  {table['bytes'] / 1e6:10,.1f} MB  {table['bytes_a_row']:7.2f} bytes a row")
    random = np.random.default_rng(1)  # another point and class each time: who asks again asks for something else
    given = [{"point": random.integers(points), "label": random.integers(classes)} for _ in range(1 + WARM)]
    for question, query in QUESTIONS.items():
        answers, times[question] = {}, {}
        for kind, directory in (("sorted", run), ("shuffled", shuffled)):
            asked = [query.format(**some) for some in given]
            answers[kind], times[question][kind] = ask(directory, asked)
        print(f"{question:50}  {_shown(times[question]['sorted'])}  shuffled {_shown(times[question]['shuffled'])}")
        assert all(len(some) and close(some, other) for some, other in zip(*answers.values(), strict=True)), question
    named = {}
    for name, query in named_queries().items():
        if "learning" not in query:  # it has no such table
            _, named[name] = ask(run, [query] * (1 + WARM))
            print(f"--named {name:42}  {_shown(named[name])}")
    explored = explore(run)
    for name, seconds in explored.items():
        print(f"explorer: {name:40}  {_shown(seconds)}")
    write_result(
        f"query-{size}",
        {
            **stamp(PACKAGES, THREADS), "load_of_the_machine": os.getloadavg(), "classes": classes,
            "seconds_of_writing": written, "weights": weights, "seconds": times, "seconds_of_named_queries": named,
            "seconds_of_the_explorer": explored,
        },
    )  # fmt: skip


def close(a: pa.Table, b: pa.Table) -> bool:
    """Whether two answers are the same, but for the order in which means were summed up."""
    rows = zip(a.to_pylist(), b.to_pylist(), strict=True)
    pairs = [pair for row in rows for pair in zip(*(one.values() for one in row), strict=True)]
    return all(x == y or (isinstance(x, float) and abs(x - y) < 1e-9 * abs(x)) for x, y in pairs)


def _shown(times: dict[str, float]) -> str:
    return f"first {times['first']:7.3f} s, then {times['warm']:7.3f} s"


if __name__ == "__main__":
    typer.run(main)
