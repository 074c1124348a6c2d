"""Requests that no client should send: what hypothesis draws of bodies, paths and headers, and damaged copies of it.

Framing is always right (`Content-Length` is the length of the body), so that each request has an answer of its own.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any

import pyarrow as pa
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from encode.serving.arrow import CONTENT_TYPE as ARROW

JSON = "application/json"
Header = tuple[str, bytes]
_MOST = 2**63 - 1


@dataclass(frozen=True)
class Strange:
    """A request."""

    method: str
    target: str
    """Path and query, in ASCII, without blanks."""
    headers: tuple[Header, ...]
    """Without the length; `Host` only if it is a strange one."""
    body: bytes

    @property
    def path(self) -> str:
        """The target without its query."""
        return self.target.partition("?")[0]

    def wire(self) -> bytes:
        """Return it as it goes over the wire, in HTTP/1.1."""
        lines = [f"{self.method} {self.target} HTTP/1.1".encode()]
        if all(name.lower() != "host" for name, _ in self.headers):
            lines.append(b"Host: 127.0.0.1")
        lines += [name.encode() + b": " + value for name, value in self.headers]
        return b"\r\n".join([*lines, b"Content-Length: %d" % len(self.body), b"", self.body])


def drawn(strategy: st.SearchStrategy[Any], count: int, number: int) -> list[Any]:
    """Return what hypothesis draws.

    Args:
        strategy: what to draw.
        count: at most; fewer if there are no more.
        number: seed.
    """
    found: list[Any] = []

    @seed(number)
    @settings(
        max_examples=count,
        phases=[Phase.generate],
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def keep(one: Any) -> None:
        found.append(one)

    keep()
    return found


# --- values and JSON ---------------------------------------------------------------------------------------

IDS = st.sampled_from([1, 2, 10, 11, 12, 10**9, _MOST])
INTEGERS = st.sampled_from([0, -1, 2**31, 2**53 + 1, _MOST + 1, 2**64, -(2**63), 10**40, 10**400]) | st.integers()
# Subnormal ones are listed, not drawn: a library compiled for speed may have switched them off in this process.
FLOATS = st.sampled_from([0.5, 1.0, -0.0, 1e308, 5e-324, float("nan"), float("inf"), -float("inf")]) | st.floats(
    allow_subnormal=False
)
TEXTS = st.sampled_from(["", "1", "1e5", "NaN", "\0", "\ud800", "é", "٣", "\u202e", "a" * 5_000]) | st.text(max_size=20)
SCALARS = st.none() | st.booleans() | IDS | INTEGERS | FLOATS | TEXTS
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=3), max_leaves=8
)
_NUMBERS = ["1" * 5_000, "1e999", "-0", "1E5", "01", "0x1", "1_0", ".5", "NaN", "-Infinity"]
RECENT = {"item_id": 11, "category_id": 2, "timestamp": 1_709_251_200}


def _tensor(name: str, *data: int) -> dict[str, Any]:
    return {"name": name, "shape": [len(data)], "datatype": "INT64", "data": list(data)}


def good_bodies(model: str) -> list[tuple[str, Any]]:
    """Return paths and bodies in JSON that are answered with 200, of a registered model's name."""
    rows = [[1, 10], [1, 11], [2, 10**9]]
    records = [{"user_id": user, "item_id": item} for user, item in rows]
    columns = {"user_id": [1, 1, 2], "item_id": [10, 11, 10**9]}
    tensors = [_tensor("user_id", 1), _tensor("item_id", 10, 11), _tensor("category_id", 1, 2)]
    return [
        ("/v1/score", {"user_id": 1, "item_ids": [10, 11, 10**9], "category_ids": [1, 2, 3], "recent": [RECENT]}),
        ("/invocations", {"dataframe_split": {"columns": ["user_id", "item_id"], "data": rows}}),
        ("/invocations", {"dataframe_records": records}),
        ("/invocations", {"inputs": columns, "params": {}}),
        (f"/v2/models/{model}/infer", {"id": "42", "inputs": tensors, "outputs": [{"name": "probability"}]}),
    ]


