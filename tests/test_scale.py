"""Many people: bounded memory, bad people, interruption, Ray."""

import copy
import json
import os
import signal
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from test_adapt import FAST, equal, faces
from test_cli import error_line, run

from metagpen.adaptation import AdaptConfig, Album, adapt, adapt_many, loop, many
from metagpen.errors import CheckpointError, ConfigError, DataError, MetagpenError, PhotoError
from metagpen.memory import control_group_memory, free_memory
from metagpen.model import MetaGPEN
from metagpen.person import DecoderBases, PersonStore

close = partial(torch.testing.assert_close, rtol=0, atol=2e-3)  # parameters are rounded to half precision
PAIRS = FAST.model_copy(update={"people_per_batch": 2})


@pytest.fixture
def learn(tiny_model, tiny_recogniser):
    def run_it(people, config=PAIRS, **more):
        return adapt_many(tiny_model, people, more.pop("steps", 1), config=config, recogniser=tiny_recogniser, **more)

    return run_it


@pytest.fixture
def store(tiny_model, tmp_path):
    return PersonStore(tmp_path / "people", tiny_model)


@pytest.fixture
def damaged(tmp_path):
    file = tmp_path / "damaged.jpg"
    file.write_bytes(b"\xff\xd8\xff\xe0 no picture")
    return file


@pytest.fixture
def faceless(tmp_path):
    file = tmp_path / "faceless.png"
    Image.fromarray(np.full((64, 64, 3), 90, np.uint8)).save(file)
    return file


def test_people_are_taken_from_an_iterator_one_batch_at_a_time_and_written_as_they_finish(learn, store):
    taken = []

    def people():
        for i in range(7):
            assert len(store) >= len(taken) - 2  # nobody waits beside the batch
            taken.append(i)
            yield f"p{i}", faces(1 + i % 3, i)

    assert learn(people(), store=store) is store
    assert set(store) == {f"p{i}" for i in range(7)}
    assert store["p4"].metadata["shots"] == 2


def test_bad_people_are_reported_and_left_out_and_the_others_are_as_without_them(learn, damaged, faceless):
    good = {name: faces(2, seed) for seed, name in enumerate("abc")}
    people = [("a", iter(good["a"])), ("none", None), ("alone", good["b"][0]), ("x", [damaged]), ("b", good["b"]),
              ("y", [faceless]), ("z", []), ("c", good["c"]), ("a", good["b"]),
              ("w", [damaged.with_name("missing.jpg")])]
    failures = []
    found = learn(people, on_error=lambda name, error: failures.append((name, error)))
    assert list(found) == ["a", "b", "c"]
    assert [name for name, _ in failures] == ["none", "alone", "x", "y", "z", "a", "w"]
    assert all(isinstance(error, MetagpenError) for _, error in failures)
    assert "damaged.jpg" in str(failures[2][1]) and "given twice" in str(failures[5][1])
    alone = learn(good)
    assert all(equal(found[name], alone[name]) for name in good)


def test_without_on_error_the_first_bad_person_is_raised(learn, damaged):
    with pytest.raises(PhotoError, match="damaged.jpg"):
        learn({"a": faces(1), "x": [damaged]})
    with pytest.raises(DataError, match="'a' is given twice"):
        learn([("a", faces(1)), ("a", faces(2))])


def test_somebody_whose_learning_diverges_does_not_spoil_the_others(learn, monkeypatch):
    plain, bad = loop.learn, faces(3)

    def diverging(model, albums, *rest):
        parameters = plain(model, albums, *rest)
        for i, own in enumerate(albums):
            if len(own) == len(bad):
                parameters["latent.offset"][i, 0, 0] = float("nan")
        return parameters

    monkeypatch.setattr(loop, "learn", diverging)
    people = {"a": faces(2), "x": bad, "b": faces(1)}
    failures = []
    found = learn(people, FAST.model_copy(update={"people_per_batch": 3}),
                  on_error=lambda name, error: failures.append((name, str(error))))
    assert list(found) == ["a", "b"] and len(failures) == 1 and "learning 'x' diverged" in failures[0][1]
    assert all(value.isfinite().all() for person in found.values() for value in person.parameters.values())
    with pytest.raises(ConfigError, match="diverged"):
        learn({"x": bad})


