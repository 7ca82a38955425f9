import csv
import io
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from metagpen.errors import PhotoError
from metagpen.faces import (
    FFHQ_LANDMARKS,
    Face,
    crop_face,
    detect,
    detect_many,
    ffhq_quad,
    invert,
    load_photo,
    outside_share,
    paste_back,
    photos_in,
    single_face,
    to_pil,
    to_tensor,
    transform,
)
from metagpen.faces import detect as detect_function

# Eyes 20 px apart, mouth 25 px below them: half side max(2 * 20, 1.8 * 25) = 45 px, centre 2.5 px below the eyes.
UPRIGHT = np.array([[40.0, 50.5], [60.0, 50.5], [50.0, 62.0], [43.0, 75.5], [57.0, 75.5]])


def smooth_photo(width=160, height=140, seed=0):
    """A picture without fine detail, so that resampling it loses little."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 7, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def noise_photo(width=200, height=160):
    return Image.fromarray(np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8))


def similarity(angle, scale, shift):
    cos, sin = scale * np.cos(angle), scale * np.sin(angle)
    return np.array([[cos, -sin, shift[0]], [sin, cos, shift[1]]])


# --- photos in and out ---------------------------------------------------------------------------------------------

def test_levels_survive_the_trip_to_tensors_and_back():
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    image = Image.fromarray(np.stack([levels, levels.T, 255 - levels], -1))
    tensor = to_tensor(image)
    assert tensor.shape == (3, 16, 16) and tensor.min() == -1 and tensor.max() == 1
    assert np.array_equal(np.asarray(to_pil(tensor)), np.asarray(image))


def test_to_pil_rounds_and_clamps():
    tensor = torch.tensor([-3.0, 0.6 / 127.5 - 1, 0.4 / 127.5 - 1, 3.0]).expand(3, 1, 4)
    assert np.asarray(to_pil(tensor))[0, :, 0].tolist() == [0, 1, 0, 255]
    with pytest.raises(PhotoError, match=r"\[3, H, W\]"):
        to_pil(torch.zeros(1, 3, 4, 4))


@pytest.mark.parametrize("mode, colour, expected", [
    ("L", 90, (90, 90, 90)),
    ("1", 1, (255, 255, 255)),
    ("RGB", (10, 20, 30), (10, 20, 30)),
    ("RGBA", (10, 20, 30, 255), (10, 20, 30)),
    ("RGBA", (10, 20, 30, 0), (255, 255, 255)),
    ("LA", (100, 0), (255, 255, 255)),
    ("CMYK", (255, 0, 0, 0), (0, 255, 255)),
    ("YCbCr", (128, 128, 128), (128, 128, 128)),
    ("I;16", 257 * 77, (77, 77, 77)),
    ("I", 257 * 77, (77, 77, 77)),
    ("F", 0.2, (51, 51, 51)),
])
def test_every_mode_becomes_rgb(mode, colour, expected):
    photo = load_photo(Image.new(mode, (5, 4), colour))
    assert photo.mode == "RGB" and photo.size == (5, 4)
    assert photo.getpixel((2, 2)) == expected


def test_files_of_many_kinds(tmp_path):
    grey16 = np.linspace(0, 65535, 12).astype(np.uint16).reshape(3, 4)
    Image.fromarray(grey16).save(tmp_path / "grey16.png")
    expected = np.rint(grey16 / 257)
    assert np.array_equal(np.asarray(load_photo(tmp_path / "grey16.png"))[..., 1], expected)

    palette = Image.new("P", (4, 3), 1)
    palette.putpalette([0, 0, 0, 200, 100, 50])
    palette.save(tmp_path / "palette.png")
    assert load_photo(str(tmp_path / "palette.png")).getpixel((0, 0)) == (200, 100, 50)
    palette.save(tmp_path / "see_through.png", transparency=1)
    assert load_photo(tmp_path / "see_through.png").getpixel((0, 0)) == (255, 255, 255)

    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "cmyk.jpg")
    red, green, blue = load_photo(tmp_path / "cmyk.jpg").getpixel((8, 8))
    assert red > 230 and green < 25 and blue < 25


@pytest.mark.parametrize("orientation, corner", [(1, (0, 0)), (3, (7, 3)), (6, (3, 0)), (8, (0, 7)), (2, (7, 0))])
def test_exif_orientation_is_applied(tmp_path, orientation, corner):
    stored = Image.new("RGB", (8, 4))
    stored.putpixel((0, 0), (255, 255, 255))
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "turned.png", exif=exif)
    photo = load_photo(tmp_path / "turned.png")
    assert photo.size == ((4, 8) if orientation in (6, 8) else (8, 4))
    assert photo.getpixel(corner) == (255, 255, 255)


def test_arrays_and_tensors():
    pixels = np.asarray(noise_photo(7, 5))
    assert np.array_equal(np.asarray(load_photo(pixels)), pixels)
    assert np.array_equal(np.asarray(load_photo(pixels.astype(np.uint16) * 257)), pixels)
    assert np.array_equal(np.asarray(load_photo(pixels / 255)), pixels)
    assert np.array_equal(np.asarray(load_photo(pixels[..., 0]))[..., 2], pixels[..., 0])
    assert np.array_equal(np.asarray(load_photo(pixels[..., :1]))[..., 2], pixels[..., 0])
    assert np.array_equal(np.asarray(load_photo(to_tensor(Image.fromarray(pixels)))), pixels)
    assert np.array_equal(np.asarray(load_photo(torch.tensor(pixels).permute(2, 0, 1))), pixels)


@pytest.mark.parametrize("source, said", [
    (np.zeros((3, 8, 8), np.uint8), "channels last"),
    (np.zeros((0, 8, 3), np.uint8), "not a picture"),
    (np.full((8, 8, 3), 200.0), r"outside \[0, 1\]"),
    (np.full((8, 8, 3), np.nan), "NaN"),
    (np.zeros((8, 8, 3), np.int64), "int64"),
    (torch.zeros(1, 3, 8, 8), r"\[3, H, W\]"),
    (torch.full((3, 8, 8), 255.0), "far outside"),
    (torch.full((3, 8, 8), float("nan")), "NaN"),
    (torch.zeros(3, 8, 8, dtype=torch.long), "int64"),
    (42, "int"),
])
def test_what_is_not_a_photo_is_refused(source, said):
    with pytest.raises(PhotoError, match=said):
        load_photo(source)


def test_bad_files_are_named(tmp_path):
    def refused(name, said):
        with pytest.raises(PhotoError, match=said) as error:
            load_photo(tmp_path / name)
        assert name in str(error.value)

    buffer = io.BytesIO()
    noise_photo().save(buffer, "JPEG")
    whole = buffer.getvalue()
    (tmp_path / "half.jpg").write_bytes(whole[:len(whole) // 2])
    (tmp_path / "header.jpg").write_bytes(whole[:30])
    buffer = io.BytesIO()
    noise_photo().save(buffer, "PNG")
    broken = bytearray(buffer.getvalue())
    broken[len(broken) // 2] ^= 255
    (tmp_path / "flipped.png").write_bytes(bytes(broken))
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "text.jpg").write_text("this is no picture")
    (tmp_path / "folder.jpg").mkdir()
    refused("half.jpg", "damaged or cut short")
    refused("header.jpg", "damaged or cut short|not a picture")
    refused("flipped.png", "damaged or cut short")
    refused("empty.jpg", "empty")
    refused("text.jpg", "not a picture")
    refused("folder.jpg", "folder")
    refused("missing.jpg", "does not exist")


# --- alignment -----------------------------------------------------------------------------------------------------

def test_quad_of_an_upright_face_by_hand():
    assert np.allclose(ffhq_quad(UPRIGHT), [[5, 8], [5, 98], [95, 98], [95, 8]])
    assert np.isclose(crop_face(smooth_photo(), UPRIGHT, 45).source_side, 90)


def test_crop_turns_and_scales_with_the_face():
    reference = crop_face(smooth_photo(), UPRIGHT, 64).landmarks
    moved = transform(UPRIGHT, similarity(0.4, 1.7, (60, 20)))
    assert np.allclose(crop_face(smooth_photo(300, 300), moved, 64).landmarks, reference)


def test_mean_landmarks_lie_where_their_own_crop_puts_them():
    again = crop_face(smooth_photo(100, 100), FFHQ_LANDMARKS * 100, 100)
    assert np.abs(again.landmarks - FFHQ_LANDMARKS * 100).max() < 1.0
    assert np.allclose(FFHQ_LANDMARKS[[1, 0, 2, 4, 3]] * [-1, 1] + [1, 0], FFHQ_LANDMARKS)  # mirror image


def test_crop_of_whole_pixels_is_a_copy():
    photo = noise_photo()
    crop = crop_face(photo, UPRIGHT, 90)
    assert np.array_equal(np.asarray(crop.image), np.asarray(photo)[8:98, 5:95])
    assert np.allclose(crop.matrix, [[1, 0, -5], [0, 1, -8]])


def test_borders_are_mirrored():
    photo = noise_photo(90, 90)
    crop = crop_face(photo, UPRIGHT - [25, 28], 90)  # reaches 20 px out on both sides
    expected = np.pad(np.asarray(photo), ((20, 0), (20, 0), (0, 0)), mode="reflect")[:90, :90]
    assert np.array_equal(np.asarray(crop.image), expected)
    assert np.isclose(outside_share(photo, UPRIGHT - [25, 28]), 1 - (70 / 90) ** 2, atol=0.02)


def test_reduction_does_not_alias():
    stripes = np.zeros((800, 800, 3), np.uint8)
    stripes[:, ::2] = 255
    crop = np.asarray(crop_face(Image.fromarray(stripes), UPRIGHT * 7.3, 64).image, dtype=float)
    assert abs(crop.mean() - 127.5) < 1.5 and crop.std() < 3


@pytest.mark.parametrize("landmarks, said", [
    (np.zeros((5, 2)), "coincide"),
    (np.full((5, 2), np.nan), "finite"),
    (np.zeros((4, 2)), "five"),
    (UPRIGHT + 500, "do not fit"),
])
def test_impossible_landmarks_are_refused(landmarks, said):
    with pytest.raises(PhotoError, match=said):
        crop_face(smooth_photo(), landmarks, 32)


@pytest.mark.parametrize("size", [64, 90, 256])
@pytest.mark.parametrize("angle", [0.0, 0.35])
def test_pasting_back_an_untouched_crop_changes_little(size, angle):
    photo = smooth_photo()
    landmarks = transform(UPRIGHT, similarity(angle, 0.9, (20, 0)))
    face = crop_face(photo, landmarks, size)
    back = paste_back(photo, face.image, face.matrix)
    difference = np.abs(np.asarray(back, dtype=float) - np.asarray(photo, dtype=float))
    assert difference.mean() < 0.5 and difference.max() <= 6
    assert np.allclose(transform(face.landmarks, invert(face.matrix)), landmarks)


def test_pasting_touches_only_the_face():
    photo = noise_photo()
    face = crop_face(photo, UPRIGHT, 128)
    before = np.asarray(photo).copy()
    after = np.asarray(paste_back(photo, Image.new("RGB", (128, 128), (255, 0, 0)), face.matrix))
    assert np.array_equal(np.asarray(photo), before)
    assert (after[20:86, 17:83] == [255, 0, 0]).all()  # inside the soft rim
    outside = np.ones(before.shape[:2], bool)
    outside[8:98, 5:95] = False
    assert np.array_equal(after[outside], before[outside])


def test_pasting_across_the_border_and_with_a_mask():
    photo = smooth_photo()
    face = crop_face(photo, UPRIGHT - [30, 30], 64)
    red = Image.new("RGB", (64, 64), (255, 0, 0))
    assert paste_back(photo, red, face.matrix).getpixel((5, 5)) == (255, 0, 0)
    nothing = paste_back(photo, red, face.matrix, mask=np.zeros((64, 64)))
    assert np.array_equal(np.asarray(nothing), np.asarray(photo))
    left = Image.new("L", (64, 64))
    left.paste(255, (0, 0, 40, 64))
    half = paste_back(photo, red, crop_face(photo, UPRIGHT, 64).matrix, mask=left)
    assert half.getpixel((30, 50)) == (255, 0, 0) and half.getpixel((80, 50)) == photo.getpixel((80, 50))
    with pytest.raises(PhotoError, match="64x64"):
        paste_back(photo, red, face.matrix, mask=np.zeros((32, 32)))


# --- detection -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("size", [(200, 160), (1, 1), (13, 300)])
def test_no_face_where_there_is_none(tmp_path, size):
    photo = smooth_photo(*size)
    photo.save(tmp_path / "clouds.png")
    assert detect(photo) == []
    assert detect_many([photo, Image.new("RGB", size), photo]) == [[], [], []]
    with pytest.raises(PhotoError, match="clouds.png.*no face"):
        single_face(tmp_path / "clouds.png", 64)


def test_an_aligned_crop_needs_no_detection():
    face = single_face(noise_photo(100, 100), 50, aligned=True)
    assert face.image.size == (50, 50) and face.source_side == 100
    assert np.allclose(face.landmarks, FFHQ_LANDMARKS * 50)
    with pytest.raises(PhotoError, match="square"):
        single_face(noise_photo(100, 90), 50, aligned=True)


def face_at(landmarks):
    return Face(np.concatenate([landmarks.min(0) - 10, landmarks.max(0) + 10]), landmarks, 0.99)


@pytest.fixture
def faces_found(monkeypatch):
    """Makes the detector answer with given landmarks."""
    module = sys.modules[detect_function.__module__]
    return lambda *landmarks: monkeypatch.setattr(
        module, "detect", lambda image, device="cpu": [face_at(points) for points in landmarks])


def test_single_face_takes_the_largest_and_warns(faces_found):
    faces_found(UPRIGHT, UPRIGHT * 0.5)
    with pytest.warns(UserWarning, match="2 faces"):
        face = single_face(smooth_photo(), 90)
    assert np.allclose(face.matrix, [[1, 0, -5], [0, 1, -8]])


def test_single_face_refuses_small_and_cut_off_faces(faces_found):
    faces_found(UPRIGHT * 0.3)
    with pytest.raises(PhotoError, match="too small.*27 px"):
        single_face(smooth_photo(), 64)
    assert single_face(smooth_photo(), 64, min_crop_side=20).image.size == (64, 64)
    faces_found(UPRIGHT - [45, 0])  # 40 of 90 columns are missing
    with pytest.raises(PhotoError, match="cut off: 44%"):
        single_face(smooth_photo(), 64)


@pytest.fixture
def london(shared):
    return shared / "photos" / "london_512"


def test_faces_are_found_where_the_manifest_says(london):
    with open(london / "manifest.csv", newline="") as stream:
        rows = [row for row in csv.DictReader(stream) if row["id"] == "lisa"]
    photos = [load_photo(london / row["file"]) for row in rows]
    for row, photo, faces in zip(rows, photos, detect_many(photos), strict=True):
        listed = np.array([[float(row[f"{axis}{i}"]) for axis in "xy"] for i in range(5)])
        assert len(faces) == 1 and faces[0].score > 0.9
        assert np.abs(faces[0].landmarks - listed).max() < 0.02 * 512
        x0, y0, x1, y1 = faces[0].box
        assert ((listed > [x0, y0]) & (listed < [x1, y1])).all()
        # An aligned crop cropped again by the listed landmarks stays as it is; by the found ones nearly so.
        again = crop_face(photo, listed, 512)
        assert np.abs(again.matrix - [[1, 0, 0], [0, 1, 0]])[:, :2].max() < 0.005
        assert np.abs(np.asarray(again.image, float) - np.asarray(photo, float)).mean() < 2
        found = crop_face(photo, faces[0].landmarks, 512)
        assert np.abs(transform(listed, found.matrix) - listed).max() < 0.02 * 512


def test_faces_in_large_and_in_small_photos(london):
    face = load_photo(london / "lisa" / "lisa1.jpg")
    large = smooth_photo(3000, 2000)
    large.paste(face, (2000, 700))
    tiny = face.resize((64, 64), Image.Resampling.LANCZOS)
    in_large, in_tiny = detect_many([large, tiny])
    reference = detect(face)[0].landmarks
    assert np.abs(in_large[0].landmarks - [2000, 700] - reference).max() < 0.02 * 512
    assert np.abs(in_tiny[0].landmarks * 8 - reference).max() < 0.04 * 512


def test_several_faces_largest_first(london):
    face = load_photo(london / "lisa" / "lisa1.jpg")
    group = smooth_photo(900, 600)
    group.paste(face.resize((200, 200)), (50, 50))
    group.paste(face.resize((400, 400)), (400, 100))
    faces = detect(group)
    assert len(faces) == 2 and faces[0].box[0] > 400
    with pytest.warns(UserWarning, match="2 faces"):
        assert 320 < single_face(group, 128).source_side < 480


def test_photos_of_a_folder_are_its_visible_files_by_name(tmp_path):
    for name in ("b.PNG", "a.jpg", "notes.txt", ".hidden.jpg", "._a.jpg"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "folder.jpg").mkdir()
    assert [path.name for path in photos_in(tmp_path)] == ["a.jpg", "b.PNG"]
    with pytest.raises(OSError):
        photos_in(tmp_path / "missing")
