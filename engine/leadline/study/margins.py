"""How near a decision is: in the input space, and between the members of an ensemble.

Output margin and entropy of each network by itself are in the table of depths; `embedding.outputs` makes them.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from scipy.special import entr, softmax
from torch import Tensor, nn

from leadline.errors import LeadlineError
from leadline.full_precision import full_precision
from leadline.knn.arrays import Array
from leadline.members.probes import eval_mode


def ensemble_entropy(logits: Iterable[Array], where: Array) -> Array:
    """Entropy of the mean of the members' softmaxes, in nats, float64 [N].

    logits: real [N, C] of each member, read one after another; where: bool [members, N], whether the member counts for
    the point (say, holds it out); its logits are not looked at where it does not. NaN where no member counts. Not the
    mean of the members' entropies, which it is never below: it is high too where each member is sure of another class.
    Whether the paper takes this one is not known.

    Raises LeadlineError for logits that are not [N, C], and ValueError for another number of members than in `where`.
    """
    counts = np.asarray(where, bool)
    n_points = counts.shape[1]
    total = np.zeros((n_points, 1))
    for member, values in zip(counts, logits, strict=True):
        if np.ndim(values) != 2 or len(values) != n_points:
            raise LeadlineError(
                f"logits: shape {np.shape(values)} beside a mask of {n_points} points; give [points, classes]"
            )
        share = softmax(np.asarray(values, np.float64), axis=1)
        total = total + np.where(member[:, None], share, 0.0)
    with np.errstate(invalid="ignore"):
        return np.asarray(entr(total / counts.sum(axis=0)[:, None]).sum(axis=1))


def adversarial_input_margin(model: nn.Module, inputs: Any, *, batch_size: int = 256) -> Array:
    """Distance to the nearest decision boundary, were the logits linear: float32 [N], in units of the inputs.

    min over j ≠ i of (z_i - z_j) / ‖∇_x (z_i - z_j)‖₂, i the predicted class (ties to the lower), over all classes j
    (believed, not verified against the paper).
    Where z_i = z_j the margin is 0, whatever the gradient; a class whose z_i - z_j > 0 does not change with the input
    is infinitely far, and where all are, the margin is infinite.

    model: gives logits [B, C], C >= 2, of inputs [B, ...], each from its own input; run in eval mode and in float32
    where its parameters lie. inputs: real [N, ...], numpy or torch. A batch takes one forward pass, whose activations
    are kept, and C - 1 backward passes to the inputs: about the time of C forward passes.

    Raises LeadlineError for outputs that are not logits, and for logits or gradients that are not finite, by the
    point's place.
    """
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    margins = np.empty(len(inputs), np.float32)
    with eval_mode(model), full_precision():
        for first in range(0, len(inputs), batch_size):
            rows = inputs[first : first + batch_size]
            rows = rows.detach() if isinstance(rows, Tensor) else torch.from_numpy(np.array(rows, np.float32))
            found = _margins(model, rows.to(device, torch.float32)).cpu().numpy()
            if np.isnan(found).any():
                bad = first + int(np.isnan(found).argmax())
                raise LeadlineError(
                    f"inputs: at point {bad} logits or their gradients are not finite; look at the model"
                )
            margins[first : first + batch_size] = found
    return margins


def _margins(model: nn.Module, inputs: Tensor) -> Tensor:
    """Of one batch, float64 [B]; NaN where logits or gradients are not finite."""
    with torch.enable_grad():
        inputs = inputs.requires_grad_()
        logits = _checked_logits(model(inputs.clone()), len(inputs))  # a model may begin with a ReLU in place
        n_classes = logits.shape[1]
        predicted = logits.argmax(dim=1, keepdim=True)
        largest = logits.gather(1, predicted)
        nearest = torch.full((len(inputs),), torch.inf, dtype=torch.float64, device=inputs.device)
        for step in range(1, n_classes):
            # Each point's own other class, so that no pass is spent on the predicted one.
            gap = (largest - logits.gather(1, (predicted + step) % n_classes))[:, 0]
            # The sum of the gaps has each point's own gradient, as no logit depends on another point's input.
            norm = torch.linalg.vector_norm(_gradient(gap.sum(), inputs).flatten(1), dim=1, dtype=torch.float64)
            gap = gap.detach().double()
            margin = torch.where(gap == 0, 0.0, gap / norm)
            nearest = torch.minimum(nearest, torch.where(norm.isfinite(), margin, torch.nan))
    return torch.where(logits.detach().isfinite().all(dim=1), nearest, torch.nan)


def _gradient(value: Tensor, inputs: Tensor) -> Tensor:
    if not value.requires_grad:  # the model does not look at its input
        return torch.zeros_like(inputs)
    return torch.autograd.grad(value, inputs, retain_graph=True, materialize_grads=True)[0]


def _checked_logits(output: Any, n_rows: int) -> Tensor:
    shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
    if not isinstance(output, Tensor) or output.ndim != 2 or len(output) != n_rows or output.shape[1] < 2:
        raise LeadlineError(
            f"model: it returns {shape} for {n_rows} inputs; logits of shape [B, C], C >= 2, are needed"
        )
    return output
