"""The command line: parse, call, print."""

import csv
import json
import os
import sys
from contextlib import suppress
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
import typer
from rich.console import Console
from typer.exceptions import TyperException

from leadline.errors import LeadlineError

app = typer.Typer(
    help="Prediction depth: how many layers a network needs before it has made up its mind.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

bench_app = typer.Typer(help="Measure methods beside one another, on embeddings of yours.", no_args_is_help=True)
app.add_typer(bench_app, name="bench")

RunPath = Annotated[str, typer.Argument(metavar="RUN", help="directory of a run, or s3://… or gs://…")]
SettledOnly = Annotated[bool, typer.Option("--settled-only", help="leave out points whose softmax probe disagrees")]


class Format(StrEnum):
    """Of a query's answer."""

    table = "table"
    csv = "csv"
    json = "json"
    parquet = "parquet"


@app.command("run")
def run_command(
    config: Annotated[str, typer.Argument(metavar="PRESET|FILE.yaml")],
    out: Annotated[
        str | None, typer.Option(help="directory of the run, or s3://… or gs://…; by default runs/<name>")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="change the configuration")
    ] = None,
    address: Annotated[str | None, typer.Option(help="of a Ray cluster; by default one is started here")] = None,
    train_only: Annotated[bool, typer.Option("--train-only", help="stop when all weights are stored")] = False,
) -> None:
    """Compute the depths of every point under every member; the same command resumes an interrupted run."""
    # A user's module:function lies in the folder where the command is given.
    sys.path.insert(0, str(Path.cwd()))
    import leadline
    from leadline.report import print_summary

    run = leadline.run(config, out, address=address, overrides=tuple(overrides or ()), train_only=train_only)
    console = _console()
    if train_only:
        console.print(f"members trained in {run.directory.root}", soft_wrap=True)
        return
    print_summary(run, console)
    console.print(f"tables in {run.directory.root}", soft_wrap=True)


@app.command()
def show(run: RunPath, settled_only: SettledOnly = False) -> None:
    """Summarise a run: probe accuracy by layer, depths, accuracy at each depth, hardest points."""
    import leadline
    from leadline.report import print_summary

    print_summary(leadline.open(run), _console(), settled_only)


@app.command()
def status(
    run: RunPath,
    watch: Annotated[bool, typer.Option("--watch", help="go on until the run's driver has ended")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="one object a line")] = False,
) -> None:
    """Tell how far a run is, who works on it, and what failed, from its own records: it needs no Ray."""
    from rich.live import Live

    from leadline.report.status import as_text, follow, status_of
    from leadline.store import RunDirectory
    from leadline.store.places import place_of

    directory = RunDirectory(place_of(run))
    told = follow(directory) if watch else iter([status_of(directory)])
    with suppress(KeyboardInterrupt):  # it only looked on
        if as_json:
            for one in told:
                print(json.dumps(one), flush=True)
            return
        with Live(console=_console(), auto_refresh=False) as live:
            for one in told:
                live.update(as_text(one), refresh=True)


@app.command()
def timeline(
    run: RunPath,
    out: Annotated[Path, typer.Option("-o", "--out", help="a picture, .svg or .png")],
) -> None:
    """Draw which worker did what when, with what failed."""
    from leadline.report.timeline import draw_timeline
    from leadline.store import RunDirectory
    from leadline.store.places import place_of

    draw_timeline(RunDirectory(place_of(run)), out)


@app.command()
def query(
    run: RunPath,
    sql: Annotated[
        str | None,
        typer.Argument(
            metavar="SQL",
            help="one SELECT; tables: points members probes ensemble depths votes learning",
        ),
    ] = None,
    named: Annotated[
        str | None, typer.Option(metavar="NAME", help="instead of SQL: a query that comes with Leadline, see --list")
    ] = None,
    list_named: Annotated[bool, typer.Option("--list", help="print the names of these, and what each answers")] = False,
    own: Annotated[
        list[str] | None, typer.Option("--with", metavar="NAME=FILE", help="a Parquet or CSV file of yours as a table")
    ] = None,
    output: Annotated[
        Format, typer.Option("--format", help="parquet goes to standard output too: redirect it")
    ] = Format.table,
) -> None:
    """Ask a run's tables in SQL (DuckDB); read-only."""
    import leadline
    from leadline.query import named_queries, named_query

    if sum((sql is not None, named is not None, list_named)) != 1:
        raise LeadlineError("query: give one of SQL, --named NAME and --list")
    if list_named:
        answers = {name: text.partition("\n")[0].removeprefix("-- ") for name, text in named_queries().items()}
        _write(pa.table({"name": list(answers), "answers": list(answers.values())}), output)
        return
    question = named_query(named) if named is not None else str(sql)
    _write(leadline.open(run).sql(question, _own_tables(own or [])), output)


