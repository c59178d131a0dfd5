"""What pictures of an embedded model are worth at several sizes, in numbers and beside what they are compared with.

Pictures of fresh prompts at the native size and at larger ones are measured beside bicubic enlargements of the same
seeds' native pictures and beside renderings of the same scenes. Larger ones are made by

- the cascade, with an attention method each: "dense", "clear:radius=8" ...,
- "direct", the size at once with stretched positions, or "direct:position=yarn" (models that have this way),
- "stock", the plain pipeline of diffusers at the size, as users without gensparse get it; dense, so that it takes hours
  at 4096.

Finished pictures are kept with their numbers; started again, a run goes on. Several processes may share it, each with
prompts of its own. The folder gets quality.md and quality.png.
"""

import argparse
import inspect
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

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
from gensparse.embedded.render import render
from gensparse.embedded.scenes import Scene, caption, parse_caption, random_scene
from gensparse.embedded.sharpness import measure_edges, seam
from gensparse.errors import ConfigError

FIRST_SEED = 9_500_000  # scenes that no training has seen
COUNTS = {"native": 200, "1024": 60, "2048": 60, "4096": 24}  # prompts per size
STOCK_COUNTS = {"1024": 60, "2048": 6}  # of the plain pipeline, whose cost grows with the square of the pixels
METHODS = {  # attention per size; at sizes not named, --method
    "native": ("dense",),
    "1024": ("dense", "direct", "stock"),
    "2048": ("dense", "clear:radius=8", "neighborhood:window=16x16", "sliding_window:radius=8", "stock"),
}
BICUBIC, RENDERING, STOCK, DIRECT = "bicubic", "rendering", "stock", "direct"
CROP, CROPS = 256, 32  # pixels per side, crops per picture for the kernel distance


@dataclass(frozen=True)
class Options:
    """What to run.

    Args:
        run: folder of results; a run in it goes on.
        model: pipeline folder or name; the shipped FLUX model by default.
        only: one size; limit: prompts per size.
        method: what makes pictures of sizes that `METHODS` does not name.
        contenders: takes the place of `METHODS` at all sizes but the native one.
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
    method: str = "clear:radius=8"
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
        for name in (self.method, *self.contenders):
            _check_contender(name)


def _check_contender(name: str) -> None:
    """ConfigError for what is neither an attention method nor another way to make a picture."""
    from gensparse.highres.ways import parse_way
    from gensparse.methods import parse_method

    if name.partition(":")[0] == DIRECT:
        parse_way(name)
    elif name not in ("dense", "auto", STOCK):
        parse_method(name)


@dataclass(frozen=True)
class Prompt:
    """One test prompt, the scene it was said of, and the seed of its noise."""

    index: int
    seed: int
    text: str
    scene: Scene


@dataclass(frozen=True)
class Item:
    """One picture to make: `size` is "native" or pixels per side, `method` an attention method or a baseline."""

    size: str
    method: str
    prompt: Prompt

    @property
    def key(self) -> str:
        return f"{self.size}/{self.method}/{self.prompt.index}/{self.prompt.seed}"

    @property
    def file_name(self) -> str:
        return self.key.replace("/", "_").replace(":", "_").replace("=", "_")


def prompts(count: int) -> list[Prompt]:
    """The first `count` test prompts; scenes whose caption came out empty are passed over."""
    found: list[Prompt] = []
    seed = FIRST_SEED
    while len(found) < count:
        scene = random_scene(seed)
        if text := caption(scene, seed):
            found.append(Prompt(len(found), seed, text, scene))
        seed += 1
    return found


def items(options: Options) -> Iterator[Item]:
    """Everything to measure, smaller sizes first; all methods see the same prompts and seeds."""
    for size in COUNTS:
        if options.only and options.only != size:
            continue
        count = min(COUNTS[size], options.limit or COUNTS[size])
        for prompt in prompts(count):
            for method in methods_at(size, options):
                if method != STOCK or prompt.index < STOCK_COUNTS.get(size, count):
                    yield Item(size, method, prompt)


def methods_at(size: str, options: Options) -> list[str]:
    """Methods and baselines measured at a size."""
    chosen = options.contenders if options.contenders and size != "native" else METHODS.get(size, (options.method,))
    own = [] if options.baselines else chosen
    return [*own, RENDERING] if size == "native" else [*own, BICUBIC, RENDERING]


# ---------------------------------------------------------------- making pictures


class NativeStage:
    """A stage store that keeps a prompt's native stage, so that every method continues the same draft."""

    def __init__(self):
        self.result = None

    def load(self, index: int):
        return self.result if index == 0 else None

    def save(self, index: int, result) -> None:
        self.result = result if index == 0 else self.result


