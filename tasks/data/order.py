"""The order in which training images come."""

from __future__ import annotations

from collections.abc import Sized

import numpy as np
import torch
from torch.utils.data import RandomSampler


class ShuffleByEpoch(RandomSampler):
    """A random order that depends on the seed and the epoch alone, so that a resumed training goes on with it.

    Lightning calls ``set_epoch``; of several processes it takes a DistributedSampler instead.
    """

    def __init__(self, dataset: Sized, seed: int) -> None:
        super().__init__(dataset, generator=torch.Generator())
        self.seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        self.generator.manual_seed(int(np.random.SeedSequence([self.seed, epoch]).generate_state(1)[0]))
