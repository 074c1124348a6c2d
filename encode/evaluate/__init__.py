"""Evaluation: impressions replayed against the user state that serving would have had, and the metrics."""
