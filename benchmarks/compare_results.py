"""Compares the numbers of two results folders: were they changed by a change of the code?

    python benchmarks/compare_results.py runs/before runs/after --rename ss-zeros-p0=ss-p0-zeros

Prints the measurements that differ by more than the tolerance, and those that only one folder has. Exits with 1 if a
number differs.
"""

from __future__ import annotations

import argparse

from padprobe.results import READOUT, Results

KEYS = ["run", "seed", *READOUT, "stimulus", "target", "metric"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", metavar="DIR")
    parser.add_argument("after", metavar="DIR")
    parser.add_argument("--rename", nargs="*", default=[], metavar="OLD=NEW", help="runs of the first folder to rename")
    parser.add_argument("--tolerance", type=float, default=0.0, help="differences up to this are none (default 0)")
    options = parser.parse_args()
    names = dict(pair.split("=") for pair in options.rename)
    before, after = (Results.load(folder).rows for folder in (options.before, options.after))
    before = before.assign(run=before["run"].replace(names))
    tables = [
        table.assign(**{key: table[key].astype(str) for key in KEYS}).drop_duplicates(KEYS) for table in (before, after)
    ]
    merged = tables[0].merge(tables[1], on=KEYS, how="outer", suffixes=("_before", "_after"), indicator=True)
    shared = merged[merged["_merge"] == "both"]
    difference = (shared["value_after"] - shared["value_before"]).abs()
    changed = shared[difference > options.tolerance]
    print(f"{len(shared)} shared measurements, {len(changed)} differ by more than {options.tolerance:g}")
    if len(changed):
        print(changed[[*KEYS, "value_before", "value_after"]].to_string(index=False))
    for side, name in (("left_only", options.before), ("right_only", options.after)):
        alone = merged[merged["_merge"] == side]
        if len(alone):
            print(f"\nonly in {name}: {len(alone)}")
            print(alone.groupby(["run", "readout", "stages", "metric"], sort=False).size().to_string())
    return int(len(changed) > 0)


if __name__ == "__main__":
    raise SystemExit(main())
