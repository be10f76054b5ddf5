"""What to train, what to probe, what to compare: a YAML's cells, each run once, and the report on all of them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import LightningCLI
from torch import nn
from torch.utils.data import Dataset

from padprobe.callback import PositionProbeCallback
from padprobe.encoders import find_encoder, load_encoder
from padprobe.features import Progress
from padprobe.fit import lightning_cli
from padprobe.maps import TARGETS, position_maps
from padprobe.probing import padding_of, probe_encoder
from padprobe.results import COLUMNS, TRAJECTORY, Results, write_atomically
from padprobe.stages import find_stages, stage_shapes
from padprobe.stimuli import load_images

METRIC_NAMES = {
    "max_fmeasure": "max F-measure",
    "mean_fmeasure": "mean F-measure",
    "adaptive_fmeasure": "adaptive F-measure",
    "smeasure": "S-measure",
    "max_emeasure": "max E-measure",
    "mae": "MAE",
    "miou": "mIoU",
    "top1": "top-1",
}


@dataclass
class Cell:
    """One encoder of a study: loaded by name, or trained by a config.

    Attributes:
        encoder: a name for :func:`~padprobe.load_encoder`; of a trained one, only what the report calls it.
        options: further arguments of the encoder's constructor.
        weights: see :func:`~padprobe.load_encoder`.
        padding: of an encoder that is loaded; a trained one's is its config's.
        fit: a config for ``padprobe fit``; the module's submodule ``encoder`` is probed after the training.
        overrides: of the config, by dotted key, such as ``model.init_args.encoder_padding: valid``.
        task: what the report calls the encoder's training: untrained, classification, SOD, SS, ...
        data: what the report calls the data of the task's scores.
        seed: of untrained weights, of the training and of the readouts.
    """

    encoder: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    weights: str = "untrained"
    padding: str = "zeros"
    fit: str | None = None
    overrides: dict[str, Any] = field(default_factory=dict)
    task: str = "untrained"
    data: str = ""
    seed: int = 0


@dataclass
class Study:
    """A comparison of encoders on the same images.

    Attributes:
        encoders: the cells, by name.
        train: images to train readouts on: a stimulus, a folder or a data set by ``class_path``.
        test: images to score on, by name.
        targets: position maps.
        image_size: side of the images in pixels.
        limit_train: use at most so many images of ``train``.
        limit_test: use at most so many images of each of ``test``.
    """

    encoders: dict[str, Cell]
    train: str | Dataset
    test: dict[str, str | Dataset]
    targets: list[str] = field(default_factory=lambda: list(TARGETS))
    image_size: int = 224
    limit_train: int | None = None
    limit_test: int | None = None


def load_study(path: str | Path) -> Study:
    """Reads a study's YAML.

    Raises:
        ValueError: naming the file that is missing or the key or value that a study does not have.
    """
    if not Path(path).is_file():
        raise ValueError(f"no study {str(path)!r}")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Study, "study")
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        content.pop("anchors", None)  # where a study keeps what its cells share
        # overrides are for the training's parser: this one would instantiate a class_path among them
        overrides = {name: cell.pop("overrides", {}) for name, cell in content["encoders"].items()}
        study: Study = parser.instantiate_classes(parser.parse_object({"study": content})).study
        for name, cell in study.encoders.items():
            cell.overrides = overrides[name]
        return study
    except Exception as error:
        raise ValueError(f"study {str(path)!r}: {error}") from error


def run_study(path: str | Path, out: str | Path, progress: Progress, say: Callable[[str], None]) -> tuple[Results, int]:
    """Runs every cell of a study that has not been run, and joins the results of all.

    A finished cell lies in ``out/cells/NAME`` and is not run again while what determines it stays the same. A cell that
    fails leaves its ``error.log`` there, and the others go on. Everything that can be checked is checked before the
    first training.

    Args:
        path: the study's YAML.
        out: folder of all results; ``results.csv`` of the joined ones.
        progress: called with (what runs, steps done, steps in all).
        say: called with a line for every cell that ends.

    Returns:
        The joined results and the number of cells that failed.

    Raises:
        ValueError: for a bad study, config, encoder or image folder, by name.
    """
    study, out = load_study(path), Path(out)
    with _quiet():
        for name, cell in study.encoders.items():
            progress(f"checking {name}", 0, 1)
            try:
                _check(cell, study, out / "cells" / name)
            except Exception as error:
                raise ValueError(f"study {str(path)!r}, encoder {name!r}: {error}") from error
        position_maps(study.image_size, study.targets)
        load_images(study.train, study.image_size, study.limit_train)  # type: ignore[arg-type]
        for source in study.test.values():
            load_images(source, study.image_size, study.limit_test)  # type: ignore[arg-type]

        parts, failed = [], 0
        for i, (name, cell) in enumerate(study.encoders.items()):
            folder = out / "cells" / name
            key = _key(cell, path)
            place = f"{i + 1}/{len(study.encoders)} {name}"
            record = folder / "cell.json"
            if (folder / "results.csv").is_file() and record.is_file() and json.loads(record.read_text())["key"] == key:
                say(f"{place}: done before")
            else:
                folder.mkdir(parents=True, exist_ok=True)
                (folder / "results.csv").unlink(missing_ok=True)
                try:
                    results = _run(name, cell, study, folder, _at(place, progress))
                except Exception as error:
                    failed += 1
                    (folder / "error.log").write_text(traceback.format_exc(), encoding="utf-8")
                    say(f"{place}: FAILED: {error} (see {folder / 'error.log'})")
                    continue
                (folder / "error.log").unlink(missing_ok=True)
                write_atomically(record, _text(json.dumps({"key": key})))
                results.save(folder)
                say(f"{place}: done")
            parts.append(Results.load(folder))
    joined = Results.join(parts)
    joined.save(out)
    return joined, failed


def _at(place: str, progress: Progress) -> Progress:
    return lambda what, done, total: progress(f"{place}: {what}", done, total)


def _text(content: str) -> Callable[[str], None]:
    def write(path: str) -> None:
        Path(path).write_text(content, encoding="utf-8")

    return write


def _key(cell: Cell, path: str | Path) -> str:
    """A hash of all that determines a cell's results: the study but for its other cells, and the training's config."""
    study = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    shared = {k: v for k, v in study.items() if k not in ("encoders", "anchors")}
    config = Path(cell.fit).read_text(encoding="utf-8") if cell.fit else ""
    files = [Path(p).stat() for p in (cell.encoder, cell.weights) if Path(p).is_file()]
    stamps = [(file.st_size, file.st_mtime_ns) for file in files]
    text = json.dumps([shared, dataclasses.asdict(cell), config, stamps], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _arguments(cell: Cell, folder: Path) -> list[str]:
    """The command line of a cell's training."""
    assert cell.fit is not None
    logger = {
        "class_path": "lightning.pytorch.loggers.CSVLogger",
        "init_args": {"save_dir": str(folder), "name": "training", "version": ""},
    }
    options = {
        "seed_everything": cell.seed,
        "trainer.logger": logger,
        "trainer.devices": 1,  # more would run this whole study once a device
        "trainer.enable_progress_bar": False,
        "trainer.enable_model_summary": False,
        **cell.overrides,
    }
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in options.items()}
    return ["--config", cell.fit, *(f"--{key}={text}" for key, text in texts.items())]


