"""What the tasks of the study share."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torchmetrics import MetricCollection

from padprobe.processes import count_new
from tasks.networks import build_network

RETIRED = {"optimizer": "adamw", "schedule": "cosine"}
"""Former options that old checkpoints still hold, with the values that match today's recipe."""


class Task(LightningModule, ABC):
    """A network with its loss, its metrics and its training recipe.

    Batches are dictionaries with an ``image`` (B, 3, S, S) and the key in the class attribute ``target``. Logged:
    ``train/loss``, ``val/loss``, ``test/loss`` and the metrics as ``val/...`` and ``test/...``. With several
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
        test_metrics: MetricCollection | None = None,
        lr: float = 1e-3,
        weight_decay: float = 1e-4,
    ) -> None:
        super().__init__()
        self.net = net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # faster convolutions
        self.lr, self.weight_decay = lr, weight_decay
        scores = {"val": metrics.clone(prefix="val/"), "test": metrics.clone(prefix="test/")}
        if test_metrics:
            scores["test"].add_metrics({name: metric.clone() for name, metric in test_metrics.items(keep_base=True)})
        self.metrics = nn.ModuleDict(scores)

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
        self._score(batch, "val", self.trainer.val_dataloaders)

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self._score(batch, "test", self.trainer.test_dataloaders)

    def _loss(self, batch: dict[str, Any], stage: str) -> tuple[Tensor, Tensor]:
        target = batch[self.target]
        logits = self(batch["image"])
        loss = self.loss(logits, target)
        sync = stage != "train"
        self.log(f"{stage}/loss", loss, batch_size=len(logits), on_step=False, on_epoch=True, sync_dist=sync)
        return loss, logits

    def _score(self, batch: dict[str, Any], stage: str, loader: Any) -> None:
        logits, target = self._loss(batch, stage)[1], batch[self.target]
        new = count_new(loader, self._seen, len(logits))
        self._seen += len(logits)
        if new:
            self.update_metrics(stage, logits[:new], target[:new])

    def update_metrics(self, stage: str, logits: Tensor, target: Tensor) -> None:
        """Scores images that no process has scored before."""
        self.metrics[stage].update(*self.predictions(logits, target))  # type: ignore[operator]

    def on_validation_epoch_start(self) -> None:
        self._seen = 0

    def on_test_epoch_start(self) -> None:
        self._seen = 0

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
        metrics: see :class:`Task`.
        test_metrics: see :class:`Task`.
        lr: learning rate of the first step.
        weight_decay: weight decay of AdamW.
        network: options of :func:`~tasks.networks.build_network`.
    """

    def __init__(
        self,
        outputs: int,
        metrics: MetricCollection,
        test_metrics: MetricCollection | None = None,
        lr: float = 1e-3,
        weight_decay: float = 1e-4,
        **network: Any,
    ) -> None:
        retired = {name: network.pop(name) for name in RETIRED.keys() & network.keys()}
        super().__init__(build_network(outputs, **network), metrics, test_metrics, lr, weight_decay)
        self._retired = RETIRED | retired
        self.metrics["position_only"] = metrics.clone(prefix="test/position_only_")
        self._position_logits: Tensor | None = None

    def configure_optimizers(self) -> Any:
        if self._retired != RETIRED:
            raise ValueError(
                f"the checkpoint was trained with {self._retired}; tasks now train with {RETIRED}: to go on with its "
                "training, name the classes with `padprobe fit --optimizer CLASS --lr_scheduler CLASS`"
            )
        return super().configure_optimizers()

    @abstractmethod
    def position_logits(self, targets: Iterable[Tensor]) -> Tensor:
        """The logits (C, S, S) of a network that knows the training targets and a pixel's position, but not the image.

        Args:
            targets: batches of training targets.
        """

    def on_test_start(self) -> None:
        loader = getattr(getattr(self.trainer, "datamodule", None), "label_dataloader", None)
        if loader is not None:
            self._position_logits = self.position_logits(batch[self.target] for batch in loader()).to(self.device)

    def update_metrics(self, stage: str, logits: Tensor, target: Tensor) -> None:
        super().update_metrics(stage, logits, target)
        if stage == "test" and self._position_logits is not None:
            same = self._position_logits.expand(len(target), -1, -1, -1)
            self.metrics["position_only"].update(*self.predictions(same, target))  # type: ignore[operator]

    def on_test_epoch_end(self) -> None:
        super().on_test_epoch_end()
        if self._position_logits is not None:
            self._log_metrics("position_only")
