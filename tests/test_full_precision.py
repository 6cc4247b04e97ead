"""Short cuts that a process has switched on, by torch's older names or its newer ones, are off and come back."""

import pytest
import torch

from leadline.full_precision import full_precision
from leadline.knn import knn_votes
from leadline.members.train import deterministic

BACKENDS = torch.backends
NEWER = {
    f"{place}, {kind}": getattr(backend, kind)
    for place, backend in (("cuda", BACKENDS.cudnn), ("cpu", BACKENDS.mkldnn))
    for kind in ("conv", "rnn")
} | {"cuda, matmul": BACKENDS.cuda.matmul, "cpu, matmul": BACKENDS.mkldnn.matmul}
OLDER = {
    "products": torch.get_float32_matmul_precision,
    "cuda products": lambda: BACKENDS.cuda.matmul.allow_tf32,
    "cuda convolutions": lambda: BACKENDS.cudnn.allow_tf32,
    "sums": lambda: BACKENDS.cuda.matmul.allow_bf16_reduced_precision_reduction,
}
OFF = {"products": "highest", "cuda products": False, "cuda convolutions": False, "sums": False}


def everything():
    def told(read):
        try:
            return read()
        except RuntimeError:
            return "newer names were used"

    settings = {f"older, {name}": told(read) for name, read in OLDER.items()}
    return settings | {name: place.fp32_precision for name, place in NEWER.items()} | {"all": BACKENDS.fp32_precision}


def by_older_names():
    torch.set_float32_matmul_precision("medium")
    BACKENDS.cudnn.allow_tf32 = True


def by_other_older_names():
    BACKENDS.cuda.matmul.allow_tf32 = True
    BACKENDS.cudnn.allow_tf32 = False


def by_one_newer_name():
    BACKENDS.cuda.matmul.fp32_precision = "tf32"


def by_the_newest_for_all():
    BACKENDS.fp32_precision = "tf32"


def by_both():
    torch.set_float32_matmul_precision("high")
    BACKENDS.cudnn.conv.fp32_precision = "ieee"


WAYS = [lambda: None, by_older_names, by_other_older_names, by_one_newer_name, by_the_newest_for_all, by_both]


@pytest.fixture(autouse=True)
def afterwards_as_before():
    before = everything()
    yield
    BACKENDS.fp32_precision = before["all"]
    torch.set_float32_matmul_precision(before["older, products"])
    BACKENDS.cudnn.allow_tf32 = before["older, cuda convolutions"]
    for name, place in NEWER.items():
        place.fp32_precision = before[name]
    assert everything() == before


@pytest.mark.parametrize("switch_on", WAYS)
def test_off_by_both_names_and_back_as_they_were(switch_on):
    switch_on()
    before = everything()
    with full_precision():
        assert {place.fp32_precision for place in NEWER.values()} == {"ieee"}
        assert {name: read() for name, read in OLDER.items()} == OFF
        inside = everything()
        with full_precision():
            assert everything() == inside
        assert everything() == inside
    assert everything() == before
    with pytest.raises(ZeroDivisionError), full_precision():
        raise ZeroDivisionError
    assert everything() == before


@pytest.mark.parametrize("switch_on", WAYS)
def test_votes_and_training_under_them(switch_on):
    bank = torch.randn(200, 16, generator=torch.Generator().manual_seed(0)) + 1e3
    labels = torch.arange(200) % 3
    expected = knn_votes(bank, labels, bank[:20], k=5)
    switch_on()
    found = knn_votes(bank, labels, bank[:20], k=5)
    assert (found.winner == expected.winner).all() and (found.winner_votes == expected.winner_votes).all()
    with deterministic(0, torch.device("cpu")):
        assert {place.fp32_precision for place in NEWER.values()} == {"ieee"}
