"""Serving: from an MLflow alias to probabilities over HTTP, without executing anything that was stored."""
