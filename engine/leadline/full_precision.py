"""Products and convolutions as they are asked for, whatever short cuts a process has switched on."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

Setting = TypeVar("Setting")


@contextmanager
def full_precision() -> Iterator[None]:
    """Float32 is float32, on GPUs and CPUs, and sums of bfloat16 products are made in float32, for a while.

    TF32, or bfloat16 in float32's place, would make embeddings depend on the generation of the device, and break the
    bounds of a search. The settings are the process's, so it is entered before threads are started, and not in them.
    They come back as they were.
    """
    backends: Any = torch.backends
    places = [
        backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn,
        backends.mkldnn.matmul, backends.mkldnn.conv, backends.mkldnn.rnn,
    ]  # fmt: skip
    before = [place.fp32_precision for place in places]
    sums = backends.cuda.matmul.allow_bf16_reduced_precision_reduction
    # Torch has older names for some of these, which raise where the newer ones were used, and must agree with them
    # meanwhile: whoever compiles a network in here asks for either.
    products = _if_told(torch.get_float32_matmul_precision)
    convolutions = _if_told(lambda: backends.cudnn.allow_tf32)
    torch.set_float32_matmul_precision("highest")
    backends.cudnn.allow_tf32 = False
    for place in places:
        place.fp32_precision = "ieee"
    backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    try:
        yield
    finally:
        if products is not None:
            torch.set_float32_matmul_precision(products)
        if convolutions is not None:
            backends.cudnn.allow_tf32 = convolutions
        for place, precision in zip(places, before, strict=True):
            place.fp32_precision = precision
        backends.cuda.matmul.allow_bf16_reduced_precision_reduction = sums


def _if_told(read: Callable[[], Setting]) -> Setting | None:
    try:
        return read()
    except RuntimeError:
        return None
