"""Position without a readout: the share of the features' variance that position explains (ours, no training)."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torchmetrics import Metric

from padprobe.results import t_quantile

GROUPS = 10
"""Number of blocks of neighbouring images. The interval leaves out one block at a time."""


class PositionVariance(Metric):
    """Eta squared: how much of each channel's variance, over images and cells, the cell alone explains.

    The data set is cut into ten blocks of neighbouring images. Let m_g be a channel's mean over block g, cell by cell,
    with the spatial mean subtracted. Then eta2 = mean_p(m_g m_h) / Var(f), averaged over the pairs of blocks g, h that
    are not neighbours. Images of two such blocks are independent, also where the data set holds copies of an image or
    the frames of a video one after the other, as long as no such run is longer than a block. So the expected value is 0
    where position explains nothing, however few images there are; single values may be slightly negative. For several
    channels, eta2 is the ratio of the sums. States are summed over batches and processes. The result does not depend on
    the batch size nor, up to rounding, on the order in which images are added.

    Args:
        in_channels: number of channels, C.
        grid: side of the aligned features in cells.
        images: number of images in the data set.

    Source: ours; the paper reads position out with trained networks only (section 3.1).

    Example:
        >>> ramp = torch.linspace(0, 1, 8).expand(20, 1, 8, 8)  # position explains all of it
        >>> variance = PositionVariance(in_channels=1, grid=8, images=20)
        >>> variance.update(ramp, torch.arange(20))
        >>> round(variance.eta_squared().mean().item(), 3)
        1.0
    """

    full_state_update = False
    sums: Tensor
    squares: Tensor
    images: Tensor

    def __init__(self, in_channels: int, grid: int = 28, *, images: int) -> None:
        super().__init__()
        self.length = images
        sums = torch.zeros(GROUPS, in_channels, grid, grid, dtype=torch.float64)
        self.add_state("sums", sums, dist_reduce_fx="sum")  # cell by cell
        self.add_state("squares", torch.zeros(GROUPS, in_channels, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("images", torch.zeros(GROUPS, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, features: Tensor, index: Tensor) -> None:
        """Adds images: features (B, C, grid, grid) and their indices in the data set (B,)."""
        for image, i in zip(features, index.tolist(), strict=True):
            group = i * GROUPS // self.length
            self.sums[group] += image
            self.squares[group] += torch.linalg.vector_norm(image.flatten(1), dim=1, dtype=torch.float64).square()
            self.images[group] += 1

    def compute(self) -> dict[str, Tensor]:
        """The sums of each block."""
        return {"sums": self.sums, "squares": self.squares, "images": self.images}

    def signal(self) -> Tensor:
        """The position-signal map E[f(c, p)]: (C, grid, grid)."""
        state = self.compute()
        return state["sums"].sum(0) / state["images"].sum()

    def eta_squared(self, channels: slice = slice(None)) -> Tensor:
        """eta2 of some channels together, cell by cell: (grid, grid). The mean over cells is their eta2.

        It is 0 for constant channels.

        Raises:
            ValueError: if no two blocks that are not neighbours have an image.
        """
        means, pairs = self._blocks(channels)
        if not pairs.any():
            raise ValueError(
                f"the blocks have {self.compute()['images'].int().tolist()} images; expected images in two blocks that "
                "are not neighbours: use more images"
            )
        partners = torch.einsum("gh,hcyx->gcyx", pairs, means)
        total = self._total(channels, torch.ones_like(pairs[0]))
        explained = (means * partners).sum((0, 1)) / pairs.sum()
        return explained / total if total > 0 else torch.zeros_like(explained)

    def interval(self, channels: slice = slice(None)) -> tuple[float, float]:
        """95% interval over images of some channels' eta2, by the jackknife over the blocks; NaN below 10 images.

        Where position explains less than about 0.05, the interval is wider than it need be: it holds the true value
        more often than it says.
        """
        means, pairs = self._blocks(channels)
        if not self.compute()["images"].all():
            return math.nan, math.nan
        products = torch.einsum("gcyx,hcyx->gh", means, means) / means[0, 0].numel()

        def value(kept: Tensor) -> Tensor:
            chosen, total = pairs * kept * kept[:, None], self._total(channels, kept)
            return (products * chosen).sum() / chosen.sum() / total if total > 0 else torch.zeros_like(total)

        without = torch.stack([value(kept) for kept in 1 - torch.eye(GROUPS).to(pairs)])
        spread = t_quantile(GROUPS - 1) * ((GROUPS - 1) * without.var(correction=0)).sqrt()
        center = value(torch.ones_like(pairs[0]))
        return (center - spread).item(), (center + spread).item()

    def _blocks(self, channels: slice) -> tuple[Tensor, Tensor]:
        """The centered means of the blocks, (G, C, grid, grid), and which pairs of blocks count, (G, G), 0 or 1."""
        state = self.compute()
        sums, images = state["sums"][:, channels], state["images"]
        means = sums / images.clamp_min(1)[:, None, None, None]
        block, present = torch.arange(GROUPS, device=images.device), images > 0
        apart = (block - block[:, None]).abs() > 1
        return means - means.mean((2, 3), keepdim=True), (apart & present & present[:, None]).double()

    def _total(self, channels: slice, kept: Tensor) -> Tensor:
        """The channels' variance over images and cells of the blocks that are kept, (G,) of 0 or 1: a number."""
        state = self.compute()
        sums, squares, images = state["sums"][:, channels], state["squares"][:, channels], kept @ state["images"]
        mean = kept @ sums.mean((2, 3)) / images
        return (kept @ squares / (images * sums[0, 0].numel()) - mean.square()).clamp_min(0).sum()
