"""Pairs on disk: numbering, reproducibility, safety of existing files, and photos that cannot be read."""

import gc

import numpy as np
import pytest
from PIL import Image

from metagpen.degrade import HeavyDegradation, write_pairs
from metagpen.errors import ConfigError, DataError


def save_photo(path, width=40, height=32, seed=0):
    levels = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    Image.fromarray(levels).resize((width, height), Image.Resampling.BICUBIC).save(path)


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for seed, name in enumerate(["b.png", "a.jpg", "c.PNG", "d.bmp"]):
        save_photo(folder / name, seed=seed)
    (folder / "notes.txt").write_text("not a photo")
    (folder / ".hidden.png").write_text("not a photo either")
    (folder / "deeper").mkdir()
    return folder


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def pixels(path):
    with Image.open(path) as image:
        assert image.format == "PNG" and image.mode == "RGB"
        return np.asarray(image)


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.png"))}


def test_pairs_are_numbered_in_the_order_of_their_names(photos, tmp_path):
    summary = write_pairs(photos, tmp_path / "out", num_workers=0, progress=False)
    assert summary.written == 4 and summary.failed == ()
    expected = ["001.png", "002.png", "003.png", "004.png"]
    assert names(summary.gt_dir) == names(summary.lr_dir) == expected  # and no temporary file stays behind
    assert names(tmp_path / "out") == ["GT", "LR"]
    for number, name in enumerate(["a.jpg", "b.png", "c.PNG", "d.bmp"], start=1):
        truth = np.asarray(Image.open(photos / name).convert("RGB"))
        assert np.array_equal(pixels(summary.gt_dir / f"{number:03}.png"), truth)
        poor = pixels(summary.lr_dir / f"{number:03}.png")
        assert poor.shape == truth.shape
        assert np.abs(poor.astype(int) - truth).mean() > 1
    assert "4 pairs" in str(summary)


def test_pictures_do_not_depend_on_the_number_of_workers(photos, tmp_path):
    for workers in (0, 2):
        write_pairs(photos, tmp_path / str(workers), num_workers=workers, progress=False)
    assert contents(tmp_path / "0") == contents(tmp_path / "2")


def test_pictures_depend_on_the_seed(photos, tmp_path):
    for name, seed in (("first", 0), ("again", 0), ("other", 1)):
        write_pairs(photos, tmp_path / name, num_workers=1, seed=seed, progress=False)
    first, again, other = (contents(tmp_path / name) for name in ("first", "again", "other"))
    assert first == again
    assert all((first[name] == other[name]) == name.startswith("GT") for name in first)


def test_equal_photos_are_degraded_differently(tmp_path):
    for name in ("a.png", "b.png"):
        save_photo(tmp_path / name)
    summary = write_pairs(tmp_path, tmp_path / "out", num_workers=0, progress=False)
    assert not np.array_equal(pixels(summary.lr_dir / "001.png"), pixels(summary.lr_dir / "002.png"))


@pytest.mark.parametrize("scale", [2, 4])
def test_scale_shrinks_lr_and_crops_gt_to_a_multiple(tmp_path, scale):
    save_photo(tmp_path / "odd.png", width=43, height=35)
    summary = write_pairs(tmp_path, tmp_path / "out", scale=scale, num_workers=0, progress=False)
    height, width = 35 // scale, 43 // scale
    assert pixels(summary.lr_dir / "001.png").shape == (height, width, 3)
    truth = pixels(summary.gt_dir / "001.png")
    assert np.array_equal(truth, pixels(tmp_path / "odd.png")[: height * scale, : width * scale])


def test_size_takes_the_middle_square(tmp_path):
    levels = np.zeros((30, 50, 3), np.uint8)
    levels[:, 10:40] = 200
    Image.fromarray(levels).save(tmp_path / "wide.png")
    summary = write_pairs(tmp_path, tmp_path / "out", size=20, num_workers=0, progress=False)
    assert np.allclose(pixels(summary.gt_dir / "001.png"), 200, atol=10)  # black had it been one pixel off
    assert pixels(summary.lr_dir / "001.png").shape == (20, 20, 3)


def test_a_degradation_of_ones_own(photos, tmp_path):
    summary = write_pairs(photos, tmp_path / "out", HeavyDegradation(face_px=(4, 4)), num_workers=0, progress=False)
    assert summary.written == 4


def test_existing_pairs_are_safe_until_told(photos, tmp_path):
    out = tmp_path / "out"
    (out / "LR").mkdir(parents=True)
    (out / "LR" / "003.png").write_bytes(b"precious")
    with pytest.raises(DataError, match=r"LR.003\.png exists already"):
        write_pairs(photos, out, num_workers=0, progress=False)
    assert contents(out) == {"LR/003.png": b"precious"}  # nothing else was written
    (out / "LR" / "mine.png").write_bytes(b"mine")
    write_pairs(photos, out, num_workers=0, overwrite=True, progress=False)
    pixels(out / "LR" / "003.png")
    assert (out / "LR" / "mine.png").read_bytes() == b"mine"


