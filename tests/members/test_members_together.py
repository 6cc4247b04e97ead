"""Several members trained at once: each is the training that it has alone."""

import numpy as np
import pytest
import torch
from torch import nn

from leadline.config import Digits, RandomSplit, Training
from leadline.errors import LeadlineError
from leadline.members.architectures import build
from leadline.members.splits import training_ids
from leadline.members.together import train_together
from leadline.members.train import train
from leadline.members.weights import weights_fingerprint
from leadline.points import open_points

pytestmark = pytest.mark.usefixtures("one_thread")

SEEDS = (3, 4, 9)
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="graphs are CUDA's")


@pytest.fixture(scope="module")
def digits():
    return open_points(Digits(source="digits"))


@pytest.fixture(scope="module")
def splits(digits):
    """Of different sizes, so that epochs end at different steps."""
    return [training_ids(RandomSplit(), digits.parts, seed=seed)[: 300 + 100 * i] for i, seed in enumerate(SEEDS)]


def models(architecture, parameters):
    return [build(architecture, parameters, (1, 8, 8), 10, seed) for seed in SEEDS]


def values(model):
    """Weights and running statistics, as one vector."""
    state = model.state_dict().values()
    return torch.cat([value.detach().double().flatten() for value in state if value.is_floating_point()])


def change(model, start):
    return values(model) - values(start)


NETWORKS = [
    ("mlp", {"width": 48, "depth": 5}),
    ("resnet18", {"width": 4, "depth": [1, 1, 1, 1]}),
    ("resnet18", {"width": 4, "depth": [1, 1, 1, 1], "norm": "batch"}),
    ("vgg16", {"width": 4}),
]


@pytest.mark.parametrize(("architecture", "parameters"), NETWORKS)
def test_each_is_the_member_that_is_trained_alone(digits, splits, architecture, parameters):
    recipe = Training(steps=24, batch=64, learning_rate=0.01, milestones=(10,), precision="float32")
    together, alone, start = (models(architecture, parameters) for _ in range(3))
    train_together(together, digits, splits, recipe, SEEDS, "cpu")
    for model, ids, seed in zip(alone, splits, SEEDS, strict=True):
        train(model, digits, ids, recipe, seed, "cpu")
    for model, expected, before in zip(together, alone, start, strict=True):
        moved = change(expected, before)
        assert (values(model) - values(expected)).norm() < 1e-4 * moved.norm() and moved.norm() > 0.01
        assert not any(module.training for module in model.modules())
        counted = [value for value in model.state_dict().values() if not value.is_floating_point()]
        assert all(int(value) == recipe.steps for value in counted)
    assert (change(together[0], start[0]) - change(alone[1], start[1])).norm() > 0.1 * change(alone[1], start[1]).norm()


@pytest.mark.parametrize(("architecture", "parameters"), NETWORKS[:3])
def test_bfloat16_is_rounded_and_stays_near(digits, splits, architecture, parameters):
    """Products are rounded to 2^-8: not float32's weights, and near those of bfloat16 alone, rounded elsewhere."""
    trained = {}
    for precision in ("float32", "bfloat16"):
        recipe = Training(steps=6, batch=64, learning_rate=0.01, precision=precision)
        together = models(architecture, parameters)
        train_together(together, digits, splits, recipe, SEEDS, "cpu")
        trained[precision] = together
    recipe = Training(steps=6, batch=64, learning_rate=0.01, precision="bfloat16")
    for number, (start, seed) in enumerate(zip(models(architecture, parameters), SEEDS, strict=True)):
        alone = models(architecture, parameters)[number]
        train(alone, digits, splits[number], recipe, seed, "cpu")
        moved = change(alone, start).norm()
        from_alone = (values(trained["bfloat16"][number]) - values(alone)).norm() / moved
        from_float32 = (values(trained["bfloat16"][number]) - values(trained["float32"][number])).norm() / moved
        assert 1e-3 < from_float32 < 0.3 and from_alone < 0.3


def test_learns_digits(digits, splits):
    together = models("mlp", {"width": 64, "depth": 3})
    train_together(together, digits, splits, Training(steps=200), SEEDS, "cpu")
    for model, ids in zip(together, splits, strict=True):
        held_out = np.setdiff1d(np.arange(len(digits)), ids)
        with torch.no_grad():
            predictions = model(torch.as_tensor(digits.read(held_out))).argmax(1).numpy()
        assert (predictions == digits.labels[held_out]).mean() > 0.85


