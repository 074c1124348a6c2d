"""The whole path on a small real log, against the real object store and the real MLflow, in one process."""

import json
import os
import secrets
import subprocess
import sys
import threading
import time
from datetime import date
from pathlib import Path

import httpx
import numpy as np
import pytest
import uvicorn
from safetensors.numpy import load

from encode import plan, steps
from encode.config import Places, load_config
from encode.data.histories import read_histories
from encode.errors import ArtifactError, ConfigError, QualityError
from encode.interests.snapshots import read_space
from encode.outputs import MANIFEST
from encode.registry import CANDIDATE, CHAMPION, PREVIOUS, REFUSED, REPORT, Registry
from encode.schema import UNKNOWN, Window
from encode.serving.app import create_app
from encode.stack.ports import free_port
from encode.storage import open_storage

SMALL = str(Path(__file__).parent / "samples" / "small.yaml")
WINDOW = Window(date(2017, 9, 3), date(2018, 1, 1))
USER, ITEMS = 653, [1082185, 6534178, 995242]

LOAD = """
import sys
from encode.config import Places, RegistryConfig
from encode.registry import CHAMPION, Registry
from encode.serving.release import loaded

places = Places.from_environment()
registry = Registry(places, RegistryConfig(model_name=sys.argv[1]))
with loaded(registry, places, registry.by_alias(CHAMPION)) as bundle:
    print(bundle.id)
assert "encode.serving.pyfunc" not in sys.modules
"""


def quiet(line):
    pass


@pytest.fixture(scope="module")
def config():
    base = load_config(SMALL)
    names = base.registry.model_copy(update={"model_name": f"ctr-{secrets.token_hex(4)}", "experiment": "steps"})
    return base.model_copy(update={"registry": names})


@pytest.fixture(scope="module")
def places(object_store, mlflow_server):
    return Places(
        store=f"s3://{object_store.bucket}/steps-{secrets.token_hex(4)}",
        endpoint_url=object_store.endpoint_url,
        access_key=object_store.access_key,
        secret_key=object_store.secret_key,
        tracking_uri=mlflow_server,
    )


@pytest.fixture(scope="module")
def serving(config, places, tmp_path_factory):
    """The real serving process's application on a real port, following the registry."""
    port = free_port(())
    app = create_app(places, config.registry, tmp_path_factory.mktemp("serving"), seconds=60)
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="warning", ws="none"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.05)
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join(20)


@pytest.fixture(scope="module")
def released(config, places, serving):
    """All steps, once."""
    places = places.model_copy(update={"serving_url": serving})
    landed = steps.land(config, places, quiet)
    validated = steps.validate(config, places, WINDOW, quiet)
    before = httpx.post(f"{serving}/v1/score", json={"user_id": USER, "item_ids": ITEMS})
    assert before.status_code == 503
    assert steps.refresh(config, places, WINDOW.end, quiet)["snapshots"] == {}
    assert steps.release(config, places, quiet)["outcome"] == "nothing to release"
    began = time.time()
    trained = steps.train(config, places, WINDOW.end, quiet)
    ended = time.time()
    refreshed = steps.refresh(config, places, WINDOW.end, quiet)
    release = steps.release(config, places, quiet)
    return {
        "places": places,
        "land": landed,
        "validate": validated,
        "train": trained,
        "trained_between": (began, ended),
        "refresh": refreshed,
        "release": release,
    }


def test_every_row_is_accounted_for(released):
    assert released["land"]["rows"] == 61_461
    assert released["validate"]["rows"] == released["land"]["landed"]
    assert released["validate"]["accepted"] + released["validate"]["rejected"] == released["validate"]["rows"]
    assert released["refresh"]["users"] == 150


