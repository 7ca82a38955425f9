"""The inner loop on a tiny model: what it must do whatever the weights are."""

import gc
import math
import shutil
import sys
import warnings
import weakref
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import metagpen
from metagpen.adaptation import AdaptConfig, adapt, adapt_many, adversarial, album
from metagpen.adaptation.draws import draw, supports
from metagpen.adaptation.objective import Objective
from metagpen.adaptation.optimise import BETAS, EPS, Adam, sgd
from metagpen.adaptation.recorded import RecordedSteps
from metagpen.adaptation.steps import PlainSteps, begin, last_rates, step_rates
from metagpen.errors import ConfigError, PhotoError
from metagpen.faces import FFHQ_LANDMARKS
from metagpen.faces.align import mirror
from metagpen.gpen.discriminator import Discriminator
from metagpen.losses import generator_loss
from metagpen.person import AdapterSpec, PersonStore, restore_many
from metagpen.person.rule import InnerRule, RuleConfig
from metagpen.recognise.align import View
from metagpen.schedule import warmup_cosine

FAST = AdaptConfig(batch_size=4, degradation={"heavy": {"face_px": [4, 8]}}, tail_blocks=1, tail_rank=2, bf16=False,
                   lr_latent=0.03, lr_tail=0.01)


def faces(count: int, seed: int = 0, size: int = 16) -> list[torch.Tensor]:
    """Variations of one smooth picture: something that can be learned."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.nn.functional.interpolate(torch.randn(1, 3, 4, 4, generator=generator), size=size, mode="bicubic")
    return list((base + 0.05 * torch.randn(count, 3, size, size, generator=generator)).clamp(-1, 1))


def equal(a, b) -> bool:
    return all(torch.equal(a.parameters[k], b.parameters[k]) for k in a.parameters)


def test_adapting_lowers_the_loss_on_photos_never_seen(tiny_model, tiny_recogniser):
    photos = faces(6)
    person = adapt(tiny_model, photos[:3], steps=24, config=FAST, recogniser=tiny_recogniser)
    start = adapt(tiny_model, photos[:3], steps=0, config=FAST, recogniser=tiny_recogniser)
    objective = Objective(tiny_model, FAST, tiny_recogniser, None)
    held_out = draw([album(photos[3:], 16)], objective.degradation, FAST.model_copy(update={"batch_size": 16}),
                    [torch.Generator().manual_seed(5)])
    with torch.no_grad():
        before, after = (float(objective(p.parameters, *held_out)) for p in (start, person))
    assert after < 0.8 * before


def test_same_seed_same_person_and_model_untouched(tiny_model, tiny_recogniser):
    state = {k: v.clone() for k, v in tiny_model.state_dict().items()}
    first, again, other = (adapt(tiny_model, faces(2), steps=3, seed=seed, config=FAST, recogniser=tiny_recogniser)
                           for seed in (0, 0, 1))
    assert equal(first, again) and not equal(first, other)
    assert all(torch.equal(state[k], v) for k, v in tiny_model.state_dict().items())
    assert not any(p.requires_grad or p.grad is not None for p in tiny_model.parameters())


def test_a_trainable_model_is_left_trainable_and_without_gradients(tiny_model, tiny_recogniser):
    tiny_model.requires_grad_(True)
    adapt(tiny_model, faces(2), steps=2, config=FAST, recogniser=tiny_recogniser)
    assert all(p.requires_grad and p.grad is None for p in tiny_model.parameters())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_people_are_learned_in_any_gradient_mode(tiny_model, tiny_recogniser, mode):
    critic, config = Discriminator(16, 1, 0.03125), FAST.model_copy(update={"adversarial_steps": 1})
    expected = adapt(tiny_model, faces(2), 2, config=config, recogniser=tiny_recogniser, critic=critic)
    with mode():
        inside = adapt(tiny_model, faces(2), 2, config=config, recogniser=tiny_recogniser, critic=critic)
        several = adapt_many(tiny_model, {"a": faces(2), "b": faces(1)}, 1, config=FAST, recogniser=tiny_recogniser)
        assert not torch.is_grad_enabled()
    assert equal(expected, inside) and len(several) == 2 and torch.is_grad_enabled()
    for person in (inside, *several.values()):
        assert not any(value.is_inference() for value in (*person.parameters.values(), person.template))


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_people_are_learned_as_they_are_inside_autocast(tiny_model, tiny_recogniser, precision):
    """And what they restore is in the model's precision, however it was computed."""
    config = AdaptConfig(**{**FAST.model_dump(exclude_unset=True), "degradation": {"heavy": 0.5, "bsrgan": 0.5}})
    expected = adapt(tiny_model, faces(2), 2, config=config, recogniser=tiny_recogniser)
    with torch.autocast("cpu", precision):
        inside = adapt(tiny_model, faces(2), 2, config=config, recogniser=tiny_recogniser)
        images = torch.stack(faces(2))
        for restored in (inside.restore_batch(images), tiny_model.restore(images),
                         restore_many(tiny_model, [inside, expected], images)):
            assert restored.dtype == torch.float32
    assert equal(expected, inside)


