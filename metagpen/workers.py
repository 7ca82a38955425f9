"""Worker processes, which leave interruptions to their parent and never outlive it; long work that finishes its step
before it is interrupted."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context, parent_process
from typing import Any, TypeVar

from .errors import DataError

Job, Result = TypeVar("Job"), TypeVar("Result")


def spread(work: Callable[[Job], Result], jobs: Iterable[Job], workers: int, prepare: Callable[..., None],
           *arguments: Any) -> Iterator[tuple[Job, Result]]:
    """(job, work(job)) from so many processes, in the order in which they finish; each begins with prepare(*arguments).

    The processes are spawned, not forked: a forked copy of a process whose torch has run threads can hang. Jobs that
    nobody has begun are dropped when the caller stops asking. Raises DataError when a process dies; what `work` raises
    is raised here.
    """
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _prepare, (prepare, arguments))
    try:
        with uninterrupted():
            running = {pool.submit(work, job): job for job in jobs}
        for done in as_completed(running):
            yield running[done], done.result()
    except BrokenProcessPool:
        raise DataError(
            "a worker process died, perhaps for want of memory: use fewer workers. If a script calls this, "
            'the call must stand below `if __name__ == "__main__":`'
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _prepare(prepare: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    obey_parent()
    prepare(*arguments)


def obey_parent() -> None:
    """A worker's first act: the parent is told of Ctrl-C, and tells; when it is gone, even killed, so is the worker."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_follow_parent, daemon=True).start()


def _follow_parent() -> None:
    parent_process().join()
    os._exit(1)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Processes that are started inside do not hear of Ctrl-C either before they could ignore it.

    One that comes meanwhile is not lost: it is heard at the end.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def finishing() -> Iterator[None]:
    """What is begun inside is finished: a Ctrl-C that comes meanwhile raises KeyboardInterrupt at the end.

    Blocking the signal would not do: another thread, a progress bar's, would take it.
    """
    if threading.current_thread() is not threading.main_thread():  # only there can handlers be set, or run
        yield
        return
    heard: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: heard.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if heard:
        raise KeyboardInterrupt
