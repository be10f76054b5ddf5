"""The study's networks: an encoder, padded or not, under a decoder that has no padding of its own."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from segmentation_models_pytorch.base import ClassificationHead
from torch import Tensor, nn

from padprobe.encoders import load_encoder
from padprobe.errors import check_name
from padprobe.padding import list_padding
from padprobe.stages import center_crop, context_size, stage_shapes


def _resize(maps: Tensor, side: int) -> Tensor:
    return F.interpolate(maps, (side, side), mode="bilinear", align_corners=False)


class DenseNetwork(nn.Module):
    """One score a class for every pixel: images (B, 3, H, W) -> logits (B, classes, S, S).

    Each of the encoder's feature maps goes through a 1x1 convolution and is resized to one grid, half of S; they are
    added, and two more 1x1 convolutions follow. Nothing here pads, so what differs between a padded and an unpadded
    network is the encoder.

    Args:
        encoder: an smp encoder: returns a list of feature maps, and knows their ``out_channels``.
        classes: number of output channels.
        image_size: S in pixels.
        alignment: of an unpadded encoder's maps, which cover less of the image. ``"stretch"``: over all of it, as in
            the paper; that moves deep maps outwards over shallow ones, so comparing the two tells the decoder where it
            is. ``"context"``: the image is larger than S and only its centre is scored. A padded encoder is shown that
            centre; an unpadded one as much around it as it needs, and its maps are centre-cropped to the resolution
            and geometry of the padded one's. Padding is then all that differs.
        width: channels of the decoder.

    Raises:
        ValueError: for an unknown alignment; in ``forward``, for an image that is too small.
    """

    def __init__(
        self,
        encoder: nn.Module,
        classes: int,
        image_size: int,
        alignment: Literal["stretch", "context"] = "stretch",
        width: int = 32,
    ) -> None:
        super().__init__()
        check_name(alignment, ("stretch", "context"), "alignment")
        self.encoder, self.image_size = encoder, image_size
        self.seen, self.sides = image_size, None
        if alignment == "context" and not list_padding(encoder):
            self.seen, self.sides = context_size(encoder, image_size)
        self.laterals = nn.ModuleList(nn.Conv2d(c, width, 1) for c in encoder.out_channels)  # type: ignore[union-attr]
        self.mix = nn.Conv2d(width, width, 1)
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, image: Tensor) -> Tensor:
        if min(image.shape[-2:]) < self.seen:
            raise ValueError(
                f"the image is {image.shape[-2]} x {image.shape[-1]} px; this network needs {self.seen} px to score "
                f"the central {self.image_size}: give the data more context, or use alignment 'stretch'"
            )
        maps = self.encoder(center_crop(image, self.seen))
        if self.sides:
            maps = [center_crop(features, side) for features, side in zip(maps, self.sides, strict=True)]
        grid = self.image_size // 2
        total = torch.zeros((), device=image.device)
        for lateral, m in zip(self.laterals, maps, strict=True):
            # a 1x1 convolution and a resize commute: the smaller map is convolved
            total = total + (lateral(_resize(m, grid)) if m.shape[-1] > grid else _resize(lateral(m), grid))
        logits = self.head(F.relu(self.mix(F.relu(total))))
        return _resize(logits, self.image_size)


class ClassificationNetwork(nn.Module):
    """One score a class for the centre of an image: (B, 3, H, W) -> logits (B, classes), by global average pooling.

    Args:
        encoder: an smp encoder: returns a list of feature maps, and knows their ``out_channels``.
        classes: number of outputs.
        image_size: side of the centre in pixels.
    """

    def __init__(self, encoder: nn.Module, classes: int, image_size: int) -> None:
        super().__init__()
        self.encoder, self.image_size = encoder, image_size
        self.head = ClassificationHead(encoder.out_channels[-1], classes, dropout=0.0)  # type: ignore[index]

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.encoder(center_crop(image, self.image_size))[-1])


def build_encoder(
    encoder: str, options: dict[str, Any] | None, weights: str, padding: str, image_size: int, seed: int
) -> nn.Module:
    """An smp encoder, ready to train; raises ValueError if it cannot take an image of ``image_size``."""
    if not encoder.startswith("smp:"):
        raise ValueError(f"encoder {encoder!r}: the tasks' networks are built on smp encoders, such as 'smp:vgg16'")
    network = load_encoder(encoder, weights, padding, seed, options)
    stage_shapes(network, [], image_size)
    return network.train()
