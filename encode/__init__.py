"""ENCODE: long-term user interest, from behavior log to served probability.

Read `encode.steps` first: it names the steps in the order the data moves.
"""

__version__ = "0.1.0"
