"""Margins in the input space against closed forms, finite differences and whole Jacobians; entropies against scipy."""

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import entropy
from torch import nn

from leadline import LeadlineError
from leadline.embedding.outputs import summarise_logits
from leadline.members.architectures import build
from leadline.study.margins import adversarial_input_margin, ensemble_entropy

pytestmark = pytest.mark.usefixtures("one_thread")


def inputs_of(shape, n=7, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).normal(0, 1, (n, *shape)).astype(np.float32))


def slow_margins(model, inputs, jacobian):
    """float64, a point at a time; jacobian(model, row) is [C, D]."""
    model = copy.deepcopy(model).double().eval()
    margins = []
    for row in inputs.double():
        with torch.no_grad():
            logits = model(row[None])[0]
        slopes = jacobian(model, row)
        i = int(logits.argmax())
        ratios = [(logits[i] - logits[j]) / (slopes[i] - slopes[j]).norm() for j in range(len(logits)) if j != i]
        margins.append(float(min(ratios)))
    return np.array(margins)


def by_jacrev(model, row):
    return torch.func.jacrev(lambda x: model(x[None].clone())[0])(row).flatten(1).detach()


def by_differences(model, row, step=1e-5):
    columns = []
    with torch.no_grad():
        for i in range(row.numel()):
            moved = torch.zeros(row.numel(), dtype=row.dtype)
            moved[i] = step
            moved = moved.reshape(row.shape)
            columns.append((model((row + moved)[None])[0] - model((row - moved)[None])[0]) / (2 * step))
    return torch.stack(columns, dim=1)


@pytest.mark.parametrize(
    ("architecture", "parameters", "shape"),
    [
        ("mlp", {"width": 16, "depth": 3}, (1, 4, 4)),
        ("resnet18", {"width": 8, "depth": [1, 1, 1, 1]}, (3, 8, 8)),  # GroupNorm and standardised convolutions
        ("resnet18", {"width": 8, "depth": [1, 1, 1, 1], "norm": "batch"}, (3, 8, 8)),
        ("vgg16", {"width": 8, "depth": [1, 1, 1, 1, 1]}, (3, 8, 8)),
    ],
)
def test_margins_are_those_of_whole_jacobians(architecture, parameters, shape):
    model = build(architecture, parameters, shape, 5, seed=1)
    inputs = inputs_of(shape)
    found = adversarial_input_margin(model, inputs, batch_size=3)
    assert found.dtype == np.float32 and found.shape == (7,) and (found > 0).all()
    np.testing.assert_allclose(found, slow_margins(model, inputs, by_jacrev), rtol=1e-3)
    np.testing.assert_allclose(found, adversarial_input_margin(model, inputs, batch_size=100), rtol=1e-4)


def test_margins_are_those_of_finite_differences():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 9), nn.Tanh(), nn.Linear(9, 4))
    inputs = inputs_of((3, 2, 2))
    expected = slow_margins(model, inputs, by_differences)
    np.testing.assert_allclose(adversarial_input_margin(model, inputs), expected, rtol=1e-4)


def test_margins_of_a_linear_model_are_distances_to_its_boundaries():
    random = np.random.default_rng(3)
    weight, bias, rows = random.normal(size=(6, 10)), random.normal(size=6), random.normal(size=(40, 10))
    model = nn.Linear(10, 6)
    with torch.no_grad():
        model.weight.copy_(torch.from_numpy(weight))
        model.bias.copy_(torch.from_numpy(bias))
    found = adversarial_input_margin(model, rows, batch_size=16)
    for row, margin in zip(rows, found, strict=True):
        logits = weight @ row + bias
        i = logits.argmax()
        away = {j: (logits[i] - logits[j]) / np.linalg.norm(weight[i] - weight[j]) for j in range(6) if j != i}
        nearest = min(away, key=away.get)
        assert margin == pytest.approx(away[nearest], rel=1e-4)
        # So far in the steepest direction the two classes tie, and no other has overtaken them.
        steepest = (weight[nearest] - weight[i]) / np.linalg.norm(weight[nearest] - weight[i])
        there = weight @ (row + margin * steepest) + bias
        assert there[i] == pytest.approx(there[nearest], abs=1e-4)
        assert there[i] >= there.max() - 1e-4


def linear(weight, bias):
    model = nn.Linear(len(weight[0]), len(weight))
    model.weight.data, model.bias.data = torch.tensor(weight), torch.tensor(bias)
    return model


def test_what_ties_and_flat_gaps_give():
    rows = np.ones((1, 2))
    # Logits 3, 2, 1: the gap to the second does not change with the input, that to the third does, by √2.
    assert adversarial_input_margin(linear([[1.0, 1.0], [1.0, 1.0], [0.0, 0.0]], [1.0, 0.0, 1.0]), rows) == [
        np.float32(2 / math.sqrt(2))
    ]
    # No gap changes with the input.
    assert adversarial_input_margin(linear([[1.0, 1.0], [1.0, 1.0]], [1.0, 0.0]), rows) == [np.inf]
    # A tie, with a gradient and without.
    assert adversarial_input_margin(linear([[1.0, 0.0], [0.0, 1.0]], [0.0, 0.0]), rows) == [0]
    assert adversarial_input_margin(linear([[1.0, 0.0], [1.0, 0.0]], [0.0, 0.0]), rows) == [0]
    # Units that are dead at some points: the gradient is 0 there alone.
    dead = nn.Sequential(nn.ReLU(), linear([[1.0, 0.0], [0.0, 1.0]], [1.0, 0.0]))
    found = adversarial_input_margin(dead, np.array([[-1.0, -2.0], [1.0, 1.0]]))
    assert found.tolist() == [np.inf, np.float32(1 / math.sqrt(2))]


