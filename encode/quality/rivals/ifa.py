"""IFA: linear attention over the whole history, whose sums do not depend on the target.

G histories   L behaviors   T targets   D embedding_dim   N num_heads   E = D / N dimensions of a head
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from encode.errors import ConfigError
from encode.model.long_term import History, LongTerm, Read, Sizes, Target, only_vector
from encode.schema import PADDING

FEATURES = ("elu", "relu", "softmax")
_TINY = 1e-9
"""Where features vanish or a history is empty, the normalizer is this instead of 0; the numerator is 0 then."""


class Sums(NamedTuple):
    """What linear attention needs of a user: D (E + 1) floats, however long the history."""

    products: Float[Tensor, "G N E E"]
    """S^n: sums of keys times values."""
    keys: Float[Tensor, "G N E"]
    """s^n: sums of keys."""


class IFA(LongTerm):
    r"""Interaction Fidelity Attention (arXiv 2406.09742): attention to every behavior in linear time.

    For each head n, with phi >= 0 elementwise and e_i, e_t the embeddings of behavior i and of the target:

        S^n = sum_i phi(W_k^n e_i) (W_v^n e_i)^T,   s^n = sum_i phi(W_k^n e_i)            once a user
        o^n = phi(W_q^n e_t)^T S^n / phi(W_q^n e_t)^T s^n,   v = W_o [o^1; ...; o^N]      once a target

    which equals sum_i a_i W_v^n e_i with a_i = phi(q)^T phi(k_i) / sum_j phi(q)^T phi(k_j): no behavior is left out.
    None of the matrices has a bias, so that an empty history reads zero; all of them keep the width D.

    With `among_candidates` the targets of a history then attend to each other,

        v_t <- v_t + sum_u softmax_u( (A_q e_t)^T A_k e_u / sqrt(D) ) A_v v_u.

    It is off by default because a score then depends on which other candidates are scored with it: training and
    evaluation group sampled impressions, serving scores the candidates of a request, and a metric would change with
    the batch. Padded targets (item 0) are not attended to.

    We differ in: the paper's phi could not be had, so `features` offers the linear transformer's elu + 1
    (arXiv 2006.16236), relu, and the softmax over a head's dimensions of efficient attention (arXiv 1812.01243); one
    layer, without feed-forward and residual, because the MLP of the backbone follows; how candidates attend to each
    other is ours; the paper's loss for consistent training and inference belongs to lists, not to impressions.

    Args:
        sizes: of the backbone.
        num_heads: N, a divisor of D.
        features: phi, one of `FEATURES`.
        among_candidates: whether targets of a history attend to each other.
    """

    def __init__(
        self,
        sizes: Sizes,
        *,
        num_heads: int = 2,
        features: str = "elu",
        among_candidates: bool = False,
    ) -> None:
        super().__init__()
        width = sizes.embedding_dim
        if width % num_heads:
            raise ConfigError(f"IFA: num_heads is {num_heads}, which does not divide embedding_dim {width}")
        if features not in FEATURES:
            raise ConfigError(f"IFA: features is {features!r}, expected one of {', '.join(FEATURES)}")
        self.num_heads, self.features = num_heads, features
        self.W_q, self.W_k, self.W_v, self.W_o = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.candidates = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(3 * among_candidates))

    def phi(self, x: Float[Tensor, "*shape E"]) -> Float[Tensor, "*shape E"]:
        """Return features of a head's queries or keys, none negative."""
        if self.features == "elu":
            return F.elu(x) + 1
        return F.relu(x) if self.features == "relu" else F.softmax(x, -1)

    def _heads(self, x: Float[Tensor, "G M D"]) -> Float[Tensor, "G N M E"]:
        return x.view(*x.shape[:2], self.num_heads, x.shape[2] // self.num_heads).transpose(1, 2)

    def summarise(self, history: History) -> Sums:
        """Return S and s of each user."""
        key = self.phi(self._heads(self.W_k(history.embedding))) * history.mask[:, None, :, None]
        return Sums(key.transpose(2, 3) @ self._heads(self.W_v(history.embedding)), key.sum(2))

    def read(self, state: Sums, target: Target) -> Read:
        """Return v of each target."""
        query = self.phi(self._heads(self.W_q(target.embedding)))
        normalizer = (query @ state.keys[..., None]).clamp(min=_TINY)
        vector = self.W_o((query @ state.products / normalizer).transpose(1, 2).flatten(2))
        if self.candidates:
            vector = vector + self._among_candidates(vector, target)
        return only_vector(vector)

    def _among_candidates(self, vector: Float[Tensor, "G T D"], target: Target) -> Float[Tensor, "G T D"]:
        A_q, A_k, A_v = self.candidates
        logits = A_q(target.embedding) @ A_k(target.embedding).transpose(1, 2) / vector.shape[2] ** 0.5
        logits = logits.masked_fill((target.item == PADDING)[:, None], torch.finfo(logits.dtype).min)
        mixed: Tensor = F.softmax(logits, 2) @ A_v(vector)
        return mixed
