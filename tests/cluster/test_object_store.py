"""Runs on an S3 server, over a line that breaks: the same tables, and at no moment a file that cannot be read."""

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from line import Line
from safetensors.torch import load as load_safetensors
from tiny import TINY, tables_of

import leadline
from leadline import LeadlineError
from leadline.config import load_config
from leadline.points import open_points
from leadline.store.places import place_of
from leadline.store.verify import verify

LEADLINE = str(Path(sys.executable).with_name("leadline"))
READERS = {
    "parquet": lambda content: pq.ParquetFile(io.BytesIO(content), page_checksum_verification=True).read(),
    "json": json.loads,
    "jsonl": lambda content: [json.loads(line) for line in content.splitlines()],
    "npy": lambda content: np.load(io.BytesIO(content), allow_pickle=False),
    "safetensors": load_safetensors,
}


def objects(s3, bucket):
    """Contents of all objects that a listing shows, by name; those that are removed meanwhile are left out."""
    found = {}
    for page in s3.get_paginator("list_objects_v2").paginate(Bucket=bucket):
        for entry in page.get("Contents", []):
            try:
                found[entry["Key"]] = s3.get_object(Bucket=bucket, Key=entry["Key"])["Body"].read()
            except s3.exceptions.NoSuchKey:
                continue
    return found


def tables_in(s3, bucket, prefix):
    """As `tables_of`, of a run in a bucket."""
    return {
        name.removeprefix(f"{prefix}/"): READERS["parquet"](content).replace_schema_metadata()
        for name, content in objects(s3, bucket).items()
        if name.endswith(".parquet")
    }


