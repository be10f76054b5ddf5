"""`padprobe fit | validate | test | predict`: LightningCLI on any LightningModule and LightningDataModule."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI


class _CLI(LightningCLI):
    """LightningCLI with ``--run NAME``: where checkpoints go."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--run",
            type=str | None,
            default=None,
            help="Name of the run: its checkpoints go to checkpoints/NAME, and --ckpt_path last resumes from there.",
        )

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        trainer, run = super().instantiate_trainer(**kwargs), self._get(self.config, "run")
        if run:
            folder = Path("checkpoints") / run
            if self.subcommand == "fit" and any(folder.glob("*.ckpt")):
                self._check_resumed(folder)
            for callback in trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, ModelCheckpoint) and callback.dirpath is None:
                    callback.dirpath = str(folder)
        return trainer

    def _check_resumed(self, folder: Path) -> None:
        """Raises ValueError unless what is asked for is to go on with the run whose checkpoints lie in ``folder``."""
        resumed, last = self._get(self.config, "ckpt_path"), folder / "last.ckpt"
        if not resumed:
            raise ValueError(
                f"{str(folder)!r} has checkpoints of an earlier run: resume it with --ckpt_path last, or give this "
                "one another name with --run"
            )
        if resumed != "last" or not last.is_file():
            return
        earlier = torch.load(last, map_location="cpu", weights_only=True).get("hyper_parameters", {})
        now = self.model.hparams
        for key in now.keys() & earlier.keys():
            if now[key] != earlier[key]:
                raise ValueError(
                    f"{str(last)!r} is of a run with {key} {earlier[key]!r}, and now it is {now[key]!r}: resume it as "
                    "it was, or give this one another name with --run"
                )


def lightning_cli(args: Sequence[str], run: bool = True, callbacks: Sequence[Callback] = ()) -> LightningCLI:
    """LightningCLI in subclass mode: model, data and callbacks by ``class_path``, as YAML or options.

    Args:
        args: options, as on the command line; with ``run``, a subcommand (fit, validate, test, predict) before them.
        run: whether to run the subcommand, or only to build trainer, model and data; a bad option then raises
            ``jsonargparse.ArgumentError`` where it would else end the program.
        callbacks: added to those of the config.
    """
    defaults: dict[str, Any] = {"callbacks": list(callbacks)} if callbacks else {}
    return _CLI(
        subclass_mode_model=True,
        subclass_mode_data=True,
        seed_everything_default=0,
        trainer_defaults=defaults,
        save_config_kwargs={"overwrite": True},
        parser_kwargs={} if run else {"exit_on_error": False},
        args=list(args),
        run=run,
    )


def check_data(path: str | Path) -> list[str]:
    """What the data module of a training config finds wrong with its files: a line for each problem.

    Raises:
        ValueError: for a config that is not there or has no data, or data that cannot check themselves.
    """
    if not Path(path).is_file():
        raise ValueError(f"no config {str(path)!r}")
    content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    if not isinstance(content, dict) or "data" not in content:
        raise ValueError(f"config {str(path)!r} has no `data`")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LightningDataModule, "data")
    try:
        data = parser.instantiate_classes(parser.parse_object({"data": content["data"]})).data
    except Exception as error:
        raise ValueError(f"config {str(path)!r}: {error}") from error
    if not callable(getattr(data, "check", None)):
        raise ValueError(f"config {str(path)!r}: {type(data).__name__} has no check(), which lists what is wrong")
    return data.check()
