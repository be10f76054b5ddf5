"""How the readout of VGG16's first stages depends on the way that their maps are resized to 28 x 28 cells.

python benchmarks/first_stage.py --weights PATH --train DIR --test DIR [--limit-train 1000] [--limit-test 200]

Trains the paper's readout (kernel 3) on f1 and on f2 alone, resized in several ways, and prints SPC of H, V and G.
Padding reaches the outermost 2 pixels of f1 (3.5% of its cells). A resize that never samples them hides them.
"""

import argparse

import torch
import torch.nn.functional as F

from padprobe import PosENet, load_encoder
from padprobe.probe.features import FeatureCache
from padprobe.probe.train import train_readouts
from padprobe.scores import score_maps
from padprobe.stimuli import load_images

RESIZE = {
    "align_corners=True (ours)": lambda maps: F.interpolate(maps, 28, mode="bilinear", align_corners=True),
    "align_corners=False": lambda maps: F.interpolate(maps, 28, mode="bilinear", align_corners=False),
    "mean over each cell": lambda maps: F.adaptive_avg_pool2d(maps, 28),
    "align_corners=True, kernel 1": lambda maps: F.interpolate(maps, 28, mode="bilinear", align_corners=True),
}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--weights", "--train", "--test"):
        parser.add_argument(name, required=True)
    parser.add_argument("--limit-train", type=int, default=1000)
    parser.add_argument("--limit-test", type=int, default=200)
    options = parser.parse_args()
    layers = load_encoder("torchvision:vgg16", options.weights).features
    train = load_images(options.train, 224, options.limit_train)
    test = load_images(options.test, 224, options.limit_test, seed=1)

    def features(images):
        """{(stage, resize): (B, C, 28, 28)} for a batch."""
        f1 = layers[:4](images)
        f2 = layers[4:9](f1)
        return {(s, way): resize(maps) for s, maps in (("f1", f1), ("f2", f2)) for way, resize in RESIZE.items()}

    def batches(images):
        for indices in torch.arange(len(images)).split(32):
            yield indices, features(torch.stack([images[i] for i in indices.tolist()]))

    caches, readouts, scores = {}, {}, {}
    with torch.inference_mode():
        for indices, aligned in batches(train):
            for key, maps in aligned.items():
                if key not in caches:
                    caches[key] = FeatureCache(len(train), maps.shape[1], 28, 100.0, None, torch.device("cpu"))
                caches[key].write(indices, maps)
    for key, cache in caches.items():
        kernel_size = 1 if "kernel 1" in key[1] else 3
        readouts[key] = PosENet(cache.values.shape[1], ["H", "V", "G"], kernel_size)
        train_readouts({key: readouts[key]}, cache, lambda _, maps: maps)
    with torch.inference_mode():
        for _, aligned in batches(test):
            for key, maps in aligned.items():
                scores.setdefault(key, []).append(score_maps(readouts[key](maps), readouts[key].maps)["spc"])
    print(f"SPC of H, V, G; {len(train)} training and {len(test)} test images")
    print("the paper (table 3)                f1: H .101, G .241; f2: H .344, G .404")
    for (stage, way), parts in scores.items():
        print(f"{stage}  {way:30}", "  ".join(f"{value:.3f}" for value in torch.cat(parts).mean(0).tolist()))
