"""Every overlay is valid, complete and locked down, and the checks find a broken one."""

import copy
import importlib
import re
import subprocess
from typing import get_type_hints

import jsonschema
import kubernetes_validate
import pytest
import yaml

from pipeline.commands import cli
from pipeline.errors import InputError
from tests.k8s import schemas
from tests.k8s.references import containers, dangling, pod_templates
from tests.k8s.render import K8S, ROOT, Object, render

IMAGES = {"ray-ddpm", "ray-ddpm-gpu", "ray-ddpm-mlflow", "redis", "postgres", "minio"}
ENTRYPOINTS = {"prepare", "train", "tune", "generate", "evaluate"}


@pytest.fixture(scope="module")
def whole() -> str:
    """All objects of one overlay, as text for tests to break."""
    overlay = K8S / "overlays" / "local"
    return yaml.dump_all(render(overlay) + render(overlay / "jobs"), Dumper=yaml.CSafeDumper)


def find(objects: list[Object], kind: str, name: str) -> Object:
    (found,) = [o for o in objects if o["kind"] == kind and o["metadata"]["name"] == name]
    return found


def job_spec(thing: Object) -> Object:
    return thing["spec"]["jobTemplate"] if thing["kind"] == "RayCronJob" else thing["spec"]


def expand(entrypoint: str) -> list[str]:
    """An entry point's words after the submitter's shell has expanded them."""
    printed = subprocess.run(
        ["bash", "-c", f"printf '%s\\0' {entrypoint}"], capture_output=True, text=True, check=True
    )
    return printed.stdout.split("\0")[:-1]


def parse_entrypoint(entrypoint: str) -> object:
    """The configuration that the job's own parser makes of an entry point."""
    python, script, *flags = expand(entrypoint)
    job = re.fullmatch(r"/app/jobs/(\w+)\.py", script)
    assert python == "python" and job, entrypoint
    module = importlib.import_module(f"pipeline.commands.{job[1]}")
    return cli.parse(get_type_hints(module.execute)["config"], flags, job[1], module.__doc__ or "")


def test_every_core_object_meets_the_kubernetes_schema(standing: list, secrets: list) -> None:
    core = [o for o in standing if not o["apiVersion"].startswith("ray.io/")]
    assert len(core) > 20
    for thing in core + secrets:
        schemas.check(thing)


def test_every_ray_object_meets_kuberays_schema(standing: list, jobs: list) -> None:
    ours = [o for o in standing + jobs if o["apiVersion"].startswith("ray.io/")]
    assert sorted(o["kind"] for o in ours) == ["RayCluster", "RayCronJob"] + ["RayJob"] * 5
    for thing in ours:
        schemas.check(thing)


def test_whatever_is_referred_to_exists(standing: list, jobs: list, secrets: list) -> None:
    assert dangling(standing + jobs + secrets, IMAGES) == []


def test_every_entry_point_parses_and_may_run_twice(jobs: list) -> None:
    assert ENTRYPOINTS | {"nightly"} == {o["metadata"]["name"] for o in jobs}
    for thing in jobs:
        config = parse_entrypoint(job_spec(thing)["entrypoint"])
        assert getattr(config, "resume", True), f"{schemas.path_of(thing)}: a second run would be refused"


def test_jobs_have_both_retry_limits_and_clean_up(jobs: list) -> None:
    for thing in jobs:
        spec = job_spec(thing)
        assert spec["backoffLimit"] > 0
        assert spec["submitterConfig"]["backoffLimit"] > 0
        assert spec["shutdownAfterJobFinishes"] is True


def test_the_cluster_survives_its_head_scales_and_asks_for_a_token(standing: list) -> None:
    spec = find(standing, "RayCluster", "ray-ddpm")["spec"]
    assert spec["enableInTreeAutoscaling"] and spec["autoscalerOptions"]["version"] == "v2"
    assert spec["gcsFaultToleranceOptions"]["redisAddress"] == "redis:6379"
    assert spec["authOptions"] == {"mode": "token"}


