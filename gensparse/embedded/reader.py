"""Reads a picture back: which subjects it shows, where, and on what background.

A convolutional network of under a million parameters in the manner of CenterNet (Zhou et al. 2019, "Objects as
Points"): a heat map of centres at stride 8, and at every cell the subject's offset, radius, shape, colour and fill. The
picture is seen at area 128 x 128 in its own aspect ratio. Its pooled activations are the features of
`quality.kernel_distance`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from gensparse.embedded.scenes import BACKGROUNDS, COLOURS, FILLS, PALETTE, SHAPES
from gensparse.errors import ConfigError

Box = tuple[float, float, float, float]
Picture = Image.Image | np.ndarray | Tensor

SIDE = 128  # a square picture is seen at SIDE x SIDE, others at the same area
STRIDE = 8
WEIGHTS = Path(__file__).parent / "reader" / "reader.safetensors"
CELL_CHANNELS = (1, 3, len(SHAPES), len(COLOURS), len(FILLS))  # heat; dy, dx, log radius; shape; colour; fill


# ---------------------------------------------------------------- what is read


@dataclass(frozen=True)
class SeenSubject:
    """One subject. `box`: (y0, x0, y1, x1), fractions of the picture; `confidence`: 0..1."""

    box: Box
    shape: str
    colour: str
    fill: str
    confidence: float

    @property
    def centre(self) -> tuple[float, float]:
        """(y, x), fractions of the picture."""
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2


@dataclass(frozen=True)
class Reading:
    """What a picture shows; subjects by falling confidence. `aspect`: width / height."""

    subjects: tuple[SeenSubject, ...]
    background_kind: str
    background_colour: str
    aspect: float = 1.0

    @property
    def extent(self) -> tuple[float, float]:
        """(height, width) in scene units; their product is 1."""
        return 1 / math.sqrt(self.aspect), math.sqrt(self.aspect)

    def radius(self, index: int) -> float:
        """Radius of subject `index` in scene units."""
        y0, _, y1, _ = self.subjects[index].box
        return (y1 - y0) / 2 * self.extent[0]


# ---------------------------------------------------------------- network


class Block(nn.Module):
    """Residual depthwise `kernel` x `kernel`, then two pointwise convolutions with twice the channels between."""

    def __init__(self, channels: int, kernel: int):
        super().__init__()
        self.spatial = nn.Conv2d(channels, channels, kernel, padding=kernel // 2, groups=channels, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.widen = nn.Conv2d(channels, 2 * channels, 1)
        self.narrow = nn.Conv2d(2 * channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.narrow(F.relu(self.widen(self.norm(self.spatial(x)))))


def _halve(inputs: int, outputs: int) -> nn.Sequential:
    """Stride-2 convolution: [B, inputs, H, W] -> [B, outputs, H/2, W/2]."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
    )


class Network(nn.Module):
    """[B, 3, H, W] in -1..1, H and W multiples of 16 -> cells [B, 30, H/8, W/8] and background logits [B, 17]."""

    def __init__(self, widths: tuple[int, int, int, int] = (24, 48, 96, 160)):
        super().__init__()
        self.stage2 = _halve(3, widths[0])
        self.stage4 = nn.Sequential(_halve(widths[0], widths[1]), Block(widths[1], 3), Block(widths[1], 3))
        self.stage8 = nn.Sequential(_halve(widths[1], widths[2]), Block(widths[2], 5), Block(widths[2], 5))
        self.stage16 = nn.Sequential(_halve(widths[2], widths[3]), *(Block(widths[3], 7) for _ in range(3)))
        self.up = nn.Conv2d(widths[3], widths[2], 1)
        self.top = nn.Sequential(Block(widths[2], 5), Block(widths[2], 5), nn.BatchNorm2d(widths[2]), nn.ReLU())
        self.cells = nn.Conv2d(widths[2], sum(CELL_CHANNELS), 1)
        self.background = nn.Conv2d(widths[2], len(BACKGROUNDS) + len(COLOURS) + 1, 1)

    def stages(self, pixels: Tensor) -> list[Tensor]:
        """Activations at strides 2, 4, 8, 16 and, with context, again at 8."""
        two = self.stage2(pixels)
        four = self.stage4(two)
        eight = self.stage8(four)
        sixteen = self.stage16(eight)
        top = self.top(eight + F.interpolate(self.up(sixteen), scale_factor=2))
        return [two, four, eight, sixteen, top]

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        top = self.stages(pixels)[-1]
        *_, height, width = top.shape
        votes = self.background(top).flatten(2)  # [B, 18, cells]; the last channel weighs the cells
        weight = votes[:, -1:].softmax(-1)
        return self.cells(top).reshape(len(top), -1, height, width), (votes[:, :-1] * weight).sum(-1)


