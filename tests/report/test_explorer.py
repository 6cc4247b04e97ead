"""The explorer's server as others see it: real requests to the real command, answers against pandas and numpy."""

import http.client
import io
import json
import re
import shutil
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from http.cookiejar import CookieJar
from pathlib import Path
from urllib.parse import urlencode, urlsplit

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from sklearn.datasets import load_digits

import leadline
from leadline import LeadlineError
from leadline.report.explorer.data import Explorer, Page, Selection
from leadline.stored_member import StoredMember, stored_points
from leadline.study.kinds import kinds, thresholds

SHOWN = 48  # points of a page, if nothing else is asked for


class Client:
    """Of one server: (status, headers, body) of each request, and JSON."""

    def __init__(self, address):
        self.address = address.rstrip("/")
        self._opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor(CookieJar()))

    def ask(self, path, body=None, headers=None, **parameters):
        address = f"{self.address}{path}{'?' + urlencode(parameters) if parameters else ''}"
        request = urllib.request.Request(address, body, headers or {})
        try:
            with self._opener.open(request, timeout=120) as answer:
                return answer.status, answer.headers, answer.read()
        except urllib.error.HTTPError as refused:
            with refused:
                return refused.code, refused.headers, refused.read()

    def json(self, path, **parameters):
        status, _, body = self.ask(path, **parameters)
        assert status == 200, body
        return json.loads(body)

    def sql(self, query, **headers):
        status, _, body = self.ask("/sql", json.dumps({"query": query}).encode(), headers)
        return status, json.loads(body) if status == 200 else body.decode()


@pytest.fixture(scope="module")
def client(explored_run, explore):
    with explore(explored_run.directory.root) as address:
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/", address)
        yield Client(address)


@pytest.fixture(scope="module")
def tables(explored_run):
    """Every table as a data frame; the ensemble with its points, and their kinds."""
    root = explored_run.directory.root
    read = {name: pd.read_parquet(root / f"{name}.parquet") for name in ("points", "members", "probes", "ensemble")}
    read |= {name: pd.read_parquet(root / name) for name in ("depths", "votes", "learning")}
    read["ensemble"] = read["ensemble"].merge(read["points"].drop(columns="label"), on="point_id")
    plane = read["ensemble"][["mean_depth_held_out", "mean_depth_training"]].to_numpy().T
    read["ensemble"]["kind"] = kinds(*plane)
    return read


def own(tables, name, member):
    """The rows of one member, by point_id."""
    rows = tables[name]
    return rows[rows.member.astype(str) == member].set_index("point_id")


def voted(tables, member, probe):
    rows = own(tables, "votes", member)
    return pd.Series(np.stack(rows.winner.to_numpy())[:, probe], rows.index)


SELECTIONS = {
    "all": ({}, lambda e, t: e.label >= 0),
    "class": ({"label": 3}, lambda e, t: e.label == 3),
    "kind": ({"kind": 3}, lambda e, t: e.kind == 3),
    "unplaced": ({"kind": -1}, lambda e, t: e.mean_depth_held_out.isna() | e.mean_depth_training.isna()),
    "part": ({"part": "train"}, lambda e, t: e.part == "train"),
    "depth": (
        {"member": "mlp-1", "depth": 2},
        lambda e, t: e.point_id.map(own(t, "depths", "mlp-1").depth) == 2,
    ),
    "disagrees": (
        {"member": "mlp-2", "probe": 1, "vote": "disagrees"},
        lambda e, t: e.point_id.map(voted(t, "mlp-2", 1)) != e.label,
    ),
    "agrees": (
        {"member": "mlp-0", "probe": 3, "vote": "agrees", "label": 5},
        lambda e, t: (e.point_id.map(voted(t, "mlp-0", 3)) == e.label) & (e.label == 5),
    ),
}


