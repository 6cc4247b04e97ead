"""Checkpoints of a training as entries of members."""

import pytest
from tiny import STUDIED, TINY

from leadline import LeadlineError
from leadline.config import load_config

ENTRY = STUDIED["members"][0]
OWN = {
    "architecture": "mlp", "name": "early", "parameters": {"width": 24, "depth": 3}, "count": 3,
    "weights": "w-{seed}.pt", "checkpoint": {"of": "mlp", "step": 5},
}  # fmt: skip


def with_members(*entries):
    return {**STUDIED, "members": list(entries)}


def test_each_step_is_an_entry_of_its_own_after_all_final_networks():
    config = load_config(with_members({**ENTRY, "at_steps": [20, 0, 20]}, {**ENTRY, "name": "other", "at_steps": [7]}))
    named = {entry.label: entry for entry in config.members}
    assert list(named) == ["mlp", "other", "mlp-at-0", "mlp-at-20", "other-at-7"]
    assert [entry.training.steps for entry in config.members] == [300, 300, 0, 20, 7]
    assert [entry.checkpoint and (entry.checkpoint.of, entry.checkpoint.step) for entry in config.members] == [
        None, None, ("mlp", 0), ("mlp", 20), ("other", 7),
    ]  # fmt: skip
    assert all(not entry.at_steps for entry in config.members)
    # What is trained is the same training, which ends sooner and is not watched.
    final = named["mlp"].model_dump()
    for step in (0, 20):
        entry = named[f"mlp-at-{step}"].model_dump()
        assert {key for key in entry if entry[key] != final[key]} == {"name", "training", "checkpoint"}
        training = entry["training"]
        assert {key for key in training if training[key] != final["training"][key]} == {"steps", "learning"}
        assert training["learning"] is None


def test_a_record_loaded_again_gives_the_same_entries():
    config = load_config(STUDIED)
    record = config.record()
    assert [entry["name"] for entry in record["members"]] == [None, "mlp-at-0", "mlp-at-20"]
    again = load_config(record)
    assert again.members == config.members and again.fingerprint() == config.fingerprint()
    assert load_config(with_members({**ENTRY, "at_steps": [20, 0]})).fingerprint() == config.fingerprint()
    assert load_config(with_members({**ENTRY, "at_steps": [0]})).fingerprint() != config.fingerprint()


def test_weights_of_ones_own_are_checkpoints_too():
    early = load_config(with_members(TINY["members"][0], OWN)).members[1]
    assert (early.checkpoint.of, early.checkpoint.step) == ("mlp", 5)


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ([{**ENTRY, "at_steps": [0, 300]}], ["members.0", "at_steps are before the last of 300 steps"]),
        ([{**ENTRY, "at_steps": [-1]}], ["members.0.at_steps.0", "greater than or equal to 0", "-1"]),
        ([{**ENTRY, "at_steps": 5}], ["members.0.at_steps", "5"]),
        ([{"architecture": "mlp", "weights": "w.pt", "at_steps": [0]}], ["members.0", "at_steps needs training"]),
        ([{"architecture": "mlp", "at_steps": [0]}], ["members.0", "at_steps needs training"]),
        ([ENTRY, {**ENTRY, "name": "mlp-at-20", "at_steps": []}], ["same name"]),
        ([{"architecture": "mlp", "checkpoint": {"of": "vgg", "step": 1}}], ["checkpoint", "has the name vgg"]),
        ([{**OWN, "name": "mlp"}], ["checkpoint", "the name mlp and is a network at its last step"]),
        ([TINY["members"][0], {**OWN, "count": 2}], ["checkpoint", "early has another count than mlp"]),
        ([TINY["members"][0], {**OWN, "seed": 1}], ["checkpoint", "early has another seed than mlp"]),
        ([TINY["members"][0], {**OWN, "split": {"kind": "part"}}], ["checkpoint", "another split than mlp"]),
        ([TINY["members"][0], {**OWN, "probes": "auto"}], ["checkpoint", "another probes than mlp"]),
        ([{"architecture": "mlp", "checkpoint": {"of": "mlp"}}], ["members.0.checkpoint.step: required"]),
        ([{"architecture": "mlp", "checkpoint": {"of": "mlp", "step": -3}}], ["members.0.checkpoint.step", "-3"]),
    ],
)
def test_what_is_refused_of_checkpoints(entries, words):
    with pytest.raises(LeadlineError) as caught:
        load_config(with_members(*entries))
    for word in words:
        assert word in str(caught.value), caught.value
    assert len(str(caught.value).splitlines()) == 1


def test_the_precision_of_forward_passes_is_part_of_what_a_run_is():
    exact, rounded = load_config(TINY), load_config({**TINY, "precision": "bfloat16"})
    assert exact.record() == {**rounded.record(), "precision": "float32"}
    assert exact.fingerprint() != rounded.fingerprint()
    with pytest.raises(LeadlineError, match=r"precision: Input should be 'float32' or 'bfloat16'.* 'half'") as caught:
        load_config({**TINY, "precision": "half"})
    assert len(str(caught.value).splitlines()) == 1


def test_nvjpeg_is_for_workers_with_a_gpu_and_is_part_of_what_a_run_is():
    images = {**TINY, "points": {"source": "image-folder", "train": "images", "decoder": "nvjpeg"}}
    with pytest.raises(LeadlineError, match=r"points\.decoder: nvjpeg decodes on a GPU; set engine\.gpus") as caught:
        load_config(images)
    assert len(str(caught.value).splitlines()) == 1
    config = load_config({**images, "engine": {"gpus": 1}})
    assert config.record()["points"]["decoder"] == "nvjpeg"
    with pytest.raises(LeadlineError, match=r"points\.decoder: no such key"):
        load_config({**TINY, "points": {"source": "digits", "decoder": "nvjpeg"}})


@pytest.mark.parametrize(
    "change",
    [
        {"method": "flat"}, {"reduction": {"hidden.0": "jl:8"}}, {"votes": "until-decided"},
        {"engine": {"placement": "device", "keep_indexes": True}},
    ],
)  # fmt: skip
def test_what_needs_embeddings_again_is_refused_where_none_are_kept(change):
    with pytest.raises(LeadlineError, match=r"engine\.placement: device keeps no embeddings"):
        load_config({**TINY, "engine": {"placement": "device"}, **change})
