"""A run's directory: schemas, manifest, atomic writes, integrity."""

from leadline.store.directory import TABLES, RunDirectory

__all__ = ["TABLES", "RunDirectory"]