@pytest.mark.parametrize(("given", "message"), [({"config": {"steps": 1}}, "an AdaptConfig is needed, not dict"),
                                                ({"recogniser": "embedded"}, "a Recogniser is needed, not its name")])
def test_something_else_than_what_is_needed_is_refused(tiny_model, tmp_path, given, message):
    store = PersonStore(tmp_path, tiny_model)
    for learn in (lambda: adapt(tiny_model, faces(1), 0, **given),
                  lambda: adapt_many(tiny_model, {"ada": faces(1)}, 0, store=store, **given)):
        with pytest.raises(ConfigError, match=message):
            learn()


@pytest.mark.parametrize("people", ["people", ["ada", "bob"]])
def test_people_come_with_their_photos(tiny_model, tiny_recogniser, people):
    with pytest.raises(ConfigError, match="names with their photos are needed"):
        adapt_many(tiny_model, people, recogniser=tiny_recogniser)


@pytest.mark.parametrize("key", ["l1", "identity", "latent_norm", "lr_latent", "lr_critic", "adversarial"])
def test_no_weight_and_no_rate_is_negative(key):
    with pytest.raises(ConfigError, match=key):
        AdaptConfig.from_dict({key: -1})


def test_who_restores_in_inference_mode_can_learn_afterwards(tiny_model, tiny_recogniser):
    """The random filters of a model without its own are kept from one to the other."""
    person = adapt(tiny_model, faces(2), 0, config=FAST, recogniser=tiny_recogniser)
    with torch.inference_mode():
        person.restore_batch(torch.stack(faces(2)))
    assert person.spec.decoder_rank and tiny_model._random_bases
    adapt(tiny_model, faces(2), 1, config=FAST, recogniser=tiny_recogniser)


def test_the_callers_dice_are_left_alone():
    before = torch.random.get_rng_state()
    model = metagpen.load("embedded")
    adapt(model, torch.zeros(1, 3, 128, 128), 0)
    assert torch.equal(before, torch.random.get_rng_state())


def test_nobodys_steps_depend_on_how_large_another_face_is(tiny_recogniser):
    """A recogniser that looks at faces more coarsely than they are samples everybody's as finely."""
    side = 48
    crops, marks = torch.stack(faces(4, size=side)), torch.from_numpy(FFHQ_LANDMARKS * side).float().repeat(4, 1, 1)
    large = side / 2 + 1.6 * (marks[:2] - side / 2)
    alone = tiny_recogniser.embed(crops[:2], marks[:2])
    beside = tiny_recogniser.embed(crops, torch.cat([marks[:2], large]))[:2]
    torch.testing.assert_close(alone, beside, rtol=0, atol=1e-6)
    assert not torch.allclose(tiny_recogniser.embed(crops[:2], large), alone, atol=1e-3)


