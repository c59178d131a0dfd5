"""Where pictures go: a file, a folder, stdout, or a run folder of their own."""

import secrets
import time
from dataclasses import dataclass
from pathlib import Path

from gensparse import image_io
from gensparse.errors import ConfigError, OutputError

ROOT = "gensparse-out"
STAGES = ".gensparse-stages"


@dataclass(frozen=True)
class Target:
    """The files of one command.

    Args:
        paths: one per picture; empty for stdout.
        stages_dir: where finished stages lie between runs; None for stdout.
        made: a folder that was made for this command, removed again when nothing was written into it.
        folder: where pictures go whose names are chosen one by one.
    """

    paths: tuple[Path, ...]
    image_format: str
    stages_dir: Path | None
    made: Path | None = None
    folder: Path | None = None

    def named(self, stem: str, image_format: str | None, count: int) -> "Target":
        """The files of one picture (or of `count`) of that name in the folder; nothing is checked."""
        assert self.folder is not None
        kind = image_io.format_of("x", image_format)
        names = [stem] if count == 1 else [f"{stem}-{k + 1:04d}" for k in range(count)]
        return Target(tuple(self.folder / f"{name}.{kind}" for name in names), kind, self.stages_dir)

    def clean(self) -> None:
        """Remove the folder made for this command if it is empty."""
        if self.made is not None and self.made.is_dir() and not any(self.made.iterdir()):
            self.made.rmdir()


def plan_target(output: str | None, image_format: str | None, count: int, *, overwrite: bool) -> Target:
    """Choose and check the files for `count` pictures. Raises ConfigError and OutputError before any work."""
    if output == "-":
        if count > 1:
            raise ConfigError(f"{count} pictures do not fit into one stream; use -o FOLDER/")
        return Target((), image_io.format_of("x", image_format), None)
    if output is None:
        target = _run_folder(image_format, count)
    elif output.endswith(("/", "\\")) or Path(output).is_dir():
        target = _folder(Path(output), image_format, count)
    else:
        target = _file(Path(output), image_format, count)
    for path in target.paths:
        image_io.check_output(path, overwrite=overwrite)
    return target


def named_target(output: str | None) -> Target:
    """A folder for pictures that keep their sources' names: the given one, or a run folder. Raises OutputError."""
    if output is None:
        folder = _new_folder()
        return Target((), "png", Path(ROOT) / STAGES, made=folder, folder=folder)
    _make(Path(output))
    return Target((), "png", Path(output) / STAGES, folder=Path(output))


def _new_folder() -> Path:
    folder = Path(ROOT) / f"{time.strftime('%Y%m%dT%H%M%S')}-{secrets.token_hex(3)}"
    _make(folder)
    return folder


def _run_folder(image_format: str | None, count: int) -> Target:
    kind = image_io.format_of("x", image_format)
    folder = _new_folder()
    return Target(_numbered(folder, kind, count, 1), kind, Path(ROOT) / STAGES, made=folder)


def _folder(folder: Path, image_format: str | None, count: int) -> Target:
    kind = image_io.format_of("x", image_format)
    _make(folder)
    return Target(_numbered(folder, kind, count, _next_number(folder)), kind, folder / STAGES)


def _file(path: Path, image_format: str | None, count: int) -> Target:
    kind = image_io.format_of(path, image_format)
    path = path if path.suffix.lower() in image_io.SUFFIXES else path.with_name(f"{path.name}.{kind}")
    paths = (path,) if count == 1 else tuple(path.with_stem(f"{path.stem}-{k + 1:04d}") for k in range(count))
    return Target(paths, kind, path.parent / STAGES)


def _numbered(folder: Path, kind: str, count: int, first: int) -> tuple[Path, ...]:
    return tuple(folder / f"{first + k:04d}.{kind}" for k in range(count))


def _next_number(folder: Path) -> int:
    return 1 + max((int(p.stem) for p in folder.iterdir() if p.stem.isdecimal() and len(p.stem) < 10), default=0)


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot make folder {str(folder)!r}: {error.strerror}; choose another output") from error


def stage_folders_near(source: Path) -> tuple[Path, ...]:
    """Where the finished stages of an earlier picture may lie: beside it, or beside its run folder."""
    return (source.parent / STAGES, source.parent.parent / STAGES)
