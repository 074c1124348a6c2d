"""From a raw log to validated behaviors and per-user histories."""
