"""`upscale` of one file, many or a folder: names are kept, what is there already is skipped, failures are told."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from gensparse import image_io
from gensparse.cli import EXIT_CODES, UNEXPECTED, output
from gensparse.cli.paths import Target, named_target
from gensparse.cli.progress import Progress
from gensparse.cli.requests import upscale_request
from gensparse.cli.run import output_options, run_one, show_result, warn_of_differences
from gensparse.cli.state import STATE
from gensparse.errors import Cancelled, ConfigError, ModelError, OutputError

if TYPE_CHECKING:
    from gensparse.engine import Result, Runner

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp", ".gif")
PARTIAL = 5  # exit code


@dataclass(frozen=True)
class Job:
    """A picture to enlarge, and the name of the result without its ending."""

    source: Path
    name: str


@dataclass
class Outcome:
    """What became of a picture: "ok", "skipped" or "failed"."""

    job: Job
    status: str
    paths: Sequence[str] = ()
    seconds: float | None = None
    code: int = 0
    message: str = ""

    def to_dict(self) -> dict[str, Any]:
        out: dict[str, Any] = {"input": self.job.source.name, "status": self.status, "outputs": list(self.paths)}
        out |= {} if self.seconds is None else {"seconds": self.seconds}
        return out | ({"error": {"code": self.code, "message": self.message}} if self.code else {})


def upscale_all(inputs: Sequence[Path], flags: Mapping[str, Any], prompt: str | None) -> None:
    """Run every picture; a single file keeps the exit code of what went wrong, several end with 5 if any failed."""
    jobs = find_jobs(inputs)
    for path in inputs:
        if not path.is_dir():
            image_io.check_image(path)
    first = upscale_request(flags, prompt, jobs[0].source)
    if first.mask is not None:
        image_io.check_image(first.mask)
    if "from_file" in flags:
        warn_of_differences(flags["from_file"], first)
    single = len(inputs) == 1 and not inputs[0].is_dir()
    if single and not _is_folder(flags.get("output"), single=True):
        from gensparse.engine import Runner

        run_one(Runner(), first, flags)
        return
    if flags.get("output") == "-":
        raise ConfigError(f"{len(jobs)} pictures do not fit into one stream; use -o FOLDER/")
    if not single and flags.get("output") is not None and not _is_folder(flags["output"], single=False):
        raise ConfigError(f"{len(jobs)} pictures need a folder; use -o FOLDER/")
    _Run(jobs, flags, prompt, single=single).run()


def find_jobs(inputs: Sequence[Path]) -> list[Job]:
    """Files as they are given, and the pictures that lie in folders, by name. Names that two share keep their ending.

    Raises ConfigError for a folder without pictures.
    """
    found: list[Path] = []
    for path in inputs:
        if not path.is_dir():
            found.append(path)
            continue
        inside = sorted(p for p in path.iterdir() if p.suffix.lower() in PICTURES and p.is_file())
        if not inside:
            raise ConfigError(f"folder {str(path)!r} holds no picture; give one with {', '.join(PICTURES)} files")
        found += inside
    found = list(dict.fromkeys(found))
    stems = [path.stem for path in found]
    names = [path.name if stems.count(path.stem) > 1 else path.stem for path in found]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"two pictures are called {twice!r}; give them one after the other, with a folder for each")
    return [Job(path, name) for path, name in zip(found, names, strict=True)]


def _is_folder(place: str | None, *, single: bool) -> bool:
    """Whether `-o` names a folder: by a slash at its end, by being one, or, of many, by having no picture's ending."""
    if place is None or place == "-":
        return False
    named = place.endswith(("/", "\\")) or Path(place).is_dir()
    return named or (not single and Path(place).suffix.lower() not in image_io.SUFFIXES)


