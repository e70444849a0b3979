"""Walk over all that is applied: selectors match, volumes fit, policies allow what is needed and nothing else."""

import copy
import re
from collections.abc import Callable

import yaml

from tests.k8s.network import mistakes
from tests.k8s.references import pod_templates
from tests.k8s.render import K8S, ROOT, Object
from tests.k8s.volumes import misfits, size


def change(objects: list[Object], kind: str, name: str, edit: Callable[[Object], object]) -> list[Object]:
    """A copy in which one object's spec is edited."""
    objects = copy.deepcopy(objects)
    (found,) = [o for o in objects if (o["kind"], o["metadata"]["name"]) == (kind, name)]
    edit(found["spec"])
    return objects


def without(objects: list[Object], kind: str, name: str) -> list[Object]:
    kept = [o for o in objects if (o["kind"], o["metadata"]["name"]) != (kind, name)]
    assert len(kept) == len(objects) - 1
    return kept


def test_pods_may_talk_where_they_do_and_nowhere_else(standing: list, jobs: list) -> None:
    assert mistakes(standing + jobs) == []


def test_a_policy_too_few_or_too_wide_is_found(standing: list, jobs: list) -> None:
    whole = standing + jobs
    assert "head to redis:6379 is not let out" in mistakes(without(whole, "NetworkPolicy", "ray-to-redis"))
    assert "worker to mlflow:5000 is not let in" in mistakes(without(whole, "NetworkPolicy", "mlflow"))
    wide = change(whole, "NetworkPolicy", "ray-to-redis", lambda spec: spec.update(podSelector={}))
    assert "worker to redis:6379 is let out, and never talks" in mistakes(wide)
    port = change(
        whole, "NetworkPolicy", "ray-metrics", lambda spec: spec["ingress"][0]["ports"][0].update(port=8081)
    )
    assert "outside to worker:8081 is let in, and nothing listens there" in mistakes(port)
    moved = change(
        whole, "NetworkPolicy", "postgres", lambda spec: spec["ingress"][0]["ports"][0].update(port=5433)
    )
    assert "mlflow to postgres:5432 is not let in" in mistakes(moved)


def test_every_volume_fits(overlay: str, standing: list, jobs: list) -> None:
    assert misfits(standing + jobs, one_node=overlay == "local") == []


def test_a_volume_that_does_not_fit_is_found(standing: list) -> None:
    def pod(spec: Object) -> Object:
        return spec["template"]["spec"]

    edits: list[tuple[str, str, Callable[[Object], object], str]] = [
        ("Deployment", "mlflow", lambda s: pod(s)["volumes"][0].update(emptyDir={}), "may fill its node"),
        ("Deployment", "mlflow", lambda s: pod(s)["containers"][0].update(volumeMounts=[]), "no /tmp"),
        ("StatefulSet", "redis", lambda s: pod(s)["securityContext"].pop("fsGroup"), "its user can't write"),
        (
            "StatefulSet", "redis",
            lambda s: pod(s)["volumes"][0]["emptyDir"].update(sizeLimit="1Gi"), "larger than the memory",
        ),
        (
            "StatefulSet", "postgres",
            lambda s: pod(s)["containers"][0]["volumeMounts"][1].update(mountPath="/tmp/"), "twice",
        ),
        (
            "RayCluster", "ray-ddpm",
            lambda s: pod(s["workerGroupSpecs"][0])["containers"][0]["resources"]["limits"].update(
                {"ephemeral-storage": "16Gi"}
            ),
            "larger than the pod may use",
        ),
        ("PersistentVolumeClaim", "results", lambda s: s.update(accessModes=["ReadWriteOnce"]), "kinds of pods"),
    ]  # fmt: skip
    for kind, name, edit, complaint in edits:
        found = misfits(change(standing, kind, name, edit), one_node=False)
        assert any(complaint in one for one in found), (complaint, found)
    assert any(
        "nothing mounts it" in one for one in misfits(without(standing, "RayCluster", "ray-ddpm"), True)
    )
    assert size("16Gi") == 16 * 2**30


def test_every_patch_finds_what_it_changes() -> None:
    """kustomize ignores a patch whose target does not exist, without a word."""
    from tests.k8s.conftest import _render

    rendered = [o for name in ("local", "gpu") for part in ("", "/jobs") for o in _render(name + part)]
    known = {(o["kind"], o["metadata"]["name"]) for o in rendered}
    known |= {("PodTemplate", "submitter")}  # copied into the jobs, not rendered itself
    targets = []
    for file in K8S.rglob("kustomization.yaml"):
        settings = yaml.safe_load(file.read_text())
        targets += [(file, patch["target"]) for patch in settings.get("patches", [])]
        for entry in settings.get("replacements", []):
            targets += [(file, target["select"]) for target in entry["targets"]]
    assert len(targets) > 8
    for file, target in targets:
        found = [
            1 for kind, name in known if target.get("kind", kind) == kind and target.get("name", name) == name
        ]
        assert found, f"{file}: {target} is nowhere"


def test_every_node_pool_is_one_that_operators_are_told_to_make(standing: list, jobs: list) -> None:
    pools = re.findall(r"^\| GPU, .*$", (ROOT / "docs" / "operations.md").read_text(), re.MULTILINE)
    labels = dict(re.findall(r"`(\S+)=(\S+)`", "".join(pools)))
    for thing in standing + jobs:
        for path, pod in pod_templates(thing):
            chosen = pod.get("nodeSelector", {})
            tolerated = {t["key"] for t in pod.get("tolerations", [])}
            rows = [row for row in pools if all(f"`{k}={v}`" in row for k, v in chosen.items())]
            if chosen:
                assert len(rows) == 1, f"{thing['metadata']['name']}{path}: {chosen}"
                assert tolerated == set(re.findall(r"`([^`=]+):NoSchedule`", rows[0])), path
            else:
                assert not tolerated, path
    assert labels
