"""DMAN: segments of a history read one after the other, the long past kept in a few slots (arXiv 2102.09269).

    G histories   T targets   L behaviors   S behaviors of a segment   m memory slots   D embedding_dim
    Q queries   K keys   J queries that see different keys: Q, or 1 where all see the same

Tan et al., AAAI 2021.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from encode.errors import ConfigError
from encode.model.long_term import History, LongTerm, Read, Sizes, Target, only_vector
from encode.quality.rivals.retrieved import check_counts, softmax_over


class Memory(NamedTuple):
    """State of `Dman`."""

    slots: Float[Tensor, "G m D"]
    """M: zero where nothing is kept yet."""
    filled: Bool[Tensor, " G"]
    """Whether anything is."""
    recent: Float[Tensor, "G S D"]
    """H of the latest segment; none, S = 0, without the short-term part."""
    recent_mask: Bool[Tensor, "G S"]
    reconstruction: Float[Tensor, " G"]
    """The loss of the updates that made `slots`, a mean over them; 0 outside of training."""


class Segment(NamedTuple):
    """Behaviors that follow each other, the latest at the end; padded in front."""

    embedding: Float[Tensor, "G S D"]
    mask: Bool[Tensor, "G S"]
    place: Int64[Tensor, "G S"]
    """From the end of the segment, in `segment_length` steps whatever its length: 0 is the latest."""


class Dman(LongTerm):
    r"""Recurrent attention over segments, a memory that is abstracted segment by segment, and a gate between the two.

    For segment n = 1 .. N with embeddings X_n, P added for the place in the segment, SG stopping the gradient:

        H_n = LN(X_n + Attn(X_n; SG(H_{n-1}) || X_n))              causal self-attention, linked to the past
        M   = f(M || H_{n-1})                                      m slots, in D dimensions
        L   = mean || Attn(H_n; M_old || H_{n-1}) - Attn(H_n; f(M_old || H_{n-1})) ||^2     what an update loses

    f is dynamic routing from capsules x_i, the rows of M_old || H_{n-1} brought to length sqrt(D), to m slots:

        b_ij = <W x_i, r_j>, then in each round  c_ij = softmax_j(b_ij),  s_j = sum_i c_ij W x_i,
        M_j = s_j |s_j| / (1 + |s_j|^2),  b_ij += <W x_i, M_j>

    L trains f alone: in it all that is not f is held fixed, and no other loss reaches f. A target then asks both parts:

        short = Attn(e_t; H_N),  long = Attn(e_t; M),  g = sigmoid(W_s short + W_l long + b),
        v = g * short + (1 - g) * long

    M leaves out the latest segment, which is the short-term part. The full text of the paper could not be had. Known
    from its abstract and figure are segments, the stopped link, M's update from H_{n-1}, the reconstruction loss that
    trains the memory, and the gate; second-hand are that abstraction is dynamic routing and that L compares what
    attention takes. What else these formulas say is ours.

    We differ in: the paper predicts the next behavior at every position, here a target takes the place of the next
    position, so that only the latest segment and the memory meet the log loss. One layer, so the link is to what it
    put out for the last segment. Routing starts from learned references r_j and not at random, so that it does not
    depend on padding; the length sqrt(D) is ours, too: squashed again with each segment, M would fade. The backbone
    has a recent branch of its own, so the short-term part says a thing twice and can be left out.

    Histories are cut from their end into segments of `segment_length`. One that would make more than `num_segments` is
    cut into that many equal ones: the whole history counts, at a bounded number of steps, and cuts do not depend on
    the other histories of a batch, as they would if the batch's longest one set the length.

    Args:
        sizes: of the backbone; all attention is D wide.
        segment_length: behaviors of a segment, at least.
        num_segments: segments at most.
        num_slots: m.
        num_heads: of every attention.
        num_rounds: of the routing.
        short_term: False reads the memory alone, which then takes in the latest segment, too: v = long. The attention
            within segments then learns with `end_to_end` only.
        link: False does not look at the segment before.
        end_to_end: True lets the log loss train the memory (ours); False is the paper's: L alone does.
        reconstruction_weight: of L in the loss; 0 leaves it out.
    """

    def __init__(
        self,
        sizes: Sizes,
        *,
        segment_length: int = 50,
        num_segments: int = 16,
        num_slots: int = 20,
        num_heads: int = 2,
        num_rounds: int = 3,
        short_term: bool = True,
        link: bool = True,
        end_to_end: bool = False,
        reconstruction_weight: float = 1.0,
    ) -> None:
        super().__init__()
        counts = {"segment_length": segment_length, "num_segments": num_segments, "num_slots": num_slots}
        check_counts("Dman", **counts, num_rounds=num_rounds)
        dim = sizes.embedding_dim
        if dim % num_heads:
            raise ConfigError(f"Dman: embedding_dim {dim} is not divisible by num_heads {num_heads}")
        self.segment_length, self.num_segments = segment_length, num_segments
        self.short_term, self.link, self.end_to_end = short_term, link, end_to_end
        self.reconstruction_weight = reconstruction_weight
        self.place = nn.Embedding(segment_length, dim)
        nn.init.normal_(self.place.weight, std=0.02)
        self.within = Attention(dim, num_heads)
        self.norm = nn.LayerNorm(dim)
        self.abstract = Routing(dim, num_slots, num_rounds)
        self.ask_memory = Attention(dim, num_heads)
        self.ask_recent = Attention(dim, num_heads) if short_term else None
        self.gate = nn.Linear(2 * dim, dim) if short_term else None

    def summarise(self, history: History) -> Memory:
        """Read the segments from the oldest on, the memory always one behind."""
        num_histories, _, dim = history.embedding.shape
        slots = history.embedding.new_zeros(num_histories, self.abstract.num_slots, dim)
        filled = history.mask.new_zeros(num_histories)
        past, past_mask = history.embedding[:, :0], history.mask[:, :0]
        loss, updates = slots.new_zeros(num_histories), slots.new_zeros(num_histories)
        for segment in self._segments(history):
            hidden = self._attend_within(segment, past, past_mask)
            slots, filled, lost = self._update(slots, filled, past, past_mask, hidden, segment.mask)
            updates = updates + past_mask.any(1)
            loss, past, past_mask = loss + lost, hidden, segment.mask
        if not self.short_term:
            slots, filled, lost = self._update(slots, filled, past, past_mask, past, past_mask)
            updates, loss = updates + past_mask.any(1), loss + lost
            past, past_mask = past[:, :0], past_mask[:, :0]
        return Memory(slots, filled, past, past_mask, loss / updates.clamp(min=1))

    def read(self, state: Memory, target: Target) -> Read:
        """Return v of each target."""
        slots = state.slots if self.end_to_end else state.slots.detach()
        known = state.filled[:, None, None].expand(-1, 1, slots.shape[1])
        long = self.ask_memory(target.embedding, slots, known)
        if self.ask_recent is None or self.gate is None:
            return only_vector(long)
        short = self.ask_recent(target.embedding, state.recent, state.recent_mask[:, None])
        share = torch.sigmoid(self.gate(torch.cat([short, long], 2)))
        return only_vector(share * short + (1 - share) * long)

    def auxiliary_loss(self, state: Memory, history: History) -> Float[Tensor, ""]:
        """Return the weighted mean of L over the histories that have updated their memory."""
        updated = state.filled.sum().clamp(min=1)
        return self.reconstruction_weight * state.reconstruction.sum() / updated

    def _segments(self, history: History) -> Iterator[Segment]:
        """Yield the segments, oldest first. Padding of the batch makes empty ones in front, which do nothing."""
        length = history.mask.sum(1, keepdim=True)
        longest = history.mask.shape[1]
        own = torch.clamp(-(-length // self.num_segments), min=self.segment_length)
        widest = max(self.segment_length, -(-longest // self.num_segments))
        from_end = torch.arange(widest - 1, -1, -1, device=length.device)
        for before in reversed(range(min(self.num_segments, -(-longest // self.segment_length)))):
            rank = before * own + from_end
            mask = (from_end < own) & (rank < length)
            index = (length - 1 - rank).clamp(min=0)
            embedding = history.embedding.gather(1, index[:, :, None].expand(-1, -1, history.embedding.shape[2]))
            place = torch.where(mask, from_end * self.segment_length // own, 0)
            yield Segment(embedding * mask[:, :, None], mask, place)

    def _attend_within(
        self, segment: Segment, past: Float[Tensor, "G K D"], past_mask: Bool[Tensor, "G K"]
    ) -> Float[Tensor, "G S D"]:
        """H_n; zero where padded."""
        queries = segment.embedding + self.place(segment.place)
        size = segment.mask.shape[1]
        causal = torch.ones(size, size, dtype=torch.bool, device=past.device).tril()
        mask = causal & segment.mask[:, None]
        keys = queries
        if self.link:
            keys = torch.cat([past.detach(), queries], 1)
            mask = torch.cat([past_mask[:, None].expand(-1, size, -1), mask], 2)
        hidden: Tensor = self.norm(queries + self.within(queries, keys, mask))
        return hidden * segment.mask[:, :, None]

    def _update(
        self,
        slots: Float[Tensor, "G m D"],
        filled: Bool[Tensor, " G"],
        past: Float[Tensor, "G K D"],
        past_mask: Bool[Tensor, "G K"],
        hidden: Float[Tensor, "G S D"],
        mask: Bool[Tensor, "G S"],
    ) -> tuple[Float[Tensor, "G m D"], Bool[Tensor, " G"], Float[Tensor, " G"]]:
        """M after one more segment, whether it holds anything, and what that lost for the queries `hidden`."""
        if not self.end_to_end:
            slots, past = slots.detach(), past.detach()
        old = torch.cat([slots, past], 1)
        old_mask = torch.cat([filled[:, None].expand(-1, slots.shape[1]), past_mask], 1)
        new, filled = self.abstract(old), filled | past_mask.any(1)
        if not (self.training and self.reconstruction_weight):
            return new, filled, slots.new_zeros(len(slots))
        asked = hidden.detach()
        before = self.within(asked, old.detach(), old_mask[:, None], fixed=True)
        # f alone is trained, so what it is given is held fixed even where the log loss goes through it.
        kept = self.abstract(old.detach()) if self.end_to_end else new
        after = self.within(asked, kept, filled[:, None, None].expand(-1, 1, slots.shape[1]), fixed=True)
        error = (before - after).square().mean(2) * mask
        return new, filled, error.sum(1) / mask.sum(1).clamp(min=1)


class Attention(nn.Module):
    """softmax(Q K^T / sqrt(d)) V by heads, no biases; zero where there is nothing to attend to."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.W_q, self.W_k, self.W_v, self.W_o = (nn.Linear(dim, dim, bias=False) for _ in range(4))

    def forward(
        self,
        query: Float[Tensor, "G Q D"],
        key: Float[Tensor, "G K D"],
        mask: Bool[Tensor, "G J K"],
        fixed: bool = False,
    ) -> Float[Tensor, "G Q D"]:
        """Return what each query takes of `key`.

        Args:
            query: what asks.
            key: keys and values.
            mask: True where a query may look.
            fixed: keep the gradient from the weights.
        """
        num_histories, _, dim = query.shape
        weights = [layer.weight for layer in (self.W_q, self.W_k, self.W_v, self.W_o)]
        W_q, W_k, W_v, W_o = (weight.detach() for weight in weights) if fixed else weights
        queries, keys, values = (
            (rows @ W.T).view(num_histories, rows.shape[1], self.num_heads, dim // self.num_heads).transpose(1, 2)
            for rows, W in ((query, W_q), (key, W_k), (key, W_v))
        )
        share = softmax_over(queries @ keys.transpose(2, 3) / (dim // self.num_heads) ** 0.5, mask[:, None])
        return (share @ values).transpose(1, 2).flatten(2) @ W_o.T


class Routing(nn.Module):
    """f: dynamic routing of many capsules to `num_slots`, as of capsule networks; the formula is in `Dman`."""

    def __init__(self, dim: int, num_slots: int, num_rounds: int) -> None:
        super().__init__()
        self.num_slots, self.num_rounds = num_slots, num_rounds
        self.W = nn.Linear(dim, dim, bias=False)
        self.reference = nn.Parameter(torch.randn(num_slots, dim) / dim**0.5)

    def forward(self, capsules: Float[Tensor, "G K D"]) -> Float[Tensor, "G m D"]:
        """Return the slots, shorter than 1 each. Capsules of zeros count for nothing."""
        length = capsules.norm(dim=2, keepdim=True).clamp(min=1e-6)
        sent = self.W(capsules / length * capsules.shape[2] ** 0.5)
        agreement = sent @ self.reference.T
        slots: Tensor = sent[:, :0]
        for round_ in range(self.num_rounds):
            total = F.softmax(agreement, 2).transpose(1, 2) @ sent
            # The root of a zero has no gradient.
            square = total.square().sum(2, keepdim=True)
            slots = total * (square + 1e-12).sqrt() / (1 + square)
            if round_ + 1 < self.num_rounds:
                agreement = agreement + sent @ slots.transpose(1, 2)
        return slots