class Maker:
    """Makes the picture of an item; the pipeline is loaded when first needed."""

    def __init__(self, options: Options, store: Store):
        self.options, self.store = options, store
        self.loaded = None
        self.drafts: dict[tuple[int, str], NativeStage] = {}
        self.seconds: dict[str, float] = {}  # of the items made in this run

    def __call__(self, item: Item) -> Image.Image:
        side = self.side(item)
        if item.method == RENDERING:
            return Image.fromarray(render(item.prompt.scene, side, side))
        if item.method == BICUBIC:
            return self.native(item.prompt).resize((side, side), Image.Resampling.BICUBIC)
        return self.native(item.prompt) if item.size == "native" else self.enlarged(item)

    def side(self, item: Item) -> int:
        return self.options.native if item.size == "native" else int(item.size)

    def native(self, prompt: Prompt) -> Image.Image:
        """The seed's native picture, kept or made; its rendering when only baselines are run."""
        if self.options.baselines:
            return self(Item("native", RENDERING, prompt))
        self.make_natives([prompt])
        return Image.open(self.store.picture_path(Item("native", "dense", prompt))).convert("RGB")

    def make_natives(self, wanted: list[Prompt]) -> None:
        """Native pictures of those prompts that have none yet, as one batch."""
        missing = [i for i in (Item("native", "dense", p) for p in wanted) if not self.store.picture_path(i).exists()]
        if missing:
            for item, picture in zip(missing, self.generate(missing, "dense", None), strict=True):
                self.store.save_picture(item, picture)

    def enlarged(self, item: Item) -> Image.Image:
        """The picture of a way to a large size; methods of one prompt and size continue one native stage."""
        if item.method == STOCK:
            return self.stock(item)
        if item.method.partition(":")[0] == DIRECT:
            from gensparse.highres.ways import parse_way

            asked = parse_way(item.method)
            return self.generate([item], "auto", None, highres=asked.name, **asked.settings)[0]
        key = (item.prompt.index, item.size)
        if key not in self.drafts:
            self.drafts = {key: NativeStage()}
        return self.generate([item], item.method, self.drafts[key])[0]

    def generate(self, batch: list[Item], attention: str, draft: NativeStage | None, **way: Any) -> list[Image.Image]:
        """Pictures of one size, by our pipeline."""
        return self._run(self.pipeline, batch, {"attention": attention, "stage_store": draft, **way})

    def stock(self, item: Item) -> Image.Image:
        """The picture of diffusers' own pipeline at the size, on the same weights."""
        ours = self.pipeline
        plain = next(cls for cls in type(ours).__mro__ if cls.__module__.startswith("diffusers.pipelines."))
        wanted = inspect.signature(plain.__init__).parameters
        pipe = plain(**{name: part for name, part in ours.components.items() if name in wanted})
        pipe.set_progress_bar_config(disable=True)
        facts, arguments = getattr(ours, "gensparse_config", {}), {}
        takes = inspect.signature(plain.__call__).parameters
        if "max_sequence_length" in takes and "max_sequence_length" in facts:  # FLUX does not mask padding
            arguments["max_sequence_length"] = facts["max_sequence_length"]
        return self._run(pipe, [item], arguments)[0]

    @property
    def pipeline(self) -> Any:
        """Ours, loaded on first use."""
        if self.loaded is None:
            self.loaded = load_pipeline(self.options)
        return self.loaded

    def _run(self, pipe: Any, batch: list[Item], arguments: dict[str, Any]) -> list[Image.Image]:
        side, start, info = self.side(batch[0]), time.time(), model_info(self.options.model)
        guidance = info.guidance if self.options.guidance is None else self.options.guidance
        pictures = pipe(
            prompt=[item.prompt.text for item in batch],
            negative_prompt=[""] * len(batch),
            height=side,
            width=side,
            generator=[torch.Generator().manual_seed(item.prompt.seed) for item in batch],
            num_inference_steps=self.options.steps or info.steps,
            **{info.row.guidance: guidance},
            **arguments,
        ).images
        self.seconds |= {item.key: round((time.time() - start) / len(batch), 2) for item in batch}
        return pictures


