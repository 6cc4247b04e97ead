"""Questions to a run: what is read, what is refused, and the queries that come with the package, against loops."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny import MADE_UP, TINY

import leadline
from leadline import LeadlineError
from leadline.query import named_queries, named_query
from leadline.store import RunDirectory
from leadline.store.files import write_json
from leadline.store.schemas import DEPTHS, POINTS, vote_columns, votes_schema
from leadline.store.tables import write_table
from leadline.study.kinds import count_kinds, kinds

N, PROBES, MEMBERS = 70_000, 3, ("a-0", "a-1", "b-0")


@pytest.fixture(scope="module")
def two_depths_run(tmp_path_factory):
    """A finished run of two architectures with 5 and 3 probes, which tell no name of the points' classes."""
    mlp = TINY["members"][0]
    members = [
        {**mlp, "count": 4, "split": {"kind": "random", "share": 0.5}},
        {**mlp, "count": 4, "split": {"kind": "random", "share": 0.5}, "name": "flat", "parameters": {"depth": 1}},
    ]
    return leadline.run({**TINY, "name": "two", "members": members}, tmp_path_factory.mktemp("runs") / "two")


@pytest.fixture(scope="module", params=["tiny", "studied", "two_depths"])
def any_run(request):
    return request.getfixturevalue(f"{request.param}_run")


