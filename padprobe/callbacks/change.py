"""What a training has changed, measured by a small readout on a few images."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from padprobe.callbacks.online import finite_spearman
from padprobe.precision import full_float32
from padprobe.readout.posenet import conv_few
from padprobe.readout.ridge import LAMBDAS, inverse_deviation, shifted_gradients
from padprobe.scores import standard_ranks

FEW = 16
"""The most images of a training batch, in each process, that a change is measured on."""


class Change:
    """The SPC of the small readout on the latest batch, and how much it differs from that before the first step.

    Attributes:
        at_start: SPC before the first step and its standard error, (2, T); NaN if there were fewer than 4 images.
    """

    def __init__(self) -> None:
        self.at_start: Tensor | None = None
        self._latest: Tensor | None = None  # features of a few images of the latest training batch

    def keep(self, features: Tensor | None) -> None:
        """Keeps a few features (B, C, grid, grid) of a batch with 4 images or more. None: drops those that it has."""
        if features is not None and len(features) < 4:
            return
        if features is not None and len(features) > FEW:  # a slice would keep the memory of the whole batch
            features = features[:FEW].clone()
        self._latest = features

    def measure(self, trainer: Trainer, maps: Tensor) -> Tensor:
        """SPC on the latest batch and its standard error over the images of all processes: (2, T).

        NaN if no process has 4 images. The device is not waited for. All processes must call it.
        """
        sums = torch.zeros(3, len(maps), dtype=torch.float64, device=maps.device)
        if self._latest is not None:
            with full_float32(self._latest.device):
                scores = small_readout(self._latest, maps)
            sums = torch.stack([torch.ones_like(scores).sum(0), scores.sum(0), scores.square().sum(0)])
        count, total, squares = trainer.strategy.reduce(sums, reduce_op="sum")
        return mean_and_error(count, total, squares)

    def log(self, trainer: Trainer, module: LightningModule, maps: Tensor, keys: Sequence[str]) -> None:
        """Logs ``start``, ``change`` and ``change_se`` of each target under its key. All processes must call it."""
        if self.at_start is None:
            return
        now = self.measure(trainer, maps)
        if self.at_start[0].isnan().any() or now.isnan().any():
            return
        change, error = now[0] - self.at_start[0], (now[1].square() + self.at_start[1].square()).sqrt()
        for i, key in enumerate(keys):
            module.log(f"{key}/start", self.at_start[0, i], sync_dist=True)
            module.log(f"{key}/change", change[i], sync_dist=True)
            module.log(f"{key}/change_se", error[i], sync_dist=True)


def small_readout(features: Tensor, maps: Tensor) -> Tensor:
    """SPC of a small readout on a few images: (B, T). It never waits for the device.

    A 1 x 1 ridge readout is fitted on each half of the images and scored on the other half. The images are too few for
    a score to report, but the same measurement before and after a training shows what the training changed.
    ``features`` are (B, C, grid, grid), B at least 4; ``maps`` (T, H, W).

    Example:
        >>> maps = torch.linspace(0, 1, 28).expand(1, 28, 28)
        >>> features = torch.linspace(0, 1, 14).expand(8, 1, 14, 14)  # position itself
        >>> small_readout(features, maps).shape, bool(small_readout(features, maps).min() > 0.99)
        (torch.Size([8, 1]), True)
    """
    ranks, scores = standard_ranks(maps), []
    half = len(features) // 2  # neighbours, which may be views of one image, are mostly in one half
    for fitted, scored in ((features[:half], features[half:]), (features[half:], features[:half])):
        weight, bias = _fit_few(fitted, maps)
        small = conv_few(scored, weight[..., None, None], 0) + bias[:, None, None]
        prediction = F.interpolate(small, maps.shape[-2:], mode="bilinear")
        scores.append(finite_spearman(prediction, maps, ranks))
    return torch.cat(scores)


@torch.no_grad()
def _fit_few(features: Tensor, maps: Tensor) -> tuple[Tensor, Tensor]:
    """Weights (T, C) and biases (T,) of the 1 x 1 ridge readout of a few images (B, C, grid, grid).

    As :func:`~padprobe.readout.ridge.solve_by_gradients`, without its checks, and without reading any value: the last
    quarter of the images chooses the penalty, on the device.
    """
    cut = len(features) - max(len(features) // 4, 1)
    fitted, held = features[:cut].flatten(2), features[cut:].flatten(2)
    target = F.adaptive_avg_pool2d(maps, features.shape[-1]).flatten(1).double()  # (T, cells)
    level, n = target.mean(1), len(fitted) * fitted.shape[-1]
    mean = fitted.sum((0, 2), dtype=torch.float64) / n
    square = fitted.square().sum((0, 2), dtype=torch.float64) / n
    inverse_sd = inverse_deviation(mean, square)
    cross = (target - level[:, None]) @ fitted.sum(0, dtype=torch.float64).T / n * inverse_sd  # (T, C)

    def apply(vectors: Tensor) -> Tensor:
        """The correlation matrix of the features times vectors (T, C)."""
        raw = vectors * inverse_sd
        prediction = raw.float() @ fitted - (raw @ mean).float()[:, None]  # (B, T, cells)
        product = (prediction @ fitted.mT).sum(0, dtype=torch.float64)
        return (product - prediction.sum((0, 2), dtype=torch.float64)[:, None] * mean) * inverse_sd / n

    low, high = math.log10(LAMBDAS[0]), math.log10(LAMBDAS[-1])  # a list of numbers would be copied to the device
    penalties = torch.logspace(low, high, len(LAMBDAS), dtype=torch.float64, device=features.device)
    weight = shifted_gradients(apply, cross, penalties, 15) * inverse_sd  # (T, L, C)
    bias = level[:, None] - weight @ mean
    prediction = weight.float().flatten(0, 1) @ held  # (B, T * L, cells)
    error = prediction.unflatten(1, bias.shape) + bias[..., None] - target[:, None]
    best = error.square().sum((0, 3)).argmin(1)[:, None]  # (T, 1)
    chosen = weight.take_along_dim(best[..., None], 1)[:, 0]
    return chosen.float(), bias.take_along_dim(best, 1)[:, 0].float()


def mean_and_error(count: Tensor, total: Tensor, squares: Tensor) -> Tensor:
    """The mean and its standard error, (2, ...), from the number of values, their sum and the sum of their squares.

    Example:
        >>> values = torch.tensor([1.0, 2.0, 3.0])
        >>> mean_and_error(torch.tensor(3.0), values.sum(), values.square().sum())
        tensor([2.0000, 0.5774])
    """
    mean = total / count
    variance = (squares / count - mean.square()).clamp_min(0) * count / (count - 1)
    return torch.stack([mean, (variance / count).sqrt()])
