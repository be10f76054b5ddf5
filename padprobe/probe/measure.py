"""One encoder's pass: makes the readouts, scores them on each test set, and tabulates the scores."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from lightning.fabric import Fabric
from torch import Tensor, nn

from padprobe.network.reach import padding_reach
from padprobe.precision import full_float32
from padprobe.probe.features import FeatureReader, Progress
from padprobe.probe.plan import Key, Made, Plan
from padprobe.probe.train import make_readouts
from padprobe.readout.variance import PositionVariance
from padprobe.results import COLUMNS, PROFILE, READOUT, RUNS, Results, summarize
from padprobe.scores import BorderProfile, border_distance, rings, score_maps, standard_ranks
from padprobe.stimuli import Images

Row = dict[str, Any]


@dataclass
class Measured:
    """One encoder's measurements."""

    plan: Plan
    n_train: int | None  # training images; None for readouts that were trained before
    made: Made = field(default_factory=dict)  # the readouts; the first is the headline
    # SPC, MAE, nMAE and constant by (key, stimulus): each (n, T), or (n, 2T) with the permuted targets
    scores: dict[tuple[Key, str], dict[str, Tensor]] = field(default_factory=dict)
    # the headline's SPC and MAE by stimulus: each (n, T, rings)
    rings: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    # by (stimulus, stage): the value, its interval, and the number of images
    eta2: dict[tuple[str, str], tuple[float, float, float, int]] = field(default_factory=dict)
    # by (stimulus, target or stage, "prediction", "error" or "eta2"), see Results
    maps: dict[tuple[str, str, str], np.ndarray] = field(default_factory=dict)
    reach: dict[str, Tensor] = field(default_factory=dict)  # the cells of each stage that padding reaches, (h, w)
    how: str = ""


def measure(
    encoder: nn.Module,
    plan: Plan,
    train: Images | None,
    test: Mapping[str, Images],
    fabric: Fabric,
    progress: Progress,
) -> Measured:
    """One pass over the training images and one over each test set.

    All in full float32, see :func:`~padprobe.precision.full_float32`.
    """
    started = time.perf_counter()
    measured = Measured(plan, None if train is None or plan.states is not None else len(train))
    if not plan.unpadded:
        masks = padding_reach(encoder, plan.layers, plan.options.image_size, plan.layouts)
        measured.reach = {f"f{i + 1}": masks[layer] for i, layer in enumerate(plan.layers) if layer in masks}
    with full_float32(fabric.device), FeatureReader(encoder, plan, fabric, progress) as reader:
        if plan.options.settle:
            assert train is not None
            reader.settle(train)
        measured.made = make_readouts(reader, train)
        for stimulus, images in test.items():
            _score(measured, reader, stimulus, images)
    measured.how = _describe_work(plan, fabric, time.perf_counter() - started)
    return measured


def _describe_work(plan: Plan, fabric: Fabric, seconds: float) -> str:
    device = torch.cuda.get_device_name(fabric.device) if fabric.device.type == "cuda" else fabric.device.type.upper()
    where = f"{fabric.world_size} x {device}" if fabric.world_size > 1 else device
    duration = f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
    notes = {
        f"probed on {where} with torch {torch.__version__}, {time.strftime('%Y-%m-%d')}, in {duration}": True,
        "images normalized as for ImageNet": plan.options.normalize,
        "BatchNorm statistics from a batch of training images": plan.options.settle,
        "readouts trained before": plan.states is not None,
    }
    return "; ".join(note for note, applies in notes.items() if applies)


