"""Images a second through a ResNet50: decoding, the forward pass, and both overlapped.

python benchmarks/gpu_images.py     prints JSON; on a CUDA device where there is one, else the quick figures of the CPU

JPEGs of natural sizes, made in memory, decoded on the host by all cores (Pillow, as a run decodes them) or by nvJPEG,
brought to 224 x 224, and run through torchvision's ResNet50 with random weights, in eval mode. No products in TF32.
"""

import io
import os
import platform
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image
from turns import in_turns, need_cuda, print_figures, wait_for

from leadline.errors import one_line
from leadline.full_precision import full_precision
from leadline.points.ahead import read_ahead
from leadline.points.dataset import Points
from leadline.points.device_jpeg import decode_jpegs, fit_on_device
from leadline.points.images import decode
from leadline.points.source import EncodedInputs, Source, two_parts
from leadline.torchvision_import import import_torchvision

SECONDS = 80.0  # nothing is begun later than this,
SECONDS_BEFORE_COMPILING = 52.0  # and nothing but compiling later than this: it takes half a minute in one piece
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
QUALITY = 90
OVERLAPPED = ("float32", "bfloat16", "bfloat16 channels-last", "bfloat16 channels-last, graph")

Forward = Callable[[torch.Tensor], torch.Tensor]
Batches = Iterator[tuple[Any, torch.Tensor]]


def measure(device: torch.device | str, quick: bool = False, compiles: bool = True) -> dict[str, Any]:
    """Rates in images a second: on an H100 in under 90 s, quick in seconds on a CPU.

    compiles: the forward pass by torch.compile as well, on a CUDA device, unless quick.
    """
    device = torch.device(device)
    started = time.perf_counter()
    n, batch, crop = (8, 4, 64) if quick else (2048, 256, 224)
    resize, rounds, cores = crop * 8 // 7, 1 if quick else 3, len(os.sched_getaffinity(0))
    with ThreadPoolExecutor(cores) as pool:
        files = list(pool.map(jpeg, range(n)))
    points = encoded_points(files, resize, crop, "pillow")
    cut = [np.arange(first, first + batch) for first in range(0, n, batch)]
    few = cut[0][:64]
    on_host = partial(read_ahead, points, cut, device, cores)
    on_device = partial(decoded_on_device, encoded_points(files, resize, crop, "nvjpeg"), cut, device, cores)
    example = torch.as_tensor(points.read(cut[0]), device=device)
    with full_precision():
        forwards, why_not = make_forwards(device, example)
        result: dict[str, Any] = {
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor(),
            "torch": torch.__version__,
            "cores": cores,
            "images": n,
            "batch": batch,
            "input": [3, crop, crop],
            "jpeg_bytes": {"mean": float(np.mean([len(one) for one in files])), "quality": QUALITY},
            "from_float32": {name: noted(apart, forwards, name, example) for name in forwards},
            "from_pillow": noted(pixels_apart, files[:64], device, resize, crop),
        }
        print(result, flush=True)
        times = 1 if quick else 4
        alone = {name: partial(ready_alone, forward, example, times, device) for name, forward in forwards.items()}
        decoding = {
            "host": partial(ready_drained, on_host, n, device),
            "host, one thread": partial(ready_drained, partial(read_ahead, points, [few], device), len(few), device),
            "nvJPEG, pixels only": partial(ready_pixels, files, cut, device),
            "nvJPEG": partial(ready_drained, on_device, n, device),
        }
        both = {
            f"{decoder}, {name}": partial(ready_both, batches, forward, n, device)
            for decoder, batches in (("host", on_host), ("nvJPEG", on_device))
            for name, forward in forwards.items()
            if name in OVERLAPPED
        }
        until = started + SECONDS_BEFORE_COMPILING
        failed = {name: {"failed": line} for name, line in why_not.items()}
        result["forward_per_second"] = {**in_turns("forward", alone, rounds, until), **failed}
        result["decode_per_second"] = in_turns("decode", decoding, rounds, until)
        result["decode_and_forward_per_second"] = in_turns("decode and forward", both, rounds, until)
        if compiles and device.type == "cuda" and not quick:
            # Last, and beside the same network that is not compiled.
            compiled = {
                "bfloat16 channels-last": partial(ready_bfloat16, device, example, times, compiles=False),
                "bfloat16 channels-last, compiled": partial(ready_bfloat16, device, example, times, compiles=True),
            }
            result["compiled_per_second"] = in_turns("compiled", compiled, rounds, started + SECONDS)
    result["seconds"] = time.perf_counter() - started
    return result