def _own_tables(given: list[str]) -> dict[str, str]:
    """The user's files by name, from NAME=FILE."""
    tables: dict[str, str] = {}
    for text in given:
        name, equals, path = text.partition("=")
        if not equals:
            raise LeadlineError(f"--with {text}: give NAME=FILE, as --with mine=labels.csv")
        if name in tables:
            raise LeadlineError(f"--with {text}: {name} is given twice")
        tables[name] = path
    return tables


@app.command()
def compare(
    run_a: Annotated[str, typer.Argument(metavar="RUN_A", help="directory of a run, or s3://… or gs://…")],
    run_b: Annotated[str, typer.Argument(metavar="RUN_B", help="another over the same points")],
    n: Annotated[int, typer.Option("--n", help="so many points that moved, of each architecture and split")] = 10,
    output: Annotated[Literal["table", "json"], typer.Option("--format")] = "table",
) -> None:
    """Hold two runs over the same points against one another: rank correlation, agreement, which points moved."""
    import leadline
    from leadline.compare import compare as compare_runs
    from leadline.report.summary import as_table

    compared = compare_runs(leadline.open(run_a), leadline.open(run_b), n)
    if output == "json":
        print(json.dumps({"a": run_a, "b": run_b, **compared.record()}, indent=1))
        return
    console = _console()
    console.print(f"a: {run_a}\nb: {run_b}\n{compared.points:,} points, by {compared.matched_by}", soft_wrap=True)
    console.print(as_table(compared.depths, "relative depths: rank correlation over points, means"))
    console.print(as_table(compared.consensus, "consensus classes, held out"))
    console.print(as_table(compared.moved, "the points that moved most, in relative depth"))


@app.command("import")
def import_command(
    run: RunPath,
    member: Annotated[str, typer.Argument(metavar="MEMBER", help="of the run, as in members.parquet")],
    log: Annotated[Path, typer.Argument(metavar="LOG.parquet", help="step, point_id or key, prediction or logits")],
) -> None:
    """Tell a finished run how a member that was trained elsewhere learned the points; again replaces it."""
    from leadline.learning_import import import_learning
    from leadline.store import RunDirectory
    from leadline.store.places import place_of

    steps = import_learning(RunDirectory(place_of(run)), member, log)
    print(f"{run}: learning of {member}, {steps:,} steps")


@app.command()
def hardest(
    run: RunPath,
    label: Annotated[str | None, typer.Option(help="a class, by number or name")] = None,
    n: Annotated[int, typer.Option("--n", help="how many")] = 20,
    split: Annotated[str, typer.Option(help="held-out or training")] = "held-out",
    settled_only: SettledOnly = False,
) -> None:
    """List the points of greatest mean depth."""
    import leadline
    from leadline import report

    _write(report.hardest(leadline.open(run), n, split=split, label=label, settled_only=settled_only), Format.table)


@app.command()
def verify(run: RunPath) -> None:
    """Hold a run's files against its manifest, its depths against its votes. Exit code 1 where one is wrong."""
    from leadline.store import RunDirectory
    from leadline.store.places import place_of
    from leadline.store.verify import verify as find_faults

    faults = find_faults(RunDirectory(place_of(run)))
    for fault in faults:
        print(fault)
    if faults:
        raise typer.Exit(1)
    print(f"{run}: sound")


@app.command()
def report(
    run: RunPath,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="by default <name of the run>.html")] = None,
) -> None:
    """Write one page that explains a run: charts, kinds of points with images, the hardest ones; it needs no net."""
    sys.path.insert(0, str(Path.cwd()))
    import leadline
    from leadline.report.page import write_report

    opened = leadline.open(run)
    place = out or Path(f"{opened.manifest['name']}.html")
    write_report(opened, place)
    print(place)


@app.command()
def study(
    run: RunPath,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="folder; by default study/<name of the run>")] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(
            help="relations, kinds, layers, convergence, corruption, members, neighbours or accuracy; by default all"
        ),
    ] = None,
    again: Annotated[
        list[str] | None, typer.Option(metavar="RUN", help="trained again without the points that depth marks")
    ] = None,
) -> None:
    """Hold the paper's claims against a run: tables, figures and a page, with intervals over members."""
    sys.path.insert(0, str(Path.cwd()))
    import leadline
    from leadline.report.study import write_study

    opened = leadline.open(run)
    folder = out or Path("study") / str(opened.manifest["name"])
    others = [leadline.open(other) for other in again or []]
    print(write_study(opened, folder, only or (), others, _tell))


