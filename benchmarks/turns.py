"""Several ways to do the same thing, measured in turns on a machine that is there for minutes."""

import json
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from leadline.errors import one_line


def in_turns(
    title: str, ways: Mapping[str, Callable[[], Callable[[], float]]], rounds: int, until: float
) -> dict[str, dict[str, Any]]:
    """The median rate of each way, and all of its rates. Each is printed as it comes.

    ways: what sets a way up and gives what measures it once, in units a second. Way after way is measured, then again.
    until: on time.perf_counter(), after which nothing is begun. A way that fails has "failed", one line, and does not
    stop the others; so has one whose turn did not come.
    """
    found: dict[str, dict[str, Any]] = {name: {"each": []} for name in ways}
    ready: dict[str, Callable[[], float]] = {}
    for number in range(rounds):
        for name, make_ready in ways.items():
            row = found[name]
            if "failed" in row:
                continue
            if time.perf_counter() > until:
                if not row["each"]:
                    row["failed"] = "its turn did not come in time"
                continue
            try:
                if number == 0:
                    started = time.perf_counter()
                    ready[name] = make_ready()
                    row["ready_seconds"] = round(time.perf_counter() - started, 3)
                row["each"].append(ready[name]())
                print(f"{title}: {name}: {row['each'][-1]:,.1f}/s", flush=True)
            except Exception as error:
                row["failed"] = one_line(error)
                print(f"{title}: {name}: {row['failed']}", flush=True)
    for row in found.values():
        if row["each"]:
            row["median"] = statistics.median(row["each"])
    return found


def need_cuda(device: torch.device) -> None:
    if device.type != "cuda":
        raise RuntimeError("only on a CUDA device")


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def print_figures(measure: Callable[..., dict[str, Any]]) -> None:
    """As JSON: of a CUDA device where there is one, else the quick ones of the CPU."""
    there = torch.cuda.is_available()
    print(json.dumps(measure("cuda" if there else "cpu", quick=not there), indent=1))
