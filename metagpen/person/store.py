"""Many people in one folder, on a disk or in an object store, read as they are needed.

The folder is the index. A person is one file that appears whole or not at all, and the file's name says whose it is:
nothing else has to agree with it, so neither a crash nor several writers can lose anybody.
"""

from __future__ import annotations

import json
import os
import re
import threading
from collections import OrderedDict
from collections.abc import ItemsView, Iterator, MutableMapping
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from ..atomic import whole_file
from ..errors import CheckpointError, ConfigError, DataError, PersonNotFound
from ..tensors import unpack_tensors
from .person import Person

if TYPE_CHECKING:
    from ..model import MetaGPEN

SUFFIX = ".safetensors"
LONGEST = 160  # bytes of a file's name before its suffix; file systems allow 255


class Items(ItemsView[str, "Person"]):
    """A store's (name, Person), without those whom another process deletes meanwhile."""

    def __iter__(self) -> Iterator[tuple[str, Person]]:
        for name in self._mapping:
            try:
                person = self._mapping[name]
            except PersonNotFound:
                continue
            yield name, person


class PersonStore(MutableMapping[str, Person]):
    """A dict {name: Person} that lives in a folder, for any number of people and of processes.

    where: a folder, or any URL that fsspec knows ("s3://bucket/people"; its driver, here s3fs, must be installed).
    model: the model that everybody in it was learned on. cache: Persons kept in memory, the least recently used go
    first; cache_bytes: the same in bytes of tensors, None for no such limit. options: for fsspec, such as credentials.

    A cached Person is handed out only while its file is unchanged, so readers see at once what others write or delete.
    Writes are atomic on local disks (temporary file, flushed, renamed) and on object stores (one put). The folder is
    made by the first write; until then the store is empty. Names are any strings, also "", "a/b" and "Ada" beside
    "ada". Threads may share a store. Raises ConfigError for a URL that cannot be used.
    """

    def __init__(self, where: str | Path, model: MetaGPEN, *, cache: int = 64, cache_bytes: int | None = None,
                 options: dict[str, Any] | None = None):
        if cache < 0 or (cache_bytes is not None and cache_bytes < 0):
            raise ConfigError(f"cache = {cache}, cache_bytes = {cache_bytes}: sizes cannot be negative; 0 for no cache")
        self.where, self.model, self.options = str(where), model, dict(options or {})
        try:
            self.files, self.root = fsspec.url_to_fs(self.where, use_listings_cache=False, **self.options)
        except Exception as error:  # every driver has errors of its own for what it lacks in the URL
            raise ConfigError(f"{self.where}: not a place for a store ({error})") from error
        self.cache, self.cache_bytes = cache, cache_bytes
        self._kept: OrderedDict[str, tuple[str, Person]] = OrderedDict()
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        """For a copy or another process: with a lock and a cache of its own, empty."""
        return {**self.__dict__, "_kept": OrderedDict(), "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())

    def path(self, name: str) -> str:
        """Where the person's file is or would be, as fsspec calls it; on a local disk `Person.load` reads it."""
        return f"{self.root.rstrip('/')}/{file_name(name)}{SUFFIX}"

    def __getitem__(self, name: str) -> Person:
        """The Person. Raises PersonNotFound (a KeyError), or CheckpointError for a damaged or foreign file."""
        if not isinstance(name, str):
            raise self._missing(name)
        path = self.path(name)
        try:
            state = self.files.ukey(path)
            kept = self._recall(path, state)
            if kept is not None:
                return kept
            data = self.files.cat_file(path)
        except FileNotFoundError:
            self._forget(path)
            raise self._missing(name) from None
        person = Person.from_bytes(data, self.model, path)
        self._keep(path, state, person)
        return person

    def __setitem__(self, name: str, person: Person) -> None:
        """Write the Person in the place of whoever had the name. Raises CheckpointError for one of another model, and
        DataError for a name that is no text."""
        if not isinstance(name, str):
            raise DataError(f"{name!r} is no name for a person in {self.where}; give text, such as {str(name)!r}")
        if not isinstance(person, Person):
            raise DataError(f"'{name}': a Person is needed, not {type(person).__name__}")
        self.check_model(person.model, f"'{name}'")
        self.write(self.path(name), person.to_bytes(name=json.dumps(name)))

    def __delitem__(self, name: str) -> None:
        """Delete the person's file. Raises PersonNotFound (a KeyError)."""
        if not isinstance(name, str):
            raise self._missing(name)
        path = self.path(name)
        self._forget(path)
        try:
            if not self.files.exists(path):
                raise FileNotFoundError
            self.files.rm_file(path)
        except FileNotFoundError:  # also when somebody else was faster
            raise self._missing(name) from None

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self.files.exists(self.path(name))

    def __iter__(self) -> Iterator[str]:
        """Names as one listing of the folder found them, sorted by file; nobody is loaded."""
        return (name for path in self._listing() if (name := self._name(path)) is not None)

    def items(self) -> ItemsView[str, Person]:
        return Items(self)

    def __len__(self) -> int:
        return len(self._listing())

    def __repr__(self) -> str:
        return f"PersonStore({self.where!r})"

    def check_model(self, model: MetaGPEN, what: str) -> None:
        """Raises CheckpointError, about `what`, unless this is the model that everybody in the store was learned on."""
        if model.fingerprint != self.model.fingerprint:
            raise CheckpointError(f"{what} is of another model than the people in {self.where}; adapt again from the "
                                  "photos on the store's model, or keep another store for that model")

    def write(self, path: str, data: bytes) -> None:
        """Put a whole file into place: others see the old one or the new one, never a part."""
        self.files.makedirs(path.rpartition("/")[0], exist_ok=True)
        if not isinstance(self.files, LocalFileSystem):
            self.files.pipe_file(path, data)
            return
        with whole_file(path) as temporary, temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    def _listing(self) -> list[str]:
        try:
            found = self.files.ls(self.root, detail=False)
        except FileNotFoundError:
            return []
        except NotImplementedError:
            raise DataError(f"{self.where}: not a place for a store, as nothing there can be listed") from None
        except NotADirectoryError:
            found = [self.root]
        if found == [self.root]:  # how a local disk lists a file
            raise DataError(f"{self.where}: a file, not a folder of Persons; one Person's is read by Person.load, or "
                            "given to metagpen restore as --person")
        return sorted(path for path in found if path.endswith(SUFFIX))

    def _name(self, path: str) -> str | None:
        """Whose file it is: from its name, or from its header where the name was too long for a file's. None where
        another process has deleted that since."""
        stem = path.rpartition("/")[2].removesuffix(SUFFIX)
        name = decoded(stem)
        if name is None and "~" in stem:
            try:
                name = json.loads(unpack_tensors(self.files.cat_file(path))[1]["name"])
            except FileNotFoundError:
                return None
            except Exception as error:  # safetensors raises its own, undocumented error types
                raise DataError(f"{path}: a damaged file of a store ({error}); delete it and learn that person "
                                "again") from None
        if not isinstance(name, str) or file_name(name) != stem:
            raise DataError(f"{path}: not a file that a store wrote; take it out of the folder and put it in with "
                            "store[name] = Person.load(file, model)")
        return name

    def _missing(self, name: object) -> PersonNotFound:
        return PersonNotFound(f"nobody called '{name}' in {self.where}; list(store) shows who is there")

    def _recall(self, path: str, state: str) -> Person | None:
        with self._lock:
            known, person = self._kept.get(path, (None, None))
            if known != state:
                self._kept.pop(path, None)
                return None
            self._kept.move_to_end(path)
            return person

    def _keep(self, path: str, state: str, person: Person) -> None:
        with self._lock:
            self._kept[path] = (state, person)
            self._kept.move_to_end(path)
            while self._kept and self._too_full():
                self._kept.popitem(last=False)

    def _too_full(self) -> bool:
        held = sum(size(person) for _, person in self._kept.values()) if self.cache_bytes is not None else 0
        return len(self._kept) > self.cache or (self.cache_bytes is not None and held > self.cache_bytes)

    def _forget(self, path: str) -> None:
        with self._lock:
            self._kept.pop(path, None)


def size(person: Person) -> int:
    """Bytes of the Person's tensors in memory (float32; its file has half)."""
    return sum(value.numel() * value.element_size() for value in person.parameters.values())


def file_name(name: str) -> str:
    """A name for a file: a-z, 0-9, '_' and '-' stay, every other byte of the UTF-8 becomes %xx ("Ada" is "%41da", for
    file systems that do not tell capitals apart). Too long: its beginning, '~' and a hash. Empty: '%'."""
    raw = name.encode("utf-8", "surrogatepass")
    safe = re.sub(rb"[^a-z0-9_-]", lambda match: b"%%%02x" % match[0][0], raw).decode() or "%"
    if len(safe) <= LONGEST:
        return safe
    return f"{safe[:LONGEST - 41]}~{sha256(raw).hexdigest()[:40]}"


def decoded(stem: str) -> str | None:
    """The name that `file_name` wrote as `stem`, None where it cannot be told."""
    if stem == "%":
        return ""
    if not re.fullmatch(r"([a-z0-9_-]|%[0-9a-f]{2})+", stem):
        return None
    raw = re.sub(rb"%(..)", lambda match: bytes([int(match[1], 16)]), stem.encode())
    try:
        return raw.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        return None
