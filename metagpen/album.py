"""Albums of the demo: photos of people, some to learn from and some to restore.

"own" ships with the package (people sampled from an embedded model, nobody real); "lisa" is one real person
under CC0, fetched on demand; any other name is a folder: photos of one person, or a sub-folder per person.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import tempfile
from pathlib import Path

from .atomic import write_text
from .errors import DataError
from .faces import photos_in
from .identities import People, Photo
from .weights.catalogue import cache_folder

OWN_ALBUM = Path(__file__).parent / "weights" / "album"

# DeBruine & Jones, webmorphR.stim, CC0. The commit id is the checksum: git names every object by the hash of its
# content, so what `git fetch` hands over for this commit is these files and no others.
LISA_REPOSITORY = "https://github.com/debruine/webmorphR.stim"
LISA_COMMIT = "fa8b78fda2d659bb74ce62fcd99c4407551d2a77"
LISA_FILES = (
    *(f"inst/lisa/lisa{i}.jpg" for i in (1, 2, 3, 4)),
    *(f"inst/zoom/{distance}cm.jpg" for distance in (30, 45, 60)),
)
FETCH_SECONDS = 180


def read_album(album: str | Path) -> People:
    """The people of an album: 'own', 'lisa', or a folder with a person's photos or a sub-folder per person.

    Raises DataError when it is missing, or shows somebody in fewer than two photos.
    """
    if album == "own":
        people = People.from_folder(OWN_ALBUM)
    elif album == "lisa":
        people = lisa()
    elif Path(album).is_dir() and (files := photos_in(Path(album))):
        people = People({Path(album).resolve().name: map(Photo, files)})
    else:
        people = People.from_folder(album)
    for name, photos in people.items():
        if len(photos) < 2:
            raise DataError(
                f"album '{album}': only one photo of '{name}'; the demo needs one to learn from and one to restore"
            )
    return people


def lisa() -> People:
    """The CC0 person: from the developers' shared data where it is ($METAGPEN_SHARED, or `shared` beside the
    repository), else fetched into the user's cache."""
    shared = Path(os.environ.get("METAGPEN_SHARED") or Path(__file__).resolve().parents[2] / "shared")
    london = shared / "photos" / "london_512"
    if (london / "lisa").is_dir():
        return People.from_folder(london).select(["lisa"])
    return People({"lisa": map(Photo, photos_in(fetch_lisa(cache_folder())))})


def fetch_lisa(cache: Path, repository: str = LISA_REPOSITORY, commit: str = LISA_COMMIT) -> Path:
    """The folder with the CC0 photos: fetched once with git at the pinned commit, afterwards only checked.

    Raises DataError when git is missing, or the repository cannot be reached within FETCH_SECONDS.
    """
    home = cache / f"lisa-{commit[:12]}"
    sums = home / "sha256.json"
    if sums.is_file() and sums.read_text("utf-8", "replace") == listed(checksums(home / "lisa")):
        return home / "lisa"
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as temporary:
        git(temporary, "init", "--quiet")
        git(temporary, "remote", "add", "origin", repository)
        git(temporary, "fetch", "--quiet", "--depth=1", "--filter=blob:none", "origin", commit)
        git(temporary, "checkout", "--quiet", commit, "--", *LISA_FILES)
        (home / "lisa").mkdir(parents=True, exist_ok=True)
        for file in LISA_FILES:
            os.replace(Path(temporary) / file, home / "lisa" / Path(file).name)
    write_text(sums, listed(checksums(home / "lisa")))
    return home / "lisa"


def git(folder: str, *arguments: str) -> None:
    """Run git, bounded in time, never asking for a password. Raises DataError with its last line."""
    environment = os.environ | {"GIT_TERMINAL_PROMPT": "0"}
    advice = "the album 'lisa' needs git and a network the first time; the album 'own' needs neither"
    try:
        subprocess.run(
            ["git", *arguments],
            cwd=folder,
            env=environment,
            check=True,
            capture_output=True,
            text=True,
            timeout=FETCH_SECONDS,
        )
    except FileNotFoundError:
        raise DataError(f"git is not installed; {advice}") from None
    except subprocess.TimeoutExpired:
        raise DataError(f"git {arguments[0]} took more than {FETCH_SECONDS} s; {advice}") from None
    except subprocess.CalledProcessError as error:
        reason = (error.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise DataError(f"git {arguments[0]} failed ({reason}); {advice}") from None


def listed(sums: dict[str, str]) -> str:
    """Checksums as their file holds them."""
    return json.dumps(sums, indent=1) + "\n"


def checksums(folder: Path) -> dict[str, str]:
    """File name -> SHA-256 of every photo in the folder."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*.jpg"))}
