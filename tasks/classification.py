"""Image classification: the study's classification encoder (the paper's "VGG")."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn.functional import cross_entropy
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from tasks.base import Task
from tasks.networks import ClassificationNetwork


class ClassificationTask(Task):
    """Predicts the class of an image; logs ``top1``, the fraction of images whose class gets the highest score.

    Batches need ``image`` (B, 3, S, S) and ``label`` (B,), int64. The loss is cross-entropy.

    Args:
        classes: number of classes.
        lr: learning rate of the first step.
        weight_decay: weight decay of AdamW.
        network: options of :class:`~tasks.networks.ClassificationNetwork`.
    """

    target = "label"

    def __init__(self, classes: int, lr: float = 1e-3, weight_decay: float = 1e-4, **network: Any) -> None:
        metrics = MetricCollection({"top1": MulticlassAccuracy(classes, average="micro")})
        super().__init__(ClassificationNetwork(classes, **network), metrics, lr=lr, weight_decay=weight_decay)
        self.save_hyperparameters()

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        return cross_entropy(logits, target)