@pytest.mark.parametrize("name", SELECTIONS)
def test_plane_and_points_of_a_selection(client, tables, name):
    asked, chosen = SELECTIONS[name]
    ensemble = tables["ensemble"]
    expected = ensemble[chosen(ensemble, tables)]
    assert len(expected) or name == "unplaced"
    plane = client.json("/plane", architecture="mlp", **asked)
    counts = {}
    for x, y in expected[["mean_depth_held_out", "mean_depth_training"]].dropna().to_numpy():
        place = tuple(np.floor(np.array([x, y]) / plane["step"] + 0.5) * plane["step"])
        counts[place] = counts.get(place, 0) + 1
    assert {(one["held_out"], one["training"]): one["points"] for one in plane["bins"]} == counts
    assert plane["kinds"] == [int((expected.kind == kind).sum()) for kind in range(4)]
    assert plane["unplaced"] == (expected.kind == -1).sum()
    found = client.json("/points", architecture="mlp", **asked)
    in_order = expected.sort_values("point_id").sort_values(
        "mean_depth_held_out", ascending=False, kind="stable", na_position="last"
    )
    assert found["total"] == len(expected)
    assert [point["point_id"] for point in found["points"]] == in_order.point_id.tolist()[:SHOWN]
    if "member" in asked:
        rows = own(tables, "depths", asked["member"])
        assert all(point["depth"] == rows.depth[point["point_id"]] for point in found["points"])


def test_thresholds_are_those_of_the_study_and_not_of_what_is_chosen(client, tables):
    plane = tables["ensemble"][["mean_depth_held_out", "mean_depth_training"]].to_numpy().T
    for asked in ({}, {"label": 1}):
        assert client.json("/plane", architecture="mlp", **asked)["thresholds"] == list(thresholds(*plane))


def test_a_region_chooses_points_and_leaves_the_plane_as_it_is(client, tables):
    ensemble = tables["ensemble"]
    sides = {"held_out_from": 0.5, "held_out_to": 3, "training_from": 0, "training_to": 1.5}
    expected = ensemble[ensemble.mean_depth_held_out.between(0.5, 3) & ensemble.mean_depth_training.between(0, 1.5)]
    assert 0 < len(expected) < len(ensemble)
    found = client.json("/points", architecture="mlp", limit=200, **sides)
    assert found["total"] == len(expected)
    assert {point["point_id"] for point in found["points"]} <= set(expected.point_id)
    assert client.json("/plane", architecture="mlp", **sides) == client.json("/plane", architecture="mlp")


@pytest.mark.parametrize(
    ("sort", "column"),
    [
        ("depth held out", "mean_depth_held_out"),
        ("depth in training", "mean_depth_training"),
        ("accuracy", "held_out_accuracy"),
        ("consistency", "consensus_consistency"),
        ("entropy", "mean_entropy_held_out"),
        ("id", "point_id"),
    ],
)
@pytest.mark.parametrize("descending", [True, False])
def test_pages_in_an_order_are_all_of_the_points(client, tables, sort, column, descending):
    ordered = tables["ensemble"].sort_values("point_id")
    ordered = ordered.sort_values(column, ascending=not descending, kind="stable", na_position="last")
    asked = {"architecture": "mlp", "sort": sort, "descending": descending, "limit": 200}
    found = []
    for offset in range(0, len(ordered) + 200, 200):
        found += client.json("/points", offset=offset, **asked)["points"]
    assert [point["point_id"] for point in found] == ordered.point_id.tolist()
    names = ["key", "part", "label", "clean_label", "consensus_class", "held_out_accuracy", "kind"]
    expected = ordered[names].astype(object).where(ordered[names].notna(), None).to_dict("records")
    assert [{name: point[name] for name in names} for point in found] == expected


def test_about_the_run(client, tables, explored_run):
    about, manifest = client.json("/about"), explored_run.manifest
    assert about["name"] == "explored" and about["status"] == "complete" and about["points"] == len(tables["points"])
    assert (about["configuration"], about["data"]) == (manifest["fingerprint"], manifest["data"]["fingerprint"])
    (architecture,) = about["architectures"]
    assert [one["member"] for one in architecture["members"]] == ["mlp-0", "mlp-1", "mlp-2"]
    assert architecture["probes"] == tables["probes"].query("member == 'mlp-0'").name.tolist()
    assert about["classes"] == [{"label": label, "name": str(label)} for label in range(10)]


