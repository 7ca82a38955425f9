"""The tutorial's fine-tune on a tiny model: options, schedule, drawing, resuming, checkpoints and what is watched."""

from __future__ import annotations

import csv
import json
import os
import signal
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

import metagpen
from metagpen import cli
from metagpen.errors import CheckpointError, ConfigError, DataError, PhotoError
from metagpen.finetune import Options, finetune, person_behind
from metagpen.finetune.pairs import TrainPairs, draw, frames, hold_back, jitter, move, read_pairs
from metagpen.finetune.train import FineTune
from metagpen.gpen import GPEN
from metagpen.gpen.discriminator import Discriminator
from metagpen.model import MetaGPEN
from metagpen.person import AdapterSpec, IdentityStart, Person, folded, new_parameters, restore_many
from metagpen.schedule import warmup_cosine

LAST = 6


def write_face(path: Path, seed: int, side: int = 32) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    levels = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    Image.fromarray(levels).resize((side, side), Image.Resampling.BICUBIC).save(path)


@pytest.fixture
def base(tiny_model, tmp_path) -> Path:
    """A 16 px model with a start, and so with a gate that fills in for everybody, as a file."""
    torch.nn.init.normal_(tiny_model.start.gate.nobody, std=0.5)
    return tiny_model.save(tmp_path / "base.safetensors", torch.float32)


@pytest.fixture
def options(base, tmp_path) -> Options:
    """The tutorial's keys, small: four pairs, six iterations, stage 2 from the third on."""
    for i in range(4):
        write_face(tmp_path / "GT" / f"00{i}.png", i)
        write_face(tmp_path / "LR" / f"00{i}.png", i + 100)
    return Options.from_dict({
        "name": "ada",
        "datasets": {"train": {
            "name": "my_photos", "dataset_type": "SingleImageDataset", "dataroot_gt": tmp_path / "GT",
            "dataroot_lq": tmp_path / "LR", "io_backend": {"type": "disk"}, "use_hflip": True, "use_rot": False,
            "resize_crop": [0.9, 1.1], "color_jitter": {"brightness": 0.1, "contrast": 0.1}, "aligned": True,
            "batch_size_per_gpu": 2}},
        "network_g": {"type": "GPEN", "nf": 64, "n_blocks": 1},
        "path": {"pretrain_network_g": str(base), "experiments_root": tmp_path / "experiments"},
        "start_iter": 0,
        "train": {"total_iters": LAST, "warmup_iter": 2, "lr_G": 0.01, "lr_D": 0.01,
                  "scheduler": {"type": "CosineAnnealingLR", "eta_min": 1e-6}},
        "val": {"val_freq": 2}, "logger": {"print_freq": 1, "save_checkpoint_freq": 3},
    })  # fmt: skip


def changed(options: Options, **sections: dict) -> Options:
    """The options with single keys of sections replaced, validated again."""
    data = options.model_dump()
    for section, values in sections.items():
        data[section] = {**data[section], **values} if isinstance(values, dict) else values
    return Options.from_dict(data)


def rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def write_yaml(path: Path, options: Options, **extra) -> Path:
    path.write_text(yaml.safe_dump({**options.model_dump(mode="json"), **extra}))
    return path


# --- options -----------------------------------------------------------------------------------------------------


def test_unknown_keys_name_their_nearest_neighbour(options):
    data = options.model_dump()
    for keys, wanted in ((["train", "lr_g"], "train.lr_G"), (["datasets", "train", "dataroot_lr"],
                         "datasets.train.dataroot_lq"), (["network_g", "n_block"], "network_g.n_blocks")):
        broken = Options.model_validate(data).model_dump()
        section = broken
        for key in keys[:-1]:
            section = section[key]
        section[keys[-1]] = 1
        with pytest.raises(ConfigError, match=f"unknown key '{'.'.join(keys)}'; did you mean '{wanted}'"):
            Options.from_dict(broken)


