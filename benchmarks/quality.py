"""Quality of every model of long-term interest on the same data: `encode bench quality`, as a module.

    python -m benchmarks.quality [--json] [--quick] [--data TASK ...] [--models MODEL ...] [--seeds N] [--out DIR]

See `--help` for tasks, models and their switches. The whole bench (three tasks, all models and ablations, five seeds)
is sized to about six hours on two cores; it can be stopped at any time and goes on where it was.
"""

from __future__ import annotations

import argparse
import sys

from encode.errors import ConfigError, EncodeError
from encode.quality.command import add_options, run


def main() -> int:
    """Run the bench; return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add_options(parser)
    try:
        run(parser.parse_args())
    except EncodeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    except KeyboardInterrupt:
        print("interrupted; what is finished is kept, run again to go on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
