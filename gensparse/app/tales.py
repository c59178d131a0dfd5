"""Several pictures with the same subjects, turn by turn: what `gensparse customize --turns` makes, a turn at a time.

A tale is a story in the folder of its first job. Every job makes its last turn; turns before it are found done.
"""

import json
import secrets
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from gensparse.app import cast, forms, runs
from gensparse.app.core import App
from gensparse.app.jobs import Engine, Job, State, Work
from gensparse.engine.story import StoryRequest, StoryRun
from gensparse.engine.values import Event, OutputOptions
from gensparse.engine.words import command_of
from gensparse.errors import ConfigError
from gensparse.request import CustomizeRequest, GenerateRequest, Request, file_name, request_from_dict
from gensparse.subjects.naming import MAX_SUBJECTS, subject_text
from gensparse.subjects.story import MAX_TURNS, Actor, Story, Turn, says


@dataclass(frozen=True)
class Tale:
    """A story as far as it is told.

    Args:
        story: its subjects and turns; the last turn is that of the job.
        base: what all pictures have in common.
        folder: of its pictures.
    """

    story: Story
    base: GenerateRequest
    folder: Path

    @property
    def command(self) -> str:
        """The command line that makes all of it from a file with its `text`."""
        base = request_from_dict(self.base.to_dict(portable=True))
        return command_of(base).replace("gensparse generate", "gensparse customize --turns story.json", 1)

    @property
    def text(self) -> str:
        """The story as a file for the command line, with names of files only."""
        story = self.story
        subjects = [
            {"name": actor.name, "prompt": actor.prompt or None, "picture": file_name(one.image)}
            | ({"box": list(one.box)} if one.box else {"mask": one.mask and file_name(one.mask)})
            for actor in story.actors
            for one in actor.shown
        ]
        turns = [
            {
                "prompt": turn.prompt,
                "subjects": list(turn.subjects),
                "layout": [{"subject": name, "box": box} for name, *box in turn.layout],
                "seed": turn.seed,
            }
            for turn in story.turns
        ]
        return f'{{"method": {_json(story.method)},\n "subjects": [{_lines(subjects)}],\n "turns": [{_lines(turns)}]}}'


def begin(app: App, owner: str, request: CustomizeRequest, **facts: Any) -> Job:
    """Queue a checked request as the first turn of a tale; as a job without turns where it can have none.

    Raises:
        As `runs.submit`.
    """
    from gensparse.pipelines.customize import WORDED

    single = request.num_images == 1 and len(request.seed) <= 1 and all(request.shown.values())
    if not single or request.subject_method.partition(":")[0].strip() in WORDED:
        return runs.submit(app, owner, request, **facts)
    runs.check_fits(request)
    with runs.job_folder(app, owner) as folder:
        request = cast.keep(request.replace(seed=request.seed or (secrets.randbelow(2**32),)), folder)
        words = dict(text.split("=", 1) for text in request.subject_prompt)
        actors = tuple(Actor(name, words.get(name, ""), shown) for name, shown in request.shown.items())
        turn = Turn(request.prompt, tuple(request.shown), request.layout, request.seed[0])
        common = {item.name: getattr(request, item.name) for item in fields(Request)}
        base = GenerateRequest(**{**common, "prompt": "", "seed": ()})
        tale = Tale(Story(actors, (turn,), request.subject_method), base, folder)
        return _submit(app, owner, request, tale, folder, facts)


