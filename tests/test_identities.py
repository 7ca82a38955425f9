import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from metagpen.errors import DataError, PhotoError
from metagpen.faces import FFHQ_LANDMARKS
from metagpen.identities import (
    LAYOUTS,
    People,
    Photo,
    episode,
    fixed_episode,
    load_people,
    pack,
    read_split,
    register_layout,
    split,
    write_split,
)

ROOT = Path(__file__).resolve().parents[1]

LANDMARKS = [column + str(i) for i in range(5) for column in "xy"]


def write_photo(file, value, size=16):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (size, size), (value, 255 - value, 7)).save(file)


def write_csv(file, rows):
    with open(file, "w", newline="") as stream:
        csv.writer(stream).writerows(rows)
    return file


@pytest.fixture
def root(tmp_path):
    """ada: 3 photos, bob: 2, eve: 1, and things that are no photos of anybody."""
    root = tmp_path / "set_a"
    for value, name in enumerate(["ada/2.png", "ada/1.JPG", "ada/3.webp", "bob/x.png", "bob/y.png", "eve/e.png"]):
        write_photo(root / name, 40 * value)
    write_photo(root / "ada" / "nested" / "4.png", 0)
    write_photo(root / ".hidden" / "5.png", 0)
    write_photo(root / "bob" / ".z.png", 0)
    write_photo(root / "loose.png", 0)
    (root / "eve" / "notes.txt").write_text("no photo")
    (root / "empty").mkdir()
    return root


@pytest.fixture
def many(tmp_path):
    """Twelve people with 1 to 12 photos that need not exist."""
    return People({f"p{n:02}": [Photo(tmp_path / f"p{n:02}" / f"{i}.jpg") for i in range(n)] for n in range(1, 13)},
                  set_name="many")


# --- people --------------------------------------------------------------------------------------------------------

def test_a_folder_of_people(root):
    people = People.from_folder(root)
    assert {name: [p.path.name for p in photos] for name, photos in people.items()} == {
        "ada": ["1.JPG", "2.png", "3.webp"], "bob": ["x.png", "y.png"], "eve": ["e.png"]}
    photo = people["ada"][0]
    assert photo.landmarks is None and photo.source_side is None
    assert photo.sha256 != people["ada"][1].sha256 and len(photo.sha256) == 64
    assert repr(people) == "People(set_a: 3 people, 6 photos)"


def test_manifest_adds_what_is_known(root):
    write_csv(root / "manifest.csv", [
        ["id", "file", "src_crop_side_px", *LANDMARKS],
        ["ada", "ada/1.JPG", "200.5", *range(10)],
        ["ada", "ada/2.png", "90", *[""] * 10],
        ["ada", "ada/3.webp", "300", *[""] * 10],
        ["bob", "bob/x.png", "150", *[""] * 10],
        ["bob", "bob/y.png", "20", *[""] * 10],
        ["eve", "eve/e.png", "20", *[""] * 10],
    ])
    people = People.from_folder(root)
    assert people["ada"][0].source_side == 200.5
    assert people["ada"][0].landmarks.tolist() == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]
    assert people["ada"][1].landmarks is None
    sharp = people.min_source_side(100)
    assert {name: len(photos) for name, photos in sharp.items()} == {"ada": 2, "bob": 1}


@pytest.mark.parametrize("row, said", [
    (["ada", "ada/9.png", "1"], "row 3: 'ada/9.png' does not exist"),
    (["ada", "ada/1.JPG", "1"], "row 3: 'ada/1.JPG' is listed twice"),
    (["bob", "ada/2.png", "1"], "row 3: id 'bob' is not the folder"),
    (["ada", "ada/2.png", "wide"], "row 3: src_crop_side_px is 'wide'"),
    (["ada", "ada/2.png", "inf"], "row 3: src_crop_side_px is 'inf'"),
    (["ada", "ada/2.png", "1", "5"], "row 3: give all ten landmark"),
    (["ada"], "row 3: too few values"),
])
def test_a_manifest_that_contradicts_the_folder(root, row, said):
    header = ["id", "file", "src_crop_side_px", *LANDMARKS]
    write_csv(root / "manifest.csv", [header, ["ada", "ada/1.JPG", "1"], row])
    with pytest.raises(DataError, match=said) as error:
        People.from_folder(root)
    assert "manifest.csv" in str(error.value)