def test_scheduler_and_start_iter_may_stand_in_either_place(options):
    data = options.model_dump()
    data["scheduler"] = data["train"].pop("scheduler") | {"eta_min": 1e-5}
    data["train"]["start_iter"] = data.pop("start_iter") + 2
    found = Options.from_dict(data)
    assert found.train.scheduler.eta_min == 1e-5 and found.start_iter == 2
    data["train"]["scheduler"] = {}
    with pytest.raises(ConfigError, match="'scheduler' is given at the top and under 'train'"):
        Options.from_dict(data)


def test_impossible_options(options):
    with pytest.raises(ConfigError, match="start_iter = 6 leaves nothing of 6"):
        changed(options, start_iter=LAST)
    with pytest.raises(ConfigError, match="resize_crop must be"):
        changed(options, datasets={"train": {"dataroot_gt": "x", "resize_crop": [1.1, 0.9]}})
    with pytest.raises(ConfigError, match="network_g.type"):
        changed(options, network_g={"type": "RRDBNet"})
    with pytest.raises(ConfigError, match="name"):
        changed(options, name="../elsewhere")


def test_notes_say_what_is_made_of_nf_and_n_blocks(options, tiny_model):
    notes = "\n".join(changed(options, network_g={"n_blocks": 23}).notes(tiny_model.gpen))
    assert "network_g.nf: 64 has no effect" in notes
    most = len(tiny_model.gpen.encoder) - 1
    assert f"the last {most} blocks of the encoder are released, all that this model has; 23 were asked for" in notes
    assert changed(options, network_g={"n_blocks": 23}).adapt_config(tiny_model.gpen).tail_blocks == most
    assert "asked for" not in "\n".join(options.notes(tiny_model.gpen))


def test_rates_fall_as_the_scheduler_says(options):
    cosine = options.train
    expected = [warmup_cosine(i, LAST, 2, 1e-4) for i in range(LAST)]
    assert [cosine.factor(i) for i in range(LAST)] == pytest.approx(expected)
    assert cosine.factor(LAST - 1) * cosine.lr_G == pytest.approx(1e-6)
    steps = changed(options, train={"scheduler": {"type": "MultiStepLR", "milestones": [5, 3], "gamma": 0.1}}).train
    assert [steps.factor(i) for i in range(LAST)] == pytest.approx([1 / 3, 2 / 3, 1, 0.1, 0.1, 0.01])


# --- pairs -------------------------------------------------------------------------------------------------------


def test_pairs_belong_together_by_name(options, tmp_path):
    pairs = read_pairs(options.datasets.train, 16)
    assert pairs.names == ("000", "001", "002", "003") and pairs.truth.shape == pairs.poor.shape == (4, 3, 16, 16)
    (tmp_path / "LR" / "002.png").unlink()
    with pytest.raises(DataError, match=r"LR: no photo '002', which .*GT has"):
        read_pairs(options.datasets.train, 16)
    write_face(tmp_path / "LR" / "002.png", 0, 20)
    Image.open(tmp_path / "LR" / "002.png").resize((20, 30)).save(tmp_path / "LR" / "002.png")
    with pytest.raises(PhotoError, match="002.png' is 20x30 and its partner 32x32"):
        read_pairs(options.datasets.train, 16)
    (tmp_path / "GT" / "000.jpg").write_bytes((tmp_path / "GT" / "000.png").read_bytes())
    with pytest.raises(DataError, match="there is also 000.jpg"):
        read_pairs(options.datasets.train, 16)


def test_the_face_is_cut_from_both_sides_at_the_same_place(tmp_path, monkeypatch):
    """A degraded side of half the size shows, once cut, what the sharp side shows."""
    photo = Image.new("RGB", (80, 60), "grey")
    photo.paste((255, 0, 0), (30, 20, 40, 30))
    for name, size in (("GT", (80, 60)), ("LR", (40, 30))):
        (tmp_path / name).mkdir()
        photo.resize(size, Image.Resampling.BOX).save(tmp_path / name / "a.png")
    detect = import_module("metagpen.faces.detect")  # the package's name `detect` is the function
    points = np.array([[30, 25], [45, 25], [37, 33], [31, 40], [44, 40]], dtype=float)
    monkeypatch.setattr(detect, "detect", lambda *_: [detect.Face(np.array([20, 10, 55, 50.0]), points, 1.0)])
    pairs = read_pairs(TrainPairs(dataroot_gt=tmp_path / "GT", dataroot_lq=tmp_path / "LR"), 32)
    assert pairs.truth[0, 0].max() > 0.9
    assert (pairs.truth - pairs.poor).abs().mean() < 0.05