def test_a_point_with_its_votes_and_how_it_was_learned(client, tables):
    ensemble = tables["ensemble"]
    one = ensemble[(ensemble.label != ensemble.clean_label) & (ensemble.n_held_out == 1)].iloc[0]
    found = client.json(f"/points/{one.point_id}", architecture="mlp")
    assert (found["label"], found["clean_label"], found["kind"]) == (one.label, one.clean_label, one.kind)
    assert [row["member"] for row in found["members"]] == ["mlp-0", "mlp-1", "mlp-2"]
    for row in found["members"]:
        depths, votes = (own(tables, name, row["member"]).loc[one.point_id] for name in ("depths", "votes"))
        assert [row[name] for name in ("in_training", "prediction", "depth", "unsettled")] == [
            depths[name] for name in ("in_training", "prediction", "depth", "unsettled")
        ]
        assert row["winner"] == votes.winner.tolist() and row["winner_votes"] == votes.winner_votes.tolist()
    right = {}
    for row in tables["learning"][tables["learning"].point_id == one.point_id].itertuples():
        for step, prediction in zip(row.steps, row.predictions, strict=True):
            right.setdefault((row.in_training, step), []).append(prediction == one.label)
    shares = {(row["in_training"], row["step"]): row["right"] for row in found["learning"]}
    assert shares == pytest.approx({key: np.mean(values) for key, values in right.items()})
    assert len(right) > 10 and client.ask("/points/1797?architecture=mlp")[0] == 404


@pytest.mark.parametrize("probe", [0, 2])
def test_neighbours_are_those_of_brute_force_without_the_point_itself(client, tables, explored_run, probe):
    rows = own(tables, "depths", "mlp-1")
    training = rows.index[rows.in_training].to_numpy()
    if probe == 0:
        inputs = load_digits().data / 16
    else:
        member = StoredMember(explored_run.directory, explored_run.manifest, "mlp-1")
        points = stored_points(explored_run.directory, explored_run.manifest)
        inputs = member.embed(points.read(np.arange(len(points))))[0][probe].astype(np.float64)
    for point in (training[5], rows.index[~rows.in_training][5]):
        bank = training[training != point]
        distances = np.linalg.norm(inputs[bank] - inputs[point], axis=1)
        expected = np.lexsort((bank, distances))[:10]
        found = client.json("/neighbours", point_id=point, member="mlp-1", probe=probe)
        assert [row["point_id"] for row in found] == bank[expected].tolist()
        assert [row["distance"] for row in found] == pytest.approx(distances[expected].tolist(), rel=1e-5)
        assert [row["label"] for row in found] == tables["points"].label[bank[expected]].tolist()


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_a_downloaded_selection_travels_with_ids_labels_and_fingerprints(client, tables, explored_run, ending):
    asked = {"member": "mlp-2", "probe": 1, "vote": "disagrees", "sort": "id", "descending": False}
    status, headers, body = client.ask(f"/download.{ending}", architecture="mlp", **asked)
    assert status == 200 and f'filename="explored-selection.{ending}"' in headers["Content-Disposition"]
    read = (pd.read_csv if ending == "csv" else pd.read_parquet)(io.BytesIO(body))
    ensemble = tables["ensemble"]
    expected = ensemble[ensemble.point_id.map(voted(tables, "mlp-2", 1)) != ensemble.label].sort_values("point_id")
    assert 0 < len(expected) < len(ensemble)
    for name in ("point_id", "key", "label", "clean_label", "mean_depth_held_out", "mean_depth_training"):
        assert read[name].tolist() == pytest.approx(expected[name].tolist(), nan_ok=True), name
    assert set(read.configuration_fingerprint) == {explored_run.manifest["fingerprint"]}
    assert set(read.data_fingerprint) == {explored_run.manifest["data"]["fingerprint"]}
    assert read.weights_fingerprint.str.fullmatch("[0-9a-f]{64}").all()
    assert read.kind.nunique() > 1
    status, _, body = client.ask(f"/download.{ending}", architecture="mlp", held_out_from=99)
    assert status == 400 and b"no point is selected" in body


def test_pictures_are_the_points_and_are_named_by_the_data(client, explored_run):
    data = explored_run.manifest["data"]["fingerprint"]
    for size in ("small", "large"):
        status, headers, body = client.ask(f"/images/{data}/{size}/17.png")
        assert status == 200 and headers["Content-Type"] == "image/png" and "max-age" in headers["Cache-Control"]
        shown = np.asarray(Image.open(io.BytesIO(body)).convert("L")).astype(float)
        assert np.abs(shown - load_digits().images[17] * 255 / 16).max() <= 1
    for path in (f"/images/{data}/small/1797.png", f"/images/{data}/huge/1.png", f"/images/{data[:-1]}/small/1.png"):
        assert client.ask(path)[0] == 404
    assert client.json("/images") is True


