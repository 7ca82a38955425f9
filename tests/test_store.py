"""People in a folder, small Persons, and restoring photos of different people at once."""

import copy
import dataclasses
import multiprocessing
import pickle
import threading

import numpy as np
import pytest
import torch
from test_person import somebody

import metagpen
from metagpen.errors import CheckpointError, ConfigError, DataError, PersonNotFound, PhotoError
from metagpen.gpen import GPEN
from metagpen.model import MetaGPEN
from metagpen.person import AdapterSpec, Person, PersonStore, restore_many
from metagpen.person.adapter import expand
from metagpen.person.serving import passes
from metagpen.person.store import decoded, file_name

NAMES = ["ada", "Ada", "ADA", "a/b", "..", ".", "", "%", "~", "Bjørk Åse", "李白", "a\nb", "con", "x" * 500, "é" * 300,
         "é" * 301, "\udcff", "name.safetensors", "a b?*[c]"]


def person_of(model: MetaGPEN, seed: int = 3, spec: AdapterSpec | None = None) -> Person:
    spec = spec or AdapterSpec(2, 2, 1)
    parameters = {k: v.half().float() for k, v in somebody(model, spec, seed=seed).items()}
    return Person(model, spec, parameters, {"shots": seed})


def same(a: Person, b: Person) -> bool:
    return a.spec == b.spec and all(torch.equal(a.parameters[k], b.parameters[k]) for k in b.parameters)


@pytest.fixture(params=["folder", "memory"])
def place(request, tmp_path):
    """A local folder, and an object store as fsspec sees one."""
    return tmp_path / "people" if request.param == "folder" else f"memory://{tmp_path.name}/people"


def test_a_store_is_a_dict_that_stays(tiny_model, place):
    store = PersonStore(place, tiny_model)
    assert len(store) == 0 and list(store) == [] and "ada" not in store
    people = {name: person_of(tiny_model, seed) for seed, name in enumerate(("ada", "bob", "eve"))}
    store.update(people)
    again = PersonStore(place, tiny_model)
    assert list(again) == ["ada", "bob", "eve"] and len(again) == 3 and "bob" in again and 3 not in again
    assert all(same(again[name], person) for name, person in people.items())
    assert again["eve"].metadata == {"shots": 2}
    del store["bob"]
    assert set(again) == {"ada", "eve"} and again.get("bob") is None
    with pytest.raises(PersonNotFound, match="nobody called 'bob'"):
        again["bob"]
    with pytest.raises(KeyError):
        del again["bob"]


def test_any_string_is_a_name(tiny_model, place):
    store = PersonStore(place, tiny_model)
    for seed, name in enumerate(NAMES):
        store[name] = person_of(tiny_model, seed)
    assert set(store) == set(NAMES) and len(store) == len(NAMES)
    for seed, name in enumerate(NAMES):
        assert store[name].metadata == {"shots": seed}


def test_file_names_are_short_plain_and_tell_capitals_apart_where_file_systems_do_not():
    files = [file_name(name) for name in NAMES]
    assert len({file.lower() for file in files}) == len(NAMES)
    assert all(len(file) <= 160 and file.isascii() and "/" not in file and "." not in file for file in files)
    assert all(decoded(file) == name for file, name in zip(files, NAMES, strict=True) if "~" not in file)


def test_a_stored_person_is_an_ordinary_person_file(tiny_model, tmp_path):
    store = PersonStore(tmp_path, tiny_model)
    store["ada"] = person_of(tiny_model)
    assert same(Person.load(tmp_path / "ada.safetensors", tiny_model), store["ada"])
    assert store.path("ada") == str(tmp_path / "ada.safetensors")


