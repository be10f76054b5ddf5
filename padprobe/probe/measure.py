"""Scores readouts on the test images: one pass over each set."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from padprobe.probe.features import FeatureReader, Progress
from padprobe.probe.plan import Key, Made, Plan, channels_of, describe, select_channels
from padprobe.probe.train import fit_readouts, load_states
from padprobe.readout.spec import Readout
from padprobe.readout.variance import PositionVariance
from padprobe.results import COLUMNS, PROFILE, Results, summarize
from padprobe.scores import BorderProfile, rings, score_maps, standard_ranks
from padprobe.stimuli import Images


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
    channels = {readout: channels_of(reader, readout) for readout in plan.readouts}
    measured = Measured(plan)
    with torch.backends.cudnn.flags(enabled=True, benchmark=torch.backends.cudnn.benchmark, allow_tf32=False):
        if plan.states is not None:
            measured.made = load_states(reader, plan, channels)
        else:
            measured.made = fit_readouts(reader, plan, channels, train, cache_gb, cache_dir, progress)
        for name, images in test.items():
            _score(measured, reader, measured.made, channels, name, images, progress)
    return measured


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
                prediction = module(select_channels(features, channels[key[0]]))
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
