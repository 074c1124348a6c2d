"""The local stack: the real components as ordinary processes on the loopback interface.

``up`` starts an S3-compatible object store, MLflow, Airflow and the serving process below one
folder (the *home*), ``status`` tells how they are, ``down`` stops them and ``clean`` removes their
data. No container engine, no root and no port beyond 127.0.0.1 is needed. The modules, from the
ground up:

    processes     one process group: start, identity, stop
    together      several programs as one process: Airflow's parts
    health        one question to a server: are you ready, and if not, what is missing
    home          the files of a home: credentials, ports, process ids, lock
    policies      who may do what in the object store
    ports         which port each component gets
    components    the four components: command, environment, ports, health
    launch        several components in the order of their needs
    local         up, status, down, clean
    airflow_api   client of Airflow's REST API (imported on its own: it needs httpx)
"""

from __future__ import annotations

from encode.stack.local import (
    ComponentStatus,
    Stack,
    clean,
    down,
    is_stopped,
    load_client_environment,
    status,
    up,
)

__all__ = [
    "ComponentStatus",
    "Stack",
    "clean",
    "down",
    "is_stopped",
    "load_client_environment",
    "status",
    "up",
]
