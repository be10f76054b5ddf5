"""Watch how much position a network encodes while it trains: python examples/watch_training.py

Trains a tiny classifier on random images. Prints each map's SPC, and change: what training changed (docs/method.md).
"""

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from padprobe import PositionProbeCallback

DATA = DataLoader(TensorDataset(torch.rand(80, 3, 32, 32), torch.randint(2, (80,))), batch_size=8)


class Classifier(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        layers = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 16, 3, padding=1)]
        self.encoder, self.head = nn.Sequential(*layers), nn.Linear(16, 2)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.head(self.encoder(batch[0]).mean((2, 3))), batch[1])

    validation_step = training_step  # the probe scores the validation images

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters())


def main(epochs: int = 5) -> dict[str, float]:
    probe = PositionProbeCallback(encoder="encoder")
    trainer = Trainer(max_epochs=epochs, callbacks=[probe], logger=False, enable_checkpointing=False)
    trainer.fit(Classifier(), DATA, DATA)
    return {k: v.item() for k, v in trainer.callback_metrics.items() if k.endswith(("/spc", "/change"))}


if __name__ == "__main__":
    print(main())
