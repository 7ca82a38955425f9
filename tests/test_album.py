"""The demo's albums: folders, the package's own, and the pinned download (from a local repository)."""

import hashlib
import json
import subprocess

import pytest
from PIL import Image

from metagpen import album
from metagpen.errors import DataError


def photo(path, colour=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (colour, 0, 0)).save(path)


def test_a_folder_is_one_person_or_one_per_sub_folder(tmp_path):
    for i in range(3):
        photo(tmp_path / "ada" / f"{i}.png")
        photo(tmp_path / "bob" / f"{i}.png")
    assert {name: len(photos) for name, photos in album.read_album(tmp_path / "ada").items()} == {"ada": 3}
    assert {name: len(photos) for name, photos in album.read_album(tmp_path).items()} == {"ada": 3, "bob": 3}


def test_albums_that_cannot_serve(tmp_path):
    photo(tmp_path / "ada" / "1.png")
    with pytest.raises(DataError, match="only one photo of 'ada'"):
        album.read_album(tmp_path)
    with pytest.raises(DataError, match="nobody"):
        album.read_album(tmp_path / "nobody")


def test_our_own_album():
    """Three people, several aligned photos each, and a page that says what they are."""
    people = album.read_album("own")
    assert len(people) == 3
    assert all(len(photos) >= 4 for photos in people.values())
    assert all(p.landmarks is not None for photos in people.values() for p in photos)
    assert (album.OWN_ALBUM / "README.md").is_file()


def test_lisa_from_the_shared_photos(shared):
    people = album.read_album("lisa")
    assert list(people) == ["lisa"] and len(people["lisa"]) == len(album.LISA_FILES)


@pytest.fixture
def repository(tmp_path):
    """A repository that holds files of the names that the album wants, and the commit that has them."""
    root = tmp_path / "repository"
    for i, file in enumerate(album.LISA_FILES):
        photo(root / file, colour=i)

    def git(*arguments):
        command = ["git", "-c", "user.name=a", "-c", "user.email=a@example.org", *arguments]
        return subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "--quiet")
    git("config", "uploadpack.allowFilter", "true")
    git("config", "uploadpack.allowAnySHA1InWant", "true")
    git("add", ".")
    git("commit", "--quiet", "-m", "photos")
    return root.as_uri(), git("rev-parse", "HEAD")


def test_fetching_once_checking_ever_after(repository, tmp_path):
    uri, commit = repository
    folder = album.fetch_lisa(tmp_path / "cache", uri, commit)
    assert sorted(p.name for p in folder.iterdir()) == sorted(f.rsplit("/", 1)[1] for f in album.LISA_FILES)
    sums = json.loads((folder.parent / "sha256.json").read_text())
    assert all(hashlib.sha256((folder / name).read_bytes()).hexdigest() == sums[name] for name in sums)

    (folder.parent / "sha256.json").write_bytes(b"\xff{ damaged")  # the photos are fetched again
    assert album.fetch_lisa(tmp_path / "cache", uri, commit) == folder
    assert json.loads((folder.parent / "sha256.json").read_text()) == sums

    nowhere = (tmp_path / "gone").as_uri()
    assert album.fetch_lisa(tmp_path / "cache", nowhere, commit) == folder, "served from the cache"

    damaged = folder / "lisa1.jpg"
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:100])
    with pytest.raises(DataError, match="git fetch failed"):
        album.fetch_lisa(tmp_path / "cache", nowhere, commit)
    album.fetch_lisa(tmp_path / "cache", uri, commit)
    assert damaged.read_bytes() == whole, "a damaged cache is fetched anew"


def test_another_commit_is_refused(repository, tmp_path):
    uri, _ = repository
    with pytest.raises(DataError, match="git fetch failed.*the album 'own' needs neither"):
        album.fetch_lisa(tmp_path / "cache", uri, "0" * 39 + "1")
    assert not list((tmp_path / "cache").iterdir()), "nothing is left behind"


def test_no_git(repository, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DataError, match="git is not installed"):
        album.fetch_lisa(tmp_path / "cache", *repository)


def test_a_server_that_does_not_answer(repository, tmp_path, monkeypatch):
    monkeypatch.setattr(album, "FETCH_SECONDS", 0.001)
    with pytest.raises(DataError, match="took more than"):
        album.fetch_lisa(tmp_path / "cache", *repository)
