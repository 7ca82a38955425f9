"""Readers of public data sets on small imitations of their layouts, shards, and mining; nothing here asks a network."""

import csv
import os
import pickle
import sys
import tarfile
import types

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from metagpen.cli import app
from metagpen.errors import DataError, PhotoError
from metagpen.faces import FFHQ_LANDMARKS, ffhq_quad
from metagpen.identities import (
    LAYOUTS,
    People,
    Photo,
    StreamedPhotos,
    celeba,
    celeba_hq,
    celeba_split,
    cut_by_landmarks,
    embed_photos,
    ffhq,
    ffhq_split,
    find_photos,
    lfw,
    load_people,
    mine_identities,
    mining_quality,
    pack,
    read_groups,
    read_shards,
    self_episode,
    split,
    validated_threshold,
    write_groups,
    write_shards,
)
from metagpen.identities.mine import group

HEADER = "lefteye_x lefteye_y righteye_x righteye_y nose_x nose_y leftmouth_x leftmouth_y rightmouth_x rightmouth_y"
# CelebA's numbers: three train photos of two people, one of val, one of test.
IDENTITIES = {1: "2880", 2: "2937", 3: "2880", 162_771: "10", 182_638: "11"}
MARKS = [60, 75, 98, 74, 80, 98, 63, 117, 96, 118]


def picture(file, value=0, size=16):
    file.parent.mkdir(parents=True, exist_ok=True)
    side = (size, size) if isinstance(size, int) else size
    Image.new("RGB", side, (value % 256, 255 - value % 256, 7)).save(file)
    return file


def names(people):
    return {name: [photo.path.name for photo in photos] for name, photos in people.items()}