def test_an_interrupted_run_goes_on_without_redoing_or_losing_anybody(learn, store, monkeypatch):
    people = {f"p{i}": faces(2, i) for i in range(5)}
    learned, plain = [], loop.learn

    def counted(model, albums, *rest):
        if len(learned) == 2 and not len(store) > 2:
            learned.append(0)
            raise KeyboardInterrupt
        learned.append(len(albums))
        return plain(model, albums, *rest)

    monkeypatch.setattr(loop, "learn", counted)
    with pytest.raises(KeyboardInterrupt):
        learned.append(0)
        learn(people, store=store)
    assert sorted(store) == ["p0", "p1"]
    before = {name: os.stat(store.path(name)).st_mtime_ns for name in store}
    learned.clear()
    learn(people, store=store)
    assert sorted(store) == sorted(people) and sum(learned) == 3
    assert all(os.stat(store.path(name)).st_mtime_ns == time for name, time in before.items())
    whole = learn(people)
    photo = torch.rand(1, 3, 16, 16)
    for name in people:  # who shares a batch with whom may have changed
        close(store[name].restore_batch(photo), whole[name].restore_batch(photo))


def test_a_store_is_not_filled_with_other_settings(learn, store, tmp_path):
    learn({"a": faces(1)}, store=store)
    learn({"b": faces(1)}, FAST.model_copy(update={"people_per_batch": 1}), store=store)  # no matter to anybody
    with pytest.raises(ConfigError, match=r"steps = 1 \(now 3\)"):
        learn({"c": faces(1)}, steps=3, store=store)
    empty = type(store)(tmp_path / "empty", store.model)
    with pytest.raises(ConfigError, match="scale"):
        learn({"c": faces(1)}, FAST.model_copy(update={"degradation": {"bsrgan": {"scale": 2}}}), store=empty)
    learn({"c": faces(1)}, store=empty)  # nobody was learned so, and nobody is bound by it
    settings = tmp_path / "people" / "adapt_many.json"
    assert json.loads(settings.read_text())["recogniser"] == "tests"
    settings.write_text("{")
    with pytest.raises(DataError, match="adapt_many.json"):
        learn({"c": faces(1)}, store=store)


def test_the_batch_follows_the_memory(tiny_model, tiny_recogniser, monkeypatch):
    config = FAST.for_model(tiny_model)
    one = loop.bytes_per_person(tiny_model, config, tiny_recogniser)
    more = loop.bytes_per_person(tiny_model, config.model_copy(update={"batch_size": 8}), tiny_recogniser)
    assert 1.6 < more / one < 2.1  # 8 pictures a step in place of 4
    for free, people in ((0, 1), (7 * one, 3), (1000 * one, 8)):
        monkeypatch.setattr(loop, "free_memory", lambda device, free=free: free)
        assert loop.people_that_fit(tiny_model, config, tiny_recogniser) == people


def test_an_automatic_batch_learns_the_same_people(learn, tiny_model, tiny_recogniser, monkeypatch):
    sizes, plain = [], loop.learn
    monkeypatch.setattr(loop, "learn", lambda model, albums, *rest: sizes.append(len(albums)) or plain(
        model, albums, *rest))
    monkeypatch.setattr(loop, "people_that_fit", lambda *_: 3)
    people = {f"p{i}": faces(1, i) for i in range(4)}
    found = learn(people, FAST)
    assert sizes == [3, 1]
    alone = adapt(tiny_model, people["p3"], 1, config=FAST, recogniser=tiny_recogniser)
    assert equal(found["p3"], alone)
    assert len(learn(people, FAST, batch=4)) == 4 and sizes[-1] == 4


def test_free_memory(tmp_path):
    assert free_memory(torch.device("cpu")) > 2**20
    assert control_group_memory(tmp_path) > 2**60
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("400\n")
    (tmp_path / "memory.stat").write_text("anon 100\ninactive_file 50\nactive_file 20\n")
    assert control_group_memory(tmp_path) == 650
    (tmp_path / "memory.max").write_text("max\n")
    assert control_group_memory(tmp_path) > 2**60


def test_a_store_among_the_people_is_nobody(tmp_path):
    from metagpen.cli import people_folders

    for name in ("ada", "bob", "store"):
        (tmp_path / name).mkdir()
    assert list(people_folders(tmp_path, str(tmp_path / "store"), None)) == ["ada", "bob"]
    (tmp_path / "ada" / "1.jpg").touch()
    with pytest.raises(DataError, match="ada: the store would lie among somebody's photos"):
        people_folders(tmp_path, str(tmp_path / "ada"), None)


