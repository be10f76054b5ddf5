"""What one encoder's pass over the images gives: readouts made on the training images, scored on the test images."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from lightning.fabric import Fabric
from torch import Tensor

from padprobe.features import FeatureCache, FeatureReader, Progress, gather
from padprobe.maps import Target, position_maps, shuffled, target_name
from padprobe.readout.posenet import PosENet, readout_side, train_readouts
from padprobe.readout.ridge import GRAM_LIMIT_GB, RidgeReadout, RidgeStatistics, gram_gb, solve, solve_by_gradients
from padprobe.readout.variance import PositionVariance
from padprobe.readout.variants import Readout
from padprobe.results import COLUMNS, PROFILE, Results
from padprobe.scores import BorderProfile, rings, score_maps, standard_ranks, summarize
from padprobe.stimuli import Images

Key = tuple[Readout, int]
"""A readout and its seed."""
Made = dict[Key, PosENet | RidgeReadout]
"""Readouts that were trained or solved."""


@dataclass(frozen=True)
class Plan:
    """What to read out: the first readout at the first seed is the headline.

    Attributes:
        readouts: all of them, the controls on the image alone included.
        targets: position maps.
        image_size: side of the predicted maps in pixels.
        grid: side of the aligned features in cells.
        epochs, batch_size: of the trained readouts.
        seeds: of the readouts.
        selectivity: whether to read out the permuted targets too.
        states: weights of readouts that were trained before; where given, nothing is trained, and ``readouts`` and
            ``seeds`` are theirs.
    """

    readouts: tuple[Readout, ...]
    targets: tuple[Target, ...]
    image_size: int
    grid: int
    epochs: int
    batch_size: int
    seeds: tuple[int, ...]
    selectivity: bool
    states: Mapping[Key, dict[str, Tensor]] | None = None

    @property
    def names(self) -> list[str]:
        """The targets' names."""
        return [target_name(target) for target in self.targets]

    @property
    def keys(self) -> list[Key]:
        """Every readout at every seed; a closed form has none, and stands at the first."""
        return [(r, s) for s in self.seeds for r in self.readouts if r.kind == "posenet" or s == self.seeds[0]]

    def all_targets(self, readout: Readout) -> list[Target]:
        """The targets, then the permuted ones."""
        side = readout_side(readout.kernel_size, readout.depth, readout.padding, self.grid)
        return [*self.targets, *(shuffled(t, side) for t in self.targets if self.selectivity)]

    def all_names(self, readout: Readout) -> list[str]:
        """Their names."""
        return [target_name(target) for target in self.all_targets(readout)]

    def maps(self, readout: Readout) -> Tensor:
        """Their maps, (T or 2T, S, S)."""
        return position_maps(self.image_size, self.all_targets(readout), readout.scale)

    def posenet(self, readout: Readout, seed: int, in_channels: int) -> PosENet:
        """An untrained readout."""
        return PosENet(
            in_channels,
            self.all_targets(readout),
            readout.kernel_size,
            readout.depth,
            readout.padding,
            self.grid,
            self.image_size,
            seed,
            readout.scale,
        )


