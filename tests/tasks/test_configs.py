"""The configs that the README names, as they stand."""

from pathlib import Path

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint

from padprobe.study.fit import lightning_cli

ROOT = Path(__file__).parents[2]
CONFIGS = sorted(path.relative_to(ROOT).as_posix() for room in ("sod", "ss") for path in ROOT.glob(f"configs/{room}/*"))
CONTEXT = ["--model.init_args.encoder_padding=valid", "--model.init_args.alignment=context"]


@pytest.mark.parametrize("config", CONFIGS)
def test_a_config_builds_with_and_without_padding(config, monkeypatch):
    monkeypatch.chdir(ROOT)
    for options in ([], CONTEXT) if "small" in config else ([],):  # VGG16's context takes long to find
        cli = lightning_cli(["--config", config, *options], run=False)
        assert cli.model.net.image_size == cli.datamodule.image_size
        if options:
            assert cli.model.net.seen == cli.datamodule.image_size + 2 * cli.datamodule.context
        (checkpoint,) = [c for c in cli.trainer.callbacks if isinstance(c, ModelCheckpoint)]
        assert checkpoint.dirpath == f"checkpoints/{cli.config.run}"


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], CONTEXT])
@pytest.mark.parametrize("config", [config for config in CONFIGS if "small" in config])
def test_a_small_config_trains_on_real_data(config, options, data, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    limits = ["--data.init_args.limit=32", "--data.init_args.check_files=false", "--trainer.max_steps=2"]
    options = [*options, "--trainer.logger=false", "--trainer.enable_progress_bar=false"]
    options.append(f"--trainer.default_root_dir={tmp_path}")  # where Lightning leaves the config
    options += ["--trainer.check_val_every_n_epoch=1"]
    cli = lightning_cli(["--config", config, *limits, *options], run=False)
    (checkpoint,) = [c for c in cli.trainer.callbacks if isinstance(c, ModelCheckpoint)]
    checkpoint.dirpath = str(tmp_path)
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    assert checkpoint.monitor in cli.trainer.callback_metrics
    assert (tmp_path / "best.ckpt").is_file()
    scores = cli.trainer.test(cli.model, datamodule=cli.datamodule, verbose=False)[0]
    main = checkpoint.monitor.removeprefix("val/")
    assert 0 < scores[f"test/position_only_{main}"] < 1
    assert f"test/{main}" in scores
