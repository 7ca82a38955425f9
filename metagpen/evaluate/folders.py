"""Restored faces against true faces of the same file names."""

from __future__ import annotations

from pathlib import Path

import torch

from metagpen import faces, recognise
from metagpen.devices import pick_device
from metagpen.errors import DataError
from metagpen.evaluate import metrics
from metagpen.lpips_files import load_lpips


def compare_folders(
    restored: str | Path, truth: str | Path, *, recogniser: str = "embedded", size: int = 128,
    device: str = "auto",
) -> dict[str, float | None]:
    """Means over all pairs of `psnr` (dB, 100 where they are equal), `ssim`, `lpips` (None: no backbone), `sharpness`,
    `identity`, `deg`.

    restored, truth: folders of aligned square faces; files pair up by name without suffix, and each restored face
    needs its truth. size: side in pixels at which they are compared. device: auto, cpu, cuda, ...
    Raises DataError when a truth is missing, and for a device that is not there.
    """
    pairs = _pairs(Path(restored), Path(truth))
    device = pick_device(device)
    net, lpips = recognise.load(recogniser, device), load_lpips()
    if lpips is not None:
        lpips.to(device)
    sums: dict[str, list[torch.Tensor]] = {}
    for paths in pairs:
        image, target = (_crop(path, size).to(device) for path in paths)
        cosine = metrics.identity(net, image, target)
        values = {
            "psnr": metrics.psnr(image, target),
            "ssim": metrics.ssim(image, target),
            "lpips": metrics.lpips(lpips, image, target),
            "sharpness": metrics.sharpness(image, target),
            "identity": cosine,
            "deg": metrics.degrees(cosine),
        }
        for name, value in values.items():
            sums.setdefault(name, []).extend([] if value is None else [value])
    return {name: torch.cat(values).double().mean().item() if values else None for name, values in sums.items()}


def _crop(path: Path, size: int) -> torch.Tensor:
    return faces.to_tensor(faces.single_face(path, size, aligned=True).image)[None]


def _pairs(restored: Path, truth: Path) -> list[tuple[Path, Path]]:
    for folder in (restored, truth):
        if not folder.is_dir():
            raise DataError(f"{folder} is not a folder of photos")
    targets: dict[str, Path] = {}
    for path in faces.photos_in(truth):
        if path.stem in targets:
            raise DataError(f"{path}: beside {targets[path.stem].name}, and names pair up without suffix; remove one")
        targets[path.stem] = path
    images = faces.photos_in(restored)
    missing = [path.name for path in images if path.stem not in targets]
    if missing or not images:
        what = f"no true face for {missing[0]} (of {len(missing)} missing)" if images else f"no photos in {restored}"
        raise DataError(f"{what}; {truth} must hold a photo of the same name for each in {restored}")
    return [(path, targets[path.stem]) for path in images]
