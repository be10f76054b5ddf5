"""How much the rows of the image alone (the paper's PosENet) depend on the initial weights of the readout.

python benchmarks/rgb_seeds.py --train DIR --test DIR [--limit-train 1000] [--limit-test 200] [--seeds 8]

Trains the readout (kernel 3; padded by 0, 1 and 2) on the image alone from several random initializations, on the same
images in the same order, and prints the lowest, the median and the highest SPC of H, V and G.
"""

import argparse

import torch
import torch.nn.functional as F

from padprobe import PosENet
from padprobe.probe.features import FeatureCache
from padprobe.probe.train import train_readouts
from padprobe.scores import score_maps
from padprobe.stimuli import load_images

PADDINGS, TARGETS = (0, 1, 2), ("H", "V", "G")

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--train", "--test"):
        parser.add_argument(name, required=True)
    for name, value in (("--limit-train", 1000), ("--limit-test", 200), ("--seeds", 8)):
        parser.add_argument(name, type=int, default=value)
    options = parser.parse_args()

    def small(folder: str, limit: int, seed: int) -> torch.Tensor:
        images = load_images(folder, 224, limit, seed=seed)
        resize = {"size": 28, "mode": "bilinear", "align_corners": True}
        return torch.cat([F.interpolate(images[i][None], **resize) for i in range(len(images))])

    train, test = small(options.train, options.limit_train, 0), small(options.test, options.limit_test, 1)
    cache = FeatureCache(len(train), 3, 28, 1.0, None, torch.device("cpu"))
    cache.write(torch.arange(len(train)), train)
    keys = [(padding, seed) for padding in PADDINGS for seed in range(options.seeds)]
    readouts = {key: PosENet(3, TARGETS, padding=key[0], seed=key[1]) for key in keys}
    train_readouts(readouts, cache, lambda _, images: images)
    print(f"SPC, lowest / median / highest of {options.seeds} seeds; {len(train)} training and {len(test)} test images")
    print("the paper (tables 1 and 4): padded by 0 H .012, V .131, G -.001; by 1 H .274, G .205; by 2 H .397, G .380")
    with torch.inference_mode():
        for padding in PADDINGS:
            trained = [readouts[padding, seed] for seed in range(options.seeds)]
            spc = torch.stack([score_maps(readout(test), readout.maps)["spc"].mean(0) for readout in trained]).T
            for target, values in zip(TARGETS, spc.tolist(), strict=True):
                low, *_, high = sorted(values)
                middle = torch.tensor(values).quantile(0.5)
                print(f"padded by {padding}  {target}  {low:.3f} / {middle:.3f} / {high:.3f}   ", end="")
                print(" ".join(f"{value:.3f}" for value in values))
