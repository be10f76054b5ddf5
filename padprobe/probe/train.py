"""Makes the readouts from the features of the training images."""

from __future__ import annotations

import itertools
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from padprobe.probe.features import FeatureCache, FeatureReader, Progress, gather, silent
from padprobe.probe.plan import Key, Made, Plan
from padprobe.readout.posenet import PosENet, make_optimizer
from padprobe.readout.ridge import GRAM_LIMIT_GB, RidgeReadout, RidgeStatistics, gram_gb, solve, solve_by_gradients
from padprobe.readout.spec import Readout
from padprobe.stimuli import Images


def make_readouts(reader: FeatureReader, images: Images | None) -> Made:
    """All readouts of a plan, in evaluation mode and the same in every process.

    They are made in one pass over the training images, unless the plan has the states of trained ones.
    """
    plan = reader.plan
    if plan.states is not None:
        made: Made = {key: plan.posenet(*key) for key in plan.states}
        for key, module in made.items():
            module.load_state_dict(dict(plan.states[key]))
    else:
        assert images is not None
        made = _fit(reader, images)
    for module in made.values():
        module.to(reader.device).eval()
    return made


def _fit(reader: FeatureReader, images: Images) -> Made:
    """One pass over the training images, then every readout."""
    plan, fabric = reader.plan, reader.fabric
    streamed: dict[Readout, RidgeStatistics] = {}  # the others need a cache
    for readout in plan.readouts:
        width, kernel_size = plan.width_of(readout), readout.kernel_size
        if is_streamed(plan, readout):
            streamed[readout] = RidgeStatistics(width, kernel_size, plan.options.grid).to(reader.device)
            streamed[readout].sync_on_compute = fabric.world_size > 1  # only within this run's own processes
    cached = [key for key in plan.keys if key[0] not in streamed]
    cache, what = None, "encoder pass"
    if cached:
        cache = _new_cache(reader, len(range(fabric.global_rank, len(images), fabric.world_size)))
        what += f" (features: {cache.where})"
    done = 0
    for index, features in reader.batches(images, what):
        for readout, statistics in streamed.items():
            statistics.update(plan.select(readout, features), _held_out(index, len(images)))
        if cache is not None:
            cache.write(torch.arange(done, done + len(index)), features)
            done += len(index)

    made: Made = {(r, plan.options.seeds[0]): solve(s, *plan.maps(r)) for r, s in streamed.items()}
    if cache is not None:
        cache.check(fabric)
        whole: FeatureCache | None = cache
        if fabric.world_size > 1:
            whole = _new_cache(reader, len(images)) if fabric.global_rank == 0 else None
            gather(cache, whole, fabric)
        made.update(_fit_cached(reader, whole, cached))
    return {key: made[key] for key in plan.keys}


def is_streamed(plan: Plan, readout: Readout) -> bool:
    """Whether a readout is solved from sums over the images, so that their features are not kept."""
    return readout.kind == "ridge" and gram_gb(plan.width_of(readout), readout.kernel_size) <= GRAM_LIMIT_GB


def check_space(plan: Plan, images: int, processes: int) -> None:
    """Raises ValueError where the training images' features go to a file for which the disk has no room."""
    options, folder = plan.options, plan.cache_dir or tempfile.gettempdir()
    kept = plan.states is None and not all(is_streamed(plan, readout) for readout in plan.readouts)
    gb = 2 * images * plan.width * options.grid**2 / 1e9
    on_disk = gb * (1 + (processes > 1))  # then process 0 also collects them
    free = shutil.disk_usage(folder).free / 1e9
    if kept and gb > options.cache_gb and on_disk > free:
        raise ValueError(
            f"the features of {images} images need {on_disk:.1f} GB in {str(folder)!r}, which has {free:.1f} GB: raise "
            "cache_gb, give another cache_dir, or use fewer images"
        )


def _held_out(index: Tensor, n: int) -> Tensor:
    """The images, of n, on which ridge chooses its penalty: the last fifth.

    Copies of an image and the frames of a video are neighbours. All but those at the border are on one side.
    """
    return index * 5 >= n * 4


def _new_cache(reader: FeatureReader, n: int) -> FeatureCache:
    plan = reader.plan
    return FeatureCache(n, plan.width, plan.options.grid, plan.options.cache_gb, plan.cache_dir, reader.device)


