"""What understanding depth is good for: which answers to reject, and at which layer to read them."""

from dataclasses import dataclass

import numpy as np

from leadline.errors import LeadlineError
from leadline.knn.arrays import Array
from leadline.study.arrays import ranked, refuse_other_shapes


@dataclass(frozen=True)
class RiskCoverage:
    """Share of wrong answers among the points that are answered, as more and more are, the most confident first.

    coverage: float64 [n], 1/n … 1; risk: float64 [n]; area: the mean of risk over these coverages, which is the lower
    the better confidence tells wrong answers from right ones (AURC; Geifman, Uziel, El-Yaniv, "Bias-reduced
    uncertainty estimation for deep neural classifiers", ICLR 2019). n_left_out: points without a confidence.
    """

    coverage: Array
    risk: Array
    area: float
    n_left_out: int


def risk_coverage(confidence: Array, right: Array) -> RiskCoverage:
    """RiskCoverage of answers, right: bool [N], by a confidence: real [N], high where sure, NaN where unknown.

    The negative of a depth held out is one. Of points of equal confidence a random order is taken, in expectation.

    Raises LeadlineError for shapes that do not agree, and where no point has a confidence.
    """
    confidence, right = np.asarray(confidence, np.float64), np.asarray(right, bool)
    refuse_other_shapes((confidence.size,), confidence=confidence, right=right)
    known = ~np.isnan(confidence)
    n = np.count_nonzero(known)
    if not n:
        raise LeadlineError(f"confidence: none of the {len(known)} points has one")
    answered = np.arange(1, n + 1)
    risk = np.cumsum(ranked(~right[known], confidence[known])) / answered
    return RiskCoverage(answered / n, risk, float(risk.mean()), len(known) - int(n))


@dataclass(frozen=True)
class ReadOuts:
    """Ways of reading an answer from one member, and how often each is right; float64 [ways] each.

    names: "network", its own prediction; "probe 3", the vote at one probe; "probes 3 to 7", the vote of these votes.
    on_validation: what `best` is chosen by, the place in names of the highest, the first of equals. on_others: the
    points that had no part in the choice.
    """

    names: tuple[str, ...]
    on_validation: Array
    on_others: Array
    best: int


def early_read_out(winners: Array, predictions: Array, labels: Array, validation: Array) -> ReadOuts:
    """Which probe, or vote over the probes from one to the last, is right most often on a validation part.

    winners: int [N, P], the votes of points that the member holds out, all computed; predictions, labels: int [N];
    validation: bool [N], the points to choose by. In a vote over probes each has one voice; ties go to the class that
    the later probe gives. Votes over probes, and the choice by validation, are ours.

    Raises LeadlineError for shapes that do not agree, votes that were not computed, and a validation part that has no
    points or leaves none.
    """
    votes, predictions, labels = (np.asarray(array) for array in (winners, predictions, labels))
    validation = np.asarray(validation, bool)
    if votes.ndim != 2 or not votes.shape[1]:
        raise LeadlineError(f"winners: shape {votes.shape}; give [points, probes], one probe at least")
    if (votes < 0).any():
        raise LeadlineError(f"winners: {np.count_nonzero(votes < 0)} votes were not computed; all are needed")
    refuse_other_shapes((len(votes),), predictions=predictions, labels=labels, validation=validation)
    if validation.all() or not validation.any():
        raise LeadlineError(f"validation: {np.count_nonzero(validation)} of {len(votes)} points; give some, not all")
    last = votes.shape[1] - 1
    names = ["network", *(f"probe {p}" for p in range(last + 1)), *(f"probes {p} to {last}" for p in range(last))]
    right = read_outs(votes, predictions) == labels[:, None]
    on_validation = right[validation].mean(axis=0)
    return ReadOuts(tuple(names), on_validation, right[~validation].mean(axis=0), int(on_validation.argmax()))


def read_outs(winners: Array, predictions: Array) -> Array:
    """What each of these ways answers, int [N, ways]: the network, each probe, the votes over a probe and all later."""
    return np.column_stack([predictions, winners, votes_from(winners)[:, :-1]])


def votes_from(winners: Array) -> Array:
    """The vote of the votes at each probe and all after it; int [N, P], as winners. Ties go to the later probe's."""
    answers, every = winners.copy(), np.arange(len(winners))
    agree = np.zeros(winners.shape, np.int32)  # with how many of the probes so far each probe's vote is the same
    for first in range(winners.shape[1] - 1, -1, -1):
        agree += winners == winners[:, first : first + 1]
        latest = winners.shape[1] - 1 - agree[:, first:][:, ::-1].argmax(axis=1)  # the last probe of most agreement
        answers[:, first] = winners[every, latest]
    return answers