def _check(cell: Cell, study: Study, folder: Path) -> None:
    """Builds what the cell will train or load, and throws it away."""
    if cell.fit:
        if not Path(cell.fit).is_file():
            raise ValueError(f"no config {cell.fit!r}")
        if cell.options or cell.weights != "untrained" or cell.padding != "zeros":
            raise ValueError(
                "options, weights and padding are for encoders that are loaded; say them of a training as overrides, "
                "such as {model.init_args.encoder_padding: valid}"
            )
        cli = lightning_cli(_arguments(cell, folder), run=False)
        encoder = cli.model.get_submodule(find_encoder(cli.model))
        for callback in cli.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, PositionProbeCallback):
                callback.resolve(cli.model)
    else:
        encoder = load_encoder(cell.encoder, cell.weights, cell.padding, cell.seed, cell.options)
    stage_shapes(encoder, find_stages(encoder, study.image_size), study.image_size)


def _run(name: str, cell: Cell, study: Study, folder: Path, progress: Progress) -> Results:
    """Trains (or loads) and probes one encoder."""
    labels = {"run": name, "encoder": cell.encoder, "weights": cell.weights, "task": cell.task, "seed": cell.seed}
    if cell.fit:
        labels["weights"] = "trained"
        cli = lightning_cli(_arguments(cell, folder), run=False, callbacks=[_Epochs(progress)])
        encoder: nn.Module = cli.model.get_submodule(find_encoder(cli.model))
        labels["padding"] = padding_of(encoder)
        trained = _train(cli, cell, folder, labels)
    else:
        encoder = load_encoder(cell.encoder, cell.weights, cell.padding, cell.seed, cell.options)
        trained = Results()
    probed = probe_encoder(
        encoder,
        study.train,  # type: ignore[arg-type]
        study.test,  # type: ignore[arg-type]
        targets=study.targets,
        image_size=study.image_size,
        seeds=[cell.seed],
        untrained=0,  # a study lists its own
        limit_train=study.limit_train,
        limit_test=study.limit_test,
        labels=labels,
        progress=progress,
    )
    return Results.join([trained, probed])


