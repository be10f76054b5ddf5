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
    """Predicts the class of every pixel; logs ``miou``, the intersection over union (IoU) averaged over classes.

    At test, the IoU of each class is logged as ``test/iou_NAME``. A class that occurs neither in labels nor in
    predictions does not count. Batches need ``image`` (B, 3, S, S) and ``labels`` (B, S, S), int64. The loss is
    cross-entropy. The position-only baseline predicts each pixel's most frequent class in the training labels.

    Args:
        classes: names of the classes, or their number.
        ignore_index: label of pixels that count neither in the loss nor in the scores.
        class_weights: weight of each class in the loss.
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
        super().__init__(len(names), metrics, {"iou": each}, **options)
        self.save_hyperparameters()
        self.classes, self.ignore_index = len(names), ignore_index
        weights = None if class_weights is None else torch.tensor(class_weights)
        self.register_buffer("class_weights", weights, persistent=False)

    def setup(self, stage: str) -> None:
        data = getattr(getattr(self.trainer, "datamodule", None), "labels", None)
        task = self.classes, self.ignore_index
        if data not in (None, task):
            raise ValueError(
                f"the data have {data[0]} classes and ignore the label {data[1]}, the task {task[0]} and {task[1]}: "
                "give both the same classes and ignore_index"
            )

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        weights: Any = self.class_weights
        total = cross_entropy(logits, target, weights, ignore_index=self.ignore_index, reduction="sum")
        counted = (target != self.ignore_index).float()
        if weights is not None:
            counted = counted * weights[target.clamp(0, len(weights) - 1)]
        return total / counted.sum().clamp_min(1e-6)  # torch's mean is NaN if every pixel is ignored

    def position_logits(self, targets: Iterable[Tensor]) -> Tensor:
        counts = torch.zeros(())
        for labels in targets:
            kept = labels.masked_fill(labels == self.ignore_index, -1)
            counts = counts + torch.stack([(kept == k).sum(0) for k in range(self.classes)])
        return counts
