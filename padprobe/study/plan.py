"""Reads a study's YAML, with what it includes, its presets and changes, and plans its cells."""

from __future__ import annotations

import copy
import dataclasses
import fnmatch
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from padprobe.errors import check_name, check_type
from padprobe.readout.spec import Readout
from padprobe.report.declared import read_claims, read_tables
from padprobe.study.cell import OPTIONS, Cell, Planned, describe, keys_of, typed
from padprobe.study.sources import Source, fill, fingerprint, names_in

_TOP = {
    "title": str,
    "text": str,
    "include": list[str],
    "anchors": Any,
    "data": dict[str, dict[str, Any]],
    "presets": dict[str, dict[str, Any]],
    "encoders": dict[str, dict[str, Any]],
    "tables": list[dict[str, Any]],
    "claims": list[dict[str, Any]],
    "references": dict[str, Any],
}
"""The keys of a study's YAML, and their types; every other key is an option of all encoders."""
_LISTS = ("tables", "claims", "references")
_ENCODER_PADDING = "model.init_args.encoder_padding"


@dataclass
class References:
    """A CSV of numbers to set beside ours, by its path from the YAML, and the difference up to which SPCs are equal."""

    file: str
    tolerance: float | None = None


@dataclass
class Study:
    """What can be run, and what cannot.

    Attributes:
        name: the YAML's name without folder and ending.
        paths: the absolute paths of its YAMLs.
        cells: all that can run, in order.
        chosen: those to run now.
        missing: by name of a data set or weights that are not on disk: what it is, and what needs it.
        about: its title, text, tables, claims and tolerance, as written.
        references: paths of CSVs, see :class:`References`.
    """

    name: str
    paths: list[str]
    cells: list[Planned]
    chosen: list[Planned]
    missing: dict[str, str]
    about: dict[str, Any]
    references: list[str]


def read_study(
    paths: str | Path | Sequence[str | Path],
    preset: str | None = None,
    changes: Iterable[str] = (),
    only: Iterable[str] = (),
) -> Study:
    """Reads a study's YAML.

    Its keys are the options of :class:`~padprobe.study.cell.Cell`, for every encoder that does not state them itself,
    and: ``encoders`` (options by name), ``data`` (:class:`~padprobe.study.sources.Source` by name), ``presets``
    (changes by name), ``include`` (other studies, by path from this one), ``title``, ``text``, ``tables``, ``claims``
    and ``references`` (what the report shows) and ``anchors`` (anything, for YAML's aliases). An encoder that several
    included studies state is one encoder, with the readouts and scores of all.

    Args:
        paths: the YAML; several are one study that includes them.
        preset: one of the study's ``presets``, applied before the changes.
        changes: ``key=value``, such as ``limit_train=500`` or ``encoders.vgg16.weights=untrained``.
        only: names of cells, or patterns such as ``sod-*``; all if empty.

    Raises:
        ValueError: naming the missing file, or the key or value that a study cannot have.
    """
    fingerprint.cache_clear()
    files = [Path(path) for path in ([paths] if isinstance(paths, (str, Path)) else paths)]
    name = "+".join(file.stem for file in files)
    tree: dict[str, Any] = {}
    try:
        for file in files:
            tree = _merge(tree, _read(file, ()))
        for part in ("encoders", "data"):  # two aliases in YAML are one object, but a change is for one encoder
            tree[part] = {key: copy.deepcopy(value) for key, value in tree[part].items()}
        presets = tree.pop("presets")
        if preset is not None:
            check_name(preset, presets, "preset")
            for key, value in presets[preset].items():
                _change(tree, key, copy.deepcopy(value))
        for change in changes:
            key, equals, value = change.partition("=")
            if not equals:
                raise ValueError(f"change {change!r}; expected key=value, such as limit_train=500")
            _change(tree, key, yaml.safe_load(value))
        return _plan(name, [str(file.resolve()) for file in files], tree, list(only))
    except RecursionError as error:
        raise ValueError(f"study {name!r}: a value refers to itself: an alias is inside its own anchor") from error
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"study {name!r}: {error}") from error


