"""Fixtures shared by the tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels run on the CPU; read as soon as Triton is imported

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Small networks run fastest on one thread, and workers of pytest-xdist do not fight over the cores."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def no_lpips_backbone(tmp_path_factory, monkeypatch):
    """Whatever this machine has of LPIPS, the tests see none, but for those that name a file."""
    from metagpen import lpips_files

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path_factory.getbasetemp() / "no_hub"))
    monkeypatch.setattr(lpips_files, "_in_package", lambda name: [])


@pytest.fixture
def random_vgg(monkeypatch):
    """LPIPS on a random VGG-16, which the losses take for the real one."""
    import torch

    from metagpen.compat import ensure_torchvision
    from metagpen.losses import vgg

    ensure_torchvision()
    from lpips import LPIPS

    torch.manual_seed(0)
    module = LPIPS(net="vgg", pnet_rand=True, verbose=False).eval().requires_grad_(False)
    monkeypatch.setattr(vgg, "load_lpips", lambda net: module)
    return module


@pytest.fixture(scope="session")
def shared() -> Path:
    """The developers' shared data: $METAGPEN_SHARED, or `shared` beside the repository. Skips where it is absent."""
    folder = Path(os.environ.get("METAGPEN_SHARED") or REPOSITORY.parent / "shared")
    if not (folder / "photos").is_dir():
        pytest.skip("the shared photos are not here ($METAGPEN_SHARED, or 'shared' beside the repository)")
    return folder


@pytest.fixture
def tiny_model():
    """A random 16 px meta-GPEN with an identity-conditioned start for 8-dimensional embeddings."""
    import torch

    from metagpen.gpen import GPEN
    from metagpen.model import MetaGPEN
    from metagpen.person import IdentityStart

    torch.manual_seed(0)
    gpen = GPEN(16, 1, 0.03125, style_dim=16, n_mlp=2)
    for name, parameter in gpen.named_parameters():
        if name.endswith("noise.weight"):
            torch.nn.init.constant_(parameter, 0.5)
    start = IdentityStart(8, gpen.config.n_latent, 16, 8)
    torch.nn.init.normal_(start.gate.nobody, std=0.5)
    torch.nn.init.normal_(start.gate.answer[-1].weight, std=0.1)
    return MetaGPEN(gpen, start, {"recogniser": "tests"}).frozen()


@pytest.fixture
def tiny_recogniser():
    """A random, native recogniser with 8-dimensional embeddings that looks at 16 px."""
    from tiny import recogniser

    return recogniser()
