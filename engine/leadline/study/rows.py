"""Estimates as rows of the study's tables: value, low, high (null where undefined) and n, beside what they are of."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from leadline.knn.arrays import Array
from leadline.study.relations import Estimate

Row = dict[str, Any]


def rows_of(estimate: Estimate, is_share: bool = False) -> list[Row]:
    """A row for each of an estimate's statistics. Intervals of shares end at 0 and 1."""
    value, low, high = (np.atleast_1d(array) for array in (estimate.value, estimate.low, estimate.high))
    if is_share:
        low, high = np.clip(low, 0, 1), np.clip(high, 0, 1)
    n = np.broadcast_to(estimate.n_points, value.shape)
    return [row_of(*one) for one in zip(value, low, high, n, strict=True)]


def row_of(value: Any, low: Any, high: Any, n: Any) -> Row:
    return {"value": _number(value), "low": _number(low), "high": _number(high), "n": int(n)}


def by_probe(row: Row, probes: Sequence[str], rows: Sequence[Row]) -> list[Row]:
    """Rows of all probes, in order, with their numbers and names."""
    return [{**row, "probe": number, "name": probes[number], **one} for number, one in enumerate(rows)]


def tables_of(rows: Mapping[str, Sequence[Row]]) -> dict[str, pa.Table]:
    """Those that have a row."""
    return {name: pa.Table.from_pylist(list(some)) for name, some in rows.items() if some}


def means(values: Array, where: Array, axis: int) -> Array:
    """Mean of values along an axis, float64, of those where: bool, of one shape; NaN of none."""
    with np.errstate(invalid="ignore"):
        return np.asarray((values * where).sum(axis=axis) / where.sum(axis=axis))


def _number(value: Any) -> float | None:
    return None if np.isnan(value) else float(value)
