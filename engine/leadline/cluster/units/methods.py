"""Methods that are not exact: tried, chosen, built and kept; and the audit, which tells what they have changed."""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from leadline.cluster.work import Member, blocks, has_choice, is_tried
from leadline.cluster.workbench import Workbench, places
from leadline.knn import count_votes
from leadline.knn.arrays import Array
from leadline.knn.audit import interval, recall_at_k
from leadline.knn.choice import Choice, Option, Trial, candidates, choose
from leadline.store.files import digest, filling, read_array, read_json, write_array, write_json, writing_rows

SHARED = "exact: the members of the run share the search of the input"


def trial(bench: Workbench, member: Member, probe: int) -> int:
    """Measure the methods that a probe may have, beside exact search, on a sample. Returns the sample's points.

    What they change is told against exact votes at full width, and so is what the probe's reduction changes alone.
    Stored for the architecture: which method pays is the same for all its members, or nearly so.
    """
    about, bank_ids = bench.probes(member)[probe], bench.training_ids(member)
    rows, queries = (bench.rows(member.name, probe, ids) for ids in (bank_ids, bench.tried))
    own = bench.left_out(bank_ids, bench.tried)
    said = bench.outputs(member)[bench.tried]["prediction"]

    def agrees(neighbours: Array) -> Array:
        return np.asarray(count_votes(bench.points.labels[neighbours]).winner == said)

    def measured(method: str) -> tuple[float, Array]:
        """Seconds to make ready and to search for all points, and where the sample's votes are the prediction."""
        started = time.perf_counter()
        search = bench.bank(rows) if method == "exact" else bench.build_index(method, rows)
        ready = time.perf_counter() - started
        started = time.perf_counter()
        found, _ = search.search(queries, bench.config.k, own)
        seconds = time.perf_counter() - started
        return ready + seconds * len(bench.points) / len(bench.tried), agrees(bank_ids[found])

    measured("exact")  # compiles
    exact_seconds, stored = measured("exact")
    exact = stored
    if about.reduction != "none":
        exact = agrees(_exact_neighbours(bench, member, probe, bench.tried))
    options, method = [], bench.config.method_of(about.name)
    methods = candidates(len(bank_ids)) if method == "auto" else [method]
    for option in methods if has_choice(bench.config, bench.common, about) else []:
        seconds, votes = measured(option)
        changed = np.flatnonzero(votes != exact).tolist()
        options.append({"method": option, "seconds": seconds, "changed": changed})
        if seconds > exact_seconds:
            break  # the others look at more
    reduced = np.flatnonzero(stored != exact).tolist()
    record = {"exact_seconds": exact_seconds, "reduced": reduced, "options": options}
    write_json(bench.directory.trial(member.architecture, probe), record)
    return len(bench.tried)


def index(bench: Workbench, member: Member, probe: int) -> int:
    """Settle the method of a probe, and save its index where it is not exact. Returns the rows of the bank."""
    choice = choice_of(bench, member, probe)
    record: dict[str, Any] = {"method": choice.method, "choice": choice.why or None}
    bank_ids = bench.training_ids(member)
    if choice.method != "exact":
        started = time.perf_counter()
        place = bench.directory.index(member.name, probe)
        built = bench.build_index(choice.method, bench.rows(member.name, probe, bank_ids))
        with filling(place.parent) as folder:
            built.save(folder / place.name)
        record |= {"index_bytes": built.size_bytes, "build_seconds": time.perf_counter() - started}
        record["sha256"] = digest(place)
    write_json(bench.directory.index_record(member.name, probe), record)
    return len(bank_ids)