def test_a_model_that_does_not_look_at_its_input_is_infinitely_far_from_another_class():
    class Constant(nn.Module):
        def forward(self, inputs):
            return torch.arange(3.0).repeat(len(inputs), 1)

    assert adversarial_input_margin(Constant(), np.zeros((2, 4))).tolist() == [np.inf, np.inf]


@given(st.floats(0.01, 100), st.integers(0, 1000))
def test_the_scale_of_the_logits_changes_nothing_and_that_of_the_inputs_all(scale, seed):
    torch.manual_seed(seed)
    first, last = nn.Linear(5, 8), nn.Linear(8, 3)
    rows = inputs_of((5,), seed=seed)
    found = adversarial_input_margin(nn.Sequential(first, nn.Tanh(), last), rows)
    scaled = copy.deepcopy(last)
    with torch.no_grad():
        scaled.weight.mul_(scale), scaled.bias.mul_(scale)
    np.testing.assert_allclose(
        adversarial_input_margin(nn.Sequential(first, nn.Tanh(), scaled), rows), found, rtol=1e-2, atol=1e-6
    )
    with torch.no_grad():
        first.weight.div_(scale)
    wider = adversarial_input_margin(nn.Sequential(first, nn.Tanh(), last), rows * scale)
    np.testing.assert_allclose(wider, found * scale, rtol=1e-2, atol=1e-6 * scale)


def test_what_is_given_stays_as_it_is():
    """In-place layers, batch statistics, modes, gradients, the caller's no_grad, arrays that are only to be read."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.ReLU(inplace=True), nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(inplace=True), nn.Dropout(), nn.Linear(8, 3)
    )
    model[2].running_mean.uniform_(-1, 1)
    model.train()
    model[4].eval()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    rows = inputs_of((6,))
    before = rows.clone()
    with torch.no_grad():
        found = adversarial_input_margin(model, rows, batch_size=4)
    np.testing.assert_allclose(found, slow_margins(model, rows, by_jacrev), rtol=1e-4)
    assert torch.equal(rows, before) and not rows.requires_grad
    assert [layer.training for layer in model] == [True, True, True, True, False, True]
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    stored = rows.numpy().astype(np.float64)
    stored.flags.writeable = False
    np.testing.assert_array_equal(adversarial_input_margin(model, stored, batch_size=4), found)
    assert adversarial_input_margin(model, rows[:0]).shape == (0,)


@pytest.mark.parametrize("bad", [1, 4])
def test_a_point_without_a_finite_margin_is_named(bad):
    class Root(nn.Module):
        def forward(self, inputs):
            return torch.stack([inputs.sum(1), inputs.clamp(-9, 1e9).sqrt().sum(1) + 7], dim=1)

    rows = np.ones((6, 2))
    rows[bad] = 0  # where the slope is infinite
    with pytest.raises(LeadlineError, match=f"point {bad} "):
        adversarial_input_margin(Root(), rows, batch_size=2)
    rows[bad] = -1  # where there is no value
    with pytest.raises(LeadlineError, match=f"point {bad} "):
        adversarial_input_margin(Root(), rows, batch_size=2)


@pytest.mark.parametrize("model", [nn.Linear(4, 1), nn.Unflatten(1, (2, 2)), nn.LSTM(4, 4)])
def test_outputs_that_are_not_logits_are_refused(model):
    with pytest.raises(LeadlineError, match="model: it returns"):
        adversarial_input_margin(model, np.ones((3, 4)))


def test_the_entropy_of_an_ensemble_is_that_of_its_mean_softmax():
    random = np.random.default_rng(0)
    logits = random.normal(0, 4, (5, 60, 7)).astype(np.float32)
    where = random.random((5, 60)) < 0.5
    where[:, 0], where[:, 1] = False, True
    logits[0, 1] = [900, -900, 0, 0, 0, 0, 0]  # a softmax that underflows
    logits[~where] = np.nan  # not to be looked at
    found = ensemble_entropy(iter(logits), where)
    assert np.isnan(found[~where.any(axis=0)]).all() and not where[:, 0].any()
    for point in np.flatnonzero(where.any(axis=0)):
        wide = logits[where[:, point], point].astype(np.float64)
        shares = np.exp(wide - wide.max(axis=1, keepdims=True))
        shares /= shares.sum(axis=1, keepdims=True)
        assert found[point] == pytest.approx(entropy(shares.mean(axis=0)))
        # Concave: never below the mean of the members' own.
        assert found[point] >= summarise_logits(logits[where[:, point], point]).entropy.mean() - 1e-6


def test_members_that_are_sure_of_different_classes_are_together_unsure():
    logits = 50.0 * np.eye(4)[:, None, :]  # member i is sure of class i
    assert ensemble_entropy(logits, np.ones((4, 1), bool)) == pytest.approx(math.log(4))


def test_logits_that_do_not_fit_are_refused():
    with pytest.raises(LeadlineError, match="logits"):
        ensemble_entropy([np.zeros((3, 2))], np.ones((1, 4), bool))
    with pytest.raises(LeadlineError, match="logits"):
        ensemble_entropy([np.zeros(4)], np.ones((1, 4), bool))
    with pytest.raises(ValueError, match="shorter"):
        ensemble_entropy([np.zeros((4, 2))], np.ones((2, 4), bool))
