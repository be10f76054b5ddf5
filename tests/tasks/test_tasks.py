import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from padprobe import PositionProbeCallback, load_encoder
from padprobe.cli import main
from padprobe.network.padding import list_padding
from tasks.classification import ClassificationTask
from tasks.data.labels import LabelFolders
from tasks.data.saliency import SaliencyData, SaliencyFolder
from tasks.data.scenes import ScenesDataModule
from tasks.saliency import SaliencyTask
from tasks.segmentation import SegmentationTask
from tests.conftest import trainer

TASKS = {
    SaliencyTask: (
        {},
        {"max_fmeasure", "mae", "smeasure", "max_emeasure", "position_only_max_fmeasure", "position_only_mae"},
    ),
    SegmentationTask: (
        {"classes": ["a", "b", "c", "d", "e"]},
        {"miou", "iou_a", "iou_b", "iou_c", "iou_d", "iou_e", "position_only_miou"},
    ),
    ClassificationTask: ({"classes": 3}, {"top1"}),
}


@pytest.mark.parametrize("padding", ["zeros", "valid"])
@pytest.mark.parametrize("task", TASKS)
def test_a_task_trains_with_the_probe_attached_and_scores(tmp_path, vgg_options, task, padding):
    options, metrics = TASKS[task]
    module = task(
        **options, encoder="smp:vgg11", encoder_options=vgg_options, encoder_padding=padding, image_size=32, lr=0.01
    )
    before = {k: v.clone() for k, v in module.net.state_dict().items()}
    data = ScenesDataModule(train=16, val=8, test=8, image_size=32, batch_size=8)
    fitter = trainer(tmp_path, PositionProbeCallback(image_size=32, grid=8), max_epochs=1)
    fitter.fit(module, datamodule=data)
    scores = fitter.test(module, datamodule=data, verbose=False)[0]
    scored = {name.removeprefix("test/"): value for name, value in scores.items() if name.startswith("test/")}
    assert scored.keys() == metrics | {"loss"}
    assert all(0 <= scored[name] <= 1 for name in metrics)
    assert "position/H/spc" in fitter.callback_metrics
    changed = [k for k, v in module.net.state_dict().items() if not torch.equal(v, before[k])]
    assert any("encoder" in k for k in changed)


@pytest.mark.parametrize("task", TASKS)
def test_only_the_encoder_pads_and_only_if_asked(vgg_options, task):
    options = TASKS[task][0] | {"encoder": "smp:vgg11", "encoder_options": vgg_options, "image_size": 32}
    assert list_padding(task(**options, encoder_padding="valid")) == []
    padded = list_padding(task(**options, encoder_padding="zeros"))
    assert padded
    assert all("encoder" in row.layer for row in padded)


def test_bad_networks_are_refused_before_training(vgg_options):
    with pytest.raises(ValueError, match=r"20 x 20 image is too small .*: the smallest that works is"):
        SaliencyTask(encoder="smp:vgg11", encoder_options=vgg_options, encoder_padding="valid", image_size=20)
    with pytest.raises(ValueError, match="need an encoder of smp"):
        SaliencyTask(encoder="torchvision:vgg11")
    with pytest.raises(ValueError, match="class_weights has 1 numbers; expected one for each of 2 classes"):
        SegmentationTask(2, class_weights=[1.0], encoder="smp:vgg11", encoder_options=vgg_options)


def test_the_learning_rate_falls_along_a_cosine_to_zero(tmp_path, vgg_options):
    module = SaliencyTask(encoder="smp:vgg11", encoder_options=vgg_options, lr=0.01, image_size=32)
    rates = []
    module.on_train_batch_start = lambda *_: rates.append(module.optimizers().param_groups[0]["lr"])
    fitter = trainer(tmp_path, max_epochs=2)
    fitter.fit(module, datamodule=ScenesDataModule(train=16, val=2, test=2, image_size=32, batch_size=4))
    last = module.optimizers().param_groups[0]["lr"]
    assert rates[0] == 0.01
    assert rates == sorted(rates, reverse=True)
    assert last == pytest.approx(0, abs=1e-9)
    assert rates[4] == pytest.approx(0.005)


