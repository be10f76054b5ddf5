"""Several processes that train or score together."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import DistributedSampler


def count_new(loader: Any, start: int, n: int) -> int:
    """How many of a batch's n images, the first of them this process's ``start``-th, no process has scored before.

    A DistributedSampler repeats some images at the end, so that all processes have as many; they come last in a batch.
    """
    sampler = getattr(getattr(loader, "batch_sampler", None), "sampler", getattr(loader, "sampler", None))
    if not isinstance(sampler, DistributedSampler):
        return n
    places = sampler.rank + sampler.num_replicas * torch.arange(start, start + n)
    return int((places < len(sampler.dataset)).sum())  # type: ignore[arg-type]


def several_processes() -> bool:
    """Whether this process is one of several that train together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def shares(images: int) -> list[int]:
    """How many images each process has; told over the CPU, so that nobody waits for a device."""
    if dist.get_backend() != "gloo" and dist.group.WORLD not in _OVER_CPU:
        _OVER_CPU.clear()  # those of a run that has ended
        _OVER_CPU[dist.group.WORLD] = dist.new_group(backend="gloo")
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, torch.tensor([images]), group=_OVER_CPU.get(dist.group.WORLD))
    return [int(size) for size in sizes]


_OVER_CPU: dict[Any, Any] = {}
