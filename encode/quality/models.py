"""The models of the bench by name, and the switches that a name may carry: `encode:num_clusters=16,moments=keys`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_origin, get_type_hints

from pydantic import TypeAdapter, ValidationError

from encode.config import ModelConfig
from encode.errors import ConfigError
from encode.model.long_term import LongTerm, Sizes
from encode.quality.counted import Counted
from encode.quality.rivals.attention import DinUnit, FullAttention
from encode.quality.rivals.dare import DARE
from encode.quality.rivals.dman import Dman
from encode.quality.rivals.eta import Eta
from encode.quality.rivals.floors import MeanPooling, RecentOnly
from encode.quality.rivals.ifa import IFA
from encode.quality.rivals.mirrn import Mirrn
from encode.quality.rivals.sdim import Sdim
from encode.quality.rivals.self_modulating import SelfModulatingAttention
from encode.quality.rivals.sim import SimHard, SimSoft
from encode.quality.rivals.sparse_ctr import SparseCTR
from encode.quality.rivals.twin import Twin
from encode.quality.rivals.twin_v2 import TwinV2
from encode.quality.variants import Variant


@dataclass(frozen=True)
class Model:
    """One model of long-term interest, as the bench knows it."""

    kind: type[LongTerm]
    family: str
    """floor, ceiling, search, cluster, memory, newer or ours."""
    reduces: bool = False
    """Whether the triplet loss teaches the reduction: where keys are what the method is about."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Switches that differ from the defaults of the class."""


_PAPER = {
    "center": "unit",
    "pooling": "relevance",
    "moments": "none",
    "remembered": 0,
    "counts": False,
    "categories": False,
    "center_weight": 0.0,
}
MODELS: Mapping[str, Model] = {
    "recent": Model(RecentOnly, "floor"),
    "mean": Model(MeanPooling, "floor"),
    "full": Model(FullAttention, "ceiling", reduces=True),
    "din": Model(DinUnit, "ceiling"),
    "sim-hard": Model(SimHard, "search"),
    "sim-soft": Model(SimSoft, "search"),
    "eta": Model(Eta, "search"),
    "sdim": Model(Sdim, "search"),
    "twin": Model(Twin, "search"),
    "twin-v2": Model(TwinV2, "cluster"),
    "dman": Model(Dman, "memory"),
    "mirrn": Model(Mirrn, "newer"),
    "dare": Model(DARE, "newer"),
    "ifa": Model(IFA, "newer"),
    "sparse-ctr": Model(SparseCTR, "newer"),
    "self-modulating": Model(SelfModulatingAttention, "newer"),
    "encode-paper": Model(Variant, "ours", reduces=True, options=_PAPER),
    "encode": Model(Variant, "ours", reduces=True),
}

ABLATIONS = (
    *(f"encode:num_clusters={k}" for k in (1, 4, 8, 16, 64)),
    *(f"encode:projected_dim={p}" for p in (4, 8, 32, 64)),
    "encode:metric=joint",
    "encode:metric=embedding",
    "encode:metric=random",
    "encode:center=unit",
    "encode:pooling=relevance",
    "encode:center_weight=0.0",
    "encode:center_weight=0.005",
    "encode:center_weight=0.02",
    "encode:counts=false",
    "encode:categories=false",
    "encode:remembered=0",
    "encode:remembered=512",
    "encode:moments=none",
    "encode:moments=keys",
    "encode:moments=values",
    "encode:moments=values,rank=4",
    "encode:size_prior=0.0",
    "encode:decay=0.01",
    "encode:affinity=false",
    "encode:sharpness=1.0",
    "encode:grouping=random",
    "encode:grouping=time",
    "encode:grouping=category",
    "encode:reduction=none,projected_dim=64",
    "encode:reduction=random",
    "encode:reduction=pca",
    "encode:reduction=table",
    "encode:selection=semi-hard",
    "encode:selection=category",
    "encode:reclustering=3",
    "encode:triplet_weight=0.0",
    "encode:margin=fixed",
)
"""ENCODE with one thing changed, a row each."""