def test_the_candidate_is_registered_with_all_that_explains_it(config, released):
    import mlflow

    registry = Registry(released["places"], config.registry)
    version = registry.by_alias(CHAMPION)
    assert version == registry.by_alias(CANDIDATE)
    client = mlflow.MlflowClient()
    run = client.get_run(version.tags["encode.run"])
    assert {"auc", "gauc", "logloss", "calibration", "auc_first_time", "epoch_loss"} <= set(run.data.metrics)
    assert run.data.params["clustering.num_clusters"] == "8"
    assert run.inputs.dataset_inputs[0].dataset.name == "behaviors 2017-09-03 to 2017-12-31"
    assert run.data.tags["encode.space"] == released["train"]["space"]
    begins, ends = (1000 * seconds for seconds in released["trained_between"])
    assert begins - 1 <= run.info.start_time < begins + 1000, "the run is as long as the training, not as its logging"
    assert begins + 1000 < run.info.end_time <= ends + 1
    assert (run.info.status, run.data.tags["mlflow.runName"]) == ("FINISHED", "small as of 2018-01-01")
    assert "mlflow.user" in run.data.tags
    assert "report.png" in [one.path for one in client.list_artifacts(run.info.run_id)]
    info = mlflow.models.get_model_info(f"models:/{config.registry.model_name}@champion")
    assert [column.name for column in info.signature.inputs] == ["user_id", "item_id"]
    assert info.saved_input_example_info is not None
    files = {
        path.name for path in Path(mlflow.artifacts.download_artifacts(info.model_uri)).rglob("*") if path.is_file()
    }
    assert not {name for name in files if name.endswith((".pkl", ".pt", ".pth"))}


def report_of(registry, version):
    """The report that MLflow has with a version's run."""
    import mlflow

    return mlflow.artifacts.load_text(f"runs:/{registry.by_number(version).tags['encode.run']}/{REPORT}")


def test_the_report_is_with_the_run(config, released):
    registry, release = Registry(released["places"], config.registry), released["release"]
    text = report_of(registry, release["version"])
    assert f"{config.registry.model_name} version {release['version']}" in text
    assert f"passed its {len(release['gates'])} gates" in text
    assert "there is no champion yet" in text
    run = registry.by_number(release["version"]).tags["encode.run"]
    assert release["report"].startswith(f"{released['places'].tracking_uri}/#/experiments/")
    assert release["report"].endswith(f"/runs/{run}/artifacts/{REPORT}")
    assert release["gates"]["parity"] < 1e-5, "what the snapshot's maker and the engine give is what was measured"


def test_a_model_holds_nobodys_history(config, released):
    """Its mirror test is of made-up users, who are as long as the longest."""
    storage = open_storage(released["places"])
    registry = Registry(released["places"], config.registry)
    mirror = load(registry.files(registry.by_number(released["train"]["version"]))["mirror.safetensors"])
    histories, _ = read_histories(storage, WINDOW.end)
    vocabulary = read_space(storage, released["train"]["space"]).vocabulary
    index = vocabulary.index(histories.item_ids, histories.category_ids)
    known = [np.unique(one[one > UNKNOWN]) for one in np.split(index, histories.offsets[1:-1])]
    held = [item[times > 0] for item, times in zip(mirror["item"], mirror["times"], strict=True)]
    assert [len(one) > 50 for one in held] == [True] * 4 + [False], "the last one is unknown"
    assert not any(np.array_equal(one, other) for one in held[:4] for other in known)


def test_serving_has_loaded_exactly_the_released_bundle(released):
    state = httpx.get(f"{released['places'].serving_url}/v1/release").json()
    assert state["bundle"]["id"] == released["release"]["bundle"]
    assert state["bundle"]["snapshot"] == released["refresh"]["snapshots"][released["train"]["space"]]
    assert state["error"] is None


def test_a_second_run_of_all_steps_changes_no_byte(config, released):
    places = released["places"]
    storage = open_storage(places)
    before = {key: storage.get_versioned(key)[1] for key in storage.list("")}
    assert steps.land(config, places, quiet)["unchanged"]
    steps.validate(config, places, WINDOW, quiet)
    assert steps.train(config, places, WINDOW.end, quiet)["version"] == released["train"]["version"]
    assert steps.refresh(config, places, WINDOW.end, quiet) == released["refresh"]
    again = steps.release(config, places, quiet)
    assert (again["outcome"], again["bundle"]) == ("serving brought up to date", released["release"]["bundle"])
    assert {key: storage.get_versioned(key)[1] for key in storage.list("")} == before