def test_unreadable_photos_are_named_and_do_not_stop_the_others(photos, tmp_path):
    (photos / "b.png").write_bytes((photos / "b.png").read_bytes()[:60])
    (photos / "c.PNG").write_text("this is text")
    out = tmp_path / "out"
    (out / "GT").mkdir(parents=True)
    (out / "GT" / "002.png").write_bytes(b"of an older run")
    summary = write_pairs(photos, out, num_workers=0, overwrite=True, progress=False)
    assert summary.written == 2
    assert [path.name for path, _ in summary.failed] == ["b.png", "c.PNG"]
    assert all(str(path) in reason for path, reason in summary.failed)
    assert names(out / "GT") == names(out / "LR") == ["001.png", "004.png"]
    assert "b.png" in str(summary) and "c.PNG" in str(summary)


def test_a_photo_too_small_for_the_scale_is_named(photos, tmp_path):
    save_photo(photos / "e.png", width=3, height=3)
    summary = write_pairs(photos, tmp_path / "out", scale=4, num_workers=0, progress=False)
    assert summary.written == 4 and "too small (3x3) for scale 4" in summary.failed[0][1]
    before = names(tmp_path / "out" / "GT")
    with pytest.raises(DataError, match="none of the 5 photos .* makes a pair; .* too small .* for scale 1000"):
        write_pairs(photos, tmp_path / "out", scale=1000, num_workers=0, overwrite=True, progress=False)
    assert names(tmp_path / "out" / "GT") == names(tmp_path / "out" / "LR") == before


def test_a_full_disk_leaves_no_half_pair(photos, tmp_path, monkeypatch, capsys):
    save, calls = Image.Image.save, []

    def failing_save(self, path, *args, **kwargs):
        if str(path).endswith(".part"):
            calls.append(path)
            if len(calls) == 4:  # LR of the second pair
                raise OSError(28, "No space left on device")
        return save(self, path, *args, **kwargs)

    monkeypatch.setattr(Image.Image, "save", failing_save)
    with pytest.raises(DataError, match="No space left") as caught:
        write_pairs(photos, tmp_path / "out", num_workers=0)
    del caught
    gc.collect()
    assert capsys.readouterr() == ("", ""), "the bar ended with the call, and none is drawn into what comes next"
    assert names(tmp_path / "out" / "GT") == names(tmp_path / "out" / "LR") == ["001.png"]


def test_a_thousand_photos_need_four_digits(tmp_path, monkeypatch):
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(1000):
        (folder / f"{i:04}.png").write_bytes(b"")
    save_photo(folder / "0000.png")
    summary = write_pairs(folder, tmp_path / "out", num_workers=0, progress=False)
    assert names(summary.gt_dir) == ["0001.png"] and len(summary.failed) == 999


def test_nothing_to_do_is_an_error(tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(DataError, match="holds no photos"):
        write_pairs(empty, tmp_path / "out", progress=False)
    with pytest.raises(DataError, match="is not a folder"):
        write_pairs(tmp_path / "missing", tmp_path / "out", progress=False)
    (empty / "a.png").write_text("text")
    with pytest.raises(DataError, match=r"none of the 1 photos.*a\.png"):
        write_pairs(empty, tmp_path / "out", num_workers=0, progress=False)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match="file"):
        write_pairs(empty, tmp_path / "file", num_workers=0, progress=False)


def test_impossible_settings(photos, tmp_path):
    for settings, word in (
        ({"degradation": "bsrgam"}, "bsrgan"),
        ({"degradation": "heavy", "scale": 2}, "scale"),
        ({"scale": 0}, "scale"),
        ({"size": 0}, "size"),
        ({"num_workers": -1}, "num_workers"),
        ({"seed": -1}, "seed"),
    ):
        with pytest.raises(ConfigError, match=word):
            write_pairs(photos, tmp_path / "out", progress=False, **settings)
    assert not (tmp_path / "out").exists()


def test_progress_is_drawn_only_when_asked(photos, tmp_path, capsys):
    write_pairs(photos, tmp_path / "silent", num_workers=0, progress=False)
    assert capsys.readouterr() == ("", "")
    write_pairs(photos, tmp_path / "shown", num_workers=0)
    out, err = capsys.readouterr()
    assert out == "" and "Writing pairs" in err


@pytest.mark.parametrize("inside", ["GT", "LR"])
def test_photos_are_never_written_over(tmp_path, inside):
    (tmp_path / inside).mkdir()
    save_photo(tmp_path / inside / "002.png")
    before = (tmp_path / inside / "002.png").read_bytes()
    with pytest.raises(DataError, match="written over the photos"):
        write_pairs(tmp_path / inside, tmp_path, num_workers=0, overwrite=True, progress=False)
    assert (tmp_path / inside / "002.png").read_bytes() == before
