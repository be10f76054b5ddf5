"""`padprobe probe`: its options, its processes and the probe."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
from jsonargparse import ActionYesNo, ArgumentParser, Namespace
from lightning.fabric import Fabric
from lightning.fabric.strategies import DDPStrategy

from padprobe.errors import check_number
from padprobe.maps import Size
from padprobe.network.embedding import position_embedding_of
from padprobe.network.encoders import load_encoder, weights_label
from padprobe.network.padding import padding_of
from padprobe.probe.encoder import PAPER_STIMULI, Source, probe_encoder
from padprobe.probe.features import Progress
from padprobe.probe.options import ProbeOptions, default_of
from padprobe.readout.spec import Readout, parse_readout
from padprobe.results import Results


def make_parser() -> ArgumentParser:
    """The parser of `padprobe probe`: a few arguments, and every option of :class:`ProbeOptions`."""
    description = "Read position out of a frozen encoder."
    parser = ArgumentParser(prog="padprobe probe", description=description, allow_abbrev=False)
    add = parser.add_argument
    add("--encoder", required=True, help="torchvision:NAME, smp:NAME, timm:NAME, or a .ckpt file")
    add("--weights", default="untrained", help="untrained (implies --settle), a name that the library knows, or a file")
    add("--padding", default="zeros", help="zeros, valid, reflect, replicate or circular")
    add(
        "--position-embedding",
        default="learned",
        help="learned, none (the control for what it brings, as --padding valid is for padding) or shuffled",
    )
    add("--train", default="dead_leaves", metavar="DIR", help="images to train the readouts on, or dead_leaves")
    add(
        "--test",
        action="append",
        metavar="[NAME=]DIR",
        help="images to score on, beside black, white and noise; may be repeated; null: dead_leaves",
    )
    add("--name", help="what the results call the run; null: encoder, weights, padding and embedding")
    add("--out", required=True, metavar="DIR", help="folder for the results and the report")
    add("--save-readouts", metavar="FILE", help="file for the trained readouts (.safetensors)")
    add("--accelerator", default="auto", help="auto (a GPU where there is one), cpu, cuda, ...")
    add("--devices", type=int, default=1, help="processes that share the images")
    add("--num-nodes", type=int, default=1, help="machines")
    add("--strategy", default="auto", help="Lightning's strategy: auto, ddp, ddp_spawn, ...")
    group = parser.add_argument_group(
        "options of the probe",
        "A readout is written as posenet or ridge, then what differs from the paper's: "
        "ridge,kernel_size=1 or kernel_size=7,stages=f1+f2 (keys: kernel_size, depth, padding, scale, stages).",
    )
    hints = get_type_hints(ProbeOptions)
    for field in dataclasses.fields(ProbeOptions):
        default, hint, name = default_of(field), hints[field.name], "--" + field.name.replace("_", "-")
        arguments: dict[str, Any] = {"help": field.metadata["help"], "default": default}
        if hint is bool:
            arguments["action"] = ActionYesNo(no_prefix="no-")
        elif list in (get_origin(hint), *map(get_origin, get_args(hint))):
            values = default if isinstance(default, list) else [default]
            words = [value.kind if isinstance(value, Readout) else value for value in values]
            arguments |= {"nargs": "+", "type": int if hint == list[int] else str, "default": words}
        elif hint == Size:
            arguments |= {"type": str, "default": str(default), "metavar": "SIZE"}
        else:
            arguments["type"] = hint
        group.add_argument(name, **arguments)
    return parser


def read_options(arguments: Namespace) -> ProbeOptions:
    """The probe's options from parsed arguments."""
    values = {field.name: arguments[field.name] for field in dataclasses.fields(ProbeOptions)}
    files = [text for text in arguments.readouts if text.endswith(".safetensors")]
    if files and len(arguments.readouts) > 1:
        raise ValueError(f"--readouts has a file of trained readouts, {files[0]!r}, and others: give the file alone")
    values["readouts"] = files[0] if files else [parse_readout(text) for text in arguments.readouts]
    if arguments.stages[0] in ("auto", "paper", "each_block") and len(arguments.stages) == 1:
        values["stages"] = arguments.stages[0]
    values["settle"] |= arguments.weights == "untrained" and not arguments.encoder.endswith(".ckpt")
    return ProbeOptions(**values)


