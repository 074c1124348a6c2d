"""`/v1/score` in Arrow: a stream of one record batch in, one of probabilities out.

in   schema metadata  user_id           decimal digits
                      recent            behaviors since the snapshot, if any, in JSON as in the other dialect
     columns          item_id int64, and category_id int64 if it is given; no nulls, not compressed
out  schema metadata  user_id, bundle and fallbacks, the last two in JSON as in the other dialect
     column           probability float32, in the order of the candidates
"""

from __future__ import annotations

import json
import struct
from typing import Any

import numpy as np
import pyarrow as pa
from fastapi import Request, Response
from pydantic import ValidationError
from pydantic_core import from_json
from starlette.routing import Match, Route
from starlette.types import Scope

from encode.serving.bundle import Asked
from encode.serving.messages import MAX_CANDIDATES, ScoreRequest
from encode.serving.problems import invalid, invalid_body
from encode.serving.scoring import Scorer

CONTENT_TYPE = "application/vnd.apache.arrow.stream"
_BINARY = {"content": {CONTENT_TYPE: {"schema": {"type": "string", "format": "binary"}}}}
ALSO_ARROW: dict[str, Any] = {"requestBody": _BINARY, "responses": {"200": _BINARY}}
"""What OpenAPI says of it, beside JSON."""
_OUT = pa.schema([pa.field("probability", pa.float32(), nullable=False)])


class _ArrowRoute(Route):
    """A route for bodies in Arrow only; others go on to the next route of the same path."""

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        given = dict(scope["headers"]).get(b"content-type", b"") if scope["type"] == "http" else b""
        if given.partition(b";")[0].strip().lower() != CONTENT_TYPE.encode():
            return Match.NONE, {}
        found, more = super().matches(scope)
        return found, {**more, "route": self}  # as FastAPI's do: its path is what is logged


def arrow_route(scorer: Scorer) -> Route:
    """Make the route; it must come before the one of the same path in JSON."""

    async def score(request: Request) -> Response:
        asked = read_request(await request.body())
        bundle = scorer.bundle(request, asked.user_id)
        scored = await scorer.score_soon(request, bundle, asked)
        told = {
            "user_id": str(asked.user_id),
            "bundle": json.dumps(bundle.describe()),
            "fallbacks": scorer.fallbacks(bundle, scored).model_dump_json(),
        }
        return Response(_stream(scored.probabilities, told), media_type=CONTENT_TYPE)

    return _ArrowRoute("/v1/score", score, methods=["POST"], include_in_schema=False)


def read_request(body: bytes) -> Asked:
    """Read and check a request.

    Raises:
        RequestValidationError: it is not as described above; nothing else, whatever the bytes are.
    """
    try:
        batch = _only_batch(body)
        batch.validate(full=True)
    except (pa.ArrowException, OSError, ValueError, struct.error, EOFError) as error:
        raise invalid(f"not an Arrow stream of one record batch: {' '.join(str(error).split())[:200]}") from None
    except MemoryError:
        raise invalid("not an Arrow stream of one record batch: a buffer is too large") from None
    for name in batch.schema.names:
        if batch.column(name).null_count:
            raise invalid("holds nulls", name)
    told = batch.schema.metadata or {}
    user = told.get(b"user_id", b"")
    if not user.isdigit() or len(user) > 19:
        raise invalid("expected decimal digits in the metadata of the schema", "user_id")
    try:
        recent = from_json(told.get(b"recent", b"[]"))
    except ValueError as error:
        raise invalid(f"expected JSON in the metadata of the schema: {error}", "recent") from None
    columns = {name: np.array(batch.column(name)) for name in batch.schema.names}
    asked = Asked(int(user), columns["item_id"], columns.get("category_id"))
    if recent == [] and _is_plain(asked):
        return asked
    lists = {name: column.tolist() for name, column in columns.items()}
    try:
        return ScoreRequest(
            user_id=int(user), item_ids=lists["item_id"], category_ids=lists.get("category_id"), recent=recent
        ).asked()
    except ValidationError as error:
        raise invalid_body(error) from None


def _is_plain(asked: Asked) -> bool:
    """Tell whether `ScoreRequest` would take it as it is: there it is said once, and here without a list of objects."""
    ids, categories = asked.item_ids, asked.category_ids
    return (
        0 < asked.user_id <= np.iinfo(np.int64).max
        and 0 < len(ids) <= MAX_CANDIDATES
        and bool(ids.min() > 0)
        and (categories is None or bool(categories.min() >= 0))
    )


def _only_batch(body: bytes) -> pa.RecordBatch:
    """Read message by message, so that no buffer is touched before its schema is known to be the expected one."""
    messages = pa.ipc.MessageReader.open_stream(pa.py_buffer(body))
    schema = pa.ipc.read_schema(_next(messages, "schema"))
    names = [field.name for field in schema]
    if names not in (["item_id"], ["item_id", "category_id"], ["category_id", "item_id"]):
        raise ValueError(f"columns {', '.join(names) or 'none'}; expected item_id and, optionally, category_id")
    if any(field.type != pa.int64() for field in schema):
        raise ValueError(f"columns of {', '.join(str(field.type) for field in schema)}; expected int64")
    message = _next(messages, "record batch")
    if _is_compressed(message.metadata.to_pybytes()):
        raise ValueError("compressed buffers; expected plain ones")  # a small body could become any number of bytes
    try:
        messages.read_next_message()
    except StopIteration:
        return pa.ipc.read_record_batch(message, schema)
    raise ValueError("more than one record batch")


def _next(messages: Any, kind: str) -> Any:
    try:
        message = messages.read_next_message()
    except StopIteration:
        raise ValueError(f"it ends before its {kind}") from None
    if message.type != kind:
        raise ValueError(f"{message.type} where a {kind} was expected")
    return message


def _is_compressed(metadata: bytes) -> bool:
    """Tell whether a record batch names a compression: the fourth field of its table in Arrow's Message.fbs."""

    def field(table: int, number: int) -> int:
        """Return where a flatbuffer table holds a field, or 0 if it does not."""
        vtable = table - struct.unpack_from("<i", metadata, table)[0]
        place = 4 + 2 * number
        (size,) = struct.unpack_from("<H", metadata, vtable)
        offset = struct.unpack_from("<H", metadata, vtable + place)[0] if place < size else 0
        return table + int(offset) if offset else 0

    header = field(struct.unpack_from("<I", metadata, 0)[0], 2)
    batch = header + struct.unpack_from("<I", metadata, header)[0]
    return field(batch, 3) != 0


def _stream(probabilities: np.ndarray, told: dict[str, str]) -> bytes:
    schema = _OUT.with_metadata(told)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, schema) as writer:
        writer.write_batch(pa.record_batch([pa.array(probabilities, pa.float32())], schema=schema))
    return bytes(sink.getvalue().to_pybytes())
