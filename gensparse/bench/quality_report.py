"""Tables and pictures of what `gensparse.bench.quality` has measured."""

import csv
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from gensparse.bench.pictures import BICUBIC, CROP, RENDERING, Item, Maker
from gensparse.bench.record import origin
from gensparse.bench.store import Store
from gensparse.embedded.quality import (
    ATTRIBUTES,
    Interval,
    KernelBlocks,
    bootstrap,
    difference_of_means,
    share_right,
)
from gensparse.embedded.scenes import Scene

NAMES = 168  # pixels for names beside pictures


def shown(interval: Interval, scale: float = 1.0, digits: int = 1) -> str:
    """`value (low..high)`."""
    value, low, high = (f"{v * scale:.{digits}f}" for v in (interval.value, interval.low, interval.high))
    return f"{value} ({low}..{high})"


def mean_of(rows: list[dict], name: str) -> Interval:
    """Mean of a column with its interval; pictures without an edge have no width and are left out."""
    values = [float(r[name]) for r in rows if r[name] is not None]
    return bootstrap(values, lambda v: float(np.mean(v))) if values else Interval(np.nan, np.nan, np.nan)


def times(interval: Interval, scale: float) -> Interval:
    """In another unit."""
    return Interval(interval.value * scale, interval.low * scale, interval.high * scale)


def median_of(rows: list[dict], name: str, digits: int = 1) -> str:
    """Median of a column; empty for what was not generated."""
    values = [row[name] for row in rows if row.get(name) is not None]
    return f"{np.median(values):.{digits}f}" if values else ""


def groups(done: list[tuple[Item, dict]]) -> dict[tuple[str, str], list[tuple[Item, dict]]]:
    """Finished items by (size, method), in order of the prompts."""
    found: dict[tuple[str, str], list[tuple[Item, dict]]] = {}
    for item, row in done:
        found.setdefault((item.size, item.method), []).append((item, row))
    return found


def measures(found: dict, store: Store, size: str, method: str) -> dict[str, Interval | None]:
    """What pictures of a method are worth; None for what cannot be told."""
    rows = [row for _, row in found[size, method]]
    twice = [{"twice": row["duplicates"] > 0} for row in rows]
    distance = kernel_interval(found, store, size, method)
    return {
        "right attributes %": times(bootstrap([row["scores"] for row in rows], share_right), 100),
        "right count %": times(mean_of(rows, "right_count"), 100),
        "with duplicates %": times(mean_of(twice, "twice"), 100),
        "edge width px": mean_of(rows, "edge_width"),
        "overshoot %": mean_of(rows, "overshoot"),
        "seam levels": mean_of(rows, "seam"),
        "kernel distance x1000": None if distance is None else times(distance, 1000),
    }


def medians(rows: list[dict]) -> dict[str, str]:
    """Medians of what a picture took; cascades begin at the kept native stage.

    Seconds are those of the wall clock, of pictures made by one worker; core seconds count all threads.
    """
    digits = {"seconds": 1, "core_seconds": 1, "peak_gib": 2}
    return {name.replace("_gib", "_GiB").replace("_", " "): median_of(rows, name, n) for name, n in digits.items()}


def main_table(found: dict, judged: dict) -> list[str]:
    """One row per size and method, of what `measures` says of each."""
    lines: list[str] = []
    for (size, method), members in found.items():
        rows = [row for _, row in members]
        told, took = judged[size, method], medians(rows)
        if not lines:
            names = ("size", "method", "pictures", *told, *took)
            lines = ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
        values = ["" if v is None else shown(v, digits=2 if name == "edge width px" else 1) for name, v in told.items()]
        lines.append("| " + " | ".join((size, method, str(len(rows)), *values, *took.values())) + " |")
    return lines


def table_rows(found: dict, judged: dict, model: str | None) -> list[dict[str, str]]:
    """The same numbers as rows of a CSV."""
    rows = []
    for (size, method), members in found.items():
        own = {"model": model or "embedded", "size": size, "contender": method, "pictures": str(len(members))}
        for name, value in judged[size, method].items():
            if value is not None:
                numbers = zip(("value", "low", "high"), (value.value, value.low, value.high), strict=True)
                rows.append({**own, "measure": name, **{key: f"{x:.2f}" for key, x in numbers}})
        took = medians([row for _, row in members])
        rows += [{**own, "measure": name, "value": v, "low": "", "high": ""} for name, v in took.items() if v]
    return rows


def attribute_table(found: dict) -> list[str]:
    """Share right of every attribute."""
    lines = ["| size | method | " + " | ".join(ATTRIBUTES) + " |", "|---" * (len(ATTRIBUTES) + 2) + "|"]
    for (size, method), members in found.items():
        cells = []
        for name in ATTRIBUTES:
            asked = [{name: row["scores"][name]} for _, row in members if name in row["scores"]]
            cells.append(f"{100 * share_right(asked):.1f}" if asked else "")
        lines.append(f"| {size} | {method} | " + " | ".join(cells) + " |")
    return lines


