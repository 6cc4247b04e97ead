"""The members of one architecture side by side, as the study reads them from a run's tables."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from leadline.config import MemberConfig, RunConfig, load_config
from leadline.html import html_table
from leadline.knn.arrays import Array
from leadline.query import Run, quoted
from leadline.store.tables import read_table
from leadline.study.rows import means

OUTPUTS = ("prediction", "confidence", "margin", "entropy", "depth")
LEARNING = (
    "iteration_learned", "forgetting_events", "el2n", "aum", "mean_label_probability", "std_label_probability",
)  # fmt: skip


@dataclass(frozen=True)
class Ensemble:
    """M members of one architecture and what they say of N points. Arrays are [M, N] where nothing else is said.

    members: their names; probes: names of the P probes. labels: int32 [N], as given to the members; clean_labels: the
    same as they were before corruption, None where there was none; in_test: bool [N], of part test. in_training bool;
    prediction int32; confidence, margin, entropy float32; depth int16. learning: measures by name, float64, empty where
    a member has none. entry: the members' configuration; its key checkpoint tells of which training they are a step.
    """

    run: Run = field(repr=False)
    architecture: str
    members: tuple[str, ...]
    probes: tuple[str, ...]
    class_names: tuple[str, ...]
    labels: Array
    clean_labels: Array | None
    in_test: Array
    in_training: Array
    prediction: Array
    confidence: Array
    margin: Array
    entropy: Array
    depth: Array
    learning: dict[str, Array]
    entry: MemberConfig

    def _repr_html_(self) -> str:
        """What a notebook shows: each member with its accuracies, by the labels given, and its mean depths."""
        columns: dict[str, Any] = {"member": self.members}
        for split in ("training", "held out"):
            where = self.of(split)
            columns[f"accuracy, {split}"] = means(self.prediction == self.labels, where, axis=1).tolist()
            columns[f"mean depth, {split}"] = means(self.depth, where, axis=1).tolist()
        return html_table(columns)

    @property
    def n_probes(self) -> int:
        return len(self.probes)

    @property
    def held_out(self) -> Array:
        return ~self.in_training

    @property
    def true_labels(self) -> Array:
        """int32 [N], the clean ones where there are such, else those given."""
        return np.asarray(self.labels if self.clean_labels is None else self.clean_labels)

    @property
    def corrupted(self) -> Array:
        """bool [N], points whose given label is not the clean one."""
        return np.asarray(self.labels != self.true_labels)

    @cached_property
    def consensus(self) -> Array:
        """int64 [N], the class that most members give the point held out, ties to the lower; -1 where none holds it."""
        counts = self.counts(self.held_out)
        return np.where(counts.any(axis=1), counts.argmax(axis=1), -1)

    @property
    def has_peers(self) -> Array:
        """bool [N], points that two members hold out at least, so that they can agree or not."""
        return np.asarray(self.held_out.sum(axis=0) >= 2)

    def counts(self, where: Array, times: Array | None = None) -> Array:
        """How many members predict each class, int64 [N, C]; where: bool [M, N]; times: int [M], members repeated."""
        counts = np.zeros((len(self.labels), len(self.class_names)), np.int64)
        every = np.arange(len(self.labels))
        for member, chosen in enumerate(where):
            counts[every[chosen], self.prediction[member, chosen]] += 1 if times is None else times[member]
        return counts

    def depths(self, split: str) -> Array:
        """float64, NaN where the point is not in this split of the member: "training" or "held out"."""
        return masked(self.depth, self.of(split))

    def of(self, split: str) -> Array:
        """bool, whether the point is in this split of the member."""
        return self.in_training if split == "training" else self.held_out

    def winners(self, member: str) -> Array:
        """int32 [N, P], the votes of one member at its probes, -1 where one was not computed."""
        votes = read_table(self.run.directory.member_table("votes", member))["winner"].combine_chunks()
        values = np.asarray(votes.values.fill_null(-1).to_numpy(zero_copy_only=False), np.int32)
        return values.reshape(-1, self.n_probes)


def masked(values: Array, where: Array) -> Array:
    """float64 with NaN where not `where`."""
    return np.where(where, np.asarray(values, np.float64), np.nan)


def read_ensembles(run: Run) -> list[Ensemble]:
    """The ensembles of a run in the order of its configuration, checkpoints of trainings last.

    Raises LeadlineError for a run that is not finished.
    """
    run.refuse_unfinished()
    config: RunConfig = load_config(run.manifest["configuration"])
    points = read_table(run.directory.table("points"))
    names = run.sql("SELECT DISTINCT label, label_name FROM points ORDER BY label").to_pylist()
    clean = points["clean_label"]
    widest = run.sql("SELECT max(width) AS n FROM probes WHERE name = 'softmax'")["n"][0].as_py()
    known = {row["label"]: row["label_name"] for row in names}
    about: dict[str, Any] = {
        "class_names": tuple(str(known.get(label, label)) for label in range(widest)),
        "labels": points["label"].to_numpy(),
        "clean_labels": None if clean.null_count else clean.to_numpy(),
        "in_test": np.asarray(points["part"].to_pylist()) == "test",
    }
    return [_ensemble(run, entry, about) for entry in config.members]


def _ensemble(run: Run, entry: MemberConfig, about: dict[str, Any]) -> Ensemble:
    name = quoted(entry.label)
    members = run.sql(f"SELECT member FROM members WHERE architecture = {name}")["member"].to_pylist()
    members.sort(key=lambda member: int(member.rpartition("-")[2]))
    probes = run.sql(f"SELECT DISTINCT probe, name FROM probes WHERE architecture = {name} ORDER BY probe")
    tables = [read_table(run.directory.member_table("depths", member)) for member in members]
    columns: dict[str, Any] = {
        column: np.stack([table[column].to_numpy() for table in tables]) for column in ("in_training", *OUTPUTS)
    }
    return Ensemble(
        run=run,
        architecture=entry.label,
        members=tuple(members),
        probes=tuple(probes["name"].to_pylist()),
        learning=_learning(run, members),
        entry=entry,
        **about,
        **columns,
    )


def _learning(run: Run, members: list[str]) -> dict[str, Array]:
    places = [run.directory.member_table("learning", member) for member in members]
    if not all(place.exists() for place in places):
        return {}
    tables = [read_table(place) for place in places]
    return {name: np.stack([np.asarray(table[name].to_numpy(), np.float64) for table in tables]) for name in LEARNING}