# ---------------------------------------------------------------- pictures in


def as_image(picture: Picture) -> Image.Image:
    """RGB image of a PIL picture, an array [H, W, 3] or a tensor [3, H, W] or [1, 3, H, W]; floats are 0..1.

    Raises ConfigError for other shapes.
    """
    if isinstance(picture, Image.Image):
        return picture.convert("RGB")
    return Image.fromarray(_as_array(picture))


def _as_array(picture: np.ndarray | Tensor) -> np.ndarray:
    """uint8 [H, W, 3]."""
    if isinstance(picture, Tensor):
        picture = picture.detach().to("cpu", torch.float32 if picture.is_floating_point() else picture.dtype)
        picture = (picture[0] if picture.ndim == 4 and len(picture) == 1 else picture).numpy()
        picture = np.moveaxis(picture, 0, -1) if picture.ndim == 3 else picture
    if picture.ndim != 3 or picture.shape[-1] != 3:
        raise ConfigError(
            f"A picture has shape {tuple(picture.shape)}: give an array [H, W, 3] or a tensor [3, H, W] of one picture."
        )
    if picture.dtype == np.uint8:
        return np.ascontiguousarray(picture)
    return np.rint(np.clip(np.nan_to_num(picture), 0, 1) * 255).astype(np.uint8)


def input_size(aspect: float) -> tuple[int, int]:
    """(height, width) at which the network sees a picture of that width / height: multiples of 16, area ~ SIDE^2."""
    height, width = SIDE / math.sqrt(aspect), SIDE * math.sqrt(aspect)
    return max(16, round(height / 16) * 16), max(16, round(width / 16) * 16)


def _seen(image: Image.Image) -> np.ndarray:
    """uint8 [h, w, 3] at the network's size, antialiased."""
    height, width = input_size(image.width / image.height)
    return np.asarray(image.resize((width, height), Image.Resampling.BILINEAR, reducing_gap=3.0))


def normalise(pictures: np.ndarray) -> Tensor:
    """uint8 [B, H, W, 3] -> float [B, 3, H, W] in -1..1, channels last in memory."""
    return (torch.from_numpy(pictures).float() / 127.5 - 1).permute(0, 3, 1, 2)


# ---------------------------------------------------------------- readings out


