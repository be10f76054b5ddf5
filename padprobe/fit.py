"""`padprobe fit | validate | test | predict`: LightningCLI on any LightningModule and LightningDataModule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Callback
from lightning.pytorch.cli import LightningCLI


def lightning_cli(args: Sequence[str], run: bool = True, callbacks: Sequence[Callback] = ()) -> LightningCLI:
    """LightningCLI in subclass mode: model, data and callbacks by ``class_path``, as YAML or options.

    Args:
        args: options, as on the command line; with ``run``, a subcommand (fit, validate, test, predict) before them.
        run: whether to run the subcommand, or only to build trainer, model and data; a bad option then raises
            ``jsonargparse.ArgumentError`` where it would else end the program.
        callbacks: added to those of the config.
    """
    defaults: dict[str, Any] = {"callbacks": list(callbacks)} if callbacks else {}
    return LightningCLI(
        subclass_mode_model=True,
        subclass_mode_data=True,
        seed_everything_default=0,
        trainer_defaults=defaults,
        save_config_kwargs={"overwrite": True},
        parser_kwargs={} if run else {"exit_on_error": False},
        args=list(args),
        run=run,
    )
