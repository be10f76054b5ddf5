"""Probes a frozen encoder: one pass over the images for all readouts, then the controls."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn

from padprobe.errors import check_name, check_writable
from padprobe.network.embedding import position_embedding_of
from padprobe.network.encoders import load_encoder
from padprobe.network.layout import Layout, find_layouts
from padprobe.network.padding import as_built, padding_of
from padprobe.network.twins import untrained_twin
from padprobe.probe.features import FeatureReader, Progress, silent
from padprobe.probe.measure import Measured, measure, tabulate
from padprobe.probe.options import ProbeOptions, change_options, show_options
from padprobe.probe.plan import Plan, make_plan, stage_channels
from padprobe.probe.train import check_space
from padprobe.readout.saved import SavedReadouts, check_savable, load_readouts, save_readouts
from padprobe.results import COLUMNS, RUNS, Results
from padprobe.stimuli import Images, image_of, load_images

Source = str | Path | Images
"""What :func:`~padprobe.stimuli.load_images` takes."""
PAPER_STIMULI: dict[str, Source] = {name: name for name in ("black", "white", "noise")}
"""What every encoder is scored on (paper, section 3.2)."""
_FACTS = ("grid", "image_size", "normalize", "selectivity")
"""The options that a file of trained readouts keeps, beside targets and seeds."""


@show_options
def probe_encoder(
    encoder: nn.Module | str | Path,
    train: Source = "dead_leaves",
    test: Mapping[str, Source] | None = None,
    options: ProbeOptions | None = None,
    *,
    twin: Callable[[int], nn.Module] | None = None,
    cache_dir: str | Path | None = None,
    save_to: str | Path | None = None,
    fabric: Fabric | None = None,
    labels: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    **changes: Any,
) -> Results:
    """Measures how much absolute position a frozen encoder encodes, beside its controls.

    The encoder sees each training image once. Its stages, aligned to one grid, are kept in half precision, and all
    readouts are trained on them side by side, each with its own random stream, so that one more readout changes no
    other's result. Then the encoder sees each test image once. Its weights and buffers do not change.

    Every readout has two controls: the same readout of the RGB image alone (the paper's "PosENet" row) and its
    selectivity. The encoder has untrained twins and, if asked for, a run without padding that sees the real
    surroundings of each image. Eta squared, the share of the features' variance that position explains, needs no
    readout.

    Args:
        encoder: a network that takes images (B, 3, H, W), or a name for :func:`~padprobe.load_encoder`. A name loads
            the network untrained and implies ``settle``; a ``.ckpt`` file loads it as trained.
        train: images to train the readouts on: a folder, a data set or a stimulus, see
            :func:`~padprobe.stimuli.load_images`.
        test: images to score on, by name. Default: the paper's ``black``, ``white`` and ``noise``, and dead leaves.
        options: all options in one object. Each can also be given, or changed, by its name (below).
        twin: called with a seed, returns an untrained encoder of the same architecture and padding. Default:
            :func:`~padprobe.network.twins.untrained_twin`.
        cache_dir: folder for features that do not fit into ``cache_gb``. Default: the system's for temporary files.
        save_to: a file for the trained readouts of ``encoder``, with their controls (.safetensors).
        fabric: Lightning's Fabric, launched. Its processes share the images, and all get the results. Default: one GPU
            where there is one, else the CPU.
        labels: columns of the results that only the caller knows, such as ``run``, ``group``, ``weights`` or ``task``.
            They change no measurement.
        progress: called with (what runs, images done, images in all).
        {options}

    Returns:
        :class:`~padprobe.results.Results`: for every readout, seed, stimulus and target rows of spc, mae, nmae,
        selectivity, delta and gap (ridge minus the trained readout) with 95% t intervals over images (that of delta
        also over the twins; none for one twin) and the number of constant predictions; eta2 (jackknife interval from 10
        images on) and the share of a stage's cells that padding reaches; the headline's scores by distance to the
        border; mean maps. The controls are runs of their own: RUN-context, and RUN-untrained-seed0 and so on.

    Raises:
        ValueError: before the encoder's pass, naming the option, target, stage, layer, folder, image or size that
            cannot work.

    Source: paper, sections 3.1 and 3.2; all controls except RGB alone are ours.

    Example:
        >>> encoder = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 8, 3))
        >>> small = ProbeOptions(image_size=16, grid=8, epochs=1, limit_train=8, limit_test=4, untrained=0)
        >>> probe_encoder(encoder, options=small, labels={"run": "tiny"}).runs[["run", "n_train"]].values.tolist()
        [['tiny', 8]]
    """
    # what cannot work is refused before the encoder sees the first image
    encoder, options, labels = _choose_encoder(encoder, change_options(options, changes), labels)
    options, saved = _read_saved(encoder, options, save_to)
    plan = make_plan(encoder, options, saved, cache_dir)
    train_images, test_images = _load_all(plan, train, test)
    fabric = fabric or Fabric(accelerator="cuda" if torch.cuda.is_available() else "cpu", devices=1)
    make_twin, progress = twin or functools.partial(untrained_twin, encoder), progress or silent
    _check_folders(plan, save_to)
    if train_images is not None:
        check_space(plan, len(train_images), fabric.world_size)
    _check_controls(encoder, plan, make_twin, fabric)
    run = functools.partial(measure, train=train_images, test=test_images, fabric=fabric)

    # the encoder's pass, its readouts and their scores
    main = run(encoder, plan, progress=progress)
    if save_to and fabric.global_rank == 0:
        facts = {name: getattr(options, name) for name in _FACTS}
        save_readouts(save_to, main.made, options.targets, layers=list(plan.layers), **facts)

    # controls
    controls: list[Results] = []
    if options.context:
        with as_built(encoder, "valid"):
            unpadded = run(encoder, plan.without_padding(), progress=_named("without padding", progress))
        controls.append(tabulate(unpadded, _control_labels(labels, "context", pair=labels["pair"], padding="valid")))
    twins: list[Measured] = []
    for seed in range(options.untrained):
        name = f"untrained {seed + 1}/{options.untrained}"
        twins.append(run(make_twin(seed), plan.of_twin(), progress=_named(name, progress)))
        columns = {"run": f"{labels['run']}-untrained-seed{seed}", "weights": "untrained", "task": "untrained"}
        controls.append(tabulate(twins[-1], _control_labels(labels, "untrained", **columns, seed=seed)))
        controls[-1].maps = {}  # maps of all twins would only make the file large
    return Results.join([tabulate(main, labels, twins), *controls])


def _named(what: str, progress: Progress) -> Progress:
    """A progress function that says first which of the passes runs."""
    return lambda step, done, total: progress(f"{what}: {step}", done, total)


def _control_labels(labels: Mapping[str, Any], suffix: str, **changes: Any) -> dict[str, Any]:
    """Labels of a control: its run, group and pair are named after the main run's."""
    names = {column: f"{labels[column]}-{suffix}" for column in ("run", "group", "pair")}
    return {**labels, **names, **changes}


