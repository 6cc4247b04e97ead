"""Sources of points: labelled inputs with stable ids, names, parts and a fingerprint of the contents."""

from leadline.points.dataset import Points, open_points
from leadline.points.source import TEST, TRAIN

__all__ = ["TEST", "TRAIN", "Points", "open_points"]
