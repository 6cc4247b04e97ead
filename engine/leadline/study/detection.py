"""How well a score finds points whose label was corrupted."""

from dataclasses import dataclass

import numpy as np
from scipy.stats import rankdata
from sklearn.metrics import average_precision_score

from leadline.errors import LeadlineError
from leadline.knn.arrays import Array
from leadline.study.arrays import ranked, refuse_other_shapes


@dataclass(frozen=True)
class Detection:
    """How well a score finds corrupted points.

    precision: of the points of highest score, as many as are corrupted, the share that is: then recall is the same.
    average_precision: the mean, over the corrupted points, of the precision at each one's score; by chance it is near
    n_corrupted / n_points. n_points, n_corrupted: with a score; n_left_out: points without one.
    """

    precision: float
    average_precision: float
    n_points: int
    n_corrupted: int
    n_left_out: int


def detect(scores: Array, corrupted: Array) -> Detection:
    """Detection of corrupted points, bool [N], by scores, real [N]: high where a label is suspect, NaN where unknown.

    Depth in training is such a score, and so is the negative of aum. Points of equal score count as in `precision_at`;
    to average precision they are found together (scikit-learn's).

    Raises LeadlineError for shapes that do not agree, and where no point with a score is corrupted.
    """
    known, wrong = _known(scores, corrupted)
    n_corrupted = int(wrong.sum())
    if not n_corrupted:
        raise LeadlineError(f"corrupted: none of the {len(wrong)} points that have a score; there is nothing to find")
    precision, _ = precision_at(known, wrong, n_corrupted)
    # By rank, since scikit-learn refuses infinite scores.
    found = average_precision_score(wrong, rankdata(known, method="dense"))
    return Detection(precision, float(found), len(wrong), n_corrupted, np.size(corrupted) - len(wrong))


def precision_at(scores: Array, corrupted: Array, n_flagged: int) -> tuple[float, float]:
    """Precision and recall where the n_flagged points of highest score are taken for corrupted.

    Arrays as in `detect`. Of points that tie at the cut a random choice is taken, in expectation. Recall is NaN where
    no point is corrupted.

    Raises LeadlineError for shapes that do not agree, and n_flagged that is not from 1 to the points with a score.
    """
    known, wrong = _known(scores, corrupted)
    if not 1 <= n_flagged <= len(known):
        raise LeadlineError(f"n_flagged: {n_flagged}; of {len(known)} points with a score at least 1 can be flagged")
    found = float(ranked(wrong, known)[:n_flagged].sum())
    n_corrupted = int(wrong.sum())
    return found / n_flagged, found / n_corrupted if n_corrupted else float("nan")


def _known(scores: Array, corrupted: Array) -> tuple[Array, Array]:
    """Scores float64 and corrupted bool of the points that have a score."""
    scores, corrupted = np.asarray(scores, np.float64), np.asarray(corrupted, bool)
    refuse_other_shapes((scores.size,), scores=scores, corrupted=corrupted)
    known = ~np.isnan(scores)
    return scores[known], corrupted[known]