def write_lists(folder, header=True, hq=(1, 3, 2, 162_771, 182_638)):
    """identity_CelebA.txt, the HQ mapping (HQ number = position in `hq`) and the landmarks in the wild."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = ["image identity"] * header + [f"{n:06}.jpg {p}" for n, p in IDENTITIES.items()]
    (folder / "identity_CelebA.txt").write_text("\n".join(rows) + "\n")
    rows = ["idx orig_idx orig_file"] * header + [f"{i:<10} {n - 1:<10} {n:06}.jpg" for i, n in enumerate(hq)]
    (folder / "CelebA-HQ-to-CelebA-mapping.txt").write_text("\n".join(rows) + "\n")
    rows = [str(len(IDENTITIES)), HEADER] if header else []
    rows += [f"{n:06}.jpg  {' '.join(map(str, MARKS))}" for n in IDENTITIES]
    (folder / "list_landmarks_celeba.txt").write_text("\n".join(rows) + "\n")
    return folder


@pytest.fixture
def hq(tmp_path):
    """CelebA-HQ of five photos, the lists beside them."""
    for i in range(5):
        picture(tmp_path / "hq" / f"{i}.jpg", 40 * i)
    write_lists(tmp_path / "hq")
    (tmp_path / "hq" / "list_landmarks_celeba.txt").unlink()
    return tmp_path / "hq"


@pytest.fixture
def wild(tmp_path):
    """CelebA in the wild as published: Img/img_celeba and Anno."""
    for n in IDENTITIES:
        picture(tmp_path / "celeba" / "Img" / "img_celeba" / f"{n:06}.jpg", n, (160, 200))
    write_lists(tmp_path / "celeba" / "Anno")
    return tmp_path / "celeba"


# --- CelebA-HQ -----------------------------------------------------------------------------------------------------

HQ_PEOPLE = {"10": ["3"], "11": ["4"], "2880": ["0", "1"], "2937": ["2"]}


@pytest.mark.parametrize("header", [True, False])
@pytest.mark.parametrize("name", ["{}.jpg", "{:05}.png", "imgHQ{:05}.png", "CelebA-HQ-img/{}.jpg",
                                  "CelebAMask-HQ/CelebA-HQ-img/{}.jpg", "train/female/{:06}.jpg"])
def test_layouts_of_celeba_hq(tmp_path, name, header):
    for i in range(5):
        picture(tmp_path / name.format(i))
    picture(tmp_path / "CelebAMask-HQ-mask-anno" / "0" / "00000_hair.png")
    write_lists(tmp_path, header)
    people = celeba_hq(tmp_path)
    found = {person: [str(int(photo.path.stem.removeprefix("imgHQ"))) for photo in photos]
             for person, photos in people.items()}
    assert found == HQ_PEOPLE
    assert people.set_name == "celeba_hq"


def test_masks_beside_the_photos_are_not_taken_for_photos(tmp_path):
    for i in range(5):
        picture(tmp_path / "CelebA-HQ-img" / f"{i}.jpg")
        picture(tmp_path / "mask" / f"{i}.png")
    write_lists(tmp_path)
    assert all(photo.path.suffix == ".jpg" for photo in celeba_hq(tmp_path).photos())


def test_lists_may_lie_elsewhere(hq, tmp_path):
    for name in ("identity_CelebA.txt", "CelebA-HQ-to-CelebA-mapping.txt"):
        (tmp_path / "lists").mkdir(exist_ok=True)
        (hq / name).rename(tmp_path / "lists" / name)
    with pytest.raises(DataError, match="CelebA-HQ-to-CelebA-mapping.txt' is in none of"):
        celeba_hq(hq)
    assert list(celeba_hq(hq, tmp_path / "lists")) == list(HQ_PEOPLE)


def test_celeba_hq_knows_native_sides_from_the_wild_landmarks(hq):
    assert all(photo.source_side is None for photo in celeba_hq(hq).photos())
    write_lists(hq / "Anno")
    quad = ffhq_quad(np.array(MARKS).reshape(5, 2) + 0.5)
    expected = float(np.hypot(*(quad[3] - quad[0])))
    people = celeba_hq(hq)
    assert [photo.source_side for photo in people.photos()] == pytest.approx([expected] * 5)
    assert len(people.min_source_side(expected - 1)) == 4 and len(people.min_source_side(expected + 1)) == 0


def test_celeba_hq_that_is_not_complete(hq):
    (hq / "2.jpg").unlink()
    with pytest.raises(DataError, match=r"1 listed photos are not below .*hq', number 2"):
        celeba_hq(hq)
    assert "2937" not in celeba_hq(hq, strict=False)


def test_photos_under_other_numbers(hq):
    picture(hq / "119614.jpg")
    with pytest.raises(DataError, match=r"119614.jpg' is not in CelebA-HQ-to-CelebA.*celeba\(\)"):
        celeba_hq(hq)


def test_two_copies_of_celeba_hq_in_one_folder(hq):
    picture(hq / "small" / "00003.png")
    with pytest.raises(DataError, match="same number"):
        celeba_hq(hq)


@pytest.mark.parametrize("name, line, said", [
    ("identity_CelebA.txt", "000001.jpg 7", "line 7: '000001.jpg' is listed twice"),
    ("identity_CelebA.txt", "000004.jpg", "line 7: '000004.jpg' is not a row of 2 values"),
    ("identity_CelebA.txt", "000004.jpg seven", "line 7: '000004.jpg seven' is not a row"),
    ("identity_CelebA.txt", "portrait.jpg 7", "line 7: 'portrait.jpg' is not the name"),
    ("identity_CelebA.txt", "202600.jpg 7", "line 7: CelebA has no photo '202600.jpg'"),
    ("CelebA-HQ-to-CelebA-mapping.txt", "5 8 000008.jpg", "line 7: '5 8 000008.jpg' contradicts"),
    ("CelebA-HQ-to-CelebA-mapping.txt", "4 8 000009.jpg", "line 7: '4 8 000009.jpg' contradicts"),
])
def test_damaged_lists(hq, name, line, said):
    with open(hq / name, "a") as stream:
        stream.write(line + "\n")
    with pytest.raises(DataError, match=said) as error:
        celeba_hq(hq)
    assert name in str(error.value)


def test_a_list_that_does_not_know_somebody(hq):
    rows = (hq / "identity_CelebA.txt").read_text().splitlines()
    (hq / "identity_CelebA.txt").write_text("\n".join(rows[:-1]))
    with pytest.raises(DataError, match=r"who is on .*4.jpg' .*182638.jpg"):
        celeba_hq(hq)
    (hq / "identity_CelebA.txt").write_text("image identity\n")
    with pytest.raises(DataError, match="lists nothing"):
        celeba_hq(hq)


def test_celeba_official_split(hq):
    people = celeba_hq(hq)
    parts = celeba_split(people, hq / "identity_CelebA.txt")
    assert {part: list(members) for part, members in parts.items()} == {
        "train": ["2880", "2937"], "val": ["10"], "test": ["11"]}
    assert list(celeba_split(people.select(["10"]), hq / "identity_CelebA.txt")) == ["val"]
    with pytest.raises(DataError, match="does not know 'ada'"):
        celeba_split(People({"ada": []}), hq / "identity_CelebA.txt")
    with open(hq / "identity_CelebA.txt", "a") as stream:
        stream.write("162772.jpg 2880\n")
    with pytest.raises(DataError, match="person 2880 has photos in train and in val"):
        celeba_split(people, hq / "identity_CelebA.txt")


def test_counts_of_the_real_lists(tmp_path, shared):
    """The 30,000 photos need not be pictures to be counted."""
    if not (shared / "lists").is_dir():
        pytest.skip("the lists of CelebA-HQ are not in the shared data")
    for i in range(30_000):
        os.close(os.open(tmp_path / f"{i}.jpg", os.O_CREAT))
    people = celeba_hq(tmp_path, shared / "lists")
    assert len(people) == 6217 and sum(map(len, people.values())) == 30_000
    assert [len(people.min_photos(count)) for count in (5, 8, 12)] == [2398, 1346, 590]
    parts = celeba_split(people, shared / "lists" / "identity_CelebA.txt")
    assert {part: len(members) for part, members in parts.items()} == {"train": 5009, "val": 604, "test": 604}


# --- CelebA in the wild --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("header", [True, False])
def test_celeba_in_the_wild(wild, header):
    write_lists(wild / "Anno", header)
    people = celeba(wild)
    assert names(people) == {"10": ["162771.jpg"], "11": ["182638.jpg"], "2880": ["000001.jpg", "000003.jpg"],
                             "2937": ["000002.jpg"]}
    photo = people["10"][0]
    assert photo.landmarks.tolist() == (np.array(MARKS).reshape(5, 2) + 0.5).tolist()
    quad = ffhq_quad(photo.landmarks)
    assert photo.source_side == pytest.approx(np.hypot(*(quad[3] - quad[0])))
    assert len(celeba_split(people, wild / "Anno" / "identity_CelebA.txt")["train"]) == 2


def test_celeba_aligned_version(wild):
    (wild / "Img" / "img_celeba").rename(wild / "img_align_celeba")
    with pytest.raises(DataError, match="list_landmarks_align_celeba.txt' is in none of"):
        celeba(wild, aligned=True)
    (wild / "Anno" / "list_landmarks_celeba.txt").rename(wild / "Anno" / "list_landmarks_align_celeba.txt")
    people = celeba(wild, aligned=True)
    assert people.set_name == "celeba_aligned" and people["10"][0].path.parent.name == "img_align_celeba"


def test_celeba_landmarks_that_are_missing_or_damaged(wild):
    file = wild / "Anno" / "list_landmarks_celeba.txt"
    rows = file.read_text().splitlines()
    file.write_text("\n".join(rows[:-1]))
    with pytest.raises(DataError, match="no landmarks for .*182638.jpg"):
        celeba(wild)
    file.write_text("\n".join([*rows[:-1], rows[-1].replace(" 98 ", " left ", 1)]))
    with pytest.raises(DataError, match="line 7: a landmark of '182638.jpg' is not a whole number"):
        celeba(wild)


def test_wild_photos_are_not_packed_but_cut_into_shards(wild, tmp_path):
    people = celeba(wild)
    with pytest.raises(DataError, match="160x200; only aligned"):
        pack(people, 32)
    with pytest.raises(DataError, match="160x200, not an aligned.*cut_by_landmarks"):
        write_shards(people, tmp_path / "shards", 32)
    assert not list(tmp_path.glob("shards*"))
    shards = write_shards(people, tmp_path / "shards", 32, crop=cut_by_landmarks)
    packed = pack(shards, 32)
    assert packed.images.shape == (5, 3, 32, 32) and packed.names == list(people)
    assert (packed.landmarks / 32 - torch.tensor(FFHQ_LANDMARKS)).abs().max() < 0.1
    assert packed.source_side.tolist() == pytest.approx([photo.source_side for photo in people.photos()], abs=0.01)


# --- FFHQ and LFW --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["{:05}.png", "00000/{:05}.png", "images1024x1024/00000/{:05}.png"])
def test_ffhq(tmp_path, name):
    for i in (0, 1, 59_999, 60_000):
        picture(tmp_path / name.format(i), i)
        if "images" in name:
            picture(tmp_path / "thumbnails128x128" / f"{i:05}.png", i)
    people = ffhq(tmp_path)
    assert names(people) == {f"{i:05}": [f"{i:05}.png"] for i in (0, 1, 59_999, 60_000)}
    assert "thumbnails128x128" not in str(people["00000"][0].path)
    parts = ffhq_split(people)
    assert list(parts["train"]) == ["00000", "00001", "59999"] and list(parts["val"]) == ["60000"]


def test_a_photo_alone_is_an_episode(tmp_path):
    people = People({f"{i:05}": [Photo(tmp_path / f"{i:05}.png")] for i in range(9)})
    drawn = [self_episode(people, torch.Generator().manual_seed(seed)) for seed in range(20)]
    assert all(one.support == one.query == list(people[one.person]) for one in drawn)
    assert len({one.person for one in drawn}) > 4
    assert drawn[3] == self_episode(people, torch.Generator().manual_seed(3))
    with pytest.raises(DataError, match="empty"):
        self_episode(People({}), torch.Generator())


def test_ffhq_with_mined_identities(tmp_path):
    for i in (0, 1, 2, 60_000, 60_001):
        picture(tmp_path / "ffhq" / f"{i:05}.png", i)
    file = tmp_path / "mined.csv"
    with open(file, "w", newline="") as stream:
        csv.writer(stream).writerows([["file", "id"], ["00002.png", "a"], ["60000.png", "a"], ["60001.png", "b"]])
    people = ffhq(tmp_path / "ffhq", file)
    assert names(people) == {"a": ["00002.png", "60000.png"], "b": ["60001.png"]}
    assert {part: names(members) for part, members in ffhq_split(people).items()} == {
        "train": {"a": ["00002.png"]}, "val": {"b": ["60001.png"]}}


def test_groups_in_a_file(tmp_path):
    photos = [Photo(picture(tmp_path / "any" / name)) for name in ("b/1.png", "a.png", "b/2.png")]
    people = People({"ada": photos[:2], "bob": photos[2:]})
    write_groups(people, tmp_path / "any", tmp_path / "any" / "identities.csv")
    again = load_people(tmp_path / "any", layout="grouped")
    assert names(again) == {"ada": ["a.png", "1.png"], "bob": ["2.png"]} and again.set_name == "any"
    with pytest.raises(DataError, match="does not lie below"):
        write_groups(people, tmp_path / "any" / "b", tmp_path / "x.csv")
    with pytest.raises(DataError, match="nobody to write down"):
        write_groups(People({}), tmp_path, tmp_path / "x.csv")
    for row, said in (("a.png,bob", "row 5: 'a.png' has no id or is listed twice"),
                      ("c.png,bob", "row 5: 'c.png' does not exist"), ("c.png,", "row 5: 'c.png' has no id")):
        (tmp_path / "x.csv").write_text((tmp_path / "any" / "identities.csv").read_text() + row + "\n")
        with pytest.raises(DataError, match=said):
            read_groups(tmp_path / "any", tmp_path / "x.csv")


def fake_sklearn(monkeypatch, home, fetch):
    module = types.ModuleType("sklearn.datasets")
    module.get_data_home, module.fetch_lfw_people = lambda: str(home), fetch
    monkeypatch.setitem(sys.modules, "sklearn", types.ModuleType("sklearn"))
    monkeypatch.setitem(sys.modules, "sklearn.datasets", module)


def test_lfw_from_a_folder(tmp_path):
    picture(tmp_path / "lfw_funneled" / "Ada_L" / "Ada_L_0001.jpg")
    people = lfw(tmp_path / "lfw_funneled")
    assert people.set_name == "lfw" and names(people) == {"Ada_L": ["Ada_L_0001.jpg"]}


@pytest.mark.parametrize("funneled, folder", [(True, "lfw_funneled"), (False, "lfw")])
def test_lfw_through_scikit_learn(tmp_path, monkeypatch, funneled, folder):
    asked = []

    def fetch(**options):
        asked.append(options)
        picture(tmp_path / "lfw_home" / folder / "Ada_L" / "Ada_L_0001.jpg")

    fake_sklearn(monkeypatch, tmp_path, fetch)
    assert list(lfw(funneled=funneled, download=False)) == ["Ada_L"]
    assert list(lfw(funneled=funneled)) == ["Ada_L"]
    assert len(asked) == 1, "the second reading finds the cache"
    assert asked[0]["funneled"] is funneled and asked[0]["download_if_missing"] is False


def test_lfw_that_cannot_be_had(tmp_path, monkeypatch):
    def fetch(**options):
        raise OSError("no route to host")

    fake_sklearn(monkeypatch, tmp_path, fetch)
    with pytest.raises(DataError, match="no route to host.*give the folder"):
        lfw()
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(DataError, match="pip install scikit-learn"):
        lfw()


def test_every_set_is_a_layout(hq):
    assert {"folder", "celeba", "celeba_hq", "ffhq", "lfw", "grouped", "shards"} <= set(LAYOUTS)
    assert names(load_people(hq, layout="celeba_hq")) == names(celeba_hq(hq))


# --- shards --------------------------------------------------------------------------------------------------------

@pytest.fixture
def people(tmp_path):
    """ada: 3 photos, bob: 2, in several formats; smooth, so that JPEG keeps them; landmarks for some."""
    ramp = np.linspace(0, 255, 32)
    made = {}
    for value, name in enumerate(["ada/1.png", "ada/2.png", "ada/3.webp", "bob/1.png", "bob/z.png"]):
        pixels = np.stack(np.broadcast_arrays(ramp[:, None], ramp[None], 50.0 * value), -1)
        file = tmp_path / "set" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.astype(np.uint8)).save(file)
        known = (FFHQ_LANDMARKS * 32 + value, 100.0 + value) if value % 2 else ()
        made.setdefault(name.split("/")[0], []).append(Photo(file, *known))
    return People(made, "set")


def test_shards_hold_what_the_folder_held(people, tmp_path):
    shards = write_shards(people, tmp_path / "out" / "shards", 16, workers=2)
    assert names(shards) == {"ada": ["1.jpg", "2.jpg", "3.jpg"], "bob": ["1.jpg", "z.jpg"]}
    before, after = pack(people, 16), pack(shards, 16)
    difference = (before.images.int() - after.images.int()).abs()
    assert difference.max() <= 12 and difference.float().mean() < 1.5  # what JPEG takes; the people differ by 50
    assert after.names == before.names and torch.equal(after.person, before.person)
    assert torch.allclose(after.landmarks, before.landmarks, atol=1e-3)
    assert torch.equal(after.source_side.nan_to_num(), before.source_side.nan_to_num())
    assert [p.landmarks is None for p in shards.photos()] == [p.landmarks is None for p in people.photos()]
    assert names(load_people(tmp_path / "out" / "shards", layout="shards")) == names(shards)


def test_shards_are_people(people, tmp_path):
    shards = write_shards(people, tmp_path / "shards", 16)
    parts = split(shards, fractions={"train": 0.5, "val": 0.5})
    assert {len(part) for part in parts.values()} == {1}
    assert len({photo.sha256 for photo in shards.photos()}) == 5
    cached = [pack(shards, 16, cache_dir=tmp_path / "cache") for _ in range(2)]
    assert torch.equal(cached[0].images, cached[1].images) and len(list((tmp_path / "cache").iterdir())) == 1


def test_unpacked_shards_are_a_folder_of_people(people, tmp_path):
    shards = write_shards(people, tmp_path / "shards", 16, shard_mb=0.0005)
    tars = sorted((tmp_path / "shards").glob("*.tar"))
    assert len(tars) > 1, "a shard ends when it is full"
    for tar in tars:
        with tarfile.open(tar) as archive:
            archive.extractall(tmp_path / "shards", filter="data")
    unpacked = People.from_folder(tmp_path / "shards")
    assert names(unpacked) == names(shards)
    for one, other in zip(unpacked.photos(), shards.photos()):
        assert one.sha256 == other.sha256 and one.path == other.path and one.source_side == other.source_side


def test_shards_are_the_same_for_the_same_photos(people, tmp_path):
    for name, workers in (("one", 1), ("two", 3)):
        write_shards(people, tmp_path / name, 16, workers=workers)
    for file in ("shard_000.tar", "manifest.csv"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_shards_of_merged_collections(people, tmp_path):
    both = People.merge(people, People({"ada": people["ada"][:1]}, "other"))
    shards = write_shards(both, tmp_path / "shards", 16)
    assert list(shards) == ["other/ada", "set/ada", "set/bob"]


def test_a_folder_of_shards_appears_whole_or_not_at_all(people, tmp_path):
    (tmp_path / "set" / "bob" / "z.png").write_bytes(b"no picture")
    with pytest.raises(PhotoError, match="z.png"):
        write_shards(people, tmp_path / "shards", 16)
    assert not list(tmp_path.glob("shards*"))
    told = []
    shards = write_shards(people, tmp_path / "shards", 16, on_error=lambda photo, error: told.append(photo.path.name))
    assert told == ["z.png"] and len(shards["bob"]) == 1
    with pytest.raises(DataError, match="exists already"):
        write_shards(people, tmp_path / "shards", 16)


def test_photos_that_would_share_a_name(people, tmp_path):
    twin = Photo(picture(tmp_path / "set" / "ada" / "1.bmp"))
    with pytest.raises(DataError, match="'ada/1.jpg'"):
        write_shards(People({"ada": [*people["ada"], twin]}), tmp_path / "shards", 16)
    with pytest.raises(DataError, match="no photos"):
        write_shards(People({}), tmp_path / "shards", 16)


def test_shards_that_are_damaged(people, tmp_path):
    shards = write_shards(people, tmp_path / "shards", 16)
    tar = tmp_path / "shards" / "shard_000.tar"
    whole = tar.read_bytes()
    tar.write_bytes(bytes(len(whole)))
    with pytest.raises(PhotoError, match="'1.jpg' in .*shard_000.tar"):
        shards["ada"][0].load()
    tar.write_bytes(whole[:2000])
    with pytest.raises(DataError, match=r"manifest.csv, row \d: .*shard_000.tar' is cut short"):
        read_shards(tmp_path / "shards")
    tar.unlink()
    with pytest.raises(DataError, match="row 2: .*shard_000.tar' does not exist"):
        read_shards(tmp_path / "shards")
    (tmp_path / "shards" / "manifest.csv").unlink()
    with pytest.raises(DataError, match="manifest.csv"):
        read_shards(tmp_path / "shards")


def test_streamed_photos_equal_packed_ones(people, tmp_path):
    shards = write_shards(people, tmp_path / "shards", 32)
    packed, index = pack(shards, 16), torch.tensor([4, 0, 2])
    for workers in (1, 3):
        streamed = pickle.loads(pickle.dumps(StreamedPhotos(shards, 16, workers)))  # as a spawned worker gets it
        assert torch.equal(streamed.batch(index), packed.batch(index))
        assert len(streamed) == 5 and streamed.names == packed.names and streamed.size == packed.size
        for name in ("person", "landmarks", "source_side"):
            assert torch.equal(getattr(streamed, name).nan_to_num(), getattr(packed, name).nan_to_num())


def test_streaming_what_is_no_crop(tmp_path):
    marked = Photo(picture(tmp_path / "wide.png", size=(20, 16)), FFHQ_LANDMARKS * 16)
    with pytest.raises(DataError, match="20x16"):
        StreamedPhotos(People({"ada": [marked]}), 16)
    with pytest.raises(PhotoError, match="gone.png"):
        StreamedPhotos(People({"ada": [Photo(tmp_path / "gone.png", FFHQ_LANDMARKS)]}), 16)
    with pytest.raises(DataError, match="no photos"):
        StreamedPhotos(People({}), 16)


# --- mining --------------------------------------------------------------------------------------------------------

def noisy_people(count=6, photos=4, dim=32, noise=0.09):
    """Unit embeddings around one direction per person, shuffled; and who is who."""
    generator = torch.Generator().manual_seed(0)
    who = torch.arange(count).repeat_interleave(photos)[torch.randperm(count * photos, generator=generator)]
    centres = torch.nn.functional.normalize(torch.randn(count, dim, generator=generator), dim=1)
    vectors = centres[who] + noise * torch.randn(len(who), dim, generator=generator)
    return torch.nn.functional.normalize(vectors, dim=1), who


def test_groups_are_the_people():
    embeddings, who = noisy_people()
    labels = torch.from_numpy(group(embeddings, 0.6))
    assert torch.equal(labels[:, None] == labels, who[:, None] == who)
    firsts = [labels.tolist().index(label) for label in range(6)]
    assert firsts == sorted(firsts), "groups are numbered as they appear"


def test_groups_equal_average_linkage_of_everything():
    """Treating chains apart is exact: the same as scipy's average linkage of all photos at once."""
    from scipy.cluster.hierarchy import fcluster, linkage
    from scipy.spatial.distance import pdist

    embeddings, _ = noisy_people(count=12, photos=5, noise=0.2)
    for threshold in (0.3, 0.45, 0.6):
        whole = fcluster(linkage(pdist(embeddings.double(), "cosine"), "average"), 1 - threshold, "distance")
        labels = group(embeddings, threshold)
        assert (labels[:, None] == labels).tolist() == (whole[:, None] == whole).tolist()
        assert 1 < len(set(labels.tolist())) < 60, "neither everything nor nothing is one group"
        firsts = [labels.tolist().index(label) for label in range(labels.max() + 1)]
        assert firsts == sorted(firsts), "groups are numbered as they appear, within chains too"


