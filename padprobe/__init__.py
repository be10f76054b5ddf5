"""padprobe: how much absolute position a CNN encodes, where it comes from, and what it does to the task."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from padprobe.callbacks.position_probe import PositionProbeCallback as PositionProbeCallback
    from padprobe.maps import position_maps as position_maps
    from padprobe.network.encoders import load_encoder as load_encoder
    from padprobe.network.padding import set_padding as set_padding
    from padprobe.network.stages import find_stages as find_stages
    from padprobe.probe.encoder import probe_encoder as probe_encoder
    from padprobe.readout.posenet import PosENet as PosENet
    from padprobe.readout.spec import Readout as Readout
    from padprobe.scores import spearman as spearman

__version__ = "0.1.0"

_HOME = {
    "PositionProbeCallback": "padprobe.callbacks.position_probe",
    "PosENet": "padprobe.readout.posenet",
    "Readout": "padprobe.readout.spec",
    "probe_encoder": "padprobe.probe.encoder",
    "position_maps": "padprobe.maps",
    "spearman": "padprobe.scores",
    "set_padding": "padprobe.network.padding",
    "find_stages": "padprobe.network.stages",
    "load_encoder": "padprobe.network.encoders",
}
__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used: `padprobe --help` need not wait for torch."""
    if name not in _HOME:
        raise AttributeError(f"module 'padprobe' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
