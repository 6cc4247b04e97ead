"""A run in one screen of text."""

from typing import Any

import pyarrow as pa
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from leadline.errors import LeadlineError
from leadline.query import Run, quoted

BAR = 24  # characters of the longest bar of a histogram


def print_summary(run: Run, console: Console, settled_only: bool = False) -> None:
    """Probe accuracy by layer, histogram of depths, held-out accuracy at each depth, and the ten hardest points.

    Where votes are approximate, or of reduced embeddings, also how far they and the depths are from exact ones at full
    width; and what `auto` chose, and why.

    settled_only leaves out the points of a member whose softmax probe disagrees with its own prediction.
    """
    for architecture in _column(run.sql("SELECT DISTINCT architecture FROM members ORDER BY architecture")):
        console.print(_probe_table(run, architecture))
        _print_methods(run, architecture, console)
        console.print(_depth_table(run, architecture, settled_only))
        title = f"{architecture}: the hardest points (by mean depth, held out)"
        points = hardest(run, 10, architecture=architecture, settled_only=settled_only)
        console.print(as_table(points.drop_columns(["architecture", "label"]), title))


def hardest(
    run: Run, n: int, *, split: str = "held-out", label: str | None = None, architecture: str | None = None,
    settled_only: bool = False,
) -> pa.Table:  # fmt: skip
    """The n points of greatest mean depth over the members of an architecture.

    split: "held-out" or "training", the members that count for a point. label: a class by number or name.
    Depths of several architectures are made comparable by their number of probes. Ties: lower accuracy (the share of
    those members that predict the point's label), then lower id.
    Raises LeadlineError for an unknown split or label.
    """
    if split not in ("held-out", "training"):
        raise LeadlineError(f"--split: {split!r} is no split; allowed: held-out, training")
    if n < 1:
        raise LeadlineError(f"--n: {n}; give at least 1")
    conditions = [f"{'NOT' if split == 'held-out' else ''} d.in_training"]
    if settled_only:
        conditions.append("NOT d.unsettled")
    if architecture is not None:
        conditions.append(f"m.architecture = {quoted(architecture)}")
    if label is not None:
        conditions.append(f"d.label = {_label(run, label)}")
    return run.sql(f"""
        WITH deep AS (
            SELECT m.architecture, d.point_id, any_value(m.n_probes) AS n_probes, count(*) AS members,
                avg(d.depth) AS mean_depth, avg((d.prediction = d.label)::DOUBLE) AS accuracy
            FROM depths d JOIN members m ON d.member = m.member
            WHERE {" AND ".join(conditions)}
            GROUP BY m.architecture, d.point_id
        )
        SELECT architecture, point_id, p.key, p.label, p.label_name, p.part, members, mean_depth, accuracy
        FROM deep JOIN points p USING (point_id)
        ORDER BY mean_depth / n_probes DESC, accuracy, point_id, architecture
        LIMIT {n}
    """)


def as_table(table: pa.Table, title: str | None = None) -> Table:
    """An Arrow table for the terminal."""
    drawn = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    for field in table.schema:
        number = pa.types.is_integer(field.type) or pa.types.is_floating(field.type)
        drawn.add_column(field.name, justify="right" if number else "left", overflow="fold")
    for row in table.to_pylist():
        drawn.add_row(*(_shown(value) for value in row.values()))
    return drawn


def _probe_table(run: Run, architecture: str) -> Table:
    n_members = len(run.sql(f"SELECT member FROM members WHERE architecture = {quoted(architecture)}"))
    rows = run.sql(f"""
        SELECT probe, name, any_value(width) AS width, {_mean_of_all("train_accuracy")} AS training,
            {_mean_of_all("held_out_accuracy")} AS "held out"
        FROM probes WHERE architecture = {quoted(architecture)} GROUP BY probe, name ORDER BY probe
    """)
    network = run.sql(f"""
        SELECT avg(train_accuracy), avg(held_out_accuracy) FROM members WHERE architecture = {quoted(architecture)}
    """).to_pylist()[0]
    drawn = as_table(rows, f"{architecture}: probe accuracy by layer, mean of {n_members} members")
    drawn.add_section()
    drawn.add_row("", "the network itself", "", *(_shown(value) for value in network.values()))
    return drawn


