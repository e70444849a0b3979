"""What operators add (monitoring, queues, large nodes), and the script that lists what a cluster lacks."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from ray.dashboard.modules.metrics import dashboards

from pipeline.training.gauges import GAUGES
from tests.k8s import schemas
from tests.k8s.references import matches
from tests.k8s.render import K8S, Object, render
from tests.k8s.test_manifests import find, job_spec, metric_ports, parse_entrypoint
from tests.k8s.volumes import misfits, size


@pytest.fixture(scope="module")
def monitoring() -> list[Object]:
    return render(K8S / "monitoring")


def exported() -> set[str]:
    """Names of the metrics in Ray's own dashboards, and of this project's."""
    texts = [path.read_text() for path in Path(dashboards.__file__).parent.glob("*.py")]
    return set(re.findall(r"\bray_[a-z_]+", " ".join(texts))) | {f"ray_{name}" for name in GAUGES}


def metrics(expression: str) -> set[str]:
    return set(re.findall(r"\bray_[a-z_]+\b(?!\s*[,)=])|\bray_ddpm_[a-z_]+", expression)) - {"ray_io_cluster"}


def with_components(names: list[str], folder: Path, overlay: str = "gpu") -> list[Object]:
    """An overlay's jobs, with components added as an operator adds them."""
    shutil.copytree(K8S, folder / "k8s", ignore=shutil.ignore_patterns("*.env"))
    mine = folder / "k8s" / "mine"
    mine.mkdir()
    parts = {"resources": [f"../overlays/{overlay}/jobs"], "components": [f"../{name}" for name in names]}
    (mine / "kustomization.yaml").write_text(yaml.dump(parts))
    return render(mine)


def test_prometheus_finds_every_ray_node_and_ports_that_exist(
    monitoring: list[Object], standing: list[Object]
) -> None:
    monitor = find(monitoring, "PodMonitor", "ray")["spec"]
    assert matches(monitor["selector"], {"ray.io/is-ray-node": "yes", "ray.io/node-type": "worker"})
    head, allowed = metric_ports(standing)
    wanted = {endpoint["port"] for endpoint in monitor["podMetricsEndpoints"]}
    assert wanted == {name for name in head if "metrics" in name}
    assert {head[name] for name in wanted} == allowed


def test_alerts_and_panels_ask_for_metrics_that_are_exported(monitoring: list[Object]) -> None:
    rules = find(monitoring, "PrometheusRule", "ray-ddpm")["spec"]["groups"][0]["rules"]
    board = find(monitoring, "ConfigMap", "ray-ddpm-dashboard")
    assert board["metadata"]["labels"]["grafana_dashboard"] == "1"
    panels = json.loads(board["data"]["ray-ddpm.json"])["panels"]
    expressions = [rule["expr"] for rule in rules]
    expressions += [target["expr"] for panel in panels for target in panel["targets"]]
    used = set().union(*map(metrics, expressions))
    assert used <= exported(), used - exported()
    assert {f"ray_{name}" for name in GAUGES} <= used
    assert len({panel["id"] for panel in panels}) == len(panels) >= 8
    for rule in rules:
        notes = rule["annotations"]
        assert len(notes["runbook"]) > 60 and "{{ $labels." in notes["summary"], rule["alert"]
    assert metrics('sum by (ray_io_cluster) (ray_actors{State="ALIVE"}) > ray_nodes') == {
        "ray_actors",
        "ray_nodes",
    }


@pytest.mark.parametrize("overlay", ["local", "gpu"], indirect=True)
def test_with_kueue_jobs_wait_in_a_queue(overlay: str, jobs: list[Object], tmp_path: Path) -> None:
    queued = with_components(["kueue"], tmp_path, overlay)
    objects = {
        o["metadata"]["name"]: o for o in yaml.safe_load_all((K8S / "kueue" / "queues.yaml").read_text())
    }
    assert {o["metadata"]["name"] for o in queued} == {o["metadata"]["name"] for o in jobs}
    for job in (o for o in queued if o["kind"] == "RayJob"):
        labels = job["metadata"]["labels"]
        spec = job_spec(job)
        assert spec["suspend"] is True
        # Kueue's webhook refuses a growing cluster that is not elastic, and a cluster that outlives its job.
        assert spec["rayClusterSpec"]["enableInTreeAutoscaling"] and spec["shutdownAfterJobFinishes"]
        assert job["metadata"]["annotations"]["kueue.x-k8s.io/elastic-job"] == "true"
        assert objects[labels["kueue.x-k8s.io/queue-name"]]
        priority = objects[labels["kueue.x-k8s.io/priority-class"]]
        assert priority["kind"] == "WorkloadPriorityClass"
        assert (priority["value"] > 100) == (job["metadata"]["name"] == "train")
        assert labels["job"] == job["metadata"]["name"]  # what `--selector` chooses by


CLUSTER = """#!/bin/sh
# Answers like a cluster that lacks some things.
case "$*" in
  *{missing}*) exit 1 ;;
  version*) exit 0 ;;
  *--raw*/version*) printf '{{\n  "major": "1",\n  "minor": "{minor}"\n}}\n' ;;
  *kuberay-operator*) echo "{space} [--feature-gates={gates}]" ;;
  *storageclass*jsonpath*) echo '{{"storageclass.kubernetes.io/is-default-class":"true"}}' ;;
  *daemonsets*) echo "kube-system nvidia-device-plugin" ;;
esac
"""


