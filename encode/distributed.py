"""Training on several processes, as torchrun starts them: each takes its share of every batch, gradients are summed.

    torchrun --nproc-per-node 4 --no-python encode train --preset ... --as-of ...

The model is the one that a single process would train on the same batches, but for the order of sums, and for dropout,
which each process draws for itself.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

_Float = TypeVar("_Float", np.float32, np.float64)


@contextmanager
def joined() -> Iterator[None]:
    """Join the processes that torchrun started with this one; alone there is nothing to join."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    dist.init_process_group("gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def place() -> tuple[int, int]:
    """Return which process this is, from 0 on, and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def sum_gradients(parameters: Iterable[torch.Tensor]) -> None:
    """Add up the gradients of all processes, dense ones in one message; sparse ones by row."""
    if not dist.is_initialized():
        return
    dense = []
    for parameter in parameters:
        if parameter.grad is not None and parameter.grad.is_sparse:
            total = parameter.grad.coalesce()
            dist.all_reduce(total)
            parameter.grad = total
        else:
            dense.append(parameter)
    for parameter in dense:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    flat = torch.cat([parameter.grad.flatten() for parameter in dense if parameter.grad is not None])
    dist.all_reduce(flat)
    parts = torch.split(flat, [parameter.numel() for parameter in dense])
    for parameter, part in zip(dense, parts, strict=True):
        parameter.grad = part.view_as(parameter)


def sum_arrays(array: npt.NDArray[_Float]) -> npt.NDArray[_Float]:
    """Return the sum of an array over all processes."""
    if dist.is_initialized():
        array = array.copy()
        dist.all_reduce(torch.from_numpy(array))
    return array