def test_many_at_once_equal_one_at_a_time(tiny_model, tiny_recogniser):
    people = {"ada": faces(2, 1), "bob": faces(5, 2), "eve": faces(1, 3)}
    together = adapt_many(tiny_model, people, steps=3, config=FAST.model_copy(update={"people_per_batch": 2}),
                          recogniser=tiny_recogniser)
    assert list(together) == list(people)
    for name, photos in people.items():
        alone = adapt(tiny_model, photos, steps=3, config=FAST, recogniser=tiny_recogniser)
        images = torch.rand(2, 3, 16, 16)
        torch.testing.assert_close(together[name].restore_batch(images), alone.restore_batch(images),
                                   rtol=0, atol=2e-3)  # parameters are rounded to half precision
        assert together[name].metadata["shots"] == len(photos)


def test_zero_steps_is_the_start_and_without_it_nobody(tiny_model, tiny_recogniser):
    photos = torch.stack(faces(3))
    person = adapt(tiny_model, photos, steps=0, config=FAST, recogniser=tiny_recogniser)
    identity = torch.nn.functional.normalize(tiny_recogniser.embed(photos).mean(0), dim=0)
    torch.testing.assert_close(person.parameters["latent.offset"], tiny_model.start(identity[None]),
                               rtol=2e-3, atol=1e-4)
    nobody = adapt(tiny_model, photos, steps=0, start=False, config=FAST, recogniser=tiny_recogniser)
    assert not nobody.parameters["latent.offset"].any() and nobody.metadata["start"] is False


@pytest.mark.parametrize("precision", [torch.float64, torch.float16, torch.bfloat16])
def test_people_are_learned_in_float32(tiny_model, tiny_recogniser, precision):
    tiny_model.to(precision)
    for learn in (lambda: adapt(tiny_model, faces(1), steps=0, recogniser=tiny_recogniser),
                  lambda: adapt_many(tiny_model, {"ada": faces(1)}, steps=0, recogniser=tiny_recogniser)):
        with pytest.raises(ConfigError, match="learned in float32, and this model is in (float64|float16|bfloat16)"):
            learn()


def test_stage_two_moves_the_person_and_not_the_critic(tiny_model, tiny_recogniser):
    critic = Discriminator(16, 1, 0.03125)
    state = {k: v.clone() for k, v in critic.state_dict().items()}
    config = FAST.model_copy(update={"adversarial_steps": 2})
    first = adapt(tiny_model, faces(2), steps=1, config=FAST, recogniser=tiny_recogniser)
    second = adapt(tiny_model, faces(2), steps=1, config=config, recogniser=tiny_recogniser, critic=critic)
    assert not equal(first, second)
    assert all(torch.equal(state[k], v) for k, v in critic.state_dict().items())
    with pytest.raises(ConfigError, match="needs a critic"):
        adapt(tiny_model, faces(1), steps=1, config=config, recogniser=tiny_recogniser)


def test_stage_two_pleases_the_critic_that_it_is_given(tiny_model, tiny_recogniser):
    """With little but the critic to please, and a critic that does not learn, its verdict on the person rises."""
    torch.manual_seed(1)
    critic, photos = Discriminator(16, 1, 0.03125), torch.stack(faces(4))
    config = FAST.model_copy(update={"adversarial": 100.0, "lr_critic": 0.0, "identity": 0.0, "perceptual": 0.0,
                                     "lr_latent": 0.3, "eta_min": 1.0})
    poor = torch.nn.functional.interpolate(torch.nn.functional.avg_pool2d(photos, 4), scale_factor=4.0)

    def verdict(steps: int) -> float:
        person = adapt(tiny_model, photos, 0, config=config.model_copy(update={"adversarial_steps": steps}),
                       recogniser=tiny_recogniser, critic=critic)
        with torch.no_grad():
            return float(generator_loss(critic(person.restore_batch(poor))).mean())

    assert verdict(8) < verdict(0)


