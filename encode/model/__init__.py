"""The space and the CTR model: one relevance from training to serving."""
