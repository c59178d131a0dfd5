"""Test cases for several subjects in one picture: a scene whose prompt names shapes only, and a picture of each.

What the prompt does not say, colours and fills, only the pictures of the subjects can tell. Each shows its subject
alone on another background, somewhere else, turned, and larger or smaller than the scene has it, so that a copy of it
can be told from a subject that was drawn anew.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from PIL import Image

from gensparse.embedded.render import render, signed_distance
from gensparse.embedded.scenes import (
    BACKGROUNDS,
    COLOURS,
    FILLS,
    MARGIN,
    PALETTE,
    SHAPES,
    SIZES,
    Scene,
    Subject,
    random_scene,
)

FIRST_SEED = 9_600_000  # scenes that no training has seen
TURNED = tuple(s for s in SHAPES if s not in ("circle", "ring"))
"""Shapes whose rotation shows."""
ROTATIONS = (12.0, 20.0)  # degrees of the subjects' pictures, to either side
AWAY = 0.15  # scene units at least between a subject's place in its picture and in the scene
CLEAR = 100.0  # levels at least between the colours of subjects and background, as vectors of red, green, blue
CONTRAST = 0.6  # cosine at most between a subject's contrast to the scene's background and to that of its picture
SLACK = 0.02  # scene units by which regions are larger than the subjects


@dataclass(frozen=True)
class Case:
    """One picture to make.

    Args:
        index: number of the case; seed: of its scene and of the noise.
        scene: the two subjects where the prompt puts them, with the looks of their pictures.
        portraits: a scene with one subject each.
    """

    index: int
    seed: int
    scene: Scene
    portraits: tuple[Scene, ...]

    @cached_property
    def text(self) -> str:
        """The prompt: shapes, how they stand, and the background."""
        first, relation, second = self.scene.relations[0]
        shapes = [subject.shape for subject in self.scene.subjects]
        return f"a {shapes[first]} {relation} a {shapes[second]}{_on(self.scene)}"

    def portrait_text(self, number: int) -> str:
        """The prompt of a subject's picture, which does not tell its look either."""
        return f"a {self.scene.subjects[number].shape}{_on(self.portraits[number])}"

    def portrait(self, number: int, side: int) -> Image.Image:
        """The picture of a subject, `side` x `side` pixels."""
        return Image.fromarray(render(self.portraits[number], side, side))

    def mask(self, number: int, side: int) -> np.ndarray:
        """Where the subject is in its picture, bool [side, side], exact for pixel centres."""
        scene = self.portraits[number]
        at = ((np.arange(side) + 0.5) / side).astype(np.float32)
        height, width = scene.extent
        return signed_distance(scene.subjects[0], scene.extent, at[:, None] * height, at[None] * width) < 0

    def region(self, number: int) -> tuple[float, float, float, float]:
        """(left, top, right, bottom) of a subject in the scene, in shares of the picture."""
        y0, x0, y1, x1 = self.scene.box(number)
        return max(0.0, x0 - SLACK), max(0.0, y0 - SLACK), min(1.0, x1 + SLACK), min(1.0, y1 + SLACK)


def _on(scene: Scene) -> str:
    kind = "" if scene.background == "plain" else f"{scene.background} "
    article = "an" if scene.background_colour[0] in "aeiou" else "a"
    return f" on {article} {scene.background_colour} {kind}background"


def cases(count: int) -> list[Case]:
    """The first `count` cases; the same ones for every method and size."""
    found: list[Case] = []
    seed = FIRST_SEED
    while len(found) < count:
        scene = random_scene(seed)
        if len(scene.subjects) == 2 and scene.relations:
            found.append(_case(len(found), seed, scene))
        seed += 1
    return found


def _case(index: int, seed: int, layout: Scene) -> Case:
    """Looks and portraits for the places of a scene."""
    rng = np.random.default_rng([seed, 2])
    shapes = [TURNED[i] for i in rng.permutation(len(TURNED))[:2]]
    colours = _clear_colours(rng)
    fills = [FILLS[i] for i in rng.permutation(len(FILLS))[:2]]
    looks = zip(layout.subjects, shapes, colours, fills, strict=False)
    subjects = tuple(replace(s, shape=shape, colour=c, fill=f, rotation=0.0) for s, shape, c, f in looks)
    scene = replace(layout, subjects=subjects, background="plain", background_colour=colours[2])
    portraits = tuple(_portrait(rng, subject, _ground(rng, subject.colour, colours)) for subject in subjects)
    return Case(index, seed, scene, portraits)


def _clear_colours(rng: np.random.Generator) -> list[str]:
    """Colours of both subjects and of the background that nobody takes for each other."""
    while True:
        drawn = [COLOURS[i] for i in rng.permutation(len(COLOURS))[:3]]
        values = np.array([PALETTE[name] for name in drawn], float)
        if min(np.linalg.norm(values[a] - values[b]) for a, b in ((0, 1), (0, 2), (1, 2))) >= CLEAR:
            return drawn


def _ground(rng: np.random.Generator, own: str, taken: list[str]) -> str:
    """Background of a subject's picture, on which it looks so different that a copy can be told by its edge."""
    subject, scene = (np.array(PALETTE[name], float) for name in (own, taken[2]))

    def alike(name: str) -> float:
        a, b = subject - PALETTE[name], subject - scene
        return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))

    free = [COLOURS[i] for i in rng.permutation(len(COLOURS)) if COLOURS[i] not in taken]
    return next((name for name in free if alike(name) <= CONTRAST), min(free, key=alike))


def _portrait(rng: np.random.Generator, subject: Subject, ground: str) -> Scene:
    """The subject alone: another size, turned, somewhere else."""
    size = "medium" if subject.size == "large" else "large"  # the look of a small one is in few tokens
    radius = SIZES[size]
    free = radius * 1.1 + MARGIN
    while True:
        y, x = (float(v) for v in rng.uniform(free, 1 - free, 2))
        if np.hypot(y - subject.y, x - subject.x) >= AWAY:
            break
    rotation = float(rng.uniform(*ROTATIONS) * rng.choice((-1, 1)))
    alone = replace(subject, x=x, y=y, size=size, radius=radius, rotation=rotation)
    kind = BACKGROUNDS[int(rng.integers(len(BACKGROUNDS)))]
    return Scene((alone,), kind, ground, phase=(float(rng.random()), float(rng.random())))
