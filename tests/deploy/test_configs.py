"""Configurations that come with the project: the presets, and those for clusters in jobs/configs."""

from pathlib import Path

import pytest
import torch

from leadline.config import load_config, preset_names
from leadline.embedding.reductions import check_patterns, choose_reductions
from leadline.members.architectures import build
from leadline.members.probes import place_probes

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "jobs" / "configs").glob("*.yaml"))
PAPER = ("cifar10", "cifar100", "fashion-mnist", "svhn")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configurations_for_clusters_load(path):
    config = load_config(path)
    assert config.name == path.stem
    # What makes it one for clusters: it names the storage that all nodes mount.
    assert config.points.train.is_relative_to("/shared")


def test_no_configuration_is_there_twice():
    configs = [load_config(source) for source in (*preset_names(), *CONFIGS)]
    assert len({config.name for config in configs}) == len(configs)
    assert len({config.model_copy(update={"name": "any"}).fingerprint() for config in configs}) == len(configs)


def test_the_papers_protocol_is_the_same_for_its_four_data_sets():
    first, *others = (load_config(name) for name in PAPER)
    assert [load_config(name).points.source for name in PAPER] == list(PAPER)
    assert all((config.members, config.engine, config.k) == (first.members, first.engine, first.k) for config in others)
    assert {(m.count, m.split.share, m.training.batch) for m in first.members} == {(250, 0.9, 128)}
    recipes = [member.training for member in first.members]
    assert {(t.learning_rate, t.momentum, t.decay) for t in recipes} == {(0.04, 0.9, 0.2)}
    milestones = {member.architecture: member.training.milestones for member in first.members}
    assert milestones == {"mlp": (1250, 4000, 12000), "vgg16": (1000, 5000), "resnet18": (7000,)}
    assert (first.k, first.leave_one_out, first.method, first.reduction) == (30, True, "exact", "none")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_probes_and_reductions_of_torchvisions_networks(path):
    """Every pattern matches, as a run checks before it begins; without the weights, which are downloaded."""
    config = load_config(path)
    shape = (3, config.points.crop, config.points.crop)
    names = []
    for member in config.members:
        model = build(member.architecture, {}, shape, 1000, 0)
        placed = place_probes(model, member.placement, torch.zeros(1, *shape))
        probes = choose_reductions(config.reduction, placed)
        names += [probe.name for probe in probes]
        # Nothing that is wider than a few thousand is kept in full.
        assert all(probe.reduction != "none" for probe in probes if probe.width > 4096)
    check_patterns(config.reduction, list(dict.fromkeys(names)))
