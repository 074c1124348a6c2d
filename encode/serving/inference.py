"""The Open Inference Protocol, version 2, in JSON: what KServe and its clients speak.

https://github.com/kserve/open-inference-protocol. The inputs of one request are of one user.
"""

from __future__ import annotations

from typing import Any, Literal

from fastapi import APIRouter, HTTPException, Request, Response
from pydantic import BaseModel, Field, StrictInt, ValidationError

from encode import __version__
from encode.serving.bundle import Bundle
from encode.serving.messages import Body, Fallbacks, Many, ScoreRequest, written
from encode.serving.problems import InferenceProblem, documented, invalid, invalid_body
from encode.serving.rollout import BY_ROLE
from encode.serving.scoring import Scorer

_NO_MODEL = (404, "there is no model of this name")
_NOT_READY: dict[int | str, dict[str, Any]] = {
    503: {"model": InferenceProblem, "description": "nothing is loaded, or the process is about to end"}
}


class Live(BaseModel):
    """The process is alive."""

    live: bool


class ServerReady(BaseModel):
    """The process has something to serve and is to stay."""

    ready: bool


class ModelReady(BaseModel):
    """The same of a model."""

    name: str
    ready: bool


class ServerMetadata(BaseModel):
    """What answers here."""

    name: str
    version: str
    extensions: list[str]


class TensorMetadata(BaseModel):
    """A tensor that goes in or comes out; -1 is any length."""

    name: str
    datatype: str
    shape: list[int]


class ModelMetadata(BaseModel):
    """The model in use."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]


class Tensor(Body):
    """An input."""

    name: Literal["user_id", "item_id", "category_id"]
    shape: Many[int] = Field(min_length=1, max_length=1)
    datatype: Literal["INT64"]
    data: Many[StrictInt]
    parameters: dict[str, Any] | None = None


class WantedOutput(Body):
    """An output; there is but one."""

    name: Literal["probability"]
    parameters: dict[str, Any] | None = None


class InferenceRequest(Body):
    """`user_id` of shape [1], `item_id` and, optionally, `category_id` of shape [n]."""

    id: str | None = None
    parameters: dict[str, Any] | None = None
    inputs: Many[Tensor]
    outputs: Many[WantedOutput] | None = None

    def asked(self) -> ScoreRequest:
        """Return what is asked.

        Raises:
            RequestValidationError: an input is missing, doubled, or not of its shape.
        """
        held = {tensor.name: tensor.data for tensor in self.inputs}
        if len(held) != len(self.inputs):
            raise invalid("two of one name", "inputs")
        for tensor in self.inputs:
            if tensor.shape != [len(tensor.data)]:
                raise invalid(f"shape {tensor.shape} for {len(tensor.data)} values", "inputs", tensor.name)
        if len(held.get("user_id", [])) != 1:
            raise invalid("expected one user_id", "inputs", "user_id")
        try:
            return ScoreRequest(
                user_id=held["user_id"][0], item_ids=held.get("item_id", []), category_ids=held.get("category_id")
            )
        except ValidationError as error:
            raise invalid_body(error) from None


class OutputTensor(BaseModel):
    """The probabilities, in the order of the items."""

    name: str
    datatype: str
    shape: list[int]
    data: list[float]


class InferenceResponse(BaseModel):
    """Probabilities; `parameters` hold the bundle and what was assumed."""

    model_name: str
    model_version: str
    id: str | None
    parameters: dict[str, str | int | bool]
    outputs: list[OutputTensor]


def inference_probes(scorer: Scorer) -> APIRouter:
    """Make the routes that are answered whatever the load."""
    routes = APIRouter(prefix="/v2/health", tags=["open inference protocol"])

    @routes.get("/live")
    async def live() -> Live:
        """Tell that the process is alive."""
        return Live(live=True)

    @routes.get("/ready", responses=_NOT_READY)
    async def ready() -> ServerReady:
        """Tell that a verified bundle is loaded and the process is to stay; 503 otherwise."""
        scorer.ready()
        return ServerReady(ready=True)

    return routes


def inference_routes(scorer: Scorer, model_name: str) -> APIRouter:
    """Make the other routes."""
    routes = APIRouter(
        prefix="/v2", tags=["open inference protocol"], responses=documented(InferenceProblem, _NO_MODEL)
    )

    def check(name: str) -> None:
        if name != model_name:
            raise HTTPException(404, f"model {name}: unknown; expected {model_name}")

    @routes.get("")
    def server() -> ServerMetadata:
        """Describe the server."""
        return ServerMetadata(name="encode", version=__version__, extensions=[])

    @routes.get("/models/{name}")
    def model(name: str, request: Request) -> ModelMetadata:
        """Describe the model in use."""
        check(name)
        inputs = [("user_id", [1]), ("item_id", [-1]), ("category_id", [-1])]
        return ModelMetadata(
            name=name,
            versions=[scorer.bundle(request).model_version],
            platform="encode",
            inputs=[TensorMetadata(name=one, datatype="INT64", shape=shape) for one, shape in inputs],
            outputs=[TensorMetadata(name="probability", datatype="FP32", shape=[-1])],
        )

    @routes.get("/models/{name}/ready")
    def model_ready(name: str) -> ModelReady:
        """Tell that the model can be asked; 503 otherwise."""
        check(name)
        scorer.ready()
        return ModelReady(name=name, ready=True)

    @routes.post("/models/{name}/infer", response_model=InferenceResponse, openapi_extra=BY_ROLE)
    async def infer(name: str, request: Request, asked: InferenceRequest) -> Response:
        """Return a probability for each item."""
        check(name)
        wanted = asked.asked()
        bundle = scorer.bundle(request, wanted.user_id)
        scored = await scorer.score_soon(request, bundle, wanted.asked())
        return written(_answer(name, asked.id, bundle, scorer.fallbacks(bundle, scored), scored.probabilities.tolist()))

    return routes


def _answer(
    name: str, request_id: str | None, bundle: Bundle, fallbacks: Fallbacks, probabilities: list[float]
) -> InferenceResponse:
    told = bundle.describe()
    return InferenceResponse(
        model_name=name,
        model_version=bundle.model_version,
        id=request_id,
        parameters={
            "bundle": told.pop("id"),
            **told,
            "unknown_user": fallbacks.unknown_user,
            "unknown_items": ",".join(map(str, fallbacks.unknown_items)),  # the protocol allows no lists here
            "stale_snapshot": fallbacks.stale_snapshot,
        },
        outputs=[
            OutputTensor(name="probability", datatype="FP32", shape=[len(probabilities)], data=probabilities),
        ],
    )