@pytest.fixture
def many_points(tmp_path):
    """A run of depths and votes alone, of more points than a row group has."""
    directory, ids = RunDirectory(tmp_path / "run"), np.arange(N)
    labels = (ids // 100 % 10).astype(np.int32)
    points = {
        "point_id": ids, "key": [f"k{i}" for i in ids], "label": labels, "label_name": ["x"] * N, "part": ["train"] * N,
        "clean_label": pa.nulls(N, pa.int32()),
    }  # fmt: skip
    write_table(directory.table("points"), POINTS, [pa.table(points)], {})
    for number, member in enumerate(MEMBERS):
        random = np.random.default_rng(number)
        depths = {
            "point_id": ids, "label": labels, "in_training": random.random(N) < 0.9, "prediction": labels,
            **{name: random.random(N, np.float32) for name in ("confidence", "margin", "entropy")},
            "depth": random.integers(0, 4, N).astype(np.int16), "unsettled": np.zeros(N, bool),
        }  # fmt: skip
        write_table(directory.member_table("depths", member), DEPTHS, [pa.table(depths)], {})
        votes = [leadline.Votes(*random.integers(0, 9, (4, N)).astype(np.int32)) for _ in range(PROBES)]
        table = pa.table({"point_id": ids, **vote_columns(votes)})
        write_table(directory.member_table("votes", member), votes_schema(PROBES), [table], {})
    write_json(directory.manifest_path, MADE_UP)
    return leadline.open(tmp_path / "run")


def garble(path, keep=()):
    """Overwrite the values of all row groups but some; the footer, with its statistics, stays."""
    metadata, content = pq.ParquetFile(path).metadata, bytearray(path.read_bytes())
    for group in set(range(metadata.num_row_groups)) - set(keep):
        columns = [metadata.row_group(group).column(i) for i in range(metadata.num_columns)]
        begin = min(column.dictionary_page_offset or column.data_page_offset for column in columns)
        size = sum(column.total_compressed_size for column in columns)
        content[begin : begin + size] = b"\xff" * size
    path.write_bytes(content)


def frames(run):
    """Every table by pandas alone."""
    root = run.directory.root
    found = {name: pd.read_parquet(root / f"{name}.parquet") for name in ("points", "members", "probes", "ensemble")}
    found["depths"] = pd.read_parquet(root / "depths")
    found["depths"]["member"] = found["depths"]["member"].astype(str)
    return found


def test_only_the_row_groups_that_are_asked_for_are_read(many_points):
    """The others are garbled, so that whoever reads them fails."""
    directory = many_points.directory
    expected = many_points.depths.to_table().to_pandas().query("member == 'a-1' and point_id == 66000")
    winners = many_points.votes.to_table().to_pandas().query("member == 'a-1' and point_id == 66000").winner.iloc[0]
    sizes = [
        [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        for name in ("depths", "votes")
        for metadata in [pq.ParquetFile(directory.member_table(name, "a-1")).metadata]
    ]
    assert sizes == [[65536, N - 65536], [16384] * 4 + [N - 65536]]
    for member in MEMBERS:
        for name, last in (("depths", 1), ("votes", 4)):
            garble(directory.member_table(name, member), [last] if member == "a-1" else [])
    found = many_points.sql(
        "SELECT depth, confidence, winner FROM depths JOIN votes USING (member, point_id) "
        "WHERE member = 'a-1' AND point_id = 66000"
    ).to_pylist()
    assert found == [
        {"depth": expected.depth.iloc[0], "confidence": expected.confidence.iloc[0], "winner": winners.tolist()}
    ]
    for wanted in ("member = 'a-1'", "point_id = 66000", "member = 'a-1' AND depth = 3"):
        with pytest.raises(LeadlineError, match="leadline verify"):
            many_points.sql(f"SELECT avg(depth) FROM depths WHERE {wanted}")
    assert many_points.sql("SELECT count(*) FROM depths WHERE depth > 3").to_pylist() == [{"count_star()": 0}]


def test_statistics_and_encodings_are_in_the_files(many_points):
    group = pq.ParquetFile(many_points.directory.member_table("depths", "a-0")).metadata.row_group(1)
    columns = {column.path_in_schema: column for column in map(group.column, range(group.num_columns))}
    bounds = {name: (column.statistics.min, column.statistics.max) for name, column in columns.items()}
    assert bounds["point_id"] == (65536, N - 1) and bounds["depth"] == (0, 3) and bounds["label"] == (0, 9)
    assert columns["point_id"].total_compressed_size < (N - 65536) / 10  # a tenth of a byte each


def test_own_tables_are_joined_by_key(tiny_run, tmp_path):
    points = frames(tiny_run)["points"]
    mine = pd.DataFrame({"key": points.key.iloc[::3], "score": np.arange(len(points))[::3] / 7})
    mine.to_csv(tmp_path / "mine.csv", index=False)
    mine.to_csv(tmp_path / "mine [1].csv.gz", index=False)
    mine.to_csv(tmp_path / "it's.tsv", index=False, sep="\t")
    mine.to_parquet(tmp_path / "mine.parquet")
    expected = points.merge(mine, on="key").groupby("label").score.mean()
    query = "SELECT label, avg(score) AS score FROM points JOIN mine USING (key) GROUP BY label ORDER BY label"
    for file in ("mine.csv", "mine [1].csv.gz", "it's.tsv", "mine.parquet"):
        found = tiny_run.sql(query, {"mine": tmp_path / file})
        np.testing.assert_allclose(found["score"], expected, rtol=1e-12)
    both = {"mine": tmp_path / "mine.csv", "Theirs": str(tmp_path / "mine.parquet")}
    assert tiny_run.sql("SELECT count(*) AS n FROM mine JOIN theirs USING (key, score)", both)["n"].to_pylist() == [
        len(mine)
    ]


@pytest.mark.parametrize(
    ("name", "file", "words"),
    [
        ("points", "mine.csv", "has a table points"),
        ("Depths", "mine.csv", "has a table depths"),
        ("learning", "mine.csv", "has a table learning"),
        ("my table", "mine.csv", "no name of a table"),
        ('x"; DROP VIEW points; --', "mine.csv", "no name of a table"),
        ("", "mine.csv", "no name of a table"),
        ("mine", "other.csv", "no such file"),
        ("mine", "mine.txt", "ends in .parquet"),
        ("mine", "broken.parquet", "cannot be read"),
        ("mine", "s3://bucket/mine.parquet", "no such file on this machine"),
    ],
)
def test_what_is_no_table_of_ones_own_is_refused(tiny_run, tmp_path, monkeypatch, name, file, words):
    monkeypatch.chdir(tmp_path)
    for there in ("mine.csv", "mine.txt", "broken.parquet"):
        Path(there).write_text("key,score\nk,1\n")
    with pytest.raises(LeadlineError, match=words) as refused:
        tiny_run.sql("SELECT * FROM mine", {name: file})
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("given", [False, True])
def test_nothing_else_is_read_or_written(tiny_run, tmp_path, given, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.csv").write_text("key,score\nk,1\n")
    Path("secret.csv").write_text("word\nxyzzy\n")
    secret = pd.DataFrame({"word": ["xyzzy"]})
    tables = {"mine": "mine.csv"} if given else {}
    run = tiny_run.directory.root
    for query in (
        f"COPY points TO '{tmp_path}/out.csv'",
        f"COPY points TO '{run}/out.csv'",
        f"COPY (SELECT 1) TO '{tmp_path}/mine.csv'",
        "ATTACH 'other.db'",
        f"ATTACH '{run}/other.db'",
        "EXPORT DATABASE 'out'",
        "INSTALL httpfs",
        "LOAD httpfs",
        "SET enable_external_access = true",
        "CREATE TABLE t AS SELECT 1",
        "INSERT INTO mine VALUES ('k', 2)",
        "SELECT * FROM 'secret.csv'",
        f"SELECT * FROM '{tmp_path}/secret.csv'",
        "SELECT * FROM read_csv('secret.csv')",
        "SELECT * FROM read_text('secret.csv')",
        f"SELECT * FROM read_text('{run}/../../{tmp_path.name}/secret.csv')",
        f"SELECT * FROM glob('{tmp_path}/*')",
        "SELECT * FROM read_parquet('https://example.org/x.parquet')",
        "SELECT * FROM read_parquet('s3://bucket/x.parquet')",
        "SELECT * FROM secret",
        "SELECT * FROM query('COPY points TO ''out.csv''')",
    ):
        with pytest.raises(LeadlineError, match=r"^query: [^\n]*$"):
            tiny_run.sql(query, tables)
    assert len(secret) == 1 and sorted(path.name for path in tmp_path.iterdir()) == ["mine.csv", "secret.csv"]
    assert Path("mine.csv").read_text() == "key,score\nk,1\n" and not (run / "out.csv").exists()


def test_damage_an_unfinished_run_and_none_are_told_in_one_line(tiny_run, tmp_path):
    def refused(run, query="SELECT count(*) FROM ensemble"):
        with pytest.raises(LeadlineError) as error:
            leadline.open(run).sql(query)
        assert "\n" not in str(error.value)
        return str(error.value)

    run = tmp_path / "run [1]"
    shutil.copytree(tiny_run.directory.root, run)
    assert leadline.open(run).sql("SELECT count(*) AS n FROM depths")["n"].to_pylist() == [3 * 1797]
    ensemble = run / "ensemble.parquet"
    whole = ensemble.read_bytes()
    ensemble.write_bytes(whole[:-100])
    assert "ensemble.parquet: cannot be read" in refused(run) and "leadline verify" in refused(run)
    assert leadline.open(run).sql("SELECT count(*) AS n FROM points")["n"].to_pylist() == [1797]  # which is sound
    ensemble.write_bytes(b"")
    assert "ensemble.parquet: cannot be read" in refused(run)
    ensemble.unlink()
    assert "ensemble.parquet: missing" in refused(run)
    ensemble.write_bytes(whole)
    assert "has no table learning" in refused(run, named_query("learned-late"))
    shutil.rmtree(run / "depths")
    assert f"{run / 'depths'}: missing" in refused(run, "SELECT * FROM Depths")
    manifest = json.loads((run / "run.json").read_text())
    write_json(run / "run.json", {**manifest, "status": "running"})
    assert "the run is running" in refused(run)
    (run / "run.json").write_text("{")
    assert "run.json: damaged" in refused(run)
    (run / "run.json").unlink()
    assert "no run here" in refused(run)
    (tmp_path / "empty").mkdir()
    assert "no run here" in refused(tmp_path / "empty")


def test_an_alias_may_have_the_name_of_a_table_that_is_not_there(tiny_run):
    rows = tiny_run.sql("WITH learning AS (SELECT 1 AS depths) SELECT depths FROM learning").to_pylist()
    assert rows == [{"depths": 1}]


def test_named_queries_say_what_they_answer_and_an_unknown_one_tells_the_others():
    known = named_queries()
    assert len(known) >= 10
    for name, text in known.items():
        first = text.splitlines()[0]
        assert first.startswith("-- ") and first.endswith("."), name
        assert max(map(len, text.splitlines())) <= 120 and named_query(name) == text
    with pytest.raises(LeadlineError, match=r"'hardest'.*hardest-by-class.*label-issues"):
        named_query("hardest")


def rows_of(run, name, *columns):
    table = run.sql(named_query(name))
    assert len(set(table.column_names)) == len(table.column_names)
    return list(zip(*(table[column].to_pylist() for column in columns), strict=True))


def probes_of(tables):
    return dict(zip(tables["members"].architecture, tables["members"].n_probes, strict=True))


def close(found, expected):
    """Rows of two lists: names and integers equal, floats nearly, and null where the other has NaN."""
    assert len(found) == len(expected)
    for row, other in zip(found, expected, strict=True):
        for value, wanted in zip(row, other, strict=True):
            if wanted is None or wanted != wanted:
                assert value is None, (row, other)
            else:
                assert value == (pytest.approx(wanted, rel=1e-9) if isinstance(wanted, float) else wanted), (row, other)


def test_hardest_by_class(any_run):
    tables = frames(any_run)
    expected = []
    for (architecture, label), own in tables["ensemble"].groupby(["architecture", "label"]):
        own = own.dropna(subset="mean_depth_held_out")
        own = own.sort_values(["mean_depth_held_out", "held_out_accuracy", "point_id"], ascending=[False, True, True])
        for row in own.head(10).itertuples():
            key = tables["points"].key[row.point_id]
            relative = row.mean_depth_held_out / probes_of(tables)[architecture]
            expected.append((architecture, label, row.point_id, key, relative))
    close(rows_of(any_run, "hardest-by-class", "architecture", "label", "point_id", "key", "relative_depth"), expected)


def test_easy_prototypes_by_class(any_run):
    expected = []
    for (architecture, label), own in frames(any_run)["ensemble"].groupby(["architecture", "label"]):
        right = [row for row in own.itertuples() if row.n_held_out and row.consensus_class == label]
        right = [row for row in right if row.held_out_accuracy == 1]
        right.sort(key=lambda row: (row.mean_depth_held_out, -row.mean_confidence_held_out, row.point_id))
        expected += [(architecture, label, row.point_id) for row in right[:10]]
    assert rows_of(any_run, "easy-prototypes-by-class", "architecture", "label", "point_id") == expected


def test_label_issues(any_run, studied_run):
    tables = frames(any_run)
    names = dict(zip(tables["points"].label, tables["points"].label_name, strict=True))
    expected = []
    for architecture, own in tables["ensemble"].groupby("architecture"):
        deep = np.quantile(own.mean_depth_training.dropna(), 0.99)
        marked = []
        for row in own.itertuples():
            contradicted = row.n_held_out > 1 and row.consensus_class != row.label and row.consensus_consistency >= 0.75
            in_training = row.n_training > 0 and row.mean_depth_training > deep
            if contradicted or in_training:
                votes = round(row.consensus_consistency * row.n_held_out) if row.n_held_out else -1
                depth = row.mean_depth_training if row.n_training else -1
                order = (not (contradicted and in_training), not contradicted, -votes, -depth, row.point_id)
                said = (row.consensus_class, names.get(row.consensus_class), contradicted, in_training)
                marked.append((order, (architecture, row.point_id, *said)))
        expected += [row for _, row in sorted(marked)]
    columns = ("architecture", "point_id", "consensus_class", "consensus_name", "contradicted", "deep_in_training")
    assert rows_of(any_run, "label-issues", *columns) == expected
    if any_run is studied_run:  # a fifth of its labels are corrupted
        clean = tables["points"].clean_label
        wrong = [clean[row[1]] != tables["points"].label[row[1]] for row in expected if row[0] == "mlp" and row[4]]
        assert len(wrong) > 20 and np.mean(wrong) > 0.6


def test_disagreeing_architectures(any_run):
    tables = frames(any_run)
    by_point = {}
    for row in tables["ensemble"].itertuples():
        if row.n_held_out:
            depth = row.mean_depth_held_out / probes_of(tables)[row.architecture]
            by_point.setdefault(row.point_id, []).append((depth, row.architecture, row.consensus_class))
    apart = [
        (max(some)[0] - min(some)[0], point, max(depth for depth, *_ in some), min(depth for depth, *_ in some))
        for point, some in by_point.items()
        if len(some) > 1
    ]
    apart.sort(key=lambda row: (-row[0], row[1]))
    found = rows_of(
        any_run, "disagreeing-architectures",
        "difference", "point_id", "greatest_depth", "least_depth", "deepest_in", "least_deep_in", "consensus_there",
        "consensus_here",
    )  # fmt: skip
    close([row[:4] for row in found], apart[:100])
    for _, point, most, least, deepest, least_deep, there, here in found:
        assert (most, deepest, there) in by_point[point] and (least, least_deep, here) in by_point[point]


def test_ambiguous_points_and_kinds_are_those_of_the_study(any_run):
    tables, ambiguous, counted = frames(any_run), [], []
    names = dict(zip(tables["points"].label, tables["points"].label_name, strict=True))
    for architecture, own in tables["ensemble"].groupby("architecture"):
        kind = kinds(own.mean_depth_held_out.to_numpy(), own.mean_depth_training.to_numpy())
        chosen = own.assign(depth=own.mean_depth_held_out + own.mean_depth_training)[kind == 3]
        chosen = chosen.sort_values(["consensus_consistency", "depth", "point_id"], ascending=[True, False, True])
        ambiguous += [(architecture, point) for point in chosen.point_id.head(100)]
        for label in sorted(names):
            numbers = list(count_kinds(kind[(own.label == label).to_numpy()]).values())[1:]  # but the unplaced
            if sum(numbers):
                counted.append((architecture, label, names[label], sum(numbers), *numbers))
    assert rows_of(any_run, "ambiguous", "architecture", "point_id") == ambiguous
    columns = ("easy", "looks_like_a_different_class", "ambiguous_unless_the_label_is_given", "ambiguous")
    assert rows_of(any_run, "kinds-by-class", "architecture", "label", "label_name", "points", *columns) == counted


def test_confused_classes(any_run):
    tables = frames(any_run)
    counts, of_label = {}, {}
    for row in tables["ensemble"].itertuples():
        if row.n_held_out:
            of_label[row.architecture, row.label] = of_label.get((row.architecture, row.label), 0) + 1
            if row.consensus_class != row.label:
                place = (row.architecture, row.label, row.consensus_class)
                counts.setdefault(place, []).append(row.mean_depth_held_out / probes_of(tables)[row.architecture])
    expected = [
        (*place, len(some), len(some) / of_label[place[:2]], float(np.mean(some))) for place, some in counts.items()
    ]
    expected.sort(key=lambda row: (row[0], -row[3], row[1], row[2]))
    columns = ("architecture", "label", "consensus_class", "points", "share_of_label", "relative_depth")
    close(rows_of(any_run, "confused-classes", *columns), expected)


def test_depth_by_class(any_run):
    expected = {}
    measures = ["mean_depth_held_out", "mean_depth_training", "held_out_accuracy", "consensus_consistency"]
    for place, own in frames(any_run)["ensemble"].groupby(["architecture", "label"]):
        expected[place] = (len(own), *(float(own[measure].mean()) for measure in measures))
    found = rows_of(any_run, "depth-by-class", "architecture", "label", "points", *measures)
    close(sorted(found), [(*place, *values) for place, values in sorted(expected.items())])
    for architecture in {row[0] for row in found}:
        depths = [row[3] for row in found if row[0] == architecture and row[3] is not None]
        assert depths == sorted(depths, reverse=True)


def test_accuracy_by_depth_and_members(any_run):
    tables = frames(any_run)
    depths = tables["depths"].merge(tables["members"][["member", "architecture"]], on="member")
    depths["right"] = depths.prediction == depths.label
    expected = []
    for (architecture, depth), own in depths.groupby(["architecture", "depth"]):
        inside, outside = own[own.in_training], own[~own.in_training]
        right = [float(side.right.mean()) for side in (inside, outside)]
        confidence = float(outside.confidence.astype(float).mean())
        expected.append((architecture, depth, len(inside), len(outside), *right, confidence))
    columns = ("training", "held_out", "training_accuracy", "held_out_accuracy", "held_out_confidence")
    close(rows_of(any_run, "accuracy-by-depth", "architecture", "depth", *columns), expected)
    expected = []
    for row in tables["members"].sort_values(["architecture", "member"]).itertuples():
        own = depths[depths.member == row.member]
        means = [float(own.depth[own.in_training == inside].mean()) for inside in (True, False)]
        expected.append((row.member, row.held_out_accuracy, *means, float(own.unsettled.mean())))
    columns = ("member", "held_out_accuracy", "mean_depth_training", "mean_depth_held_out", "unsettled")
    close(rows_of(any_run, "members", *columns), expected)


def test_unsettled_and_memorised(any_run):
    tables = frames(any_run)
    depths = tables["depths"].merge(tables["members"][["member", "architecture"]], on="member")
    depths["right"] = depths.prediction == depths.label
    unsettled, memorised = [], []
    for architecture, own in depths.groupby("architecture"):
        share = own.groupby("point_id").unsettled.mean()
        rows = sorted((-value, point) for point, value in share.items() if value > 0)
        unsettled += [(architecture, point, -value) for value, point in rows[:100]]
        inside, outside = (own[own.in_training == side].groupby("point_id") for side in (True, False))
        drop = (inside.right.mean() - outside.right.mean()).dropna()
        counts, deep = outside.size(), inside.depth.mean()
        rows = sorted((-value, -counts[point], -deep[point], point) for point, value in drop.items() if value > 0)
        memorised += [(architecture, row[3], -row[0]) for row in rows[:100]]
    close(rows_of(any_run, "unsettled", "architecture", "point_id", "share"), unsettled)
    close(rows_of(any_run, "memorised", "architecture", "point_id", "memorisation"), memorised)


def test_probe_accuracy(any_run):
    tables = frames(any_run)
    files = [any_run.directory.member_table("votes", member) for member in tables["members"].member]
    votes = pd.concat(pq.ParquetFile(file).read().to_pandas().assign(member=file.parent.name[7:]) for file in files)
    both = tables["depths"].merge(votes, on=["member", "point_id"])
    expected = []
    for architecture, members in tables["members"].groupby("architecture"):
        for probe in range(members.n_probes.iloc[0]):
            means = []
            for inside in (True, False):
                sides = [both[(both.member == member) & (both.in_training == inside)] for member in members.member]
                right = [[row.winner[probe] == row.label for row in side.itertuples()] for side in sides]
                means.append(float(np.mean([np.mean(some) for some in right])))
            expected.append((architecture, probe, len(members), *means))
    columns = ("architecture", "probe", "members", "train_accuracy", "held_out_accuracy")
    close(rows_of(any_run, "probe-accuracy", *columns), expected)


def test_learned_late(watched_run):
    tables, root = frames(watched_run), watched_run.directory.root
    learning = pd.read_parquet(root / "learning")
    learning["member"] = learning.member.astype(str)
    both = learning[learning.in_training].merge(tables["members"][["member", "architecture"]], on="member")
    both = both.merge(tables["depths"][["member", "point_id", "depth"]], on=["member", "point_id"])
    expected = []
    for architecture, own in both.groupby("architecture"):
        by_point = own.groupby("point_id").agg(
            late=("iteration_learned", "mean"), forgot=("forgetting_events", "mean"), depth=("depth", "mean")
        )
        by_point = by_point.reset_index().sort_values(["late", "forgot", "point_id"], ascending=[False, False, True])
        expected += [(architecture, row.point_id, row.late, row.depth) for row in by_point.head(100).itertuples()]
    columns = ("architecture", "point_id", "iteration_learned", "mean_depth_training")
    close(rows_of(watched_run, "learned-late", *columns), expected)


def test_a_run_in_a_bucket_answers_the_same(s3, bucket, two_depths_run, tmp_path):
    root = two_depths_run.directory.root
    for path in (path for path in root.rglob("*") if path.suffix in (".parquet", ".json")):
        s3.upload_file(str(path), bucket, f"run/{path.relative_to(root)}")
    run = leadline.open(f"s3://{bucket}/run")
    for name in named_queries().keys() - {"learned-late"}:
        found, expected = (some.sql(named_query(name)) for some in (run, two_depths_run))
        rows = [[tuple(row.values()) for row in table.to_pylist()] for table in (found, expected)]
        assert found.column_names == expected.column_names
        close(*rows)
    (tmp_path / "mine.csv").write_text("key,score\n" + f"{frames(two_depths_run)['points'].key[7]},0.5\n")
    query = "SELECT point_id, score FROM points JOIN mine USING (key)"
    assert run.sql(query, {"mine": tmp_path / "mine.csv"}).to_pylist() == [{"point_id": 7, "score": 0.5}]
    with pytest.raises(LeadlineError, match="has no table learning"):
        run.sql(named_query("learned-late"))
    s3.put_object(Bucket=bucket, Key="run/ensemble.parquet", Body=(root / "ensemble.parquet").read_bytes()[:-9])
    with pytest.raises(LeadlineError, match=r"ensemble.parquet: cannot be read"):
        leadline.open(f"s3://{bucket}/run").sql("SELECT * FROM ensemble")
    s3.delete_object(Bucket=bucket, Key="run/ensemble.parquet")
    with pytest.raises(LeadlineError, match=r"ensemble.parquet: missing"):
        leadline.open(f"s3://{bucket}/run").sql("SELECT * FROM ensemble")