def test_folders_without_people(tmp_path):
    with pytest.raises(DataError, match="nowhere"):
        People.from_folder(tmp_path / "nowhere")
    with pytest.raises(DataError, match="no photos of anybody"):
        People.from_folder(tmp_path)


def test_selecting_and_filtering(root):
    people = People.from_folder(root)
    assert list(people.select(["eve", "ada"])) == ["ada", "eve"]
    assert list(people.min_photos(2)) == ["ada", "bob"]
    with pytest.raises(DataError, match="mallory"):
        people.select(["ada", "mallory"])
    with pytest.raises(DataError, match="src_crop_side_px"):
        people.min_source_side(100)


def test_merged_collections_keep_namesakes_apart(root, tmp_path):
    write_photo(tmp_path / "set_b" / "ada" / "other.png", 9)
    both = load_people(root, tmp_path / "set_b")
    assert list(both) == ["set_a/ada", "set_a/bob", "set_a/eve", "set_b/ada"]
    assert list(both.select(["set_b/ada"])) == ["set_b/ada"]
    with pytest.raises(DataError, match="different"):
        load_people(root, root)


def test_layouts_can_be_added(root, monkeypatch):
    monkeypatch.setattr("metagpen.identities.people.LAYOUTS", dict(LAYOUTS))

    @register_layout("only_ada")
    def only_ada(folder):
        return People.from_folder(folder).select(["ada"])

    assert list(load_people(root, layout="only_ada")) == ["ada"]
    with pytest.raises(DataError, match="registered"):
        register_layout("folder")(only_ada)
    with pytest.raises(DataError, match="unknown layout 'films'"):
        load_people(root, layout="films")


# --- splits --------------------------------------------------------------------------------------------------------

def test_split_by_fractions_is_disjoint_and_complete(many):
    parts = split(many, fractions={"train": 0.7, "val": 0.15, "test": 0.15}, seed=3)
    assert [len(part) for part in parts.values()] == [8, 2, 2]
    assert sorted(name for part in parts.values() for name in part) == list(many)
    again = split(many, fractions={"train": 0.7, "val": 0.15, "test": 0.15}, seed=3)
    other = split(many, fractions={"train": 0.7, "val": 0.15, "test": 0.15}, seed=4)
    assert list(again["train"]) == list(parts["train"]) != list(other["train"])


@pytest.mark.parametrize("fractions", [{}, {"train": 0.5}, {"train": 1.2, "val": -0.2}, {"train": 0.99, "val": 0.01}])
def test_impossible_fractions(many, fractions):
    with pytest.raises(DataError):
        split(many, fractions=fractions)


def test_split_from_a_file_and_back(root, tmp_path):
    write_photo(tmp_path / "set_b" / "ada" / "other.png", 9)
    both = load_people(root, tmp_path / "set_b")
    file = write_csv(tmp_path / "splits.csv", [
        ["set", "id", "n", "split"],
        ["set_a", "ada", 3, "train"], ["set_a", "bob", 2, "val"], ["set_a", "eve", 1, "train"],
        ["set_b", "ada", 1, "val"], ["set_c", "zoe", 1, "val"],
    ])
    parts = split(both, file)
    assert {part: list(people) for part, people in parts.items()} == {
        "train": ["set_a/ada", "set_a/eve"], "val": ["set_a/bob", "set_b/ada"]}
    alone = split(People.from_folder(root), file)
    assert {part: list(people) for part, people in alone.items()} == {"train": ["ada", "eve"], "val": ["bob"]}
    for people, expected in ((both, parts), (People.from_folder(root), alone)):
        write_split(expected, tmp_path / "written.csv")
        written = split(people, tmp_path / "written.csv")
        assert {part: list(p) for part, p in written.items()} == {part: list(p) for part, p in expected.items()}
    assert read_split(file)["set_c", "zoe"] == "val"


def test_people_without_a_set_are_written_without_one(root, tmp_path):
    nameless = People(dict(People.from_folder(root)))
    write_split({"train": nameless}, tmp_path / "written.csv")
    assert set(read_split(tmp_path / "written.csv")) == {("", name) for name in nameless}


