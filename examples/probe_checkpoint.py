"""Probe the encoder of your own checkpoint: python examples/probe_checkpoint.py

Trains a tiny network, saves a Lightning checkpoint, loads it again and probes its encoder. Put your own module and
checkpoint in their place. `spc` is the rank correlation of the predicted and the true position map. `delta` is the SPC
minus the mean SPC of two untrained twins (copies of the encoder with new random weights): what training added. Half a
minute on one CPU core, no download.
"""

import tempfile

import pandas as pd
from lightning.pytorch import Trainer
from watch_training import DATA, Classifier

from padprobe import probe_encoder


def train(folder: str) -> str:
    """Trains for one epoch and returns the path of the checkpoint."""
    trainer = Trainer(max_epochs=1, default_root_dir=folder, logger=False, enable_checkpointing=False)
    trainer.fit(Classifier(), DATA, DATA)
    trainer.save_checkpoint(f"{folder}/last.ckpt")
    return f"{folder}/last.ckpt"


def main(images: int = 100) -> pd.DataFrame:
    with tempfile.TemporaryDirectory() as folder:
        model = Classifier.load_from_checkpoint(train(folder), map_location="cpu")
    results = probe_encoder(
        model.encoder, image_size=32, limit_train=images, limit_test=images // 2, untrained=2, labels={"run": "mine"}
    )
    rows = results.rows.query("run == 'mine' and stages == 'all' and metric in ('spc', 'delta')")
    return rows.pivot(index=["stimulus", "metric"], columns="target", values="value").round(3)


if __name__ == "__main__":
    print(main())