@app.command()
def export(
    run: RunPath,
    to: Annotated[str, typer.Option(help="csv, npz, parquet, cleanlab or fiftyone")],
    out: Annotated[
        Path | None, typer.Option("-o", "--out", metavar="FILE", help="by default <name of the run>-scores.<ending>")
    ] = None,
    architecture: Annotated[str | None, typer.Option(metavar="NAME", help="by default all of them")] = None,
) -> None:
    """Write every score of every point into a file, with ids, keys, labels and fingerprints."""
    import leadline
    from leadline.study.export import export_scores

    print(export_scores(leadline.open(run), to, out, architecture))


@app.command()
def explore(
    run: RunPath,
    host: Annotated[str, typer.Option(help="address to serve; others than this machine's own ask for a token")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="by default any that is free")] = 0,
    token: Annotated[
        str | None, typer.Option(help="what browsers must bring; by default a new one where --host needs it")
    ] = None,
) -> None:
    """Look at a finished run's points in a browser: plane of depths, images, votes, neighbours, SQL, downloads."""
    import leadline
    from leadline.report.explorer.server import serve

    serve(leadline.open(run), host, port, token, partial(print, flush=True))


@bench_app.command("knn")
def bench_knn(
    source: Annotated[
        Path,
        typer.Argument(metavar="RUN|EMBEDDINGS", help="directory of a run, or folder of .npy files"),
    ],
    member: Annotated[str | None, typer.Option(help="of the run; by default the first")] = None,
    methods: Annotated[
        list[str] | None,
        typer.Option(help="as hnsw:m=16,ef=128; several with spaces between them, or the option again"),
    ] = None,
    queries: Annotated[int | None, typer.Option(min=1, help="so many random points; by default all")] = None,
    k: Annotated[int | None, typer.Option("-k", min=1, help="neighbours; by default the run's, or 30")] = None,
    device: Annotated[str | None, typer.Option(help="of exact search; by default a GPU where there is one")] = None,
    threads: Annotated[int, typer.Option(min=1)] = os.cpu_count() or 1,
    out: Annotated[Path | None, typer.Option(help="folder for table, JSON and plot; by default bench/<name>")] = None,
    address: Annotated[str | None, typer.Option(help="of a Ray cluster: layers are measured there in parallel")] = None,
) -> None:
    """Compare approximate neighbours with exact ones: time, memory, recall, votes and depths."""
    sys.path.insert(0, str(Path.cwd()))
    from leadline import bench
    from leadline.report.bench import knn_tables, write_knn

    given = [text for several in methods or [] for text in several.split()]
    console, folder = _console(), out or Path("bench") / source.resolve().name
    if address:
        from leadline.cluster.bench import bench_knn_on_ray

        result = bench_knn_on_ray(source, member, given, queries, k, device, threads, address, _tell)
    else:
        comparison = bench.prepare(source, member, given, queries, k, device, threads)
        result = bench.bench_knn(comparison, _tell)
    write_knn(result, folder)
    for table in knn_tables(result):
        console.print(table)
    console.print(f"knn.json, knn.txt, knn.png, knn.svg in {folder}", soft_wrap=True)


@app.command()
def doctor() -> None:
    """Tell what this machine offers and what is used of it, and check votes; exit code 2 where something is broken."""
    from leadline.doctor import as_table, examine

    console, broken = _console(), list[str]()
    for title, findings in examine():
        console.print(as_table(title, findings))
        broken += [f"{finding.what}: {finding.says}" for finding in findings if finding.is_broken]
    if broken:
        raise LeadlineError("; ".join(broken))


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@app.command()
def probes(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="mlp, resnet18, vgg16, a torchvision classifier, or module:function")
    ],
    shape: Annotated[str, typer.Option("--input", help="shape of a point's input, as 3x32x32")] = "3x224x224",
    classes: Annotated[int, typer.Option(min=2)] = 10,
    parameters: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="a parameter of the architecture")
    ] = None,
    at: Annotated[
        list[str] | None, typer.Option("--probe", help="paper, auto, or a module's name, with wildcards")
    ] = None,
) -> None:
    """Print the probes that would be read in a model, with their widths."""
    sys.path.insert(0, str(Path.cwd()))
    import torch

    from leadline.config import apply_override
    from leadline.members.architectures import build
    from leadline.members.probes import place_probes
    from leadline.report.summary import as_table

    input_shape = _sizes(shape)
    given: dict[str, Any] = {}
    for parameter in parameters or []:
        apply_override(given, parameter)
    network = build(model, given, input_shape, classes, seed=0)
    named = at[0] if at in (["paper"], ["auto"]) else at
    placed = place_probes(network, named, torch.zeros(1, *input_shape))
    table = pa.table(
        {"probe": [p.index for p in placed], "name": [p.name for p in placed], "width": [p.width for p in placed]}
    )
    _console().print(as_table(table, f"{model}: {len(placed)} probes"))