COUNTED = tuple(name if name == "encode" else f"{name}:counts=true,categories=true" for name in MODELS)
"""Every model told how often the target and its category are in the history, which ENCODE is by itself."""

GROUPS: Mapping[str, tuple[str, ...]] = {"all": tuple(MODELS), "counted": COUNTED, "ablations": ABLATIONS}
"""Names that stand for several models."""


PLATFORM_ONLY = frozenset({"center_weight", "num_remembered", "pooling", "size_prior"})
"""Settings that the platform's own ENCODE reads and no model of the bench; `Variant` has such switches itself."""
_TOLD = ("counts", "categories")
_BACKBONE: Mapping[str, Any] = {
    name: field.annotation for name, field in ModelConfig.model_fields.items() if name not in PLATFORM_ONLY
}
"""Switches of the backbone and their types."""


@dataclass(frozen=True)
class Chosen:
    """A model with its switches set."""

    name: str
    """As it was asked for."""
    model: Model
    options: Mapping[str, Any]
    """Of the model of long-term interest."""
    backbone: Mapping[str, Any]
    """Of `ModelConfig`, where it differs from what all have."""
    told: Mapping[str, bool] = field(default_factory=dict)
    """Counts that the MLP is told by a model that has no such switches itself; see `Counted`."""

    def make(self, sizes: Sizes) -> LongTerm:
        """Return the model of long-term interest, initialized from torch's generator."""
        factory: Callable[..., LongTerm] = self.model.kind
        made = factory(sizes, **self.options)
        told = self.told
        return Counted(made, items=told["counts"], categories=told["categories"]) if any(told.values()) else made


def choose(name: str) -> Chosen:
    """Read a model's name with its switches, `NAME[:SWITCH=VALUE,...]`; values of a list are joined by `+`.

    Switches are those of the model's class, else `counts` and `categories` (see `Counted`), else those of the backbone
    (`ModelConfig`). A value has the type that the switch declares.

    Raises:
        ConfigError: there is no such model, switch or value; what there is, is named.
    """
    base, _, switches = name.partition(":")
    if base not in MODELS:
        raise ConfigError(f"model {base!r}: unknown; have {', '.join(MODELS)}, and groups {', '.join(GROUPS)}")
    model = MODELS[base]
    own = _switches(model.kind)
    options = dict(model.options)
    backbone: dict[str, Any] = {} if model.reduces else {"triplet_weight": 0.0}
    told = dict.fromkeys(_TOLD, False)
    for switch in filter(None, switches.split(",")):
        key, _, text = switch.partition("=")
        if key in own:
            options[key] = _value(name, key, text, own[key])
        elif key in _TOLD:
            told[key] = _value(name, key, text, bool)
        elif key in _BACKBONE:
            backbone[key] = _value(name, key, text, _BACKBONE[key])
        else:
            known = ", ".join(dict.fromkeys([*own, *_TOLD, *_BACKBONE]))
            raise ConfigError(f"model {name!r}: unknown switch {key!r}; have {known}")
    return Chosen(name, model, options, backbone, told)


def named(names: Sequence[str]) -> tuple[str, ...]:
    """Return models by name, groups taken apart, each once."""
    return tuple(dict.fromkeys(model for name in names for model in GROUPS.get(name, (name,))))


def _switches(kind: type[LongTerm]) -> dict[str, Any]:
    """Return the type of each switch of a model's class."""
    hints = get_type_hints(kind.__init__)
    parameters = inspect.signature(kind.__init__).parameters.values()
    return {one.name: hints[one.name] for one in parameters if one.kind is inspect.Parameter.KEYWORD_ONLY}


def _value(name: str, key: str, text: str, kind: Any) -> Any:
    if text == "":
        raise ConfigError(f"model {name!r}: switch {key} has no value; write {key}=VALUE")
    takes_many = get_origin(kind) in (tuple, Sequence)
    try:
        return TypeAdapter(kind).validate_python(text.split("+") if takes_many else text)
    except ValidationError as error:
        raise ConfigError(f"model {name!r}: {key}: {error.errors()[0]['msg']}, found {text!r}") from None
