"""Tables as a notebook shows them."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

ROWS = 20  # that are shown


def html_table(columns: Mapping[str, Sequence[Any]]) -> str:
    """Columns of equal length, under their names; of more than ROWS rows the first, and how many there are."""
    head = "".join(f"<th>{escape(name)}</th>" for name in columns)
    n_rows = max((len(values) for values in columns.values()), default=0)
    shown = zip(*(values[:ROWS] for values in columns.values()), strict=True)
    rows = "".join(f"<tr>{''.join(f'<td>{_shown(value)}</td>' for value in row)}</tr>" for row in shown)
    rest = f"<p>{n_rows:,} rows, of which the first {ROWS} are shown</p>" if n_rows > ROWS else ""
    return f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>{rest}"


def _shown(value: Any) -> str:
    return "" if value is None else escape(f"{value:.4g}" if isinstance(value, float) else str(value))
