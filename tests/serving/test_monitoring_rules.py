"""What watches serving asks for what serving tells: rules, dashboard, runbook."""

import importlib.util
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

ROOT = Path(__file__).parents[2]
MONITORING = ROOT / "infra" / "monitoring"
RULES = [rule for group in yaml.safe_load((MONITORING / "rules.yml").read_text())["groups"] for rule in group["rules"]]
DASHBOARD = json.loads((MONITORING / "grafana" / "dashboards" / "serving.json").read_text())
PANELS = DASHBOARD["panels"]
ENDINGS = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "gauge": ("",)}


def expressions():
    """Every query, by what asks it."""
    found = {rule["alert"]: rule["expr"] for rule in RULES}
    for panel in PANELS:
        for target in panel["targets"]:
            expression = target["expr"].replace("$__rate_interval", "1m").replace("$instance", ".*")
            found[f"{panel['title']} {target['refId']}"] = expression
    return found


EXPRESSIONS = expressions()


def without_strings(expression):
    return re.sub(r'"[^"]*"', '""', expression)


@pytest.fixture(scope="module")
def told():
    """The names that /metrics can show, and the labels of each."""
    from encode.serving.metrics import Metrics

    registry = Metrics().registry
    labels = {}
    for collector in registry._collector_to_names:
        for name in registry._collector_to_names[collector]:
            labels[name] = set(getattr(collector, "_labelnames", ()))
    return labels


@pytest.fixture
def exposed(make_client, told):
    """The names and labels of an application that has answered."""
    client = make_client()
    client.post("/v1/score", json={"user_id": 1, "item_ids": [10, 10**9]})
    found = {}
    for family in text_string_to_metric_families(client.get("/metrics").text):
        for ending in ENDINGS.get(family.type, ()):
            labels = {label for sample in family.samples for label in sample.labels} | told.get(family.name, set())
            found[family.name + ending] = labels | ({"le"} if ending == "_bucket" else set())
    return found


def test_every_name_and_label_that_is_asked_for_is_exposed(exposed):
    assert len(exposed) > 20
    for where, expression in EXPRESSIONS.items():
        text = without_strings(expression)
        names = set(re.findall(r"\b(?:encode|process)_\w+", text))
        assert names or text.startswith(("up{", "sum(up{")), where
        assert names <= exposed.keys(), where
        for name, matchers in re.findall(r"\b((?:encode|process)_\w+)\{([^}]*)\}", text):
            asked = set(re.findall(r"(\w+)\s*[!=]", matchers)) - {"job", "instance"}
            assert asked <= exposed[name], f"{where}: {name} has no {asked - exposed[name]}"
        for grouped in re.findall(r"by \(([^)]*)\)", text):
            asked = {label.strip() for label in grouped.split(",")} - {"job", "instance"}
            assert all(asked <= exposed[name] for name in names), f"{where}: by ({grouped})"


def requests_told(client):
    """Label sets of the requests that were counted."""
    families = text_string_to_metric_families(client.get("/metrics").text)
    return [one.labels for family in families for one in family.samples if one.name == "encode_requests_total"]


def test_shares_and_latency_are_of_requests_that_score_not_of_probes(make_client):
    client, scoring = make_client(bundle=None), {"/v1/score", "/invocations", "/v2/models/{name}/infer"}
    for path in ("/health", "/ready", "/ping", "/v2/health/live", "/v2/health/ready", "/v2/models/encode-ctr/ready"):
        client.get(path)
    inputs = [{"name": name, "shape": [1], "datatype": "INT64", "data": [1]} for name in ("user_id", "item_id")]
    client.post("/v1/score", json={"user_id": 1, "item_ids": [10]})
    client.post("/invocations", json={"dataframe_records": [{"user_id": 1, "item_id": 1}]})
    client.post("/v2/models/encode-ctr/infer", json={"inputs": inputs})
    refused = {labels["route"] for labels in requests_told(client) if labels["status"] == "503"}
    assert refused == scoring | {"/ready", "/ping", "/v2/health/ready", "/v2/models/{name}/ready"}
    client.get("/nowhere")
    routes = {labels["route"] for labels in requests_told(client)}
    asked = {where: set(re.findall(r'route=~"([^"]*)"', expression)) for where, expression in EXPRESSIONS.items()}
    wanted = {
        "EncodeLatencyHigh": scoring,
        "EncodeFaults": scoring | {"unrouted"},
        "EncodeUnavailable": scoring | {"unrouted"},
        "p99, scored requests A": scoring,
        "Not answered A": scoring | {"unrouted"},
    }
    for where, expected in wanted.items():
        [pattern] = asked[where]
        assert {route for route in routes if re.fullmatch(pattern, route)} == expected, where
        assert EXPRESSIONS[where].count("rate(") == EXPRESSIONS[where].count("route=~"), f"{where}: all or none"


