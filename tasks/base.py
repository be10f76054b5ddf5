"""What the tasks of the study share."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from padprobe.processes import count_new
from tasks.networks import build_network

RETIRED = {"optimizer": "adamw", "schedule": "cosine"}
"""Former options that old checkpoints still hold, with the values that match today's recipe."""


class Task(LightningModule, ABC):
    """A network with its loss, its metrics and its training recipe.

    Batches are dictionaries with an ``image`` (B, 3, S, S) and the key in the class attribute ``target``. With several
    processes, each image counts once in the metrics.

    The recipe: AdamW, with a learning rate that falls from ``lr`` to 0 along a cosine, step by step. ``padprobe fit
    --optimizer CLASS --lr_scheduler CLASS`` replaces it, and ``lr`` and ``weight_decay`` with it.

    Args:
        net: takes images (B, 3, S, S), returns logits.
        metrics: computed at validation and test, from what :meth:`predictions` returns.
        test_metrics: computed only at test.
        lr: learning rate of the first step.
        weight_decay: weight decay of AdamW.
    """

    target: str

    def __init__(
        self,
        net: nn.Module,
        metrics: MetricCollection,
        test_metrics: Sequence[Metric] | dict[str, Metric] = (),
        lr: float = 1e-3,
        weight_decay: float = 1e-4,
    ) -> None:
        super().__init__()
        self.net = net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # faster convolutions
        self.lr, self.weight_decay = lr, weight_decay
        self._seen = 0  # images of the current loader that were scored
        self.metrics = nn.ModuleDict({stage: metrics.clone(prefix=f"{stage}/") for stage in ("val", "test")})
        self.metrics["test"].add_metrics(test_metrics)  # type: ignore[operator]

    @abstractmethod
    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """The training loss, a scalar."""

    def predictions(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """The prediction and the target in the form that the metrics take."""
        return logits, target

    def forward(self, image: Tensor) -> Tensor:
        return self.net(image.contiguous(memory_format=torch.channels_last))

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        return self._loss(batch, "train")[0]

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self._score(batch, batch_idx, "val", self.trainer.val_dataloaders)

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self._score(batch, batch_idx, "test", self.trainer.test_dataloaders)

    def _loss(self, batch: dict[str, Any], stage: str) -> tuple[Tensor, Tensor]:
        logits = self(batch["image"])
        loss = self.loss(logits, batch[self.target])
        sync = stage != "train"
        self.log(f"{stage}/loss", loss, batch_size=len(logits), on_step=False, on_epoch=True, sync_dist=sync)
        return loss, logits

    def _score(self, batch: dict[str, Any], batch_idx: int, stage: str, loader: Any) -> None:
        logits = self._loss(batch, stage)[1]
        start = self._seen if batch_idx else 0
        self._seen = start + len(logits)
        if new := count_new(loader, start, len(logits)):
            self.update_metrics(stage, logits[:new], batch[self.target][:new])

    def update_metrics(self, stage: str, logits: Tensor, target: Tensor) -> None:
        """Scores images that no process has scored before."""
        self.metrics[stage].update(*self.predictions(logits, target))  # type: ignore[operator]

    def on_validation_epoch_end(self) -> None:
        self._log_metrics("val")

    def on_test_epoch_end(self) -> None:
        self._log_metrics("test")

    def _log_metrics(self, name: str) -> None:
        metrics = self.metrics[name]
        self.log_dict(metrics.compute(), prog_bar=name == "val", sync_dist=True)  # type: ignore[operator]
        metrics.reset()  # type: ignore[operator]

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), self.lr, weight_decay=self.weight_decay)
        steps = int(self.trainer.estimated_stepping_batches)

        def cosine(step: int) -> float:  # torch's CosineAnnealingLR would keep the old length when a longer run resumes
            left = 1 - min(step / steps, 1)
            return (1 - math.cos(math.pi * left)) / 2

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, cosine)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class DenseTask(Task):
    """A task with a target at every pixel.

    At test it also logs what position alone can score, as ``test/position_only_...``: one prediction, made from the
    training targets, is used for every image. This needs a data module with a ``label_dataloader``.

    Args:
        outputs: number of output channels.
        metrics, test_metrics: see :class:`Task`.
        lr: learning rate of the first step.
        weight_decay: weight decay of AdamW.
        network: options of :func:`~tasks.networks.build_network`.
    """

    def __init__(
        self,
        outputs: int,
        metrics: MetricCollection,
        test_metrics: Sequence[Metric] | dict[str, Metric] = (),
        lr: float = 1e-3,
        weight_decay: float = 1e-4,
        **network: Any,
    ) -> None:
        retired = {name: network.pop(name) for name in RETIRED.keys() & network.keys()}
        super().__init__(build_network(outputs, **network), metrics, test_metrics, lr, weight_decay)
        self._recipe = RETIRED | retired
        self.metrics["position_only"] = metrics.clone(prefix="test/position_only_")
        self._position_logits: Tensor | None = None

    def configure_optimizers(self) -> Any:
        if self._recipe != RETIRED:
            raise ValueError(
                f"the checkpoint was trained with {self._recipe}; tasks now train with {RETIRED}: to go on with its "
                "training, name the classes with `padprobe fit --optimizer CLASS --lr_scheduler CLASS`"
            )
        return super().configure_optimizers()

    @abstractmethod
    def position_logits(self, targets: Iterable[Tensor]) -> Tensor:
        """The logits (C, S, S) of a network that knows batches of training targets and a pixel's position alone."""

    def on_test_start(self) -> None:
        data: Any = getattr(self.trainer, "datamodule", None)
        if hasattr(data, "label_dataloader"):
            targets = (batch[self.target] for batch in data.label_dataloader())
            self._position_logits = self.position_logits(targets).to(self.device)

    def update_metrics(self, stage: str, logits: Tensor, target: Tensor) -> None:
        super().update_metrics(stage, logits, target)
        if stage == "test" and self._position_logits is not None:
            same = self._position_logits.expand(len(target), -1, -1, -1)
            self.metrics["position_only"].update(*self.predictions(same, target))  # type: ignore[operator]

    def on_test_epoch_end(self) -> None:
        super().on_test_epoch_end()
        if self._position_logits is not None:
            self._log_metrics("position_only")
