"""Keys are known by their hash only, and asked for wherever others can reach the process."""

import subprocess
import sys

import pytest

from encode.cli import main
from encode.errors import ConfigError
from encode.serving.keys import hash_of, new_key, read_hashes, require_keys

FIRST, SECOND = "ek_first", "ek_second"


def test_a_hash_is_sha256_of_the_key():
    printed = subprocess.run(["sha256sum"], input=FIRST, capture_output=True, text=True, check=True).stdout
    assert hash_of(FIRST) == printed.split()[0]


def test_a_new_key_is_long_and_new():
    keys = {new_key() for _ in range(100)}
    assert len(keys) == 100
    assert all(key.startswith("ek_") and len(key) == 46 for key in keys)


def test_the_command_line_prints_a_key_and_its_hash(capsys):
    assert main(["serve", "--new-key"]) == 0
    key, found = (line.split()[1] for line in capsys.readouterr().out.splitlines())
    assert hash_of(key) == found


def test_hashes_come_from_a_file_and_from_the_environment(tmp_path):
    file = tmp_path / "keys"
    file.write_text(f"# who may ask\n{hash_of(FIRST)}  # ranking\n\n")
    assert read_hashes(file) == {hash_of(FIRST)}
    assert read_hashes(file, f"{hash_of(SECOND).upper()}, ") == {hash_of(FIRST), hash_of(SECOND)}
    assert read_hashes(None) == frozenset()


@pytest.mark.parametrize(
    ("content", "named"), [(f"{FIRST}\n", "line 1: expected a SHA-256"), ("# none\n", "holds no hash"), (None, "read")]
)
def test_a_file_of_keys_that_is_wrong_is_refused_without_showing_it(tmp_path, content, named):
    file = tmp_path / "keys"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ConfigError, match=named) as refused:
        read_hashes(file)
    assert FIRST not in str(refused.value)


def test_a_key_in_the_environment_is_refused_without_showing_it():
    with pytest.raises(ConfigError, match="ENCODE_SERVING_KEYS: expected a SHA-256") as refused:
        read_hashes(None, FIRST)
    assert FIRST not in str(refused.value)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.1.2.3", "example.org", ""])
def test_without_keys_only_the_loopback_is_listened_on(host):
    with pytest.raises(ConfigError, match="encode serve --new-key"):
        require_keys(host, frozenset())
    require_keys(host, {hash_of(FIRST)})


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_on_the_loopback_keys_are_optional(host):
    require_keys(host, frozenset())


def test_serve_refuses_to_start_in_the_open_without_keys(tmp_path):
    command = [sys.executable, "-m", "encode.cli", "serve", "--workdir", str(tmp_path), "--host", "0.0.0.0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2
    assert "--keys FILE or ENCODE_SERVING_KEYS" in done.stderr


def test_only_who_has_a_key_is_answered(make_client):
    client = make_client(hashes={hash_of(FIRST), hash_of(SECOND)})
    body = {"user_id": 1, "item_ids": [10]}
    for header in (f"Bearer {FIRST}", f"bearer {SECOND}", f"BEARER  {SECOND}"):
        assert client.post("/v1/score", json=body, headers={"Authorization": header}).status_code == 200
    wrong = [
        FIRST,
        f"Basic {FIRST}",
        "Bearer",
        "Bearer ",
        f"Bearer {FIRST}x",
        f"Bearer {hash_of(FIRST)}",
        "Bearer \xe9",
    ]
    for header in wrong:
        answer = client.post("/v1/score", json=body, headers={"Authorization": header.encode("latin-1")})
        assert answer.status_code == 401, header
        assert answer.headers["WWW-Authenticate"] == "Bearer"
        assert answer.json()["detail"].startswith("expected the header")
    two = [("Authorization", f"Bearer {FIRST}"), ("Authorization", "Bearer x")]
    assert client.post("/v1/score", json=body, headers=two).status_code == 401
    assert client.post("/v1/score", json=body).status_code == 401


def test_probes_are_open_and_all_else_is_not(make_client):
    client = make_client(hashes={hash_of(FIRST)})
    for path in ("/health", "/ready", "/ping", "/v2/health/live", "/v2/health/ready"):
        assert client.get(path).status_code == 200
    paths = make_client().get("/openapi.json").json()["paths"]
    closed = {path for path, actions in paths.items() if any("401" in one["responses"] for one in actions.values())}
    assert {"/metrics", "/v1/score", "/invocations", "/v2/models/{name}/infer"} <= closed
    for path in (*closed, "/docs", "/openapi.json", "/nowhere", "/health/", "//health"):
        assert client.get(f"http://serving{path}").status_code == 401, path


def test_without_keys_everybody_is_answered(make_client):
    assert make_client().get("/v1/release").status_code == 200
