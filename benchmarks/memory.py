"""The memory of a run whose embeddings are ten times what a worker may take.

python benchmarks/memory.py --out DIRECTORY     an untrained network with wide layers over JPEGs that are written here

`engine.memory_budget` is for a worker's whole process: Python, its libraries, the network, and what it searches in.
Writes benchmarks/results/memory-PROCESSOR.json.
"""

import os
import sys
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from PIL import Image
from record import stamp, write_result

import leadline
from leadline.report.status import status_of

PACKAGES = ("leadline", "torch", "numba", "numpy", "ray")
IMAGES, SIDE, CHANNELS, LAYERS = 1_200, 32, 64, 44  # widths of 64 x 32 x 32 values


def write_images(folder: Path) -> None:
    """JPEGs of ten classes: two gratings each, in noise."""
    random = np.random.default_rng(0)
    y, x = np.mgrid[:SIDE, :SIDE] / SIDE
    for i in range(IMAGES):
        place = folder / f"class{i % 10}"
        place.mkdir(parents=True, exist_ok=True)
        waves = np.sin(2 * np.pi * ((i % 10 + 1) * x / 2 + random.uniform())) + np.cos(2 * np.pi * (i % 7) * y / 2)
        pixels = 128 + 40 * waves[..., None] + random.normal(0, 20, (SIDE, SIDE, 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(place / f"{i:05d}.jpg")


def main(
    out: Annotated[Path, typer.Option(help="a folder for images, embeddings and the run")],
    budget: Annotated[int, typer.Option(help="bytes: engine.memory_budget")] = 1280 << 20,
) -> None:
    if not (out / "images").exists():
        write_images(out / "images")
    (out / "wide.py").write_text(
        "from torch import nn\n"
        "def wide(channels, layers):\n"
        "    sizes = [3] + [channels] * layers\n"
        "    pairs = zip(sizes, sizes[1:])\n"
        "    layers = [nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.ReLU()) for a, b in pairs]\n"
        "    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))\n"
    )
    os.environ["PYTHONPATH"] = f"{out.absolute()}:{os.environ.get('PYTHONPATH', '')}"
    sys.path.insert(0, str(out.absolute()))
    config = {
        "name": "wide",
        "points": {"source": "image-folder", "train": str(out / "images"), "resize": SIDE, "crop": SIDE},
        "members": [
            {
                "architecture": "wide:wide",
                "parameters": {"channels": CHANNELS, "layers": LAYERS},
                "probes": [f"{i}" for i in range(LAYERS)],
            }
        ],
        "engine": {
            "memory_budget": budget, "scratch": str(out / "scratch"), "query_block": 2500, "shard_size": 1024,
            "batch_size": 8, "workers": 2,
        },
    }  # fmt: skip
    run = leadline.run(config, out / "run")
    widths = run.sql("SELECT name, width, plan FROM probes ORDER BY probe").to_pylist()
    embeddings = sum(4 * IMAGES * row["width"] for row in widths)
    resident = sorted(worker["peak_memory"] for worker in status_of(run.directory)["workers"])
    print(f"embeddings {embeddings / 2**20:,.0f} MiB, {embeddings / budget:.1f} times the budget")
    print(f"budget of a worker {budget / 2**20:,.0f} MiB")
    print(f"peak of each worker, all that the kernel counts: {[round(size / 2**20) for size in resident]} MiB")
    write_result(
        "memory",
        {
            **stamp(PACKAGES, 1), "images": IMAGES, "probes": widths, "embeddings_bytes": embeddings,
            "memory_budget": budget, "peak_resident_bytes": resident, "stages": run.manifest["stages"],
        },
    )  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