def test_one_version_of_ray(standing: list, jobs: list) -> None:
    pinned = re.search(r"^ray==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned
    clusters = [find(standing, "RayCluster", "ray-ddpm")["spec"]]
    clusters += [job_spec(thing)["rayClusterSpec"] for thing in jobs]
    assert {spec["rayVersion"] for spec in clusters} == {pinned[1]}


def test_the_image_is_built_from_the_pins_and_runs_as_no_root() -> None:
    stages = re.split(r"^FROM ", (K8S / "Dockerfile").read_text(), flags=re.MULTILINE)[1:]
    names = [re.match(r"\S+ AS (\S+)", stage)[1] for stage in stages]  # type: ignore[index]
    assert {"cpu", "gpu", "mlflow"} <= set(names)
    for name, stage in zip(names, stages, strict=True):
        installs = [line for line in stage.splitlines() if "pip install" in line]
        assert all("--constraint /tmp/constraints.txt" in line for line in installs)
        assert name in ("base", "compiler", "torch-cpu", "torch-gpu") or "\nUSER 1000:1000" in stage
    assert re.search(r"^ARG PYTHON=3\.\d+\.\d+-slim", (K8S / "Dockerfile").read_text(), re.MULTILINE)


def test_every_container_is_locked_down(standing: list, jobs: list) -> None:
    checked = 0
    for thing in standing + jobs:
        for path, pod in pod_templates(thing):
            where = f"{schemas.path_of(thing)}{path}"
            context = pod["securityContext"]
            assert context["runAsNonRoot"] and context["runAsUser"] > 0, where
            assert context["seccompProfile"] == {"type": "RuntimeDefault"}, where
            assert pod["automountServiceAccountToken"] is False, where
            for container in containers(pod):
                own = container["securityContext"]
                assert own["readOnlyRootFilesystem"] and not own["allowPrivilegeEscalation"], where
                assert own["capabilities"] == {"drop": ["ALL"]}, where
                assert container["resources"]["requests"].keys() >= {"cpu", "memory"}, where
                assert "memory" in container["resources"]["limits"], where
                checked += 1
    assert checked > 20


def test_long_lived_containers_have_probes(standing: list) -> None:
    for thing in standing:
        for path, pod in pod_templates(thing):
            for container in pod["containers"]:
                assert {"readinessProbe", "livenessProbe"} <= container.keys(), f"{thing['kind']}{path}"


def test_nothing_talks_unless_allowed(standing: list) -> None:
    deny = find(standing, "NetworkPolicy", "default-deny")["spec"]
    assert deny == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}


def test_spot_workers_are_told_apart_and_elastic_training_finds_its_workers(jobs: list) -> None:
    for thing in jobs:
        groups = {g["groupName"]: g for g in job_spec(thing)["rayClusterSpec"]["workerGroupSpecs"]}
        if "gpu-spot" not in groups:
            continue
        tolerated = {t["key"] for t in groups["gpu-spot"]["template"]["spec"]["tolerations"]}
        assert "ray-ddpm/spot" in tolerated
        if thing["metadata"]["name"] == "train":
            config = parse_entrypoint(job_spec(thing)["entrypoint"])
            most = groups["gpu"]["maxReplicas"] + groups["gpu-spot"]["maxReplicas"]
            assert 0 < config.min_workers <= groups["gpu"]["maxReplicas"]  # type: ignore[attr-defined]
            assert config.workers <= most  # type: ignore[attr-defined]


def test_no_secret_stands_in_the_tree(standing: list, jobs: list) -> None:
    assert not [o for o in standing + jobs if o["kind"] == "Secret"]
    for example in (K8S / "secrets").glob("*.env.example"):
        assert all(line.startswith("#") or line.endswith("=") for line in example.read_text().splitlines())


def metric_ports(standing: list) -> tuple[dict[str, int], set[int]]:
    """The head's ports by name, and the ports that Prometheus may reach."""
    spec = find(standing, "RayCluster", "ray-ddpm")["spec"]
    ports = spec["headGroupSpec"]["template"]["spec"]["containers"][0]["ports"]
    policies = [find(standing, "NetworkPolicy", name) for name in ("ray-metrics", "ray-head-metrics")]
    allowed = {p["port"] for policy in policies for p in policy["spec"]["ingress"][0]["ports"]}
    return {p["name"]: p["containerPort"] for p in ports}, allowed


