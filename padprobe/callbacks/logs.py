"""What the callback logs beside its scores: mean maps as images, and the batches that it cannot use."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor


class MeanMaps:
    """Means over images of the predicted maps and of their absolute errors.

    Args:
        prefix: what the names of the images begin with.
    """

    def __init__(self, prefix: str = "position") -> None:
        self._prefix = prefix
        self._sums: Tensor | None = None  # (2, T, H, W): of predictions and of errors
        self._images = 0

    def add(self, prediction: Tensor, maps: Tensor) -> None:
        """Adds predictions (B, T, H, W) of the maps (T, H, W)."""
        sums = torch.stack([prediction.sum(0), (prediction - maps).abs().sum(0)])
        self._sums = sums if self._sums is None else self._sums + sums
        self._images += len(prediction)

    def log(self, trainer: Trainer, targets: Sequence[str]) -> None:
        """Sends the maps side by side, and the content loss (mean error of H, V, G), to TensorBoard and W&B."""
        from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger

        if self._sums is None or not self._images:
            return
        predictions, errors = self._sums / self._images
        images = {f"{self._prefix}/maps": torch.cat(list(predictions), dim=1)}
        content = [error for error, target in zip(errors, targets, strict=True) if target in ("H", "V", "G")]
        if content:
            images[f"{self._prefix}/content_loss"] = torch.stack(content).mean(0)
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
        self._warned = self._warned_of_calls = self._warned_of_samples = False

    def warn_of_calls(self, calls: Counter[str]) -> None:
        """Says once which of several calls of the encoder are read, from their number by size."""
        if not self._warned_of_calls:
            self._warned_of_calls = True
            listed = ", ".join(f"{count} at {size}" for size, count in calls.items())
            rank_zero_warn(
                f"PositionProbeCallback: the encoder was called {calls.total()} times in one batch ({listed}); the "
                "calls with the largest input are read."
            )

    def warn_of_samples(self, images: int, samples: int) -> None:
        """Says once that the images are not so many views of each sample."""
        if not self._warned_of_samples:
            self._warned_of_samples = True
            rank_zero_warn(
                f"PositionProbeCallback: the encoder saw {images} images for a batch of {samples} samples: each image "
                "counts as a sample, also those that a DistributedSampler repeats."
            )

    def add_unread(self, why: str) -> None:
        """Counts a batch that cannot be read."""
        if not self._warned:
            rank_zero_warn(
                f"PositionProbeCallback: in this batch {why}. This batch and all later ones like it are skipped. Name "
                "stages that every forward pass calls, and that keep their width."
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
                f"PositionProbeCallback: {missing} batch(es) lacked a stage or had other channels and were skipped, "
                f"{not_finite} had features that are not finite or beyond half precision (replaced by 0). "
                "position/trouble counts them."
            )
        return missing + not_finite
