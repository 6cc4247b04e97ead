"""What was measured on GPUs, and by name what was not, as Markdown.

python benchmarks/gpu_page.py > docs/gpu-results.md     of all of benchmarks/results/gpu-*.json

A section of `gpu.py` that no file has, or that failed, is told as not measured.
"""

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
SECTIONS = {
    "checks": "neighbours of hard inputs against float64 brute force",
    "rates": "the search over all pairs beside the matrix product and other searches",
    "layer": "a layer of ImageNet's size",
    "apart": "banks in main memory: whole on a GPU, through it in tiles, on several",
    "member": "a trained CIFAR-10 member: votes at every probe against the CPU and float64, checkpoint to depth table",
    "images": "images a second, decoding and forward pass, also compiled and as a CUDA graph, ResNet50 at 224 x 224",
    "training": "members trained at once, one after another, in CUDA graphs",
}
# What no section of gpu.py looks at.
OUTSIDE = (
    "this tree, where it is not the commit that a table above is of: a share of .6 at D = 512 is not shown yet",
    "screens in int8, where no table above has them",
    "GPUs other than those above, on which shapes of tiles are tried out",
    "runs on a GPU, with `engine.placement: device` or another, `decoder: nvjpeg`, `at_once` or `cuda_graph`, and "
    "`leadline doctor` there",
    "the tests that need a GPU",
)
NAMES = {
    "matrix product in bfloat16": "product",
    "leadline, without pruning": "nothing pruned",
    "leadline": "pruned",
    "leadline in int8, without pruning": "int8, nothing pruned",
    "leadline in int8": "int8, pruned",
    "torch mm + topk in bfloat16": "mm + topk, bfloat16",
    "torch mm + topk in float32": "mm + topk, float32",
    "faiss GPU Flat": "faiss Flat",
}
EXACT_OTHERS = ("torch mm + topk in float32", "faiss GPU Flat")


def main() -> None:
    """Print the page."""
    files = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("gpu-*.json"))]
    print("# On GPUs\n")
    print(
        "Printed by `python benchmarks/gpu_page.py` from `benchmarks/results/gpu-*.json`, which `gpu.py` there wrote."
    )
    print("How the search works, and why it is exact: [decisions/0014](decisions/0014-exact-search-on-a-gpu.md).")
    missing = {**SECTIONS}
    for found in files:
        measured = {name: found[name] for name in SECTIONS if name in found and "failed" not in found[name]}
        versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items() if version)
        print(f"\n## {found['driver'].split(',')[0]}\n")
        print(f"`{found['command']}`, commit {found['commit']}; driver {found['driver'].split(', ', 1)[1]}, CUDA")
        print(f"{found['cuda']}, {versions}; {found['hardware']}.")
        for name, section in measured.items():
            missing.pop(name, None)
            print(f"\n### {SECTIONS[name][0].upper()}{SECTIONS[name][1:]}\n")
            PRINTED[name](section)
    print("\n## Not measured\n")
    print("On a GPU of yours: `python benchmarks/gpu.py OUT.json`, which says there what could not be measured.\n")
    unmeasured = dict.fromkeys(line for found in files for line in found["unmeasured"])
    for line in [*missing.values(), *unmeasured, *OUTSIDE]:
        print(f"- {line}")


def checks(section: dict[str, Any]) -> None:
    wrong = section["wrong"]
    print(f"{section['cases']} cases, {len(wrong)} wrong{': ' if wrong else ''}{', '.join(wrong)}.")


def rates(section: dict[str, Any]) -> None:
    rows = {title: row for title, row in section.items() if isinstance(row, dict)}
    ways = [name for name in NAMES if any(name in row["medians"] for row in rows.values())]
    print("262,144 rows as queries and bank, k = 30: seconds, medians of three in turns, the bank made ready in each.")
    print(
        "Shares: of the product's rate. Times: what the fastest other exact search takes, in Leadline's; mm + topk in"
    )
    print("bfloat16 is not exact.\n")
    shares = ("share, nothing pruned", "pruned")
    heads = (*(NAMES[name] for name in ways), *shares, "times, nothing pruned", "pruned", "first search", "exact in 64")
    _head(["rows", *heads])
    for title, row in rows.items():
        medians = row["medians"]
        seconds = [f"{medians[name]:.3f}" if name in medians else "" for name in ways]
        rates_ = [f"{row[name]:.3f}" for name in ("fraction_of_product", "fraction_with_pruning")]
        others = min(medians[name] for name in EXACT_OTHERS if name in medians)
        times = [f"{others / medians[name]:.1f}" for name in ("leadline, without pruning", "leadline")]
        first = f"{row['first']['leadline, without pruning']:.1f}" if "first" in row else "not kept"
        _row([title, *seconds, *rates_, *times, first, "yes" if row["equal_to_float64"] else "no"])


def layer(section: dict[str, Any]) -> None:
    _head(["rows", "queries", "bank", "D", "s", "peak GB", "pairs multiplied", "rows measured a query", "exact in 64"])
    for title, row in section.items():
        if isinstance(row, dict):
            sizes = [f"{row[name]:,}" for name in ("queries", "bank", "width")]
            told = [f"{row['seconds']:.1f}", f"{row['peak_bytes'] / 1e9:.1f}", f"{row['pairs_of_all']:.1%}"]
            measured = f"{row['rows_measured_a_query']:.1f}"
            _row([title, *sizes, *told, measured, "yes" if row["equal_to_float64"] else "no"])


def apart(section: dict[str, Any]) -> None:
    print(f"{section['rows']:,} rows of {section['width']:,} values as queries and bank, all of the call in it.\n")
    _head(["bank", "s"])
    for name, seconds in section["medians"].items():
        _row([name, f"{seconds:.2f}"])
    print(f"\nNeighbours {'are the same in all' if section['same'] else 'differ'}.")


def member(section: dict[str, Any]) -> None:
    _head(["probe", "D", "votes as on the CPU", "votes as in float64"])
    for row in section["votes"]:
        answers = ["yes" if row[name] else "no" for name in ("as_cpu", "as_float64")]
        _row([row["probe"], f"{row['width']:,}", *answers])
    whole = section["end_to_end"]
    tables = "; ".join(f"{name}, {table['points']:,} points" for name, table in whole["tables"].items())
    shares = ", ".join(f"{name} {share:.0%}" for name, share in whole["shares"].items())
    print(f"\nFrom a checkpoint to tables of depths ({tables}): {whole['seconds']:.1f} s, peak")
    print(f"{whole['peak_bytes'] / 1e9:.1f} GB; {shares}.")


def images(section: dict[str, Any]) -> None:
    for title, ways in section.items():
        if title.endswith("_per_second"):
            _turns(title.removesuffix("_per_second").replace("_", " "), ways, "images a second")


def training(section: dict[str, Any]) -> None:
    for title, ways in section["member_steps_per_second"].items():
        _turns(f"{title}, {section['members']} members", ways, "steps a second")


PRINTED = {function.__name__: function for function in (checks, rates, layer, apart, member, images, training)}


def _turns(title: str, ways: dict[str, dict[str, Any]], unit: str) -> None:
    _head([title, unit])
    for name, way in ways.items():
        _row([name, f"{way['median']:,.0f}" if "median" in way else f"not measured: {way['failed']}"])
    print()


def _head(names: list[str]) -> None:
    _row(names)
    print("|---" * len(names) + "|")


def _row(values: list[str]) -> None:
    print(f"| {' | '.join(values)} |")


if __name__ == "__main__":
    main()
