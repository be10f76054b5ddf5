"""Read position out of an untrained ResNet-18: python examples/probe_resnet18.py

Probes torchvision's ResNet-18 on generated images ("dead leaves": no download), once with zero padding and once with
circular padding, under which the image has no border. Prints SPC, the rank correlation of the predicted and the true
position map: 1 is perfect, 0 is none. About 20 seconds on one CPU core.
"""

import pandas as pd

from padprobe import load_encoder, probe_encoder


def main(image_size: int = 96, images: int = 40, epochs: int = 10) -> pd.DataFrame:
    tables = {}
    for padding in ("zeros", "circular"):
        results = probe_encoder(
            load_encoder("torchvision:resnet18", padding=padding),
            train="dead_leaves",
            test={"dead leaves": "dead_leaves", "white": "white"},
            targets=["H", "V", "G"],  # left to right, top to bottom, towards the centre
            image_size=image_size,
            epochs=epochs,
            limit_train=images,
            limit_test=images // 2,
            selectivity=False,
            settle=True,  # BatchNorm statistics from the images, because the network is untrained
            untrained=0,  # no untrained twins to compare with: it is one
        )
        rows = results.rows.query("metric == 'spc' and stages == 'all'")
        tables[padding] = rows.pivot(index="stimulus", columns="target", values="value")[["H", "V", "G"]]
    return pd.concat(tables, names=["padding"]).round(3)


if __name__ == "__main__":
    print(main())
