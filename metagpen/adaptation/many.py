"""Learning any number of people: as a dict, or into a store where an interrupted run goes on later."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence, Sized
from os import PathLike
from typing import Any

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text
from torch import Tensor

from .. import recognise
from ..errors import ConfigError, DataError
from ..faces.photo import PhotoSource
from ..model import MetaGPEN
from ..person import Person, PersonStore
from .config import AdaptConfig
from .loop import OnError, adapt_stream, settled

Photos = Iterable[PhotoSource] | Tensor
People = Mapping[str, Photos] | Iterable[tuple[str, Photos]]
SETTINGS = "adapt_many.json"
ENGINES = ("embedded", "ray")


def adapt_many(model: MetaGPEN, people: People, steps: int | None = None, *, start: bool | None = None,
               seed: int | None = None, config: AdaptConfig | None = None,
               recogniser: recognise.Recogniser | None = None, batch: int | None = None,
               store: PersonStore | None = None, on_error: OnError | None = None, engine: str = "embedded",
               workers: int | None = None, progress: bool = False) -> MutableMapping[str, Person]:
    """`adapt` for many people, several in one batch.

    people: {name: photos}, or an iterable of (name, photos) that is read as far as needed, so that millions fit. batch:
    how many learn at a time; default `config.people_per_batch`, and where that is 0 as many as memory allows.

    store: where Persons are written as soon as they are learned. People who are in it already are passed over, so a
    run that was interrupted is gone on with by calling again; settings other than those that the store was filled
    with are a ConfigError, another model is a CheckpointError. on_error: called with (name, error) for everybody who
    cannot be learned (no face, a damaged file, a name given twice or that is no text), while the others go on; without
    it the first such error is raised. engine: "embedded" learns here; "ray" on the workers of a Ray cluster
    (`metagpen.adaptation.on_ray`), and needs a store; workers: how many of them.

    Returns the store, or without one a dict. A person's result does not depend on who shares the batch, up to float
    rounding.
    """
    config = settled("adapt_many", model, config, recogniser, steps=steps, start=start, seed=seed,
                     people_per_batch=batch)
    if engine not in ENGINES:
        raise ConfigError(f"engine '{engine}' is not known; choose one of {', '.join(ENGINES)}")
    if store is not None and not isinstance(store, PersonStore):
        raise ConfigError(f"store: {store!r} is no PersonStore; give store=PersonStore(folder, model)")
    if engine == "ray" and store is None:
        raise ConfigError("the Ray engine writes people into a store; give it one: store=PersonStore(folder, model)")
    if workers is not None and engine != "ray":
        raise ConfigError("workers are those of the Ray engine; add engine='ray', or leave them out")
    if engine == "ray":
        from .on_ray import learn_on_ray, ray_module

        ray_module()  # before the store is given settings, which would bind it
    if store is not None:
        store.check_model(model, "what is learned here")
        keep_settings(store, config, recogniser)
    result: MutableMapping[str, Person] = {} if store is None else store
    with Progress(*columns(), disable=not progress) as bar:
        task = bar.add_task("", total=len(people) if isinstance(people, Sized) else None)

        def failed(name: str, error: Exception) -> None:
            on_error(name, error)
            bar.advance(task)

        report = failed if on_error else None
        waiting = to_do(people, store, report, lambda: bar.update(task, advance=1))
        if engine == "ray":
            finished = learn_on_ray(model, waiting, config, recogniser, store, report, workers)
        else:
            finished = learn_here(model, waiting, config, recogniser, result, report)
        for _ in finished:
            bar.advance(task)
    return result


def learn_here(model: MetaGPEN, people: Iterable[tuple[str, Photos]], config: AdaptConfig,
               recogniser: recognise.Recogniser | None, result: MutableMapping[str, Person],
               on_error: OnError | None) -> Iterator[str]:
    """Names of the people as they have been put into `result`."""
    for number, (name, person) in enumerate(adapt_stream(model, people, config, recogniser, on_error=on_error)):
        if not number and isinstance(result, PersonStore):  # another process may have found it empty, too
            must_be_as_noted(result, settings_of(config, result, recogniser))
        result[name] = person
        yield name


def to_do(people: People, store: PersonStore | None, on_error: OnError | None,
          passed_over: Callable[[], None]) -> Iterator[tuple[str, Photos]]:
    """The people who are not in the store, each of them once."""
    names_alone = isinstance(people, Sequence) and any(isinstance(one, str) for one in people)
    if isinstance(people, (str, PathLike)) or names_alone:
        raise ConfigError("people: names with their photos are needed, {name: photos}, or pairs of both; a folder with "
                          "one sub-folder per person is for `metagpen adapt-many`")
    done = set() if store is None else set(store)
    seen: set[str] = set()
    for name, photos in people.items() if isinstance(people, Mapping) else people:
        error = None
        if not isinstance(name, str):
            error = DataError(f"{name!r} is no name; people are called by text, such as {str(name)!r}")
        elif name in seen:
            error = DataError(f"'{name}' is given twice; put all photos of a person together, and tell people apart")
        if error is not None:
            if on_error is None:
                raise error
            on_error(name, error)
            continue
        seen.add(name)
        if name in done:
            passed_over()
        else:
            yield name, photos


def keep_settings(store: PersonStore, config: AdaptConfig, recogniser: recognise.Recogniser | None) -> None:
    """Note beside the people how they are learned. Raises ConfigError where others of the store were otherwise."""
    wanted = settings_of(config, store, recogniser)
    if noted(store) is None or not len(store):  # settings under which nobody was learned bind nobody
        store.write(note_of(store), json.dumps(wanted, indent=1).encode())
    else:
        must_be_as_noted(store, wanted)


def settings_of(config: AdaptConfig, store: PersonStore, recogniser: recognise.Recogniser | None) -> dict[str, Any]:
    """What decides a person's numbers, as its JSON file holds it."""
    settings = config.for_model(store.model).model_dump(exclude={"people_per_batch", "cuda_graphs", "compile"})
    settings |= {"model": store.model.fingerprint,
                 "recogniser": recogniser.name if recogniser else store.model.card.get("recogniser", "embedded")}
    return json.loads(json.dumps(settings))


def note_of(store: PersonStore) -> str:
    return f"{store.root.rstrip('/')}/{SETTINGS}"


def noted(store: PersonStore) -> dict[str, Any] | None:
    """The settings that the store's people were learned with; None before anybody was."""
    try:
        return dict(json.loads(store.files.cat_file(note_of(store))))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise DataError(f"{note_of(store)}: not readable ({error}); delete it to fill the store with other settings"
                        ) from None


def must_be_as_noted(store: PersonStore, wanted: dict[str, Any]) -> None:
    """Raises ConfigError where the store's people are learned otherwise."""
    known = noted(store) or {}
    other = [f"{key} = {known.get(key)!r} (now {wanted.get(key)!r})" for key in sorted(known.keys() | wanted.keys())
             if known.get(key) != wanted.get(key)]
    if other:
        raise ConfigError(f"{store.where}: its people were learned with {', '.join(other)}; go on with the same "
                          "settings, or take another store")


class Pace(ProgressColumn):
    """People learned per second."""

    def render(self, task: Task) -> Text:
        return Text("" if task.speed is None else f"{task.speed:.2f} people/s")


def columns() -> list[ProgressColumn]:
    return [SpinnerColumn(), TextColumn("people"), BarColumn(), MofNCompleteColumn(), Pace(), TimeElapsedColumn(),
            TextColumn("left"), TimeRemainingColumn()]
