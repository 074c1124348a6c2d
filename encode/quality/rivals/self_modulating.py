"""Self-modulating attention: attention weights times the rate at which behaviors of that type happen just then.

G histories   L behaviors   T targets   D embedding_dim   N num_heads   E = D / N dimensions of a head
K behaviors looked at   Q queries   Y types of behavior
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from encode.errors import ConfigError
from encode.model.long_term import History, LongTerm, Read, Sizes, Target, only_vector
from encode.quality.rivals.retrieved import gather_behaviors

_LOWEST_RATE = 1e-8
"""Under it the logarithm of a rate is cut off."""


class Modulated(NamedTuple):
    """The latest behaviors after self-attention: K (3 D + 3) floats a user, and K D more for training alone.

    What padding holds means nothing.
    """

    key: Float[Tensor, "G N K E"]
    value: Float[Tensor, "G N K E"]
    evidence: Float[Tensor, "G N K E"]
    """T x_j of the attention by targets, what S is averaged from."""
    summary: Float[Tensor, "G N K E"]
    """S_i of each behavior; only `auxiliary_loss` looks at it."""
    event: Int64[Tensor, "G K"]
    """y_j: type of each behavior, from 0 on."""
    wait: Float[Tensor, "G K"]
    """dt_i: from each behavior to the next, from the latest to the moment of asking, in units of time."""
    mask: Bool[Tensor, "G K"]


class Intensity(nn.Module):
    r"""Rate of each type of behavior.

        lambda_y(S, dt) = s_y log( 1 + exp( w_y^T sigma(W [S; log(1 + dt)] + b) / s_y ) )

    s_y > 0 and w_y are learned for each type, W and b for all. Types share W where the paper has one each: only so can
    there be one type a category without Y hidden layers for each behavior.
    """

    def __init__(self, width: int, num_types: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(width + 1, width)
        self.weight = nn.Parameter(torch.empty(num_types, width))
        self.log_scale = nn.Parameter(torch.zeros(num_types))
        nn.init.xavier_uniform_(self.weight)

    def _hidden(self, summary: Float[Tensor, "G N Q E"], wait: Float[Tensor, "G Q"]) -> Float[Tensor, "G N Q E"]:
        time = wait.log1p()[:, None, :, None].expand(*summary.shape[:3], 1)
        hidden: Tensor = self.hidden(torch.cat([summary, time], 3)).sigmoid()
        return hidden

    def of_all(self, summary: Float[Tensor, "G N Q E"], wait: Float[Tensor, "G Q"]) -> Float[Tensor, "G N Q Y"]:
        """Return the rate of each type, `wait` after each summary."""
        scale = self.log_scale.exp()
        return scale * F.softplus(self._hidden(summary, wait) @ self.weight.T / scale)

    def of_types(
        self, summary: Float[Tensor, "G N Q E"], wait: Float[Tensor, "G Q"], event: Int64[Tensor, "G K"]
    ) -> Float[Tensor, "G N Q K"]:
        """Return the rates of the types of K behaviors, `wait` after each summary."""
        scale = self.log_scale.exp()[event][:, None, None]
        weight = self.weight[event][:, None].transpose(2, 3)
        return scale * F.softplus(self._hidden(summary, wait) @ weight / scale)


class ModulatedAttention(nn.Module):
    r"""In each head A = softmax(Q K^T / sqrt(E)), S = A (T x), output_i = sum_j A_ij lambda_{y_j}(S_i, dt_i) V x_j."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.Q, self.K, self.V, self.T = (nn.Linear(width, width, bias=False) for _ in range(4))

    def heads(self, x: Float[Tensor, "G M D"]) -> Float[Tensor, "G N M E"]:
        """Split what Q, K, V or T gave into heads."""
        return x.view(*x.shape[:2], self.num_heads, x.shape[2] // self.num_heads).transpose(1, 2)

    def prepare(self, x: Float[Tensor, "G K D"]) -> tuple[Tensor, Tensor, Tensor]:
        """Return keys, values and evidence of what is attended to, each [G, N, K, E]."""
        return self.heads(self.K(x)), self.heads(self.V(x)), self.heads(self.T(x))

    def forward(
        self,
        query: Float[Tensor, "G Q D"],
        key: Float[Tensor, "G N K E"],
        value: Float[Tensor, "G N K E"],
        evidence: Float[Tensor, "G N K E"],
        event: Int64[Tensor, "G K"],
        wait: Float[Tensor, "G Q"],
        visible: Bool[Tensor, "G Q K"],
        intensity: Intensity | None,
    ) -> tuple[Float[Tensor, "G Q D"], Float[Tensor, "G N Q E"]]:
        """Return the output, zero where nothing is visible, and S."""
        logits = self.heads(self.Q(query)) @ key.transpose(2, 3) / key.shape[3] ** 0.5
        visible = visible[:, None]
        weights = F.softmax(logits.masked_fill(~visible, torch.finfo(logits.dtype).min), 3) * visible
        summary = weights @ evidence
        if intensity is not None:
            weights = weights * intensity.of_types(summary, wait, event)
        return (weights @ value).transpose(1, 2).flatten(2), summary


class SelfModulatingAttention(LongTerm):
    r"""Self-modulating attention (Chen et al., ICML 2021, arXiv 2204.06517) under a target.

    x_1, ..., x_K are the embeddings of the latest behaviors, y_j their types, t_j their times, t_{K+1} the moment of
    asking, dt_i = t_{i+1} - t_i in units of time. In each of N heads

        A_ij = softmax_{j <= i}( (Q LN(x_i))^T K x_j / sqrt(E) ),   S_i = sum_j A_ij T x_j
        lambda_y(S, dt) = s_y log( 1 + exp( w_y^T sigma(W [S; log(1 + dt)] + b) / s_y ) )
        x'_i = x_i + sum_j A_ij lambda_{y_j}(S_i, dt_i) V x_j,   state_i = x'_i + FFN(LN(x'_i))

    and the target reads the states by a second such attention, all j visible, with its own Q, K, V, T, the same
    lambda, and dt_K, the time since the latest behavior; its output goes through W_o and has no residual, so that an
    empty history reads zero. A weight is more than a share: it grows with how much is going on, as weights A_ij do
    not. The regulariser is what a point process with these rates loses on the next behavior,

        - 1 / n sum_i [ log lambda_{y_{i+1}}(S_i, dt_i) - dt_i / 2 sum_y ( lambda_y(S_i, 0) + lambda_y(S_i, dt_i) ) ]

    over the n behaviors that have a next one, averaged over heads; the integral of the rates is a trapezoid.

    Self-attention is quadratic, so only the latest `length` behaviors are looked at: the paper cuts, too. What is
    older is not seen by this model except in the mean of the history that the MLP gets with every model.

    We differ in: the reading by the target, which the paper, predicting the next item, does not have (ours); types
    share W (`Intensity`); log(1 + dt), as pauses range from seconds to years; the trapezoid, where the released code
    takes half of its far end; no embedding of positions, since time is in lambda; one block; no dropout.

    Args:
        sizes: of the backbone.
        num_heads: N, a divisor of D.
        length: K, at most.
        modulated: False attends with A alone, and there is no regulariser.
        event_type: what a type is: the category or the kind of a behavior.
        num_types: Y, at most; categories above share one, modulo Y (ours: rates of all types are needed at once).
        time_unit: in days; what dt is counted in.
        regulariser: its weight in the loss; 0 for none. Small, because the sum over types starts at 0.7 Y a unit.
    """

    def __init__(
        self,
        sizes: Sizes,
        *,
        num_heads: int = 2,
        length: int = 200,
        modulated: bool = True,
        event_type: str = "category",
        num_types: int = 64,
        time_unit: float = 1.0,
        regulariser: float = 0.001,
    ) -> None:
        super().__init__()
        width = sizes.embedding_dim
        if width % num_heads:
            raise ConfigError(
                f"SelfModulatingAttention: num_heads is {num_heads}, which does not divide embedding_dim {width}"
            )
        if event_type not in ("category", "kind"):
            raise ConfigError(f"SelfModulatingAttention: event_type is {event_type!r}, expected category or kind")
        for name, number in (("length", length), ("num_types", num_types), ("time_unit", time_unit)):
            if number <= 0:
                raise ConfigError(f"SelfModulatingAttention: {name} is {number}, expected more than 0")
        self.length, self.event_type, self.time_unit, self.regulariser = length, event_type, time_unit, regulariser
        present = sizes.num_categories if event_type == "category" else sizes.num_kinds
        self.num_types = min(num_types, present)
        self.intensity = Intensity(width // num_heads, self.num_types) if modulated else None
        self.among, self.asking = (ModulatedAttention(width, num_heads) for _ in range(2))
        self.norm_query, self.norm_forward = nn.LayerNorm(width), nn.LayerNorm(width)
        self.feed_forward = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))
        self.W_o = nn.Linear(width, width, bias=False)

    def summarise(self, history: History) -> Modulated:
        """Return the states of the latest behaviors, ready to be read."""
        count = history.mask.sum(1, keepdim=True)
        place = torch.arange(min(self.length, history.mask.shape[1]), device=count.device)
        places = place + (count - self.length).clamp(min=0)
        mask = place < count
        places = places.where(mask, 0)
        x = gather_behaviors(history.embedding, places[:, None])[:, 0]
        age = history.age.gather(1, places) * mask
        wait = (age - F.pad(age, (0, 1))[:, 1:]).clamp(min=0) / self.time_unit
        event = (history.category if self.event_type == "category" else history.kind).gather(1, places) % self.num_types
        before = (place <= place[:, None]).expand(len(mask), -1, -1)  # padding comes last: no behavior looks at it
        moved, summary = self.among(self.norm_query(x), *self.among.prepare(x), event, wait, before, self.intensity)
        moved = x + moved
        states = moved + self.feed_forward(self.norm_forward(moved))
        return Modulated(*self.asking.prepare(states), summary, event, wait, mask)

    def read(self, state: Modulated, target: Target) -> Read:
        """Return what each target takes from the states."""
        query = target.embedding
        latest = state.mask & ~F.pad(state.mask, (0, 1))[:, 1:]
        wait = (state.wait * latest).sum(1, keepdim=True).expand(-1, query.shape[1])
        visible = state.mask[:, None].expand(-1, query.shape[1], -1)
        vector, _ = self.asking(
            query, state.key, state.value, state.evidence, state.event, wait, visible, self.intensity
        )
        return only_vector(self.W_o(vector))

    def auxiliary_loss(self, state: Modulated, history: History) -> Float[Tensor, ""]:
        """Return the weighted regulariser; 0 where no behavior has a next one."""
        if self.intensity is None or self.regulariser == 0:
            return history.embedding.new_zeros(())
        has_next = state.mask[:, 1:]
        summary, wait, upcoming = state.summary[:, :, :-1], state.wait[:, :-1], state.event[:, 1:]
        before, after = self.intensity.of_all(summary, torch.zeros_like(wait)), self.intensity.of_all(summary, wait)
        happened = after.take_along_dim(upcoming[:, None, :, None], 3)[..., 0].clamp(min=_LOWEST_RATE).log()
        expected = wait[:, None] * (before + after).sum(3) / 2
        loss = ((expected - happened).mean(1) * has_next).sum() / has_next.sum().clamp(min=1)
        return self.regulariser * loss
