"""The units of a run: each is done whole or not at all, and done again gives the same bytes.

A unit is a function of a workbench and of what it is to be done for. It leaves arrays and records in the run's
directory, and returns its work in its stage's measure. Units know nothing of Ray: `pool` gives actors a workbench.
"""

from collections.abc import Callable

from leadline.cluster.units.embedding import embed, train
from leadline.cluster.units.methods import audit, index, keep, trial
from leadline.cluster.units.reducing import free, reduce
from leadline.cluster.units.searching import part, share, vote
from leadline.cluster.units.whole import whole

UNITS: dict[str, Callable[..., int]] = {  # by stage
    "train": train, "embed": embed, "trial": trial, "index": index, "keep": keep, "share": share, "part": part,
    "vote": vote, "whole": whole, "audit": audit, "reduce": reduce, "free": free,
}  # fmt: skip
