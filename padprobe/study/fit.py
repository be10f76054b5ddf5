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
    """LightningCLI with ``--run NAME``, which names the folder of checkpoints."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--run",
            type=str | None,
            default=None,
            help="Name of the run: its checkpoints go to checkpoints/NAME, and --ckpt_path last resumes from there.",
        )

    def before_instantiate_classes(self) -> None:
        if self._get(self.config, "lr_scheduler") and not self._get(self.config, "optimizer"):
            raise ValueError(
                "--lr_scheduler without --optimizer, which LightningCLI would ignore: give both, for example "
                "--optimizer torch.optim.AdamW"
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
        """Raises ValueError unless the options resume the run whose checkpoints are in ``folder``."""
        resumed, last = self._get(self.config, "ckpt_path"), folder / "last.ckpt"
        otherwise = "or name this run differently with --run"
        if not resumed:
            raise ValueError(
                f"{str(folder)!r} has checkpoints of an earlier run: resume it with --ckpt_path last, {otherwise}"
            )
        if resumed == "last" and last.is_file():
            earlier = torch.load(last, map_location="cpu", weights_only=True).get("hyper_parameters", {})
            now = self.model.hparams
            for key in now.keys() & earlier.keys():
                if now[key] != earlier[key]:
                    raise ValueError(
                        f"{str(last)!r} is of a run with {key} {earlier[key]!r}, and now it is {now[key]!r}: resume it "
                        f"with the same options, {otherwise}"
                    )


def lightning_cli(args: Sequence[str], run: bool = True, callbacks: Sequence[Callback] = ()) -> LightningCLI:
    """LightningCLI in subclass mode: model, data and callbacks by ``class_path``, as YAML or options.

    Args:
        args: options, as on the command line; with ``run``, after a subcommand (fit, validate, test, predict).
        run: whether to run the subcommand, or only to build trainer, model and data. In the second case a bad option
            raises ``jsonargparse.ArgumentError`` instead of ending the program.
        callbacks: added to the callbacks of the config.
    """
    return _CLI(
        subclass_mode_model=True,
        subclass_mode_data=True,
        seed_everything_default=0,
        trainer_defaults={"callbacks": list(callbacks)} if callbacks else {},
        save_config_kwargs={"overwrite": True},
        parser_kwargs={} if run else {"exit_on_error": False},
        args=list(args),
        run=run,
    )


def check_data(path: str | Path) -> list[str]:
    """What is wrong with the files of a training config's data module: one line per problem.

    Raises:
        ValueError: for a config that does not exist or has no data, or a data module without ``check``.
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
        raise ValueError(f"config {str(path)!r}: {type(data).__name__} has no check() that lists problems")
    return data.check()
