"""Runs a study's cells, each once."""

from __future__ import annotations

import functools
import json
import logging
import os
import shlex
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from jsonargparse import ArgumentParser
from torch import nn
from torch.utils.data import Dataset

from padprobe.callbacks.position_probe import PositionProbeCallback
from padprobe.maps import position_maps
from padprobe.network.encoders import find_encoder, load_encoder
from padprobe.network.padding import padding_of
from padprobe.network.stages import choose_layers
from padprobe.network.trace import stage_shapes
from padprobe.probe.encoder import probe_encoder
from padprobe.probe.features import Progress
from padprobe.results import Results, write_text
from padprobe.stimuli import Images, load_images
from padprobe.study.estimate import seconds_to_run
from padprobe.study.folder import error_log, load_results, readouts_left, save_part, scores_folder, write_plan
from padprobe.study.plan import PROBE, Cell, Planned, Study
from padprobe.study.training import build, score, trained

Say = Callable[[str], None]


def run_study(study: Study, out: str | Path, progress: Progress, say: Say) -> tuple[Results, int]:
    """Runs every cell of a study that has not been run, and joins the results of all.

    What a cell finds lies in ``out/cells/NAME``, under the keys that tell its results from others: a finished cell is
    not run again, and of a changed one only what the change changes. A cell that fails leaves its ``error.log`` there,
    and the others go on. Everything that can be checked is checked before the first training.

    Args:
        study: see :func:`~padprobe.study.plan.read_study`.
        out: folder of all results; ``results.csv`` of the joined ones.
        progress: called with (what runs, steps done, steps in all).
        say: called with a line for every cell that ends and for every thing that is missing.

    Returns:
        The joined results and the number of cells that failed.

    Raises:
        ValueError: for a bad config, encoder or image folder, by name.
    """
    out = Path(out)
    write_plan(study, out)
    for line in study.missing.values():
        say(f"missing: {line}")
    with _quiet():
        todo = [planned for planned in study.chosen if not _done(planned, out)]
        failed = []
        for planned in todo:
            progress(f"checking {planned.name}", 0, 1)
            try:
                _check(planned.cell, out / "cells" / planned.folder)
            except OSError as error:  # weights that cannot be fetched: the others need not wait
                failed.append(planned)
                _tell(planned, out, error, say)
            except Exception as error:
                raise ValueError(f"encoder {planned.name!r}: {error}") from error
        for i, planned in enumerate(study.chosen):
            place = f"{i + 1}/{len(study.chosen)} {planned.name}"
            log = error_log(planned, out)
            log.parent.mkdir(parents=True, exist_ok=True)
            if planned in failed:
                continue
            try:
                with FileLock(log.with_name("lock"), timeout=0):  # released where its process ends, however it does
                    before = _done(planned, out)
                    if not before:
                        _run(planned, out, functools.partial(_at, place, progress))
            except Timeout:
                say(f"{place}: left to another process, which runs it")
                continue
            except Exception as error:
                failed.append(planned)
                _tell(planned, out, error, say)
                continue
            log.unlink(missing_ok=True)
            say(f"{place}: done" + " before" * before)
    results = load_results(out)
    results.save(out)
    return results, len(failed)


def _tell(planned: Planned, out: Path, error: Exception, say: Say) -> None:
    """Writes down why a cell failed; called where its exception is handled."""
    log = error_log(planned, out)
    log.parent.mkdir(parents=True, exist_ok=True)
    write_text(log, traceback.format_exc())
    say(f"{planned.name}: FAILED: {error} (see {log})")


def _at(place: str, progress: Progress, what: str, done: int, total: int) -> None:
    progress(f"{place}: {what}", done, total)


def _done(planned: Planned, out: Path) -> bool:
    scored = not planned.cell.fit or (scores_folder(planned, out) / "results.csv").is_file()
    return scored and not readouts_left(planned, out)


def _check(cell: Cell, folder: Path) -> nn.Module:
    """Builds what the cell will train or load and reads its images; the encoder, untrained."""
    if cell.fit:
        if not Path(cell.fit).is_file():
            raise ValueError(f"no config {cell.fit!r}")
        if cell.options or cell.weights != "untrained" or cell.padding != "zeros":
            raise ValueError(
                "options, weights and padding are for encoders that are loaded; say them of a training as overrides, "
                "such as {model.init_args.encoder_padding: valid}"
            )
        for overrides in ({}, *cell.scores.values()):
            cli = build(cell, folder, overrides)
        encoder = cli.model.get_submodule(find_encoder(cli.model))
        for callback in cli.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, PositionProbeCallback):
                callback.resolve(cli.model)
    else:
        encoder = load_encoder(cell.encoder, cell.weights, cell.padding, cell.seeds[0], cell.options)
    stage_shapes(encoder, choose_layers(encoder, cell.stages, cell.image_size), cell.image_size)
    position_maps(cell.image_size, cell.targets)
    for given in _given(cell):
        _images(*given)
    return encoder


