"""Training: it learns real digits, does what the recipe says, and gives the same bits again."""

import numpy as np
import pytest
import torch
from torch import nn

from leadline.config import Corruption, Digits, Learning, NpyPoints, RandomSplit, Training
from leadline.errors import LeadlineError
from leadline.members import train as train_module
from leadline.members.architectures import build
from leadline.members.splits import training_ids
from leadline.members.train import checkpoint_steps, resolve_precision, steps_per_epoch, train
from leadline.members.weights import weights_fingerprint
from leadline.points import open_points

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def digits():
    return open_points(Digits(source="digits"))


@pytest.fixture(scope="module")
def ids(digits):
    return training_ids(RandomSplit(), digits.parts, seed=0)


def mlp(seed=0):
    return build("mlp", {"width": 32, "depth": 3}, (1, 8, 8), 10, seed)


def trained(digits, ids, seed=0, model_seed=0, **recipe):
    model = mlp(model_seed)
    train(model, digits, ids, Training(**{"steps": 8, "precision": "float32", **recipe}), seed, "cpu")
    return model


def numbered_points(folder, n):
    """Points whose input is their id, in two classes."""
    np.save(folder / "inputs.npy", np.arange(n, dtype=np.float32)[:, None])
    np.save(folder / "labels.npy", np.arange(n) % 2)
    return open_points(NpyPoints(source="npy", inputs=folder / "inputs.npy", labels=folder / "labels.npy"))


def batches(points, ids, batch, steps, seed=0):
    """The ids that each step sees."""
    model, seen = nn.Linear(1, 2), []
    model.register_forward_pre_hook(lambda module, args: seen.append(args[0][:, 0].int().tolist()))
    recipe = Training(steps=steps, batch=batch, learning_rate=1e-9, precision="float32")
    train(model, points, ids, recipe, seed, "cpu")
    return seen


@pytest.mark.parametrize(
    ("architecture", "parameters", "recipe"),
    [
        ("mlp", {"width": 64}, {"steps": 200, "precision": "float32"}),
        ("mlp", {"width": 64}, {"steps": 200, "precision": "bfloat16"}),
        ("resnet18", {"width": 4}, {"steps": 120, "milestones": (100,)}),
        ("vgg16", {"width": 8, "norm": "batch"}, {"steps": 120}),
    ],
)
def test_learns_digits(digits, ids, architecture, parameters, recipe):
    model = build(architecture, parameters, digits.input_shape, 10, seed=0)
    train(model, digits, ids, Training(**recipe), 0, "cpu")
    held_out = np.setdiff1d(np.arange(len(digits)), ids)
    assert not any(module.training for module in model.modules())
    with torch.no_grad():
        predictions = model(torch.as_tensor(digits.read(held_out))).argmax(1).numpy()
    assert (predictions == digits.labels[held_out]).mean() > 0.9


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_same_seed_same_bits(digits, ids, precision):
    def fingerprint(seed):
        model = build("resnet18", {"width": 4, "depth": [1, 1, 1, 1]}, digits.input_shape, 10, 0)
        train(model, digits, ids, Training(steps=5, precision=precision), seed, "cpu")
        return weights_fingerprint(model)

    assert fingerprint(seed=1) == fingerprint(seed=1) != fingerprint(seed=2)


def test_dropout_follows_the_seed_and_leaves_the_callers_random_state(digits, ids):
    def fingerprint(callers_seed):
        model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 10))
        nn.init.zeros_(model[2].weight), nn.init.zeros_(model[2].bias)
        torch.manual_seed(callers_seed)
        expected = torch.rand(3)
        torch.manual_seed(callers_seed)
        train(model, digits, ids, Training(steps=4), 5, "cpu")
        assert torch.equal(torch.rand(3), expected)
        return weights_fingerprint(model)

    assert fingerprint(callers_seed=1) == fingerprint(callers_seed=2)


