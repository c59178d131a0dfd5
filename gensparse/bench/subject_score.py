"""Are both subjects there as their pictures show them, unmixed, and drawn anew instead of copied? Judged by program.

Every part of the score fails on its planted defect, see tests/bench/test_subject_score.py.
"""

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image

from gensparse.bench.subject_cases import Case
from gensparse.embedded.quality import pasted, prompt_fidelity
from gensparse.embedded.reader import Picture, Reader, Reading, SeenSubject, as_image
from gensparse.embedded.render import shades, signed_distance
from gensparse.embedded.scenes import Request, Subject, SubjectRequest

SIDE = 256  # pixels at which poses are measured
PASTED = 0.8  # correlation with a subject's box in its picture from which it was copied; drawn anew it is below 0.7
MOVED, TURNED, RESIZED = 0.06, 8.0, 1.12  # scene units, degrees, ratio: from here on a pose is another one
SAME_TURN, SAME_SIZE = 4.0, 1.05  # up to here it is the same within what can be measured
FITS = 0.7  # overlap with the fitted shape below which no rotation is told
_PERIODS = {
    "square": 90,
    "cross": 90,
    "star": 72,
    "triangle": 120,
    "diamond": 180,
    "flower": 60,
}  # degrees to the same outline


@dataclass(frozen=True)
class Pose:
    """Where a subject stands. `y`, `x`: fractions; `radius`: scene units; `rotation`: degrees, None where unclear."""

    y: float
    x: float
    radius: float
    rotation: float | None


@dataclass(frozen=True)
class Verdict:
    """What is right of one picture.

    Args:
        right: for both subjects that shape, colour and fill are those of its picture; there is no third one.
        each: for either subject whether one of the picture has its shape, colour and fill.
        leak: some subject has what belongs to one and what belongs to the other.
        copied: some subject is a copy of its picture: with its background, or cut out at its size and rotation.
        posed: of the subjects that are right, whether place, size or rotation is another one than in its picture.
        shape, colour, fill: right ones of both subjects, of the best matches, 0 to 2.
    """

    right: bool
    each: tuple[bool, ...]
    leak: bool
    copied: bool
    posed: tuple[bool, ...]
    shape: int
    colour: int
    fill: int

    @property
    def good(self) -> bool:
        """The score: both right, nothing mixed, nothing copied."""
        return self.right and not self.leak and not self.copied and all(self.posed)


def judge(picture: Picture, case: Case, reader: Reader, portraits: list[Image.Image]) -> Verdict:
    """The verdict on a picture of a case; `portraits` are the subjects' pictures."""
    image = as_image(picture)
    reading = reader.read(image)
    wanted = [scene.subjects[0] for scene in case.portraits]
    scores = prompt_fidelity(reading, Request(tuple(SubjectRequest(s.shape, s.colour, s.fill) for s in wanted)))
    found = [_found(reading, subject) for subject in wanted]
    copied = [
        pasted(image, portrait, scene.box(0), margin=0.0) >= PASTED
        for portrait, scene in zip(portraits, case.portraits, strict=True)
    ]
    posed = []
    for number, seen in enumerate(found):
        if seen is None:
            continue
        pose = fitted_pose(image, seen, reading, wanted[1 - number])
        before = wanted[number]
        posed.append(another_pose(pose, before))
        copied[number] = copied[number] or cut_out(pose, before)
    return Verdict(
        right=all(all(answers) for answers in scores.values()),
        each=tuple(seen is not None for seen in found),
        leak=mixed(reading, wanted),
        copied=any(copied),
        posed=tuple(posed),
        **{name: sum(scores[name]) for name in ("shape", "colour", "fill")},
    )


def _found(reading: Reading, subject: Subject) -> SeenSubject | None:
    """The subject of a picture that looks like it."""
    looks = (subject.shape, subject.colour, subject.fill)
    return next((s for s in reading.subjects if (s.shape, s.colour, s.fill) == looks), None)


def mixed(reading: Reading, wanted: list[Subject]) -> bool:
    """Whether a subject of the picture has something of both: shape, colour and fill differ between the two."""
    for seen in reading.subjects:
        of = [any(getattr(seen, n) == getattr(w, n) for n in ("shape", "colour", "fill")) for w in wanted]
        if all(of):
            return True
    return False


# ---------------------------------------------------------------- poses


def another_pose(pose: Pose, before: Subject) -> bool:
    """Moved, turned or resized so far that it can be measured."""
    moved = math.hypot(pose.y - before.y, pose.x - before.x) >= MOVED
    return moved or _resized(pose, before) >= RESIZED or (turned(pose, before) or 0.0) >= TURNED