def _choose_encoder(
    encoder: nn.Module | str | Path, options: ProbeOptions, labels: Mapping[str, Any] | None
) -> tuple[nn.Module, ProbeOptions, dict[str, Any]]:
    """The network to probe (a copy where it will be settled), its options, and the labels of its run."""
    labels = dict(labels or {})
    for column in labels:
        check_name(column, [*COLUMNS, *RUNS, "group", "pair"], "label")
    if isinstance(encoder, (str, Path)):
        trained = str(encoder).endswith(".ckpt")
        name = Path(encoder).stem if trained else str(encoder).partition(":")[2]
        labels = {"run": name, "encoder": str(encoder), "weights": "trained" if trained else "untrained", **labels}
        encoder = load_encoder(str(encoder), image_size=options.image_size)
        options = dataclasses.replace(options, settle=options.settle or not trained)
    elif options.settle:
        encoder = copy.deepcopy(encoder)
    if options.settle:
        options = dataclasses.replace(options, untrained=0)  # it is its own twin
    kind = type(encoder).__name__
    labels = {"run": kind, "encoder": kind, "weights": "", "task": "", "padding": padding_of(encoder), **labels}
    labels = {"position_embedding": position_embedding_of(encoder), **labels}
    labels = {"group": labels["run"], "pair": labels["run"], **labels}
    return encoder, options, {**labels, **{column: str(labels[column]) for column in ("run", "group", "pair")}}


def _read_saved(
    encoder: nn.Module, options: ProbeOptions, save_to: str | Path | None
) -> tuple[ProbeOptions, SavedReadouts | None]:
    """The options with those of a file of trained readouts, and what the file holds; None where there is no file."""
    if not isinstance(options.readouts, (str, Path)):
        return options, None
    saved = load_readouts(options.readouts)
    if options.context or save_to:
        raise ValueError(
            f"{str(options.readouts)!r} holds trained readouts, which fit the encoder as it is and are saved already: "
            "leave context and save_to out"
        )
    stages = options.stages
    if stages == "auto" and set(saved.layers) <= {name for name, _ in encoder.named_modules()}:
        stages = saved.layers  # the layers that the readouts were trained on
    return dataclasses.replace(
        options,
        readouts=list(dict.fromkeys(readout for readout, _ in saved.readouts)),
        seeds=list(dict.fromkeys(seed for _, seed in saved.readouts)),
        stages=stages,
        untrained=0,
        **{name: getattr(saved, name) for name in ("targets", *_FACTS)},
    ), saved


