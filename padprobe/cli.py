"""`padprobe fit | validate | test | predict | probe | study | report | data`."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from padprobe import __version__
from padprobe.errors import check_writable, require

if TYPE_CHECKING:
    from jsonargparse import Namespace
    from lightning.fabric import Fabric

    from padprobe.results import Results

LIGHTNING = {
    "fit": "train any LightningModule, with or without PositionProbeCallback",
    "validate": "score a LightningModule on its validation data",
    "test": "score a LightningModule on its test data",
    "predict": "run a LightningModule on its prediction data",
}


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Returns:
        The exit code: 0; 1 where a cell of a study failed or data are bad; 2 for bad input.
    """
    args = list(sys.argv[1:] if args is None else args)
    if str(Path.cwd()) not in sys.path:  # a config or checkpoint names modules of the current folder (tasks, here)
        sys.path.insert(0, str(Path.cwd()))
    command = args[0] if args else ""
    try:
        if command in LIGHTNING:
            with require("cli"):
                from padprobe.study.fit import lightning_cli
        if command == "probe":
            return _probe(args[1:])
        if command not in LIGHTNING:
            options = _parser().parse_args(args)
            if hasattr(options, "out"):
                _check_out(options.out)
            return options.command(options)
    except (ValueError, ModuleNotFoundError, OSError) as error:  # bad input, a missing extra: one line, no traceback
        print(f"padprobe: {error}", file=sys.stderr)
        return 2
    # errors in a training keep their traceback: they may be in the user's own module
    warnings.filterwarnings("ignore", message=".*args parameter is intended to run from within Python")
    lightning_cli(args)
    return 0


def _parser() -> argparse.ArgumentParser:
    """The parser of all commands; those of `probe` and of LightningCLI are parsed elsewhere, and only listed here."""
    parser = argparse.ArgumentParser(
        prog="padprobe", description="How much absolute position does a CNN encode, and where does it come from?"
    )
    parser.add_argument("--version", action="version", version=f"padprobe {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, text in LIGHTNING.items():
        commands.add_parser(name, help=f"{text} (LightningCLI: padprobe {name} --help)", add_help=False)
    commands.add_parser("probe", help="read position out of a frozen encoder (padprobe probe --help)", add_help=False)

    study = commands.add_parser("study", help="train, probe and compare the encoders that a YAML lists")
    study.add_argument("config", nargs="+", metavar="YAML", help="a study; several are run as one")
    study.add_argument(
        "--out", required=True, metavar="DIR", help="folder for all results; the same command resumes a stopped study"
    )
    study.add_argument("--preset", metavar="NAME", help="one of the study's presets, such as laptop or paper")
    study.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change the study, such as image_size=96 or encoders.vgg16.weights=untrained; may be repeated",
    )
    study.add_argument(
        "--only", action="append", default=[], metavar="NAME", help="run only these cells (sod-* for a pattern)"
    )
    study.add_argument("--limit-train", type=int, metavar="N", help="the same as --set limit_train=N")
    study.add_argument("--data", metavar="DIR", help="the folder of data sets and weights, in place of $PADPROBE_DATA")
    study.add_argument("--dry-run", action="store_true", help="list the cells, done and to do, and run none")
    study.set_defaults(command=_study)

    report = commands.add_parser("report", help="build the report again from results")
    report.add_argument("results", nargs="+", metavar="DIR", help="--out folders of probe or study")
    report.add_argument("--out", required=True, metavar="DIR", help="folder for the report")
    report.add_argument(
        "--beside",
        action="append",
        default=[],
        metavar="FILE.csv",
        help="numbers to set beside these: published ones, or an earlier results.csv; may be repeated",
    )
    report.set_defaults(command=_report)

    data = commands.add_parser("data", help="check data sets").add_subparsers(required=True, metavar="COMMAND")
    check = data.add_parser("check", help="list everything that is wrong with the files of a training")
    check.add_argument("config", metavar="YAML", help="a config of `padprobe fit`")
    check.set_defaults(command=_check)
    return parser


def _check_out(out: str) -> None:
    """Raises ValueError where the output folder is something else, or cannot be written into."""
    if Path(out).exists() and not Path(out).is_dir():
        raise ValueError(f"--out {out!r} is a file; expected a folder, which may be new")
    if Path(out).exists():
        check_writable(out, "--out")


def _probe(args: list[str]) -> int:
    with require("cli"):
        import padprobe.report  # noqa: F401  # what it lacks is said now, not after the probe
        from padprobe.probe.command import launch, make_parser

    arguments = make_parser().parse_args(args)
    _check_out(arguments.out)
    launch(arguments, _probe_here)
    return 0


def _probe_here(fabric: Fabric, arguments: Namespace) -> None:
    """`padprobe probe` in each of its processes; the first writes and shows the results."""
    from padprobe.probe.command import probe
    from padprobe.progress import display

    first = fabric.global_rank == 0
    with display() if first else nullcontext((None, None)) as (progress, _):
        results = probe(fabric, arguments, progress)
    if first:
        results.save(arguments.out)
        _show(results, arguments.out)


def _study(options: argparse.Namespace) -> int:
    if options.data:
        os.environ["PADPROBE_DATA"] = os.path.abspath(options.data)
    with require("cli"):
        from padprobe.progress import display
        from padprobe.study.plan import read_study
        from padprobe.study.runner import dry_run, run_study

    changes = list(options.set)
    if options.limit_train is not None:
        changes.append(f"limit_train={options.limit_train}")
    study = read_study(options.config, options.preset, changes, options.only)
    if options.dry_run:
        for line in dry_run(study, options.out):
            print(line, flush=True)
        return 0
    with display() as (progress, say):
        results, failed = run_study(study, options.out, progress, say)
    if len(results.rows):
        _show(results, options.out)
    elif Path(options.out, "report.html").is_file():
        print(f"nothing was measured: {Path(options.out, 'report.html')} is of an earlier run", file=sys.stderr)
    return 1 if failed or not study.chosen else 0


def _report(options: argparse.Namespace) -> int:
    with require("cli"):
        from padprobe.report.references import read_references
        from padprobe.results import Results
        from padprobe.study.folder import join_folders

    references = [Results(references=read_references(file)) for file in options.beside]
    return _show(Results.join([join_folders(options.results), *references]), options.out)


def _check(options: argparse.Namespace) -> int:
    with require("cli"):
        from padprobe.study.fit import check_data

    problems = check_data(options.config)
    print("\n".join([*problems, f"{len(problems) or 'no'} problem{'s' * (len(problems) != 1)}"]))
    return 1 if problems else 0


def _show(results: Results, out: str) -> int:
    """Writes the report; prints the main table and the path of the page."""
    from padprobe.report import main_table, write_report

    page = write_report(results, Path(out))
    print(main_table(results))
    print(f"\nreport: {page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