def choice_of(bench: Workbench, member: Member, probe: int) -> Choice:
    """The method of a probe, and why, where `auto` took it: the same whenever it is asked for."""
    config, probes = bench.config, bench.probes(member)
    given = {own.index: config.method_of(own.name) for own in probes}
    if given[probe] != "auto":
        return Choice(given[probe], "")
    if not has_choice(config, bench.common, probes[probe]):
        return Choice("exact", SHARED)
    changed, trials = np.zeros(len(bench.tried), bool), {}
    for own in probes:
        if is_tried(config, bench.common, own):
            record = read_json(bench.directory.trial(member.architecture, own.index))
            changed |= _mask(record["reduced"], len(bench.tried))
            options = [
                Option(option["method"], option["seconds"], _mask(option["changed"], len(bench.tried)))
                for option in record["options"]
            ]
            if given[own.index] == "auto" and options:
                trials[own.index] = Trial(record["exact_seconds"], options)
            elif options:
                changed |= options[0].changed
    assert config.audit.depth_agreement is not None  # the configuration has it wherever it has `auto`
    return choose(trials, config.audit.depth_agreement, changed)[probe]


def _mask(places: Sequence[int], n: int) -> Array:
    """bool [n], true at these places."""
    mask = np.zeros(n, bool)
    mask[list(places)] = True
    return mask


def keep(bench: Workbench, member: Member, probe: int) -> int:
    """Keep the rows of a member's bank in the run; at the input those of all points. Returns their number."""
    ids = np.arange(len(bench.points)) if probe == 0 else bench.training_ids(member)
    rows = bench.rows(member.name, probe, ids)
    with writing_rows(bench.directory.bank(member.name, probe), *rows.shape) as write:
        for first, stop in blocks(len(ids), bench.config.engine.query_block):
            write(rows[first:stop])
    return len(ids)


def audit(bench: Workbench, member: Member, probe: int) -> int:
    """Exact votes of the sample at one probe, at full width, and what the run's own are beside them.

    Where the run's are such votes, they are taken as they are, and only those made that `votes: until-decided` left
    out, since another vote at a later probe may have done so wrongly. Returns the sample's points.
    """
    directory, n_probes = bench.directory, len(bench.probes(member))
    if all(bench.is_exact(member, other) for other in range(n_probes)):
        write_json(directory.audit_record(member.name, probe), {})
        return 0
    every_block = range(len(bench.query_blocks))
    part = np.concatenate([read_array(directory.votes_part(member.name, probe, block)) for block in every_block])
    place = places(part["point_id"], bench.sample)
    voted = place >= 0
    winner = np.full(len(bench.sample), -1, np.int32)
    winner[voted] = part["winner"][place[voted]]
    is_exact = bench.is_exact(member, probe)
    exact, asked = winner.copy(), bench.sample[~voted] if is_exact else bench.sample
    neighbours = _exact_neighbours(bench, member, probe, asked)
    exact[~voted if is_exact else slice(None)] = count_votes(bench.points.labels[neighbours]).winner
    record: dict[str, Any] = {}
    if not is_exact:
        record["audit_sample"] = int(voted.sum())
    if not is_exact and voted.any():
        sampled = np.concatenate([read_array(directory.sampled(member.name, probe, block)) for block in every_block])
        recall = recall_at_k(sampled["neighbours"], neighbours[voted])
        record |= interval(recall).columns("recall")
        record |= interval(winner[voted] == exact[voted]).columns("vote_agreement")
    write_array(directory.audited(member.name, probe), exact)
    write_json(directory.audit_record(member.name, probe), record)
    return len(bench.sample)


def _exact_neighbours(bench: Workbench, member: Member, probe: int, asked: Array) -> Array:
    """Ids of the k nearest points of a member's own bank, [Q, k], whatever the method and the reduction."""
    bank_ids = bench.training_ids(member)
    if not len(asked):
        return np.empty((0, bench.config.k), np.int64)
    bench.drop_search()
    rows, queries = (bench.rows_in_full(member, probe, ids) for ids in (bank_ids, asked))
    found, _ = bench.bank(rows).search(queries, bench.config.k, bench.left_out(bank_ids, asked))
    return bank_ids[found]
