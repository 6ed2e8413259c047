"""The Kubernetes manifests: valid, without secrets, without privileges, and one with Compose."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from compose.file import ROOT, read

from sweeper.study.spec import Faults

FILES = [ROOT / "deploy/kubernetes.yaml", ROOT / "deploy/kubernetes-workers.yaml"]
OBJECTS: list[dict[str, Any]] = [
    found for file in FILES for found in yaml.safe_load_all(file.read_text("utf-8"))
]
COMPOSE: dict[str, Any] = read(
    dict.fromkeys(
        (
            "POSTGRES_PASSWORD",
            "SWEEPER_DB_PASSWORD",
            "MLFLOW_DB_PASSWORD",
            "MLFLOW_PASSWORD",
            "MLFLOW_SECRET_KEY",
        ),
        "secret",
    )
)["services"]


def named(found: dict[str, Any]) -> str:
    metadata = found["metadata"]
    return f"{found['kind']} {metadata.get('name') or metadata['generateName']}"


def kind(*kinds: str) -> list[dict[str, Any]]:
    return [found for found in OBJECTS if found["kind"] in kinds]


PODS = {
    named(found): found["spec"]["template"]["spec"]
    for found in kind("Deployment", "StatefulSet", "Job")
}


def container(name: str) -> dict[str, Any]:
    (found,) = PODS[name]["containers"]
    return dict(found)


def variables(name: str) -> dict[str, Any]:
    """The environment of a pod's container: a value, or where it comes from."""
    given = container(name)
    found: dict[str, Any] = {}
    for source in given.get("envFrom", []):
        (data,) = (
            each["data"]
            for each in kind("ConfigMap")
            if each["metadata"]["name"] == source["configMapRef"]["name"]
        )
        found.update(data)
    for each in given.get("env", []):
        found[each["name"]] = each.get("value", each.get("valueFrom"))
    return found


@pytest.mark.parametrize("version", ["1.31", "1.34", "1.37"])
@pytest.mark.parametrize("found", OBJECTS, ids=named)
def test_an_object_is_strictly_valid(found: dict[str, Any], version: str) -> None:
    kubernetes_validate.validate(found, version, strict=True)


def test_validation_is_strict() -> None:
    wrong = {**OBJECTS[0], "spek": {}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, "1.34", strict=True)


def test_everything_is_in_the_one_namespace() -> None:
    (space,) = kind("Namespace")
    for found in OBJECTS:
        if found is not space:
            assert found["metadata"]["namespace"] == space["metadata"]["name"], named(found)


@pytest.mark.parametrize("name", PODS)
def test_a_pod_has_no_privileges(name: str) -> None:
    """What the namespace's label `restricted` demands, and a read-only root besides."""
    pod = PODS[name]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] > 0
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["automountServiceAccountToken"] is False
    own = container(name)["securityContext"]
    assert own == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert "/tmp" in {mount["mountPath"] for mount in container(name)["volumeMounts"]}


@pytest.mark.parametrize("name", sorted(PODS.keys() - {"StatefulSet postgres"}))
def test_the_home_folder_can_be_written(name: str) -> None:
    assert variables(name)["HOME"] == "/tmp"


@pytest.mark.parametrize("name", PODS)
def test_what_a_pod_refers_to_is_there(name: str) -> None:
    pod = PODS[name]
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    for found in kind("StatefulSet"):
        if named(found) == name:
            templates = found["spec"]["volumeClaimTemplates"]
            volumes |= {claim["metadata"]["name"]: claim for claim in templates}
    assert {mount["name"] for mount in container(name)["volumeMounts"]} == volumes.keys()
    claims = {found["metadata"]["name"] for found in kind("PersistentVolumeClaim")}
    configs = {found["metadata"]["name"] for found in kind("ConfigMap")}
    for volume in volumes.values():
        if "persistentVolumeClaim" in volume:
            assert volume["persistentVolumeClaim"]["claimName"] in claims
        if "configMap" in volume:
            assert volume["configMap"]["name"] in configs


@pytest.mark.parametrize("name", PODS)
def test_a_pod_has_limits_and_time_to_end(name: str) -> None:
    resources = container(name)["resources"]
    assert resources["requests"]["memory"]
    assert resources["requests"]["cpu"]
    assert resources["limits"]["memory"]
    grace_s = PODS[name]["terminationGracePeriodSeconds"]
    assert grace_s >= 30
    if not name.startswith("Job"):
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            assert container(name)[probe]["timeoutSeconds"] >= 5
    else:
        assert grace_s >= 2 * Faults().grace_s
        assert resources["limits"]["nvidia.com/gpu"] == resources["requests"]["nvidia.com/gpu"]


def test_a_controller_is_not_started_again_because_its_database_is_away() -> None:
    asked = container("Deployment controller")
    paths = {
        probe: asked[f"{probe}Probe"]["httpGet"]["path"]
        for probe in ("startup", "readiness", "liveness")
    }
    assert paths == {"startup": "/livez", "readiness": "/healthz", "liveness": "/livez"}


