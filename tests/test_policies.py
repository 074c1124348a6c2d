"""Each role's key does its work on a real store, the whole main job among it, and nothing else."""

from __future__ import annotations

import io
import json
import logging
import re
import secrets
from datetime import date
from pathlib import Path

import boto3
import numpy as np
import pytest
from botocore.exceptions import ClientError

from encode import steps
from encode.config import Places, load_config
from encode.schema import Window
from encode.serving.app import create_app
from encode.serving.bundle import Asked
from encode.stack import policies
from encode.stack.components import PORTS, Store
from encode.stack.components import object_store as weed
from encode.stack.ports import free_port
from encode.storage import open_storage

ROOT = Path(__file__).parents[1]
SMALL = str(Path(__file__).parent / "samples" / "small.yaml")
WINDOW = Window(date(2017, 11, 19), date(2018, 1, 1))
"""As few days as training needs."""
POINTER = "interests/space/current.json"


@pytest.fixture(scope="module")
def store(start_server):
    """An object store of this file with a key for each role; the administrator's, and the secret of each role."""
    ports: dict[str, int] = {}
    for role in PORTS["objectstore"]:
        ports[role] = free_port(ports.values())
    admin = secrets.token_hex(10), secrets.token_hex(20)
    role_secrets = {role: secrets.token_hex(20) for role in policies.ROLES}
    made = start_server(lambda home: weed(home / "roles", ports, *admin, role_secrets))
    return Store(made.url, *admin), role_secrets


@pytest.fixture(scope="module")
def client_of(store):
    """A function that makes a client with a role's key."""

    def make(role=None, service="s3"):
        known = store[0].as_role(role, store[1]) if role else store[0]
        return boto3.client(
            service,
            endpoint_url=known.endpoint_url,
            region_name="us-east-1",
            aws_access_key_id=known.access_key,
            aws_secret_access_key=known.secret_key,
        )

    return make


@pytest.fixture(scope="module", autouse=True)
def objects(client_of):
    """One object of each kind, written by the administrator."""
    keys = [
        *("log.json", "erasures.json", "items/items.parquet", "raw/dt=1/a", "behaviors/dt=1/a", "quarantine/dt=1/a"),
        "feedback/dt=1/a",
        *("quarantine/dt=unknown/a", "spaces/s/a", "models/m/a", "histories/h/a", "histories/current.json"),
        *("interests/space/1/part", POINTER, "mlflow/1/a", "probe/a"),
    ]
    for key in keys:
        client_of().put_object(Bucket="encode", Key=key, Body=b"first")
    yield keys
    for key in keys:
        client_of().delete_object(Bucket="encode", Key=key)


def allowed(action):
    """Tell whether a request is let through."""
    try:
        action()
    except ClientError as error:
        if error.response["ResponseMetadata"]["HTTPStatusCode"] != 403:
            raise
        return False
    return True


def matching(patterns, keys):
    return {
        key
        for key in keys
        for pattern in patterns
        if key == pattern or (pattern[-1] == "*" and key.startswith(pattern[:-1]))
    }


@pytest.mark.parametrize("role", policies.ROLES)
def test_a_role_reads_writes_and_deletes_what_the_table_says_and_nothing_else(role, objects, client_of):
    client, rights = client_of(role), policies.ROLES[role]
    read = {key for key in objects if allowed(lambda key=key: client.get_object(Bucket="encode", Key=key))}
    assert read == matching(rights.reads + rights.writes, objects)
    put = {key for key in objects if allowed(lambda key=key: client.put_object(Bucket="encode", Key=key, Body=b"x"))}
    assert put == matching(rights.writes, objects)
    deleted = {key for key in objects if allowed(lambda key=key: client.delete_object(Bucket="encode", Key=key))}
    assert deleted == matching(rights.deletes, objects)
    for key in deleted:
        client_of().put_object(Bucket="encode", Key=key, Body=b"first")


