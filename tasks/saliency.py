"""Salient object detection (SOD; paper, section 4.4 and table 5a)."""

from __future__ import annotations

from typing import Any, Literal

from segmentation_models_pytorch.losses import DiceLoss
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits
from torchmetrics import MetricCollection

from tasks.base import Task
from tasks.metrics import SaliencyScores
from tasks.networks import DenseNetwork, build_encoder


class SaliencyTask(Task):
    """Predicts which pixels are salient; logs ``max_fmeasure``, ``adaptive_fmeasure`` (beta^2 = .3) and ``mae``.

    Batches need ``image`` (B, 3, S, S) and ``mask`` (B, 1, S, S) in [0, 1]. Loss: binary cross-entropy + Dice.

    Args:
        encoder: an smp encoder, such as ``smp:vgg16``.
        encoder_options: further arguments of its constructor.
        encoder_weights: ``untrained``, a name that smp knows, or a file.
        padding: of the encoder, see :func:`padprobe.set_padding`.
        image_size: S in pixels.
        alignment: of an unpadded encoder's maps, see :class:`~tasks.networks.DenseNetwork`; ``"context"`` wants images
            that are larger than S, labels are S x S.
        lr: the highest learning rate.
        weight_decay: of AdamW.
        seed: of untrained weights.
    """

    target = "mask"

    def __init__(
        self,
        encoder: str = "smp:vgg16",
        encoder_options: dict[str, Any] | None = None,
        encoder_weights: str = "untrained",
        padding: str = "zeros",
        image_size: int = 224,
        alignment: Literal["stretch", "context"] = "stretch",
        lr: float = 1e-3,
        weight_decay: float = 1e-4,
        seed: int = 0,
    ) -> None:
        backbone = build_encoder(encoder, encoder_options, encoder_weights, padding, image_size, seed)
        network = DenseNetwork(backbone, 1, image_size, alignment)
        super().__init__(network, MetricCollection([SaliencyScores()]), lr, weight_decay)
        self.save_hyperparameters()
        self.dice = DiceLoss("binary")

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        return binary_cross_entropy_with_logits(logits, target) + self.dice(logits, target)

    def scored(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        return logits.sigmoid()[:, 0], target[:, 0]