def _read(path: Path, parents: tuple[Path, ...]) -> dict[str, Any]:
    """A study's YAML with everything that it includes."""
    if not path.is_file():
        raise ValueError(f"no study {str(path)!r}")
    if path.resolve() in parents:
        raise ValueError(f"{str(path)!r} includes itself")
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    check_type(content, dict[str, Any], repr(str(path)))
    for key, value in content.items():
        check_name(key, [*_TOP, *OPTIONS], "option of a study")
        check_type(value, _TOP.get(key, Any), f"{key} of {str(path)!r}")
    content.pop("anchors", None)
    if "references" in content:
        references = typed(References, content["references"], "references")
        content["references"] = [str(path.parent / references.file)]
        content["tolerance"] = references.tolerance
    merged: dict[str, Any] = {}
    for included in content.pop("include", []):
        merged = _merge(merged, _read(path.parent / included, (*parents, path.resolve())))
    return _merge(merged, content)


def _merge(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Two studies in one: the second's options replace the first's; lists are joined, and encoders of one name."""
    merged = {**first, **second}
    for part in _LISTS:
        merged[part] = _union(first.get(part, []), second.get(part, []))
    for part, merge in _MERGES.items():
        merged[part] = dict(first.get(part, {}))
        for name, value in second.get(part, {}).items():
            merged[part][name] = merge(name, merged[part][name], value) if name in merged[part] else value
    return merged


def _merge_encoder(name: str, first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    merged = {**first, **second}
    defaults: dict[str, Any] = {"readouts": [{}], "scores": {}}
    for key in merged:
        one, other = (options.get(key, defaults.get(key)) for options in (first, second))
        if key == "readouts" and isinstance(one, list) and isinstance(other, list):
            merged[key] = _union(one, other)
        elif key == "scores" and isinstance(one, dict) and isinstance(other, dict):
            merged[key] = {**one, **other}
        elif one != other:
            raise ValueError(
                f"encoder {name!r} is included with {key} {one!r} and with {other!r}: give one of them another name"
            )
    return merged


_MERGES: dict[str, Callable[[str, Any, Any], Any]] = {
    "data": lambda name, first, second: second,
    "presets": lambda name, first, second: {**first, **second},
    "encoders": _merge_encoder,
}


def _union(first: list[Any], second: list[Any]) -> list[Any]:
    return [*first, *(value for value in second if value not in first)]


def _change(tree: dict[str, Any], key: str, value: Any) -> None:
    """Sets one value of a study by its dotted key."""
    first, *rest = key.split(".")
    if first == "encoders" and len(rest) >= 2:
        name, option, *parts = rest
        check_name(name, tree["encoders"], "encoder")
        options = tree["encoders"][name]
        if parts:  # a change of one of the overrides, say
            options, option = options.setdefault(option, {}), ".".join(parts)
            check_type(options, dict[str, Any], key)
        options[option] = value
    elif first == "data" and len(rest) == 2:
        check_name(rest[0], tree["data"], "data")
        tree["data"][rest[0]][rest[1]] = value
    else:
        check_name(key, [*OPTIONS, "encoders.NAME.OPTION", "data.NAME.path"], "option of a study")
        tree[key] = value


def _plan(name: str, paths: list[str], tree: dict[str, Any], only: list[str]) -> Study:
    """The cells of a merged and changed tree."""
    tables, claims, references = (tree.pop(part) for part in _LISTS)
    read_tables(tables)
    read_claims(claims)
    about = {key: tree.pop(key, default) for key, default in (("title", name), ("text", ""), ("tolerance", None))}
    about |= {"tables": tables, "claims": claims}
    encoders = tree.pop("encoders")
    if not encoders:
        raise ValueError("it has no encoders")
    sources = {key: typed(Source, values, f"data {key!r}") for key, values in tree.pop("data").items()}
    cells: list[Planned] = []
    waiting: dict[str, list[str]] = {}
    for encoder, options in encoders.items():
        for run, written in _modes(encoder, options, tree):
            if any(planned.group == run for planned in cells):
                raise ValueError(f"runs of two encoders would both be called {run!r}: give one encoder another name")
            cells += _cells(run, written, sources, waiting)
    _check_names(cells)
    names = [planned.name for planned in cells]
    for pattern in only:
        if not fnmatch.filter(names, pattern):
            check_name(pattern, [*names, *(row for rows in waiting.values() for row in rows)], "cell")
    chosen = {match for pattern in only or ["*"] for match in fnmatch.filter(names, pattern)}
    missing = {
        key: f"{sources[key].describe(key)} not found, needed for {', '.join(rows)}" for key, rows in waiting.items()
    }
    return Study(
        name, paths, cells, [planned for planned in cells if planned.name in chosen], missing, about, references
    )


def _modes(encoder: str, options: dict[str, Any], common: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The runs that an encoder's paddings and position embeddings make: name and options."""
    written = {**common, **options}
    padding, written = written.get("padding"), {**written, "pair": written.get("pair") or encoder}
    stated, overrides = padding if isinstance(padding, list) else options.get("padding"), written.get("overrides")
    if stated and isinstance(overrides, dict) and _ENCODER_PADDING in overrides:
        raise ValueError(f"encoder {encoder!r} states padding and overrides {_ENCODER_PADDING}: state one of them")
    listed: dict[str, list[str]] = {}
    for option in ("padding", "position_embedding"):
        if isinstance(modes := written.get(option), list):
            check_type(modes, list[str], f"{option} of encoder {encoder!r}")
            if not modes:
                raise ValueError(f"{option} of encoder {encoder!r} is empty; expected at least one mode")
            listed[option] = list(dict.fromkeys(modes))
    for chosen in itertools.product(*listed.values()):
        yield "-".join([encoder, *chosen]), {**written, **dict(zip(listed, chosen, strict=True))}


def _cells(
    run: str, written: dict[str, Any], sources: Mapping[str, Source], waiting: dict[str, list[str]]
) -> list[Planned]:
    """The cells of one run, one per seed where its weights depend on the seed; none where data are missing."""
    what = f"encoder {run!r}"
    if isinstance(written.get("readouts"), list):
        readouts = [typed(Readout, readout, f"readout of {what}") for readout in written["readouts"]]
        written = {**written, "readouts": readouts}
    cell = typed(Cell, written, what)
    stated = cell.overrides
    untrained = not cell.trained and cell.weights == "untrained"
    if cell.fit:
        needs = [(name, [keys] if isinstance(keys, str) else keys) for name, keys in cell.needs.items()]
        overrides = {key: f"${{{name}}}" for name, keys in needs for key in keys}
        overrides |= {_ENCODER_PADDING: cell.padding} if "padding" in written else {}
        cell.overrides = {**overrides, **stated}
    if untrained:
        cell.settle = written.get("settle", True)
        cell.task = cell.task or "untrained"
    if not _drop_missing(run, cell, sources, waiting):
        return []
    per_seed = bool(cell.fit) or untrained
    planned = []
    for seeds in [[seed] for seed in dict.fromkeys(cell.seeds)] if per_seed else [cell.seeds]:
        one = dataclasses.replace(cell, seeds=seeds)
        values = {name: fill(getattr(one, name), sources) for name in OPTIONS}
        folder = f"{run}-seed{seeds[0]}" if per_seed else run
        name = folder if per_seed and len(cell.seeds) > 1 else run
        planned.append(Planned(name, run, folder, Cell(**values), describe(one, stated), *keys_of(one, sources)))
    return planned


def _drop_missing(run: str, cell: Cell, sources: Mapping[str, Source], waiting: dict[str, list[str]]) -> bool:
    """Takes test sets that are not on disk out of a cell; returns whether the rest of it can run.

    ``waiting`` collects, for each missing source, what needs it.
    """

    def on_disk(value: Any, needed_for: str) -> bool:
        missing = [name for name in names_in(value, sources) if not Path(sources[name].place).exists()]
        for name in missing:
            waiting.setdefault(name, []).append(needed_for)
        return not missing

    for option in ("test", "scores"):
        values = getattr(cell, option)
        kept = {label: value for label, value in values.items() if on_disk(value, f"{run} on {label}")}
        setattr(cell, option, kept)
    return on_disk([getattr(cell, option) for option in OPTIONS], run)


def _check_names(cells: list[Planned]) -> None:
    """Raises ValueError where a run's name cannot be a folder's, or two runs share one."""
    owners: dict[str, str] = {}
    for planned in cells:
        name = planned.name
        if not re.fullmatch(r"[A-Za-z0-9._+-]+", name) or not name.strip("."):
            raise ValueError(f"encoder {name!r} has a name with odd characters: use letters, digits and ._+-")
        for label in dict.fromkeys((*planned.pairs, planned.folder, planned.group)):
            if label in owners and not owners[label] == label == planned.group:  # the seeds of a group share its name
                raise ValueError(
                    f"the encoders {owners[label]!r} and {planned.group!r} would both have a run called {label!r}: "
                    "give one of them another name"
                )
            owners[label] = planned.group
