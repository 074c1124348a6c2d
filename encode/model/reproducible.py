"""Same inputs, same bytes: what that asks of torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def reproducible(num_threads: int) -> Iterator[None]:
    """Run with deterministic algorithms on a fixed number of threads, and restore what was set before.

    Sums are taken in an order that depends on the number of threads, so it is a setting and not the number of cores.
    """
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(num_threads)
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic)
