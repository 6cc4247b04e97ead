"""Members trained, or their weights taken as they are given, and points embedded by them."""

import time
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from dataclasses import asdict, fields

import numpy as np
import torch

from leadline.cluster.work import OUTPUTS, Member, blocks
from leadline.cluster.workbench import Workbench
from leadline.config import Learning, Training
from leadline.embedding import batch_logits, embed_batch, embed_input, fit_directions, forward_pass
from leadline.embedding.principal import save_directions
from leadline.embedding.reductions import choose_reductions, stored_width
from leadline.knn.arrays import Array
from leadline.learning_table import LearningTable
from leadline.members.probes import Probe, place_probes
from leadline.members.together import train_together
from leadline.members.train import checkpoint_steps, is_resident, resolve_precision, steps_per_epoch
from leadline.members.train import train as train_network
from leadline.members.weights import load_weights, save_weights, weights_fingerprint
from leadline.store.files import digest, replacing, write_array, write_json, writing_rows
from leadline.store.schemas import OUTPUT_FIELDS, WATCHED
from leadline.study.learning import LabelOutputs, label_outputs


def train(bench: Workbench, members: Sequence[Member]) -> int:
    """Train members of an entry, several of them at once, or load the given weights of one.

    Those that are not stored yet are, with their probes and what their reductions need. Returns the steps, of all
    members that are trained.
    """
    started = time.perf_counter()
    recipe = members[0].config.training
    models = [bench.build(member) for member in members]
    for member, model in zip(members, models, strict=True):
        if member.weights_source:
            load_weights(model, member.weights_source)
    splits = [bench.training_ids(member) for member in members]
    if recipe and recipe.learning:
        _train_watched(bench, members, models, splits, recipe, recipe.learning)
    elif recipe:
        _train(bench, members, models, splits, recipe)
    seconds = time.perf_counter() - started
    for member, model, ids in zip(members, models, splits, strict=True):
        if not bench.directory.record("train", member.name).exists():
            _store(bench, member, model, len(ids), seconds / len(members))
    return recipe.steps * len(members) if recipe else 0


def _train(
    bench: Workbench, members: Sequence[Member], models: Sequence[torch.nn.Module], splits: Sequence[Array],
    recipe: Training, at: Collection[int] = (), watch: Callable[[int], None] = lambda step: None,
) -> None:  # fmt: skip
    """One by `train`, several by `train_together`."""
    seeds, replay = [member.seed for member in members], recipe.cuda_graph
    if len(members) == 1:
        train_network(models[0], bench.points, splits[0], recipe, seeds[0], bench.device, at, watch, replay=replay)
    else:
        train_together(models, bench.points, splits, recipe, seeds, bench.device, at, watch, replay=replay)


def _store(bench: Workbench, member: Member, model: torch.nn.Module, n_train: int, seconds: float) -> None:
    """n_train: points of its split; seconds: of its training."""
    started = time.perf_counter()
    directory, recipe = bench.directory, member.config.training
    model.float().to(bench.device)
    example = bench.inputs(np.zeros(1, np.int64))
    with forward_pass(model, bench.device, bench.config.precision):  # what fails in it is told here
        placed = place_probes(model, member.config.placement, example)
    probes = choose_reductions(bench.config.reduction, placed)
    with replacing(directory.weights(member.name)) as beside:
        save_weights(model, beside)
    directions = _fit_directions(bench, member, model, probes)
    write_json(
        directory.record("train", member.name),
        {
            "weights_fingerprint": weights_fingerprint(model),
            "n_train": n_train,
            "steps": recipe.steps if recipe else None,
            "precision": resolve_precision(recipe.precision, bench.device) if recipe else None,
            "probes": [asdict(probe) for probe in probes],
            "directions": directions,
            "seconds": seconds + time.perf_counter() - started,
        },
    )