@pytest.fixture
def line(s3):
    """Make a line to the server: (line, the environment of a process that goes over it)."""
    lines = []

    def make(fault):
        lines.append(Line(int(os.environ["AWS_ENDPOINT_URL"].rpartition(":")[2]), fault))
        return lines[-1], {**os.environ, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{lines[-1].port}"}

    yield make
    for made in lines:
        made.close()


@pytest.fixture
def command(tmp_path, bucket):
    config = tmp_path / "tiny.yaml"
    config.write_text(yaml.safe_dump(TINY))
    return [LEADLINE, "run", str(config), "--out", f"s3://{bucket}/runs/tiny"]


@pytest.mark.slow
def test_a_run_over_a_bad_line(s3, bucket, line, command, tiny_run):
    """Every fourth write breaks off or is refused, while everything that a listing shows is read all the time."""
    writes, over, seen, unreadable = [], threading.Event(), set(), []

    def fault(request):
        if request.startswith("PUT"):
            writes.append(request)
        return None if len(writes) % 4 else ("cut", "refuse")[len(writes) // 4 % 2]

    def watch():
        while not over.is_set():
            for name, content in objects(s3, bucket).items():
                seen.add(name)
                try:
                    READERS[name.rpartition(".")[2]](content)
                except Exception as error:  # whatever a reader says of half a file
                    unreadable.append((name, error))

    bad, environment = line(fault)
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        answer = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    finally:
        over.set()
        watcher.join()
    assert answer.returncode == 0, answer.stderr
    assert "the hardest points" in answer.stdout and f"tables in s3://{bucket}/runs/tiny" in answer.stdout
    assert len(bad.faults) > 20
    assert unreadable == []
    assert {name.split("/")[2] for name in seen} >= {"units", "weights", "drivers", "run.json"}
    assert tables_in(s3, bucket, "runs/tiny") == tables_of(tiny_run.directory.root)
    run = leadline.open(f"s3://{bucket}/runs/tiny")
    assert verify(run.directory) == []
    assert not [name for name in objects(s3, bucket) if "/units/vote/" in name or "/units/share/" in name]
    expect_same_answers(run, tiny_run)
    expect_damage_is_found(s3, bucket, run)


def expect_same_answers(run, local):
    query = """
        SELECT p.label_name, member, avg(depth) AS depth, sum(winner_votes[3])::BIGINT AS votes
        FROM depths JOIN votes USING (member, point_id) JOIN points p USING (point_id) JOIN members USING (member)
        WHERE point_id < 1000 GROUP BY ALL ORDER BY ALL
    """
    assert run.sql(query).equals(local.sql(query))
    assert run.sql("DESCRIBE votes").equals(local.sql("DESCRIBE votes"))
    for name in ("points", "members", "probes", "ensemble", "depths", "votes"):
        assert getattr(run, name).to_table().sort_by(getattr(run, name).schema.names[0]).num_rows == (
            getattr(local, name).count_rows()
        )
    for refused in ("SELECT * FROM read_csv('/etc/passwd')", f"SELECT * FROM '{run.directory.root}/points.parquet'"):
        with pytest.raises(LeadlineError, match="query"):
            run.sql(refused)


def expect_damage_is_found(s3, bucket, run):
    key = "runs/tiny/votes/member=mlp-1/part-0.parquet"
    content = bytearray(s3.get_object(Bucket=bucket, Key=key)["Body"].read())
    content[len(content) // 2] ^= 1
    s3.put_object(Bucket=bucket, Key=key, Body=bytes(content))
    s3.put_object(Bucket=bucket, Key="runs/tiny/depths/more.parquet", Body=b"")
    assert verify(run.directory) == [
        f"s3://{bucket}/runs/tiny/depths/more.parquet: not a file of this run; remove it",
        f"s3://{bucket}/{key}: damaged or changed (its SHA-256 is not the manifest's)",
    ]


@pytest.mark.slow
def test_a_driver_that_is_killed_while_a_table_goes_up(s3, bucket, line, command, tiny_run):
    """When half of the table is there, the driver is killed; its worker gets nothing more through till it ends."""
    table = "depths/member=mlp-1/part-0.parquet"
    drivers = []

    def fault(request):
        if request.startswith("PUT") and "mlp-1/part-0.parquet" in request and "depths" in request:
            return "refuse" if drivers[0].returncode is not None else kill
        return None

    def kill():
        drivers[0].send_signal(signal.SIGKILL)
        drivers[0].wait()

    bad, environment = line(fault)
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as driver:
        drivers.append(driver)
        driver.wait(240)
    assert bad.faults
    time.sleep(1)  # Ray's processes notice that their driver is gone
    there = tables_in(s3, bucket, "runs/tiny")
    assert table not in there and "points.parquet" in there
    place = place_of(f"s3://{bucket}/runs/tiny")
    assert verify(leadline.open(str(place)).directory) == [
        f"{place}/run.json: the run is running; finish it with the same command"
    ]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert finished.returncode == 0, finished.stderr
    assert "train  3/3 units are there already" in finished.stderr
    assert tables_in(s3, bucket, "runs/tiny") == tables_of(tiny_run.directory.root)
    assert verify(leadline.open(str(place)).directory) == []
    changed = subprocess.run([*command, "--set", "k=11"], capture_output=True, text=True)
    assert (changed.returncode, "k was 10, is now 11" in changed.stderr) == (2, True)


@pytest.mark.slow
def test_indexes_directions_and_banks_are_kept_there(s3, bucket, tmp_path):
    pytest.importorskip("faiss")
    config = {
        **TINY,
        "reduction": {"hidden.1": "pca:8"},
        "method": {"hidden.*": "hnsw:m=8,ef=32"},
        "engine": {**TINY["engine"], "keep_indexes": True},
    }
    local = leadline.run(config, tmp_path / "run")
    run = leadline.run(config, f"s3://{bucket}/run")
    assert tables_in(s3, bucket, "run") == tables_of(tmp_path / "run")
    assert run.manifest["files"].keys() == local.manifest["files"].keys()
    assert any(name.endswith(".index") for name in run.manifest["files"])
    assert verify(run.directory) == []
    inputs = open_points(load_config(TINY).points).read(np.arange(50))
    assert run.depth_of("mlp-1", inputs).equals(local.depth_of("mlp-1", inputs))
    kept = "run/indexes/mlp-1/001.npy"
    content = s3.get_object(Bucket=bucket, Key=kept)["Body"].read()
    s3.put_object(Bucket=bucket, Key=kept, Body=content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(LeadlineError, match=f"s3://{bucket}/{kept}.*SHA-256"):
        run.depth_of("mlp-1", inputs)


def test_a_place_without_a_run_or_of_something_else(s3, bucket):
    s3.put_object(Bucket=bucket, Key="notes/a.txt", Body=b"mine")
    with pytest.raises(LeadlineError, match="notes: not empty and no run"):
        leadline.run(TINY, f"s3://{bucket}/notes")
    assert list(objects(s3, bucket)) == ["notes/a.txt"]
    with pytest.raises(LeadlineError, match="no run here"):
        leadline.open(f"s3://{bucket}/nothing")
    with pytest.raises(LeadlineError, match=f"s3://{bucket}-not.*NoSuchBucket"):
        leadline.run(TINY, f"s3://{bucket}-not/run")
