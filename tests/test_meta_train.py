"""`metagpen meta-train` on a tiny model and random faces: it learns, resumes exactly, and splits over processes."""

import csv
import json
import os
import shutil
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file
from tiny import older_sheet_is_left
from torch import nn

from metagpen import recognise
from metagpen.adaptation import AdaptConfig, adapt, draws
from metagpen.album import OWN_ALBUM
from metagpen.errors import CheckpointError, ConfigError, DataError
from metagpen.gpen import GPEN
from metagpen.meta import ENGINES, OUTER_LOOPS
from metagpen.meta import train as meta
from metagpen.meta.recorded import RecordedGradient
from metagpen.model import MetaGPEN
from metagpen.person import AdapterSpec, DecoderBases, IdentityStart
from metagpen.person.rule import InnerRule, RuleConfig


@pytest.fixture
def config(tmp_path, monkeypatch, tiny_model, tiny_recogniser) -> meta.MetaConfig:
    monkeypatch.setattr(recognise, "load", lambda *_, device="cpu", **__: tiny_recogniser.to(torch.device(device)))
    rng = np.random.default_rng(0)
    rows = [("set", "id", "split")]
    for person, part in (("ada", "train"), ("bob", "train"), ("cyd", "train"), ("solo", "train"), ("eve", "val")):
        folder = tmp_path / "people" / person
        folder.mkdir(parents=True)
        rows.append(("people", person, part))
        for i in range(1 if person == "solo" else 5):
            small = Image.fromarray(rng.integers(0, 255, (4, 4, 3), dtype=np.uint8))
            small.resize((16, 16)).save(folder / f"{i}.png")
    with open(tmp_path / "splits.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)
    tiny_model.save(tmp_path / "base.safetensors", dtype=torch.float32)
    return meta.MetaConfig.from_dict({
        "data": [tmp_path / "people"], "split": tmp_path / "splits.csv", "output_dir": tmp_path / "run",
        "base": str(tmp_path / "base.safetensors"), "shots": [1, 2], "queries": 2, "people": 2, "meta_steps": 5,
        "save_every": 2, "validate_every": 4, "validate_people": 1, "validate_queries": 2, "warmup": 1,
        "loop": "fomaml", "inner": {"steps": 2, "batch_size": 2, "optimiser": "sgd", "tail_blocks": 1, "tail_rank": 2,
                                    "bf16": False, "degradation": {"heavy": {"face_px": [4, 8]}}}})


def series(config: meta.MetaConfig) -> dict[int, tuple]:
    """By step: what was logged, without timings. A step repeated after a kill must be logged alike."""
    found: dict[int, tuple] = {}
    for line in (config.output_dir / "log.jsonl").read_text().splitlines():
        record = json.loads(line)
        del record["people_per_second"]
        assert found.setdefault(record["step"], tuple(record.items())) == tuple(record.items())
    return found


def test_it_learns_a_rule_that_ships_and_that_adapt_follows(config, tiny_model, tiny_recogniser):
    model = MetaGPEN.from_file(meta.meta_train(config)).frozen()
    assert model.rule.config.steps == 2 and model.card["meta"]["loop"] == "fomaml"
    assert model.card["meta"]["people"] == 4
    before = meta.InnerRule(tiny_model.gpen, model.rule.spec, model.rule.config, seed=config.seed)
    moved = {name: not torch.allclose(value, before.state_dict()[name], atol=1e-3)
             for name, value in model.rule.state_dict().items()}
    assert moved["initial.latent-offset"] and moved["log_rates.latent-offset"]
    assert not torch.equal(model.start.head.weight, tiny_model.start.head.weight.half().float())
    assert torch.equal(model.gpen.final_linear[0].weight, tiny_model.gpen.final_linear[0].weight.half().float())
    assert sorted(series(config)) == list(range(5))
    assert "heavy_psnr_gain_2" in dict(series(config)[3]) and (config.output_dir / "sheet_000004.png").exists()
    assert (config.output_dir / "best.safetensors").exists()

    photos = torch.rand(2, 3, 16, 16) * 2 - 1
    followed = adapt(model, photos, 0, recogniser=tiny_recogniser)
    assert followed.spec == model.rule.spec
    expected = model.rule.initial["latent-offset"] + model.start(
        nn.functional.normalize(tiny_recogniser.embed(photos).mean(dim=0, keepdim=True), dim=1))
    torch.testing.assert_close(followed.parameters["latent.offset"], expected.detach(), atol=1e-3, rtol=1e-3)
    plain = adapt(model, photos, 0, recogniser=tiny_recogniser, config=AdaptConfig(rule=False, tail_blocks=1))
    assert plain.spec.tail_rank == 8


def test_tensorboard_gets_what_the_log_gets_also_of_a_run_that_goes_on(config):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for meta_steps in (2, 3):
        meta.meta_train(config.model_copy(update={"meta_steps": meta_steps}))
    board = accumulator.EventAccumulator(str(config.output_dir)).Reload()
    for name in ("loss", "people_per_second"):
        logged = [json.loads(line)[name] for line in (config.output_dir / "log.jsonl").read_text().splitlines()]
        assert [(event.step, event.value) for event in board.Scalars(name)] == [
            (step, pytest.approx(value, rel=1e-6)) for step, value in enumerate(logged, 1)]


def test_tensorboards_file_is_closed_also_when_the_run_fails(config, monkeypatch):
    board = pytest.importorskip("torch.utils.tensorboard")
    closed, close = [], board.SummaryWriter.close
    monkeypatch.setattr(board.SummaryWriter, "close", lambda writer: closed.append(writer) or close(writer))
    monkeypatch.setattr(meta.Trainer, "train_step", lambda *_: {}["nothing"])
    with pytest.raises(KeyError):
        meta.meta_train(config)
    assert len(closed) == 1


def test_who_is_watched_is_read_once(config, monkeypatch):
    read, load_task = [], meta.tasks.load_task
    monkeypatch.setattr(meta.tasks, "load_task", lambda *given, **more: read.append(given[1]) or load_task(
        *given, **more))
    meta.meta_train(config.model_copy(update={"validate_every": 2}))
    assert read == ["eve"]


@pytest.mark.parametrize("content", [b"half", {"step": 1}, ["no", "state"]])
def test_a_damaged_state_is_named_with_what_to_do(config, content):
    config.output_dir.mkdir()
    path = config.output_dir / "last.pt"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(CheckpointError, match=r"last\.pt: (damaged|not a state of this training) .*; delete it"):
        meta.meta_train(config)


def test_a_photo_on_both_sides_of_the_validation_is_told_before_the_training(config):
    eve = config.data[0] / "eve"
    for file in sorted(eve.iterdir())[1:]:
        file.write_bytes((eve / "0.png").read_bytes())
    with pytest.raises(DataError, match="the same photo as .*, a support photo"):
        meta.prepare(config)


def test_outer_sgd_moves_by_the_rate_times_the_clipped_gradient(config):
    """Reptile as published: an outer step is a part of the way to where adaptation ends (Nichol et al. 2018)."""
    trainer = meta.prepare(config.model_copy(update={"loop": "reptile", "outer_optimiser": "sgd", "lr": 0.5,
                                                     "clip": 1e9}))
    begin = trainer.model.rule.initial["latent-offset"]
    before = begin.detach().clone()
    trainer.meta_gradient(trainer.episodes[0])
    gradient = begin.grad.clone()
    factor = trainer.train_step(next(trainer.upcoming()))["factor"]
    assert gradient.any()
    torch.testing.assert_close(begin.detach() - before, -0.5 * factor * gradient, rtol=1e-4, atol=1e-7)


def test_small_photos_are_learned_from_and_never_judged_on(config):
    trainer = meta.prepare(config.model_copy(update={"min_query_side": 16}))
    sides = trainer.data.photos.source_side
    sides[trainer.data.photos.person == 0] = 8
    assert [len(own) for own, _ in trainer.episodes.eligible()] == [5, 5], "ada can no longer be an episode"
    sides[torch.nonzero(trainer.data.photos.person == 1)[0]] = 8
    assert [(len(own), len(queries)) for own, queries in trainer.episodes.eligible()] == [(5, 4), (5, 5)]


def test_the_start_learns_to_guess_mixtures_without_an_inner_step(config, tmp_path, tiny_model, tiny_recogniser):
    config = meta.MetaConfig.from_dict({
        **config.model_dump(exclude_unset=True), "unroll": [0, 0], "start_mixtures": 3, "slow": ["bases.*"],
        "lr_start": 1e-2, "lr_slow": 1e-2, "validate_part": "train",
        "inner": {**config.inner.model_dump(exclude_unset=True), "decoder_rank": 2}})
    model = MetaGPEN.from_file(meta.meta_train(config)).frozen()
    assert model.start.mixtures.rank == 2 and model.start.mixtures.head.weight.any()
    assert not torch.equal(model.bases.filters[0], DecoderBases.random(tiny_model.gpen, 2).filters[0].half().float())
    assert all(dict(record)["gradient_rates"] == 0 for record in series(config).values())

    photos = torch.rand(2, 3, 16, 16) * 2 - 1
    person = adapt(model, photos, 0, recogniser=tiny_recogniser)
    guess = model.guess(nn.functional.normalize(tiny_recogniser.embed(photos).mean(dim=0, keepdim=True), dim=1))
    expected = model.rule.initial["decoder-1-up"] + guess["decoder.1.up"]
    torch.testing.assert_close(person.parameters["decoder.1.up"], expected.detach(), atol=1e-3, rtol=1e-3)
    plain = adapt(model, photos, 0, recogniser=tiny_recogniser, start=False)
    torch.testing.assert_close(plain.parameters["decoder.1.up"][0], model.rule.initial["decoder-1-up"].detach(),
                               atol=1e-3, rtol=1e-3)

    go_on = config.model_copy(update={"base": str(config.output_dir / "ema.safetensors"),
                                      "output_dir": tmp_path / "more", "unroll": None, "start_mixtures": 0})
    assert MetaGPEN.from_file(meta.meta_train(go_on)).start.mixtures.rank == 2
    without = {**config.model_dump(exclude_unset=True), "inner": {"steps": 2, "decoder_rank": 0}}
    with pytest.raises(ConfigError, match="start_mixtures: .*decoder_rank 0"):
        meta.prepare(meta.MetaConfig.from_dict({**without, "slow": []}))


def test_the_start_learns_to_look_at_the_photos(config, tiny_model, tiny_recogniser):
    config = meta.MetaConfig.from_dict({**config.model_dump(exclude_unset=True), "unroll": [0, 0], "shots": [2, 2],
                                        "start_appearance": True, "lr_start": 1e-2})
    trainer = meta.prepare(config)
    assert trainer.episodes.appearances.shape == (16, 16)  # of 16 photos
    model = MetaGPEN.from_file(meta.meta_train(config)).frozen()
    assert model.start.appearance.weight.any()

    photos = torch.rand(2, 3, 16, 16) * 2 - 1
    identity = nn.functional.normalize(tiny_recogniser.embed(photos).mean(dim=0, keepdim=True), dim=1)
    guess = model.guess(identity, model.appearance(photos).mean(dim=0, keepdim=True))
    person = adapt(model, photos, 0, recogniser=tiny_recogniser)
    expected = model.rule.initial["latent-offset"] + guess["latent.offset"]
    torch.testing.assert_close(person.parameters["latent.offset"], expected.detach(), atol=1e-3, rtol=1e-3)
    with pytest.raises(ConfigError, match="slow: gpen.generator.style.1.bias makes the w that the start looks at"):
        meta.prepare(config.model_copy(update={"slow": ["gpen.generator.style.1.*"]}))


@pytest.mark.parametrize("workers", [0, 2])
def test_resumed_run_equals_an_uninterrupted_one(config, tmp_path, monkeypatch, workers):
    config = config.model_copy(update={"workers": workers})
    whole = meta.meta_train(config)
    expected = series(config)
    parts = config.model_copy(update={"output_dir": tmp_path / "parts"})
    original, calls = meta.Trainer.train_step, []

    def dies_once(self, episode):
        calls.append(self.step)
        if len(calls) == 4:
            raise RuntimeError("killed")  # as kill -9 would: nothing is saved on the way out
        return original(self, episode)
    monkeypatch.setattr(meta.Trainer, "train_step", dies_once)
    with pytest.raises(RuntimeError, match="killed"):
        meta.meta_train(parts)
    resumed = meta.meta_train(parts)
    assert calls == [0, 1, 2, 3, 2, 3, 4]
    assert series(parts) == expected
    a, b = (MetaGPEN.from_file(path).state_dict() for path in (whole, resumed))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_episodes_made_ahead_are_those_made_in_place(config, tmp_path):
    """By processes, which draw and damage; of drawn numbers of steps, and of none."""
    for unroll in ((1, 3), (0, 0)):
        here = config.model_copy(update={"unroll": unroll, "output_dir": tmp_path / f"here{unroll[1]}"})
        ahead = here.model_copy(update={"workers": 2, "output_dir": tmp_path / f"ahead{unroll[1]}"})
        for one in (here, ahead):
            meta.meta_train(one)
        assert series(here) == series(ahead)


def test_a_step_from_recorded_gradients_is_the_plain_one(config):
    """Of what would be recorded, run as it is; the recording itself is tested on a GPU."""
    plain, other = (meta.prepare(config.model_copy(update={"device": "cpu"})) for _ in range(2))
    rule = other.model.rule
    other.gradient = RecordedGradient(other.inner_objective, rule.names, rule.moving, recorded=False)
    for trainer in (plain, other):
        trainer.meta_gradient(trainer.episodes[0])
    for group, own in plain.groups.items():
        for name, value in own.items():
            torch.testing.assert_close(other.groups[group][name].grad, value.grad, rtol=1e-5, atol=1e-8)


def test_gradients_are_recorded_where_that_can_be_done(config):
    cuda, plain = torch.device("cuda"), config.model_copy(update={"first_order": True})
    assert meta.records_gradients(plain, cuda) and not meta.records_gradients(plain, torch.device("cpu"))
    second, wanted = plain.model_copy(update={"first_order": False}), {"cuda_graphs": True}
    assert not meta.records_gradients(second, cuda)
    for asked, expected in (({"cuda_graphs": False}, False), (wanted, True)):
        inner = config.inner.model_copy(update=asked)
        assert meta.records_gradients(plain.model_copy(update={"inner": inner}), cuda) is expected
    with pytest.raises(ConfigError, match="first order and by engine: batched only"):
        meta.records_gradients(second.model_copy(update={"inner": config.inner.model_copy(update=wanted)}), cuda)


def test_processes_of_a_machine_share_its_cores(monkeypatch):
    monkeypatch.setattr(draws.os, "sched_getaffinity", lambda _: set(range(64)))
    monkeypatch.setattr(draws.sys, "platform", "linux")
    cuda = torch.device("cuda")
    assert [draws.helpers(cuda, sharing) for sharing in (1, 4, 100)] == [32, 15, 1]
    assert draws.helpers(torch.device("cpu")) == 0


@pytest.mark.parametrize("setting, message", [
    ({"compile": True}, "inner.compile.*derivatives that compiled ones lack"),
    ({"rule": False}, "inner.rule.*True"),
    ({"adversarial_steps": 3}, "inner.adversarial_steps.*0"),
])
def test_how_a_rule_is_followed_is_no_setting(setting, message):
    with pytest.raises(ConfigError, match=message):
        meta.MetaConfig.from_dict({"data": ["."], "split": "s", "inner": setting}, source="meta.yml")


def test_a_start_that_nobody_begins_at_cannot_learn(config):
    inner = config.inner.model_copy(update={"start": False})
    with pytest.raises(ConfigError, match="learn_start: with inner.start false nobody begins at the start"):
        meta.prepare(config.model_copy(update={"inner": inner}))
    assert not meta.prepare(config.model_copy(update={"inner": inner, "learn_start": False})).groups["start"]


def test_a_run_keeps_the_number_of_people_in_a_meta_step(config):
    meta.meta_train(config.model_copy(update={"meta_steps": 1}))
    with pytest.raises(CheckpointError, match="2 people in a meta-step, now they are 3"):
        meta.meta_train(config.model_copy(update={"people": 3}))


def test_who_judges_and_was_in_a_loss_is_said(config, capsys):
    meta.meta_train(config.model_copy(update={"meta_steps": 1}))
    assert "which is in the losses, too" in " ".join(capsys.readouterr().out.split())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="graphs are a CUDA device's")
