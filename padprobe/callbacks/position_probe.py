"""PositionProbeCallback: probes a network while it trains."""

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
from padprobe.scores import PositionScores

HALF = torch.finfo(torch.float16).max
"""Features beyond this are in trouble: such a batch would outweigh all others for good."""

FEW = 16
"""Images of a training batch that ``position/{target}/delta`` is measured on, at most."""


class PositionProbeCallback(Callback):
    """Measures how much absolute position an encoder encodes, while it trains.

    Every training batch's stages f1..fn are caught as the host computes them, detached, and readouts learn from them.
    On every validation image their maps are scored; the means are logged as ``position/{target}/{spc|mae|nmae}``, so
    loggers, ``trainer.callback_metrics`` and ``ModelCheckpoint(monitor=...)`` see them. The host is not touched:
    readouts are neither in its parameters nor in its ``state_dict``, and no random number is drawn. Their state travels
    in the checkpoint, as the callback's own, in plain tensors and numbers: a resumed run goes on exactly. (Of several
    processes ridge statistics, and the running statistics of readouts of depth 2 and 3, are those of the last
    validation.)

    A position score needs its control beside it. The untrained twin comes for free: ``position/{target}/before`` is the
    SPC of a small closed-form readout on up to 16 images of the first training batch, before the first step, and
    ``position/{target}/delta`` what it is on the latest batch minus that. They compare with each other, not with
    ``spc``; ``padprobe study`` measures twins on the same images.

    What goes wrong while the host trains (a stage that does not arrive, features that are not finite) is counted,
    warned about once and logged as ``position/trouble``, a number of batches; the host goes on.

    Args:
        encoder: dotted name of the submodule to probe. Default: the one called ``encoder`` or ``backbone``, or else the
            whole module.
        stages: dotted layer names inside the encoder, or ``"auto"``: :func:`~padprobe.find_stages`.
        targets: position maps to read out, of ``H``, ``V``, ``G``, ``HS``, ``VS``.
        readout: ``"posenet"``: the paper's, trained on each batch. ``"ridge"``: linear, solved at each validation from
            statistics of the training batches, without an optimizer.
        kernel_size: of the readout's convolutions.
        depth: number of the readout's convolutions.
        padding: zero padding of the readout's convolutions.
        grid: side of the aligned features in cells.
        image_size: side in pixels of the maps that are predicted and scored.
        every_n_steps: learn from every n-th training batch only.
        each_stage: read out each stage alone too: ``position/{target}/{f1|f2|...}/{spc|mae|nmae}``.
        lr: learning rate of trained readouts; a tenth of it in the last third of the training, as in the paper.
        forget: what the weight of a batch in the ridge readout's statistics is multiplied by with every later batch: at
            .99 they are of about the last 100 batches.
        log_images: send the mean predicted maps and the content loss (mean error of H, V, G) to TensorBoard and W&B.
        seed: of the readouts' initial weights.

    Raises:
        ValueError: for an unknown target, an impossible readout, ``every_n_steps`` under 1.
        MisconfigurationException: before training, for an encoder or stage that does not exist, that ``forward`` does
            not reach, or that gives no (B, C, H, W) output; the message lists the candidates. When resuming, for
            options other than the checkpoint's.

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
        check_name(readout, ("posenet", "ridge"), "readout")
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps is {every_n_steps}; expected 1 or more")
        if isinstance(stages, str) and stages != "auto":
            raise ValueError(f"stages is {stages!r}; expected 'auto' or a list of layer names such as [{stages!r}]")
        if not 0 < forget <= 1:
            raise ValueError(f"forget is {forget}; expected a number above 0 and at most 1")
        if readout == "ridge" and (depth, padding) != (1, 0):
            raise ValueError(f"depth is {depth} and padding {padding}; a ridge readout has depth 1 and padding 0")
        readout_side(kernel_size, depth, padding, grid)  # an impossible readout is named here, not after loading data
        self._maps = position_maps(image_size, targets)
        self.encoder, self.stages, self.log_images = encoder, stages, log_images
        self._options: dict[str, Any] = {
            "readout": readout,
            "targets": list(targets),
            "kernel_size": kernel_size,
            "depth": depth,
            "padding": padding,
            "grid": grid,
            "image_size": image_size,
            "each_stage": each_stage,
            "every_n_steps": every_n_steps,
            "lr": lr,
            "forget": forget,
            "seed": seed,
        }
        self._tap: StageTap | None = None
        self._module = 0  # the probed one's id
        self._channels: dict[str, slice] = {}  # of "" (all stages together), f1, f2, ...
        self._probes: dict[str, OnlinePosENet | OnlineRidge] = {}
        self._made: dict[str, nn.Module] = {}  # the readouts that are being scored
        self._scores: dict[str, PositionScores] = {}
        self._restored: dict[str, Any] | None = None  # a checkpoint's state, until the readouts are on their device
        self._batches = 0  # training batches seen
        self._late = False  # whether the last third of the training has begun
        self._untrained = False  # whether this is the first batch, before the host's first step
        self._before: Tensor | None = None  # (T,), SPC of the small readout then
        self._latest: Tensor | None = None  # features of a few images of the latest training batch
        self._trouble = _Trouble()
        self._seen: dict[int, int] = {}  # images by validation data loader
        self._drawn: Tensor | None = None  # sums of predicted maps and of error maps, (2, T, S, S), and
        self._images = 0  # over how many images

    @property
    def state_key(self) -> str:
        stages = self.stages if isinstance(self.stages, str) else list(self.stages)
        return self._generate_state_key(encoder=self.encoder, stages=stages, targets=self._options["targets"])

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
        self.teardown(trainer, pl_module, stage)  # what a run that was interrupted may have left
        if not (is_overridden("setup", pl_module) or is_overridden("configure_model", pl_module)):
            self._attach(trainer, pl_module)  # those may build the network, later

    def _attach(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Taps the stages, and makes new readouts where those at hand are of another network."""
        module, stages, widths = self.resolve(pl_module)
        ends = list(itertools.accumulate(widths))
        channels = {"": slice(0, ends[-1])}
        if self._options["each_stage"]:
            channels |= {f"f{i + 1}": slice(e - w, e) for i, (w, e) in enumerate(zip(widths, ends, strict=True))}
        another = trainer.state.fn == TrainerFn.FITTING and id(module) != self._module
        if channels != self._channels or another:
            self._channels, self._batches, self._before = channels, 0, None
            self._probes = {name: self._probe(part.stop - part.start) for name, part in channels.items()}
            self._scores = {name: PositionScores(self._maps) for name in channels}
        self._module = id(module)
        self._tap = StageTap(module, stages, self._options["grid"])
        self._tap.active = False

    def _probe(self, in_channels: int) -> OnlinePosENet | OnlineRidge:
        o = self._options
        if o["readout"] == "ridge":
            size = gram_gb(in_channels, o["kernel_size"])
            if size > GRAM_LIMIT_GB:
                raise MisconfigurationException(
                    f"PositionProbeCallback(readout='ridge', kernel_size={o['kernel_size']}): its statistics of "
                    f"{in_channels} channels would take {size:.1f} GB, more than {GRAM_LIMIT_GB}: use kernel_size=1 "
                    "or fewer stages"
                )
            return OnlineRidge(o["targets"], self._maps, in_channels, o["kernel_size"], o["grid"], o["forget"])
        shape = (o["kernel_size"], o["depth"], o["padding"], o["grid"], o["image_size"], o["seed"])
        return OnlinePosENet(PosENet(in_channels, o["targets"], *shape).float(), o["lr"])

    def resolve(self, pl_module: LightningModule) -> tuple[nn.Module, list[str], list[int]]:
        """The encoder, its stages and their channels; raises MisconfigurationException if they do not exist."""
        name = find_encoder(pl_module) if self.encoder is None else self.encoder
        size = self._options["image_size"]
        try:
            if name:
                check_name(name, [n for n, _ in pl_module.named_modules() if n], "encoder")
            module = pl_module.get_submodule(name)
            module = getattr(module, "_orig_mod", module)  # what torch.compile wraps
            with isolate_rng(include_cuda=False):  # a forward pass, without data, may draw
                stages = find_stages(module, size) if self.stages == "auto" else list(self.stages)
                shapes = stage_shapes(module, stages, size)
        except Exception as error:  # whatever a forward pass that takes no image raises
            raise MisconfigurationException(
                f"PositionProbeCallback(encoder={name!r}): {error}. It must name a module whose forward takes images "
                f"(B, C, H, W); this one's parts are {[n for n, _ in pl_module.named_children()]}"
            ) from error
        for stage, (_, height, width) in zip(stages, shapes, strict=True):
            if height * width == 1:
                raise MisconfigurationException(
                    f"PositionProbeCallback(encoder={name!r}): stage {stage!r} is 1 x 1 at image_size {size}, too "
                    f"small to show position: use larger images, or name the others of {stages} with stages=[...]"
                )
        return module, stages, [channels for channels, _, _ in shapes]

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._latest = None
        if self._tap is not None:
            self._tap.remove()
            self._tap = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "")

    @torch.inference_mode(False)  # a validation before the fit must not leave tensors that cannot learn
    def _to_device(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Readouts and scores where the host is; then a checkpoint's state, if one was loaded."""
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
            self._batches, self._before = (
                self._restored["batches"],
                None if before is None else before.to(pl_module.device),
            )
            self._restored = None

    on_fit_start = on_train_start = on_validation_start = on_test_start = _to_device

    # ------------------------------------------------------------------ making the readouts

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        assert self._tap is not None
        self._tap.clear()
        self._tap.active = self._batches % self._options["every_n_steps"] == 0
        self._untrained = self._batches == trainer.global_step == 0
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
        features = self._take()
        with torch.autocast(pl_module.device.type, enabled=False):
            for name, part in self._channels.items():
                self._probes[name].step(None if features is None else features[:, part], self._late)
        if features is not None:
            self._latest = features if len(features) <= FEW else features[:FEW].clone()  # a slice would keep the rest
        if self._untrained:
            self._before = self._small_readout(trainer)

    def _take(self) -> Tensor | None:
        """The stages of the host's last forward pass, if all of them arrived; 0 where they leave half precision."""
        assert self._tap is not None
        self._tap.active = False
        if self._tap.missing:
            self._trouble.missing(self._tap.missing)
            self._tap.clear()
            return None
        features = self._tap.take()
        sound = features.abs() <= HALF
        self._trouble.look(sound)
        return features.masked_fill_(~sound, 0.0)  # they would spoil a readout for good

    def _small_readout(self, trainer: Trainer) -> Tensor | None:
        """SPC of the small readout on the latest batch, (T,), the mean over processes; None where it has under 4 images
        in all of them."""
        sums = torch.zeros(len(self._maps) + 1, device=self._maps.device)
        if self._latest is not None and len(self._latest) >= 4:
            with torch.autocast(self._latest.device.type, enabled=False):
                sums[:-1] = small_readout(self._latest, self._options["targets"], self._maps)
            sums[-1] = 1
        sums = trainer.strategy.reduce(sums, reduce_op="sum")
        return sums[:-1] / sums[-1] if sums[-1] else None

    # ------------------------------------------------------------------ scoring

    @torch.inference_mode(False)
    def _start_scoring(self, trainer: Trainer, pl_module: LightningModule) -> None:
        made = {} if trainer.sanity_checking else {name: probe.made() for name, probe in self._probes.items()}
        self._made = {name: module for name, module in made.items() if module is not None}
        if not (self._made or trainer.sanity_checking):
            rank_zero_warn(
                "PositionProbeCallback: its readouts are untrained, so nothing is scored; fit first, or give the "
                "ckpt_path of a run that had this callback"
            )
        self._seen, self._drawn, self._images = {}, None, 0
        for name in self._made:
            self._scores[name].reset()
            self._scores[name].update(self._maps[None][:0])  # a process without images answers the others all the same

    def _want(self, *args: Any) -> None:
        assert self._tap is not None
        self._tap.clear()
        self._tap.active = bool(self._made)

    def _score(self, trainer: Trainer, dataloader_idx: int) -> None:
        assert self._tap is not None
        features = self._take() if self._tap.active else None
        if features is None:
            return
        features = features[: self._new_images(trainer, len(features), dataloader_idx)]
        with torch.no_grad(), torch.autocast(features.device.type, enabled=False):
            for name, readout in self._made.items():
                prediction = readout(features[:, self._channels[name]])
                self._scores[name].update(prediction)
                if not name and self.log_images and trainer.is_global_zero:
                    maps = torch.stack([prediction.sum(0), (prediction - self._maps).abs().sum(0)])
                    self._drawn = maps if self._drawn is None else self._drawn + maps
                    self._images += len(prediction)

    def _new_images(self, trainer: Trainer, n: int, dataloader_idx: int) -> int:
        """How many of a batch's n images no process has seen."""
        loaders = trainer.test_dataloaders if trainer.testing else trainer.val_dataloaders
        loader = tree_leaves(getattr(loaders, "iterables", loaders))[dataloader_idx]
        start = self._seen.get(dataloader_idx, 0)
        self._seen[dataloader_idx] = start + n
        return count_new(loader, start, n)

    def _log(self, trainer: Trainer, pl_module: LightningModule) -> None:
        targets = self._options["targets"]
        for name in self._made:
            scores = self._scores[name].per_image()
            if not len(scores["spc"]):  # no stage arrived
                continue
            for metric in ("spc", "mae", "nmae"):
                for target, mean in zip(targets, scores[metric].mean(0), strict=True):
                    key = "/".join(filter(None, ("position", target, name, metric)))
                    bar = key == f"position/{targets[0]}/spc"
                    pl_module.log(key, mean, prog_bar=bar, sync_dist=True)
        if self._before is not None and trainer.state.fn == TrainerFn.FITTING and self._made:
            now = self._small_readout(trainer)
            if now is not None:
                for target, before, after in zip(targets, self._before, now, strict=True):
                    pl_module.log(f"position/{target}/before", before, sync_dist=True)
                    pl_module.log(f"position/{target}/delta", after - before, sync_dist=True)
        if self._drawn is not None and self._images:
            _log_images(trainer, self._drawn / self._images, targets)
        self._made = {}
        self._report(trainer, pl_module)

    def _report(self, trainer: Trainer, pl_module: LightningModule) -> None:
        count = self._trouble.count(trainer, pl_module.device)
        if count:
            pl_module.log("position/trouble", float(count), sync_dist=True)

    on_train_epoch_end = _report
    on_validation_epoch_start = on_test_epoch_start = _start_scoring

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._want()

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._score(trainer, dataloader_idx)

    on_test_batch_start, on_test_batch_end = on_validation_batch_start, on_validation_batch_end
    on_validation_epoch_end = on_test_epoch_end = _log

    # ------------------------------------------------------------------ checkpoints

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
        there, here = state_dict["options"], self._options
        changed = [f"{k} was {there.get(k)!r} and is {here[k]!r}" for k in here if there.get(k) != here[k]]
        if changed:
            raise MisconfigurationException(
                "PositionProbeCallback: the checkpoint's readouts were made with other options "
                f"({'; '.join(changed)}): use those, or leave the callback out"
            )
        self._restored = state_dict

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        saved = [key for key in checkpoint.get("callbacks", {}) if key.startswith(type(self).__name__)]
        if saved and self.state_key not in saved:
            rank_zero_warn(
                f"PositionProbeCallback: the checkpoint has no readouts for {self.state_key}, so they start anew; "
                f"it has some for {', '.join(saved)}"
            )


class _Trouble:
    """Counts the batches that a readout could not learn from or be scored on, and warns of them once."""

    def __init__(self) -> None:
        self._missing = 0
        self._not_finite: Tensor | int = 0
        self._warned = False

    def missing(self, stages: list[str]) -> None:
        """A batch in which these stages did not arrive."""
        if not self._warned:
            rank_zero_warn(
                f"PositionProbeCallback: stage(s) {', '.join(stages)} did not arrive in this batch; it is left out, "
                "and so are later ones like it. Name stages that every forward pass calls."
            )
        self._missing, self._warned = self._missing + 1, True

    def look(self, sound: Tensor) -> None:
        """Notes, on the device, whether all of a batch's features are sound."""
        self._not_finite = self._not_finite + (~sound.all()).int()

    def count(self, trainer: Trainer, device: torch.device) -> int:
        """Batches in trouble since the last count, in all processes."""
        mine = torch.stack([torch.as_tensor(n, device=device) for n in (self._missing, self._not_finite)]).float()
        missing, not_finite = trainer.strategy.reduce(mine, reduce_op="sum").int().tolist()
        self._missing = self._not_finite = 0
        if missing + not_finite and not self._warned:
            self._warned = True
            rank_zero_warn(
                f"PositionProbeCallback: {missing} batch(es) came without all stages and were left out; {not_finite} "
                "had features that are not finite or beyond half precision, taken as 0. position/trouble counts them."
            )
        return missing + not_finite


def _log_images(trainer: Trainer, maps: Tensor, targets: Sequence[str]) -> None:
    """Mean predicted maps side by side, and the content loss, in whichever of TensorBoard and W&B is there."""
    from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger

    images = {"position/maps": torch.cat(list(maps[0]), dim=1)}
    errors = [error for error, target in zip(maps[1], targets, strict=True) if target in ("H", "V", "G")]
    if errors:
        images["position/content_loss"] = torch.stack(errors).mean(0)
    for name, image in images.items():
        pixels = (255 * image.clamp(0, 1)).byte().cpu()
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image(name, pixels[None], trainer.global_step)
            elif isinstance(logger, WandbLogger):
                logger.log_image(name, [pixels.numpy()], step=trainer.global_step)


def _progress(trainer: Trainer, batch_idx: int) -> float:
    """How much of the training is behind it, in [0, 1); 0 where its length is unknown."""
    by_steps = trainer.global_step / trainer.max_steps if trainer.max_steps > 0 else 0.0
    epochs = trainer.current_epoch + batch_idx / trainer.num_training_batches
    return max(by_steps, epochs / trainer.max_epochs if trainer.max_epochs and trainer.max_epochs > 0 else 0.0)
