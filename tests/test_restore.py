"""Whole photos: who is matched, what is pasted where, what of a file is kept, and the null space."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from PIL import Image, ImageCms, TiffImagePlugin
from test_cli import error_line, run

import metagpen
from metagpen.errors import CheckpointError, ConfigError, DataError, PhotoError
from metagpen.evaluate import methods
from metagpen.faces import (
    FFHQ_LANDMARKS,
    AlignedFace,
    Face,
    crop_face,
    load_photo,
    load_with_extras,
    save_photo,
    to_pil,
    to_tensor,
    with_extras,
)
from metagpen.person import AdapterSpec, Person, PersonStore, new_parameters
from metagpen.restore import FaceWarning, Gallery, null_space, paste, restore_photo, sweep
from metagpen.restore.matching import SAME_PERSON, assign
from metagpen.restore.null_space import default_side, enlarge, reduce
from metagpen.restore.paste import agree_in_colour, paste_faces, soft_masks

ALBUM = REPOSITORY / "metagpen" / "weights" / "album"
PLACES = {"ada": (10, 20, 200), "bob": (230, 60, 180), "eve": (430, 5, 210)}


def crop(path, size=128):
    return to_tensor(load_photo(path).resize((size, size), Image.Resampling.LANCZOS))


def group_photo(faces, places=None, size=(650, 260)):
    """Faces {name: path} on grey; places {name: (x, y, side)}."""
    canvas = Image.new("RGB", size, (120, 125, 130))
    for name, (x, y, side) in (places or PLACES).items():
        canvas.paste(load_photo(faces[name]).resize((side, side), Image.Resampling.LANCZOS), (x, y))
    return canvas


def person_at(found, places):
    """{name: the person that was found at its place}."""
    middles = [(face, (face.box[:2] + face.box[2:]) / 2) for face in found]
    return {name: [face.person for face, (x, y) in middles if left < x < left + side and top < y < top + side]
            for name, (left, top, side) in places.items()}


@pytest.fixture(scope="module")
def model():
    return metagpen.load()


@pytest.fixture(scope="module")
def people(model):
    """The people of the embedded album, each by the start alone, from four photos."""
    photos = {name: torch.stack([crop(ALBUM / name / f"{i}.jpg") for i in (1, 2, 3, 4)]) for name in PLACES}
    return dict(metagpen.adapt_many(model, photos, steps=0))


@pytest.fixture(scope="module")
def group():
    return group_photo({name: ALBUM / name / "6.jpg" for name in PLACES})


def somebody(model, seed, template=True):
    generator = torch.Generator().manual_seed(seed)
    parameters = {name: value + 0.3 * torch.randn(value.shape, generator=generator)
                  for name, value in new_parameters(model.gpen, AdapterSpec(1, 2), 1, generator).items()}
    vector = torch.nn.functional.normalize(torch.randn(8, generator=generator), dim=0) if template else None
    return Person(model, AdapterSpec(1, 2), parameters, {"shots": 1, "recogniser": "tests"}, vector)


def smooth_photo(width=160, height=120, seed=0):
    rough = torch.rand(1, 3, 4, 5, generator=torch.Generator().manual_seed(seed))
    fine = torch.nn.functional.interpolate(rough, (height, width), mode="bilinear")[0]
    return Image.fromarray((fine * 255).permute(1, 2, 0).numpy().astype(np.uint8))


@pytest.fixture
def faces_at(monkeypatch):
    """Makes the detector find faces whose crops begin at (x, y) and have a side."""
    def answer(*squares):
        faces = [Face(np.array([x, y, x + side, y + side], float), FFHQ_LANDMARKS * side + [x, y], 0.99)
                 for x, y, side in squares]
        monkeypatch.setattr("metagpen.restore.photo.detect", lambda picture, device, degraded: faces)

    return answer


# --- null space ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("size, side", [(128, 16), (128, 20), (64, 1), (16, 16)])
def test_reducing_undoes_enlarging(size, side):
    small = torch.randn(2, 3, side, side, dtype=torch.float64)
    torch.testing.assert_close(reduce(enlarge(small, size), side), small, rtol=0, atol=1e-12)
    image = torch.randn(1, 3, size, size, dtype=torch.float64)
    projected = enlarge(reduce(image, side), size)
    torch.testing.assert_close(enlarge(reduce(projected, side), size), projected)  # a projection,
    assert ((image - projected) * projected).sum().abs() < 1e-9 * image.square().sum()  # and an orthogonal one


def test_reducing_is_a_low_pass():
    x = torch.arange(128) / 128 * 2 * torch.pi
    slow, fast = torch.sin(2 * x).expand(1, 3, 128, 128), torch.sin(40 * x).expand(1, 3, 128, 128)
    assert reduce(fast).abs().max() < 0.1 and reduce(slow).abs().max() > 0.9


def test_seen_from_afar_the_result_is_the_generic_one():
    generic, personal = torch.rand(2, 4, 3, 64, 64, dtype=torch.float64) * 2 - 1
    joined = null_space(generic, personal)
    torch.testing.assert_close(reduce(joined, 8), reduce(generic, 8), rtol=0, atol=1e-12)  # an eighth of 64
    detail = personal - enlarge(reduce(personal, 8), 64)
    torch.testing.assert_close(joined - enlarge(reduce(joined, 8), 64), detail, rtol=0, atol=1e-12)
    assert [default_side(size) for size in (4, 64, 128, 512)] == [1, 8, 16, 16]
    torch.testing.assert_close(null_space(generic, personal, side=64), generic)
    with pytest.raises(ConfigError, match="side = 65"):
        null_space(generic, personal, side=65)
    with pytest.raises(ConfigError, match="equal batches"):
        null_space(generic, personal[:2])


def test_null_space_of_a_person(tiny_model):
    person, face = somebody(tiny_model, 1, template=False), smooth_photo(16, 16)
    images = to_tensor(face)[None]
    expected = null_space(tiny_model.restore(images), person.restore_batch(images)).clamp(-1, 1)
    with pytest.warns(FaceWarning, match="not checked"):
        joined, plain = (person.restore(face, aligned=True, null_space=wanted) for wanted in (True, False))
    assert np.abs(np.asarray(joined, int) - np.asarray(to_pil(expected[0]), int)).max() <= 1
    assert not np.array_equal(np.asarray(joined), np.asarray(plain))
    generic = Person.generic(tiny_model).restore(face, aligned=True, null_space=True)
    assert np.array_equal(np.asarray(generic), np.asarray(to_pil(tiny_model.restore(images)[0])))


def test_the_method_of_the_curve_is_adapt_in_the_null_space(tiny_model, tiny_recogniser, monkeypatch):
    from metagpen.adaptation import AdaptConfig
    from metagpen.adaptation.draws import album

    monkeypatch.setattr(methods, "null_space", lambda generic, personal: null_space(generic, personal, side=4))
    photos = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    lesson = methods.Lesson(tiny_model, album(photos, 16), AdaptConfig(tail_blocks=1), methods.Rivals(),
                            tiny_recogniser)
    with torch.no_grad():
        joined, adapted = (next(methods.checkpoints(methods.METHODS[name], lesson, [0], "constant")).restore(photos)
                           for name in ("null-space", "adapt"))
    expected = null_space(tiny_model.restore(photos), adapted, side=4).clamp(-1, 1)
    assert torch.equal(joined, expected) and not torch.equal(joined, adapted)


# --- who is who ----------------------------------------------------------------------------------------------------

def test_people_are_shared_out_one_to_one():
    high = SAME_PERSON + 0.2
    cosines = torch.tensor([[high, high - 0.05, 0.0], [high + 0.1, 0.0, 0.0], [0.1, 0.2, SAME_PERSON - 0.01]])
    assert assign(cosines) == [1, 0, None], "the second face is the first person's, so the first face is the second's"
    assert assign(cosines, once=False) == [0, 0, None]
    assert assign(torch.zeros(2, 3)) == [None, None] and assign(torch.zeros(2, 0)) == [None, None]
    crowd = torch.zeros(1, 5000)
    crowd[0, 4321] = high
    assert assign(crowd) == [4321]


def test_a_person_has_a_template_and_its_file_too(tiny_model, tiny_recogniser, tmp_path):
    photos = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    person = metagpen.adapt(tiny_model, photos, steps=1, recogniser=tiny_recogniser)
    mean = tiny_recogniser.embed(photos, torch.tensor(FFHQ_LANDMARKS * 16).float().expand(3, -1, -1)).mean(0)
    assert torch.allclose(person.template, mean / mean.norm(), atol=1e-3)
    again = Person.load(person.save(tmp_path / "ada"), tiny_model)
    assert torch.equal(again.template, person.template) and set(again.parameters) == set(person.parameters)
    assert torch.equal(person.compress(tail_rank=1).template, person.template)
    person.template = None  # as files of earlier versions
    assert Person.load(person.save(tmp_path / "old"), tiny_model).template is None


def test_people_without_a_template(tiny_model, tiny_recogniser, faces_at):
    old, new = somebody(tiny_model, 1, template=False), somebody(tiny_model, 2)
    with pytest.raises(CheckpointError, match="ada, bob: no template"):
        Gallery({"ada": old, "bob": old}, tiny_model, tiny_recogniser)
    with pytest.warns(FaceWarning, match="ada: no template"):
        assert Gallery({"ada": old, "bob": new}, tiny_model, tiny_recogniser).names == ["bob"]
    faces_at((20, 20, 60))
    with pytest.warns(FaceWarning, match="not checked"):
        assert [f.person for f in restore_photo(tiny_model, smooth_photo(), {"ada": old}).faces] == ["ada"]
    faces_at((20, 20, 60), (90, 30, 40))
    with pytest.warns(FaceWarning, match="largest of 2 faces"):
        assert [f.person for f in restore_photo(tiny_model, smooth_photo(), {"ada": old}).faces] == ["ada", None]


def test_a_damaged_file_of_a_store_leaves_out_one_person(tiny_model, tiny_recogniser, tmp_path, monkeypatch):
    store = PersonStore(tmp_path, tiny_model)
    store.update({name: somebody(tiny_model, seed) for seed, name in enumerate(("ada", "bob", "eve"), start=1)})
    (tmp_path / "ada.safetensors").write_bytes(b"half of a file")
    with pytest.warns(FaceWarning, match="ada: left out; .*ada.safetensors: not a readable"):
        assert Gallery(store, tiny_model, tiny_recogniser).names == ["bob", "eve"]
    listed = list(store)
    del store["eve"]
    monkeypatch.setattr(PersonStore, "__iter__", lambda self: iter(listed))  # as before eve was deleted
    with pytest.warns(FaceWarning, match="ada"):
        gallery = Gallery(store, tiny_model, tiny_recogniser)
    assert gallery.names == ["bob"] and gallery.only is None, "of two people, whose photo it need not be"
    del store["bob"]
    with pytest.raises(CheckpointError, match="ada.safetensors: not a readable"):
        Gallery(store, tiny_model, tiny_recogniser)


def test_each_face_of_a_group_gets_its_own_person(model, people, group):
    result = restore_photo(model, group, people)
    assert person_at(result.faces, PLACES) == {name: [name] for name in PLACES}
    assert all(face.cosine >= SAME_PERSON and face.strength == 1 for face in result.faces)
    # Each is pasted as its own Person alone restores it.
    gallery = Gallery({"bob": people["bob"]}, model)
    alone = restore_photo(model, group, gallery)
    assert person_at(alone.faces, PLACES) == {"ada": [None], "bob": ["bob"], "eve": [None]}
    x, y, side = PLACES["bob"]
    box = (x, y, x + side, y + side)
    assert np.abs(np.asarray(alone.image.crop(box), int) - np.asarray(result.image.crop(box), int)).max() <= 1
    generic = restore_photo(model, group)
    assert [face.person for face in generic.faces] == [None] * 3
    assert np.array_equal(np.asarray(generic.image), np.asarray(restore_photo(model, group, people, strength=0).image))
    # Clear faces need nobody; with the gate open all of them change.
    centre = model.gate.centre.clone()
    try:
        model.gate.centre.fill_(-200.0)
        opened = restore_photo(model, group, people)
    finally:
        model.gate.centre.copy_(centre)
    for x, y, side in PLACES.values():
        box = (x, y, x + side, y + side)
        assert not np.array_equal(np.asarray(opened.image.crop(box)), np.asarray(result.image.crop(box)))


def test_the_only_person_and_the_wrong_face(model, people):
    photo = load_photo(ALBUM / "eve" / "6.jpg")
    with pytest.warns(FaceWarning, match=r"cosine -?\d\.\d\d to 'bob'.*restored as theirs"):
        (face,) = restore_photo(model, photo, {"bob": people["bob"]}, aligned=True).faces
    assert face.person == "bob" and face.cosine < SAME_PERSON
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (face,) = restore_photo(model, photo, people, aligned=True).faces
        assert face.person == "eve"
        assert restore_photo(model, photo, {"eve": people["eve"]}, aligned=True).faces[0].person == "eve"


def test_somebody_twice_in_a_photo(model, people):
    places = {"ada": PLACES["ada"], "eve": PLACES["eve"]}
    photo = group_photo({"ada": ALBUM / "eve" / "5.jpg", "eve": ALBUM / "eve" / "6.jpg"}, places)
    known = {name: people[name] for name in ("bob", "eve")}
    assert [face.person for face in restore_photo(model, photo, known, once=False).faces] == ["eve", "eve"]
    assert sorted(str(face.person) for face in restore_photo(model, photo, known).faces) == ["None", "eve"]
    with pytest.warns(FaceWarning, match="all 2 faces"):
        assert [f.person for f in restore_photo(model, photo, {"bob": people["bob"]}).faces] == [None, None]


def test_each_face_of_a_real_group_gets_its_own_person(model, shared):
    london = shared / "photos" / "london_512"
    names = ["lisa", "london_002", "london_007", "london_010"]
    photos = {name: sorted((london / name).glob("*.jpg")) for name in names}
    known = metagpen.adapt_many(model, {name: [crop(own[0])] for name, own in photos.items()}, steps=0)
    places = {name: (10 + 250 * i, 10 + 15 * i, 230) for i, name in enumerate(names)}
    photo = group_photo({name: own[-1] for name, own in photos.items()}, places, (1020, 320))
    small = photo.resize((340, 107), Image.Resampling.LANCZOS).resize(photo.size, Image.Resampling.BICUBIC)
    del known["london_007"]  # a stranger
    found = person_at(restore_photo(model, small, known).faces, places)
    assert found == {name: [name if name in known else None] for name in names}


# --- pasting back --------------------------------------------------------------------------------------------------

def test_pasting_touches_only_faces_and_leaves_no_seam(tiny_model, faces_at):
    photo = smooth_photo()
    faces_at((20, 20, 60))
    before, after = np.asarray(photo, int), np.asarray(restore_photo(tiny_model, photo).image, int)
    changed = np.abs(after - before).max(axis=2)
    assert changed[40:60, 40:60].max() > 0
    outside = np.ones(changed.shape, bool)
    outside[20:80, 20:80] = False
    assert changed[outside].max() == 0
    rim = np.concatenate([changed[21, 20:80], changed[78, 20:80], changed[20:80, 21], changed[20:80, 78]])
    assert rim.max() < 0.2 * changed.max(), "the first of 58 px that 16 px masks cover is nearly the photo's"


def test_colours_agree_with_the_photo_and_detail_stays():
    seen = torch.zeros(1, 3, 64, 64)
    seen[:, 0] = 0.5
    detail = 0.2 * (-1.0) ** torch.arange(64).expand(1, 3, 64, 64)
    agreed = agree_in_colour(detail - 0.3, seen)
    torch.testing.assert_close(agreed[..., 8:-8, 8:-8], (seen + detail)[..., 8:-8, 8:-8], rtol=0, atol=0.01)
    grey = agree_in_colour(torch.rand(1, 3, 64, 64), seen[:, 1:2].expand(-1, 3, -1, -1))
    assert (grey - grey[:, :1]).abs().max() == 0


def test_neighbours_do_not_cover_each_other():
    photo = smooth_photo(300, 120)
    left, right = (crop_face(photo, FFHQ_LANDMARKS * 100 + [x, 10], 64) for x in (20, 80))
    alone, (first, second) = soft_masks([left])[0], soft_masks([left, right])
    assert alone[32, 32] == 1 and alone[0].max() < 0.01 and alone[:, -1].max() < 0.01
    assert np.array_equal(first[:, :32], alone[:, :32]) and first[32, 60] == 0 < alone[32, 60]
    middle = 32 * (1 + 30 / (left.source_side / 2))  # of the line between the centres, 60 px apart in the photo
    shared = np.interp(middle - 0.5, range(64), first[32]) + np.interp(63.5 - middle, range(64), second[32])
    assert shared == pytest.approx(1, abs=0.02)


def test_faces_far_apart_leave_each_others_masks_as_they_are(monkeypatch):
    """Whom nobody looks at would change nothing, bit for bit."""
    generator = np.random.default_rng(0)
    photo, asked, plain = smooth_photo(400, 200), [], paste.far_apart
    faces = [crop_face(photo, FFHQ_LANDMARKS * side + corner, 32) for side, corner in
             ((generator.uniform(20, 45), generator.uniform(10, (340, 140))) for _ in range(24))]
    monkeypatch.setattr(paste, "far_apart", lambda *given: asked.append(plain(*given)) or asked[-1])
    masks = soft_masks(faces)
    assert len(asked) == 24 * 23 and 0.2 < np.mean(asked) < 0.95
    monkeypatch.setattr(paste, "far_apart", lambda *given: False)
    assert all(np.array_equal(mask, whole) for mask, whole in zip(masks, soft_masks(faces), strict=True))


def test_a_face_can_lie_on_a_larger_background(faces_at, tiny_model):
    photo = smooth_photo()
    faces_at((20, 20, 60))
    plain = restore_photo(tiny_model, photo).image
    large = restore_photo(tiny_model, photo, background=lambda p: p.resize((480, 360), Image.Resampling.BICUBIC)).image
    assert large.size == (480, 360)
    again = np.asarray(large.resize(photo.size, Image.Resampling.LANCZOS), int)
    assert np.abs(again - np.asarray(plain, int)).mean() < 1
    with pytest.raises(PhotoError, match="proportions"):
        restore_photo(tiny_model, photo, background=lambda p: p.resize((480, 120)))
    with pytest.raises(PhotoError, match="PIL image"):
        restore_photo(tiny_model, photo, background=np.asarray)


def test_pasting_unchanged_crops_changes_nothing_much():
    photo = smooth_photo(200, 160)
    face = crop_face(photo, FFHQ_LANDMARKS * 100 + [30, 20], 128)
    assert isinstance(face, AlignedFace)
    back = paste_faces(photo, [face], [face.image])
    assert np.abs(np.asarray(back, int) - np.asarray(photo, int)).max() <= 4


def test_faces_that_cannot_be_restored_are_left_alone(tiny_model, faces_at):
    photo = smooth_photo()
    faces_at((20, 20, 60), (100, 50, 9), (130, 20, 60))
    found = restore_photo(tiny_model, photo).faces
    assert [bool(face.left_alone) for face in found] == [False, True, True]
    assert "too small" in found[1].left_alone and "cut off" in found[2].left_alone
    faces_at((100, 50, 9))
    with pytest.raises(PhotoError, match="no face that can be restored: too small"):
        restore_photo(tiny_model, photo)
    faces_at()
    with pytest.raises(PhotoError, match="no face that can be found"):
        restore_photo(tiny_model, photo)
    with pytest.raises(ConfigError, match="strength"):
        restore_photo(tiny_model, photo, strength=2)


# --- what a file has beside its colours ----------------------------------------------------------------------------

def exif_photo(path, **more):
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "a camera"
    exif.get_ifd(0x8769).update({0x9003: "2020:01:01 00:00:00", 0xA002: 160, 0xA003: 120})
    exif.get_ifd(0x8825)[1] = "N"
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    smooth_photo().save(path, exif=exif.tobytes(), icc_profile=profile, **more)
    return profile


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
def test_a_turned_photo_comes_back_upright_with_its_exif(tiny_model, faces_at, tmp_path, suffix):
    profile = exif_photo(tmp_path / f"old.{suffix}")
    faces_at((30, 40, 60))
    image = restore_photo(tiny_model, tmp_path / f"old.{suffix}").image
    assert image.size == (120, 160)
    for target in ("new.jpg", "new.png", "new.webp", "new.tif"):
        save_photo(image, tmp_path / target)
        with Image.open(tmp_path / target) as new:
            exif = new.getexif()
            assert new.size == (120, 160) and 0x0112 not in exif or exif[0x0112] == 1
            assert exif[0x010F] == "a camera" and exif.get_ifd(0x8769)[0x9003] == "2020:01:01 00:00:00"
            assert exif.get_ifd(0x8825)[1] == "N" and 0xA002 not in exif.get_ifd(0x8769)
            assert new.info["icc_profile"] == profile
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        {f"old.{suffix}", "new.jpg", "new.png", "new.webp", "new.tif"}), "no temporary file stays"


def test_transparency_stays_and_hidden_colours_too(tiny_model, faces_at, tmp_path):
    pixels = np.asarray(smooth_photo().convert("RGBA")).copy()
    pixels[:10, :, 3], pixels[10:90, :40, 3] = 0, 128
    Image.fromarray(pixels, "RGBA").save(tmp_path / "old.png")
    faces_at((20, 20, 60))
    image = restore_photo(tiny_model, tmp_path / "old.png").image
    after = np.asarray(image)
    assert image.mode == "RGBA" and np.array_equal(after[..., 3], pixels[..., 3])
    assert np.array_equal(after[:20], pixels[:20]) and not np.array_equal(after[30:70, 50:60], pixels[30:70, 50:60])
    rgb, extras = load_with_extras(tmp_path / "old.png")
    changed = Image.fromarray(np.maximum(np.asarray(rgb), 200))
    over_white = load_photo(with_extras(changed, extras))
    visible = pixels[..., 3] > 0
    assert np.abs(np.asarray(over_white, int) - np.asarray(changed, int))[visible].max() <= 1
    assert load_photo(save_photo(image, tmp_path / "new.jpg")).size == (160, 120)


def test_a_grey_photo_stays_grey(tiny_model, faces_at):
    faces_at((20, 20, 60))
    assert restore_photo(tiny_model, smooth_photo().convert("L")).image.mode == "L"
    assert restore_photo(tiny_model, smooth_photo().convert("LA")).image.mode == "LA"
    same = np.asarray(restore_photo(tiny_model, smooth_photo().convert("L").convert("RGB")).image, int)
    assert np.ptp(same, axis=2).max() == 0


def test_pictures_are_not_written_as_something_unknown(tmp_path):
    with pytest.raises(DataError, match="'.doc'"):
        save_photo(smooth_photo(), tmp_path / "a.doc")
    (tmp_path / "a.jpg").write_text("kept")
    broken = Image.new("RGB", (0, 0))
    with pytest.raises((ValueError, SystemError, OSError)):
        save_photo(broken, tmp_path / "a.jpg")
    assert (tmp_path / "a.jpg").read_text() == "kept" and len(list(tmp_path.iterdir())) == 1


def test_what_a_photo_says_of_itself_never_keeps_its_restoration_from_being_written(tmp_path):
    info = TiffImagePlugin.ImageFileDirectory_v2()
    info[34377], info[37724], info[270] = b"8BIM thumbnail", b"layers", "a description"
    info[65000] = "x" * 70_000
    smooth_photo().save(tmp_path / "old.tif", tiffinfo=info)
    image, extras = load_with_extras(tmp_path / "old.tif")
    for resolution in ((0.0, 0.0), (float("nan"), 1.0), (4294967295, 4294967295), (72, 72)):
        photo = smooth_photo()
        photo.info["dpi"] = resolution
        kept = load_with_extras(photo)[1].info.get("dpi")
        assert kept == (resolution if resolution == (72, 72) else None)
    image = with_extras(image, extras)
    save_photo(image, tmp_path / "new.png")
    with Image.open(tmp_path / "new.png") as new:
        exif = new.getexif()
        assert exif[270] == "a description"
        assert not {34377, 37724} & set(exif), "Photoshop's layers show the old picture"
    with pytest.warns(UserWarning, match="too long for a JPEG"):
        save_photo(image, tmp_path / "new.jpg")
    image.info["dpi"] = (float("nan"), float("nan"))
    with pytest.raises(DataError, match="new.png: cannot be written as PNG"):
        save_photo(image, tmp_path / "new.png")


def test_persons_that_are_none_are_named(tiny_model, tiny_recogniser):
    for persons in ("ada.safetensors", Path("ada.safetensors"), ["ada.safetensors"], {"ada": "ada.safetensors"}):
        with pytest.raises(DataError, match=r"no Person; read .*Person\.load"):
            restore_photo(tiny_model, smooth_photo(), persons, recogniser=tiny_recogniser)


def test_a_strength_may_be_any_number(tiny_model, tiny_recogniser, faces_at):
    faces_at((20, 20, 60))
    photo, ada = smooth_photo(), somebody(tiny_model, 1)
    known = Gallery({"ada": ada, "bob": ada}, tiny_model, tiny_recogniser)
    known.only = "ada"  # so that the face is theirs whatever it shows
    half = restore_photo(tiny_model, photo, known, strength=0.5)
    for strength in (np.float32(0.5), np.array(0.5), torch.tensor(0.5)):
        found = restore_photo(tiny_model, photo, known, strength=strength)
        assert np.array_equal(np.asarray(found.image), np.asarray(half.image)) and found.faces[0].strength == 0.5
        assert type(found.faces[0].strength) is float
    strengths = np.linspace(0, 1, 3, dtype=np.float32)
    for given in (strengths, torch.tensor(strengths)):
        (line,) = sweep(tiny_model, photo, known, given)
        assert [label for label, _ in line][1:] == ["strength 0", "strength 0.5", "strength 1"]


@pytest.mark.parametrize("precision", [torch.float64, torch.float16, torch.bfloat16])
def test_a_model_in_another_precision_restores_photos(tiny_model, tiny_recogniser, faces_at, precision):
    faces_at((20, 20, 60), (90, 30, 40))
    known = {"ada": somebody(tiny_model, 1), "bob": somebody(tiny_model, 2)}
    tiny_model.to(precision)
    found = restore_photo(tiny_model, smooth_photo(), known, null_space=True, once=False, recogniser=tiny_recogniser)
    assert len(found.faces) == 2 and found.image.size == (160, 120)
    with pytest.warns(FaceWarning, match="not checked"):
        face = somebody(tiny_model, 1, template=False).restore(smooth_photo(16, 16), aligned=True, null_space=True)
    assert face.size == (16, 16)


def test_what_is_found_can_be_compared_and_collected(tiny_model, faces_at):
    faces_at((20, 20, 60), (90, 30, 40))
    photo = restore_photo(tiny_model, smooth_photo())
    first, second = photo.faces
    assert first != second and photo.faces.index(second) == 1 and len({photo, first, second}) == 3


# --- the command ---------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def album_on_disk(people, group, tmp_path_factory, model):
    """photos/ with the group, somebody and a photo without a face; people/ as files and store/ as a store."""
    root = tmp_path_factory.mktemp("restore")
    (root / "photos").mkdir()
    (root / "people").mkdir()
    group.save(root / "photos" / "group.png")
    load_photo(ALBUM / "ada" / "7.jpg").resize((256, 256)).save(root / "photos" / "ada.jpg")
    Image.new("RGB", (200, 150), (90, 120, 90)).save(root / "photos" / "clouds.png")
    store = PersonStore(root / "store", model)
    for name, person in people.items():
        person.save(root / "people" / name)
        store[name] = person
    return root


def test_a_folder_with_a_photo_without_a_face(album_on_disk, tmp_path):
    files = [album_on_disk / "people" / f"{name}.safetensors" for name in ("ada", "bob")]
    persons = [word for file in files for word in ("--person", file)]
    result = run("restore", "-i", album_on_disk / "photos", "-o", tmp_path / "new", *persons, "--lambda-id", 0.5,
                 "--model-path", "embedded", "--null-space")
    assert result.exit_code == 1 and "2 of 3 photos restored" in result.stdout
    assert "clouds.png: not restored" in result.stderr and result.stderr.count("\n") == 1
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["ada.png", "group.png"]
    assert "bob 0." in result.stdout and "stranger" in result.stdout and "(nearest" in result.stdout
    assert Image.open(tmp_path / "new" / "group.png").size == (650, 260)


def test_a_single_photo_without_a_face(album_on_disk, tmp_path):
    line = error_line("restore", "-i", album_on_disk / "photos" / "clouds.png", "-o", tmp_path / "new.png")
    assert "clouds.png' shows no face" in line and not list(tmp_path.iterdir())


def test_a_pattern_and_a_store_and_a_sweep(album_on_disk, tmp_path):
    result = run("restore", "-i", album_on_disk / "photos" / "[ag]*", "-o", tmp_path / "new", "--store",
                 album_on_disk / "store", "--sweep")
    assert result.exit_code == 0, result.output
    assert "group.png: 3 faces at 5 strengths" in result.stdout and "ada.png: 1 face at 5" in result.stdout
    with Image.open(tmp_path / "new" / "group.png") as sheet:
        assert sheet.width > 6 * 190 and sheet.height > 3 * 190


def test_a_sweep_goes_from_the_generic_model_to_the_person(model, people):
    photo = ALBUM / "ada" / "6.jpg"
    (line,) = sweep(model, photo, {"ada": people["ada"]}, aligned=True)
    assert [label for label, _ in line] == ["ada: input", *(f"strength {s}" for s in ("0", "0.25", "0.5", "0.75", "1"))]
    ends = [Person.restore(people["ada"], photo, strength, aligned=True) for strength in (0, 1)]
    assert all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip((line[1][1], line[-1][1]), ends))
    with pytest.raises(PhotoError, match="no face in it belongs"):
        sweep(model, photo, None, aligned=True)


def test_people_on_the_command_line(album_on_disk, tmp_path):
    photo, out = album_on_disk / "photos" / "ada.jpg", tmp_path / "new.png"
    ada = album_on_disk / "people" / "ada.safetensors"
    start = ["restore", "-i", photo, "-o", out]
    assert "give one of them" in error_line(*start, "--person", ada, "--store", album_on_disk / "store")
    assert "two files are called 'ada'" in error_line(*start, "--person", ada, "--person", ada)
    assert "no Person in this store" in error_line(*start, "--store", tmp_path / "nobody")
    assert "no photo matches" in error_line("restore", "-i", tmp_path / "*.jpg", "-o", out)
    assert "cannot be written as '.doc'" in error_line("restore", "-i", photo, "-o", tmp_path / "new.doc")
    assert "need a folder" in error_line("restore", "-i", photo, "-i", album_on_disk / "photos" / "group.png",
                                         "-o", ada)
    load_photo(ALBUM / "eve" / "6.jpg").save(tmp_path / "eve.png")
    result = run("restore", "-i", tmp_path / "eve.png", "-o", out, "--aligned", "--person",
                 album_on_disk / "people" / "bob.safetensors")
    assert result.exit_code == 0 and "warning:" in result.stderr and "'bob'" in result.stderr
