"""Image classification: the study's classification encoder (the paper's "VGG")."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn.functional import cross_entropy
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from tasks.base import Task
from tasks.networks import ClassificationNetwork, build_encoder


class ClassificationTask(Task):
    """Predicts the image's class; logs ``top1``, the fraction of images whose class is the highest-scored one.

    Batches need ``image`` (B, 3, S, S) and ``label`` (B,), int64. Loss: cross-entropy.

    Args:
        classes: number of classes.
        encoder: an smp encoder, such as ``smp:vgg16``.
        encoder_options: further arguments of its constructor.
        encoder_weights: ``untrained``, a name that smp knows, or a file.
        encoder_padding: see :func:`padprobe.set_padding`.
        image_size: S in pixels.
        lr: the highest learning rate.
        weight_decay: of AdamW.
        seed: of untrained weights.
    """

    target = "label"

    def __init__(
        self,
        classes: int,
        encoder: str = "smp:vgg16",
        encoder_options: dict[str, Any] | None = None,
        encoder_weights: str = "untrained",
        encoder_padding: str = "zeros",
        image_size: int = 224,
        lr: float = 1e-3,
        weight_decay: float = 1e-4,
        seed: int = 0,
    ) -> None:
        backbone = build_encoder(encoder, encoder_options, encoder_weights, encoder_padding, image_size, seed)
        network = ClassificationNetwork(backbone, classes, image_size)
        metrics = MetricCollection({"top1": MulticlassAccuracy(classes, average="micro")})
        super().__init__(network, metrics, lr=lr, weight_decay=weight_decay)
        self.save_hyperparameters()

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        return cross_entropy(logits, target)
