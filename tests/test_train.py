"""`metagpen train` on a tiny model and random faces: stages, growth, and resuming exactly."""

import csv
import datetime
import json
import os
import signal

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save
from tiny import older_sheet_is_left
from torch.optim.swa_utils import AveragedModel

from metagpen import devices, recognise, train
from metagpen.errors import CheckpointError, ConfigError, DataError
from metagpen.model import MetaGPEN
from metagpen.person.start import MixtureHead

LOSS = {"l1": 1.0, "gradient": 0.5, "perceptual": 0.1, "identity": 0.1}


@pytest.fixture
def config(tmp_path, monkeypatch, tiny_recogniser) -> train.TrainConfig:
    monkeypatch.setattr(recognise, "load", lambda *_, **__: tiny_recogniser)
    rng = np.random.default_rng(0)
    rows = [("set", "id", "split")]
    for person, split in (("ada", "train"), ("bob", "train"), ("solo", "train"), ("eve", "val")):
        folder = tmp_path / "people" / person
        folder.mkdir(parents=True)
        rows.append(("people", person, split))
        for i in range(1 if person == "solo" else 3):
            small = Image.fromarray(rng.integers(0, 255, (4, 4, 3), dtype=np.uint8))
            small.resize((32, 32)).save(folder / f"{i}.png")
    with open(tmp_path / "splits.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)
    return train.TrainConfig.from_dict({
        "data": [tmp_path / "people"], "split": tmp_path / "splits.csv", "output_dir": tmp_path / "run",
        "narrow": 0.03125, "pack_size": 32, "degradation": {"heavy": {"face_px": [4, 8]}}, "bf16": False,
        "save_every": 3, "sheet_every": 4, "ema": 0.9,
        "stages": [{"size": 16, "steps": 4, "batch_size": 2, "loss": LOSS},
                   {"size": 32, "steps": 3, "batch_size": 2, "r1_every": 2,
                    "loss": LOSS | {"adversarial": 0.1, "feature_matching": 0.1, "projected": 0.1, "regions": 0.1}}]})


def losses(config: train.TrainConfig) -> dict[int, tuple]:
    """By step: what was logged, without timings; every step once, in order."""
    records = [json.loads(line) for line in (config.output_dir / "log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(len(records)))
    return {record["step"]: tuple(item for item in record.items() if item[0] != "photos_per_second")
            for record in records}


def test_two_stages_make_a_model_of_the_last_size(config):
    model = MetaGPEN.from_file(train.train(config))
    assert model.size == 32 and model.start.n_latent == model.gpen.config.n_latent
    series = losses(config)
    assert sorted(series) == list(range(7))
    assert {"adversarial", "critic", "identity", "projected", "critic_depth_1", "regions",
            "critic_mouth"} <= dict(series[5]).keys()
    assert (config.output_dir / "sheet_000004.png").exists()
    assert model.card["recogniser"] == "embedded" and model.card["loss_recogniser"] == "tests"
    assert (model.card["people"], model.card["photos"]) == (3, 7)


@pytest.mark.parametrize("killed_at", [2, 3, 4, 5])
def test_killed_and_resumed_equals_uninterrupted(config, monkeypatch, killed_at):
    """Three stages: the last one's new layers and critic are drawn after the resume as they would have been."""
    first, last = config.stages
    config = config.model_copy(update={"stages": [first, first.model_copy(update={"steps": 2}), last]})
    whole = config.model_copy(update={"output_dir": config.output_dir.with_name("whole")})
    reference = MetaGPEN.from_file(train.train(whole)).state_dict()

    class Killed(Exception):
        pass

    step = train.Trainer.train_step

    def until(trainer, batch):
        if trainer.step == killed_at:
            raise Killed
        return step(trainer, batch)

    monkeypatch.setattr(train.Trainer, "train_step", until)
    with pytest.raises(Killed):
        train.train(config)
    monkeypatch.setattr(train.Trainer, "train_step", step)
    resumed = MetaGPEN.from_file(train.train(config)).state_dict()
    assert losses(config) == losses(whole)
    assert all(torch.equal(resumed[name], value) for name, value in reference.items())


def test_an_interrupted_step_is_finished_first(config, monkeypatch):
    """Ctrl-C while weights have moved and the counter has not: what is saved must be one or the other."""
    whole = config.model_copy(update={"output_dir": config.output_dir.with_name("whole")})
    reference = MetaGPEN.from_file(train.train(whole)).state_dict()
    update, calls = AveragedModel.update_parameters, []

    def interrupted(average, model):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return update(average, model)

    monkeypatch.setattr(AveragedModel, "update_parameters", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train.train(config)
    assert len(losses(config)) == 3, "the step that was finished is in the log"
    resumed = MetaGPEN.from_file(train.train(config)).state_dict()
    assert losses(config) == losses(whole)
    assert all(torch.equal(resumed[name], value) for name, value in reference.items())


def test_another_configuration_does_not_go_on(config):
    train.train(config.model_copy(update={"stages": config.stages[:1]}))
    with pytest.raises(ConfigError, match="holds a run with seed = 0, now it is 1"):
        train.train(config.model_copy(update={"seed": 1}))
    changed = config.stages[0].model_copy(update={"lr": 1e-4})
    with pytest.raises(ConfigError, match=r"stages\.0\.lr = .*, now it is 0.0001;"):
        train.train(config.model_copy(update={"stages": [changed, config.stages[1]]}))
    train.train(config.model_copy(update={"sheet_every": 2}))  # a further stage, watched more often
    assert len(losses(config)) == 7
    with pytest.raises(CheckpointError, match="written in stage 2, the configuration has only 1 stages"):
        train.train(config.model_copy(update={"stages": config.stages[:1]}))


def test_a_run_does_not_go_on_with_other_photos(config):
    train.train(config.model_copy(update={"stages": config.stages[:1]}))
    photo = config.data[0] / "ada" / "0.png"
    Image.open(photo).rotate(90).save(photo)
    with pytest.raises(CheckpointError, match="began on other photos"):
        train.train(config)


@pytest.mark.parametrize("content", [b"half", b"", [1, 2], {"step": 1}, "config"])
def test_a_damaged_state_is_named_with_what_to_do(config, content):
    train.train(config.model_copy(update={"stages": config.stages[:1]}))
    path = config.output_dir / "last.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(torch.load(path, weights_only=True) | {"config": "{"} if content == "config" else content, path)
    with pytest.raises(CheckpointError, match=r"last\.pt: (damaged|not a state of this training) .*; delete it"):
        train.train(config)


def test_a_setting_that_a_run_did_not_know_has_its_default(config):
    train.train(config.model_copy(update={"stages": config.stages[:1]}))
    path = config.output_dir / "last.pt"
    state = torch.load(path, weights_only=True)
    known = json.loads(state["config"])
    del known["mapping_rate"]
    torch.save(state | {"config": json.dumps(known)}, path)
    train.train(config)
    assert len(losses(config)) == 7


def test_numbers_that_are_not_finite_never_reach_a_file(config, monkeypatch):
    plain = train.Trainer.losses

    def broken(trainer, restored, batch):
        return {name: term * (float("nan") if trainer.step == 4 else 1.0)
                for name, term in plain(trainer, restored, batch).items()}

    monkeypatch.setattr(train.Trainer, "losses", broken)
    with pytest.raises(ConfigError, match="step 4: a loss or gradient is not finite"):
        train.train(config)
    assert all(bool(value.isfinite().all()) for value in MetaGPEN.from_file(
        config.output_dir / "ema.safetensors").state_dict().values())


def test_an_average_that_diverged_replaces_no_state(config):
    train.train(config.model_copy(update={"stages": config.stages[:1]}))
    trainer = train.prepare(config)
    trainer.resume()
    before = {file.name: file.read_bytes() for file in config.output_dir.iterdir() if file.is_file()}
    torch.nn.init.constant_(trainer.average.module.gpen.final_linear[0].weight, 1e9)  # which half precision lacks
    with pytest.raises(ConfigError, match="not written, .* begin another run.* at lower rates") as caught:
        trainer.save()
    assert "dtype" not in str(caught.value)
    assert before == {file.name: file.read_bytes() for file in config.output_dir.iterdir() if file.is_file()}


def test_a_full_disk_leaves_the_older_sheet(config, monkeypatch):
    trainer = train.prepare(config)
    older_sheet_is_left(config.output_dir / "sheet_000000.png", trainer.watch, monkeypatch)


@pytest.mark.parametrize("change", [
    {"threads": 0}, {"max_identity_photos": 0}, {"narrow": 0}, {"ema": 1}, {"mapping_rate": -1},
    {"channel_multiplier": -2}, {"card": {"made": datetime.date(2024, 1, 1)}}, {"card": {"made": "\ud800"}},
    *({"stages": [{"size": 16, "steps": 1, **stage}]} for stage in (
        {"beta1": 2}, {"lr_d": -1}, {"warmup": -1}, {"loss": {"l1": -1}})),
])
def test_numbers_that_no_training_can_have_are_refused(config, change):
    with pytest.raises(ConfigError, match=next(iter(change))):
        train.TrainConfig.from_dict({**config.model_dump(exclude_unset=True), **change})


def test_damaged_leftovers_are_named(config):
    train.train(config)
    log = config.output_dir / "log.jsonl"
    whole = log.read_bytes()
    for junk in (b"{\n", b"[1]\n", b"{}\n", b"\xff\n"):
        log.write_bytes(whole + junk)
        with pytest.raises(DataError, match=r"log.jsonl, line 8: damaged .* delete the line"):
            train.train(config)
    log.write_bytes(whole)
    cache = min((config.output_dir / "cache").glob("embeddings_*"))
    for junk in (cache.read_bytes()[:50], save({"other": torch.zeros(1)})):
        cache.write_bytes(junk)
        with pytest.raises(DataError, match="the embeddings in '.*' cannot be read .*; delete the file"):
            train.train(config)


def test_beginning_from_a_model_grows_it(config, tmp_path):
    small = train.prepare(config).average.module
    path = small.save(tmp_path / "small.safetensors", torch.float32)
    trainer = train.prepare(config.model_copy(update={"init": str(path), "stages": config.stages[1:]}))
    assert trainer.model.size == 32 and trainer.model.card["init"]["recogniser"] == "embedded"
    assert torch.equal(trainer.model.gpen.final_linear[0].weight, small.gpen.final_linear[0].weight)
    trainer.train_step(next(trainer.upcoming()))
    assert not torch.equal(trainer.model.gpen.final_linear[0].weight, small.gpen.final_linear[0].weight)


def test_a_training_begins_without_what_only_meta_training_learns(config, tmp_path):
    """Nothing here would move a guess of mixtures, or what the start makes of the appearance."""
    small = train.prepare(config).average.module
    small.start.look_at_appearance()
    small.start.mixtures = MixtureHead(small.start.hidden, [layer.conv.weight.shape[1] for layer in
                                                            small.gpen.generator.styled], 2, 3)
    path = small.save(tmp_path / "small.safetensors", torch.float32)
    start = train.prepare(config.model_copy(update={"init": str(path)})).model.start
    assert start.mixtures is None and start.appearance is None


def test_interruption_saves_where_it_was(config, monkeypatch):
    step = train.Trainer.train_step

    def interrupted(trainer, batch):
        if trainer.step == 2:
            raise KeyboardInterrupt
        return step(trainer, batch)

    monkeypatch.setattr(train.Trainer, "train_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train.train(config)
    state = torch.load(config.output_dir / "last.pt", weights_only=True)
    assert state["step"] == 2


def test_people_with_one_photo_have_no_identity_and_others_never_their_own(config):
    trainer = train.prepare(config)
    batches, stage = trainer.batches, trainer.stage.model_copy(update={"batch_size": 64})
    batch = batches.draw(0, stage)
    assert 0 < batch.known.mean() < 1
    nobody = batch.identity.norm(dim=1) == 0  # "solo"
    assert nobody.any() and not nobody.all() and not batch.known[nobody].any()
    torch.testing.assert_close(batch.identity[~nobody].norm(dim=1), torch.ones(int((~nobody).sum())))
    again = batches.draw(0, stage)
    assert torch.equal(batch.poor, again.poor) and torch.equal(batch.identity, again.identity)
    assert not torch.equal(batch.truth, batches.draw(1, stage).truth)


@pytest.mark.parametrize("part", ["train", "val"])
def test_a_stage_for_which_no_photo_is_large_enough_is_told_before_the_first(config, monkeypatch, part):
    pack = train.pack

    def packed(people, *given, **more):
        photos = pack(people, *given, **more)
        photos.source_side[:] = 16.0 if ("eve" in people) == (part == "val") else 64.0
        return photos

    monkeypatch.setattr(train, "pack", packed)
    stages = [config.stages[0], config.stages[1].model_copy(update={"min_source_side": 32})]
    with pytest.raises(DataError, match=f"no photo of the people marked '{part}' has a native side of 32 px"):
        train.prepare(config.model_copy(update={"stages": stages}))


def test_a_watched_person_with_a_single_photo_is_nobody(config):
    """No other photo says who that is, as in training."""
    for i in (1, 2):
        (config.data[0] / "eve" / f"{i}.png").unlink()
    trainer = train.prepare(config)
    trainer.folder.mkdir(parents=True, exist_ok=True)
    torch.nn.init.normal_(trainer.average.module.start.head.bias)
    figures = trainer.watch()
    assert figures["start_psnr"] == figures["generic_psnr"] and figures["start_cosine"] == figures["generic_cosine"]


def test_workers_make_the_same_batches(config):
    trainer = train.prepare(config)
    alone = list(trainer.upcoming())
    trainer.config = config.model_copy(update={"workers": 2})
    for a, b in zip(alone, trainer.upcoming(), strict=True):
        assert torch.equal(a.poor, b.poor) and torch.equal(a.identity, b.identity)


def test_the_mapping_network_has_a_rate_of_its_own(config):
    trainer = train.prepare(config.model_copy(update={"mapping_rate": 0.0}))
    mapping = trainer.model.gpen.generator.style
    before = [p.clone() for p in trainer.model.parameters()]
    of_mapping = {id(p) for p in mapping.parameters()}
    trainer.train_step(next(trainer.upcoming()))
    moved = {id(p): not torch.equal(p, old) for p, old in zip(trainer.model.parameters(), before, strict=True)}
    assert not any(moved[i] for i in of_mapping) and sum(moved.values()) > 0.8 * (len(moved) - len(of_mapping))


def test_every_feature_of_the_encoder_learns_from_the_first_step(config):
    """A feature weight that begins at zero, as StyleGAN2's noise does, would leave the encoder without a gradient."""
    trainer = train.prepare(config)
    batch = trainer.to_device(next(trainer.upcoming()))
    trainer.losses(trainer.forward(trainer.model, batch), batch)["l1"].backward()
    for block in trainer.model.gpen.encoder:
        assert block[0][-2].weight.grad.abs().max() > 0


@pytest.mark.parametrize("native", [False, True])
def test_bfloat16_only_where_it_is_native(config, monkeypatch, native):
    """Elsewhere it is emulated, slower than float32: there wanting it changes nothing."""
    monkeypatch.setattr(devices, "has_bf16", lambda device: native)
    config = config.model_copy(update={"stages": [config.stages[0].model_copy(update={"steps": 1})]})
    models = [train.train(config.model_copy(update={"bf16": bf16, "output_dir": config.output_dir / str(bf16)}))
              for bf16 in (True, False)]
    wanted, plain = (MetaGPEN.from_file(file).state_dict() for file in models)
    assert all(torch.equal(wanted[name], plain[name]) for name in plain) is not native


def test_a_critic_that_looks_through_vgg_sees_the_whole_batch(config, random_vgg, tiny_recogniser):
    """And the recogniser only its share of it."""
    loss = LOSS | {"lpips": 0.3, "projected": 0.1}
    stage = train.Stage(size=32, steps=2, batch_size=4, loss=loss, critic_sees="vgg", recogniser_share=0.5)
    trainer = train.prepare(config.model_copy(update={"stages": [stage]}))
    batch = next(trainer.upcoming())
    logged = trainer.train_step(batch)
    assert logged["lpips"] > 0 and logged["projected"] > 0 and {"identity", "severity"} <= logged.keys()
    assert [len(m) for m in trainer.seen.maps] == [4] * 3 and len(trainer.seen.truth) == 4
    assert [m.shape[1] for m in trainer.seen.maps] == [128, 256, 512]
    placed = trainer.to_device(batch)
    restored = trainer.forward(trainer.model, placed)
    halves = trainer.recogniser_loss(restored[:2], batch.truth[:2], batch.landmarks[:2], batch.poor[:2])
    assert float(trainer.losses(restored, placed)["identity"].detach()) == pytest.approx(
        stage.loss.identity * float(halves.identity.mean().detach()), rel=1e-5)


def test_a_critic_that_looks_through_another_network_than_before_begins_anew(config, random_vgg):
    stages = [train.Stage(size=32, steps=1, batch_size=2, loss=LOSS | {"projected": 0.1}, critic_sees=sees)
              for sees in ("recogniser", "vgg", "vgg")]
    trainer = train.prepare(config.model_copy(update={"stages": stages}))
    kept = []
    for _ in range(2):
        before = trainer.critics["projected"].network
        trainer.next_stage()
        after = trainer.critics["projected"].network
        kept.append(torch.equal(before.brightness[-1].weight, after.brightness[-1].weight))
        assert trainer.train_step(next(trainer.upcoming()))["projected"] > 0
    assert kept == [False, True]


def test_critics_of_regions_look_at_those_alone_and_grow_along(config):
    regions = config.stages[1].model_copy(update={"loss": train.LossWeights(regions=1.0)})
    config = config.model_copy(update={"pack_size": 64, "stages": [regions,
                                                                   regions.model_copy(update={"size": 64})]})
    trainer = train.prepare(config)
    batch = trainer.to_device(next(trainer.upcoming()))
    restored = batch.truth.clone().requires_grad_()
    gradient, = torch.autograd.grad(trainer.losses(restored, batch)["regions"], restored)
    assert not gradient[:, :, :4, :].any(), "hair is none of their business"
    x, y = batch.landmarks[0, 3:].mean(dim=0).round().int().tolist()
    assert gradient[0, :, y - 1:y + 2, x - 1:x + 2].any(), "the mouth is"
    before = {name: value.clone() for name, value in trainer.critics["regions"].network.state_dict().items()}
    logged = trainer.train_step(next(trainer.upcoming()))
    assert {"regions", "critic_left_eye", "critic_right_eye", "critic_nose", "critic_mouth"} <= logged.keys()
    small = trainer.critics["regions"].network
    assert all(any(not torch.equal(value, before[f"kinds.{kind}.{name}"]) for name, value in own.state_dict().items())
               for kind, own in small.kinds.items())
    trainer.next_stage()
    large = trainer.critics["regions"].network
    assert (small.resolution, large.resolution) == (8, 16)
    for kind in small.kinds:
        assert torch.equal(large.kinds[kind].final_conv[0].weight, small.kinds[kind].final_conv[0].weight)


def test_impossible_configurations(config):
    with pytest.raises(ConfigError, match="did you mean 'stages.0.steps'"):
        train.TrainConfig.from_dict({"data": ["x"], "split": "y", "stages": [{"size": 16, "stepps": 3}]})
    given = config.model_dump(mode="json")
    for change, message in (({"stages": given["stages"][::-1]}, "16 px cannot follow 32 px: sizes may stay or double"),
                            ({"pack_size": 16}, "pack_size = 16: a stage of 32 px needs photos of that size"),
                            ({"stages": [given["stages"][0] | {"loss": {"regions": 0.1}}]}, "too small to judge eyes"),
                            ({"save_every": 0}, "save_every"), ({"device": "abacus"}, "'abacus' is not available")):
        with pytest.raises(ConfigError, match=message):
            train.TrainConfig.from_dict(given | change)
    with pytest.raises(ConfigError, match="scale = 2"):
        train.prepare(config.model_copy(update={"degradation": {"bsrgan": {"scale": 2}}}))
    with pytest.raises(DataError, match="whole ones, not aligned crops"):
        train.prepare(config.model_copy(update={"layout": "lfw"}))
    with pytest.raises(ConfigError, match="cannot become one of 16 px"):
        train.grow_to(train.grow_to(train.prepare(config).model, 32), 16)
    trainer = train.prepare(config)
    trainer.batches.photos.source_side[:] = 100.0
    with pytest.raises(DataError, match="min_source_side"):
        trainer.batches.draw(0, config.stages[0].model_copy(update={"min_source_side": 101}))


def test_a_configured_gate_stays(config):
    """And what it lets in is learned behind it."""
    config = config.model_copy(update={"gate": (15.0, 0.7)})
    gate = MetaGPEN.from_file(train.train(config)).gate
    assert gate.slope.unique().tolist() == [15.0]
    assert gate.centre.unique().tolist() == pytest.approx([0.7], abs=1e-3)  # half precision
    assert gate.nobody.abs().max() > 0