@pytest.mark.parametrize("limits", [{"cache": 2}, {"cache": 99, "cache_bytes": 2}])
def test_the_least_recently_used_leave_the_cache(tiny_model, tmp_path, limits):
    people = {name: person_of(tiny_model, seed) for seed, name in enumerate("abc")}
    one = sum(4 * v.numel() for v in people["a"].parameters.values())
    if "cache_bytes" in limits:
        limits = {**limits, "cache_bytes": 2 * one + one // 2}
    store = PersonStore(tmp_path, tiny_model, **limits)
    store.update(people)
    a, b = store["a"], store["b"]
    assert store["a"] is a
    store["c"]
    assert store["a"] is a and store["b"] is not b


def test_a_cache_of_nothing_keeps_nothing(tiny_model, tmp_path):
    store = PersonStore(tmp_path, tiny_model, cache=0)
    store["a"] = person_of(tiny_model)
    assert store["a"] is not store["a"]


def test_the_cache_never_serves_what_somebody_else_replaced_or_deleted(tiny_model, place):
    mine, theirs = PersonStore(place, tiny_model), PersonStore(place, tiny_model)
    mine["ada"] = person_of(tiny_model, 1)
    assert mine["ada"] is mine["ada"]
    theirs["ada"] = person_of(tiny_model, 2)
    assert mine["ada"].metadata == {"shots": 2}
    del theirs["ada"]
    with pytest.raises(PersonNotFound):
        mine["ada"]


def test_whoever_is_deleted_meanwhile_is_not_among_the_items(tiny_model, place):
    mine, theirs = PersonStore(place, tiny_model), PersonStore(place, tiny_model)
    mine.update({name: person_of(tiny_model, seed) for seed, name in enumerate("abc")})
    found = iter(mine.items())
    first = next(found)
    del theirs["b"]
    assert [name for name, _ in (first, *found)] == ["a", "c"]
    assert same(dict(mine.items())["c"], person_of(tiny_model, 2))


def write_people(place: str, model: MetaGPEN, writer: int, count: int) -> None:
    store = PersonStore(place, model)
    for i in range(count):
        store[f"{writer}/{i}"] = person_of(model, writer)
        store["everybody's"] = person_of(model, writer)


def test_writers_at_the_same_time_lose_nobody_and_readers_see_whole_people(tiny_model, tmp_path):
    torch.set_num_threads(1)
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=write_people, args=(str(tmp_path), tiny_model, writer, 20)) for writer in (1, 2)]
    for writer in writers:
        writer.start()
    reader = PersonStore(tmp_path, tiny_model)
    seen = set()
    while any(writer.is_alive() for writer in writers):
        seen |= {reader[name].metadata["shots"] for name in reader}
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert seen <= {1, 2} and len(reader) == 41
    assert all(reader[f"{writer}/{i}"].metadata == {"shots": writer} for writer in (1, 2) for i in range(20))
    assert not list(tmp_path.glob("*.part"))


def test_threads_share_a_store(tiny_model, tmp_path):
    store, failed = PersonStore(tmp_path, tiny_model, cache=2), []
    store.update({name: person_of(tiny_model, seed) for seed, name in enumerate("abcd")})

    def read() -> None:
        try:
            for _ in range(30):
                assert [store[name].metadata["shots"] for name in "abcd"] == [0, 1, 2, 3]
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed and len(store._kept) <= 2


