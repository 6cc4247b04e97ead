"""What an ensemble shares: the input is the same for every member, so its neighbours are found once.

The common bank holds the inputs of all points that any member was trained on. Of a point's nearest rows in it, in the
order of (distance, point id), those in a member's own training split are, in this order, its nearest in that member's
bank: the search is made once with more than k neighbours, and every member takes its first k.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from leadline.knn.arrays import Array

RARE = 1e-6  # share of points that may have fewer common neighbours in a random split than vote
WORTH = 1.5  # rows of all members' banks for each row of the common bank, from which the longer search pays
LONGEST = 8  # common neighbours for each of the k; small splits would need more, and each member searches for itself


@dataclass(frozen=True)
class CommonBank:
    """ids: of its points, int64 [M], ascending; k: how many neighbours are found in it.

    pays: whether a search in it costs less than the members' own.
    """

    ids: Array
    k: int
    pays: bool


def common_bank(splits: Iterable[Array], n_points: int, k: int, leave_one_out: bool) -> CommonBank:
    """The common bank of members with these training ids, int64 each, out of n_points.

    Its k is such that hardly any point (RARE) has fewer than `k` of its common neighbours in a random split.
    """
    inside, sizes = np.zeros(n_points, bool), []
    for ids in splits:
        inside[ids] = True
        sizes.append(len(ids))
    ids = np.flatnonzero(inside)
    share = min(sizes) / len(ids)
    enough = _enough(share, k)
    pays = sum(sizes) >= WORTH * len(ids) and enough <= LONGEST * k
    return CommonBank(ids, min(enough, len(ids) - leave_one_out), pays)


def _enough(share: float, k: int) -> int:
    """The least number of things of which, with each kept by a chance of `share`, fewer than k are kept RAREly.

    It stops beyond LONGEST * k.
    """
    number, chance = k, share**k  # that the k-th that is kept is this one
    doubt = 1 - chance
    while doubt > RARE and number <= LONGEST * k:
        chance *= (1 - share) * number / (number - k + 1)
        number += 1
        doubt -= chance
    return number


def own_neighbours(neighbours: Array, inside: Array, k: int) -> tuple[Array, Array]:
    """A member's nearest points among the common ones.

    neighbours: point ids, int64 [Q, K], nearest first; inside: bool [N], the member's training split. Returns int64
    [Q, k], the first k inside, and bool [Q], whether there are so many: where not, the row says nothing.
    """
    kept = inside[neighbours]
    # A stable sort leaves those that are kept in their order, before the others.
    order = np.argsort(~kept, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(neighbours, order, axis=1), kept.sum(axis=1) >= k
