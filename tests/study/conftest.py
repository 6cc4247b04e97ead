"""What the tests of the study share: a run that all analyses say something of, and one that some do not."""

import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from leadline.query import open_run
from leadline.store import RunDirectory
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
def undecided(studied_run, tmp_path_factory):
    """The same, where the votes of one network at its first probe were not computed for some points."""
    root = tmp_path_factory.mktemp("runs") / "undecided"
    shutil.copytree(studied_run.directory.root, root)
    file = RunDirectory(root).member_table("votes", "mlp-0")
    table = pq.ParquetFile(file).read()
    winner = table["winner"].to_pylist()
    for point in range(0, 1797, 100):
        winner[point][0] = None
    place = table.column_names.index("winner")
    pq.write_table(table.set_column(place, table.field(place), pa.array(winner, table.field(place).type)), file)
    run = open_run(root)
    return material_of(read_ensembles(run), Networks(run, root.with_name("networks"), lambda line: None))


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
