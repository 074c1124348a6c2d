"""The command line as a user meets it: in a process of its own."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from encode.config import Places, RegistryConfig
from encode.errors import ArtifactError
from encode.lineage_names import uri_of
from encode.quickstart import _told
from encode.registry import Registry
from encode.stack.home import make_folder, open_state
from encode.storage import open_storage

SMALL = Path(__file__).parent / "samples" / "small.yaml"


def encode(*arguments, cwd, **environment):
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "ENCODE_", "MLFLOW_"))}
    command = [sys.executable, "-m", "encode.cli", *map(str, arguments)]
    return subprocess.run(
        command, cwd=cwd, env={**inherited, **environment}, capture_output=True, text=True, check=False, timeout=300
    )


def files_of(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """The tiny preset, run once."""
    folder = tmp_path_factory.mktemp("run")
    began = time.monotonic()
    done = encode("run", "--preset", "tiny", "--workdir", folder / "a", "--json", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout), time.monotonic() - began


def test_run_needs_no_server_and_twice_gives_the_same_bytes(workdir):
    folder, summary, _ = workdir
    assert summary["release"]["outcome"] == "released"
    assert summary["train"]["metrics"]["auc"] > 0.85  # planted interests are found
    again = encode("run", "--preset", "tiny", "--workdir", folder / "b", cwd=folder)
    assert again.returncode == 0, again.stderr
    assert files_of(folder / "a" / "store") == files_of(folder / "b" / "store")


def test_score_and_explain_read_the_same_folder(workdir):
    folder = workdir[0]
    options = ("--preset", "tiny", "--workdir", folder / "a")
    explained = json.loads(encode("explain", 1, *options, "--json", cwd=folder).stdout)
    weights = [interest["weight"] for interest in explained["interests"]]
    assert sum(weights) == pytest.approx(1)
    assert weights == sorted(weights, reverse=True)
    items = [interest["top_items"][0]["item_id"] for interest in explained["interests"]][:2]
    scored = json.loads(
        encode("score", "--user", 1, "--items", f"{items[0]},999999", *options, "--json", cwd=folder).stdout
    )
    assert scored["bundle"] == explained["bundle"]
    assert scored["fallbacks"] == {"unknown_user": False, "unknown_items": [999999], "stale_snapshot": False}
    told = encode("explain", 1, *options, "--item", items[0], cwd=folder)
    assert "attention" in told.stdout
    assert (
        encode("score", "--user", 1, "--items", "5", *options, cwd=folder)
        .stdout.splitlines()[0]
        .startswith(" " * 11 + "5    0.")
    )


def test_what_serves_may_refuse_a_request_and_that_is_wrong_usage(workdir):
    items, folder = ",".join(map(str, range(1, 5_002))), workdir[0]
    done = encode(*("score", "--user", 1, "--items", items, "--preset", "tiny", "--workdir", folder / "a"), cwd=folder)
    assert done.returncode == 2
    assert "error: score: the service refuses this request: item_ids: List should have at most 5000" in done.stderr


def test_an_erased_user_is_forgotten_by_the_next_refresh(workdir):
    folder = workdir[0]
    options = ("--preset", "tiny", "--workdir", folder / "a", "--json")
    before = json.loads(encode("explain", 2, *options, cwd=folder).stdout)
    erased = json.loads(encode("erase", 2, *options, cwd=folder).stdout)
    assert (erased["erased"], erased["on_list"]) == (1, [2])
    refreshed = json.loads(encode("refresh", "--as-of", before["bundle"]["as_of"], *options, cwd=folder).stdout)
    assert refreshed["users"] == 299
    answer = json.loads(encode("score", "--user", 2, "--items", 5, *options, cwd=folder).stdout)
    assert answer["fallbacks"]["unknown_user"] is True
    assert answer["bundle"]["snapshot"] != before["bundle"]["snapshot"]
    others = json.loads(encode("score", "--user", 3, "--items", 5, *options, cwd=folder).stdout)
    assert others["fallbacks"]["unknown_user"] is False


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["run", "--preset", "nope", "--workdir", "x"], 2, "preset 'nope': unknown; have complete-journey, tiny"),
        (["run", "--preset", "tiny"], 2, "--workdir"),
        (["trian"], 2, "invalid choice: 'trian'"),
        (["validate", "--start", "soon", "--workdir", "x"], 2, "start: found 'soon', expected a day"),
        (["validate", "--workdir", "x"], 2, "which days? give --start DAY"),
        (["release", "--refuse", "", "--reason", "", "--workdir", "x"], 2, "argument --refuse: found nothing"),
        (["release", "--refuse", "1", "--reason", " ", "--workdir", "x"], 2, "argument --reason: found nothing"),
        (["release", "--approve", "", "--workdir", "x"], 2, "argument --approve: found nothing, expected a text"),
        (["rollback", "--to", "", "--workdir", "x"], 2, "argument --to: found nothing"),
        (["rollback", "--to", "abc", "--workdir", "x"], 2, "--to: found 'abc', expected the number of a version"),
        (["release", "--approve", "0", "--workdir", "x"], 2, "--approve: found '0', expected the number of a version"),
        (["feedback", "none.parquet", "--workdir", "x"], 2, "feedback: none.parquet: no such file or folder"),
        (["webhook", "--url", "http://s", "--workdir", "x"], 2, "ENCODE_WEBHOOK_SECRET is not set; give the serving"),
        (["serve", "--shard", "9/4", "--workdir", "x"], 2, "shard: found '9/4', expected PLACE/COUNT"),
        (["serve", "--port", "99999"], 2, "argument --port: found 99999, expected 0 to 65535"),
        (["stack", "up", "--mlflow-port", "-1"], 2, "argument --mlflow-port: found -1, expected 0 to 65535"),
        (["train", "--as-of", "2024-01-01", "--workdir", "x"], 1, "no validated day before 2024-01-01; validate"),
        (["release", "--workdir", "x"], 0, ""),
        (["rollback", "--workdir", "x"], 1, "there is no champion"),
        (["erase", "0", "--workdir", "x"], 2, "found '0', expected an id: a whole number"),
        (["erase", "somebody", "--workdir", "x"], 2, "argument USER: found 'somebody', expected an id"),
        (["score", "--user", "1", "--items", "a,b"], 2, "expected ids separated by commas"),
        (["lineage", "score.json", "--workdir", "x"], 2, "lineage: score.json: no such file"),
        (["score", "--user", "1", "--items", ","], 2, "expected ids separated by commas"),
        (["score", "--user", "1", "--items", "1,,2"], 2, "found '1,,2', expected ids separated by commas"),
        (["score", "--user", "1", "--items", "0"], 2, "whole numbers above 0, none left empty"),
        (["score", "--user", "1", "--items", str(2**63)], 2, "expected ids separated by commas"),
        (["score", "--user", "-1", "--items", "2"], 2, "argument --user: found '-1', expected an id"),
        (["explain", "0"], 2, "argument user: found '0', expected an id: a whole number from 1 to 2^63 - 1"),
        (["lineage", "foo", "--workdir", "x"], 2, "lineage: found 'foo', expected a score"),
        (
            ["score", "--user", "1", "--items", "2", "--workdir", "x"],
            1,
            "no version of encode-ctr has the alias champion",
        ),
        (["score", "--user", "1", "--items", "2"], 2, "ENCODE_STORE is not set"),
    ],
)
def test_a_users_mistake_gets_one_clear_line_and_no_traceback(tmp_path, arguments, status, message):
    (tmp_path / "x" / "store").mkdir(parents=True)
    done = encode(*arguments, cwd=tmp_path)
    assert done.returncode == status, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr


REFUSED = [
    ["release", "--preset", "bad"],
    ["validate"],
    ["validate", "--start", "2024-01-01", "--preset", "bad"],
    ["train", "--as-of", "soon"],
    ["refresh", "--as-of", "2024-01-01", "--workdir", "mistyped", "--dry-run"],
    ["release", "--refuse", "abc", "--reason", "slow", "--workdir", "x"],
    ["rollback", "--dry-run"],
    ["rollback", "--to", "abc", "--workdir", "x"],
    ["prune", "--dry-run"],
    ["erase", "1"],
    ["lineage", "foo"],
    ["lineage", "foo", "--workdir", "x"],
    ["lineage", "foo.json", "--workdir", "x"],
    ["monitor", "--as-of", "soon"],
    ["feedback", "--preset", "bad"],
    ["feedback", "none.parquet", "--workdir", "x"],
    ["score", "--user", "1", "--items", "2"],
    ["serve", "--preset", "bad"],
    ["serve", "--shard", "9/4", "--workdir", "x"],
    ["webhook", "--url", "http://127.0.0.1:1", "--workdir", "x"],
    ["quickstart", "--preset", "bad"],
]
ENDS_AND_SLOW_IMPORTS = """
import json, sys
from encode import cli

