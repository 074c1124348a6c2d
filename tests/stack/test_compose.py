"""No container engine is needed: what can be checked in the files themselves is."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from encode.stack import components, policies

ROOT = Path(__file__).parents[2]
INFRA = ROOT / "infra"
RUN_ONCE = {"bucket", "identities", "airflow-init"}
SECRET = re.compile(r"PASSWORD|SECRET|OBJECT_STORE_ACCESS_KEY|FERNET|SERVING_KEY")


@pytest.fixture(scope="module")
def services() -> dict:
    return yaml.safe_load((INFRA / "compose.yaml").read_text())["services"]


def example() -> dict[str, str]:
    lines = (INFRA / ".env.example").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def variables() -> dict[str, set[str]]:
    """Names that compose.yaml takes from .env, each with what follows it (a default, or a refusal)."""
    found: dict[str, set[str]] = {}
    for name, rest in re.findall(r"\$\{(\w+)([^}]*)\}", (INFRA / "compose.yaml").read_text()):
        found.setdefault(name, set()).add(rest)
    return found


def test_every_published_port_is_on_the_loopback(services):
    published = {name: port for name, fields in services.items() for port in fields.get("ports", [])}
    assert {"seaweedfs", "minio", "mlflow", "airflow-api-server", "serving"} == set(published)
    assert all(port.startswith("127.0.0.1:") for port in published.values())


def test_secrets_come_from_the_env_file_and_are_refused_when_empty():
    assert set(variables()) | {"COMPOSE_PROFILES"} == set(example())
    for name, rests in variables().items():
        if SECRET.search(name):
            assert example()[name] == "", "the example holds no secret that somebody would keep"
            assert all(rest.startswith(":?") for rest in rests), name
        else:
            assert rests == {f":-{example()[name]}"}, name


def test_no_service_sets_a_secret_in_plain_text(services):
    for name, fields in services.items():
        for variable, value in (fields.get("environment") or {}).items():
            if SECRET.search(variable) and not variable.endswith("_FILE"):
                assert str(value).startswith("${"), f"{name}: {variable}"


def test_images_are_pinned(services):
    for name, fields in services.items():
        if "build" not in fields:
            assert re.search(r":[\w.-]*\d", fields["image"]), name
        else:
            dockerfile = ROOT / fields["build"]["dockerfile"]
            assert "FROM python:3.11-" in dockerfile.read_text()
            assert re.search(r"--uid (\d+) .*^USER \1$", dockerfile.read_text(), re.DOTALL | re.MULTILINE)


def test_whatever_runs_on_is_watched_and_dependencies_are_waited_for(services):
    for name, fields in services.items():
        if name not in RUN_ONCE:
            assert fields["restart"] == "unless-stopped"
            assert "healthcheck" in fields or name == "minio", name
        for other, how in fields.get("depends_on", {}).items():
            expected = "service_completed_successfully" if other in RUN_ONCE else "service_healthy"
            assert how["condition"] == expected, f"{name} -> {other}"


def test_one_of_the_two_object_stores_answers_under_the_one_name(services):
    for name in ("seaweedfs", "minio"):
        assert services[name]["profiles"] == [name]
        assert services[name]["networks"]["default"]["aliases"] == ["objectstore"]
    assert example()["COMPOSE_PROFILES"] == "seaweedfs"
    dependencies = {other for fields in services.values() for other in fields.get("depends_on", {})}
    assert not dependencies & {"seaweedfs", "minio"}


def test_the_object_store_has_the_flags_of_the_stack_of_processes(services, tmp_path):
    ports = dict.fromkeys(components.PORTS["objectstore"], 1)
    command = components.object_store(tmp_path, ports, "key", "secret").command
    ours = set(command[command.index("mini") + 1 :])
    theirs = set(services["seaweedfs"]["command"][1:])
    differing = {flag.partition("=")[0] for flag in ours ^ theirs}
    assert {flag for flag in differing if ".port" not in flag} == {"-dir", "-ip.bind", "-s3.config"}


def test_the_object_store_knows_the_roles_of_the_stack_of_processes(services, tmp_path):
    """What is in the file is tried on a real store by tests/test_policies.py."""
    environment = {name: f"{name}-value" for name in services["identities"]["environment"]}
    script = [sys.executable, str(INFRA / "make_identities.py"), str(tmp_path / "s3.json")]
    subprocess.run(script, env=environment | {"PYTHONPATH": str(ROOT)}, check=True)
    secrets = {role: f"{role.upper()}_SECRET_KEY-value" for role in policies.ROLES}
    admin = "OBJECT_STORE_ACCESS_KEY-value", "OBJECT_STORE_SECRET_KEY-value"
    assert (tmp_path / "s3.json").read_text() == policies.identities(admin, secrets)
    [shared] = [mount for mount in services["identities"]["volumes"] if mount.startswith("identities:")]
    assert script[2].endswith(services["identities"]["command"][2].rpartition("/")[2])
    assert services["identities"]["command"][2].startswith(shared.partition(":")[2])
    assert "identities:/etc/objectstore:ro" in services["seaweedfs"]["volumes"]
    assert "-s3.config=/etc/objectstore/s3.json" in services["seaweedfs"]["command"]


def test_only_what_makes_bucket_and_identities_has_the_administrator_of_the_store(services):
    having = {name for name, fields in services.items() if "OBJECT_STORE_SECRET_KEY" in json.dumps(fields)}
    assert having == {"identities", "bucket", "minio"}
    for name, role in {"serving": "serve", "mlflow": "mlflow"}.items():
        environment = services[name]["environment"]
        assert environment["AWS_ACCESS_KEY_ID"] == policies.access_key(role)
        assert environment["AWS_SECRET_ACCESS_KEY"] == f"${{{role.upper()}_SECRET_KEY:?set it in infra/.env}}"


def test_airflow_has_the_connections_of_the_stack_of_processes_and_no_keys(services):
    store = components.Store("http://objectstore:8333", "key", "secret")
    secrets = {role: f"${{{role.upper()}_SECRET_KEY:?set it in infra/.env}}" for role in policies.ROLES}
    ours = components.airflow_connections(store, "http://mlflow:5000", "http://serving:8000", secrets)
    parts = [name for name in services if name.startswith("airflow-")]
    assert len(parts) == 5
    for name in parts:
        environment = services[name]["environment"]
        assert [variable for variable in environment if variable.startswith("AWS_")] == []
        for variable, text in ours.items():
            expected = json.loads(text)
            if variable.endswith("SERVING"):
                expected["password"] = "${SERVING_KEY_SECRET:?set it in infra/.env}"
            assert json.loads(environment[variable]) == expected


def test_mlflow_answers_to_every_name_that_clients_use(services):
    [hosts] = [flag for flag in services["mlflow"]["command"] if flag.startswith("--allowed-hosts=")]
    assert {"mlflow:5000", "localhost:${MLFLOW_PORT:-5000}"} <= set(hosts.partition("=")[2].split(","))
    for name in ("bucket", "serving"):
        uri = services[name]["environment"].get("MLFLOW_TRACKING_URI", "http://mlflow:5000")
        assert uri == "http://mlflow:5000"


def test_serving_knows_the_key_with_which_airflow_asks_by_its_hash(services):
    assert services["serving"]["environment"]["ENCODE_SERVING_KEYS"] == "${SERVING_KEY_HASHES:?set it in infra/.env}"
    assert "SERVING_KEY_SECRET" not in json.dumps(services["serving"])


def test_mounted_files_exist(services):
    for fields in services.values():
        for mount in fields.get("volumes", []):
            source = mount.split(":")[0]
            if source.startswith("."):
                assert (INFRA / source).exists(), source


def test_the_serving_image_carries_no_airflow():
    text = (INFRA / "Dockerfile.serving").read_text()
    assert "airflow" not in re.sub(r"#.*", "", text).lower()
    assert "--constraint requirements.txt" in text
    assert "-r requirements.txt" not in text


def test_compose_itself_accepts_the_file(tmp_path):
    docker = shutil.which("docker")
    if docker is None or subprocess.run([docker, "compose", "version"], capture_output=True).returncode != 0:
        pytest.skip("docker compose is not installed")
    filled = tmp_path / ".env"
    filled.write_text("".join(f"{name}={value or 'abc123'}\n" for name, value in example().items()))
    command = [docker, "compose", "--env-file", str(filled), "-f", str(INFRA / "compose.yaml"), "config", "--quiet"]
    checked = subprocess.run(command, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr
