"""A part of a configuration's points as .npy files, for networks that would take too long on all of them here.

python benchmarks/part.py CONFIG FOLDER     writes FOLDER/inputs.npy, labels.npy and parts.npy, of source `npy`

Of each part the first points are taken, with their labels.
"""

from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from leadline.config import load_config
from leadline.points import TEST, TRAIN, Points, open_points


def main(
    config: str,
    folder: Path,
    training: Annotated[int, typer.Option(help="points of part train")] = 16_000,
    testing: Annotated[int, typer.Option(help="points of part test")] = 4_000,
) -> None:
    """Write a part of a configuration's points."""
    folder.mkdir(parents=True, exist_ok=True)
    write_part(open_points(load_config(config).points), folder, training, testing)


def write_part(points: Points, folder: Path, training: int, testing: int) -> dict[str, str]:
    """Write the first points of each part into a folder that is there. Returns the section `points` that reads them."""
    wanted = ((TRAIN, training), (TEST, testing))
    chosen = np.concatenate([np.flatnonzero(points.parts == part)[:n] for part, n in wanted])
    values = {"inputs": points.read(chosen), "labels": points.labels[chosen], "parts": points.parts[chosen]}
    for key, array in values.items():
        np.save(folder / f"{key}.npy", array)
    return {"source": "npy", **{key: str(folder / f"{key}.npy") for key in values}}


if __name__ == "__main__":
    typer.run(main)