def _given(cell: Cell) -> list[tuple[str, int, int | None]]:
    """The cell's images, for training and for each test: their source as JSON, their size and limit."""
    sources = [(cell.train, cell.limit_train), *((source, cell.limit_test) for source in cell.test.values())]
    return [(json.dumps(source), cell.image_size, limit) for source, limit in sources]


@functools.cache
def _images(source: str, image_size: int, limit: int | None) -> Images:
    """A cell's images, as JSON, checked: each is opened once for all cells."""
    return load_images(_source(source), image_size, limit)


@functools.cache
def _source(source: str) -> Any:
    """What :func:`~padprobe.stimuli.load_images` takes, of its JSON: a data set by ``class_path`` is made."""
    value = json.loads(source)
    if isinstance(value, str):
        return value
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--images", type=Dataset)
    return parser.instantiate_classes(parser.parse_object({"images": value})).images


def _run(planned: Planned, out: Path, progress: Progress) -> None:
    """Trains (or loads), scores and probes one encoder, as far as it has not been done."""
    cell = planned.cell
    scores = scores_folder(planned, out)
    labels: dict[str, Any] = {
        "run": planned.name,
        "encoder": cell.encoder,
        "weights": "trained" if cell.fit or cell.encoder.endswith(".ckpt") else Path(cell.weights).stem,
        "task": cell.task,
        "seed": cell.seeds[0],
    }
    if cell.fit:
        folder = out / "cells" / planned.folder / f"training-{planned.training_key}"
        model = trained(cell, folder, progress)
        encoder: nn.Module = model.get_submodule(find_encoder(model))
        labels["padding"] = padding_of(encoder)
        if not (scores / "results.csv").is_file():
            score(model, cell, folder, labels, progress).save(scores)
    else:
        encoder = load_encoder(cell.encoder, cell.weights, cell.padding, cell.seeds[0], cell.options)
        if len(cell.seeds) > 1:
            del labels["seed"]  # the readouts'
    readouts = readouts_left(planned, out)
    if readouts:
        begun = time.perf_counter()
        results = probe_encoder(
            encoder,
            _source(json.dumps(cell.train)),
            {name: _source(json.dumps(source)) for name, source in cell.test.items()},
            readouts=readouts,
            untrained=0,  # a study lists its own
            **{option: getattr(cell, option) for option in PROBE},
            cache_dir=out,
            labels=labels,
            progress=progress,
        )
        save_part(results, planned, out, readouts, time.perf_counter() - begun)


def print_commands(study: Study, out: str | Path, options: Sequence[str]) -> Iterator[str]:
    """A command for every cell that has not been run, for machines that share the folder ``out``.

    Args:
        study: see :func:`~padprobe.study.plan.read_study`.
        out: folder of all results.
        options: of ``padprobe study``, its YAML first.
    """
    for planned in study.chosen:
        if not _done(planned, Path(out)):
            yield shlex.join(["padprobe", "study", *options, "--only", planned.name])


def dry_run(study: Study, out: str | Path) -> Iterator[str]:
    """What a study would do: a line for every cell, with an estimate of its time, and for every thing that is missing.

    The estimates are measured here and now, see :func:`~padprobe.study.estimate.seconds_to_run`.
    """
    total = 0.0
    with _quiet():
        for planned in study.chosen:
            if _done(planned, Path(out)):
                yield f"{planned.name}: done before"
                continue
            cell, left = planned.cell, readouts_left(planned, Path(out))
            try:
                encoder = _check(cell, Path(out) / "cells" / planned.folder)
            except (OSError, ValueError) as error:
                yield f"{planned.name}: cannot run: {error}"
                continue
            layers = choose_layers(encoder, cell.stages, cell.image_size)
            train, *test = (len(_images(*given)) for given in _given(cell))
            seconds = seconds_to_run(cell, left, layers, (train, sum(test)))
            total += seconds
            yield f"{planned.name}: about {_duration(seconds)}"
    yield f"in all about {_duration(total)}"
    for line in study.missing.values():
        yield f"missing: {line}"


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{max(minutes, 1)} min"


@contextmanager
def _quiet() -> Iterator[None]:
    """While open, Lightning's notes about devices, data loaders and folders stay away from the progress display."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="lightning.*")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