@dataclass
class _Run:
    """The pictures of one command."""

    jobs: Sequence[Job]
    flags: Mapping[str, Any]
    prompt: str | None
    single: bool
    done: list[Outcome] = field(default_factory=list)

    def run(self) -> None:
        from gensparse.engine import Runner

        self._check_settings()
        target, runner = named_target(self.flags.get("output")), Runner()
        try:
            for number, job in enumerate(self.jobs, 1):
                self._note(number, job)
                self._add(self._outcome(runner, target, job))
        except Cancelled:
            self._report("cancelled")
            raise
        finally:
            target.clean()
        failed = [outcome for outcome in self.done if outcome.status == "failed"]
        self._report("ok" if not failed else "failed" if len(failed) == len(self.done) else "partial")
        if failed:
            raise typer.Exit(PARTIAL)

    def _check_settings(self) -> None:
        """Raise for what is wrong whatever the picture, before any work."""
        from gensparse.engine import open_model
        from gensparse.engine.plans import asked_way
        from gensparse.engine.resolve import check_attention

        request = upscale_request(self.flags, self.prompt, self.jobs[0].source)
        check_attention(request.attention)
        asked_way(request, open_model(request, weights=False).info)

    def _outcome(self, runner: "Runner", target: Target, job: Job) -> Outcome:
        try:
            return self._one(runner, target, job)
        except (Cancelled, ModelError):  # the same for every picture that is left
            raise
        except Exception as error:
            code = next((EXIT_CODES[cls] for cls in type(error).__mro__ if cls in EXIT_CODES), UNEXPECTED)
            if self.single:
                raise
            message = " ".join(output.redact(str(error) or type(error).__name__).split())
            return Outcome(job, "failed", code=code, message=message)

    def _one(self, runner: "Runner", target: Target, job: Job) -> Outcome:
        from gensparse.engine.record import job_key

        request = upscale_request(self.flags, self.prompt, job.source)
        count = max(len(request.seed), request.num_images)
        overwrite = bool(self.flags.get("overwrite", False))
        own = target.named(job.name, self.flags.get("image_format"), count)
        key = job_key(request, _digest(job.source), request.mask and _digest(Path(request.mask)))
        if not overwrite and all(path.exists() for path in own.paths):
            if all(_is_result(path, key) for path in own.paths):
                return Outcome(job, "skipped", [str(path) for path in own.paths])
            raise OutputError(
                f"{own.paths[0].name} exists, made with other settings; pass --overwrite, or choose another folder"
            )
        for path in own.paths:
            if path.resolve() == job.source.resolve():
                raise OutputError(f"{path.name} would replace the picture it is made from; choose another folder")
            image_io.check_output(path, overwrite=overwrite)
        cancel = STATE.interrupts.cancel if STATE.interrupts else None
        with Progress() as progress:
            options = output_options(self.flags, own, key=key)
            result = runner.execute(request, options, on_event=progress.on_event, cancel=cancel)
        return self._finished(job, result)

    def _finished(self, job: Job, result: "Result") -> Outcome:
        if STATE.output != "json":
            show_result(result)
        elif self.single:
            output.print_json(result.to_dict())
        return Outcome(job, "ok", [str(item.path) for item in result.outputs], result.timings.get("total"))

    def _note(self, number: int, job: Job) -> None:
        if not self.single:
            output.note(f"[{number}/{len(self.jobs)}] {job.source.name}")

    def _add(self, outcome: Outcome) -> None:
        self.done.append(outcome)
        if outcome.status == "skipped":
            output.note(f"skipped {outcome.job.source.name}: made before with the same settings")
            if STATE.output != "json":
                for path in outcome.paths:
                    output.print_out(path)
        elif outcome.status == "failed":
            output.print_err(f"failed {outcome.job.source.name}: {outcome.message}")

    def _report(self, status: str) -> None:
        """The table of what failed on stderr, or everything as one JSON object on stdout."""
        failed = [outcome for outcome in self.done if outcome.status == "failed"]
        if STATE.output == "json":
            if not self.single or status != "ok" or self.done[0].status == "skipped":
                output.print_json({"status": status, "items": [outcome.to_dict() for outcome in self.done]})
            return
        if not failed:
            return
        output.print_err(f"{len(failed)} of {len(self.jobs)} pictures failed:")
        width = max(len(outcome.job.source.name) for outcome in failed)
        for outcome in failed:
            output.print_err(f"  {outcome.job.source.name:<{width}}  {outcome.code}  {outcome.message}")
        if self.flags.get("output") is not None:
            output.print_err("  try: run the same command again; what is finished is skipped")


def _digest(path: Path) -> str:
    """sha256 of a file, as the engine has it of its pictures. Raises ConfigError."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ConfigError(f"cannot read picture {path.name!r}: {error.strerror}; give a picture file") from error


def _is_result(path: Path, key: str) -> bool:
    """Whether a file is the whole result of the job of that key."""
    try:
        return image_io.read_metadata(path).get("key") == key and image_io.is_whole(path)
    except ConfigError:
        return False
