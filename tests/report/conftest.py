"""Results made up for the report's tests, and a reader of its pages."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd

from padprobe.maps import position_maps
from padprobe.results import COLUMNS, RUNS, Results

TARGETS = ("H", "V", "G", "HS")


def run_row(
    run, encoder, weights, task, padding, seed=0, group=None, pair=None, shown_px=96, embedding=""
) -> pd.DataFrame:
    """A run's line of runs.csv; by default it is a group and a pair of its own, at 96 px."""
    labels = (run, group or run, pair or run, encoder, weights, task, padding, embedding, seed)
    return pd.DataFrame([(*labels, 96, 96, shown_px, 96, 96, shown_px, 400, f"how {run} was made")], columns=list(RUNS))


def probed(
    run, encoder, weights, task, padding, spc, seed=0, stimuli=("black", "scenes"), rgb=0.02, **labels
) -> Results:
    """One run's readouts, on every stimulus: SPC of target number i is ``spc`` - .001 i."""
    rows, maps = [], {}
    truth = dict(zip(TARGETS, position_maps(8, TARGETS).numpy(), strict=True))
    for stimulus in stimuli:
        n = 1 if stimulus in ("black", "white") else 40
        for stages, level in (("all", spc), ("rgb", rgb)):
            for i, target in enumerate(TARGETS):
                readout = ("posenet", 3, 1, 0, "unit", stages)
                place = (run, encoder, weights, task, padding, seed, *readout, stimulus, target)
                value = level - 0.001 * i
                low, high = (value - 0.01, value + 0.01) if n > 1 else (np.nan, np.nan)
                rows += [
                    (*place, "spc", value, low, high, n),
                    (*place, "mae", 0.25 * (1 - level), np.nan, np.nan, n),
                    (*place, "nmae", 1 - level, np.nan, np.nan, n),
                    (*place, "constant", 7 if stages == "rgb" and n > 1 else 0, np.nan, np.nan, n),
                ]
                if stages == "all":
                    prediction = (level * truth[target] + (1 - level) / 2).astype(np.float32)
                    maps[f"{run}/{stimulus}/{target}/prediction"] = prediction
                    maps[f"{run}/{stimulus}/{target}/error"] = np.abs(prediction - truth[target])
    runs = run_row(run, encoder, weights, task, padding, seed, **labels)
    return Results(pd.DataFrame(rows, columns=list(COLUMNS)), runs=runs, maps=maps)


class Page(HTMLParser):
    """The tags, links and table rows of a page; a cell is the list of its lines."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.rows: list[list[list[str]]] = []
        self.tables: list[list[list[list[str]]]] = []
        self.captions: list[str] = []
        self.headings: list[str] = []
        self.folder, self.text = path.parent, path.read_text(encoding="utf-8")
        self.feed(self.text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href", "srcset", "action")]
        if tag == "table":
            self.tables.append([])
            self.captions.append("")
        elif tag == "tr":
            self.rows.append([])
            self.tables[-1].append(self.rows[-1])
        elif tag in ("td", "th"):
            self.rows[-1].append([])

    def handle_data(self, data):
        open_tag = next((t for t in reversed(self.tags) if t != "small"), "")
        if open_tag in ("td", "th") and data.strip():
            self.rows[-1][-1].append(data.strip())
        elif open_tag == "caption":
            self.captions[-1] += data.strip()
        elif open_tag == "h2" and data.strip():
            self.headings.append(data.strip())

    def row(self, name: str, table: int = 0) -> list[list[str]]:
        """The table-th row that starts with a name."""
        return [row for row in self.rows if row[0] == [name]][table]