def jpeg(number: int) -> bytes:
    """A smooth random image of about 500 x 375, or upright: of 60 to 110 KB, as photographs of this size are."""
    random = np.random.default_rng(number)
    width, height = int(random.integers(470, 531)), int(random.integers(350, 401))
    if number % 4 == 0:
        width, height = height, width
    layers = [
        Image.fromarray(random.integers(0, 256, (height // scale, width // scale, 3), dtype=np.uint8)).resize(
            (width, height), Image.Resampling.BICUBIC
        )
        for scale in (60, 12, 3)
    ]
    image = Image.blend(Image.blend(layers[0], layers[1], 0.3), layers[2], random.uniform(0.2, 0.45))
    file = io.BytesIO()
    image.save(file, "jpeg", quality=QUALITY)
    return file.getvalue()


class FilesInMemory(EncodedInputs):
    """As a source gives them."""

    def __init__(self, files: list[bytes]) -> None:
        self._files = files

    def encoded(self, ids: np.ndarray) -> Iterator[tuple[int, bytes]]:
        for position, point_id in enumerate(ids.tolist()):
            yield position, self._files[point_id]

    def where(self, point_id: int) -> str:
        return f"image {point_id}"

    def content(self) -> Iterator[bytes]:
        return iter(self._files)


def encoded_points(files: list[bytes], resize: int, crop: int, decoder: str) -> Points:
    n = len(files)
    source = Source(
        inputs=FilesInMemory(files),
        labels=np.zeros(n, np.int32),
        parts=two_parts(n, 0),
        keys=[str(number) for number in range(n)],
        label_names=("image",),
    )
    # The fields of `config.PointsConfig`, which needs pydantic.
    fields = {"resize": resize, "crop": crop, "mean": MEAN, "std": STD, "corrupt": None, "relabel": None}
    return Points(SimpleNamespace(**fields, decoder=decoder), source)


def decoded_on_device(points: Points, cut: list[np.ndarray], device: torch.device, threads: int) -> Batches:
    need_cuda(device)
    return read_ahead(points, cut, device, threads)


def resnet50() -> torch.nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return import_torchvision().models.resnet50(weights=None).eval()


def make_forwards(device: torch.device, example: torch.Tensor) -> tuple[dict[str, Forward], dict[str, str]]:
    """By name: inputs, float32 [B, 3, H, W] on the device, to logits. And why others are not there."""
    channels_last = torch.channels_last
    makers: dict[str, Callable[[], Forward]] = {
        "float32": lambda: float32(device, torch.contiguous_format),
        "float32 channels-last": lambda: float32(device, channels_last),
        "bfloat16": lambda: bfloat16(device, torch.contiguous_format),
        "bfloat16 channels-last": lambda: bfloat16(device, channels_last),
        "autocast channels-last": lambda: autocast(device),
        "bfloat16 channels-last, graph": lambda: replayed(bfloat16(device, channels_last), example),
    }
    made, failed = {}, {}
    for name, make in makers.items():
        try:
            forward = make()
            forward(example)
            made[name] = forward
        except Exception as error:
            failed[name] = one_line(error)
    return made, failed


def float32(device: torch.device, memory_format: torch.memory_format) -> Forward:
    model = resnet50().to(device, memory_format=memory_format)
    return lambda inputs: inference(model, inputs.contiguous(memory_format=memory_format))


def bfloat16(device: torch.device, memory_format: torch.memory_format, compiles: bool = False) -> Forward:
    model = resnet50().to(device, torch.bfloat16, memory_format=memory_format)
    run = torch.compile(model) if compiles else model
    return lambda inputs: inference(run, inputs.to(torch.bfloat16, memory_format=memory_format))


def autocast(device: torch.device) -> Forward:
    """Weights in float32 that are rounded in each forward pass; normalisation in bfloat16 too, pooling in float32."""
    model = resnet50().to(device, memory_format=torch.channels_last)

    def forward(inputs: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            return inference(model, inputs.contiguous(memory_format=torch.channels_last))

    return forward


@torch.inference_mode()
def replayed(forward: Forward, example: torch.Tensor) -> Forward:
    """The same in a CUDA graph, for batches of the example's size."""
    need_cuda(example.device)
    given, graph, stream = example.clone(), torch.cuda.CUDAGraph(), torch.cuda.Stream(example.device)
    stream.wait_stream(torch.cuda.current_stream(example.device))
    with torch.cuda.stream(stream):
        for _ in range(3):
            forward(given)
    torch.cuda.current_stream(example.device).wait_stream(stream)
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        logits = forward(given)

    @torch.inference_mode()
    def replay(inputs: torch.Tensor) -> torch.Tensor:
        given.copy_(inputs)
        graph.replay()
        return logits.clone()

    return replay


@torch.inference_mode()
def inference(model: Callable[[torch.Tensor], torch.Tensor], inputs: torch.Tensor) -> torch.Tensor:
    return model(inputs)


def noted(measured: Callable[..., dict[str, float]], *args: Any) -> dict[str, Any]:
    """What is measured, or why it is not."""
    try:
        return measured(*args)
    except Exception as error:
        return {"failed": one_line(error)}


def apart(forwards: dict[str, Forward], name: str, example: torch.Tensor) -> dict[str, float]:
    """The distance of a forward's logits from those in float32, relative to how these vary from image to image."""
    expected, logits = forwards["float32"](example).float(), forwards[name](example).float()
    return {"logits": float((logits - expected).norm() / (expected - expected.mean(0)).norm())}


def pixels_apart(files: list[bytes], device: torch.device, resize: int, crop: int) -> dict[str, float]:
    """Levels of 0 to 255 between nvJPEG's pixels and Pillow's, as decoded and then brought to size."""
    need_cuda(device)
    pillows = [torch.from_numpy(np.asarray(decode(one, "")).copy()).permute(2, 0, 1) for one in files]
    decoded = decode_jpegs(files, device)
    both = zip(decoded, pillows, strict=True)
    levels = torch.cat([(one.cpu().int() - other.int()).abs().flatten() for one, other in both])
    fits = [torch.stack([fit_on_device(one, resize, crop).cpu() for one in images]) for images in (decoded, pillows)]
    fitted = (fits[0] - fits[1]).abs()
    return {
        "mean": float(levels.float().mean()),
        "largest": float(levels.max()),
        "brought to size, mean": float(fitted.mean()),
        "brought to size, largest": float(fitted.max()),
    }


def ready_alone(forward: Forward, example: torch.Tensor, times: int, device: torch.device) -> Callable[[], float]:
    forward(example)

    def rate() -> float:
        wait_for(device)
        started = time.perf_counter()
        for _ in range(times):
            forward(example)
        wait_for(device)
        return times * len(example) / (time.perf_counter() - started)

    return rate


def ready_bfloat16(device: torch.device, example: torch.Tensor, times: int, compiles: bool) -> Callable[[], float]:
    return ready_alone(bfloat16(device, torch.channels_last, compiles), example, times, device)


def ready_drained(batches: Callable[[], Batches], n: int, device: torch.device) -> Callable[[], float]:
    return lambda: n / timed(lambda: deque(batches(), maxlen=0), device)


def ready_pixels(files: list[bytes], cut: list[np.ndarray], device: torch.device) -> Callable[[], float]:
    need_cuda(device)

    def decode_all() -> None:
        for ids in cut:
            decode_jpegs([files[i] for i in ids], device)

    decode_jpegs(files[:4], device)
    return lambda: len(files) / timed(decode_all, device)


def ready_both(batches: Callable[[], Batches], forward: Forward, n: int, device: torch.device) -> Callable[[], float]:
    """Each batch's logits come to the CPU before the next one starts, as embeddings do in a run."""

    def run() -> None:
        for _, inputs in batches():
            forward(inputs).cpu()

    return lambda: n / timed(run, device)


def timed(do: Callable[[], Any], device: torch.device) -> float:
    """Seconds."""
    wait_for(device)
    started = time.perf_counter()
    do()
    wait_for(device)
    return time.perf_counter() - started


if __name__ == "__main__":
    print_figures(measure)