def test_recorded_gradients_meta_train_as_plain_ones_do_on_cuda(config, tmp_path):
    """A whole run, through warm-up, recording and replay, while the shared filters move; up to the order of a GPU's
    sums."""
    losses = []
    for recorded in (False, True):
        inner = config.inner.model_copy(update={"cuda_graphs": recorded, "bf16": False, "decoder_rank": 3})
        own = config.model_copy(update={"inner": inner, "device": "cuda", "output_dir": tmp_path / str(recorded),
                                        "meta_steps": 8, "slow": ["bases.*"], "lr_slow": 0.01})
        meta.meta_train(own)
        losses.append([record["loss"] for record in series(own)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


@pytest.mark.parametrize("loop", list(OUTER_LOOPS))
def test_every_loop_takes_a_step(config, loop):
    trainer = meta.prepare(config.model_copy(update={"loop": loop, "first_order": loop != "maml"}))
    trainer.folder.mkdir(exist_ok=True)
    before = {name: value.clone() for name, value in trainer.groups["begin"].items()}
    record = trainer.train_step(next(trainer.upcoming()))
    assert np.isfinite(list(record.values())).all()
    assert any(not torch.equal(value, before[name]) for name, value in trainer.groups["begin"].items())
    assert bool(trainer.groups["rates"]) == OUTER_LOOPS[loop].learns_rates


def test_unrolled_steps_are_drawn_between_fewest_and_most(config):
    trainer = meta.prepare(config.model_copy(update={"unroll": (1, 4), "validate_steps": [0, 3]}))
    drawn = [trainer.episodes.inner_steps(step) for step in range(200)]
    assert set(drawn) == {1, 2, 3, 4} and drawn == [trainer.episodes.inner_steps(step) for step in range(200)]
    assert drawn.count(1) > drawn.count(4)  # even on a logarithmic scale
    for step in (drawn.index(1), drawn.index(4)):
        problem = trainer.problem(trainer.episodes[step])
        assert len(problem.support) == len(problem.rates) == drawn[step]
    trainer.folder.mkdir(exist_ok=True)
    metrics = ["identity", "psnr", "sharpness", *(["lpips"] if trainer.lpips is not None else [])]
    assert trainer.validate().keys() == {f"{kind}_{metric}_gain_{steps}" for kind in ("heavy", "moderate")
                                         for metric in metrics for steps in (0, 3)}


def test_the_outer_loss_can_mind_texture(config, random_vgg):
    """By LPIPS over VGG-16 of what the first guess restores, times its weight."""
    trainers = [meta.prepare(config.model_copy(update={"outer": config.outer.model_copy(update={"lpips": weight})}))
                for weight in (0.0, 0.5)]
    problems = [trainer.problem(trainer.episodes[0]) for trainer in trainers]
    truth, poor, _ = problems[0].query
    without, within = (problem.outer(problem.begin, *problem.query).detach() for problem in problems)
    restored = problems[0].outer.restore(problems[0].begin, poor)
    distance = random_vgg(restored, truth).flatten().unflatten(0, (config.people, -1)).mean(dim=1)
    torch.testing.assert_close(within - without, 0.5 * distance, rtol=1e-4, atol=1e-6)


def test_engines_take_the_same_step(config):
    pytest.importorskip("higher")
    gradients = []
    for engine in ("batched", "higher"):
        trainer = meta.prepare(config.model_copy(update={"engine": engine, "first_order": False, "loop": "maml"}))
        trainer.meta_gradient(trainer.episodes[0])
        gradients.append({name: value.grad for own in trainer.groups.values() for name, value in own.items()})
    for name, value in gradients[0].items():
        torch.testing.assert_close(value, gradients[1][name], rtol=1e-3, atol=1e-6, msg=name)
    assert set(ENGINES) >= {"batched", "higher"}


def test_slow_weights_move_slowly(config, tiny_model):
    slow = config.model_copy(update={"slow": ["gpen.generator.*.modulation.*", "start.gate.slope"], "lr_slow": 1e-4})
    trainer = meta.prepare(slow)
    assert any("modulation" in name for name in trainer.groups["slow"])
    trainer.train_step(next(trainer.upcoming()))
    before, after = (m.gpen.generator.conv1.conv.modulation.weight for m in (tiny_model, trainer.model))
    assert 0 < (after - before).abs().max() < 2e-4


def under_torchrun(processes: int, *work: str) -> None:
    """Run `work`, what Python would get, in so many processes that speak gloo."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}",
               "--master-addr=127.0.0.1", f"--master-port={port}", *work]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.path.dirname(__file__)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[:3000]


def test_what_processes_average_may_lie_in_memory_in_any_order(monkeypatch):
    """nccl refuses what is neither contiguous nor channels_last, and gloo adds up whatever lies at a place."""
    def all_reduce(value):
        assert value.is_contiguous()
        value.add_(1)  # what the other process has, in sum

    monkeypatch.setattr(meta.dist, "all_reduce", all_reduce)
    monkeypatch.setattr(meta.dist, "get_world_size", lambda: 2)
    values = [torch.randn(4, 6, 3, 3).permute(1, 0, 2, 3), torch.randn(5), torch.tensor(3.0)]
    wanted = [(value + 1) / 2 for value in values]
    meta.average_over_processes(values)
    for value, mean in zip(values, wanted, strict=True):
        torch.testing.assert_close(value, mean)


def test_two_processes_equal_one_with_twice_the_people(config, tmp_path):
    """Through torchrun and gloo: the same meta-gradient, so the same weights after two meta-steps."""
    results = []
    for world, people in ((1, 4), (2, 2)):
        out = tmp_path / f"world{world}.pt"
        arguments = config.model_copy(update={
            "people": people, "output_dir": tmp_path / f"run{world}", "outer_optimiser": "sgd", "lr_slow": 1e-3,
            "slow": ["gpen.generator.*.conv.weight"]})  # the gradients of some lie in memory in an order of their own
        (tmp_path / "config.json").write_text(arguments.model_dump_json())
        (tmp_path / "work.py").write_text(WORK)
        under_torchrun(world, str(tmp_path / "work.py"), str(tmp_path / "config.json"), str(out))
        results.append(torch.load(out, weights_only=True))
    one, two = results
    assert one.keys() == two.keys() and len(one) > 10
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=1e-6, msg=name)


WORK = """
import sys, json
import torch
torch.set_num_threads(1)
from tiny import recogniser
from metagpen import recognise
from metagpen.meta import train as meta

net = recogniser()
recognise.load = lambda *_, **__: net
config = meta.MetaConfig.from_dict(json.load(open(sys.argv[1])))
rank, world = meta.process_of_run("cpu")
if rank:
    meta.dist.barrier()  # let the first one write the cache of photos
trainer = meta.prepare(config)
if world > 1 and not rank:
    meta.dist.barrier()
for _ in range(2):
    trainer.train_step(next(trainer.upcoming()))
if not rank:
    torch.save({n: v.detach() for own in trainer.groups.values() for n, v in own.items()}, sys.argv[2])
"""


def test_the_command_trains_and_goes_on_in_two_processes_as_in_one(tmp_path):
    """`metagpen meta-train` itself under torchrun, from the package's album: one model in the end, written once."""
    rows, people = [("set", "id", "split")], ("ada", "bob", "eve")
    for person in people:
        shutil.copytree(OWN_ALBUM / person, tmp_path / "people" / person)
        rows.append(("people", person, "val" if person == "eve" else "train"))
    with open(tmp_path / "splits.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)
    gpen = GPEN(32, 1, 1 / 32)
    start = IdentityStart(256, gpen.config.n_latent, gpen.config.style_dim)
    MetaGPEN(gpen, start, {"recogniser": "embedded"}).save(tmp_path / "base.safetensors", dtype=torch.float32)
    settings = {"data": [str(tmp_path / "people")], "split": str(tmp_path / "splits.csv"), "loop": "fomaml",
                "base": str(tmp_path / "base.safetensors"), "device": "cpu", "threads": 1, "shots": [1, 2],
                "outer_optimiser": "sgd", "queries": 2, "warmup": 1, "validate_people": 1, "validate_queries": 1,
                "save_every": 1, "inner": {"steps": 1, "batch_size": 2, "tail_blocks": 0, "bf16": False}}
    finished = []
    for number, runs in enumerate(([(1, 2)], [(1, 1), (2, 2)])):
        folder = tmp_path / f"run{number}"
        (tmp_path / "config.yml").write_text(json.dumps({**settings, "output_dir": str(folder)}))
        for world, stop in runs:
            under_torchrun(world, "-m", "metagpen", "meta-train", "-c", str(tmp_path / "config.yml"),
                           "-s", f"meta_steps={stop}", "-s", f"people={4 // world}")
        finished.append(load_file(folder / "ema.safetensors"))
        logged = [json.loads(line)["step"] for line in (folder / "log.jsonl").read_text().splitlines()]
        assert logged == [0, 1]
    one, two = finished
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("change, error, message", [
    ({"loop": "mamml"}, ConfigError, "loop: 'mamml' is none of"),
    ({"loop": "maml"}, ConfigError, "loop: maml in first order is fomaml; take loop: fomaml, or first_order: false"),
    ({"engine": "hire"}, ConfigError, "engine: 'hire' is none of"),
    ({"shots": (8, 9)}, DataError, "no training person has 8 photos"),
    ({"shots": (3, 2)}, ConfigError, "shots: .* is no range"),
    ({"unroll": (0, 2)}, ConfigError, "unroll: .* is no range"),
    ({"slow": ["gpen.nothing.*"]}, ConfigError, "no shared weight is called"),
    ({"pack_size": 32}, ConfigError, "the base restores 16 px, not 32"),
    ({"part": "kept"}, DataError, "no person of these folders is marked 'kept'"),
    ({"validate_degradations": ["hevy"]}, ConfigError, "no degradation 'hevy'"),
    ({"layout": "lfw"}, DataError, "whole ones, not aligned crops"),
])
def test_what_cannot_work_is_refused_early(config, change, error, message):
    with pytest.raises(error, match=message):
        meta.prepare(config.model_copy(update=change))


def test_people_kept_back_from_the_base_can_be_learned_on_alone(config):
    config.split.write_text(config.split.read_text().replace("bob,train", "bob,kept"))
    trainer = meta.prepare(config.model_copy(update={"part": "kept"}))
    assert trainer.data.photos.names == ["bob"] and [task.person for task in trainer.data.watched] == ["eve"]
    assert meta.prepare(config).data.photos.names == ["ada", "cyd", "solo"]


def test_shared_filters_are_learned_and_kept(config, tiny_model, tmp_path):
    inner = config.inner.model_copy(update={"decoder_rank": 3})
    trainer = meta.prepare(config.model_copy(update={"inner": inner, "slow": ["bases.*"], "lr_slow": 1e-2}))
    before = [own.detach().clone() for own in trainer.model.bases.filters]
    assert all(torch.equal(own, random) for own, random in zip(
        before, DecoderBases.random(trainer.model.gpen, 3).filters, strict=True))
    trainer.train_step(next(trainer.upcoming()))
    assert not any(torch.equal(a, b) for a, b in zip(before, trainer.model.bases.filters, strict=True))
    path = trainer.average.module.save(tmp_path / "model.safetensors")
    assert MetaGPEN.from_file(path).bases.rank == 3


def test_a_rule_takes_over_what_fits(tiny_model):
    shape = RuleConfig("adam", 4, per_step=True)
    old = InnerRule(tiny_model.gpen, AdapterSpec(1, 2), shape, lr_latent=0.5)
    new = InnerRule(tiny_model.gpen, AdapterSpec(1, 3, decoder_rank=2), shape, lr_latent=0.1, lr_decoder=0.2)
    with torch.no_grad():
        old.initial["linear-bias"].fill_(7.0)
    new.take(old)
    assert torch.equal(new.initial["linear-bias"], old.initial["linear-bias"])
    assert torch.equal(new.log_rates["latent-offset"], old.log_rates["latent-offset"])
    assert new.initial["linear-weight-up"].shape[-1] == 3, "of another shape: its own"
    assert new.rates(0, 4)["decoder.0.up"].item() == pytest.approx(0.2)


def test_rates_are_taken_over_for_what_they_mean(tiny_model):
    """Under another optimiser or schedule nothing; for other numbers of steps, what they say for such a run."""
    old = InnerRule(tiny_model.gpen, AdapterSpec(1, 2), RuleConfig("adam", 4), lr_latent=0.5)
    with torch.no_grad():
        old.shrink.fill_(0.8)
    longer = InnerRule(tiny_model.gpen, AdapterSpec(1, 2), RuleConfig("adam", 16), lr_latent=0.1)
    longer.take(old)
    for steps in (2, 16, 40):
        assert longer.rates(0, steps)["latent.offset"].item() == pytest.approx(
            old.rates(0, steps)["latent.offset"].item(), rel=1e-5)
    for other in (RuleConfig("sgd", 4), RuleConfig("adam", 4, schedule="cosine")):
        own = InnerRule(tiny_model.gpen, AdapterSpec(1, 2), other, lr_latent=0.1)
        own.take(old)
        assert own.log_rates["latent-offset"].exp().item() == pytest.approx(0.1)


def test_rates_are_taken_over_by_tables_of_every_shape(tiny_model):
    def rule(steps, lr_latent=0.1, rank=2, **shape):
        return InnerRule(tiny_model.gpen, AdapterSpec(1, rank), RuleConfig("adam", steps, **shape), lr_latent)

    def taken(new, old):
        new.take(old)
        return [new.rates(k, new.config.steps) for k in range(new.config.steps)]

    one = rule(4, lr_latent=0.5)
    for shape in ({"per_step": True}, {"elementwise": True}, {"per_step": True, "elementwise": True}):
        for rates in taken(rule(4, **shape), one):
            torch.testing.assert_close(rates["latent.offset"], torch.tensor(0.5).expand_as(rates["latent.offset"]))

    table = rule(3, per_step=True)
    with torch.no_grad():
        table.log_rates["latent-offset"].copy_(torch.tensor([1.0, 4.0, 2.0]).log()[:, None, None])
    longer = [rates["latent.offset"].item() for rates in taken(rule(5, per_step=True), table)]
    assert longer == pytest.approx([value * (3 / 5) ** 0.5 for value in (1, 2, 4, 8 ** 0.5, 2)])
    assert taken(rule(3), table)[0]["latent.offset"].item() == pytest.approx(2)

    every = rule(4, elementwise=True)
    with torch.no_grad():
        every.log_rates["linear-weight-up"][..., 0] = torch.tensor(0.2).log()
        every.log_rates["linear-weight-up"][..., 1] = torch.tensor(0.8).log()
    for own in (rule(4), rule(4, rank=3, elementwise=True)):
        rates = taken(own, every)[0]["linear.weight.up"]
        torch.testing.assert_close(rates, torch.tensor(0.4).expand_as(rates))


def test_a_single_setting_of_the_inner_loop_leaves_the_others(config):
    given = {**config.model_dump(exclude_unset=True), "inner": {"batch_size": 3}}
    assert meta.MetaConfig.from_dict(given).inner.steps == meta.InnerConfig().steps == 8


def test_a_validation_that_was_interrupted_at_the_end_is_made_up_for(config, monkeypatch):
    config = config.model_copy(update={"validate_every": 100})
    plain = meta.Trainer.validate

    def interrupted(trainer):
        raise KeyboardInterrupt

    monkeypatch.setattr(meta.Trainer, "validate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        meta.meta_train(config)
    assert not (config.output_dir / "best.safetensors").exists()
    monkeypatch.setattr(meta.Trainer, "validate", plain)
    meta.meta_train(config)
    assert (config.output_dir / "best.safetensors").exists() and sorted(series(config)) == list(range(5))
    monkeypatch.setattr(meta.Trainer, "validate", interrupted)
    meta.meta_train(config)  # once is enough


def test_a_validation_that_was_interrupted_on_the_way_is_logged_as_it_would_have_been(config, tmp_path, monkeypatch):
    whole = config.model_copy(update={"validate_every": 2, "save_every": 100})
    meta.meta_train(whole)
    parts = whole.model_copy(update={"output_dir": tmp_path / "parts"})
    plain, looks = meta.Trainer.validate, []

    def interrupted_at_first(trainer):
        looks.append(trainer.step)
        if len(looks) == 1:
            raise KeyboardInterrupt
        return plain(trainer)

    monkeypatch.setattr(meta.Trainer, "validate", interrupted_at_first)
    with pytest.raises(KeyboardInterrupt):
        meta.meta_train(parts)
    meta.meta_train(parts)
    assert looks == [2, 2, 4, 5]
    assert series(parts) == series(whole) and len((parts.output_dir / "log.jsonl").read_text().splitlines()) == 5
    a, b = (MetaGPEN.from_file(own.output_dir / "best.safetensors").state_dict() for own in (whole, parts))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_the_best_so_far_counts_for_the_same_measure_only(config):
    meta.meta_train(config)
    same = meta.prepare(config.model_copy(update={"meta_steps": 9, "validate_every": 3}))
    assert same.resume() and same.best > float("-inf")
    for change in ({"validate_steps": [0, 1]}, {"validate_degradations": ["moderate"]}, {"scorer": "another"},
                   {"validate_queries": 1}):
        other = meta.prepare(config.model_copy(update=change))
        assert other.resume() and other.step == same.step and other.best == float("-inf")


def test_a_run_does_not_go_on_from_another_base(config, tiny_model):
    meta.meta_train(config)
    with torch.no_grad():
        tiny_model.gpen.final_linear[0].weight.mul_(1.5)
    tiny_model.save(config.base, dtype=torch.float32)
    with pytest.raises(CheckpointError, match="began from another model"):
        meta.meta_train(config)


def test_a_meta_step_that_is_not_finite_is_not_taken(config, monkeypatch):
    plain = meta.Trainer.meta_gradient

    def broken(trainer, episode):
        loss = plain(trainer, episode)
        if episode.step == 3:
            next(iter(trainer.groups["begin"].values())).grad.fill_(float("nan"))
        return loss

    monkeypatch.setattr(meta.Trainer, "meta_gradient", broken)
    with pytest.raises(ConfigError, match="step 3: a loss or gradient is not finite"):
        meta.meta_train(config)
    assert MetaGPEN.from_file(config.output_dir / "ema.safetensors").rule.initial["latent-offset"].isfinite().all()


def test_an_average_that_diverged_replaces_nothing(config):
    meta.meta_train(config)
    trainer = meta.prepare(config)
    trainer.resume()
    before = {file.name: file.read_bytes() for file in config.output_dir.iterdir() if file.is_file()}
    nn.init.constant_(trainer.average.module.gpen.final_linear[0].weight, 1e9)  # which half precision lacks
    trainer.best, trainer.validate = float("-inf"), lambda: {"heavy_identity_gain_2": 0.0}
    for write, name in ((trainer.save, "ema"), (lambda: trainer._validate_and_keep({}, Console(quiet=True)), "best")):
        with pytest.raises(ConfigError, match=f"{name}.safetensors: not written, .* at lower rates"):
            write()
    assert before == {file.name: file.read_bytes() for file in config.output_dir.iterdir() if file.is_file()}


def test_a_full_disk_leaves_the_older_sheet(config, monkeypatch):
    trainer = meta.prepare(config)
    older_sheet_is_left(config.output_dir / "sheet_000000.png", trainer.validate, monkeypatch)


@pytest.mark.parametrize("change", [
    {"lr": -1}, {"lr_rates": -1}, {"lr_start": -1}, {"lr_slow": float("nan")}, {"warmup": -1}, {"ema": 5},
    {"pack_size": 0}, {"threads": -1}, {"min_query_side": -1}, {"outer": {"l1": -1}},
    {"outer": {"identity": float("inf")}}, {"card": {"made": {1, 2}}},
])
def test_numbers_that_no_meta_training_can_have_are_refused(config, change):
    with pytest.raises(ConfigError, match=next(iter(change))):
        meta.MetaConfig.from_dict({**config.model_dump(exclude_unset=True), **change})


def test_a_frozen_weight_cannot_be_slow(config):
    trainer = meta.prepare(config.model_copy(update={"slow": ["gpen.ecd0.*"]}))
    with pytest.raises(ConfigError, match="does not influence the query loss"):
        trainer.train_step(next(trainer.upcoming()))


def test_a_base_without_start_needs_learn_start_off(config, tmp_path):
    MetaGPEN(GPEN(16, 1, 0.03125, style_dim=16, n_mlp=2)).save(tmp_path / "plain.safetensors")
    plain = config.model_copy(update={"base": str(tmp_path / "plain.safetensors")})
    with pytest.raises(ConfigError, match="has no start"):
        meta.prepare(plain)
    trainer = meta.prepare(plain.model_copy(update={"learn_start": False}))
    trainer.train_step(next(trainer.upcoming()))


def test_any_seed_can_be_the_time(config):
    """1,753,000,000 times what it is multiplied with is more than generators take."""
    trainer = meta.prepare(config.model_copy(update={"seed": 1_753_000_000, "unroll": (1, 2)}))
    ours, again = (trainer.problem(trainer.episodes[2**31]) for _ in range(2))
    assert torch.equal(ours.query[1], again.query[1]) and trainer.episodes.inner_steps(0) in (1, 2)
    for seed in (-1, 2**63):
        with pytest.raises(ConfigError, match=f"'seed': input should be .*, not {seed}"):
            meta.MetaConfig.from_dict({**config.model_dump(exclude_unset=True), "seed": seed})


def test_another_configuration_does_not_resume(config):
    trainer = meta.prepare(config)
    trainer.folder.mkdir(exist_ok=True)
    trainer.save()
    other = meta.prepare(config.model_copy(update={"learn_start": False}))
    with pytest.raises(ConfigError, match="holds a run with learn_start = True, now it is False"):
        other.resume()