@st.composite
def spoiled(draw: st.DrawFn, body: Any) -> Any:
    """Draw a body of which one part is another value, missing, doubled or repeated."""
    body = json.loads(json.dumps(body))
    holder, part = body, draw(_parts(body))
    while isinstance(holder[part], dict | list) and holder[part] and draw(st.integers(0, 3)):
        holder = holder[part]
        part = draw(_parts(holder))
    match draw(st.integers(0, 5)):
        case 0:
            del holder[part]
        case 1 if isinstance(holder, dict):
            holder[draw(TEXTS)] = draw(VALUES)
        case 2 if isinstance(holder[part], list):
            holder[part] *= draw(st.sampled_from([0, 2, 120, 2_000]))
        case _:
            holder[part] = draw(VALUES)
    return body


def _parts(body: dict[str, Any] | list[Any]) -> st.SearchStrategy[Any]:
    return st.sampled_from(sorted(body) if isinstance(body, dict) else range(len(body)))


@st.composite
def json_texts(draw: st.DrawFn, body: Any) -> bytes:
    """Draw what a body becomes on its way: another encoding, or something that JSON cannot say."""
    meant = draw(st.sampled_from([st.just(body), *[spoiled(body)] * 3, VALUES]).flatmap(lambda one: one))
    text = json.dumps(meant, ensure_ascii=draw(st.booleans()))
    match draw(st.integers(0, 15)):
        case 0:
            depth = draw(st.sampled_from([150, 990, 30_000]))
            return b'{"a":' * depth + text.encode(errors="surrogatepass") + b"}" * draw(st.sampled_from([0, depth]))
        case 1:
            depth = draw(st.sampled_from([150, 990, 500_000]))
            return b"[" * depth + b"]" * draw(st.sampled_from([0, depth]))
        case 2:
            return text.replace("1", draw(st.sampled_from(_NUMBERS)), 1).encode(errors="surrogatepass")
        case 3:
            encoding = draw(st.sampled_from(["utf-8-sig", "utf-16", "utf-32-le", "utf-7"]))
            return text.encode(encoding, errors="surrogatepass" if encoding != "utf-7" else "replace")
        case 4:
            end = draw(st.sampled_from([b"\0", b"\xff", b"{}", b",", b" " * 9_000]))
            return text.encode(errors="surrogatepass") + end
        case _:
            return text.encode(errors="surrogatepass")  # a half of a character: not UTF-8


# --- Arrow -------------------------------------------------------------------------------------------------

_TYPES = [
    pa.int64(),
    pa.int32(),
    pa.uint64(),
    pa.float64(),
    pa.bool_(),
    pa.string(),
    pa.null(),
    pa.dictionary(pa.int8(), pa.int64()),
    pa.dictionary(pa.int32(), pa.string()),
    pa.list_(pa.int64()),
    pa.struct([("a", pa.int64())]),
    pa.run_end_encoded(pa.int32(), pa.int64()),
    pa.decimal128(20, 0),
    pa.timestamp("ns"),
]


def _column(kind: pa.DataType, values: Sequence[int | None]) -> pa.Array:
    one = values[:1] and [1]
    if pa.types.is_run_end_encoded(kind):
        ends = pa.array([len(values)] if values else [], pa.int32())
        return pa.RunEndEncodedArray.from_arrays(ends, pa.array(one, pa.int64()))
    if pa.types.is_dictionary(kind):
        index = pa.array([0] * len(values), kind.index_type)
        return pa.DictionaryArray.from_arrays(index, pa.array(one, pa.int64()).cast(kind.value_type))
    if pa.types.is_list(kind):
        return pa.array([[one] for one in values], kind)
    if pa.types.is_struct(kind):
        return pa.array([{"a": one} for one in values], kind)
    if pa.types.is_null(kind):
        return pa.nulls(len(values))
    return pa.array(values, pa.int64()).cast(kind, safe=False)


