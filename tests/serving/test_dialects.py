"""Whatever dialect a question comes in, the numbers are the same, and what is wrong is refused and told why."""

import contextlib
import json

import numpy as np
import pyarrow as pa
import pytest
from fastapi.exceptions import RequestValidationError
from hypothesis import given, settings
from hypothesis import strategies as st
from made import arrow_stream

from encode.serving.arrow import read_request
from encode.serving.messages import MAX_CANDIDATES, ScoreRequest

ARROW = {"Content-Type": "application/vnd.apache.arrow.stream"}
ITEMS, CATEGORIES = [10, 11, 10**9, 12], [1, 2, 3, 4]
INT64 = pa.int64()


@pytest.fixture
def client(make_client):
    return make_client()


@pytest.fixture
def expected(client):
    answer = client.post("/v1/score", json={"user_id": 1, "item_ids": ITEMS})
    assert answer.status_code == 200
    return answer.json()


def stream(columns=None, *more, **options):
    return arrow_stream({"item_id": ITEMS} if columns is None else columns, *more, **options)


# --- Arrow -------------------------------------------------------------------------------------------------


def test_arrow_gives_the_same_numbers(client, expected):
    answer = client.post("/v1/score", content=stream(), headers=ARROW)
    assert answer.status_code == 200, answer.text
    assert answer.headers["Content-Type"] == ARROW["Content-Type"]
    table = pa.ipc.open_stream(answer.content).read_all()
    assert table.schema == pa.schema([pa.field("probability", pa.float32(), nullable=False)])
    np.testing.assert_array_equal(table["probability"].to_numpy(), np.float32(expected["probabilities"]))
    told = {key.decode(): value.decode() for key, value in table.schema.metadata.items()}
    assert told.pop("user_id") == "1"
    assert {key: json.loads(value) for key, value in told.items()} == {
        "bundle": expected["bundle"],
        "fallbacks": expected["fallbacks"],
    }


def test_arrow_takes_categories_in_any_order_of_columns(client):
    json_answer = client.post("/v1/score", json={"user_id": 1, "item_ids": ITEMS, "category_ids": CATEGORIES}).json()
    for columns in ({"item_id": ITEMS, "category_id": CATEGORIES}, {"category_id": CATEGORIES, "item_id": ITEMS}):
        answer = client.post(
            "/v1/score",
            content=stream(columns),
            headers=ARROW | {"Content-Type": ARROW["Content-Type"].upper() + "; v=1"},
        )
        found = pa.ipc.open_stream(answer.content).read_all()["probability"].to_numpy()
        np.testing.assert_array_equal(found, np.float32(json_answer["probabilities"]))


RECENT = [
    {"item_id": 12, "timestamp": 1_709_251_300},
    {"item_id": 11, "category_id": 2, "timestamp": 1_709_251_200},
    {"item_id": 10**9, "category_id": 3, "timestamp": "1709251100"},
]


def test_arrow_takes_recent_behaviors_and_gives_the_numbers_of_json(client, expected):
    asked = {"user_id": 1, "item_ids": ITEMS, "recent": RECENT}
    in_json = client.post("/v1/score", json=asked).json()["probabilities"]
    assert in_json != expected["probabilities"]
    answer = client.post("/v1/score", content=stream(recent=json.dumps(RECENT)), headers=ARROW)
    found = pa.ipc.open_stream(answer.content).read_all()["probability"].to_numpy()
    np.testing.assert_array_equal(found, np.float32(in_json))
    empty = client.post("/v1/score", content=stream(recent="[]"), headers=ARROW)
    assert empty.content == client.post("/v1/score", content=stream(), headers=ARROW).content


@pytest.mark.parametrize(
    "recent",
    [
        None,
        {},
        "11",
        [11],
        [{}],
        [{"item_id": 11}],
        [{"item_id": 11.0, "timestamp": 1}],
        [{"item_id": 0, "timestamp": 1}],
        [{"item_id": 2**63, "timestamp": 1}],
        [{"item_id": 11, "timestamp": -1}],
        [{"item_id": 11, "timestamp": float("nan")}],
        [{"item_id": 11, "timestamp": 1, "category_id": None}],
        [{"item_id": 11, "timestamp": 1, "more": 1}],
        RECENT[:1] * 1_001,
    ],
)
def test_recent_behaviors_are_refused_in_arrow_as_in_json(client, recent):
    body = json.dumps({"user_id": 1, "item_ids": ITEMS, "recent": recent})
    in_json = client.post("/v1/score", content=body, headers={"Content-Type": "application/json"})
    in_arrow = client.post("/v1/score", content=stream(recent=json.dumps(recent)), headers=ARROW)
    assert in_json.status_code == in_arrow.status_code == 422
    assert [one["loc"] for one in in_arrow.json()["detail"]] == [one["loc"] for one in in_json.json()["detail"]]


