"""Runs on Ray: units, actors, scheduling, progress. The only room that imports ray."""

from leadline.cluster.driver import run

__all__ = ["run"]
