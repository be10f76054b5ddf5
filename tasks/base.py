"""What the study's tasks share."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torchmetrics import MetricCollection

from padprobe.errors import check_name
from padprobe.processes import count_new
from tasks.networks import build_network


class Task(LightningModule):
    """A network, its loss, its metrics and its optimizer.

    Batches are dictionaries with an ``image`` (B, 3, S, S) and the key that ``target`` names. Metrics are logged as
    ``val/...`` and ``test/...``, the loss as ``train/loss``, ``val/loss`` and ``test/loss``. Of several processes every
    image counts once in the metrics. Subclasses say what ``target``, ``loss`` and the metrics' predictions are.

    Args:
        net: images (B, 3, S, S) -> logits.
        metrics: take what :meth:`scored` gives, at validation and test.
        test_metrics: the same, at test alone.
        lr: the highest learning rate.
        weight_decay: of the optimizer.
        optimizer: ``"adamw"``, or ``"sgd"`` with momentum .9.
        schedule: of the learning rate, step by step down to 0: ``"cosine"``, or ``"poly"`` with power .9.
    """

    target: str

    def __init__(
        self,
        net: nn.Module,
        metrics: MetricCollection,
        test_metrics: MetricCollection | None = None,
        lr: float = 1e-3,
        weight_decay: float = 1e-4,
        optimizer: Literal["adamw", "sgd"] = "adamw",
        schedule: Literal["cosine", "poly"] = "cosine",
    ) -> None:
        super().__init__()
        check_name(optimizer, ("adamw", "sgd"), "optimizer")
        check_name(schedule, ("cosine", "poly"), "schedule")
        self.net = net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # faster convolutions
        self.lr, self.weight_decay, self.optimizer, self.schedule = lr, weight_decay, optimizer, schedule
        scores = {"val_": metrics.clone(prefix="val/"), "test_": metrics.clone(prefix="test/")}
        if test_metrics:
            scores["test_"].add_metrics({name: metric.clone() for name, metric in test_metrics.items(keep_base=True)})
        self.metrics = nn.ModuleDict(scores)

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """The training loss, a scalar."""
        raise NotImplementedError

    def scored(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """What the metrics take of the logits and the target."""
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
        """Scores a batch whose images no process has scored before."""
        self.metrics[f"{stage}_"].update(*self.scored(logits, target))  # type: ignore[operator]

    def on_validation_epoch_start(self) -> None:
        self._seen = 0

    def on_test_epoch_start(self) -> None:
        self._seen = 0

    def on_validation_epoch_end(self) -> None:
        self._log_metrics("val_")

    def on_test_epoch_end(self) -> None:
        self._log_metrics("test_")

    def _log_metrics(self, name: str) -> None:
        metrics = self.metrics[name]
        self.log_dict(metrics.compute(), prog_bar=name == "val_", sync_dist=True)  # type: ignore[operator]
        metrics.reset()  # type: ignore[operator]

    def configure_optimizers(self) -> Any:
        optimizer: torch.optim.Optimizer
        if self.optimizer == "sgd":
            optimizer = torch.optim.SGD(self.parameters(), self.lr, momentum=0.9, weight_decay=self.weight_decay)
        else:
            optimizer = torch.optim.AdamW(self.parameters(), self.lr, weight_decay=self.weight_decay)
        steps = int(self.trainer.estimated_stepping_batches)

        def factor(step: int) -> float:  # torch's own schedules would keep the old length where a longer run resumes
            left = 1 - min(step / steps, 1)
            return left**0.9 if self.schedule == "poly" else (1 - math.cos(math.pi * left)) / 2

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class DenseTask(Task):
    """A task with a target for every pixel, solved by an encoder and a decoder that pad as they are told.

    At test, what position alone knows is scored beside the network, ``test/position_only_...``: the same prediction for
    every image, made from the training targets. It needs a data module with a ``label_dataloader``.

    Args:
        outputs: number of output channels.
        metrics, test_metrics: see :class:`Task`.
        encoder: an smp encoder, such as ``smp:vgg16``, or with ``smp:tu-`` before its name one of timm's.
        encoder_options: further arguments of its constructor.
        encoder_weights: ``untrained``, a name that smp, torchvision or timm knows, or a file.
        encoder_padding: ``zeros``, ``valid``, ``reflect``, ``replicate`` or ``circular``, see
            :func:`padprobe.set_padding`.
        decoder: ``linear`` (no padding of its own), or smp's ``unet``, ``fpn``, ``deeplabv3plus``, ``pspnet``,
            ``linknet`` or ``upernet``.
        decoder_options: further arguments of smp's constructor.
        decoder_padding: as ``encoder_padding``.
        image_size: S in pixels.
        alignment: of an unpadded encoder's maps, see :class:`~tasks.networks.DenseNetwork`; ``"context"`` wants images
            that are larger than S, labels are S x S.
        lr, weight_decay, optimizer, schedule: see :class:`Task`.
        seed: of untrained weights.
    """

    def __init__(
        self,
        outputs: int,
        metrics: MetricCollection,
        test_metrics: MetricCollection | None = None,
        encoder: str = "smp:vgg16",
        encoder_options: dict[str, Any] | None = None,
        encoder_weights: str = "untrained",
        encoder_padding: str = "zeros",
        decoder: str = "linear",
        decoder_options: dict[str, Any] | None = None,
        decoder_padding: str = "zeros",
        image_size: int = 224,
        alignment: Literal["stretch", "context"] = "stretch",
        lr: float = 1e-3,
        weight_decay: float = 1e-4,
        optimizer: Literal["adamw", "sgd"] = "adamw",
        schedule: Literal["cosine", "poly"] = "cosine",
        seed: int = 0,
    ) -> None:
        network = build_network(
            encoder,
            outputs,
            image_size,
            decoder=decoder,
            encoder_options=encoder_options,
            encoder_weights=encoder_weights,
            encoder_padding=encoder_padding,
            decoder_padding=decoder_padding,
            decoder_options=decoder_options,
            alignment=alignment,
            seed=seed,
        )
        super().__init__(network, metrics, test_metrics, lr, weight_decay, optimizer, schedule)
        self.metrics["position_only_"] = metrics.clone(prefix="test/position_only_")
        self._position_logits: Tensor | None = None

    def position_logits(self, targets: Iterable[Tensor]) -> Tensor:
        """The logits (C, S, S) of a network that knows the training targets and a pixel's position, not the image.

        Args:
            targets: batches of training targets.
        """
        raise NotImplementedError

    def on_test_start(self) -> None:
        loader = getattr(getattr(self.trainer, "datamodule", None), "label_dataloader", None)
        if loader is not None:
            self._position_logits = self.position_logits(batch[self.target] for batch in loader()).to(self.device)

    def update_metrics(self, stage: str, logits: Tensor, target: Tensor) -> None:
        super().update_metrics(stage, logits, target)
        if stage == "test" and self._position_logits is not None:
            same = self._position_logits.expand(len(target), -1, -1, -1)
            self.metrics["position_only_"].update(*self.scored(same, target))  # type: ignore[operator]

    def on_test_epoch_end(self) -> None:
        super().on_test_epoch_end()
        if self._position_logits is not None:
            self._log_metrics("position_only_")
