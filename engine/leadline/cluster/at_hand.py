"""A plan for the cluster that is there: Ray says what it has, and its workers are measured, all of a node's at once."""

import shutil
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import ray
import torch

from leadline.cluster.driver import free_memory
from leadline.cluster.graph import Graph, Outline
from leadline.cluster.plan import Cluster, Plan, plan_of
from leadline.cluster.pool import MEMORY, connected
from leadline.cluster.rates import Rates, measure, networks_of
from leadline.errors import LeadlineError


def plan_at_hand(graph: Graph, points: Outline, address: str | None, price: float | None) -> Plan:
    """Plan a run on the Ray cluster at an address, by default on this machine. Raises LeadlineError as a run does."""
    networks = networks_of(graph, points)
    began = time.perf_counter()
    with connected(graph.config.engine, address) as is_local:
        cluster = _cluster(graph, is_local, price)
        folder = graph.config.engine.scratch or (Path.cwd() if is_local else Path(tempfile.gettempdir()))
        # At once, since workers of a node get into each other's way.
        options = {"num_cpus": graph.config.engine.threads, "num_gpus": graph.config.engine.gpus}
        at_once = -(-cluster.workers // cluster.nodes)
        actors = [
            ray.remote(_Measured).options(**options).remote(sys.path, graph, points, folder) for _ in range(at_once)
        ]
        ray.get([actor.ready.remote() for actor in actors])
        waited = time.perf_counter() - began
        (rates, disk, device), *_ = ray.get([actor.measure.remote() for actor in actors])
        ended = time.perf_counter()
    rates = replace(rates, start=waited + time.perf_counter() - ended)
    return plan_of(graph, networks, replace(cluster, disk=disk, device=device), rates)


def _cluster(graph: Graph, is_local: bool, price: float | None) -> Cluster:
    engine, resources = graph.config.engine, ray.cluster_resources()
    cpus, gpus = resources.get("CPU", 0), resources.get("GPU", 0)
    room = engine.workers_in(cpus, gpus)
    workers = engine.workers or room
    if not 0 < workers <= room:
        raise LeadlineError(
            f"engine: {max(workers, 1)} workers of {engine.threads} CPUs and {engine.gpus:g} GPUs do not fit a cluster "
            f"of {cpus:g} CPUs and {gpus:g} GPUs; lower engine.workers, engine.threads or engine.gpus, or describe "
            "another cluster with --nodes"
        )
    nodes = sum(node["Alive"] and node["Resources"].get("CPU", 0) > 0 for node in ray.nodes())
    where = "this machine" if is_local else f"the Ray cluster at hand, {nodes} nodes"
    return Cluster(
        nodes=nodes,
        workers=workers,
        memory=int(resources.get("memory", 0)) // nodes,
        free=free_memory(MEMORY / "leadline-plan") if is_local else 0,
        disk=0,
        device=None,
        is_local=is_local,
        price=price,
        said=f"{where}: {cpus:g} CPUs, {gpus:g} GPUs, {workers} workers",
    )


class _Measured:
    def __init__(self, search_path: list[str], graph: Graph, points: Outline, folder: Path) -> None:
        sys.path.extend(path for path in search_path if path not in sys.path)
        self._graph, self._points, self._folder = graph, points, folder

    def ready(self) -> None:
        """Answers when the actor is there."""

    def measure(self) -> tuple[Rates, int, int | None]:
        """Rates; free bytes of the disk for embeddings; bytes of its share of a GPU."""
        engine, disk = self._graph.config.engine, self._folder
        while not disk.exists():
            disk = disk.parent
        place = MEMORY if engine.scratch is None and MEMORY.is_dir() else disk
        device = None
        if engine.gpus:
            device = int(torch.cuda.get_device_properties(0).total_memory * min(1.0, engine.gpus))
        return measure(self._graph, self._points, place, disk), shutil.disk_usage(disk).free, device
