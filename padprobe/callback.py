"""PositionProbeCallback: probes a network while it trains."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from padprobe.encoders import find_encoder
from padprobe.errors import check_name
from padprobe.maps import TARGETS
from padprobe.readout.posenet import PosENet, make_optimizer
from padprobe.scores import PositionScores
from padprobe.stages import StageTap, find_stages, stage_shapes


class PositionProbeCallback(Callback):
    """Measures how much absolute position an encoder encodes, while it trains.

    Every training batch's stages f1..fn are caught as the host computes them, detached, and the paper's readouts are
    trained on them with an optimizer of their own. On every validation image the readouts' maps are scored; the means
    are logged as ``position/{target}/{spc|mae|nmae}``, so loggers, ``trainer.callback_metrics`` and
    ``ModelCheckpoint(monitor=...)`` see them. The host is not touched: readouts are neither in its parameters nor in
    its ``state_dict``, and no random number is drawn. Their state travels in the checkpoint, as the callback's own.

    A position score needs its control beside it: probe an untrained twin too (``padprobe study``).

    Args:
        encoder: dotted name of the submodule to probe. Default: the one called ``encoder`` or ``backbone``, or else the
            whole module.
        stages: dotted layer names inside the encoder, or ``"auto"``: :func:`~padprobe.find_stages`.
        targets: position maps to read out, of ``H``, ``V``, ``G``, ``HS``, ``VS``.
        kernel_size: of the readout's convolutions.
        depth: number of the readout's convolutions.
        padding: zero padding of the readout's convolutions.
        grid: side of the aligned features in cells.
        image_size: side in pixels of the maps that are predicted and scored.
        every_n_steps: train the readouts on every n-th batch only.
        lr: learning rate of the readouts; a tenth of it in the last third of the training, as in the paper.
        seed: of the readouts' initial weights.

    Raises:
        ValueError: for an unknown target, an impossible readout, ``every_n_steps`` under 1.
        MisconfigurationException: in ``setup``, before training, for an encoder or stage that does not exist, that
            ``forward`` does not reach, or that gives no (B, C, H, W) output; the message lists the candidates.

    Example::

        >>> from lightning.pytorch import Trainer
        >>> from padprobe import PositionProbeCallback
        >>> trainer = Trainer(callbacks=[PositionProbeCallback(encoder="net.encoder")])

    Source: paper, section 3; the readout's training is the paper's but for its length, which is the host's.
    """

    def __init__(
        self,
        encoder: str | None = None,
        stages: Literal["auto"] | Sequence[str] = "auto",
        targets: Sequence[str] = TARGETS,
        kernel_size: int = 3,
        depth: int = 1,
        padding: int = 0,
        grid: int = 28,
        image_size: int = 224,
        every_n_steps: int = 1,
        lr: float = 0.1,
        seed: int = 0,
    ) -> None:
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps is {every_n_steps}; expected 1 or more")
        if isinstance(stages, str) and stages != "auto":
            raise ValueError(f"stages is {stages!r}; expected 'auto' or a list of layer names such as [{stages!r}]")
        self.encoder, self.stages, self.every_n_steps, self.lr = encoder, stages, every_n_steps, lr
        self._options: dict[str, Any] = {
            "targets": tuple(targets),
            "kernel_size": kernel_size,
            "depth": depth,
            "padding": padding,
            "grid": grid,
            "size": image_size,
            "seed": seed,
        }
        PosENet(1, **self._options)  # an impossible readout is named here, not after the data have been loaded
        self._tap: StageTap | None = None
        self._readout: PosENet | None = None
        self._optimizer: torch.optim.SGD | None = None
        self._scores: PositionScores | None = None
        self._restored: dict[str, Any] | None = None  # a checkpoint's state, until the readout is on its device
        self._batches = 0  # training batches seen
        self._steps = 0  # readout steps taken
        self._warned = False

    @property
    def state_key(self) -> str:
        stages = self.stages if isinstance(self.stages, str) else list(self.stages)
        return self._generate_state_key(encoder=self.encoder, stages=stages, **self._options)

    # ------------------------------------------------------------------ set up and tear down

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "predict":
            return
        for other in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(other, PositionProbeCallback) and other is not self:
                shared = set(other._options["targets"]) & set(self._options["targets"])
                if shared:
                    raise MisconfigurationException(
                        f"two PositionProbeCallbacks read out {', '.join(sorted(shared))} and would log under the same "
                        "keys: give them different targets"
                    )
        module, stages, channels = self.resolve(pl_module)
        if self._readout is None or self._readout.weight.shape[1] != channels:
            self._readout = PosENet(channels, **self._options)
            self._optimizer, self._batches, self._steps = None, 0, 0
        self._scores = PositionScores(self._readout.maps)
        self.teardown(trainer, pl_module, stage)  # what a run that was interrupted may have left
        self._tap = StageTap(module, stages, self._options["grid"])
        self._tap.active = False

    def resolve(self, pl_module: LightningModule) -> tuple[nn.Module, list[str], int]:
        """The encoder, its stages and their channels in all; raises MisconfigurationException if they do not exist."""
        name = find_encoder(pl_module) if self.encoder is None else self.encoder
        size = self._options["size"]
        try:
            if name:
                check_name(name, [n for n, _ in pl_module.named_modules() if n], "encoder")
            module = pl_module.get_submodule(name)
            stages = find_stages(module, size) if self.stages == "auto" else list(self.stages)
            return module, stages, sum(c for c, _, _ in stage_shapes(module, stages, size))
        except ValueError as error:
            raise MisconfigurationException(
                f"PositionProbeCallback(encoder={name!r}): {error} (the network must be built in the module's __init__)"
            ) from error

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._tap is not None:
            self._tap.remove()
            self._tap = None

    def _to_device(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Readout, scores and optimizer where the host is; then a checkpoint's state, if one was loaded."""
        assert self._readout is not None
        assert self._scores is not None
        self._readout.to(pl_module.device)
        self._scores.to(pl_module.device)
        if self._optimizer is None:
            self._optimizer = make_optimizer(self._readout, self.lr)
        if self._restored is not None:
            self._readout.load_state_dict(self._restored["readout"])
            self._optimizer.load_state_dict(self._restored["optimizer"])
            self._batches, self._steps = self._restored["batches"], self._restored["steps"]
            self._restored = None

    on_fit_start = on_train_start = on_validation_start = on_test_start = _to_device

    # ------------------------------------------------------------------ training the readouts

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        assert self._tap is not None
        self._tap.active = self._batches % self.every_n_steps == 0
        self._batches += 1

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        features = self._take()
        if features is None:
            return
        assert self._readout is not None
        assert self._optimizer is not None
        for group in self._optimizer.param_groups:
            group["lr"] = self.lr if _progress(trainer) < 2 / 3 else self.lr / 10
        self._readout.train()
        self._optimizer.zero_grad()
        with torch.enable_grad(), torch.autocast(features.device.type, enabled=False):
            self._readout.loss(features).sum().backward()
        if trainer.world_size > 1:
            for parameter in self._readout.parameters():
                parameter.grad = trainer.strategy.reduce(parameter.grad, reduce_op="mean")  # type: ignore[assignment]
        self._optimizer.step()
        self._steps += 1

    def _take(self) -> Tensor | None:
        """The stages of the host's last forward pass, if they were wanted and arrived."""
        assert self._tap is not None
        wanted, self._tap.active = self._tap.active, False
        if wanted and self._tap.missing:
            if not self._warned:
                rank_zero_warn(
                    f"PositionProbeCallback: stage(s) {', '.join(self._tap.missing)} did not arrive in this batch; it "
                    "is left out, and so are later ones like it. Name stages that every forward pass calls."
                )
            self._warned = True
            self._tap.clear()
            return None
        # what is not finite (half precision overflows) must not spoil the readout for good
        return self._tap.take().nan_to_num(0.0, 0.0, 0.0) if wanted else None

    # ------------------------------------------------------------------ scoring

    def _start_scoring(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self._scores is not None
        self._scores.reset()
        if not (self._steps or trainer.sanity_checking):
            rank_zero_warn(
                "PositionProbeCallback: its readouts are untrained, so nothing is scored; fit first, or give the "
                "ckpt_path of a run that had this callback"
            )

    def _want(self, trainer: Trainer, *args: Any) -> None:
        assert self._tap is not None
        self._tap.active = bool(self._steps) and not trainer.sanity_checking

    def _score(self, *args: Any) -> None:
        features = self._take()
        if features is None:
            return
        assert self._readout is not None
        assert self._scores is not None
        with torch.no_grad(), torch.autocast(features.device.type, enabled=False):
            self._scores.update(self._readout.eval()(features))

    def _log(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self._scores is not None
        if not self._scores.update_called:  # nothing is trained yet, or no stage arrived
            return
        scores = self._scores.per_image()
        for metric in ("spc", "mae", "nmae"):
            means = scores[metric].mean(0)
            for target, mean in zip(self._options["targets"], means, strict=True):
                pl_module.log(f"position/{target}/{metric}", mean)

    on_validation_epoch_start = on_test_epoch_start = _start_scoring

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._want(trainer)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._score()

    on_test_batch_start, on_test_batch_end = on_validation_batch_start, on_validation_batch_end
    on_validation_epoch_end = on_test_epoch_end = _log

    # ------------------------------------------------------------------ checkpoints

    def state_dict(self) -> dict[str, Any]:
        if self._readout is None or self._optimizer is None:
            return {}
        return {
            "readout": self._readout.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "batches": self._batches,
            "steps": self._steps,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict or None


def _progress(trainer: Trainer) -> float:
    """How much of the training is behind it, in [0, 1); 0 where its length is unknown."""
    if trainer.max_steps > 0:
        return trainer.global_step / trainer.max_steps
    epochs = trainer.max_epochs or 0
    return trainer.current_epoch / epochs if epochs > 0 else 0.0
