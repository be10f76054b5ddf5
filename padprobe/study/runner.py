"""Runs a study's cells, each once."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import os
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from jsonargparse import ArgumentParser
from torch import nn
from torch.utils.data import Dataset

from padprobe.callbacks.position_probe import PositionProbeCallback
from padprobe.maps import Size, position_maps
from padprobe.network.encoders import find_encoder, load_encoder, weights_label
from padprobe.network.padding import padding_of
from padprobe.network.stages import choose_layers
from padprobe.network.trace import stage_shapes
from padprobe.probe.encoder import probe_encoder
from padprobe.probe.features import Progress
from padprobe.results import Results, write_text
from padprobe.stimuli import load_images
from padprobe.study.cell import Cell, Planned
from padprobe.study.folder import (
    error_log,
    load_results,
    readouts_left,
    save_part,
    scores_folder,
    seconds_taken,
    write_plan,
)
from padprobe.study.plan import Study
from padprobe.study.training import build, score, trained


def run_study(study: Study, out: str | Path, progress: Progress, say: Callable[[str], None]) -> tuple[Results, int]:
    """Runs every chosen cell that is not finished, and joins the results of all.

    A cell's results lie in ``out/cells/NAME``, in folders named by the keys of everything that determines them. So a
    finished cell is not run again, and after a change only what it affects. A cell that fails leaves an ``error.log``
    there, and the other cells run. Everything that can be checked is checked before the first training.

    Args:
        study: see :func:`~padprobe.study.plan.read_study`.
        out: the folder of all results; the joined ones are saved in it.
        progress: called with (what runs, steps done, steps in total).
        say: called with one line per finished cell and per missing data set.

    Returns:
        The joined results and the number of cells that failed.

    Raises:
        ValueError: naming the cell, and the bad config, encoder or image folder.
    """
    out = Path(out)
    write_plan(study, out)
    for why in study.missing.values():
        say(f"missing: {why}")
    failed = []
    with _quiet():
        for planned in study.chosen:
            try:
                if not _done(planned, out):
                    progress(f"checking {planned.name}", 0, 1)
                    _check(planned.cell, out / "cells" / planned.folder)
            except OSError as error:  # weights that cannot be downloaded; the other cells need not wait for them
                failed.append(planned)
                _report_failure(planned, out, error, say)
            except Exception as error:
                raise ValueError(f"encoder {planned.name!r}: {error}") from error
        for i, planned in enumerate(study.chosen):
            if planned not in failed and not _run_once(planned, out, f"{i + 1}/{len(study.chosen)}", progress, say):
                failed.append(planned)
    results = load_results(out)
    results.save(out)
    return results, len(failed)


def _run_once(planned: Planned, out: Path, count: str, progress: Progress, say: Callable[[str], None]) -> bool:
    """Runs a cell unless it is finished or another process runs it; returns False if it failed."""
    place, log = f"{count} {planned.name}", error_log(planned, out)
    log.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(log.with_name("lock"), timeout=0):  # the system releases it when the process ends, even if killed
            before = _done(planned, out)
            if not before:
                _run(planned, out, lambda what, done, total: progress(f"{place}: {what}", done, total))
    except Timeout:
        say(f"{place}: another process is running it")
        return True
    except Exception as error:
        _report_failure(planned, out, error, say)
        return False
    log.unlink(missing_ok=True)
    say(f"{place}: done" + " before" * before)
    return True


def _report_failure(planned: Planned, out: Path, error: Exception, say: Callable[[str], None]) -> None:
    """Writes a cell's error.log; called while its exception is handled."""
    log = error_log(planned, out)
    log.parent.mkdir(parents=True, exist_ok=True)
    write_text(log, traceback.format_exc())
    say(f"{planned.name}: FAILED: {error} (see {log})")


def _done(planned: Planned, out: Path) -> bool:
    scored = not planned.cell.fit or (scores_folder(planned, out) / "results.csv").is_file()
    return scored and not readouts_left(planned, out)


