"""What pictures of an embedded model are worth at several sizes, in numbers and beside what they are compared with.

Pictures of fresh prompts at the native size and at larger ones are measured beside bicubic enlargements of the same
seeds' native pictures and beside renderings of the same scenes. Larger ones are made by

- the cascade, with an attention method each: "dense", "clear:radius=8" ...,
- a way of the model (`gensparse.highres.ways`) with its settings and, behind a +, an attention method: "direct",
  "direct:position=ntk+dense", "freescale", "hidiffusion+auto",
- "stock", the plain pipeline of diffusers at the size, as users without gensparse get it; dense, so that it takes hours
  at 4096, or with a method in all its steps: "stock+clear:radius=8".

Finished pictures are kept with their numbers; started again, a run goes on. Several processes may share it, each with
prompts of its own. The folder gets quality.md and quality.png.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from gensparse.bench.pictures import BICUBIC, RENDERING, STOCK, Contender, Item, Maker, model_info, prompts
from gensparse.bench.store import Store
from gensparse.bench.workers import check_workers, share_work
from gensparse.embedded.quality import (
    ATTRIBUTES,
    Interval,
    KernelBlocks,
    bootstrap,
    difference_of_means,
    duplicates,
    prompt_fidelity,
    right_count,
    share_right,
)
from gensparse.embedded.reader import Reader
from gensparse.embedded.scenes import Scene, parse_caption
from gensparse.embedded.sharpness import measure_edges, seam
from gensparse.errors import ConfigError

COUNTS = {"native": 200, "512": 60, "1024": 60, "2048": 60, "4096": 24}  # prompts per size
SLOW_COUNTS = {"2048": 6}  # of dense attention in all steps, whose cost grows with the square of the pixels
SPARSE = ("clear:radius=8", "neighborhood:window=16x16")
AT_ONCE = tuple(f"{way}+{attention}" for way in ("direct", STOCK) for attention in ("dense", *SPARSE))
METHODS = {  # contenders per size
    "native": ("dense",),
    "1024": ("dense", *SPARSE, *AT_ONCE),
    "2048": ("dense", *SPARSE, "sliding_window:radius=8", "direct+dense", STOCK),
    "4096": ("clear:radius=8",),
}
UNET_WAYS = ("hidiffusion", "freescale", "rectifiedhr", "demofusion", "c_upscale")
UNET_METHODS = {
    "native": ("dense",),
    **dict.fromkeys(("512", "1024"), ("dense", "msw_msa", *(f"{way}+auto" for way in UNET_WAYS), STOCK)),
}
CROP, CROPS = 256, 32  # pixels per side, crops per picture for the kernel distance
NAMES = 168  # pixels for names beside pictures


@dataclass(frozen=True)
class Options:
    """What to run.

    Args:
        run: folder of results; a run in it goes on.
        model: pipeline folder or name; the shipped FLUX model by default.
        only: one size, by default all that models of the kind are usually measured at; limit: prompts per size.
        contenders: take the place of the usual ones at all sizes but the native one.
        baselines: bicubic and renderings only, without a model.
        native: pixels per side of the model's native size; steps, guidance: the model's own without.
        dtype: "float32" (default of "cpu") or "bfloat16" (of "cuda").
        batch: native pictures made at once; threads: of the processor, per worker.
        device: "cpu" or "cuda", of the pipeline; the reader is always on the CPU.
        workers: processes that share prompts and device.
    """

    run: Path
    model: str | None = None
    only: str | None = None
    limit: int | None = None
    contenders: tuple[str, ...] = ()
    baselines: bool = False
    native: int = 256
    steps: int | None = None
    guidance: float | None = None
    dtype: str | None = None
    batch: int = 8
    threads: int = 1
    device: str = "cpu"
    workers: int = 1

    def __post_init__(self) -> None:
        check_workers(self.device, self.workers)
        if self.dtype is None:
            object.__setattr__(self, "dtype", "float32" if self.device == "cpu" else "bfloat16")
        if self.only is not None and self.only not in COUNTS:
            raise ConfigError(f"--size is {self.only!r}; choose one of {', '.join(COUNTS)}")
        for name in ("limit", "native", "steps", "batch", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}; give a whole number from 1")
        for name in self.contenders:
            Contender.read(name).check(self.model)


def items(options: Options) -> Iterator[Item]:
    """Everything to measure, smaller sizes first; all methods see the same prompts and seeds."""
    for size in usual(options) if options.only is None else (options.only,):
        count = min(COUNTS[size], options.limit or COUNTS[size])
        chosen = {
            method: SLOW_COUNTS.get(size, count) if is_slow(method) else count for method in methods_at(size, options)
        }
        for prompt in prompts(count):
            for method in (name for name, most in chosen.items() if prompt.index < most):
                yield Item(size, method, prompt)


def usual(options: Options) -> dict[str, tuple[str, ...]]:
    """Sizes and contenders of models of the kind; baselines need no model."""
    return METHODS if options.baselines or model_info(options.model).row.levels != "steps" else UNET_METHODS


def methods_at(size: str, options: Options) -> list[str]:
    """Contenders and baselines measured at a size."""
    chosen = options.contenders if options.contenders and size != "native" else usual(options).get(size, ("dense",))
    own = [] if options.baselines else chosen
    return [*own, RENDERING] if size == "native" else [*own, BICUBIC, RENDERING]


def is_slow(method: str) -> bool:
    """Whether all steps have dense attention at the size."""
    if method in (BICUBIC, RENDERING):
        return False
    contender = Contender.read(method)
    return contender.way in (STOCK, "direct", "none") and contender.attention == "dense"


# ---------------------------------------------------------------- measuring


def measure(item: Item, picture: Image.Image, reader: Reader) -> dict:
    """Numbers of one picture."""
    reading, request = reader.read(picture), parse_caption(item.prompt.text)
    edges = measure_edges(picture)
    return {
        "key": item.key,
        "size": item.size,
        "method": item.method,
        "prompt": item.prompt.text,
        "index": item.prompt.index,
        "scores": prompt_fidelity(reading, request),
        "right_count": right_count(reading, request),
        "duplicates": len(duplicates(picture, reader, reading)),
        "edge_width": float(np.median(edges.width)) if len(edges.width) else None,
        "overshoot": float(edges.overshoot.mean()) if len(edges.overshoot) else None,
        "seam": seam(picture),
        "reading": asdict(reading),
    }


def crops(picture: Image.Image, seed: int) -> list[np.ndarray]:
    """Full-resolution crops at places that depend on the seed only."""
    pixels, rng = np.asarray(picture), np.random.default_rng(seed)
    corners = rng.integers(0, (pixels.shape[0] - CROP + 1, pixels.shape[1] - CROP + 1), (CROPS, 2))
    return [pixels[top : top + CROP, left : left + CROP] for top, left in corners]


def run_item(item: Item, maker: Maker, reader: Reader, store: Store, say: Callable[[str], None] = print) -> None:
    """Make, measure, keep; the row comes last, so what has a row has everything."""
    picture = maker(item)
    row = {**measure(item, picture, reader), "device": maker.options.device, **costs(maker, item)}
    if item.size != "native":
        store.save_features(item, reader.features(crops(picture, item.prompt.seed)))
    if item.method not in (BICUBIC, RENDERING):
        store.save_picture(item, picture)
    store.add(row)
    share = share_right([row["scores"]])
    took = f"{row['core_seconds'] or 0:.1f} s of processor"
    say(f"{item.key}: right {share:.2f}, edges {row['edge_width'] or 0:.2f} px, {took}")


def costs(maker: Maker, item: Item) -> dict[str, float | None]:
    """What it took to make the picture; nothing where this run did not make it."""
    use = maker.used.get(item.key)
    if use is None:
        return dict.fromkeys(("seconds", "core_seconds", "peak_gib"))
    return {
        "seconds": round(use.seconds, 2) if maker.options.workers == 1 else None,  # beside others it takes longer
        "core_seconds": round(use.cpu_seconds, 2),
        "peak_gib": None if use.peak_bytes is None else round(use.peak_bytes / 2**30, 2),
    }


# ---------------------------------------------------------------- report


def shown(interval: Interval, scale: float = 1.0, digits: int = 1) -> str:
    """`value (low..high)`."""
    value, low, high = (f"{v * scale:.{digits}f}" for v in (interval.value, interval.low, interval.high))
    return f"{value} ({low}..{high})"


def mean_of(rows: list[dict], name: str) -> Interval:
    """Mean of a column with its interval; pictures without an edge have no width and are left out."""
    values = [float(r[name]) for r in rows if r[name] is not None]
    return bootstrap(values, lambda v: float(np.mean(v))) if values else Interval(np.nan, np.nan, np.nan)


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


def main_table(found: dict, store: Store) -> list[str]:
    """One row per size and method, with the medians of what a picture took; cascades begin at the kept native stage.

    Seconds are those of the wall clock, of pictures made by one worker; core seconds count all threads.
    """
    lines = [
        "| size | method | pictures | right attributes % | right count % | with duplicates % | edge width px "
        "| overshoot % | seam levels | kernel distance x1000 | seconds | core seconds | peak GiB |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (size, method), members in found.items():
        rows = [row for _, row in members]
        fidelity = bootstrap([r["scores"] for r in rows], share_right)
        twice = [{"twice": r["duplicates"] > 0} for r in rows]
        distance = kernel_interval(found, store, size, method)
        cells = [
            size,
            method,
            str(len(rows)),
            shown(fidelity, 100),
            shown(mean_of(rows, "right_count"), 100),
            shown(mean_of(twice, "twice"), 100),
            shown(mean_of(rows, "edge_width"), digits=2),
            shown(mean_of(rows, "overshoot")),
            shown(mean_of(rows, "seam")),
            "" if distance is None else shown(distance, 1000),
            median_of(rows, "seconds"),
            median_of(rows, "core_seconds"),
            median_of(rows, "peak_gib", 2),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


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
    """Markdown of all tables; also writes the picture grid."""
    found = groups(done)
    parts = [main_table(found, store), attribute_table(found), pair_table(found, store)]
    text = "\n\n".join("\n".join(part) for part in parts) + "\n"
    (store.run / "quality.md").write_text(text, encoding="utf-8")
    picture_grid(found, maker, store.run / "quality.png")
    return text


def run_quality(options: Options, say: Callable[[str], None] = print) -> str:
    """Make and measure everything that is not there yet; returns the tables as Markdown.

    Raises:
        ConfigError: the folder holds pictures that were made with other settings, or the device is not there.
    """
    from gensparse.engine.machine import pick_device

    pick_device(options.device)
    store = Store(options.run)
    names = ("model", "native", "steps", "guidance", "dtype", "baselines")
    store.check_settings({name: getattr(options, name) for name in names})
    store.merge()
    share_work(work, options, options.workers, say)
    store = Store(options.run)
    store.merge()
    wanted = list(items(options))
    return report([(item, store.rows[item.key]) for item in wanted], Maker(options, store), store)


def work(options: Options, number: int, say: Callable[[str], None]) -> None:
    """What worker `number` of the options' has to do: the prompts whose index leaves this remainder."""
    before = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    try:
        store = Store(options.run, number if options.workers > 1 else None)
        own = [item for item in items(options) if item.prompt.index % options.workers == number]
        wanted = [item for item in own if item.key not in store.rows]
        if not wanted:
            return
        reader, maker = Reader.load(), Maker(options, store)
        natives = [] if options.baselines else [i.prompt for i in own if (i.size, i.method) == ("native", "dense")]
        for start in range(0, len(natives), options.batch):
            maker.make_natives(natives[start : start + options.batch])
        for item in wanted:
            run_item(item, maker, reader, store, say)
    finally:
        torch.set_num_threads(before)


def read_options(arguments: Sequence[str] | None = None) -> Options:
    """Options from the words of a command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="folder of results; a run in it goes on")
    parser.add_argument("--model", help="pipeline folder or name; the shipped FLUX model without")
    parser.add_argument("--only", choices=tuple(COUNTS))
    parser.add_argument("--limit", type=int, help="prompts per size")
    parser.add_argument("--baselines", action="store_true", help="bicubic and renderings only, without a model")
    parser.add_argument("--native", type=int, default=256, help="pixels per side of the model's native size")
    parser.add_argument("--steps", type=int, help="of the native stage; the model's own without")
    parser.add_argument("--guidance", type=float, help="scale of guidance; the model's own without")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="float32 on cpu, bfloat16 on cuda without")
    parser.add_argument("--batch", type=int, default=8, help="native pictures made at once")
    parser.add_argument("--threads", type=int, default=1, help="per worker")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--workers", type=int, default=1, help="processes that share the prompts")
    return Options(**vars(parser.parse_args(arguments)))


def main(arguments: Sequence[str] | None = None) -> None:
    """From words to tables, as `samples/embedded/quality.py` does it."""
    print(run_quality(read_options(arguments)))