def test_one_pair_is_held_back_from_three_on(options):
    pairs = read_pairs(options.datasets.train, 16)
    kept, held = hold_back(pairs)
    assert kept.names == ("000", "001", "002") and held.names == ("003",)
    few, none = hold_back(pairs.select([0, 1]))
    assert few.names == ("000", "001") and none is None


def test_both_sides_move_alike_and_landmarks_go_along():
    """Pairs whose sides are equal stay equal; a bright dot stays under its landmark."""
    size, generator = 64, torch.Generator().manual_seed(0)
    sides = torch.full((64, 3, size, size), -1.0)
    landmarks = torch.tensor([[20.0, 24], [44, 24], [32, 34], [24, 46], [40, 46]]).repeat(64, 1, 1)
    for x, y in landmarks[0].int():
        sides[:, :, y - 2 : y + 2, x - 2 : x + 2] = 1
    everything = TrainPairs(dataroot_gt="x", use_rot=True, resize_crop=(0.9, 1.1))
    (truth, poor), points = move([sides, sides], landmarks, *frames(64, everything, generator))
    assert torch.equal(truth, poor) and not torch.equal(truth[0], truth[1])
    inside = points.round().int().clamp(0, size - 1)
    assert all(truth[i, 0, y, x] > 0 for i in range(64) for x, y in inside[i])
    eyes, mouth = points[:, 1] - points[:, 0], points[:, 3:].mean(1) - points[:, :2].mean(1)
    turn = eyes[:, 0] * mouth[:, 1] - eyes[:, 1] * mouth[:, 0]
    assert (turn > 0).all(), "left stays left of right, whatever way up the face is"


def test_without_augmentation_a_draw_is_the_photo():
    sides = [torch.rand(4, 3, 16, 16) * 2 - 1]
    plain = TrainPairs(dataroot_gt="x", use_hflip=False)
    moved, points = move(sides, torch.rand(4, 5, 2), *frames(4, plain, torch.Generator().manual_seed(0)))
    torch.testing.assert_close(moved[0], sides[0], atol=1e-4, rtol=0)
    assert jitter(moved, plain.color_jitter, torch.Generator()) is moved


def test_colours_change_alike_on_both_sides(options):
    side = torch.rand(8, 3, 16, 16) - 0.5
    a, b = jitter([side, side.clone()], options.datasets.train.color_jitter, torch.Generator().manual_seed(1))
    assert torch.equal(a, b) and (a - side).abs().mean() > 0.01


def test_without_a_degraded_side_it_is_made_when_drawn(options):
    data = options.datasets.train.model_copy(update={"dataroot_lq": None})
    pairs = read_pairs(data, 16)
    assert pairs.poor is None

    def halve(images, generator):
        return images / 2

    truth, poor, _ = draw(pairs, data, halve, torch.Generator().manual_seed(0))
    assert torch.equal(poor, truth / 2)


# --- training ----------------------------------------------------------------------------------------------------


@pytest.fixture
def finished(options, tiny_recogniser):
    return finetune(options, tiny_recogniser)


def test_the_prior_is_frozen_and_stage_2_releases_the_critics_last_layers(options, tiny_recogniser, tiny_model):
    run = FineTune(options, tiny_recogniser, cli.out, "cpu")
    run.begin()
    assert set(run.parameters) == set(new_parameters(tiny_model.gpen, AdapterSpec(1, 0), 1, torch.Generator()))
    logged, critics = [], []
    for _ in range(LAST):
        before = {name: value.clone() for name, value in run.critic.state_dict().items()}
        logged.append(run.step())
        critics.append({n.split(".")[0] for n, v in run.critic.state_dict().items() if not torch.equal(v, before[n])})
    joint = options.train.joint_from
    assert all("convs" in moved for moved in critics[:joint]), "from scratch it learns beside stage 1"
    assert all(moved == {"final_conv", "final_linear"} for moved in critics[joint:])
    assert ["adversarial" in losses for losses in logged] == [False] * joint + [True] * (LAST - joint)
    original = metagpen.load(options.path.pretrain_network_g)
    assert run.model.fingerprint == original.fingerprint
    assert all(torch.equal(a, b) for a, b in zip(run.model.parameters(), original.parameters(), strict=True))
    assert all(value.abs().max() > 0 for value in run.parameters.values())