def pair_table(found: dict, store: Store) -> list[str]:
    """Every method at a large size against the native pictures, dense and bicubic of the same prompts."""
    lines = ["| size | method | against | difference | |", "|---|---|---|---|---|"]
    for (size, method), members in found.items():
        if size == "native" or method in (BICUBIC, RENDERING):
            continue
        for other_size, other in (("native", "dense"), (size, "dense")):
            if (other_size, other) != (size, method) and (pairs := paired(found, members, (other_size, other))):
                interval = bootstrap(pairs, fidelity_difference)
                lines.append(f"| {size} | {method} | {other_size} {other} | {shown(interval, 100)} | points right |")
        lines += [f"| {size} | {method} | bicubic | {text} |" for text in against_bicubic(found, store, size, method)]
    return lines


def paired(found: dict, members: list, other: tuple[str, str]) -> list[tuple[dict, dict]]:
    """(row, other method's row) of the prompts both have."""
    rows = {item.prompt.index: row for item, row in found.get(other, [])}
    return [(row, rows[item.prompt.index]) for item, row in members if item.prompt.index in rows]


def fidelity_difference(pairs: list[tuple[dict, dict]]) -> float:
    return share_right([a["scores"] for a, _ in pairs]) - share_right([b["scores"] for _, b in pairs])


def against_bicubic(found: dict, store: Store, size: str, method: str) -> list[str]:
    """Edges so many times narrower, overshoot and kernel distance so much smaller, as `value | meaning`."""
    pairs = paired(found, found[size, method], (size, BICUBIC))
    pairs = [p for p in pairs if p[0]["edge_width"] and p[1]["edge_width"]]
    if not pairs:
        return []
    ratio = bootstrap([b["edge_width"] / a["edge_width"] for a, b in pairs], lambda v: float(np.median(v)))
    over = bootstrap([(a["overshoot"], b["overshoot"]) for a, b in pairs], difference_of_means)
    lines = [f"{shown(ratio, digits=2)} | times narrower edges (median)", f"{shown(over)} | points overshoot"]
    if (gain := kernel_interval(found, store, size, method, minus=BICUBIC)) is not None:
        lines.append(f"{shown(gain, 1000)} | kernel distance x1000 (below 0: closer to renderings)")
    return lines


def kernel_interval(found: dict, store: Store, size: str, method: str, minus: str | None = None) -> Interval | None:
    """Kernel distance to the renderings of the same scenes, or its difference to another method's."""
    names = [method, RENDERING, *([minus] if minus else [])]
    if size == "native" or any((size, name) not in found for name in names):
        return None
    by_index = [{item.prompt.index: item for item, _ in found[size, name]} for name in names]
    shared = sorted(set.intersection(*(set(d) for d in by_index)))
    if len(shared) < 2:
        return None
    own, reference, *other = (
        torch.from_numpy(np.stack([store.features(d[i]) for i in shared]).astype(np.float32)) for d in by_index
    )
    blocks = KernelBlocks.of(own, reference)
    if not other:
        return bootstrap(range(len(shared)), blocks.distance)
    rival = KernelBlocks.of(other[0], reference)
    return bootstrap(range(len(shared)), lambda picked: blocks.distance(picked) - rival.distance(picked))


def picture_grid(found: dict, maker: Maker, path: Path, columns: int = 6, side: int = 256) -> None:
    """A row per method, named at its left: whole pictures and, at large sizes, crops at full resolution below them."""
    strips = []
    for (size, method), members in found.items():
        pictures = []
        for item, _ in members[:columns]:
            kept = maker.store.picture_path(item)
            pictures.append(Image.open(kept).convert("RGB") if kept.exists() else maker(item))
        small = [p.resize((side, side), Image.Resampling.LANCZOS, reducing_gap=3.0) for p in pictures]
        strips.append((f"{size}\n{method}".replace("+", "\n+").replace(":", ":\n"), small))
        if size != "native":
            own = [edge_crop(p, item.prompt.scene) for p, (item, _) in zip(pictures, members, strict=False)]
            strips.append((f"{CROP} pixels\nof it", own))
    grid = Image.new("RGB", (NAMES + columns * side, len(strips) * side), "white")
    pen = ImageDraw.Draw(grid)
    for row, (name, strip) in enumerate(strips):
        pen.text((6, row * side + 6), name, fill="black", font=ImageFont.load_default(16))
        for column, picture in enumerate(strip):
            grid.paste(picture, (NAMES + column * side, row * side))
    grid.save(path)


def edge_crop(picture: Image.Image, scene: Scene) -> Image.Image:
    """256 x 256 pixels around the upper edge of where the first subject was meant to be."""
    y0, x0, _, x1 = scene.box(0)
    left = round((x0 + x1) / 2 * picture.width) - CROP // 2
    top = round(y0 * picture.height) - CROP // 4
    left, top = (min(max(v, 0), length - CROP) for v, length in zip((left, top), picture.size, strict=True))
    return picture.crop((left, top, left + CROP, top + CROP))


def report(done: list[tuple[Item, dict]], maker: Maker, store: Store) -> str:
    """Markdown of all tables; writes quality.md, quality.csv and quality.png."""
    found, options = groups(done), maker.options
    judged = {group: measures(found, store, *group) for group in found}
    parts = [main_table(found, judged), attribute_table(found), pair_table(found, store)]
    text = "\n\n".join("\n".join(part) for part in parts) + "\n"
    (store.run / "quality.md").write_text(text, encoding="utf-8")
    rows = [{**row, **origin(options.device)} for row in table_rows(found, judged, options.model)]
    with (store.run / "quality.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, tuple(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    picture_grid(found, maker, store.run / "quality.png")
    return text
