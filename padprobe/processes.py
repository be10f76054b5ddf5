"""Helpers for several processes that train or score one network together."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import DistributedSampler


def count_new(loader: Any, start: int, n: int) -> int:
    """How many of a batch's images no process has scored before.

    A DistributedSampler repeats some images at the end of the data set, so that all processes get equally many. The
    repeated images come last in a batch.

    Args:
        loader: the data loader that the batch came from.
        start: how many images of this loader the process saw before this batch.
        n: images in the batch.

    Example:
        >>> from torch.utils.data import DataLoader, DistributedSampler
        >>> images = torch.zeros(5, 3, 8, 8)
        >>> second = DistributedSampler(images, num_replicas=2, rank=1, shuffle=False)
        >>> count_new(DataLoader(images, 3, sampler=second), start=0, n=3)  # images 1, 3 and again 0
        2
    """
    sampler = getattr(getattr(loader, "batch_sampler", None), "sampler", getattr(loader, "sampler", None))
    if not isinstance(sampler, DistributedSampler):
        return n
    positions = sampler.rank + sampler.num_replicas * torch.arange(start, start + n)
    return int((positions < len(sampler.dataset)).sum())  # type: ignore[arg-type]


def several_processes() -> bool:
    """Whether this process is one of several that train together.

    Example:
        >>> several_processes()
        False
    """
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def images_per_process(images: int) -> list[int]:
    """How many images each process has, in the order of their ranks. All processes must call it.

    The numbers travel between CPUs, so that no process waits for its GPU.

    Args:
        images: how many this process has.
    """
    if dist.get_backend() != "gloo" and dist.group.WORLD not in _cpu_groups:
        _cpu_groups.clear()  # groups of earlier runs
        _cpu_groups[dist.group.WORLD] = dist.new_group(backend="gloo")
    counts = [torch.zeros(1, dtype=torch.int64) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, torch.tensor([images]), group=_cpu_groups.get(dist.group.WORLD))
    return [int(count) for count in counts]


_cpu_groups: dict[Any, Any] = {}
"""A process group over the CPU for the current run's group."""
