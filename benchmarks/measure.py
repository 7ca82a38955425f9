"""What the benchmarks share: where photos and pages lie, on whom is measured, who measured where, and publishing it.

Of speed: ways that are compared run in one process and take turns, so that a busy moment of the machine meets all of
them; the first rounds warm up and do not count. A figure is the median over rounds with its quartiles.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import quantiles
from typing import Any, NamedTuple

import torch
import yaml

from metagpen import load
from metagpen.devices import synchronise
from metagpen.errors import DataError, MetagpenError
from metagpen.evaluate import curve_report, report
from metagpen.gpen import GPEN
from metagpen.identities import People, load_people, split
from metagpen.memory import keep_freed_memory
from metagpen.model import MetaGPEN
from metagpen.person import IdentityStart

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
SHARED = Path(os.environ.get("METAGPEN_SHARED", ROOT.parent / "shared"))
SETS = ("celeba_wild_256", "lfw_176")  # whose people the embedded models are made with
PEOPLE = ROOT / "configs" / "people_128.csv"  # who trains, is kept back and judges: split_people.py
SCORER = "068"  # the recogniser that no loss used
SCORING = SHARED / "weights" / "mobilefacenet_casia_xiaoccer_068.ckpt"
PAGE = ROOT / "docs" / "speed.md"
DAMAGE = {"hard": "16 px", "extreme": "8 px", "moderate": "moderate"}  # what tables and pictures call it
ARCHITECTURES = {32: (32, 1, 1 / 32), 256: (256, 1, 0.5), 512: (512, 2, 1.0)}  # of `model_of`
CPU = torch.device("cpu")
REACHED, UNDECIDED, MISSED = "reached", "undecided", "**missed**"

Row = dict[str, Any]


class Seconds(NamedTuple):
    """Median and quartiles over rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Seconds:
        low, median, high = quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
        return cls(median, low, high)

    def row(self, prefix: str = "") -> Row:
        return {f"{prefix}seconds": self.median, f"{prefix}seconds_low": self.low, f"{prefix}seconds_high": self.high}


def take_turns(ways: Mapping[str, Callable[[], Any]], rounds: int, device: torch.device = CPU,
               warmup: int = 1) -> dict[str, Seconds]:
    """Seconds of each way: `warmup` rounds that do not count, then `rounds` in which every way has one turn."""
    spent: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(warmup + rounds):
        for name, way in ways.items():
            synchronise(device)
            began = time.perf_counter()
            way()
            synchronise(device)
            if turn >= warmup:
                spent[name].append(time.perf_counter() - began)
    found = {name: Seconds.of(values) for name, values in spent.items()}
    for name, seconds in found.items():
        print(f"{name}: {milliseconds(seconds.row())} ms", file=sys.stderr, flush=True)  # the tables come much later
    return found


def parser(doc: str) -> argparse.ArgumentParser:
    """The flags that every speed benchmark has."""
    wanted = argparse.ArgumentParser(description=doc.splitlines()[0])
    wanted.add_argument("--quick", action="store_true", help="the smallest sizes, as a smoke test; publishes none")
    wanted.add_argument("--device", default="cpu", help="cpu or cuda; each has its own figures")
    wanted.add_argument("--threads", type=int, help="threads of torch; default: as many as it takes")
    wanted.add_argument("--rounds", type=int, help="turns that count, for each way")
    wanted.add_argument("--dry", action="store_true", help="print the tables; write nothing")
    return wanted


def begin(arguments: argparse.Namespace) -> torch.device:
    """Set the process up as the command line does; the device to measure on."""
    keep_freed_memory()
    exact_float32()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    return torch.device(arguments.device)


def run(main: Callable[[], Any]) -> None:
    """A script's `main`, what is wrong told in a line."""
    try:
        main()
    except MetagpenError as error:
        sys.exit(f"{Path(sys.argv[0]).stem}: {error}")