@st.composite
def arrow_streams(draw: st.DrawFn) -> bytes:
    """Draw whole streams: mostly as agreed, else of other types, columns, batches, metadata or with compression."""
    strange = draw(st.booleans())
    kinds = st.sampled_from(_TYPES) if strange else st.just(pa.int64())
    names = ["item_id", "category_id", "item_id", "é", ""] if strange else ["item_id", "category_id"]
    size = draw(st.sampled_from([1, 3, 0, 1_000, 5_001] if strange else [1, 3, 1_000]))
    values: list[int | None] = [1 + place for place in range(size)]
    for place in draw(st.lists(st.integers(0, size - 1), max_size=2)) if size else []:
        values[place] = draw(st.sampled_from([None, 0, -1, _MOST]))
    columns = [(name, draw(kinds)) for name in names[: draw(st.integers(0 if strange else 1, len(names)))]]
    told = {"user_id": draw(st.sampled_from(["1", "2", str(_MOST)]) | TEXTS.map(_utf8))}
    if draw(st.booleans()):
        told["recent"] = json.dumps(draw(st.just([RECENT]) | spoiled([RECENT])))
    schema = pa.schema(columns, draw(st.just(told) | st.none()) if strange else told)
    codec = draw(st.sampled_from([None, None, "lz4", "zstd"])) if strange else None
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, schema, options=pa.ipc.IpcWriteOptions(compression=codec)) as writer:
        for _ in range(draw(st.sampled_from([1, 1, 0, 2])) if strange else 1):
            writer.write_batch(pa.record_batch([_column(kind, values) for _, kind in columns], schema=schema))
    return bytes(sink.getvalue().to_pybytes())


def _utf8(text: str) -> str:
    return text.encode(errors="replace").decode()


# --- paths and headers -------------------------------------------------------------------------------------

_PLAIN = [
    "/", "/page.js", "/health", "/ready", "/ping", "/metrics", "/openapi.json", "/v1/release", "/v1/release/reload",
    "/v1/release/webhook", "/v1/score", "/v1/score/", "/invocations", "/v2", "/v2/", "/v2/health/live", "/docs",
    "//", "/v1//score", "/v1/../v1/score", "/%2e%2e/etc/passwd", "/%00", "/%ff%fe", "/%zz", "/v1/score;a=1", "/*",
]  # fmt: skip
_PARTS = TEXTS | st.sampled_from(
    ["1", "0", "-1", "1.0", "٣", "9" * 30, "9" * 5_000, "a b", "%2F", "\0", "..", "\ud800"]
)
_QUERIES = [
    "",
    "?",
    "?item_id=10",
    "?item_id=",
    "?item_id=10&item_id=x",
    "?item_id=%ff",
    "?" + "a&" * 5_000,
    "?item_id=.5",
]


def _quoted(text: str) -> str:
    return "".join(f"%{byte:02X}" for byte in text.encode(errors="surrogatepass"))


def targets(model: str) -> st.SearchStrategy[str]:
    """Draw paths with queries."""
    parts = _PARTS.map(_quoted)
    paths = (
        st.sampled_from([*_PLAIN, f"/v2/models/{model}", f"/v2/models/{model}/ready"])
        | st.sampled_from(["/v1/users/1/interests", "/v1/users/2/interests/"])
        | parts.map(lambda part: f"/v1/users/{part}/interests")
        | parts.map(lambda part: f"/v2/models/{part}/ready")
    )
    return st.builds(str.__add__, paths, st.sampled_from(_QUERIES))


METHODS = st.sampled_from(["GET", "POST", "HEAD", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "PROPFIND"])
CONTENT_TYPES = st.sampled_from([
    JSON, JSON, JSON, ARROW, "application/vnd.x+json", "text/plain", "application/x-www-form-urlencoded", "", ";", "/",
    "multipart/form-data", "multipart/form-data; boundary=x", "application/json; charset=utf-16", "application/json;;=",
    "APPLICATION/JSON", "application/json, text/plain", "a" * 5_000, f"{ARROW};v=1", "application/\xe9",
])  # fmt: skip
_OTHERS: list[Header] = [
    ("X-Encode-Role", b"champion"), ("X-Encode-Role", b"challenger"), ("X-Encode-Role", b"\xe9"),
    ("Accept", b"application/openmetrics-text; version=1.0.0"), ("Accept", b"text/plain; version=x"),
    ("Accept", b"application/openmetrics-text; version=1.0.0; escaping=\xff"), ("Accept", b"," * 2_000),
    ("Accept-Encoding", b"gzip, br;q=x"), ("Content-Encoding", b"gzip"), ("Expect", b"100-continue"),
    ("traceparent", b"00-" + b"1" * 32 + b"-" + b"2" * 16 + b"-01"), ("traceparent", b"-"),
    ("Authorization", b"Bearer \xff"), ("Authorization", b"Basic"), ("Cookie", b"a=" + b"b" * 5_000), ("Host", b"["),
    ("Host", b"a b/c?d"), ("Host", b""), ("Origin", b"null"), ("Range", b"bytes=5-1"), ("If-None-Match", b"*"),
    ("Upgrade", b"websocket"), ("Connection", b"Upgrade"),
    ("X-Forwarded-For", b"\xff, ["), ("X-Forwarded-Proto", b"gopher"), ("X-" + "a" * 900, b""),
    ("X-MLflow-Timestamp", b"\xb2"), ("X-MLflow-Signature", b"v1,\xff"), ("Content-Type", b"text/plain"),
]  # fmt: skip


