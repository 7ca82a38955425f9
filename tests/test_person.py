"""The adapter, the Person and its file."""

import copy
import pickle
from dataclasses import replace
from functools import partial

import pytest
import torch

import metagpen
from metagpen.errors import CheckpointError, ConfigError, PhotoError
from metagpen.gpen import GPEN
from metagpen.model import MetaGPEN
from metagpen.person import (
    AdapterSpec,
    DecoderBases,
    IdentityStart,
    Person,
    folded,
    mean_identity,
    new_parameters,
    personal_forward,
    restore_many,
)
from metagpen.person.adapter import LastMixtures, mixed, mixed_in, personal_forward_reference, plus_mixed
from metagpen.person.start import band_statistics

SPECS = [AdapterSpec(2, 0, 0), AdapterSpec(2, 3, 2), AdapterSpec(1, 0, 2), AdapterSpec(0, 2, 0),
         AdapterSpec(0, 1, 0, decoder_rank=3), AdapterSpec(2, 2, 1, decoder_rank=2),
         AdapterSpec(1, 2, 1, decoder_rank=2, gated_decoder=False)]


def somebody(model: MetaGPEN, spec: AdapterSpec, people: int = 1, seed: int = 3) -> dict[str, torch.Tensor]:
    """Parameters that differ from zero everywhere and between people."""
    generator = torch.Generator().manual_seed(seed)
    parameters = new_parameters(model.gpen, spec, people, generator)
    return {k: v + 0.3 * torch.randn(v.shape, generator=generator).to(v) for k, v in parameters.items()}


