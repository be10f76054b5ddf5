"""Peak memory of `padprobe probe` for more and more training images, with a budget for their features.

python benchmarks/probe_memory.py --weights PATH --train DIR --test DIR --out DIR
    [--images 300 1200 4000] [--cache-gb 1]

Each size runs in a separate process: VGG16 at 224 px, five targets, the paper's readout, one epoch (more epochs take
time, not memory). Prints the size of the features, the peak resident memory of the process, and the seconds.
"""

import argparse
import os
import subprocess
import sys
import time

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--weights", "--train", "--test", "--out"):
        parser.add_argument(name, required=True)
    parser.add_argument("--images", type=int, nargs="+", default=[300, 1200, 4000])
    parser.add_argument("--cache-gb", type=float, default=1.0)
    options = parser.parse_args()
    print(f"images  features  peak memory   (budget for features: {options.cache_gb} GB)")
    for n in options.images:
        command = ["probe", "--encoder", "torchvision:vgg16", "--weights", options.weights, "--train", options.train]
        command += ["--test", options.test, "--limit-train", str(n), "--limit-test", "8", "--epochs", "1"]
        command += ["--untrained", "0", "--cache-gb", str(options.cache_gb), "--out", options.out]
        start = time.perf_counter()
        process = subprocess.Popen([sys.executable, "-m", "padprobe.cli", *command], stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            sys.exit(f"padprobe probe failed with {n} images")
        features = 2 * n * 1475 * 28 * 28 / 1e9
        seconds = time.perf_counter() - start
        print(f"{n:6d}  {features:5.2f} GB  {usage.ru_maxrss * 1024 / 1e9:8.2f} GB   {seconds:.0f} s", flush=True)
