import os
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

SMALL_VGG = {"config": [8, "M", 16, 16, "M", 32], "out_channels": [8, 16, 32], "depth": 2, "batch_norm": True}


@pytest.fixture
def data() -> Path:
    """The development data: real weights and images that are not part of the project."""
    folder = os.environ.get("PADPROBE_DATA")
    if not folder:
        pytest.skip("PADPROBE_DATA is not set: it names the folder with the VGG16 weights, DUTS-TR and PASCAL-S")
    return Path(folder)


class Host(LightningModule):
    """A small classifier, trained on random images: what the callback is a guest of."""

    def __init__(self, padding: int = 1) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            *(nn.Conv2d(3, 8, 3, padding=padding), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(2)),
            *(nn.Conv2d(8, 16, 3, padding=padding), nn.ReLU(inplace=True)),
        )
        self.dropout = nn.Dropout(0.2)
        self.head = nn.Linear(16, 2)

    def forward(self, image):
        return self.head(self.dropout(self.encoder(image).mean((2, 3))))

    def training_step(self, batch, batch_idx):
        image, label = batch
        loss = nn.functional.cross_entropy(self(image), label)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        image, label = batch
        self.log("val_loss", nn.functional.cross_entropy(self(image), label))

    test_step = validation_step

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01)


@pytest.fixture
def host() -> Host:
    torch.manual_seed(0)
    return Host()


@pytest.fixture
def batches() -> DataLoader:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(48, 3, 32, 32, generator=generator)
    labels = torch.randint(2, (48,), generator=generator)
    return DataLoader(TensorDataset(images, labels), batch_size=8)


@pytest.fixture
def vgg_options() -> dict:
    """A VGG with three stages and few channels, as options of load_encoder("smp:vgg11", ...)."""
    return dict(SMALL_VGG)


def trainer(folder: Path, *callbacks: Callback, **options: Any) -> Trainer:
    """A quiet Trainer on the CPU, for two epochs unless told otherwise."""
    options = {"max_epochs": 2, "logger": False, "enable_progress_bar": False, "enable_model_summary": False} | options
    return Trainer(accelerator="cpu", default_root_dir=folder, callbacks=list(callbacks), **options)


class Frozen(Host):
    """Learns nothing."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.0)


def equal(a: Any, b: Any) -> bool:
    """Whether two values are equal bit for bit, tensors in dictionaries and lists too."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    return a == b
