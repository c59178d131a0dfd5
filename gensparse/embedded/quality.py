"""What a generated picture is worth, in numbers: right attributes, right counts, duplicates, distance to renderings.

Every measure here fails on its planted defect (`gensparse.embedded.defects`); sharpness is in `sharpness`.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from gensparse.embedded.reader import SIDE, Box, Picture, Reader, Reading, SeenSubject, as_image, overlap
from gensparse.embedded.scenes import MARGIN, PLACES, RELATIONS, SIZES, Request, Scene, SubjectRequest
from gensparse.errors import ConfigError

ATTRIBUTES = ("count", "shape", "colour", "fill", "size", "place", "relation", "background", "background colour")
Scores = dict[str, list[bool]]
PASTED_SIDE = 64  # pixels: side of a square picture when searched for a pasted patch
_MOST_SEEN = 7  # subjects of a picture that are matched with a prompt's


def reading_of(scene: Scene) -> Reading:
    """The reading that a perfect reader gives of a scene's picture."""
    seen = tuple(SeenSubject(scene.box(i), s.shape, s.colour, s.fill, 1.0) for i, s in enumerate(scene.subjects))
    return Reading(seen, scene.background, scene.background_colour, scene.aspect)


# ---------------------------------------------------------------- prompt fidelity


def prompt_fidelity(reading: Reading, request: Request) -> Scores:
    """Right or wrong for everything the prompt says, and for nothing else; keys from ATTRIBUTES.

    Subjects of the prompt are matched with those of the picture in the way that makes most attributes right; one that
    is missing has every attribute wrong.
    """
    scores: Scores = {}
    if request.subjects:
        scores["count"] = [right_count(reading, request)]
        for name, values in _best_match(reading, request).items():
            scores[name] = values
    if request.background is not None:
        scores["background"] = [reading.background_kind == request.background]
    if request.background_colour is not None:
        scores["background colour"] = [reading.background_colour == request.background_colour]
    return scores


def right_count(reading: Reading, request: Request) -> bool:
    """The picture shows as many subjects as the prompt names."""
    return len(reading.subjects) == len(request.subjects)


def share_right(scores: Iterable[Scores]) -> float:
    """Right answers over all answers of many pictures; nan without any."""
    answers = [right for one in scores for values in one.values() for right in values]
    return float(np.mean(answers)) if answers else math.nan


def _best_match(reading: Reading, request: Request) -> Scores:
    count = len(request.subjects)
    candidates = [*range(min(len(reading.subjects), _MOST_SEEN)), *[None] * count]
    matches = (_match_scores(reading, request, m) for m in set(itertools.permutations(candidates, count)))
    return max(matches, key=lambda s: (sum(map(sum, s.values())), sum(s["shape"]), sum(s.get("colour", []))))


def _match_scores(reading: Reading, request: Request, match: Sequence[int | None]) -> Scores:
    """Scores if subject i of the prompt is subject match[i] of the picture."""
    scores: Scores = {}
    for wanted, index in zip(request.subjects, match, strict=True):
        for name, right in _subject_scores(reading, wanted, index).items():
            scores.setdefault(name, []).append(right)
    for first, relation, second in request.relations:
        ends = match[first], match[second]
        right = None not in ends and stands(reading, ends[0], relation, ends[1])
        scores.setdefault("relation", []).append(right)
    return scores


def _subject_scores(reading: Reading, wanted: SubjectRequest, index: int | None) -> dict[str, bool]:
    said = {name: value for name, value in vars(wanted).items() if value is not None}
    if index is None:
        return dict.fromkeys(said, False)
    seen = reading.subjects[index]
    shown = {
        "shape": seen.shape,
        "colour": seen.colour,
        "fill": seen.fill,
        "size": size_word(reading.radius(index)),
        "place": place_word(reading, index),
    }
    return {name: shown[name] == value for name, value in said.items()}


