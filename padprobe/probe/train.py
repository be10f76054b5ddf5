"""Makes the readouts on features of the training images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from torch import Tensor

from padprobe.probe.features import FeatureCache, FeatureReader, Progress, gather
from padprobe.probe.plan import Key, Made, Plan, held_out_mask, select_channels, total_width
from padprobe.readout.posenet import PosENet, make_optimizer
from padprobe.readout.ridge import GRAM_LIMIT_GB, RidgeReadout, RidgeStatistics, gram_gb, solve, solve_by_gradients
from padprobe.readout.spec import Readout
from padprobe.stimuli import Images


def load_states(reader: FeatureReader, plan: Plan, channels: dict[Readout, list[slice]]) -> Made:
    """Readouts that were trained before, in evaluation mode.

    Raises:
        ValueError: where they read other channels than the encoder has.
    """
    found: Made = {}
    for (readout, seed), state in (plan.states or {}).items():
        width, expected = total_width(channels[readout]), state["weight"].shape[1]
        if width != expected:
            raise ValueError(
                f"the trained readout of stages {readout.stages} reads {expected} channels, and those of "
                f"{type(reader.encoder).__name__} have {width}: it was trained on another architecture"
            )
        module = plan.posenet(readout, seed, width)
        module.load_state_dict(state)
        found[readout, seed] = module.to(reader.device).eval()
    return found


def fit_readouts(
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
        width = total_width(channels[readout])
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
            statistics.update(select_channels(features, channels[readout]), held_out_mask(index))
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
            key: plan.posenet(key[0], seed, total_width(channels[key[0]])).to(device)
            for key in keys
            if key[0].kind == "posenet" and key[1] == seed
        }
        if trained and cache is not None:
            train_readouts(
                trained,
                cache,
                lambda key, features: select_channels(features, channels[key[0]]),
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
                yield select_channels(cache.read(index, buffer), parts), held_out_mask(index).to(device)
                if progress:
                    progress(f"conjugate gradients, sweep {sweeps}", int(index[-1]) + 1, len(cache))

        solved = solve_by_gradients(
            batches, total_width(parts), names, maps, readout.kernel_size, plan.grid, device=device
        )
    if fabric.world_size == 1:
        assert solved is not None
        return solved
    state: Any = (solved.weight.cpu(), solved.bias.cpu(), solved.lam) if solved else None
    weight, bias, lam = fabric.broadcast(state)
    return RidgeReadout(names, maps, weight, bias, plan.grid, lam)


def train_readouts(
    readouts: Mapping[Key, PosENet],
    cache: FeatureCache,
    select: Callable[[Key, Tensor], Tensor],
    epochs: int = 15,
    batch_size: int = 32,
    seed: int = 0,
    progress: Progress | None = None,
) -> None:
    """Trains readouts side by side on features that were computed once, in place, and leaves them in evaluation mode.

    Each has its own optimizer and its own random stream, so that none changes another's result.

    Args:
        readouts: by any key.
        cache: the features of all images.
        select: called with (key, features (B, width, grid, grid)): what that readout reads of them.
        epochs: passes over the features.
        batch_size: images a step.
        seed: of the order of images, which all readouts share.
        progress: called with ("readouts", steps done, steps in all).

    Source: paper, section 3.2: SGD, 15 epochs; the authors' code: rate .1, a tenth of that from epoch 10 on.
    """
    device = next(iter(readouts.values())).weight.device
    optimizers = {key: make_optimizer(readout.train()) for key, readout in readouts.items()}
    generator = torch.Generator().manual_seed(seed)
    steps = [
        order for _ in range(epochs) for order in torch.randperm(len(cache), generator=generator).split(batch_size)
    ]
    slow = 2 * len(steps) // 3
    buffer = cache.buffer(batch_size, device)
    for step, order in enumerate(steps):
        features = cache.read(order, buffer)
        for key, readout in readouts.items():
            optimizer = optimizers[key]
            for group in optimizer.param_groups:
                group["lr"] = 0.1 if step < slow else 0.01
            optimizer.zero_grad()
            readout.loss(select(key, features)).sum().backward()
            optimizer.step()
        if progress:
            progress("readouts", step + 1, len(steps))
    for readout in readouts.values():
        readout.eval()
