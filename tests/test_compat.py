import numpy as np
import pytest
import torch

from metagpen import compat
from metagpen.compat import ensure_torchvision, nms


def test_torchvision_imports_and_suppresses():
    import torchvision

    boxes = torch.tensor([[0.0, 0, 10, 10], [1, 1, 11, 11], [20, 20, 30, 30]])
    assert torchvision.ops.nms(boxes, torch.tensor([0.5, 0.9, 0.1]), 0.5).tolist() == [1, 2]


def test_a_healthy_torchvision_is_left_alone(monkeypatch):
    imported = []
    monkeypatch.setattr(compat, "_library", None)
    monkeypatch.setattr(compat.importlib, "import_module", imported.append)
    monkeypatch.setattr(torch.library, "Library", lambda *_: pytest.fail("nothing is missing"))
    assert ensure_torchvision() is False
    assert imported == ["torchvision"]


@pytest.mark.parametrize("error", [RuntimeError("compiled with different CUDA major versions"),
                                   ModuleNotFoundError("No module named 'torchvision'")])
def test_other_failures_are_not_hidden(monkeypatch, error):
    def fail(name):
        raise error

    monkeypatch.setattr(compat.importlib, "import_module", fail)
    with pytest.raises(type(error), match=str(error)):
        ensure_torchvision()


def test_mending_twice_changes_nothing():
    assert ensure_torchvision() == ensure_torchvision()


def brute_force(boxes, scores, threshold):
    """Every pair's IoU, spelled out."""
    def iou(a, b):
        width, height = (max(0, min(a[2 + k], b[2 + k]) - max(a[k], b[k])) for k in (0, 1))
        area = [(c[2] - c[0]) * (c[3] - c[1]) for c in (a, b)]
        return width * height / (sum(area) - width * height)

    keep = []
    for i in np.argsort(-scores, kind="stable"):
        if all(iou(boxes[i], boxes[j]) <= threshold for j in keep):
            keep.append(int(i))
    return keep


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.7])
def test_nms_against_every_pair(threshold):
    draw = np.random.default_rng(0)
    corners = draw.uniform(0, 50, (80, 2))
    boxes = np.concatenate([corners, corners + draw.uniform(1, 40, (80, 2))], axis=1)
    scores = draw.uniform(size=80)
    kept = nms(torch.tensor(boxes), torch.tensor(scores), threshold)
    assert kept.tolist() == brute_force(boxes, scores, threshold)
    assert len(kept) < 80


def test_nms_of_no_boxes():
    kept = nms(torch.zeros(0, 4), torch.zeros(0), 0.5)
    assert kept.shape == (0,) and kept.dtype == torch.int64
