"""Check objects strictly against the schemas of Kubernetes and KubeRay, with the CEL rules of the latter."""

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from cel_expr_python import cel

from tests.k8s.render import ROOT, Object

CRDS = ROOT.parent / "shared" / "kuberay-crds"
KUBERNETES = "1.33"


def check(thing: Object) -> None:
    """Raises jsonschema's or kubernetes_validate's ValidationError; skips where the definitions are absent."""
    if thing["apiVersion"].startswith("ray.io/"):
        if not CRDS.is_dir():
            pytest.skip(f"KubeRay's definitions are not at {CRDS}")
        ray_validator(thing["kind"], thing["apiVersion"]).validate(thing)
    else:
        kubernetes_validate.validate(thing, KUBERNETES, strict=True)


RULES = cel.NewEnv(variables={"self": cel.Type.DYN, "oldSelf": cel.Type.DYN})


def keep_rules(validator: Any, rules: list[dict[str, str]], thing: Any, schema: Any) -> Iterator[Any]:
    """The keyword `x-kubernetes-validations`. Rules with `oldSelf` are left out, since they concern changes."""
    for rule in rules:
        if (
            "oldSelf" not in rule["rule"]
            and RULES.compile(rule["rule"]).eval(data={"self": thing}).value() is not True
        ):
            yield jsonschema.ValidationError(rule.get("message") or rule["rule"])


Validator = jsonschema.validators.extend(
    jsonschema.Draft202012Validator, {"x-kubernetes-validations": keep_rules}
)


@lru_cache
def ray_validator(kind: str, version: str) -> Any:
    text = (CRDS / f"ray.io_{kind.lower()}s.yaml").read_text()
    definition = yaml.load(text, yaml.CSafeLoader)["spec"]
    (found,) = [v for v in definition["versions"] if f"ray.io/{v['name']}" == version]
    schema = found["schema"]["openAPIV3Schema"]
    # Definitions leave these two to the API server.
    schema["properties"] |= {"apiVersion": {"type": "string"}, "kind": {"type": "string"}}
    strict = _refuse_unknown(schema)
    strict["properties"]["metadata"] = {"type": "object"}
    return Validator(strict)


def _refuse_unknown(schema: Any) -> Any:
    """The same schema, refusing properties that it does not name."""
    if isinstance(schema, list):
        return [_refuse_unknown(child) for child in schema]
    if not isinstance(schema, dict):
        return schema
    strict = {key: _refuse_unknown(child) for key, child in schema.items()}
    # A property may itself be called "properties"; a schema's own is always a mapping of schemas.
    described = isinstance(schema.get("properties"), dict) and schema.get("type") == "object"
    if described and not schema.get("x-kubernetes-preserve-unknown-fields"):
        strict.setdefault("additionalProperties", False)
    return strict


def path_of(thing: Object) -> str:
    return f"{thing['kind']}/{thing['metadata']['name']}"
