"""The chart renders what an installation needs, and refuses what could not work."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from devstack.services import KINDS, SERVICES, WITH_DATABASE

ROOT = Path(__file__).parents[2]
CHART = ROOT / "helm" / "tenfold"
# A helm that was built from source takes a very old cluster for granted.
KUBERNETES = "1.31.0"


@pytest.fixture(scope="module")
def helm() -> str:
    built = subprocess.run([ROOT / "scripts" / "tools.sh", "--path"], capture_output=True, text=True, check=True).stdout
    found = shutil.which("helm") or shutil.which("helm", path=built.strip())
    if found is None:
        pytest.skip("helm is not installed, so the chart was not rendered: make tools builds it")
    return found


def render(helm: str, values: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    """The objects of an installation named `shop`, with `values` over those of `ci/values.yaml`."""
    return [o for o in yaml.safe_load_all(attempt(helm, values, check=True).stdout) if o]


def attempt(helm: str, values: dict[str, Any] | None, *, check: bool = False) -> subprocess.CompletedProcess[str]:
    command = [helm, "template", "shop", str(CHART), "--kube-version", KUBERNETES]
    command += ["--values", str(CHART / "ci" / "values.yaml"), "--values", "-"]
    return subprocess.run(command, input=json.dumps(values or {}), capture_output=True, text=True, check=check)


def of_kind(objects: list[dict[str, Any]], kind: str) -> dict[str, dict[str, Any]]:
    return {o["metadata"]["name"]: o for o in objects if o["kind"] == kind}


@pytest.fixture(scope="module")
def objects(helm: str) -> list[dict[str, Any]]:
    return render(helm)


PROCESSES = {f"shop-tenfold-{kind.removesuffix('-api')}" for kind in KINDS}


def pods(objects: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {
        f"{o['kind']}/{o['metadata']['name']}": o["spec"]["template"]["spec"]
        for o in objects
        if o["kind"] in ("Deployment", "Job")
    }


@pytest.mark.parametrize(
    "kind", ["Deployment", "HorizontalPodAutoscaler", "PodDisruptionBudget", "ServiceAccount", "NetworkPolicy"]
)
def test_every_process_has_its_objects(objects: list[dict[str, Any]], kind: str) -> None:
    assert set(of_kind(objects, kind)) == PROCESSES


def test_only_apis_have_a_service(objects: list[dict[str, Any]]) -> None:
    apis = {name for name in PROCESSES if not name.endswith("-worker")}
    headless = {f"{name}-instances" for name in apis if not name.endswith("-gateway")}
    services = of_kind(objects, "Service")
    assert set(services) == apis | headless
    assert {name for name, service in services.items() if service["spec"].get("clusterIP") == "None"} == headless


def test_the_gateway_looks_up_names_that_there_are(objects: list[dict[str, Any]]) -> None:
    container = of_kind(objects, "Deployment")["shop-tenfold-gateway"]["spec"]["template"]["spec"]["containers"][0]
    upstreams = {v["value"] for v in container["env"] if v["name"].startswith("UPSTREAM_")}
    assert upstreams == {f"dns+http://{n}:8000" for n in of_kind(objects, "Service") if n.endswith("-instances")}


def test_names_are_unique_within_a_kind(objects: list[dict[str, Any]]) -> None:
    names = [(o["kind"], o["metadata"]["name"]) for o in objects]
    assert len(names) == len(set(names))


def test_selectors_meet_exactly_their_own_pods(objects: list[dict[str, Any]]) -> None:
    labels = {n: d["spec"]["template"]["metadata"]["labels"] for n, d in of_kind(objects, "Deployment").items()}

    def matched(selector: dict[str, str]) -> set[str]:
        return {name for name, have in labels.items() if selector.items() <= have.items()}

    for name, service in of_kind(objects, "Service").items():
        assert matched(service["spec"]["selector"]) == {name.removesuffix("-instances")}
    for name, deployment in of_kind(objects, "Deployment").items():
        assert matched(deployment["spec"]["selector"]["matchLabels"]) == {name}


def test_every_pod_meets_the_restricted_standard(objects: list[dict[str, Any]]) -> None:
    for name, pod in pods(objects).items():
        assert pod["securityContext"]["runAsNonRoot"], name
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert pod["automountServiceAccountToken"] is False, name
        for container in pod["containers"]:
            security = container["securityContext"]
            assert security["allowPrivilegeEscalation"] is False, name
            assert security["readOnlyRootFilesystem"] is True, name
            assert security["capabilities"] == {"drop": ["ALL"]}, name
            assert "memory" in container["resources"]["limits"], name


def test_probes_use_the_admin_port(objects: list[dict[str, Any]]) -> None:
    for deployment in of_kind(objects, "Deployment").values():
        (container,) = deployment["spec"]["template"]["spec"]["containers"]
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            assert container[probe]["httpGet"]["port"] == "admin"


def test_a_pod_is_given_time_to_drain(helm: str) -> None:
    for deployment in of_kind(render(helm, {"drainSeconds": 15}), "Deployment").values():
        pod = deployment["spec"]["template"]["spec"]
        assert pod["terminationGracePeriodSeconds"] == 15 + 25
        assert {"name": "DRAIN_SECONDS", "value": "15"} in pod["containers"][0]["env"]


def test_migrations_run_before_the_pods_and_after_the_bootstrap(objects: list[dict[str, Any]]) -> None:
    jobs = of_kind(objects, "Job")
    assert set(jobs) == {"shop-tenfold-bootstrap", *(f"shop-tenfold-{name}-migrate" for name in WITH_DATABASE)}
    weights = {name: int(job["metadata"]["annotations"]["helm.sh/hook-weight"]) for name, job in jobs.items()}
    assert all(job["metadata"]["annotations"]["helm.sh/hook"] == "pre-install,pre-upgrade" for job in jobs.values())
    assert weights.pop("shop-tenfold-bootstrap") < min(weights.values())


def test_no_secret_is_made_or_shown_by_the_chart(objects: list[dict[str, Any]]) -> None:
    assert not of_kind(objects, "Secret")
    shown = {e["name"] for pod in pods(objects).values() for c in pod["containers"] for e in c["env"]}
    assert not {name for name in shown if name.endswith(("_SECRET", "DATABASE_URL", "REDIS_URL", "PASSWORD"))}


def test_a_service_is_reached_only_by_those_that_call_it(objects: list[dict[str, Any]]) -> None:
    policies = of_kind(objects, "NetworkPolicy")

    def callers(name: str) -> list[str]:
        rules = policies[name]["spec"]["ingress"]
        (rule,) = [r for r in rules if r["ports"] == [{"port": "http"}]]
        (expression,) = rule["from"][0]["podSelector"]["matchExpressions"]
        return sorted(expression["values"])

    assert callers("shop-tenfold-users") == sorted(service.name for service in SERVICES if service.name != "users")
    assert callers("shop-tenfold-media") == ["gateway"]
    assert all(
        rule["ports"] == [{"port": "admin"}] for rule in policies["shop-tenfold-media-worker"]["spec"]["ingress"]
    )


def test_a_new_service_is_one_entry(helm: str) -> None:
    orders = {
        "secret": "tenfold-orders",
        "migrations": True,
        "processes": {"api": {"replicas": {"min": 1, "max": 1}, "pool": 2, "resources": {"requests": {"cpu": "50m"}}}},
    }
    objects = render(helm, {"services": {"orders": orders}})
    assert of_kind(objects, "Deployment")["shop-tenfold-orders"]["spec"]["replicas"] == 1
    assert "shop-tenfold-orders" not in of_kind(objects, "HorizontalPodAutoscaler")
    assert "shop-tenfold-orders-migrate" in of_kind(objects, "Job")


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"database": {"maxConnections": 50}}, "more than maxConnections 50 - reserve 10 = 40"),
        ({"kafka": {"partitions": 3}}, "replicas.max 4 is more than kafka.partitions 3"),
        ({"services": {"users": {"processes": {"api": {"replicas": {"min": 5}}}}}}, "less than replicas.min 5"),
        ({"publicUrl": ""}, "/publicUrl"),
        ({"objectStoreUrl": "file:///data"}, "/objectStoreUrl"),
        ({"ingres": {"enabled": True}}, "ingres"),
    ],
)
def test_what_cannot_work_is_refused_with_the_reason(helm: str, values: dict[str, Any], reason: str) -> None:
    outcome = attempt(helm, values)
    assert outcome.returncode != 0
    assert reason in outcome.stderr
