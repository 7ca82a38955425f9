"""Landmarks corrected, degraded faces found, faces given by a box."""

import sys

import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from PIL import Image
from test_cli import error_line, run

import metagpen
from metagpen import degrade
from metagpen.errors import CheckpointError, ConfigError, PhotoError
from metagpen.faces import FFHQ_LANDMARKS, crop_face, invert, load_photo, to_pil, to_tensor, transform
from metagpen.faces import detect as detect_function
from metagpen.faces import landmarks as module
from metagpen.faces.landmarks import BOX, LandmarkNet, embedded_net, landmarks_in, looked_at_twice, refine
from metagpen.restore import FaceWarning, restore_photo, sweep
from metagpen.restore.photo import cut_faces

ALBUM = REPOSITORY / "metagpen" / "weights" / "album"
RIM = 192
TRUE = FFHQ_LANDMARKS * 128 + RIM  # of the album's crops, in the photos below


@pytest.fixture(scope="module")
def model():
    return metagpen.load()


def in_a_photo(face):
    """A crop [3, 128, 128] in the middle of a photo of 512, its edge drawn out."""
    return Image.fromarray(np.pad(np.asarray(to_pil(face)), ((RIM, RIM), (RIM, RIM), (0, 0)), mode="edge"))


def ruined_photos(level="hard"):
    """The album's portraits, degraded, in photos."""
    damage, generator = degrade.by_name(level), torch.Generator().manual_seed(0)
    crops = [to_tensor(load_photo(path)) for path in sorted(ALBUM.glob("*/*.jpg"))]
    return [in_a_photo(face) for face in damage(torch.stack(crops), generator)]


def error(landmarks, truth=TRUE):
    return np.linalg.norm(landmarks - truth, axis=1).mean() / np.linalg.norm(truth[0] - truth[1])


class Says(torch.nn.Module):
    """A network that sees the same landmarks in every crop."""

    def __init__(self, landmarks):
        super().__init__()
        self.landmarks = torch.as_tensor(landmarks, dtype=torch.float32)

    def forward(self, crops):
        return self.landmarks.expand(len(crops), 5, 2)


# --- correcting ----------------------------------------------------------------------------------------------------

def test_what_the_network_says_of_a_crop_is_taken_back_into_the_photo(monkeypatch):
    photo = Image.new("RGB", (512, 512))
    monkeypatch.setattr(module, "embedded_net", lambda device: Says(FFHQ_LANDMARKS))
    turned = transform(TRUE, np.array([[0.9, -0.3, 60.0], [0.3, 0.9, -40.0]]))
    once = refine(photo, turned)  # symmetric, so that the mirror image says the same
    face = crop_face(photo, turned, 64)
    np.testing.assert_allclose(once, transform(FFHQ_LANDMARKS * 64, invert(face.matrix)), atol=1e-4)
    np.testing.assert_allclose(once, turned, atol=0.05 * 45)  # the mean landmarks are nearly what the crop is laid by


def test_a_crop_and_its_mirror_image_are_told_the_same():
    torch.manual_seed(0)
    net, crops = LandmarkNet(4).eval(), torch.rand(2, 3, 64, 64) * 2 - 1
    there, back = looked_at_twice(net, crops), looked_at_twice(net, crops.flip(-1))
    assert there.shape == (2, 5, 2) and (there - net(crops)).abs().max() > 1e-4
    torch.testing.assert_close(back[:, [1, 0, 2, 4, 3], 0], 1 - there[..., 0])
    torch.testing.assert_close(back[:, [1, 0, 2, 4, 3], 1], there[..., 1])


def test_landmarks_of_ruined_faces_are_corrected():
    """The portraits' landmarks are FFHQ's mean ones within a tenth of the eyes' distance."""
    generator = np.random.default_rng(0)
    begun, found = [], []
    for photo in ruined_photos():
        start = TRUE + generator.uniform(-12, 12, 2)  # up to 0.55 of the eyes' distance away
        begun.append(error(start))
        found.append(error(refine(photo, start)))
    assert len(found) == 21 and np.median(found) < 0.6 * np.median(begun) and np.median(found) < 0.2
    assert np.mean(np.array(found) < begun) > 0.7


def test_heads_that_tilt_are_corrected_from_upright_landmarks():
    """By 25 degrees, of sharp faces: `landmarks_in` says by how much they may."""
    found = []
    for path in sorted(ALBUM.glob("*/*.jpg")):
        photo = in_a_photo(to_tensor(load_photo(path))).rotate(25, Image.Resampling.BICUBIC)
        c, s = np.cos(np.radians(25)), np.sin(np.radians(25))
        truth = (TRUE - 256) @ np.array([[c, -s], [s, c]]) + 256
        upright = FFHQ_LANDMARKS * 128 + RIM + truth.mean(0) - TRUE.mean(0)
        assert error(upright, truth) > 0.25
        found.append(error(refine(photo, upright), truth))
    assert np.median(found) < 0.15


