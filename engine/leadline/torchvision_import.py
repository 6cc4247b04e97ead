"""torchvision, also where its compiled operators do not load."""

import importlib
import sys
from types import ModuleType

import torch

_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


def import_torchvision() -> ModuleType:
    """The module torchvision, with working models, transforms and data sets.

    torchvision's wheels are CUDA builds. Beside a torch for the CPU alone their compiled operators do not load, and
    `import torchvision` ends where it describes `torchvision::nms`. The schemas that it asks for are then declared
    here, without an implementation, and it is imported again. Any other failure of the import is raised as it is.
    """
    if "torchvision" in sys.modules:
        return sys.modules["torchvision"]
    try:
        return _import_afresh()
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
    for operator in ("torchvision::nms", "torchvision::qnms"):
        torch.library.define(operator, _SCHEMA)
    return _import_afresh()


def _import_afresh() -> ModuleType:
    # A failed import leaves submodules behind, which Python would not attach to the package when it is tried again.
    for name in [name for name in sys.modules if name.startswith("torchvision.")]:
        del sys.modules[name]
    return importlib.import_module("torchvision")
