"""Each job's cluster begins with the head alone, and has only the groups that the job needs."""

import pytest

from pipeline.commands import attempts
from tests.k8s import schemas
from tests.k8s.render import K8S, Object, render
from tests.k8s.test_manifests import find, job_spec, parse_entrypoint

GPUS = ["gpu", "gpu-spot"]
ON_GPUS = ("train", "tune", "generate", "nightly")
GROUPS = {
    "local": {name: ["cpu"] for name in ("prepare", "evaluate", *ON_GPUS)},
    "gpu": {"prepare": ["cpu"], "evaluate": ["gpu"], **dict.fromkeys(ON_GPUS, GPUS)},
}


def groups(thing: Object) -> dict[str, Object]:
    return {one["groupName"]: one for one in job_spec(thing)["rayClusterSpec"]["workerGroupSpecs"]}


def test_each_job_has_its_groups(overlay: str, jobs: list) -> None:
    assert {thing["metadata"]["name"]: list(groups(thing)) for thing in jobs} == GROUPS[overlay]


def test_a_job_begins_with_the_head_alone(jobs: list) -> None:
    for thing in jobs:
        assert job_spec(thing)["rayClusterSpec"]["enableInTreeAutoscaling"]
        for group in groups(thing).values():
            assert (group["replicas"], group["minReplicas"]) == (0, 0) and group["maxReplicas"] > 0


def test_its_groups_and_head_are_those_of_the_standing_cluster(standing: list, jobs: list) -> None:
    cluster = find(standing, "RayCluster", "ray-ddpm")["spec"]
    whole = {one["groupName"]: one for one in cluster["workerGroupSpecs"]}
    for thing in jobs:
        spec = job_spec(thing)["rayClusterSpec"]
        assert {**spec, "workerGroupSpecs": 0, "headGroupSpec": 0} == {
            **cluster,
            "workerGroupSpecs": 0,
            "headGroupSpec": 0,
        }
        for name, group in groups(thing).items():
            assert {**group, "replicas": 0, "minReplicas": 0} == {
                **whole[name],
                "replicas": 0,
                "minReplicas": 0,
            }
        head = spec["headGroupSpec"]["template"]["spec"]["containers"][0]
        mine = cluster["headGroupSpec"]["template"]["spec"]["containers"][0]
        assert head == mine | {"env": head["env"]}


def test_gpus_stand_in_a_jobs_groups_where_its_flags_ask_for_them(overlay: str, jobs: list) -> None:
    for thing in jobs:
        limits = [
            group["template"]["spec"]["containers"][0]["resources"]["limits"]
            for group in groups(thing).values()
        ]
        gpu = getattr(parse_entrypoint(job_spec(thing)["entrypoint"]), "gpu", None)
        if gpu is not None:
            assert all(bool(gpu) == ("nvidia.com/gpu" in limit) for limit in limits), schemas.path_of(thing)
        elif thing["metadata"]["name"] == "prepare":
            assert all("nvidia.com/gpu" not in limit for limit in limits)


def test_a_workers_reservation_fits_a_node_of_its_groups(jobs: list) -> None:
    for thing in jobs:
        config = parse_entrypoint(job_spec(thing)["entrypoint"])
        each = getattr(config, "cpus_per_worker", None) or 1
        for group in groups(thing).values():
            (worker,) = group["template"]["spec"]["containers"]
            assert each <= int(worker["resources"]["limits"]["cpu"]), schemas.path_of(thing)


def test_a_job_that_was_refused_leaves_its_note_where_the_next_head_finds_it(jobs: list) -> None:
    for thing in jobs:
        spec = job_spec(thing)
        assert spec["backoffLimit"] == attempts.FURTHER
        assert spec["preRunningDeadlineSeconds"] <= attempts.SECONDS
        (head,) = spec["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"]
        (folder,) = [one["value"] for one in head["env"] if one["name"] == attempts.FOLDER]
        assert any(folder.startswith(mount["mountPath"] + "/") for mount in head["volumeMounts"])
    standing = render(K8S / "overlays" / "local")
    assert attempts.FOLDER not in str(standing)  # who submits again there does so on purpose


@pytest.fixture
def kept(overlay: str, tmp_path) -> list[Object]:
    """The jobs, with the component that keeps failed clusters."""
    folder = tmp_path / "kept"
    folder.mkdir()
    up = "../" * len(folder.parts[1:])
    below = str(K8S).lstrip("/")
    (folder / "kustomization.yaml").write_text(
        f"resources: [{up}{below}/overlays/{overlay}/jobs]\ncomponents: [{up}{below}/jobs/kept]\n"
    )
    return [thing for thing in render(folder) if thing["kind"] == "RayJob"]


def test_failed_clusters_are_kept_by_a_component(kept: list) -> None:
    assert len(kept) == 5
    for thing in kept:
        schemas.check(thing)
        spec = thing["spec"]
        # KubeRay accepts only one of the two ways to delete a cluster.
        assert not {"shutdownAfterJobFinishes", "ttlSecondsAfterFinished"} & set(spec)
        assert spec["backoffLimit"] == 0
        rules = [rule["condition"] for rule in spec["deletionStrategy"]["deletionRules"]]
        seconds = {rule["jobStatus"]: rule["ttlSeconds"] for rule in rules if "jobStatus" in rule}
        assert seconds["FAILED"] == 86400 > seconds["SUCCEEDED"]