def _check(cell: Cell, folder: Path) -> None:
    """Builds what the cell will train or load, and opens its images.

    Raises:
        ValueError: for what cannot work.
        OSError: for weights that cannot be downloaded.
    """
    if cell.fit:
        if not Path(cell.fit).is_file():
            raise ValueError(f"no config {cell.fit!r}")
        if cell.options or cell.weights != "untrained" or cell.position_embedding != "learned":
            raise ValueError(
                "`options`, `weights` and `position_embedding` are for encoders that are loaded. For a training state "
                "them as overrides, such as {model.init_args.encoder_weights: imagenet}"
            )
        for overrides in ({}, *cell.scores.values()):
            cli = build(cell, folder, overrides)
        encoder = cli.model.get_submodule(find_encoder(cli.model))
        for callback in cli.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, PositionProbeCallback):
                callback.resolve(cli.model)
    else:
        encoder = _load(cell, cell.weights, cell.seeds[0])
    stage_shapes(encoder, choose_layers(encoder, cell.stages, cell.image_size), cell.image_size)
    position_maps(cell.image_size, cell.targets)
    _open_images(json.dumps(cell.train), cell.image_size, cell.limit_train)
    for images in cell.test.values():
        _open_images(json.dumps(images), cell.image_size, cell.limit_test)


@functools.cache
def _open_images(source: str, image_size: Size, limit: int | None) -> None:
    """Checks images, given as JSON: once for all cells."""
    load_images(_images(json.loads(source)), image_size, limit)


def _images(value: Any) -> Any:
    """What :func:`~padprobe.stimuli.load_images` takes; a data set by ``class_path`` is created."""
    if isinstance(value, str):
        return value
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--images", type=Dataset)
    return parser.instantiate_classes(parser.parse_object({"images": value})).images


def _run(planned: Planned, out: Path, progress: Progress) -> None:
    """Trains (or loads), scores and probes one encoder, as far as that is not done."""
    begun, cell, scores = time.perf_counter(), planned.cell, scores_folder(planned, out)
    labels: dict[str, Any] = {
        "run": planned.name,
        "group": planned.group,
        "pair": cell.pair,
        "encoder": cell.encoder,
        "weights": "trained" if cell.trained else weights_label(cell.weights),
        "task": cell.task,
    }
    if len(cell.seeds) == 1:  # otherwise the readouts' seeds
        labels["seed"] = cell.seeds[0]
    if cell.fit:
        folder = out / "cells" / planned.folder / f"training-{planned.training_key}"
        model = trained(cell, folder, progress)
        encoder: nn.Module = model.get_submodule(find_encoder(model))
        labels["padding"] = padding_of(encoder)
        if not (scores / "results.csv").is_file():
            score(model, cell, folder, labels, progress).save(scores)
    else:
        encoder = _load(cell, cell.weights, cell.seeds[0])
    readouts = readouts_left(planned, out)
    if readouts:
        results = probe_encoder(
            encoder,
            _images(cell.train),
            {name: _images(images) for name, images in cell.test.items()},
            dataclasses.replace(cell, readouts=readouts),
            twin=None if cell.trained else functools.partial(_load, cell, "untrained"),
            cache_dir=out,
            labels=labels,
            progress=progress,
        )
        save_part(results, planned, out, readouts, time.perf_counter() - begun)


def _load(cell: Cell, weights: str, seed: int) -> nn.Module:
    modes = {"padding": cell.padding, "position_embedding": cell.position_embedding}
    return load_encoder(cell.encoder, weights, seed=seed, options=cell.options, image_size=cell.image_size, **modes)


def dry_run(study: Study, out: str | Path) -> Iterator[str]:
    """What a study would do: one line per cell, done or to do, and one per missing data set.

    Each cell to do is checked. A finished cell with the same encoder and training, if there is one, says how long it
    may take.
    """
    out = Path(out)
    finished = [planned for planned in study.cells if _done(planned, out)]
    with _quiet():
        for planned in study.chosen:
            if planned in finished:
                yield f"{planned.name}: done, {_took(planned, out)}"
                continue
            try:
                _check(planned.cell, out / "cells" / planned.folder)
            except Exception as error:
                yield f"{planned.name}: cannot run: {' '.join(str(error).split())}"
                continue
            trains_alike = (other for other in finished if other.cell.fit == planned.cell.fit)
            alike = next((other for other in trains_alike if other.cell.encoder == planned.cell.encoder), None)
            yield f"{planned.name}: to do" + (f"; {alike.name} {_took(alike, out)}" if alike else "")
    for why in study.missing.values():
        yield f"missing: {why}"


def _took(planned: Planned, out: Path) -> str:
    minutes = max(round(seconds_taken(planned, out) / 60), 1)
    return f"took {minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"took {minutes} min"


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps Lightning's notes about devices, data loaders and folders out of the progress display."""
    levels = {logger: logger.level for logger in map(logging.getLogger, ("lightning.pytorch", "lightning.fabric"))}
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="lightning.*")
            for logger in levels:
                logger.setLevel(logging.ERROR)
            yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)
