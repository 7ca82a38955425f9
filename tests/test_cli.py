"""The command line: help, exit codes, one-line errors, and what it leaves unimported."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import REPOSITORY
from PIL import Image
from typer.testing import CliRunner

import metagpen
import metagpen.weights
from metagpen.cli import app, given_flags, restore_targets
from metagpen.errors import DataError

COMMANDS = ("demo", "pairs", "train", "meta-train", "adapt", "adapt-many", "restore", "evaluate", "compare", "curve",
            "curve-report", "mine-identities", "weights")


def run(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def error_line(*arguments: object) -> str:
    """The one line on stderr of a command that must fail with exit code 2."""
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert "Traceback" not in result.output
    return result.stderr.strip()


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_explains_itself(command):
    result = run(command, "--help")
    assert result.exit_code == 0 and "Usage" in result.output


def test_help_lists_the_commands():
    output = run("--help").output
    assert all(command in output for command in COMMANDS)


def test_the_reference_in_docs_knows_every_command():
    text = (REPOSITORY / "docs" / "cli.md").read_text()
    assert all(f"metagpen {command}" in text for command in COMMANDS)


def test_version():
    result = run("--version")
    assert result.exit_code == 0 and result.output.strip() == f"metagpen {metagpen.__version__}"


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory"),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")])
def test_too_little_memory_is_told_in_a_line(monkeypatch, error):
    def raised(*_, **__):
        raise error

    monkeypatch.setattr(metagpen.weights, "available", raised)
    assert "not enough memory" in error_line("weights")
    monkeypatch.setattr(metagpen.weights, "available", lambda: 1 / 0)
    assert isinstance(run("weights").exception, ZeroDivisionError), "a fault of ours keeps its traceback"


def test_an_unknown_flag_is_a_usage_error():
    assert run("demo", "--stepz", "3").exit_code == 2


def test_importing_is_light():
    """Neither the library nor the command line loads a heavy library before it is used."""
    heavy = "{'torch', 'torchvision', 'kornia', 'facenet_pytorch', 'lpips', 'matplotlib', 'numpy', 'onnxruntime'}"
    code = f"import sys, metagpen, metagpen.cli; print(sorted({heavy} & set(sys.modules)))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"


def test_the_module_runs_and_keeps_the_exit_code(tmp_path):
    command = [sys.executable, "-m", "metagpen", "adapt", str(tmp_path / "none"), "-o", str(tmp_path / "a.safetensors")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr == f"error: {tmp_path / 'none'}: no such photo or folder\n"


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_a_misspelt_key(command, tmp_path):
    config = tmp_path / "a[b].yml"
    config.write_text("sed: 3\n")
    line = error_line(command, "-c", config)
    assert f"{config}: unknown key 'sed'; did you mean 'seed'?" in line


def test_a_misspelt_override(tmp_path):
    photo = tmp_path / "a.png"
    Image.new("RGB", (8, 8)).save(photo)
    for command in (["train"], ["evaluate"], ["adapt", photo, "-o", tmp_path / "a.safetensors"]):
        assert "override: unknown key 'sed'; did you mean 'seed'?" in error_line(*command, "-s", "sed=3")


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_a_missing_config(command, tmp_path):
    assert error_line(command, "-c", tmp_path / "none.yml").endswith("none.yml: no such configuration file")


def test_a_missing_config_key():
    assert "key 'data' is required" in error_line("evaluate")


def test_adapt_needs_photos(tmp_path):
    assert "no photos in this folder" in error_line("adapt", tmp_path, "-o", tmp_path / "ada.safetensors")


def test_restore_needs_a_photo(tmp_path):
    assert "no such photo or folder" in error_line("restore", "-i", tmp_path / "a.png", "-o", tmp_path / "b.png")


def test_restore_refuses_to_replace_its_input(tmp_path):
    photo = tmp_path / "a.png"
    Image.new("RGB", (8, 8)).save(photo)
    assert "would replace the input" in error_line("restore", "-i", photo, "-o", photo)
    assert "would replace the input" in error_line("restore", "-i", tmp_path, "-o", tmp_path)


def test_restore_targets(tmp_path):
    photos, results = tmp_path / "photos", tmp_path / "results"
    photos.mkdir()
    for name in ("a.jpg", "b.png"):
        Image.new("RGB", (8, 8)).save(photos / name)
    (photos / "notes.txt").write_text("not a photo")
    assert restore_targets(photos, results) == [
        (photos / "a.jpg", results / "a.png"),
        (photos / "b.png", results / "b.png"),
    ]
    assert restore_targets(photos / "a.jpg", tmp_path / "new.jpg") == [(photos / "a.jpg", tmp_path / "new.jpg")]
    assert not results.exists(), "nothing is made before the model is there"
    results.mkdir()
    assert restore_targets(photos / "a.jpg", results) == [(photos / "a.jpg", results / "a.png")]
    Image.new("RGB", (8, 8)).save(photos / "a.png")
    with pytest.raises(DataError, match="differ only in their suffix"):
        restore_targets(photos, results)


def test_several_photos_do_not_go_into_a_folder_called_like_a_picture(tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    files = [photos / "a.png", photos / "b.png"]
    for file in files:
        Image.new("RGB", (8, 8)).save(file)
    for several in (files, photos, photos / "a*"):
        with pytest.raises(DataError, match="z.PNG: not a folder; several photos"):
            restore_targets(several, tmp_path / "z.PNG")
    (tmp_path / "z.PNG").mkdir()
    assert restore_targets(files, tmp_path / "z.PNG")[0] == (files[0], tmp_path / "z.PNG" / "a.png")


def test_adapt_looks_at_its_output_before_anything_else(tmp_path, monkeypatch):
    monkeypatch.setattr(metagpen, "load", lambda *_, **__: 1 / 0)
    for name in ("photos/a.png", "photos/b.safetensors"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name, "png")
    model, config, folder = (tmp_path / f"{name}.safetensors" for name in ("model", "config", "folder"))
    model.write_bytes(b"a model")
    config.write_text("seed: 1\n")
    folder.mkdir()
    photos = [tmp_path / "photos", tmp_path / "photos" / "b.safetensors"]
    command, before = ["adapt", *photos, "--model", model, "-c", config, "-o"], sorted(tmp_path.rglob("*"))
    for output in (model, model.with_suffix(""), config, photos[1]):
        assert "would replace" in error_line(*command, output)
    assert "folder.safetensors: Is a directory" in error_line(*command, folder)
    assert "model.safetensors: Not a directory" in error_line(*command, model / "new" / "ada.safetensors")
    assert "/: a folder; give the name" in error_line(*command, "/")
    if Path("/proc/self").exists():
        assert "/proc: No such file" in error_line(*command, "/proc/ada.safetensors")
    assert isinstance(run(*command, tmp_path / "new" / "folder" / "ada").exception, ZeroDivisionError)
    assert sorted(tmp_path.rglob("*")) == before and model.read_bytes() == b"a model"


def test_flags_become_overrides():
    assert given_flags(a=None, b=False, c=3, d=Path("x: [1")) == ["b=false", "c=3", 'd="x: [1"']


def test_a_device_that_is_not_there(tmp_path):
    photo = tmp_path / "a.png"
    Image.new("RGB", (8, 8)).save(photo)
    for device in ("cuda:99", "gpu", "meta", "privateuseone"):
        line = error_line("restore", "-i", photo, "-o", tmp_path / "b.png", "--device", device)
        assert f"device '{device}' is not available here" in line


def test_interruption_before_there_is_a_command(monkeypatch, capsys):
    from metagpen.__main__ import main

    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setitem(sys.modules, "metagpen.cli", SimpleNamespace(main=interrupted))
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 130 and capsys.readouterr().err == "interrupted\n"


def test_interruption(monkeypatch):
    def interrupted(album):
        raise KeyboardInterrupt

    monkeypatch.setattr("metagpen.demo.read_album", interrupted)
    result = run("demo")
    assert result.exit_code == 130 and "interrupted" in result.stderr


def test_the_demo_names_an_album_that_is_not_there(tmp_path):
    assert str(tmp_path / "nobody") in error_line("demo", "--album", tmp_path / "nobody", "--output-dir", tmp_path)


def test_compare_names_the_face_without_a_truth(tmp_path):
    for folder, name in (("restored", "a.png"), ("truth", "b.png")):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (64, 64)).save(tmp_path / folder / name)
    line = error_line("compare", "--restored", tmp_path / "restored", "--truth", tmp_path / "truth")
    assert "no true face for a.png" in line