@pytest.mark.parametrize(
    "path",
    [
        "/plane",
        "/plane?architecture=resnet18",
        "/plane?architecture=mlp&label=three",
        "/plane?architecture=mlp&kind=4",
        "/plane?architecture=mlp&part=validation",
        "/plane?architecture=mlp&member=mlp-9",
        "/plane?architecture=mlp&depth=1",
        "/plane?architecture=mlp&probe=1&member=mlp-0",
        "/plane?architecture=mlp&colour=red",
        "/plane?architecture=mlp&label=1%20OR%201=1",
        "/plane?architecture=mlp&member=mlp-0'%20OR%20'1'='1",
        "/points?architecture=mlp&limit=100000",
        "/points?architecture=mlp&offset=-1",
        "/points?architecture=mlp&sort=point_id;DROP",
        "/points?architecture=mlp&held_out_from=nan",
        "/points?architecture=mlp&held_out_from=inf",
        "/points?architecture=mlp&label=99999999999999999999",
        "/points?architecture=mlp&offset=99999999999999999999999999999999999999999999",
        "/points/0",
        "/points/0?architecture=other",
        "/points/99999999999999999999999?architecture=mlp",
        "/neighbours?point_id=0&member=mlp-0&probe=17",
        "/neighbours?point_id=0&member=../mlp-0&probe=0",
        "/neighbours?point_id=99999&member=mlp-0&probe=0",
        "/download.csv?architecture=mlp&sort=x",
        "/download.npz?architecture=mlp",
        "/static/../server.py",
        "/static/%2e%2e/server.py",
        "/run.json",
    ],
)
def test_what_cannot_be_is_a_plain_line(client, path):
    status, headers, body = client.ask(path)
    assert 400 <= status < 500 and headers["Content-Type"].startswith("text/plain")
    text = body.decode()
    assert text and "\n" not in text and "Traceback" not in text


def test_sql_gives_the_rows_that_pandas_has(client, tables):
    status, answer = client.sql("SELECT label, count(*) AS n FROM points GROUP BY label ORDER BY label")
    counts = tables["points"].groupby("label").size()
    assert status == 200 and answer["rows"] == [[str(label), str(n)] for label, n in counts.items()]
    assert [column["name"] for column in answer["columns"]] == ["label", "n"] and not answer["more"]
    status, answer = client.sql("SELECT point_id FROM depths ORDER BY member, point_id")
    assert answer["more"] and answer["rows"] == [[str(number)] for number in range(1000)]
    status, answer = client.sql("SELECT 'nan'::DOUBLE, NULL, [1, 2], '<b>', 9007199254740993 FROM points LIMIT 1")
    assert answer["rows"] == [["nan", None, "[1, 2]", "<b>", "9007199254740993"]]
    assert client.sql("SELECT 1 WHERE false")[1]["rows"] == []


def test_sql_reads_and_writes_nothing_outside_the_run(client, explored_run, tmp_path):
    outside = tmp_path / "outside.csv"
    outside.write_text("a\n1\n")
    before = sorted(path.name for path in Path.cwd().iterdir())
    for query in (
        f"SELECT * FROM '{outside}'",
        f"SELECT * FROM read_csv('{outside}')",
        f"SELECT * FROM read_text('{explored_run.directory.root}/../../../../../../../../etc/passwd')",
        "SELECT * FROM glob('/etc/*')",
        f"COPY points TO '{tmp_path / 'written.csv'}'",
        f"ATTACH '{tmp_path / 'written.db'}'",
        f"EXPORT DATABASE '{tmp_path / 'written'}'",
        "CREATE TABLE written AS SELECT 1",
        "DROP VIEW points",
        "SELECT 1; SELECT 2",
        "SET enable_external_access = true",
        "INSTALL httpfs",
        "LOAD httpfs",
        "SELECT * FROM 'https://example.org/x.parquet'",
        "",
        "SELEC 1",
    ):
        status, said = client.sql(query)
        assert status == 400 and said.startswith("query: ") and "\n" not in said, (query, said)
    assert list(tmp_path.iterdir()) == [outside]
    assert sorted(path.name for path in Path.cwd().iterdir()) == before
    assert client.sql("SELECT count(*) FROM points")[1]["rows"] == [["1797"]]


def test_sql_that_takes_too_long_or_fails_late_is_given_up(explored_run):
    endless = "SELECT count(*) FROM range(1000000000000) AS a, range(1000000) AS b"
    with pytest.raises(LeadlineError, match=r"given up after 0\.5 s"):
        list(explored_run.batches(endless, seconds=0.5))
    late = "SELECT CASE WHEN range = 700000 THEN error('late') ELSE range END FROM range(1000000)"
    with pytest.raises(LeadlineError, match="late"):
        list(explored_run.batches(late))