def test_the_serving_key_cannot_write_by_any_way(client_of):
    client = client_of("serve")
    etag = client.get_object(Bucket="encode", Key=POINTER)["ETag"]
    assert not allowed(lambda: client.put_object(Bucket="encode", Key=POINTER, Body=b"x", IfMatch=etag))
    assert not allowed(lambda: client.put_object(Bucket="encode", Key="new", Body=b"x", IfNoneMatch="*"))
    assert not allowed(lambda: client.create_multipart_upload(Bucket="encode", Key=POINTER))
    copied = {"Bucket": "encode", "Key": "spaces/s/a"}
    assert not allowed(lambda: client.copy_object(Bucket="encode", Key=POINTER, CopySource=copied))
    answer = client.delete_objects(Bucket="encode", Delete={"Objects": [{"Key": POINTER}]})
    assert [error["Code"] for error in answer["Errors"]] == ["AccessDenied"]
    assert not allowed(lambda: client.create_bucket(Bucket="another"))


@pytest.mark.parametrize("role", ["ingest", "train"])
def test_neither_ingest_nor_training_moves_the_pointer_of_interests(role, client_of):
    client = client_of(role)
    etag = client_of().get_object(Bucket="encode", Key=POINTER)["ETag"]
    assert not allowed(lambda: client.get_object(Bucket="encode", Key=POINTER))
    assert not allowed(lambda: client.put_object(Bucket="encode", Key=POINTER, Body=b"x", IfMatch=etag))
    copied = {"Bucket": "encode", "Key": POINTER}
    assert not allowed(lambda: client.copy_object(Bucket="encode", Key="raw/dt=1/stolen", CopySource=copied))


@pytest.mark.parametrize("role", policies.ROLES)
def test_no_role_gives_itself_more_rights(role, client_of):
    everything = {"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": "s3:*", "Resource": "*"}]}
    text = json.dumps(everything)
    iam, sts, s3 = (client_of(role, service) for service in ("iam", "sts", "s3"))
    assert not allowed(lambda: iam.put_user_policy(UserName=role, PolicyName="all", PolicyDocument=text))
    assert not allowed(lambda: iam.create_access_key(UserName="encode"))
    assert not allowed(lambda: sts.get_federation_token(Name="somebody", Policy=text))
    assert not allowed(lambda: s3.put_bucket_policy(Bucket="encode", Policy=text))
    assert not allowed(lambda: s3.put_bucket_acl(Bucket="encode", ACL="public-read-write"))


@pytest.mark.parametrize("role", policies.ROLES)
def test_what_is_not_there_is_told_from_what_is_forbidden(role, client_of):
    """Outputs are looked for before they are made: a 403 for what is missing would stop every first run."""
    rights = policies.ROLES[role]
    pattern = next(pattern for pattern in rights.reads + rights.writes if pattern.endswith("*"))
    client = client_of(role)
    with pytest.raises(client.exceptions.NoSuchKey):
        client.get_object(Bucket="encode", Key=pattern.replace("*", "nothing"))


@pytest.mark.parametrize("role", policies.ROLES)
def test_the_policy_files_are_those_of_the_table(role):
    remedy = "run `.venv/bin/python infra/make_policies.py`"
    assert (ROOT / "infra" / "policies" / f"{role}.json").read_text() == policies.to_text(role), remedy
    assert {path.stem for path in (ROOT / "infra" / "policies").glob("*.json")} == set(policies.ROLES), remedy


