"""A study's trainings: run once, resumed where they were killed, scored on their test sets."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI

from padprobe.callbacks.position_probe import PositionProbeCallback
from padprobe.probe.features import Progress
from padprobe.results import COLUMNS, RUNS, TRAJECTORY, Results, write_text
from padprobe.study.cell import Cell
from padprobe.study.fit import lightning_cli

METRIC_NAMES = {
    "max_fmeasure": "max F-measure",
    "smeasure": "S-measure",
    "max_emeasure": "max E-measure",
    "mae": "MAE",
    "miou": "mIoU",
    "top1": "top-1",
}
"""What the results call a task's logged metrics; ``iou_CLASS`` is "IoU of CLASS", and every other keeps its name."""


def build(
    cell: Cell, folder: Path, changes: dict[str, Any] | None = None, callbacks: Sequence[Callback] = ()
) -> LightningCLI:
    """Trainer, model and data of a cell's training, which writes into ``folder``; ``changes`` replace its overrides."""
    # each row is written at once, because what a killed training has logged is part of its trajectory
    log = {"save_dir": str(folder), "name": "log", "version": "", "flush_logs_every_n_steps": 1}
    options = {
        "seed_everything": cell.seeds[0],
        "run": None,  # the study's folder, not checkpoints/RUN
        "trainer.logger": {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": log},
        "trainer.default_root_dir": str(folder),
        "trainer.devices": 1,  # more would run this whole study once per device
        "trainer.enable_progress_bar": False,
        "trainer.enable_model_summary": False,
        **cell.overrides,
        **(changes or {}),
    }
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in options.items()}
    arguments = [f"--config={cell.fit}", *(f"--{key}={text}" for key, text in texts.items())]
    return lightning_cli(arguments, run=False, callbacks=callbacks)


def trained(cell: Cell, folder: Path, progress: Progress) -> LightningModule:
    """The network with its trained weights: the best by the config's ModelCheckpoint, or else the last.

    The weights are kept in ``folder``. A training that was killed is resumed from the last epoch that it finished.
    """
    folder = folder.resolve()  # a ModelCheckpoint forgets its best weights when its folder's name changes
    record, last = folder / "trained.json", folder / "resume.ckpt"
    if not record.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        log = folder / "log" / "metrics.csv"
        if log.is_file():  # the logger starts a new file
            log.rename(log.with_name(f"metrics-{len(list(log.parent.glob('metrics*.csv')))}.csv"))
        keep = _Resume(folder, last.stem, save_on_train_epoch_end=True, enable_version_counter=False)
        cli = build(cell, folder, callbacks=[_Steps(progress), keep])
        for callback in cli.trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint):
                callback.dirpath = str(folder)
        cli.trainer.fit(cli.model, datamodule=cli.datamodule, ckpt_path=str(last) if last.is_file() else None)
        best = next(path for c in cli.trainer.checkpoint_callbacks if (path := c.best_model_path))  # type: ignore[attr-defined]
        write_text(record, json.dumps({"weights": Path(best).name}))
    model: LightningModule = build(cell, folder, {"trainer.logger": False}).model
    weights = folder / json.loads(record.read_text())["weights"]
    model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True)["state_dict"])
    return model


def score(model: LightningModule, cell: Cell, folder: Path, labels: dict[str, Any], progress: Progress) -> Results:
    """A trained network's scores on the cell's test sets, and what was logged during validation in ``folder``."""
    rows = []
    for i, (name, overrides) in enumerate(cell.scores.items()):
        progress(f"scoring on {name}", i, len(cell.scores))
        cli = build(cell, folder, {"trainer.logger": False, **overrides})
        callbacks: list[Callback] = cli.trainer.callbacks  # type: ignore[attr-defined]
        callbacks[:] = [callback for callback in callbacks if not isinstance(callback, PositionProbeCallback)]
        scores = cli.trainer.test(model, datamodule=cli.datamodule, verbose=False)[0]
        row = {**labels, "readout": "", "scale": "", "stimulus": name, "target": ""}
        row["n"] = len(cli.trainer.test_dataloaders.dataset)  # type: ignore[union-attr]
        rows += [{**row, "value": value, **name_metric(key)} for key, value in scores.items() if key != "test/loss"]
    table, runs = pd.DataFrame(rows).reindex(columns=list(COLUMNS)), pd.DataFrame([labels])
    return Results(table, runs.reindex(columns=list(RUNS)), _trajectory(folder / "log", labels["run"]))


def _trajectory(log: Path, run: str) -> pd.DataFrame:
    """What was logged during validation. A training that was killed has logged its last steps twice."""
    parts = sorted(log.glob("metrics-*.csv"), key=lambda path: int(path.stem.split("-")[1]))
    tables = [pd.read_csv(path) for path in [*parts, *log.glob("metrics.csv")] if path.stat().st_size]
    if not tables:
        return pd.DataFrame(columns=list(TRAJECTORY))
    logged = pd.concat(tables)
    keys = [key for key in map(str, logged) if key.startswith("val/") and key != "val/loss"]
    keys += [key for key in map(str, logged) if key.startswith("position/") and key.count("/") == 2]  # not each stage
    points = logged.melt(id_vars="step", value_vars=keys).dropna(subset="value")
    points = points.drop_duplicates(["step", "variable"], keep="last").sort_values(["variable", "step"])
    names = points["variable"].str.split("/")
    position = names.str[0] == "position"
    points = points.assign(
        run=run,
        target=names.str[1].where(position, ""),
        metric=names.str[-1].where(position, points["variable"].map(lambda key: name_metric(key)["metric"])),
    )
    return points[list(TRAJECTORY)].reset_index(drop=True)


def name_metric(key: str) -> dict[str, str]:
    """The columns ``metric`` and ``stages`` of a task's logged metric; ``position_only_`` is of the position alone.

    Example:
        >>> name_metric("test/miou"), name_metric("test/position_only_iou_sky")
        ({'metric': 'mIoU', 'stages': ''}, {'metric': 'IoU of sky', 'stages': 'position alone'})
    """
    name = key.split("/")[-1]
    score = name.removeprefix("position_only_")
    metric = METRIC_NAMES.get(score, score.replace("iou_", "IoU of "))
    return {"metric": metric, "stages": "" if score == name else "position alone"}


class _Resume(ModelCheckpoint):
    """The last epoch's checkpoint; a subclass, because a config may have a ModelCheckpoint with the same options."""


class _Steps(Callback):
    """Reports how far a training is."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        steps = trainer.estimated_stepping_batches
        self.progress("training", trainer.global_step, int(steps) if steps != float("inf") else 0)