@pytest.mark.parametrize(
    ("body", "named"),
    [
        (b"", "ends before its schema"),
        (b'{"user_id": 1}', "not an Arrow stream"),
        (stream(batches=0), "ends before its record batch"),
        (stream(batches=2), "more than one record batch"),
        (stream()[:-60], "not an Arrow stream"),
        (stream(codec="zstd", columns={"item_id": [7] * 900}), "compressed"),
        (stream(codec="lz4", columns={"item_id": [7] * 900}), "compressed"),
        (stream(types=pa.int32()), "expected int64"),
        (stream(types=pa.dictionary(pa.int8(), pa.int64())), "expected int64"),
        (stream({"item": ITEMS}), "columns item; expected item_id"),
        (stream({"item_id": ITEMS, "more": ITEMS}), "columns item_id, more"),
        (stream({}), "columns none"),
        (stream({"item_id": [1, None]}), "nulls"),
        (stream({"item_id": [1], "category_id": [None]}), "nulls"),
        (stream({"item_id": []}), "at least 1 item"),
        (stream({"item_id": [0]}), "greater than 0"),
        (stream({"item_id": [1] * (MAX_CANDIDATES + 1)}), "at most 5000"),
        (stream({"item_id": [1], "category_id": [-1]}), "greater than or equal to 0"),
        (stream(user=None), "user_id"),
        (stream(user=""), "decimal digits"),
        (stream(user="-1"), "decimal digits"),
        (stream(user="1" * 5_000), "decimal digits"),
        (stream(user="٣"), "decimal digits"),
        (stream(recent=""), "expected JSON"),
        (stream(recent="[{"), "expected JSON"),
        (stream(recent=b"\xff"), "expected JSON"),
        (stream(recent="[" * 10_000), "expected JSON"),
        (stream(recent="1" * 5_000), "expected JSON"),
        (stream(user="0"), "greater than 0"),
        (stream(user=str(10**19 - 1)), "less than or equal"),
    ],
)
def test_arrow_that_is_not_as_agreed_is_refused_and_told_why(client, body, named):
    answer = client.post("/v1/score", content=body, headers=ARROW)
    assert answer.status_code == 422, answer.text
    assert named in answer.json()["detail"][0]["msg"] or named in answer.json()["detail"][0]["loc"]


WHOLE = stream({"item_id": ITEMS, "category_id": CATEGORIES})


@settings(max_examples=500, deadline=None)
@given(st.data())
def test_bytes_are_a_request_or_refused_and_nothing_else(data):
    """Whole streams with some bytes changed and cut off, and any bytes."""
    body = bytearray(WHOLE)
    for place in data.draw(st.lists(st.integers(0, len(WHOLE) - 1), max_size=6)):
        body[place] = data.draw(st.sampled_from([0, 1, 127, 128, 255]) | st.integers(0, 255))
    body = bytes(body[: data.draw(st.integers(0, len(WHOLE)) | st.just(len(WHOLE)))])
    for some in (body, data.draw(st.binary(max_size=200))):
        with contextlib.suppress(RequestValidationError):
            asked = read_request(some)
            columns = {"item_ids": asked.item_ids, "category_ids": asked.category_ids}
            told = {name: None if column is None else column.tolist() for name, column in columns.items()}
            assert ScoreRequest(user_id=asked.user_id, **told), "what the other dialect would refuse"


def test_json_is_still_read_where_no_arrow_is_announced(client):
    assert client.post("/v1/score", content=stream(), headers={"Content-Type": "application/json"}).status_code == 400
    assert client.post("/v1/score", content=stream()).status_code == 422


# --- MLflow ------------------------------------------------------------------------------------------------

ROWS = [(1, 10), (2, 11), (1, 11), (10**9, 10), (1, 10**9), (1, 12)]
USERS, ROW_ITEMS = ([row[part] for row in ROWS] for part in (0, 1))
RECORDS = [{"user_id": user, "item_id": item} for user, item in ROWS]
FORMS = [
    {"dataframe_split": {"columns": ["user_id", "item_id"], "data": ROWS}},
    {"dataframe_split": {"columns": ["item_id", "user_id"], "data": [row[::-1] for row in ROWS], "index": [1] * 6}},
    {"dataframe_records": RECORDS},
    {"dataframe_records": [record | {"more": "ignored"} for record in RECORDS]},
    {"inputs": RECORDS, "params": {}},
    {"inputs": {"user_id": USERS, "item_id": ROW_ITEMS}},
]


