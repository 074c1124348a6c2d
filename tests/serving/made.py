"""A small release made by hand: a space, a model, snapshots of drawn histories; and a registry that a test moves."""

from __future__ import annotations

import asyncio
import time
from datetime import date

import httpx
import numpy as np
import pyarrow as pa
import torch

from encode.config import ClusteringConfig, ModelConfig, Places
from encode.data.histories import history_batch, to_histories
from encode.data.vocabulary import Vocabulary
from encode.interests.extract import extract, state_of
from encode.interests.snapshots import folder_of, snapshot_bytes, snapshot_file, write_space
from encode.model.ctr import Encode, Reader, Tables
from encode.model.files import ModelCard, model_digest, model_files
from encode.model.space import Space, SpaceConfig, space_of
from encode.outputs import write_output
from encode.pointers import publish, read_pointer
from encode.registry import Version
from encode.schema import BEHAVIORS, SECONDS_PER_DAY, day_start
from encode.serving.bundle import load_bundle
from encode.storage import open_storage

MODEL = ModelConfig(
    embedding_dim=8, category_dim=2, projected_dim=4, recent_length=6, hidden_dims=(16,), num_remembered=20
)
"""Users have more items than are remembered."""
ITEMS = np.arange(10, 50)
VOCABULARY = Vocabulary(np.array([1, 2, 3]), ITEMS, 1 + ITEMS % 3)
SETTINGS = SpaceConfig(ClusteringConfig(num_clusters=4), MODEL.pooling, MODEL.recent_length, MODEL.num_remembered)
START, AS_OF, END = date(2024, 3, 1), date(2024, 3, 11), date(2024, 3, 12)
UNKNOWN_USER = 999


MEASURED = {
    "auc": 0.8,
    "gauc": 0.7,
    "auc_first_time": 0.7,
    "logloss": 0.3,
    "calibration": 1.1,
    "coverage": 0.95,
    "parity": 1e-6,
    "latency_ms": 5.0,
    "size_mb": 30.0,
}
"""What a release measures that passes its gates."""


def draw_space(num_items, num_categories, num_clusters, embedding_dim=6, projected_dim=4):
    """A space whose embeddings are drawn, items from 1 on, each of the next category."""
    rng, items = np.random.default_rng(0), np.arange(num_items)
    vocabulary = Vocabulary(np.arange(1, num_categories + 1), 1 + items, 1 + items % num_categories)
    embedding = rng.normal(size=(len(vocabulary), embedding_dim)).astype(np.float32)
    key = embedding[:, :projected_dim] / np.linalg.norm(embedding[:, :projected_dim], axis=1, keepdims=True)
    config = SpaceConfig(ClusteringConfig(num_clusters=num_clusters), "relevance", 5, 50)
    return Space(config, vocabulary, embedding, key, np.zeros((embedding_dim, projected_dim), np.float32), 8.0)


def make_model(seed):
    """A space and a model with weights large enough that a history shows, and the model's files."""
    torch.manual_seed(seed)
    tables = Tables(MODEL, torch.from_numpy(VOCABULARY.category_index), VOCABULARY.num_categories)
    reader = Reader(MODEL, Encode(MODEL)).eval()
    with torch.no_grad():
        tables.item.weight[1:] *= 20
        tables.category.weight[1:] *= 20
    space = space_of(tables, reader, VOCABULARY, SETTINGS)
    card = ModelCard(model=MODEL, space=space.id, as_of=AS_OF, first_day=START, test_days=1, metrics={})
    targets = torch.arange(1, 9)[None]
    return space, reader, model_files(card, reader, space.items, [state_of(None, space)], targets, {})


def draw_histories():
    """12 users over 11 days; the last has behaviors on the last day only. Some items are outside the vocabulary."""
    rng = np.random.default_rng(0)
    users = rng.integers(1, 13, 900)
    items = rng.integers(1, 60, 900)
    times = day_start(START) + np.sort(rng.choice(11 * SECONDS_PER_DAY, 900, replace=False))
    kept = (users != 12) | (times >= day_start(AS_OF))
    columns = [
        users[kept],
        items[kept],
        1 + items[kept] % 4,
        pa.array(["pv"] * kept.sum()).dictionary_encode(),
        times[kept],
    ]
    return to_histories(
        pa.table([pa.array(c, f.type) for c, f in zip(columns, BEHAVIORS, strict=True)], schema=BEHAVIORS)
    )