def test_grouping_does_not_depend_on_the_rows_at_once(monkeypatch):
    embeddings, _ = noisy_people(noise=0.2)
    before = group(embeddings, 0.4)
    monkeypatch.setattr("metagpen.identities.mine.ROWS_AT_ONCE", 5)
    assert group(embeddings, 0.4).tolist() == before.tolist()


def test_thresholds_that_cannot_be(monkeypatch):
    embeddings, _ = noisy_people()
    for threshold in (0.0, 1.0, -0.3):
        with pytest.raises(DataError, match="between 0 and 1"):
            group(embeddings, threshold)
    monkeypatch.setattr("metagpen.identities.mine.LARGEST_CHAIN", 3)
    with pytest.raises(DataError, match="chains 4 of 24"):
        group(embeddings, 0.6)
    monkeypatch.setattr("metagpen.identities.mine.MOST_PAIRS", 3)
    with pytest.raises(DataError, match="more than 3 pairs"):
        group(embeddings, 0.6)


def test_thresholds_hold_for_what_they_were_validated_on():
    assert 0 < validated_threshold("embedded", 1000) < 1
    with pytest.raises(DataError, match="validated for 1000 photos, not for 70000"):
        validated_threshold("embedded", 70_000)
    with pytest.raises(DataError, match="no threshold was validated for the recogniser 'mine.onnx'"):
        validated_threshold("mine.onnx", 10)


