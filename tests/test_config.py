"""Settings enter by one door, and a wrong one is named."""

from pathlib import Path

import pytest

from encode.config import Config, Places, load_config, presets
from encode.errors import ConfigError


def test_every_preset_that_ships_is_valid():
    assert {"complete-journey", "tiny"} <= set(presets())
    for preset in presets():
        assert load_config(preset).name == preset


def write(tmp_path: Path, text: str) -> str:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    return str(path)


def test_a_users_preset_is_named_after_its_file_and_paths_are_relative_to_it(tmp_path):
    config = load_config(write(tmp_path, "source: {reader: taobao, path: UserBehavior.csv}"))
    assert config.name == "mine"
    assert config.source.path == tmp_path / "UserBehavior.csv"
    above = tmp_path.parent
    paths = {"../log": above / "log", ".": tmp_path, "..": above, "logs/..": tmp_path, "/log": Path("/log")}
    for path, found in paths.items():
        assert load_config(write(tmp_path, f"source: {{path: {path}}}")).source.path == found


def test_a_log_that_is_a_link_keeps_its_name(tmp_path):
    (tmp_path / "log.inter").symlink_to(tmp_path / "v7")
    assert load_config(write(tmp_path, "source: {path: log.inter}")).source.path == tmp_path / "log.inter"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "training: {train_days: 5}",
            r"training: .*snapshot_days 7 must not exceed train_days 5: .*; set it to how often",
        ),
        ("training: {epochs: 3}", r"training.epochs: unknown key; expected one of train_days.*num_epochs"),
        ("trainig: {}", r"trainig: unknown key; expected one of name, source"),
        ("clustering: {num_clusters: 0}", r"clustering.num_clusters: .*greater than 0, found 0"),
        ("model: {projected_dim: 128}", r"projected_dim 128 must not exceed embedding_dim 64"),
        ("release: {calibration: [.nan, .inf]}", r"calibration\.0: .* finite number, found nan; .*\.1: .*found inf"),
        ("refresh: {max_drift: .inf}", "refresh.max_drift: Input should be a finite number, found inf"),
        ("training: {seed: -1}", "training.seed: .*greater than or equal to 0, found -1"),
        ("training: {num_threads: 3000}", "training.num_threads: .*less than or equal to 1024, found 3000"),
        ("registry: {model_name: 'a/b:c'}", "registry.model_name: .*found 'a/b:c'"),
        ("release: {max_latency_ms: 1e999}", "release.max_latency_ms: Input should be a finite number"),
        ("training: {learning_rate: 2}", "training.learning_rate: .*less than or equal to 1, found 2"),
        ("- a list", "found list, expected settings"),
        ("", "found nothing, expected settings"),
        ("[" * 5000, "nested too deeply"),
        ("name: a\nmodel: {}\nmodel: {}", "model a second time in line 3"),
        ("model: {recent_length: 5, recent_length: 6}", "recent_length a second time in line 1"),
        ("source:\n  columns:\n    user_id: u\n    user_id: v", "user_id a second time in line 4"),
        ("a: &x [1, *x]", "a: unknown key"),
        ("source: {earliest: 2024-13-45}", "not YAML: month must be in 1..12"),
        ("? [1, 2]\n: 3\n? [1, 2]\n: 4", "mine.yaml"),
        ("a: !x 1", r"mine\.yaml: not YAML: could not determine a constructor .* in line 1, column 4$"),
        ("a: [", r"mine\.yaml: not YAML: while parsing a flow node .* in line 1, column 5$"),
        ("source: {reader: csv}", "source.reader: Input should be 'parquet'"),
    ],
)
def test_a_wrong_setting_is_refused_with_where_and_what(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        load_config(write(tmp_path, text))


def test_an_unknown_preset_names_those_that_exist():
    with pytest.raises(ConfigError, match="'nope': unknown; have complete-journey"):
        load_config("nope")
    with pytest.raises(ConfigError, match="no such file"):
        load_config("nope.yaml")


def test_a_folder_is_no_preset(tmp_path):
    (tmp_path / "mine.yaml").mkdir()
    with pytest.raises(ConfigError, match="a folder, expected a file"):
        load_config(str(tmp_path / "mine.yaml"))


def test_settings_cannot_be_changed_after_they_were_checked():
    with pytest.raises(ValueError, match="frozen"):
        Config(name="x").training.num_epochs = 5


def test_places_come_from_the_names_that_clients_read():
    places = Places.from_environment(
        {
            "ENCODE_STORE": "s3://bucket/prefix",
            "AWS_ENDPOINT_URL": "http://store",
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "hidden",
            "MLFLOW_TRACKING_URI": "http://mlflow",
        }
    )
    assert places.endpoint_url == "http://store"
    assert places.tracking_uri == "http://mlflow"
    assert "hidden" not in repr(places)
    with pytest.raises(ConfigError, match="ENCODE_STORE is not set"):
        Places.from_environment({})
