"""KubeRay's manifests: held against its published resource definitions, and against what they start."""

import copy
from pathlib import Path

import jsonschema
import pytest
import yaml

from leadline.config import load_config

ROOT = Path(__file__).parents[2]
MANIFESTS = ROOT / "deploy" / "kuberay"
DEFINITIONS = ROOT.parent / "shared" / "data" / "kuberay"


def read(name):
    return yaml.safe_load((MANIFESTS / name).read_text())


def merged(tree, patch):
    """RFC 7386, which is what kustomize does with a resource of a definition that it does not know."""
    if not isinstance(patch, dict):
        return patch
    tree = dict(tree) if isinstance(tree, dict) else {}
    for key, value in patch.items():
        if value is None:
            tree.pop(key, None)
        else:
            tree[key] = merged(tree.get(key), value)
    return tree


def queued():
    """rayjob.yaml as `kubectl apply -k` sends it."""
    kustomization = read("kustomization.yaml")
    tree = read(*kustomization["resources"])
    for patch in kustomization["patches"]:
        tree = merged(tree, read(patch["path"]))
    return tree


def cluster_of(manifest):
    return manifest["spec"].get("rayClusterSpec", manifest["spec"])


def manifests():
    return {"job": read("rayjob.yaml"), "queued job": queued(), "cluster": read("raycluster.yaml")}


def close(schema):
    """Let no object of a schema have unknown keys, in place: the API server drops them without a word."""
    if isinstance(schema, dict):
        if schema.get("type") == "object":
            schema.setdefault("additionalProperties", False)
        for part in schema.values():
            close(part)


def closed(schema):
    """A definition's schema, closed, with the few keys of metadata that we use: it leaves those to the API server."""
    names = {"type": "object", "additionalProperties": {"type": "string"}}
    schema["properties"]["metadata"] = {"type": "object", "properties": {"name": {"type": "string"}, "labels": names}}
    close(schema)
    return schema


@pytest.fixture(scope="module")
def mistakes():
    """All that a resource's definition has against a manifest, as texts."""
    validators = {}
    for name in ("rayjobs", "rayclusters"):
        path = DEFINITIONS / f"ray.io_{name}.yaml"
        if not path.is_file():
            pytest.skip(f"{path}: KubeRay's definitions are not here")
        definition = yaml.load(path.read_text(), yaml.CSafeLoader)["spec"]
        (schema,) = (v["schema"]["openAPIV3Schema"] for v in definition["versions"] if v["name"] == "v1")
        validators[definition["names"]["kind"]] = jsonschema.Draft202012Validator(closed(schema))

    def find(manifest):
        assert manifest["apiVersion"] == "ray.io/v1"
        return [f"{e.json_path}: {e.message}" for e in validators[manifest["kind"]].iter_errors(manifest)]

    return find


@pytest.mark.parametrize("which", manifests())
def test_manifests_follow_the_definitions(mistakes, which):
    assert mistakes(manifests()[which]) == []


def misspelt(manifest):
    """The manifest with one key misspelt, for every key in it whose name is KubeRay's or Kubernetes's to choose."""
    free = {"labels", "annotations", "rayStartParams", "requests", "limits"}

    def places(node, path=()):
        if isinstance(node, dict):
            for key in node:
                yield (*path, key)
                if key not in free:
                    yield from places(node[key], (*path, key))
        elif isinstance(node, list):
            for i, part in enumerate(node):
                yield from places(part, (*path, i))

    for *parents, key in places(manifest):
        tree = copy.deepcopy(manifest)
        node = tree
        for parent in parents:
            node = node[parent]
        if parents:
            node[key + "s"] = node.pop(key)
            yield tree, ".".join(map(str, [*parents, key]))


def test_every_misspelt_key_is_found(mistakes):
    found = [place for tree, place in misspelt(read("rayjob.yaml")) if mistakes(tree)]
    every = [place for _, place in misspelt(read("rayjob.yaml"))]
    assert found == every and len(every) > 50


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("backoffLimit",), "three"),
        (("rayClusterSpec", "authOptions", "mode"), "tokens"),
        (("rayClusterSpec", "headGroupSpec", "rayStartParams", "num-cpus"), 0),
        (("rayClusterSpec", "workerGroupSpecs"), [{"groupName": "gpu"}]),
    ],
)
def test_wrong_values_are_found(mistakes, place, value):
    tree = read("rayjob.yaml")
    node = tree["spec"]
    for key in place[:-1]:
        node = node[key]
    node[place[-1]] = value
    assert mistakes(tree)


@pytest.mark.parametrize("which", manifests())
def test_what_the_operator_refuses_beside_its_definitions(which):
    """Read in its validation: not written in the definitions."""
    spec, cluster = manifests()[which]["spec"], cluster_of(manifests()[which])
    assert cluster["authOptions"]["mode"] == "token" and cluster["rayVersion"]
    if spec.get("suspend") or "ttlSecondsAfterFinished" in spec:
        assert spec["shutdownAfterJobFinishes"]
    for group in cluster["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    pods = [group["template"]["spec"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]
    assert all(pod.get("restartPolicy", "Never") == "Never" for pod in pods)  # autoscaler v2


@pytest.mark.parametrize("which", manifests())
def test_pods_have_what_ray_and_the_run_need(which):
    cluster = cluster_of(manifests()[which])
    head, (workers,) = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
    assert head["rayStartParams"]["num-cpus"] == "0"
    (claim,) = {read("storage.yaml")["metadata"]["name"]}
    assert read("storage.yaml")["spec"]["accessModes"] == ["ReadWriteMany"]
    images = set()
    for group in (head, workers):
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        images.add(container["image"])
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
        assert mounts["/shared"]["persistentVolumeClaim"]["claimName"] == claim
        memory = mounts["/dev/shm"]["emptyDir"]
        assert memory["medium"] == "Memory"
        object_store = int(group["rayStartParams"]["object-store-memory"])
        assert object_store < gibibytes(memory["sizeLimit"]) < gibibytes(container["resources"]["limits"]["memory"]) / 4
    assert len(images) == 1
    # All pods of a queued job are admitted together, so nothing may start others.
    assert cluster["enableInTreeAutoscaling"] == (which != "queued job")


def test_a_queued_job_waits_for_its_queue():
    job = queued()
    assert job["spec"]["suspend"] is True
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"]
    assert job["spec"]["entrypoint"] == read("rayjob.yaml")["spec"]["entrypoint"]


def test_a_job_s_cluster_is_the_one_that_stays():
    assert cluster_of(read("rayjob.yaml")) == cluster_of(read("raycluster.yaml"))


def test_workers_have_room_for_the_job():
    job = read("rayjob.yaml")
    _, script, config, out, run = job["spec"]["entrypoint"].split()
    assert (script, out) == ("/opt/leadline/jobs/compute_depths.py", "--out") and run.startswith("/shared/")
    engine = load_config(ROOT / Path(config).relative_to("/opt/leadline")).engine
    (workers,) = cluster_of(job)["workerGroupSpecs"]
    (container,) = workers["template"]["spec"]["containers"]
    limits = container["resources"]["limits"]
    assert engine.threads <= int(limits["cpu"]) and 0 < engine.gpus <= int(limits["nvidia.com/gpu"])
    assert engine.memory_budget < gibibytes(limits["memory"]) / 2


def gibibytes(text):
    assert text.endswith("Gi"), text
    return int(text.removesuffix("Gi")) << 30