def test_the_baseline_is_what_position_alone_knows(tmp_path, vgg_options, pictures):
    left, right = np.zeros((16, 16), np.uint8), np.ones((16, 16), np.uint8)
    half = np.concatenate([left[:, :8], right[:, :8]], 1)
    for split, labels in {"train": [half, half, left], "val": [half], "test": [half, left]}.items():
        for i, answer in enumerate(labels):
            pictures(f"images/{split}/{i}.png", np.zeros((16, 16, 3), np.uint8))
            pictures(f"masks/{split}/{i}.png", answer)
    data = LabelFolders(str(pictures.folder), ["a", "b"], image_size=32, batch_size=2)
    module = SegmentationTask(["a", "b"], encoder="smp:vgg11", encoder_options=vgg_options, image_size=32)
    scores = trainer(tmp_path).test(module, datamodule=data, verbose=False)[0]
    # it predicts `half` for both test images: the IoU is 2 of 3 quarters for class a, and 1 of 2 for class b
    assert scores["test/position_only_miou"] == pytest.approx((2 / 3 + 1 / 2) / 2)
    for name in ("train/images/0", "train/images/1", "test/images/0"):
        pictures(f"{name}.png", np.zeros((16, 16, 3), np.uint8))
        pictures(f"{name.replace('images', 'masks')}.png", 255 * half)
    folders = [SaliencyFolder(str(pictures.folder / split)) for split in ("train", "test")]
    module = SaliencyTask(encoder="smp:vgg11", encoder_options=vgg_options, image_size=16)
    scores = trainer(tmp_path).test(
        module, datamodule=SaliencyData(*folders, image_size=16, holdout=0.5), verbose=False
    )[0]
    assert scores["test/position_only_max_fmeasure"] == pytest.approx(1)
    assert scores["test/position_only_mae"] == pytest.approx(0, abs=1e-5)


def test_a_longer_run_resumes_on_its_own_schedule(tmp_path, vgg_options):
    def fit(epochs: int, checkpoint=None) -> None:
        torch.manual_seed(0)
        module = SaliencyTask(encoder="smp:vgg11", encoder_options=vgg_options, image_size=32, lr=0.01)
        module.on_train_batch_start = lambda *_: rates.append(module.optimizers().param_groups[0]["lr"])
        fitter = trainer(tmp_path, max_epochs=epochs)
        fitter.fit(module, ScenesDataModule(train=8, val=2, test=2, image_size=32, batch_size=4), ckpt_path=checkpoint)
        fitter.save_checkpoint(tmp_path / "x.ckpt")

    rates: list[float] = []
    fit(2)
    rates.clear()
    fit(4, tmp_path / "x.ckpt")
    # the first step's rate is the checkpoint's
    assert rates[1:] == pytest.approx([0.005 * (1 + math.cos(math.pi * step / 8)) for step in range(5, 8)])


def checkpoint_of_an_earlier_version(folder: Path, vgg_options, **recipe) -> tuple[Path, SaliencyTask]:
    """A checkpoint whose hyper-parameters have the options that tasks once had."""
    module = SaliencyTask(encoder="smp:vgg11", encoder_options=vgg_options, image_size=32, encoder_padding="circular")
    fitter = trainer(folder, max_epochs=1)
    fitter.fit(module, ScenesDataModule(train=8, val=2, test=2, image_size=32, batch_size=4))
    path = folder / "earlier.ckpt"
    fitter.save_checkpoint(path)
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["hyper_parameters"] |= {"_class_path": "tasks.saliency.SaliencyTask", **recipe}
    torch.save(checkpoint, path)
    return path, module


CONFIG = """
model:
  class_path: tasks.saliency.SaliencyTask
  init_args: {{encoder: smp:vgg11, encoder_options: {options}, encoder_padding: circular, image_size: 32}}
data:
  class_path: tasks.data.scenes.ScenesDataModule
  init_args: {{train: 8, val: 2, test: 2, image_size: 32, batch_size: 4}}
trainer: {{accelerator: cpu, logger: false, max_epochs: 2, enable_progress_bar: false, default_root_dir: {folder}}}
"""


def test_checkpoints_of_an_earlier_version_load_and_resume_on_the_same_recipe_alone(tmp_path, vgg_options):
    config = tmp_path / "fit.yaml"
    config.write_text(CONFIG.format(options=json.dumps(vgg_options), folder=tmp_path))
    sgd, module = checkpoint_of_an_earlier_version(tmp_path, vgg_options, optimizer="sgd", schedule="poly")
    encoder = load_encoder(sgd)
    assert {row.mode for row in list_padding(encoder) if "2d" not in row.mode} == {"circular"}
    trained = module.net.encoder.state_dict()
    assert all(torch.equal(value, trained[name]) for name, value in encoder.state_dict().items())
    command = ["--config", str(config), "--ckpt_path", str(sgd)]
    assert main(["test", *command]) == 0
    with pytest.raises(ValueError, match=r"trained with .*'sgd'.*--optimizer CLASS --lr_scheduler CLASS"):
        main(["fit", *command])
    checkpoint_of_an_earlier_version(tmp_path, vgg_options, optimizer="adamw", schedule="cosine")
    assert main(["fit", *command]) == 0


