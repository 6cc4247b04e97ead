"""The claims of several studies side by side, as Markdown: what was measured in each, what holds there, what it gains.

python benchmarks/study_claims.py docs/study > docs/study-results.md     of every folder there that has a claims.csv
"""

import csv
from pathlib import Path
from typing import Annotated

import typer

Row = dict[str, str]
WAYS = {"early_read_out.csv": "early read-out", "trained_again.csv": "trained again"}


def main(folder: Annotated[Path, typer.Argument(exists=True, file_okay=False)]) -> None:
    """Print a table for each claim, and one of accuracies."""
    studies = [place.parent for place in sorted(folder.glob("*/claims.csv"))]
    print("# Claims, study by study\n")
    print("Printed by `python benchmarks/study_claims.py docs/study`. Intervals are of 95 % over members; how they are")
    print("judged, and in what words, is told in [study.md](study.md).")
    _print_accuracies(studies)
    claims: dict[str, list[tuple[Path, Row]]] = {}
    for study in studies:
        for row in _rows(study / "claims.csv"):
            claims.setdefault(row["claim"], []).append((study, row))
    for claim, rows in claims.items():
        print(f"\n## {claim}\n")
        print("| study | network | measured | value (95 % interval) | |\n|---|---|---|---|---|")
        for study, row in rows:
            print(f"| {_name(study)} | {row['architecture']} | {row['measured']} | {_value(row)} | {row['verdict']} |")


def _print_accuracies(studies: list[Path]) -> None:
    """Plain accuracy on the untouched part, what another way gives, and the gain: of members, and of their vote."""
    print("\n## Better accuracy\n")
    print("| study | network | way | of | plain | with it | gain (95 % interval) |\n|---|---|---|---|---|---|---|")
    for study in studies:
        for file, way in WAYS.items():
            rows = {(row["architecture"], row.get("run", ""), row["what"]): row for row in _rows(study / file)}
            for (network, run, what), row in rows.items():
                if what.endswith(", gain"):
                    of = what.removesuffix(", gain")
                    plain, other = (rows[network, run, f"{of}, {name}"] for name in ("plain", way))
                    how = f"{way} ({run.rpartition('-')[2]})" if run else way
                    values = " | ".join(f"{float(one['value']):.4f}" for one in (plain, other))
                    print(f"| {_name(study)} | {network} | {how} | {of} | {values} | {_value(row)} |")


def _rows(place: Path) -> list[Row]:
    if not place.exists():  # a study that could say nothing of it
        return []
    with place.open(newline="") as file:
        return list(csv.DictReader(file))


def _name(study: Path) -> str:
    return f"[{study.name.removeprefix('study-')}](study/{study.name}/page.md)"


def _value(row: Row) -> str:
    value, *ends = (f"{float(row[name]):.4g}" if row[name] else "" for name in ("value", "low", "high"))
    return f"{value} ({ends[0]} to {ends[1]})" if all(ends) else value


if __name__ == "__main__":
    typer.run(main)
