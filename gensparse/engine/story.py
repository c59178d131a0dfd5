"""Stories turn by turn: one subject bank over several prompts, kept with its pictures so that a stopped run goes on.

A subject with pictures stands beside every picture it is in. One without is drawn by words in the first turn that has
it, and cut out of that picture by its box; where that turn also has subjects that are known, it is drawn alone first
(the subject-initialised generation of AutoStudio, 2406.01388). The bank is written once per subject.
"""

import hashlib
import json
import re
import secrets
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gensparse import image_io
from gensparse.engine.plans import asked_way
from gensparse.engine.resolve import open_model, resolve_request
from gensparse.engine.session import Runner
from gensparse.engine.subjects import FAMILIES, check_customize
from gensparse.engine.values import Event, OutputOptions, Result
from gensparse.errors import ConfigError, OutputError
from gensparse.request import TOGETHER, CustomizeRequest, GenerateRequest, Request
from gensparse.subjects.naming import Shown, subject_text
from gensparse.subjects.story import Story, Turn, newcomers, with_prefix

if TYPE_CHECKING:
    from PIL import Image

SESSION = "session.json"
BANK = "bank"
STAGES = ".gensparse-stages"
VERSION = 1
MAX_SESSION = 16 << 20
DEFAULT_METHOD = "auto"

Segment = Callable[["Image.Image", str], Any]
"""Picture of a subject and its name -> its mask, see `gensparse.subjects.read_masks.read_mask`."""


@dataclass(frozen=True)
class StoryRequest:
    """A story, and what its pictures have in common: the job of `StoryRun`.

    Args:
        base: model, size, steps and so on; its prompt is not used, and its seed (at most one) comes before the story's.
        method: subject method, before the story's; by default "auto", the usual one of the model.

    Raises:
        ConfigError: several pictures or seeds for a turn.
    """

    story: Story
    base: GenerateRequest = field(default_factory=GenerateRequest)
    method: str | None = None

    def __post_init__(self) -> None:
        if self.base.num_images != 1 or len(self.base.seed) > 1:
            raise ConfigError("a story has one picture per turn; give one seed, and seeds of turns in the story")
        if self.subject_method.partition(":")[0].strip() == "regional":
            raise ConfigError("regional keeps no looks from turn to turn; use freecustom, isolation or consistory")

    @property
    def subject_method(self) -> str:
        return self.method or self.story.method or DEFAULT_METHOD

    @property
    def together(self) -> bool:
        """Whether all turns are drawn in one call."""
        return self.subject_method.partition(":")[0].strip() in TOGETHER


@dataclass(frozen=True)
class Look:
    """How a subject looks that no picture was given of: its entry in the bank.

    Args:
        sha256: of its picture in the bank.
        turn: the first that has it, from 1.
        how: "cut" out of that turn's picture, or a "portrait" that was drawn before it.
        key: of the turn or portrait.
        mask: sha256 of its mask in the bank.
    """

    sha256: str
    turn: int
    how: str
    key: str
    mask: str | None = None


@dataclass(frozen=True)
class Finished:
    """A turn that is done, as the session file has it.

    Args:
        key: of everything that decides its picture.
        asked: that, in words, so that changes can be named.
    """

    key: str
    picture: str
    sha256: str
    seed: int
    asked: dict[str, Any]


@dataclass(frozen=True)
class TurnResult:
    """What became of a turn, from 1: "ok" or "skipped" (made before); `result` is that of the engine."""

    turn: int
    status: str
    path: Path
    seed: int
    sha256: str
    result: Result | None = None

    def to_dict(self) -> dict[str, Any]:
        return {
            "turn": self.turn,
            "status": self.status,
            "path": str(self.path),
            "seed": self.seed,
            "sha256": self.sha256,
        }