def _score(measured: Measured, reader: FeatureReader, stimulus: str, images: Images) -> None:
    """One pass over a test set: scores of every readout, the headline's rings and maps, and eta squared."""
    plan, n, made = measured.plan, len(images), measured.made
    headline, count = next(iter(made)), len(plan.options.targets)
    maps = {key: module.maps for key, module in made.items()}
    ranks = {readout: standard_ranks(maps[readout, seed]) for readout, seed in reversed(made)}
    profile = BorderProfile(maps[headline][:count], _ring_width(plan))
    variance = PositionVariance(plan.width, plan.options.grid, images=n).to(reader.device)
    variance.sync_on_compute = reader.fabric.world_size > 1
    scores = {key: {m: torch.zeros(n, len(maps[key])) for m in ("spc", "mae", "nmae", "constant")} for key in made}
    in_rings = {m: torch.zeros(n, count, len(profile.rings)) for m in ("spc", "mae")}
    sums = torch.zeros(2, *maps[headline][:count].shape, device=reader.device)
    for index, features in reader.batches(images, stimulus):
        variance.update(features, index)
        for key, module in made.items():
            with torch.inference_mode():
                prediction = module(plan.select(key[0], features))
                for metric, values in score_maps(prediction, maps[key], ranks[key[0]]).items():
                    scores[key][metric][index] = values.float().cpu()
                if key == headline:
                    prediction = prediction[:, :count]
                    for metric, values in profile.score(prediction).items():
                        in_rings[metric][index] = values.cpu()
                    sums[0] += prediction.sum(0)
                    sums[1] += (prediction - maps[key][:count]).abs().sum(0)

    def total(values: Tensor) -> Tensor:  # each image was scored by one process, and is 0 in the others
        if reader.fabric.world_size == 1:
            return values.cpu()
        return reader.fabric.all_reduce(values.to(reader.device), reduce_op="sum").cpu()  # type: ignore[union-attr]

    for key in made:
        totals = {metric: total(values) for metric, values in scores[key].items()}
        measured.scores[key, stimulus] = {**totals, "constant": totals["constant"].bool()}
    measured.rings[stimulus] = {metric: total(values) for metric, values in in_rings.items()}
    for kind, means in zip(("prediction", "error"), total(sums) / n, strict=True):
        for name, mean in zip(plan.names, means, strict=True):
            measured.maps[stimulus, name, kind] = mean.numpy()
    for stage, part in {**plan.channels, "all": slice(0, plan.channels["rgb"].start)}.items() if n >= 2 else ():
        cells = variance.eta_squared(part)
        measured.eta2[stimulus, stage] = (cells.mean().item(), *variance.interval(part), n)
        if stage != "all":
            measured.maps[stimulus, stage, "eta2"] = cells.float().cpu().numpy()


def tabulate(measured: Measured, labels: Mapping[str, Any], twins: Sequence[Measured] = ()) -> Results:
    """One run's row, its measurements, the border profile and the maps.

    ``labels`` are the run's columns; a ``seed`` among them replaces those of the readouts. ``twins`` are the
    measurements of untrained twins, for delta.
    """
    plan, labels = measured.plan, dict(labels)
    shown = {"image": plan.size, "source": plan.source_px, "shown": plan.source_px if plan.unpadded else plan.size}
    sizes = {f"{what}_px": height for what, (height, _) in shown.items()}
    sizes |= {f"{what}_width": width for what, (_, width) in shown.items()}
    run = {"seed": plan.options.seeds[0], **labels, **sizes, "n_train": measured.n_train, "how": measured.how}
    rows = [*_scores(measured, twins, labels), *_variance(measured, labels)]
    return Results(
        pd.DataFrame(rows).reindex(columns=list(COLUMNS)),
        runs=pd.DataFrame([run]).reindex(columns=list(RUNS)),
        profile=pd.DataFrame(list(_profile(measured, labels))).reindex(columns=list(PROFILE)),
        maps={"/".join((labels["run"], *key)): values for key, values in measured.maps.items()},
    )


def _describe(key: Key, labels: Row) -> Row:
    """A readout's columns and the run's."""
    readout, seed = key
    shape = (readout.kernel_size, readout.depth, readout.padding)
    columns = zip(READOUT, (readout.kind, *shape, readout.scale, readout.stages), strict=True)
    return {**dict(columns), "seed": seed, **labels}


