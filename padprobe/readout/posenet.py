"""The paper's readout f_pem, for any number of targets side by side (paper, section 3.1)."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from padprobe.maps import TARGETS, Size, Target, position_maps, size_pair, target_name


class PosENet(nn.Module):
    """The paper's readout: predicts position maps from stages aligned to one grid, independently for each target.

    Conv k x k (without padding) -> BatchNorm -> sigmoid -> bilinear upsampling to ``size``. With a depth above 1,
    blocks of Conv k x k (C -> C channels), BatchNorm and ReLU come first. Weights are Xavier-uniform, biases zero. The
    readouts of different targets share only the features, and each target has its own random stream, so that adding a
    target does not change the results of the others. The global random state is left alone.

    Args:
        in_channels: channels of all stages together (1472 for VGG16; 3 for the image alone, the paper's "PosENet").
        targets: position maps to predict, see :func:`~padprobe.position_maps`.
        kernel_size: size of every convolution; odd.
        depth: number of convolutions.
        padding: zero padding of the convolutions (0, 1 or 2 in the paper's table 4).
        grid: side of the aligned features in cells.
        size: of the maps in pixels: (height, width), or one number for a square.
        seed: seed of the initial weights.
        scale: scale of the maps, see :func:`~padprobe.position_maps`.

    Raises:
        ValueError: for an unknown target, an even kernel, or convolutions that leave nothing of the grid.

    Source: paper, section 3.1 and table 2; the authors' code where the text says nothing.

    Example:
        >>> readout = PosENet(in_channels=24, targets=["H", "G"])
        >>> features = torch.rand(4, 24, 28, 28)
        >>> readout(features).shape, readout.loss(features).shape
        (torch.Size([4, 2, 224, 224]), torch.Size([2]))
    """

    def __init__(
        self,
        in_channels: int,
        targets: Sequence[Target] = TARGETS,
        kernel_size: int = 3,
        depth: int = 1,
        padding: int = 0,
        grid: int = 28,
        size: Size = 224,
        seed: int = 0,
        scale: Literal["unit", "paper"] = "unit",
    ) -> None:
        super().__init__()
        side = readout_side(kernel_size, depth, padding, grid)
        self.targets = tuple(targets)
        self.kernel_size, self.depth, self.padding = kernel_size, depth, padding
        self.grid, self.side, self.size = grid, side, size_pair(size)
        self.register_buffer("maps", position_maps(size, targets, scale), persistent=False)

        self.hidden = nn.ModuleList()
        weights = []
        for target in targets:
            generator = torch.Generator().manual_seed(1000 * seed + _stream(target))
            layers: list[nn.Module] = []
            for _ in range(depth - 1):
                conv = nn.utils.skip_init(nn.Conv2d, in_channels, in_channels, kernel_size, padding=padding)
                nn.init.xavier_uniform_(conv.weight, generator=generator)
                nn.init.zeros_(conv.bias)
                layers += [conv, nn.BatchNorm2d(in_channels), nn.ReLU(inplace=True)]
            self.hidden.append(nn.Sequential(*layers))
            weights.append(
                nn.init.xavier_uniform_(torch.empty(1, in_channels, kernel_size, kernel_size), generator=generator)
            )
        self.weight = nn.Parameter(torch.cat(weights))  # (T, C, k, k): one convolution per target
        self.bias = nn.Parameter(torch.zeros(len(weights)))
        self.norm = nn.BatchNorm2d(len(weights))  # one channel per target, the same as one BatchNorm(1) each

        # Bilinear upsampling is linear and separable: full = up_h @ small @ up_w.T, so the squared error at full size
        # is a quadratic form in the small map. See errors().
        up_h, up_w = (upsampling(side, pixels) for pixels in self.size)
        self.register_buffer("up_h", up_h, persistent=False)
        self.register_buffer("up_w", up_w, persistent=False)
        self.register_buffer("gram_h", up_h.T @ up_h, persistent=False)
        self.register_buffer("gram_w", up_w.T @ up_w, persistent=False)
        self.register_buffer("projected", up_h.T @ self.maps @ up_w, persistent=False)  # (T, side, side)

    up_h: Tensor
    up_w: Tensor
    gram_h: Tensor
    gram_w: Tensor
    maps: Tensor
    projected: Tensor

    def raw(self, features: Tensor) -> Tensor:
        """The output of the convolutions, before BatchNorm: (B, C, grid, grid) -> (B, T, side, side)."""
        if self.depth > 1:
            split = zip(self.hidden, self.weight[:, None], self.bias[:, None], strict=True)
            return torch.cat([F.conv2d(h(features), w, b, padding=self.padding) for h, w, b in split], dim=1)
        return conv_few(features, self.weight, self.padding) + self.bias[:, None, None]

    def predict_small(self, features: Tensor) -> Tensor:
        """The prediction before upsampling: (B, C, grid, grid) -> (B, T, side, side) in [0, 1]."""
        return torch.sigmoid(self.norm(self.raw(features)))

    def forward(self, features: Tensor) -> Tensor:
        """Predicted position maps: (B, C, grid, grid) -> (B, T, height, width) in [0, 1]."""
        return self.up_h @ self.predict_small(features) @ self.up_w.T

    def loss(self, features: Tensor) -> Tensor:
        """Mean squared error of each target's maps at full size: (B, C, grid, grid) -> (T,).

        Equal to ``((forward(features) - maps) ** 2).mean((0, 2, 3))`` up to rounding, see :meth:`errors`.
        """
        return self.errors(self.predict_small(features)).mean(0)

    def errors(self, small: Tensor) -> Tensor:
        """Mean squared error at full size of each small map P: (B, T, side, side) -> (B, T).

        It needs no full-size map: with U and V the upsampling of height and width and B = U' map V, |U P V' - map|^2 =
        <P, U'U P V'V> - 2 <P, B> + |map|^2.
        """
        quadratic = (small * (self.gram_h @ small @ self.gram_w)).sum((2, 3))
        cross = (small * self.projected).sum((2, 3))
        constant = self.maps.square().sum((1, 2))
        return (quadratic - 2 * cross + constant) / math.prod(self.size)


def readout_side(kernel_size: int = 3, depth: int = 1, padding: int = 0, grid: int = 28) -> int:
    """Side, in cells, of the map that a readout predicts before it is upsampled.

    Args:
        kernel_size: size of each convolution; odd.
        depth: number of convolutions.
        padding: zero padding of each convolution.
        grid: side of the features in cells.

    Raises:
        ValueError: for an even kernel, or convolutions that leave fewer than 2 cells of the grid.

    Example:
        >>> readout_side(kernel_size=3), readout_side(kernel_size=3, depth=3)
        (26, 22)
    """
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"kernel_size is {kernel_size}; expected an odd number such as 1, 3, 5 or 7")
    if depth < 1 or padding < 0:
        raise ValueError(f"depth is {depth} and padding {padding}; expected depth >= 1 and padding >= 0")
    side = grid + depth * (2 * padding - kernel_size + 1)
    if side < 2:
        raise ValueError(
            f"{depth} convolution(s) of size {kernel_size} with padding {padding} leave {side} cells of a grid of "
            f"{grid}: use a larger grid, a smaller kernel_size or more padding"
        )
    return side


def upsampling(side: int, size: int) -> Tensor:
    """The matrix of bilinear upsampling along one axis, from ``side`` to ``size`` pixels: (size, side).

    A whole map is upsampled as full = up_h @ small @ up_w.T.

    Example:
        >>> upsampling(2, 4)
        tensor([[1.0000, 0.0000],
                [0.7500, 0.2500],
                [0.2500, 0.7500],
                [0.0000, 1.0000]])
    """
    return F.interpolate(torch.eye(side)[None], size=size, mode="linear", align_corners=False)[0].T


def _stream(target: Target) -> int:
    """The number of a target's random stream."""
    return TARGETS.index(target) if target in TARGETS else 5 + zlib.crc32(target_name(target).encode())


def conv_few(features: Tensor, weight: Tensor, padding: int) -> Tensor:
    """``F.conv2d(features, weight, padding=padding)``, several times faster for a handful of output channels.

    All taps of the kernel are one matrix product over the channels; the few resulting rows are shifted and added. The
    features get no gradient.

    Example:
        >>> features, weight = torch.rand(2, 16, 8, 8), torch.rand(3, 16, 3, 3)
        >>> torch.allclose(conv_few(features, weight, padding=1), F.conv2d(features, weight, padding=1), atol=1e-4)
        True
    """
    k, side = weight.shape[-1], features.shape[-1] + 2 * padding - weight.shape[-1] + 1
    if padding >= k:
        return F.conv2d(features, weight, padding=padding)
    taps = _Taps.apply(features.flatten(2), weight.flip(2, 3).permute(0, 2, 3, 1).flatten(0, 2))
    return F.fold(taps, side, k, padding=k - 1 - padding)


class _Taps(torch.autograd.Function):
    """``rows @ features`` for (R, C) and (B, C, N): (B, R, N). The backward pass sums the gradient over the batch.

    On a CPU it does so image by image: the products of a whole batch would be large temporaries, and allocating them
    costs more than the sums.
    """

    @staticmethod
    def forward(ctx: Any, features: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(features)
        return torch.bmm(rows.expand(len(features), -1, -1), features)  # matmul would copy the features

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:  # type: ignore[override]
        (features,) = ctx.saved_tensors
        if features.device.type != "cpu":
            return None, torch.bmm(gradient, features.transpose(1, 2)).sum(0)
        total = gradient.new_zeros(gradient.shape[1], features.shape[1])
        for taps, image in zip(gradient, features, strict=True):
            total.addmm_(taps, image.T)
        return None, total


def make_optimizer(readout: nn.Module, lr: float = 0.1) -> torch.optim.SGD:
    """The paper's optimizer for a readout: SGD with momentum 0.9 and weight decay 1e-4.

    Source: paper, section 3.2; the learning rate from the authors' code.

    Example:
        >>> make_optimizer(PosENet(in_channels=3)).defaults["momentum"]
        0.9
    """
    return torch.optim.SGD(readout.parameters(), lr=lr, momentum=0.9, weight_decay=1e-4)
