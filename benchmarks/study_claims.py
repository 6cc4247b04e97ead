"""The claims of several studies side by side, as Markdown: what was measured in each, and whether it holds there.

python benchmarks/study_claims.py docs/study > docs/study-results.md     of every folder there that has a claims.csv
"""

import csv
from pathlib import Path
from typing import Annotated

import typer

Row = dict[str, str]


def main(folder: Annotated[Path, typer.Argument(exists=True, file_okay=False)]) -> None:
    """Print a table for each claim."""
    found: dict[str, list[tuple[str, Row]]] = {}
    for place in sorted(folder.glob("*/claims.csv")):
        with place.open(newline="") as file:
            for row in csv.DictReader(file):
                found.setdefault(row["claim"], []).append((place.parent.name, row))
    print("# Claims, study by study\n")
    print("Printed by `python benchmarks/study_claims.py docs/study`. Intervals are of 95 % over members; how they are")
    print("judged, and in what words, is told in [study.md](study.md).")
    for claim, rows in found.items():
        print(f"\n## {claim}\n")
        print("| study | network | measured | value (95 % interval) | |\n|---|---|---|---|---|")
        for study, row in rows:
            name = f"[{study.removeprefix('study-')}](study/{study}/page.md)"
            print(f"| {name} | {row['architecture']} | {row['measured']} | {_value(row)} | {row['verdict']} |")


def _value(row: Row) -> str:
    value, *ends = (f"{float(row[name]):.4g}" if row[name] else "" for name in ("value", "low", "high"))
    return f"{value} ({ends[0]} to {ends[1]})" if all(ends) else value


if __name__ == "__main__":
    typer.run(main)
