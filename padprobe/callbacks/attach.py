"""Finds what a callback probes in a host, and refuses what cannot be probed before the training starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from padprobe.errors import check_name, check_number
from padprobe.maps import TARGETS, Size, size_pair
from padprobe.network.layout import LAYOUTS, Layout, find_layouts
from padprobe.network.stages import choose_layers
from padprobe.network.tap import StageTap
from padprobe.readout.ridge import gram_gb

WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Names under which torch.compile, FSDP and activation checkpointing hold the module that they wrap."""


MOST_GRAM_GB = 2.0
"""The most memory that the statistics of one ridge readout may take."""


class Probed(NamedTuple):
    """The part of a host that is probed."""

    name: str  # of the encoder in the host
    encoder: nn.Module
    stages: list[str]  # dotted layer names in the encoder
    layouts: Mapping[str, Layout]  # of the stages' outputs, as far as they are known before the first batch


def check_options(
    stages: str | Sequence[str],
    targets: Sequence[Any],
    layout: str,
    name: str | None,
    every_n_steps: int,
    lr: float,
    forget: float,
    counts: Mapping[str, int],
) -> None:
    """Refuses values of the callback's options that no host could make right; ``counts`` are whole numbers from 0 on.

    Raises:
        ValueError: with the value, what was expected and the way out.
    """
    for option, count in {**counts, "every_n_steps": every_n_steps}.items():
        check_number(option, count, int, least=int(option == "every_n_steps"))
    check_number("lr", lr, float, least=0)
    check_number("forget", forget, float)
    is_word = isinstance(stages, str)
    if stages not in ("auto", "each_block") and (is_word or not stages or len(set(stages)) < len(stages)):
        raise ValueError(
            f"stages is {stages!r}; expected 'auto', 'each_block' or a list of different layers such as ['layer1']"
        )
    if not 0 < forget <= 1:
        raise ValueError(f"forget is {forget}; expected a number above 0 and at most 1")
    if name == "":
        raise ValueError("name is ''; expected a word such as 'teacher', or None")
    check_name(layout, LAYOUTS, "layout")
    functions = [target for target in targets if not isinstance(target, str)]
    if functions or not targets or len(set(targets)) < len(targets):
        raise ValueError(
            f"targets are {list(targets)}; expected different names from {', '.join(TARGETS)}. A function cannot "
            "be saved in a checkpoint: pass it to probe_encoder instead"
        )


def check_trainer(trainer: Trainer, callback: Any, keys: set[str]) -> None:
    """Refuses a fit that would never score the readouts, and callbacks that would log under the same keys.

    Args:
        trainer: about to run.
        callback: the callback that asks.
        keys: its prefix and targets, as ``log_keys`` gives them for any callback of its kind.

    Raises:
        MisconfigurationException: with the way out.
    """
    if trainer.state.fn == TrainerFn.FITTING:
        every, epochs = trainer.check_val_every_n_epoch, trainer.max_epochs or -1
        check_validation(
            trainer.enable_validation
            and not (every and 0 < epochs < every and not getattr(trainer, "fast_dev_run", False))
        )
    for other in trainer.callbacks:  # type: ignore[attr-defined]
        shared = keys & other.log_keys if type(other) is type(callback) and other is not callback else set()
        if shared:
            raise MisconfigurationException(
                f"two PositionProbeCallbacks would log under the same keys ({', '.join(sorted(shared))}): give one of "
                'them a name, such as PositionProbeCallback(name="teacher", encoder="teacher.backbone"), or give them '
                "different targets"
            )


def check_validation(is_ahead: bool) -> None:
    """Refuses a fit in which no validation is ahead.

    Raises:
        MisconfigurationException: with the way out.
    """
    if not is_ahead:
        raise MisconfigurationException(
            "PositionProbeCallback scores its readouts at each validation, and this fit has none: pass a validation "
            "loader that is not empty, define validation_step, leave limit_val_batches above 0 and let "
            "check_val_every_n_epoch be at most max_epochs; or leave the callback out"
        )