def size_word(radius: float) -> str:
    """The size whose radius (scene units) is nearest by ratio."""
    return min(SIZES, key=lambda name: abs(math.log(max(radius, 1e-6) / SIZES[name])))


def place_word(reading: Reading, index: int) -> str:
    """The absolute place of a subject: thirds of the range in which its centre can lie."""
    cells = []
    for centre, extent in zip(reading.subjects[index].centre, reading.extent, strict=True):
        free = max(extent / 2 - reading.radius(index) - MARGIN, 1e-3)
        cells.append(1 + int(np.clip(np.rint((centre - 0.5) * extent / free / 0.88), -1, 1)))
    return next(name for name, cell in PLACES.items() if cell == tuple(cells))


def stands(reading: Reading, first: int, relation: str, second: int) -> bool:
    """Subject `first` stands in `relation` to `second`: it lies in that of the four directions."""
    (y1, x1), (y2, x2) = reading.subjects[first].centre, reading.subjects[second].centre
    dy, dx = (y1 - y2) * reading.extent[0], (x1 - x2) * reading.extent[1]
    wanted_y, wanted_x = RELATIONS[relation]
    along, across = dy * wanted_y + dx * wanted_x, dy * wanted_x + dx * wanted_y
    return along > abs(across)


# ---------------------------------------------------------------- duplicates at full resolution


def duplicates(picture: Picture, reader: Reader, reading: Reading | None = None) -> list[SeenSubject]:
    """Subjects that only close-ups show: copies too small for the whole picture's reading, boxes in the whole picture.

    Crops of 1/2 to 1/16 of the shorter side overlap by half. A subject counts if most of the crops that hold it show
    it, in the same colour at two of these scales. Copies that lie on a known subject are not looked for: the parts of
    its texture are circles and squares themselves.
    """
    image = as_image(picture)
    reading = reader.read(image) if reading is None else reading
    scales = [_confirmed(_sightings(view, reader), view.size) for view in _views(image)]
    found: list[SeenSubject] = []
    for finer, coarser in itertools.combinations(reversed(scales), 2):
        for seen in finer:
            agreed = any(_agree(seen, other) for other in coarser)
            if agreed and not any(_same(seen, known) for known in (*reading.subjects, *found)):
                found.append(seen)
    return found


def _views(image: Image.Image) -> list[Image.Image]:
    """The picture with shorter sides of 2 to 16 times the reader's; none is enlarged, but there are two at least."""
    shorter = min(image.size)
    factors = [n for n in (2, 4, 8, 16) if n <= 4 or n * SIDE <= shorter]
    sizes = [tuple(round(length * n * SIDE / shorter) for length in image.size) for n in factors]
    return [image.resize(size, Image.Resampling.BILINEAR, reducing_gap=3.0) for size in sizes]


def _starts(length: int) -> list[int]:
    """Offsets of crops of SIDE pixels that cover `length` and overlap by at least half."""
    count = math.ceil(2 * (length - SIDE) / SIDE) + 1
    return [round(i * (length - SIDE) / max(1, count - 1)) for i in range(count)]


def _sightings(view: Image.Image, reader: Reader) -> list[SeenSubject]:
    """Subjects wholly inside a crop of SIDE pixels, boxes in the whole picture; one entry per crop that shows them."""
    pixels, (width, height) = np.asarray(view), view.size
    corners = list(itertools.product(_starts(height), _starts(width)))
    crops = [pixels[top : top + SIDE, left : left + SIDE] for top, left in corners]
    found = []
    for (top, left), reading in zip(corners, reader.read_many(crops), strict=True):
        for seen in reading.subjects:
            if min(seen.box[:2]) >= 0 and max(seen.box[2:]) <= 1:
                y0, x0, y1, x1 = (v * SIDE for v in seen.box)
                box = (top + y0) / height, (left + x0) / width, (top + y1) / height, (left + x1) / width
                found.append(replace(seen, box=box))
    return found


