"""Leadline: how many layers a network needs before it has made up its mind about an input."""

from typing import TYPE_CHECKING, Any

from leadline.depth import depth_from_votes
from leadline.errors import LeadlineError
from leadline.knn import Votes, knn_votes
from leadline.one_model import prediction_depth

if TYPE_CHECKING:
    from leadline.cluster.driver import run
    from leadline.query import Run
    from leadline.query import open_run as open

__all__ = ["LeadlineError", "Run", "Votes", "depth_from_votes", "knn_votes", "open", "prediction_depth", "run"]


def __getattr__(name: str) -> Any:
    # Runs need Ray and DuckDB, the other names do not: these are imported when they are first asked for.
    if name == "run":
        from leadline.cluster.driver import run

        return run
    if name in ("open", "Run"):
        from leadline import query

        return query.open_run if name == "open" else query.Run
    raise AttributeError(f"module 'leadline' has no attribute {name!r}")