def _train(cli: LightningCLI, cell: Cell, folder: Path, labels: dict[str, Any]) -> Results:
    """Fits and tests; the task's test scores and everything that was logged on validation."""
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    scores = cli.trainer.test(cli.model, datamodule=cli.datamodule, verbose=False)[0]
    n = len(cli.trainer.test_dataloaders.dataset)  # type: ignore[union-attr]
    rows = [
        {**labels, "stimulus": cell.data, "metric": _metric(key), "value": value, "n": n}
        for key, value in scores.items()
        if key.startswith("test/") and key != "test/loss"
    ]
    for column in ("readout", "stages", "target"):
        for row in rows:
            row[column] = ""
    logged = pd.read_csv(folder / "training" / "metrics.csv")
    keys = [key for key in map(str, logged) if key.startswith("val/") and key != "val/loss"]
    keys += [key for key in map(str, logged) if key.startswith("position/") and key.count("/") == 2]  # not each stage
    points = logged.melt(id_vars="step", value_vars=keys).dropna(subset="value")
    points = points[points["step"] < cli.trainer.global_step]  # the test's scores are logged at the step after the last
    parts = points["variable"].str.split("/")
    of_position = parts.str[0] == "position"
    points = points.assign(
        run=labels["run"],
        task=labels["task"],
        padding=labels["padding"],
        target=parts.str[1].where(of_position, ""),
        metric=parts.str[-1].where(of_position, parts.str[-1].map(_metric)),
    )
    return Results(pd.DataFrame(rows).reindex(columns=list(COLUMNS)), points[list(TRAJECTORY)])


def _metric(key: str) -> str:
    name = key.split("/")[-1]
    score = name.removeprefix("position_only_")
    text = METRIC_NAMES.get(score, score.replace("iou_", "IoU of "))
    return text if score == name else f"{text}, position alone"


class _Epochs(Callback):
    """Tells how far a training is."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        steps = trainer.estimated_stepping_batches
        self.progress("training", trainer.global_step, int(steps) if steps != float("inf") else 0)


class _quiet:
    """While open, Lightning's notes about devices, data loaders and folders stay away from the progress display."""

    def __enter__(self) -> None:
        self.loggers = [logging.getLogger(n) for n in ("lightning.pytorch", "lightning.fabric")]
        self.levels = [logger.level for logger in self.loggers]
        for logger in self.loggers:
            logger.setLevel(logging.ERROR)
        self.warnings = warnings.catch_warnings()
        self.warnings.__enter__()
        warnings.filterwarnings("ignore", module="lightning.*")
        os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

    def __exit__(self, *args: Any) -> None:
        self.warnings.__exit__(*args)
        for logger, level in zip(self.loggers, self.levels, strict=True):
            logger.setLevel(level)