def _load_all(plan: Plan, train: Source, test: Mapping[str, Source] | None) -> tuple[Images | None, dict[str, Images]]:
    """The images to train on (None where nothing needs them) and those to score on."""
    options, images, size = plan.options, None, plan.source_px
    if plan.states is None or options.settle:
        images = load_images(train, size, options.limit_train, options.seeds[0])
        if len(images) < 5 and any(readout.kind == "ridge" for readout in plan.readouts):
            raise ValueError(
                f"{len(images)} training image(s) and a ridge readout, which is fitted on the first four fifths "
                "and chosen on the last; expected 5 or more: use more images, or leave ridge out"
            )
    # another seed: generated test stimuli differ from those of the training
    sources = {"dead_leaves": "dead_leaves", **PAPER_STIMULI} if test is None else test
    if len(names := [str(name) for name in sources]) > len(set(names)):
        raise ValueError(f"two of the test sets {', '.join(names)} have the same name: give one another name")
    stimuli = {str(n): load_images(s, size, options.limit_test, options.seeds[0] + 1) for n, s in sources.items()}
    for name, loaded in [*stimuli.items(), ("training", images)]:
        if loaded is not None:
            if not len(loaded):
                raise ValueError(f"the {name} images are an empty data set; expected at least one image")
            with isolate_rng(include_cuda=False):  # a data set may draw
                first = image_of(loaded[0])
            plan.check_shape(first.shape)
            if not first.is_floating_point():
                raise ValueError(
                    f"the {name} images are {first.dtype}; expected floating-point numbers in [0, 1]: divide by 255"
                )
    return images, stimuli


def _check_folders(plan: Plan, save_to: str | Path | None) -> None:
    """Raises ValueError where features or trained readouts could not be written."""
    if save_to:
        check_savable(plan.readouts, plan.options.targets)
        if Path(save_to).is_dir():
            raise ValueError(f"save_to is the folder {str(save_to)!r}; expected a file, such as readouts.safetensors")
    folders = {"cache_dir": plan.cache_dir, "save_to": Path(save_to).parent if save_to else None}
    for name, folder in folders.items():
        if folder is not None and not Path(folder).is_dir():
            raise ValueError(f"{name} needs the folder {str(folder)!r}, which does not exist: make it first")
        if folder is not None:
            check_writable(folder, name)


def _check_controls(encoder: nn.Module, plan: Plan, make_twin: Callable[[int], nn.Module], fabric: Fabric) -> None:
    """Raises ValueError where an untrained twin cannot be made, or the encoder cannot do without padding."""
    if plan.options.untrained:
        with isolate_rng(include_cuda=False):  # the twin of the run itself is made later
            twin = make_twin(0)
            if not isinstance(twin, nn.Module) or twin is encoder:
                what = "the encoder itself" if twin is encoder else f"a {type(twin).__name__}"
                raise ValueError(f"the function `twin` returns {what}; expected a new untrained network")
            layouts: dict[str, Layout] = {}
            for kind in {layout.kind for layout in plan.layouts.values()}:  # as the encoder's were verified
                same = [layer for layer, layout in plan.layouts.items() if layout.kind == kind]
                layouts |= find_layouts(twin, same, plan.options.image_size, kind)
            channels = stage_channels({layer: layouts[layer] for layer in plan.layers})
        if channels != plan.channels:
            raise ValueError(
                f"the twin's stages have channels {channels}, and the encoder's {dict(plan.channels)}: make a twin of "
                "the same architecture, or set untrained=0"
            )
    if plan.options.context:
        with as_built(encoder, "valid"), FeatureReader(encoder, plan.without_padding(), fabric) as reader:
            try:
                features = reader.features(torch.full((1, 3, *plan.source_px), 0.5))[0]
            except RuntimeError as error:
                raise ValueError(
                    f"{type(encoder).__name__} cannot run without padding on {plan.source_px} px: {error}. Leave "
                    "`context` out, or try another image_size"
                ) from error
        for name, part in plan.channels.items():
            values = features[part]
            spread = (values.amax((1, 2)) - values.amin((1, 2))).max()
            if spread > 1e-3 * values.abs().max():
                raise ValueError(
                    f"without padding, stage {name} of {type(encoder).__name__} still varies over a constant image, by "
                    f"{spread:.3g}: it pads in its forward(), where set_padding cannot reach. Leave `context` out"
                )
