"""No cluster is needed: what the manifests say is checked against the program, the image and each other."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import yaml

from encode.cli import _parser
from encode.config import Places
from encode.serving.probes import OPEN_PATHS
from encode.serving.shard import Shard

ROOT = Path(__file__).parents[2]
KUBERNETES = ROOT / "infra" / "kubernetes"
LABELS = {"app.kubernetes.io/name": "encode-serving"}


def load(folder):
    """Manifests of a folder by kind."""
    files = [path for path in sorted((KUBERNETES / folder).glob("*.yaml")) if path.name != "kustomization.yaml"]
    return {one["kind"]: one for path in files for one in yaml.safe_load_all(path.read_text())}


@pytest.fixture(scope="module")
def base():
    return load("base")


@pytest.fixture(scope="module")
def pod(base):
    return base["Deployment"]["spec"]["template"]["spec"]


@pytest.fixture(scope="module")
def container(pod):
    [one] = pod["containers"]
    return one


@pytest.fixture(scope="module")
def options(container):
    """What the program understands of its arguments; it refuses what it does not know."""
    assert container["command"][0] == "encode"
    return _parser().parse_args([*container["command"][1:], *container["args"]])


class Asked(dict):
    """An environment that remembers what it was asked for."""

    def __init__(self, values):
        super().__init__(values)
        self.names = set()

    def get(self, name, default=None):
        self.names.add(name)
        return super().get(name, default)


def render(folder):
    """What kubectl would apply."""
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("kubectl is not installed")
    made = subprocess.run([kubectl, "kustomize", str(folder)], capture_output=True, text=True, check=True)
    return list(yaml.safe_load_all(made.stdout))


def on_top(folder, kustomization):
    """Write a user's own folder, whose paths are from the root of the repository."""
    up = os.path.relpath(ROOT, folder)
    named = {k: [f"{up}/{path}" for path in kustomization.get(k, [])] for k in ("resources", "components")}
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(kustomization | named))
    return folder


def blocks_of_the_page():
    """What it shows as YAML."""
    page = (ROOT / "docs" / "deployment.md").read_text()
    return [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)]


def test_every_file_is_named_in_its_kustomization():
    folders = [path.parent for path in KUBERNETES.rglob("kustomization.yaml")]
    assert {folder.name for folder in folders} == {"base", "sharded", "autoscaling", "monitoring"}
    for folder in folders:
        named = yaml.safe_load((folder / "kustomization.yaml").read_text())["resources"]
        there = {path.name for path in folder.glob("*.yaml")} - {"kustomization.yaml"}
        assert {name for name in named if name.endswith(".yaml")} == there


def test_the_program_has_time_to_drain(pod, container, options):
    assert pod["terminationGracePeriodSeconds"] >= options.drain_delay + options.drain_timeout + 10
    ready = container["readinessProbe"]
    assert ready["periodSeconds"] * ready["failureThreshold"] + ready["timeoutSeconds"] < options.drain_delay
    assert "lifecycle" not in container, "the delay is the program's own"


def test_probes_ask_what_is_open_and_only_readiness_depends_on_a_release(container):
    paths = {kind: container[f"{kind}Probe"]["httpGet"]["path"] for kind in ("startup", "liveness", "readiness")}
    assert set(paths.values()) <= OPEN_PATHS
    assert paths == {"startup": "/health", "liveness": "/health", "readiness": "/ready"}


def test_ports_are_the_one_on_which_the_program_listens(base, container, options):
    assert options.host == "0.0.0.0"
    assert container["ports"] == [{"name": "http", "containerPort": options.port}]
    assert [port["targetPort"] for port in base["Service"]["spec"]["ports"]] == ["http"]
    [rule] = base["NetworkPolicy"]["spec"]["ingress"]
    assert [port["port"] for port in rule["ports"]] == [options.port]
    [endpoint] = load("components/monitoring")["ServiceMonitor"]["spec"]["endpoints"]
    assert endpoint["port"] == base["Service"]["spec"]["ports"][0]["name"]