def test_what_a_killed_writer_left_is_nobody(tiny_model, tmp_path, monkeypatch):
    store = PersonStore(tmp_path, tiny_model)
    store["ada"] = before = person_of(tiny_model, 1)
    (tmp_path / "bob.safetensors.0123.part").write_bytes(b"half of a file")
    assert list(store) == ["ada"]

    def killed(self, target):
        raise KeyboardInterrupt

    monkeypatch.setattr("pathlib.Path.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        store["ada"] = person_of(tiny_model, 2)
    assert same(store["ada"], before)


def test_what_cannot_be_in_a_store_is_named(tiny_model, tmp_path):
    store = PersonStore(tmp_path, tiny_model)
    torch.manual_seed(99)
    other = MetaGPEN(GPEN(16, 1, 0.03125, style_dim=16, n_mlp=2)).frozen()
    with pytest.raises(CheckpointError, match="another model"):
        store["ada"] = Person.generic(other)
    with pytest.raises(DataError, match="3 is no name .* such as '3'"):
        store[3] = person_of(tiny_model)
    assert store.get(3) is None and 3 not in store
    with pytest.raises(PersonNotFound, match="nobody called '3'"):
        del store[3]
    (tmp_path / "bob.safetensors").write_bytes(b"nobody")
    with pytest.raises(CheckpointError, match="bob.safetensors: not a readable"):
        store["bob"]
    person_of(tiny_model).save(tmp_path / "Ada Lovelace")
    with pytest.raises(DataError, match="not a file that a store wrote"):
        list(store)
    (tmp_path / "Ada Lovelace.safetensors").unlink()
    long = "李" * 40  # a name that only the file's header holds
    store[long] = person_of(tiny_model)
    (file,) = (path for path in tmp_path.iterdir() if "~" in path.name)
    whole = file.read_bytes()
    file.write_bytes(whole[:100])
    with pytest.raises(DataError, match="a damaged file of a store"):
        list(store)
    listed = iter(store)
    file.write_bytes(whole)
    (tmp_path / "bob.safetensors").unlink()
    file.unlink()  # by another process, between listing and reading
    assert long not in list(listed)
    with pytest.raises(ConfigError, match="nosuch://"):
        PersonStore("nosuch://people", tiny_model)
    for place in ("github://x", "jupyter://x", "dir://x"):  # whose drivers have errors of their own
        with pytest.raises((ConfigError, DataError), match=place):
            list(PersonStore(place, tiny_model))
    (tmp_path / "a file").touch()
    with pytest.raises(DataError, match="a file, not a folder of Persons; .* --person"):
        list(PersonStore(tmp_path / "a file", tiny_model))
    with pytest.raises(ConfigError, match="negative"):
        PersonStore(tmp_path, tiny_model, cache=-1)


SPECS = (AdapterSpec(2, 2, 1), AdapterSpec(2, 2, 1), AdapterSpec(1, 0, 0))


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("batch", [64, 3])
def test_photos_of_different_people_in_one_batch_equal_one_at_a_time(tiny_model, gated, batch):
    if gated:
        torch.nn.init.normal_(tiny_model.start.gate.centre)
    else:
        tiny_model.start = None
    ada, bob, eve = (person_of(tiny_model, seed, spec) for seed, spec in enumerate(SPECS))
    persons = [ada, bob, eve, ada, ada, ada, bob, Person.generic(tiny_model), eve]
    images = torch.rand(9, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    strengths = [1, 0.3, 1, 0, 0.5, 1, 1, 1, 0]
    for strength in (1.0, 0.4, 0, strengths):
        each = strength if isinstance(strength, list) else [strength] * 9
        alone = [p.restore_batch(image[None], s)[0] for p, image, s in zip(persons, images, each, strict=True)]
        together = restore_many(tiny_model, persons, images, strength, batch=batch)
        torch.testing.assert_close(together, torch.stack(alone), rtol=0, atol=1e-5)
    assert metagpen.restore_many is restore_many


def test_a_store_goes_to_another_process_without_its_cache(tmp_path, tiny_model):
    store = PersonStore(tmp_path, tiny_model)
    store["ada"] = person_of(tiny_model)
    assert store["ada"] is store["ada"]
    for other in (pickle.loads(pickle.dumps(store)), copy.deepcopy(store)):
        assert list(other) == ["ada"] and not other._kept
        assert torch.equal(other["ada"].parameters["latent.offset"], store["ada"].parameters["latent.offset"])
    with pytest.raises(DataError, match="'bob': a Person is needed, not NoneType"):
        store["bob"] = None


def test_people_of_one_spec_and_other_ranks_are_restored_together(tiny_model):
    """A side of 16 numbers holds no rank of 20: of two people of that spec one may have factors and the other not."""
    whole = person_of(tiny_model, 0, AdapterSpec(1, 20))
    lower = dataclasses.replace(whole, parameters={
        name: value[..., :15] if name.endswith(".up") and value.shape[-1] > 15
        else value[:, :15] if name.endswith(".down") and value.shape[1] > 15 else value
        for name, value in whole.parameters.items()})
    shapes = [[value.shape for value in one.parameters.values()] for one in (whole, lower)]
    images = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    persons = [whole, lower, whole, lower]
    alone = torch.cat([one.restore_batch(image[None]) for one, image in zip(persons, images, strict=True)])
    assert shapes[0] != shapes[1]
    torch.testing.assert_close(restore_many(tiny_model, persons, images), alone, rtol=0, atol=1e-5)


def test_people_who_were_read_from_files_share_a_pass(tmp_path, tiny_model, monkeypatch):
    """Whatever order the tensors of a file come in."""
    store = PersonStore(tmp_path, tiny_model)
    for i in range(6):
        store[str(i)] = person_of(tiny_model, i)
    persons = [*store.values(), person_of(tiny_model, 6)]
    for k, person in enumerate(persons):  # as files may give them
        items = list(person.parameters.items())
        persons[k] = dataclasses.replace(person, parameters=dict(items[k % len(items):] + items[:k % len(items)]))
    assert list(passes(persons, [1.0] * 7, 64)) == [list(range(7))]


@pytest.mark.parametrize("precision, near", [(torch.float64, 1e-5), (torch.float16, 0.02), (torch.bfloat16, 0.2)])
def test_a_model_in_another_precision_restores(tiny_model, precision, near):
    specs = (AdapterSpec(2, 2, 1), AdapterSpec(1, 0, 0, decoder_rank=2))
    ada, bob = (person_of(tiny_model, seed, spec) for seed, spec in enumerate(specs))
    images, strengths = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1, [1, 0.5, 0, 1]
    persons = [ada, bob, ada, bob]
    expected = restore_many(tiny_model, persons, images, strengths)
    tiny_model.to(precision)
    together = restore_many(tiny_model, persons, images, strengths)
    alone = torch.cat([p.restore_batch(image[None], s) for p, image, s in zip(persons, images, strengths)])
    assert together.dtype == alone.dtype == precision
    for found in (together, alone):
        assert (found - expected).abs().max() < near


@pytest.mark.parametrize("number", [np.float32, np.float64, np.int64, np.array, torch.tensor])
@pytest.mark.parametrize("strength", [0, 1])
def test_a_strength_may_be_any_number(tiny_model, number, strength):
    person, images = person_of(tiny_model), torch.rand(2, 3, 16, 16)
    for restore in (person.restore_batch, lambda images, given: restore_many(tiny_model, [person] * 2, images, given)):
        assert torch.equal(restore(images, number(strength)), restore(images, strength))


@pytest.mark.parametrize("spec", [*SPECS[1:], AdapterSpec(0, 1, 0, decoder_rank=2)])
def test_no_photos_are_restored_as_none(tiny_model, spec):
    person, nothing = person_of(tiny_model, 0, spec), torch.zeros(0, 3, 16, 16)
    for restored in (person.restore_batch(nothing), person.restore_batch(nothing, 0), tiny_model.restore(nothing),
                     restore_many(tiny_model, [], nothing)):
        assert restored.shape == nothing.shape


def test_one_spec_is_one_pass(tiny_model, monkeypatch):
    from metagpen import model

    sizes = []

    def counted(gpen, images, parameters, *rest, **more):
        sizes.append((len(images), len(parameters["latent.offset"])))
        return forward(gpen, images, parameters, *rest, **more)

    forward = model.personal_forward
    monkeypatch.setattr(model, "personal_forward", counted)
    ada, bob = (person_of(tiny_model, seed) for seed in (0, 1))
    restore_many(tiny_model, [ada, bob, ada, bob, ada, ada], torch.zeros(6, 3, 16, 16))
    assert sizes == [(6, 3)]  # ada stands for two images twice, bob once


def test_bad_batches_are_refused(tiny_model):
    person, images = person_of(tiny_model), torch.zeros(2, 3, 16, 16)
    with pytest.raises(ConfigError, match="2 images, 1 persons"):
        restore_many(tiny_model, [person], images)
    with pytest.raises(ConfigError, match="strength"):
        restore_many(tiny_model, [person] * 2, images, strength=[0.5, 2])
    for persons in (person, ["ada", "bob"], iter([person, person])):
        with pytest.raises(ConfigError, match="persons: a list with a Person for each image"):
            restore_many(tiny_model, persons, images)
    for strength in ("a", None):
        with pytest.raises(ConfigError, match="strength must"):
            restore_many(tiny_model, [person] * 2, images, strength=strength)
        with pytest.raises(ConfigError, match="strength must"):
            person.restore_batch(images, strength)
    with pytest.raises(ConfigError, match="batch be a whole number"):
        restore_many(tiny_model, [person] * 2, images, batch=1.5)
    for restore in (tiny_model.restore, person.restore_batch, lambda x: restore_many(tiny_model, [person] * 2, x)):
        for wrong in (torch.zeros(2, 3, 17, 17), torch.zeros(2, 3, 16, 16, dtype=torch.uint8), [1, 2]):
            with pytest.raises(PhotoError, match="aligned faces"):
                restore(wrong)
        for precision in (torch.float64, torch.float16):
            assert torch.equal(restore(images.to(precision)), restore(images))
    torch.manual_seed(99)
    other = MetaGPEN(GPEN(16, 1, 0.03125, style_dim=16, n_mlp=2)).frozen()
    with pytest.raises(CheckpointError, match="another model"):
        restore_many(tiny_model, [person, Person.generic(other)], images)
    assert restore_many(tiny_model, [], torch.zeros(0, 3, 16, 16)).shape == (0, 3, 16, 16)


@pytest.mark.parametrize("spec", [AdapterSpec(2, 6, 3), AdapterSpec(2, 0, 3)])
def test_compressing_is_the_nearest_person_of_that_rank(tiny_model, spec):
    person = person_of(tiny_model, 1, spec)
    small = person.compress(tail_rank=2, latent_rank=1)
    assert small.spec == AdapterSpec(2, 2, 1) and small.metadata["compressed_from"] == spec.to_dict()
    assert torch.equal(small.parameters["latent.offset"], person.parameters["latent.offset"])
    assert torch.equal(small.parameters["linear.bias"], person.parameters["linear.bias"])
    shape = tiny_model.gpen.final_linear[0].weight.shape
    full, near = (expand(p.parameters, "linear.weight", shape)[0].double() for p in (person, small))
    values = torch.linalg.svdvals(full)
    torch.testing.assert_close((full - near).square().sum(), values[2:].square().sum(), rtol=1e-4, atol=1e-6)
    maps = [p.parameters["latent.up"] @ p.parameters["latent.down"] for p in (person, small)]
    torch.testing.assert_close(torch.linalg.svdvals(maps[1])[..., 0], torch.linalg.svdvals(maps[0])[..., 0])


def test_compressing_to_the_same_rank_changes_nothing_that_shows(tiny_model):
    person = person_of(tiny_model, 1, AdapterSpec(2, 0, 0))
    images = torch.rand(2, 3, 16, 16)
    whole = person.compress(tail_rank=10_000)
    torch.testing.assert_close(whole.restore_batch(images), person.restore_batch(images), rtol=0, atol=1e-5)
    assert person.compress() is person


@pytest.mark.parametrize("spec", [AdapterSpec(2, 6, 0), AdapterSpec(2, 0, 0)])
def test_compressing_to_a_size_takes_the_largest_rank_that_fits(tiny_model, tmp_path, spec):
    person = person_of(tiny_model, 1, spec)
    wanted = len(person.compress(tail_rank=3).to_bytes())
    file = person.compress(max_bytes=wanted).save(tmp_path / "small")
    assert file.stat().st_size <= wanted
    small = Person.load(file, tiny_model)
    assert small.spec.tail_rank == 3
    assert small.compress(max_bytes=wanted) is small
    with pytest.raises(ConfigError, match="max_bytes = 100"):
        person.compress(max_bytes=100)
    with pytest.raises(ConfigError, match="tail_rank = 0"):
        person.compress(tail_rank=0)
