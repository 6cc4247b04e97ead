"""The claims of the paper's abstract, each held against a study's tables: what was measured, and whether it holds here.

A claim holds where the whole interval of what was measured lies on the side that it says, fails where it lies on the
other, and is open where it holds 0, or where there is no interval. Where a difference is made of estimates of the same
members, its interval has the sum of their half-widths: wider than need be, since what they share is not known here.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import pyarrow as pa

from leadline.study.rows import Row

Told = Mapping[str, list[Row]]  # the rows of each table that have a value
FALLS, RISES = -1, 1
WITH_DEPTH = {
    "accuracy": FALLS, "consensus-consistency": FALLS, "confidence": FALLS, "entropy": RISES, "output margin": FALLS,
    "adversarial input margin": FALLS,
}  # fmt: skip


@dataclass(frozen=True)
class Measured:
    """What a claim is judged by: a value with its interval, of what, and the sign that the claim gives it."""

    what: str
    value: float
    low: float | None
    high: float | None
    sign: int
    architecture: str = ""

    @property
    def verdict(self) -> str:
        if self.low is None or self.high is None or self.low <= 0 <= self.high:
            return "open"
        return "holds" if (self.value > 0) == (self.sign > 0) else "does not hold"


def claims(tables: Mapping[str, pa.Table]) -> pa.Table | None:
    """A row for each measure of each claim that the tables have a value for; None where there is none.

    claim, architecture, measured: what of; value, low, high (of 95 %, see the module), verdict: "holds", "does not
    hold" or "open".
    """
    told = {
        name: [row for row in table.to_pylist() if row["value"] is not None]
        for name, table in tables.items()
        if "value" in table.column_names
    }
    rows = [
        {
            "claim": claim, "architecture": one.architecture, "measured": one.what, "value": one.value, "low": one.low,
            "high": one.high, "verdict": one.verdict,
        }
        for claim, measure in CLAIMS.items()
        for one in measure(told)
    ]  # fmt: skip
    return pa.Table.from_pylist(rows) if rows else None


def _with_depth(told: Told) -> Iterator[Measured]:
    for row in told.get("rank_correlations", []):
        if row["split"] == "held out" and (sign := WITH_DEPTH.get(row["measure"])):
            yield _measured(row, f"rank correlation of held-out depth with {row['measure']}", sign)


def _with_learning(told: Told) -> Iterator[Measured]:
    for row in told.get("rank_correlations", []):
        if row["measure"] == "iteration learned":
            yield _measured(row, f"rank correlation of depth, {row['split']}, with the iteration learned", RISES)


def _between(told: Told) -> Iterator[Measured]:
    for row in told.get("between_architectures", []):
        what = f"rank correlation of depth, {row['split']}, with that in {row['other']}"
        yield _measured(row, what, RISES)


def _kinds(told: Told) -> Iterator[Measured]:
    """Halfway through a network that is trained on the points, how much more often votes give their label to those that
    are ambiguous unless it is given, than to those that look like a different class. In part by construction: kinds are
    made of the depths of these votes."""
    rows = [row for row in told.get("kinds_by_layer", []) if row["split"] == "training"]
    one, other = "ambiguous unless the label is given", "looks like a different class"
    for architecture in _architectures(rows):
        own = [row for row in rows if row["architecture"] == architecture]
        middle = max(row["probe"] for row in own) // 2
        there = {row["kind"]: row for row in own if row["probe"] == middle}
        if {one, other} <= there.keys():
            what = f"votes for the given label at probe {middle}, in training: {one}, less {other}"
            yield _difference(what, RISES, architecture, [there[one]], [there[other]])


def _memorise(told: Told) -> Iterator[Measured]:
    """How much farther training is above held out at the softmax than at the input."""
    for architecture, of in _by_probe(told, group="label uncorrupted", against="given label").items():
        inside, held_out = of.get("training"), of.get("held out")
        if inside and held_out:
            what = "votes for the given label, training less held out: at the softmax, less at the input"
            yield _difference(what, RISES, architecture, [inside[-1], held_out[0]], [held_out[-1], inside[0]])


def _generalise(told: Told) -> Iterator[Measured]:
    """Corrupted points that a network was trained on: votes for the clean and the given label, at the first layer after
    the input and at the softmax."""
    given = _by_probe(told, group="label corrupted", against="given label")
    for architecture, of in _by_probe(told, group="label corrupted", against="clean label").items():
        clean, wrong = of.get("training"), given[architecture].get("training")
        if clean and wrong and len(clean) > 2:
            first, last = clean[1], clean[-1]
            what = "corrupted training points, votes for the clean label: first layer, less softmax"
            yield _difference(what, RISES, architecture, [first], [last])
            what = "corrupted training points, votes for the given label: softmax, less first layer"
            yield _difference(what, RISES, architecture, [wrong[-1]], [wrong[1]])


def _converge(told: Told) -> Iterator[Measured]:
    rows = told.get("step_of_convergence", [])
    for architecture in _architectures(rows):
        own = sorted((row for row in rows if row["architecture"] == architecture), key=lambda row: row["probe"])
        if len(own) > 2:  # the input never changes
            what = f"step of convergence: {own[-1]['name']}, less {own[1]['name']}"
            yield _difference(what, RISES, architecture, [own[-1]], [own[1]])


def _find(told: Told) -> Iterator[Measured]:
    rows = [row for row in told.get("corrupted_labels", []) if row["measure"] == "average precision"]
    for architecture in _architectures(rows):
        own = {row["score"]: row for row in rows if row["architecture"] == architecture}
        for score, row in own.items():
            if "depth" in score:
                for rival in (other for name, other in own.items() if "depth" not in name):
                    what = f"average precision of finding corrupted labels: {score}, less {rival['score']}"
                    yield _difference(what, RISES, architecture, [row], [rival])


def _better(told: Told) -> Iterator[Measured]:
    for table, how in (("early_read_out", "early read-out"), ("trained_again", "trained again")):
        for row in told.get(table, []):
            if row["what"].endswith(", gain"):
                of = row["what"].removesuffix(", gain")
                name = f" ({row['run']})" if "run" in row else ""
                yield _measured(row, f"accuracy gained by {how}{name}, {of}", RISES)
    for row in told.get("rejection", []):
        if row["ordered_by"].startswith("depth less"):
            what = f"area under the risk-coverage curve: {row['ordered_by']}"
            yield _measured(row, what, FALLS)


CLAIMS: dict[str, Callable[[Told], Iterator[Measured]]] = {
    "Deep points are uncertain, and often answered wrongly": _with_depth,
    "Easy data are learned first": _with_learning,
    "Depth is in part a property of the point: architectures agree": _between,
    "Kinds of difficult points are processed differently": _kinds,
    "Later layers memorise": _memorise,
    "Early layers generalise where later ones memorise wrong labels": _generalise,
    "Early layers converge first": _converge,
    "Depth finds corrupted labels better than other scores": _find,
    "Knowing depths makes predictions better": _better,
}


def _measured(row: Row, what: str, sign: int) -> Measured:
    return Measured(what, row["value"], row["low"], row["high"], sign, row["architecture"])


def _difference(what: str, sign: int, architecture: str, plus: list[Row], minus: list[Row]) -> Measured:
    """Of sums of estimates, and their interval by the sum of half-widths."""
    value = sum(row["value"] for row in plus) - sum(row["value"] for row in minus)
    ends = [(row["low"], row["high"]) for row in (*plus, *minus)]
    if any(low is None or high is None for low, high in ends):
        return Measured(what, value, None, None, sign, architecture)
    reach = sum(high - low for low, high in ends) / 2
    return Measured(what, value, value - reach, value + reach, sign, architecture)


def _by_probe(told: Told, group: str, against: str) -> dict[str, dict[str, list[Row]]]:
    """Probe accuracies in the order of the probes: architecture → split → rows."""
    found: dict[str, dict[str, list[Row]]] = {}
    for row in told.get("probe_accuracy", []):
        if (row["points"], row["against"]) == (group, against):
            found.setdefault(row["architecture"], {}).setdefault(row["split"], []).append(row)
    return found


def _architectures(rows: list[Row]) -> list[str]:
    return list(dict.fromkeys(row["architecture"] for row in rows))