def _fit_cached(reader: FeatureReader, cache: FeatureCache | None, keys: list[Key]) -> Made:
    """Readouts that need the features more than once.

    Process 0, which has the cache, makes them and hands them to the other processes.
    """
    plan, fabric, options = reader.plan, reader.fabric, reader.plan.options
    trained = {key: plan.posenet(*key).to(reader.device) for key in keys if key[0].kind == "posenet"}
    for seed in options.seeds:
        same_seed = {key: readout for key, readout in trained.items() if key[1] == seed}
        if same_seed and cache is not None:
            how = options.epochs, options.batch_size, seed, reader.progress
            train_readouts(same_seed, cache, lambda key, features: plan.select(key[0], features), *how)
    for module in trained.values():
        if fabric.world_size > 1:
            module.load_state_dict(fabric.broadcast({k: v.cpu() for k, v in module.state_dict().items()}))
    made: Made = dict(trained)
    for readout, seed in keys:
        if readout.kind == "ridge":
            made[readout, seed] = _solve_cached(reader, cache, readout)
    return made


def _solve_cached(reader: FeatureReader, cache: FeatureCache | None, readout: Readout) -> RidgeReadout:
    """A ridge readout whose Gram matrix would be too large: solved on process 0, the same on all."""
    plan, fabric, options = reader.plan, reader.fabric, reader.plan.options
    names, maps = plan.maps(readout)
    solved: RidgeReadout | None = None
    if cache is not None:
        buffer, width = cache.buffer(options.batch_size, reader.device), plan.width_of(readout)
        sweep = itertools.count(1)

        def batches() -> Iterator[tuple[Tensor, Tensor]]:
            what = f"conjugate gradients, sweep {next(sweep)}"
            for index in torch.arange(len(cache)).split(options.batch_size):
                yield plan.select(readout, cache.read(index, buffer)), _held_out(index, len(cache)).to(reader.device)
                reader.progress(what, int(index[-1]) + 1, len(cache))

        shape = readout.kernel_size, options.grid
        solved = solve_by_gradients(batches, width, names, maps, *shape, device=reader.device)
    if fabric.world_size == 1:
        assert solved is not None
        return solved
    state: Any = (solved.weight.cpu(), solved.bias.cpu(), solved.lam) if solved else None
    weight, bias, lam = fabric.broadcast(state)
    return RidgeReadout(names, maps, weight, bias, options.grid, lam)


def train_readouts(
    readouts: Mapping[Key, PosENet],
    cache: FeatureCache,
    select: Callable[[Key, Tensor], Tensor],
    epochs: int = 15,
    batch_size: int = 32,
    seed: int = 0,
    progress: Progress = silent,
) -> None:
    """Trains readouts side by side on features that were computed once, in place; leaves them in evaluation mode.

    Each readout has its own optimizer and its own random stream, so that none changes the result of another.

    Args:
        readouts: by any key.
        cache: the features of all images.
        select: called with (key, features (B, width, grid, grid)): returns what that readout reads of them.
        epochs: passes over the features.
        batch_size: images per step.
        seed: of the order of images, which all readouts share.
        progress: called with ("readouts", steps done, steps in all).

    Source: paper, section 3.2: SGD, 15 epochs; the authors' code: learning rate 0.1, then 0.01 from epoch 10 on.
    """
    optimizers = {key: make_optimizer(readout.train()) for key, readout in readouts.items()}
    generator = torch.Generator().manual_seed(seed)
    steps = [
        order for _ in range(epochs) for order in torch.randperm(len(cache), generator=generator).split(batch_size)
    ]
    buffer = cache.buffer(batch_size, next(iter(readouts.values())).weight.device)
    for step, order in enumerate(steps):
        features = cache.read(order, buffer)
        for key, readout in readouts.items():
            optimizer = optimizers[key]
            for group in optimizer.param_groups:
                group["lr"] = 0.1 if step < 2 * len(steps) // 3 else 0.01
            optimizer.zero_grad()
            readout.loss(select(key, features)).sum().backward()
            optimizer.step()
        progress("readouts", step + 1, len(steps))
    for readout in readouts.values():
        readout.eval()
