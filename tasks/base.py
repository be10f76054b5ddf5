"""What the study's tasks share."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torchmetrics import MetricCollection


class Task(LightningModule):
    """A network, its loss and its metrics; AdamW with a cosine schedule.

    Batches are dictionaries with an ``image`` (B, 3, S, S) and the key that ``target`` names. Metrics are logged as
    ``val/...`` and ``test/...``, the loss as ``train/loss``, ``val/loss`` and ``test/loss``. Subclasses say what
    ``target``, ``loss`` and the metrics' predictions are.

    Args:
        net: images (B, 3, S, S) -> logits.
        metrics: take what :meth:`predict_for_metrics` gives, and the target.
        lr: the highest learning rate.
        weight_decay: of AdamW.
    """

    target: str

    def __init__(self, net: nn.Module, metrics: MetricCollection, lr: float, weight_decay: float) -> None:
        super().__init__()
        self.net = net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # faster convolutions
        self.lr, self.weight_decay = lr, weight_decay
        self.metrics = nn.ModuleDict({"val_": metrics.clone(prefix="val/"), "test_": metrics.clone(prefix="test/")})

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """The training loss, a scalar."""
        raise NotImplementedError

    def scored(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """What the metrics take of the logits and the target."""
        return logits, target

    def forward(self, image: Tensor) -> Tensor:
        return self.net(image.contiguous(memory_format=torch.channels_last))

    def _step(self, batch: dict[str, Any], stage: str) -> Tensor:
        target = batch[self.target]
        logits = self(batch["image"])
        loss = self.loss(logits, target)
        self.log(f"{stage}/loss", loss, batch_size=len(logits), on_step=False, on_epoch=True)
        if stage != "train":
            metrics = self.metrics[f"{stage}_"]
            metrics.update(*self.scored(logits, target))  # type: ignore[operator]
        return loss

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        return self._step(batch, "train")

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self._step(batch, "val")

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self._step(batch, "test")

    def _log_metrics(self, stage: str) -> None:
        metrics = self.metrics[f"{stage}_"]
        self.log_dict(metrics.compute(), prog_bar=stage == "val")  # type: ignore[operator]
        metrics.reset()  # type: ignore[operator]

    def on_validation_epoch_end(self) -> None:
        self._log_metrics("val")

    def on_test_epoch_end(self) -> None:
        self._log_metrics("test")

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=self.weight_decay)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