def end(arguments):
    try:
        return cli.main(arguments)
    except SystemExit as exit:
        return exit.code

ends = [end(arguments) for arguments in json.loads(sys.argv[1])]
print(json.dumps([ends, sorted({'mlflow', 'torch', 'boto3', 'great_expectations'} & {*sys.modules})]))
"""


@pytest.mark.parametrize(
    ("store", "refused"),
    [("", REFUSED), ("s3://store/log", [["lineage", "foo"], ["lineage", "foo.json"], ["feedback", "none.parquet"]])],
)
def test_what_is_wrong_with_options_is_said_before_anything_slow_is_imported(tmp_path, store, refused):
    (tmp_path / "x" / "store").mkdir(parents=True)
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("ENCODE_")}
    command = [sys.executable, "-c", ENDS_AND_SLOW_IMPORTS, json.dumps(refused)]
    environment = {**inherited, "ENCODE_STORE": store}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [[2] * len(refused), []], done.stderr


@pytest.mark.parametrize("store", ["s3://bucket", "s3://bucket//prefix/", "folder", "/folder/", "file:///folder"])
def test_a_store_has_the_same_uri_before_it_is_open(store):
    assert uri_of(store) == open_storage(Places(store=store), writing=False).uri


@pytest.mark.parametrize("arguments", [["explain", "1"], ["monitor", "--as-of", "2024-01-01"], ["lineage", "1"]])
def test_a_command_that_reads_begins_no_folder(tmp_path, arguments):
    done = encode(*arguments, "--workdir", "mistyped", cwd=tmp_path)
    assert (done.returncode, list(tmp_path.iterdir())) == (2, [])
    assert "--workdir mistyped: there is no store in it; `encode run` or `encode land` begins one" in done.stderr


@pytest.mark.parametrize("number", ["abc", "", "-1", "1.0", "²", "9" * 20])
def test_what_is_no_number_of_a_version_is_refused(mlflow_server, number):
    registry = Registry(Places(store="x", tracking_uri=mlflow_server), RegistryConfig())
    with pytest.raises(ArtifactError, match=f"encode-ctr version {number}: expected a number"):
        registry.by_number(number)


@pytest.mark.parametrize(
    ("result", "told"),
    [
        (
            {"outcome": "released", "version": "2", "bundle": "b94", "served_by": "http://s", "gates": {}},
            "released: version 2, bundle b94, served by http://s",
        ),
        ({"outcome": "refused", "version": "2", "reason": "rejected by ann: slow"}, "refused: version 2, reason rej"),
        ({"outcome": "nothing to release", "approval": False}, "nothing to release"),
    ],
)
def test_a_quickstart_tells_each_end_of_a_release(result, told):
    assert _told("encode_release", result).startswith(told)


def test_a_port_that_is_taken_is_refused_at_once(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = encode("serve", "--workdir", tmp_path, "--preset", "tiny", "--port", port, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (
        2,
        f"error: 127.0.0.1:{port}: Address already in use; choose another --host or --port\n",
    )


def test_a_server_that_is_gone_is_named(tmp_path):
    done = encode(
        *("score", "--user", 1, "--items", 2), cwd=tmp_path, ENCODE_STORE="x", ENCODE_SERVING_URL="http://127.0.0.1:9"
    )
    assert done.returncode == 1
    assert "http://127.0.0.1:9: " in done.stderr
    assert "Is the stack up?" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_broken_file_is_refused_by_name(tmp_path):
    (tmp_path / "log.parquet").write_bytes(b"PAR1 this is not Parquet")
    (tmp_path / "mine.yaml").write_text("source: {reader: parquet, path: log.parquet}")
    done = encode("run", "--preset", "mine.yaml", "--workdir", "out", cwd=tmp_path)
    assert done.returncode == 1
    assert "log.parquet" in done.stderr
    assert "Traceback" not in done.stderr


def test_nothing_is_made_for_a_log_that_is_not_there(tmp_path):
    (tmp_path / "presets").mkdir()
    (tmp_path / "presets" / "mine.yaml").write_text("source: {reader: parquet, path: ../logs/log.parquet}")
    done = encode("run", "--preset", "presets/mine.yaml", "--workdir", "out", cwd=tmp_path)
    assert done.returncode == 1
    assert f"error: {tmp_path}/logs/log.parquet: no such file or folder; set source.path to the log" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["presets"]


def test_a_stack_can_be_started_beside_what_serves_by_hand(tmp_path):
    command = [sys.executable, "-m", "encode.cli", "serve", "--port", "0"]
    environment = {**os.environ, "ENCODE_HOME": str(tmp_path / "home"), "ENCODE_STORE": str(tmp_path / "store")}
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        until = time.monotonic() + 60
        while not list(tmp_path.rglob("lock")) and process.poll() is None and time.monotonic() < until:
            time.sleep(0.1)
        assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("lock")] == ["home/snapshots/lock"]
    finally:
        process.kill()
        process.wait()
    make_folder(tmp_path / "home")
    assert open_state(tmp_path / "home").entries == {}


def test_ctrl_c_leaves_nothing_half_written_and_the_next_run_finishes(tmp_path):
    command = [sys.executable, "-m", "encode.cli", "run", "--preset", str(SMALL), "--workdir", "out"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("validated"):
            break
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors
    done = encode("run", "--preset", SMALL, "--workdir", "out", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    validated = json.loads(done.stdout)["validate"]
    assert validated["unchanged"] > 0
    assert validated["accepted"] + validated["rejected"] == 61_461