def find_probed(
    host: nn.Module, name: str | None, stages: str | Sequence[str], layout: str, sizes: Sequence[Size]
) -> Probed:
    """The encoder in a host and its stages. Named stages need no trace of the encoder.

    Names count with and without the ``_orig_mod`` of torch.compile and the like. The host stays as it is.

    Args:
        host: the module that trains.
        name: dotted name of the encoder. None: the one called ``encoder`` or ``backbone``, or else the whole host.
        stages: a word of :func:`~padprobe.network.stages.choose_layers`, or dotted layer names in the encoder.
        layout: what the stages' outputs are, see :func:`~padprobe.network.layout.find_layouts`.
        sizes: image sizes to trace with, the first that works.

    Raises:
        MisconfigurationException: for an unknown encoder or stage, with the nearest names; for more than one candidate,
            with all; and where no stages are found.
    """
    if name is None:
        name = _only_encoder(host)
    where = f"PositionProbeCallback(encoder={name!r})"
    try:
        encoder = find_part(host, name, "encoder")[1]
        if not isinstance(stages, str):
            return Probed(name, encoder, [find_part(encoder, stage, "layer")[0] for stage in stages], {})
        _check_traceable(encoder)
    except ValueError as error:
        parts = [part for part, _ in host.named_children()]
        raise MisconfigurationException(f"{where}: {error}. This host's parts are {parts}") from error
    failures: list[Exception] = []
    for size in dict.fromkeys(sizes):
        try:
            with isolate_rng(include_cuda=False):  # the host's forward may draw random numbers
                layers = choose_layers(encoder, stages, size)
                return Probed(name, encoder, layers, find_layouts(encoder, layers, size, layout))
        except Exception as error:  # a forward pass that takes no image may raise anything
            failures.append(error)
    raise MisconfigurationException(
        f'{where}: stages="{stages}" found no stages: {failures[0]}. It must name a module whose forward takes images '
        f"(B, C, H, W); this host's parts are {[part for part, _ in host.named_children()]}. Where it takes more than "
        'images, name the layers to probe: stages=["...", ...]'
    ) from failures[0]


def check_stages(tap: StageTap, is_auto: bool, made_for: int | None, options: Mapping[str, Any]) -> None:
    """Refuses stages that cannot be read, once a batch has shown their shapes.

    Of stages that were found, those of one pixel are left out: :func:`~padprobe.find_stages` takes none either, at the
    size that it traces.

    Args:
        tap: has caught a batch.
        is_auto: whether the stages were found.
        made_for: the number of channels that the readouts were made for, if they exist.
        options: of the readouts.

    Raises:
        MisconfigurationException: with the way out.
    """
    if tap.no_maps:
        stage, shape = next(iter(tap.no_maps.items()))
        raise MisconfigurationException(
            f"PositionProbeCallback: stage {stage!r} gives an output of shape {shape} for images of {tap.size[0]} x "
            f"{tap.size[1]}, which is not clearly (B, C, H, W), (B, H, W, C) or (B, tokens, C) of the images' "
            "proportions: say what it is with layout='NCHW', 'NHWC' or 'tokens', or name other layers with stages=[...]"
        )
    points = [stage for stage, (_, height, width) in tap.map_shapes.items() if height * width == 1]
    if is_auto and len(points) < len(tap.modules):
        for stage in points:
            tap.forget(stage)
    elif points:
        raise MisconfigurationException(
            f"PositionProbeCallback: stage {points[0]!r} is 1 x 1 for images of {tap.size[0]} x {tap.size[1]}, too "
            f"small to show position: use larger images, or name the others of {list(tap.modules)} with stages=[...]"
        )
    channels = sum(width for width, _, _ in tap.map_shapes.values())
    if made_for not in (None, channels):
        raise MisconfigurationException(
            f"PositionProbeCallback: its readouts were made for {made_for} channels, and the stages "
            f"{list(tap.modules)} have {channels}: probe the encoder and the stages that they were made for"
        )
    size = gram_gb(channels, options["kernel_size"])
    if options["readout"] == "ridge" and size > MOST_GRAM_GB:
        raise MisconfigurationException(
            f"PositionProbeCallback(readout='ridge', kernel_size={options['kernel_size']}): the statistics of "
            f"{channels} channels would take {size:.1f} GB, more than {MOST_GRAM_GB}: use kernel_size=1 or fewer stages"
        )


