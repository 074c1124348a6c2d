"""The same model for MLflow's own tools: `mlflow models serve`, `mlflow.pyfunc.load_model`, batch scoring.

It scores exactly as the serving process does, because both call `Bundle.score`. The model artifact holds no
interests: they are fetched from the store when the model is loaded.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from mlflow.pyfunc import PythonModel, PythonModelContext

from encode.config import Places
from encode.model.files import MODEL_FILES
from encode.serving.bundle import Asked, Bundle, load_bundle
from encode.storage import open_storage


class ScoringModel(PythonModel):  # type: ignore[misc]
    """`user_id`, `item_id` in, `probability` out, a row each."""

    def load_context(self, context: PythonModelContext) -> None:
        """Load the bundle: model files from the artifact, space and snapshot from the store.

        The store is ENCODE_STORE, else the one that the model was registered with; credentials come from the
        environment, as for any S3 client. Fetched files are mapped and have no name any more: what holds users goes
        with the process.
        """
        settings = dict(context.model_config or {})
        defaults = {
            "ENCODE_STORE": settings.get("store") or "",
            "AWS_ENDPOINT_URL": settings.get("endpoint_url") or "",
        }
        places = Places.from_environment({name: value for name, value in defaults.items() if value} | dict(os.environ))
        folder = Path(context.artifacts["model"])
        files = {name: (folder / name).read_bytes() for name in MODEL_FILES}
        with tempfile.TemporaryDirectory(prefix="encode-") as cache:
            self.bundle: Bundle = load_bundle(open_storage(places, writing=False), files, "pyfunc", Path(cache))

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        """Score each row; rows of one user are scored together."""
        users = model_input["user_id"].to_numpy()
        items = model_input["item_id"].to_numpy()
        probabilities = np.zeros(len(users))
        for user in np.unique(users):
            rows = np.flatnonzero(users == user)
            probabilities[rows] = self.bundle.score(Asked(int(user), items[rows])).probabilities
        return pd.DataFrame({"probability": probabilities})
