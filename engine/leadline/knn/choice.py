"""`method: auto`: which layers are worth an index, by what a trial on a sample measured."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import log2, sqrt

from leadline.knn.arrays import Array
from leadline.knn.audit import interval


@dataclass(frozen=True)
class Option:
    """What one method did in the trial of a layer.

    seconds: to build it, and to search for all points at the speed at which the sample was. changed: bool [n], at which
    sampled points the vote came to agree with the network's prediction, or to disagree, where the exact one at full
    width did not.
    """

    method: str
    seconds: float
    changed: Array


@dataclass(frozen=True)
class Trial:
    """Of one layer: exact search, its seconds counted as an option's, and the methods that were tried beside it."""

    exact_seconds: float
    options: Sequence[Option]


@dataclass(frozen=True)
class Choice:
    """A method, and why it was taken."""

    method: str
    why: str


def candidates(n_bank: int) -> list[str]:
    """The methods that are tried for a bank of so many rows, those that look at least first.

    IVF with some 4 √M cells, as faiss's guidelines begin, of which 1/128 to 1/8 are looked into.
    """
    cells = 2 ** round(log2(4 * sqrt(n_bank)))
    looked_into = dict.fromkeys(max(1, cells // part) for part in (128, 32, 8))
    return [f"ivf-flat:nlist={cells},nprobe={n}" for n in looked_into]


def choose(trials: Mapping[int, Trial], target: float, changed: Array) -> dict[int, Choice]:
    """A method for each layer that was tried, so that depths agree with exact ones in a share `target` of points.

    A point's depth can differ from the exact one only where some layer's vote changed sides (Option.changed): whether a
    vote is the prediction is all that a depth asks. So the share of points at which no layer of the whole network
    changed is a lower bound of the agreement, and the low end of its 95 % interval on the sample must reach the target.
    From all exact, the switch to an index that saves most time is taken first, then the next, as long as the target is
    still met. changed: bool [n], the points that reductions, and layers with a given method, have changed already.
    """
    switches = sorted(
        (
            (trial.exact_seconds - option.seconds, probe, option)
            for probe, trial in trials.items()
            for option in trial.options
            if option.seconds < trial.exact_seconds
        ),
        key=lambda switch: (-switch[0], switch[1], switch[2].method),
    )
    chosen: dict[int, Choice] = {}
    for _, probe, option in switches:
        agreement = interval(~(changed | option.changed))
        if probe not in chosen and agreement.low >= target:
            changed = changed | option.changed
            chosen[probe] = Choice(
                option.method,
                f"{option.seconds:.3g} s, exact {trials[probe].exact_seconds:.3g} s; with the layers chosen before, "
                f"depths of {len(changed)} points agree in at least {agreement.low:.4f}",
            )
    for probe in trials.keys() - chosen.keys():
        chosen[probe] = Choice("exact", _why_exact(trials[probe], target, changed))
    return chosen


def _why_exact(trial: Trial, target: float, changed: Array) -> str:
    cheaper = [option for option in trial.options if option.seconds < trial.exact_seconds]
    if not cheaper:
        least = min(trial.options, key=lambda option: option.seconds)
        return f"exact is cheaper: {trial.exact_seconds:.3g} s, {least.method} {least.seconds:.3g} s"
    best = min(cheaper, key=lambda option: int((changed | option.changed).sum()))
    low = interval(~(changed | best.changed)).low
    return f"no cheaper method meets {target:g}: with {best.method} the low end would be {low:.4f}"
