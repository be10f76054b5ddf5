"""One encoder of a study: its options, their types, and which results depend on which of them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from padprobe.errors import check_name, check_type
from padprobe.maps import size_pair
from padprobe.probe.options import ProbeOptions, option
from padprobe.study.sources import Source, fingerprint, leaves, names_in


@dataclass
class Cell(ProbeOptions):
    """An encoder, loaded by name or trained by a config, and how it is probed.

    A study's YAML takes these options and those of :class:`~padprobe.probe.options.ProbeOptions`, for one encoder or,
    at the top, for all; the help of each field says what it is.

    Example:
        >>> Cell(encoder="torchvision:vgg16", image_size=96).untrained
        0
    """

    encoder: str = option(
        "",
        "torchvision:NAME, smp:NAME, timm:NAME or a .ckpt file; for an encoder with `fit`, only a label",
        changes=("scores", "probe"),
    )
    options: dict[str, Any] = option({}, "more arguments of the encoder's constructor")
    weights: str = option("untrained", "untrained, a name that the library knows, or a file")
    padding: str = option(
        "zeros",
        "zeros, valid, reflect, replicate or circular; a list makes one run per mode, called NAME-MODE. With `fit`, it "
        "sets the config's model.init_args.encoder_padding",
    )
    position_embedding: str = option(
        "learned",
        "learned, none or shuffled, for an encoder without `fit`; a list makes one run per mode, called NAME-MODE",
    )
    pair: str = option(
        "",
        "name shared by runs that differ only in their padding or position embedding (default: the encoder's)",
        changes=(),
    )
    fit: str | None = option(
        None, "config of `padprobe fit`; its module's submodule `encoder` is probed after training", ("training",)
    )
    overrides: dict[str, Any] = option(
        {}, "changes to the config by dotted key, such as trainer.max_epochs: 3", ("training",)
    )
    needs: dict[str, str | list[str]] = option(
        {}, "data sets of the training: the path of each is set in the config under this dotted key or keys", ()
    )
    scores: dict[str, dict[str, Any]] = option(
        {}, "test sets of a trained network by name, each with further changes to its config", ("scores",)
    )
    task: str = option(
        "", "label of the encoder's training, such as classification, SOD or SS", changes=("scores", "probe")
    )
    train: Any = option("dead_leaves", "images to train readouts on: a stimulus, a folder or a data set by class_path")
    test: dict[str, Any] = option({name: name for name in ("black", "white", "noise")}, "images to score on, by name")
    # the probe's options that mean more, or have another default, in a study
    seeds: list[int] = option(
        [0],
        "seeds: one cell per seed for trainings and untrained weights; otherwise seeds of the readouts",
        ("training", "probe"),
    )
    untrained: int = option(0, "untrained twins for delta; a study usually lists untrained encoders instead")

    @property
    def trained(self) -> bool:
        """Whether a Lightning training, the cell's or an earlier one, makes the weights."""
        return bool(self.fit) or self.encoder.endswith(".ckpt")


OPTIONS = {field.name: field for field in dataclasses.fields(Cell)}
"""All options of a study's encoder, by name."""
_PATHS = ("fit", "encoder", "weights", "train", "test", "readouts")  # options whose values may be files or folders


@dataclass
class Planned:
    """A cell that can run, and the keys of its results.

    Attributes:
        name: the run's name: the encoder's, with the padding mode, the position embedding and the seed where it has
            several.
        group: the name without the seed.
        folder: folder of everything it writes; it does not change when more seeds are added.
        cell: what to run.
        how: how the run is made, in words.
        training_key, scores_key, probe_key: see :func:`keys_of`.
    """

    name: str
    group: str
    folder: str
    cell: Cell
    how: str
    training_key: str
    scores_key: str
    probe_key: str

    @property
    def pairs(self) -> dict[str, str]:
        """The pair of each run that the cell makes: its own and its controls'."""
        pairs = {self.name: self.cell.pair}
        if self.cell.context:
            pairs[f"{self.name}-context"] = self.cell.pair
        for seed in range(self.cell.untrained):
            pairs[f"{self.name}-untrained-seed{seed}"] = f"{self.cell.pair}-untrained"
        return pairs


def typed(kind: type, values: Any, what: str) -> Any:
    """An instance of a dataclass, after a check of each value against its type.

    Raises:
        ValueError: for an option that the class does not have, or a value of another type.

    Example:
        >>> typed(Cell, {"grid": "large"}, "encoder 'a'")
        Traceback (most recent call last):
            ...
        ValueError: grid of encoder 'a' is 'large'; expected int
    """
    check_type(values, dict[str, Any], what)
    hints = get_type_hints(kind)
    for name, value in values.items():
        check_name(name, hints, f"option of {what}")
        check_type(value, hints[name], f"{name} of {what}")
    for field in dataclasses.fields(kind):
        if field.default is field.default_factory is dataclasses.MISSING and field.name not in values:
            raise ValueError(f"{what} has no {field.name}")
    try:
        return kind(**values)
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from error


def keys_of(cell: Cell, sources: Mapping[str, Source]) -> tuple[str, str, str]:
    """Hashes of what determines a cell's weights ("" without a training), its task's scores, and any one readout.

    Each is made of the options that change these results, with ``${NAME}`` as written, and of the content of the files
    that they name, and of configs that a training's config includes. So a data set may move, and its content may not
    change.
    """

    def key(result: str, training: str = "") -> str:
        chosen = {name: getattr(cell, name) for name, field in OPTIONS.items() if result in field.metadata["changes"]}
        if isinstance(cell.readouts, str) and result == "probe":
            chosen["readouts"] = cell.readouts  # a file, whose readouts are made in one go
        paths = [sources[name].place for name in names_in(chosen, sources)]
        texts = leaves([chosen[name] for name in _PATHS if name in chosen])
        paths += [text for text in texts if isinstance(text, str) and os.path.exists(text)]
        named: list[Any] = [chosen.get("overrides"), chosen.get("scores")]
        if result == "training" and cell.fit and os.path.isfile(cell.fit):
            named.append(yaml.safe_load(Path(cell.fit).read_text(encoding="utf-8")))
        configs = [text for text in leaves(named) if str(text).endswith((".yaml", ".yml", ".json"))]
        places = [Path(folder, text) for text in configs for folder in ("", Path(cell.fit or "").parent)]
        paths += [str(place) for place in dict.fromkeys(places) if place.is_file()]
        parts = [chosen, [fingerprint(path) for path in paths], training]
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:12]

    training = key("training") if cell.fit else ""
    return training, key("scores", training), key("probe", training)


def describe(cell: Cell, overrides: Mapping[str, Any]) -> str:
    """How a run is made, in words; ``overrides`` of its training's config as the YAML states them.

    Example:
        >>> describe(Cell(fit="sod.yaml", image_size=96, limit_train=400, grid=14), {"trainer.max_epochs": 3})
        '96 px; readouts trained on 400 images; grid 14; trained by sod.yaml, trainer.max_epochs=3'
    """
    sides = dict.fromkeys(size_pair(cell.image_size))  # one number for a square
    words = [f"{' x '.join(map(str, sides))} px", f"readouts trained on {cell.limit_train or 'all'} images"]
    for name in ("grid", "epochs", "batch_size", "stages"):
        if getattr(cell, name) != getattr(Cell(), name):
            words.append(f"{name} {getattr(cell, name)}")
    if cell.fit:
        words.append(", ".join([f"trained by {cell.fit}", *(f"{key}={value}" for key, value in overrides.items())]))
    return "; ".join(words)