def trace_sizes(host: LightningModule, image_size: Size) -> list[Size]:
    """Image sizes at which the host's encoder may run: of the host's example input, of its networks, or usual ones."""
    examples = [x for x in tree_leaves(host.example_input_array) if isinstance(x, Tensor) and x.ndim == 4]
    sizes: list[Size] = [(image.shape[-2], image.shape[-1]) for image in examples]
    for module in host.modules():
        config = getattr(module, "config", None)  # of transformers
        for known in (getattr(module, "img_size", None), getattr(config, "image_size", None)):
            try:
                sizes.append(size_pair(known))  # type: ignore[arg-type]
            except ValueError:
                continue
    return [*sizes, size_pair(image_size), (224, 224)]


def find_part(module: nn.Module, name: str, what: str) -> tuple[str, nn.Module]:
    """The submodule of this name, inside what wraps it, and its full name; the module itself for "".

    Raises:
        ValueError: for a name that does not exist, with the nearest names.

    Example:
        >>> network = nn.ModuleDict({"encoder": nn.ModuleDict({"_orig_mod": nn.Linear(2, 3)})})
        >>> find_part(network, "encoder", "layer")
        ('encoder._orig_mod', Linear(in_features=2, out_features=3, bias=True))
    """
    parts = {_unwrapped(full): (full, part) for full, part in module.named_modules(remove_duplicate=False)}
    if name not in parts and _unwrapped(name) not in parts:
        check_name(name, [part for part in parts if part], what)
    return parts[_unwrapped(name)]


def is_compiled(host: nn.Module) -> bool:
    """Whether torch.compile has wrapped a part of the host."""
    by_lightning = getattr(host, "_compiler_ctx", None)
    parts = host.modules()
    return bool(by_lightning) or any(hasattr(m, "_orig_mod") or getattr(m, "_compiled_call_impl", None) for m in parts)


def _unwrapped(name: str) -> str:
    """A dotted name without the names under which wrappers hold their module."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def _only_encoder(host: nn.Module) -> str:
    """The name of the outermost submodule called ``encoder`` or ``backbone``; "" if there is none.

    Raises:
        MisconfigurationException: if there are several.
    """
    names = list(dict.fromkeys(_unwrapped(name) for name, _ in host.named_modules()))
    names = [name for name in names if name.split(".")[-1] in ("encoder", "backbone")]
    depth = min((name.count(".") for name in names), default=0)
    candidates = [name for name in names if name.count(".") == depth]
    if len(candidates) > 1:
        listed = " or ".join(f"encoder={name!r}" for name in candidates)
        raise MisconfigurationException(
            f"PositionProbeCallback: this host has {len(candidates)} encoders: say which to probe ({listed}). To probe "
            "several, give each a callback of its own with a name"
        )
    return candidates[0] if candidates else ""


def _check_traceable(encoder: nn.Module) -> None:
    """Refuses parameters that are spread over processes: a trace would see or disturb their parts.

    Raises:
        ValueError: with the way out.
    """
    for name, parameter in encoder.named_parameters():
        if hasattr(parameter, "device_mesh") or "_fsdp_wrapped_module" in name or hasattr(parameter, "ds_id"):
            raise ValueError(
                f"its parameters, such as {name!r}, are spread over processes, so stages cannot be found: name "
                'the layers to probe: stages=["...", ...]'
            )