SPACE, READER, FILES = make_model(0)
HISTORIES = draw_histories()


def refresh(storage, as_of=AS_OF, space=SPACE, name="made"):
    """Publish a snapshot of the histories before a day, as one file made in one go."""
    known = HISTORIES.before(day_start(as_of))
    rows = pa.Table.from_batches([extract(history_batch(known, np.arange(len(known))), space)])
    snapshot = f"{as_of:%Y%m%d}-{name}"
    found = read_pointer(storage, folder_of(space.id))
    manifest = write_output(
        storage,
        f"{folder_of(space.id)}/{snapshot}",
        {snapshot_file(0): snapshot_bytes(rows.schema, rows.to_batches())},
        kind="interests",
        fingerprint=f"{as_of} {name}",
        config={"num_buckets": 1},
        inputs={},
        counts={"users": len(rows)},
        details={"as_of": str(as_of), "space": space.id},
    )
    return publish(storage, folder_of(space.id), snapshot, manifest, found[0] if found else None)


def make_bundle(folder):
    """A bundle of the first model with a snapshot, in a store of its own below a folder."""
    storage = open_storage(Places(store=str(folder / "store")))
    write_space(storage, SPACE, {})
    refresh(storage)
    return load_bundle(storage, FILES, "1", folder / "cache")


class OneVersion:
    """Stands for MLflow: an alias that the test moves."""

    def __init__(self):
        self.number, self.challenger, self.held, self.tags = None, None, {}, {}

    def release(self, number, files, space):
        self.held[number] = files, space
        self.number = number

    def by_alias(self, alias):
        number = self.challenger if alias == "challenger" else self.number
        if number is None:
            return None
        files, space = self.held[number]
        return Version(number, space.id, model_digest(files), self.tags)

    def files(self, version):
        return self.held[version.number][0]


class Client:
    """Asks an application without a socket; as a context it starts and stops it, too."""

    def __init__(self, app):
        self.app = app

    def __enter__(self):
        self._loop = asyncio.new_event_loop()
        self._running = self.app.router.lifespan_context(self.app)
        self._loop.run_until_complete(self._running.__aenter__())
        return self

    def __exit__(self, *_error):
        self._loop.run_until_complete(self._running.__aexit__(None, None, None))
        self._loop.close()

    def request(self, method, path, **options):
        async def ask():
            transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://serving") as client:
                return await client.request(method, path, **options)

        return asyncio.run(ask())

    def get(self, path, **options):
        return self.request("GET", path, **options)

    def post(self, path, **options):
        return self.request("POST", path, **options)


def wait(client, reached):
    for _ in range(6_000):  # the first load of all compiles the kernels
        state = client.get("/v1/release").json()
        if reached(state):
            return state
        time.sleep(0.01)
    raise AssertionError(f"still {state} after a minute")


def arrow_stream(columns, user="1", types=None, batches=1, codec=None, recent=None):
    """An Arrow stream of columns by name, as bytes."""
    told, types = {"user_id": user, "recent": recent}, types or pa.int64()
    schema = pa.schema([(name, types) for name in columns], {key: one for key, one in told.items() if one is not None})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, schema, options=pa.ipc.IpcWriteOptions(compression=codec)) as writer:
        for _ in range(batches):
            writer.write_batch(pa.record_batch([pa.array(c, types) for c in columns.values()], schema=schema))
    return sink.getvalue().to_pybytes()


def release_another(client, storage, registry):
    """Let version 2, another model in a space of its own, take the place of version 1; return the space."""
    space, _, files = make_model(1)
    write_space(storage, space, {})
    refresh(storage, space=space)
    registry.release("2", files, space)
    client.post("/v1/release/reload")
    wait(client, lambda state: state["bundle"]["model_version"] == "2")
    return space


def score(client, user_id=1, item_ids=(10, 11, 12), **more):
    answer = client.post("/v1/score", json={"user_id": user_id, "item_ids": list(item_ids), **more})
    assert answer.status_code == 200, answer.text
    return answer.json()
