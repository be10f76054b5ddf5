"""What a study measures: its YAML, what that includes, presets and changes, read into cells."""

from __future__ import annotations

import copy
import dataclasses
import fnmatch
import functools
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser

from padprobe.errors import check_name
from padprobe.maps import TARGETS
from padprobe.readout.spec import Readout


@dataclass
class Source:
    """Data or weights on disk, which a study calls by a name: ``${NAME}`` in any of its values.

    Attributes:
        path: a folder or file; environment variables are filled in.
        what: what it is.
        published: where it can be had.
    """

    path: str
    what: str = ""
    published: str = ""

    @property
    def place(self) -> str:
        """The path with its environment variables filled in."""
        return os.path.expanduser(os.path.expandvars(self.path))


@dataclass
class Cell:
    """One encoder of a study, loaded by name or trained by a config, and how it is probed.

    Attributes:
        encoder: a name for :func:`~padprobe.load_encoder`; of a trained one, only what the report calls it.
        options: further arguments of the encoder's constructor.
        weights: see :func:`~padprobe.load_encoder`.
        padding: of an encoder that is loaded; a trained one's is its config's.
        fit: a config for ``padprobe fit``; the module's submodule ``encoder`` is probed after the training.
        overrides: of the config, by dotted key, such as ``model.init_args.encoder_padding: valid``.
        scores: of a trained network: the test sets, by the name that the report gives them, each with overrides of the
            config beside those of the training.
        task: what the report calls the encoder's training: classification, SOD, SS, ...; without any, and with
            untrained weights, it is called untrained.
        seeds: of untrained weights and of trainings, one cell each; of the readouts.
        train: images to train readouts on: a stimulus, a folder or a data set by ``class_path``.
        test: images to score on, by name.
        readouts: see :class:`~padprobe.readout.variants.Readout`.
        targets, image_size, stages, grid, epochs, batch_size, context, limit_train, limit_test, num_workers, cache_gb:
            see :func:`~padprobe.probe_encoder`.
    """

    encoder: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    weights: str = "untrained"
    padding: str = "zeros"
    fit: str | None = None
    overrides: dict[str, Any] = field(default_factory=dict)
    scores: dict[str, dict[str, Any]] = field(default_factory=dict)
    task: str = ""
    seeds: list[int] = field(default_factory=lambda: [0])
    train: Any = "dead_leaves"
    test: dict[str, Any] = field(default_factory=lambda: {name: name for name in ("black", "white", "noise")})
    readouts: list[Readout] = field(default_factory=lambda: [Readout()])
    targets: list[str] = field(default_factory=lambda: list(TARGETS))
    image_size: int = 224
    stages: str | list[str] = "auto"
    grid: int = 28
    epochs: int = 15
    batch_size: int = 32
    context: bool = False
    limit_train: int | None = None
    limit_test: int | None = None
    num_workers: int = 0
    cache_gb: float = 8.0


PROBE = (
    *("seeds", "targets", "image_size", "stages", "grid", "epochs", "batch_size", "context"),
    *("limit_train", "limit_test", "num_workers", "cache_gb"),
)
"""The options that are :func:`~padprobe.probe_encoder`'s own."""
_OPTIONS = [option.name for option in dataclasses.fields(Cell)]
_NESTED = ("readouts", "train", "test", "overrides", "scores")  # what may hold a class_path, or is checked apart
_TRAINING = ("fit", "overrides", "seeds")
_FREE = ("readouts", "scores", "num_workers", "cache_gb")  # what does not change a probe's results, or has its own key


@dataclass
class Planned:
    """A cell that can run, with what tells its results from others.

    Attributes:
        name: the encoder's, followed by the seed where it has several.
        folder: of all that it leaves; the same however many seeds stand beside its own.
        cell: what to run.
        overrides: of its training, as they are written.
        training_key, scores_key, probe_key: hashes of all that determines the weights, the task's scores, and the
            measurements of any one readout.
    """

    name: str
    folder: str
    cell: Cell
    overrides: dict[str, Any]
    training_key: str
    scores_key: str
    probe_key: str