def _print_methods(run: Run, architecture: str, console: Console) -> None:
    """Methods, reductions, choices and audits; nothing where all votes are exact as a matter of course."""
    of_it = f"FROM probes WHERE architecture = {quoted(architecture)}"
    as_usual = "method = 'exact' AND choice IS NULL AND reduction = 'none'"
    if _column(run.sql(f"SELECT bool_and({as_usual}) {of_it}")) == [True]:
        return
    rows = run.sql(f"""
        SELECT probe, name, any_value(reduction) AS reduction, string_agg(DISTINCT method, ' ') AS method,
            avg(recall) AS recall, min(recall_low) AS "low end", avg(vote_agreement) AS votes,
            min(vote_agreement_low) AS "low end "
        {of_it} GROUP BY probe, name ORDER BY probe
    """)
    console.print(
        as_table(rows, f"{architecture}: recall of neighbours and agreement of votes, 95 % intervals, all members")
    )
    for row in run.sql(f"SELECT DISTINCT probe, choice {of_it} AND choice IS NOT NULL ORDER BY probe").to_pylist():
        console.print(f"  probe {row['probe']}: {row['choice']}", markup=False, highlight=False, soft_wrap=True)
    audited = run.sql(f"""
        SELECT count(*) AS n, avg(depth_agreement) AS agreement, min(depth_agreement_low) AS low,
            avg(depth_error) AS error, max(depth_error_high) AS high, any_value(audit_sample) AS sample
        FROM members WHERE architecture = {quoted(architecture)} AND audit_sample IS NOT NULL
    """).to_pylist()[0]
    if audited["n"]:
        console.print(
            f"  depths of {audited['n']} members beside exact ones, on {audited['sample']} points of each: "
            f"{audited['agreement']:.4f} agree (low end {audited['low']:.4f}), "
            f"mean error {audited['error']:.4f} layers (high end {audited['high']:.4f})",
            highlight=False, soft_wrap=True,
        )  # fmt: skip


def _mean_of_all(column: str) -> str:
    """SQL: the mean over members; null where one of them has no value, since a mean of the others says nothing."""
    return f"CASE WHEN count({column}) = count(*) THEN avg({column}) END"


def _depth_table(run: Run, architecture: str, settled_only: bool) -> Table:
    rows = run.sql(f"""
        SELECT d.depth, count(*) FILTER (d.in_training) AS training, count(*) FILTER (NOT d.in_training) AS held_out,
            avg((d.prediction = d.label)::DOUBLE) FILTER (NOT d.in_training) AS accuracy
        FROM depths d JOIN members m ON d.member = m.member
        WHERE m.architecture = {quoted(architecture)} {"AND NOT d.unsettled" if settled_only else ""}
        GROUP BY d.depth ORDER BY d.depth
    """).to_pylist()
    drawn = Table(title=f"{architecture}: points at each depth, all members", title_justify="left", box=SIMPLE_HEAD)
    for name in ("depth", "training", "held out", "held-out accuracy"):
        drawn.add_column(name, justify="right")
    drawn.add_column("held out, share", no_wrap=True)
    total = max(sum(row["held_out"] for row in rows), 1)
    most = max((row["held_out"] for row in rows), default=0) or 1
    for row in rows:
        bar = "█" * round(BAR * row["held_out"] / most)
        share = f"{row['held_out'] / total:6.1%} {bar}"
        drawn.add_row(str(row["depth"]), f"{row['training']:,}", f"{row['held_out']:,}", _shown(row["accuracy"]), share)
    return drawn


def _label(run: Run, label: str) -> int:
    if label.isdigit():
        found = _column(run.sql(f"SELECT DISTINCT label FROM points WHERE label = {int(label)}"))
    else:
        found = _column(run.sql(f"SELECT DISTINCT label FROM points WHERE label_name = {quoted(label)}"))
    if not found:
        names = _column(run.sql("SELECT DISTINCT label_name, label FROM points ORDER BY label LIMIT 10"))
        raise LeadlineError(f"--label: no point has {label!r}; labels are numbers or names such as {', '.join(names)}")
    return int(found[0])


def _column(table: pa.Table) -> list[Any]:
    values: list[Any] = table.column(0).to_pylist()
    return values


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if isinstance(value, float) else str(value)
