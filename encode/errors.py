"""Everything ENCODE raises on purpose.

    EncodeError            retrying cannot help
    ├── ConfigError        edit the setting that the message names
    ├── DataError          fix the data that the message names
    ├── ArtifactError      an output is missing, half-written, damaged, or from another space
    └── QualityError       a model or a partition misses its gate

A message says where, what was found, what was expected, and the remedy. Network and storage errors are
not wrapped: they pass through, so that an orchestrator retries them.
"""


class EncodeError(Exception):
    """Base of all errors that a retry cannot cure."""


class ConfigError(EncodeError):
    """A setting is missing, unknown or out of range."""


class DataError(EncodeError):
    """Input data break the contract as a whole; single bad rows go to quarantine instead."""


class ArtifactError(EncodeError):
    """A stored output is missing, incomplete, damaged, or belongs to another space."""


class QualityError(EncodeError):
    """A gate is missed: nothing was published, what served before still serves."""