def test_landmarks_of_sharp_faces_stay():
    photos = [in_a_photo(to_tensor(load_photo(path))) for path in sorted(ALBUM.glob("*/1.jpg"))]
    for photo in photos:
        seen = detect_function(photo)[0].landmarks
        assert error(refine(photo, seen), seen) < 0.12


def test_refining_is_the_same_inside_the_callers_inference_mode():
    photo, state = ruined_photos()[0], torch.get_rng_state()
    embedded_net.cache_clear()
    plain = refine(photo, TRUE)
    assert torch.equal(torch.get_rng_state(), state), "the caller's dice are left alone"
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert np.array_equal(refine(photo, TRUE), plain)


def test_landmarks_outside_the_photo_are_refused():
    with pytest.raises(PhotoError, match="do not fit"):
        refine(Image.new("RGB", (64, 64)), TRUE)


def test_an_installation_without_the_network_says_so(monkeypatch):
    monkeypatch.setattr(module, "EMBEDDED", "gone.safetensors")
    embedded_net.cache_clear()
    with pytest.raises(CheckpointError, match="no gone.safetensors"):
        embedded_net("cpu")


# --- finding -------------------------------------------------------------------------------------------------------

def test_more_ruined_faces_are_found_in_a_blurred_photo():
    photos = ruined_photos()
    plain, degraded = (sum(any(error(face.landmarks) < 0.5 for face in metagpen.faces.detect(photo, degraded=wanted))
                           for photo in photos) for wanted in (False, True))
    assert degraded > plain and degraded >= len(photos) / 2


