"""The curve's tasks as pictures for other programs, and what these restored read back as a method."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image
from test_curve import SMALL, measure, tiny, values, write_people
from typer.testing import CliRunner

import metagpen
from metagpen import faces
from metagpen.cli import app
from metagpen.errors import ConfigError, DataError
from metagpen.evaluate import curve, curve_report, report
from metagpen.evaluate.curve import CurveConfig, CurveSettings
from metagpen.evaluate.elsewhere import Elsewhere
from metagpen.evaluate.engine import named_degradations
from metagpen.evaluate.tasks import damage, load_task
from metagpen.identities import People

COPY = CurveSettings(**{**SMALL.model_dump(), "methods": ["input", "generic", "folder-copy"]})


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("elsewhere") / "smooth"
    write_people(folder)
    return folder


@pytest.fixture
def exported(folder, tmp_path, monkeypatch) -> Path:
    """The tasks, and as what `copy` restored the damaged faces themselves."""
    monkeypatch.setattr(metagpen, "load", lambda *_, **__: tiny(), raising=False)
    config = CurveConfig(**COPY.model_dump(), data=str(folder))
    assert curve.export_curve(config, tmp_path / "tasks") == 3 * 2 * 2  # people, degradations, queries
    hand_in(tmp_path / "tasks", "copy", lambda picture: picture)
    return tmp_path / "tasks"


def hand_in(exported: Path, name: str, restore, photos: int = 0) -> None:
    """What another program would do."""
    for file in sorted(exported.glob("seed_*/*/*/*.png")):
        if file.parent.name != "photos":
            to = exported / "restored" / name / f"{photos}_photos" / file.relative_to(exported)
            to.parent.mkdir(parents=True, exist_ok=True)
            restore(Image.open(file)).save(to)


def test_all_that_is_exported_is_photos_to_learn_from_and_damaged_faces(exported, folder):
    own = exported / "seed_0" / "a"
    assert sorted(path.name for path in own.iterdir()) == ["extreme", "hard", "photos"]
    assert [len(list((own / name).iterdir())) for name in ("extreme", "hard", "photos")] == [2, 2, 2]
    assert {Image.open(path).size for path in own.rglob("*.png")} == {(16, 16)}
    said = json.loads((exported / "tasks.json").read_text())
    assert said["size"] == 16 and said["shots"] == 2 and len(said["inputs"]) == 3 * 3
    assert str(folder) not in json.dumps(said), "no path of this machine"


def test_a_copy_of_the_input_scores_as_the_input(exported, folder):
    rows = measure(People.from_folder(folder), COPY, exported=exported)
    copied, unrestored = values(rows, method="folder-copy"), values(rows, method="input")
    assert copied.keys() == unrestored.keys() and copied
    for key, value in unrestored.items():
        assert copied[key] == pytest.approx(value, abs=2.0 if "deg" in key[1] else 0.05), f"{key}: beyond eight bits"
    row = next(row for row in rows if row["method"] == "folder-copy")
    generic = next(row for row in rows if row["method"] == "generic")
    assert (row["seconds"], row["shots"], row["steps"]) == (None, 0, 0) and row["model"] != generic["model"]


def test_pictures_are_matched_with_their_own_truth(exported, folder):
    """A restorer that knows the truth reaches it, and one that gives every person the next one's does not."""
    people = People.from_folder(folder)
    truth = {}
    for person in people:
        task = load_task(people, person, 2, 16, 0, 2)
        for number, query in enumerate(task.queries):
            truth[(person, f"{number:02d}.png")] = faces.to_pil(query)
    names = list(people)
    for name, whose in {"right": {n: n for n in names}, "wrong": dict(zip(names, names[1:] + names[:1]))}.items():
        shutil.copytree(exported / "restored" / "copy", exported / "restored" / name)
        for file in (exported / "restored" / name).rglob("*.png"):
            truth[(whose[file.parents[1].name], file.name)].save(file)
    rows = measure(people, COPY, exported=exported, methods=["folder-right", "folder-wrong"])
    right, wrong = (values([row for row in rows if row["metric"] == "psnr"], method=f"folder-{name}")
                    for name in ("right", "wrong"))
    assert min(right.values()) > 45 > 30 > max(wrong.values())