def test_a_given_discriminator_waits_for_stage_2(options, tiny_recogniser, tmp_path):
    torch.save(Discriminator(16, 1, 0.03125).state_dict(), tmp_path / "d.pth")
    given = changed(options, path={"pretrain_network_d": tmp_path / "d.pth"})
    run = FineTune(given, tiny_recogniser, cli.out, "cpu")
    run.begin()
    assert ["critic" in run.step() for _ in range(LAST)] == [False] * 3 + [True] * 3
    torch.save(Discriminator(32, 1, 0.03125).state_dict(), tmp_path / "d.pth")
    with pytest.raises(ConfigError, match="judges faces of 32 px"):
        FineTune(given, tiny_recogniser, cli.out, "cpu")
    with pytest.raises(CheckpointError, match="pretrain_network_d: no such file"):
        FineTune(changed(options, path={"pretrain_network_d": "none.pth"}), tiny_recogniser, cli.out, "cpu")
    with pytest.raises(CheckpointError, match="pretrain_network_d: no such file"):  # also where none is asked
        FineTune(changed(options, path={"pretrain_network_d": "none.pth"}, train={"losses": {"adversarial": 0}}),
                 tiny_recogniser, cli.out, "cpu")


@pytest.mark.parametrize("name", ["l1", "identity", "latent_norm", "adversarial"])
def test_no_term_counts_less_than_nothing(options, name):
    for value, said in ((-0.1, "greater than or equal to 0"), (float("nan"), "finite")):
        with pytest.raises(ConfigError, match=f"train.losses.{name}.*{said}"):
            changed(options, train={"losses": {name: value}})


def test_a_device_that_is_not_there(options, tiny_recogniser):
    with pytest.raises(DataError, match="device 'abacus' is not available here"):
        FineTune(options, tiny_recogniser, cli.out, "abacus")


def test_checkpoints_are_a_model_and_a_person_that_agree(options, finished):
    folder = options.folder
    assert sorted(path.name for path in (folder / "models").iterdir()) == [
        "net_g_3.safetensors", "net_g_6.safetensors", "person_3.safetensors", "person_6.safetensors"]  # fmt: skip
    assert finished.model == folder / "models" / "net_g_6.safetensors"
    model, base = metagpen.load(finished.model), metagpen.load(options.path.pretrain_network_g)
    assert base.gate.nobody.abs().max() > 0, "what the model adds for everybody must not get lost"
    person = Person.load(finished.person, base)
    assert not person.spec.gated and person.metadata["shots"] == 3 and person.metadata["steps"] == LAST
    assert model.card["fine_tuned"]["fingerprint"] == base.fingerprint
    poor = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    torch.testing.assert_close(model.restore(poor), person.restore_batch(poor), atol=1e-5, rtol=0)
    assert torch.equal(person.restore_batch(poor, 0.0), base.restore(poor))
    assert (person.restore_batch(poor) - base.restore(poor)).abs().max() > 1e-3
    together = restore_many(base, [person] * 3, poor, [0.5, 0.5, 1.0])
    torch.testing.assert_close(together[:2], person.restore_batch(poor[:2], 0.5), atol=1e-5, rtol=0)
    assert not person.compress(tail_rank=2).spec.gated