@dataclass
class Study:
    """What can be run, and what cannot.

    Attributes:
        name: of its YAML, without the folder.
        cells: in order.
        chosen: those to run now.
        missing: a line for every data set or weights that are not there: what they are, and the rows that wait for
            them.
    """

    name: str
    cells: list[Planned]
    chosen: list[Planned]
    missing: dict[str, str]


def read_study(
    paths: str | Path | Sequence[str | Path],
    preset: str | None = None,
    changes: Iterable[str] = (),
    only: Iterable[str] = (),
) -> Study:
    """Reads a study's YAML.

    Beside the options of :class:`Cell`, which hold for every encoder that does not have its own, it has ``encoders``
    (by name), ``data`` (:class:`Source` by name), ``presets`` (changes by name), ``include`` (other studies, by path
    from this one; an encoder that several name is one, with the readouts and scores of all) and ``anchors`` (anything).

    Args:
        paths: of the YAML; several are one study, as if it included them.
        preset: one of the study's ``presets``, applied first.
        changes: ``key=value``, such as ``limit_train=500`` or ``encoders.vgg16.weights=untrained``.
        only: names of cells, or patterns such as ``sod-*``; none: all.

    Raises:
        ValueError: naming the file that is missing or the key or value that a study does not have.
    """
    _fingerprint.cache_clear()
    files = [Path(path) for path in ([paths] if isinstance(paths, (str, Path)) else paths)]
    name = "+".join(file.stem for file in files)
    try:
        tree: dict[str, Any] = {}
        for file in files:
            tree = _merge(tree, _read(file))
        for part in ("encoders", "data"):  # YAML's aliases are one object, and a change is of one encoder
            tree[part] = {key: copy.deepcopy(value) for key, value in tree[part].items()}
        written = {key: str(source.get("path")) for key, source in tree["data"].items() if isinstance(source, dict)}
        presets = tree.pop("presets", {})
        if preset is not None:
            check_name(preset, presets, "preset")
            for key, value in presets[preset].items():
                _change(tree, key, copy.deepcopy(value))
        for change in changes:
            key, equals, value = change.partition("=")
            if not equals:
                raise ValueError(f"change {change!r}; expected key=value, such as limit_train=500")
            _change(tree, key, yaml.safe_load(value))
        return _plan(name, tree, written, list(only))
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"study {name!r}: {error}") from error


def _read(path: Path) -> dict[str, Any]:
    """A study's YAML with all that it includes."""
    if not path.is_file():
        raise ValueError(f"no study {str(path)!r}")
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"{str(path)!r} holds {type(content).__name__}; expected keys and values")
    content.pop("anchors", None)  # where a study keeps what its cells share
    merged: dict[str, Any] = {}
    for included in content.pop("include", []):
        merged = _merge(merged, _read(path.parent / included))
    return _merge(merged, content)


