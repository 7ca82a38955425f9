"""Nothing breaks it: hostile files against every command that reads their kind, full disks, kills, and properties.

Whatever comes: a few lines on stderr that name the file or the key, exit code 2, no traceback, nothing half-written,
and what was there stays as it was.
"""

from __future__ import annotations

import gzip
import io
import json
import math
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save, save_file
from test_cli import run
from test_curve import wait_for_the_end_of

import metagpen
from metagpen import recognise
from metagpen.adaptation import AdaptConfig
from metagpen.errors import CheckpointError, ConfigError, DataError, MetagpenError, PhotoError
from metagpen.faces import load_photo
from metagpen.model import MetaGPEN
from metagpen.person import AdapterSpec, Person, PersonStore, new_parameters
from metagpen.tensors import unpack_tensors

QUICK = {"tail_blocks": 1, "tail_rank": 2, "bf16": False, "batch_size": 2,
         "degradation": {"heavy": {"face_px": [4, 8]}}}  # fmt: skip
PRECIOUS = b"what was there before"
INPUTS = ("photos", "faces", "inputs")

few = settings(max_examples=40, deadline=None, derandomize=True, database=None)


# --- the place, its snapshot, and what a refusal looks like ---------------------------------------------------------


@pytest.fixture
def place(tmp_path, tiny_model, tiny_recogniser, monkeypatch) -> Path:
    """A folder with a tiny model in it, which commands name by --model; its recogniser is found by its name."""
    plain = recognise.load
    monkeypatch.setattr(recognise, "load", lambda name="embedded", device="cpu": (
        plain(name, device) if Path(name).is_file() else tiny_recogniser))
    monkeypatch.setattr("metagpen.demo.load", lambda device: tiny_model)
    tiny_model.save(tmp_path / "model.safetensors", torch.float32)
    write_people(tmp_path / "faces")
    return tmp_path


def write_face(path: Path, seed: int = 0, side: int = 32) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    levels = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    Image.fromarray(levels).resize((side, side), Image.Resampling.BICUBIC).save(path)
    return path


def write_people(folder: Path, names: str = "ab", photos: int = 4) -> Path:
    """Aligned faces with listed landmarks, so that nobody has to find them; and a list of who is in which split."""
    lines = ["file," + ",".join(f"{axis}{i}" for i in range(5) for axis in "xy")]
    for seed, (name, i) in enumerate((name, i) for name in names for i in range(photos)):
        write_face(folder / name / f"{i}.png", seed)
        lines.append(f"{name}/{i}.png,11,14,21,14,16,19,13,24,19,24")
    (folder / "manifest.csv").write_text("\n".join(lines))
    parts = "".join(f"{name},{part}\n" for name, part in zip(names, ("train", "val")))
    (folder / "splits.csv").write_text(f"id,split\n{parts}")
    return folder


def snapshot(folder: Path) -> dict[str, Any]:
    """Every file and link below a folder, with what it holds."""
    return {str(path.relative_to(folder)): os.readlink(path) if path.is_symlink() else path.read_bytes()
            for path in sorted(folder.rglob("*")) if path.is_symlink() or path.is_file()}


def refused(*arguments: object, naming: object = "", code: int = 2) -> str:
    """What a command says that must fail, in a few lines, without a traceback, naming something."""
    result = run(*arguments)
    assert result.exit_code == code, f"{arguments}\n{result.output}\n{result.exception!r}"
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    assert "Traceback" not in result.output and 1 <= result.stderr.count("\n") <= 4, result.stderr
    assert str(naming) in result.stderr, result.stderr
    return result.stderr


def config(folder: Path, **values: Any) -> Path:
    """A configuration file: JSON is YAML."""
    path = folder / "inputs" / f"{len(list(folder.glob('inputs/*.yml')))}.yml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(values, default=str))
    return path


def finetune_options(place: Path, gt: Path, **more: Any) -> dict[str, Any]:
    return {"name": "own", "datasets": {"train": {"dataroot_gt": gt, "aligned": True, "batch_size_per_gpu": 1,
                                                  "degradation": QUICK["degradation"]}},
            "network_g": {"n_blocks": 1},
            "path": {"pretrain_network_g": place / "model.safetensors", "experiments_root": place / "out"},
            "train": {"total_iters": 4, "warmup_iter": 0, "lr_D": 0.01}, "val": {"val_freq": 2},
            "logger": {"print_freq": 1, "save_checkpoint_freq": 2}} | more


def evaluate_config(place: Path, **more: Any) -> dict[str, Any]:
    return {"model": place / "model.safetensors", "data": place / "faces", "methods": ["generic"], "shots": [1],
            "steps": 0, "recognisers": {"tests (in losses)": "tests"}, "work_dir": place / "out",
            "progress": False} | more


def curve_config(place: Path, **more: Any) -> dict[str, Any]:
    return {"model": place / "model.safetensors", "data": place / "faces", "methods": ["generic", "adapt"],
            "shots": [1], "steps": [0, 2], "degradations": ["hard"], "adapt": QUICK, "max_queries": 2,
            "recognisers": {"tests (in losses)": "tests"}, "work_dir": place / "out", "progress": False,
            "preview": 0} | more


def train_config(place: Path, **more: Any) -> dict[str, Any]:
    return {"data": [place / "faces"], "split": place / "faces" / "splits.csv", "output_dir": place / "out",
            "recogniser": "tests", "pack_size": 16, "stages": [{"size": 16, "steps": 1}]} | more


def meta_config(place: Path, **more: Any) -> dict[str, Any]:
    return {"data": [place / "faces"], "split": place / "faces" / "splits.csv", "output_dir": place / "out",
            "base": place / "model.safetensors", "shots": [1, 1], "queries": 1, "people": 1, "meta_steps": 1,
            "inner": QUICK} | more


# --- pictures -------------------------------------------------------------------------------------------------------


