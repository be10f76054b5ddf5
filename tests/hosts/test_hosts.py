"""Hosts that others wrote train with the callback, bit for bit, as without it."""

import copy
import os
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, seed_everything
from torch import nn
from torch.utils.data import DataLoader

from padprobe import PositionProbeCallback
from tests.conftest import equal, trainer

pytestmark = pytest.mark.zoo
WHY = 'a host of another package; `make test-zoo` installs it (pip install "padprobe[hosts]")'


class Classifier(LightningModule):
    """Trains ``self.net``, which gives logits, on dictionaries of images and labels."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, image):
        return self.net(image)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch["image"]), batch["label"])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.training_step(batch, batch_idx), batch_size=len(batch["image"]))

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-3)


# ---------------------------------------------------------------------- the hosts


def torchgeo_segmentation():
    trainers = pytest.importorskip("torchgeo.trainers", reason=WHY)
    return trainers.SemanticSegmentationTask(model="unet", backbone="resnet18", in_channels=3, num_classes=3)


def torchgeo_classification(name: str) -> Callable[[], LightningModule]:
    def make():
        trainers = pytest.importorskip("torchgeo.trainers", reason=WHY)
        return trainers.ClassificationTask(model=name, in_channels=3, num_classes=3)

    return make


def lightly_dino():
    """As in lightly's documentation, with a validation, which the callback needs."""
    pytest.importorskip("lightly", reason=WHY)
    from lightly.loss import DINOLoss
    from lightly.models.modules import DINOProjectionHead
    from lightly.models.utils import deactivate_requires_grad, update_momentum
    from torchvision.models import resnet18

    class DINO(LightningModule):
        def __init__(self):
            super().__init__()
            backbone = nn.Sequential(*list(resnet18(weights=None).children())[:-1])
            self.student_backbone = backbone
            self.student_head = DINOProjectionHead(512, 64, 32, 128, freeze_last_layer=1)
            self.teacher_backbone = copy.deepcopy(backbone)
            self.teacher_head = DINOProjectionHead(512, 64, 32, 128)
            deactivate_requires_grad(self.teacher_backbone)
            deactivate_requires_grad(self.teacher_head)
            self.criterion = DINOLoss(output_dim=128, warmup_teacher_temp_epochs=1)

        def student(self, view):
            return self.student_head(self.student_backbone(view).flatten(start_dim=1))

        def teacher(self, view):
            return self.teacher_head(self.teacher_backbone(view).flatten(start_dim=1))

        def training_step(self, batch, batch_idx):
            update_momentum(self.student_backbone, self.teacher_backbone, m=0.99)
            update_momentum(self.student_head, self.teacher_head, m=0.99)
            image = batch["image"]
            large = [image, image.flip(-1)]
            small = [nn.functional.interpolate(view, scale_factor=0.5) for view in (*large, *large)]
            with torch.no_grad():
                targets = [self.teacher(view) for view in large]
            return self.criterion(targets, [self.student(view) for view in (*large, *small)], epoch=self.current_epoch)

        def on_after_backward(self):
            self.student_head.cancel_last_layer_gradients(current_epoch=self.current_epoch)

        def validation_step(self, batch, batch_idx):
            distance = (self.student(batch["image"]) - self.teacher(batch["image"])).abs().mean()
            self.log("val_distance", distance, batch_size=len(batch["image"]))

        def configure_optimizers(self):
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.01, momentum=0.9)

    return DINO()


