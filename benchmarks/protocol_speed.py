"""The paper's protocol done literally, compared with padprobe's one pass, on the same images and machine.

python benchmarks/protocol_speed.py --weights PATH --train DIR --test DIR
    [--limit-train 64] [--limit-test 32] [--seeds 3]

Literal: one training per target, one encoder pass per batch and epoch, the loss at 224 x 224, one encoder pass per
target over the test images, scipy's SPC image by image. padprobe: `probe_encoder` with five targets and its controls
(image alone, permuted target), without untrained twins. Prints both times, their ratio and both score tables. The times
are for the first seed. For the scores of the other seeds the literal protocol reads stored features, which are the same
because the encoder is frozen; this shows the spread over seeds without repeating hours of passes.
"""

import argparse
import time

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from torch import nn
from torch.utils.data import DataLoader

from padprobe import find_stages, load_encoder, position_maps, probe_encoder
from padprobe.maps import TARGETS
from padprobe.stimuli import load_images

EPOCHS, BATCH = 15, 32
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Features:
    """The encoder's stages, resized to 28 x 28: (B, 1472, 28, 28)."""

    def __init__(self, encoder: nn.Module) -> None:
        self.encoder, self.stages = encoder.to(DEVICE), {}
        for stage in find_stages(encoder):
            encoder.get_submodule(stage).register_forward_hook(lambda m, args, out, s=stage: self.keep(s, out))

    def keep(self, stage: str, output: torch.Tensor) -> None:
        self.stages[stage] = F.interpolate(output, 28, mode="bilinear", align_corners=True)

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        self.encoder(images.to(DEVICE))
        return torch.cat(list(self.stages.values()), dim=1)


def literal(target: str, features, train, test, seed: int) -> list[float]:
    """SPC of each test image after one training of the paper's readout."""
    torch.manual_seed(seed)
    conv = nn.Conv2d(1472, 1, 3)
    nn.init.xavier_uniform_(conv.weight)
    nn.init.zeros_(conv.bias)
    up = nn.Upsample(224, mode="bilinear", align_corners=False)
    readout = nn.Sequential(conv, nn.BatchNorm2d(1), nn.Sigmoid(), up).to(DEVICE)
    optimizer = torch.optim.SGD(readout.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [10])
    truth = position_maps(224, [target]).to(DEVICE)
    for _ in range(EPOCHS):
        for images in DataLoader(train, BATCH, shuffle=True):
            loss = F.mse_loss(readout(features(images)), truth.expand(len(images), 1, 224, 224))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
    readout.eval()
    expected = truth.flatten().cpu().numpy()
    with torch.no_grad():
        maps = [map_.cpu().numpy() for images in DataLoader(test, BATCH) for map_ in readout(features(images))]
    return [float(np.nan_to_num(spearmanr(map_.flatten(), expected).statistic)) for map_ in maps]


def clock() -> float:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--weights", "--train", "--test"):
        parser.add_argument(name, required=True)
    parser.add_argument("--limit-train", type=int, default=64)
    parser.add_argument("--limit-test", type=int, default=32)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    encoder = load_encoder("torchvision:vgg16", options.weights)
    train = load_images(options.train, 224, options.limit_train)
    test = load_images(options.test, 224, options.limit_test, seed=1)
    seeds = range(options.seeds)
    with torch.inference_mode():
        encoder.to(DEVICE)(train[0][None].to(DEVICE))  # the first pass also sets up the convolutions

    def probe(chosen):
        arguments = {"untrained": 0, "batch_size": BATCH, "cache_gb": 16.0}
        rows = probe_encoder(encoder, train, {"test": test}, seeds=chosen, **arguments).rows
        rows = rows[(rows.stages == "all") & (rows.metric == "spc")]
        return {(row.target, row.seed): row.value for row in rows.itertuples()}

    start = clock()
    padprobe_scores = probe([0])
    fast = clock() - start
    padprobe_scores.update(probe(seeds[1:]) if len(seeds) > 1 else {})

    features = Features(encoder)
    start = clock()
    literal_scores = {(target, 0): literal(target, features, train, test, 0) for target in TARGETS}
    slow = clock() - start
    if len(seeds) > 1:
        stored = [torch.cat([features(images).cpu() for images in DataLoader(part, 1)]) for part in (train, test)]
        for seed in seeds[1:]:
            for target in TARGETS:
                literal_scores[target, seed] = literal(target, lambda batch: batch.to(DEVICE), *stored, seed)

    name = torch.cuda.get_device_name() if DEVICE.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}, torch {torch.__version__}; {len(train)} training and {len(test)} test images, {EPOCHS} epochs")
    print(f"literal protocol {slow:8.1f} s\npadprobe         {fast:8.1f} s\nratio            {slow / fast:8.1f}")
    print(f"\nmean SPC over {len(test)} images and {len(seeds)} seeds (range over seeds)")
    differences = []
    for target in TARGETS:
        a = [sum(literal_scores[target, seed]) / len(test) for seed in seeds]
        b = [padprobe_scores[target, seed] for seed in seeds]
        differences.append(abs(sum(a) - sum(b)) / len(seeds))
        text = "  ".join(f"{sum(v) / len(v):.3f} ({min(v):.3f} .. {max(v):.3f})" for v in (a, b))
        print(f"{target:3} literal, padprobe  {text}  |difference| {differences[-1]:.3f}")
    print(f"mean |difference| {sum(differences) / len(differences):.3f}")