@pytest.mark.parametrize("form", FORMS)
def test_invocations_give_the_same_numbers_row_by_row(client, form):
    answer = client.post("/invocations", json=form)
    assert answer.status_code == 200, answer.text
    found = [row["probability"] for row in answer.json()["predictions"]]
    for (user, item), probability in zip(ROWS, found, strict=True):
        alone = client.post("/v1/score", json={"user_id": user, "item_ids": [item]}).json()
        assert alone["probabilities"] == pytest.approx([probability], abs=1e-6)
        assert alone["bundle"] == answer.json()["bundle"]
    assert answer.json()["fallbacks"] == {
        "unknown_users": [10**9],
        "unknown_items": [10**9],
        "stale_snapshot": False,
    }


@pytest.mark.filterwarnings("ignore")  # of MLflow itself
@pytest.mark.parametrize("form", [FORMS[0], FORMS[2], FORMS[5]])
def test_invocations_answer_as_mlflow_does(client, released, form):
    """MLflow's own reading of the body, the pyfunc, MLflow's own writing of the answer."""
    from io import StringIO

    from mlflow.models.utils import _enforce_schema
    from mlflow.pyfunc.scoring_server import infer_and_parse_data, predictions_to_json
    from mlflow.types import ColSpec, Schema

    from encode.serving.pyfunc import ScoringModel

    schema = Schema([ColSpec("long", "user_id"), ColSpec("long", "item_id")])
    model = ScoringModel()
    model.bundle = released
    sink = StringIO()
    rows = _enforce_schema(infer_and_parse_data(json.loads(json.dumps(form)), schema), schema)
    predictions_to_json(model.predict(None, rows), sink)
    theirs, ours = json.loads(sink.getvalue())["predictions"], client.post("/invocations", json=form).json()
    assert [list(row) for row in theirs] == [list(row) for row in ours["predictions"]]
    assert [row["probability"] for row in theirs] == pytest.approx([row["probability"] for row in ours["predictions"]])


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({}, "exactly one"),
        ({"inputs": [], "dataframe_records": []}, "exactly one"),
        ({"inputs": []}, "0 rows of 0 users"),
        ({"instances": RECORDS}, "Extra inputs"),
        ({"dataframe_records": [{"user_id": 1}]}, "Field required"),
        ({"dataframe_records": [{"user_id": 1, "item_id": 1.5}]}, "valid integer"),
        ({"dataframe_split": {"columns": ["user_id"], "data": [[1]]}}, "Field required"),
        (
            {"dataframe_split": {"columns": ["user_id", "item_id", "user_id"], "data": [[1, 10, 2]]}},
            "two columns user_id",
        ),
        ({"dataframe_split": {"columns": ["user_id", "item_id"], "data": [[1]]}}, "not 2 values"),
        ({"dataframe_split": {"columns": ["user_id", "item_id"], "data": [[1, 0]]}}, "greater than 0"),
        ({"inputs": {"user_id": [1], "item_id": [1, 2]}}, "1 user_id for 2 item_id"),
        ({"inputs": [{"user_id": n + 1, "item_id": 1} for n in range(101)]}, "101 rows of 101 users"),
        ({"inputs": [{"user_id": 1, "item_id": 1}] * 5_001}, "5,001 rows of 1 users"),
    ],
)
def test_invocations_that_are_wrong_are_refused_and_told_why(client, body, named):
    answer = client.post("/invocations", json=body)
    assert answer.status_code == 422
    assert named in answer.text


# --- Open Inference Protocol -------------------------------------------------------------------------------


def tensor(name, data, **other):
    return {"name": name, "shape": [len(data)], "datatype": "INT64", "data": data} | other


def test_inference_gives_the_same_numbers(client, expected):
    body = {
        "id": "42",
        "inputs": [tensor("item_id", ITEMS), tensor("user_id", [1])],
        "outputs": [{"name": "probability"}],
    }
    answer = client.post("/v2/models/encode-ctr/infer", json=body)
    assert answer.status_code == 200, answer.text
    assert answer.json() == {
        "model_name": "encode-ctr",
        "model_version": "1",
        "id": "42",
        "parameters": {
            "bundle": expected["bundle"]["id"],
            **{key: value for key, value in expected["bundle"].items() if key != "id"},
            "unknown_user": False,
            "unknown_items": "1000000000",
            "stale_snapshot": False,
        },
        "outputs": [
            {"name": "probability", "datatype": "FP32", "shape": [4], "data": expected["probabilities"]},
        ],
    }