def load_pipeline(options: Options) -> Any:
    """The embedded model, or the checkpoint folder or name of the options, in its pipeline of stages."""
    from gensparse.embedded import embedded_path, load_folder
    from gensparse.pipelines import highres_class

    stock = load_folder(folder_of(options.model) or embedded_path(), getattr(torch, options.dtype))
    pipe = highres_class(stock).from_pipe(stock).to(options.device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def model_info(model: str | None) -> Any:
    """What is known of a model: its steps, its guidance and the argument that takes it."""
    from gensparse.embedded import embedded_path
    from gensparse.models import resolve

    return resolve(str(folder_of(model) or embedded_path())).info


def folder_of(model: str | None) -> Path | None:
    """The folder of a model by its name or path; None for the shipped FLUX model."""
    from gensparse.embedded import SHIPPED

    if model is None:
        return None
    return SHIPPED[model]() if model in SHIPPED else Path(model)


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
    alone = maker.options.workers == 1  # beside others a picture takes longer
    seconds = maker.seconds.get(item.key) if alone else None
    row = {**measure(item, picture, reader), "seconds": seconds, "device": maker.options.device}
    if item.size != "native":
        store.save_features(item, reader.features(crops(picture, item.prompt.seed)))
    if item.method not in (BICUBIC, RENDERING):
        store.save_picture(item, picture)
    store.add(row)
    share = share_right([row["scores"]])
    say(f"{item.key}: right {share:.2f}, edges {row['edge_width'] or 0:.2f} px, {row['seconds']} s")


# ---------------------------------------------------------------- report


def shown(interval: Interval, scale: float = 1.0, digits: int = 1) -> str:
    """`value (low..high)`."""
    value, low, high = (f"{v * scale:.{digits}f}" for v in (interval.value, interval.low, interval.high))
    return f"{value} ({low}..{high})"


def mean_of(rows: list[dict], name: str) -> Interval:
    """Mean of a column with its interval; pictures without an edge have no width and are left out."""
    values = [float(r[name]) for r in rows if r[name] is not None]
    return bootstrap(values, lambda v: float(np.mean(v))) if values else Interval(np.nan, np.nan, np.nan)


def median_seconds(rows: list[dict]) -> str:
    """Empty for what was not generated."""
    values = [r["seconds"] for r in rows if r["seconds"] is not None]
    return f"{np.median(values):.1f}" if values else ""


def groups(done: list[tuple[Item, dict]]) -> dict[tuple[str, str], list[tuple[Item, dict]]]:
    """Finished items by (size, method), in order of the prompts."""
    found: dict[tuple[str, str], list[tuple[Item, dict]]] = {}
    for item, row in done:
        found.setdefault((item.size, item.method), []).append((item, row))
    return found


def main_table(found: dict, store: Store) -> list[str]:
    """One row per size and method; seconds per picture, for large ones on from the kept native stage.

    None are told of pictures that several workers made side by side.
    """
    lines = [
        "| size | method | pictures | right attributes % | right count % | with duplicates % | edge width px "
        "| overshoot % | seam levels | kernel distance x1000 | seconds |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
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
            median_seconds(rows),
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
    """Whole pictures and, at large sizes, crops at full resolution below them: one row of prompts per method."""
    strips = []
    for members in found.values():
        pictures = []
        for item, _ in members[:columns]:
            kept = maker.store.picture_path(item)
            pictures.append(Image.open(kept).convert("RGB") if kept.exists() else maker(item))
        strips.append([p.resize((side, side), Image.Resampling.LANCZOS, reducing_gap=3.0) for p in pictures])
        if members[0][0].size != "native":
            strips.append([edge_crop(p, item.prompt.scene) for p, (item, _) in zip(pictures, members, strict=False)])
    grid = Image.new("RGB", (columns * side, len(strips) * side), "white")
    for row, strip in enumerate(strips):
        for column, picture in enumerate(strip):
            grid.paste(picture, (column * side, row * side))
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
    parser.add_argument("--method", default="clear:radius=8", help="attention at 4096")
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