def test_quality_of_mining():
    # Cosines: 0 and 1 alike, 2 and 3 alike, others not; 3 is somebody else.
    embeddings = torch.eye(3)[[0, 0, 1, 1, 2]]
    quality = mining_quality(embeddings, ["ada", "ada", "bob", "eve", "ada"], 0.5)
    assert quality == {"precision": 0.5, "recall": pytest.approx(1 / 3), "pairs": 2, "wrong": 1, "groups": 2}
    nothing = mining_quality(torch.eye(3), ["ada", "bob", "eve"], 0.5)
    assert nothing["pairs"] == 0 and np.isnan(nothing["precision"]) and np.isnan(nothing["recall"])


def mean_colour(crops, landmarks):
    """An embedding that tells colours apart; checks what mining hands over."""
    assert crops.shape[1:] == (3, 16, 16) and landmarks.shape == (len(crops), 5, 2)
    assert crops.min() >= -1 and crops.max() <= 1
    return crops.mean((2, 3))


def test_mining_groups_photos(tmp_path):
    for i, value in enumerate([250, 5, 245, 10, 130]):
        picture(tmp_path / f"{i}.png", value)
    photos = [Photo(path) for path in find_photos(tmp_path)]
    people = mine_identities(photos, mean_colour, 0.95, size=16, batch=2)
    assert names(people) == {"mined_000000": ["0.png", "2.png"], "mined_000001": ["1.png", "3.png"],
                             "mined_000004": ["4.png"]}
    assert list(people.min_photos(2)) == ["mined_000000", "mined_000001"]
    embeddings = embed_photos(photos, mean_colour, size=16, batch=3)
    assert embeddings.shape == (5, 3) and torch.allclose(embeddings.norm(dim=1), torch.ones(5))