def cut_out(pose: Pose, before: Subject) -> bool:
    """The subject at its size and rotation, wherever it stands: what a copy without its background would be."""
    angle = turned(pose, before)
    return angle is not None and angle <= SAME_TURN and _resized(pose, before) <= SAME_SIZE


def _resized(pose: Pose, before: Subject) -> float:
    """Ratio of the radii, from 1."""
    return math.exp(abs(math.log(max(pose.radius, 1e-6) / before.radius)))


def turned(pose: Pose, before: Subject) -> float | None:
    """Degrees between the outlines, from 0; None where unclear."""
    if pose.rotation is None:
        return None
    period = _PERIODS.get(before.shape, 360)
    apart = (pose.rotation - before.rotation) % period
    return min(apart, period - apart)


def fitted_pose(picture: Picture, seen: SeenSubject, reading: Reading, other: Subject | None = None) -> Pose:
    """The pose of a seen subject: the outline of its shape that covers its pixels best.

    Args:
        other: a subject whose colours are neither its own nor the background's.
    """
    image = as_image(picture)
    scale = SIDE / math.sqrt(image.width * image.height)
    size = max(8, round(image.width * scale)), max(8, round(image.height * scale))
    pixels = np.asarray(image.resize(size, Image.Resampling.BILINEAR, reducing_gap=3.0), np.float32)
    extent = reading.extent
    ys = (np.arange(size[1], dtype=np.float32)[:, None] + 0.5) / size[1]
    xs = (np.arange(size[0], dtype=np.float32)[None] + 0.5) / size[0]
    (cy, cx), reach = seen.centre, 0.75 * (seen.box[2] - seen.box[0])
    rows, columns = (abs(ys[:, 0] - cy) <= reach).nonzero()[0], (abs(xs[0] - cx) <= reach * extent[0] / extent[1])
    columns = columns.nonzero()[0]
    own = _own_pixels(pixels[np.ix_(rows, columns)], seen, reading, other)
    y, x = ys[rows] * extent[0], xs[:, columns] * extent[1]
    guess = Subject(seen.shape, seen.colour, seen.fill, "", cx, cy, (seen.box[2] - seen.box[0]) / 2 * extent[0])
    return _fit(guess, own, extent, y, x)


def _own_pixels(pixels: np.ndarray, seen: SeenSubject, reading: Reading, other: Subject | None) -> np.ndarray:
    """Pixels whose colour is nearer to the subject's shades than to those of the background and of the other one."""
    own = _distance(pixels, *shades(seen.colour, 0.0 if seen.fill == "plain" else 0.6))
    apart = [_distance(pixels, *shades(reading.background_colour, 0.0 if reading.background_kind == "plain" else 0.28))]
    if other is not None:
        apart.append(_distance(pixels, *shades(other.colour, 0.0 if other.fill == "plain" else 0.6)))
    return own < np.min(apart, axis=0)


def _distance(pixels: np.ndarray, base: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Of colours [..., 3] to the line between two shades."""
    along = second - base
    power = float(along @ along)
    share = np.clip((pixels - base) @ along / power, 0, 1) if power else np.zeros(pixels.shape[:-1], np.float32)
    return np.linalg.norm(pixels - base - share[..., None] * along, axis=-1)


def _fit(guess: Subject, own: np.ndarray, extent: tuple[float, float], y: np.ndarray, x: np.ndarray) -> Pose:
    """Coarse search over rotation and size, then ever finer steps of place, size and rotation."""
    values = np.array([guess.y, guess.x, math.log(max(guess.radius, 1e-3)), 0.0])

    def covers(v: np.ndarray) -> float:
        if abs(v[2] - values[2]) > math.log(1.5):
            return 0.0
        shape = Subject(guess.shape, "", "", "", float(v[1]), float(v[0]), math.exp(v[2]), float(v[3]))
        inside = signed_distance(shape, extent, y, x) < 0
        return float((inside & own).sum() / max(1, (inside | own).sum()))

    starts = [values + np.array((0, 0, size, turn)) for size in (-0.15, 0.0, 0.15) for turn in range(-44, 45, 8)]
    best = max(starts, key=covers)
    top, steps = covers(best), np.array([0.02, 0.02, 0.08, 4.0])
    while steps[3] > 0.4:
        tries = [best + sign * step for step in np.diag(steps) for sign in (-1, 1)]
        after = max(tries, key=covers)
        if covers(after) > top:
            best, top = after, covers(after)
        else:
            steps = steps / 2
    return Pose(float(best[0]), float(best[1]), math.exp(best[2]), float(best[3]) if top >= FITS else None)
