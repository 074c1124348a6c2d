"""Who may do what in the object store: one table, from which the policies of `infra/policies` are made.

A policy is in the JSON of AWS IAM; SeaweedFS takes the same text in its file of identities. Keys in the store hold days
and digests, never users, so everybody may list: without that right AWS answers 403 for a missing object where 404 is
needed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

BUCKET = "encode"
_PROBE = ("probe/*",)
"""Where it is tried once a process whether the store honors conditions."""


@dataclass(frozen=True)
class Rights:
    """What one key may do; patterns are keys in the bucket. What is written may be read: a rerun looks for it."""

    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    deletes: tuple[str, ...] = ()


ROLES: Mapping[str, Rights] = {
    "ingest": Rights(
        writes=("log.json", "raw/*", "items/*", "feedback/*", "quarantine/dt=unknown/*", *_PROBE), deletes=_PROBE
    ),
    "train": Rights(
        reads=("erasures.json", "raw/*"),
        writes=("log.json", "behaviors/*", "quarantine/*", "spaces/*", "models/*", *_PROBE),
        deletes=_PROBE,
    ),
    "publish": Rights(
        reads=("log.json", "erasures.json", "behaviors/*", "spaces/*", "items/*"),
        writes=("histories/*", "interests/*", *_PROBE),
        deletes=_PROBE,
    ),
    "serve": Rights(reads=("erasures.json", "spaces/*", "interests/*", "items/*")),
    "erase": Rights(
        reads=("log.json", "raw/*", "behaviors/*", "quarantine/*", "feedback/*", "histories/*", "interests/*"),
        writes=("erasures.json", *_PROBE),
        deletes=("histories/*", "interests/*", *_PROBE),
    ),
    "mlflow": Rights(writes=("mlflow/*",), deletes=("mlflow/*",)),
}
"""`ingest` lands the log, and what came of the answers. `train` validates and trains. `publish` refreshes, releases and
rolls back. `serve` answers: models come to it through MLflow. `erase` keeps the list of erased users and prunes.
`mlflow` is MLflow's server."""


def policy(role: str, bucket: str = BUCKET) -> dict[str, Any]:
    """Return a role's policy."""
    rights = ROLES[role]
    statements = [
        _allow("List", ["s3:GetBucketLocation", "s3:ListBucket"], [f"arn:aws:s3:::{bucket}"]),
        _allow("Read", ["s3:GetObject"], _objects(bucket, rights.reads + rights.writes)),
    ]
    if rights.writes:
        actions = ["s3:AbortMultipartUpload", "s3:PutObject"]
        statements.append(_allow("Write", actions, _objects(bucket, rights.writes)))
    if rights.deletes:
        statements.append(_allow("Delete", ["s3:DeleteObject"], _objects(bucket, rights.deletes)))
    return {"Version": "2012-10-17", "Statement": statements}


def identities(admin: tuple[str, str], secrets: Mapping[str, str], bucket: str = BUCKET) -> str:
    """Return SeaweedFS's file of identities: an administrator, and roles whose access key is `access_key(role)`.

    Args:
        admin: access key and secret key.
        secrets: secret key by role.
        bucket: that the roles' policies are of.
    """
    all_rights = ["Admin", "Read", "Write", "List", "Tagging"]
    people: list[dict[str, Any]] = [{"name": "encode", "credentials": [_credential(*admin)], "actions": all_rights}]
    people += [
        {"name": role, "credentials": [_credential(access_key(role), secret)], "policyNames": [role]}
        for role, secret in secrets.items()
    ]
    policies = [{"name": role, "content": json.dumps(policy(role, bucket))} for role in secrets]
    return json.dumps({"identities": people, "policies": policies})


def access_key(role: str) -> str:
    """Return the access key of a role where we make the keys: a name, no secret."""
    return f"encode-{role}"


def to_text(role: str) -> str:
    """Return the file of a role's policy."""
    return json.dumps(policy(role), indent=2) + "\n"


def _allow(name: str, actions: list[str], resources: list[str]) -> dict[str, Any]:
    return {"Sid": name, "Effect": "Allow", "Action": actions, "Resource": resources}


def _objects(bucket: str, patterns: tuple[str, ...]) -> list[str]:
    return [f"arn:aws:s3:::{bucket}/{pattern}" for pattern in sorted(patterns)]


def _credential(access: str, secret: str) -> dict[str, str]:
    return {"accessKey": access, "secretKey": secret}