def test_plain_mlflow_scores_the_same(config, released, tmp_path):
    """`mlflow models serve` in a process of its own, without anything of ours but the logged model."""
    places = released["places"]
    port = free_port(())
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "MLFLOW_TRACKING_URI": places.tracking_uri,
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "AWS_ACCESS_KEY_ID": places.access_key,
        "AWS_SECRET_ACCESS_KEY": places.secret_key.get_secret_value(),
    }
    uri = f"models:/{config.registry.model_name}@champion"
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", uri, "--env-manager", "local", "-p", str(port)]
    log = tmp_path / "serve.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            command, env=environment, stdout=output, stderr=output, start_new_session=True, cwd=tmp_path
        )
    try:
        until = time.monotonic() + 120
        while True:
            try:
                httpx.get(f"http://127.0.0.1:{port}/ping").raise_for_status()
                break
            except httpx.HTTPError:
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < until, log.read_text()
                time.sleep(0.3)
        rows = {"columns": ["user_id", "item_id"], "data": [[USER, item] for item in ITEMS]}
        answer = httpx.post(f"http://127.0.0.1:{port}/invocations", json={"dataframe_split": rows}, timeout=60).json()
    finally:
        os.killpg(process.pid, 15)
        process.wait(20)
    plain = [row["probability"] for row in answer["predictions"]]
    ours = httpx.post(f"{places.serving_url}/v1/score", json={"user_id": USER, "item_ids": ITEMS}).json()
    assert plain == pytest.approx(ours["probabilities"], abs=1e-5)
    assert len(set(plain)) == len(ITEMS)


def test_our_server_needs_no_model_code(config, released, tmp_path):
    """Loading a release must work where MLflow is told never to execute what an artifact holds."""
    places = released["places"]
    environment = {
        **os.environ,
        "MLFLOW_ALLOW_MODEL_CODE_EXECUTION": "false",
        "MLFLOW_TRACKING_URI": places.tracking_uri,
        "ENCODE_STORE": places.store,
        "AWS_ENDPOINT_URL": places.endpoint_url,
        "AWS_ACCESS_KEY_ID": places.access_key,
        "AWS_SECRET_ACCESS_KEY": places.secret_key.get_secret_value(),
    }
    command = [sys.executable, "-c", LOAD, config.registry.model_name]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == released["release"]["bundle"]


def test_a_second_log_may_not_share_the_store(config, released):
    other = config.model_copy(update={"name": "other"})
    with pytest.raises(ConfigError, match=r'found \{"log":"small"\}, this preset is \{"log":"other"\}'):
        steps.land(other, released["places"], quiet)