def test_recipe_is_sgd_with_momentum_and_milestones(digits, ids):
    few = ids[:50]  # one batch an epoch, so the order of the points does not matter
    model = trained(digits, few, steps=9, learning_rate=0.03, momentum=0.8, milestones=(4, 7), decay=0.1)
    expected = mlp().double()
    inputs, labels = torch.as_tensor(digits.read(few)).double(), torch.as_tensor(digits.labels[few]).long()
    velocity = [torch.zeros_like(p) for p in expected.parameters()]
    for step in range(9):
        rate = 0.03 * (1 if step < 4 else 0.1 if step < 7 else 0.01)
        log_softmax = torch.log(torch.softmax(expected(inputs), 1))
        loss = -log_softmax[torch.arange(50), labels].mean()
        gradients = torch.autograd.grad(loss, list(expected.parameters()))
        with torch.no_grad():
            for i, parameter in enumerate(expected.parameters()):
                velocity[i] = 0.8 * velocity[i] + gradients[i]
                parameter -= rate * velocity[i]
    for parameter, reference in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(parameter.double(), reference, atol=1e-5, rtol=1e-4)
    other = trained(digits, few, steps=9, learning_rate=0.03, momentum=0.8)
    assert not torch.allclose(next(other.parameters()), next(model.parameters()), atol=1e-4)


def test_given_labels_are_learned_not_the_clean_ones(ids):
    points = open_points(Digits(source="digits", corrupt=Corruption(share=1.0, seed=0)))
    few = ids[:40]
    model = trained(points, few, steps=300)
    with torch.no_grad():
        predictions = model(torch.as_tensor(points.read(few))).argmax(1).numpy()
    assert (predictions == points.labels[few]).mean() > 0.9
    assert (points.labels[few] != points.clean_labels[few]).mean() > 0.5


def test_batches_are_epochs_without_replacement(tmp_path):
    points = numbered_points(tmp_path, 40)
    ids = np.arange(3, 38, 2)  # 18 points: three batches of 5 an epoch, 3 points left out of each
    seen = batches(points, ids, batch=5, steps=12)
    epochs = [[*seen[start], *seen[start + 1], *seen[start + 2]] for start in range(0, 12, 3)]
    assert [len(batch) for batch in seen] == [5] * 12
    for epoch in epochs:
        assert len(set(epoch)) == 15 and set(epoch) <= set(ids.tolist())
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert len({frozenset(epoch) for epoch in epochs}) > 1  # not always the same points are left out
    assert batches(points, ids, batch=5, steps=12) == seen != batches(points, ids, batch=5, steps=12, seed=1)


def test_an_incomplete_batch_is_kept_where_it_is_the_only_one(tmp_path):
    points = numbered_points(tmp_path, 8)
    seen = batches(points, np.arange(6), batch=128, steps=3)
    assert [sorted(batch) for batch in seen] == [list(range(6))] * 3
    assert [len(batch) for batch in batches(points, np.arange(6), batch=6, steps=3)] == [6] * 3


def test_points_that_are_read_anew_each_batch_train_the_same(digits, ids, monkeypatch):
    expected = weights_fingerprint(trained(digits, ids))
    monkeypatch.setattr(train_module, "RESIDENT_BYTES", 0)
    assert weights_fingerprint(trained(digits, ids)) == expected


def test_precision(digits, ids):
    assert resolve_precision("float32", "cpu") == "float32"
    assert resolve_precision("bfloat16", "cpu") == "bfloat16"
    auto = resolve_precision("auto", torch.device("cpu"))
    fingerprints = {p: weights_fingerprint(trained(digits, ids, precision=p)) for p in ("float32", "bfloat16", "auto")}
    assert fingerprints["auto"] == fingerprints[auto]
    assert fingerprints["float32"] != fingerprints["bfloat16"]


class Noisy(nn.Module):
    """Draws random numbers in eval mode too."""

    def forward(self, x):
        return x + 0.1 * torch.rand_like(x)


def layers():
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Flatten(), Noisy(), nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.3), nn.Linear(32, 10)
    )


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_training_that_is_watched_gives_the_same_bits(digits, ids, precision):
    recipe, inputs, seen = Training(steps=9, precision=precision), torch.as_tensor(digits.read(ids[:100])), {}
    plain = layers()
    train(plain, digits, ids, recipe, 0, "cpu")
    model = layers()

    def watch(step):
        assert not any(module.training for module in model.modules())
        seen[step] = weights_fingerprint(model)
        model(inputs)

    train(model, digits, ids, recipe, 0, "cpu", (0, 2, 9), watch)
    assert seen[9] == weights_fingerprint(model) == weights_fingerprint(plain) and not model.training
    assert list(seen) == [0, 2, 9] and seen[0] == weights_fingerprint(layers())
    shorter = layers()
    train(shorter, digits, ids, Training(steps=2, precision=precision), 0, "cpu")
    assert seen[2] == weights_fingerprint(shorter) and len(set(seen.values())) == 3