def test_the_critics_last_layers_alone_learn_in_stage_two(tiny_model, tiny_recogniser, monkeypatch):
    critic, copies, plain = Discriminator(16, 1, 0.03125), [], adversarial.critic_step
    monkeypatch.setattr(adversarial, "critic_step", lambda own, *rest: copies.append(own) or plain(own, *rest))
    adapt(tiny_model, faces(2), 0, config=FAST.model_copy(update={"adversarial_steps": 2}), recogniser=tiny_recogniser,
          critic=critic)
    before, after = critic.state_dict(), copies[0].state_dict()
    moved = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"final_conv", "final_linear"}


def test_stage_two_goes_on_at_the_rates_of_the_rule(tiny_model, tiny_recogniser):
    shape = RuleConfig("sgd", 4, per_step=True, moving=("latent.",))
    tiny_model.rule = InnerRule(tiny_model.gpen, AdapterSpec(1, 2), shape, lr_latent=0.5)
    with torch.no_grad():
        tiny_model.rule.log_rates["latent-offset"][:-1] = math.log(1e-9)
    base = {"degradation": FAST.degradation, "bf16": False, "start": False}

    def learned(steps, adversarial_steps):
        config = AdaptConfig(**base, adversarial_steps=adversarial_steps)
        return adapt(tiny_model, faces(2), steps, config=config, recogniser=tiny_recogniser,
                     critic=Discriminator(16, 1, 0.03125))

    for steps in (0, 4):
        before, after = learned(steps, 0), learned(steps, 1)
        assert not torch.equal(before.parameters["latent.offset"], after.parameters["latent.offset"])
        assert torch.equal(before.parameters["linear.bias"], after.parameters["linear.bias"]), "has no rate"
        assert "adversarial_steps" not in before.metadata and after.metadata["adversarial_steps"] == 1
    rates = last_rates(tiny_model, AdaptConfig(steps=16), ())
    assert list(rates) == ["latent.offset"]
    assert rates["latent.offset"].item() == pytest.approx(0.5 * (4 / 16) ** 0.5)
    config = AdaptConfig(eta_min=0.1, lr_latent=0.5, rule=False)
    assert last_rates(tiny_model, config, ["latent.offset"]) == {"latent.offset": pytest.approx(0.05)}


def test_the_largest_seed_is_one_and_the_next_is_refused(tiny_model, tiny_recogniser):
    adapt(tiny_model, faces(1), 1, seed=2**63 - 1, config=FAST, recogniser=tiny_recogniser)
    for seed in (-1, 2**63, 2**64):
        with pytest.raises(ConfigError, match=f"'seed': input should be .*, not {seed}"):
            adapt(tiny_model, faces(1), 1, seed=seed, config=FAST, recogniser=tiny_recogniser)


def test_sgd_learns_too(tiny_model, tiny_recogniser):
    config = FAST.model_copy(update={"optimiser": "sgd", "lr_latent": 0.3, "lr_tail": 0.1})
    photos = faces(2)
    objective = Objective(tiny_model, config, tiny_recogniser, None)
    support = draw([album(photos, 16)], objective.degradation, config.model_copy(update={"batch_size": 16}),
                   [torch.Generator().manual_seed(5)])
    with torch.no_grad():
        before, after = (float(objective(adapt(tiny_model, photos, steps=steps, config=config,
                                               recogniser=tiny_recogniser).parameters, *support)) for steps in (0, 8))
    assert after < before


