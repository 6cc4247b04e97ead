"""How measures hang together over points, with intervals over members.

A measure is an array [members, N] of real numbers, one row a member, NaN where a member says nothing of a point: depth
held out, say, is NaN where the member was trained on the point. A point's value is its mean over the members that say
something of it. Points for which nobody does are left out, and counted. A share of members is the mean of zeros and
ones: accuracy of `prediction == label`, consensus-consistency of `prediction == consensus_class`.

Intervals are of 95 %, by the bootstrap over members (Efron, "Bootstrap methods: another look at the jackknife", Annals
of Statistics 7, 1979): members are drawn with replacement, with all that they say, and the statistic is made again.
They tell what other members, trained on the same data, would have given. They are value ± t s √(M / (M - 1)), s the
standard deviation over the draws and t the quantile of Student's t for M - 1 degrees of freedom, M the number of
members: s alone would be too small where M is. The quantiles of the draws are not taken as ends. A draw has fewer
different members than the ensemble, so its means are noisier, and a correlation of noisier means is nearer to 0: with
many points all draws can lie below the value. The number of different members also varies from draw to draw, so with
many points intervals of correlations are wider than they need be. There is no interval (NaN) for one member.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import spearmanr, t

from leadline.errors import LeadlineError
from leadline.html import html_table
from leadline.knn.arrays import Array
from leadline.study.arrays import refuse_other_shapes

DRAWS = 1000
LOW, HIGH = 0.025, 0.975  # of a two-sided interval of 95 %


@dataclass(frozen=True)
class Estimate:
    """A statistic from all members and the ends of its interval, float64 arrays of one shape; NaN where undefined.

    n_points: that it is from, int64, of the same shape or of one for all; n_left_out: the other points.
    """

    value: Array
    low: Array
    high: Array
    n_points: Array
    n_left_out: Array

    def _repr_html_(self) -> str:
        names = ("value", "low", "high", "n_points", "n_left_out")
        arrays = np.broadcast_arrays(*(getattr(self, name) for name in names))
        return html_table({name: array.ravel().tolist() for name, array in zip(names, arrays, strict=True)})


def binned_means(depth: Array, measure: Array, edges: Array, *, draws: int = DRAWS, seed: int = 0) -> Estimate:
    """Mean over points of a measure, by bins of their mean depth; Estimate of arrays [bins].

    depth, measure: real [members, N] of the same members, as the module says. edges: real [bins + 1], ascending; a bin
    holds its lower edge, the last one its upper edge too. Points beyond the edges are left out. A bin without points
    is NaN; the interval of one that is empty in some draws is from the others.

    Raises LeadlineError for shapes that do not agree, and edges that do not ascend.
    """
    edges = np.asarray(edges, np.float64)
    if edges.ndim != 1 or len(edges) < 2 or not (np.diff(edges) > 0).all():
        raise LeadlineError(f"edges: {edges.tolist()}; give two at least, each above the one before")
    n_bins = len(edges) - 1

    def counts(depths: Array, values: Array) -> tuple[Array, Array]:
        inside = (depths >= edges[0]) & (depths <= edges[-1]) & ~np.isnan(values)
        bins = np.minimum(np.searchsorted(edges, depths[inside], side="right") - 1, n_bins - 1)
        return np.bincount(bins, minlength=n_bins), np.bincount(bins, values[inside], n_bins)

    def means(depths: Array, values: Array) -> Array:
        n, total = counts(depths, values)
        with np.errstate(invalid="ignore"):
            return np.asarray(total / n)

    measures = _measures(depth=depth, measure=measure)
    n_points, _ = counts(*(ready.means() for ready in measures))
    n_left_out = measures[0].known.shape[1] - n_points.sum()
    return Estimate(
        *_interval([len(measures[0])], _of_means([measures], means), draws, seed), n_points, np.asarray(n_left_out)
    )


def rank_correlation(one: Array, other: Array, *, draws: int = DRAWS, seed: int = 0) -> Estimate:
    """Spearman's rank correlation over points of two measures' means; both real [members, N] of the same members.

    NaN where fewer than two points have both, or all are equal in one.

    Raises LeadlineError for shapes that do not agree.
    """
    return _rank_correlation([_measures(one=one, other=other)], draws, seed)


def rank_correlation_between(one: Array, other: Array, *, draws: int = DRAWS, seed: int = 0) -> Estimate:
    """As `rank_correlation`, of measures of the same N points by different members, [members, N] and [others, N].

    Of two architectures' mean depths, say. The members of each are drawn apart, and M is the smaller number of members.
    """
    groups = [_measures(one=one), _measures(other=other)]
    n_points, n_others = (group[0].known.shape[1] for group in groups)
    if n_points != n_others:
        raise LeadlineError(f"other: {n_others} points beside {n_points}; give the same points in the same order")
    return _rank_correlation(groups, draws, seed)


def mean_over_members(values: Array, *, draws: int = DRAWS, seed: int = 0) -> Estimate:
    """Mean over members of any few numbers of each, real [members, ...], NaN where one has none; Estimate of [...].

    Of probe accuracies, say. n_points is the number of members behind each mean, n_left_out that of the others.
    """
    shape = np.shape(values)[1:]
    (measure,) = _measures(values=np.reshape(values, (len(values), -1)))
    n_members = measure.known.sum(axis=0)
    value, low, high = _interval([len(measure)], _of_means([[measure]], lambda means: means), draws, seed)
    return Estimate(*(array.reshape(shape) for array in (value, low, high, n_members, len(values) - n_members)))


def over_members(
    statistic: Callable[[Array], Array], n_members: int, *, draws: int = DRAWS, seed: int = 0
) -> tuple[Array, Array, Array]:
    """A statistic of an ensemble, and the ends of its interval; all of the statistic's own shape.

    statistic: of how often each member counts, int [members]; once each for the value.
    """
    return _interval([n_members], lambda times: statistic(times[0]), draws, seed)


def stability(measure: Array, sizes: Sequence[int], *, draws: int = 100, seed: int = 0) -> Estimate:
    """How far a measure's means over m members agree with those over m others; Estimate of arrays [sizes].

    measure: real [members, N]; sizes: the m, of which two fit into the members. For each, `draws` times two disjoint
    halves of m members each are drawn, and Spearman's rank correlation over points of their means is made. value is
    the mean of these, low and high their 2.5 % and 97.5 % quantiles: what one such pair may give, which is no interval
    of the mean. n_points: in the mean over the draws, points that have a value in both halves, rounded. The draws of
    one size do not depend on which other sizes are asked for.

    Raises LeadlineError for a size that is not from 1 to half of the members.
    """
    (ready,) = _measures(measure=measure)
    n_members, n_points = ready.known.shape
    columns = []
    for size in sizes:
        if not 1 <= size <= n_members // 2:
            raise LeadlineError(f"sizes: {size}; of {n_members} members two halves have 1 to {n_members // 2} each")
        random = np.random.default_rng([seed, size])
        correlations, n_both = np.empty(draws), np.empty(draws)
        for draw in range(draws):
            order = random.permutation(n_members)
            halves = [
                ready.means(np.bincount(half, minlength=n_members)) for half in (order[:size], order[size : 2 * size])
            ]
            correlations[draw] = _spearman(*halves)
            n_both[draw] = np.count_nonzero(~np.isnan(halves[0] + halves[1]))
        n = round(n_both.mean())
        columns.append((correlations.mean(), *np.quantile(correlations, [LOW, HIGH]), n, n_points - n))
    value, low, high, n, left_out = np.array(columns, np.float64).reshape(-1, 5).T
    return Estimate(value, low, high, n.astype(np.int64), left_out.astype(np.int64))


class _Measure:
    """A measure [members, N], ready for means over some of its members."""

    def __init__(self, values: Array) -> None:
        self.known = ~np.isnan(values)
        self._filled = np.where(self.known, values, 0.0)

    def __len__(self) -> int:
        return len(self.known)

    def means(self, times: Array | None = None) -> Array:
        """float64 [N], each member counted so many times, int [members], or once; NaN where nobody says anything."""
        times = np.ones(len(self), np.int64) if times is None else times
        n_points = self.known.shape[1]
        total, count = np.zeros(n_points), np.zeros(n_points)
        for member in np.flatnonzero(times):  # a product would make NaN of an infinite value that is not drawn
            total += times[member] * self._filled[member]
            count += times[member] * self.known[member]
        with np.errstate(invalid="ignore"):
            return np.asarray(total / count)


def _measures(**arrays: Array) -> list[_Measure]:
    """Of the same members and points. Raises LeadlineError where they are not."""
    given = {name: np.asarray(array, np.float64) for name, array in arrays.items()}
    first = next(iter(given.values()))
    for name, array in given.items():
        if array.ndim != 2 or not len(array):
            raise LeadlineError(f"{name}: shape {array.shape}; give [members, points], one member at least")
    refuse_other_shapes(first.shape, **given)
    return [_Measure(array) for array in given.values()]


def _spearman(one: Array, other: Array) -> Array:
    both = ~(np.isnan(one) | np.isnan(other))
    one, other = one[both], other[both]
    if len(one) < 2 or (one == one[0]).all() or (other == other[0]).all():
        return np.array(np.nan)
    return np.asarray(spearmanr(one, other).statistic)


def _rank_correlation(groups: Sequence[Sequence[_Measure]], draws: int, seed: int) -> Estimate:
    value, *ends = _interval([len(group[0]) for group in groups], _of_means(groups, _spearman), draws, seed)
    low, high = (np.asarray(np.clip(end, -1, 1)) for end in ends)
    known = np.array([measure.known.any(axis=0) for group in groups for measure in group]).all(axis=0)
    return Estimate(value, low, high, np.asarray(known.sum()), np.asarray((~known).sum()))


def _interval(
    sizes: Sequence[int], statistic: Callable[[Sequence[Array]], Array], draws: int, seed: int
) -> tuple[Array, Array, Array]:
    """A statistic from all members, and the ends of its interval.

    sizes: members of each group that is drawn apart; statistic: of how often each member of each group counts.
    """
    random = np.random.default_rng(seed)
    value = np.asarray(statistic([np.ones(n, np.int64) for n in sizes]))
    if min(sizes) < 2:
        return value, np.full_like(value, np.nan), np.full_like(value, np.nan)
    drawn = np.stack([statistic([random.multinomial(n, np.full(n, 1 / n)) for n in sizes]) for _ in range(draws)])
    reach = t.ppf(HIGH, min(sizes) - 1) * np.sqrt(min(sizes) / (min(sizes) - 1)) * _std(drawn)
    return value, np.asarray(value - reach), np.asarray(value + reach)


def _of_means(
    groups: Sequence[Sequence[_Measure]], statistic: Callable[..., Array]
) -> Callable[[Sequence[Array]], Array]:
    """A statistic of the means of measures; those of one group are of the same members, which are drawn together."""

    def of(times: Sequence[Array]) -> Array:
        return statistic(*(m.means(drawn) for group, drawn in zip(groups, times, strict=True) for m in group))

    return of


def _std(drawn: Array) -> Any:
    """Standard deviation over the draws [draws, ...] in which the statistic is defined; NaN for fewer than two."""
    known = ~np.isnan(drawn)
    n = known.sum(axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.where(known, drawn, 0.0).sum(axis=0) / n
        squares = np.where(known, (drawn - mean) ** 2, 0.0).sum(axis=0)
        return np.sqrt(squares / np.where(n > 1, n - 1, np.nan))
