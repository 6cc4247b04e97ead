"""Whole runs with approximate votes, beside the exact run of the same weights.

python benchmarks/approximate_runs.py methods CONFIG --out DIRECTORY   what audits say, and what is the case
python benchmarks/approximate_runs.py auto CONFIG --out DIRECTORY      `method: auto`: depths kept, time saved or lost
python benchmarks/approximate_runs.py builds CONFIG --out DIRECTORY    indexes built by one actor and by two

One member of CONFIG is trained by the exact run, on the whole training part; the others are given its weights. Runs lie
in DIRECTORY; finished ones are not made again. Writes benchmarks/results/approximate_runs-COMMAND-NAME-PROCESSOR.json.
"""

from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from record import stamp, write_result
from rich.console import Console
from rich.table import Table

import leadline
from leadline.knn.arrays import Array
from leadline.knn.audit import draw, interval
from leadline.store.log import ended_units, sessions

PACKAGES = ("leadline", "torch", "numba", "numpy", "pyarrow", "ray", "faiss-cpu", "hnswlib")
METHODS = ["ivf-flat", "ivf-flat:nprobe=4", "ivf-pq", "hnsw", "hnsw-sq8", "hnswlib", "flat"]
ONE_MEMBER = ("members.0.count=1", "members.0.split={kind: part}")
SEEDS = 400
ALL = 1 << 31  # points of an audit that leaves none out

