"""Semantic segmentation (SS; paper, section 4.4 and table 5b)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torchmetrics import ClasswiseWrapper, MetricCollection
from torchmetrics.classification import MulticlassJaccardIndex

from tasks.base import DenseTask


class SegmentationTask(DenseTask):
    """Predicts every pixel's class; logs ``miou``, the mean over classes of the intersection over union.

    At test the IoU of each class is logged as ``test/iou_NAME``. A class that neither labels nor predictions have does
    not count. Batches need ``image`` (B, 3, S, S) and ``labels`` (B, S, S), int64. Loss: cross-entropy. The
    position-only baseline is each pixel's most frequent class in the training labels.

    Args:
        classes: names of the classes, or their number.
        ignore_index: label of pixels that count neither in the loss nor in the scores.
        class_weights: of the loss, one a class.
        options: see :class:`~tasks.base.DenseTask`.
    """

    target = "labels"

    def __init__(
        self,
        classes: int | list[str],
        ignore_index: int = 255,
        class_weights: list[float] | None = None,
        **options: Any,
    ) -> None:
        names = [str(i) for i in range(classes)] if isinstance(classes, int) else list(classes)
        if class_weights is not None and len(class_weights) != len(names):
            raise ValueError(
                f"class_weights has {len(class_weights)} numbers; expected one for each of {len(names)} classes"
            )
        jaccard: Any = {"num_classes": len(names), "ignore_index": ignore_index, "validate_args": False}
        each = ClasswiseWrapper(MulticlassJaccardIndex(average="none", **jaccard), names, prefix="iou_")
        metrics = MetricCollection({"miou": MulticlassJaccardIndex(**jaccard)})
        super().__init__(len(names), metrics, MetricCollection({"iou": each}), **options)
        self.save_hyperparameters()
        self.ignore_index = ignore_index
        weights = None if class_weights is None else torch.tensor(class_weights)
        self.register_buffer("class_weights", weights, persistent=False)

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        weights: Any = self.class_weights
        return cross_entropy(logits, target, weights, ignore_index=self.ignore_index)

    def position_logits(self, targets: Iterable[Tensor]) -> Tensor:
        classes = self.metrics["val_"]["miou"].num_classes  # type: ignore[index, union-attr]
        return sum(torch.stack([(labels == k).sum(0) for k in range(classes)]) for labels in targets).float()  # type: ignore[union-attr]