class Reader:
    """A trained network with its decoding. Readings are deterministic; nothing is random."""

    def __init__(self, network: Network, threshold: float = 0.4):
        self.network = network.eval().to(memory_format=torch.channels_last)
        self.threshold = threshold

    @classmethod
    def load(cls, path: str | Path = WEIGHTS, threshold: float = 0.4) -> "Reader":
        """The shipped reader, or other weights of the same network."""
        from safetensors.torch import load_file

        network = Network()
        network.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in load_file(path).items()})
        return cls(network, threshold)

    def read(self, picture: Picture) -> Reading:
        """What one picture of any size shows."""
        return self.read_many([picture])[0]

    @torch.no_grad()
    def read_many(self, pictures: Sequence[Picture]) -> list[Reading]:
        """Like `read` for each; pictures of the same aspect ratio share a batch."""
        images = [as_image(p) for p in pictures]
        seen = [_seen(image) for image in images]
        readings: list[Reading | None] = [None] * len(images)
        for shape in {s.shape for s in seen}:
            members = [i for i, s in enumerate(seen) if s.shape == shape]
            for start in range(0, len(members), 32):
                chunk = members[start : start + 32]
                cells, background = self.network(normalise(np.stack([seen[i] for i in chunk])))
                for row, i in enumerate(chunk):
                    aspect = images[i].width / images[i].height
                    reading = decode(cells[row], background[row], aspect, self.threshold)
                    readings[i] = settle_colours(reading, seen[i])
        return readings  # type: ignore[return-value] - every index was filled

    @torch.no_grad()
    def features(self, crops: Sequence[Picture]) -> Tensor:
        """[N, F]: mean and deviation of every channel at every depth, at the crops' own resolution.

        Early layers see sharpness and noise, late ones shapes. Raises ConfigError for a side below 32 pixels.
        """
        arrays = [np.asarray(as_image(c)) for c in crops]
        for array in arrays:
            if min(array.shape[:2]) < 32:
                raise ConfigError(f"A crop is {array.shape[0]}x{array.shape[1]}: features need sides of at least 32.")
        return torch.stack([self._features(a[: a.shape[0] // 16 * 16, : a.shape[1] // 16 * 16]) for a in arrays])

    def _features(self, array: np.ndarray) -> Tensor:
        stages = self.network.stages(normalise(array[None].copy()))
        return torch.cat([torch.cat((s.mean((2, 3)), s.std((2, 3))), 1) for s in stages], 1)[0]


def decode(cells: Tensor, background: Tensor, aspect: float, threshold: float) -> Reading:
    """Local maxima of the heat map, each with what its cell says; `cells` [30, h, w], `background` [17]."""
    heat, place, shape, colour, fill = cells.float().split(CELL_CHANNELS)
    heat = heat.sigmoid()
    peak = (heat == F.max_pool2d(heat[None], 3, 1, 1)[0]) & (heat >= threshold)
    found = []
    for row, column in peak[0].nonzero().tolist():
        box = _box(place[:, row, column].tolist(), row, column, heat.shape[1:])
        words = [
            names[int(logits[:, row, column].argmax())]
            for names, logits in ((SHAPES, shape), (COLOURS, colour), (FILLS, fill))
        ]
        found.append(SeenSubject(box, *words, float(heat[0, row, column])))
    found.sort(key=lambda s: -s.confidence)
    kinds, colours = background.float().split((len(BACKGROUNDS), len(COLOURS)))
    kept = tuple(s for i, s in enumerate(found) if not any(overlap(s.box, o.box) > 0.55 for o in found[:i]))
    return Reading(kept, BACKGROUNDS[int(kinds.argmax())], COLOURS[int(colours.argmax())], aspect)


def settle_colours(reading: Reading, pixels: np.ndarray) -> Reading:
    """The reading with colours that the picture itself contradicts replaced; `pixels` uint8 [h, w, 3].

    A colour is contradicted if next to none of the subject's pixels have it and a quarter have one other colour of the
    palette, the background's apart.
    """
    subjects = []
    for subject in reading.subjects:
        share = _palette_shares(pixels, subject.box)
        own = share[COLOURS.index(subject.colour)]
        share[COLOURS.index(reading.background_colour)] = 0
        settled = COLOURS[int(share.argmax())] if own < 0.03 and share.max() > 0.25 else subject.colour
        subjects.append(replace(subject, colour=settled))
    return replace(reading, subjects=tuple(subjects))


def _palette_shares(pixels: np.ndarray, box: Box) -> np.ndarray:
    """Share of the pixels in the inner 80% of `box` that lie within 28 levels of each palette colour."""
    height, width = pixels.shape[:2]
    dy, dx = (box[2] - box[0]) / 10, (box[3] - box[1]) / 10
    top, bottom = (int(np.clip(round(v * height), 0, height)) for v in (box[0] + dy, box[2] - dy))
    left, right = (int(np.clip(round(v * width), 0, width)) for v in (box[1] + dx, box[3] - dx))
    inner = pixels[top:bottom, left:right].reshape(-1, 1, 3).astype(np.float32)
    if not len(inner):
        return np.zeros(len(COLOURS))
    return (np.linalg.norm(inner - np.array([*PALETTE.values()], np.float32), axis=-1) < 28).mean(0)


def _box(place: list[float], row: int, column: int, grid: Sequence[int]) -> Box:
    """Box from the cell's (dy, dx, log radius): offsets in cells, radius in units of SIDE."""
    y, x = (row + 0.5 + place[0]) / grid[0], (column + 0.5 + place[1]) / grid[1]
    radius = math.exp(min(place[2], 1.0)) * SIDE / STRIDE
    dy, dx = radius / grid[0], radius / grid[1]
    return y - dy, x - dx, y + dy, x + dx


def overlap(a: Box, b: Box) -> float:
    """Area of the intersection over the area of the union."""
    height, width = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    if height <= 0 or width <= 0:
        return 0.0
    both = height * width
    return both / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both)