def test_the_command_line_replaces_optimizer_and_schedule(tmp_path, vgg_options, monkeypatch):
    config = tmp_path / "fit.yaml"
    config.write_text(CONFIG.format(options=json.dumps(vgg_options), folder=tmp_path))
    fitted = []
    monkeypatch.setattr(SaliencyTask, "on_train_end", lambda self: fitted.append(self.trainer))
    sgd = ["--optimizer", "torch.optim.SGD", "--optimizer.lr", "0.02"]
    poly = ["--lr_scheduler", "torch.optim.lr_scheduler.PolynomialLR", "--lr_scheduler.total_iters", "4"]
    assert main(["fit", "--config", str(config)]) == 0
    assert main(["fit", "--config", str(config), *sgd]) == 0
    assert main(["fit", "--config", str(config), *sgd, *poly]) == 0
    assert [type(fitter.optimizers[0]) for fitter in fitted] == [torch.optim.AdamW, torch.optim.SGD, torch.optim.SGD]
    assert fitted[1].optimizers[0].param_groups[0]["lr"] == 0.02
    assert fitted[1].lr_scheduler_configs == []
    assert type(fitted[2].lr_scheduler_configs[0].scheduler) is torch.optim.lr_scheduler.PolynomialLR
    with pytest.raises(ValueError, match="--lr_scheduler without --optimizer"):
        main(["fit", "--config", str(config), *poly])


def test_ignored_pixels_teach_nothing(vgg_options):
    task = SegmentationTask(3, 0, [1.0, 2.0, 3.0], encoder="smp:vgg11", encoder_options=vgg_options, image_size=32)
    logits, labels = torch.randn(2, 3, 8, 8), torch.randint(3, (2, 8, 8))
    expected = torch.nn.functional.cross_entropy(logits, labels, torch.tensor([1.0, 2.0, 3.0]), ignore_index=0)
    assert torch.allclose(task.loss(logits, labels), expected)
    assert task.loss(logits, torch.zeros_like(labels)) == 0
    mostly_ignored = torch.tensor([[[0]], [[0]], [[2]]])
    assert task.position_logits([mostly_ignored]).argmax(0).item() == 2


@pytest.mark.slow
def test_two_processes_score_every_image_once(tmp_path, vgg_options):
    """An odd number of images: a DistributedSampler gives one of them to both."""
    scores = {}
    for devices in (1, 2):
        script = tmp_path / f"{devices}.py"
        script.write_text(
            DISTRIBUTED.format(options=vgg_options, devices=devices, out=str(tmp_path / f"{devices}.json"))
        )
        root = Path(__file__).parents[2]
        environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, str(script)], check=True, env=environment, timeout=240)
        scores[devices] = json.loads((tmp_path / f"{devices}.json").read_text())
    assert {"test/miou", "test/max_fmeasure", "test/mae", "test/smeasure", "val/miou"} <= scores[1].keys()
    for name in scores[1]:
        if not name.endswith("loss"):
            assert scores[2][name] == pytest.approx(scores[1][name], abs=1e-5), name


DISTRIBUTED = """
import json
from lightning.pytorch import Trainer, seed_everything
from tasks.data.scenes import ScenesDataModule
from tasks.saliency import SaliencyTask
from tasks.segmentation import SegmentationTask

if __name__ == "__main__":
    seed_everything(0, verbose=False)
    options = dict(encoder="smp:vgg11", encoder_options={options}, image_size=32)
    scores = {{}}
    for module in (SaliencyTask(**options), SegmentationTask(5, **options)):
        data = ScenesDataModule(train=8, val=5, test=7, image_size=32, batch_size=2)
        quiet = dict.fromkeys(("enable_progress_bar", "enable_model_summary", "enable_checkpointing", "logger"), False)
        strategy = "ddp" if {devices} > 1 else "auto"
        trainer = Trainer(accelerator="cpu", devices={devices}, strategy=strategy, **quiet)
        scores |= trainer.validate(module, datamodule=data, verbose=False)[0]
        scores |= trainer.test(module, datamodule=data, verbose=False)[0]
    if trainer.is_global_zero:
        json.dump(scores, open({out!r}, "w"))
"""