@st.composite
def strange_requests(draw: st.DrawFn, model: str) -> Strange:
    """Draw a request of any kind; `model` is the name under which the model is registered."""
    kind = draw(st.integers(0, 9))
    headers = tuple(draw(st.lists(st.sampled_from(_OTHERS), max_size=2)))
    if kind < 4:
        path, body = draw(st.sampled_from(good_bodies(model)))
        content_type = draw(CONTENT_TYPES if draw(st.integers(0, 4)) == 4 else st.just(JSON))
        method = draw(st.sampled_from(["POST"] * 9 + ["PUT"]))
        headers = (("Content-Type", content_type.encode("latin-1")), *headers)
        return Strange(method, path, headers, draw(json_texts(body)))
    if kind < 8:
        return Strange("POST", "/v1/score", (("Content-Type", ARROW.encode()), *headers), draw(arrow_streams()))
    content_type = draw(CONTENT_TYPES)
    body = draw(st.just(b"") | st.binary(max_size=100) | st.just(b"x" * 70_000))
    target = draw(targets(model))
    return Strange(draw(METHODS), target, (("Content-Type", content_type.encode("latin-1")), *headers), body)


# --- damage ------------------------------------------------------------------------------------------------


def _flip(body: bytearray, random: Random) -> None:
    for _ in range(random.randint(1, 4)):
        body[random.randrange(len(body))] ^= 1 << random.randrange(8)


def _cut(body: bytearray, random: Random) -> None:
    del body[random.randrange(len(body)) :]


def _drop(body: bytearray, random: Random) -> None:
    start = random.randrange(len(body))
    del body[start : start + random.randint(1, 16)]


def _repeat(body: bytearray, random: Random) -> None:
    start = random.randrange(len(body))
    body[start:start] = body[start : start + random.randint(1, 64)] * random.randint(1, 30)


def _number(body: bytearray, random: Random) -> None:
    """Put a 32-bit number over four bytes: lengths and offsets of Arrow are such."""
    start = random.randrange(max(1, len(body) // 4)) * 4
    body[start : start + 4] = struct.pack("<i", random.choice([0, 1, -1, 8, 64, 2**31 - 1, -(2**31), 2**20]))


def _digit(body: bytearray, random: Random) -> None:
    """Change a digit, if there is one after a place: most often it stays JSON, of other numbers."""
    start = random.randrange(len(body))
    found = next((place for place in range(start, len(body)) if 48 <= body[place] < 58), None)
    if found is not None:
        body[found : found + 1] = random.choice([b"0", b"9", b"-1", b"1.5", b"99999999", b"null"])


_DAMAGES: list[Callable[[bytearray, Random], None]] = [_flip, _cut, _drop, _repeat, _number, _digit, _digit]


def damaged(request: Strange, random: Random) -> Strange:
    """Return a copy with damage to its body; without a body it has another method or target."""
    if not request.body:
        cut = random.randrange(len(request.target)) + 1
        method = random.choice([request.method, "GET", "POST", "HEAD"])
        return replace(request, method=method, target=request.target[:cut])
    body = bytearray(request.body)
    random.choice(_DAMAGES)(body, random)
    return replace(request, body=bytes(body))
