"""What pictures of an embedded model are worth at several sizes, in numbers and beside what they are compared with.

Pictures of fresh prompts at the native size and at larger ones are measured beside bicubic enlargements of the same
seeds' native pictures and beside renderings of the same scenes. Larger ones are made by

- the cascade, with an attention method each: "dense", "clear:radius=8" ...,
- a way of the model (`gensparse.highres.ways`) with its settings and, behind a +, an attention method: "direct",
  "direct:position=ntk+dense", "freescale", "hidiffusion+auto",
- "stock", the plain pipeline of diffusers at the size, as users without gensparse get it; dense, so that it takes hours
  at 4096, or with a method in all its steps: "stock+clear:radius=8".

Finished pictures are kept with their numbers; started again, a run goes on. Several processes may share it, each with
prompts of its own. The folder gets quality.md, quality.csv and quality.png.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from gensparse.bench.pictures import BICUBIC, CROP, RENDERING, STOCK, Contender, Item, Maker, model_info, prompts
from gensparse.bench.quality_report import report
from gensparse.bench.store import Store
from gensparse.bench.workers import check_workers, share_work
from gensparse.embedded.quality import duplicates, prompt_fidelity, right_count, share_right
from gensparse.embedded.reader import Reader
from gensparse.embedded.scenes import parse_caption
from gensparse.embedded.sharpness import measure_edges, seam
from gensparse.errors import ConfigError

COUNTS = {"native": 200, "512": 60, "1024": 60, "2048": 60, "4096": 24}  # prompts per size
SLOW_COUNTS = {"2048": 6}  # of dense attention in all steps, whose cost grows with the square of the pixels
SPARSE = ("clear:radius=8", "neighborhood:window=16x16")
AT_ONCE = tuple(f"{way}+{attention}" for way in ("direct:position=yarn", STOCK) for attention in ("dense", *SPARSE))
METHODS = {  # contenders per size
    "native": ("dense",),
    "1024": ("dense", *SPARSE, *AT_ONCE),
    "2048": ("dense", *SPARSE, "sliding_window:radius=8", "direct:position=yarn+dense", STOCK),
    "4096": SPARSE,
}
UNET_WAYS = ("hidiffusion", "freescale", "rectifiedhr", "demofusion", "c_upscale")
UNET_METHODS = {
    "native": ("dense",),
    **dict.fromkeys(("512", "1024"), ("dense", "msw_msa", *(f"{way}+auto" for way in UNET_WAYS), STOCK)),
}
CROPS = 32  # per picture, for the kernel distance


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


# ---------------------------------------------------------------- running


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