@pytest.fixture(scope="module")
def job(store, client_of, objects, mlflow_server, tmp_path_factory):
    """The main job with a key for each step: places by role, settings, summaries, and all that was logged and said."""
    for key in objects:
        client_of().delete_object(Bucket="encode", Key=key)
    base = load_config(SMALL)
    names = base.registry.model_copy(update={"model_name": f"roles-{secrets.token_hex(4)}", "experiment": "roles"})
    training = base.training.model_copy(update={"num_epochs": 1, "max_positives": 2000, "max_eval_positives": 1000})
    lenient = base.release.model_copy(
        update={"min_auc": 0, "min_gauc": 0, "min_auc_first_time": 0, "max_logloss": 9, "calibration": (0, 9)}
    )
    config = base.model_copy(update={"registry": names, "training": training, "release": lenient})

    def as_role(role):
        known = store[0].as_role(role, store[1])
        return Places(
            store="s3://encode",
            endpoint_url=known.endpoint_url,
            access_key=known.access_key,
            secret_key=known.secret_key,
            tracking_uri=mlflow_server,
        )

    said = io.StringIO()
    handler = logging.StreamHandler(said)
    logging.getLogger().addHandler(handler)

    def say(line):
        print(line, file=said)

    try:
        made = {
            "land": steps.land(config, as_role("ingest"), say),
            "validate": steps.validate(config, as_role("train"), WINDOW, say),
            "erase": steps.erase(config, as_role("erase"), [653], say),
            "train": steps.train(config, as_role("train"), WINDOW.end, say),
            "refresh": steps.refresh(config, as_role("publish"), WINDOW.end, say),
            "release": steps.release(config, as_role("publish"), say=say),
            "prune": steps.prune(config, as_role("erase"), 3, 1, say=say),
        }
    finally:
        logging.getLogger().removeHandler(handler)
    app = create_app(as_role("serve"), config.registry, tmp_path_factory.mktemp("serving"))
    app.state.follower.look()
    return as_role, config, made, said.getvalue(), app.state.follower.bundle


def test_the_main_job_runs_with_a_key_for_each_step(job, client_of):
    as_role, _, made, _, bundle = job
    assert made["refresh"]["users"] > 100
    assert bundle.interests(653) is None
    assert bundle.interests(1) is not None
    assert {prefix.partition("/")[0] for prefix in made["erase"]["held"]} == {"raw", "behaviors"}
    assert bundle.id == made["release"]["bundle"]
    assert len(bundle.score(Asked(1, np.array([1082185]))).probabilities) == 1
    keys = open_storage(as_role("erase"), writing=False).list("")
    written = {pattern for role in ("ingest", "train", "publish", "erase") for pattern in policies.ROLES[role].writes}
    assert matching(written, keys) == set(keys)
    assert json.loads(client_of().get_object(Bucket="encode", Key="erasures.json")["Body"].read()) == {"users": [653]}


def test_the_main_job_leaves_no_secret_behind(job, store, client_of, tmp_path):
    """Not in what it says and logs, hands on (XCom), stores, or writes into MLflow."""
    import mlflow

    as_role, config, made, said, _ = job
    secret = re.compile("|".join([store[0].secret_key, *store[1].values()]).encode())
    assert "candidate: " in said
    assert not secret.search(said.encode())
    assert not secret.search(json.dumps(made).encode())
    client, count = client_of(), 0
    for page in client.get_paginator("list_objects_v2").paginate(Bucket="encode"):
        for one in page["Contents"]:
            count += 1
            if one["Key"].endswith((".json", ".html")):
                data = client.get_object(Bucket="encode", Key=one["Key"])["Body"].read()
                assert not secret.search(data), one["Key"]
    assert count > 300
    api = mlflow.MlflowClient(as_role("train").tracking_uri)
    [version] = api.search_model_versions(f"name = '{config.registry.model_name}'")
    run = api.get_run(version.run_id)
    assert run.data.params["clustering.num_clusters"] == "8"
    assert not secret.search(json.dumps(run.to_dictionary(), default=str).encode())
    assert not secret.search(str(dict(version)).encode())
    folder = Path(mlflow.artifacts.download_artifacts(version.source, dst_path=str(tmp_path)))
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {"MLmodel", "model.json"} <= {path.name for path in files}
    assert not [path for path in files if secret.search(path.read_bytes())]