def test_other_pages_cannot_ask(client):
    host = urlsplit(client.address).netloc
    for origin in ("http://example.org", "null", f"http://{host.replace('127.0.0.1', 'localhost')}"):
        status, said = client.sql("SELECT 1", Origin=origin)
        assert status == 403 and origin in said
    assert client.sql("SELECT 1", Origin=client.address)[0] == 200
    # A name of somebody's that points to this machine.
    for name in ("example.org", f"example.org:{host.rpartition(':')[2]}", "127.0.0.1.example.org", ""):
        assert client.ask("/about", headers={"Host": name})[0] == 403
    for name in ("localhost", host, "127.0.0.1", "[::1]:80"):
        assert client.ask("/about", headers={"Host": name})[0] == 200
    assert client.ask("/about", b"{}")[0] == 405
    assert client.ask("/sql")[0] == 405
    assert client.ask("/sql", b"x" * 200_000)[0] == 413
    assert client.ask("/sql", b"{}")[0] == 400


def test_every_answer_tells_browsers_to_run_nothing_else(client):
    for path in ("/", "/about", "/static/app.js", "/vega.js", "/nothing", "/plane", "/static/style.css"):
        status, headers, _ = client.ask(path)
        policy = headers["Content-Security-Policy"]
        assert "default-src 'self'" in policy and "unsafe" not in policy, (path, status)
        assert headers["X-Content-Type-Options"] == "nosniff" and headers["Cache-Control"]


def test_a_token_is_asked_of_every_request(explored_run, explore):
    with explore(explored_run.directory.root, "--token", "a-long-word") as address:
        parts = urlsplit(address)
        assert parts.query == "token=a-long-word"
        client = Client(f"http://{parts.netloc}")
        every = (
            "/",
            "/about",
            "/vega.js",
            "/static/app.js",
            "/plane?architecture=mlp",
            "/nothing",
            "/about?token=a-long-word",
        )
        for path in (*every, "/?token=a-long-wore", "/?token="):
            assert client.ask(path)[0] == 403, path
        assert client.sql("SELECT 1")[0] == 403
        assert client.ask("/about", headers={"Cookie": f"leadline-{parts.port}=a-long-wore"})[0] == 403
        status, _, body = client.ask("/?token=a-long-word")
        assert status == 200 and b"<title>Leadline" in body  # sent on, with the cookie
        assert client.json("/about")["name"] == "explored" and client.sql("SELECT 1")[0] == 200


def test_other_addresses_need_a_token_and_are_given_one(explored_run, explore):
    with explore(explored_run.directory.root, "--host", "0.0.0.0") as address:
        parts = urlsplit(address)
        assert parts.hostname == "0.0.0.0" and re.fullmatch(r"token=[\w-]{32}", parts.query)
        client = Client(f"http://127.0.0.1:{parts.port}")
        assert client.ask("/about")[0] == 403
        connection = http.client.HTTPConnection("127.0.0.1", parts.port, timeout=60)
        connection.request("GET", f"/?{parts.query}")
        answer = connection.getresponse()
        assert answer.status == 303 and answer.headers["Location"] == "/"
        assert "HttpOnly" in answer.headers["Set-Cookie"] and "samesite=strict" in answer.headers["Set-Cookie"].lower()
        connection.close()
        assert client.ask(f"/?{parts.query}")[0] == 200 and client.json("/about")["points"] == 1797


@pytest.fixture
def copy(explored_run, tmp_path):
    """Of the run, to be spoilt."""
    return Path(shutil.copytree(explored_run.directory.root, tmp_path / "copy"))


def change_manifest(run, change):
    manifest = json.loads((run / "run.json").read_text())
    change(manifest)
    (run / "run.json").write_text(json.dumps(manifest))


def test_without_its_data_a_run_is_shown_without_pictures(copy, explore):
    gone = {"source": "npy", "inputs": "gone.npy", "labels": "gone-too.npy"}
    change_manifest(copy, lambda manifest: manifest["configuration"].update(points=gone))
    with explore(copy) as address:
        client = Client(address)
        data = client.json("/about")["data"]
        for path in ("/images", f"/images/{data}/small/0.png"):
            status, _, body = client.ask(path)
            assert status == 400 and b"gone.npy" in body
        assert client.json("/points", architecture="mlp")["total"] == 1797


