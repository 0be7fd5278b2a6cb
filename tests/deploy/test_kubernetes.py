"""The Kubernetes manifests, offline: against the API's own schemas, and the promises of deploy/README.md."""

from pathlib import Path
from typing import Any

import kubernetes_validate  # type: ignore[import-untyped]
import pytest
import yaml

from receiver.config import environment_variables, load_settings
from receiver.service.service import check_role

HERE = Path(__file__).parents[2] / "deploy/kubernetes"
FILES = sorted(path.name for path in HERE.glob("*.yaml") if path.name != "kustomization.yaml")


def manifests(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((HERE / name).read_text()))


EVERY = [manifest for name in FILES for manifest in manifests(name)]
PODS = [manifest for manifest in EVERY if manifest["kind"] == "Deployment"]


def test_every_file_is_a_resource_of_the_base() -> None:
    assert sorted(yaml.safe_load((HERE / "kustomization.yaml").read_text())["resources"]) == FILES


@pytest.mark.parametrize("manifest", EVERY, ids=lambda each: f"{each['kind']}-{each['metadata']['name']}")
def test_manifests_fit_the_schemas_of_the_api(manifest: dict[str, Any]) -> None:
    """Strictly: no field that the API does not know."""
    kubernetes_validate.validate(manifest, "1.32", strict=True)


@pytest.mark.parametrize("deployment", PODS, ids=lambda each: str(each["metadata"]["name"]))
def test_pods_are_restricted_and_know_no_names_but_ours(deployment: dict[str, Any]) -> None:
    """Pod Security `restricted`; a read-only root; no service links; every variable is a setting; time to stop in order."""
    pod = deployment["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert (pod["enableServiceLinks"], pod["automountServiceAccountToken"]) == (False, False)
    assert pod["securityContext"]["runAsNonRoot"]
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    limits = container["securityContext"]
    assert limits["allowPrivilegeEscalation"] is False
    assert limits["readOnlyRootFilesystem"] is True
    assert limits["capabilities"] == {"drop": ["ALL"]}
    known = {
        *environment_variables(),
        *(f"{name}_FILE" for name in environment_variables()),
        "RECEIVER_CONFIG",
    }
    assert {each["name"] for each in container["env"]} <= known
    assert container["args"][:2] == ["serve", "--only"]
    assert pod["terminationGracePeriodSeconds"] > 30
    assert "livenessProbe" in container
    assert {mount["name"] for mount in container["volumeMounts"]} == {
        volume["name"] for volume in pod["volumes"]
    }


@pytest.mark.parametrize("deployment", PODS, ids=lambda each: str(each["metadata"]["name"]))
def test_what_pods_are_given_are_good_settings(deployment: dict[str, Any], tmp_path: Path) -> None:
    """Read by the service's own code: the ConfigMap's file, and secrets in files where the pod has them."""
    (config,) = (each for each in EVERY if each["kind"] == "ConfigMap")
    (tmp_path / "receiver.toml").write_text(config["data"]["receiver.toml"])
    for name, value in {
        "database_url": "postgresql://db/receiver",
        "ops_token": "0123456789abcdef",
    }.items():
        (tmp_path / name).write_text(value)
    for name in ("flora_api_key", "flora_webhook_secret"):
        (tmp_path / name).write_text(f"{name}_value\n")
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    places = [mount["mountPath"] for mount in container["volumeMounts"]]
    environ = {}
    for each in container["env"]:
        assert str(Path(each["value"]).parent) in places
        environ[each["name"]] = str(tmp_path / Path(each["value"]).name)
    settings = load_settings(None, environ)
    assert check_role(settings, container["args"][2]) is None
    assert settings.operations.host == "127.0.0.1"


def test_selectors_select_what_there_is() -> None:
    """Services, budgets and policies name labels that pods have."""
    labels = [deployment["spec"]["template"]["metadata"]["labels"] for deployment in PODS]
    for manifest in EVERY:
        spec = manifest.get("spec", {})
        wanted = spec.get("podSelector", {}).get("matchLabels") or (
            spec.get("selector", {}).get("matchLabels") or spec.get("selector")
        )
        if wanted:
            assert any(wanted.items() <= each.items() for each in labels), manifest["metadata"]