def tiny_vit():
    """transformers' classifier; it gives an object with the logits."""
    transformers = pytest.importorskip("transformers", reason=WHY)
    sizes = {"hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 3, "intermediate_size": 96}
    config = transformers.ViTConfig(image_size=64, patch_size=8, num_labels=3, **sizes)
    return transformers.ViTForImageClassification(config)


class OfTransformers(Classifier):
    def training_step(self, batch, batch_idx):
        return self.net(pixel_values=batch["image"], labels=batch["label"]).loss


def lora():
    """The network is frozen, and low-rank layers are put beside its linear layers when the fit begins."""
    peft = pytest.importorskip("peft", reason=WHY)

    class LoRA(OfTransformers):
        def configure_model(self):
            if not isinstance(self.net, peft.PeftModel):
                linear = {name.split(".")[-1] for name, m in self.net.vit.named_modules() if isinstance(m, nn.Linear)}
                config = peft.LoraConfig(r=2, target_modules=sorted(linear), modules_to_save=["classifier"])
                self.net = peft.get_peft_model(self.net, config)

    return LoRA(tiny_vit())


def smp_unet():
    smp = pytest.importorskip("segmentation_models_pytorch", reason=WHY)

    class Segmenter(Classifier):
        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self(batch["image"]), batch["mask"])

    return Segmenter(smp.Unet("resnet18", encoder_weights=None, classes=3))


class SmallNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            *(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(8, 16, 3, padding=1), nn.ReLU()),
        )
        self.head = nn.Linear(16, 3)

    def forward(self, image):
        return self.head(self.encoder(image).mean((2, 3)))


def compiled_parent(backend: str) -> Callable[[], LightningModule]:
    return lambda: Classifier(torch.compile(SmallNet(), backend=backend))


@dataclass
class Setting:
    make: Callable[[], LightningModule]
    size: tuple[int, int] = (64, 96)
    guests: Sequence[dict[str, Any]] = field(default_factory=lambda: [{"encoder": "model"}])
    epochs: int = 2


HOSTS = {
    "torchgeo: segmentation": Setting(torchgeo_segmentation, guests=[{}]),
    "torchgeo: classification, resnet18": Setting(torchgeo_classification("resnet18")),
    "torchgeo: classification, ViT": Setting(torchgeo_classification("vit_tiny_patch16_224"), (224, 224), epochs=1),
    "torchgeo: classification, Swin": Setting(
        torchgeo_classification("swin_tiny_patch4_window7_224"), (224, 224), epochs=1
    ),
    "lightly: DINO": Setting(
        lightly_dino,
        guests=[
            {"name": "student", "encoder": "student_backbone"},
            {"name": "teacher", "encoder": "teacher_backbone"},
        ],
        epochs=1,
    ),
    "transformers: ViTForImageClassification": Setting(
        lambda: OfTransformers(tiny_vit()), (64, 64), [{"encoder": "net.vit"}]
    ),
    "peft: LoRA": Setting(lora, (64, 64), [{"encoder": "net.base_model.model.vit"}]),
    "smp: Unet": Setting(smp_unet, guests=[{}]),
    "compiled parent": Setting(compiled_parent("eager"), guests=[{"encoder": "net._orig_mod.encoder"}]),
    "compiled parent, aot": Setting(compiled_parent("aot_eager"), guests=[{}]),
}


# ---------------------------------------------------------------------- with and without the callback


def batches(size: tuple[int, int]) -> DataLoader:
    generator = torch.Generator().manual_seed(0)
    samples = [
        {
            "image": torch.rand(3, *size, generator=generator),
            "label": torch.randint(3, (), generator=generator),
            "mask": torch.randint(3, size, generator=generator),
        }
        for _ in range(8)
    ]
    return DataLoader(samples, 4, shuffle=True)


def fit(folder: Path, setting: Setting, guests: Sequence[PositionProbeCallback]) -> tuple[dict, dict, dict]:
    """What a fit leaves behind: the checkpoint, the random streams, and what was logged."""
    seed_everything(3, verbose=False)
    host, loader = setting.make(), batches(setting.size)
    run = trainer(folder, *guests, max_epochs=setting.epochs, enable_checkpointing=False)
    run.fit(host, loader, loader)
    run.save_checkpoint(folder / "end.ckpt")
    streams = {"python": random.getstate(), "numpy": np.random.get_state()[1].tolist()}  # noqa: NPY002
    logged = {key: value.item() for key, value in run.callback_metrics.items()}
    return (
        torch.load(folder / "end.ckpt", weights_only=False),
        streams | {"torch": torch.get_rng_state()},
        logged,
    )