def test_prometheus_scrapes_ports_that_exist(standing: list) -> None:
    (job,) = yaml.safe_load((K8S / "prometheus.yaml").read_text())["scrape_configs"]
    kept = job["relabel_configs"][0]["regex"].split("|")
    head, allowed = metric_ports(standing)
    assert {head[name] for name in kept} == allowed
    assert job["kubernetes_sd_configs"][0]["namespaces"]["names"] == ["ray-ddpm"]


MUTATIONS = [
    ("RayCluster", "ray-ddpm", ("spec", "headGroupSpecs"), {}),
    ("RayCluster", "ray-ddpm", ("spec", "workerGroupSpecs", 0, "maxReplicas"), "four"),
    ("RayCluster", "ray-ddpm", ("spec", "autoscalerOptions", "version"), "v3"),
    ("RayCluster", "ray-ddpm", ("spec", "headGroupSpec", "template", "spec", "container"), []),
    ("Deployment", "mlflow", ("spec", "replica"), 1),
    ("Deployment", "mlflow", ("spec", "replicas"), "one"),
    ("NetworkPolicy", "redis", ("spec", "ingress", 0, "port"), []),
    ("Service", "postgres", ("spec", "ports", 0, "port"), "many"),
]


@pytest.mark.parametrize(("kind", "name", "path", "value"), MUTATIONS)
def test_a_wrong_field_or_type_is_refused(
    kind: str, name: str, path: tuple, value: object, standing: list
) -> None:
    thing = copy.deepcopy(find(standing, kind, name))
    schemas.check(thing)
    node = thing
    for part in path[:-1]:
        node = node[part]
    node[path[-1]] = value
    with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError)):
        schemas.check(thing)


@pytest.mark.parametrize(
    ("strategy", "complaint"),
    [
        ({"deletionRules": [{"policy": "DeleteCluster", "condition": {"jobStatus": "FAILED"}}]}, ""),
        ({"onSuccess": {"policy": "DeleteSelf"}}, "requires either BOTH onSuccess and"),
        (
            {"deletionRules": [{"policy": "DeleteCluster", "condition": {"ttlSeconds": 5}}]},
            "requires either the JobStatus",
        ),
    ],
)
def test_a_rule_of_a_definition_is_kept(strategy: dict, complaint: str, jobs: list) -> None:
    """CEL rules state what a schema can't."""
    thing = copy.deepcopy(find(jobs, "RayJob", "train"))
    thing["spec"]["deletionStrategy"] = strategy
    if not complaint:
        schemas.check(thing)
        return
    with pytest.raises(jsonschema.ValidationError, match=complaint):
        schemas.check(thing)


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("name: ray-storage", "name: ray-store", "no Secret ray-store"),
        ("key: password", "key: passwort", "Secret redis has no key passwort"),
        (r"configMapRef:\s+name: mlflow-settings", "configMapRef: {name: settings}", "no ConfigMap settings"),
        ("claimName: results", "claimName: result", "no PersistentVolumeClaim result"),
        ("serviceAccountName: ray-worker", "serviceAccountName: worker", "no ServiceAccount worker"),
        ("redisAddress: redis:6379", "redisAddress: redis:6380", "Service redis has no port 6380"),
        ("http://mlflow:5000", "http://mlflows:5000", "no Service mlflows"),
        ("image: redis:7.4.5-alpine", "image: redis", "image redis is not pinned"),
        ("image: postgres:", "image: postgresql:", "no image postgresql"),
        ("targetPort: http", "targetPort: web", "no pod has port web"),
        (r"- mountPath: /results\s+name: results", "- {mountPath: /results, name: runs}", "no volume runs"),
        ("port: agent", "port: agents", "no port agents"),
        ("port: 5432\n", "port: 5433\n", "port 5433"),
    ],
)
def test_a_dangling_name_is_found(old: str, new: str, complaint: str, whole: str, secrets: list) -> None:
    broken, count = re.subn(old, new, whole)
    assert count
    objects = list(yaml.load_all(broken, yaml.CSafeLoader))
    assert any(complaint in problem for problem in dangling(objects + secrets, IMAGES))


@pytest.mark.parametrize("flags", ["--no-such-flag 1", "--steps many", ""])
def test_a_wrong_entry_point_is_found(flags: str) -> None:
    with pytest.raises(InputError):
        parse_entrypoint(f"python /app/jobs/train.py --data a {flags}")