def test_a_folder_that_cannot_be_read_is_its_persons_failure(tmp_path, monkeypatch):
    from metagpen import cli, faces

    for name in ("ada", "bob"):
        (tmp_path / name).mkdir()

    def photos_in(folder):
        if folder.name == "ada":
            raise PermissionError(13, "Permission denied", str(folder))
        return []

    monkeypatch.setattr(faces, "photos_in", photos_in)
    failed = []
    assert cli.people_folders(tmp_path, str(tmp_path / "store"), lambda name, _: failed.append(name)) == {"bob": []}
    assert failed == ["ada"]


def test_a_store_is_filled_under_one_setting_also_by_two_processes(learn, store):
    """Each found it empty; the second noted its own settings before the first had learned anybody."""
    def people():
        yield "a", faces(1)
        noted = json.loads(store.files.cat_file(many.note_of(store)))
        store.write(many.note_of(store), json.dumps({**noted, "steps": 99}).encode())

    with pytest.raises(ConfigError, match=r"learned with steps = 99 \(now 0\)"):
        learn(people(), steps=0, batch=2, store=store)
    assert not len(store)


def test_filters_that_a_model_lacks_are_missed_before_anybody_is_learned(learn, tiny_model):
    shared = MetaGPEN(tiny_model.gpen, tiny_model.start, tiny_model.card, bases=DecoderBases.random(tiny_model.gpen, 2))
    with pytest.raises(ConfigError, match="decoder_rank = 3"):
        loop.adapt(shared, [faces(1)[0]], 0, config=AdaptConfig(decoder_rank=3, rule=False), recogniser=None)


def test_impossible_combinations(learn, store, tiny_model):
    for more, message in (({"engine": "spark"}, "not known"), ({"engine": "ray"}, "a store"),
                          ({"workers": 2}, "Ray engine"), ({"batch": -1}, "people_per_batch")):
        with pytest.raises(ConfigError, match=message):
            learn({"a": faces(1)}, **more)


def test_a_store_that_cannot_be_filled_is_refused_before_anybody_is_learned(learn, store, tmp_path, tiny_model,
                                                                            monkeypatch):
    other = copy.deepcopy(tiny_model)
    other.weights_changed()
    with torch.no_grad():
        other.gpen.final_linear[0].bias.add_(1)
    monkeypatch.setattr(loop, "learn", None)
    with pytest.raises(CheckpointError, match="another model than the people in .*people"):
        learn({"a": faces(1)}, store=PersonStore(tmp_path / "people", other))
    with pytest.raises(ConfigError, match="'people' is no PersonStore"):
        learn({"a": faces(1)}, store="people")
    with pytest.raises(DataError, match="3 is no name"):
        learn({3: faces(1)}, store=store)
    with pytest.raises(ConfigError, match="a folder with one sub-folder per person"):
        learn(tmp_path, store=store)
    assert not list(tmp_path.glob("people/*.safetensors")) and not (tmp_path / "people" / "people").exists()


def test_a_name_that_is_no_text_is_left_out(learn):
    failures = []
    found = learn([(3, faces(1)), (["a"], faces(1)), ("a", faces(1))], steps=0,
                  on_error=lambda name, error: failures.append(str(error)))
    assert list(found) == ["a"] and [text[:12] for text in failures] == ["3 is no name", "['a'] is no "]