def test_a_models_file_leads_back_to_its_person(options, finished, tmp_path):
    model, base = metagpen.load(finished.model), metagpen.load(options.path.pretrain_network_g)
    person = person_behind(finished.model, model)
    assert person.model.fingerprint == base.fingerprint and person.metadata["steps"] == LAST
    assert person_behind(options.path.pretrain_network_g, base) is None
    finished.person.rename(tmp_path / "away.safetensors")
    with pytest.raises(CheckpointError, match=r"net_g_6.safetensors: a strength .* needs .*no such Person file"):
        person_behind(finished.model, model)
    (tmp_path / "away.safetensors").rename(finished.person)
    MetaGPEN(GPEN(16, 1, 0.03125, style_dim=16, n_mlp=2)).save(options.path.pretrain_network_g)
    with pytest.raises(CheckpointError, match="is another model now"):
        person_behind(finished.model, model)


@pytest.mark.parametrize("with_start", [True, False])
def test_folding_equals_the_person_at_every_strength(tiny_model, with_start):
    """Beside a start, whose gate adds something for everybody, and without one, there with a latent map too."""
    generator = torch.Generator().manual_seed(3)
    torch.nn.init.normal_(tiny_model.start.gate.nobody, generator=generator)
    model = tiny_model if with_start else MetaGPEN(tiny_model.gpen)
    spec = AdapterSpec(2, 4, 0 if with_start else 2, gated=False)
    begun = new_parameters(model.gpen, spec, 1, generator)
    mine = {name: 0.3 * torch.randn(value.shape, generator=generator) for name, value in begun.items()}
    person = Person(model, spec, mine)
    poor = torch.rand(2, 3, 16, 16, generator=generator) * 2 - 1
    before = model.restore(poor)
    for strength in (0.0, 0.5, 1.0):
        own = MetaGPEN(folded(person, strength), model.start).restore(poor)
        torch.testing.assert_close(own, person.restore_batch(poor, strength), atol=1e-4, rtol=0)
    assert torch.equal(model.restore(poor), before)


def test_what_a_gate_weighs_cannot_be_folded(tiny_model):
    for spec in (AdapterSpec(2, 4), AdapterSpec(2, 4, 2, gated=False)):
        with pytest.raises(ConfigError, match="cannot be folded"):
            folded(Person(tiny_model, spec, new_parameters(tiny_model.gpen, spec, 1, torch.Generator())))


def test_what_is_watched(options, finished):
    folder = options.folder
    watched = rows(folder / "validation.csv")
    assert [row["iter"] for row in watched] == ["0", "2", "4", "6"]
    assert finished.before["psnr"] == pytest.approx(float(watched[0]["psnr"]), abs=1e-3)
    assert finished.after["psnr"] == pytest.approx(float(watched[-1]["psnr"]), abs=1e-3)
    assert watched[0]["psnr"] != watched[-1]["psnr"]
    log = rows(folder / "log.csv")
    assert [row["iter"] for row in log] == [str(i) for i in range(1, LAST + 1)]
    assert [bool(row["adversarial"]) for row in log] == [False] * 3 + [True] * 3
    text = (folder / "train.log").read_text()
    assert "held out (no datasets.val was given): 003" in text and "3 pairs to train on: 000, 001, 002" in text
    assert "network_g.nf: 64 has no effect" in text
    for picture in ("curves.png", "visualization/net_g_6.png"):
        with Image.open(folder / picture) as image:
            image.verify()
    assert yaml.safe_load((folder / "options.yml").read_text())["train"]["total_iters"] == LAST


def test_given_held_out_pairs_are_used_and_may_not_be_trained_on(options, tiny_recogniser, tmp_path):
    for i in range(2):
        write_face(tmp_path / "val" / f"v{i}.png", 50 + i)
    data = options.datasets.model_dump()
    val = {"dataroot_gt": tmp_path / "val", "dataroot_lq": tmp_path / "val", "aligned": True}
    given = changed(options, datasets={**data, "val": val})
    run = FineTune(given, tiny_recogniser, cli.out, "cpu")
    assert len(run.pairs) == 4 and run.held_out.pairs.names == ("v0", "v1")
    (tmp_path / "val" / "v0.png").write_bytes((tmp_path / "GT" / "002.png").read_bytes())
    with pytest.raises(DataError, match="'v0' is the training photo '002'"):
        FineTune(given, tiny_recogniser, cli.out, "cpu")


