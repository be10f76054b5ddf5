"""The order in which training images come."""

from __future__ import annotations

from collections.abc import Sized

import numpy as np
import torch
from torch.utils.data import RandomSampler


def seed_of(*numbers: int) -> int:
    """A random state's seed, of 32 bits, that depends on these numbers and their order alone."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


class ShuffleByEpoch(RandomSampler):
    """A random order that depends on the seed and the epoch alone, so that a resumed training goes on with it.

    Lightning calls ``set_epoch``; of several processes it takes a DistributedSampler instead. A data set that draws has
    a tensor ``epoch`` in shared memory, which this sets then, and not before, so that persistent workers see it too.
    """

    def __init__(self, dataset: Sized, seed: int) -> None:
        super().__init__(dataset, generator=torch.Generator().manual_seed(seed_of(seed, 0)))
        self.seed = seed

    def set_epoch(self, epoch: int) -> None:
        self.generator.manual_seed(seed_of(self.seed, epoch))
        if hasattr(self.data_source, "epoch"):
            self.data_source.epoch.fill_(epoch)
