"""`encode serve`, but the champion's bundle scores by a model that reads whole histories.

    python -m benchmarks.whole_history MODEL --workdir FOLDER --histories FOLDER --cache FOLDER --port N

HTTP, parsing, candidates, recent behaviors and MLP are those of the real server; only the long-term model differs. What
it keeps of a user is what it can: SDIM its buckets, computed beforehand; the others the history, mapped from disk as
vocabulary indices, whose embeddings are gathered within the request.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, fields
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from fastapi import Request

from encode.config import Places, RegistryConfig
from encode.model.ctr import Reader, Recent, User
from encode.model.long_term import History, LongTerm, Sizes, Target
from encode.quality.rivals import eta, sim
from encode.quality.rivals.attention import FullAttention
from encode.quality.rivals.eta import Eta
from encode.quality.rivals.sdim import Sdim
from encode.quality.rivals.sim import SimHard, SimSoft
from encode.schema import PADDING
from encode.serving.app import create_app
from encode.serving.bundle import Asked, Bundle, Found, Scored
from encode.serving.scoring import Scorer
from encode.serving.server import serve


def any_top(score: torch.Tensor, mask: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what `top_behaviors` does, but any of equals and in any order: to sort out ties takes most of its time."""
    best, places = score.masked_fill_(~mask[:, None], float("-inf")).topk(min(k, score.shape[2]), sorted=False)
    return places, best > float("-inf")


async def on_the_event_loop(scorer: Scorer, request: Request, bundle: Bundle, asked: Asked) -> Scored:
    """Score as `score_soon` does, but never on another thread: PyTorch's calls would hand the GIL to and fro."""
    return scorer.score(request, bundle, asked)


MODELS: dict[str, type[LongTerm]] = {
    "full_attention": FullAttention,
    "sim_hard": SimHard,
    "sim_soft": SimSoft,
    "eta": Eta,
    "sdim": Sdim,
}


@dataclass(frozen=True, kw_only=True)
class WholeHistories(Bundle):
    """A bundle with another model, weights as drawn, and histories."""

    rival: Reader
    histories: Mapping[int, np.ndarray]
    """Vocabulary indices by user."""
    kept: Mapping[int, User]
    """What does not depend on the target, where the model keeps that."""

    def look_up(self, asked: Asked) -> Found:
        """Return who the user is, beside the recent behaviors; only users with a history here can be asked for."""
        found = super().look_up(asked)
        return found._replace(user=(asked.user_id, found.user.recent))

    @torch.inference_mode()
    def compute(self, found: Found) -> np.ndarray:
        """Return the probability of each candidate by the other model."""
        user_id, latest = found.user
        items, target, latest = self.space.items, torch.from_numpy(found.target)[None], torch.from_numpy(latest)[None]
        recently = Recent(
            items.embedding[latest], items.key[latest], latest != PADDING, torch.zeros_like(target).squeeze(0)
        )
        user = self.kept.get(user_id) or summarised(self.rival, self, user_id)
        logit = self.rival(
            user, recently, Target(items.embedding[target], items.key[target], target, items.category[target])
        )
        return logit.sigmoid().numpy()


def summarised(reader: Reader, bundle: WholeHistories, user_id: int) -> User:
    """Return what the model makes of a user's history: gathered, then read."""
    items, index = bundle.space.items, torch.from_numpy(np.array(bundle.histories[user_id]))[None]
    nothing = torch.zeros_like(index)
    age = torch.arange(index.shape[1], 0, -1, dtype=torch.float32)[None] / 24
    history = History(
        items.embedding[index],
        items.key[index],
        index != PADDING,
        index,
        items.category[index],
        nothing,
        age,
        nothing,
        torch.tensor(bundle.space.scale),
    )
    return reader.summarise(history)


def with_model(bundle: Bundle, name: str, folder: Path) -> WholeHistories:
    """Return the bundle with another model and the histories of `folder`, a file a user."""
    vocabulary, model = bundle.space.vocabulary, bundle.card.model
    sizes = Sizes(len(vocabulary), vocabulary.num_categories, 1, model.embedding_dim, model.projected_dim)
    torch.manual_seed(0)
    reader = Reader(model, MODELS[name](sizes)).eval()
    histories = {int(path.stem): np.load(path, mmap_mode="r") for path in folder.glob("*.npy")}
    kept: dict[int, User] = {}
    parts = {field.name: getattr(bundle, field.name) for field in fields(Bundle)}
    made = WholeHistories(**parts, rival=reader, histories=histories, kept=kept)
    if reader.long_term.target_free:
        with torch.inference_mode():
            kept |= {user: summarised(reader, made, user) for user in histories}
    return made


def main() -> None:
    """Serve until SIGTERM."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", choices=MODELS)
    for name in ("--workdir", "--histories", "--cache"):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument("--port", type=int, required=True)
    options = parser.parse_args()
    app = create_app(Places.in_folder(options.workdir), RegistryConfig(), options.cache, seconds=3600)
    follower = app.state.follower
    follower.look()  # what it finds later is the same release: then it leaves the bundle as it is
    follower.bundle = with_model(follower.bundle, options.model, options.histories)
    with ExitStack() as patches:
        for module in (sim, eta):
            patches.enter_context(patch.object(module, "top_behaviors", any_top))
        patches.enter_context(patch.object(Scorer, "score_soon", on_the_event_loop))
        serve(app, "127.0.0.1", options.port, 0, 1)


if __name__ == "__main__":
    main()
