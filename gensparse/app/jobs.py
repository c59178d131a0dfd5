"""Jobs: work that waits, runs and ends, owned by whoever asked for it.

One worker thread per engine takes jobs in turn, so that a device never computes two at a time. Nothing here knows how
a page looks or what a model is.
"""

import contextlib
import logging
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol

from gensparse.engine.values import Event, OutputOptions, Result
from gensparse.errors import BusyError, Cancelled, ConfigError, GensparseError
from gensparse.request import Request

LOG = logging.getLogger(__name__)
KEPT = 200  # ended jobs that can still be asked about
STOPPED = "stopped on request"
LEFT = "stopped because its page was closed"


class State(StrEnum):
    """Where a job is."""

    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def ended(self) -> bool:
        return self in (State.DONE, State.FAILED, State.CANCELLED)


class Engine(Protocol):
    """What a worker needs of `gensparse.engine.Runner`."""

    def execute(
        self,
        request: Request,
        output: OutputOptions | None = None,
        *,
        on_event: Callable[[Event], None] | None = None,
        cancel: threading.Event | None = None,
    ) -> Result: ...

    def tidy(self) -> None:
        """Give back memory that nothing uses."""
        ...


Work = Callable[[Engine, Callable[[Event], None], threading.Event], Any]
"""What a job does: (engine, on_event, cancel) -> result. It raises Cancelled soon after `cancel` is set."""


def run_request(request: Request, output: OutputOptions) -> Work:
    """The work of making the pictures of a request."""
    return lambda engine, on_event, cancel: engine.execute(request, output, on_event=on_event, cancel=cancel)


