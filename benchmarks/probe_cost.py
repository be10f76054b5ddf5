"""What a probe costs, compared with a bare pass of the encoder over the same images.

python benchmarks/probe_cost.py --weights PATH --train DIR --test DIR [--limit-train 1200] [--limit-test 200] --out DIR

Times a plain loop `encoder(batch)` over a sample of the images (--bare, extrapolated to all of them), then
`padprobe probe` with five targets and the paper's readout, in the same process, and prints both and their ratio.
"""

import argparse
import resource
import time

import torch

from padprobe import load_encoder
from padprobe.cli import main
from padprobe.stimuli import load_images


def bare_pass(encoder: torch.nn.Module, folder: str, n: int) -> float:
    """Seconds per image for reading, decoding and encoding, in batches of 32."""
    images = load_images(folder, 224, n)
    loader = torch.utils.data.DataLoader(images, 32)
    with torch.inference_mode():
        encoder(images[0][None])  # the first pass also sets up the convolutions
        start = time.perf_counter()
        for batch in loader:
            encoder(batch)
    return (time.perf_counter() - start) / n


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--weights", "--train", "--test", "--out"):
        parser.add_argument(name, required=True)
    parser.add_argument("--limit-train", type=int, default=1200)
    parser.add_argument("--limit-test", type=int, default=200)
    parser.add_argument("--bare", type=int, default=192, help="images for the bare pass")
    options = parser.parse_args()

    name = "torchvision:vgg16"
    images = options.limit_train + 2 * options.limit_test + 2  # the test set, as many of noise, black and white
    bare = bare_pass(load_encoder(name, options.weights), options.train, options.bare) * images
    start = time.perf_counter()
    arguments = ["--encoder", name, "--weights", options.weights, "--train", options.train, "--test", options.test]
    limits = ["--limit-train", str(options.limit_train), "--limit-test", str(options.limit_test)]
    main(["probe", *arguments, *limits, "--untrained", "0", "--out", options.out])
    probe = time.perf_counter() - start
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"\n{torch.get_num_threads()} threads, torch {torch.__version__}, {images} images at 224 px")
    print(f"bare encoder pass {bare:7.0f} s ({options.bare} images measured)")
    print(f"padprobe probe    {probe:7.0f} s = {probe / bare:.2f} x the bare pass, peak memory {memory:.1f} GiB")
