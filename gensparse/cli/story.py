"""`customize --turns`: a story turn by turn, resumed where it stopped."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gensparse import image_io
from gensparse.cli import output
from gensparse.cli.paths import Target, named_target
from gensparse.cli.progress import Progress
from gensparse.cli.requests import generate_request
from gensparse.cli.run import output_options, show_result
from gensparse.cli.state import STATE
from gensparse.errors import Cancelled, ConfigError

if TYPE_CHECKING:
    from gensparse.engine.story import StoryRun, TurnResult

OF_THE_STORY = ("subject", "subject_prompt", "subject_negative", "layout", "num_images", "negative_prompt", "from_file")
"""Flags that a story has in its file."""


def run_story(file: Path, flags: Mapping[str, Any], prompts: Sequence[str]) -> None:
    """Make every turn of a story that is not there yet, and say where the pictures are."""
    run, target = _opened(file, flags, prompts)
    done: list[TurnResult] = []
    try:
        run.check()
        output.warn(run.warnings)
        for number in range(run.count):
            output.note(f"[turn {number + 1}/{run.count}] {_short(run.story.turns[number].prompt)}")
            cancel = STATE.interrupts.cancel if STATE.interrupts else None
            with Progress() as progress:
                result = run.turn(number, on_event=progress.on_event, cancel=cancel)
            done.append(result)
            _show(result)
    except Cancelled:
        _report(run, done, "cancelled")
        raise
    finally:
        target.clean()
    _report(run, done, "ok")


def _opened(file: Path, flags: Mapping[str, Any], prompts: Sequence[str]) -> "tuple[StoryRun, Target]":
    from gensparse.engine.story import StoryRequest, StoryRun
    from gensparse.subjects.story import Story

    extra = next((name for name in OF_THE_STORY if name in flags), None)
    if extra is not None:
        flag = "--from" if extra == "from_file" else f"--{extra.replace('_', '-')}"
        raise ConfigError(f"{flag} is given together with --turns; write it into {file.name}, or leave it out")
    if prompts:
        raise ConfigError(f"a prompt is given together with --turns; write it into {file.name} as a turn")
    story = Story.read(file)
    shared = {k: v for k, v in flags.items() if k not in ("turns", "subject_method")}
    request = StoryRequest(story, generate_request(shared, ""), flags.get("subject_method"))
    target = named_target(_folder(flags.get("output")))
    assert target.folder is not None, "a target of names has one"
    kind = image_io.format_of("x", flags.get("image_format"))
    options = output_options(flags, Target((), kind, target.stages_dir))
    return StoryRun(request, target.folder, options=options, overwrite=bool(flags.get("overwrite"))), target


def _folder(place: str | None) -> str | None:
    """The folder that `-o` names; ConfigError for stdout and for a picture."""
    picture = place is not None and Path(place).suffix.lower() in image_io.SUFFIXES and not Path(place).is_dir()
    if place == "-" or (picture and place is not None and not place.endswith(("/", "\\"))):
        raise ConfigError(f"the pictures of a story need a folder, and -o is {place!r}; use -o FOLDER/")
    return place


def _show(result: "TurnResult") -> None:
    if result.status == "skipped":
        output.note(f"skipped turn {result.turn}: made before")
    if STATE.output == "json":
        return
    if result.result is not None and len(result.result.outputs) == 1:
        show_result(result.result)
    else:
        output.print_out(str(result.path))


def _report(run: "StoryRun", done: "Sequence[TurnResult]", status: str) -> None:
    """The whole story as one JSON object on stdout."""
    if STATE.output == "json":
        turns = [result.to_dict() for result in done]
        looks = {name: {"turn": look.turn, "how": look.how} for name, look in run.bank.items()}
        output.print_json({"status": status, "turns": turns, "bank": looks, "warnings": run.warnings})


def _short(text: str) -> str:
    from gensparse.engine.words import clean

    return clean(text if len(text) <= 60 else text[:57] + "...")
