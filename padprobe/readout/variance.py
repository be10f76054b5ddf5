"""Position without a readout: the share of the features' variance that position explains (ours, no training)."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torchmetrics import Metric

GROUPS = 10
"""Number of groups that the images are dealt into. Even groups are half A, odd ones half B; the interval leaves out one
group at a time."""


class PositionVariance(Metric):
    """Eta squared: how much of each channel's variance, over images and cells, the cell alone explains.

    The images are split into two halves, A and B. Let m_A and m_B be a channel's mean over each half, cell by cell,
    with the spatial mean subtracted. Then eta2 = mean_p(m_A m_B) / Var(f). The noise of the two means is independent,
    so the expected value is 0 where position explains nothing, however few images there are; single values may be
    slightly negative. For several channels, eta2 is the ratio of the sums. States are summed over batches and
    processes. The result does not depend on the batch size, nor, up to rounding, on the order of the images.

    Args:
        in_channels: number of channels, C.
        grid: side of the aligned features in cells.

    Source: ours; the paper reads position out with trained networks only (section 3.1).

    Example:
        >>> ramp = torch.linspace(0, 1, 8).expand(20, 1, 8, 8)  # position explains all of it
        >>> variance = PositionVariance(in_channels=1, grid=8)
        >>> variance.update(ramp, torch.arange(20))
        >>> round(variance.eta_squared().mean().item(), 3)
        1.0
    """

    full_state_update = False
    sums: Tensor
    squares: Tensor
    images: Tensor

    def __init__(self, in_channels: int, grid: int = 28) -> None:
        super().__init__()
        sums = torch.zeros(GROUPS, in_channels, grid, grid, dtype=torch.float64)
        self.add_state("sums", sums, dist_reduce_fx="sum")  # cell by cell
        self.add_state("squares", torch.zeros(GROUPS, in_channels, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("images", torch.zeros(GROUPS, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, features: Tensor, index: Tensor) -> None:
        """Adds images: features (B, C, grid, grid) and their indices in the data set (B,). Even images are half A."""
        for image, i in zip(features, index.tolist(), strict=True):
            group = i % GROUPS
            self.sums[group] += image
            self.squares[group] += image.flatten(1).square().sum(1, dtype=torch.float64)
            self.images[group] += 1

    def compute(self) -> dict[str, Tensor]:
        """The sums of each group."""
        return {"sums": self.sums, "squares": self.squares, "images": self.images}

    def signal(self) -> Tensor:
        """The position-signal map E[f(c, p)]: (C, grid, grid)."""
        state = self.compute()
        return state["sums"].sum(0) / state["images"].sum()

    def eta_squared(self, channels: slice = slice(None)) -> Tensor:
        """eta2 of some channels together, cell by cell: (grid, grid). The mean over cells is their eta2.

        It is 0 for constant channels.

        Raises:
            ValueError: if a half has no image.
        """
        halves, squares, images = self._halves(channels)
        if not images.all():
            raise ValueError(
                f"the two halves have {images.int().tolist()} images; expected at least one in each: use more images"
            )
        return _eta_squared(halves, squares, images)

    def interval(self, channels: slice = slice(None)) -> tuple[float, float]:
        """95% interval over images of some channels' eta2, by the jackknife over the groups; NaN below 20 images."""
        state = self.compute()
        if state["images"].min() < 2:
            return math.nan, math.nan
        halves, squares, images = self._halves(channels)
        value = _eta_squared(halves, squares, images).mean()
        without = []
        for group in range(GROUPS):
            fewer, count = halves.clone(), images.clone()
            fewer[group % 2] -= state["sums"][group, channels]
            count[group % 2] -= state["images"][group]
            without.append(_eta_squared(fewer, squares - state["squares"][group, channels], count).mean())
        spread = 1.96 * ((GROUPS - 1) * torch.stack(without).var(correction=0)).sqrt()
        return (value - spread).item(), (value + spread).item()

    def _halves(self, channels: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Sums of each half (2, C, grid, grid), sums of squares (C,), and images in each half (2,)."""
        state = self.compute()
        halves, images = (
            torch.stack([values[half::2].sum(0) for half in (0, 1)])
            for values in (state["sums"][:, channels], state["images"])
        )
        return halves, state["squares"][:, channels].sum(0), images


def _eta_squared(halves: Tensor, squares: Tensor, images: Tensor) -> Tensor:
    means = halves / images[:, None, None, None]
    means -= means.mean((2, 3), keepdim=True)
    center = halves.sum(0).mean((1, 2)) / images.sum()
    total = (squares / (images.sum() * halves.shape[-1] ** 2) - center.square()).clamp_min(0).sum()
    explained = (means[0] * means[1]).sum(0)
    return explained / total if total > 0 else torch.zeros_like(explained)