def follow(
    app: App, owner: str, job: Job, prompt: Any, boxes: Mapping[str, Any] | None = None, seed: Any = None, **facts: Any
) -> Job:
    """Queue the next turn of the tale of a job, with the settings and subjects of the first.

    Subjects are in it that its prompt names; where it names none, all of them.

    Args:
        prompt, seed: of this turn; None draws a seed.
        boxes: name -> place of some of them; None keeps the places of the turn before.

    Raises:
        ConfigError: a job without a tale, one that is not its newest, or values that are not allowed.
        Others as `runs.submit`.
    """
    tale, limits = _newest(app, owner, job), app.limits
    text = forms.checked_text("prompt", prompt, limits.prompt)
    if not text.strip():
        raise ConfigError("the prompt of the next picture is empty; say what it shows")
    seed = secrets.randbelow(2**32) if seed is None or seed == "" else forms.whole("seed", seed, 0, limits.seed)
    named = {actor.name: actor for actor in tale.story.actors}
    names = tuple(name for name in named if says(text, name)) or tuple(named)
    last = {name: tuple(box) for name, *box in tale.story.turns[-1].layout}
    places = last if boxes is None else _places(boxes, named)
    layout = tuple((name, *places[name]) for name in names if name in places)
    common = {item.name: getattr(tale.base, item.name) for item in fields(Request)}
    own = {
        "prompt": text,
        "seed": (seed,),
        "subject": tuple(subject_text(name, named[name].shown) for name in names),
        "layout": layout,
        "subject_method": tale.story.method,
        "subject_prompt": tuple(f"{name}={named[name].prompt}" for name in names if named[name].prompt),
    }
    request = CustomizeRequest(**{**common, **own})
    runs.check_fits(request)
    turn = Turn(text, names, layout, seed)
    told = replace(tale, story=replace(tale.story, turns=(*tale.story.turns, turn)))
    with runs.job_folder(app, owner) as folder:
        return _submit(app, owner, request, told, folder, facts)


def told(app: App, job: Job) -> list[Job]:
    """The jobs whose pictures are the turns of a job's tale, first one first; none for jobs without one."""
    own = job.facts.get("tale")
    done = [other for other in app.jobs.of(job.owner) if _is_turn(other, own) and other.state is State.DONE]
    return done[::-1]


def _lines(items: list[dict[str, Any]]) -> str:
    """Objects as JSON, one a line, without what is not said."""
    kept = [{name: value for name, value in item.items() if value is not None} for item in items]
    return ",".join(f"\n  {_json(item)}" for item in kept)


def _json(data: Any) -> str:
    return json.dumps(data, ensure_ascii=False)


def _newest(app: App, owner: str, job: Job) -> Tale:
    """The tale of a job as far as it is done, where the job is its newest."""
    own = job.facts.get("tale")
    if own is None:
        raise ConfigError("this picture cannot be continued; make one picture with pictures of its subjects first")
    if any(_is_turn(other, own) and not other.state.ended for other in app.jobs.of(owner)):
        raise ConfigError("the picture before is not done yet; wait for it, or cancel it")
    done = told(app, job)
    if not done or (job.state is State.DONE and job is not done[-1]):
        why = "nothing of it is done" if not done else "it has been continued already"
        raise ConfigError(f"this picture cannot be continued: {why}; go on from the newest one")
    tale: Tale = done[-1].facts["tale"]
    if len(tale.story.turns) >= MAX_TURNS:
        raise ConfigError(f"{MAX_TURNS} pictures are made; begin anew with the last one as a subject")
    return tale


def _is_turn(job: Job, tale: Tale | None) -> bool:
    own = job.facts.get("tale")
    return own is not None and tale is not None and own.folder == tale.folder


def _places(boxes: Any, named: Mapping[str, Actor]) -> dict[str, tuple[float, ...]]:
    if not isinstance(boxes, Mapping) or len(boxes) > MAX_SUBJECTS or any(name not in named for name in boxes):
        raise ConfigError(f"the boxes are not those of {', '.join(named)}; give a box for some of these names")
    return {name: cast.box_of(name, box) for name, box in boxes.items() if box not in (None, "")}


def _submit(app: App, owner: str, request: CustomizeRequest, tale: Tale, folder: Path, facts: Mapping[str, Any]) -> Job:
    work = runs.keeping_native(_telling(tale), folder)
    return app.jobs.submit(owner, work, kind=request.kind, request=request, folder=folder, tale=tale, **facts)


def _telling(tale: Tale) -> Work:
    """The work of making the last turn of a tale."""

    def work(engine: Engine, on_event: Callable[[Event], None], cancel: threading.Event) -> Any:
        asked = StoryRequest(tale.story, tale.base)
        run = StoryRun(asked, tale.folder, options=OutputOptions(live_preview=True), runner=engine)
        run.check()
        turns = [run.turn(number, on_event=on_event, cancel=cancel) for number in range(run.count)]
        return turns[-1].result

    return work