def _merge(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Two studies in one: the second's options replace the first's, encoders of one name become one."""
    merged = {**first, **second}
    merged["data"] = {**first.get("data", {}), **second.get("data", {})}
    merged["presets"] = {
        name: {**first.get("presets", {}).get(name, {}), **second.get("presets", {}).get(name, {})}
        for name in [*first.get("presets", {}), *second.get("presets", {})]
    }
    merged["encoders"] = dict(first.get("encoders", {}))
    for name, cell in second.get("encoders", {}).items():
        other = merged["encoders"].get(name, cell)
        for key in {**other, **cell}:
            if key not in ("readouts", "scores") and other.get(key) != cell.get(key):
                raise ValueError(
                    f"encoder {name!r} is included with {key} {other.get(key)!r} and with {cell.get(key)!r}: give one "
                    "of them another name"
                )
        both = {**other, **cell}
        if "readouts" in both and other is not cell:
            union = [*other.get("readouts", [{}]), *cell.get("readouts", [{}])]
            both["readouts"] = [readout for i, readout in enumerate(union) if readout not in union[:i]]
        if "scores" in both:
            both["scores"] = {**other.get("scores", {}), **cell.get("scores", {})}
        merged["encoders"][name] = both
    return merged


def _change(tree: dict[str, Any], key: str, value: Any) -> None:
    """Sets one value of a study by its dotted key."""
    first, *rest = key.split(".")
    if first == "encoders" and len(rest) >= 2:
        name, option, *more = rest
        check_name(name, tree["encoders"], "encoder")
        if option == "overrides" and more:
            tree["encoders"][name].setdefault(option, {})[".".join(more)] = value
        else:
            tree["encoders"][name][".".join([option, *more])] = value
    elif first == "data" and len(rest) == 2:
        check_name(rest[0], tree["data"], "data")
        tree["data"][rest[0]][rest[1]] = value
    else:
        check_name(key, [*_OPTIONS, "encoders.NAME.OPTION", "data.NAME.path"], "option of a study")
        tree[key] = value


def _plan(study: str, tree: dict[str, Any], written: dict[str, str], only: list[str]) -> Study:
    """The cells of a merged and changed tree; ``written`` are its data's paths as they were before the changes."""
    encoders = tree.pop("encoders")
    if not encoders:
        raise ValueError("it has no encoders")
    sources = {name: _typed(Source, values, f"data {name!r}") for name, values in tree.pop("data").items()}
    for key in tree:
        check_name(key, _OPTIONS, "option of a study")
    cells: list[Planned] = []
    waiting: dict[str, list[str]] = {}
    for name, own in encoders.items():
        for key in own:
            check_name(key, _OPTIONS, f"option of encoder {name!r}")
        raw = {**tree, **own}
        raw["overrides"] = {**_of_fit(raw, written), **raw.get("overrides", {})}
        if not _drop_missing(name, raw, sources, waiting):
            continue
        blank = raw.get("weights", "untrained") == "untrained" and not str(raw.get("encoder")).endswith(".ckpt")
        seeds, apart = raw.get("seeds", [0]), "fit" in raw or blank
        if blank and not raw.get("fit") and not raw.get("task"):
            raw["task"] = "untrained"
        for chosen in [[seed] for seed in seeds] if apart and isinstance(seeds, list) else [seeds]:
            one = {**raw, "seeds": chosen}
            cell = _typed(Cell, _fill(one, sources), f"encoder {name!r}")
            cell.readouts = [_typed(Readout, r, f"readout of encoder {name!r}") for r in one.get("readouts", [{}])]
            folder = f"{name}-seed{chosen[0]}" if apart else name
            full = folder if len(seeds) > 1 else name
            cells.append(Planned(full, folder, cell, own.get("overrides", {}), *_keys(cell, one, sources)))
    names = [planned.name for planned in cells]
    for pattern in only:
        if not fnmatch.filter(names, pattern):
            check_name(pattern, [*names, *(n for rows in waiting.values() for n in rows)], "cell")
    chosen_names = {name for pattern in only or ["*"] for name in fnmatch.filter(names, pattern)}
    missing = {
        name: f"{sources[name].what or name} ({sources[name].path}"
        + (f"; {sources[name].published})" if sources[name].published else ")")
        + f": {', '.join(rows)}"
        for name, rows in waiting.items()
    }
    return Study(study, cells, [planned for planned in cells if planned.name in chosen_names], missing)


def _typed(kind: type, values: Any, what: str) -> Any:
    """An instance of a dataclass, its values checked against their types."""
    if not isinstance(values, dict):
        raise ValueError(f"{what} is {values!r}; expected options and values")
    for key in values:
        check_name(key, [option.name for option in dataclasses.fields(kind)], f"option of {what}")
    parser = ArgumentParser(exit_on_error=False)
    plain = {key: value for key, value in values.items() if key not in _NESTED}
    parser.add_class_arguments(kind, "it", skip={*values.keys() - plain.keys()})
    try:
        parsed = parser.parse_object({"it": plain}).it.as_dict()
    except Exception as error:
        raise ValueError(f"{what}: {error}") from error
    # data sets and overrides may hold a class_path, which this parser would take for its own
    return kind(**{key: parsed[key] for key in plain}, **{key: values[key] for key in values.keys() - plain.keys()})


def _drop_missing(name: str, raw: dict[str, Any], sources: dict[str, Source], waiting: dict[str, list[str]]) -> bool:
    """Takes test sets that are not on disk out of a cell, and writes down what waits for what; False for a cell that
    cannot run at all."""

    def lacking(value: Any) -> list[str]:
        return [source for source in _names(value, sources) if not Path(sources[source].place).exists()]

    for option in ("test", "scores"):
        kept = {}
        for label, value in raw.get(option, {}).items():
            for source in lacking(value):
                waiting.setdefault(source, []).append(f"{name} on {label}")
            if not lacking(value):
                kept[label] = value
        if option in raw:
            raw[option] = kept
    blocking = lacking({key: value for key, value in raw.items() if key not in ("test", "scores")})
    for source in dict.fromkeys(blocking):
        waiting.setdefault(source, []).append(name)
    return not blocking


def _of_fit(raw: dict[str, Any], written: dict[str, str]) -> dict[str, str]:
    """Overrides of a training's config that put the study's data where the config names them by their path."""
    found: dict[str, str] = {}
    if raw.get("fit") and Path(raw["fit"]).is_file():
        for key, value in _flat(yaml.safe_load(Path(raw["fit"]).read_text(encoding="utf-8"))):
            for name, path in written.items():
                if isinstance(value, str) and (value == path or value.startswith(f"{path}/")):
                    found[key] = f"${{{name}}}{value.removeprefix(path)}"
    return found


def _flat(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _flat(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield from _flat(inner, f"{key}.{i}")
    else:
        yield key, value


def _names(value: Any, sources: dict[str, Source]) -> list[str]:
    """The sources that a value names as ``${NAME}``."""
    found = [name for _, text in _flat(value) if isinstance(text, str) for name in re.findall(r"\$\{([^}]+)\}", text)]
    for name in found:
        check_name(name, sources, "data")
    return list(dict.fromkeys(found))


def _fill(value: Any, sources: dict[str, Source]) -> Any:
    """A value with the paths of the sources that it names."""
    if isinstance(value, dict):
        return {key: _fill(inner, sources) for key, inner in value.items()}
    if isinstance(value, list):
        return [_fill(inner, sources) for inner in value]
    if isinstance(value, str):
        return re.sub(r"\$\{([^}]+)\}", lambda match: sources[match[1]].place, value)
    return copy.copy(value)


def _keys(cell: Cell, raw: dict[str, Any], sources: dict[str, Source]) -> tuple[str, str, str]:
    """A cell's keys: hashes of its options as they are written, of its config and of the files it reads."""
    complete = {option: raw.get(option, getattr(cell, option)) for option in _OPTIONS}

    def part(options: Iterable[str], *more: Any) -> str:
        chosen = {option: complete[option] for option in options}
        paths = [sources[source].place for source in _names(chosen, sources)]
        named = [chosen.get(option) for option in ("fit", "encoder", "weights", "train")]
        named += [*chosen.get("test", {}).values()]
        paths += [text for text in named if isinstance(text, str) and os.path.exists(text)]
        return _hash(chosen, [_fingerprint(path) for path in paths], *more)

    training = part(_TRAINING) if cell.fit else ""
    probe = part([option for option in _OPTIONS if option not in (*_TRAINING, *_FREE)], cell.seeds, training)
    return training, part(["scores", "task", "encoder"], training), probe


def _hash(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:12]


@functools.cache
def _fingerprint(path: str) -> str:
    """A hash of a file's content, or of the names and sizes of a folder's files."""
    found = hashlib.sha256()
    if Path(path).is_file():
        with open(path, "rb") as file:
            while block := file.read(2**24):
                found.update(block)
    else:
        for root, folders, files in os.walk(path, followlinks=True):
            folders.sort()
            for name in sorted(files):
                place = Path(root, name)
                found.update(f"{place.relative_to(path)} {place.stat().st_size}\n".encode())
    return found.hexdigest()
