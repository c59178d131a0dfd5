"""A measurement shared by processes of one machine, which may also share its GPU."""

import multiprocessing
import pickle
import queue
import traceback
from collections.abc import Callable
from typing import Any

from gensparse.errors import ConfigError, GensparseError, ParallelError

Say = Callable[[str], None]
Work = Callable[[Any, int, Say], None]
"""What a process does: options, its number from 0, and where it says what it has done."""


def check_workers(device: str, workers: int) -> None:
    """ConfigError for another device, or no worker at all."""
    if device not in ("cpu", "cuda"):
        raise ConfigError(f"--device is {device!r}; choose cpu or cuda")
    if workers < 1:
        raise ConfigError(f"workers is {workers}; give a whole number from 1")


def share_work(work: Work, options: Any, workers: int, say: Say) -> None:
    """Do the work in so many processes, in this one if there is one only; it has to divide itself by its number.

    Args:
        work: a function that a new process can import.

    Raises:
        GensparseError: of the first worker that failed, when all others are done; what they finished is kept.
        ParallelError: a worker that ended without a word, or failed with another kind of error.
    """
    if workers == 1:
        work(options, 0, say)
        return
    context = multiprocessing.get_context("spawn")  # a forked process cannot use a GPU
    told: Any = context.Queue()
    running = {n: context.Process(target=_run, args=(work, options, n, told), daemon=True) for n in range(workers)}
    for process in running.values():
        process.start()
    failures: list[GensparseError] = []
    gone: set[int] = set()
    try:
        while running:
            _hear(told, running, gone, failures, say)
    finally:
        for process in running.values():
            process.terminate()
    if failures:
        raise failures[0]


def _hear(told: Any, running: dict[int, Any], gone: set[int], failures: list[GensparseError], say: Say) -> None:
    """One message; in silence, workers that have ended without a last one are missed.

    Args:
        gone: had ended at the silence before, so that a message of theirs would have come since.
    """
    try:
        number, kind, text = told.get(timeout=0.5)
    except queue.Empty:
        for number in [n for n, process in running.items() if not process.is_alive()]:
            if number in gone:
                code = running.pop(number).exitcode
                failures.append(ParallelError(f"worker {number} ended with code {code}; run again to go on"))
            gone.add(number)
        return
    if kind == "said":
        say(text)
    elif number in running:
        running.pop(number).join()
        if kind == "failed":
            failures.append(pickle.loads(text))


def _run(work: Work, options: Any, number: int, told: Any) -> None:
    """In the process of a worker."""
    try:
        work(options, number, lambda text: told.put((number, "said", text)))
    except GensparseError as error:
        told.put((number, "failed", pickle.dumps(error)))
    except Exception:
        told.put((number, "failed", pickle.dumps(ParallelError(f"worker {number} failed: {traceback.format_exc()}"))))
    else:
        told.put((number, "done", ""))
