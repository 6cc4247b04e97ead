"""The comparison of `leadline.bench` with each layer a Ray task: all are measured at once, as far as there is room."""

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayTaskError

from leadline import bench
from leadline.cluster.pool import connected
from leadline.config import Engine
from leadline.errors import LeadlineError
from leadline.knn import parse_method
from leadline.knn.engines import GPU_METHODS
from leadline.layers import open_layers
from leadline.machine import hardware


def bench_knn_on_ray(
    path: Path, member: str | None, methods: Sequence[str], queries: int | None, k: int | None, device: str | None,
    threads: int, address: str | None, tell: Callable[[str], None],
) -> dict[str, Any]:  # fmt: skip
    """As `bench.prepare` and `bench.bench_knn`, on a Ray cluster, by default one that is started on this machine.

    path: on storage that all nodes see. Methods of a layer are measured one after another, each task with `threads`
    CPUs, and one GPU where exact search or a method needs one. What methods can be used is asked of a worker. Raises
    LeadlineError also where no node has so many CPUs.
    """
    path, device = path.absolute(), device or "cpu"
    on_gpu = device.startswith("cuda") or any(parse_method(text).name in GPU_METHODS for text in methods)
    with connected(Engine(threads=threads), address):
        _refuse_too_small(threads, on_gpu)
        # A worker that dies is replaced, and its layer measured again.
        task = ray.remote(_on_worker).options(num_cpus=threads, num_gpus=1 if on_gpu else 0)
        asked = (path, member, methods, queries, k, device, threads)
        comparison = _got(task.remote(sys.path, bench.prepare, asked))
        layers = open_layers(path, member)
        waiting = {task.remote(sys.path, _measured, (comparison, layer)): layer for layer, _ in enumerate(layers.names)}
        found: dict[int, bench.Measured] = {}
        started, n_methods = time.perf_counter(), len(comparison.methods)
        while waiting:
            (ready,), _ = ray.wait(list(waiting), num_returns=1)
            layer = waiting.pop(ready)
            found[layer], kind = _got(ready)
            found[layer].record["hardware"] = kind
            seconds = time.perf_counter() - started
            tell(f"{layers.names[layer]}: {n_methods} methods, {seconds:.1f} s since all layers began")
        return bench.join(comparison, layers, [found[layer] for layer in sorted(found)])


def _measured(comparison: bench.Comparison, layer: int) -> tuple[bench.Measured, str]:
    """One layer, and the worker's hardware: nodes may differ."""
    layers = open_layers(comparison.path, comparison.member, comparison.device)
    return bench.measure(comparison, layers, layer), hardware(comparison.device)


def _on_worker(search_path: list[str], call: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    sys.path.extend(path for path in search_path if path not in sys.path)
    return call(*arguments)


def _got(reference: Any) -> Any:
    try:
        return ray.get(reference)
    except RayTaskError as error:
        if isinstance(error.cause, LeadlineError):
            raise error.cause from None
        raise


def _refuse_too_small(threads: int, on_gpu: bool) -> None:
    """Ray would wait for them for ever."""
    most = max((node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]), default=0)
    if threads > most:
        raise LeadlineError(f"--threads: {threads}, but no node of the cluster has more than {most:g} CPUs; lower it")
    if on_gpu and ray.cluster_resources().get("GPU", 0) < 1:
        raise LeadlineError("--methods, --device: they need a GPU, and the cluster has none; choose those for the CPU")
