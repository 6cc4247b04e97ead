"""Members: architectures, splits, training, weights, and the probes that are read in them."""

from leadline.members.architectures import build
from leadline.members.probes import Probe, place_probes, read_probes
from leadline.members.splits import training_ids
from leadline.members.train import resolve_precision, train
from leadline.members.weights import load_weights, save_weights, weights_fingerprint

__all__ = [
    "Probe",
    "build",
    "load_weights",
    "place_probes",
    "read_probes",
    "resolve_precision",
    "save_weights",
    "train",
    "training_ids",
    "weights_fingerprint",
]