def test_a_photo_is_looked_at_once_in_every_way(monkeypatch):
    detect = sys.modules[detect_function.__module__]
    looks = []

    def look(images, how, device):
        looks.extend((how.side(image), how.margin, how.sigma) for image in images)
        return [[] for _ in images]

    monkeypatch.setattr(detect, "_look", look)
    small, middle, large = (Image.new("RGB", (side, side // 2)) for side in (100, 700, 3000))
    less = [(512, 0, 3), (320, 0, 3), (1280, 0, 3)]
    for photo, plain, soft in ((small, [(320, 0, 0), (320, 0.25, 0)], [(320, 0, 3), (400, 0, 3)]),
                               (middle, [(700, 0, 0), (700, 0.25, 0)], [(700, 0, 3), *less]),
                               (large, [(1024, 0, 0), (2048, 0, 0), (1024, 0.25, 0)], [(1024, 0, 3), *less])):
        looks.clear()
        assert detect.detect(photo) == [] and looks == plain
        looks.clear()
        assert detect.detect(photo, degraded=True) == [] and looks == plain + soft


def test_what_is_found_at_first_is_not_looked_at_again(monkeypatch):
    detect = sys.modules[detect_function.__module__]
    looks = []
    face = detect.Face(np.zeros(4), TRUE, 1.0)

    def look(images, how, device):
        looks.append(len(images))
        return [[face] if image.size == (512, 512) else [] for image in images]

    monkeypatch.setattr(detect, "_look", look)
    photos = [Image.new("RGB", (512, 512)), Image.new("RGB", (320, 320))]
    assert detect.detect_many(photos, degraded=True) == [[face], []] and looks == [2, 0, 1, 1, 0, 0, 1]


# --- a box by hand -------------------------------------------------------------------------------------------------

def test_a_box_has_the_mean_landmarks_in_it():
    x0, y0, x1, y1 = np.array(BOX) * 200 + 30
    np.testing.assert_allclose(landmarks_in((x0, y0, x1, y1)), FFHQ_LANDMARKS * 200 + 30)


def test_a_face_in_a_box_is_restored_without_a_detector(model, monkeypatch):
    def never(*_, **__):
        raise AssertionError("nothing was to be looked for")

    monkeypatch.setattr("metagpen.restore.photo.detect", never)
    photo = ruined_photos()[3]
    box = (np.array(BOX) * 128 + RIM).round()
    done = restore_photo(model, photo, boxes=[box])
    assert len(done.faces) == 1 and np.array_equal(done.faces[0].box, box)
    before, after = np.asarray(photo, float), np.asarray(done.image, float)
    changed = np.argwhere(np.abs(after - before).max(axis=2) > 8)
    assert len(changed) > 500 and changed.min() > RIM - 64 and changed.max() < RIM + 128 + 64
    assert done.faces[0].person is None and not done.faces[0].unsure
    wrong = box + [12, 0, 12, 0]  # a quarter of the eyes' distance and more
    face = cut_faces(photo, model, "photo", boxes=[wrong])[0].face
    assert error(landmarks_in(wrong)) > 0.35 and error(transform(face.landmarks, invert(face.matrix))) < 0.2


def test_a_ruined_face_that_is_missed_at_first_is_found_corrected_and_restored(model):
    missed = [photo for photo in ruined_photos() if not metagpen.faces.detect(photo)]
    found = [restore_photo(model, photo).faces[0] for photo in missed
             if any(error(face.landmarks) < 0.5 for face in metagpen.faces.detect(photo, degraded=True))]
    assert len(found) >= 3 and any(face.unsure and "perhaps no face" in str(face) for face in found)
    cuts = [cut_faces(photo, model, "photo")[0].face for photo in missed
            if metagpen.faces.detect(photo, degraded=True)]
    corrected = [error(transform(face.landmarks, invert(face.matrix))) for face in cuts]
    seen = [error(metagpen.faces.detect(photo, degraded=True)[0].landmarks) for photo in missed
            if metagpen.faces.detect(photo, degraded=True)]
    assert np.median(corrected) < 0.8 * np.median(seen)


def test_the_command_says_of_whom_the_detector_is_unsure(tmp_path):
    unsure = next(photo for photo in ruined_photos() if not metagpen.faces.detect(photo)
                  and any(face.score < 0.9 for face in metagpen.faces.detect(photo, degraded=True)))
    unsure.save(tmp_path / "old.png")
    result = run("restore", "-i", tmp_path / "old.png", "-o", tmp_path / "new.png")
    assert result.exit_code == 0 and "perhaps no face" in result.output


def test_without_a_template_the_largest_box_is_the_persons(model):
    face = ruined_photos()[0].crop((RIM, RIM, RIM + 128, RIM + 128))
    photo = Image.new("RGB", (512, 256), (90, 90, 90))
    photo.paste(face.resize((96, 96)), (30, 60))
    photo.paste(face, (330, 60))
    nameless = metagpen.adapt(model, to_tensor(face)[None], steps=0, start=False)
    boxes = [(30 + 22, 60 + 17, 30 + 74, 60 + 88), (330 + 29, 60 + 23, 330 + 98, 60 + 117)]
    with pytest.warns(FaceWarning, match="largest of 2"):
        done = restore_photo(model, photo, nameless, boxes=boxes)
    assert [found.person for found in done.faces] == [None, "person"]


def test_two_boxes_keep_their_order(model):
    face = ruined_photos()[0].crop((RIM, RIM, RIM + 128, RIM + 128))
    photo = Image.new("RGB", (512, 256), (90, 90, 90))
    photo.paste(face, (30, 60))
    photo.paste(face, (330, 60))
    boxes = [(330 + 29, 60 + 23, 330 + 98, 60 + 117), (30 + 29, 60 + 23, 30 + 98, 60 + 117)]
    assert [tuple(found.box) for found in restore_photo(model, photo, boxes=boxes).faces] == boxes


@pytest.mark.parametrize("box, said", [
    ((10, 10, 5, 50), "x0 < x1"), ((10, 50, 50, 50), "y0 < y1"), ((1, 2, 3), "four numbers"),
    ((0, 0, float("nan"), 9), "four numbers"), (7, "boxes are a list"), (("a", "b", "c", "d"), "four numbers"),
    ((0, 0, 1e30, 9), "four numbers"), ((600, 0, 700, 100), "outside the photo, which is 512x512")])
def test_boxes_that_are_none_are_refused(model, box, said):
    with pytest.raises(ConfigError, match=said):
        restore_photo(model, Image.new("RGB", (512, 512)), boxes=[box])


def test_a_crop_has_no_faces_in_boxes(model):
    with pytest.raises(ConfigError, match="aligned and boxes"):
        restore_photo(model, Image.new("RGB", (64, 64)), aligned=True, boxes=[(1, 1, 9, 9)])


def test_a_sweep_of_a_face_in_a_box(model):
    photos = torch.stack([to_tensor(load_photo(ALBUM / "ada" / f"{i}.jpg")) for i in (1, 2)])
    ada = metagpen.adapt(model, photos, steps=0)
    lines = sweep(model, ruined_photos("extreme")[0], ada, (0.0, 1.0), boxes=[np.array(BOX) * 128 + RIM])
    assert len(lines) == 1 and len(lines[0]) == 3


def test_command_restores_a_face_in_a_box(tmp_path):
    ruined_photos("extreme")[0].save(tmp_path / "old.png")
    box = ",".join(f"{value:.0f}" for value in np.array(BOX) * 128 + RIM)
    result = run("restore", "-i", tmp_path / "old.png", "-o", tmp_path / "new.png", "--face", box)
    assert result.exit_code == 0 and "1 face" in result.output and load_photo(tmp_path / "new.png").size == (512, 512)
    for wrong, said in (("1,2,3", "four numbers"), ("a,b,c,d", "four numbers"), ("9,9,1,1", "x0 < x1"),
                        ("900,900,950,950", "outside the photo")):
        assert said in error_line("restore", "-i", tmp_path / "old.png", "-o", tmp_path / "no.png", "--face", wrong)
        assert not (tmp_path / "no.png").exists()
    ruined_photos()[1].save(tmp_path / "another.png")
    result = run("restore", "-i", tmp_path / "old.png", "-o", tmp_path / "no.png", "--aligned", "--face", box)
    assert result.exit_code == 2 and "give one of" in result.output and not (tmp_path / "no.png").exists()
    assert "one photo" in error_line("restore", "-i", tmp_path, "-o", tmp_path / "out", "--face", box)