@pytest.mark.parametrize("n_points", [5, 8, 20, 27])
def test_steps_of_an_epoch_are_its_batches(tmp_path, n_points):
    seen, n = batches(numbered_points(tmp_path, 30), np.arange(n_points), 8, 12), steps_per_epoch(n_points, 8)
    epochs = [[point for batch in seen[first : first + n] for point in batch] for first in range(0, 12, n)]
    assert all(len(set(epoch)) == len(epoch) for epoch in epochs)
    assert n_points < 8 + len(epochs[0])  # all of it but an incomplete batch


@pytest.mark.parametrize(
    ("steps", "steps_per_epoch", "learning", "expected"),
    [
        (0, 7, {}, [0]),
        (1, 7, {}, [0, 1]),
        (10, 4, {"per_decade": 1, "per_epoch": 0}, [0, 1, 10]),
        (1234, 4, {"per_decade": 1, "per_epoch": 0}, [0, 1, 10, 100, 1000, 1234]),
        (100, 4, {"per_decade": 3, "per_epoch": 0}, [0, 1, 2, 5, 10, 22, 46, 100]),
        (10, 4, {"per_decade": 1, "per_epoch": 1}, [0, 1, 4, 8, 10]),
        (10, 5, {"per_decade": 1, "per_epoch": 3}, [0, 1, 2, 3, 5, 7, 8, 10]),
        (6, 2, {"per_decade": 1, "per_epoch": 9}, [0, 1, 2, 3, 4, 5, 6]),
    ],
)
def test_checkpoints(steps, steps_per_epoch, learning, expected):
    assert checkpoint_steps(steps, steps_per_epoch, Learning(**learning)) == expected


def test_no_steps(digits, ids):
    model = mlp()
    before = weights_fingerprint(model)
    train(model, digits, ids, Training(steps=0), 0, "cpu")
    assert weights_fingerprint(model) == before and not model.training


class Poisoned(nn.Linear):
    """Gives NaN at the step `at`."""

    def __init__(self, at):
        super().__init__(64, 10)
        self.at = at

    def forward(self, x):
        self.at -= 1
        return super().forward(x.flatten(1)) * (float("nan") if self.at == -1 else 1)


@pytest.mark.parametrize("step", [0, 3, 49, 50, 60])
def test_a_loss_that_is_not_finite_names_its_step(digits, ids, step):
    with pytest.raises(LeadlineError, match=rf"the loss is nan at step {step}; use a learning rate lower than 0.5"):
        train(Poisoned(step), digits, ids[:50], Training(steps=61, learning_rate=0.5), 0, "cpu")


def test_a_learning_rate_that_is_far_too_high(digits, ids):
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    with pytest.raises(LeadlineError, match=r"at step 1; use a learning rate lower than 1e\+38"):
        train(model, digits, ids[:50], Training(steps=5, learning_rate=1e38), 0, "cpu")


class Pair(nn.Linear):
    def forward(self, x):
        return super().forward(x.flatten(1)), None


@pytest.mark.parametrize(
    ("model", "n_ids", "words"),
    [
        (mlp(), 0, "0 points"),
        (nn.Flatten(), 50, "0 parameters"),
        (Pair(64, 10), 50, "returns tuple in training mode"),
        (nn.Linear(8, 10), 50, r"shape \(50, 1, 8, 10\) for 50 points"),
        (build("mlp", {"width": 8}, (1, 8, 8), 4, 0), 50, r"shape \(50, 4\) for 50 points of classes 0 to 9"),
    ],
)
def test_what_cannot_be_trained(digits, ids, model, n_ids, words):
    with pytest.raises(LeadlineError, match=words) as caught:
        train(model, digits, ids[:n_ids], Training(steps=2), 0, "cpu")
    assert "\n" not in str(caught.value)
