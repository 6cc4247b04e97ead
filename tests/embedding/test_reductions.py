"""Reductions against independent computations on digits, and whole runs that are made with them."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.linalg import subspace_angles
from scipy.spatial.distance import pdist
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from tiny import TINY, tables_of
from torch import nn
from torch.utils.data import TensorDataset

import leadline
from leadline import LeadlineError
from leadline.cluster.units import embed, train
from leadline.cluster.work import list_members
from leadline.cluster.workbench import Workbench
from leadline.config import load_config
from leadline.embedding import embed_batch, extract, fit_directions, signs
from leadline.embedding.principal import principal_directions
from leadline.embedding.reductions import (
    Reduction,
    check_patterns,
    choose_reductions,
    make_reducers,
    parse_reduction,
    stored_width,
)
from leadline.embedding.signs import packed_signs, project, spell_out
from leadline.members.architectures import build
from leadline.members.probes import Probe, place_probes
from leadline.store import RunDirectory
from leadline.store.verify import verify

CPU = torch.device("cpu")
SHAPE = (1, 8, 8)
# The stem and the first block are [4, 8, 8], the others [8, 4, 4], [16, 2, 2] and [32, 1, 1].
NETWORK = {"width": 4, "depth": [1, 1, 1, 1]}


@pytest.fixture(scope="module")
def images():
    return torch.tensor(load_digits().data.reshape(-1, *SHAPE) / 16, dtype=torch.float32)


@pytest.fixture(scope="module")
def wide(images):
    """A layer of 1,024 values: an untrained convolution of the digits."""
    torch.manual_seed(0)
    with torch.no_grad():
        return nn.Conv2d(1, 16, 3, padding=1)(images).flatten(1)


@pytest.fixture(scope="module")
def network(images):
    model = build("resnet18", NETWORK, SHAPE, 10, 0)
    return model, place_probes(model, None, images[:1])


# What a reduction is called


@pytest.mark.parametrize(
    ("text", "reduction"),
    [
        ("none", Reduction("none")),
        ("pca:256", Reduction("pca", (256,))),
        ("jl:1024", Reduction("jl", (1024,))),
        ("pool:2x3", Reduction("pool", (2, 3))),
    ],
)
def test_names_of_reductions(text, reduction):
    assert parse_reduction(text) == reduction
    assert str(reduction) == text


NEARLY = st.from_regex(r"(none|pca|jl|pool|PCA)?:?-?[0-9]*x?[0-9]*\s?", fullmatch=True)


@given(st.text() | NEARLY)
def test_anything_else_is_refused_in_one_line(text):
    try:
        reduction = parse_reduction(text)
    except LeadlineError as error:
        assert len(str(error).splitlines()) == 1 and "allowed: none, pca:M, jl:M, pool:HxW" in str(error)
    else:
        assert str(reduction) == text
        assert reduction.kind in ("none", "pca", "jl", "pool") and all(number > 0 for number in reduction.size)


@pytest.mark.parametrize(
    "text", ["", "pca", "pca:0", "jl:-4", "jl:1e3", "jl:007", "pool:2", "pool:2x", "pca:2x2", "jl:٣"]
)
def test_refused_names(text):
    with pytest.raises(LeadlineError, match="is no reduction"):
        parse_reduction(text)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("jl", r"reduction: 'jl' is no reduction"),
        (5, r"reduction: 5 is neither"),
        ({"stem": "jl:x"}, r"reduction: stem: 'jl:x' is no reduction"),
        ({"stem": 5}, r"reduction: 'stem': 5 is not"),
        ({"input": "pca:8"}, r"reduction: input: pca is fitted to each member"),
    ],
)
def test_a_configuration_says_what_is_wrong(given, words):
    with pytest.raises(LeadlineError, match=words) as caught:
        load_config({**TINY, "reduction": given})
    assert len(str(caught.value).splitlines()) == 1


def test_a_reduction_is_part_of_what_a_run_is():
    reduced = load_config(TINY, ("reduction=jl:8",))
    assert reduced.reduction == "jl:8"
    assert reduced.fingerprint() != load_config(TINY).fingerprint()


# Which probe gets which


def chosen(network, choice):
    return [probe.reduction for probe in choose_reductions(choice, network[1])]


def test_one_reduction_is_for_the_layers_that_are_wider(network):
    assert chosen(network, "jl:64") == ["none", "jl:64", "jl:64", "jl:64", "none", "none", "none"]
    pooled = choose_reductions("pool:2x2", network[1])
    assert [probe.reduction for probe in pooled] == ["none", "pool:2x2", "pool:2x2", "pool:2x2", "none", "none", "none"]
    assert [stored_width(probe) for probe in pooled] == [64, 16, 16, 32, 64, 32, 10]
    assert chosen(network, "pool:1x16") == ["none"] * 7  # never to more pixels than there are


def test_reductions_by_name(network):
    choice = {"input": "pool:4x4", "blocks.*.sum": "pca:40", "blocks.1.sum": "none", "softmax": "jl:5"}
    assert chosen(network, choice) == ["pool:4x4", "none", "pca:40", "none", "pca:40", "none", "jl:5"]
    assert chosen(network, {"*": "jl:8"}) == ["none", "jl:8", "none", "none", "none", "none", "none"]
    with pytest.raises(LeadlineError, match=r"blocks\.\*\.sum and blocks\.0\.\* contradict each other at blocks\.0"):
        chosen(network, {"blocks.*.sum": "pca:40", "blocks.0.*": "jl:8"})


def test_a_pool_takes_images(images):
    model = build("mlp", {"width": 32, "depth": 3}, SHAPE, 10, 0)
    mlp = (model, place_probes(model, None, images[:1]))
    assert chosen(mlp, "pool:1x1") == chosen(mlp, {"hidden.*": "pool:1x1"}) == ["none"] * 4
    with pytest.raises(LeadlineError, match=r"hidden\.1 has values of shape \(32,\)"):
        chosen(mlp, {"hidden.1": "pool:1x1"})


def test_a_pattern_that_matches_nothing_is_told(network):
    names = [probe.name for probe in network[1]]
    check_patterns({"stem": "jl:8", "blocks.*.*": "jl:9"}, names)
    for pattern in ("stam", "in*"):
        with pytest.raises(LeadlineError, match=re.escape(f"{pattern} matches no probe")):
            check_patterns({pattern: "jl:8"}, names)


# Random projection


def test_the_signs_are_the_same_everywhere():
    assert packed_signs(3, 16, CPU).tolist() == [[232, 175], [247, 146], [139, 8]]
    spelt = spell_out(packed_signs(1000, 77, CPU), 77)
    assert spelt.shape == (1000, 77) and set(spelt.unique().tolist()) == {-1.0, 1.0}
    # Bits in numpy's order, in blocks as in whole.
    bits = np.unpackbits(packed_signs(1000, 77, CPU).numpy(), axis=1, bitorder="little")[:, :77]
    assert np.array_equal(spelt.numpy(), 1 - 2 * bits.astype(np.float32))
    blocks = [spell_out(packed_signs(1000, 77, CPU)[first : first + 128], 77) for first in range(0, 1000, 128)]
    assert torch.equal(torch.cat(blocks), spelt)
    assert abs(spelt.mean()) < 4 / np.sqrt(77000)


@pytest.mark.parametrize("block", [signs.BLOCK, 10_000])
def test_a_projection_is_the_product_with_the_signs(wide, monkeypatch, block):
    monkeypatch.setattr(signs, "BLOCK", block)
    matrix = spell_out(packed_signs(1024, 200, CPU), 200).double().numpy() / np.sqrt(200)
    np.testing.assert_allclose(project(wide, 200).numpy(), wide.double().numpy() @ matrix, atol=2e-5)


@pytest.mark.parametrize("size", [64, 256])
def test_projected_distances_are_off_by_what_theory_says(wide, monkeypatch, size):
    values = wide[::30]
    before = pdist(values.double().numpy(), "sqeuclidean")
    errors = []
    for seed in range(50):
        monkeypatch.setattr(signs, "SEED", seed)
        packed_signs.cache_clear()
        errors.append(pdist(project(values, size).double().numpy(), "sqeuclidean") / before - 1)
    packed_signs.cache_clear()
    spread = np.sqrt(2 / size)
    # Each pair over the matrices, then all pairs: those of one matrix go together.
    assert 0.85 * spread < np.std(errors, axis=0).mean() < 1.05 * spread
    assert abs(np.mean(errors)) < 3 * spread / np.sqrt(50)


# Principal directions


def streamed(values, batch=100):
    return lambda: ([values[first : first + batch]] for first in range(0, len(values), batch))


@pytest.mark.parametrize("size", [8, pytest.param(64, marks=pytest.mark.slow)])
def test_principal_directions_are_scikit_learns(wide, size):
    shifted = wide + 50  # far from the origin, as activations may be
    (found,) = principal_directions(streamed(shifted), [size])
    expected = PCA(size, svd_solver="full").fit(shifted.double().numpy())
    matrix = found.matrix.double().numpy()
    assert found.matrix.shape == (1024, size) and found.matrix.dtype == torch.float32
    np.testing.assert_allclose(found.mean.numpy(), expected.mean_, rtol=1e-6)
    np.testing.assert_allclose(matrix.T @ matrix, np.eye(size), atol=1e-5)
    variances = ((shifted.double().numpy() - expected.mean_) @ matrix).var(axis=0, ddof=1)
    np.testing.assert_allclose(variances[: size // 2], expected.explained_variance_[: size // 2], rtol=1e-3)
    assert variances.sum() > 0.9995 * expected.explained_variance_.sum()
    assert np.degrees(subspace_angles(matrix[:, : size // 2], expected.components_[: size // 2].T)).max() < 3


def fitted(network, images, **arguments):
    model, probes = network
    reduced = choose_reductions({"stem": "pca:20", "blocks.0.*": "pca:12", "input": "pca:9"}, probes)
    read = arguments.pop("read", lambda ids: images[torch.from_numpy(ids)])
    options = {
        "ids": np.arange(0, 1797, 2),
        "seed": 3,
        "batch_size": 300,
        "memory": 1 << 30,
        "member": "m",
        **arguments,
    }
    return reduced, fit_directions(model, reduced, read, options.pop("ids"), **options)


def test_the_fit_does_not_depend_on_its_memory(network, images):
    passes = []
    read = lambda ids: passes.append(len(ids)) or images[torch.from_numpy(ids)]  # noqa: E731
    probes, together = fitted(network, images, read=read)
    n_together = sum(passes)
    _, alone = fitted(network, images, read=read, memory=1)
    assert sum(passes) - n_together == 3 * n_together
    assert together.keys() == alone.keys() == {0, 1, 2}
    for probe, directions in together.items():
        assert directions.matrix.shape == (probes[probe].width, stored_width(probes[probe]))
        assert torch.equal(directions.matrix, alone[probe].matrix)


def test_the_fit_is_to_embeddings_of_the_same_precision(network, images):
    model, probes = network
    _, found = fitted(network, images, precision="bfloat16")
    _, exact = fitted(network, images)
    batches = images[::2].split(300)  # fewer points than a sample would have
    rounded = [embed_batch(model, probes, batch, 0, "m", precision="bfloat16").embeddings for batch in batches]
    for probe, size in ((0, 9), (1, 20), (2, 12)):
        (expected,) = principal_directions(lambda: ([torch.from_numpy(rows[probe])] for rows in rounded), [size])  # noqa: B023
        assert torch.equal(found[probe].matrix, expected.matrix) and torch.equal(found[probe].mean, expected.mean)
        assert torch.equal(found[probe].mean, exact[probe].mean) == (probe == 0)


def test_the_fit_is_to_a_sample_of_the_split(network, images, monkeypatch):
    monkeypatch.setattr(extract, "SAMPLE", 150)
    seen = []
    read = lambda ids: seen.append(ids) or images[torch.from_numpy(ids)]  # noqa: E731
    fitted(network, images, read=read)
    first, *others = np.split(np.concatenate(seen), len(np.concatenate(seen)) // 150)
    assert len(np.unique(first)) == 150 and (first % 2 == 0).all()
    assert all(np.array_equal(other, first) for other in others)
    assert np.diff(first).min() > 0 and first.max() > 1500


def test_a_fit_that_cannot_be_is_told(network, images):
    with pytest.raises(LeadlineError, match=r"member m: pca:20 is fitted to more points .* there are 20"):
        fitted(network, images, ids=np.arange(20))
    broken = images.clone()
    broken[1000] = torch.nan
    with pytest.raises(LeadlineError, match="member m, probe input: not finite at point 1000"):
        fitted(network, broken)


# On the way out of the network


def test_embeddings_are_reduced_as_they_leave(network, images):
    model, probes = network
    choice = {"input": "pool:4x4", "stem": "pca:20", "blocks.0.sum": "jl:33", "blocks.1.sum": "pool:2x2"}
    reduced = choose_reductions(choice, probes)
    ids = np.arange(1797)
    directions = fit_directions(
        model, reduced, lambda ids: images[torch.from_numpy(ids)], ids, seed=0, batch_size=256, memory=1, member="m"
    )
    found = embed_batch(model, reduced, images[:128], 0, "m", make_reducers(reduced, directions)).embeddings
    full = embed_batch(model, probes, images[:128], 0, "m").embeddings
    assert (
        [rows.shape[1] for rows in found] == [stored_width(probe) for probe in reduced] == [16, 20, 33, 32, 64, 32, 10]
    )
    mean, matrix = directions[1].mean.numpy(), directions[1].matrix.numpy()
    np.testing.assert_allclose(found[1], (full[1] - mean) @ matrix, atol=1e-4)
    np.testing.assert_array_equal(found[2], project(torch.from_numpy(full[2]), 33).numpy())
    for probe, side, channels in ((0, 4, 1), (3, 2, 8)):
        old = int(np.sqrt(full[probe].shape[1] / channels))
        blocks = full[probe].reshape(128, channels, side, old // side, side, old // side)
        np.testing.assert_allclose(found[probe], blocks.mean(axis=(3, 5)).reshape(128, -1), atol=1e-5)
    for probe in (4, 5, 6):
        np.testing.assert_array_equal(found[probe], full[probe])


def test_a_pool_to_sides_that_do_not_divide_is_torchs(images):
    probe = Probe(0, "input", 64, None, SHAPE, "pool:3x5")
    (reduce,) = make_reducers([probe], {})
    expected = nn.AdaptiveAvgPool2d((3, 5))(images[:50])
    assert torch.equal(reduce(images[:50].flatten(1)), expected.flatten(1))


def test_one_model_is_measured_by_reduced_layers(images):
    labels = torch.tensor(load_digits().target)
    model = build("mlp", {"width": 32, "depth": 3}, SHAPE, 10, 0)
    bank, queries = TensorDataset(images[:1200], labels[:1200]), TensorDataset(images[1200:], labels[1200:])
    whole = leadline.prediction_depth(model, bank, queries)
    assert leadline.prediction_depth(model, bank, queries, reduction="jl:32").equals(whole)
    reduced = leadline.prediction_depth(model, bank, queries, reduction={"input": "pca:30", "*.1": "jl:16"})
    assert reduced.schema.metadata[b"reductions"].decode().split("\n") == ["pca:30", "none", "jl:16", "none"]
    before, after = (np.array(table["winner"].to_pylist()) for table in (whole, reduced))
    agreement = (before == after).mean(axis=0)
    assert agreement[[1, 3]].tolist() == [1, 1] and 0.98 < agreement[0] < 1 and 0.6 < agreement[2] < 1
    with pytest.raises(LeadlineError, match="hiden matches no probe"):
        leadline.prediction_depth(model, bank, reduction={"hiden": "jl:8"})


# Whole runs

REDUCED = {
    **TINY,
    "members": [
        {
            "architecture": "resnet18",
            "parameters": NETWORK,
            "count": 2,
            "training": {"steps": 20, "batch": 64, "precision": "float32"},
        }
    ],
    "engine": {**TINY["engine"], "query_block": 2000},
    "reduction": {"input": "jl:40", "stem": "pca:16", "blocks.0.sum": "jl:64", "blocks.*.sum": "pool:1x1"},
}


@pytest.mark.slow
def test_a_run_records_its_reductions_and_goes_on_after_the_fit(tmp_path):
    run = leadline.run(REDUCED, tmp_path / "run")
    assert verify(run.directory) == []
    rows = run.sql("SELECT name, width, stored_width, reduction FROM probes WHERE member = 'resnet18-1' ORDER BY probe")
    assert [tuple(row.values()) for row in rows.to_pylist()] == [
        ("input", 64, 40, "jl:40"),
        ("stem", 256, 16, "pca:16"),
        ("blocks.0.sum", 256, 64, "jl:64"),
        ("blocks.1.sum", 128, 8, "pool:1x1"),
        ("blocks.2.sum", 64, 16, "pool:1x1"),
        ("blocks.3.sum", 32, 32, "none"),
        ("softmax", 10, 10, "none"),
    ]

    other = {**REDUCED, "engine": {**REDUCED["engine"], "shard_size": 640, "workers": 1}}
    leadline.run(other, tmp_path / "other", train_only=True)
    files = sorted((tmp_path / "other" / "directions").iterdir())
    assert [path.name for path in files] == ["resnet18-0.safetensors", "resnet18-1.safetensors"]
    before = [path.stat().st_mtime_ns for path in files]
    again = leadline.run(other, tmp_path / "other")
    assert [path.stat().st_mtime_ns for path in files] == before
    assert tables_of(again.directory.root) == tables_of(run.directory.root)


def test_stored_embeddings_are_narrow_and_other_directions_are_refused(tmp_path):
    config = load_config(REDUCED)
    directory, (member, other) = RunDirectory(tmp_path), list_members(config)
    bench = Workbench(config, {}, directory)
    train(bench, [member])
    train(bench, [other])
    embed(bench, [member], 1)
    widths = [np.load(directory.embedding(member.name, probe, 1)).shape[1] for probe in range(7)]
    assert widths == [40, 16, 64, 8, 16, 32, 10]
    Path(directory.directions(member.name)).write_bytes(directory.directions(other.name).read_bytes())
    with pytest.raises(LeadlineError, match="not the directions that the run was begun with"):
        embed(Workbench(config, {}, directory), [member], 1)
