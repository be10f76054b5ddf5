"""The study's networks: an encoder, padded or not, under a decoder that has no padding of its own."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from segmentation_models_pytorch.base import ClassificationHead
from torch import Tensor, nn

from padprobe.encoders import load_encoder
from padprobe.stages import stage_shapes


class DenseNetwork(nn.Module):
    """One score a class for every pixel: images (B, 3, H, W) -> logits (B, classes, H, W).

    Each of the encoder's feature maps goes through a 1x1 convolution and is resized to one grid (half the image's
    size); they are added, and two more 1x1 convolutions follow. Nothing here pads, so what differs between a padded and
    an unpadded network is the encoder's padding. An unpadded encoder's maps, which cover less of the image, are
    stretched over all of it, as in the paper.

    Args:
        encoder: an smp encoder: returns a list of feature maps, and knows their ``out_channels``.
        classes: number of output channels.
        width: channels of the decoder.
    """

    def __init__(self, encoder: nn.Module, classes: int, width: int = 32) -> None:
        super().__init__()
        self.encoder = encoder
        self.laterals = nn.ModuleList(nn.Conv2d(c, width, 1) for c in encoder.out_channels)  # type: ignore[union-attr]
        self.mix = nn.Conv2d(width, width, 1)
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, image: Tensor) -> Tensor:
        height, width = image.shape[-2:]
        grid = (height // 2, width // 2)
        total = torch.zeros(())
        for lateral, features in zip(self.laterals, self.encoder(image), strict=True):
            resized = F.interpolate(lateral(features), grid, mode="bilinear", align_corners=False)
            total = resized if total.ndim == 0 else total + resized
        logits = self.head(F.relu(self.mix(F.relu(total))))
        return F.interpolate(logits, (height, width), mode="bilinear", align_corners=False)


class ClassificationNetwork(nn.Module):
    """One score a class for the image: images (B, 3, H, W) -> logits (B, classes), by global average pooling.

    Args:
        encoder: an smp encoder: returns a list of feature maps, and knows their ``out_channels``.
        classes: number of outputs.
    """

    def __init__(self, encoder: nn.Module, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = ClassificationHead(encoder.out_channels[-1], classes, dropout=0.0)  # type: ignore[index]

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.encoder(image)[-1])


def build_encoder(
    encoder: str, options: dict[str, Any] | None, weights: str, padding: str, image_size: int, seed: int
) -> nn.Module:
    """An smp encoder, ready to train; raises ValueError if it cannot take an image of ``image_size``."""
    if not encoder.startswith("smp:"):
        raise ValueError(f"encoder {encoder!r}: the tasks' networks are built on smp encoders, such as 'smp:vgg16'")
    network = load_encoder(encoder, weights, padding, seed, options)
    stage_shapes(network, [], image_size)
    return network.train()