def test_two_pairs_hold_nothing_back_and_say_so(options, tiny_recogniser, tmp_path):
    for side in ("GT", "LR"):
        for i in (2, 3):
            (tmp_path / side / f"00{i}.png").unlink()
    found = finetune(changed(options, train={"total_iters": 1}), tiny_recogniser)
    assert found.before is None and found.model.is_file()
    assert "nothing is held out" in (options.folder / "train.log").read_text()


@pytest.mark.parametrize("killed_at", [0, 2, 3, 5])
def test_killed_and_resumed_equals_uninterrupted(options, tiny_recogniser, monkeypatch, killed_at):
    whole = finetune(changed(options, name="whole"), tiny_recogniser)

    class Killed(BaseException):
        pass

    after = FineTune._after

    def until(run, logged):
        if run.iteration == killed_at + 1:
            with (run.folder / "log.csv").open("a") as file:
                file.write("99,0.1")  # half a row, as a kill may leave it
            raise Killed
        after(run, logged)

    monkeypatch.setattr(FineTune, "_after", until)
    with pytest.raises(Killed):
        finetune(options, tiny_recogniser)
    monkeypatch.setattr(FineTune, "_after", after)
    resumed = finetune(options, tiny_recogniser)
    for mine, other in ((resumed.model, whole.model), (resumed.person, whole.person)):
        first, second = load_file(mine), load_file(other)
        assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    for name in ("log.csv", "validation.csv"):
        assert (options.folder / name).read_text() == (options.folder.with_name("whole") / name).read_text()
    assert resumed.after == whole.after
    assert finetune(options, tiny_recogniser).model == resumed.model, "a finished run has nothing left to do"


