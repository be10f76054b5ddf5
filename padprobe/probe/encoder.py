"""Probes a frozen encoder: one pass over the images, every readout at once, its controls beside it."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from lightning.fabric import Fabric
from torch import nn

from padprobe.maps import Target, position_maps, target_name
from padprobe.network.encoders import load_encoder, untrained_twin
from padprobe.network.padding import as_built, padding_of, padding_reach
from padprobe.network.stages import choose_layers
from padprobe.network.trace import context_size
from padprobe.probe.features import FeatureReader, Progress
from padprobe.probe.measure import Measured, measure
from padprobe.probe.options import ProbeOptions
from padprobe.probe.plan import Plan, describe
from padprobe.readout.posenet import readout_side
from padprobe.readout.saved import check_savable, load_readouts, save_readouts
from padprobe.readout.spec import Readout, with_controls
from padprobe.results import COLUMNS, Results, summarize
from padprobe.stimuli import Images, load_images

Source = str | Path | Images


def probe_encoder(
    encoder: nn.Module | str | Path,
    train: Source = "dead_leaves",
    test: dict[str, Source] | None = None,
    options: ProbeOptions | None = None,
    *,
    twin: Callable[[int], nn.Module] | None = None,
    cache_dir: str | Path | None = None,
    save_to: str | Path | None = None,
    fabric: Fabric | None = None,
    labels: dict[str, Any] | None = None,
    progress: Progress | None = None,
    **changes: Any,
) -> Results:
    """Measures how much absolute position a frozen encoder encodes, and what of it is the controls' too.

    The encoder sees each training image once; its stages, aligned to one grid, are kept in half precision, and all
    readouts are trained on them side by side, each from its own random stream, so that one more changes no other's
    result. Then it sees each test image once. Neither its weights nor its buffers change.

    Beside every readout stand the same readout of the RGB image alone (the paper's "PosENet" row) and its selectivity;
    beside the encoder, untrained twins and, if asked for, the unpadded encoder with real context. Without any readout,
    eta squared is the share of the features' variance that position explains, see
    :class:`~padprobe.readout.variance.PositionVariance`.

    Args:
        encoder: a network that takes images (B, 3, S, S), or a name for :func:`~padprobe.load_encoder`.
        train: images to train the readouts on: a folder, a data set or a stimulus, see
            :func:`~padprobe.stimuli.load_images`.
        test: images to score on, by name; ``black``, ``white`` and ``noise`` are the paper's. Default: those and other
            dead leaves.
        readouts: see :class:`~padprobe.readout.variants.Readout`. The first is the headline: the one whose maps and
            border profile are kept. Or a file of trained readouts (``save_to``): then nothing is trained, ``train`` is
            not looked at, there are no untrained twins, and the file says ``targets``, ``grid``, ``image_size``,
            ``normalize``, ``seeds`` and ``selectivity``.
        stages: dotted layer names; ``"auto"``: :func:`~padprobe.find_stages`; ``"paper"``: the paper's choice,
            which leaves out the first of a ResNet.
        targets: position maps, out of ``H, V, G, HS, VS``, or functions, see :data:`padprobe.maps.Target`.
        grid: side of the aligned features in cells.
        image_size: S in pixels; predictions are scored at this size.
        normalize: subtract ImageNet's mean and divide by its standard deviation (the paper's code does not).
        epochs, batch_size: of the readouts' training; SGD with rate .1, a tenth of that from two thirds on.
        seeds: of the readouts and their order of images, one training each; the first also of the samples of images
            and the generated stimuli.
        untrained: number of untrained twins; each costs as much as the encoder itself. delta = SPC - mean SPC(twins).
            None for an encoder that is labelled ``weights="untrained"``. BatchNorms of untrained encoders take the
            statistics of the first training images, as they would in a training.
        twin: called with a seed, gives an untrained encoder of the same architecture and padding. Default:
            :func:`~padprobe.encoders.untrained_twin`.
        selectivity: read out a permuted target too, see :func:`padprobe.maps.shuffled`: selectivity = SPC - its SPC.
        context: take images larger than S, with the surroundings that the encoder would need to do without padding (404
            px for VGG16 at 224). The encoder sees their centre, as if they were S px; a further run, "valid+context",
            shows all of them to the encoder without padding, and crops its stages to the padded ones' geometry.
            Stimuli are named with their size then, for they are others than without.
        limit_train, limit_test: use at most so many images, a random sample.
        num_workers: processes that read images.
        cache_gb: memory for the training images' features (2.3 MB an image for VGG16); above it they go to a file. Of
            several processes each keeps its share, and the first all of them too.
        cache_dir: where that file lies; default: the system's folder for temporary files.
        save_to: a file for the trained readouts of ``encoder``, with their controls (.safetensors).
        fabric: Lightning's Fabric, launched, for a choice of devices: the images are shared out among its processes,
            and all get the results. Default: one GPU where there is one, or else the CPU.
        labels: columns of the results that only the caller knows, such as ``run``, ``weights`` or ``task``.
        progress: called with (what runs, images done, images in all).

    Returns:
        :class:`~padprobe.results.Results`: for every readout, seed, stimulus and target rows of spc, mae, nmae,
        selectivity, delta and, of a ridge readout beside the trained one, gap (95% bootstrap interval over images) and
        the number of constant predictions; eta2 (jackknife interval) and the part of a stage's cells that padding
        reaches; the headline's scores by distance to the border; mean maps.

    Raises:
        ValueError: naming the unknown target, stage or layer, the empty folder, the unreadable image, or the image size
            that is too small for the encoder.

    Source: paper, sections 3.1 and 3.2; the controls but for RGB-only are ours.
    """
    options = dataclasses.replace(options or ProbeOptions(), **changes)
    readouts, stages, targets, grid = options.readouts, options.stages, options.targets, options.grid
    image_size, normalize, epochs, batch_size = (
        options.image_size,
        options.normalize,
        options.epochs,
        options.batch_size,
    )
    seeds, untrained, selectivity, context = options.seeds, options.untrained, options.selectivity, options.context
    limit_train, limit_test, num_workers, cache_gb = (
        options.limit_train,
        options.limit_test,
        options.num_workers,
        options.cache_gb,
    )
    labels = dict(labels or {})
    saved = load_readouts(readouts) if isinstance(readouts, (str, Path)) else None
    if saved:
        if context or save_to:
            raise ValueError("trained readouts are for the encoder as it is, and saved: leave context and save_to out")
        readouts = list(dict.fromkeys(readout for readout, _ in saved.readouts))
        seeds = list(dict.fromkeys(seed for _, seed in saved.readouts))
        targets, grid, image_size = saved.targets, saved.grid, saved.image_size
        normalize, selectivity, untrained = saved.normalize, saved.selectivity, 0
    if isinstance(encoder, (str, Path)):
        weights = "trained" if str(encoder).endswith(".ckpt") else "untrained"
        labels = {"run": Path(encoder).stem, "encoder": str(encoder), "weights": weights, **labels}
        encoder = load_encoder(str(encoder))
    labels = {"run": "", "padding": padding_of(encoder), **labels}
    if normalize:
        labels["encoder"] = f"{labels.get('encoder', '')} on normalised images".strip()
    blank = labels.get("weights") == "untrained"
    if blank:
        encoder, untrained = copy.deepcopy(encoder), 0  # it is its own twin
    fabric = fabric or Fabric(accelerator="cuda" if torch.cuda.is_available() else "cpu", devices=1)
    if saved and stages == "auto" and set(saved.layers) <= {name for name, _ in encoder.named_modules()}:
        stages = saved.layers  # the same layers, where the network calls them so
    layers = choose_layers(encoder, stages, image_size)
    shown, sides = context_size(encoder, image_size, layers) if context else (image_size, None)
    assert not isinstance(readouts, (str, Path))
    plan = _plan(readouts, layers, targets, image_size, grid, epochs, batch_size, seeds, selectivity)
    if save_to:
        check_savable(plan.readouts, targets)
    if saved:
        plan = dataclasses.replace(plan, states=dict(zip(saved.readouts, saved.states, strict=True)))
    if test is None:
        test = {"dead_leaves": "dead_leaves", "black": "black", "white": "white", "noise": "noise"}
    train_images = load_images("black" if saved and not blank else train, shown, limit_train, seeds[0])
    # another seed: generated test stimuli are not those of the training
    place = f" ({shown} px)" if context else ""
    test_images = {name + place: load_images(source, shown, limit_test, seeds[0] + 1) for name, source in test.items()}
    if len(train_images) < 5 and any(readout.kind == "ridge" for readout in plan.readouts):
        raise ValueError(
            f"{len(train_images)} training image(s) and a ridge readout, which is fitted on four in five and chosen on "
            "the fifth; expected 5 or more: use more images, or leave ridge out"
        )

    def run(
        network: nn.Module, plan: Plan, what: str = "", sides: list[int] | None = None, new: bool = False
    ) -> Measured:
        reader = FeatureReader(
            network,
            layers,
            grid=grid,
            image_size=image_size,
            shown=shown,
            sides=sides,
            normalize=normalize,
            batch_size=batch_size,
            workers=num_workers,
            fabric=fabric,
        )
        masks = {} if sides else padding_reach(network, layers, image_size)
        with reader:
            if new:
                reader.settle(train_images)
            if sides:
                _check_blind(reader)
            say = progress and (lambda step, done, total: progress(f"{what}{step}", done, total))
            found = measure(reader, plan, train_images, test_images, cache_gb, cache_dir, say)
        found.reach = {f"f{i + 1}": masks[layer] for i, layer in enumerate(layers) if layer in masks}
        return found

    main = run(encoder, plan, new=blank)
    parts = [main.results(labels)]
    if save_to and fabric.global_rank == 0:
        facts = {"grid": grid, "image_size": image_size, "normalize": normalize, "selectivity": selectivity}
        save_readouts(save_to, main.made, targets, layers=layers, **facts)
    if context:
        with as_built(encoder, "valid"):
            unpadded = run(encoder, plan, "valid + context: ", sides)
        parts.append(unpadded.results(_relabel(labels, "padding", "valid+context")))
    twins = []
    for seed in range(untrained):
        network = twin(seed) if twin else untrained_twin(encoder, seed)
        once = dataclasses.replace(plan, seeds=plan.seeds[:1])
        twins.append(run(network, once, f"untrained {seed + 1}/{untrained}: ", new=True))
        found = twins[-1].results({**_relabel(labels, "weights", "untrained"), "task": "untrained", "seed": seed})
        found.maps = {}  # their name is the same for every seed
        parts.append(found)
    if twins:
        parts.append(_deltas(main, twins, labels))
    return Results.join(parts)


def _plan(
    readouts: Sequence[Readout],
    layers: Sequence[str],
    targets: Sequence[Target],
    image_size: int,
    grid: int,
    epochs: int,
    batch_size: int,
    seeds: Sequence[int],
    selectivity: bool,
) -> Plan:
    """What to read out, checked."""
    for what, given in (("readouts", readouts), ("targets", targets), ("seeds", seeds)):
        if not given:
            raise ValueError(f"{what} is empty; expected at least one")
    names = [target_name(target) for target in targets]
    if len(set(names)) < len(names):
        raise ValueError(f"targets {', '.join(names)} share a name: give each function a __name__ of its own")
    position_maps(image_size, targets)
    variants = with_controls(readouts, [f"f{i + 1}" for i in range(len(layers))])
    for readout in variants:
        readout_side(readout.kernel_size, readout.depth, readout.padding, grid)
    return Plan(tuple(variants), tuple(targets), image_size, grid, epochs, batch_size, tuple(seeds), selectivity)


def _check_blind(reader: FeatureReader) -> None:
    """Raises ValueError where an encoder that should have no padding is not blind on a constant image."""
    features = reader.features(torch.full((1, 3, reader.shown, reader.shown), 0.5))[0]
    for name, part in reader.channels.items():
        values = features[part]
        spread = (values.amax((1, 2)) - values.amin((1, 2))).max()
        if spread > 1e-3 * values.abs().max():
            raise ValueError(
                f"without padding, stage {name} of {type(reader.encoder).__name__} still varies over a constant image, "
                f"by {spread:.3g}: it pads in its forward(), where set_padding cannot reach. Leave `context` out"
            )


def _relabel(labels: dict[str, Any], column: str, value: str) -> dict[str, Any]:
    """The labels of a control: one column's value is another, and so is its last mention in the run's name."""
    run, old = str(labels["run"]), str(labels.get(column, ""))
    before, found, after = run.rpartition(old) if old else ("", "", run)
    return {**labels, column: value, "run": f"{before}{value}{after}" if found else f"{run} {value}".strip()}


def _deltas(main: Measured, twins: list[Measured], labels: dict[str, Any]) -> Results:
    """Rows of delta = SPC - mean SPC of the untrained twins, image by image; its interval takes the twins as given.

    None for the image alone, which has no encoder.
    """
    plan, rows = main.plan, []
    for (key, stimulus), scores in main.scores.items():
        if key[0].stages != "rgb":
            control = torch.stack([twin.scores[(key[0], plan.seeds[0]), stimulus]["spc"] for twin in twins]).mean(0)
            delta = (scores["spc"] - control)[:, : len(plan.targets)]
            common = {**describe(key), **labels, "stimulus": stimulus}
            rows += [{**common, **row} for row in summarize({"delta": delta}, plan.names)]
    return Results(pd.DataFrame(rows).reindex(columns=list(COLUMNS)))
