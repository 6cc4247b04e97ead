"""Metrics of a run in Ray, which every node exports for Prometheus to scrape; there their names begin with ray_."""

from typing import Any

from ray.util.metrics import Counter, Gauge, Histogram

from leadline.cluster.pool import Ended

SECONDS = [0.01, 0.1, 1.0, 10.0, 60.0, 600.0, 3600.0]


class Metrics:
    """Of one run, kept by its driver; what is counted while no Ray is connected is not exported."""

    def __init__(self, run: str) -> None:
        self._run = {"run": run}
        self._tries = Counter("leadline_tries", "Tries of units that ended", ("run", "stage", "state"))
        self._work = Counter("leadline_work", "Work done, in the stage's measure", ("run", "stage", "measure"))
        self._bytes = Counter("leadline_embedding_bytes", "Embeddings written", ("run",))
        self._seconds = Histogram("leadline_unit_seconds", "Seconds of units in actors", SECONDS, ("run", "stage"))
        self._units = Gauge("leadline_units", "Units by state", ("run", "stage", "state"))

    def ended(self, stage: str, measure: str, end: Ended, bytes_written: int) -> None:
        """Count a try of a unit."""
        tags = {**self._run, "stage": stage}
        self._tries.inc(1, {**tags, "state": end.state})
        if end.done is None:
            return
        self._seconds.observe(end.done.seconds, tags)
        if end.done.work:
            self._work.inc(end.done.work, {**tags, "measure": measure})
        if bytes_written:
            self._bytes.inc(bytes_written, self._run)

    def tell(self, stages: dict[str, dict[str, Any]], running: dict[str, int]) -> None:
        """Say how many units are in each state. stages: of `Stages.state`; running: units under way, by stage."""
        for name, stage in stages.items():
            under_way = running.get(name, 0)
            states = {"running": under_way, "done": stage["done"], "set_aside": stage["set_aside"]}
            states["waiting"] = stage["units"] - sum(states.values())
            for state, units in states.items():
                self._units.set(units, {**self._run, "stage": name, "state": state})