@pytest.mark.parametrize("spec", SPECS)
def test_batched_people_equal_one_after_the_other(tiny_model, spec):
    model = tiny_model.double()
    parameters = {k: v.double().requires_grad_() for k, v in somebody(model, spec, people=3).items()}
    images = torch.rand(6, 3, model.size, model.size, dtype=torch.float64) * 2 - 1
    torch.nn.init.normal_(model.start.gate.centre)
    bases = model.bases_of(spec.decoder_rank)
    for strength, share, filling in ((1.0, None, None), (0.4, *model.look(images))):
        fast = personal_forward(model.gpen, images, parameters, spec, strength, share=share, filling=filling,
                                bases=bases)
        plain = personal_forward_reference(model.gpen, images, parameters, strength, share, filling, bases,
                                           spec.gated_decoder)
        torch.testing.assert_close(fast, plain, rtol=0, atol=1e-10)
        gradients = [torch.autograd.grad(y.square().sum(), list(parameters.values())) for y in (fast, plain)]
        for a, b in zip(*gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_mixtures_are_added_in_place_where_nothing_is_learned(layout):
    generator = torch.Generator().manual_seed(0)
    x, maps, up, part = (torch.randn(shape, generator=generator, dtype=torch.float64)
                         for shape in ((6, 5, 4, 3), (6, 2, 4, 3), (3, 5, 2), (6,)))
    x, maps = x.to(memory_format=layout), maps.to(memory_format=layout)
    plain = x + mixed(maps, up, part)
    assert plus_mixed(x.clone().requires_grad_(), maps, up, part).requires_grad
    with torch.no_grad():
        fast = plus_mixed(x, maps, up, part)
    assert (fast is x) == (layout is torch.channels_last)
    torch.testing.assert_close(fast, plain, rtol=0, atol=1e-12)


def test_many_people_without_a_graph_equal_the_reference(tiny_model):
    model, spec = tiny_model.double(), AdapterSpec(1, 2, decoder_rank=2)
    parameters = {name: value.double() for name, value in somebody(model, spec, people=3).items()}
    images = torch.rand(6, 3, model.size, model.size, dtype=torch.float64) * 2 - 1
    images, bases = images.to(memory_format=torch.channels_last), model.bases_of(2)
    with torch.no_grad():
        share, filling = model.look(images)
        fast = personal_forward(model.gpen, images, parameters, spec, 0.7, share=share, filling=filling, bases=bases)
        plain = personal_forward_reference(model.gpen, images, parameters, 0.7, share, filling, bases)
    torch.testing.assert_close(fast, plain, rtol=0, atol=1e-10)


@pytest.mark.parametrize("gated", [True, False])
def test_photos_of_one_person_share_a_weight_where_the_gate_does_not_tell_them_apart(tiny_model, monkeypatch, gated):
    model, spec = tiny_model.double(), AdapterSpec(1, 2, decoder_rank=2, gated_decoder=gated)
    parameters = {name: value.double() for name, value in somebody(model, spec).items()}
    images, bases = torch.rand(3, 3, model.size, model.size, dtype=torch.float64) * 2 - 1, model.bases_of(2)
    mixed_apart = []
    monkeypatch.setattr("metagpen.person.adapter.plus_mixed",
                        lambda *given: mixed_apart.append(given) or plus_mixed(*given))
    with torch.no_grad():
        share, filling = model.look(images)
        together = personal_forward(model.gpen, images, parameters, spec, 0.7, share=share, filling=filling,
                                    bases=bases)
        assert bool(mixed_apart) == gated
        plain = personal_forward_reference(model.gpen, images, parameters, 0.7, share, filling, bases, gated)
    torch.testing.assert_close(together, plain, rtol=0, atol=1e-10)


def test_one_image_restored_alone_has_a_weight_of_its_own_to_the_same_effect(tiny_model):
    model, spec = tiny_model.double(), AdapterSpec(1, 2, decoder_rank=2)
    parameters = {name: value.double() for name, value in somebody(model, spec).items()}
    image, bases = torch.rand(1, 3, model.size, model.size, dtype=torch.float64) * 2 - 1, model.bases_of(2)
    with torch.no_grad():
        share, filling = model.look(image)
        alone = personal_forward(model.gpen, image, parameters, spec, 0.7, share=share, filling=filling, bases=bases)
        plain = personal_forward_reference(model.gpen, image, parameters, 0.7, share, filling, bases)
        pair = personal_forward(model.gpen, image.repeat(2, 1, 1, 1), parameters, spec, 0.7,
                                share=share.repeat(2, 1), filling=filling.repeat(2, 1, 1), bases=bases)
    torch.testing.assert_close(alone, plain, rtol=0, atol=1e-10)
    torch.testing.assert_close(alone, pair[:1], rtol=0, atol=1e-10)


def test_mixtures_are_multiplied_out_once_for_the_person_who_was_restored_last(tiny_model, monkeypatch):
    """Bit for bit what doing it every time gives; anew for another strength or person, and when any number changed."""
    spec, count = AdapterSpec(0, 1, decoder_rank=2, gated_decoder=False), len(tiny_model.gpen.generator.styled)
    done, images = [], torch.rand(2, 3, 16, 16) * 2 - 1
    monkeypatch.setattr("metagpen.person.adapter.mixed_in", lambda *given: done.append(1) or mixed_in(*given))

    def anew(person: Person, strength: float) -> int:
        done.clear()
        found, times, kept = person.restore_batch(images, strength), len(done), tiny_model._last_mixtures
        tiny_model._last_mixtures = LastMixtures()
        assert torch.equal(found, person.restore_batch(images, strength))
        tiny_model._last_mixtures = kept
        return times

    one, other = (Person(tiny_model, spec, somebody(tiny_model, spec, seed=seed)) for seed in (1, 2))
    assert [anew(person, strength) for person, strength in ((one, 1.0), (one, 1.0), (one, 0.5), (other, 0.5),
                                                            (one, 1.0), (one, 0.0), (one, 1.0))] == [
        count, 0, count, count, count, 0, 0]
    with torch.no_grad():
        for changed in (one.parameters["decoder.1.up"], tiny_model.gpen.generator.conv1.conv.weight,
                        tiny_model.bases_of(2)[0]):
            changed.mul_(1.1)
            assert anew(one, 1.0) == count and anew(one, 1.0) == 0
    for restore in (partial(restore_many, tiny_model, [other, other], images),
                    partial(other.restore, images[0], aligned=True)):
        restore()
        done.clear()
        restore()
        assert not done, "somebody's photos come one by one by these ways, too"
    with torch.autocast("cpu", torch.bfloat16):
        one.restore_batch(images)
    assert anew(one, 1.0) == 0
    with torch.inference_mode():  # whose tensors do not say when they change
        fresh = Person(tiny_model, spec, somebody(tiny_model, spec))
        assert anew(fresh, 1.0) == anew(fresh, 1.0) == count


def test_copies_of_a_model_do_not_carry_the_last_persons_weights(tiny_model):
    spec = AdapterSpec(0, 1, decoder_rank=2, gated_decoder=False)
    before = len(pickle.dumps(tiny_model))
    Person(tiny_model, spec, somebody(tiny_model, spec)).restore_batch(torch.zeros(1, 3, 16, 16))
    assert tiny_model._last_mixtures.known and not copy.deepcopy(tiny_model)._last_mixtures.known
    assert len(pickle.dumps(tiny_model)) < before + 20_000  # the random filters, not as much again as the decoder


def test_every_image_may_have_a_strength_of_its_own(tiny_model):
    spec, images = AdapterSpec(2, 2, 1, decoder_rank=2), torch.rand(3, 3, tiny_model.size, tiny_model.size) * 2 - 1
    parameters, bases, (share, filling) = somebody(tiny_model, spec), tiny_model.bases_of(2), tiny_model.look(images)
    together = personal_forward(tiny_model.gpen, images, parameters, spec, torch.tensor([0.0, 0.3, 1.0]),
                                share=share, filling=filling, bases=bases)
    for i, strength in enumerate((0.0, 0.3, 1.0)):
        alone = personal_forward(tiny_model.gpen, images[i:i + 1], parameters, spec, strength, share=share[i:i + 1],
                                 filling=filling[i:i + 1], bases=bases)
        torch.testing.assert_close(together[i:i + 1], alone, rtol=0, atol=1e-5)


def test_an_open_gate_fills_in_nobody_and_a_shut_one_the_answer_to_the_damage_alone(tiny_model):
    images = torch.rand(2, 3, tiny_model.size, tiny_model.size) * 2 - 1
    images = images.contiguous(memory_format=torch.channels_last)  # as `restore` lays them out
    gate = tiny_model.start.gate
    with torch.no_grad():
        answer = gate.answer(band_statistics(images, gate.bands)).unflatten(1, gate.nobody.shape)
        gate.centre.fill_(200.0)
        shut = tiny_model.restore(images)
        assert torch.equal(shut, tiny_model.gpen(images, answer).clamp(-1, 1))
        gate.centre.fill_(-200.0)
        assert torch.equal(tiny_model.restore(images), tiny_model.gpen(images, gate.nobody + answer).clamp(-1, 1))
        gate.answer[-1].weight.zero_()
        gate.answer[-1].bias.zero_()
        nobody = gate.nobody.expand(2, -1, -1)
        assert torch.equal(tiny_model.restore(images), tiny_model.gpen(images, nobody).clamp(-1, 1))
        gate.centre.fill_(200.0)
        assert torch.equal(tiny_model.restore(images), tiny_model.gpen(images).clamp(-1, 1))
    assert not torch.allclose(shut, tiny_model.gpen(images).clamp(-1, 1))


def test_frozen_prefix_gives_the_same_gradients(tiny_model):
    spec, bases = AdapterSpec(2, 2, 1, decoder_rank=2), tiny_model.bases_of(2)
    parameters = {k: v.requires_grad_() for k, v in somebody(tiny_model, spec).items()}
    images = torch.rand(2, 3, tiny_model.size, tiny_model.size) * 2 - 1
    tiny_model.gpen.requires_grad_(True)
    outputs = [personal_forward(tiny_model.gpen, images, parameters, spec, frozen=frozen, bases=bases)
               for frozen in (False, True)]
    gradients = [torch.autograd.grad(output.sum(), list(parameters.values())) for output in outputs]
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("spec", SPECS)
def test_nobody_is_the_generic_model_and_strength_zero_is_it_bit_for_bit(tiny_model, spec):
    images = torch.rand(2, 3, tiny_model.size, tiny_model.size) * 2 - 1
    generic = tiny_model.restore(images)
    nobody = new_parameters(tiny_model.gpen, spec, 1, torch.Generator())
    torch.testing.assert_close(Person(tiny_model, spec, nobody).restore_batch(images), generic, rtol=0, atol=1e-5)
    person = Person(tiny_model, spec, somebody(tiny_model, spec))
    assert torch.equal(person.restore_batch(images, strength=0), generic)
    assert not torch.equal(person.restore_batch(images, strength=1), generic)
    assert torch.equal(Person.generic(tiny_model).restore_batch(images, strength=0), generic)


def test_start_offset_is_where_parameters_begin(tiny_model):
    config = tiny_model.gpen.config
    offset = torch.randn(2, config.n_latent, config.style_dim)
    parameters = new_parameters(tiny_model.gpen, AdapterSpec(), 2, torch.Generator(), {"latent.offset": offset})
    assert torch.equal(parameters["latent.offset"], offset)
    images = torch.rand(2, 3, tiny_model.size, tiny_model.size)
    with torch.no_grad():
        torch.testing.assert_close(personal_forward(tiny_model.gpen, images, parameters, AdapterSpec()),
                                   tiny_model.gpen(images, offset), rtol=0, atol=1e-5)


def with_mixtures(model, rank=4):
    """The tiny model with filters of its own, and a start that guesses how much of them somebody takes."""
    channels = [layer.conv.weight.shape[1] for layer in model.gpen.generator.styled]
    start = IdentityStart(**model.start.config(), mixtures={"channels": channels, "rank": rank, "width": 3})
    torch.nn.init.normal_(start.mixtures.head.weight, std=0.1)
    return MetaGPEN(model.gpen, start, model.card, bases=DecoderBases.random(model.gpen, rank)).frozen()


def test_a_start_that_guesses_mixtures_is_where_people_begin(tiny_model, tmp_path):
    model = with_mixtures(tiny_model)
    guess = model.guess(torch.randn(2, 8))
    spec = AdapterSpec(tail_blocks=0, tail_rank=1, decoder_rank=4)
    begun = new_parameters(model.gpen, spec, 2, torch.Generator(), guess)
    assert {name for name in begun if begun[name].any()} - {"linear.weight.down"} == set(guess)
    assert all(torch.equal(begun[name], value) for name, value in guess.items())

    first = new_parameters(model.gpen, AdapterSpec(0, 1, decoder_rank=3), 2, torch.Generator(), guess)
    assert torch.equal(first["decoder.1.up"], guess["decoder.1.up"][..., :3])
    with pytest.raises(ConfigError, match="decoder_rank = 5: .* 4 filters"):
        new_parameters(model.gpen, AdapterSpec(0, 1, decoder_rank=5), 2, torch.Generator(), guess)

    again = metagpen.load(model.save(tmp_path / "model.safetensors", torch.float32))
    assert torch.equal(again.guess(torch.ones(1, 8))["decoder.0.up"], model.guess(torch.ones(1, 8))["decoder.0.up"])


def test_mixtures_are_guessed_of_the_models_own_filters_only(tiny_model):
    model = with_mixtures(tiny_model)
    assert set(MetaGPEN(model.gpen, model.start).guess(torch.randn(1, 8))) == {"latent.offset"}
    assert set(model.start.grow().guess(torch.randn(1, 8))) == {"latent.offset"}
    assert MetaGPEN(model.gpen).guess(torch.randn(1, 8)) is None


def test_a_start_that_looks_at_the_photos_begins_as_one_that_does_not(tiny_model, tmp_path):
    start = IdentityStart(**tiny_model.start.config(), appearance=True)
    start.load_state_dict(tiny_model.start.state_dict(), strict=False)
    model = MetaGPEN(tiny_model.gpen, start, tiny_model.card).frozen()
    identity, photos = torch.randn(2, 8), torch.rand(2, 3, 16, 16) * 2 - 1
    seen = model.appearance(photos)
    torch.testing.assert_close(seen, tiny_model.gpen.encode(photos)[1])
    assert tiny_model.appearance(photos) is None
    torch.testing.assert_close(model.guess(identity, seen), tiny_model.guess(identity))

    torch.nn.init.normal_(start.appearance.weight)
    own = model.guess(identity, seen)["latent.offset"]
    assert not torch.allclose(own, model.guess(identity)["latent.offset"])
    again = metagpen.load(model.save(tmp_path / "model.safetensors", torch.float32))
    assert torch.equal(again.guess(identity, seen)["latent.offset"], own)
    torch.testing.assert_close(start.grow().guess(identity, seen)["latent.offset"][:, :own.shape[1]], own)


def test_start_grows_with_the_model():
    start = IdentityStart(8, 4, 16, 8)
    identity = torch.randn(2, 8)
    grown = start.grow()(identity)
    assert grown.shape == (2, 6, 16)
    torch.testing.assert_close(grown[:, :4], start(identity))
    torch.testing.assert_close(grown[:, 4], grown[:, 3])
    start.gate.nobody.data.normal_()
    torch.nn.init.normal_(start.gate.answer[-1].weight)
    images = torch.rand(2, 3, 16, 16)
    nobody = start.grow().gate.nobody
    assert torch.equal(nobody[:4], start.gate.nobody) and torch.equal(nobody[5], start.gate.nobody[3])
    filling, grown_filling = start.gate(images)[1], start.grow().gate(images)[1]
    torch.testing.assert_close(grown_filling[:, :4], filling)
    torch.testing.assert_close(grown_filling[:, 5], filling[:, 3])


def test_a_shut_gate_lets_nothing_in_and_an_open_one_all(tiny_model):
    images = torch.rand(2, 3, tiny_model.size, tiny_model.size)
    with torch.no_grad():
        for centre, share in ((200.0, 0.0), (-200.0, 1.0)):
            tiny_model.start.gate.centre.fill_(centre)
            assert torch.equal(tiny_model.look(images)[0], torch.full((2, tiny_model.gpen.config.n_latent), share))


def test_shared_filters_are_the_same_everywhere_and_for_good(tiny_model):
    first, second = (DecoderBases.random(tiny_model.gpen, 3) for _ in range(2))
    assert len(first.filters) == len(tiny_model.gpen.generator.styled)
    assert all(torch.equal(a, b) for a, b in zip(first.filters, second.filters, strict=True))
    # numpy's RandomState(0): its first normal number is 1.764052..., the variance here is 1/3
    assert float(first.filters[0].flatten()[0]) == pytest.approx(1.764052345967664 / 3**0.5)
    assert tiny_model.bases_of(0) is None and tiny_model.bases_of(3)[0].shape[0] == 3


def test_a_model_keeps_its_filters_and_a_person_needs_enough_of_them(tiny_model, tmp_path):
    plain = tiny_model.fingerprint
    bases = DecoderBases.random(tiny_model.gpen, 4)
    for own in bases.filters:
        own.data += 0.25
    model = MetaGPEN(tiny_model.gpen, tiny_model.start, tiny_model.card, bases=bases).frozen()
    assert model.fingerprint != plain, "they are part of what a Person belongs to"
    path = model.save(tmp_path / "model.safetensors", torch.float32)
    again = MetaGPEN.from_file(path).frozen()
    assert again.fingerprint == model.fingerprint and again.bases.rank == 4
    assert all(torch.equal(a, b[:3]) for a, b in zip(again.bases_of(3), bases.filters, strict=True))
    with pytest.raises(ConfigError, match="decoder_rank = 5: this model shares 4"):
        again.bases_of(5)
    spec = AdapterSpec(0, 1, 0, decoder_rank=5)
    file = Person(model, spec, new_parameters(model.gpen, spec, 1, torch.Generator())).save(tmp_path / "five")
    with pytest.raises(CheckpointError, match="this model shares 4"):
        Person.load(file, model)


def test_decoder_mixtures_stay_whole_when_compressed_and_cannot_be_folded(tiny_model):
    spec = AdapterSpec(2, 3, 0, gated=False, decoder_rank=2)
    person = Person(tiny_model, spec, somebody(tiny_model, spec))
    small = person.compress(tail_rank=1)
    assert small.spec.decoder_rank == 2 and small.spec.tail_rank == 1
    assert torch.equal(small.parameters["decoder.1.up"], person.parameters["decoder.1.up"])
    with pytest.raises(ConfigError, match="decoder_rank=0"):
        folded(person)


def test_a_shut_gate_keeps_out_all_but_what_goes_without_it(tiny_model, tmp_path):
    images = torch.rand(2, 3, tiny_model.size, tiny_model.size) * 2 - 1
    with torch.no_grad():
        tiny_model.start.gate.centre.fill_(1e3)
    for gated in (True, False):
        spec = AdapterSpec(1, 2, decoder_rank=2, gated_decoder=gated)
        person = Person(tiny_model, spec, somebody(tiny_model, spec))
        changed = (person.restore_batch(images) - tiny_model.restore(images)).abs().max()
        assert changed < 1e-4 if gated else changed > 1e-2
        weaker = (person.restore_batch(images, 0.5) - tiny_model.restore(images)).abs().max()
        assert gated or 0 < weaker < changed
        file = person.save(tmp_path / f"{gated}")
        assert Person.load(file, tiny_model).spec == spec


def test_mean_identity_is_a_unit_vector():
    mean = mean_identity(torch.nn.functional.normalize(torch.randn(5, 7), dim=1))
    torch.testing.assert_close(mean.norm(), torch.tensor(1.0))


def test_file_holds_the_person(tiny_model, tmp_path):
    spec = AdapterSpec(2, 2, 1, decoder_rank=2)
    parameters = {k: v.half().float() for k, v in somebody(tiny_model, spec).items()}
    person = Person(tiny_model, spec, parameters, {"shots": 5, "steps": 32})
    path = person.save(tmp_path / "ada")
    assert path.name == "ada.safetensors" and [p.name for p in tmp_path.iterdir()] == ["ada.safetensors"]
    again = Person.load(path, tiny_model)
    assert again.spec == spec and again.metadata == person.metadata
    images = torch.rand(1, 3, tiny_model.size, tiny_model.size)
    assert torch.equal(again.restore_batch(images), person.restore_batch(images))


def test_file_of_another_model_is_refused(tiny_model, tmp_path):
    path = Person.generic(tiny_model).save(tmp_path / "ada.safetensors")
    torch.manual_seed(99)
    other = MetaGPEN(GPEN(16, 1, 0.03125, style_dim=16, n_mlp=2)).frozen()
    with pytest.raises(CheckpointError, match="another model"):
        Person.load(path, other)


def test_damaged_and_foreign_files_are_named(tiny_model, tmp_path):
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"not a file of ours")
    with pytest.raises(CheckpointError, match="broken.safetensors: not a readable Person"):
        Person.load(broken, tiny_model)
    model_file = tiny_model.save(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="not a Person"):
        Person.load(model_file, tiny_model)
    with pytest.raises(CheckpointError, match="no such Person file"):
        Person.load(tmp_path / "missing.safetensors", tiny_model)


