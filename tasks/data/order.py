"""The order of training images, reproducible from a seed."""

from __future__ import annotations

from collections.abc import Sized

import numpy as np
import torch
from torch.utils.data import RandomSampler


def seed_of(*numbers: int) -> int:
    """A 32-bit seed that depends only on these numbers and their order.

    Example:
        >>> seed_of(0, 1) == seed_of(0, 1), seed_of(0, 1) == seed_of(1, 0)
        (True, False)
    """
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


class ShuffleByEpoch(RandomSampler):
    """A random order that depends only on the seed and the epoch, so that a resumed training continues with it.

    Lightning calls ``set_epoch`` before each epoch; with several processes it uses a DistributedSampler instead. A data
    set's tensor ``epoch``, in shared memory, tells persistent workers the epoch.

    Example:
        >>> sampler = ShuffleByEpoch(range(100), seed=0)
        >>> sampler.set_epoch(2)
        >>> order = list(sampler)
        >>> sampler.set_epoch(2)
        >>> list(sampler) == order
        True
    """

    def __init__(self, dataset: Sized, seed: int) -> None:
        super().__init__(dataset, generator=torch.Generator().manual_seed(seed_of(seed, 0)))
        self.seed = seed

    def set_epoch(self, epoch: int) -> None:
        self.generator.manual_seed(seed_of(self.seed, epoch))
        if hasattr(self.data_source, "epoch"):
            self.data_source.epoch.fill_(epoch)