def _confirmed(sightings: list[SeenSubject], size: tuple[int, int]) -> list[SeenSubject]:
    """One entry per subject that at least half of the crops holding it show; `size` is (width, height) of the view."""
    groups: list[list[SeenSubject]] = []
    for seen in sorted(sightings, key=lambda s: -s.confidence):
        group = next((g for g in groups if overlap(g[0].box, seen.box) > 0.3), None)
        groups.append([seen]) if group is None else group.append(seen)
    return [group[0] for group in groups if len(group) >= 0.5 * _holders(group[0].box, size)]


def _holders(box: Box, size: tuple[int, int]) -> int:
    """How many crops hold the whole box."""
    held = 1
    for low, high, length in ((box[1], box[3], size[0]), (box[0], box[2], size[1])):
        held *= max(1, sum(s <= low * length and high * length <= s + SIDE for s in _starts(length)))
    return held


def _same(seen: SeenSubject, known: SeenSubject) -> bool:
    """`seen` is `known`, looked at in another crop, or a part of it."""
    return overlap(seen.box, known.box) > 0.4 or all(
        low < middle < high for low, middle, high in zip(known.box[:2], seen.centre, known.box[2:], strict=True)
    )


def _agree(seen: SeenSubject, other: SeenSubject) -> bool:
    """Two crops show one subject alike; shapes are not compared, for the coarser crop shows it in a few pixels."""
    return overlap(seen.box, other.box) > 0.3 and seen.colour == other.colour


# ---------------------------------------------------------------- pasted references


def pasted(picture: Picture, reference: Picture, box: Box, margin: float = 0.2) -> float:
    """Highest correlation, -1..1, of the reference's `box` with a margin of its background, anywhere in the picture.

    A patch pasted at its own size scores above 0.9, a resized one (half to double is searched) less; the same subject
    drawn anew on another background stays below 0.85. Pictures are compared at area 64 x 64.

    Args:
        margin: of the reference's background on every side, as a share of the box.
    """
    target, source = as_image(picture), as_image(reference)
    patch = _patch(source, box, margin)
    shrink = PASTED_SIDE / math.sqrt(source.width * source.height)
    target = _shrunk(target, PASTED_SIDE / math.sqrt(target.width * target.height))
    best = -1.0
    for scale in np.geomspace(0.5, 2, 25):
        scaled = _shrunk(patch, shrink * scale)
        small, large = scaled.shape[-2:], target.shape[-2:]
        if min(small) >= 6 and all(s <= t for s, t in zip(small, large, strict=True)):
            best = max(best, float(_correlation(target, scaled).max()))
    return best


def _patch(image: Image.Image, box: Box, margin: float) -> Image.Image:
    """The box and a share of its size around it, in the picture's bounds."""
    margin_y, margin_x = margin * (box[2] - box[0]), margin * (box[3] - box[1])
    y0, x0 = max(0.0, box[0] - margin_y), max(0.0, box[1] - margin_x)
    y1, x1 = min(1.0, box[2] + margin_y), min(1.0, box[3] + margin_x)
    return image.crop(tuple(round(v * s) for v, s in zip((x0, y0, x1, y1), image.size * 2, strict=True)))


def _shrunk(image: Image.Image, scale: float) -> Tensor:
    """float [1, 3, h, w] in 0..1 of the image at `scale`."""
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    small = image.resize(size, Image.Resampling.BILINEAR, reducing_gap=3.0)
    return torch.from_numpy(np.asarray(small, np.float32) / 255).permute(2, 0, 1)[None]


def _correlation(target: Tensor, patch: Tensor) -> Tensor:
    """Normalised cross-correlation of a patch [1, 3, h, w] at every place of the target; each channel less its mean."""
    area = patch.shape[-2] * patch.shape[-1]
    flat = 3e-3 * area  # three channels that vary by a thirtieth: below it, nothing correlates
    patch = patch - patch.mean((2, 3), keepdim=True)
    ones = torch.ones(1, 1, *patch.shape[-2:])
    mean = F.conv2d(target.transpose(0, 1), ones) / area
    power = (F.conv2d(target.square().transpose(0, 1), ones) - area * mean.square()).sum(0).clamp_min(flat)
    return F.conv2d(target, patch)[0] / (power.sqrt() * patch.norm().clamp_min(flat**0.5))