def test_the_environment_is_what_the_program_reads(base, container):
    given = {variable["name"] for variable in container["env"]} | set(base["ConfigMap"]["data"])
    environment = Asked(dict.fromkeys(given, "x"))
    Places.from_environment(environment)
    own = {"ENCODE_SERVING_KEYS", "MLFLOW_DISABLE_TELEMETRY", "HOME"}
    assert given <= environment.names | own
    assert 'environment.get("ENCODE_SERVING_KEYS"' in (ROOT / "encode" / "cli.py").read_text()
    assert {"ENCODE_STORE", "MLFLOW_TRACKING_URI", "AWS_SECRET_ACCESS_KEY", "ENCODE_SERVING_KEYS"} <= given


def test_secrets_are_references_that_the_page_tells_how_to_make(container):
    page = (ROOT / "docs" / "deployment.md").read_text()
    for variable in container["env"]:
        if variable["name"] == "HOME":
            continue
        reference = variable["valueFrom"]["secretKeyRef"]
        assert re.search(rf"create secret generic {reference['name']}\b.*--from-literal={reference['key']}=", page)
    [endpoint] = load("components/monitoring")["ServiceMonitor"]["spec"]["endpoints"]
    asked = endpoint["authorization"]["credentials"]
    assert re.search(rf"create secret generic {asked['name']}\b.*--from-literal={asked['key']}=", page)


def test_the_network_lets_out_to_where_things_are_and_nowhere_else(base):
    data = base["ConfigMap"]["data"]
    wanted = {urlsplit(data[name]).port for name in ("AWS_ENDPOINT_URL", "MLFLOW_TRACKING_URI")}
    names = {urlsplit(data[name]).hostname for name in ("AWS_ENDPOINT_URL", "MLFLOW_TRACKING_URI")}
    egress = base["NetworkPolicy"]["spec"]["egress"]
    assert base["NetworkPolicy"]["spec"]["policyTypes"] == ["Ingress", "Egress"]
    assert {port["port"] for rule in egress for port in rule["ports"]} == wanted | {53}
    to = {
        label
        for rule in egress
        for peer in rule["to"]
        for key, label in peer["podSelector"]["matchLabels"].items()
        if key == "app.kubernetes.io/name"
    }
    assert to == names


def test_who_is_let_in_and_out_may_run_in_any_namespace(base):
    spec = base["NetworkPolicy"]["spec"]
    callers = [peer for rule in spec["ingress"] for peer in rule["from"]]
    called = [peer for rule in spec["egress"] for peer in rule["to"]]
    assert all("namespaceSelector" in peer for peer in callers + called), "a podSelector alone means this namespace"
    labels = [peer["podSelector"]["matchLabels"] for peer in callers if "podSelector" in peer]
    registry = urlsplit(base["ConfigMap"]["data"]["MLFLOW_TRACKING_URI"]).hostname
    assert labels == [{"encode/asks-serving": "true"}, {"app.kubernetes.io/name": registry}], "the webhook calls, too"
    page = (ROOT / "docs" / "deployment.md").read_text()
    assert '"labels":{"encode/asks-serving":"true"}' in page, "how to label"


def test_the_policy_that_the_page_adds_is_of_these_pods(base):
    [added] = [one for one in blocks_of_the_page() if one.get("kind") == "NetworkPolicy"]
    assert added["metadata"]["namespace"] == "encode"
    assert added["metadata"]["name"] != base["NetworkPolicy"]["metadata"]["name"], "it comes beside it"
    assert added["spec"]["podSelector"]["matchLabels"] == LABELS
    assert {kind.lower() for kind in added["spec"]["policyTypes"]} == added["spec"].keys() & {"ingress", "egress"}