class StoryRun:
    """A story in a folder: `turn-01.png` and so on, `session.json`, and the bank of looks.

        run = StoryRun(StoryRequest(Story.read(Path("story.json"))), Path("story"))
        run.check()
        for number in range(run.count):
            print(run.turn(number).path)

    Turns that are done are not made again. A turn whose prompt, seed, subjects, boxes or settings have changed since is
    refused by `check`, unless `overwrite` says to make it again; turns after it are made again only where what they are
    made from has changed with it.

    Args:
        folder: of the pictures; it is made.
        options: of the engine; paths, key and stages are chosen here.
        runner: keeps the model loaded; by default one of its own.
        segment: finds a subject in its cut-out; by default all of the box counts.
    """

    def __init__(
        self,
        request: StoryRequest,
        folder: Path,
        *,
        options: OutputOptions | None = None,
        overwrite: bool = False,
        runner: Runner | None = None,
        segment: Segment | None = None,
    ) -> None:
        self.request, self.folder, self.overwrite = request, folder, overwrite
        self.options = options or OutputOptions()
        self.runner = runner or Runner()
        self.segment = segment
        self.story = request.story
        self.bank: dict[str, Look] = {}
        self.warnings: list[str] = []
        self._finished: list[Finished | None] = [None] * self.count
        self._kept: dict[str, Look] = {}  # looks of an earlier run, until the turn that wrote them is reached
        self._seed = 0
        self._regional = False
        self._set: dict[int, TurnResult] = {}

    @property
    def count(self) -> int:
        """Turns of the story."""
        return len(self.story.turns)

    def path(self, number: int) -> Path:
        """The picture of a turn, counted from 0."""
        return self.folder / f"turn-{number + 1:02d}.{self.options.image_format}"

    # ------------------------------------------------------------------------------------------------------- checking
    def check(self) -> None:
        """Everything that can be known before a weight is read; reads what an earlier run left in the folder.

        Raises:
            ConfigError: files or settings that do not fit, a session that is damaged, or finished turns that have
                changed; with the turn.
            OutputError: a folder that cannot be written.
        """
        self._read_pictures()
        self._make_folder()
        self._load()
        base = self._filled(GenerateRequest, self.story.turns[0], self._seed_of(0))
        info = open_model(base, weights=False).info
        self._regional = FAMILIES.get(info.row.highres, "UNet") in _regional_families()
        known = {actor.name for actor in self.story.actors if actor.shown}
        requests: list[tuple[str, Request]] = []
        if self.request.together:
            requests.append((f"{self.story.source}: ", self._set_request()))
        for number, turn in enumerate([] if self.request.together else self.story.turns):
            where, new = self.story.at(number), newcomers(turn, known)
            self._check_newcomers(where, turn, new)
            looks = {name: Look("", 0, "", "") for name in turn.subjects}
            requests.append((where, with_prefix(where, lambda t=turn, n=number, w=looks: self._asked(t, n, w))))
            known |= set(new)
        for where, request in requests:
            with_prefix(where, lambda r=request: check_customize(r, info, asked_way(r, info)))
            with_prefix(where, lambda r=request: resolve_request(r, info))
        self._check_finished()
        self._save()

    def _check_newcomers(self, where: str, turn: Turn, new: Sequence[str]) -> None:
        """Those who are cut out of a picture must have a place in it."""
        if len(new) < len(turn.subjects) or len(turn.subjects) == 1:
            return
        lost = [name for name in new if name not in turn.boxes]
        if lost:
            raise ConfigError(
                f"{where}{', '.join(lost)} appears for the first time, and nothing says where; give a box in the "
                "layout, so that the look can be kept, or a picture"
            )

    def _check_finished(self) -> None:
        """Refuse turns that have changed since they were made, or forget them where they may be made again."""
        if self.request.together:
            key, asked = self._key_of(self._set_request(), {})
            for number, done in enumerate(self._finished):
                self._compare(number, done, key, asked)
            return
        bank: dict[str, Look] = {}
        for number, turn in enumerate(self.story.turns):
            done = self._finished[number]
            new = self._new(turn, bank)
            if done is None:
                break
            own = {name: look for name, look in self._kept.items() if name in new and look.turn == number + 1}
            missing = {name: Look("", 0, "", "") for name in turn.subjects}
            looks = {**missing, **bank, **own}
            key, asked = self._key_of(self._asked(turn, number, looks), self._cuts(turn, new), looks)
            if not self._compare(number, done, key, asked):
                break
            bank |= own

    def _compare(self, number: int, done: Finished | None, key: str, asked: Mapping[str, Any]) -> bool:
        """Whether a finished turn is still what is asked for.

        Raises:
            ConfigError: it is not, and may not be made again.
        """
        if done is None or done.key == key:
            return True
        if not self.overwrite:
            raise ConfigError(
                f"{self.story.at(number)}it has changed since {done.picture} was made ({_changes(done.asked, asked)}); "
                "pass --overwrite to make it again, and what follows from it, or choose another folder"
            )
        return False

    # -------------------------------------------------------------------------------------------------------- running
    def turn(
        self,
        number: int,
        *,
        on_event: Callable[[Event], None] | None = None,
        cancel: threading.Event | None = None,
    ) -> TurnResult:
        """Make the picture of a turn, counted from 0; turns come one after the other.

        Raises:
            ConfigError: as `check`, with the turn.
            OutputError: a picture of that name is there that is not this turn's.
            Others of `gensparse.errors`, as the engine raises them.
        """
        where = self.story.at(number)
        if self.request.together:
            if not self._set:
                self._draw_set(on_event, cancel)
            return self._set[number]
        return with_prefix(where, lambda: self._turn(number, on_event, cancel))

    def _turn(
        self, number: int, on_event: Callable[[Event], None] | None, cancel: threading.Event | None
    ) -> TurnResult:
        turn = self.story.turns[number]
        new = self._new(turn, self.bank)
        if self._portrayed(turn, new):
            for name in new:
                self._portray(number, name, on_event, cancel)
        request = self._asked(turn, number, self.bank)
        key, asked = self._key_of(request, self._cuts(turn, new), self.bank)
        done, result = self._done(number, key, asked), None
        status = "ok" if done is None else "skipped"
        if done is None:
            result = self._execute(request, self.path(number), key, on_event, cancel)
            done = Finished(key, self.path(number).name, self._sha256(self.path(number)), request.seed[0], asked)
        if not self._portrayed(turn, new):
            for name in new:
                self._cut(number, name, key)
        self._finished[number] = done
        self._save()
        return TurnResult(number + 1, status, self.path(number), done.seed, done.sha256, result)

    def _done(self, number: int, key: str, asked: dict[str, Any]) -> Finished | None:
        """What is there already of a turn; None where it is to be made."""
        path, known = self.path(number), self._finished[number]
        if not path.is_file():
            return None
        if known is not None and known.key == key:
            if known.sha256 == self._sha256(path):
                return known
            if not self.overwrite:
                raise OutputError(
                    f"{path.name} has been changed since it was made; pass --overwrite to make it again, or restore it"
                )
            return None
        if _is_picture_of(path, key):  # stopped between the picture and the session file
            return Finished(key, path.name, self._sha256(path), self._seed_of(number), asked)
        return None

    def _draw_set(self, on_event: Callable[[Event], None] | None, cancel: threading.Event | None) -> None:
        """All turns at once."""
        request = self._set_request()
        key, asked = self._key_of(request, {})
        numbers = range(self.count)
        found = [self._done(number, key, asked) for number in numbers]
        done = [item for item in found if item is not None]
        result, status = None, "skipped"
        if len(done) < self.count:
            ours = all(item is not None or not self.path(number).exists() for number, item in enumerate(found))
            paths = tuple(self.path(number) for number in numbers)
            result = self._execute(request, paths, key, on_event, cancel, again=ours)
            status = "ok"
            done = [
                Finished(key, path.name, self._sha256(path), seed, asked)
                for path, seed in zip(paths, request.seed, strict=True)
            ]
        self._finished = list(done)
        self._save()
        self._set = {
            number: TurnResult(number + 1, status, self.path(number), item.seed, item.sha256, result)
            for number, item in enumerate(done)
        }

    def _execute(
        self,
        request: Request,
        paths: Path | tuple[Path, ...],
        key: str,
        on_event: Callable[[Event], None] | None,
        cancel: threading.Event | None,
        *,
        again: bool = False,
    ) -> Result:
        paths = paths if isinstance(paths, tuple) else (paths,)
        overwrite = self.overwrite or again
        for path in paths:
            image_io.check_output(path, overwrite=overwrite)
        previews = self.options.preview_dir
        if previews is not None:
            previews = previews / paths[0].stem
            previews.mkdir(parents=True, exist_ok=True)
        options = replace(
            self.options,
            paths=paths,
            key=key,
            overwrite=overwrite,
            stages_dir=self.folder / STAGES,
            preview_dir=previews,
            image_format=image_io.format_of(paths[0]),
        )
        return self.runner.execute(request, options, on_event=on_event, cancel=cancel)

    # --------------------------------------------------------------------------------------------------- who is known
    def _new(self, turn: Turn, bank: Mapping[str, Look]) -> tuple[str, ...]:
        """Those of a turn whose look is not decided before it."""
        return newcomers(turn, [*(actor.name for actor in self.story.actors if actor.shown), *bank])

    def _portrayed(self, turn: Turn, new: Sequence[str]) -> bool:
        """Whether newcomers are drawn alone before the turn: where others in it are known already."""
        return bool(new) and len(new) < len(turn.subjects)

    def _cuts(self, turn: Turn, new: Sequence[str]) -> dict[str, list[float]]:
        """Boxes of those that are cut out of the picture."""
        if self._portrayed(turn, new):
            return {}
        return {name: list(turn.boxes.get(name, (0.0, 0.0, 1.0, 1.0))) for name in new}

    def _look_path(self, name: str, part: str = "") -> Path:
        plain = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:40] or "subject"
        return self.folder / BANK / f"{plain}-{hashlib.sha256(name.encode()).hexdigest()[:6]}{part}.png"

    def _portray(
        self,
        number: int,
        name: str,
        on_event: Callable[[Event], None] | None,
        cancel: threading.Event | None,
    ) -> None:
        """Draw a newcomer alone, at the model's own size."""
        turn, actor, path = self.story.turns[number], self.story.actor(name), self._look_path(name)
        request = self._filled(GenerateRequest, turn, self._seed_of(number)).replace(
            prompt=actor.prompt or actor.name, size=None
        )
        key, _ = self._key_of(request, {})
        kept = self._kept.get(name)
        whole = path.is_file() and kept is not None and kept.key == key and kept.sha256 == self._sha256(path)
        if not whole and not (path.is_file() and _is_picture_of(path, key)):
            path.parent.mkdir(exist_ok=True)
            self._execute(request, path, key, on_event, cancel, again=True)
        self._keep(name, path, Look(self._sha256(path), number + 1, "portrait", key), kept)

    def _cut(self, number: int, name: str, key: str) -> None:
        """Cut a newcomer out of the picture of its first turn."""
        turn, path, kept = self.story.turns[number], self._look_path(name), self._kept.get(name)
        if kept is not None and kept.key == key and path.is_file() and kept.sha256 == self._sha256(path):
            self.bank[name] = kept
            return
        picture = image_io.read_image(self.path(number)).image
        left, top, right, bottom = turn.boxes.get(name, (0.0, 0.0, 1.0, 1.0))
        width, height = picture.size
        box = (int(left * width), int(top * height), -int(-right * width // 1), -int(-bottom * height // 1))
        path.parent.mkdir(exist_ok=True)
        image_io.write_image(picture.crop(box), path, overwrite=True)
        self._keep(name, path, Look(self._sha256(path), number + 1, "cut", key), None)

    def _keep(self, name: str, path: Path, look: Look, kept: Look | None) -> None:
        """Write a look into the bank, with its mask where something finds it."""
        mask = self._look_path(name, "-mask")
        if kept is not None and kept.sha256 == look.sha256 and kept.mask is not None and mask.is_file():
            look = replace(look, mask=kept.mask)
        elif self.segment is not None:
            from PIL import Image

            from gensparse.subjects.read_masks import read_mask

            found = read_mask(self.segment(image_io.read_image(path).image, name))
            if bool(found.any()):
                grey = Image.fromarray(found.numpy().astype("uint8") * 255)
                look = replace(look, mask=image_io.write_image(grey, mask, overwrite=True))
        self.bank[name] = look
        self._save()

    # ------------------------------------------------------------------------------------------------------- requests
    def _seed_of(self, number: int) -> int:
        own = self.story.turns[number].seed
        if own is not None:
            return own
        common = (*self.request.base.seed, self.story.seed, self._seed)
        first = next(seed for seed in common if seed is not None)
        return first + number if self.request.together else first  # pictures of a set begin from noise of their own

    def _filled(self, cls: type[Request], turn: Turn, *seeds: int, **own: Any) -> Any:
        """A request of a turn with everything that the story leaves to its base."""
        base = self.request.base
        shared = {item.name: getattr(base, item.name) for item in fields(Request)}
        negatives = (turn.negative_prompt, self.story.negative_prompt, base.negative_prompt)
        negative = next(text for text in negatives if text is not None)
        return cls(**{**shared, "prompt": turn.prompt, "negative_prompt": negative, "seed": seeds, **own})

    def _asked(self, turn: Turn, number: int, looks: Mapping[str, Look]) -> Request:
        """The request of a turn, from the looks that are known."""
        seed = self._seed_of(number)
        if not turn.subjects:
            return self._filled(GenerateRequest, turn, seed)
        shown = {name: self._shown(name, looks) for name in turn.subjects}
        texts = [f"{name}={self.story.actor(name).prompt}" for name in turn.subjects if self.story.actor(name).prompt]
        if all(shown.values()) and not self._introduces(turn, number):
            subjects = tuple(subject_text(name, own) for name, own in shown.items())
            return self._filled(
                CustomizeRequest,
                turn,
                seed,
                subject=subjects,
                layout=turn.layout,
                subject_method=self.request.subject_method,
                subject_prompt=tuple(texts),
            )
        if self._regional and len(turn.boxes) == len(turn.subjects):
            return self._filled(
                CustomizeRequest,
                turn,
                seed,
                subject=turn.subjects,
                layout=turn.layout,
                subject_method="regional",
                subject_prompt=tuple(texts),
            )
        return self._filled(GenerateRequest, turn, seed)

    def _introduces(self, turn: Turn, number: int) -> bool:
        """Whether a turn is the first of all that are in it, none of whom has a picture."""
        earlier = {name for other in self.story.turns[:number] for name in other.subjects}
        return not any(name in earlier or self.story.actor(name).shown for name in turn.subjects)

    def _shown(self, name: str, looks: Mapping[str, Look]) -> tuple[Shown, ...]:
        given = self.story.actor(name).shown
        if given or name not in looks:
            return given
        mask = None if looks[name].mask is None else str(self._look_path(name, "-mask"))
        return (Shown(str(self._look_path(name)), mask),)

    def _set_request(self) -> CustomizeRequest:
        """The request of a story whose turns are drawn together."""
        turns, where = self.story.turns, f"{self.story.source}: "
        placed = next((number for number, turn in enumerate(turns) if turn.layout), None)
        method = self.request.subject_method.partition(":")[0]
        if placed is not None:
            raise ConfigError(f"{self.story.at(placed)}{method} leaves places to the model; leave the layout out")
        if any(turn.negative_prompt is not None for turn in turns):
            raise ConfigError(f"{where}{method} draws all turns under one negative prompt; give it once, for the story")
        names = [actor.name for actor in self.story.actors if any(actor.name in turn.subjects for turn in turns)]
        if not names:
            raise ConfigError(f"{where}no turn has a subject; name one in the prompts")
        subjects = tuple(subject_text(name, self.story.actor(name).shown) for name in names)
        seeds = tuple(self._seed_of(number) for number in range(len(turns)))
        return with_prefix(
            where,
            lambda: self._filled(
                CustomizeRequest,
                turns[0],
                *seeds,
                num_images=len(turns),
                more_prompts=tuple(turn.prompt for turn in turns[1:]),
                subject=subjects,
                subject_method=self.request.subject_method,
            ),
        )

    def _key_of(
        self, request: Request, cuts: Mapping[str, list[float]], looks: Mapping[str, Look] | None = None
    ) -> tuple[str, dict[str, Any]]:
        """sha256 of everything that decides a picture, whatever the names of files, and that in words."""
        asked = {k: v for k, v in request.to_dict(portable=True).items() if k not in request.piece_fields}
        if isinstance(request, CustomizeRequest):
            kept = {str(self._look_path(name)): look for name, look in (looks or {}).items()}
            asked["subject"] = [
                [name, [self._facts(one, kept.get(one.image)) for one in own]] for name, own in request.shown.items()
            ]
        asked["cuts"] = dict(cuts)
        asked = json.loads(json.dumps(asked))
        return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest(), asked

    def _facts(self, shown: Shown, look: Look | None) -> dict[str, Any]:
        """A picture of a subject by its bytes; of one in the bank by those that were written."""
        if look is not None:
            return {"picture": look.sha256} | ({} if look.mask is None else {"mask": look.mask})
        mask = {} if shown.mask is None else {"box": shown.mask} if shown.box else {"mask": self._sha256(shown.mask)}
        return {"picture": self._sha256(shown.image), **mask}

    # ---------------------------------------------------------------------------------------------------------- files
    def _sha256(self, path: str | Path) -> str:
        """Of a file; "" for one that is not there."""
        try:
            with open(path, "rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        except OSError:
            return ""

    def _read_pictures(self) -> None:
        for number, actor in enumerate(self.story.actors, 1):
            where = f"{self.story.source}, subject {number} ({actor.name}): "
            for shown in actor.shown:
                files = [shown.image, *([] if shown.mask is None or shown.box else [shown.mask])]
                for file in files:
                    with_prefix(where, lambda f=file: image_io.check_image(f))

    def _make_folder(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(
                f"cannot make folder {str(self.folder)!r}: {error.strerror}; choose another output"
            ) from error
        image_io.check_output(self.folder / SESSION, overwrite=True)

    def _load(self) -> None:
        """The session of an earlier run, if there is one."""
        path = self.folder / SESSION
        data: Any = {}
        if path.is_file():
            try:
                with open(path, encoding="utf-8") as file:
                    data = json.loads(file.read(MAX_SESSION))
                turns = [None if item is None else Finished(**item) for item in data["turns"]]
                bank = {name: Look(**look) for name, look in data["bank"].items()}
                seed = data["seed"]
                if data["gensparse_session"] != VERSION or not _is_session(turns, bank, seed):
                    raise ValueError("not of this version")
            except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                raise ConfigError(
                    f"{SESSION} in {str(self.folder)!r} is damaged or of another version; delete it (pictures of this "
                    "story are recognised all the same), or choose another folder"
                ) from error
            self._kept, self._seed = bank, seed
            self._finished = (turns + [None] * self.count)[: self.count]
            left = [item.picture for item in turns[self.count :] if item is not None]
            if left:
                self.warnings.append(f"the story no longer has the turns of {', '.join(left)}; the pictures are left")
            return
        self._seed = secrets.randbelow(2**32)

    def _save(self) -> None:
        kept = {name: look for name, look in self._kept.items() if name not in self.bank}
        data = {
            "gensparse_session": VERSION,
            "story": self.story.source,
            "seed": self._seed,
            "bank": {name: asdict(look) for name, look in {**kept, **self.bank}.items()},
            "turns": [None if item is None else asdict(item) for item in self._finished],
        }
        image_io.write_json(self.folder / SESSION, data, overwrite=True)


# --- pure helpers ---------------------------------------------------------------------------------------------------


def _regional_families() -> tuple[str, ...]:
    from gensparse.methods.regional import FAMILIES as KNOWN

    return KNOWN


def _is_session(turns: Sequence[Finished | None], bank: Mapping[str, Look], seed: Any) -> bool:
    """Whether the values of a session file are of the right kinds; paths are never taken from it."""
    whole = isinstance(seed, int) and not isinstance(seed, bool)
    done = [item for item in turns if item is not None]
    texts = [text for item in done for text in (item.key, item.picture, item.sha256)]
    texts += [text for look in bank.values() for text in (look.sha256, look.how, look.key)]
    numbers = [item.seed for item in done] + [look.turn for look in bank.values()]
    return (
        whole
        and all(isinstance(text, str) for text in texts)
        and all(isinstance(number, int) for number in numbers)
        and all(isinstance(item.asked, dict) for item in done)
    )


def _is_picture_of(path: Path, key: str) -> bool:
    """Whether a file is the whole picture of that key."""
    try:
        return image_io.read_metadata(path).get("key") == key and image_io.is_whole(path)
    except ConfigError:
        return False


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Names of what differs between two turns."""
    words = {
        "subject": "pictures or looks of its subjects",
        "cuts": "box of a new subject",
        "kind": "its subjects",
        "more_prompts": "prompts",
        "subject_prompt": "prompts of subjects",
        "subject_method": "method",
    }
    names = sorted(name for name in {*before, *now} if before.get(name) != now.get(name))
    if "kind" in names:  # fields that only one kind has say nothing more
        names = [name for name in names if name in before and name in now]
    return ", ".join(dict.fromkeys(words.get(name, name) for name in names))