@pytest.mark.parametrize(
    ("missing", "space", "gates", "minor", "said"),
    [
        ("nothing-at-all", "kuberay-system", "RayCronJob=true", "33", ""),
        ("nothing-at-all", "kuberay-system", "RayCronJob=true", "34+", ""),
        ("nothing-at-all", "kuberay-system", "RayCronJob=true", "9", "1.33 or newer: the cluster has 1.9"),
        ("--raw", "kuberay-system", "RayCronJob=true", "33", "the cluster has an unknown version"),
        ("raycronjobs", "kuberay-system", "RayCronJob=true", "33", "MISSING  KubeRay's raycronjobs: "),
        ("nothing-at-all", "default", "RayCronJob=true", "33", "it runs in default: "),
        ("nothing-at-all", "kuberay-system", "RayJob=true", "33", "--feature-gates=RayCronJob=true"),
        ("secret postgres", "kuberay-system", "RayCronJob=true", "33", "kubectl apply -k k8s/secrets"),
        (
            "namespace ray-ddpm",
            "kuberay-system",
            "RayCronJob=true",
            "33",
            "kubectl create namespace ray-ddpm",
        ),
        (
            "storageclass shared",
            "kuberay-system",
            "RayCronJob=true",
            "33",
            "MISSING  the storage class shared: ",
        ),
    ],
)
def test_what_a_cluster_lacks_is_said(
    missing: str,
    space: str,
    gates: str,
    minor: str,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake = tmp_path / "kubectl"
    answers = {"space": space, "gates": gates, "minor": minor}
    fake.write_text(CLUSTER.format(missing=missing.replace(" ", "\\ "), **answers))
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    done = subprocess.run([K8S / "preflight.sh", "gpu"], capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("MISSING")]
    assert done.returncode == bool(said), done.stdout
    assert [said in line for line in lines] == [True] * bool(said), done.stdout
    assert done.stdout.count("\nok ") + len(lines) >= 7 or "namespace" in said


def test_without_a_cluster_the_script_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "kubectl").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "kubectl").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    done = subprocess.run([K8S / "preflight.sh"], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "no cluster answers to kubectl" in done.stderr


def test_names_are_found_wherever_clusters_answer_for_them(standing: list[Object]) -> None:
    rules = find(standing, "NetworkPolicy", "dns")["spec"]["egress"]
    peers = [(peer, {port["port"] for port in rule["ports"]}) for rule in rules for peer in rule["to"]]
    assert ({"ipBlock": {"cidr": "169.254.20.10/32"}}, {53}) in peers  # NodeLocal DNSCache
    spaces = {
        peer["namespaceSelector"]["matchLabels"]["kubernetes.io/metadata.name"]: ports
        for peer, ports in peers
        if "namespaceSelector" in peer
    }
    assert spaces == {"kube-system": {53}, "openshift-dns": {5353}}


def test_whoever_may_leave_by_ipv4_may_by_ipv6_and_to_no_metadata_service(standing: list[Object]) -> None:
    seen = 0
    for thing in (o for o in standing if o["kind"] == "NetworkPolicy"):
        for rule in thing["spec"].get("egress", []):
            blocks = {p["ipBlock"]["cidr"]: p["ipBlock"] for p in rule["to"] if "ipBlock" in p}
            if "0.0.0.0/0" in blocks:
                seen += 1
                assert "169.254.0.0/16" in blocks["0.0.0.0/0"]["except"]
                assert "fd00:ec2::254/128" in blocks["::/0"]["except"], thing["metadata"]["name"]
    assert seen >= 2


@pytest.mark.parametrize("names", [["eight-gpus"], ["eight-gpus", "rdma"], ["eight-gpus", "rdma", "kueue"]])
def test_training_on_nodes_of_eight_gpus(names: list[str], tmp_path: Path) -> None:
    objects = with_components(names, tmp_path)
    train = find(objects, "RayJob", "train")
    schemas.check(train)
    (group,) = train["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    pod = group["template"]["spec"]
    (worker,) = pod["containers"]
    limits = worker["resources"]["limits"]
    assert limits["nvidia.com/gpu"] == "8"
    config = parse_entrypoint(train["spec"]["entrypoint"])
    assert 8 * config.cpus_per_worker <= int(limits["cpu"]) and not config.workers % 8  # type: ignore[attr-defined]
    assert misfits([*render(K8S / "overlays" / "gpu"), train], one_node=False) == []
    assert pod.get("hostNetwork", False) == ("rdma" in names) == ("rdma/hca" in limits)
    assert worker["securityContext"]["capabilities"]["drop"] == ["ALL"]


def test_shared_memory_holds_the_object_store_and_messages_and_the_disk_what_is_spilled(
    jobs: list[Object], overlay: str, tmp_path: Path
) -> None:
    """Ray's object store takes 30 % of a node's memory; what it can't hold goes to /tmp."""
    checked = 0
    for thing in jobs + (with_components(["eight-gpus"], tmp_path) if overlay == "gpu" else []):
        for group in job_spec(thing)["rayClusterSpec"]["workerGroupSpecs"]:
            pod = group["template"]["spec"]
            limits = pod["containers"][0]["resources"]["limits"]
            store, gpus = 0.3 * size(limits["memory"]), int(limits.get("nvidia.com/gpu", 0))
            volumes = {v["name"]: v["emptyDir"] for v in pod["volumes"] if "emptyDir" in v}
            if overlay == "gpu":
                assert size(volumes["shm"]["sizeLimit"]) > store + gpus * 2**30, group["groupName"]
                assert size(volumes["shm"]["sizeLimit"]) < size(limits["memory"]) / 2
            assert size(volumes["tmp"]["sizeLimit"]) > 2 * store, group["groupName"]
            checked += 1
    assert checked >= 5