@dataclass(eq=False)
class Job:
    """One piece of work; its fields are written by `Jobs` only.

    Args:
        id: unguessable; with it alone a job of a visitor without a cookie can be asked for.
        owner: of whom it is, see `sessions`.
        kind: what it does, for people: "generate", "upscale", ...
        request: what is made; None for other work.
        folder: where its files are.
        facts: what the one who submitted it wants to remember.
    """

    id: str
    owner: str
    kind: str
    work: Work = field(repr=False)
    request: Request | None = None
    folder: Path | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    created: float = field(default_factory=time.time)
    started: float | None = None
    ended: float | None = None
    state: State = State.QUEUED
    event: Event | None = None  # the latest but warnings
    preview: Any = None  # the latest small picture (PIL)
    warnings: list[str] = field(default_factory=list)
    result: Any = None
    error: str | None = None  # in words
    reason: str = ""  # why it was cancelled
    revision: int = 0  # changes with everything above
    seen: float = field(default_factory=time.monotonic)
    cancel: threading.Event = field(default_factory=threading.Event, repr=False)
    over: threading.Event = field(default_factory=threading.Event, repr=False)

    @property
    def stopping(self) -> bool:
        return self.state is State.RUNNING and self.cancel.is_set()

    @property
    def seconds(self) -> float:
        """How long it has run."""
        return 0.0 if self.started is None else (self.ended or time.time()) - self.started

    @property
    def share(self) -> float:
        """Part of the work that is done, 0 to 1, as well as it is known."""
        event = self.event
        if self.state is State.DONE:
            return 1.0
        if event is None or event.phase not in ("step", "decode", "write"):
            return 0.0
        if event.phase == "write":
            part = 0.98
        elif event.eta is not None and event.pictures == 1 and self.seconds + event.eta > 0:
            part = self.seconds / (self.seconds + event.eta)
        else:
            part = (event.stage + event.step / max(1, event.steps)) / max(1, event.stages)
        return min(0.99, (event.picture + part) / max(1, event.pictures))

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for its end; False when it has not ended in time."""
        return self.over.wait(timeout)


class Jobs:
    """A bounded queue in front of one worker per engine.

    Args:
        engines: one worker thread each.
        limit: jobs that may wait; more are refused.
        per_owner: jobs of one owner that may wait or run.
        grace: seconds that a job goes on after its owner has gone.
        away: seconds since an owner was last there; 0 for one who is.
        forgotten: called with a job that is dropped from memory.
        prepare: called once on every worker before its first job.
    """

    def __init__(
        self,
        engines: Sequence[Engine],
        *,
        limit: int = 16,
        per_owner: int | None = None,
        grace: float = 60.0,
        away: Callable[[str], float] = lambda owner: 0.0,
        forgotten: Callable[[Job], None] = lambda job: None,
        prepare: Callable[[Engine], None] | None = None,
    ) -> None:
        self.limit, self.grace = limit, grace
        self._per_owner = per_owner or limit + len(engines)
        self._away, self._forgotten, self._prepare = away, forgotten, prepare
        self._lock = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._jobs: dict[str, Job] = {}
        self._closed = threading.Event()
        self._threads = [threading.Thread(target=self._serve, args=(engine,), daemon=True) for engine in engines]
        self._threads.append(threading.Thread(target=self._watch, daemon=True))
        for thread in self._threads:
            thread.start()

    # -- asked by pages
    def submit(
        self,
        owner: str,
        work: Work,
        *,
        kind: str,
        request: Request | None = None,
        folder: Path | None = None,
        **facts: Any,
    ) -> Job:
        """Queue a job. Raises BusyError when the queue, or the share of this owner, is full."""
        with self._lock:
            if self._closed.is_set():
                raise BusyError("the server is stopping; try again when it runs")
            if len(self._waiting) >= self.limit:
                raise BusyError(f"the queue is full: {len(self._waiting)} jobs wait; try again in a few minutes")
            own = sum(job.owner == owner and not job.state.ended for job in self._jobs.values())
            if own >= self._per_owner:
                raise BusyError(f"{own} jobs of yours wait or run, which is the limit; wait for one, or cancel it")
            job = Job(secrets.token_urlsafe(18), owner, kind, work, request, folder, dict(facts))
            self._jobs[job.id] = job
            self._waiting.append(job)
            self._forget()
            self._lock.notify_all()
        return job

    def get(
        self, job_id: str, owner: str | None = None, *, open_to_all: Callable[[Job], bool] = lambda job: False
    ) -> Job:
        """A job by its id; asking counts as being there.

        Args:
            owner: only a job of this owner; None for any.
            open_to_all: which jobs may be asked for by everybody who knows their id.

        Raises:
            ConfigError: there is none; the sentence is the same for a job of somebody else.
        """
        with self._lock:
            job = self._jobs.get(job_id) if isinstance(job_id, str) else None
            if job is None or (owner is not None and job.owner != owner and not open_to_all(job)):
                raise ConfigError("there is no such job; give the id that was answered when it was submitted")
            job.seen = time.monotonic()
            return job

    def of(self, owner: str) -> list[Job]:
        """All jobs of an owner that are remembered, newest first."""
        with self._lock:
            return [job for job in reversed(self._jobs.values()) if job.owner == owner]

    def unfinished(self) -> list[Job]:
        """Jobs that run, then those that wait, in turn."""
        with self._lock:
            running = [job for job in self._jobs.values() if job.state is State.RUNNING]
            return running + list(self._waiting)

    def position(self, job: Job) -> int:
        """Place in the queue, 1 for the next; 0 when it does not wait."""
        with self._lock:
            return self._waiting.index(job) + 1 if job in self._waiting else 0

    def cancel(self, job: Job, reason: str = STOPPED) -> None:
        """Take a job out of the queue, or stop it after its current step or tile. An ended one stays as it is."""
        with self._lock:
            if job.state.ended:
                return
            job.reason = job.reason or reason
            job.cancel.set()
            job.revision += 1
            if job.state is State.QUEUED:
                self._waiting.remove(job)
                self._end(job, State.CANCELLED)

    def close(self, timeout: float = 30.0) -> None:
        """Cancel everything and end the workers."""
        self._closed.set()
        for job in self.unfinished():
            self.cancel(job, "stopped because the server ends")
        with self._lock:
            self._lock.notify_all()
        for thread in self._threads:
            thread.join(timeout)

    # -- workers
    def _serve(self, engine: Engine) -> None:
        if self._prepare is not None:
            try:
                self._prepare(engine)
            except Exception:  # the first job will say what is wrong
                LOG.exception("preparing a worker failed")
        while (job := self._next()) is not None:
            self._run(engine, job)

    def _next(self) -> Job | None:
        with self._lock:
            while not self._waiting and not self._closed.is_set():
                self._lock.wait()
            if self._closed.is_set():
                return None
            job = self._waiting.popleft()
            job.state, job.started = State.RUNNING, time.time()
            job.revision += 1
            for waiting in self._waiting:
                waiting.revision += 1  # one place further
            return job

    def _run(self, engine: Engine, job: Job) -> None:
        outcome: tuple[State, Any, str | None]
        try:
            result = job.work(engine, lambda event: self._note(job, event), job.cancel)
        except Cancelled as stop:
            job.reason = job.reason or str(stop)
            outcome = (State.CANCELLED, None, None)
        except GensparseError as error:
            outcome = (State.FAILED, None, str(error))
        except Exception as error:
            LOG.exception("job %s failed", job.kind)
            outcome = (State.FAILED, None, f"unexpected error ({type(error).__name__}); the server's log says more")
        else:
            stopped = getattr(result, "status", "ok") == "cancelled"
            outcome = (State.CANCELLED if stopped else State.DONE, result, None)
        # here, where errors and what their frames held are gone
        with contextlib.suppress(Exception):
            engine.tidy()
        state, job.result, job.error = outcome
        with self._lock:
            self._end(job, state)

    def _note(self, job: Job, event: Event) -> None:
        with self._lock:
            if event.phase == "warning":
                job.warnings.append(event.text)
            else:
                job.event = event
                job.preview = event.preview if event.preview is not None else job.preview
            job.revision += 1

    def _end(self, job: Job, state: State) -> None:
        job.state, job.ended, job.preview = state, time.time(), None
        job.work = _nothing  # what it holds is not needed any more
        job.revision += 1
        job.over.set()

    def _forget(self) -> None:
        """Drop the oldest ended jobs."""
        ended = [job for job in self._jobs.values() if job.state.ended]
        for job in ended[: max(0, len(ended) - KEPT)]:
            del self._jobs[job.id]
            self._forgotten(job)

    # -- those who left
    def _watch(self) -> None:
        while not self._closed.wait(min(1.0, self.grace / 4)):
            for job in self._left():
                self.cancel(job, LEFT)

    def _left(self) -> Iterator[Job]:
        now = time.monotonic()
        for job in self.unfinished():
            if not job.cancel.is_set() and min(now - job.seen, self._away(job.owner)) > self.grace:
                yield job


def _nothing(*_: Any) -> None:
    """The work of a job that has ended."""
