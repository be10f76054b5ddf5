"""PositionProbeCallback: measures how much position a network encodes, while it trains."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from padprobe.callbacks.attach import (
    Probed,
    check_options,
    check_stages,
    check_trainer,
    check_validation,
    find_probed,
    is_compiled,
    trace_sizes,
)
from padprobe.callbacks.change import Change
from padprobe.callbacks.logs import MeanMaps, TroubleCounter
from padprobe.callbacks.online import OnlinePosENet, OnlineRidge, OnlineScores, by_view, make_online, saved_channels
from padprobe.maps import TARGETS, Size, position_maps, size_pair
from padprobe.network.tap import StageTap
from padprobe.precision import full_float32
from padprobe.processes import count_new, count_samples, gather_objects
from padprobe.readout.posenet import readout_side
from padprobe.readout.spec import Readout

HALF_MAX = torch.finfo(torch.float16).max
"""Features beyond this count as trouble: one such batch would outweigh all others for good."""


class PositionProbeCallback(Callback):
    """Measures how much absolute position an encoder encodes while it trains.

    In every training batch, the stages f1..fn are caught as the host computes them, detached, and readouts learn from
    them. In every validation, the readouts' maps are scored on each image. The means are logged as
    ``position/{target}/{spc|mae|nmae}``, so loggers, ``trainer.callback_metrics`` and ``ModelCheckpoint(monitor=...)``
    see them. The host is not touched: the readouts are not among its parameters nor in its ``state_dict``, and no
    random number is drawn. The state of the readouts travels in the checkpoint, and a resumed run continues exactly.
    (With several processes, the ridge statistics in a checkpoint are those of the last validation, and so are the
    running statistics of readouts of depth 2 and more.)

    The readouts are made for the first training batch: for its numbers of channels and for the proportions of its
    images. Position is relative, so later batches may have other sizes. Where the host calls the encoder several times
    in a step, the calls with the largest input are read (of DINO's crops, the global views); a sample's score is the
    mean over its views.

    ``position/{target}/start`` is the SPC of a small closed-form readout on up to 16 images per process of the first
    training batch, before the first step. ``position/{target}/change`` is that of the latest batch, minus ``start``:
    what the training has changed so far; ``change_se`` is its standard error over these images. It is not the
    difference from an untrained network unless the training began with one. All three come from very few images and do
    not compare with ``spc``.

    Problems during the training (a stage that does not arrive, features that are not finite) do not stop the host. They
    are warned about once, and the number of batches is logged as ``position/trouble``.

    Args:
        encoder: dotted name of the submodule to probe. Default: the one called ``encoder`` or ``backbone``, or else the
            whole module.
        stages: dotted layer names inside the encoder; or ``"auto"`` to find them with :func:`~padprobe.find_stages`, or
            ``"each_block"`` for all blocks. Named stages need no trace, so the encoder may take more than the image.
        targets: position maps to read out, from ``H``, ``V``, ``G``, ``HS``, ``VS``.
        readout: ``"posenet"``: the paper's, trained on each batch. ``"ridge"``: linear, solved at each validation from
            statistics of the training batches, without an optimizer.
        kernel_size: size (odd) of the readout's convolutions. Default: 3 for posenet, 1 for ridge.
        depth, padding: number and zero padding of the readout's convolutions.
        grid: side of the aligned features in cells.
        image_size: longer side in pixels of the maps that are predicted and scored; they have the proportions of the
            encoder's input in the first batch. A pair (height, width) fixes both.
        every_n_steps: learn only from every n-th training batch.
        each_stage: also read out each stage alone: ``position/{target}/{f1|f2|...}/{spc|mae|nmae}``.
        lr: learning rate of the posenet readout. In the last third of the training it is a tenth, as in the paper.
        forget: decay per batch of the ridge readout's statistics: 0.99 remembers about 100 batches.
        log_images: send the mean predicted maps and the content loss (mean error of H, V, G) to TensorBoard and W&B.
        seed: seed of the readouts' initial weights.
        layout: what the stages' outputs are: ``"NCHW"``, ``"NHWC"`` or ``"tokens"`` (B, tokens, C). ``"auto"`` finds it
            as :func:`~padprobe.probe_encoder` does; of named stages, from the shapes in the first batch.
        name: goes before all keys (``{name}/position/...``), so that several encoders of one host can be probed.

    Raises:
        ValueError: for an unknown target, an impossible readout, or ``every_n_steps`` below 1.
        MisconfigurationException: before training, for an encoder or stage that does not exist, for several possible
            encoders (the message lists the candidates), and for a fit without validation, which would score nothing. In
            the first batch, before the first step, for a stage whose output is not (B, C, H, W) or has one pixel. When
            resuming, for options that differ from the checkpoint's.

    Source: paper, section 3. The readout trains as in the paper, but as long as the host does.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> probe = PositionProbeCallback(encoder="net.encoder", targets=["H", "G"])
        >>> trainer = Trainer(callbacks=[probe], accelerator="cpu", logger=False)
    """

    def __init__(
        self,
        encoder: str | None = None,
        stages: Literal["auto", "each_block"] | Sequence[str] = "auto",
        targets: Sequence[str] = TARGETS,
        readout: Literal["posenet", "ridge"] = "posenet",
        kernel_size: int | None = None,
        depth: int = 1,
        padding: int = 0,
        grid: int = 28,
        image_size: Size = 224,
        every_n_steps: int = 1,
        each_stage: bool = False,
        lr: float = 0.1,
        forget: float = 0.99,
        log_images: bool = True,
        seed: int = 0,
        name: str | None = None,
        layout: Literal["auto", "NCHW", "NHWC", "tokens"] = "auto",
    ) -> None:
        if kernel_size is None:
            kernel_size = 1 if readout == "ridge" else 3
        counts = {"kernel_size": kernel_size, "depth": depth, "padding": padding, "grid": grid, "seed": seed}
        check_options(stages, targets, layout, name, every_n_steps, lr, forget, counts)
        # an impossible readout is refused now, not after the data are loaded
        Readout(readout, kernel_size=kernel_size, depth=depth, padding=padding)
        readout_side(kernel_size, depth, padding, grid)
        size = size_pair(image_size, "image_size")
        position_maps(size, targets)
        self.encoder, self.stages, self.log_images, self.name = encoder, stages, log_images, name
        self._options: dict[str, Any] = {
            **{"readout": readout, "targets": list(targets), "kernel_size": kernel_size, "depth": depth},
            **{"padding": padding, "grid": grid, "image_size": size[0] if isinstance(image_size, int) else list(size)},
            **{"each_stage": each_stage, "every_n_steps": every_n_steps, "lr": lr, "forget": forget, "seed": seed},
            "layout": layout,
        }
        self._prefix = "position" if name is None else f"{name}/position"
        self._tap: StageTap | None = None
        self._probed: Probed | None = None  # as found before the start of the run
        self._module_id = 0  # of the encoder that is probed
        self._is_checked = False  # whether a batch has shown that the tapped stages can be read
        self._size = (0, 0)  # height and width of the maps, from the first batch on
        self._channels: dict[str, slice] = {}  # of "" (all stages together), f1, f2, ...; from the first batch on
        self._probes: dict[str, OnlinePosENet | OnlineRidge] = {}
        self._maps = torch.empty(0)  # (T, height, width)
        self._restored: dict[str, Any] | None = None  # a checkpoint's state, until the readouts are on their device
        self._batches = 0  # training batches so far
        self._late = False  # whether the last third of the training has begun
        self._is_first_step = False  # whether the host has not taken a step yet
        self._change = Change()
        self._trouble = TroubleCounter()
        # during a validation or test
        self._readouts: dict[str, nn.Module] = {}  # the readouts that are scored
        self._scores: dict[str, OnlineScores] = {}
        self._seen: dict[int, int] = {}  # samples so far, by data loader
        self._mean_maps = MeanMaps(self._prefix)

    # ------------------------------------------------------------------ set up and tear down

    @property
    def log_keys(self) -> set[str]:
        """What its metrics' names begin with."""
        return {f"{self._prefix}/{target}" for target in self._options["targets"]}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "predict":
            return
        check_trainer(trainer, self, self.log_keys)
        self.teardown(trainer, pl_module, stage)  # removes what an interrupted run may have left
        is_late = is_overridden("setup", pl_module) or is_overridden("configure_model", pl_module)
        try:
            self._probed = self.resolve(pl_module)
        except MisconfigurationException:
            if not is_late:  # otherwise the network may not exist yet
                raise

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start(trainer, pl_module, is_new_fit=True)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        check_validation(sum(trainer.num_val_batches) > 0)
        self._start(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start(trainer, pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start(trainer, pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._probed = None
        self._change.keep(None)
        if self._tap is not None:
            self._tap.remove()
            self._tap = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "")

    def resolve(self, pl_module: LightningModule) -> Probed:
        """The encoder in a host, and the layer names of its stages.

        Raises:
            MisconfigurationException: if the encoder or a stage does not exist, or ``"auto"`` finds no stages.
        """
        sizes = trace_sizes(pl_module, self._options["image_size"])
        return find_probed(pl_module, self.encoder, self.stages, self._options["layout"], sizes)

    @torch.inference_mode(False)  # tensors of a validation before the fit must be able to learn later
    def _start(self, trainer: Trainer, pl_module: LightningModule, is_new_fit: bool = False) -> None:
        """Taps the stages, moves readouts and scores to the host's device, and restores a checkpoint's state.

        Layers may have been replaced since the last call (LoRA, synchronised BatchNorm), so the tap is renewed where it
        no longer holds the host's own.
        """
        _, module, stages, layouts = self._find_again(pl_module)
        tap, layers = self._tap, dict(module.named_modules(remove_duplicate=False))
        if tap is None or any(layers.get(stage) is not layer for stage, layer in tap.modules.items()):
            if tap is not None:
                tap.remove()
            self._tap = StageTap(module, stages, self._options["grid"], None, layouts, self._options["layout"])
            self._tap.active, self._is_checked = False, False
            if is_compiled(pl_module):  # graphs that were compiled without the tap would go on without it
                torch.compiler.reset()
        if is_new_fit and id(module) != self._module_id:  # readouts of another network
            self._channels, self._probes, self._scores = {}, {}, {}
            self._batches, self._change = 0, Change()
        self._module_id = id(module)
        self._restore(pl_module.device)
        self._to(pl_module.device)

    def _find_again(self, pl_module: LightningModule) -> Probed:
        """The encoder and its stages as they are now; a search for stages is made once per encoder."""
        known = self._probed
        if known is None or not isinstance(self.stages, str):
            return self.resolve(pl_module)
        with contextlib.suppress(MisconfigurationException):  # the layers may have other names by now
            now = find_probed(pl_module, known.name, known.stages, self._options["layout"], [])
            if now.encoder is known.encoder:
                return now._replace(layouts=dict(zip(now.stages, known.layouts.values(), strict=False)))
        self._probed = self.resolve(pl_module)
        return self._probed

    def _build(self, widths: Sequence[int], image: tuple[int, int]) -> None:
        """Makes readouts for stages of these numbers of channels and images of this height and width."""
        wanted = self._options["image_size"]
        if isinstance(wanted, int):
            self._size = (max(2, round(wanted * image[0] / max(image))), max(2, round(wanted * image[1] / max(image))))
        else:
            self._size = (wanted[0], wanted[1])
        self._maps = position_maps(self._size, self._options["targets"])
        ends = list(itertools.accumulate(widths))
        self._channels = {"": slice(0, ends[-1])}
        if self._options["each_stage"]:
            self._channels |= {f"f{i + 1}": slice(e - w, e) for i, (w, e) in enumerate(zip(widths, ends, strict=True))}
        self._probes = {
            name: make_online(part.stop - part.start, self._maps, self._options)
            for name, part in self._channels.items()
        }
        self._scores = {name: OnlineScores(self._maps) for name in self._channels}

    def _to(self, device: torch.device) -> None:
        self._maps = self._maps.to(device)
        for name, probe in self._probes.items():
            probe.to(device)
            self._scores[name].to(device)

    # ------------------------------------------------------------------ training the readouts

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        assert self._tap is not None
        self._tap.clear()
        self._tap.active = self._batches % self._options["every_n_steps"] == 0
        self._is_first_step = self._batches == trainer.global_step == 0
        self._late = _progress(trainer, batch_idx) >= 2 / 3
        self._batches += 1

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        self._check_stages()  # before the first step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert self._tap is not None
        if not self._tap.active:
            return
        self._check_stages()
        found = [channels for channels, _, _ in self._tap.map_shapes.values()], self._tap.size
        features = self._take_features()
        if not self._probes:
            # the same in all processes, from what the first process with images has seen
            known = [shapes for shapes in gather_objects(None if features is None else found) if shapes]
            if known:
                self._build(*known[0])
            self._to(pl_module.device)
        with full_float32(pl_module.device):
            for name, part in self._channels.items():
                self._probes[name].step(None if features is None else features[:, part], self._late)
        if features is not None:
            self._change.keep(features)
        if self._is_first_step and self._probes:
            self._change.at_start = self._change.measure(trainer, self._maps)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._log_trouble(trainer, pl_module)

    def _check_stages(self) -> None:
        """Refuses, in the first batch that is caught, stages that cannot be read."""
        tap = self._tap
        if tap is not None and tap.active and not self._is_checked and (tap.no_maps or not tap.missing):
            self._is_checked = True
            made_for = self._channels[""].stop if self._channels else None
            check_stages(tap, isinstance(self.stages, str), made_for, self._options)

    def _take_features(self) -> Tensor | None:
        """The stages of the host's latest calls, 0 where they exceed half precision; None if one is missing."""
        assert self._tap is not None
        self._check_stages()
        calls = self._tap.calls
        if calls.total() > 1:
            self._trouble.warn_of_calls(calls)
        self._tap.active = False
        if self._tap.missing:
            self._trouble.add_unread(f"stage(s) {', '.join(self._tap.missing)} did not arrive")
            self._tap.clear()
            return None
        features = self._tap.take()
        if self._channels and features.shape[1] != self._channels[""].stop:
            self._trouble.add_unread(f"the stages have {features.shape[1]} channels, not {self._channels[''].stop}")
            return None
        usable = features.abs() <= HALF_MAX
        self._trouble.add_batch(usable)
        return features.masked_fill_(~usable, 0.0)  # they would spoil a readout for good

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
        self._score_batch(trainer, batch, dataloader_idx)

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, dataloader_idx=0
    ) -> None:
        self._score_batch(trainer, batch, dataloader_idx)

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
        self._seen, self._mean_maps = {}, MeanMaps(self._prefix)
        for name in self._readouts:
            self._scores[name].reset()
            self._scores[name].update(self._maps[None][:0])  # so that a process without images can sync with the others

    def _start_batch(self) -> None:
        assert self._tap is not None
        self._tap.clear()
        self._tap.active = bool(self._readouts)

    def _score_batch(self, trainer: Trainer, batch: Any, dataloader_idx: int) -> None:
        assert self._tap is not None
        if not self._readouts:
            return
        loaders = trainer.test_dataloaders if trainer.testing else trainer.val_dataloaders
        loader = tree_leaves(getattr(loaders, "iterables", loaders))[dataloader_idx]
        start = self._seen.get(dataloader_idx, 0)
        samples = count_samples(loader, batch, start)
        self._seen[dataloader_idx] = start + samples
        in_one_call = self._tap.calls.total() == 1
        features = self._take_features()
        if features is None:
            return
        views = 1
        if samples and len(features) % samples == 0:
            views = len(features) // samples
            new = count_new(loader, start, samples)  # no process has scored these yet
            features = by_view(features, samples, batch if in_one_call else None)[:, :new].flatten(0, 1)
        else:
            self._trouble.warn_of_samples(len(features), samples)
        with torch.no_grad(), full_float32(features.device):
            for name, readout in self._readouts.items():
                prediction = readout(features[:, self._channels[name]])
                self._scores[name].update(prediction, views)
                if not name and self.log_images and trainer.is_global_zero:
                    self._mean_maps.add(prediction, self._maps)

    def _log_scores(self, trainer: Trainer, pl_module: LightningModule) -> None:
        targets, prefix = self._options["targets"], self._prefix
        for name in self._readouts:
            scores = self._scores[name].per_image()
            if not len(scores["spc"]):  # no stage arrived
                continue
            for metric in ("spc", "mae", "nmae"):
                for target, mean in zip(targets, scores[metric].mean(0), strict=True):
                    key = "/".join(filter(None, (prefix, target, name, metric)))
                    pl_module.log(key, mean, prog_bar=key == f"{prefix}/{targets[0]}/spc", sync_dist=True)
        if trainer.state.fn == TrainerFn.FITTING and self._readouts:
            self._change.log(trainer, pl_module, self._maps, [f"{prefix}/{target}" for target in targets])
        self._mean_maps.log(trainer, targets)
        self._readouts = {}
        self._log_trouble(trainer, pl_module)

    def _log_trouble(self, trainer: Trainer, pl_module: LightningModule) -> None:
        count = self._trouble.take(trainer, pl_module.device)
        if count:
            pl_module.log(f"{self._prefix}/trouble", float(count), sync_dist=True)

    # ------------------------------------------------------------------ checkpoints

    @property
    def state_key(self) -> str:
        stages = self.stages if isinstance(self.stages, str) else list(self.stages)
        named = {} if self.name is None else {"name": self.name}
        return self._generate_state_key(encoder=self.encoder, stages=stages, targets=self._options["targets"], **named)

    def state_dict(self) -> dict[str, Any]:
        if not self._probes:
            return {}
        return {
            "options": self._options,
            "size": list(self._size),
            "probes": {name: probe.state_dict() for name, probe in self._probes.items()},
            "batches": self._batches,
            "start": self._change.at_start,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if not state_dict:
            return
        saved, now = state_dict["options"], self._options
        changed = [f"{k} was {saved[k]!r} and is {now[k]!r}" for k in now if k in saved and saved[k] != now[k]]
        if changed:
            raise MisconfigurationException(
                "PositionProbeCallback: the readouts in the checkpoint were made with other options "
                f"({'; '.join(changed)}): use those, or leave the callback out"
            )
        self._restored = state_dict

    def _restore(self, device: torch.device) -> None:
        """Makes the readouts of a checkpoint that was loaded."""
        state, self._restored = self._restored, None
        if state is None:
            return
        probes, side = state["probes"], self._options["image_size"]
        stages = [probes[name] for name in probes if name] or [probes[""]]
        widths = [saved_channels(stage, self._options["kernel_size"]) for stage in stages]
        self._build(widths, state.get("size", (side, side)))  # version 0.1 knew square maps alone
        self._to(device)
        for name, probe in self._probes.items():
            probe.load_state_dict(probes[name])
        start = state.get("start")
        if (before := state.get("before")) is not None:  # of version 0.1, without its error
            start = torch.stack([before, torch.full_like(before, torch.nan)])
        self._change.at_start = None if start is None else start.to(device)
        self._batches = state["batches"]

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
