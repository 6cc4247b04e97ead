"""What the tests of the study share: a run that all analyses say something of, and one that some do not."""

import pyarrow.parquet as pq
import pytest

from leadline.study import accuracy, analyses
from leadline.study.analyses import material_of
from leadline.study.ensembles import read_ensembles
from leadline.study.networks import Networks


@pytest.fixture(scope="session", autouse=True)
def few_draws():
    """Intervals have tests of their own, in test_relations.py."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (analyses, accuracy):
            patch.setattr(module, "DRAWS", 10)
        yield


@pytest.fixture(scope="session")
def material(studied_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("study") / "networks"
    return material_of(read_ensembles(studied_run), Networks(studied_run, folder, lambda line: None))


@pytest.fixture(scope="session")
def tiny_material(tiny_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("study") / "networks"
    return material_of(read_ensembles(tiny_run), Networks(tiny_run, folder, lambda line: None))


@pytest.fixture(scope="session")
def ensemble(material):
    """The networks at the end of their training."""
    return material.ensembles[0]


@pytest.fixture(scope="session")
def stored(studied_run):
    """Rows of depths with those of votes, as they are stored: {member: a row for each point}."""
    root, found = studied_run.directory.root, {}
    for folder in (root / "depths").iterdir():
        depths, votes = (pq.ParquetFile(root / t / folder.name / "part-0.parquet").read() for t in ("depths", "votes"))
        rows = zip(depths.to_pylist(), votes.to_pylist(), strict=True)
        found[folder.name.removeprefix("member=")] = [{**row, **vote} for row, vote in rows]
    return found


@pytest.fixture(scope="session")
def members(stored):
    """The rows of the networks at the end of their training, a list of points for each member."""
    return [stored[f"mlp-{seed}"] for seed in range(4)]


@pytest.fixture(scope="session")
def clean(studied_run):
    """Labels of the points before corruption, as they are stored."""
    return pq.ParquetFile(studied_run.directory.table("points")).read()["clean_label"].to_pylist()
