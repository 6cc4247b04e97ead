"""Files in an object store, on a real S3 server: whole or not there, whatever happens to a write."""

import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from line import Line

from leadline import LeadlineError
from leadline.errors import StorageError
from leadline.store.files import create, digest, fetched, filling, names, read_json, remove, replacing, write_json
from leadline.store.places import place_of

PART = 5 << 20  # bytes of a part of an upload in several


def keys(s3, bucket):
    return [entry["Key"] for entry in s3.list_objects_v2(Bucket=bucket).get("Contents", [])]


def body(s3, bucket, key):
    return s3.get_object(Bucket=bucket, Key=key)["Body"].read()


@pytest.fixture
def line(s3, monkeypatch):
    """Make a line to the server that the environment then points to."""
    lines = []

    def make(fault):
        lines.append(Line(int(os.environ["AWS_ENDPOINT_URL"].rpartition(":")[2]), fault))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{lines[-1].port}")
        return lines[-1]

    yield make
    for made in lines:
        made.close()


def test_places_are_paths_or_objects(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert place_of("runs/a") == tmp_path / "runs" / "a"
    assert place_of(tmp_path) == tmp_path
    place = place_of("s3://mine/runs/a/")
    assert str(place) == "s3://mine/runs/a"
    assert str(place / "b.x.npy") == "s3://mine/runs/a/b.x.npy"
    assert (place / "b.npy").parent == place == pickle.loads(pickle.dumps(place))
    assert (place / "b.npy").with_suffix(".json").name == "b.json"
    assert str(place_of("gs://mine")) == "gs://mine"
    for wrong in ("http://mine/a", "s3://", "s3:///a"):
        with pytest.raises(LeadlineError, match="no place of a run"):
            place_of(wrong)


def test_files_are_written_found_read_and_removed(s3, bucket):
    root = place_of(f"s3://{bucket}/runs/a")
    write_json(root / "a.json", {"a": 1})
    write_json(root / "deep" / "b.json", {"b": 2})
    write_json(place_of(f"s3://{bucket}/runs/ab.json"), {})  # begins alike, and is not in the folder
    assert body(s3, bucket, "runs/a/a.json") == b'{\n "a": 1\n}\n'
    assert read_json(root / "a.json") == {"a": 1}
    assert names(root) == {"a.json"} and names(root / "nowhere") == frozenset()
    assert sorted(map(str, root.rglob("*.json"))) == [f"{root}/a.json", f"{root}/deep/b.json"]
    assert (root / "deep").exists() and not (root / "deep").is_file() and not (root / "dee").exists()
    remove(root)
    assert keys(s3, bucket) == ["runs/ab.json"]
    with pytest.raises(LeadlineError, match=r"a\.json: damaged"):
        read_json(root / "a.json")


def test_large_files_go_up_and_come_down_whole(s3, bucket):
    content = os.urandom(2 * PART + 1)
    place = place_of(f"s3://{bucket}/large")
    with replacing(place) as beside:
        beside.write_bytes(content)
    assert body(s3, bucket, "large") == content
    with fetched(place, sha256=digest(place)) as path:
        assert path.read_bytes() == content
    assert not path.exists()
    with place.open("rb") as opened:
        opened.seek(-10, os.SEEK_END)
        assert opened.read() == content[-10:]
        opened.seek(PART)
        assert opened.read(7) == content[PART : PART + 7]
    with pytest.raises(LeadlineError, match=r"large: missing, damaged or changed"), fetched(place, sha256="0"):
        pass
    with (
        pytest.raises(LeadlineError, match=r"other: missing, damaged or changed"),
        fetched(place, place_of(f"{place.parent}/other")),
    ):
        pass
    with pytest.raises(FileNotFoundError):
        (place.parent / "other").open("rb")


def test_a_failed_write_publishes_nothing(s3, bucket):
    place = place_of(f"s3://{bucket}/a.json")
    write_json(place, {"a": 1})
    with pytest.raises(ValueError, match="boom"), replacing(place) as beside:
        beside.write_text("half")
        raise ValueError("boom")
    with pytest.raises(ValueError, match="boom"), filling(place.parent) as folder:
        (folder / "b").write_text("whole")
        raise ValueError("boom")
    assert read_json(place) == {"a": 1}
    assert keys(s3, bucket) == ["a.json"]


def test_only_the_first_creates(s3, bucket, tmp_path):
    for place in (place_of(f"s3://{bucket}/1.json"), tmp_path / "folder" / "1.json"):
        assert [create(place, {"by": i}) for i in range(3)] == [True, False, False]
        assert read_json(place) == {"by": 0}
        assert names(place.parent) == {"1.json"}


def test_only_the_first_creates_without_hard_links(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(1, "Operation not permitted")  # as exFAT says

    monkeypatch.setattr(os, "link", refuse)
    assert [create(tmp_path / "1.json", {"by": i}) for i in range(3)] == [True, False, False]
    assert read_json(tmp_path / "1.json") == {"by": 0}
    assert names(tmp_path) == {"1.json"}


@pytest.mark.parametrize("fault", ["cut", "refuse"])
def test_a_write_that_breaks_off_is_made_again(s3, bucket, line, fault):
    """The first two tries break, the second of them for what is uploaded in parts too."""
    broken = line(lambda request: fault if len(broken.faults) < 2 else None)
    place, content = place_of(f"s3://{bucket}/large"), os.urandom(PART + 1)
    write_json(place, {"a": 1})
    assert len(broken.faults) == 2
    assert body(s3, bucket, "large") == b'{\n "a": 1\n}\n'
    broken.faults.clear()
    with replacing(place) as beside:
        beside.write_bytes(content)
    assert any("partNumber" in request for request in broken.faults)
    assert body(s3, bucket, "large") == content


@pytest.mark.parametrize("size", [1 << 20, 2 * PART])
def test_a_kill_during_an_upload_leaves_the_old_object(s3, bucket, line, size):
    place = place_of(f"s3://{bucket}/a")
    s3.put_object(Bucket=bucket, Key="a", Body=b"old")
    seen = []

    def kill():
        os.kill(writer.pid, signal.SIGKILL)
        seen.append(body(s3, bucket, "a"))

    line(lambda request: kill if request.startswith("PUT") else None)
    program = (
        "import os, sys; from leadline.store.files import replacing; from leadline.store.places import place_of\n"
        "with replacing(place_of(sys.argv[1])) as beside: beside.write_bytes(os.urandom(int(sys.argv[2])))\n"
    )
    with subprocess.Popen([sys.executable, "-c", program, str(place), str(size)]) as writer:
        assert writer.wait(60) == -signal.SIGKILL
    time.sleep(0.5)  # the server notices that the rest does not come
    assert set(seen) == {b"old"}
    assert body(s3, bucket, "a") == b"old" and keys(s3, bucket) == ["a"]


def test_what_the_store_refuses_is_one_line(s3, bucket):
    nowhere = place_of(f"s3://{bucket}-not/a.json")
    for ask in (lambda: write_json(nowhere, {}), lambda: names(nowhere.parent), lambda: create(nowhere, {})):
        with pytest.raises(StorageError, match=r"s3://.*NoSuchBucket.*check the bucket") as error:
            ask()
        assert "\n" not in str(error.value)
    assert isinstance(pickle.loads(pickle.dumps(error.value)), StorageError)  # as it comes from an actor
    assert not nowhere.is_file()


def test_local_files_are_read_where_they_are(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"a")
    with fetched(path, sha256=digest(path)) as same, filling(tmp_path / "b") as folder:
        assert same == path and folder == Path(tmp_path / "b")