def _scores(measured: Measured, twins: Sequence[Measured], labels: Row) -> Iterator[Row]:
    """Rows of every readout.

    The ``gap`` of a ridge readout is its SPC minus that of the trained readout of the same features: what the training
    left undone. ``delta`` is the SPC minus the mean SPC of the untrained twins; its interval takes in the spread of
    the twins. The image alone has no encoder, and so no delta.
    """
    plan, count = measured.plan, len(measured.plan.names)
    for (key, stimulus), scores in measured.scores.items():
        values, of_twins = {metric: per_image[:, :count] for metric, per_image in scores.items()}, None
        if plan.options.selectivity:
            values["selectivity"] = values["spc"] - scores["spc"][:, count:]
        trained = (dataclasses.replace(key[0], kind="posenet"), plan.options.seeds[0]), stimulus
        if key[0].kind == "ridge" and trained in measured.scores:
            values["gap"] = values["spc"] - measured.scores[trained]["spc"][:, :count]
        if twins and key[0].stages != "rgb":
            same = (key[0], plan.options.seeds[0]), stimulus
            of_twins = torch.stack([twin.scores[same]["spc"][:, :count] for twin in twins])
            values["delta"] = values["spc"] - of_twins.mean(0)
        for row in summarize(values, plan.names, of_twins):
            yield {**_describe(key, labels), "stimulus": stimulus, **row}


def _variance(measured: Measured, labels: Row) -> Iterator[Row]:
    """Rows of what needs no readout: eta2, and the share of a stage's cells that padding reaches."""
    common = {"seed": measured.plan.options.seeds[0], **labels, "readout": "variance", "target": ""}
    for (stimulus, stage), (value, low, high, n) in measured.eta2.items():
        numbers = {"metric": "eta2", "value": value, "ci_low": low, "ci_high": high, "n": n}
        yield {**common, "stages": stage, "stimulus": stimulus, **numbers}
    for stage, mask in measured.reach.items():
        yield {**common, "stages": stage, "stimulus": "", "metric": "reach", "value": mask.float().mean().item()}


def _profile(measured: Measured, labels: Row) -> Iterator[Row]:
    """Rows of the border profile: the headline's scores, eta2 and reach, by distance to the border in pixels."""
    plan, (height, width), grid = measured.plan, measured.plan.size, measured.plan.options.grid
    shorter, ring_width = min(height, width), _ring_width(plan)
    headline = _describe(next(iter(measured.made)), labels)
    for stimulus, values in measured.rings.items():
        for i in range(values["spc"].shape[-1]):
            place = {"stimulus": stimulus, "distance": (i + 0.5) * ring_width}
            for row in summarize({name: scores[..., i] for name, scores in values.items()}, plan.names):
                yield {**headline, **place, **row}
    variance = {"seed": plan.options.seeds[0], **labels, "readout": "variance", "target": ""}
    for (stimulus, stage), (*_, n) in measured.eta2.items():
        if stage != "all":
            cells = torch.from_numpy(measured.maps[stimulus, stage, "eta2"])
            # the outermost points of the aligned grid lie on the image's border; the unit is the smaller step of it
            points = border_distance(grid, grid, (height / shorter, width / shorter), first=0)
            for i, value in enumerate(_by_ring(cells, points + 0.5, 1.0)):
                place = {"stimulus": stimulus, "stages": stage, "distance": i * shorter / (grid - 1)}
                yield {**variance, **place, "metric": "eta2", "value": value, "n": n}
    for stage, mask in measured.reach.items():
        rows, columns = height / mask.shape[-2], width / mask.shape[-1]
        cell = min(rows, columns)
        step = max(ring_width / cell, 1.0)
        distance = border_distance(mask.shape[-2], mask.shape[-1], (rows / cell, columns / cell))
        for i, value in enumerate(_by_ring(mask.float(), distance, step)):
            place = {"stimulus": "", "stages": stage, "distance": (i + 0.5) * step * cell}
            yield {**variance, **place, "metric": "reach", "value": value}


def _ring_width(plan: Plan) -> float:
    """Width in pixels of the rings of the border profile: the smaller side of a cell of the aligned grid, and at least
    one pixel, so that no ring is empty."""
    return max(min(plan.size) / plan.options.grid, 1.0)


def _by_ring(cells: Tensor, distance: Tensor, width: float) -> list[float]:
    """Means of a map of cells (h, w) over rings of a width, by the cells' distances from the border, (h, w)."""
    return [cells.flatten()[ring].mean().item() for ring in rings(distance, width)]