def test_a_refused_candidate_leaves_the_champion_and_a_good_one_can_be_rolled_back(config, released):
    """Last but one in this file: it moves the champion and puts it back."""
    places, first = released["places"], released["release"]
    changed = config.training.model_copy(update={"seed": 1})
    registry = Registry(places, config.registry)

    strict = config.model_copy(
        update={"training": changed, "release": config.release.model_copy(update={"min_auc": 0.99})}
    )
    second = steps.train(strict, places, WINDOW.end, quiet)
    assert second["space"] != released["train"]["space"]
    steps.refresh(strict, places, WINDOW.end, quiet)
    with pytest.raises(QualityError, match=r"misses its gates: auc 0\.\d+ \(>= 0.99\).*Report: http"):
        steps.release(strict, places, quiet)
    assert "is refused: " in report_of(registry, second["version"])
    assert "training.seed" in report_of(registry, second["version"]), "what changed"
    assert registry.by_alias(CHAMPION).number == first["version"]
    again = steps.release(strict, places, quiet)
    assert (again["outcome"], again["bundle"]) == ("serving brought up to date", first["bundle"])

    wide = {"max_auc_loss": 1.0, "max_gauc_loss": 1.0, "max_logloss_gain": 1.0, "max_miscalibration_gain": 9.0}
    lenient = config.model_copy(
        update={
            "training": changed.model_copy(update={"seed": 2}),
            "release": config.release.model_copy(update={**wide, "approval": True}),
        }
    )
    third = steps.train(lenient, places, WINDOW.end, quiet)
    steps.refresh(lenient, places, WINDOW.end, quiet)
    said = []
    planned = plan.release(lenient, places, quiet)
    assert (planned["outcome"], planned["version"]) == ("to be judged", third["version"])
    assert (planned["champion"], planned["approval"]) == (first["version"], True)
    waiting = steps.release(lenient, places, quiet)
    assert (waiting["outcome"], waiting["version"]) == ("waits for approval", third["version"])
    with pytest.raises(QualityError, match=f"version 99 is approved, version {third['version']} was judged"):
        steps.release(lenient, places, quiet, approve="99")
    judged = json.loads(json.dumps(steps.judge(lenient, places, quiet)))  # as Airflow carries it
    assert judged["approval"]
    assert "| auc_over_champion |" in judged["body"]
    with pytest.raises(QualityError, match=r"snapshot was yesterday, is .*; nothing was released"):
        steps.release(lenient, places, quiet, judged=judged | {"snapshot": "yesterday"}, approve=third["version"])
    registry.point(CANDIDATE, registry.by_number(second["version"]))
    with pytest.raises(QualityError, match=f"candidate was {third['version']}, is {second['version']};.* was refused"):
        steps.release(lenient, places, quiet, judged=judged, approve=third["version"])
    assert registry.by_alias(CHAMPION).number == first["version"]
    registry.point(CANDIDATE, registry.by_number(third["version"]))
    with pytest.raises(QualityError, match="approved by nobody; nothing was released"):
        steps.release(lenient, places, quiet, judged=judged)
    release = steps.release(lenient, places, quiet, judged=judged, approve=third["version"])
    assert (release["outcome"], release["version"]) == ("released", third["version"])
    assert release["gates"] == judged["gates"]
    assert httpx.get(f"{places.serving_url}/v1/release").json()["bundle"]["id"] == release["bundle"]
    again = steps.release(lenient, places, quiet, judged=judged, approve=third["version"])
    assert again == release, "a second try changes nothing"

    assert steps.train(config, places, WINDOW.end, said.append)["version"] == first["version"], "registered before"
    assert f"the candidate is still version {third['version']}" in said[-1]
    assert registry.by_alias(CANDIDATE).number == third["version"]
    late = {"outcome": "serving brought up to date", "approval": False, "version": first["version"]}
    assert steps.release(config, places, quiet, judged=late)["outcome"] == "nothing to release"

    with pytest.raises(ConfigError, match="is the champion: it serves; roll back"):
        steps.refuse(lenient, places, third["version"], "slow", quiet)
    with pytest.raises(ArtifactError, match="version 99: not in the registry"):
        steps.rollback(lenient, places, quiet, to="99")
    with pytest.raises(QualityError, match=rf"version {second['version']} was never champion.*have 1, 3;"):
        steps.rollback(lenient, places, quiet, to=second["version"])
    with pytest.raises(QualityError, match="is the champion; it serves already"):
        steps.rollback(lenient, places, quiet, to=third["version"])
    planned = plan.rollback(lenient, places, said.append, reason="rehearsal")
    assert (planned["from"], planned["version"]) == (third["version"], first["version"])
    assert planned["snapshot"] == released["refresh"]["snapshots"][released["train"]["space"]]
    assert f"version {third['version']} as refused: {planned['note']}" in said[-1]
    assert registry.by_alias(CHAMPION).number == third["version"], "a dry run moves nothing"
    assert REFUSED not in registry.by_number(third["version"]).tags
    with pytest.raises(
        QualityError, match=f"version 99 was to be left, but version {third['version']} is the champion"
    ):
        steps.rollback(lenient, places, quiet, leaving="99")
    # As in Airflow: what was chosen may be tried again, here after serving could not be asked.
    chosen = {"to": planned["version"], "leaving": planned["from"]}
    away = places.model_copy(update={"serving_url": f"http://127.0.0.1:{free_port(())}"})
    for _ in range(2):
        with pytest.raises(TimeoutError, match=r"cannot be asked: ConnectError.*The alias has moved.*do not roll back"):
            steps.rollback(lenient, away, quiet, reason="rehearsal", **chosen)
        assert registry.by_alias(CHAMPION).number == first["version"]
    back = steps.rollback(lenient, places, said.append, reason="rehearsal", **chosen)
    assert (back["from"], back["version"]) == (third["version"], first["version"])
    assert (back["version"], back["bundle"]) == (first["version"], first["bundle"])
    assert httpx.get(f"{places.serving_url}/v1/release").json()["bundle"]["id"] == first["bundle"]
    assert (
        httpx.post(f"{places.serving_url}/v1/score", json={"user_id": USER, "item_ids": ITEMS}).json()["bundle"][
            "model_version"
        ]
        == first["version"]
    )
    assert back["seconds"] < 60, "seconds; on a machine that many tests share, more"
    assert f"in {back['seconds']:.1f} s" in said[-1]
    assert registry.by_number(third["version"]).tags[REFUSED] == planned["note"]
    assert planned["note"] == f"rolled back to version {first['version']}: rehearsal"
    assert steps.release(lenient, places, quiet)["outcome"] == "serving brought up to date"
    with pytest.raises(QualityError, match="is the first champion"):
        steps.rollback(lenient, places, quiet)

    forward = steps.rollback(lenient, places, quiet, to=third["version"])
    assert forward["bundle"] == release["bundle"]
    assert REFUSED not in registry.by_number(third["version"]).tags
    assert steps.rollback(lenient, places, quiet)["bundle"] == first["bundle"]

    # Released once more, it comes after whoever serves then, whatever came before it the first time.
    registry.untag(registry.by_number(third["version"]), REFUSED)
    registry.tag(registry.by_number(third["version"]), PREVIOUS, second["version"])
    steps.release(lenient, places, quiet, approve=third["version"])
    assert registry.by_number(third["version"]).tags[PREVIOUS] == first["version"]
    assert steps.rollback(lenient, places, quiet)["bundle"] == first["bundle"]


