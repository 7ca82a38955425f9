"""What a fine-tune leaves behind to look at: CSV files that survive a kill, curves, pictures, TensorBoard if there."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from ..atomic import whole_file, write_text
from ..errors import DataError
from ..evaluate import metrics
from ..evaluate.report import contact_sheet
from ..faces import to_pil
from ..lpips_files import load_lpips
from ..recognise import Recogniser
from .pairs import PairSet

MOST_PICTURES = 8
PANELS = {"psnr": "PSNR, dB", "identity": "identity, cosine", "lpips": "LPIPS"}


class Series:
    """A CSV file of numbers by iteration. Opened for a resumed run it forgets what lies after it, so that no row is
    there twice."""

    def __init__(self, path: Path, columns: Sequence[str], upto: int):
        self.path, self.columns = path, ["iter", *columns]
        self.rows = [row for row in read_series(path) if row["iter"] <= upto] if path.exists() else []
        text = io.StringIO()
        writer = csv.DictWriter(text, self.columns, lineterminator="\n", extrasaction="ignore")
        writer.writeheader()
        writer.writerows({key: printed(value) for key, value in row.items()} for row in self.rows)
        write_text(path, text.getvalue())

    def add(self, iteration: int, values: Mapping[str, float | None]) -> None:
        row = {"iter": iteration, **{key: values.get(key) for key in self.columns[1:]}}
        self.rows.append(row)
        with self.path.open("a", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, self.columns, lineterminator="\n")
            writer.writerow({key: printed(value) for key, value in row.items()})


def read_series(path: Path) -> list[dict[str, Any]]:
    """The whole rows of a CSV file that `Series` wrote: iter as int, numbers as float, None where there was none."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        whole = [line for line in lines if line.endswith("\n")]  # a kill may have cut the last one
        return [{key: int(value) if key == "iter" else float(value) if value else None for key, value in row.items()}
                for row in csv.DictReader(whole)]
    except (ValueError, TypeError, csv.Error) as error:
        raise DataError(f"{path}: damaged ({error}); move {path.parent} away to begin again") from None


def printed(value: float | None) -> str:
    return "" if value is None else str(value) if isinstance(value, int) else f"{value:.6g}"


class HeldOut:
    """The pairs that are watched, and the numbers of a restoration of them."""

    columns = ("psnr", "ssim", "identity", "lpips")

    def __init__(self, pairs: PairSet, recogniser: Recogniser):
        self.pairs, self.recogniser, self.lpips = pairs, recogniser, load_lpips()

    def score(self, restored: Tensor) -> dict[str, float | None]:
        """Means over the pairs of [N, 3, S, S]; None for LPIPS where its backbone is absent."""
        truth = self.pairs.truth
        found = {"psnr": metrics.psnr(restored, truth), "ssim": metrics.ssim(restored, truth),
                 "identity": metrics.identity(self.recogniser, restored, truth, self.pairs.landmarks),
                 "lpips": metrics.lpips(self.lpips, restored, truth)}
        return {name: None if value is None else float(value.mean()) for name, value in found.items()}

    def sheet(self, columns: Mapping[str, Tensor]) -> Image.Image:
        """A line per pair: degraded, these columns, truth."""
        shown = {"degraded": self.pairs.poor, **columns, "truth": self.pairs.truth}
        return contact_sheet([[(label, to_pil(images[i])) for label, images in shown.items()]
                              for i in range(min(MOST_PICTURES, len(self.pairs)))])


def plot_curves(path: Path, rows: Sequence[Mapping[str, Any]], joint_from: int, title: str) -> None:
    """PSNR, identity and, where measured, LPIPS against iterations; dashed: the model before; dotted: stage 2."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [name for name in PANELS if any(row[name] is not None for row in rows)]
    figure = Figure(figsize=(4 * len(panels), 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, name in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        axes.plot([row["iter"] for row in rows], [row[name] for row in rows], marker="o", markersize=3)
        axes.axhline(rows[0][name], linestyle="--", color="0.5", linewidth=1, label="before")
        if rows[0]["iter"] <= joint_from <= rows[-1]["iter"]:
            axes.axvline(joint_from, linestyle=":", color="0.5", linewidth=1, label="stage 2")
        axes.set(xlabel="iteration", ylabel=PANELS[name])
    figure.axes[0].legend(fontsize="small")
    figure.suptitle(title, fontsize="medium")
    with whole_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