def test_dropout_differs_from_member_to_member_and_leaves_the_callers_random_state(digits, splits):
    def trained(callers_seed):
        alike = [nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 10)) for _ in range(2)]
        for model in alike:
            nn.init.zeros_(model[2].weight), nn.init.zeros_(model[2].bias)
        torch.manual_seed(callers_seed)
        expected = torch.rand(3)
        torch.manual_seed(callers_seed)
        train_together(alike, digits, [splits[0]] * 2, Training(steps=3), (5, 5), "cpu")
        assert torch.equal(torch.rand(3), expected)
        return [weights_fingerprint(model) for model in alike]

    first, second = trained(callers_seed=1)
    assert first != second
    assert trained(callers_seed=2) == [first, second]


def test_watched_at_steps(digits, splits):
    recipe, seen = Training(steps=5, precision="float32"), {}
    watched, plain, shorter = (models("resnet18", {"width": 4, "depth": [1, 1, 1, 1]}) for _ in range(3))

    def watch(step):
        assert not any(module.training for model in watched for module in model.modules())
        seen[step] = [weights_fingerprint(model) for model in watched]

    before = [weights_fingerprint(model) for model in watched]
    train_together(watched, digits, splits, recipe, SEEDS, "cpu", (0, 2, 5), watch)
    train_together(plain, digits, splits, recipe, SEEDS, "cpu")
    train_together(shorter, digits, splits, Training(steps=2, precision="float32"), SEEDS, "cpu")
    assert seen == {
        0: before,
        2: [weights_fingerprint(model) for model in shorter],
        5: [weights_fingerprint(model) for model in plain],
    }


def test_a_weight_that_is_frozen_stays(digits, splits):
    together = models("mlp", {"width": 16, "depth": 3})
    for model in together:
        model.hidden[0].weight.requires_grad_(False)
    before = [model.hidden[0].weight.clone() for model in together]
    train_together(together, digits, splits, Training(steps=3), SEEDS, "cpu")
    for model, weight, start in zip(together, before, models("mlp", {"width": 16, "depth": 3}), strict=True):
        assert torch.equal(model.hidden[0].weight, weight)
        assert not torch.equal(model.hidden[1].weight, start.hidden[1].weight)


def test_a_loss_that_is_not_finite_names_the_seed_and_the_step(digits, splits):
    together = models("mlp", {"width": 16, "depth": 3})
    with torch.no_grad():
        together[1].classifier.bias[0] = float("nan")
    with pytest.raises(LeadlineError, match=r"the loss of the model with seed 4 is nan at step 0; use a learning rate"):
        train_together(together, digits, splits, Training(steps=3), SEEDS, "cpu")


@pytest.mark.parametrize(
    ("n_ids", "words"),
    [
        ((300, 20, 300), "splits of 20 to 300 points give batches of 20 to 128.*leave at_once out"),
        ((300, 0, 300), "0 points"),
    ],
)
def test_what_cannot_be_trained_at_once(digits, splits, n_ids, words):
    ids = [of_one[:n] for of_one, n in zip(splits, n_ids, strict=True)]
    with pytest.raises(LeadlineError, match=words):
        train_together(models("mlp", {"width": 16}), digits, ids, Training(steps=3), SEEDS, "cpu")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_cuda)])
@pytest.mark.parametrize(("architecture", "parameters"), NETWORKS[:2])
def test_a_replayed_step_is_the_same_step(digits, splits, device, architecture, parameters):
    """Rates are cut before the first graph is captured and after it; one step is watched."""
    recipe, watched = Training(steps=12, batch=64, milestones=(2, 7), precision="float32"), []

    def trained(replay):
        alone, together = models(architecture, parameters), models(architecture, parameters)
        for model, ids, seed in zip(alone, splits, SEEDS, strict=True):
            train(model, digits, ids, recipe, seed, device, (5,), watched.append, replay=replay)
        train_together(together, digits, splits, recipe, SEEDS, device, (5,), watched.append, replay=replay)
        return [values(model.cpu()) for model in (*alone, *together)]

    for step, replayed in zip(trained(replay=False), trained(replay=True), strict=True):
        torch.testing.assert_close(replayed, step, rtol=1e-5, atol=1e-6)
    assert watched == [5] * 8


@needs_cuda
def test_a_step_that_cannot_be_captured_is_told(digits, splits):
    class Waiting(nn.Sequential):
        def forward(self, inputs):
            return super().forward(inputs * (1 + 0 * inputs.sum().item()))

    model = Waiting(nn.Flatten(), nn.Linear(64, 10))
    with pytest.raises(LeadlineError, match=r"training\.cuda_graph: .* leave cuda_graph out"):
        train(model, digits, splits[0], Training(steps=9), 0, "cuda", replay=True)