def test_the_command_screens_photos_where_asked(tmp_path, tiny_model, monkeypatch):
    import metagpen
    from metagpen import cli
    from metagpen.errors import PhotoError

    looked: list[str] = []

    def serving(model, files, best, otherwise):
        looked.append(files[0].parent.name)
        if files[0].parent.name == "Bob":
            raise PhotoError("none of the 2 photos is usable")
        return files[1:]

    learned: list[list] = []
    monkeypatch.setattr(metagpen, "load", lambda *_, **__: tiny_model)
    monkeypatch.setattr(cli, "photos_that_serve", serving)
    monkeypatch.setattr(loop, "album", lambda photos, *_: learned.append(photos) or Album(
        torch.stack(faces(1)), torch.zeros(1, 5, 2)))
    tiny_model.start = None
    for name in ("ada", "Bob"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for file in ("1.jpg", "2.jpg"):
            (tmp_path / "photos" / name / file).write_bytes(b"")
    command = ("adapt-many", tmp_path / "photos", "-o", tmp_path / "people", "--steps", 0, "--check")
    result = run(*command)
    assert result.exit_code == 1 and "Bob: none of the 2 photos is usable" in result.stderr
    assert "1 people are in" in result.output and "1 could not be learned" in result.output
    assert [[photo.name for photo in photos] for photos in learned] == [["2.jpg"]]
    run(*command)
    assert looked == ["Bob", "ada", "Bob"], "who is in the store is passed over"


def test_the_command(tmp_path, tiny_model, monkeypatch, damaged):
    import metagpen

    monkeypatch.setattr(metagpen, "load", lambda *_, **__: tiny_model)
    photos = tmp_path / "photos"
    for name in ("ada", "Bob"):
        (photos / name).mkdir(parents=True)
    (photos / "ada" / "1.jpg").write_bytes(damaged.read_bytes())
    tiny_model.start = None
    result = run("adapt-many", photos, "-o", tmp_path / "people", "--steps", 0)
    assert result.exit_code == 1
    assert "Bob: no photo given" in result.stderr and "ada: photo" in result.stderr
    assert "0 people are in" in result.output and "2 could not be learned" in result.output
    for album, name in ((faces(2), "eve"), (faces(1), "Fay")):
        monkeypatch.setattr(loop, "album", lambda *_, album=album: Album(torch.stack(album), torch.zeros(9, 5, 2)))
        (photos / name).mkdir()
        (photos / name / "1.png").write_bytes(b"")
    result = run("adapt-many", photos, "-o", tmp_path / "people", "--steps", 0)
    assert result.exit_code == 0, result.output
    assert "4 people are in" in result.output and sorted(PersonStore(tmp_path / "people", tiny_model)) == [
        "Bob", "Fay", "ada", "eve"]
    assert "no such folder" in error_line("adapt-many", tmp_path / "nowhere", "-o", tmp_path / "people")
    assert "no sub-folders" in error_line("adapt-many", photos / "ada", "-o", tmp_path / "people")


class KillsItsWorker(list):
    """Photos whose worker is killed when it first looks at them."""

    def __init__(self, photos, marker):
        super().__init__(photos)
        self.marker = marker

    def __reduce__(self):
        return KillsItsWorker, (self[:], self.marker)  # list(self) would look at them here

    def __iter__(self):
        if not self.marker.exists():
            self.marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__iter__()


@pytest.fixture(scope="module")
def cluster():
    """A Ray of this machine with three workers."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_raylet_start_wait_time_s", "150")  # busy machines are slow to begin
    ray = pytest.importorskip("ray", reason="Ray is not installed (pip install 'metagpen[ray]')")
    paths = os.pathsep.join(p for p in (os.path.dirname(__file__), os.environ.get("PYTHONPATH", "")) if p)
    ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False, object_store_memory=10**8,
             runtime_env={"env_vars": {"PYTHONPATH": paths}})
    yield ray
    ray.shutdown()


@pytest.mark.timeout(600)
def test_ray_loses_nobody_when_a_worker_is_killed(cluster, learn, store, tmp_path, damaged):
    people = {f"p{i}": faces(2, i) for i in range(9)}
    marker, failures = tmp_path / "killed", []
    given = people | {"p4": KillsItsWorker(people["p4"], marker), "x": [damaged]}
    with pytest.raises(ConfigError, match="workers = 4: this cluster has room for 3"):
        learn(given, store=store, engine="ray", workers=4)
    learn(given, store=store, engine="ray", workers=3, on_error=lambda name, error: failures.append(name))
    assert marker.exists() and sorted(store) == sorted(people) and failures == ["x"]
    here = learn(people)
    photo = torch.rand(1, 3, 16, 16)
    for name in people:
        close(store[name].restore_batch(photo), here[name].restore_batch(photo))


def test_ray_needs_a_store_that_its_workers_see(cluster, learn, tiny_model):
    with pytest.raises(ConfigError, match="only this process"):
        learn({"a": faces(1)}, store=PersonStore("memory://here", tiny_model), engine="ray")
