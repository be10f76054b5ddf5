from pathlib import Path

import pytest
import yaml
from lightning.pytorch import Callback

from padprobe.study.plan import read_study
from padprobe.study.runner import run_study

SCENES = "tasks.data.scenes"
OPTIONS = {"config": [8, "M", 16, "M", 16], "out_channels": [8, 16, 16], "depth": 2, "batch_norm": True}


@pytest.fixture
def study(tmp_path):
    """A study of an untrained and a trained encoder that takes a few seconds."""
    fit = {
        "model": {
            "class_path": "tasks.saliency.SaliencyTask",
            "init_args": {"encoder": "smp:vgg11", "encoder_options": OPTIONS, "image_size": 32},
        },
        "data": {
            "class_path": f"{SCENES}.ScenesDataModule",
            "init_args": {"train": 16, "val": 8, "test": 8, "image_size": 32, "batch_size": 8},
        },
        "trainer": {
            "accelerator": "cpu",
            "max_epochs": 2,
            "callbacks": [{"class_path": "padprobe.PositionProbeCallback", "init_args": {"image_size": 32, "grid": 8}}],
        },
    }
    (tmp_path / "fit.yaml").write_text(yaml.safe_dump(fit))
    content = {
        "image_size": 32,
        "targets": ["H", "G"],
        "train": {"class_path": f"{SCENES}.Scenes", "init_args": {"n": 24, "image_size": 32}},
        "test": {
            "scenes": {"class_path": f"{SCENES}.Scenes", "init_args": {"n": 8, "image_size": 32}},
            "black": "black",
        },
        "encoders": {
            "untrained-valid": {"encoder": "smp:vgg11", "options": OPTIONS, "padding": "valid"},
            "sod-valid": {
                "encoder": "smp:vgg11",
                "task": "SOD",
                "scores": {"scenes": {}},
                "fit": str(tmp_path / "fit.yaml"),
                "overrides": {"model.init_args.encoder_padding": "valid"},
            },
        },
    }
    return write(tmp_path / "study.yaml", content)


def write(path, content):
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def edit(path, change):
    content = yaml.safe_load(path.read_text())
    change(content)
    return write(path, content)


def run(path, out, **options):
    messages = []
    results, failed = run_study(read_study(path, **options), out, lambda *args: None, messages.append)
    return results, failed, messages


class Breaks(Callback):
    """Writes down every epoch that begins, and breaks in the third, once."""

    def __init__(self, log: str, whole: bool = False) -> None:
        self.file, self.whole = Path(log), whole

    def on_train_epoch_start(self, trainer, pl_module):
        begun = self.file.read_text() if self.file.is_file() else ""
        self.file.write_text(f"{begun}{trainer.current_epoch}\n")
        if trainer.current_epoch == 2 and not self.whole and "2" not in begun:
            raise RuntimeError("the machine went away")
