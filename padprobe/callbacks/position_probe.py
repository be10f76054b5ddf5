"""PositionProbeCallback: measures how much position a network encodes, while it trains."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from padprobe.callbacks.logs import MeanMaps, TroubleCounter
from padprobe.callbacks.online import OnlinePosENet, OnlineRidge, small_readout
from padprobe.errors import check_name
from padprobe.maps import TARGETS, position_maps
from padprobe.network.encoders import find_encoder
from padprobe.network.stages import find_stages
from padprobe.network.tap import StageTap
from padprobe.network.trace import stage_shapes
from padprobe.processes import count_new
from padprobe.readout.posenet import PosENet, readout_side
from padprobe.readout.ridge import GRAM_LIMIT_GB, gram_gb
from padprobe.readout.spec import Readout
from padprobe.scores import PositionScores

HALF_MAX = torch.finfo(torch.float16).max
"""Features beyond this count as trouble: one such batch would outweigh all others for good."""

FEW = 16
"""The most images of a training batch that ``position/{target}/delta`` is measured on."""


class PositionProbeCallback(Callback):
    """Measures how much absolute position an encoder encodes while it trains.

    In every training batch, the stages f1..fn are caught as the host computes them, detached, and readouts learn from
    them. In every validation, the readouts' maps are scored on each image. The means are logged as
    ``position/{target}/{spc|mae|nmae}``, so loggers, ``trainer.callback_metrics`` and ``ModelCheckpoint(monitor=...)``
    see them. The host is not touched: the readouts are not among its parameters nor in its ``state_dict``, and no
    random number is drawn. The state of the readouts travels in the checkpoint, and a resumed run continues exactly.
    (With several processes, the ridge statistics in a checkpoint are those of the last validation, and so are the
    running statistics of readouts of depth 2 and more.)

    ``position/{target}/before`` is the SPC of a small closed-form readout on up to 16 images of the first training
    batch, before the first step. ``position/{target}/delta`` is that of the latest batch, minus ``before``: what the
    training has changed so far. With pretrained weights, ``before`` is not the score of an untrained network. Both
    come from very few images and do not compare with ``spc``.

    Problems during the training (a stage that does not arrive, features that are not finite) do not stop the host. They
    are warned about once, and the number of batches is logged as ``position/trouble``.

    Args:
        encoder: dotted name of the submodule to probe. Default: the one called ``encoder`` or ``backbone``, or else the
            whole module.
        stages: dotted layer names inside the encoder, or ``"auto"`` to find them with :func:`~padprobe.find_stages`.
        targets: position maps to read out, from ``H``, ``V``, ``G``, ``HS``, ``VS``.
        readout: ``"posenet"``: the paper's, trained on each batch. ``"ridge"``: linear, solved at each validation from
            statistics of the training batches, without an optimizer.
        kernel_size, depth, padding: size (odd), number and zero padding of the readout's convolutions.
        grid: side of the aligned features in cells.
        image_size: side in pixels of the maps that are predicted and scored.
        every_n_steps: learn only from every n-th training batch.
        each_stage: also read out each stage alone: ``position/{target}/{f1|f2|...}/{spc|mae|nmae}``.
        lr: learning rate of the posenet readout. In the last third of the training it is a tenth, as in the paper.
        forget: decay per batch of the ridge readout's statistics: 0.99 remembers about 100 batches.
        log_images: send the mean predicted maps and the content loss (mean error of H, V, G) to TensorBoard and W&B.
        seed: seed of the readouts' initial weights.

    Raises:
        ValueError: for an unknown target, an impossible readout, or ``every_n_steps`` below 1.
        MisconfigurationException: before training, for an encoder or stage that does not exist, that ``forward`` does
            not reach, or whose output is not (B, C, H, W); the message lists the candidates. When resuming, for options
            that differ from the checkpoint's.

    Source: paper, section 3. The readout trains as in the paper, but as long as the host does.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> probe = PositionProbeCallback(encoder="net.encoder", targets=["H", "G"])
        >>> trainer = Trainer(callbacks=[probe], accelerator="cpu", logger=False)
    """

    def __init__(
        self,
        encoder: str | None = None,
        stages: Literal["auto"] | Sequence[str] = "auto",
        targets: Sequence[str] = TARGETS,
        readout: Literal["posenet", "ridge"] = "posenet",
        kernel_size: int = 3,
        depth: int = 1,
        padding: int = 0,
        grid: int = 28,
        image_size: int = 224,
        every_n_steps: int = 1,
        each_stage: bool = False,
        lr: float = 0.1,
        forget: float = 0.99,
        log_images: bool = True,
        seed: int = 0,
    ) -> None:
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps is {every_n_steps}; expected 1 or more")
        if isinstance(stages, str) and stages != "auto":
            raise ValueError(f"stages is {stages!r}; expected 'auto' or a list of layer names such as [{stages!r}]")
        if not 0 < forget <= 1:
            raise ValueError(f"forget is {forget}; expected a number above 0 and at most 1")
        # an impossible readout is refused now, not after the data are loaded
        Readout(readout, kernel_size=kernel_size, depth=depth, padding=padding)
        readout_side(kernel_size, depth, padding, grid)
        self._maps = position_maps(image_size, targets)
        self.encoder, self.stages, self.log_images = encoder, stages, log_images
        self._options: dict[str, Any] = {
            **{"readout": readout, "targets": list(targets), "kernel_size": kernel_size, "depth": depth},
            **{"padding": padding, "grid": grid, "image_size": image_size, "each_stage": each_stage},
            **{"every_n_steps": every_n_steps, "lr": lr, "forget": forget, "seed": seed},
        }
        self._tap: StageTap | None = None
        self._module_id = 0  # of the module that is probed
        self._channels: dict[str, slice] = {}  # of "" (all stages together), f1, f2, ...
        self._probes: dict[str, OnlinePosENet | OnlineRidge] = {}
        self._restored: dict[str, Any] | None = None  # a checkpoint's state, until the readouts are on their device
        self._batches = 0  # training batches so far
        self._late = False  # whether the last third of the training has begun
        self._is_first_step = False  # whether the host has not taken a step yet
        self._before: Tensor | None = None  # (T,): SPC of the small readout before the first step
        self._latest: Tensor | None = None  # features of a few images of the latest training batch
        self._trouble = TroubleCounter()
        # during a validation or test
        self._readouts: dict[str, nn.Module] = {}  # the readouts that are scored
        self._scores: dict[str, PositionScores] = {}
        self._seen: dict[int, int] = {}  # images so far, by data loader
        self._mean_maps = MeanMaps()

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
        self.teardown(trainer, pl_module, stage)  # removes what an interrupted run may have left
        if not (is_overridden("setup", pl_module) or is_overridden("configure_model", pl_module)):
            self._attach(trainer, pl_module)  # otherwise the network may not exist yet

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start(trainer, pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start(trainer, pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._latest = None
        if self._tap is not None:
            self._tap.remove()
            self._tap = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "")

    def resolve(self, pl_module: LightningModule) -> tuple[nn.Module, list[str], list[int]]:
        """The encoder in a host, the layer names of its stages, and their numbers of channels.

        Raises:
            MisconfigurationException: if the encoder or a stage does not exist or cannot be probed.
        """
        name = find_encoder(pl_module) if self.encoder is None else self.encoder
        size = self._options["image_size"]
        try:
            if name:
                check_name(name, [n for n, _ in pl_module.named_modules() if n], "encoder")
            module = pl_module.get_submodule(name)
            module = getattr(module, "_orig_mod", module)  # the module inside torch.compile's wrapper
            with isolate_rng(include_cuda=False):  # the host's forward may draw random numbers
                stages = find_stages(module, size) if self.stages == "auto" else list(self.stages)
                shapes = stage_shapes(module, stages, size)
        except Exception as error:  # a forward pass that takes no image may raise anything
            raise MisconfigurationException(
                f"PositionProbeCallback(encoder={name!r}): {error}. It must name a module whose forward takes images "
                f"(B, C, H, W); this host's parts are {[n for n, _ in pl_module.named_children()]}"
            ) from error
        for stage, (_, height, width) in zip(stages, shapes, strict=True):
            if height * width == 1:
                raise MisconfigurationException(
                    f"PositionProbeCallback(encoder={name!r}): stage {stage!r} is 1 x 1 at image_size {size}, too "
                    f"small to show position: use larger images, or name the others of {stages} with stages=[...]"
                )
        return module, stages, [channels for channels, _, _ in shapes]

    def _attach(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Taps the stages, and makes new readouts if the present ones belong to another network."""
        module, stages, widths = self.resolve(pl_module)
        ends = list(itertools.accumulate(widths))
        channels = {"": slice(0, ends[-1])}
        if self._options["each_stage"]:
            channels |= {f"f{i + 1}": slice(e - w, e) for i, (w, e) in enumerate(zip(widths, ends, strict=True))}
        another = trainer.state.fn == TrainerFn.FITTING and id(module) != self._module_id
        if channels != self._channels or another:
            self._channels, self._batches, self._before = channels, 0, None
            self._probes = {name: self._new_probe(part.stop - part.start) for name, part in channels.items()}
            self._scores = {name: PositionScores(self._maps) for name in channels}
        self._module_id = id(module)
        self._tap = StageTap(module, stages, self._options["grid"])
        self._tap.active = False

    def _new_probe(self, in_channels: int) -> OnlinePosENet | OnlineRidge:
        o = self._options
        if o["readout"] == "ridge":
            size = gram_gb(in_channels, o["kernel_size"])
            if size > GRAM_LIMIT_GB:
                raise MisconfigurationException(
                    f"PositionProbeCallback(readout='ridge', kernel_size={o['kernel_size']}): the statistics of "
                    f"{in_channels} channels would take {size:.1f} GB, more than {GRAM_LIMIT_GB}: use kernel_size=1 "
                    "or fewer stages"
                )
            return OnlineRidge(o["targets"], self._maps, in_channels, o["kernel_size"], o["grid"], o["forget"])
        shape = (o["kernel_size"], o["depth"], o["padding"], o["grid"], o["image_size"], o["seed"])
        return OnlinePosENet(PosENet(in_channels, o["targets"], *shape).float(), o["lr"])

    @torch.inference_mode(False)  # tensors of a validation before the fit must be able to learn later
    def _start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Moves readouts and scores to the host's device, then restores a checkpoint's state if one was loaded."""
        if self._tap is None:
            self._attach(trainer, pl_module)
        self._maps = self._maps.to(pl_module.device)
        for name, probe in self._probes.items():
            probe.to(pl_module.device)
            self._scores[name].to(pl_module.device)
        if self._restored is not None:
            for name, probe in self._probes.items():
                probe.load_state_dict(self._restored["probes"][name])
            before = self._restored["before"]
            self._before = None if before is None else before.to(pl_module.device)
            self._batches = self._restored["batches"]
            self._restored = None

    # ------------------------------------------------------------------ training the readouts

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        assert self._tap is not None
        self._tap.clear()
        self._tap.active = self._batches % self._options["every_n_steps"] == 0
        self._is_first_step = self._batches == trainer.global_step == 0
        self._late = _progress(trainer, batch_idx) >= 2 / 3
        self._batches += 1
        if self._tap.active:
            self._latest = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert self._tap is not None
        if not self._tap.active:
            return
        features = self._take_features()
        with torch.autocast(pl_module.device.type, enabled=False):
            for name, part in self._channels.items():
                self._probes[name].step(None if features is None else features[:, part], self._late)
        if features is not None:  # a slice would keep the memory of the whole batch
            self._latest = features if len(features) <= FEW else features[:FEW].clone()
        if self._is_first_step:
            self._before = self._small_readout(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._log_trouble(trainer, pl_module)

    def _take_features(self) -> Tensor | None:
        """The stages of the host's last forward pass, 0 where they exceed half precision; None if one is missing."""
        assert self._tap is not None
        self._tap.active = False
        if self._tap.missing:
            self._trouble.add_missing(self._tap.missing)
            self._tap.clear()
            return None
        features = self._tap.take()
        usable = features.abs() <= HALF_MAX
        self._trouble.add_batch(usable)
        return features.masked_fill_(~usable, 0.0)  # they would spoil a readout for good

    def _small_readout(self, trainer: Trainer) -> Tensor | None:
        """SPC of the small readout on the latest batch, (T,), the mean over processes with 4 images or more.

        None if no process has that many.
        """
        sums = torch.zeros(len(self._maps) + 1, device=self._maps.device)
        if self._latest is not None and len(self._latest) >= 4:
            with torch.autocast(self._latest.device.type, enabled=False):
                sums[:-1] = small_readout(self._latest, self._options["targets"], self._maps)
            sums[-1] = 1
        sums = trainer.strategy.reduce(sums, reduce_op="sum")
        return sums[:-1] / sums[-1] if sums[-1] else None

    # ------------------------------------------------------------------ scoring them

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start_scoring(trainer)

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start_scoring(trainer)

    def on_validation_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kw: Any) -> None:
        self._start_batch()

    def on_test_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kw: Any) -> None:
        self._start_batch()

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, dataloader_idx=0
    ) -> None:
        self._score_batch(trainer, dataloader_idx)

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, dataloader_idx=0
    ) -> None:
        self._score_batch(trainer, dataloader_idx)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._log_scores(trainer, pl_module)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._log_scores(trainer, pl_module)

    @torch.inference_mode(False)
    def _start_scoring(self, trainer: Trainer) -> None:
        current = {} if trainer.sanity_checking else {name: probe.current() for name, probe in self._probes.items()}
        self._readouts = {name: readout for name, readout in current.items() if readout is not None}
        if not (self._readouts or trainer.sanity_checking):
            rank_zero_warn(
                "PositionProbeCallback: its readouts are untrained, so nothing is scored. Fit first, or pass the "
                "ckpt_path of a run that had this callback."
            )
        self._seen, self._mean_maps = {}, MeanMaps()
        for name in self._readouts:
            self._scores[name].reset()
            self._scores[name].update(self._maps[None][:0])  # so that a process without images can sync with the others

    def _start_batch(self) -> None:
        assert self._tap is not None
        self._tap.clear()
        self._tap.active = bool(self._readouts)

    def _score_batch(self, trainer: Trainer, dataloader_idx: int) -> None:
        assert self._tap is not None
        features = self._take_features() if self._tap.active else None
        if features is None:
            return
        loaders = trainer.test_dataloaders if trainer.testing else trainer.val_dataloaders
        loader = tree_leaves(getattr(loaders, "iterables", loaders))[dataloader_idx]
        start = self._seen.get(dataloader_idx, 0)
        self._seen[dataloader_idx] = start + len(features)
        features = features[: count_new(loader, start, len(features))]  # those that no process has scored yet
        with torch.no_grad(), torch.autocast(features.device.type, enabled=False):
            for name, readout in self._readouts.items():
                prediction = readout(features[:, self._channels[name]])
                self._scores[name].update(prediction)
                if not name and self.log_images and trainer.is_global_zero:
                    self._mean_maps.add(prediction, self._maps)

    def _log_scores(self, trainer: Trainer, pl_module: LightningModule) -> None:
        targets = self._options["targets"]
        for name in self._readouts:
            scores = self._scores[name].per_image()
            if not len(scores["spc"]):  # no stage arrived
                continue
            for metric in ("spc", "mae", "nmae"):
                for target, mean in zip(targets, scores[metric].mean(0), strict=True):
                    key = "/".join(filter(None, ("position", target, name, metric)))
                    pl_module.log(key, mean, prog_bar=key == f"position/{targets[0]}/spc", sync_dist=True)
        if self._before is not None and trainer.state.fn == TrainerFn.FITTING and self._readouts:
            now = self._small_readout(trainer)
            if now is not None:
                for target, before, after in zip(targets, self._before, now, strict=True):
                    pl_module.log(f"position/{target}/before", before, sync_dist=True)
                    pl_module.log(f"position/{target}/delta", after - before, sync_dist=True)
        self._mean_maps.log(trainer, targets)
        self._readouts = {}
        self._log_trouble(trainer, pl_module)

    def _log_trouble(self, trainer: Trainer, pl_module: LightningModule) -> None:
        count = self._trouble.take(trainer, pl_module.device)
        if count:
            pl_module.log("position/trouble", float(count), sync_dist=True)

    # ------------------------------------------------------------------ checkpoints

    @property
    def state_key(self) -> str:
        stages = self.stages if isinstance(self.stages, str) else list(self.stages)
        return self._generate_state_key(encoder=self.encoder, stages=stages, targets=self._options["targets"])

    def state_dict(self) -> dict[str, Any]:
        if not self._batches:
            return {}
        return {
            "options": self._options,
            "probes": {name: probe.state_dict() for name, probe in self._probes.items()},
            "batches": self._batches,
            "before": self._before,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if not state_dict:
            return
        saved, options = state_dict["options"], self._options
        changed = [f"{k} was {saved.get(k)!r} and is {options[k]!r}" for k in options if saved.get(k) != options[k]]
        if changed:
            raise MisconfigurationException(
                "PositionProbeCallback: the readouts in the checkpoint were made with other options "
                f"({'; '.join(changed)}): use those, or leave the callback out"
            )
        self._restored = state_dict

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        saved = [key for key in checkpoint.get("callbacks", {}) if key.startswith(type(self).__name__)]
        if saved and self.state_key not in saved:
            rank_zero_warn(
                f"PositionProbeCallback: the checkpoint has no readouts for {self.state_key}, so these start "
                f"from the beginning; it has readouts for {', '.join(saved)}"
            )


def _progress(trainer: Trainer, batch_idx: int) -> float:
    """The part of the training that is done, in [0, 1); 0 if its length is unknown."""
    by_steps = trainer.global_step / trainer.max_steps if trainer.max_steps > 0 else 0.0
    epochs = trainer.current_epoch + batch_idx / trainer.num_training_batches
    return max(by_steps, epochs / trainer.max_epochs if trainer.max_epochs and trainer.max_epochs > 0 else 0.0)