@pytest.mark.parametrize("threshold", [0, 1, 2, -5, float("nan")])
def test_a_threshold_that_is_none_is_refused_before_anything_is_embedded(tmp_path, threshold):
    with pytest.raises(DataError, match="a cosine between 0 and 1"):
        mine_identities([Photo(tmp_path / "missing.png")], mean_colour, threshold)


def test_the_command(tmp_path, tiny_recogniser, monkeypatch):
    monkeypatch.setattr("metagpen.recognise.load", lambda name, device: tiny_recogniser)
    for i, value in enumerate([250, 5, 250, 5]):
        picture(tmp_path / "faces" / "deep" / f"{i}.png", value)
    runner = CliRunner()
    arguments = ["mine-identities", str(tmp_path / "faces"), "-o", str(tmp_path / "out" / "mined.csv")]
    found = runner.invoke(app, [*arguments, "--threshold", "0.999", "--device", "cpu"])
    assert found.exit_code == 0, found.output
    assert "2 people with 2 photos or more (4 of 4)" in found.stdout
    people = read_groups(tmp_path / "faces", tmp_path / "out" / "mined.csv")
    assert names(people) == {"mined_000000": ["0.png", "2.png"], "mined_000001": ["1.png", "3.png"]}
    refused = runner.invoke(app, [*arguments, "--recogniser", "other.pth"])
    assert refused.exit_code == 2 and "no threshold was validated" in refused.stderr


def test_precision_of_the_default_threshold(shared):
    """On the people whom no training saw: what docs/datasets.md says, within what other arithmetic may change."""
    from metagpen import recognise

    known = People.from_folder(shared / "photos" / "celeba_wild_256")
    val = split(known, shared / "photos" / "splits.csv", strict=False)["val"]
    some = People({name: photos[:6] for name, photos in val.items()})
    embeddings = embed_photos(list(some.photos()), recognise.load().embed)
    who = [name for name, photos in some.items() for _ in photos]
    quality = mining_quality(embeddings, who, validated_threshold("embedded", len(who)))
    assert quality["precision"] >= 0.99 and quality["recall"] > 0.2