def test_split_file_without_sets(root, tmp_path):
    file = write_csv(tmp_path / "s.csv", [["id", "split"], ["ada", "a"], ["bob", "b"], ["eve", "b"]])
    assert {part: list(p) for part, p in split(People.from_folder(root), file).items()} == {
        "a": ["ada"], "b": ["bob", "eve"]}


@pytest.mark.parametrize("rows, said", [
    ([["id", "part"], ["ada", "a"]], "column 'split' is missing"),
    ([["id", "split"], ["ada", "a"], ["bob", ""]], "row 3: id or split is empty"),
    ([["id", "split"], ["ada", "a"], ["bob", "b"], ["ada", "b"]], "row 4: 'ada' is listed again as b .row 2: a"),
    ([["id", "split"], ["ada", "a"], ["mallory", "b"]], "row 3: 'mallory' is not among"),
    ([["id", "split"], ["ada", "a"], ["bob", "b"]], "which part 'eve' belongs"),
    ([["set", "id", "split"], ["set_a", "ada", "a"], ["", "ada", "b"]], "row 3: 'ada' is listed already in row 2"),
])
def test_split_files_that_contradict(root, tmp_path, rows, said):
    file = write_csv(tmp_path / "s.csv", rows)
    with pytest.raises(DataError, match=said) as error:
        split(People.from_folder(root), file)
    assert "s.csv" in str(error.value)


def test_split_that_is_not_strict(root, tmp_path):
    file = write_csv(tmp_path / "s.csv", [["id", "split"], ["ada", "a"], ["mallory", "b"]])
    parts = split(People.from_folder(root), file, strict=False)
    assert {part: list(p) for part, p in parts.items()} == {"a": ["ada"]}
    with pytest.raises(DataError, match="missing.csv"):
        split(People.from_folder(root), tmp_path / "missing.csv")


# --- episodes ------------------------------------------------------------------------------------------------------

def draw(many, seed, count=40):
    generator = torch.Generator().manual_seed(seed)
    return [episode(many, shots=3, queries=2, generator=generator) for _ in range(count)]


def test_episodes_are_disjoint_and_reproducible(many):
    episodes = draw(many, 0)
    for one in episodes:
        assert len(one.support) == 3 and len(one.query) == 2
        assert len(set(one.support) | set(one.query)) == 5
        assert set(one.support) | set(one.query) <= set(many[one.person])
    assert episodes == draw(many, 0) != draw(many, 1)
    assert {one.person for one in episodes} >= {"p05", "p12"}  # drawn from all who have enough, and no others
    assert min(one.person for one in episodes) == "p05"


def test_too_few_photos_for_an_episode(many):
    with pytest.raises(DataError, match=r"13 photos.*the most is 12"):
        episode(many, shots=8, queries=5, generator=torch.Generator())
    with pytest.raises(DataError, match="at least one"):
        episode(many, shots=0, queries=5, generator=torch.Generator())
    with pytest.raises(DataError, match="'p08' has 8 photos"):
        fixed_episode(many, "p08", shots=1)
    with pytest.raises(DataError, match="exceed the largest"):
        fixed_episode(many, "p12", shots=9)
    with pytest.raises(DataError, match="nobody is called"):
        fixed_episode(many, "p99", shots=1)


def test_fixed_episodes_are_nested_with_the_same_queries(many):
    episodes = [fixed_episode(many, "p12", shots, seed=5) for shots in (1, 2, 4, 8)]
    for smaller, larger in zip(episodes, episodes[1:], strict=False):
        assert larger.support[:len(smaller.support)] == smaller.support
        assert larger.query == smaller.query
    assert set(episodes[-1].support) | set(episodes[-1].query) == set(many["p12"])
    assert not set(episodes[-1].support) & set(episodes[-1].query)
    assert fixed_episode(many, "p12", 8, seed=6).support != episodes[-1].support
    assert fixed_episode(many, "p12", 1, seed=5, queries=2).query == episodes[0].query[:2]


def test_fixed_episodes_do_not_depend_on_the_machine(tmp_path):
    one, two = (People({"ada": [Photo(folder / f"{i}.jpg") for i in order]}) for folder, order in (
        (tmp_path / "here", range(9)), (tmp_path / "there", reversed(range(9)))))
    names = [[p.path.name for p in fixed_episode(people, "ada", 4).support] for people in (one, two)]
    assert names[0] == names[1] == ["7.jpg", "0.jpg", "4.jpg", "2.jpg"]


