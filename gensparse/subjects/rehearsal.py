"""Where a model puts the subjects of a prompt: found in a picture it drew by what its answer owes to their words.

IR-Diffusion (2411.19261) draws the scene once without references and finds its subjects there by a detector. Here the
model itself says where they are: its answer to the noised picture is compared with its answer to the prompt without the
subject, as DiffEdit (2210.11427, section 3.2) does for edits, and what differs most grows to the edges of the picture
by a random walk (Grady, 2006). No detector, no attention maps, and the same for all models.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from gensparse.subjects.phrases import noun_phrases

SHARES = (0.5, 0.7)
"""Shares of noise at which answers are compared: lower ones show outlines, higher ones areas."""

DRAWS = 4
"""Noises per share."""

CELL = 2
"""Latent cells per side over which differences are summed: 16 pixels of most models."""

SURE, NOWHERE = 0.8, 0.25
"""Of a subject's strongest changes: from here on a token is the subject's, and below this nobody's."""

STRONGEST = 4
"""Tokens whose mean is the measure of strong."""

LEAST = 6
"""Parts per side from which on those at the border are left to the walk."""

SIDE = 128
"""Pixels of the longer side at which areas grow."""

STIFFNESS = 1000.0
"""Of edges, for the random walk."""


class Noisy(NamedTuple):
    """One noise to compare answers at."""

    share: float
    seed: int


def comparisons(seed: int) -> Iterator[Noisy]:
    """All of them, `DRAWS` per share."""
    for share in SHARES:
        for number in range(DRAWS):
            yield Noisy(share, seed + number)


def without(prompt: str, name: str) -> str | None:
    """A prompt without the noun phrase that holds a name, or without the name; None where it is not said."""
    said = re.search(rf"(?<!\w){re.escape(name.strip())}(?!\w)", prompt, re.IGNORECASE)
    if said is None:
        return None
    start, end = said.span()
    for phrase in noun_phrases(prompt):
        for found in re.finditer(re.escape(phrase), prompt, re.IGNORECASE):
            if found.start() <= start and end <= found.end():
                start, end = found.span()
    return " ".join((prompt[:start] + prompt[end:]).split())


def changes(answer: Callable[[Noisy], Tensor], seed: int = 0) -> Tensor:
    """How much every part owes to every subject, [subjects, rows, columns], float32 with a mean of 1.

    Args:
        answer: of a noise, the model's answers [1 + subjects, C, h, w] under the whole prompt, and under those without
            a subject; parts are of `CELL` x `CELL` cells, those at the end smaller where these do not divide.
    """
    sums: dict[float, Tensor] = {}
    for noisy in comparisons(seed):
        answers = answer(noisy).float()
        power = F.avg_pool2d((answers[1:] - answers[:1]).square().mean(1), CELL, ceil_mode=True)
        sums[noisy.share] = sums.get(noisy.share, 0) + power
    roots = torch.stack([power.sqrt() for power in sums.values()])
    return (roots / roots.mean(dim=(2, 3), keepdim=True).clamp(min=torch.finfo(roots.dtype).tiny)).mean(0)


def grown(maps: Tensor, picture: np.ndarray) -> Tensor:
    """Where the subjects are, bool [subjects, height, width] of at most `SIDE` pixels, disjoint.

    Args:
        maps: [subjects, rows, columns] of `changes`.
        picture: bytes [H, W, 3], what was drawn.
    """
    from PIL import Image
    from skimage.segmentation import random_walker

    inner = maps[:, 1:-1, 1:-1] if min(maps.shape[1:]) >= LEAST else maps
    top = inner.flatten(1).topk(min(STRONGEST, inner[0].numel())).values.mean(1)
    strong = maps / top[:, None, None].clamp(min=1e-12)
    if inner is not maps:  # at the border models answer least surely: there the walk decides
        middle = strong[:, 1:-1, 1:-1].clone()
        strong = strong.clamp(max=(SURE + NOWHERE) / 2)
        strong[:, 1:-1, 1:-1] = middle
    seeds = seeded(strong)
    scale = min(1.0, SIDE / max(picture.shape[:2]))
    height, width = (max(1, round(side * scale)) for side in picture.shape[:2])
    marks = np.zeros((height, width), np.int64)  # in the middle of every part, whose rest may be someone else's
    middles = (((np.arange(n) + 0.5) * side / n).astype(int) for n, side in zip(seeds.shape, marks.shape, strict=True))
    marks[np.ix_(*middles)] = seeds.numpy()
    if len(np.unique(marks[marks > 0])) < 2:  # nothing to tell apart
        return torch.from_numpy(np.stack([np.full(marks.shape, n + 1 in marks) for n in range(len(maps))]))
    small = np.asarray(Image.fromarray(picture).resize((width, height), Image.Resampling.LANCZOS, reducing_gap=3.0))
    accuracy = {"mode": "cg_j", "tol": 1e-5, "prob_tol": np.inf}  # its labels are wanted alone
    walked = random_walker(small / 255.0, marks, beta=STIFFNESS, channel_axis=-1, **accuracy)
    return torch.from_numpy(np.stack([walked == n + 1 for n in range(len(maps))]))


def seeded(strong: Tensor) -> Tensor:
    """Sure tokens, int64 [rows, columns]: the number of the subject from 1, one more for nobody, 0 for unsure.

    Args:
        strong: [subjects, rows, columns], 1 for a subject's strongest changes. Everybody gets a token, two subjects
            with one strongest token excepted.
    """
    count, best = len(strong), strong.argmax(0)
    seeds = torch.zeros(best.shape, dtype=torch.int64)
    seeds[strong.amax(0) < NOWHERE] = count + 1
    for number in reversed(range(count)):
        seeds.view(-1)[int(strong[number].argmax())] = number + 1
    for number in range(count):
        seeds[(strong[number] > SURE) & (best == number)] = number + 1
    return seeds


def box_of(mask: Tensor) -> tuple[float, float, float, float] | None:
    """(left, top, right, bottom) of a mask [H, W] in shares of its sides; None for an empty one."""
    rows, columns = (mask.any(dim=axis).nonzero()[:, 0] for axis in (1, 0))
    if not len(rows):
        return None
    sides = ((columns, mask.shape[1]), (rows, mask.shape[0]))
    (left, right), (top, bottom) = ((int(x[0]) / n, (int(x[-1]) + 1) / n) for x, n in sides)
    return round(left, 3), round(top, 3), round(right, 3), round(bottom, 3)


def missing_in(prompts: Sequence[str], names: Sequence[str]) -> list[str]:
    """Names that some prompt does not say."""
    return [name for name in names if any(without(prompt, name) is None for prompt in prompts)]
