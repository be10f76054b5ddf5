"""Salient object detection (SOD; paper, section 4.4 and table 5a)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from segmentation_models_pytorch.losses import DiceLoss
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits
from torchmetrics import MetricCollection

from tasks.base import DenseTask
from tasks.metrics import SaliencyScores, StructureScores


class SaliencyTask(DenseTask):
    """Predicts which pixels are salient; logs ``max_fmeasure`` and ``mae``, at test also S- and E-measure.

    Batches need ``image`` (B, 3, S, S) and ``mask`` (B, 1, S, S) in [0, 1]. The loss is binary cross-entropy plus Dice.
    The position-only baseline is the mean training mask.

    Args:
        options: see :class:`~tasks.base.DenseTask`.
    """

    target = "mask"

    def __init__(self, **options: Any) -> None:
        super().__init__(1, MetricCollection([SaliencyScores()]), [StructureScores()], **options)
        self.save_hyperparameters()
        self.dice = DiceLoss("binary")

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        return binary_cross_entropy_with_logits(logits, target) + self.dice(logits, target)

    def predictions(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        return logits.sigmoid()[:, 0], target[:, 0]

    def position_logits(self, targets: Iterable[Tensor]) -> Tensor:
        total, count = torch.zeros(()), 0
        for masks in targets:
            total, count = total + masks.double().sum(0), count + len(masks)
        return torch.logit((total / count).float(), 1e-6)