def exact_float32() -> None:
    """float32 means float32 on a GPU too, not TF32."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False


def facts(device: torch.device, arguments: argparse.Namespace, **settings: Any) -> Row:
    """Who measured, where, on what, and with which arguments."""
    found = report.machine()
    if device.type != "cuda":
        found["accelerator"] = None  # one may be there, but these figures owe it nothing
    return {"commit": report.commit(), "machine": found, "settings": {**settings, "arguments": vars(arguments)}}


def publish(name: str, arguments: argparse.Namespace, rows: Sequence[Row], about: Row,
            page: Callable[[Sequence[Row]], str]) -> None:
    """Print the tables; unless told otherwise, write results/{name}.json, where each kind of device keeps its own
    figures, and put the tables of all devices between the markers of docs/speed.md."""
    print(page(rows))
    if arguments.quick or arguments.dry:
        return
    path = RESULTS / f"{name}.json"
    measured = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    measured[torch.device(arguments.device).type] = {**about, "rows": [rounded(row) for row in rows]}
    report.write_text(path, json.dumps(measured, indent=1, allow_nan=False) + "\n")
    put_on_page(name, both(measured, page), path, PAGE)


def put_on_page(name: str, text: str, results: Path, page: Path) -> None:
    """Put a text between the markers of a page, and say where it and the results are."""
    report.write_text(page, report.replace_between(page.read_text(encoding="utf-8"), *markers(name), text))
    print(f"written: {results.relative_to(ROOT)}, {page.relative_to(ROOT)}")


def both(measured: Mapping[str, Row], page: Callable[[Sequence[Row]], str]) -> str:
    """The tables of each device, in a fixed order; who has not been measured is named."""
    parts = []
    for device, title in (("cpu", "CPU"), ("cuda", "GPU")):
        if device not in measured:
            parts.append(f"{title}: not measured yet.")
            continue
        run = measured[device]
        load = run["machine"]["load_average"]
        parts.append(f"{title}: {report.machine_line(run['machine'])}; commit {run['commit']}; load average at the end "
                     f"{load}.\n\n{page(run['rows'])}")
    return "\n\n".join(parts)


def markers(name: str) -> tuple[str, str]:
    return f"<!-- {name}:begin -->", f"<!-- {name}:end -->"


def rounded(value: Any) -> Any:
    """Floats to five significant digits, wherever they stand."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def milliseconds(row: Mapping[str, float], prefix: str = "") -> str:
    """"210 (205-221)" ms, median and quartiles."""
    median, low, high = (1e3 * row[f"{prefix}seconds{end}"] for end in ("", "_low", "_high"))
    digits = 0 if median >= 100 else 1
    return f"{median:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def model_of(size: int, device: torch.device) -> MetaGPEN:
    """The embedded model at 128 px; elsewhere random weights with a random start."""
    if size == 128:
        return load().to(device)
    torch.manual_seed(0)
    gpen = GPEN(*ARCHITECTURES[size])
    start = IdentityStart(256, gpen.config.n_latent, gpen.config.style_dim)
    return MetaGPEN(gpen, start, {"recogniser": "embedded"}).frozen().to(device)


def without_rule(model: MetaGPEN, folder: Path, name: str) -> Path:
    """The file `name` in the folder: the model without its rule and its filters."""
    file = folder / f"{name}.safetensors"
    if not file.exists():
        MetaGPEN(model.gpen, model.start, model.card).save(file, torch.float32)
    return file


def settings_on_shared(config: Path) -> Row:
    """A meta-training's configuration, with the photos, the split and the recogniser of the losses where they lie."""
    found, photos = yaml.safe_load(config.read_text(encoding="utf-8")), SHARED / "photos"
    return {**found, "data": [photos / "celeba_wild_256", photos / "lfw_176"], "split": PEOPLE,
            "loss_recogniser": str(SHARED / "weights" / Path(found["loss_recogniser"]).name)}


def held_out(split: str = "val", split_file: Path = SHARED / "photos" / "splits.csv",
             photos: str = "celeba_wild_256") -> Row:
    """Settings of a curve on people whom no training saw, scored by whom no loss used."""
    folder = SHARED / "photos"
    return {"data": str(folder / photos), "split_file": str(split_file), "split": split,
            "trained_on": [str(folder / "celeba_wild_256"), str(folder / "lfw_176")],
            "recognisers": {SCORER: str(SCORING)}}


def wild_people(part: str = "val") -> People:
    """A part of celeba_wild_256; val: whom no training saw. Raises DataError where the photos are absent."""
    photos = SHARED / "photos" / "celeba_wild_256"
    need(photos)
    return split(People.from_folder(photos), photos.parent / "splits.csv", strict=False)[part]


def our_people() -> dict[str, People]:
    """Everybody of the sets that the embedded models are made with, by part: `train`, `kept`, `val`, `test`. Raises
    DataError where the photos are absent."""
    folders = [SHARED / "photos" / name for name in SETS]
    need(*folders)
    return split(load_people(*folders), PEOPLE, strict=False)


def over(rows: Sequence[Row], found: Row, method: str, digits: int) -> str:
    """What a row of a curve's summary has over another method at its photos and steps, paired by person."""
    ours, theirs = ((name, found["shots"], found["steps"]) for name in (found["method"], method))
    gain = curve_report.versus(rows, found["degradation"], ours, theirs, found["metric"], found["recogniser"])
    return report.interval_text(gain.mean, gain.lo, gain.hi, digits)


def need(*paths: Path) -> None:
    """Raises DataError for the first of the shared files or folders that is absent."""
    for path in paths:
        if not path.exists():
            raise DataError(f"{path} is absent; point METAGPEN_SHARED at the folder that holds photos/ and weights/")


def verdict(reached: bool) -> str:
    return REACHED if reached else MISSED


def not_below(low: float, high: float) -> str:
    """Whether a gain with this interval is none below zero; one that holds zero decides nothing, in whosever favour."""
    return REACHED if low > 0 else MISSED if high < 0 else UNDECIDED


def peak_rss() -> int:
    """Highest resident memory of this process so far, in bytes."""
    return status_bytes("VmHWM")


def status_bytes(name: str) -> int:
    """What the system says of this process' memory under this name."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"this system does not tell a process' memory ({name})")


def forget_peak_rss() -> bool:
    """Let `peak_rss` begin again at what is resident now; whether the system did so (some take the wish and do not)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return peak_rss() < status_bytes("VmRSS") + 2**23


def give_back_freed_memory() -> None:
    """What was freed goes back to the system, where the C library can do that, so that it hides no later growth."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc
    if trim is not None:
        trim(0)