def test_before_there_is_a_champion_a_limit_may_be_mended_but_what_a_person_refuses_is_refused(
    config, released, monkeypatch
):
    """Under another name in the registry: the model is there already, so that nothing is trained."""
    names = config.registry.model_copy(update={"model_name": f"ctr-{secrets.token_hex(4)}"})
    places = released["places"].model_copy(update={"serving_url": None})
    mended = config.model_copy(update={"registry": names})
    wrong = mended.model_copy(update={"release": config.release.model_copy(update={"min_auc": 0.9999})})
    registry, number = Registry(places, names), steps.train(mended, places, WINDOW.end, quiet)["version"]
    with pytest.raises(QualityError, match=r"misses its gates: auc .*there is no champion yet, nothing serves"):
        steps.release(wrong, places, quiet)
    steps.refuse(mended, places, number, "a person says no", quiet)
    said = []
    assert steps.release(mended, places, said.append)["outcome"] == "nothing to release"
    assert said[-1].endswith("was refused before: a person says no")

    registry.untag(registry.by_number(number), REFUSED)
    with pytest.raises(QualityError):
        steps.release(wrong, places, quiet)
    with monkeypatch.context() as patch:
        patch.setattr(Registry, "point", lambda *_: (_ for _ in ()).throw(ConnectionError("MLflow is away")))
        with pytest.raises(ConnectionError):
            steps.release(mended, places, quiet)
    assert registry.released() == [], "what never served cannot be rolled back to"
    assert REFUSED not in registry.by_number(number).tags
    released = steps.release(mended, places, quiet)
    assert (released["outcome"], registry.released()) == ("released", [number])


def test_every_output_in_the_store_is_complete(released):
    """Each directory with parts has a manifest, and each manifest's parts are there."""
    storage = open_storage(released["places"])
    keys = set(storage.list(""))
    manifests = {key for key in keys if key.endswith(f"/{MANIFEST}")}
    named = set()
    for key in manifests:
        prefix = key.removesuffix(f"/{MANIFEST}")
        named |= {f"{part.get('at') or prefix}/{part['name']}" for part in json.loads(storage.get(key))["parts"]}
    assert named <= keys
    assert {key.split("/")[0] for key in manifests} == {
        "raw",
        "behaviors",
        "quarantine",
        "histories",
        "spaces",
        "models",
        "interests",
    }
    lone = keys - named - manifests
    # Beside pointers, what each bucket told while it was made, and the page of each snapshot.
    assert {key for key in lone if not key.endswith(("/current.json", ".result.json", "/report.html"))} == {"log.json"}