def test_larger_pictures_are_scaled_down_and_photos_may_count(exported, folder):
    hand_in(exported, "large", lambda picture: picture.resize((64, 64), Image.Resampling.BICUBIC), photos=2)
    rows = measure(People.from_folder(folder), COPY, exported=exported, methods=["input", "folder-large"],
                   shots_of={"folder-large": [2]})
    task = load_task(People.from_folder(folder), "a", 2, 16, 0, 2)
    poor = damage(task, "hard", named_degradations(["hard"])["hard"])
    found = Elsewhere.open(exported).restored("folder-large", 2, 0, "a", "hard", poor)
    assert found.shape == poor.shape and (found - poor).abs().mean() < 0.1 < (found.flip(-1) - poor).abs().mean()
    assert {row["shots"] for row in rows if row["method"] == "folder-large"} == {2}


def test_what_is_missing_or_of_another_run_is_named(exported, folder):
    people = People.from_folder(folder)
    with pytest.raises(ConfigError, match="exported must name"):
        measure(people, COPY)
    with pytest.raises(DataError, match="not a folder of exported tasks"):
        measure(people, COPY, exported=folder)
    with pytest.raises(DataError, match="no pictures in .*nobody"):
        measure(people, COPY, exported=exported, methods=["folder-nobody"])
    with pytest.raises(DataError, match="not those that are measured now"):
        measure(people, COPY, exported=exported, methods=["folder-copy"], seeds=[1])
    hand_in(exported, "learner", lambda picture: picture, photos=2)
    said = json.loads((exported / "tasks.json").read_text())
    said["inputs"]["0/a/photos"] = "of other photos"
    (exported / "tasks.json").write_text(json.dumps(said))
    with pytest.raises(DataError, match="of a, 'photos', seed 0"):
        measure(people, COPY, exported=exported, methods=["folder-learner"], shots_of={"folder-learner": [2]})
    lost = exported / "restored" / "copy" / "0_photos" / "seed_0" / "b" / "hard" / "01.png"
    lost.unlink()
    with pytest.raises(DataError, match="b/hard/01.png: missing"):
        measure(people, COPY, exported=exported, methods=["folder-copy"])


def test_new_pictures_are_a_new_run(exported, folder, tmp_path):
    people, where = People.from_folder(folder), tmp_path / "run"
    first = measure(people, COPY, exported=exported, methods=["folder-copy"], folder=where)
    assert measure(people, COPY, exported=exported, methods=["folder-copy"], folder=where) == first
    hand_in(exported, "copy", lambda picture: picture.point(lambda level: 255 - level))
    with pytest.raises(ConfigError, match="other settings .pictures."):
        measure(people, COPY, exported=exported, methods=["folder-copy"], folder=where)


def test_the_report_says_who_restored_and_no_seconds(exported, folder, tmp_path):
    hand_in(exported, "theirs", lambda picture: picture, photos=2)
    rows = measure(People.from_folder(folder), COPY, exported=exported, workers=2,
                   methods=["generic", "start", "folder-copy", "folder-theirs"], shots_of={"folder-theirs": [2]})
    curve.write_rows(tmp_path / "rows.jsonl", rows)
    found = curve_report.read_rows(tmp_path / "rows.jsonl")
    curve_report.write_report(tmp_path / "rows.jsonl", tmp_path / "report")
    table = (tmp_path / "report" / "curve.md").read_text()
    line = next(line for line in table.splitlines() if line.startswith("| theirs (restored elsewhere), 2 photos"))
    assert line.endswith("| – |")
    lines = curve_report.curves(curve_report.records_of(found), "hard", "psnr", "seconds")
    assert "start" in lines and "folder-theirs" not in lines, "nobody took the time"


def test_a_method_elsewhere_learns_nothing_here():
    assert report.label_of("folder-gfpgan") == "gfpgan (restored elsewhere)"
    with pytest.raises(ConfigError, match="not in shots"):
        CurveSettings(methods=["folder-x"], shots=[1], shots_of={"folder-x": [5]}).check()
    with pytest.raises(ConfigError, match="not in shots"):
        CurveSettings(methods=["adapt"], shots=[1], shots_of={"adapt": [0, 1]}).check()


def test_the_command_exports_and_keeps_what_is_there(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(metagpen, "load", lambda *_, **__: tiny(), raising=False)
    settings = tmp_path / "curve.yml"
    settings.write_text(f"data: {folder}\nshots: [1]\nmax_people: 1\nmax_queries: 2\n")
    wanted = ["curve", "-c", str(settings), "--export", str(tmp_path / "new")]
    ran = CliRunner().invoke(app, wanted)
    assert ran.exit_code == 0 and "6 damaged faces" in ran.output, ran.output
    assert (tmp_path / "new" / "seed_0" / "a" / "moderate" / "00.png").exists()
    again = CliRunner().invoke(app, wanted)
    assert again.exit_code == 2 and "not empty" in again.output + again.stderr