def test_a_template_of_no_numbers_is_damaged(tiny_model, tmp_path):
    """Nobody would be as near to any face as nobody knows."""
    spec = AdapterSpec(1, 2)
    for template in (torch.full((8,), torch.nan), torch.ones(2, 4)):
        file = Person(tiny_model, spec, somebody(tiny_model, spec), template=template).save(tmp_path / "ada")
        with pytest.raises(CheckpointError, match="template is no vector of finite numbers"):
            Person.load(file, tiny_model)


def test_people_can_be_compared_searched_and_collected(tiny_model):
    spec = AdapterSpec(1, 2)
    ada, eve = (Person(tiny_model, spec, somebody(tiny_model, spec), template=torch.ones(8)) for _ in range(2))
    assert ada == ada and ada != eve and [ada, eve].index(eve) == 1 and len({ada, eve, ada}) == 2


def test_bad_arguments(tiny_model):
    person = Person.generic(tiny_model)
    with pytest.raises(ConfigError, match="strength"):
        person.restore_batch(torch.zeros(1, 3, tiny_model.size, tiny_model.size), strength=1.5)
    with pytest.raises(PhotoError, match="aligned faces"):
        person.restore_batch(torch.zeros(1, 3, 17, 17))
    with pytest.raises(ConfigError, match="tail_blocks"):
        new_parameters(tiny_model.gpen, AdapterSpec(tail_blocks=9), 1, torch.Generator())
    with pytest.raises(ConfigError, match="shared evenly"):
        spec = AdapterSpec()
        personal_forward(tiny_model.gpen, torch.zeros(3, 3, tiny_model.size, tiny_model.size),
                         somebody(tiny_model, spec, people=2), spec)


def test_a_file_that_asks_for_all_memory_is_refused_before_any_is_taken(tiny_model, tmp_path):
    person = Person(tiny_model, AdapterSpec(2, 2, 1), somebody(tiny_model, AdapterSpec(2, 2, 1)), {})
    lying = [Person(tiny_model, replace(person.spec, **{rank: 10**12}), person.parameters, {}).to_bytes()
             for rank in ("tail_rank", "latent_rank", "decoder_rank")]
    for data in lying[:2]:  # factors of a lower rank than the file says are read as they are
        assert same_tensors(Person.from_bytes(data, tiny_model), person)
    with pytest.raises(CheckpointError, match="a damaged Person file"):
        Person.from_bytes(lying[2], tiny_model)


def same_tensors(a: Person, b: Person) -> bool:
    return all(torch.equal(a.parameters[name], value.half().float()) for name, value in b.parameters.items())
