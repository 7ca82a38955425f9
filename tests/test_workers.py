"""Worker processes: who does what, what an error or a death among them becomes."""

import os
import time

import pytest

from metagpen.errors import DataError
from metagpen.workers import spread


def remember(value: int) -> None:
    global added
    added = value


def add(job: int) -> int:
    return job + added


def fail(job: int) -> None:
    raise KeyError(job)


def die(job: int) -> None:
    os._exit(7)


def note_and_wait(path: str) -> None:
    open(path, "w").close()
    time.sleep(0.2)


def test_every_job_is_done_once_by_prepared_workers():
    assert dict(spread(add, range(5), 2, remember, 10)) == {job: job + 10 for job in range(5)}
    assert not list(spread(add, [], 2, remember, 10))


def test_what_a_job_raises_is_raised_here():
    with pytest.raises(KeyError, match="3"):
        list(spread(fail, [3], 1, remember, 0))


def test_a_death_is_told_in_a_sentence():
    with pytest.raises(DataError, match="a worker process died.*fewer workers"):
        list(spread(die, [1, 2], 1, remember, 0))


def test_jobs_are_dropped_when_nobody_asks_any_more(tmp_path):
    jobs = [str(tmp_path / str(number)) for number in range(20)]
    done = spread(note_and_wait, jobs, 1, remember, 0)
    next(done)
    done.close()
    assert 1 <= len(list(tmp_path.iterdir())) < 10