def launch(arguments: Namespace, work: Callable[..., None]) -> None:
    """Calls ``work(fabric, arguments)`` in each of the processes that the arguments ask for."""
    accelerator, strategy = arguments.accelerator, arguments.strategy
    if accelerator == "auto":  # not MPS, which lacks float64
        accelerator = "cuda" if torch.cuda.is_available() else "cpu"
    if arguments.devices * arguments.num_nodes > 1 and strategy in ("auto", "ddp", "ddp_spawn"):
        # the other processes wait while the first trains the readouts
        method: Literal["spawn", "popen"] = "spawn" if strategy == "ddp_spawn" else "popen"
        strategy = DDPStrategy(start_method=method, timeout=timedelta(days=1))
    devices = {"devices": arguments.devices, "num_nodes": arguments.num_nodes}
    for name, value in devices.items():
        check_number(f"--{name.replace('_', '-')}", value, int, least=1)
    read_options(arguments)  # what cannot be is refused here, not in every process
    try:
        fabric = Fabric(accelerator=accelerator, strategy=strategy, **devices)
    except Exception as error:  # whatever Lightning raises where there is no such device
        raise ValueError(f"accelerator {accelerator!r} with devices {arguments.devices}: {error}") from error
    fabric.launch(work, arguments)


def probe(fabric: Fabric, arguments: Namespace, progress: Progress | None) -> Results:
    """Probes the encoder that the arguments name; the same results in every process."""
    options = read_options(arguments)
    test = _read_test(arguments.test or ["dead_leaves"])
    name, trained = arguments.encoder, arguments.encoder.endswith(".ckpt")
    load = functools.partial(
        load_encoder,
        name,
        padding=arguments.padding,
        image_size=options.image_size,
        position_embedding=arguments.position_embedding,
    )
    encoder = load(arguments.weights, seed=options.seeds[0])
    weights = "trained" if trained else weights_label(arguments.weights)
    pair = f"{Path(name).stem if trained else name.partition(':')[2]}-{weights}"
    embedding = position_embedding_of(encoder)
    suffix = "" if embedding in ("", "learned") else f"-embedding-{embedding}"
    labels = {
        "run": arguments.name or f"{pair}-{padding_of(encoder)}{suffix}",
        "pair": pair,
        "encoder": name,
        "weights": weights,
        "task": "untrained" if weights == "untrained" else "",
    }
    if fabric.global_rank == 0:
        Path(arguments.out).mkdir(parents=True, exist_ok=True)
    fabric.barrier()
    return probe_encoder(
        encoder,
        arguments.train,
        test,
        options,
        twin=None if trained else lambda seed: load(seed=seed),
        cache_dir=arguments.out,
        save_to=arguments.save_readouts,
        fabric=fabric,
        labels=labels,
        progress=progress,
    )


def _read_test(texts: list[str]) -> dict[str, Source]:
    """The test sets by name, of texts ``DIR`` or ``NAME=DIR``; then black, white and noise.

    A set without a name is called as its folder, or as the parent of a folder that is just called "images".
    """
    test: dict[str, Source] = {}
    for text in texts:
        name, equals, folder = text.partition("=")
        if not equals or Path(text).is_dir():
            path = Path(text)
            generic = path.name.lower() in ("images", "imgs", "image")
            name, folder = path.resolve().parent.name if generic else path.name, text
        if not name or not folder:
            raise ValueError(f"--test is {text!r}; expected DIR or NAME=DIR")
        if name in (*test, *PAPER_STIMULI):
            raise ValueError(f"two test sets are called {name!r}: give them names with --test NAME=DIR")
        test[name] = folder
    return {**test, **PAPER_STIMULI}