def test_the_process_has_no_rights_and_writes_to_its_volumes_only(pod, container, options):
    user = pod["securityContext"]["runAsUser"]
    assert pod["securityContext"]["runAsNonRoot"]
    assert f"USER {user}\n" in (ROOT / "infra" / "Dockerfile.serving").read_text()
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert pod["automountServiceAccountToken"] is False
    assert {mount["mountPath"] for mount in container["volumeMounts"]} == {str(options.cache), "/tmp"}
    assert {volume["name"] for volume in pod["volumes"]} == {mount["name"] for mount in container["volumeMounts"]}
    assert [one["value"] for one in container["env"] if one["name"] == "HOME"] == ["/tmp"]
    assert container["resources"]["requests"].keys() >= {"cpu", "memory"}


def test_everything_selects_the_pods(base):
    spec = base["Deployment"]["spec"]
    monitor = load("components/monitoring")["ServiceMonitor"]["spec"]
    assert spec["template"]["metadata"]["labels"] == spec["selector"]["matchLabels"] == LABELS
    assert base["Service"]["spec"]["selector"] == LABELS
    assert base["Service"]["metadata"]["labels"] == monitor["selector"]["matchLabels"] == LABELS
    assert base["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"] == LABELS
    assert base["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"] == LABELS
    scaled = load("components/autoscaling")["HorizontalPodAutoscaler"]["spec"]
    assert scaled["scaleTargetRef"]["name"] == base["Deployment"]["metadata"]["name"]
    assert scaled["minReplicas"] >= spec["replicas"] > base["PodDisruptionBudget"]["spec"]["maxUnavailable"]


def test_each_pod_of_the_sharded_form_holds_the_shard_of_its_number():
    kinds = {one["metadata"]["name"] + one["kind"]: one for one in render(KUBERNETES / "sharded")}
    shards = kinds["encode-servingStatefulSet"]["spec"]
    [container] = shards["template"]["spec"]["containers"]
    assert kinds["encode-serving-shardsService"]["spec"]["clusterIP"] == "None"
    assert shards["serviceName"] == "encode-serving-shards"
    [source] = [one["valueFrom"]["fieldRef"]["fieldPath"] for one in container["env"] if one["name"] == "SHARD"]
    assert source == "metadata.labels['apps.kubernetes.io/pod-index']"
    volumes = [one["name"] for one in shards["template"]["spec"]["volumes"]]
    volumes += [one["metadata"]["name"] for one in shards["volumeClaimTemplates"]]
    assert sorted(volumes) == sorted(mount["name"] for mount in container["volumeMounts"])
    held = []
    for number in range(shards["replicas"]):
        arguments = [argument.replace("$(SHARD)", str(number)) for argument in container["args"]]
        held.append(Shard.parse(_parser().parse_args(["serve", *arguments]).shard))
    assert held == [Shard(number, len(held)) for number in range(len(held))]


def test_the_folder_of_the_page_leaves_the_number_of_replicas_to_the_autoscaler(tmp_path):
    [own] = [one for one in blocks_of_the_page() if "components" in one]
    made = {one["kind"]: one for one in render(on_top(tmp_path, own))}
    assert {one["metadata"]["namespace"] for one in made.values()} == {"encode"}
    target = made["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]
    deployment = made[target["kind"]]
    assert deployment["metadata"]["name"] == target["name"]
    assert "replicas" not in deployment["spec"], "each apply would set it back"
    assert made["ServiceMonitor"]
    assert made["ConfigMap"]["data"]["ENCODE_STORE"] == "s3://my-bucket"


def test_a_second_copy_of_the_shards_shares_nothing_with_the_first(tmp_path):
    paths = {"resources": ["infra/kubernetes/sharded"], "components": ["infra/kubernetes/components/monitoring"]}
    first, second = render(KUBERNETES / "sharded"), render(on_top(tmp_path, paths | {"namespace": "encode-b"}))
    assert {one["metadata"]["namespace"] for one in first} == {"encode"}
    assert {one["metadata"]["namespace"] for one in second} == {"encode-b"}
    for copy in (first, second):
        assert [one["kind"] for one in copy].count("PodDisruptionBudget") == 1
        [pods] = [one["spec"] for one in copy if one["kind"] == "StatefulSet"]
        assert pods["serviceName"] in {one["metadata"]["name"] for one in copy if one["kind"] == "Service"}
