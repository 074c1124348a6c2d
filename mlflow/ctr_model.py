"""The model from code that `encode.registry` logs: nothing is pickled, MLflow runs this file to make the model."""

import mlflow

from encode.serving.pyfunc import ScoringModel

mlflow.models.set_model(ScoringModel())
