"""ENCODE: long-term user interest, from behavior log to served probability.

Read `encode.steps` first: it names the steps in the order the data moves.
"""

import os

# Threads of torch spin while they wait for each other. On a machine with other work that made an update thirty times
# slower; asleep they cost little. Read once, when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

__version__ = "0.1.0"
