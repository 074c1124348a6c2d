"""Two processes train the model that one trains, on the same global batches."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from encode.config import ClusteringConfig, ModelConfig, TrainingConfig
from encode.distributed import joined, place, sum_arrays, sum_gradients
from encode.errors import ConfigError
from encode.evaluate.reading import predict
from encode.evaluate.replay import make_replay
from encode.interests.clustered import Clustered
from encode.model.ctr import Reader, Tables
from encode.quality.tasks import load_task
from encode.train import fit

MODEL = ModelConfig(embedding_dim=12, category_dim=4, projected_dim=6, recent_length=8, hidden_dims=(16,), dropout=0.0)
TRAINING = TrainingConfig(num_epochs=2, patience=2, histories_per_batch=7, learning_rate=1e-3)


def trained(training=TRAINING):
    """Weights, validation metrics and predictions after two epochs on a small log."""
    torch.set_num_threads(1)
    task = load_task("planted", None, lambda line: None, quick=True)
    shown = {name: getattr(task, name) for name in ("train", "valid")}
    replays = {
        name: make_replay(task.histories, one.impressions, one.as_of, task.vocabulary, MODEL.recent_length)
        for name, one in shown.items()
    }
    torch.manual_seed(0)
    tables = Tables(MODEL, torch.from_numpy(task.vocabulary.category_index), task.vocabulary.num_categories)
    reader = Reader(MODEL, Clustered(MODEL, ClusteringConfig(num_clusters=4)))
    epochs = fit(tables, reader, replays["train"], replays["valid"], MODEL, training, lambda line: None)
    predicted = predict(tables.all_items(), reader, replays["valid"])
    return {"weights": {**tables.state_dict(), **reader.state_dict()}, "epochs": epochs, "predicted": predicted}


def test_two_processes_give_the_model_of_one(tmp_path):
    path = tmp_path / "found.pt"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", __file__, str(path)],
        check=True,
        env=environment,
        timeout=180,
    )
    alone = trained()
    for rank in (0, 1):
        found = torch.load(f"{path}-{rank}", weights_only=False)
        for name, value in alone["weights"].items():
            torch.testing.assert_close(found["weights"][name], value, atol=2e-4, rtol=2e-3, msg=name)
        np.testing.assert_allclose(found["predicted"], alone["predicted"], atol=1e-3)
        for epoch, expected in zip(found["epochs"], alone["epochs"], strict=True):
            assert epoch["loss"] == pytest.approx(expected["loss"], abs=1e-4)
            assert epoch["auxiliary"] == pytest.approx(expected["auxiliary"], rel=1e-2)
            assert epoch["triplet"] == pytest.approx(expected["triplet"], abs=1e-3)
            assert epoch["valid_auc"] == pytest.approx(expected["valid_auc"], abs=1e-3)


def test_a_rate_at_which_training_diverges_is_named():
    with pytest.raises(ConfigError, match=r"diverged in epoch 1 .*lower training.learning_rate, found 1e\+30"):
        trained(TRAINING.model_copy(update={"learning_rate": 1e30}))


def test_alone_there_is_nobody_to_wait_for():
    weight = torch.ones(2, requires_grad=True)
    with joined():
        assert place() == (0, 1)
        weight.sum().backward()
        sum_gradients([weight])
        assert weight.grad.tolist() == [1, 1]
        assert sum_arrays(np.ones(2)).tolist() == [1, 1]


if __name__ == "__main__":
    with joined():
        found = trained()
        torch.save(found, f"{sys.argv[1]}-{place()[0]}")
