"""All votes of a member in one unit, by a worker in whose device the embeddings stay: `engine.placement: device`."""

import time
from dataclasses import asdict
from typing import Any

import numpy as np

from leadline.cluster.work import OUTPUTS, VOTES, Member
from leadline.cluster.workbench import Workbench
from leadline.embedding.in_place import embed_in_place, probe_groups
from leadline.knn import NOTHING, Cost, Votes, count_votes
from leadline.knn.on_device import free_memory
from leadline.store.files import write_array, write_json
from leadline.store.schemas import OUTPUT_FIELDS, VOTE_FIELDS

EMBEDDED = 0.3  # of what is free on a GPU, or of the memory budget, for embeddings that are kept together


def whole(bench: Workbench, member: Member) -> int:
    """Embed all points and vote at every probe. Returns the number of votes.

    The points go through the network once for each group of probes that there is room for.
    """
    model, probes, reducers = bench.network(member)
    n, ids, on_gpu = len(bench.points), bench.training_ids(member), bench.device.type == "cuda"
    own, labels = bench.left_out(ids, np.arange(n)), bench.points.labels[ids]
    room = EMBEDDED * (free_memory(bench.device) if on_gpu else bench.config.engine.search_memory)
    for group in probe_groups(probes, n, room):
        batches = ((int(some[0]), inputs) for some, inputs in bench.batches(0, n))
        kept, outputs = embed_in_place(model, probes, reducers, group, batches, n, member.name)
        for probe in group:
            started, embedded = time.perf_counter(), kept.pop(0)
            rows: Any = embedded if on_gpu else embedded.numpy()
            search = bench.bank(rows[ids])
            nearest, cost = search.search(rows, bench.config.k, own)
            votes = count_votes(labels[nearest])
            _write(bench, member, probe, votes, cost, search.plan, time.perf_counter() - started)
            del embedded, rows, search  # two probes are never made ready together
    for shard, (first, stop) in enumerate(bench.shards):
        out = np.empty(stop - first, OUTPUTS)
        for field in OUTPUT_FIELDS:
            out[field] = outputs[field][first:stop]
        write_array(bench.directory.outputs(member.name, shard), out)
    return n * len(probes)


def _write(bench: Workbench, member: Member, probe: int, votes: Votes, cost: Cost, plan: str, seconds: float) -> None:
    """As the units of voting leave them, a block at a time; what they cost is with the first."""
    for block, (first, stop) in enumerate(bench.query_blocks):
        found = np.empty(stop - first, VOTES)
        found["point_id"] = np.arange(first, stop)
        for field in VOTE_FIELDS:
            found[field] = getattr(votes, field)[first:stop]
        write_array(bench.directory.votes_part(member.name, probe, block), found)
        spent = asdict(cost if block == 0 else NOTHING)
        about = {**spent, "plan": plan, "seconds": seconds if block == 0 else 0.0}
        write_json(bench.directory.votes_cost(member.name, probe, block), about)