@dataclass
class Measured:
    """One encoder's measurements.

    Attributes:
        plan: what was asked for.
        scores: SPC, MAE, nMAE and constant by (key, stimulus): each (n, T), or (n, 2T) with the permuted targets.
        made: the readouts.
        rings: the headline's SPC and MAE by stimulus: each (n, T, rings).
        eta2: by (stimulus, stage): the value, its interval, and the number of images.
        maps: see :class:`~padprobe.results.Results`, without the run's name.
        reach: the cells of each stage that padding reaches, bool (h, w).
    """

    plan: Plan
    made: Made = field(default_factory=dict)
    scores: dict[tuple[Key, str], dict[str, Tensor]] = field(default_factory=dict)
    rings: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    eta2: dict[tuple[str, str], tuple[float, float, float, int]] = field(default_factory=dict)
    maps: dict[str, np.ndarray] = field(default_factory=dict)
    reach: dict[str, Tensor] = field(default_factory=dict)

    def results(self, labels: Mapping[str, Any]) -> Results:
        """Tidy rows, the border profile and the maps. A ridge readout's ``gap`` is its SPC minus that of the trained
        readout of the same features: what the training left undone."""
        names = self.plan.names
        rows: list[dict[str, Any]] = []
        for (key, stimulus), scores in self.scores.items():
            own = {metric: values[:, : len(names)] for metric, values in scores.items()}
            if self.plan.selectivity:
                own["selectivity"] = own["spc"] - scores["spc"][:, len(names) :]
            common = {**describe(key), **labels, "stimulus": stimulus}
            trained = (dataclasses.replace(key[0], kind="posenet"), self.plan.seeds[0]), stimulus
            if key[0].kind == "ridge" and trained in self.scores:
                own["gap"] = own["spc"] - self.scores[trained]["spc"][:, : len(names)]
            rows += [{**common, **row} for row in summarize(own, names)]
        variance = {"seed": self.plan.seeds[0], **labels, "readout": "variance"}
        for (stimulus, stage), (value, low, high, n) in self.eta2.items():
            more = {"stages": stage, "stimulus": stimulus, "target": "", "metric": "eta2", "value": value}
            rows.append({**variance, **more, "ci_low": low, "ci_high": high, "n": n})
        for stage, mask in self.reach.items():
            more = {
                "stages": stage,
                "stimulus": "",
                "target": "",
                "metric": "reach",
                "value": mask.float().mean().item(),
            }
            rows.append({**variance, **more})
        run = labels.get("run", "")
        return Results(
            pd.DataFrame(rows).reindex(columns=list(COLUMNS)),
            profile=pd.DataFrame(list(self._profile(labels))).reindex(columns=list(PROFILE)),
            maps={f"{run}/{name}": values for name, values in self.maps.items()},
        )

    def _profile(self, labels: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        plan = self.plan
        width = plan.image_size / plan.grid
        headline = {**describe((plan.readouts[0], plan.seeds[0])), **labels}
        for stimulus, values in self.rings.items():
            for i in range(values["spc"].shape[-1]):
                place = {"stimulus": stimulus, "distance": (i + 0.5) * width}
                for row in summarize({name: scores[..., i] for name, scores in values.items()}, plan.names):
                    yield {**headline, **place, **row}
        variance = {"seed": plan.seeds[0], **labels, "readout": "variance", "target": ""}
        for (stimulus, stage), (*_, n) in self.eta2.items():
            if stage != "all":
                found = torch.from_numpy(self.maps[f"{stimulus}/{stage}/eta2"])
                for i, value in enumerate(_by_ring(found, 1.0)):
                    # the outermost points of the aligned grid lie on the image's border
                    place = {"stimulus": stimulus, "stages": stage, "distance": i * plan.image_size / (plan.grid - 1)}
                    yield {**variance, **place, "metric": "eta2", "value": value, "n": n}
        for stage, mask in self.reach.items():
            cell = plan.image_size / mask.shape[-1]
            step = max(width / cell, 1.0)
            for i, value in enumerate(_by_ring(mask.float(), step)):
                place = {"stimulus": "", "stages": stage, "distance": (i + 0.5) * step * cell}
                yield {**variance, "readout": "", **place, "metric": "reach", "value": value}


def describe(key: Key) -> dict[str, Any]:
    """A readout's columns in the results."""
    readout, seed = key
    return {
        "readout": readout.name,
        "kernel_size": readout.kernel_size,
        "depth": readout.depth,
        "head_padding": readout.padding,
        "stages": readout.stages,
        "seed": seed,
    }


def _by_ring(cells: Tensor, width: float) -> list[float]:
    """Means of a map of cells (h, w) over rings ``width`` cells wide, from the border inwards."""
    return [cells.flatten()[ring].mean().item() for ring in rings(cells.shape[0], cells.shape[1], width)]


def measure(
    reader: FeatureReader,
    plan: Plan,
    train: Images,
    test: Mapping[str, Images],
    cache_gb: float,
    cache_dir: str | Path | None,
    progress: Progress | None,
) -> Measured:
    """Makes the readouts on the training images and scores them on each test set: one pass over either.

    In full float32: a GPU's TF32 would put differences of 1e-3 between it and a CPU.
    """
    channels = {readout: _channels(reader, readout) for readout in plan.readouts}
    measured = Measured(plan)
    with torch.backends.cudnn.flags(enabled=True, benchmark=torch.backends.cudnn.benchmark, allow_tf32=False):
        if plan.states is not None:
            measured.made = _load(reader, plan, channels)
        else:
            measured.made = _fit(reader, plan, channels, train, cache_gb, cache_dir, progress)
        for name, images in test.items():
            _score(measured, reader, measured.made, channels, name, images, progress)
    return measured


def _channels(reader: FeatureReader, readout: Readout) -> list[slice]:
    """The channels that a readout reads, neighbours together."""
    if readout.stages == "all":
        return [slice(0, reader.channels["rgb"].start)]
    names = dict.fromkeys(readout.stages.split("+"))
    parts = sorted((reader.channels[name] for name in names), key=lambda part: part.start)
    merged: list[slice] = []
    for part in parts:
        if merged and merged[-1].stop == part.start:
            merged[-1] = slice(merged[-1].start, part.stop)
        else:
            merged.append(part)
    return merged


def _select(features: Tensor, parts: list[slice]) -> Tensor:
    """A view of neighbouring channels, or a copy of scattered ones."""
    return features[:, parts[0]] if len(parts) == 1 else torch.cat([features[:, part] for part in parts], dim=1)


def _width(parts: list[slice]) -> int:
    return sum(part.stop - part.start for part in parts)


def _held_out(index: Tensor) -> Tensor:
    """The images on which ridge chooses its penalty: every fifth."""
    return index % 5 == 4


def _load(reader: FeatureReader, plan: Plan, channels: dict[Readout, list[slice]]) -> Made:
    """Readouts that were trained before, in evaluation mode.

    Raises:
        ValueError: where they read other channels than the encoder has.
    """
    found: Made = {}
    for (readout, seed), state in (plan.states or {}).items():
        width, expected = _width(channels[readout]), state["weight"].shape[1]
        if width != expected:
            raise ValueError(
                f"the trained readout of stages {readout.stages} reads {expected} channels, and those of "
                f"{type(reader.encoder).__name__} have {width}: it was trained on another architecture"
            )
        module = plan.posenet(readout, seed, width)
        module.load_state_dict(state)
        found[readout, seed] = module.to(reader.device).eval()
    return found


def _fit(
    reader: FeatureReader,
    plan: Plan,
    channels: dict[Readout, list[slice]],
    images: Images,
    cache_gb: float,
    cache_dir: str | Path | None,
    progress: Progress | None,
) -> Made:
    """One pass over the training images, then every readout, in evaluation mode; the same in every process."""
    fabric, n = reader.fabric, len(images)
    streamed: dict[Readout, RidgeStatistics] = {}
    for readout in plan.readouts:
        width = _width(channels[readout])
        if readout.kind == "ridge" and gram_gb(width, readout.kernel_size) <= GRAM_LIMIT_GB:
            streamed[readout] = RidgeStatistics(width, readout.kernel_size, plan.grid).to(reader.device)
            streamed[readout].sync_on_compute = fabric.world_size > 1  # not with processes that this run knows not of
    cached = [key for key in plan.keys if key[0] not in streamed]
    cache = None
    what = "encoder pass"
    if cached:
        share = len(range(fabric.global_rank, n, fabric.world_size))
        cache = FeatureCache(share, reader.width, plan.grid, cache_gb, cache_dir, reader.device)
        what += f" (features: {cache.where})"
    done = 0
    for index, features in reader.batches(images, what, progress):
        for readout, statistics in streamed.items():
            statistics.update(_select(features, channels[readout]), _held_out(index))
        if cache is not None:
            cache.write(torch.arange(done, done + len(index)), features)
            done += len(index)

    found: Made = {}
    for readout, statistics in streamed.items():
        found[readout, plan.seeds[0]] = solve(statistics, plan.all_names(readout), plan.maps(readout))
    if cache is not None:
        cache.check(fabric)
        whole: FeatureCache | None = cache
        if fabric.world_size > 1:
            first = fabric.global_rank == 0
            whole = FeatureCache(n, reader.width, plan.grid, cache_gb, cache_dir, reader.device) if first else None
            gather(cache, whole, fabric)
        found.update(_fit_cached(whole, cached, reader.device, plan, channels, fabric, progress))
    for module in found.values():
        module.to(reader.device).eval()
    return {key: found[key] for key in plan.keys}


def _fit_cached(
    cache: FeatureCache | None,
    keys: list[Key],
    device: torch.device,
    plan: Plan,
    channels: dict[Readout, list[slice]],
    fabric: Fabric,
    progress: Progress | None,
) -> Made:
    """Readouts that need the features more than once: made by process 0, which has the cache, and handed to all."""
    found: Made = {}
    for seed in plan.seeds:
        trained: dict[Key, PosENet] = {
            key: plan.posenet(key[0], seed, _width(channels[key[0]])).to(device)
            for key in keys
            if key[0].kind == "posenet" and key[1] == seed
        }
        if trained and cache is not None:
            train_readouts(
                trained,
                cache,
                lambda key, features: _select(features, channels[key[0]]),
                plan.epochs,
                plan.batch_size,
                seed,
                progress,
            )
        found.update(trained)
    for module in found.values():
        if fabric.world_size > 1:
            module.load_state_dict(fabric.broadcast({k: v.cpu() for k, v in module.state_dict().items()}))
    for readout, seed in keys:
        if readout.kind == "ridge":
            found[readout, seed] = _solve_cached(cache, readout, device, plan, channels[readout], fabric, progress)
    return found


def _solve_cached(
    cache: FeatureCache | None,
    readout: Readout,
    device: torch.device,
    plan: Plan,
    parts: list[slice],
    fabric: Fabric,
    progress: Progress | None,
) -> RidgeReadout:
    """A ridge readout whose Gram matrix would be too large, on process 0, and the same on all."""
    names, maps = plan.all_names(readout), plan.maps(readout)
    solved: RidgeReadout | None = None
    if cache is not None:
        buffer = cache.buffer(plan.batch_size, device)
        sweeps = 0

        def batches() -> Iterator[tuple[Tensor, Tensor]]:
            nonlocal sweeps
            sweeps += 1
            for index in torch.arange(len(cache)).split(plan.batch_size):
                yield _select(cache.read(index, buffer), parts), _held_out(index).to(device)
                if progress:
                    progress(f"conjugate gradients, sweep {sweeps}", int(index[-1]) + 1, len(cache))

        solved = solve_by_gradients(batches, _width(parts), names, maps, readout.kernel_size, plan.grid, device=device)
    if fabric.world_size == 1:
        assert solved is not None
        return solved
    state: Any = (solved.weight.cpu(), solved.bias.cpu(), solved.lam) if solved else None
    weight, bias, lam = fabric.broadcast(state)
    return RidgeReadout(names, maps, weight, bias, plan.grid, lam)


def _score(
    measured: Measured,
    reader: FeatureReader,
    readouts: Made,
    channels: dict[Readout, list[slice]],
    stimulus: str,
    images: Images,
    progress: Progress | None,
) -> None:
    """One pass over a test set: scores of every readout, the headline's rings and maps, and eta squared."""
    plan, fabric, n = measured.plan, reader.fabric, len(images)
    headline = next(iter(readouts))
    maps = {key: module.maps for key, module in readouts.items()}
    ranks = {readout: standard_ranks(maps[readout, seed]) for readout, seed in reversed(readouts)}
    count = len(plan.targets)
    profile = BorderProfile(maps[headline][:count], plan.image_size / plan.grid)
    variance = PositionVariance(reader.width, plan.grid).to(reader.device)
    variance.sync_on_compute = fabric.world_size > 1
    scores = {key: {m: torch.zeros(n, len(maps[key])) for m in ("spc", "mae", "nmae", "constant")} for key in readouts}
    in_rings = {m: torch.zeros(n, count, len(profile.rings)) for m in ("spc", "mae")}
    sums = torch.zeros(2, *maps[headline][:count].shape, device=reader.device)
    for index, features in reader.batches(images, stimulus, progress):
        variance.update(features, index)
        for key, module in readouts.items():
            with torch.inference_mode():
                prediction = module(_select(features, channels[key[0]]))
                for metric, values in score_maps(prediction, maps[key], ranks[key[0]]).items():
                    scores[key][metric][index] = values.float().cpu()
                if key == headline:
                    prediction = prediction[:, :count]
                    for metric, values in profile.score(prediction).items():
                        in_rings[metric][index] = values.cpu()
                    sums[0] += prediction.sum(0)
                    sums[1] += (prediction - maps[key][:count]).abs().sum(0)

    def total(values: Tensor) -> Tensor:  # every image was seen by one process, and is 0 in the others
        if fabric.world_size == 1:
            return values.cpu()
        return fabric.all_reduce(values.to(reader.device), reduce_op="sum").cpu()  # type: ignore[union-attr]

    for key in readouts:
        whole = {metric: total(values) for metric, values in scores[key].items()}
        measured.scores[key, stimulus] = {**whole, "constant": whole["constant"].bool()}
    measured.rings[stimulus] = {metric: total(values) for metric, values in in_rings.items()}
    for kind, values in zip(("prediction", "error"), total(sums) / n, strict=True):
        for name, mean in zip(plan.names, values, strict=True):
            measured.maps[f"{stimulus}/{name}/{kind}"] = mean.numpy()
    if n >= 2:
        for stage, part in {**reader.channels, "all": slice(0, reader.channels["rgb"].start)}.items():
            cells = variance.eta_squared(part)
            measured.eta2[stimulus, stage] = (cells.mean().item(), *variance.interval(part), n)
            if stage != "all":
                measured.maps[f"{stimulus}/{stage}/eta2"] = cells.float().cpu().numpy()