def picture_bytes(kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    levels = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    Image.fromarray(levels).save(stream, kind, **options)
    return stream.getvalue()


@pytest.fixture(scope="session")
def bomb() -> bytes:
    """100 megapixels of one bit in a few kilobytes."""
    stream = io.BytesIO()
    Image.new("1", (10_000, 10_001)).save(stream, "PNG")
    return stream.getvalue()


def truncated(path: Path) -> None:
    path.write_bytes(picture_bytes("PNG")[:200])


def no_picture(path: Path) -> None:
    path.write_bytes(b"\xff\xd8\xff\xe0 the beginning of a JPEG, and then this")


def unreadable(path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may read everything")
    path.write_bytes(picture_bytes("PNG"))
    path.chmod(0)


HOSTILE_PICTURES: dict[str, Callable[[Path], Any]] = {
    "truncated": truncated,
    "empty": Path.touch,
    "wrong-extension": no_picture,
    "link-to-itself": lambda path: path.symlink_to(path.name),
    "link-to-nothing": lambda path: path.symlink_to("nowhere.png"),
    "folder": Path.mkdir,
    "unreadable": unreadable,
}


def commands_that_read_pictures(place: Path, photos: Path) -> dict[str, list[object]]:
    """Every command on a folder of people of whom `a` has bad photos alone."""
    bad, model, out = photos / "a", place / "model.safetensors", place / "out"
    return {
        "restore": ["restore", "-i", bad / "0.png", "-o", out / "new.png", "--model", model, "--aligned"],
        "find": ["restore", "-i", bad / "0.png", "-o", out / "new.png", "--model", model],
        "adapt": ["adapt", bad / "0.png", "-o", out / "a.safetensors", "--model", model],
        "pairs": ["pairs", "--input-dir", bad, "--output-dir", out, "--num-workers", 0],
        "compare": ["compare", "--restored", bad, "--truth", bad, "--recogniser", "tests", "--size", 32],
        "mine-identities": ["mine-identities", bad, "-o", out / "who.csv", "--threshold", 0.5],
        "demo": ["demo", "--album", photos, "--output-dir", out, "--steps", 0, "--shots", 1],
        "evaluate": ["evaluate", "-c", config(place, **evaluate_config(place, data=photos))],
        "curve": ["curve", "-c", config(place, **curve_config(place, data=photos))],
        "fine-tune": ["train", "-opt", config(place, **finetune_options(place, bad))],
        "train": ["train", "-c", config(place, **train_config(place, data=[photos]))],
        "meta-train": ["meta-train", "-c", config(place, **meta_config(place, data=[photos]))],
    }


@pytest.fixture
def spoil(place) -> Callable[[Callable[[Path], Any]], Path]:
    """A folder of people of whom `a` has only photos made by the given function."""
    def spoil_with(make: Callable[[Path], Any]) -> Path:
        photos = write_people(place / "photos")
        for path in (photos / "a").iterdir():
            path.unlink()
            make(path)
        return photos
    return spoil_with


@pytest.mark.parametrize("kind", HOSTILE_PICTURES)
def test_no_command_breaks_on_a_hostile_picture(place, spoil, kind):
    photos = spoil(HOSTILE_PICTURES[kind])
    for command, arguments in commands_that_read_pictures(place, photos).items():
        before = snapshot(place)
        said = refused(*arguments, naming=place)
        after = {name: data for name, data in snapshot(place).items() if not name.startswith("out/cache")}
        assert {name for name in after if name not in before} <= settings_of_runs(after), command
        assert all(after[name] == data for name, data in before.items()), command
        assert any(line.startswith("error: ") for line in said.splitlines()), command


def settings_of_runs(files: dict[str, Any]) -> set[str]:
    """Files in which a run that has begun says what it is: whole, and no result."""
    return {name for name in files if Path(name).name in ("settings.json", "rows.jsonl", "options.yml")}


def test_a_bomb_is_refused_before_it_is_unpacked(place, spoil, bomb, monkeypatch):
    photos = spoil(lambda path: path.write_bytes(bomb))
    monkeypatch.setattr(Image.Image, "convert", None)
    commands = commands_that_read_pictures(place, photos)
    for command in ("restore", "adapt", "pairs", "mine-identities", "fine-tune"):
        assert "too large to open (10000x10001" in refused(*commands[command], naming="0.png")


def test_bad_people_and_photos_do_not_stop_the_others(place, spoil):
    photos = spoil(truncated)
    said = refused("adapt-many", photos, "-o", place / "store", "--model", place / "model.safetensors", code=1)
    assert "a: photo" in said and "b: photo" in said  # b's random pictures show no face
    result = run("album", photos / "a", "--model", place / "model.safetensors")
    assert result.exit_code == 1 and "0.png" in result.stdout and not result.stderr
    write_face(photos / "a" / "good.png")
    said = refused("restore", "-i", photos / "a", "-o", place / "out", "--model", place / "model.safetensors",
                   "--aligned", code=1)
    assert "0.png" in said and [path.name for path in (place / "out").iterdir()] == ["good.png"]
    result = run("pairs", "--input-dir", photos / "a", "--output-dir", place / "pairs", "--num-workers", 0)
    assert result.exit_code == 1 and "1 pairs in" in result.stdout and "3.png" in result.stdout
    assert [path.name for path in (place / "pairs" / "GT").iterdir()] == ["005.png"]


ODD_PICTURES: dict[str, tuple[str, Callable[[], Image.Image], dict[str, Any]]] = {
    "one pixel": ("PNG", lambda: Image.new("RGB", (1, 1), "red"), {}),
    "one bit": ("PNG", lambda: Image.new("1", (9, 9), 1), {}),
    "16 bits": ("PNG", lambda: Image.fromarray(np.full((8, 8), 40_000, np.uint16)), {}),
    "CMYK": ("JPEG", lambda: Image.new("CMYK", (8, 8), (10, 200, 30, 4)), {}),
    "grey with alpha": ("PNG", lambda: Image.new("LA", (8, 8), (90, 120)), {}),
    "animated GIF": ("GIF", lambda: Image.new("P", (8, 8), 1),
                     {"save_all": True, "append_images": [Image.new("P", (8, 8), 2)]}),
    "animated WebP": ("WEBP", lambda: Image.new("RGB", (8, 8), "red"),
                      {"save_all": True, "append_images": [Image.new("RGB", (8, 8), "blue")]}),
    "broken EXIF": ("JPEG", lambda: Image.new("RGB", (8, 8)), {"exif": b"Exif\0\0II*\0\xff\xff\xff\xff"}),
}


def test_odd_pictures_are_pictures(place):
    for name, (kind, make, options) in ODD_PICTURES.items():
        path = place / "photos" / f"{name}.{'jpg' if kind == 'JPEG' else kind.lower()}"
        path.parent.mkdir(exist_ok=True)
        make().save(path, kind, **options)
    model = place / "model.safetensors"
    result = run("restore", "-i", place / "photos", "-o", place / "out", "--model", model, "--aligned")
    assert result.exit_code == 0, result.output
    assert {path.stem for path in (place / "out").iterdir()} == set(ODD_PICTURES)
    assert all(load_photo(path).size == (16, 16) for path in (place / "out").iterdir())
    assert run("pairs", "--input-dir", place / "photos", "--output-dir", place / "pairs", "--num-workers",
               0).exit_code == 0
    refused("restore", "-i", place / "photos" / "one pixel.png", "-o", place / "new.png", "--model", model,
            naming="one pixel.png' shows no face")
    refused("adapt", place / "photos" / "one pixel.png", "-o", place / "a.safetensors", "--model", model,
            naming="one pixel.png")


ODD_NAMES = ("with a space", "Zoë 张伟 🙂", "-rf", "[ab]*?", "new\nline", "%s {x} $HOME `ls`", "'\"", "[bold]x",
             "x" * 250, "a~b", "a..b", os.fsdecode(b"no text \xff"))


@pytest.mark.parametrize("name", ODD_NAMES, ids=range(len(ODD_NAMES)))
def test_odd_names(place, name, monkeypatch):
    photos, model = place / "photos", place / "model.safetensors"
    write_face(photos / f"{name}.png")
    monkeypatch.chdir(photos)
    arguments = ["--model", model, "--aligned"]
    result = run("restore", "-i", f"{name}.png", "-o", place / "one" / f"{name}.png", *arguments)
    assert result.exit_code == 0, result.output
    assert run("restore", "-i", photos, "-o", place / "all", *arguments).exit_code == 0
    once, again = (place / folder / f"{name}.png" for folder in ("one", "all"))
    assert once.read_bytes() == again.read_bytes() and len(snapshot(place / "one")) == 1
    truncated(photos / f"{name}.png")
    said = refused("restore", "-i", f"{name}.png", "-o", again, *arguments)
    assert " ".join(name.split())[:40].encode(errors="backslashreplace").decode() in said
    assert again.read_bytes() == once.read_bytes()


@few
@given(st.data())
def test_a_damaged_picture_is_a_picture_or_a_photo_error(tmp_path_factory, data):
    kind = data.draw(st.sampled_from(["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "PPM"]))
    path = tmp_path_factory.getbasetemp() / f"damaged.{kind.lower()}"
    path.write_bytes(data.draw(mutations(picture_bytes(kind))))
    try:
        assert load_photo(path).mode == "RGB"
    except PhotoError as error:
        assert path.name in str(error)


@few
@given(st.sampled_from("?bBhHiIlLqQefdFDSU"), st.lists(st.integers(0, 5), max_size=4), st.integers(0, 255))
def test_any_array_is_a_picture_or_a_photo_error(kind, shape, value):
    array = np.full(shape, value).astype(kind)
    try:
        image = load_photo(array)
    except PhotoError:
        return
    assert image.mode == "RGB" and image.size == (array.shape[1], array.shape[0])


@st.composite
def mutations(draw: Any, data: bytes) -> bytes:
    """The bytes, cut short or with a few places overwritten, taken out or doubled."""
    if draw(st.booleans()):
        data = data[:draw(st.integers(0, len(data)))]
    for _ in range(draw(st.integers(0, 4))):
        at, junk = draw(st.integers(0, len(data))), draw(st.binary(max_size=8))
        data = data[:at] + junk + data[at + draw(st.sampled_from([0, len(junk), 20])):]
    return data


# --- weights --------------------------------------------------------------------------------------------------------


class Trap:
    """Unpickling this would make a file."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def header(metadata: dict[str, str] | None = None, **tensors: Any) -> bytes:
    text = json.dumps({"__metadata__": metadata or {}, **tensors}).encode()
    return len(text).to_bytes(8, "little") + text


def rewritten(path: Path, change: Callable[[dict, dict], Any]) -> bytes:
    """A safetensors file whose tensors and metadata were changed."""
    tensors, metadata = unpack_tensors(path.read_bytes())
    change(tensors, metadata)
    return save(tensors, metadata)


def first(tensors: dict[str, torch.Tensor]) -> str:
    return min(tensors)


MODEL_CHANGES: dict[str, Callable[[dict, dict], Any]] = {
    "missing key": lambda tensors, _: tensors.pop(first(tensors)),
    "unexpected key": lambda tensors, _: tensors.update(more=torch.zeros(1)),
    "wrong shape": lambda tensors, _: tensors.update({first(tensors): torch.zeros(3, 5)}),
    "no arguments": lambda _, metadata: metadata.pop("gpen"),
    "arguments that are no JSON": lambda _, metadata: metadata.update(gpen="{"),
    "unknown arguments": lambda _, metadata: metadata.update(gpen='{"width": 3}'),
    "arguments of another type": lambda _, metadata: metadata.update(gpen='{"size": "16"}'),
    "a size for all memory": lambda _, metadata: metadata.update(gpen=json.dumps({"size": 2**24})),
    "a width for all memory": lambda _, metadata: metadata.update(gpen=json.dumps({"size": 16, "narrow": 4096.0})),
    "a start that is none": lambda _, metadata: metadata.update(start="7"),
    "a rule that is none": lambda _, metadata: metadata.update(rule='{"spec": 3}'),
    "a card that is none": lambda _, metadata: metadata.update(card="[1]"),
    "another format": lambda _, metadata: metadata.update(format="metagpen-model-99"),
}


def hostile_models(place: Path) -> dict[str, Path]:
    """Files that claim to be weights."""
    whole = (place / "model.safetensors").read_bytes()
    contents = {f"{name}.safetensors": rewritten(place / "model.safetensors", change)
                for name, change in MODEL_CHANGES.items()}
    contents |= {
        "cut short.safetensors": whole[: len(whole) // 2], "empty.safetensors": b"", "empty.pth": b"",
        "text.pth": b"weights", "a huge header.safetensors": (2**62).to_bytes(8, "little") + b"{",
        "a header beyond the end.safetensors": (10**6).to_bytes(8, "little") + b"{}",
        "tensors beyond the end.safetensors": header(x={"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}),
        "a pickle.pth": pickle.dumps(Trap(place / "executed"), protocol=2),
        "a picture.pth": picture_bytes("PNG"),
    }  # fmt: skip
    files = {name: place / "inputs" / name for name in contents}
    (place / "inputs").mkdir(exist_ok=True)
    for name, data in contents.items():
        files[name].write_bytes(data)
    gpen = load_file(place / "model.safetensors")
    for name, state in {
        "a trap.pth": {"g_ema": Trap(place / "executed")}, "numbers.pth": {1: torch.zeros(1)}, "a list.pth": [1],
        "flat.pth": {name.removeprefix("gpen."): torch.zeros(()) for name in gpen},
        "hollow.pth": {name.removeprefix("gpen."): value[:0] for name, value in gpen.items() if value.ndim},
    }.items():  # fmt: skip
        files[name] = place / "inputs" / name
        torch.save(state, files[name])
    return files


def test_no_hostile_file_is_a_model(place):
    write_face(place / "photo.png")
    out = place / "new.png"
    out.write_bytes(PRECIOUS)
    for name, file in hostile_models(place).items():
        refused("restore", "-i", place / "photo.png", "-o", out, "--aligned", "--model", file, naming=file)
        assert out.read_bytes() == PRECIOUS and not (place / "executed").exists(), name
    refused("restore", "-i", place / "photo.png", "-o", out, "--model", place, naming=place)
    assert len(list(place.iterdir())) == 5


@pytest.mark.parametrize("name", ["a trap.pth", "wrong shape.safetensors", "a header beyond the end.safetensors"])
def test_no_command_takes_a_hostile_model(place, name):
    file = hostile_models(place)[name]
    write_face(place / "photos" / "a" / "1.png")
    options = finetune_options(place, place / "photos" / "a")
    critic = {**options, "path": {**options["path"], "pretrain_network_d": file}}
    options["path"]["pretrain_network_g"] = file
    for arguments in (
        ["adapt", place / "photos" / "a", "-o", place / "out" / "a.safetensors", "--model", file],
        ["adapt-many", place / "photos", "-o", place / "out", "--model", file],
        ["evaluate", "-c", config(place, **evaluate_config(place, model=file))],
        ["curve", "-c", config(place, **curve_config(place, model=file))],
        ["meta-train", "-c", config(place, **meta_config(place, base=file))],
        ["train", "-opt", config(place, **options)],
        ["train", "-opt", config(place, **critic)],
        ["compare", "--restored", place / "faces" / "a", "--truth", place / "faces" / "a", "--recogniser", file],
        ["mine-identities", place / "faces", "-o", place / "out" / "who.csv", "--recogniser", file],
        ["evaluate", "-c", config(place, **evaluate_config(place, recognisers={"other": file}))],
    ):
        before = snapshot(place)
        refused(*arguments, naming=file)
        assert snapshot(place) == before and not (place / "executed").exists(), arguments


PERSON_CHANGES: dict[str, Callable[[dict, dict], Any]] = {
    "missing key": lambda tensors, _: tensors.pop("latent.offset"),
    "unexpected key": lambda tensors, _: tensors.update(more=torch.zeros(1)),
    "wrong shape": lambda tensors, _: tensors.update({"latent.offset": torch.zeros(3)}),
    "no number": lambda tensors, _: tensors["latent.offset"].fill_(torch.nan),
    "a rank that is not its own": lambda tensors, _: tensors.update({"linear.weight.down": torch.zeros(1, 256)}),
    "no spec": lambda _, metadata: metadata.pop("spec"),
    "a spec that is none": lambda _, metadata: metadata.update(spec="[]"),
    "a spec for another model": lambda _, metadata: metadata.update(spec='{"tail_blocks": 9}'),
    "a spec of words": lambda _, metadata: metadata.update(spec='{"tail_blocks": "all"}'),
    "no model": lambda _, metadata: metadata.pop("model"),
    "another model": lambda _, metadata: metadata.update(model="0" * 64),
    "metadata that is none": lambda _, metadata: metadata.update(metadata="3"),
    "another format": lambda _, metadata: metadata.update(format="metagpen-person-99"),
}


@pytest.fixture
def ada(place, tiny_model) -> Path:
    """Somebody's file, for the model of the place."""
    spec, generator = AdapterSpec(1, 2), torch.Generator().manual_seed(0)
    parameters = new_parameters(tiny_model.gpen, spec, 1, generator)
    return Person(tiny_model, spec, parameters, {"recogniser": "tests"}).save(place / "inputs" / "ada.safetensors")


def test_no_hostile_file_is_a_person(place, ada):
    write_face(place / "photo.png")
    arguments = ["restore", "-i", place / "photo.png", "-o", place / "new.png", "--aligned", "--model",
                 place / "model.safetensors"]
    assert run(*arguments, "--person", ada).exit_code == 0
    restored = (place / "new.png").read_bytes()
    contents = {name: rewritten(ada, change) for name, change in PERSON_CHANGES.items()}
    contents |= {"cut short": ada.read_bytes()[:500], "empty": b"", "a pickle": pickle.dumps(Trap(place / "executed")),
                 "a model": (place / "model.safetensors").read_bytes(), "a huge header": (2**62).to_bytes(8, "little")}
    store = place / "store"
    store.mkdir()
    for name, data in contents.items():
        for file in (place / "inputs" / f"{name}.safetensors", store / "ada.safetensors"):
            file.write_bytes(data)
        refused(*arguments, "--person", place / "inputs" / f"{name}.safetensors", naming=f"{name}.safetensors")
        refused(*arguments, "--store", store, naming=store / "ada.safetensors")
        assert (place / "new.png").read_bytes() == restored and not (place / "executed").exists(), name
    (store / "ada.safetensors").rename(store / "Not a name.safetensors")
    refused(*arguments, "--store", store, naming="Not a name.safetensors")
    refused(*arguments, "--store", place / "photo.png", naming=place / "photo.png")
    refused(*arguments, "--store", "nowhere://people", naming="nowhere://people")
    refused(*arguments, "--person", store, naming=store)


IRS = {
    "no graph": "<html/>", "no layers": "<net><layers/><edges/></net>",
    "a loop": '<net><layers><layer id="0" type="Add"/></layers><edges><edge from-layer="0" to-layer="0" to-port="0"/>'
              "</edges></net>",
    "a billion laughs": '<!DOCTYPE x [<!ENTITY a "ha">' + "".join(
        f'<!ENTITY {b} "{10 * f"&{a};"}">' for a, b in zip("abcdefghi", "bcdefghij")) + "]><net>&j;</net>",
    "an edge to nowhere": '<net><layers><layer id="0"/></layers><edges><edge to-port="x"/></edges></net>',
    "a constant without a place": '<net><layers><layer id="0" type="Const"><data/></layer></layers><edges/></net>',
}  # fmt: skip


def test_no_hostile_file_is_a_recogniser(place):
    (place / "inputs").mkdir()
    for name, text in IRS.items():
        file = place / "inputs" / f"{name}.xml"
        file.write_text(text)
        file.with_suffix(".bin").touch()
        with pytest.raises(CheckpointError, match=name):
            recognise.load(file)
    student = place / "inputs" / "student.safetensors"
    for state, metadata in (({"place": torch.zeros(4)}, {"architecture": "metagpen-mobileface-3"}),
                            ({"linear7.conv.weight": torch.zeros(())}, {}),
                            (dict.fromkeys(("layer1.0.conv1.weight", "fc.weight", "features.weight"), torch.zeros(2)),
                             {})):
        save_file({name: value.clone() for name, value in state.items()}, student, metadata)
        with pytest.raises(CheckpointError, match="student"):
            recognise.load(student)


@few
@given(data=st.data())
def test_damaged_weights_are_weights_or_a_checkpoint_error(weights, data):
    name = data.draw(st.sampled_from(sorted(weights)))
    file = weights[name].with_stem("damaged")
    file.write_bytes(data.draw(mutations(weights[name].read_bytes())))
    model = metagpen.load(weights["model"])
    try:
        Person.load(file, model) if name == "person" else metagpen.load(file)
    except CheckpointError as error:
        assert "damaged" in str(error)


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> dict[str, Path]:
    """A model, a plain generator and a Person."""
    from metagpen.gpen import GPEN

    folder = tmp_path_factory.mktemp("weights")
    gpen = GPEN(16, 1, 0.03125, style_dim=16, n_mlp=2)
    files = {"model": MetaGPEN(gpen).frozen().save(folder / "model.safetensors"), "plain": folder / "plain.pth"}
    torch.save(gpen.state_dict(), files["plain"])
    model, spec = metagpen.load(files["model"]), AdapterSpec(1, 2)
    person = Person(model, spec, new_parameters(model.gpen, spec, 1, torch.Generator().manual_seed(0)))
    return files | {"person": person.save(folder / "person.safetensors")}


# --- configurations and lists ---------------------------------------------------------------------------------------


HOSTILE_YAML = {
    "python objects": "seed: !!python/object/apply:os.mkdir ['{marker}']",
    "a python name": "seed: !!python/name:os.system",
    "a key given twice": "seed: 1\nseed: 2",
    "another type": "seed: [1, 2]",
    "another type below": "recognisers: 3\ndatasets: 4\nstages: 5\ndegradation: 6",
    "no mapping": "- a\n- b",
    "a word": "seed",
    "an impossible date": "seed: 2024-13-45",
    "an impossible number": "seed: !!int many",
    "no truth": "seed: !!bool perhaps",
    "keys that are no words": "? [a, b]\n: 1",
    "numbers for keys": "1: 2",
    "itself": "seed: &a [*a]",
    "deep": "seed: " + "[" * 3000,
    "laughs": "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"{b}: &{b} [{', '.join(9 * [f'*{a}'])}]\n" for a, b in zip("abcdefgh", "bcdefghi"))
        + "seed: *i",
    "no text": "\x00\x01",
    "a tab": "seed:\t\t{",
}  # fmt: skip


def test_no_hostile_yaml_is_a_configuration(place):
    write_face(place / "photos" / "a" / "1.png")
    file, folder = place / "bad.yml", place / "folder.yml"
    folder.mkdir()
    latin, empty = place / "latin.yml", place / "empty.yml"
    latin.write_bytes("name: Zoë".encode("latin-1"))
    empty.touch()
    commands: list[list[object]] = [
        ["evaluate", "-c"], ["curve", "-c"], ["train", "-c"], ["train", "-opt"], ["meta-train", "-c"],
        ["adapt", place / "photos" / "a", "-o", place / "a.safetensors", "-c"],
        ["adapt-many", place / "photos", "-o", place / "store", "-c"],
    ]  # fmt: skip
    for command in commands:
        for name, text in HOSTILE_YAML.items():
            if command == commands[0] or name in ("python objects", "a key given twice", "another type"):
                file.write_text(text.replace("{marker}", str(place / "executed")))
                said = refused(*command, file, naming=file)
                assert len(said) < 4000 and not (place / "executed").exists(), name
        refused(*command, folder, naming=folder)
    for other in (latin, place / "missing.yml", place / "model.safetensors"):
        refused(*commands[0], other, naming=other)
    for command in commands[:5]:
        assert "is required" in refused(*command, empty, naming=empty) or command[0] == "meta-train"
    assert not (place / "a.safetensors").exists() and not (place / "store").exists()


@pytest.mark.parametrize("text", ["seed", "=1", "seed=[", "seed=!!python/name:os.system", "seed=2024-13-45",
                                  "seed.deep=1", ".=1", "seed=\x00"])
def test_hostile_overrides(place, text):
    write_face(place / "photos" / "a" / "1.png")
    for command in (["adapt", place / "photos" / "a", "-o", place / "a.safetensors"], ["train"], ["evaluate"]):
        refused(*command, "-s", text)


yaml_like = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda below: st.lists(below, max_size=3) | st.dictionaries(st.text(max_size=8), below, max_size=3), max_leaves=8)


@few
@given(st.dictionaries(st.sampled_from(sorted(AdaptConfig.model_fields)) | st.text(max_size=6), yaml_like, max_size=4))
def test_any_mapping_is_a_configuration_or_a_config_error(values):
    try:
        AdaptConfig.from_dict(values)
    except ConfigError as error:
        assert "\n" not in str(error)


@settings(few, max_examples=150)
@given(st.text(alphabet="ab:-[]{}&*!?|>'\"%@#,. \n\t01ex~<=", max_size=40) | st.binary(max_size=40))
def test_any_file_is_yaml_or_a_config_error(tmp_path_factory, text):
    file = tmp_path_factory.getbasetemp() / "any.yml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    try:
        AdaptConfig.from_yaml(file)
    except ConfigError as error:
        assert "any.yml" in str(error)


HOSTILE_SPLITS = {
    "other columns": b"name,part\na,train\n", "nothing": b"", "columns alone": b"id,split\n",
    "a stranger": b"id,split\na,train\nb,val\nc,train\n", "somebody twice": b"id,split\na,train\na,val\nb,val\n",
    "too few values": b"id,split\na\n", "no part": b"id,split\na,\nb,val\n", "nobody of these": b"id,split\nx,val\n",
    "latin": "id,split\na,train\nb,val\nZoë,val\n".encode("latin-1"), "bytes": b"id,split\n\x00\xff\n",
    "a huge value": b"id,split\na," + b"x" * 200_000 + b"\n", "a picture": picture_bytes("PNG"),
    "an open quote": b'id,split\na,"train\nb,val\n',
}  # fmt: skip


def test_no_hostile_list_is_a_split(place):
    file = place / "bad.csv"
    commands = [["train", "-c", config(place, **train_config(place, split=file))],
                ["meta-train", "-c", config(place, **meta_config(place, split=file))],
                ["evaluate", "-c", config(place, **evaluate_config(place, split_file=file))],
                ["curve", "-c", config(place, **curve_config(place, split_file=file))]]  # fmt: skip
    for command in commands:
        refused(*command, naming=file)  # it is not there
        for name, data in HOSTILE_SPLITS.items():
            if command[0] == "curve" and name == "a stranger":
                continue  # the curve passes strangers over: its people are fewer than the list's
            file.write_bytes(data)
            before = snapshot(place)
            refused(*command, naming=file)
            assert snapshot(place) == before, name
        file.unlink()


@few
@given(st.sampled_from([b"", b"id,split\n"]), st.binary(max_size=40) | st.text('id,split\n\r"ab ').map(str.encode))
def test_any_file_is_a_split_or_a_data_error(tmp_path_factory, head, data):
    file = tmp_path_factory.getbasetemp() / "any.csv"
    file.write_bytes(head + data)
    try:
        metagpen.identities.read_split(file)
    except DataError as error:
        assert "any.csv" in str(error)


# --- rows and what runs leave behind --------------------------------------------------------------------------------


ROW = {"dataset": "d", "degradation": "hard", "method": "generic", "shots": 0, "steps": 0, "metric": "psnr",
       "recogniser": None, "identity": "a", "value": 1.0, "seed": 0, "seconds": 0.0, "commit": "c", "machine": "m",
       "queries": 1}  # fmt: skip


def test_no_hostile_file_is_rows(place):
    line = json.dumps(ROW).encode()
    contents = {"nothing.jsonl": b"", "text.jsonl": b"rows\n", "a list.jsonl": b"[1]\n", "null.jsonl": b"null\n",
                "cut.jsonl": line[:40], "cut.jsonl.gz": gzip.compress(line)[:-9], "plain.jsonl.gz": line,
                "damaged.jsonl.gz": gzip.compress(100 * line)[:30] + b"\xff" * 40,
                "rows of what.jsonl": b'{"rows": 3}\n'}
    for key, value in (("value", "high"), ("value", True), ("shots", None), ("method", 3), ("seconds", [1]),
                       ("value", math.nan), ("seconds", math.inf), ("value", 10**400),
                       ("dataset", "../escaped"), ("dataset", "/tmp/x"), ("dataset", ""), ("recogniser", None)):
        contents[f"{key} {str(value).replace('/', '')[:20]}.jsonl"] = json.dumps({**ROW, key: value}).encode() + b"\n"
    for name, data in contents.items():
        (place / name).write_bytes(data)
    before = snapshot(place)
    for name in contents:
        refused("curve-report", place / name, "-o", place / "out" / "in", naming=place / name)
    for other in (place, place / "missing.jsonl"):
        refused("curve-report", other, "-o", place / "out" / "in", naming=other)
    assert snapshot(place) == before and not (place / "out").exists()


@pytest.mark.parametrize("junk", [b"{\n", b"[1]\n", b"\xff\xfe\n", b'{"unit": 3}\n'])
def test_what_a_run_left_behind_may_be_damaged(place, junk):
    runs = {
        "curve": ["curve", "-c", config(place, **curve_config(place, methods=["generic"], work_dir=place / "c"))],
        "evaluate": ["evaluate", "-c", config(place, **evaluate_config(place, work_dir=place / "e"))],
    }
    for name, arguments in runs.items():
        assert run(*arguments).exit_code == 0
        kept, = (place / name[0]).glob("*/*s.jsonl" if name == "evaluate" else "*/units.jsonl")
        whole = kept.read_bytes()
        kept.write_bytes(junk + whole)
        refused(*arguments, naming=kept)
        assert kept.read_bytes() == junk + whole, "a person decides what to do with it"
        kept.write_bytes(whole)
        assert run(*arguments).exit_code == 0
    settings_file, = (place / "c").glob("*/settings.json")
    settings_file.write_bytes(junk)
    refused(*runs["curve"], naming=settings_file.parent)


# --- a full disk ----------------------------------------------------------------------------------------------------


@contextmanager
def full_disk() -> Iterator[None]:
    """No file can grow beyond 0 bytes, whoever writes it, in whatever language: a disk without room."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def found_faces(monkeypatch):
    """Every photo counts as the aligned crop of a face."""
    from metagpen.adaptation import Album, loop
    from metagpen.faces import FFHQ_LANDMARKS, to_tensor

    def album(photos, size, device="cpu"):
        crops = torch.stack([to_tensor(load_photo(photo).resize((size, size))) for photo in photos])
        return Album(crops, torch.from_numpy(FFHQ_LANDMARKS * size).float().repeat(len(crops), 1, 1))

    monkeypatch.setattr(loop, "album", album)


def writing_commands(place: Path) -> dict[str, tuple[Path, list[object]]]:
    """For every command that writes: a file that it would replace, and its arguments."""
    faces, out, model = place / "faces", place / "out", place / "model.safetensors"
    quick = ["-c", config(place, **QUICK, steps=0)]
    rows = place / "inputs" / "rows.jsonl"
    rows.write_text("".join(json.dumps({**ROW, "identity": name, **kind}) + "\n" for name in "ab" for kind in (
        {}, {"metric": "identity", "recogniser": "r"})))
    mine = ["--threshold", 0.001, "--min-photos", 1]
    return {
        "restore": (out / "new.png", ["restore", "-i", faces / "a" / "0.png", "-o", out / "new.png", "--aligned",
                                      "--model", model]),
        "adapt": (out / "a.safetensors", ["adapt", faces / "a", "-o", out / "a.safetensors", "--model", model,
                                           "--keep-all", *quick]),
        "adapt-many": (out / "adapt_many.json", ["adapt-many", faces, "-o", out, "--model", model, *quick]),
        "pairs": (out / "GT" / "001.png", ["pairs", "--input-dir", faces / "a", "--output-dir", out, "--overwrite",
                                           "--num-workers", 0]),
        "compare": (out / "f.json", ["compare", "--restored", faces / "a", "--truth", faces / "a", "--recogniser",
                                     "tests", "--size", 32, "-o", out / "f.json"]),
        "mine-identities": (out / "who.csv", ["mine-identities", faces, "-o", out / "who.csv", *mine]),
        "evaluate": (out / "f.json", ["evaluate", "-c", config(place, **evaluate_config(
            place, output=out / "f.json"))]),
        "curve": (out / "r.jsonl", ["curve", "-c", config(place, **curve_config(place, output=out / "r.jsonl"))]),
        "curve-report": (out / "curve.md", ["curve-report", rows, "-o", out]),
        "fine-tune": (out / "own" / "options.yml", ["train", "-opt", config(place, **finetune_options(
            place, faces / "a"))]),
        "demo": (out / "a.jpg", ["demo", "--album", faces, "--output-dir", out, "--steps", 0, "--shots", 1]),
    }  # fmt: skip


@pytest.mark.parametrize("command", ["restore", "adapt", "adapt-many", "pairs", "compare", "mine-identities",
                                     "evaluate", "curve", "curve-report", "fine-tune", "demo"])
def test_a_full_disk_loses_nothing(place, command, found_faces):
    (place / "inputs").mkdir()
    output, arguments = writing_commands(place)[command]
    output.parent.mkdir(parents=True)
    if command != "adapt-many":  # whose settings must be readable
        output.write_bytes(PRECIOUS)
    before = snapshot(place)
    with full_disk():
        result = run(*arguments)
    assert snapshot(place) == before, "nothing half-written, nothing lost"
    assert result.exit_code == 2 and isinstance(result.exception, SystemExit), f"{result.output} {result.exception!r}"
    assert result.stderr.startswith("error: ") and str(place / "out") in result.stderr, result.stderr
    assert any(word in result.stderr for word in ("too large", "cannot be written")), result.stderr


def test_outputs_that_cannot_be(place, monkeypatch):
    """A device, a folder, a file in the way, and no room left at the last moment."""
    photo, model = write_face(place / "photo.png"), place / "model.safetensors"
    (place / "folder.png").mkdir()
    (place / "file").write_bytes(PRECIOUS)
    (place / "full.png").symlink_to("/dev/full")
    (place / "null.json").symlink_to("/dev/null")
    arguments = ["restore", "-i", photo, "--model", model, "--aligned", "-o"]
    faces = place / "faces" / "a"
    compare = ["compare", "--restored", faces, "--truth", faces, "--recogniser", "tests"]
    before = snapshot(place)
    refused(*arguments, "/dev/full", naming="/dev/full: not a folder")
    refused(*arguments, place / "full.png", naming="full.png: a device or a pipe")
    refused(*compare, "-o", place / "null.json", naming="null.json: a device or a pipe")
    refused(*arguments, place / "file" / "new.png", naming=place / "file")
    refused(*arguments, place / "file", naming="need a folder")
    refused(*arguments, photo, naming="would replace the input")
    (place / "link.png").symlink_to(photo.name)
    refused(*arguments, place / "link.png", naming="would replace the input")
    (place / "link.png").unlink()
    monkeypatch.setattr(os, "replace", no_room)
    new = place / "full" / "new.png"
    refused(*arguments, new, naming=f"{new}: No space left on device; free some space")
    refused(*arguments[:2], place / "faces" / "a", *arguments[3:], place / "photo.png" / "in", naming="photo.png")
    assert snapshot(place) == before
    assert not [path for path in Path("/dev").iterdir() if path.name.endswith(".part")]


def test_no_output_replaces_what_is_read(place):
    """Of the commands whose output may have any name."""
    faces, model, split = place / "faces", place / "model.safetensors", place / "faces" / "splits.csv"
    people = ["-s", "split=val", "-s", f"split_file={split}"]
    commands = {
        "compare": ["compare", "--restored", faces / "a", "--truth", faces / "b", "--recogniser", "tests", "-o"],
        "mine-identities": ["mine-identities", faces, "--threshold", 0.5, "-o"],
        "evaluate": ["evaluate", "-c", config(place, **evaluate_config(place)), *people, "-o"],
        "curve": ["curve", "-c", config(place, **curve_config(place)), *people, "-s"],
    }
    read = {"compare": [faces / "a" / "0.png", faces / "b" / "1.png"], "mine-identities": [faces / "a" / "2.png"],
            "evaluate": [commands["evaluate"][2], split, model, faces / "b" / "0.png"],
            "curve": [commands["curve"][2], split, model, faces / "b" / "0.png"]}  # fmt: skip
    before = snapshot(place)
    for name, files in read.items():
        for file in files:
            refused(*commands[name], f"output={file}" if name == "curve" else file, naming="would replace")
    assert snapshot(place) == before


def test_stage_2_without_a_critic_is_refused_before_anything_is_read(place):
    said = refused("adapt", place / "faces" / "a", "-o", place / "ada", "-s", "adversarial_steps=1",
                   "--model", place / "model.safetensors", naming="adversarial_steps")
    assert "train -opt" in said


def no_room(*_: object) -> None:
    raise OSError(28, "No space left on device")


# --- kills and interruptions ----------------------------------------------------------------------------------------


class Killed(BaseException):
    """Nothing catches it; and from it on nothing on the disk changes any more."""


@contextmanager
def dying_at(number: int, how: type[BaseException] = Killed) -> Iterator[None]:
    """Raises at the number-th moment at which a file is flushed or takes its place; who is killed does not tidy up."""
    moments, unlink, dead = count(1), os.unlink, []

    def mortal(function: Callable) -> Callable:
        def call(*arguments: Any, **more: Any) -> Any:
            if dead or next(moments) == number:
                dead.extend([how] if how is Killed else [])
                raise how
            return function(*arguments, **more)
        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", mortal(os.replace))
        patch.setattr(os, "fsync", mortal(os.fsync))
        patch.setattr(os, "unlink", lambda *arguments, **more: None if dead else unlink(*arguments, **more))
        yield


def finishes(arguments: list[object], dies_at: int) -> bool:
    """Whether a command comes to its end before that moment."""
    try:
        with dying_at(dies_at):
            result = run(*arguments)
    except Killed:
        return False
    assert result.exit_code == 0, f"{result.output}\n{result.exception!r}"
    return True


def killed_once(command: Callable[[str], list[object]], step: int = 1) -> list[str]:
    """Folders, one for every moment (or every few) at which the command was killed and then begun again."""
    folders = []
    for number in count(1, step):
        if finishes(command(f"killed{number}"), number):
            return folders
        folders.append(f"killed{number}")
        assert run(*command(folders[-1])).exit_code == 0


def killed_again_and_again(arguments: list[object]) -> int:
    """How often a command had to be begun that is killed ever later, until it came to its end."""
    return next(number for number in count(1) if finishes(arguments, number))


def tensors_of(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    return {path.name: load_file(path) for path in sorted(folder.glob("*.safetensors"))}


def same(one: dict[str, dict[str, torch.Tensor]], other: dict[str, dict[str, torch.Tensor]]) -> bool:
    return one.keys() == other.keys() and all(
        one[file].keys() == other[file].keys() and all(torch.equal(one[file][n], other[file][n]) for n in one[file])
        for file in one)


def numbers(file: Path) -> list[dict[str, Any]]:
    """Rows without what may differ when a run is repeated."""
    return [{**json.loads(line), "seconds": 0} for line in file.read_text().splitlines()]


def test_adapt_many_may_be_killed_at_any_moment(place, found_faces, tiny_model):
    def command(store: str) -> list[object]:
        return ["adapt-many", place / "faces", "-o", place / store, "--model", place / "model.safetensors", "--batch",
                1, "-c", config(place, **QUICK, steps=1)]

    assert run(*command("whole")).exit_code == 0
    folders = killed_once(command)
    assert len(folders) == 6, "the settings and two people, each flushed and put into place"
    for folder in folders:
        assert same(tensors_of(place / folder), tensors_of(place / "whole"))
        store = PersonStore(place / folder, tiny_model)
        assert sorted(store) == ["a", "b"] and all(store[name].metadata["shots"] == 4 for name in store)


def test_a_fine_tune_may_be_killed_at_any_moment(place, monkeypatch):
    monkeypatch.setattr("metagpen.finetune.train.plot_curves", lambda path, *_: path.write_bytes(b"slow to draw"))

    def command(name: str) -> list[object]:
        return ["train", "-opt", config(place, **finetune_options(place, place / "faces" / "a", name=name))]

    assert run(*command("whole")).exit_code == 0
    assert killed_again_and_again(command("again")) > 6
    whole = place / "out" / "whole"
    for killed in [place / "out" / name for name in ("again", *killed_once(command, step=3))]:
        assert same(tensors_of(whole / "models"), tensors_of(killed / "models"))
        for name in ("log.csv", "validation.csv"):
            assert (whole / name).read_text() == (killed / name).read_text()


@pytest.mark.parametrize("kind", ["train", "meta-train"])
def test_a_training_may_be_killed_at_any_moment(place, kind):
    options = {"train": partial(train_config, stages=[{"size": 16, "steps": 3, "batch_size": 2}], sheet_every=2),
               "meta-train": partial(meta_config, meta_steps=3, validate_every=2, validate_people=1,
                                     validate_queries=1)}[kind]  # fmt: skip

    def command(folder: str) -> list[object]:
        return [kind, "-c", config(place, **options(place, output_dir=place / folder, save_every=1))]

    def logged(folder: str) -> list[dict[str, Any]]:
        return [{key: value for key, value in json.loads(line).items() if not key.endswith("_per_second")}
                for line in (place / folder / "log.jsonl").read_text().splitlines()]

    assert run(*command("whole")).exit_code == 0
    assert killed_again_and_again(command("again")) > 4
    for folder in ("again", *killed_once(command, step=5)):
        assert logged(folder) == logged("whole") and len(logged(folder)) == 3
        assert torch.equal(*(load_file(place / name / "ema.safetensors")["gpen.final_linear.0.weight"]
                             for name in (folder, "whole")))


def test_a_curve_may_be_killed_at_any_moment(place):
    def command(folder: str) -> list[object]:
        return ["curve", "-c", config(place, **curve_config(place, work_dir=place / folder))]

    def rows(folder: str) -> list[dict[str, Any]]:
        return numbers(next((place / folder).glob("*/rows.jsonl")))

    assert run(*command("whole")).exit_code == 0
    assert killed_again_and_again(command("again")) > 2
    folders = killed_once(command)
    assert len(folders) == 6, "the settings, four units, the rows"
    assert len(rows("whole")) > 10 and all(rows(folder) == rows("whole") for folder in ("again", *folders))


def test_pairs_may_be_killed_at_any_moment(place):
    def command(folder: str) -> list[object]:
        return ["pairs", "--input-dir", place / "faces" / "a", "--output-dir", place / folder, "--num-workers", 0,
                "--overwrite"]

    assert run(*command("whole")).exit_code == 0
    folders = killed_once(command)
    assert len(folders) == 8, "both sides of four pairs"
    for folder in folders:
        found = {name: data for name, data in snapshot(place / folder).items() if not name.endswith(".part")}
        assert found == snapshot(place / "whole")


@pytest.mark.parametrize("command", ["restore", "adapt", "adapt-many", "pairs", "evaluate", "curve", "fine-tune"])
def test_an_interruption_leaves_no_litter_and_can_be_resumed(place, command, found_faces):
    (place / "inputs").mkdir()
    output, arguments = writing_commands(place)[command]
    for number in (1, 2, 4):
        with dying_at(number, KeyboardInterrupt):
            result = run(*arguments)
        assert result.exit_code in (130, 0), f"{result.output}\n{result.exception!r}"
        assert result.exit_code == 0 or ("interrupted" in result.stderr and "Traceback" not in result.output)
        assert not [name for name in snapshot(place) if name.endswith((".part", ".tmp"))]
    assert run(*arguments).exit_code == 0 and output.exists()


@pytest.mark.skipif(os.name != "posix", reason="sends a signal to a group of processes")
def test_control_c_ends_the_workers_of_pairs_too(place):
    """A real one, which the terminal sends to every process of the command."""
    for i in range(120):
        write_face(place / "photos" / f"{i:03}.png", i, side=200)
    command = [sys.executable, "-m", "metagpen", "pairs", "--input-dir", str(place / "photos"), "--output-dir",
               str(place / "out"), "--num-workers", "2"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True,
                               env={**os.environ, "OMP_NUM_THREADS": "1"},
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # a shell's & ignores
    deadline = time.monotonic() + 240
    while process.poll() is None and time.monotonic() < deadline and not list(place.glob("out/LR/*.png")):
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=240)
    assert process.returncode == 130 and "interrupted" in said and "Traceback" not in said, said
    wait_for_the_end_of(process.pid)
    found = snapshot(place / "out")
    assert 0 < len(found) < 240 and all(name.endswith(".png") for name in found)
    assert {name for name in found if name.startswith("GT")} == {
        name.replace("LR", "GT") for name in found if name.startswith("LR")}


# --- names ----------------------------------------------------------------------------------------------------------


@settings(few, max_examples=200)
@given(st.text(max_size=200))
def test_any_name_has_a_file_of_its_own(name):
    from metagpen.person.store import decoded, file_name

    stem = file_name(name)
    assert len(os.fsencode(stem)) <= 200 and "/" not in stem and stem not in (".", "..") and stem == stem.lower()
    assert decoded(stem) == name if "~" not in stem else decoded(stem) is None


def test_every_error_of_ours_is_one_that_the_command_line_explains():
    from metagpen import errors

    ours = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    assert len(ours) > 4 and all(issubclass(kind, MetagpenError) for kind in ours)


def test_a_hidden_photo_is_taken_only_when_named(place):
    """What a Mac leaves beside each photo on a foreign disk, "._a.png", is none; a folder's reader passes it over."""
    photos, model = place / "photos", place / "model.safetensors"
    write_face(photos / ".a.png")
    write_face(photos / "b.png")
    truncated(photos / "._b.png")
    arguments = ["--model", model, "--aligned"]
    assert run("restore", "-i", photos, "-o", place / "all", *arguments).exit_code == 0
    assert [path.name for path in (place / "all").iterdir()] == ["b.png"]
    assert run("restore", "-i", photos / ".a.png", "-o", place / "one.png", *arguments).exit_code == 0