@pytest.mark.parametrize("name", PODS)
def test_service_links_are_off(name: str) -> None:
    """A Service called mlflow makes MLFLOW_PORT=tcp://…, which its server would read."""
    assert PODS[name]["enableServiceLinks"] is False


def test_secrets_are_named_and_never_written() -> None:
    assert not kind("Secret")
    for name in PODS:
        for variable, value in variables(name).items():
            if "PASSWORD" in variable or "SECRET" in variable:
                assert value["secretKeyRef"]["name"] == "sweeper"


PAIRS = {
    "StatefulSet postgres": "postgres",
    "Deployment mlflow": "mlflow",
    "Deployment controller": "controller",
}


@pytest.mark.parametrize(("name", "service"), PAIRS.items())
def test_a_server_is_run_as_compose_runs_it(name: str, service: str) -> None:
    """So what the test of the Compose services sees holds here too."""
    assert container(name)["args"] == COMPOSE[service]["command"]
    assert container(name)["image"] == COMPOSE[service]["image"]
    ours, theirs = variables(name), COMPOSE[service]["environment"]
    assert ours.keys() - theirs.keys() <= {"HOME", "PGDATA"}
    assert theirs.keys() <= ours.keys()
    same = theirs.keys() - {"SWEEPER_LAUNCHER", "MLFLOW_SERVER_ALLOWED_HOSTS"}
    for variable in same:
        if isinstance(ours[variable], str):
            assert ours[variable] == theirs[variable], variable


def test_workers_have_what_compose_gives_them() -> None:
    name = "Job workers-"
    ours, theirs = variables(name), COMPOSE["worker-gpu"]["environment"]
    assert ours.keys() - theirs.keys() == {"HOME", "SWEEPER_WORKER"}
    assert theirs.keys() <= ours.keys()
    assert container(name)["args"] == ["sweeper", "worker", "STUDY"]
    assert container(name)["image"] == COMPOSE["worker-gpu"]["image"]


def test_every_pod_of_the_job_has_a_name_of_its_own() -> None:
    """A worker's name must never come twice, so a pod's container is not started again in it."""
    (job,) = kind("Job")
    assert job["spec"]["completionMode"] == "Indexed"
    assert PODS["Job workers-"]["restartPolicy"] == "Never"
    assert variables("Job workers-")["SWEEPER_WORKER"] == {
        "fieldRef": {"fieldPath": "metadata.name"}
    }


def test_the_job_keeps_what_no_schema_says() -> None:
    """What the API server demands of fields together (pkg/apis/batch/validation)."""
    (job,) = (found["spec"] for found in kind("Job"))
    assert job["podReplacementPolicy"] == "Failed", "the only one beside podFailurePolicy"
    assert job["template"]["spec"]["restartPolicy"] == "Never"
    assert job["maxFailedIndexes"] <= job["completions"]
    containers = {each["name"] for each in job["template"]["spec"]["containers"]}
    for rule in job["podFailurePolicy"]["rules"]:
        assert ("onExitCodes" in rule) != ("onPodConditions" in rule)
        if codes := rule.get("onExitCodes"):
            assert codes["containerName"] in containers
            assert codes["values"] == sorted(set(codes["values"]))
            assert 0 not in codes["values"]


def test_a_worker_that_is_told_to_end_comes_back_and_one_that_cannot_work_does_not() -> None:
    (job,) = kind("Job")
    rules = job["spec"]["podFailurePolicy"]["rules"]
    actions = {
        code: rule["action"]
        for rule in rules
        for code in rule.get("onExitCodes", {}).get("values", [])
    }
    assert actions == {2: "FailIndex", 143: "Ignore"}


def test_the_databases_are_made_by_the_same_script() -> None:
    (script,) = (
        found["data"]["databases.sh"]
        for found in kind("ConfigMap")
        if found["metadata"]["name"] == "postgres-init"
    )
    file = ROOT / "deploy/postgres/databases.sh"
    assert script == file.read_text("utf-8")
    assert file.stat().st_mode & 0o111, "the postgres image must run it, not read it in"
    (volume,) = (each for each in PODS["StatefulSet postgres"]["volumes"] if each["name"] == "init")
    assert volume["configMap"]["defaultMode"] & 0o111


@pytest.mark.parametrize("found", kind("Service"), ids=named)
def test_a_service_leads_to_a_port(found: dict[str, Any]) -> None:
    selected = found["spec"]["selector"]["app"]
    (pod,) = (pod for name, pod in PODS.items() if name.endswith(f" {selected}"))
    (port,) = found["spec"]["ports"]
    assert port["targetPort"] in {each["name"] for each in pod["containers"][0]["ports"]}
    assert port["port"] in {each["containerPort"] for each in pod["containers"][0]["ports"]}


def test_the_files_have_no_aliases() -> None:
    """Anchors end with their document, and not every tool reads them."""
    for file in FILES:
        for token in yaml.scan(Path(file).read_text("utf-8")):
            assert not isinstance(token, yaml.AliasToken)
