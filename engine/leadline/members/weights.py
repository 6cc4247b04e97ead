"""A member's weights: read, written, fingerprinted. Nothing is unpickled but tensors."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from leadline.errors import LeadlineError, one_line


def load_weights(model: nn.Module, path: Path) -> None:
    """Fill a model, in place, from a .safetensors file or a state dict that torch.save wrote.

    The state dict may lie under "state_dict" or "model", and a prefix "module." that all its keys share is taken off.
    torch's own files are read with weights_only=True, so no code in them runs.
    Raises LeadlineError that names the file, and the first few keys where they do not fit; the model's weights are then
    partly replaced.
    """
    state = _state_dict(path)
    own = model.state_dict()
    misshaped = [
        f"{key} {list(state[key].shape)} for {list(own[key].shape)}"
        for key in state.keys() & own.keys()
        if isinstance(own[key], Tensor) and state[key].shape != own[key].shape
    ]
    if misshaped:
        raise LeadlineError(
            f"weights {path}: of another shape than the architecture's: {_few(sorted(misshaped))}; "
            "give the parameters that the weights were made with"
        )
    missing, unexpected = model.load_state_dict(state, strict=False)
    if missing or unexpected:
        mistakes = [f"{what}: {_few(keys)}" for what, keys in (("missing", missing), ("not of it", unexpected)) if keys]
        raise LeadlineError(
            f"weights {path}: not this architecture's: {'; '.join(mistakes)}; "
            "give the architecture and parameters that the weights were made with"
        )


def save_weights(model: nn.Module, path: Path) -> None:
    """Write a model's state dict as safetensors. Tensors that share memory are written once for each name."""
    state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in model.state_dict().items()}
    save_file(state, path)


def weights_fingerprint(model: nn.Module) -> str:
    """SHA-256, in hexadecimal, of name, dtype, shape and bytes of every parameter and buffer, by name.

    The same weights have the same fingerprint on every device.
    """
    digest = hashlib.sha256()
    tensors: dict[str, Tensor] = dict(model.named_buffers(remove_duplicate=False))
    tensors.update(model.named_parameters(remove_duplicate=False))
    for name, tensor in sorted(tensors.items()):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _state_dict(path: Path) -> dict[str, Tensor]:
    state = _read(path)
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise LeadlineError(
            f"weights {path}: no state dict, a mapping of names to tensors; write model.state_dict() with torch.save"
        )
    if all(key.startswith("module.") for key in state):
        state = {key.removeprefix("module."): value for key, value in state.items()}
    return state


def _read(path: Path) -> Any:
    try:
        path.open("rb").close()  # says what is wrong with a path in one way, whichever library reads it
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise LeadlineError(
            f"weights {path}: {error.strerror or 'damaged'}; give a .safetensors or state-dict file"
        ) from error
    except SafetensorError as error:
        raise LeadlineError(f"weights {path}: damaged ({one_line(error)}); give a whole safetensors file") from error
    except Exception as error:  # torch.load raises many kinds for a damaged file
        raise LeadlineError(
            f"weights {path}: damaged, or more than tensors, and then it is not unpickled ({type(error).__name__}); "
            "give a .safetensors or state-dict file"
        ) from error


def _few(keys: list[str]) -> str:
    return ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