def check_unchanged(ours: dict, theirs: dict, guests: int) -> None:
    """The checkpoints are equal, but for the callback's own state."""
    assert len([ours["callbacks"].pop(key) for key in list(ours["callbacks"]) if "Probe" in key]) == guests
    assert ours.keys() == theirs.keys()
    assert list(ours["state_dict"]) == list(theirs["state_dict"])
    for part in ours:
        assert equal(ours[part], theirs[part]), part


@pytest.mark.parametrize("name", HOSTS)
def test_a_host_of_another_package_is_bit_for_bit_what_it_is_without_the_callback(name, tmp_path):
    setting = HOSTS[name]
    shown = setting.size[0] if setting.size[0] == setting.size[1] else setting.size
    guests = [PositionProbeCallback(image_size=shown, grid=8, **options) for options in setting.guests]
    ours, our_streams, our_log = fit(tmp_path / "with", setting, guests)
    theirs, their_streams, their_log = fit(tmp_path / "without", setting, [])

    check_unchanged(ours, theirs, len(guests))
    assert equal(our_streams, their_streams)
    assert {key: value for key, value in our_log.items() if "position/" not in key} == their_log
    for options in setting.guests:
        key = "/".join(filter(None, (options.get("name"), "position")))
        for target in ("H", "V", "G"):
            assert -1 <= our_log[f"{key}/{target}/spc"] <= 1
        assert f"{key}/trouble" not in our_log


FSDP = '''
import sys
from pathlib import Path

import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard

from padprobe import PositionProbeCallback
from tests.hosts.test_hosts import Classifier, SmallNet, batches


class Sharded(Classifier):
    """Each process holds a part of every weight."""

    def configure_model(self):
        mesh = self.device_mesh["data_parallel"]
        for part in (self.net.encoder[0], self.net.encoder[4], self.net.encoder, self.net.head):
            fully_shard(part, mesh=mesh)


if __name__ == "__main__":
    seed_everything(3, verbose=False)
    path, guests = sys.argv[1], [PositionProbeCallback(image_size=(64, 96), grid=8)] if sys.argv[2] == "with" else []
    strategy = ModelParallelStrategy(2, 1, save_distributed_checkpoint=False, process_group_backend="gloo")
    run = Trainer(
        accelerator="cpu", devices=2, strategy=strategy, max_epochs=2, logger=False, callbacks=guests,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )
    loader = batches((64, 96))
    run.fit(Sharded(SmallNet()), loader, loader)
    run.save_checkpoint(path + ".ckpt")
    if run.is_global_zero:
        logged = {key: value.item() for key, value in run.callback_metrics.items()}
        torch.save({"torch": torch.get_rng_state(), "logged": logged}, path + ".pt")
'''


def test_a_host_whose_weights_are_sharded_over_two_processes_is_unchanged(tmp_path):
    """FSDP2: fully_shard, with gloo on the CPU."""
    (tmp_path / "host.py").write_text(FSDP)
    for guest in ("with", "without"):
        command = [sys.executable, str(tmp_path / "host.py"), str(tmp_path / guest), guest]
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)
        assert done.returncode == 0, done.stderr
    ours, theirs = (torch.load(tmp_path / f"{guest}.ckpt", weights_only=False) for guest in ("with", "without"))
    check_unchanged(ours, theirs, 1)
    ours, theirs = (torch.load(tmp_path / f"{guest}.pt", weights_only=False) for guest in ("with", "without"))
    assert equal(ours["torch"], theirs["torch"])
    assert -1 <= ours["logged"]["position/H/spc"] <= 1
    assert {key: value for key, value in ours["logged"].items() if "position/" not in key} == theirs["logged"]
