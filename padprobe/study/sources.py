"""Data and weights on disk that a study calls by name, as ``${NAME}`` in any of its values."""

from __future__ import annotations

import functools
import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from padprobe.errors import check_name

_REFERENCE = re.compile(r"\$\{([^}]+)\}")


@dataclass
class Source:
    """A folder or file that a study needs: its path, a description for people, and where it can be downloaded.

    Example:
        >>> Source("$PADPROBE_DATA/ECSSD", "ECSSD, 1,000 images", "https://a.b").describe("ECSSD")
        'ECSSD, 1,000 images ($PADPROBE_DATA/ECSSD; https://a.b)'
    """

    path: str
    what: str = ""
    published: str = ""

    @property
    def place(self) -> str:
        """The path with the values of its environment variables."""
        return os.path.expanduser(os.path.expandvars(self.path))

    def describe(self, name: str) -> str:
        """What it is (by default its name), where it was looked for, and where it is published."""
        return f"{self.what or name} ({'; '.join(filter(None, (self.path, self.published)))})"


def leaves(value: Any) -> Iterator[Any]:
    """All values inside nested lists and mappings."""
    if isinstance(value, (dict, list)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from leaves(inner)
    else:
        yield value


def names_in(value: Any, sources: Mapping[str, Source]) -> list[str]:
    """The sources that a value names, each once.

    Raises:
        ValueError: for a name that the study does not have.
    """
    names = [name for text in leaves(value) if isinstance(text, str) for name in _REFERENCE.findall(text)]
    for name in names:
        check_name(name, sources, "data")
    return list(dict.fromkeys(names))


def fill(value: Any, sources: Mapping[str, Source]) -> Any:
    """A copy of a value, with each ``${NAME}`` replaced by the source's path.

    Example:
        >>> fill(["${VOC}/images", 3], {"VOC": Source("/data/VOC")})
        ['/data/VOC/images', 3]
    """
    if isinstance(value, dict):
        return {key: fill(inner, sources) for key, inner in value.items()}
    if isinstance(value, list):
        return [fill(inner, sources) for inner in value]
    if isinstance(value, str):
        return _REFERENCE.sub(lambda match: sources[match[1]].place, value)
    return value


@functools.cache
def fingerprint(path: str) -> str:
    """A hash of a file's content, or of the names and sizes of all files in a folder."""
    digest = hashlib.sha256()
    if Path(path).is_file():
        with open(path, "rb") as file:
            while block := file.read(2**24):
                digest.update(block)
    seen: set[str] = set()
    for root, folders, files in os.walk(path, followlinks=True):
        if (real := os.path.realpath(root)) in seen:  # a link to a parent
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        for name in sorted(files):
            place = Path(root, name)
            digest.update(f"{place.relative_to(path)} {place.stat().st_size}\n".encode())
    return digest.hexdigest()