def test_counters_of_which_one_count_is_enough_are_shown_from_the_start(make_client):
    families = text_string_to_metric_families(make_client().get("/metrics").text)
    zeros = [{"": one.name} | one.labels for family in families for one in family.samples if one.value == 0]
    enough = [rule["expr"] for rule in RULES if "increase(" in rule["expr"]]
    assert len(enough) == 2
    for name, matchers in re.findall(r"increase\((\w+)\{([^}]*)\}", " ".join(enough)):
        wanted = {"": name} | dict(re.findall(r'(\w+)="([^"]*)"', matchers))
        assert wanted in zeros


def test_rules_fire_when_they_should_and_not_else():
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed")
    done = subprocess.run(
        [promtool, "test", "rules", str(MONITORING / "rules_test.yml")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_metric_of_ours_is_on_the_dashboard(exposed):
    shown = " ".join(target["expr"] for panel in PANELS for target in panel["targets"])
    ours = [name for name in exposed if name.startswith("encode_") and not name.endswith("_created")]
    families = {re.sub(r"_(total|bucket|sum|count)$", "", name) for name in ours}
    unseen = {family for family in families if family not in shown}
    assert unseen <= {"encode_erased_users"}


@pytest.mark.parametrize("where", EXPRESSIONS)
def test_queries_parse(where):
    text = EXPRESSIONS[where]
    bare = without_strings(text)
    depth = []
    for character in bare:
        if character in "([{":
            depth.append(")]}"["([{".index(character)])
        elif character in ")]}":
            assert depth, where
            assert depth.pop() == character, where
    assert not depth, where
    if importlib.util.find_spec("promql_parser"):
        import promql_parser

        promql_parser.parse(text)


def test_each_alert_has_its_paragraph_in_the_runbook():
    document = (ROOT / "docs" / "monitoring.md").read_text()
    headings = {heading.lower() for heading in re.findall(r"^#+ (\w+)$", document, re.MULTILINE)}
    alerts = [rule["alert"] for rule in RULES]
    assert len(alerts) == len(set(alerts))
    for rule in RULES:
        path, _, anchor = rule["annotations"]["runbook"].partition("#")
        assert path == "docs/monitoring.md"
        assert anchor == rule["alert"].lower()
        assert anchor in headings, rule["alert"]
        assert rule["labels"]["severity"] in ("page", "ticket")
        assert rule["annotations"]["summary"]


def test_what_is_provisioned_is_there():
    compose = yaml.safe_load((MONITORING / "compose.yaml").read_text())
    for service in compose["services"].values():
        assert re.search(r":v?\d+\.\d+\.\d+$", service["image"])
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
        for mount in service["volumes"]:
            if mount.startswith("."):
                assert (ROOT / "infra" / mount.split(":")[0]).exists(), mount
    [source] = yaml.safe_load((MONITORING / "grafana/provisioning/datasources/prometheus.yml").read_text())[
        "datasources"
    ]
    assert {panel["datasource"]["uid"] for panel in PANELS} == {source["uid"]}
    [provider] = yaml.safe_load((MONITORING / "grafana/provisioning/dashboards/encode.yml").read_text())["providers"]
    assert any(provider["options"]["path"] in mount for mount in compose["services"]["grafana"]["volumes"])
    prometheus = yaml.safe_load((MONITORING / "prometheus.yml").read_text())
    assert prometheus["rule_files"] == ["rules.yml"]
    [job] = prometheus["scrape_configs"]
    assert job["authorization"]["credentials_file"] == f"/run/secrets/{compose['services']['prometheus']['secrets'][0]}"
    assert any(f'job="{job["job_name"]}"' in rule["expr"] for rule in RULES), "the alert on a target that is down"


def test_panels_do_not_overlap_and_say_what_they_show():
    places = set()
    for panel in PANELS:
        box = panel["gridPos"]
        cells = {(x, y) for x in range(box["x"], box["x"] + box["w"]) for y in range(box["y"], box["y"] + box["h"])}
        assert not cells & places, panel["title"]
        assert box["x"] + box["w"] <= 24
        places |= cells
        assert panel["title"]
        assert panel["targets"]