@app.command("plan")
def plan_command(
    config: Annotated[str, typer.Argument(metavar="PRESET|FILE.yaml")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="change the configuration")
    ] = None,
    address: Annotated[str | None, typer.Option(help="of a Ray cluster; by default this machine")] = None,
    nodes: Annotated[
        int | None, typer.Option(min=1, help="describe a cluster of so many nodes; nothing is started")
    ] = None,
    gpu: Annotated[str | None, typer.Option(help="of the described nodes: h100 or h200")] = None,
    gpus: Annotated[int | None, typer.Option("--gpus-per-node", min=1, help="by default 8 of those")] = None,
    cpus: Annotated[int | None, typer.Option("--cpus-per-node", min=1)] = None,
    memory: Annotated[float | None, typer.Option("--memory-per-node", min=1, help="GB")] = None,
    scratch: Annotated[
        float | None, typer.Option(min=1, help="GB on the disks of a described node, or in the folder that all share")
    ] = None,
    price: Annotated[float | None, typer.Option(min=0, help="of a node for an hour, in any currency")] = None,
    points: Annotated[
        str | None, typer.Option(metavar="TRAIN[+TEST]", help="describe points that are not at hand: how many")
    ] = None,
    classes: Annotated[int, typer.Option(min=2, help="of described points")] = 10,
    shape: Annotated[str | None, typer.Option("--input", help="theirs, as 3x32x32; by default as cropped")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="all of it as JSON")] = False,
) -> None:
    """Say what a run will take before it runs: units, bytes, memory, time and cost; exit code 2 where it cannot be."""
    sys.path.insert(0, str(Path.cwd()))
    from leadline.cluster import described
    from leadline.cluster.graph import graph_of
    from leadline.config import load_config
    from leadline.report import print_plan

    run = described.without_downloads(load_config(config, tuple(overrides or ())))
    at = described.points_of(run.points, points, classes, _sizes(shape) if shape else None)
    graph = graph_of(run, at)
    if nodes:
        cluster = described.describe_cluster(
            run.engine, nodes=nodes, cpus=cpus, gpus=gpus, gpu=gpu, memory=memory and memory * 1e9,
            scratch=scratch and scratch * 1e9, price=price,
        )  # fmt: skip
        plan = described.plan_described(graph, at, cluster, gpu)
    else:
        from leadline.cluster.at_hand import plan_at_hand

        plan = plan_at_hand(graph, at, address, price)
    if as_json:
        print(json.dumps(plan.record(), indent=1))
    else:
        print_plan(plan.record(), _console())
    if plan.refused:
        raise LeadlineError("; ".join(plan.refused))


def _sizes(text: str) -> tuple[int, ...]:
    sizes = text.split("x")
    if not all(size.isdigit() and int(size) > 0 for size in sizes):
        raise LeadlineError(f"--input: {text!r} is no shape; write sizes with x between them, as 3x32x32")
    return tuple(int(size) for size in sizes)


def _console() -> Console:
    """Standard output; wide where it is no terminal, whose width nobody knows."""
    return Console(width=None if sys.stdout.isatty() else 160)


def _write(table: pa.Table, output: Format) -> None:
    match output:
        case Format.table:
            from leadline.report.summary import as_table

            _console().print(as_table(table))
        case Format.csv:
            writer = csv.writer(sys.stdout, lineterminator="\n")
            writer.writerow(table.column_names)
            for row in _rows(table):
                writer.writerow(
                    json.dumps(value) if isinstance(value, (list, dict)) else value for value in row.values()
                )
        case Format.json:
            # One object a line, in one array: whole JSON, and easy to cut.
            print("[" + ",\n ".join(json.dumps(row, default=str) for row in _rows(table)) + "]")
        case Format.parquet:
            if sys.stdout.isatty():
                raise LeadlineError(
                    "--format parquet: standard output is a terminal; redirect it, as in > answer.parquet"
                )
            sink = pa.BufferOutputStream()
            pq.write_table(table, sink)
            sys.stdout.buffer.write(sink.getvalue())


def _rows(table: pa.Table) -> Any:
    for batch in table.to_batches():
        yield from batch.to_pylist()


def main() -> None:
    """Run the command line; what is the user's to mend is one line on standard error and exit code 2."""
    try:
        code = app(standalone_mode=False)
    except LeadlineError as error:
        print(f"leadline: {error}", file=sys.stderr)
        code = 2
    except TyperException as error:
        print(f"leadline: {' '.join(error.format_message().split())}; see leadline --help", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("leadline: interrupted; the same command resumes", file=sys.stderr)
        code = 130
    sys.exit(code if isinstance(code, int) else 0)