# ---------------------------------------------------------------- distance of distributions


def kernel_distance(crops_a: Sequence[Picture], crops_b: Sequence[Picture], reader: Reader) -> float:
    """Squared maximum mean discrepancy of the reader's features, each crop a picture of its own.

    About 0 for equal distributions; `crops_b` is the reference. Raises ConfigError as `KernelBlocks` does.
    """
    a, b = (reader.features(crops)[:, None] for crops in (crops_a, crops_b))
    return KernelBlocks.of(a, b).distance()


@dataclass(frozen=True)
class KernelBlocks:
    """Mean kernel values between pictures: [G, G] within a, within b, and from a to b."""

    within_a: np.ndarray
    within_b: np.ndarray
    across: np.ndarray

    @classmethod
    def of(cls, a: Tensor, b: Tensor) -> "KernelBlocks":
        """From features [G, crops, d] of G pictures each, with the kernel (x . y / d + 1)^3.

        Binkowski et al. 2018, "Demystifying MMD GANs", section 4. Features are scaled by the mean and deviation of `b`,
        the reference, and cut at 3 deviations, lest the cubic kernel see outliers only. Raises ConfigError unless both
        have the same number of pictures, 2 or more.
        """
        if len(a) != len(b) or len(a) < 2:
            raise ConfigError(
                f"The kernel distance has {len(a)} and {len(b)} pictures: give as many of each, 2 at least."
            )
        flat = b.flatten(0, 1)
        scale = flat.std(0)
        scale = scale + 0.1 * scale.mean()
        a, b = (((t - flat.mean(0)) / scale).clamp(-3, 3).double() for t in (a, b))
        return cls(_block_means(a, a), _block_means(b, b), _block_means(a, b))

    def distance(self, pictures: Sequence[int] | None = None) -> float:
        """Unbiased squared MMD over the given pictures (all; may repeat); one picture is never compared with itself."""
        count = len(self.across)
        weight = np.ones(count) if pictures is None else np.bincount(pictures, minlength=count).astype(float)
        pairs = np.outer(weight, weight) * (1 - np.eye(count))
        total = pairs.sum()
        if total == 0:
            return math.nan
        return float((pairs * (self.within_a + self.within_b - self.across - self.across.T)).sum() / total)


def _block_means(a: Tensor, b: Tensor) -> np.ndarray:
    """Mean of the kernel over the crops of every pair of pictures, [Ga, Gb]."""
    rows = [((one @ b.flatten(0, 1).T / a.shape[-1] + 1) ** 3).mean(0).reshape(len(b), -1).mean(1) for one in a]
    return torch.stack(rows).numpy()


# ---------------------------------------------------------------- intervals


@dataclass(frozen=True)
class Interval:
    """A statistic with its 95% bootstrap interval."""

    value: float
    low: float
    high: float


def bootstrap(items: Sequence, statistic: Callable[[Sequence], float], rounds: int = 1000, seed: int = 0) -> Interval:
    """Percentile interval of `statistic` under resampling of `items` with replacement.

    Paired comparisons put what belongs together into one item: `bootstrap(list(zip(a, b)), difference_of_means)`.
    Raises ConfigError without items.
    """
    if not items:
        raise ConfigError("The bootstrap has no items: give at least one.")
    rng = np.random.default_rng(seed)
    draws = rng.integers(0, len(items), (rounds, len(items)))
    values = [statistic([items[i] for i in draw]) for draw in draws]
    return Interval(float(statistic(items)), *(float(v) for v in np.nanquantile(values, (0.025, 0.975))))


def difference_of_means(pairs: Sequence[tuple[float, float]]) -> float:
    """Mean of the first minus mean of the second."""
    return float(np.mean([a - b for a, b in pairs]))
