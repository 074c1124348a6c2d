"""Monitoring: how old what serves is, how far it has moved, and how its scores fare."""
