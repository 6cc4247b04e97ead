"""How far approximate votes and depths are from exact ones: means over a random sample, with 95 % intervals."""

from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from leadline.knn.arrays import Array

Z = NormalDist().inv_cdf(0.975)  # of a two-sided interval of 95 %


@dataclass(frozen=True)
class Measured:
    """A mean over sampled points, and the ends of its 95 % interval."""

    value: float
    low: float
    high: float

    def columns(self, name: str) -> dict[str, float]:
        """As the tables have it: name, name_low, name_high."""
        return {name: self.value, f"{name}_low": self.low, f"{name}_high": self.high}


def draw(n_points: int, size: int, seed: int) -> tuple[Array, Array]:
    """Two random samples of the ids 0 … n_points - 1, each int64, ascending, of min(size, n_points) points.

    The first is to audit, the second to choose by: what is chosen for looking well on a sample must be measured on
    another. They have no point in common where 2 * size <= n_points. A sample of all points is a full comparison.
    """
    order = np.random.default_rng(seed).permutation(n_points)
    return np.sort(order[:size]), np.sort(order[::-1][:size])


def interval(values: Array, largest: float = 1.0) -> Measured:
    """The mean of something from 0 to `largest` over all points, from its values at n > 0 sampled points.

    values: bool or real [n]. For a share (values 0 and 1) this is the score interval of Wilson ("Probable inference,
    the law of succession, and statistical inference", JASA 22, 1927). It has a width also where all values are equal,
    which neither the normal interval nor the bootstrap has: no error among n points is no proof of none. Of other
    values it is at least as wide as it need be: p (1 - p) is the largest variance that numbers from 0 to 1 with mean p
    can have.
    """
    n = len(values)
    share = float(np.mean(values)) / largest
    middle = (share + Z**2 / (2 * n)) / (1 + Z**2 / n)
    reach = Z / (1 + Z**2 / n) * float(np.sqrt(share * (1 - share) / n + Z**2 / (4 * n**2)))
    # Rounding must not put an end past the mean, or past what is possible.
    low, high = max(0.0, min(middle - reach, share)), min(1.0, max(middle + reach, share))
    return Measured(share * largest, low * largest, high * largest)


def recall_at_k(found: Array, exact: Array) -> Array:
    """Share of each query's exact neighbours that were found, float64 [Q].

    found, exact: bank rows or point ids, int64 [Q, k], in any order; -1 in `found` where one is missing. Of rows at
    equal distance only those that exact search takes count: among duplicates this is low although votes agree.
    """
    return np.asarray((found[:, :, None] == exact[:, None, :]).any(axis=1).mean(axis=1))


def audit_depths(depths: Array, exact: Array, n_probes: int) -> tuple[Measured, Measured]:
    """Share of points with the exact depth, and mean absolute error of depth, in layers.

    depths, exact: int [n] from 0 to n_probes, of the sampled points.
    """
    error = np.abs(depths.astype(np.int64) - exact)
    return interval(error == 0), interval(error, n_probes)
