"""Semantic segmentation (SS; paper, section 4.4 and table 5b)."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor
from torch.nn.functional import cross_entropy
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassJaccardIndex

from tasks.base import Task
from tasks.networks import DenseNetwork, build_encoder


class SegmentationTask(Task):
    """Predicts every pixel's class; logs ``miou``, the mean over classes of the intersection over union.

    Batches need ``image`` (B, 3, S, S) and ``labels`` (B, S, S), int64. Loss: cross-entropy.

    Args:
        classes: number of classes.
        encoder: an smp encoder, such as ``smp:vgg16``.
        encoder_options: further arguments of its constructor.
        encoder_weights: ``untrained``, a name that smp knows, or a file.
        padding: of the encoder, see :func:`padprobe.set_padding`.
        ignore_index: label of pixels that count neither in the loss nor in the score.
        image_size: S in pixels.
        alignment: of an unpadded encoder's maps, see :class:`~tasks.networks.DenseNetwork`; ``"context"`` wants images
            that are larger than S, labels are S x S.
        lr: the highest learning rate.
        weight_decay: of AdamW.
        seed: of untrained weights.
    """

    target = "labels"

    def __init__(
        self,
        classes: int,
        encoder: str = "smp:vgg16",
        encoder_options: dict[str, Any] | None = None,
        encoder_weights: str = "untrained",
        padding: str = "zeros",
        ignore_index: int = 255,
        image_size: int = 224,
        alignment: Literal["stretch", "context"] = "stretch",
        lr: float = 1e-3,
        weight_decay: float = 1e-4,
        seed: int = 0,
    ) -> None:
        backbone = build_encoder(encoder, encoder_options, encoder_weights, padding, image_size, seed)
        network = DenseNetwork(backbone, classes, image_size, alignment)
        miou = MulticlassJaccardIndex(classes, ignore_index=ignore_index, validate_args=False)
        super().__init__(network, MetricCollection({"miou": miou}), lr, weight_decay)
        self.save_hyperparameters()
        self.ignore_index = ignore_index

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        return cross_entropy(logits, target, ignore_index=self.ignore_index)
