"""People on the workers of a Ray cluster: actors that hold one model each and write into a store that all can reach.

Ray restarts a worker that dies and gives it its people again; those whom it had written already are passed over.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

from .. import recognise
from ..errors import ConfigError, DataError
from ..model import MetaGPEN
from ..person import PersonStore
from .config import AdaptConfig
from .loop import OnError
from .many import Photos, learn_here

RETRIES = 3  # how often people are tried again whose worker dies

Group = list[tuple[str, Photos]]
Answer = tuple[list[str], list[tuple[str, Exception]]]


class Worker:
    """One model on one CPU or GPU."""

    def __init__(self, model: MetaGPEN, config: AdaptConfig, recogniser: recognise.Recogniser | None, where: str,
                 options: dict[str, Any], device: str):
        self.model, self.config, self.recogniser = model.to(device), config, recogniser  # moved by `adapt_stream`
        self.store = PersonStore(where, self.model, cache=0, options=options)

    def learn(self, group: Group) -> Answer:
        """(names now in the store, people who cannot be learned and why)."""
        waiting = [(name, photos) for name, photos in group if name not in self.store]
        failures: list[tuple[str, Exception]] = []
        done = {name for name, _ in group} - {name for name, _ in waiting}
        found = learn_here(self.model, waiting, self.config, self.recogniser, self.store,
                           lambda name, error: failures.append((name, error)))
        return [*done, *found], failures


def learn_on_ray(model: MetaGPEN, people: Iterable[tuple[str, Photos]], config: AdaptConfig,
                 recogniser: recognise.Recogniser | None, store: PersonStore, on_error: OnError | None,
                 workers: int | None = None) -> Iterator[str]:
    """Names of the people as they have been written into the store, in no order.

    Joins the cluster that this process or $RAY_ADDRESS names, else starts Ray on this machine. Workers take a GPU each
    where the cluster has some, else a CPU each; `workers`: how many, default all. Photos and store must lie where
    every worker can read them. Raises ConfigError without Ray, or for a store in one process' memory.
    """
    ray = ray_module()
    if "memory" in store.files.protocol:
        raise ConfigError(f"{store.where}: only this process sees that store; Ray's workers need a folder or an "
                          "object store that all of them reach")
    started = not ray.is_initialized()
    if started:
        ray.init(include_dashboard=False, log_to_driver=False)
    try:
        yield from share_out(ray, model, people, config, recogniser, store, on_error, workers)
    finally:
        if started:
            ray.shutdown()


def share_out(ray: Any, model: MetaGPEN, people: Iterable[tuple[str, Photos]], config: AdaptConfig,
              recogniser: recognise.Recogniser | None, store: PersonStore, on_error: OnError | None,
              workers: int | None) -> Iterator[str]:
    """A batch of people to every worker, and the next to whoever is done."""
    there = ray.cluster_resources()
    gpus = int(there.get("GPU", 0))
    room = gpus or int(there["CPU"])
    if workers is not None and workers > room:
        raise ConfigError(f"workers = {workers}: this cluster has room for {room}; give as many or fewer")
    kind = ray.remote(Worker).options(num_cpus=1, num_gpus=1 if gpus else 0, max_restarts=-1,
                                      max_task_retries=RETRIES)
    where = store.files.unstrip_protocol(store.root)
    held = ray.put(copy.deepcopy(model).cpu())
    staff = [kind.remote(held, config, recogniser, where, store.options, "cuda" if gpus else "cpu")
             for _ in range(workers or room)]
    waiting, size = iter(people), config.people_per_batch or (64 if gpus else 8)
    busy: dict[Any, tuple[Any, Group]] = {}

    def employ(worker: Any) -> None:
        if group := list(islice(waiting, size)):
            busy[worker.learn.remote(group)] = worker, group

    try:
        for worker in staff:
            employ(worker)
        while busy:
            (ready,), _ = ray.wait(list(busy), num_returns=1)
            worker, group = busy.pop(ready)
            learned, failures = answer(ray, ready, group, store)
            yield from learned
            for name, error in failures:
                if on_error is None:
                    raise error
                on_error(name, error)
            employ(worker)
    finally:
        for worker in staff:
            ray.kill(worker)


def answer(ray: Any, ready: Any, group: Group, store: PersonStore) -> Answer:
    """What a worker returned; for one that died every time, what the store holds of its people."""
    try:
        return ray.get(ready)
    except ray.exceptions.RayActorError as error:
        learned = [name for name, _ in group if name in store]
        lost = DataError(f"the worker died {RETRIES + 1} times while it learned the batch ({error}); give it more "
                         "memory or a smaller batch, then run again")
        return learned, [(name, lost) for name, _ in group if name not in learned]


def ray_module() -> Any:
    """Ray, if it is installed; it sends no usage statistics from here."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError:
        raise ConfigError("engine 'ray' needs Ray: pip install 'metagpen[ray]'; the engine 'embedded' does "
                          "not") from None
    return ray