def test_other_data_than_the_run_s_are_not_shown(copy, explore):
    other = {"source": "digits", "corrupt": {"share": 0.2}}
    change_manifest(copy, lambda manifest: manifest["configuration"].update(points=other))
    with explore(copy) as address:
        status, _, body = Client(address).ask("/images")
        assert status == 400 and b"data have changed" in body


def test_a_table_that_is_damaged_is_told_where_it_is_asked(copy, explore):
    votes = copy / "votes" / "member=mlp-0" / "part-0.parquet"
    votes.write_bytes(votes.read_bytes()[:-100])
    with explore(copy) as address:
        client = Client(address)
        status, _, body = client.ask("/points/3", architecture="mlp")
        assert status == 400 and b"part-0.parquet" in body and b"\n" not in body
        assert client.json("/points", architecture="mlp")["total"] == 1797


@pytest.mark.parametrize("case", ["unfinished", "damaged", "no manifest", "half a manifest", "empty table", "empty"])
def test_a_run_that_cannot_be_shown_ends_in_one_line(copy, tmp_path, case):
    says = {
        "unfinished": "the run is running; finish it",
        "damaged": "ensemble.parquet: cannot be read",
        "no manifest": "no run here",
        "half a manifest": "damaged (no configuration)",
        "empty table": "no points",
        "empty": "no run here",
    }
    ensemble = copy / "ensemble.parquet"
    if case == "unfinished":
        change_manifest(copy, lambda manifest: manifest.update(status="running"))
    elif case == "damaged":
        ensemble.write_bytes(ensemble.read_bytes()[:1000])
    elif case == "no manifest":
        (copy / "run.json").unlink()
    elif case == "half a manifest":
        change_manifest(copy, lambda manifest: manifest.pop("configuration"))
    elif case == "empty table":
        for table in ("points", "ensemble"):
            pd.read_parquet(copy / f"{table}.parquet").iloc[:0].to_parquet(copy / f"{table}.parquet")
    else:
        copy = tmp_path / "nothing"
        copy.mkdir()
    refused(copy, says=says[case])


def test_addresses_and_tokens_that_cannot_be(explored_run):
    root = explored_run.directory.root
    refused(root, "--token", "short", says="--token")
    refused(root, "--host", "example.invalid", says="example.invalid")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        refused(root, "--port", str(taken.getsockname()[1]), says="not to be had")


def refused(run, *options, says):
    command = [str(Path(sys.executable).with_name("leadline")), "explore", str(run), *options]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stdout) == (2, ""), ended
    (line,) = ended.stderr.splitlines()
    assert line.startswith("leadline: ") and says in line, line


def test_two_architectures_have_their_own_members_and_planes(watched_run, explore):
    with explore(watched_run.directory.root) as address:
        client = Client(address)
        about = client.json("/about")
        assert {one["name"]: len(one["members"]) for one in about["architectures"]} == {"mlp": 2, "plain": 1}
        for name, n in (("mlp", 2), ("plain", 1)):
            assert client.json("/points", architecture=name)["total"] == about["points"]
            assert len(client.json("/points/0", architecture=name)["members"]) == n
        assert client.ask("/plane", architecture="plain", member="mlp-0", depth=1)[0] == 400
        # Of one member, a point is held out or in training: none has a place in the plane.
        plane = client.json("/plane", architecture="plain")
        assert plane["unplaced"] == about["points"] and plane["bins"] == [] and plane["thresholds"] is None
        status, _, body = client.ask("/neighbours", point_id=0, member="mlp-0", probe=1)
        assert status == 400 and b"engine.keep_indexes: true" in body
        assert leadline.open(watched_run.directory.root).manifest == watched_run.manifest


def test_a_run_in_a_bucket_is_explored_alike(s3, bucket, explored_run):
    root = explored_run.directory.root
    for path in (path for path in root.rglob("*") if path.suffix in (".parquet", ".json")):
        s3.upload_file(str(path), bucket, f"run/{path.relative_to(root)}")
    there, here = Explorer(leadline.open(f"s3://{bucket}/run")), Explorer(explored_run)
    assert there.about == here.about
    selection = {"architecture": "mlp", "member": "mlp-1", "probe": 2, "vote": "disagrees"}
    assert there.plane(Selection(**selection)) == here.plane(Selection(**selection))
    page = Page(**selection, limit=20)
    assert there.points(page) == here.points(page) and here.points(page)["total"] > 0
    assert there.point(7, "mlp") == here.point(7, "mlp")