def test_inference_takes_categories(client):
    inputs = [tensor("user_id", [1]), tensor("item_id", ITEMS), tensor("category_id", CATEGORIES)]
    ours = client.post("/v1/score", json={"user_id": 1, "item_ids": ITEMS, "category_ids": CATEGORIES}).json()
    found = client.post("/v2/models/encode-ctr/infer", json={"inputs": inputs}).json()["outputs"][0]["data"]
    assert found == ours["probabilities"]


def test_inference_tells_what_it_is(client, make_client):
    assert client.get("/v2").json()["name"] == "encode"
    assert client.get("/v2/health/live").json() == {"live": True}
    assert client.get("/v2/health/ready").json() == {"ready": True}
    assert client.get("/v2/models/encode-ctr/ready").json() == {"name": "encode-ctr", "ready": True}
    told = client.get("/v2/models/encode-ctr").json()
    assert (told["name"], told["versions"]) == ("encode-ctr", ["1"])
    assert [one["name"] for one in told["inputs"] + told["outputs"]] == [
        "user_id",
        "item_id",
        "category_id",
        "probability",
    ]
    empty = make_client(bundle=None)
    assert empty.get("/v2/health/live").status_code == 200
    for path in ("/v2/health/ready", "/v2/models/encode-ctr", "/v2/models/encode-ctr/ready"):
        answer = empty.get(path)
        assert answer.status_code == 503
        why = "loading" if path.endswith("encode-ctr") else "no bundle yet; /v1/release tells why"
        assert answer.json() == {"error": f"not ready: {why}"}
        assert answer.headers["Retry-After"] == "2"


@pytest.mark.parametrize(
    ("inputs", "named"),
    [
        ([], "expected one user_id"),
        ([tensor("user_id", [1])], "item_ids"),
        ([tensor("item_id", [1])], "expected one user_id"),
        ([tensor("user_id", [1, 2]), tensor("item_id", [1])], "expected one user_id"),
        ([tensor("user_id", [1]), tensor("user_id", [1]), tensor("item_id", [1])], "two of one name"),
        ([tensor("user_id", [1]), tensor("item_id", [1, 2], shape=[3])], "shape [3] for 2 values"),
        ([tensor("user_id", [1]), tensor("item_id", [1], shape=[1, 1])], "shape"),
        ([tensor("user_id", [1]), tensor("item_id", [1], datatype="FP32")], "datatype"),
        ([tensor("user_id", [1]), tensor("item_id", [1.5])], "data"),
        ([tensor("user_id", [1]), tensor("item_id", [0])], "greater than 0"),
        ([tensor("user_id", [1]), tensor("item_id", [1]), tensor("category_id", [1, 2])], "2 category_ids for 1"),
        ([tensor("user_id", [1]), tensor("item_id", [1]), tensor("price", [1])], "name"),
    ],
)
def test_inference_that_is_wrong_is_refused_and_told_why(client, inputs, named):
    answer = client.post("/v2/models/encode-ctr/infer", json={"inputs": inputs})
    assert answer.status_code == 422
    assert list(answer.json()) == ["error"]
    assert named in answer.json()["error"]


def test_another_model_is_not_found(client):
    body = {"inputs": [tensor("user_id", [1]), tensor("item_id", [1])]}
    for answer in (
        client.get("/v2/models/x"),
        client.get("/v2/models/x/ready"),
        client.post("/v2/models/x/infer", json=body),
    ):
        assert answer.status_code == 404
        assert answer.json() == {"error": "model x: unknown; expected encode-ctr"}


# --- description -------------------------------------------------------------------------------------------


def test_openapi_describes_every_route_and_its_errors(client):
    described = client.get("/openapi.json").json()
    score = described["paths"]["/v1/score"]["post"]
    for content in (score["requestBody"]["content"], score["responses"]["200"]["content"]):
        assert set(content) == {"application/json", ARROW["Content-Type"]}
    expected = {"200", "400", "401", "408", "413", "421", "422", "500", "503"}
    for path, of_model in {"/v1/score": set(), "/invocations": set(), "/v2/models/{name}/infer": {"404"}}.items():
        assert set(described["paths"][path]["post"]["responses"]) == expected | of_model
    for path, actions in described["paths"].items():
        for action in actions.values():
            errors = {one for one in action["responses"] if one >= "400"}
            model = "InferenceProblem" if path.startswith("/v2") else "Problem"
            for status in errors:
                schema = action["responses"][status]["content"]["application/json"]["schema"]
                assert schema["$ref"].endswith(f"/{model}"), (path, status)
            assert action["responses"].get("422") is None or "HTTPValidationError" not in str(action)