def test_an_interruption_loses_nothing(options, tiny_recogniser, monkeypatch):
    """A real one, in the middle of an iteration after which no state would be saved."""
    rarely = changed(options, val={"val_freq": 100}, logger={"save_checkpoint_freq": 100})
    whole = finetune(changed(rarely, name="whole"), tiny_recogniser)
    plain, begun = FineTune.batch, []

    def interrupted(run, iteration):
        begun.append(iteration)
        if len(begun) == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return plain(run, iteration)

    monkeypatch.setattr(FineTune, "batch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        finetune(rarely, tiny_recogniser)
    resumed = finetune(rarely, tiny_recogniser)
    assert begun == list(range(LAST)), "every iteration once"
    said = (options.folder / "train.log").read_text()
    assert "interrupted at iteration 5; run the same command" in said and "resumed at iteration 5" in said
    first, second = load_file(resumed.person), load_file(whole.person)
    assert all(torch.equal(first[name], second[name]) for name in second)
    for name in ("log.csv", "validation.csv"):
        assert (options.folder / name).read_text() == (options.folder.with_name("whole") / name).read_text()


def test_another_run_in_the_folder_is_refused(options, tiny_recogniser, tmp_path, finished):
    models = sorted((path, path.read_bytes()) for path in (options.folder / "models").iterdir())
    with pytest.raises(ConfigError, match=r"holds a run with train.total_iters = 6, now it is 8"):
        finetune(changed(options, train={"total_iters": 8}), tiny_recogniser)
    finetune(changed(options, val={"val_freq": 3}), tiny_recogniser)  # watching changes no number
    write_face(tmp_path / "GT" / "001.png", 77)
    with pytest.raises(ConfigError, match="other photos"):
        finetune(options, tiny_recogniser)
    (options.folder / "training_states" / "latest.state").write_bytes(b"half")
    write_face(tmp_path / "GT" / "001.png", 1)
    with pytest.raises(CheckpointError, match="latest.state: damaged .*; move .*ada away to begin again"):
        finetune(options, tiny_recogniser)
    torch.save({"iteration": 1}, options.folder / "training_states" / "latest.state")
    with pytest.raises(CheckpointError, match="latest.state: not a state of this training .*; move .*ada away"):
        finetune(options, tiny_recogniser)
    (options.folder / "training_states" / "latest.state").unlink()
    with pytest.raises(DataError, match="holds models but no training state"):
        finetune(options, tiny_recogniser)
    assert models == sorted((path, path.read_bytes()) for path in (options.folder / "models").iterdir())


def test_an_option_that_a_run_did_not_know_has_its_default(options, tiny_recogniser, finished):
    path = options.folder / "training_states" / "latest.state"
    state = torch.load(path, weights_only=True)
    known = json.loads(state["options"])
    del known["train"]["release"], known["network_g"]["nf"]
    torch.save(state | {"options": json.dumps(known)}, path)
    with pytest.raises(ConfigError, match="holds a run with network_g.nf = None, now it is 64"):
        finetune(options, tiny_recogniser)
    assert finetune(changed(options, network_g={"nf": None}), tiny_recogniser).model == finished.model


def test_it_computes_where_the_options_say_and_takes_the_recogniser_there(options, tiny_recogniser, monkeypatch):
    moved = []
    monkeypatch.setattr(tiny_recogniser, "to", lambda device: moved.append(device) or tiny_recogniser)
    with pytest.raises(DataError, match="device 'abacus' is not available here"):
        finetune(changed(options, device="abacus"), tiny_recogniser)
    run = FineTune(changed(options, device="cpu"), tiny_recogniser, cli.out)
    assert moved == [torch.device("cpu")] == [run.device]
    finetune(changed(options, device="abacus", train={"total_iters": 1}), tiny_recogniser, device="cpu")


def test_going_on_from_another_runs_model(options, tiny_recogniser, finished):
    later = changed(options, name="later", start_iter=4, path={"pretrain_network_g": str(finished.model)})
    found = finetune(later, tiny_recogniser)
    assert found.model.name == "net_g_6.safetensors"
    assert [row["iter"] for row in rows(later.folder / "log.csv")] == ["5", "6"]


def test_numbers_that_explode_stop_the_run(options, tiny_recogniser):
    with pytest.raises(ConfigError, match="diverged at iteration .*lower train.lr_G"):
        finetune(changed(options, train={"lr_G": 1e30, "warmup_iter": 0}), tiny_recogniser)
    assert not (options.folder / "models").exists()


# --- the command line --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", ["-opt", "--opt"])
def test_the_flag_as_the_tutorial_spells_it(options, tmp_path, monkeypatch, flag):
    asked = []
    monkeypatch.setattr("metagpen.finetune.finetune", lambda given, **rest: asked.append(given))
    file = write_yaml(tmp_path / "options.yml", options)
    done = CliRunner().invoke(cli.app, ["train", flag, str(file), "-s", "train.total_iters=7"])
    assert done.exit_code == 0, done.output
    assert asked[0].train.total_iters == 7 and asked[0].name == "ada"


def test_the_other_training_keeps_its_flag(tmp_path):
    (tmp_path / "a.yml").write_text("sed: 3\n")
    for flag in ("-c", "-opt"):
        failed = CliRunner().invoke(cli.app, ["train", flag, str(tmp_path / "a.yml")])
        assert failed.exit_code == 2 and "unknown key 'sed'" in failed.stderr and failed.stderr.count("\n") == 1
    both = CliRunner().invoke(cli.app, ["train", "-c", str(tmp_path / "a.yml"), "-opt", str(tmp_path / "a.yml")])
    assert both.exit_code == 2


def test_models_of_another_kind_are_no_place_to_begin(options, tmp_path):
    (tmp_path / "x.pth").write_bytes(b"nothing")
    broken = changed(options, path={"pretrain_network_g": str(tmp_path / "x.pth")})
    with pytest.raises(CheckpointError, match="x.pth"):
        finetune(broken)
    assert not options.folder.exists()


def test_a_model_without_a_start_is_fine_tuned_too(options, tiny_recogniser, tmp_path):
    torch.manual_seed(1)
    torch.save({"g_ema": GPEN(16, 1, 0.03125).state_dict()}, tmp_path / "published.pth")
    found = finetune(changed(options, path={"pretrain_network_g": str(tmp_path / "published.pth")},
                             train={"total_iters": 1}), tiny_recogniser)  # fmt: skip
    assert metagpen.load(found.model).start is None
    assert isinstance(metagpen.load("embedded").start, IdentityStart)
