"""What the callback logs beside its scores: mean maps as images, and the batches that it cannot use."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor


class MeanMaps:
    """Means over images of the predicted maps and of their absolute errors."""

    def __init__(self) -> None:
        self._sums: Tensor | None = None  # (2, T, S, S): of predictions and of errors
        self._images = 0

    def add(self, prediction: Tensor, maps: Tensor) -> None:
        """Adds predictions (B, T, S, S) of the maps (T, S, S)."""
        sums = torch.stack([prediction.sum(0), (prediction - maps).abs().sum(0)])
        self._sums = sums if self._sums is None else self._sums + sums
        self._images += len(prediction)

    def log(self, trainer: Trainer, targets: Sequence[str]) -> None:
        """Sends the maps side by side, and the content loss (mean error of H, V, G), to TensorBoard and W&B."""
        from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger

        if self._sums is None or not self._images:
            return
        predictions, errors = self._sums / self._images
        images = {"position/maps": torch.cat(list(predictions), dim=1)}
        content = [error for error, target in zip(errors, targets, strict=True) if target in ("H", "V", "G")]
        if content:
            images["position/content_loss"] = torch.stack(content).mean(0)
        for name, image in images.items():
            pixels = (255 * image.clamp(0, 1)).byte().cpu()
            for logger in trainer.loggers:
                if isinstance(logger, TensorBoardLogger):
                    logger.experiment.add_image(name, pixels[None], trainer.global_step)
                elif isinstance(logger, WandbLogger):
                    logger.log_image(name, [pixels.numpy()], step=trainer.global_step)


class TroubleCounter:
    """Counts the batches that a readout cannot learn from or be scored on, and warns once."""

    def __init__(self) -> None:
        self._missing = 0
        self._not_finite: Tensor | int = 0
        self._warned = False

    def add_missing(self, stages: Sequence[str]) -> None:
        """Counts a batch in which these stages did not arrive."""
        if not self._warned:
            rank_zero_warn(
                f"PositionProbeCallback: stage(s) {', '.join(stages)} did not arrive in this batch. This batch and all "
                "later ones like it are skipped. Name stages that every forward pass calls."
            )
        self._missing, self._warned = self._missing + 1, True

    def add_batch(self, usable: Tensor) -> None:
        """Counts a batch if not all of its features are usable (bool, any shape). The device is not waited for."""
        self._not_finite = self._not_finite + (~usable.all()).int()

    def take(self, trainer: Trainer, device: torch.device) -> int:
        """The number of bad batches in all processes since the last call. All processes must call it."""
        counts = torch.stack([torch.as_tensor(n, device=device) for n in (self._missing, self._not_finite)]).float()
        missing, not_finite = trainer.strategy.reduce(counts, reduce_op="sum").int().tolist()
        self._missing = self._not_finite = 0
        if missing + not_finite and not self._warned:
            self._warned = True
            rank_zero_warn(
                f"PositionProbeCallback: {missing} batch(es) lacked a stage and were skipped, {not_finite} had "
                "features that are not finite or beyond half precision (replaced by 0). position/trouble counts them."
            )
        return missing + not_finite
