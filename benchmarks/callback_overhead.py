"""What the callback costs a training: VGG16 segmentation at 224 px, batches of 8, five targets, the paper's readout.

python -m benchmarks.callback_overhead [--rounds 8] [--steps 2] [--batch-size 8] [--precision 32-true] [--kinds ...]

One training runs in blocks of steps, in turn without the callback, with it, with `every_n_steps=2`, and with the usual
alternative: a second pass of the encoder for the probe. Prints the time of each relative to the block without the
callback in the same round (mean over rounds, its 95% interval, and the range), and the memory that it takes. The first
round does not count.
"""

import argparse
import statistics
import time

import torch
from lightning.pytorch import Callback, Trainer
from torch.utils.data import DataLoader

from padprobe import PositionProbeCallback
from tasks.segmentation import SegmentationTask

KINDS = {
    "without": None,
    "with the callback": PositionProbeCallback(encoder="net.encoder"),
    "every_n_steps=2": PositionProbeCallback(encoder="net.encoder", every_n_steps=2),
    "second encoder pass": PositionProbeCallback(encoder="net.encoder"),
}


def clock() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class Alternate(Callback):
    """Runs the kinds in turn, each for a block of steps, and times the blocks."""

    def __init__(self, kinds: list[str], steps: int) -> None:
        self.kinds, self.steps = kinds, steps
        self.seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
        self.memory = dict.fromkeys(KINDS, 0)

    def now(self, batch_idx: int) -> str:
        return self.kinds[batch_idx // self.steps % len(self.kinds)]

    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        kind = self.now(batch_idx)
        guest = KINDS[kind]
        if batch_idx % self.steps == 0:
            if guest:
                guest.on_fit_start(trainer, module)
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            self.start = clock()
        if guest:
            guest.on_train_batch_start(trainer, module, batch, batch_idx)
            guest._tap.active &= kind != "second encoder pass"

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        kind = self.now(batch_idx)
        guest = KINDS[kind]
        if kind == "second encoder pass":
            guest._tap.active = True
            with torch.no_grad(), trainer.precision_plugin.forward_context():
                module.net.encoder(batch["image"])
        if guest:
            guest.on_train_batch_end(trainer, module, outputs, batch, batch_idx)
        if batch_idx % self.steps == self.steps - 1:
            self.seconds[kind].append((clock() - self.start) / self.steps)
            if torch.cuda.is_available() and (
                guest or not self.memory[kind]
            ):  # without the callback: before any readout exists
                self.memory[kind] = max(self.memory[kind], torch.cuda.max_memory_allocated())
            if guest:
                guest.teardown(trainer, module, "fit")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=2, help="steps per block")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    options = parser.parse_args()

    generator = torch.Generator().manual_seed(0)
    image = torch.rand(options.batch_size, 3, 224, 224, generator=generator)
    labels = torch.randint(11, (options.batch_size, 224, 224), generator=generator)
    batches = [{"image": image, "labels": labels}] * (options.steps * len(options.kinds) * (options.rounds + 1))
    alternate = Alternate(options.kinds, options.steps)
    trainer = Trainer(
        accelerator="auto",
        devices=1,
        precision=options.precision,
        max_epochs=1,
        callbacks=[alternate],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(SegmentationTask(classes=11, encoder="smp:vgg16"), DataLoader(batches, batch_size=None))

    cuda = torch.cuda.is_available()
    name = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}, torch {torch.__version__}, {options.precision}, batches of {options.batch_size}")
    without = alternate.seconds["without"][1:]
    for kind, seconds in alternate.seconds.items():
        ratios = [a / b for a, b in zip(seconds[1:], without, strict=True)]
        error = 1.96 * statistics.stdev(ratios) / len(ratios) ** 0.5
        spread = f"{statistics.mean(ratios):.3f} +- {error:.3f} ({min(ratios):.3f} .. {max(ratios):.3f})"
        memory = f"  {(alternate.memory[kind] - alternate.memory['without']) / 1e6:+.0f} MB" if cuda else ""
        print(f"{kind:20} {statistics.median(seconds[1:]):8.4f} s per step  {spread}{memory}")
    probe = KINDS["with the callback"]._probes[""]
    features = 4 * options.batch_size * probe.readout.weight.shape[1] * probe.readout.grid**2
    heads = 3 * 4 * sum(p.numel() for p in probe.readout.parameters())
    print(f"aligned features {features / 1e6:.1f} MB; readouts, gradients and momenta {heads / 1e6:.1f} MB")
