"""The sections of a page about what a study states: its claims, its tables, its references, and its record."""

from __future__ import annotations

from collections import Counter

import pandas as pd

from padprobe.report.contents import readout_name
from padprobe.report.declared import read_tables
from padprobe.report.measurements import by_run
from padprobe.report.sections import Section, Table, between, number, render, sections_with_tables
from padprobe.results import Results


def claims_section(claims: pd.DataFrame) -> list[Section]:
    """Each claim with its verdict and the numbers behind it."""
    if claims.empty:
        return []
    verdicts = Counter(claims.drop_duplicates("claim")["claim_verdict"])
    text = (
        f"{sum(verdicts.values())} claims: {', '.join(f'{n} {verdict}' for verdict, n in verdicts.items())}. A claim "
        "holds where the 95% interval of every comparison keeps to the bound. It is undecided where an interval "
        "crosses the bound, and where Δ has no interval (a single untrained encoder) or η² has none (fewer than 10 "
        "images). Other numbers without an interval (one image, task scores) are compared by their value alone."
    )
    rows: list[tuple[str, list[str]]] = []
    for _, compared in claims.groupby("claim", sort=False):
        for i, row in enumerate(compared.to_dict("records")):
            value = number(row["value"])
            if row["ci_low"] < row["ci_high"]:
                value += f"\n[{number(row['ci_low'])}, {number(row['ci_high'])}]"
            first = [row["says"], row["claim_verdict"]] if i == 0 else ["", ""]
            rows.append(("run", [*first, row["part"], value, row["bound"], row["verdict"]]))
    columns = ["claim", "verdict", "comparison", "value", "bound", "of this comparison"]
    return [Section("Claims", text, [Table("", columns, rows, 3)])]


def declared_sections(results: Results, table: pd.DataFrame) -> list[Section]:
    """The tables that the study declares, as far as they were measured."""
    sections = []
    for spec in read_tables(results.about.get("tables") or []):
        if rendered := render(spec, by_run(table), "network"):
            rendered.caption = ""
            sections.append(Section(spec.title, spec.text, [rendered]))
    return sections


def difference_sections(table: pd.DataFrame, tolerance: float | None) -> list[Section]:
    """How many values have a reference, how many are near it, and the others, largest difference first; and how many
    references match no measurement."""
    pairs = [
        {**row, "source": source, "theirs": theirs, "difference": row["value"] - theirs}
        for row in table[~table["single"]].to_dict("records")
        for source, theirs in row["references"].items()
    ]
    lines = []
    for source, metric in dict.fromkeys((pair["source"], pair["metric"]) for pair in pairs):
        alike = [abs(pair["difference"]) for pair in pairs if (pair["source"], pair["metric"]) == (source, metric)]
        near = sum(difference <= tolerance for difference in alike) if tolerance is not None else 0
        within = f", {near} of them within {tolerance:g}" if tolerance is not None else ""
        lines.append(f"{metric}: {len(alike)} values have a reference ({source}){within}.")
    lines += [
        f"{left} of the {n} references of {source} match no measurement."
        for source, (n, left) in table.attrs["unmatched"].items()
        if left
    ]
    far = sorted((p for p in pairs if abs(p["difference"]) > (tolerance or 0)), key=lambda p: -abs(p["difference"]))
    rows = []
    for p in far:
        labels = [p["run"], readout_name(p), p["stimulus"], p["target"], p["metric"]]
        ours = f"{number(p['value'])}\n{between(p)}".strip()
        rows.append(("run", [*labels, ours, f"{p['source']} {number(p['theirs'])}", number(p["difference"], sign="+")]))
    columns = ["run", "readout", "stimulus", "target", "metric", "here", "reference", "difference"]
    shown = [Table("The others, largest first" if tolerance else "", columns, rows, 5)] if rows else []
    return [Section("Differences from the references", " ".join(lines), shown)] if lines else []


def record_sections(results: Results) -> list[Section]:
    """What was not measured, and how the rest was."""
    made = results.runs[results.runs["how"].fillna("") != ""]
    return sections_with_tables(
        ("What is missing, and why", "", [_listed(results.missing, ["what", "why"])]),
        ("How each run was made", "", [_listed(made, ["run", "how"])]),
    )


def _listed(table: pd.DataFrame, columns: list[str]) -> Table | None:
    rows = [("run", [str(row[column]) for column in columns]) for row in table.to_dict("records")]
    return Table("", columns, rows, len(columns)) if rows else None
