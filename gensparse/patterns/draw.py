"""Pictures of what one query sees. Loaded on first use, because it needs Pillow."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from textwrap import wrap
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from gensparse.errors import ConfigError
from gensparse.layout import Coords, Grid, Layout, Segment, segment_coords
from gensparse.patterns.base import Bools, Pattern, Rule
from gensparse.patterns.checks import whole_number

Colour = tuple[int, int, int]

# Okabe and Ito's palette: told apart with every kind of colour vision, and in grey
SEEN: Colour = (0, 114, 178)
EXTRA: Colour = (0, 158, 115)
QUERY: Colour = (213, 94, 0)
HIDDEN: Colour = (226, 229, 233)
PAPER: Colour = (255, 255, 255)
INK: Colour = (32, 33, 36)

MARGIN, LINE, FONT = 12, 18, 13  # pixels
BARE_TOP = MARGIN + LINE // 2 + LINE  # pixels above the frames of the target in a bare drawing
NARROWEST = 360  # pixels of a canvas, so that titles have room
WIDEST = 1400  # pixels of frames side by side; further frames go below
MOST_PIXELS = 64 << 20
RULED = 5  # pixels of a cell from which cells are set apart by lines

Span = tuple[int, int]


class Panel(NamedTuple):
    """One segment: its label, its cells as colours [F, H, W, 3], pixels (height, width) of a cell, and the query."""

    label: str
    cells: np.ndarray
    size: Span
    query: Grid | None


@dataclass(frozen=True)
class Sheet:
    """Where the frames of a panel stand.

    Args:
        frame: pixels (height, width) of one frame.
        columns: frames side by side.
        rows: lines of frames.
        gap: pixels between frames.
        frames: how many there are.
    """

    frame: Span
    columns: int
    rows: int
    gap: int
    frames: int

    @property
    def titled(self) -> bool:
        """Whether every frame has its number above it."""
        return self.frames > 1

    @classmethod
    def of(cls, grid: Grid, size: Span) -> "Sheet":
        """Of a segment's grid (F, H, W) whose cells have `size` pixels."""
        frames, height, width = grid
        frame = (height * size[0], width * size[1])
        gap = max(8, size[1])
        columns = max(1, min(frames, (WIDEST + gap) // (frame[1] + gap)))
        return cls(frame, columns, ceil(frames / columns), gap, frames)

    @property
    def step(self) -> Span:
        """Pixels from one frame to the next, downwards and to the right."""
        return self.frame[0] + self.gap + (LINE if self.titled else 0), self.frame[1] + self.gap

    @property
    def size(self) -> Span:
        return self.rows * self.step[0] - self.gap, self.columns * self.step[1] - self.gap


class Drawing(NamedTuple):
    """A picture of what one query sees, and how many of how many keys that are."""

    image: Image.Image
    sees: int
    keys: int


def token_at(grid: Grid, scale: int, x: int, y: int) -> Grid | None:
    """(frame, row, column) of the token of the target at a pixel of a bare drawing; None beside the target."""
    sheet = Sheet.of(grid, (scale, scale))
    (line, down), (column, right) = divmod(y - BARE_TOP, sheet.step[0]), divmod(x - MARGIN, sheet.step[1])
    down -= LINE if sheet.titled else 0
    frame = line * sheet.columns + column
    inside = 0 <= down < sheet.frame[0] and 0 <= right < sheet.frame[1]
    if not inside or line < 0 or not 0 <= column < sheet.columns or frame >= sheet.frames:
        return None
    return frame, down // scale, right // scale


def draw_pattern(
    pattern: Pattern,
    layout: Layout,
    query: int | tuple[int, ...],
    *,
    group: int = 0,
    scale: int = 8,
    data: Mapping[str, Any] | None = None,
) -> Image.Image:
    """What `Pattern.draw` gives, see there."""
    return drawn(pattern, layout, query, group=group, scale=scale, data=data).image


def drawn(
    pattern: Pattern,
    layout: Layout,
    query: int | tuple[int, ...],
    *,
    group: int = 0,
    scale: int = 8,
    data: Mapping[str, Any] | None = None,
    bare: bool = False,
) -> Drawing:
    """What `Pattern.draw` gives, and where its tokens are.

    Args:
        bare: leave out the title and the legend, for pages that have their own.
    """
    scale = whole_number("draw scale", scale, high=64, unit="pixels of a token")
    rule = pattern.bind(layout, {name: np.asarray(array) for name, array in (data or {}).items()})
    group = whole_number("draw group", group, low=0, high=rule.groups - 1)
    segment, position = _query(layout, query)
    seen = _seen(rule, segment, position, group)
    panels = _panels(rule, seen, segment, position, scale)
    if bare:
        return Drawing(_canvas([], panels, scale), int(seen.sum()), len(seen))
    own = layout.segments[segment]
    menu = f" (entry {group} of a menu of {rule.groups})" if rule.groups > 1 else ""
    place = ", ".join(str(p) for p, n in zip(position, own.shape, strict=True) if n > 1) or "0"
    sight = f"query ({place}) of {_name(own)} sees {int(seen.sum())} of {len(seen)} keys{menu}"
    legend = [("query", QUERY), ("sees", SEEN), ("sees not", HIDDEN)]
    legend += [("sees, extra key", EXTRA)] if rule.sources else []
    return Drawing(_canvas([repr(pattern), sight], panels, scale, legend), int(seen.sum()), len(seen))


def _query(layout: Layout, query: int | tuple[int, ...]) -> tuple[int, Grid]:
    """Segment and position of the query."""
    if isinstance(query, tuple | list):
        grid = layout.grid
        left_out = 3 - len(query)
        if not 0 <= left_out < 3 or any(length > 1 for length in grid[:left_out]):
            raise ConfigError(f"draw query={query!r} is no position on grid {grid}; pass (H, W) or (F, H, W).")
        entries = [
            whole_number(f"draw query={query!r}: entry", entry, low=0, high=length - 1)
            for entry, length in zip(query, grid[left_out:], strict=True)
        ]
        frames, row, column = (*(0,) * left_out, *entries)
        return layout.target, (frames, row, column)
    number = whole_number("draw query", query, low=0, high=layout.tokens - 1, unit="a token of the sequence")
    coords = layout.coords()
    frames, row, column = map(int, coords.position[number])
    return int(coords.segment[number]), (frames, row, column)


def _seen(rule: Rule, segment: int, position: Grid, group: int) -> Bools:
    """bool [keys in segment order]: what the query sees."""
    keys = segment_coords(rule.key_segments)
    one = Coords(np.array([segment]), np.array([position]))
    return np.broadcast_to(rule.allowed(one, keys, group), (len(keys.segment),))


def _panels(rule: Rule, seen: Bools, segment: int, position: Grid, scale: int) -> list[Panel]:
    """The target, the other segments in their order, then the sources."""
    starts = np.cumsum([0, *(part.length for part in rule.key_segments)])
    own, target = len(rule.layout.segments), rule.layout.target
    order = [target, *(number for number in range(len(rule.key_segments)) if number != target)]
    return [
        _panel(rule, number, seen[starts[number] : starts[number + 1]], own, scale)._replace(
            query=_unrolled(rule, position, number) if number == segment else None
        )
        for number in order
    ]


def _panel(rule: Rule, number: int, seen: Bools, own: int, scale: int) -> Panel:
    part = rule.key_segments[number]
    colour, size = (SEEN, (scale, scale)) if number < own else (EXTRA, _source_cell(rule, number - own, scale))
    cells = np.where(seen[:, None], np.array(colour), np.array(HIDDEN)).astype(np.uint8)
    if part.grid is None:
        columns = _run_columns(rule, part.length)
        blank = np.tile(np.array(PAPER, np.uint8), (-part.length % columns, 1))
        cells = np.concatenate([cells, blank]).reshape(1, -1, columns, 3)
    else:
        cells = cells.reshape(*part.grid, 3)
    shape = " x ".join(str(n) for n in part.shape if n > 1) or "1"
    return Panel(f"{_name(part)}, {shape}: sees {int(seen.sum())} of {part.length}", cells, size, None)


def _name(part: Segment) -> str:
    return part.name if part.name.startswith(part.kind) else f"{part.kind} {part.name}".strip()


def _source_cell(rule: Rule, number: int, scale: int) -> Span:
    """A pooled key is as large as the tokens it stands for."""
    _, height, width = rule.sources[number].cells
    return scale * height, scale * width


def _run_columns(rule: Rule, length: int) -> int:
    """Tokens per line of a segment without a grid."""
    return min(length, max(rule.layout.grid[2], 32))


def _unrolled(rule: Rule, position: Grid, number: int) -> Grid:
    """Where a position stands in its panel."""
    part = rule.key_segments[number]
    return position if part.grid is not None else (0, *divmod(position[2], _run_columns(rule, part.length)))


def _canvas(
    title: list[str], panels: list[Panel], scale: int, legend: Sequence[tuple[str, Colour]] = ()
) -> Image.Image:
    sheets = [Sheet.of(panel.cells.shape[:3], panel.size) for panel in panels]
    font = ImageFont.load_default(FONT)
    labels = (ceil(font.getlength(panel.label)) for panel in panels)
    width = max(NARROWEST, *labels, *(sheet.size[1] for sheet in sheets))
    title = [line for text in title for line in wrap(text, int(0.97 * width * len(text) / font.getlength(text)))]
    height = LINE * len(title) + sum(sheet.size[0] + 2 * LINE for sheet in sheets) + (2 * LINE if legend else 0)
    width, height = width + 2 * MARGIN, height + 2 * MARGIN
    if width * height > MOST_PIXELS:
        raise ConfigError(
            f"draw scale={scale} makes a picture of {width} x {height} pixels, the limit is {MOST_PIXELS}; pass a "
            "smaller scale."
        )
    image = Image.new("RGB", (width, height), PAPER)
    pen, top = ImageDraw.Draw(image), MARGIN
    for line in title:
        pen.text((MARGIN, top), line, INK, font)
        top += LINE
    for panel, sheet in zip(panels, sheets, strict=True):
        top += LINE // 2
        pen.text((MARGIN, top), panel.label, INK, font)
        top += LINE
        _paste(image, pen, panel, sheet, top, font)
        top += sheet.size[0] + LINE // 2
    _legend(pen, MARGIN, top + LINE // 2, font, legend)
    return image


def _paste(image: Image.Image, pen: ImageDraw.ImageDraw, panel: Panel, sheet: Sheet, top: int, font: Any) -> None:
    """The frames of a panel, from `top` downwards."""
    for number, cells in enumerate(panel.cells):
        row, column = divmod(number, sheet.columns)
        y, x = top + row * sheet.step[0], MARGIN + column * sheet.step[1]
        if sheet.titled:
            pen.text((x, y), f"frame {number}", INK, font)
            y += LINE
        image.paste(Image.fromarray(_enlarged(cells, panel.size)), (x, y))
        if panel.query is not None and panel.query[0] == number:
            _mark(pen, x + panel.query[2] * panel.size[1], y + panel.query[1] * panel.size[0], panel.size[0])


def _enlarged(cells: np.ndarray, size: Span) -> np.ndarray:
    """Cells [H, W, 3] as pixels, with a line after every row and column where there is room."""
    pixels = cells.repeat(size[0], axis=0).repeat(size[1], axis=1)
    if min(size) >= RULED:
        pixels[size[0] - 1 :: size[0]] = PAPER
        pixels[:, size[1] - 1 :: size[1]] = PAPER
    return pixels


def _mark(pen: ImageDraw.ImageDraw, x: int, y: int, size: int) -> None:
    """The query: a frame around its cell, whose inside tells whether it sees itself, or a ring around a small cell."""
    if size >= RULED:
        border = max(1, size // 4)
        pen.rectangle((x - 1, y - 1, x + size - 1, y + size - 1), outline=QUERY, width=border + 1)
    else:
        pen.rectangle((x, y, x + size - 1, y + size - 1), fill=QUERY)
        pen.ellipse((x - 5, y - 5, x + size + 4, y + size + 4), outline=QUERY, width=2)


def _legend(pen: ImageDraw.ImageDraw, x: int, y: int, font: Any, entries: Sequence[tuple[str, Colour]]) -> None:
    for word, colour in entries:
        pen.rectangle((x, y + 2, x + 11, y + 13), fill=colour)
        pen.text((x + 17, y), word, INK, font)
        x += 17 + ceil(font.getlength(word)) + 16
