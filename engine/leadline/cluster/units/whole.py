"""All votes of a member in one unit, by a worker in whose device the embeddings stay: `engine.placement: device`."""

import time
from dataclasses import asdict
from typing import Any

import numpy as np

from leadline.cluster.units.searching import write_votes
from leadline.cluster.work import OUTPUTS, Member
from leadline.cluster.workbench import Workbench
from leadline.embedding.in_place import EMBEDDED, embed_in_place, probe_groups
from leadline.knn import NOTHING, Cost, count_votes
from leadline.knn.on_device import free_memory
from leadline.store.files import write_array, write_json
from leadline.store.schemas import OUTPUT_FIELDS


def whole(bench: Workbench, member: Member) -> int:
    """Embed all points and vote at every probe. Returns the number of votes.

    The points go through the network once for each group of probes that there is room for; their inputs may stay on
    the device, and not only for this member (see `Workbench.all_batches`).
    """
    model, probes, reducers = bench.network(member)
    n, ids, on_gpu = len(bench.points), bench.training_ids(member), bench.device.type == "cuda"
    own, labels = bench.left_out(ids, np.arange(n)), bench.points.labels[ids]
    room = EMBEDDED * (free_memory(bench.device) if on_gpu else bench.config.engine.search_memory)
    for group in probe_groups(probes, n, room):
        kept, outputs = embed_in_place(
            model, probes, reducers, group, bench.all_batches, n, member.name, bench.config.precision
        )
        for probe in group:
            started, embedded = time.perf_counter(), kept.pop(0)
            rows: Any = embedded if on_gpu else embedded.numpy()
            search = bench.bank(rows[ids])
            nearest, cost = search.search(rows, bench.config.k, own)
            for block, edges in enumerate(bench.query_blocks):
                asked = slice(*edges)
                votes = count_votes(labels[nearest[asked]])
                write_votes(bench, member, probe, block, np.arange(*edges), votes)
            _write_costs(bench, member, probe, cost, search.plan, time.perf_counter() - started)
            del embedded, rows, search  # two probes are never made ready together
    for shard, (first, stop) in enumerate(bench.shards):
        out = np.empty(stop - first, OUTPUTS)
        for field in OUTPUT_FIELDS:
            out[field] = outputs[field][first:stop]
        write_array(bench.directory.outputs(member.name, shard), out)
    return n * len(probes)


def _write_costs(bench: Workbench, member: Member, probe: int, cost: Cost, plan: str, seconds: float) -> None:
    """The records of units of voting: what all blocks cost together is with the first."""
    for block in range(len(bench.query_blocks)):
        spent = {**asdict(NOTHING if block else cost), "plan": plan, "seconds": 0.0 if block else seconds}
        write_json(bench.directory.votes_cost(member.name, probe, block), spent)