app = typer.Typer(
    help="Runs with approximate votes beside exact ones.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
Config = Annotated[str, typer.Argument(metavar="PRESET|FILE.yaml")]
Out = Annotated[Path, typer.Option(help="folder for the runs")]


def runs_of(config: str, out: Path) -> tuple[leadline.Run, Any]:
    """The exact run, and how to make others of the same weights: name and overrides to a run."""
    exact = leadline.run(config, out / "exact", overrides=ONE_MEMBER)
    weights = next((exact.directory.root / "weights").iterdir())
    given = (*ONE_MEMBER, "members.0.training=null", f"members.0.weights={weights}")

    def run(name: str, *overrides: str) -> leadline.Run:
        return leadline.run(config, out / name, overrides=(*given, *overrides))

    return exact, run


def winners(run: leadline.Run) -> Array:
    """[N, P]."""
    lists = run.sql("SELECT winner FROM votes ORDER BY point_id")["winner"].combine_chunks()
    return np.asarray(lists.flatten()).reshape(len(lists), -1)


def depths(run: leadline.Run) -> Array:
    return np.asarray(run.sql("SELECT depth FROM depths ORDER BY point_id")["depth"]).astype(int)


def seconds(run: leadline.Run) -> dict[str, float]:
    """By stage, and of all that searching takes together."""
    stages = {name: report["seconds"] for name, report in run.manifest["stages"].items()}
    searching = ("trial", "index", "share", "vote", "audit")
    return {**stages, "searching": sum(stages.get(name, 0.0) for name in searching)}


def compared(exact: leadline.Run, other: leadline.Run) -> dict[str, Any]:
    """All points of two runs: agreement of votes by probe, and agreement and mean absolute error of depth."""
    error = np.abs(depths(other) - depths(exact))
    return {
        "vote_agreement": (winners(exact) == winners(other)).mean(axis=0).tolist(),
        "depth_agreement": float((error == 0).mean()),
        "depth_error": float(error.mean()),
    }


def coverage(exact: leadline.Run, other: leadline.Run, sample: int) -> float:
    """Share of SEEDS samples of so many points whose interval of depth agreement holds that of all points."""
    same = depths(exact) == depths(other)
    samples = (draw(len(same), sample, seed)[0] for seed in range(SEEDS))
    intervals = [interval(same[ids]) for ids in samples]
    return float(np.mean([found.low <= same.mean() <= found.high for found in intervals]))


@app.command()
def methods(
    config: Config, out: Out, method: Annotated[list[str], typer.Option("--method")] = METHODS
) -> None:  # fmt: skip
    """Each method at every probe: its stored audit of a sample beside the comparison of all points."""
    exact, run = runs_of(config, out)
    rows, inside, covered = [], [], {}
    for name in method:
        folder = name.replace(":", "-").replace(",", "-")
        sampled = run(folder, f"method={name}")
        whole = run(f"{folder}-whole", f"method={name}", f"audit.sample={ALL}")
        full = compared(exact, sampled)
        member = sampled.members.to_table().to_pylist()[0]
        measures = [
            ("depth agreement", "", member, "depth_agreement", full["depth_agreement"]),
            ("depth error", "", member, "depth_error", full["depth_error"]),
        ]
        covered[name] = coverage(exact, sampled, member["audit_sample"])
        of_all = whole.probes.to_table().to_pylist()
        for probe, everything in zip(sampled.probes.to_table().to_pylist(), of_all, strict=True):
            truth = full["vote_agreement"][probe["probe"]]
            assert everything["vote_agreement"] in (None, truth)  # the audit of all points is the full comparison
            measures.append(("vote agreement", probe["name"], probe, "vote_agreement", truth))
            measures.append(("recall", probe["name"], probe, "recall", everything["recall"]))
        for what, place, record, column, truth in measures:
            low, high = record[f"{column}_low"], record[f"{column}_high"]
            inside.append(low <= truth <= high)
            rows.append(
                {
                    "method": name, "measure": what, "probe": place, "sample": record["audit_sample"],
                    "audited": record[column], "low": low, "high": high, "all_points": truth, "inside": inside[-1],
                }
            )  # fmt: skip
    settings = exact.manifest["name"]
    table = Table("method", "measure", "probe", "audited", "low", "high", "all points", "", title=settings)
    for row in rows:
        numbers = (f"{row[key]:.4f}" for key in ("audited", "low", "high", "all_points"))
        table.add_row(row["method"], row["measure"], row["probe"], *numbers, "" if row["inside"] else "outside")
    Console(width=140).print(table)
    print(f"{sum(inside)} of {len(inside)} figures of all points lie in the interval of 95 % that was stored")
    print(f"of {SEEDS} samples' intervals, so many hold the depth agreement of all points:", covered)
    write_result(
        f"approximate_runs-methods-{settings}",
        {
            **stamp(PACKAGES, 1),
            "inside": sum(inside),
            "of": len(inside),
            "seeds": SEEDS,
            "covered": covered,
            "rows": rows,
        },
    )


@app.command()
def auto(config: Config, out: Out, target: Annotated[float, typer.Option(help="depth agreement")] = 0.99) -> None:
    """What `auto` chooses for a target; the comparison of all points; seconds beside those of all exact."""
    exact, run = runs_of(config, out)
    chosen = run("auto", "method=auto", f"audit.depth_agreement={target}")
    again = run("exact-again", "method=exact")  # with given weights too
    full, times = compared(exact, chosen), {"exact": seconds(again), "auto": seconds(chosen)}
    probes = chosen.sql("SELECT probe, name, method, choice FROM probes ORDER BY probe").to_pylist()
    for probe in probes:
        print(f"{probe['probe']} {probe['name']}: {probe['method']} ({probe['choice']})")
    print(f"depth agreement of all points {full['depth_agreement']:.5f}, asked for {target}")
    for name, spent in times.items():
        print(f"{name}: searching {spent['searching']:.1f} s; {spent}")
    write_result(
        f"approximate_runs-auto-{exact.manifest['name']}",
        {**stamp(PACKAGES, 1), "target": target, "probes": probes, "all_points": full, "seconds": times},
    )


@app.command()
def builds(
    config: Config, out: Out, method: Annotated[str, typer.Option()] = "hnsw",
    workers: Annotated[list[int], typer.Option("--workers", min=1)] = [1, 2],  # noqa: B006
) -> None:  # fmt: skip
    """One method at every probe, its indexes built by so many actors: seconds; equal tables.

    Building and searching go on at the same time: the seconds of both are told beside those with an actor at a build.
    """
    _, run = runs_of(config, out)
    made = {n: run(f"builds-{n}", f"method={method}", f"engine.workers={n}") for n in workers}
    first = made[workers[0]]
    equal = all(
        np.array_equal(winners(first), winners(other)) and np.array_equal(depths(first), depths(other))
        for other in made.values()
    )
    spent = {n: build_seconds(of_n) for n, of_n in made.items()}
    for n, found in spent.items():
        print(f"{n} actors, {len(first.probes.to_table())} indexes: {found}")
    print("votes and depths:", "equal" if equal else "DIFFERENT")
    write_result(
        f"approximate_runs-builds-{first.manifest['name']}",
        {**stamp(PACKAGES, 1), "method": method, "actors": spent, "tables_equal": equal},
    )


def build_seconds(run: leadline.Run) -> dict[str, float]:
    """Of a run that was made in one session.

    all_builds: with an actor at a build; actors_building: how many were, in the mean; builds_and_votes: from the
    beginning of the first build to the end of the last vote.
    """
    (session,) = sessions(run.directory)
    units = list(ended_units(run.directory, session["session"]))
    builds = sorted((unit["began"], unit["ended"]) for unit in units if unit["stage"] == "index")
    covered, until = 0.0, -np.inf
    for began, ended in builds:
        covered += max(0.0, ended - max(began, until))
        until = max(until, ended)
    last = max(unit["ended"] for unit in units if unit["stage"] == "vote")
    return {
        "all_builds": covered,
        "actors_building": sum(ended - began for began, ended in builds) / covered,
        "builds_and_votes": last - builds[0][0],
    }


if __name__ == "__main__":
    app()
