"""Position without any readout: the share of the features' variance that position explains (ours, no training)."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric


class PositionVariance(Metric):
    """How much of each channel's variance over images and cells is explained by the cell alone: eta squared.

    The images are split into two halves, A and B. With m_A and m_B a channel's mean over each half cell by cell,
    spatially centred, eta2 = mean_p(m_A m_B) / Var(f): the noise of the two means is independent, so that the expected
    value is 0 where position explains nothing, however few images there are (single values may be slightly negative).
    Of several channels, eta2 is the ratio of the sums. Streaming; states sum across processes; the result depends
    neither on the batch size nor, but for rounding, on the order of the images.

    Args:
        in_channels: C.
        grid: side of the aligned features in cells.

    Source: this measure is ours; the paper reads position out with trained networks only (section 3.1).
    """

    full_state_update = False
    sums: Tensor
    squares: Tensor
    images: Tensor

    def __init__(self, in_channels: int, grid: int = 28) -> None:
        super().__init__()
        self.cells = grid * grid
        zeros = torch.zeros(2, in_channels, grid, grid, dtype=torch.float64)
        self.add_state("sums", zeros, dist_reduce_fx="sum")  # of each half, cell by cell
        self.add_state("squares", torch.zeros(in_channels, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("images", torch.zeros(2, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, features: Tensor, half: Tensor) -> None:
        """Adds images: features (B, C, grid, grid), and the half, 0 or 1, that each belongs to: (B,)."""
        for image, which in zip(features, half.tolist(), strict=True):
            self.sums[which] += image
            self.squares += image.flatten(1).square().sum(1, dtype=torch.float64)
            self.images[which] += 1

    def compute(self) -> tuple[Tensor, Tensor, Tensor]:
        """What position explains, and the map of it.

        Returns:
            ``explained``: (C, grid, grid), the product m_A m_B of each channel and cell; its spatial mean is the
            variance that position explains. ``variance``: (C,), each channel's whole variance. ``signal``: (C, grid,
            grid), E[f(c, p)] over all images.

        Raises:
            ValueError: where a half has no image.
        """
        if not self.images.all():
            raise ValueError(
                f"the two halves have {self.images.int().tolist()} images; expected one or more in each: use more"
            )
        means = self.sums / self.images[:, None, None, None]
        means -= means.mean((2, 3), keepdim=True)
        signal = self.sums.sum(0) / self.images.sum()
        variance = self.squares / (self.images.sum() * self.cells) - signal.mean((1, 2)).square()
        return means[0] * means[1], variance.clamp_min(0), signal


def eta_squared(explained: Tensor, variance: Tensor) -> Tensor:
    """eta2 of some channels together, cell by cell: ``explained`` (C, grid, grid), ``variance`` (C,) -> (grid, grid).

    The mean over cells is their eta2; 0 where the channels are constant.
    """
    total = variance.sum()
    return explained.sum(0) / total if total > 0 else torch.zeros_like(explained[0])