# --- packed --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("workers", [1, 3])
def test_packing(root, workers):
    write_csv(root / "manifest.csv", [
        ["id", "file", "src_crop_side_px", *LANDMARKS], ["bob", "bob/y.png", "150", *range(10)]])
    packed = pack(People.from_folder(root), 8, workers=workers)
    assert packed.images.shape == (6, 3, 8, 8) and packed.images.dtype == torch.uint8 and packed.size == 8
    assert packed.names == ["ada", "bob", "eve"] and packed.person.tolist() == [0, 0, 0, 1, 1, 2]
    assert packed.images[4, :, 3, 3].tolist() == [160, 95, 7]
    assert packed.landmarks[4].tolist() == (np.arange(10).reshape(5, 2) / 2).tolist()
    assert np.allclose(packed.landmarks[0], FFHQ_LANDMARKS * 8)
    assert packed.source_side[4] == 150 and packed.source_side.isnan().sum() == 5
    batch = packed.batch(torch.tensor([4, 0]))
    assert batch.shape == (2, 3, 8, 8) and torch.allclose(batch[0, :, 0, 0], torch.tensor([160, 95, 7]) / 127.5 - 1)


def test_packing_reduces_without_aliasing(tmp_path):
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    (tmp_path / "set" / "ada").mkdir(parents=True)
    Image.fromarray(stripes).save(tmp_path / "set" / "ada" / "stripes.png")
    packed = pack(People.from_folder(tmp_path / "set"), 16)
    assert (packed.images.float() - 127.5).abs().max() < 12


def test_packed_cache_follows_the_contents(root, tmp_path):
    cache = tmp_path / "cache"
    first = pack(People.from_folder(root), 8, cache_dir=cache)
    (file,) = cache.iterdir()
    stamp = file.stat().st_mtime_ns
    second = pack(People.from_folder(root), 8, cache_dir=cache)
    assert file.stat().st_mtime_ns == stamp and second.names == first.names
    for name in ("images", "person", "landmarks"):
        assert torch.equal(getattr(first, name), getattr(second, name))
    write_photo(root / "eve" / "e.png", 201)
    changed = pack(People.from_folder(root), 8, cache_dir=cache)
    assert changed.images[5, 0, 0, 0] == 201 and len(list(cache.iterdir())) == 2
    file.write_bytes(b"damaged")
    write_photo(root / "eve" / "e.png", 200)
    with pytest.raises(DataError, match="delete the file"):
        pack(People.from_folder(root), 8, cache_dir=cache)


def test_what_cannot_be_packed_is_named(root):
    Image.new("RGB", (16, 12)).save(root / "bob" / "x.png")
    with pytest.raises(DataError, match="x.png' is 16x12"):
        pack(People.from_folder(root), 8)
    (root / "bob" / "x.png").write_bytes(b"")
    with pytest.raises(PhotoError, match="x.png"):
        pack(People.from_folder(root), 8)
    with pytest.raises(DataError, match="no photos to pack"):
        pack(People({}), 8)


def test_who_judges_the_embedded_models_is_not_in_their_training(shared):
    people = load_people(shared / "photos" / "celeba_wild_256", shared / "photos" / "lfw_176")
    parts = split(people, ROOT / "configs" / "people_128.csv")
    assert {part: len(of) for part, of in parts.items()} == {"train": 714, "kept": 60, "val": 25, "test": 30}
    given = split(people, shared / "photos" / "splits.csv")
    assert set(parts["val"]) == set(given["val"])
    assert all(name.startswith("lfw_176/") and len(photos) >= 12 for name, photos in parts["test"].items())


def test_the_shared_collections(shared):
    people = load_people(shared / "photos" / "celeba_wild_256", shared / "photos" / "lfw_176")
    parts = split(people, shared / "photos" / "splits.csv")
    assert len(parts["train"]) == 206 + 598 and len(parts["val"]) == 25
    assert all(photo.landmarks is not None and photo.source_side > 0 for photo in people.photos())
    few = parts["val"].select(list(parts["val"])[:2])
    packed = pack(few, 64)
    assert (packed.landmarks / 64 - torch.tensor(FFHQ_LANDMARKS)).abs().max() < 0.2
