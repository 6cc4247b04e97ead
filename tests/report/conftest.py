"""A real browser and a real explorer, for the pages that Leadline writes and serves."""

import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
from tiny import TINY

# All that an explorer shows: labels that are not the clean ones, training that was watched, banks that were kept.
EXPLORED = {
    **TINY,
    "name": "explored",
    "points": {"source": "digits", "corrupt": {"share": 0.1}},
    "members": [
        {
            **TINY["members"][0],
            "split": {"kind": "random", "share": 0.6},
            "training": {**TINY["members"][0]["training"], "learning": {"per_decade": 3, "per_epoch": 0}},
        }
    ],
    "engine": {**TINY["engine"], "keep_indexes": True},
}


@pytest.fixture(scope="session")
def browser():
    """Headless Chromium with Debian's own driver; `console()` gives what it has complained of since the last call."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and driver):
        pytest.skip("there is no chromium with its driver")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1280,1000"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with webdriver.Chrome(options, webdriver.ChromeService(driver)) as opened:
        opened.console = lambda: [entry["message"] for entry in opened.get_log("browser")]
        yield opened


@pytest.fixture(scope="session")
def explored_run(tmp_path_factory):
    """A finished run of digits that an explorer shows all of itself on, to be read and not changed."""
    import leadline

    return leadline.run(EXPLORED, tmp_path_factory.mktemp("runs") / "explored")


@pytest.fixture(scope="session")
def clothes_run(tmp_path_factory):
    """A finished run of 1,200 images of the real Fashion-MNIST, to be read and not changed."""
    import numpy as np

    import leadline
    from leadline.config import load_config
    from leadline.points import open_points

    if not Path("/usr/share/datasets/fashion-mnist").is_dir():
        pytest.skip("Debian's dataset-fashion-mnist is not there")
    folder = tmp_path_factory.mktemp("clothes")
    points = open_points(load_config({**TINY, "points": {"source": "fashion-mnist"}}).points)
    some = np.r_[:1000, 60_000:60_200]
    values = {"inputs": points.read(some), "labels": points.labels[some], "parts": points.parts[some]}
    for name, array in values.items():
        np.save(folder / f"{name}.npy", array)
    source = {"source": "npy", **{name: str(folder / f"{name}.npy") for name in values}}
    entry = {**TINY["members"][0], "split": {"kind": "random", "share": 0.6}}
    return leadline.run({**TINY, "name": "clothes", "points": source, "members": [entry]}, folder / "run")


@pytest.fixture(scope="session")
def explore():
    """`leadline explore` of a run, as a context: the address that it prints. Ctrl-C ends it; it has said no more."""

    @contextmanager
    def serve(run, *options):
        command = [str(Path(sys.executable).with_name("leadline")), "explore", str(run), *options]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
            address = server.stdout.readline().strip()
            try:
                yield address
            finally:
                server.send_signal(2)
                said = server.communicate(timeout=60)
        assert (server.returncode, *said) == (0, "", "")

    return serve
