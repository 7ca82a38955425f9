"""Every file of examples/ runs without arguments, in an empty folder, and leaves what it says it leaves."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from conftest import REPOSITORY

import metagpen
from metagpen.adaptation import AdaptConfig, album
from metagpen.adaptation.objective import Objective
from metagpen.album import OWN_ALBUM

EXAMPLES = REPOSITORY / "examples"
SMALLER = {  # constants at the examples' tops, and the files that each must write
    "quickstart": ({"SHOTS": 1, "STEPS": 1}, ["ada.safetensors", "degraded.png", "strengths.png"]),
    "shots_curve": (
        {"SHOTS": [1, 2], "STEPS": [0, 1], "QUERIES": 1, "METHODS": ["generic", "adapt"]},
        ["rows.jsonl", "report/curve.md", "report/curve.csv", "report/curve.html", "report/album_shots.png"],
    ),
    "many_people": ({"SHOTS": 1, "STEPS": 1}, ["people/ada.safetensors", "people/eve.safetensors", "restored.png"]),
    "own_dataset": ({"SHOTS": 1, "QUERIES": 1}, ["split.csv", "meta/ema.safetensors"]),
    "custom_loss": (
        {"SHOTS": 1, "STEPS": 1, "DRAWS": 1},
        ["ada_Objective.safetensors", "ada_RegionObjective.safetensors", "restored.png"],
    ),
    "published_gpen": ({"SHOTS": 1, "STEPS": 1}, ["random.pth", "ada.safetensors", "restored.png"]),
}  # fmt: skip
NEED_ARGUMENTS = {"sample_album"}


def example(name: str) -> ModuleType:
    """The example as a module of its own, so that its constants can be changed."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch) -> Path:
    """The examples write below the folder that they run in; nothing was downloaded before."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("METAGPEN_CACHE", str(tmp_path / "cache"))
    with torch.random.fork_rng(devices=[]):
        yield tmp_path


def test_every_example_is_tested():
    assert {file.stem for file in EXAMPLES.glob("*.py")} == SMALLER.keys() | NEED_ARGUMENTS


@pytest.mark.parametrize("name", SMALLER)
def test_example(name, empty_folder, monkeypatch, capsys):
    constants, files = SMALLER[name]
    module = example(name)
    assert f"python examples/{name}.py" in module.__doc__, "says how to run it"
    for constant, value in constants.items():
        assert hasattr(module, constant), constant
        monkeypatch.setattr(module, constant, value)
    module.main()
    printed = capsys.readouterr().out
    for file in files:
        assert (empty_folder / module.OUTPUT / file).stat().st_size > 0
    assert str((empty_folder / module.OUTPUT).resolve()) in printed, "says where its results are"
    assert {path.name for path in empty_folder.iterdir()} == {"example_out"}, "writes nowhere else"


def test_a_second_run_of_many_people_learns_nobody_again(empty_folder, monkeypatch, capsys):
    module = example("many_people")
    monkeypatch.setattr(module, "SHOTS", 1)
    monkeypatch.setattr(module, "STEPS", 0)
    module.main()
    module.main()
    first, second = (line for line in capsys.readouterr().out.splitlines() if line.startswith("learned"))
    assert first.startswith("learned 3 people, 0 were") and second.startswith("learned 0 people, 3 were")


def test_the_loop_of_custom_loss_is_that_of_adapt():
    """With the usual objective it must learn the very same numbers."""
    module, model = example("custom_loss"), metagpen.load()
    photos = sorted((OWN_ALBUM / "bob").glob("*.jpg"))[:2]
    config = AdaptConfig(steps=2, batch_size=2)
    ours = module.adapt_with(Objective, model, album(photos, model.size), config)
    theirs = metagpen.adapt(model, photos, 2, config=config)
    assert ours.spec == theirs.spec and ours.parameters.keys() == theirs.parameters.keys()
    for name, value in ours.parameters.items():
        assert torch.equal(value.half().float(), theirs.parameters[name]), name
    assert torch.equal(ours.template.half().float(), theirs.template)


def test_region_l1_counts_only_where_the_regions_are():
    module = example("custom_loss")
    landmarks = torch.tensor([[[20.0, 24], [44, 24], [32, 36], [24, 48], [40, 48]]])
    truth = torch.zeros(1, 3, 64, 64)
    at_eye, in_corner = truth.clone(), truth.clone()
    at_eye[..., 22:27, 18:23] = 1.0
    in_corner[..., :5, :5] = 1.0
    inside, outside = (float(module.region_l1(image, truth, landmarks)) for image in (at_eye, in_corner))
    assert inside > 100 * outside
    assert float(module.region_l1(truth + 0.5, truth, landmarks)) == pytest.approx(0.5)


def test_an_example_takes_a_path(empty_folder, capsys):
    """published_gpen.py with a file of another shape."""
    module = example("published_gpen")
    module.SHOTS, module.STEPS = 1, 1
    file = empty_folder / "mine.pth"
    torch.save(module.GPEN(64, 1, 1 / 16).state_dict(), file)
    module.main(str(file))
    assert "loaded mine.pth: 64 px" in capsys.readouterr().out
