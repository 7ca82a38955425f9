"""Interruptions: of worker processes, which leave them to their parent and never outlive it, and of long work, which
finishes its step first."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import parent_process


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