def _train_watched(
    bench: Workbench, members: Sequence[Member], models: Sequence[torch.nn.Module], splits: Sequence[Array],
    recipe: Training, learning: Learning,
) -> None:  # fmt: skip
    """Train, run all points through the networks at each checkpoint, and store what that says of their learning.

    They go in the batches that `embed` makes, so that the last predictions are those of the table of depths.
    """
    points = bench.points
    batches = [np.arange(*edges) for edges in blocks(len(points), bench.config.engine.batch_size)]
    keeps = is_resident(len(points), points.input_shape)
    kept = [bench.inputs(batch) for batch in batches] if keeps else []
    steps = [checkpoint_steps(recipe.steps, steps_per_epoch(len(ids), recipe.batch), learning) for ids in splits]
    tables = [
        LearningTable(points.labels, np.isin(np.arange(len(points)), ids), of_member)
        for ids, of_member in zip(splits, steps, strict=True)
    ]

    def watch(step: int) -> None:
        looked_at = [number for number, of_member in enumerate(steps) if step in of_member]
        said: dict[int, list[LabelOutputs]] = {number: [] for number in looked_at}
        for batch_number, batch in enumerate(batches):
            inputs = kept[batch_number] if keeps else bench.inputs(batch)
            for number in looked_at:
                logits = batch_logits(
                    models[number], inputs, int(batch[0]), members[number].name, bench.config.precision
                )
                said[number].append(label_outputs(logits, points.labels[batch]))
        measures = [field.name for field in fields(LabelOutputs)]
        for number, of_batches in said.items():
            told = {name: np.concatenate([getattr(of_batch, name) for of_batch in of_batches]) for name in measures}
            tables[number].add(step, **told)

    _train(bench, members, models, splits, recipe, frozenset().union(*steps), watch)
    for member, table in zip(members, tables, strict=True):
        table.write(bench.directory.member_table("learning", member.name), bench.stamps, WATCHED)


def _fit_directions(bench: Workbench, member: Member, model: torch.nn.Module, probes: Sequence[Probe]) -> str | None:
    """Store the directions of a member's probes that are reduced by pca. Returns the file's digest, None for none.

    All shards are reduced by what lies in the file, so a fit on another machine cannot be mixed in.
    """
    found = fit_directions(
        model, probes, bench.inputs, bench.training_ids(member), seed=member.seed,
        batch_size=bench.config.engine.batch_size, memory=bench.config.engine.search_memory, member=member.name,
        precision=bench.config.precision,
    )  # fmt: skip
    if not found:
        return None
    path = bench.directory.directions(member.name)
    with replacing(path) as beside:
        save_directions(found, beside)
    return digest(path)


def embed(bench: Workbench, members: Sequence[Member], shard: int) -> int:
    """Read a shard of points once and run every member on it. Returns the number of embedded points.

    The input, the same for all members of the run, is kept with the first of them that comes by.
    """
    directory = bench.directory
    networks = [bench.network(member) for member in members]
    first, stop = bench.shards[shard]
    outputs = [np.empty(stop - first, OUTPUTS) for _ in members]
    kept = directory.embedding("input", 0, shard)
    with ExitStack() as files:

        def rows_of(owner: str, probe: Probe) -> Callable[[Array], None]:
            """They take their names when all files of the unit are whole."""
            place = directory.embedding(owner, probe.index, shard)
            return files.enter_context(writing_rows(place, stop - first, stored_width(probe)))

        write_input = None if kept.exists() else rows_of("input", bench.input_probe)
        writes = [
            [rows_of(member.name, probe) for probe in probes[1:]]
            for member, (_, probes, _) in zip(members, networks, strict=True)
        ]
        for ids, inputs in bench.batches(first, stop):
            start = int(ids[0])
            rows = slice(start - first, start - first + len(ids))
            for member, network, write_each, out in zip(members, networks, writes, outputs, strict=True):
                model, probes, reducers = network
                batch = embed_batch(model, probes, inputs, start, member.name, reducers, bench.config.precision)
                for write, values in zip(write_each, batch.embeddings[1:], strict=True):
                    write(values)
                for field in OUTPUT_FIELDS:
                    out[field][rows] = getattr(batch.outputs, field)
            if write_input is not None:
                write_input(embed_input(bench.input_probe, inputs, start))
    for member, out in zip(members, outputs, strict=True):
        write_array(directory.outputs(member.name, shard), out)
    return (stop - first) * len(members)
