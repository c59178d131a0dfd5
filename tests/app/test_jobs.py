"""The queue of the page, with an engine that computes nothing."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from gensparse.app.jobs import KEPT, LEFT, Job, Jobs, State, run_request
from gensparse.engine.values import Event, OutputOptions, Result
from gensparse.errors import BusyError, Cancelled, ConfigError, NumericsError
from gensparse.request import GenerateRequest

SOON = 10.0  # seconds after which something that should happen at once has not happened


def result(status: str = "ok") -> Result:
    return Result(status, (), {}, {"total": 1.0}, {}, {}, {})


@dataclass
class FakeEngine:
    """Takes as many steps as a request has; waits before each until it may go on."""

    go: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    ran: list[str] = field(default_factory=list)
    stopped_at: list[int] = field(default_factory=list)
    tidied: int = 0
    at_once: int = 0
    most: int = 0

    def execute(self, request, output=None, *, on_event=None, cancel=None) -> Result:
        self.at_once += 1
        self.most = max(self.most, self.at_once)
        try:
            for step in range(request.steps):
                self.go.acquire()
                if cancel.is_set():
                    self.stopped_at.append(step)
                    raise Cancelled("stopped on request")
                on_event(Event("step", step=step + 1, steps=request.steps, stages=1, eta=float(request.steps - step)))
            self.ran.append(request.prompt)
            return result()
        finally:
            self.at_once -= 1

    def tidy(self) -> None:
        self.tidied += 1

    def let(self, steps: int = 10_000) -> None:
        self.go.release(steps)


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def make(engine: FakeEngine):
    """`make(limit=3)` -> Jobs, closed at the end."""
    made: list[Jobs] = []

    def jobs(**options) -> Jobs:
        made.append(Jobs(options.pop("engines", [engine]), **options))
        return made[-1]

    yield jobs
    engine.let()
    for item in made:
        item.close()


def submit(jobs: Jobs, name: str = "a", owner: str = "me", steps: int = 2) -> Job:
    request = GenerateRequest(prompt=name, steps=steps)
    return jobs.submit(owner, run_request(request, OutputOptions()), kind="generate", request=request)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SOON
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.005)


def test_jobs_run_in_turn_one_at_a_time(make, engine: FakeEngine) -> None:
    jobs = make()
    first, second, third = (submit(jobs, name) for name in "abc")
    until(lambda: first.state is State.RUNNING)
    assert [jobs.position(job) for job in (first, second, third)] == [0, 1, 2]
    assert second.state is State.QUEUED
    engine.let()
    assert third.wait(SOON)
    assert engine.ran == ["a", "b", "c"]
    assert engine.most == 1
    assert {job.state for job in (first, second, third)} == {State.DONE}


def test_two_devices_run_two_jobs(make, engine: FakeEngine) -> None:
    jobs = make(engines=[engine, engine])
    both = [submit(jobs, name) for name in "ab"]
    until(lambda: all(job.state is State.RUNNING for job in both))


def test_progress_is_told_and_numbered(make, engine: FakeEngine) -> None:
    jobs = make()
    job = submit(jobs, steps=4)
    until(lambda: job.state is State.RUNNING)
    seen = [job.revision]
    shares = [job.share]
    for step in range(3):
        engine.let(1)
        until(lambda step=step: job.event is not None and job.event.step == step + 1)
        seen.append(job.revision)
        shares.append(job.share)
    assert seen == sorted(set(seen))
    assert shares[0] == 0
    assert all(0 <= share < 1 for share in shares)
    engine.let()
    assert job.wait(SOON)
    assert job.share == 1
    assert job.revision > seen[-1]


def test_warnings_are_kept_and_are_no_progress(make, engine: FakeEngine) -> None:
    def work(runner, on_event, cancel):
        on_event(Event("step", step=1, steps=2))
        on_event(Event("warning", text="mind the gap"))
        return result()

    job = make().submit("me", work, kind="lab")
    assert job.wait(SOON)
    assert job.warnings == ["mind the gap"]
    assert job.event.phase == "step"


def test_a_full_queue_says_so_and_takes_jobs_again_later(make, engine: FakeEngine) -> None:
    jobs = make(limit=3, per_owner=100)
    running = submit(jobs)
    until(lambda: running.state is State.RUNNING)
    waiting = [submit(jobs) for _ in range(3)]
    with pytest.raises(BusyError, match="queue is full: 3 jobs wait; try again"):
        submit(jobs)
    engine.let()
    assert all(job.wait(SOON) for job in waiting)
    late = submit(jobs)
    assert late.wait(SOON)


def test_one_visitor_cannot_fill_the_queue(make, engine: FakeEngine) -> None:
    jobs = make(limit=10, per_owner=2)
    mine = [submit(jobs, owner="me") for _ in range(2)]
    with pytest.raises(BusyError, match="2 jobs of yours"):
        submit(jobs, owner="me")
    assert submit(jobs, owner="you").state in (State.QUEUED, State.RUNNING)
    jobs.cancel(mine[1])
    assert submit(jobs, owner="me").state is State.QUEUED


def test_fifty_at_once_are_finished_or_refused_and_none_is_lost(make, engine: FakeEngine) -> None:
    jobs = make(limit=16, per_owner=100)
    accepted: list[Job] = []
    refused: list[str] = []
    lock, start = threading.Lock(), threading.Barrier(50)

    def one(number: int) -> None:
        start.wait()
        try:
            job = submit(jobs, str(number), owner=f"visitor {number}", steps=1)
        except BusyError as error:
            with lock:
                refused.append(str(error))
        else:
            with lock:
                accepted.append(job)

    threads = [threading.Thread(target=one, args=(number,)) for number in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(accepted) + len(refused) == 50
    assert len(accepted) in (16, 17)  # the worker may have taken one meanwhile
    engine.let()
    assert all(job.wait(SOON) for job in accepted)
    assert sorted(engine.ran) == sorted(job.request.prompt for job in accepted)


def test_cancelling_a_waiting_job_ends_it_at_once(make, engine: FakeEngine) -> None:
    jobs = make()
    first, second, third = (submit(jobs, name) for name in "abc")
    until(lambda: first.state is State.RUNNING)
    jobs.cancel(second)
    assert second.state is State.CANCELLED
    assert second.wait(0)
    assert jobs.position(third) == 1
    engine.let()
    assert third.wait(SOON)
    assert engine.ran == ["a", "c"]


def test_cancelling_a_running_job_stops_it_within_a_step_and_gives_memory_back(make, engine: FakeEngine) -> None:
    jobs = make()
    job = submit(jobs, steps=50)
    engine.let(3)
    until(lambda: job.event is not None and job.event.step == 3)
    jobs.cancel(job)
    assert job.stopping
    engine.let(1)
    assert job.wait(SOON)
    assert job.state is State.CANCELLED
    assert engine.stopped_at == [3]
    assert engine.tidied == 1
    assert job.reason == "stopped on request"
    after = submit(jobs, "b", steps=1)
    engine.let()
    assert after.wait(SOON)
    assert after.state is State.DONE


def test_cancelling_an_ended_job_changes_nothing(make, engine: FakeEngine) -> None:
    jobs = make()
    engine.let()
    job = submit(jobs)
    assert job.wait(SOON)
    revision = job.revision
    jobs.cancel(job)
    assert (job.state, job.revision) == (State.DONE, revision)


def test_pictures_finished_before_a_cancel_are_kept(make) -> None:
    job = make().submit("me", lambda *_: result("cancelled"), kind="generate")
    assert job.wait(SOON)
    assert job.state is State.CANCELLED
    assert job.result is not None


def test_failures_are_told_in_words_and_the_worker_goes_on(make, engine: FakeEngine) -> None:
    jobs = make()
    engine.let()

    def fail(error: Exception):
        def work(*_):
            raise error

        return work

    known = jobs.submit("me", fail(NumericsError("decoding gave NaN; try --dtype fp32")), kind="generate")
    unknown = jobs.submit("me", fail(RuntimeError("/home/somebody/secret")), kind="generate")
    fine = submit(jobs)
    assert fine.wait(SOON)
    assert (known.state, known.error) == (State.FAILED, "decoding gave NaN; try --dtype fp32")
    assert unknown.state is State.FAILED
    assert "RuntimeError" in unknown.error
    assert "secret" not in unknown.error
    assert fine.state is State.DONE
    assert engine.tidied == 3


def test_a_job_of_somebody_else_looks_like_none_at_all(make) -> None:
    jobs = make()
    job = submit(jobs, owner="me")
    assert jobs.get(job.id, "me") is job
    said = []
    for wrong in (job.id, "no-such-job", None, 7):
        with pytest.raises(ConfigError) as caught:
            jobs.get(wrong, "you")
        said.append(str(caught.value))
    assert len(set(said)) == 1
    assert jobs.get(job.id, "you", open_to_all=lambda job: job.owner == "me") is job
    assert jobs.of("you") == []
    assert jobs.of("me") == [job]


def test_ids_cannot_be_guessed(make) -> None:
    jobs = make(limit=100, per_owner=100)
    ids = {submit(jobs).id for _ in range(50)}
    assert len(ids) == 50
    assert min(map(len, ids)) >= 22


def test_jobs_of_those_who_left_stop_after_the_grace(make, engine: FakeEngine) -> None:
    gone = {"left": 0.0, "stays": 0.0}
    jobs = make(grace=0.2, away=lambda owner: gone[owner], per_owner=10)
    running, waiting, other = (submit(jobs, owner=owner) for owner in ("left", "left", "stays"))
    until(lambda: running.state is State.RUNNING)
    time.sleep(0.5)
    assert not running.cancel.is_set(), "its page is open"
    gone["left"] = 100.0
    until(lambda: running.cancel.is_set() and waiting.state is State.CANCELLED)
    assert {running.reason, waiting.reason} == {LEFT}
    engine.let()
    assert other.wait(SOON)
    assert other.state is State.DONE
    assert running.state is State.CANCELLED


def test_asking_about_a_job_keeps_it_alive(make) -> None:
    jobs = make(grace=0.4, away=lambda owner: 100.0)
    job = submit(jobs)
    for _ in range(10):
        jobs.get(job.id)
        time.sleep(0.1)
    assert not job.cancel.is_set()
    until(lambda: job.cancel.is_set())


def test_closing_cancels_everything(make, engine: FakeEngine) -> None:
    jobs = make()
    first, second = submit(jobs), submit(jobs)
    until(lambda: first.state is State.RUNNING)
    threading.Timer(0.1, engine.let).start()
    jobs.close()
    assert (first.state, second.state) == (State.CANCELLED, State.CANCELLED)
    with pytest.raises(BusyError, match="stopping"):
        submit(jobs)


def test_old_jobs_are_forgotten_with_what_they_hold(make, engine: FakeEngine) -> None:
    dropped: list[Job] = []
    jobs = make(limit=KEPT + 20, per_owner=KEPT + 20, forgotten=dropped.append)
    engine.let()
    made = []
    for _ in range(KEPT + 5):
        made.append(submit(jobs, steps=1))
        assert made[-1].wait(SOON)
    assert dropped == made[: len(dropped)]
    assert len(dropped) >= 4
    assert len(jobs.of("me")) == len(made) - len(dropped)
    with pytest.raises(ConfigError):
        jobs.get(made[0].id)


def test_the_worker_prepares_itself_and_survives_when_that_fails(make, engine: FakeEngine) -> None:
    asked = []

    def prepare(runner) -> None:
        asked.append(runner)
        raise OSError("no model")

    jobs = make(prepare=prepare)
    engine.let()
    assert submit(jobs).wait(SOON)
    assert asked == [engine]