def test_the_start_is_told_embeddings_of_its_own_recogniser(tiny_model, tiny_recogniser):
    def learned(recogniser, start=True):
        return adapt(tiny_model, faces(2), 0, start=start, config=FAST, recogniser=recogniser)

    wide = tiny.recogniser("wide")
    wide.dim = 9
    with pytest.raises(ConfigError, match="reads embeddings of 8 numbers, 'wide' gives 9"):
        learned(wide)
    with pytest.warns(UserWarning, match="trained with the recogniser 'tests'; embeddings of 'strange' say nothing"):
        learned(tiny.recogniser("strange"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        learned(tiny_recogniser)
        learned(tiny.recogniser("strange"), start=False)
        for card in ("some/where/strange.fp16.xml", "strange.onnx", "some/student.safetensors"):
            tiny_model.card["recogniser"] = card
            learned(tiny.recogniser("strange"))


def test_two_hundred_photos_are_looked_at_in_parts(tiny_model, tiny_recogniser):
    """Beside their crops, nothing computed of them is larger than what 32 photos need."""
    class Sizes(TorchDispatchMode):
        """The numbers in the largest tensor that any operation returned, album-wide crops apart."""

        largest = 0

        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            out = operation(*args, **(kwargs or {}))
            self.largest = max([self.largest, *(leaf.numel() for leaf in tree_leaves(out)
                                                if torch.is_tensor(leaf) and leaf.shape != self.crops)])
            return out

    def needed(count):
        photos = faces(count)
        with Sizes() as sizes:
            sizes.crops = (count, 3, tiny_model.size, tiny_model.size)
            person = adapt(tiny_model, photos, steps=2, config=FAST, recogniser=tiny_recogniser)
        assert person.metadata["shots"] == count
        return sizes.largest

    assert needed(200) == needed(32)


def test_photos_may_come_from_an_iterator(tiny_model, tiny_recogniser):
    people = {name: adapt(tiny_model, photos, steps=0, recogniser=tiny_recogniser)
              for name, photos in (("list", faces(3)), ("iterator", iter(faces(3))), ("tensor", torch.stack(faces(3))))}
    assert all(equal(people["list"], person) and person.metadata["shots"] == 3 for person in people.values())


@pytest.mark.parametrize("single", ["ada.jpg", Path("ada.jpg"), Image.new("RGB", (16, 16)), faces(1)[0],
                                    np.zeros((16, 16, 3), np.uint8), np.zeros((16, 16), np.uint8)])
def test_a_single_photo_in_place_of_a_list_is_an_error(tiny_model, tiny_recogniser, single):
    with pytest.raises(PhotoError, match="ada.jpg|the given .* alone; put it in a list"):
        adapt(tiny_model, single, recogniser=tiny_recogniser)


def test_no_photo_and_what_holds_none_are_errors(tiny_model, tiny_recogniser, tmp_path):
    with pytest.raises(PhotoError, match="at least one photo"):
        adapt(tiny_model, [], recogniser=tiny_recogniser)
    for nothing in (None, 3, torch.tensor(1.0)):
        with pytest.raises(PhotoError, match="expected a list of photos of one person, not"):
            adapt(tiny_model, nothing, recogniser=tiny_recogniser)
    noise = tmp_path / "noise.png"
    Image.fromarray(np.full((64, 64, 3), 90, np.uint8)).save(noise)
    with pytest.raises(PhotoError, match="noise.png"):
        adapt(tiny_model, [noise], recogniser=tiny_recogniser)


def test_unknown_setting_is_an_error():
    with pytest.raises(ConfigError, match="batch_size"):
        AdaptConfig.from_dict({"batchsize": 3})


def test_mirrored_landmarks():
    landmarks = torch.tensor([[[2.0, 5], [10, 5], [6, 8], [3, 12], [9, 12]]])
    flipped = mirror(landmarks, 16)
    assert flipped[0, 0].tolist() == [6, 5] and flipped[0, 1].tolist() == [14, 5]
    assert torch.equal(mirror(flipped, 16), landmarks)


def test_adam_is_torch_adam_and_sgd_is_torch_sgd():
    for ours, theirs in ((Adam(), torch.optim.Adam), (sgd, torch.optim.SGD)):
        x = torch.randn(5, dtype=torch.float64)
        reference = x.clone().requires_grad_()
        extra = {"betas": BETAS, "eps": EPS} if theirs is torch.optim.Adam else {}
        optimiser = theirs([reference], lr=0.1, **extra)
        values = {"x": x}
        for _ in range(5):
            values = ours(values, {"x": 2 * values["x"]}, {"x": 0.1})
            optimiser.zero_grad()
            reference.square().sum().backward()
            optimiser.step()
        torch.testing.assert_close(values["x"], reference.detach(), rtol=1e-12, atol=1e-12)


def test_schedule_warms_up_and_ends_at_its_minimum():
    factors = [warmup_cosine(step, 20, 4, 0.1) for step in range(20)]
    assert factors[:4] == [0.2, 0.4, 0.6, 0.8] and factors[4] == 1.0
    assert math.isclose(factors[-1], 0.1) and factors[4:] == sorted(factors[4:], reverse=True)


def test_public_names_are_functions_even_after_the_sub_packages_were_imported():
    assert metagpen.adapt is adapt and metagpen.adapt_many is adapt_many


def test_a_tensor_released_late_is_corrected_as_new():
    """As torch.optim.Adam: the count of bias correction is each tensor's own."""
    ours, early, late = Adam(), torch.zeros(3), torch.zeros(3)
    theirs = [value.clone().requires_grad_() for value in (early, late)]
    adam = torch.optim.Adam(theirs, lr=0.1, betas=BETAS, eps=EPS)
    parameters, generator = {"early": early, "late": late}, torch.Generator().manual_seed(0)
    for step in range(20):
        moving = ["early"] if step < 15 else ["early", "late"]
        gradients = {name: torch.randn(3, generator=generator) for name in moving}
        parameters |= ours({name: parameters[name] for name in moving}, gradients, dict.fromkeys(moving, 0.1))
        for name, value in zip(("early", "late"), theirs, strict=True):
            value.grad = gradients.get(name)
        adam.step()
    for name, value in zip(("early", "late"), theirs, strict=True):
        torch.testing.assert_close(parameters[name], value.detach(), atol=1e-5, rtol=1e-5)


def test_impossible_settings_of_adapt(tiny_model):
    photos = torch.zeros(2, 3, 16, 16)
    with pytest.raises(ConfigError, match="steps"):
        metagpen.adapt(tiny_model, photos, steps=-5)


@pytest.mark.parametrize("gated", [True, False])
def test_a_rule_decides_the_shape_and_not_what_goes_behind_the_gate(tiny_model, gated):
    spec = AdapterSpec(1, 2, decoder_rank=3, gated_decoder=not gated)
    tiny_model.rule = InnerRule(tiny_model.gpen, spec, RuleConfig(steps=2))
    followed = AdaptConfig(gated_decoder=gated).for_model(tiny_model).spec
    assert followed == AdapterSpec(1, 2, decoder_rank=3, gated_decoder=gated)


def test_what_a_learned_rule_decides_cannot_be_given_beside_it(tiny_model):
    photos, wish = torch.zeros(2, 3, 16, 16), AdaptConfig(lr_latent=0.1, tail_rank=2)
    tiny_model.rule = InnerRule(tiny_model.gpen, AdapterSpec(1, 2), RuleConfig(steps=2), 0.02, 0.02)
    for learn in (lambda: adapt(tiny_model, photos, config=wish),
                  lambda: adapt_many(tiny_model, {"a": photos}, 0, config=wish)):
        with pytest.raises(ConfigError, match="lr_latent, tail_rank: of no effect.*rule=False"):
            learn()
    free = adapt(tiny_model, photos, 0, start=False, config=AdaptConfig(tail_rank=2, tail_blocks=1, rule=False))
    assert free.spec.tail_rank == 2 and "steps=0" in repr(free) and len(repr(free)) < 120


def test_crops_of_bytes_are_scaled_and_broken_ones_refused(tiny_model, tiny_recogniser):
    bytes_ = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    as_bytes, as_floats = (adapt(tiny_model, photos, 0, recogniser=tiny_recogniser)
                           for photos in (bytes_, bytes_.float() / 127.5 - 1))
    assert torch.equal(as_bytes.parameters["latent.offset"], as_floats.parameters["latent.offset"])
    for broken in (bytes_.float(), torch.full((1, 3, 16, 16), float("nan")), bytes_.long()):
        with pytest.raises(PhotoError, match=r"\[-1, 1\]"):
            adapt(tiny_model, broken, 0, recogniser=tiny_recogniser)


def test_what_only_the_configuration_says_counts(tiny_model, tiny_recogniser):
    photos, config = torch.rand(1, 3, 16, 16), AdaptConfig(steps=1, seed=7, start=False, rule=False)
    person = adapt(tiny_model, photos, config=config, recogniser=tiny_recogniser)
    assert (person.metadata["steps"], person.metadata["seed"], person.metadata["start"]) == (1, 7, False)
    person = adapt(tiny_model, photos, 2, start=True, config=config, recogniser=tiny_recogniser)
    assert (person.metadata["steps"], person.metadata["seed"], person.metadata["start"]) == (2, 7, True)


def test_all_rates_are_scaled(tiny_model):
    config = FAST.model_copy(update={"steps": 5, "rule": False})
    scaled = config.model_copy(update={"lr_scale": 3.0})
    begun = begin(tiny_model, config, 1, torch.Generator().manual_seed(0), None)
    for step in (0, 4):
        once, thrice = (step_rates(tiny_model, one, step, begun) for one in (config, scaled))
        assert thrice == pytest.approx({name: 3 * rate for name, rate in once.items()}) and max(once.values()) > 0
    assert last_rates(tiny_model, scaled, begun) == pytest.approx(
        {name: 3 * rate for name, rate in last_rates(tiny_model, config, begun).items()})
    with pytest.raises(ConfigError, match="lr_scale"):
        AdaptConfig.from_dict({"lr_scale": 0})


def test_recorded_steps_are_the_plain_ones(tiny_model, tiny_recogniser):
    """What a GPU would record, run as it is, for two people, up to rounding; and with a rate that changes."""
    config = FAST.model_copy(update={"steps": 5, "rule": False})
    albums = [album(faces(3, seed), 16) for seed in (0, 1)]
    begun = begin(tiny_model, config, 2, torch.Generator().manual_seed(0), None)
    objective = Objective(tiny_model, config, tiny_recogniser, begun["latent.offset"])
    plain = PlainSteps(objective, begun, config.optimiser)
    recorded = RecordedSteps(objective, begun, recorded=False)
    for step, support in enumerate(supports(albums, config, torch.device("cpu"), tiny_recogniser)):
        rates = step_rates(tiny_model, config, step, begun)
        torch.testing.assert_close(recorded(support, rates), plain(support, rates), rtol=1e-5, atol=1e-6)
    assert step == 4 and not torch.equal(begun["latent.offset"], plain.parameters["latent.offset"])
    for name, value in plain.parameters.items():
        torch.testing.assert_close(recorded.parameters[name].detach(), value.detach(), rtol=1e-3, atol=1e-5)


def test_recorded_steps_follow_what_is_released_and_what_rests():
    """Moments and their corrections are every tensor's own, however often what moves changes; rates may be tensors."""
    begun = {"a": torch.tensor([[1.0, -2.0]]), "b": torch.tensor([[0.5, 3.0]])}

    def objective(parameters, truth, poor, view):
        return ((parameters["a"] * truth).square() + (parameters["b"] - poor).square() * parameters["a"]).sum(dim=1)

    generator = torch.Generator().manual_seed(0)
    plain, recorded = PlainSteps(objective, begun, "adam"), RecordedSteps(objective, begun, recorded=False)
    for rates in ({"a": 0.1}, {"a": 0.2, "b": torch.tensor([[0.1, 0.3]])}, {"b": torch.tensor(0.2)},
                  {"a": 0.1, "b": 0.1}):
        support = *torch.randn(2, 1, 2, generator=generator), View(torch.empty(0), 1)
        torch.testing.assert_close(recorded(support, rates), plain(support, rates))
        for name, value in plain.parameters.items():
            torch.testing.assert_close(recorded.parameters[name].detach(), value.detach())
    assert recorded.taken == {"a": 3, "b": 3}


def test_nothing_keeps_a_recording_when_its_steps_are_over(tiny_model):
    """Its memory is as large as a step's, and the next people need it: no waiting for the garbage collector."""
    begun = begin(tiny_model, FAST.model_copy(update={"rule": False}), 1, torch.Generator(), None)
    steps = RecordedSteps(lambda *_: None, begun)
    steps.begin(list(begun))
    recording = weakref.ref(steps.run)
    gc.disable()
    try:
        del steps
        assert recording() is None
    finally:
        gc.enable()


@pytest.mark.skipif(shutil.which("g++") is None or sys.platform != "linux", reason="no C++ compiler")
def test_compiled_steps_are_the_plain_ones(tiny_model, tiny_recogniser):
    """Two batches by the same kernels, and a smaller last one, which is not compiled."""
    counters.clear()
    config = FAST.model_copy(update={"steps": 3, "people_per_batch": 2, "bf16": False, "decoder_rank": 3})
    people = {name: faces(2, seed) for seed, name in enumerate("abcde")}
    plain, compiled = (adapt_many(tiny_model, people, config=config.model_copy(update={"compile": wanted}),
                                  recogniser=tiny_recogniser) for wanted in (False, True))
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    for name, person in plain.items():
        for key, value in person.parameters.items():
            torch.testing.assert_close(compiled[name].parameters[key], value, rtol=1e-3, atol=1e-4)


def test_compiling_needs_a_compiler_and_a_cpu(tiny_model, tiny_recogniser, monkeypatch):
    config = AdaptConfig(steps=1, compile=True)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ConfigError, match="there is no no-such-compiler here"):
        adapt(tiny_model, faces(1), config=config, recogniser=tiny_recogniser)
    monkeypatch.setattr(type(tiny_model), "device", torch.device("cuda"))
    with pytest.raises(ConfigError, match="compile: for steps on a CPU"):
        adapt(tiny_model, faces(1), config=config, recogniser=tiny_recogniser)


@pytest.mark.parametrize(("people", "steps", "workers"), [(3, 2, 2), (1, 9, 3), (2, 8, 5)])
def test_photos_damaged_ahead_are_those_damaged_in_place(people, steps, workers):
    """Beside a GPU, processes damage each some people's photos, or one person's of some steps: the order and all
    numbers stay."""
    config = FAST.model_copy(update={"steps": steps})
    albums = [album(faces(2, seed), 16) for seed in range(people)]
    in_place = list(supports(albums, config, torch.device("cpu"), None))
    ahead = list(supports(albums, config, torch.device("cpu"), None, workers=workers))
    assert len(ahead) == len(in_place) == steps
    for mine, theirs in zip(ahead, in_place, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_the_same_person_is_learned(tiny_model, tiny_recogniser):
    """Recorded or not; the two of them alike up to the order of sums."""
    config = FAST.model_copy(update={"steps": 6})
    here = adapt(tiny_model, faces(3), config=config, recogniser=tiny_recogniser)
    plain, recorded = (adapt(tiny_model.to("cuda"), faces(3), recogniser=tiny_recogniser.to("cuda"),
                             config=config.model_copy(update={"cuda_graphs": records})) for records in (False, True))
    for name, value in here.parameters.items():
        torch.testing.assert_close(plain.parameters[name].cpu(), value, rtol=0.05, atol=0.01)
        torch.testing.assert_close(recorded.parameters[name], plain.parameters[name], rtol=1e-3, atol=1e-4)
