"""Makes `import torchvision` work where its binary does not load; import this module before anything that
needs it.

torchvision's wheel for torch 2.13 is linked against CUDA, so beside a CPU-only torch its compiled operators
are missing and `import torchvision` itself fails with "operator torchvision::nms does not exist". Then the
two missing operators are declared here (non-maximum suppression in numpy) and torchvision is imported
again, which is all that facenet-pytorch and lpips use. On a healthy torchvision, and on every other
failure, this module changes nothing.
"""

from __future__ import annotations

import importlib
import sys

import numpy as np
import torch

_library: torch.library.Library | None = None  # its definitions live only as long as the object


def ensure_torchvision() -> bool:
    """Imports torchvision, mending it when only its compiled operators are missing. Returns whether it was
    mended.

    Raises ModuleNotFoundError when torchvision is not installed; other import errors pass through
    unchanged.
    """
    global _library
    try:
        importlib.import_module("torchvision")
        return _library is not None
    except RuntimeError as error:
        if "operator torchvision::nms does not exist" not in str(error):
            raise
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]  # half-imported
    _library = torch.library.Library("torchvision", "DEF")
    _library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _library.impl("nms", nms, "CompositeExplicitAutograd")
    importlib.import_module("torchvision")
    importlib.import_module("torchvision.ops.boxes")._assert_has_ops = lambda: None
    return True


def nms(boxes: torch.Tensor, scores: torch.Tensor, iou_threshold: float) -> torch.Tensor:
    """Greedy non-maximum suppression, as torchvision.ops.nms: indices of the kept boxes, best score first.

    boxes: [N, 4] as x0, y0, x1, y1. scores: [N]. A box goes when its IoU with a better kept one exceeds the
    threshold.
    """
    corners = boxes.detach().double().cpu().numpy()
    x0, y0, x1, y1 = corners.T
    area = (x1 - x0) * (y1 - y0)
    order = torch.argsort(scores.detach(), descending=True, stable=True).cpu().numpy()
    keep = []
    while order.size:
        best, rest = order[0], order[1:]
        keep.append(best)
        width = np.clip(np.minimum(x1[best], x1[rest]) - np.maximum(x0[best], x0[rest]), 0, None)
        height = np.clip(np.minimum(y1[best], y1[rest]) - np.maximum(y0[best], y0[rest]), 0, None)
        overlap = width * height
        order = rest[overlap <= iou_threshold * (area[best] + area[rest] - overlap)]
    return torch.as_tensor(np.array(keep, dtype=np.int64), device=boxes.device)


ensure_torchvision()
