"""The demo on a stand-in model: what it writes, that it is reproducible, and that held-out photos stay unseen."""

import json

import pytest
import torch
from PIL import Image

from metagpen import demo
from metagpen.errors import DataError
from metagpen.identities import People, Photo


class Blank:
    """Restores every face to one grey level; the person's level is that of the mean support photo."""

    size = 32

    def __init__(self, level=0.0):
        self.level = level

    def restore(self, images):
        return torch.full_like(images, self.level)

    restore_batch = restore


class Recogniser:
    """Embeds a face by its mean colour."""

    def embed(self, crops, landmarks=None):
        assert landmarks.shape == (len(crops), 5, 2)
        return torch.nn.functional.normalize(crops.mean(dim=(2, 3)) + 2, dim=1)


@pytest.fixture
def seen(monkeypatch):
    """Replaces model, recogniser and adapting; returns the support photos that adapting was given."""
    seen = []

    def adapt(model, photos, steps, seed):
        seen.append(torch.stack(photos))
        return Blank(float(seen[-1].mean()))

    monkeypatch.setattr(demo, "load", lambda device: Blank())
    monkeypatch.setattr(demo, "adapt", adapt)
    monkeypatch.setattr(demo.recognise, "load", lambda name: Recogniser())
    monkeypatch.setattr(demo.degrade, "by_name", lambda name: lambda images, generator: images * 0.5)
    return seen


@pytest.fixture
def album(tmp_path, monkeypatch):
    """Two people; every photo has its own grey level, bob's are brighter."""
    levels = {"ada": [30, 40, 50, 60], "bob": [200, 210, 220]}
    landmarks = torch.tensor([[12, 14], [20, 14], [16, 18], [13, 22], [19, 22]]).numpy()
    people = {}
    for name, greys in levels.items():
        (tmp_path / name).mkdir()
        for grey in greys:
            Image.new("RGB", (32, 32), (grey,) * 3).save(tmp_path / name / f"{grey}.png")
        people[name] = [Photo(tmp_path / name / f"{grey}.png", landmarks) for grey in greys]
    monkeypatch.setattr(demo, "read_album", lambda album: People(people))
    return levels


def test_what_the_demo_writes(seen, album, tmp_path):
    lines = []
    result = demo.run_demo("two", tmp_path / "out", steps=3, shots=2, progress=lines.append)
    assert [(p.name, p.support, p.held_out) for p in result.people] == [("ada", 2, 2), ("bob", 2, 1)]
    assert len(lines) == 4
    for person in result.people:
        with Image.open(person.sheet) as sheet:
            assert sheet.width > 4 * 100, "degraded, generic, personal and truth side by side"
        assert person.figures["personal"]["psnr"] > person.figures["generic"]["psnr"]
    rows = json.loads(result.data.read_text())["rows"]
    assert {(row["person"], row["method"]) for row in rows} == {(n, m) for n in album for m in demo.METHODS}
    report = result.report.read_text()
    assert "| ada | 2 / 2 | personal |" in report and "![bob](bob.jpg)" in report


def test_held_out_photos_are_never_learned_from(seen, album, tmp_path, monkeypatch):
    truths = []
    measure = demo.measure
    monkeypatch.setattr(
        demo, "measure", lambda restored, truth, *rest: truths.append(truth) or measure(restored, truth, *rest)
    )
    demo.run_demo("two", tmp_path, shots=2)
    for support, truth in zip(seen, truths[:: len(demo.METHODS)]):
        learned = {round(float(x.mean()), 4) for x in support}
        restored = {round(float(x.mean()), 4) for x in truth}
        assert len(learned) == 2 and restored and not learned & restored


def test_one_photo_is_always_held_out(seen, album, tmp_path):
    result = demo.run_demo("two", tmp_path, shots=99)
    assert [(p.support, p.held_out) for p in result.people] == [(3, 1), (2, 1)]


def test_the_seed_decides(seen, album, tmp_path):
    supports = []
    for seed in (0, 0, 1, 2, 3):
        seen.clear()
        demo.run_demo("two", tmp_path, shots=2, seed=seed)
        supports.append(torch.cat(seen))
    assert torch.equal(supports[0], supports[1])
    assert any(not torch.equal(supports[0], other) for other in supports[2:])


def test_no_photo_no_person(tmp_path):
    with pytest.raises(DataError, match="at least 1"):
        demo.run_demo("own", tmp_path, shots=0)


def test_a_device_that_is_not_there(seen, album, tmp_path):
    with pytest.raises(DataError, match="device 'cuda:99' is not available"):
        demo.run_demo("two", tmp_path, device="cuda:99")


def test_the_pictures_never_take_the_place_of_photos(seen, album, tmp_path):
    for output in (tmp_path, tmp_path / "ada", tmp_path / "deep" / "out"):
        with pytest.raises(DataError, match="lies in the album"):
            demo.run_demo(str(tmp_path), output)
