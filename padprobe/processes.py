"""Helpers for several processes that train or score one network together."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._pytree import tree_leaves
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
    sampler = _sampler(loader)
    if not isinstance(sampler, DistributedSampler):
        return n
    positions = sampler.rank + sampler.num_replicas * torch.arange(start, start + n)
    return int((positions < len(sampler.dataset)).sum())  # type: ignore[arg-type]


def count_samples(loader: Any, batch: Any, start: int) -> int:
    """How many of a data loader's samples a batch holds. A sample may have several views in it.

    Args:
        loader: the data loader that the batch came from.
        batch: is asked if the loader does not know.
        start: how many samples of this loader the process saw before this batch.

    Example:
        >>> from torch.utils.data import DataLoader
        >>> loader = DataLoader(torch.zeros(5, 3, 8, 8), batch_size=3)
        >>> count_samples(loader, None, start=0), count_samples(loader, None, start=3)
        (3, 2)
        >>> count_samples([], {"image": torch.zeros(4, 3, 8, 8), "name": "abcd"}, start=0)
        4
    """
    size, sampler = getattr(loader, "batch_size", None), _sampler(loader)
    size = size or getattr(getattr(loader, "batch_sampler", None), "batch_size", None)
    if isinstance(size, int):
        with contextlib.suppress(TypeError):  # a stream has no length
            return min(size, len(sampler) - start)
    tensors = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, torch.Tensor) and leaf.ndim]
    return next((len(leaf) for leaf in sorted(tensors, key=lambda leaf: leaf.ndim < 4)), 0)  # images first


def _sampler(loader: Any) -> Any:
    return getattr(getattr(loader, "batch_sampler", None), "sampler", getattr(loader, "sampler", None))


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
    counts = [torch.zeros(1, dtype=torch.int64) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, torch.tensor([images]), group=_cpu_group())
    return [int(count) for count in counts]


def gather_objects(value: Any) -> list[Any]:
    """Each process's value, in the order of their ranks. All processes must call it.

    Example:
        >>> gather_objects("alone")
        ['alone']
    """
    if not several_processes():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=_cpu_group())
    return values


def _cpu_group() -> Any:
    """A process group over the CPU; None where the current one is."""
    if dist.get_backend() != "gloo" and dist.group.WORLD not in _cpu_groups:
        _cpu_groups.clear()  # groups of earlier runs
        _cpu_groups[dist.group.WORLD] = dist.new_group(backend="gloo")
    return _cpu_groups.get(dist.group.WORLD)


_cpu_groups: dict[Any, Any] = {}
"""A process group over the CPU for the current run's group."""
