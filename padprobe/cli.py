"""`padprobe fit | validate | test | predict | probe | study | report | data`."""

from __future__ import annotations

import argparse
import functools
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from lightning.fabric import Fabric

    from padprobe.results import Results

LIGHTNING = {
    "fit": "train any LightningModule, with or without PositionProbeCallback",
    "validate": "score it on its validation data",
    "test": "score it on its test data",
    "predict": "run it on its prediction data",
}


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 0, 1 where a cell failed or data are bad, 2 for bad input."""
    args = list(sys.argv[1:] if args is None else args)
    if str(Path.cwd()) not in sys.path:  # a config or checkpoint names the modules beside it (tasks, here)
        sys.path.insert(0, str(Path.cwd()))
    if args and args[0] in LIGHTNING:
        from padprobe.study.fit import lightning_cli

        warnings.filterwarnings("ignore", message=".*args parameter is intended to run from within Python")
        lightning_cli(args)
        return 0
    options = _parser().parse_args(args)
    try:
        return options.command(options)
    except ValueError as error:  # bad input: one line, not a traceback
        print(f"padprobe: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="padprobe", description="How much absolute position does a CNN encode, and where does it come from?"
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, text in LIGHTNING.items():
        commands.add_parser(name, help=f"{text} (LightningCLI: padprobe {name} --help)", add_help=False)

    probe = commands.add_parser("probe", help="read position out of a frozen encoder")
    probe.add_argument("--encoder", required=True, help="torchvision:NAME, smp:NAME, timm:NAME, or a .ckpt file")
    probe.add_argument("--weights", default="untrained", help="untrained, a name the library knows, or a file")
    probe.add_argument("--padding", default="zeros", help="zeros, valid, reflect, replicate or circular")
    probe.add_argument(
        "--train", default="dead_leaves", metavar="DIR", help="images to train on (default: dead leaves)"
    )
    probe.add_argument(
        "--test",
        action="append",
        metavar="[NAME=]DIR",
        help="images to score on, beside black, white and noise; may be repeated (default: dead leaves)",
    )
    probe.add_argument("--limit-train", type=int, metavar="N", help="a random sample of the training images")
    probe.add_argument("--limit-test", type=int, metavar="N", help="a random sample of each test set")
    probe.add_argument(
        "--readout",
        action="append",
        metavar="KEY=VALUE,...",
        help="a readout, 'posenet' or 'ridge', then what is not as in the paper: kernel_size, depth, padding, scale "
        "(unit, paper), stages (all, each, f1, f2+f4, ...). May be repeated; the first is the headline; each has its "
        "control on the image alone (default: posenet). Or one file of trained readouts, such as "
        "checkpoints/vgg16_readouts.safetensors: nothing is trained then",
    )
    probe.add_argument("--save-readouts", metavar="FILE", help="keep the trained readouts (.safetensors)")
    probe.add_argument(
        "--stages", nargs="+", default=["auto"], metavar="LAYER", help="layer names, 'auto' (found) or 'paper'"
    )
    probe.add_argument("--targets", nargs="+", default=["H", "V", "G", "HS", "VS"], metavar="MAP")
    probe.add_argument("--image-size", type=int, default=224, help="in pixels (default 224)")
    probe.add_argument("--normalize", action="store_true", help="ImageNet mean and std (the paper's code: none)")
    probe.add_argument("--epochs", type=int, default=15, help="of the readouts' training (default 15)")
    probe.add_argument("--seeds", nargs="+", type=int, default=[0], help="of the readouts (default 0)")
    probe.add_argument(
        "--untrained", type=int, default=3, metavar="N", help="untrained twins for delta, each one more run (default 3)"
    )
    probe.add_argument("--no-selectivity", action="store_true", help="leave the permuted targets out")
    probe.add_argument(
        "--context", action="store_true", help="also without padding, with real surroundings instead; one more run"
    )
    probe.add_argument("--num-workers", type=int, default=0, help="processes that read images (default 0)")
    probe.add_argument(
        "--cache-gb", type=float, default=8.0, help="memory for features; above it, a file in --out (default 8)"
    )
    probe.add_argument("--accelerator", default="auto", help="auto (a GPU where there is one), cpu, cuda, ...")
    probe.add_argument("--devices", type=int, default=1, help="processes that share the images (default 1)")
    probe.add_argument("--num-nodes", type=int, default=1, help="machines (default 1)")
    probe.add_argument("--strategy", default="auto", help="Lightning's: auto, ddp, ddp_spawn, ...")
    probe.add_argument("--out", required=True, metavar="DIR", help="folder for results.csv and the report")
    probe.set_defaults(command=_probe)

    study = commands.add_parser("study", help="train, probe and compare the encoders that a YAML lists")
    study.add_argument("config", nargs="+", metavar="YAML", help="a study; several are run as one")
    study.add_argument(
        "--out", required=True, metavar="DIR", help="folder for all results; a killed study goes on there"
    )
    study.add_argument("--preset", metavar="NAME", help="one of the study's presets, such as laptop or paper")
    study.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change the study, such as image_size=96 or encoders.vgg16.weights=untrained; may be repeated",
    )
    study.add_argument("--only", action="append", default=[], metavar="NAME", help="these cells (sod-* for a pattern)")
    study.add_argument("--limit-train", type=int, metavar="N", help="the same as --set limit_train=N")
    study.add_argument("--data", metavar="DIR", help="the folder of data sets and weights, in place of $PADPROBE_DATA")
    study.add_argument("--dry-run", action="store_true", help="list the cells, what is done, and an estimate of time")
    study.add_argument(
        "--print-commands", action="store_true", help="print a command a cell, for machines that share DIR"
    )
    study.set_defaults(command=_study)

    report = commands.add_parser("report", help="rebuild the report from results alone")
    report.add_argument("results", nargs="+", metavar="DIR", help="--out folders of probe or study")
    report.add_argument("--out", required=True, metavar="DIR")
    report.set_defaults(command=_report)

    data = commands.add_parser("data", help="look after data sets").add_subparsers(required=True, metavar="COMMAND")
    check = data.add_parser("check", help="list everything that is wrong with a training's files")
    check.add_argument("config", metavar="YAML", help="a config of `padprobe fit`")
    check.set_defaults(command=_check)
    return parser


def _probe(options: argparse.Namespace) -> int:
    import torch
    from lightning.fabric import Fabric
    from lightning.fabric.strategies import DDPStrategy

    accelerator = options.accelerator
    if accelerator == "auto":  # not MPS, which lacks float64
        accelerator = "cuda" if torch.cuda.is_available() else "cpu"
    strategy = options.strategy
    if options.devices * options.num_nodes > 1 and strategy in ("auto", "ddp", "ddp_spawn"):
        # the other processes wait while the first trains the readouts
        method: Literal["spawn", "popen"] = "spawn" if strategy == "ddp_spawn" else "popen"
        strategy = DDPStrategy(start_method=method, timeout=timedelta(days=1))
    devices = {"devices": options.devices, "num_nodes": options.num_nodes}
    fabric = Fabric(accelerator=accelerator, strategy=strategy, **devices)
    fabric.launch(functools.partial(_probe_here, options=options))
    return 0


def _probe_here(fabric: Fabric, options: argparse.Namespace) -> None:
    """`padprobe probe` in each of its processes; the first writes and shows the results."""
    from padprobe.network.encoders import load_encoder
    from padprobe.network.padding import padding_of
    from padprobe.probe.encoder import probe_encoder
    from padprobe.readout.spec import Readout, parse_readout

    readouts: list[Readout] | str = [Readout()]
    if options.readout:
        files = [text for text in options.readout if text.endswith(".safetensors")]
        if files and len(options.readout) > 1:
            raise ValueError(
                f"--readout {files[0]!r} is a file of trained readouts, which stand alone: leave the others out"
            )
        readouts = files[0] if files else [parse_readout(text) for text in options.readout]
    encoder = load_encoder(options.encoder, options.weights, options.padding, options.seeds[0])
    test: dict[str, str] = {}
    for text in options.test or ["dead_leaves"]:
        name, equals, folder = text.partition("=")
        if not equals or Path(text).is_dir():
            name, folder = _name(text), text
        if name in (*test, "black", "white", "noise"):
            raise ValueError(f"two test sets are called {name!r}: name them apart with --test NAME=DIR")
        test[name] = folder
    test.update({name: name for name in ("black", "white", "noise")})
    trained = options.encoder.endswith(".ckpt")
    weights = "trained" if trained else Path(options.weights).stem
    architecture = Path(options.encoder).stem if trained else options.encoder.partition(":")[2]
    labels = {
        "run": f"{architecture}-{weights}-{padding_of(encoder)}",
        "encoder": options.encoder,
        "weights": weights,
        "task": "untrained" if weights == "untrained" else "",
    }
    first = fabric.global_rank == 0
    if first:
        Path(options.out).mkdir(parents=True, exist_ok=True)
    fabric.barrier()
    with _progress() if first else nullcontext((None, None)) as (progress, _):
        results = probe_encoder(
            encoder,
            options.train,
            test,  # type: ignore[arg-type]
            readouts=readouts,
            stages=options.stages[0] if options.stages[0] in ("auto", "paper") else options.stages,
            targets=options.targets,
            image_size=options.image_size,
            normalize=options.normalize,
            epochs=options.epochs,
            seeds=options.seeds,
            untrained=options.untrained,
            twin=None if trained else lambda seed: load_encoder(options.encoder, padding=options.padding, seed=seed),
            selectivity=not options.no_selectivity,
            context=options.context,
            limit_train=options.limit_train,
            limit_test=options.limit_test,
            num_workers=options.num_workers,
            cache_gb=options.cache_gb,
            cache_dir=options.out,
            save_to=options.save_readouts,
            fabric=fabric,
            labels=labels,
            progress=progress,
        )
    if first:
        results.save(options.out)
        _show(results, options.out)


def _name(folder: str) -> str:
    """What a test set is called: its folder's name, or its parent's where the folder is just called "images"."""
    path = Path(folder)
    return path.resolve().parent.name if path.name.lower() in ("images", "imgs", "image") else path.name


def _study(options: argparse.Namespace) -> int:
    if options.data:
        os.environ["PADPROBE_DATA"] = os.path.abspath(options.data)
    from padprobe.study.plan import read_study
    from padprobe.study.runner import dry_run, print_commands, run_study

    changes = list(options.set)
    if options.limit_train is not None:
        changes.append(f"limit_train={options.limit_train}")
    study = read_study(options.config, options.preset, changes, options.only)
    if options.dry_run:
        for line in dry_run(study, options.out):
            print(line, flush=True)
        return 0
    if options.print_commands:
        same = [("--out", options.out), ("--preset", options.preset), *(("--set", c) for c in changes)]
        same.append(("--data", options.data))
        given = [text for option, value in same if value for text in (option, value)]
        for line in print_commands(study, options.out, [*options.config, *given]):
            print(line)
        return 0
    with _progress() as (progress, say):
        results, failed = run_study(study, options.out, progress, say)
    if len(results.rows):
        _show(results, options.out)
    return 1 if failed or not study.chosen else 0


def _report(options: argparse.Namespace) -> int:
    from padprobe.results import Results
    from padprobe.study.folder import PLANS, load_results

    studies = [Path(folder, PLANS).is_dir() for folder in options.results]
    parts = [load_results(f) if s else Results.load(f) for f, s in zip(options.results, studies, strict=True)]
    return _show(Results.join(parts), options.out)


def _check(options: argparse.Namespace) -> int:
    from padprobe.study.fit import check_data

    problems = check_data(options.config)
    print("\n".join([*problems, f"{len(problems) or 'no'} problem{'s' * (len(problems) != 1)}"]))
    return 1 if problems else 0


def _show(results: Results, out: str) -> int:
    """Writes the report and prints the main table and where the page is."""
    from padprobe.report import main_table, write_report

    page = write_report(results, Path(out))
    print(main_table(results))
    print(f"\nreport: {page}")
    return 0


@contextmanager
def _progress() -> Iterator[tuple]:
    """A display of what runs, what is done and what is left: (progress(what, done, total), say(line))."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        Task,
        TaskID,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    class Speed(ProgressColumn):
        def render(self, task: Task) -> str:
            return f"{task.speed:.1f}/s" if task.speed else ""

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Speed())
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=Console(stderr=True)) as display:
        shown: dict[str, TaskID] = {}

        def progress(what: str, done: int, total: int) -> None:
            if what not in shown:
                for task in shown.values():
                    display.remove_task(task)
                shown.clear()
                shown[what] = display.add_task(what, total=total or None)
            display.update(shown[what], completed=done, total=total or None)

        yield progress, lambda line: display.console.print(line, highlight=False)


if __name__ == "__main__":
    sys.exit(main())
