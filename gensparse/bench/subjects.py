"""Do subjects come through? Methods for several subjects on an embedded model, judged by program.

Every case is a prompt that names two shapes and nothing of their looks, and a picture of each subject with an exact
mask. Contenders make the picture from the same seeds:

- "plain", without the pictures of the subjects,
- "shared", plain shared attention: every token sees the masked tokens of all references, in all layers,
- any method that takes pictures of two subjects, with settings: "freecustom", "isolation:isolation=false" ...,
- "rendering", the scene as it should be, drawn: what the reader makes of a perfect picture.

The score is the share of pictures in which both subjects look as in their pictures, neither has anything of the other,
and neither is a copy of its picture; so that neither dropping nor pasting references wins. Larger sizes continue the
native stage, where subjects act, by the cascade with `attention`.

Finished pictures are kept with their verdicts; started again, a run goes on. Several processes may share it. The folder
gets subjects.md, subjects.csv and subjects.png.
"""

import csv
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from gensparse.bench.pictures import folder_of, model_info
from gensparse.bench.quality_report import median_of, shown
from gensparse.bench.record import origin
from gensparse.bench.store import Store
from gensparse.bench.subject_cases import Case, cases
from gensparse.bench.subject_score import Verdict, judge
from gensparse.bench.workers import Say, check_workers, share_work
from gensparse.embedded.quality import Interval, bootstrap, difference_of_means
from gensparse.embedded.reader import Reader
from gensparse.embedded.render import render
from gensparse.errors import ConfigError

COUNTS = {256: 100, 1024: 40, 4096: 12}  # cases per size
PLAIN, SHARED, RENDERING = "plain", "shared", "rendering"
SHARED_METHOD = "freecustom:weights=0,style_fidelity=0,layers=all"
NATIVE = 256  # pixels per side of the embedded models and of the subjects' pictures
GRID = 8  # cases in the picture grid
Row = dict[str, Any]
MEASURES: dict[str, Callable[[Row], float | None]] = {  # of one picture; None where there is nothing to measure
    "score": lambda row: float(row["good"]),
    "both right": lambda row: float(row["right"]),
    "one right": lambda row: float(any(row["each"])),
    "leak": lambda row: float(row["leak"]),
    "copied": lambda row: float(row["copied"]),
    "same pose": lambda row: None if not row["posed"] else float(not all(row["posed"])),
    "shapes": lambda row: row["shape"] / 2,
    "colours": lambda row: row["colour"] / 2,
    "fills": lambda row: row["fill"] / 2,
}
COMPARED = ("score", "both right", "leak", "colours", "fills")
COLUMNS = ("model", "size", "contender", "attention", "against", "pictures", "measure", "value", "low", "high")


@dataclass(frozen=True)
class Options:
    """What to run.

    Args:
        run: folder of results; a run in it goes on.
        model: name of an embedded model, or pipeline folder; the shipped FLUX model without.
        contenders: see the module; by default plain, shared and all methods for two subjects that the model can have.
        limit: cases; COUNTS without.
        size: pixels per side: 256, 1024 or 4096.
        attention: of the stages beyond the native one.
        device: "cpu" or "cuda", of the pipeline; the reader is always on the CPU.
        workers: processes that share cases and device; threads: of the processor, per worker.
        dtype: "float32" (default of "cpu") or "bfloat16" (of "cuda").
        steps, guidance: of the model's pipeline; its own without.
    """

    run: Path
    model: str | None = None
    contenders: tuple[str, ...] = ()
    limit: int | None = None
    size: int = NATIVE
    attention: str = "clear:radius=8"
    device: str = "cpu"
    workers: int = 1
    threads: int = 1
    dtype: str | None = None
    steps: int | None = None
    guidance: float | None = None

    def __post_init__(self) -> None:
        check_workers(self.device, self.workers)
        if self.size not in COUNTS:
            raise ConfigError(f"--size is {self.size}; choose one of {', '.join(map(str, COUNTS))}")
        for name in ("limit", "threads", "steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}; give a whole number from 1")
        if self.dtype is None:
            object.__setattr__(self, "dtype", "float32" if self.device == "cpu" else "bfloat16")
        for name in self.contenders:
            checked_method(name)
        from gensparse.methods import parse_method

        if self.attention not in ("auto", "dense"):
            parse_method(self.attention)

    @property
    def cases(self) -> list[Case]:
        return cases(self.limit or COUNTS[self.size])


@dataclass(frozen=True)
class Item:
    """One picture to make."""

    size: int
    method: str
    case: Case

    @property
    def key(self) -> str:
        return f"{self.size}/{self.method}/{self.case.index}/{self.case.seed}"

    @property
    def file_name(self) -> str:
        return self.key.replace("/", "_").replace(":", "_").replace("=", "_")


def split_contenders(text: str) -> tuple[str, ...]:
    """Contenders joined by commas; "freecustom:weights=2,seed=1,plain" are two, for names have no "=".

    Raises:
        ConfigError: settings before any method.
    """
    found: list[str] = []
    for part in (piece.strip() for piece in text.split(",")):
        if "=" in part.partition(":")[0]:
            if not found:
                raise ConfigError(f"--methods begins with the setting {part!r}; begin with a method, as name:setting=1")
            found[-1] += f",{part}"
        elif part:
            found.append(part)
    return tuple(found)


def checked_method(name: str) -> Any:
    """The method of a contender; None for those without pictures of subjects.

    Raises:
        ConfigError: an unknown one, or a method that does not take a picture of each of two subjects.
    """
    from gensparse.pipelines.customize import NOISED, subject_method

    if name in (PLAIN, RENDERING):
        return None
    method = subject_method(SHARED_METHOD if name == SHARED else name)
    if method.name not in NOISED or getattr(method, "fixed", None) is not None:
        raise ConfigError(f"{method.name} does not take pictures of two subjects, which the cases have; leave it out")
    return method


def usual_contenders(family: str) -> tuple[str, ...]:
    """Plain, shared, and every method that takes pictures of two subjects, on models of a family.

    Args:
        family: as `gensparse.families` names it.
    """
    from gensparse.pipelines.customize import NOISED, REGIONAL, subject_method

    methods = [subject_method(name) for name in NOISED]
    fit = [m.name for m in methods if getattr(m, "fixed", None) is None and family in m.families]
    apart = [f"{name}:isolation=false" for name in fit if name in REGIONAL]  # what isolation adds
    return (PLAIN, SHARED, *apart, *fit, RENDERING)


# ---------------------------------------------------------------- making pictures


class Maker:
    """Makes the picture of an item by the pipeline for subjects, which is loaded when first needed."""

    def __init__(self, options: Options):
        self.options = options
        self.loaded: Any = None

    @property
    def pipeline(self) -> Any:
        if self.loaded is None:
            self.loaded = load_pipeline(self.options)
        return self.loaded

    def __call__(self, item: Item) -> Image.Image:
        if item.method == RENDERING:
            return Image.fromarray(render(item.case.scene, item.size, item.size))
        larger, info = item.size > NATIVE, model_info(self.options.model)
        guidance = info.guidance if self.options.guidance is None else self.options.guidance
        return self.pipeline(
            prompt=item.case.text,
            negative_prompt="",
            height=item.size,
            width=item.size,
            num_inference_steps=self.options.steps or info.steps,
            generator=torch.Generator().manual_seed(item.case.seed),
            attention=self.options.attention if larger else "dense",
            **{info.row.guidance: guidance},
            **subject_arguments(item),
        ).images[0]


def subject_arguments(item: Item) -> dict[str, Any]:
    """What the pipeline is told about the subjects of an item: never where they are to be."""
    from gensparse.subjects.references import Reference

    method, case = checked_method(item.method), item.case
    if method is None:
        return {}
    references = [
        Reference(
            case.scene.subjects[number].shape,
            case.portrait(number, NATIVE),
            case.mask(number, NATIVE),
            prompt=case.portrait_text(number),
        )
        for number in range(len(case.portraits))
    ]
    return {"subjects": references, "subject_method": method}


def load_pipeline(options: Options) -> Any:
    """The model of the options in its pipeline for subjects.

    Raises:
        ConfigError: its family has none.
    """
    from gensparse import pipelines
    from gensparse.embedded import embedded_path, load_folder
    from gensparse.engine.subjects import CLASSES

    stock = load_folder(folder_of(options.model) or embedded_path(), getattr(torch, str(options.dtype)))
    name = pipelines.highres_class(stock).__name__
    if name not in CLASSES:
        raise ConfigError(f"{type(stock).__name__} has no pipeline for subjects; take a FLUX.1 or UNet model")
    pipe = getattr(pipelines, CLASSES[name]).from_pipe(stock).to(options.device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def family_of_model(options: Options) -> str:
    """Family of the options' model, told by its folder."""
    from gensparse.embedded import embedded_path

    folder = folder_of(options.model) or embedded_path()
    return "UNet" if (folder / "unet").is_dir() else "FLUX.1"


# ---------------------------------------------------------------- measuring


def run_item(item: Item, maker: Maker, reader: Reader, store: Store, say: Say) -> None:
    """Make, judge, keep; the row comes last, so what has a row has everything."""
    start = time.time()
    picture = maker(item)
    seconds = round(time.time() - start, 2) if maker.options.workers == 1 and item.method != RENDERING else None
    portraits = [item.case.portrait(number, NATIVE) for number in range(len(item.case.portraits))]
    verdict = judge(picture, item.case, reader, portraits)
    store.save_picture(item, picture)
    store.add(row_of(item, verdict, seconds, maker.options.device))
    say(f"{item.key}: {told(verdict)}{'' if seconds is None else f', {seconds} s'}")


def row_of(item: Item, verdict: Verdict, seconds: float | None, device: str) -> Row:
    facts = {"size": item.size, "method": item.method, "index": item.case.index, "prompt": item.case.text}
    return {"key": item.key, **facts, **asdict(verdict), "good": verdict.good, "seconds": seconds, "device": device}


def told(verdict: Verdict) -> str:
    """A verdict in a few words."""
    words = ["good" if verdict.good else "not good", f"{sum(verdict.each)} of 2 right"]
    words += [f"shapes {verdict.shape}, colours {verdict.colour}, fills {verdict.fill}"]
    words += [name for name in ("leak", "copied") if getattr(verdict, name)]
    return ", ".join(words)


# ---------------------------------------------------------------- report


def mean(values: Sequence[float]) -> float:
    return float(np.mean(values))


def measured(rows: list[Row], name: str) -> Interval | None:
    """A measure's mean over pictures, with its interval; None where no picture has it."""
    values = [v for v in map(MEASURES[name], rows) if v is not None]
    return bootstrap(values, mean) if values else None


def difference(rows: list[Row], others: list[Row], name: str) -> Interval | None:
    """Of a measure's means over the cases that both have; resampled in pairs."""
    of = MEASURES[name]
    known = {row["index"]: of(row) for row in others}
    pairs = [(of(row), known.get(row["index"])) for row in rows]
    both = [(a, b) for a, b in pairs if a is not None and b is not None]
    return bootstrap(both, difference_of_means) if both else None


def main_table(found: dict[str, list[Row]]) -> list[str]:
    """One row per contender, in percent of its pictures; "same pose" of those with a right subject."""
    lines = [
        "| contender | pictures | " + " | ".join(f"{name} %" for name in MEASURES) + " | seconds |",
        "|---" * (len(MEASURES) + 3) + "|",
    ]
    for method, rows in found.items():
        values = [measured(rows, name) for name in MEASURES]
        cells = [
            method,
            str(len(rows)),
            *("" if v is None else shown(v, 100, 0) for v in values),
            median_of(rows, "seconds"),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def pair_table(found: dict[str, list[Row]]) -> list[str]:
    """Every contender against plain and shared, points of percent."""
    lines = ["| contender | against | " + " | ".join(COMPARED) + " |", "|---" * (len(COMPARED) + 2) + "|"]
    for method, other in pairs_of(found):
        values = [difference(found[method], found[other], name) for name in COMPARED]
        lines.append(
            f"| {method} | {other} | " + " | ".join("" if v is None else shown(v, 100, 0) for v in values) + " |"
        )
    return lines


def pairs_of(found: dict[str, list[Row]]) -> list[tuple[str, str]]:
    """(contender, what it is compared with)."""
    own = [method for method in found if method not in (PLAIN, RENDERING)]
    return [(method, other) for other in (PLAIN, SHARED) if other in found for method in own if method != other]


def table_rows(found: dict[str, list[Row]], options: Options) -> list[dict[str, str]]:
    """The tables as rows of a CSV."""
    facts = {
        "model": options.model or "embedded",
        "size": str(options.size),
        "attention": options.attention if options.size > NATIVE else "",
    }

    def row(method: str, against: str, name: str, value: Interval | None) -> dict[str, str]:
        numbers = ["" if value is None else f"{100 * v:.1f}" for v in (asdict(value).values() if value else "   ")]
        told = dict(zip(("value", "low", "high"), numbers, strict=True))
        own = {"contender": method, "against": against, "pictures": str(len(found[method])), "measure": f"{name} %"}
        return {name: ({**facts, **own, **told})[name] for name in COLUMNS}

    rows = [row(m, "", name, measured(rows, name)) for m, rows in found.items() for name in MEASURES]
    return rows + [
        row(m, other, name, difference(found[m], found[other], name))
        for m, other in pairs_of(found)
        for name in COMPARED
    ]


def picture_grid(found: dict[str, list[Row]], options: Options, store: Store) -> Image.Image:
    """A row per case: the subjects' pictures, then what every contender made of them; names above."""
    side, head = NATIVE // 2, 28
    shown_cases = options.cases[:GRID]
    names = ["first", "second", *found]
    grid = Image.new("RGB", (len(names) * side, head + len(shown_cases) * side), "white")
    pen = ImageDraw.Draw(grid)
    for column, name in enumerate(names):
        method, _, settings = name.partition(":")
        pen.text((column * side + 3, 2), f"{method}\n{settings}"[:60], fill="black")
    for line, case in enumerate(shown_cases):
        pictures: list[Image.Image | None] = [case.portrait(n, side) for n in range(len(case.portraits))]
        for method in found:
            path = store.picture_path(Item(options.size, method, case))
            pictures.append(Image.open(path).convert("RGB") if path.exists() else None)
        for column, picture in enumerate(pictures):
            if picture is not None:
                small = picture.resize((side, side), Image.Resampling.LANCZOS, reducing_gap=3.0)
                grid.paste(small, (column * side, head + line * side))
    return grid


def report(options: Options, store: Store, contenders: Sequence[str]) -> str:
    """Markdown of the tables; writes subjects.md, subjects.csv and subjects.png."""
    wanted = [[Item(options.size, method, case) for case in options.cases] for method in contenders]
    found = {
        method: [store.rows[item.key] for item in line if item.key in store.rows]
        for method, line in zip(contenders, wanted, strict=True)
    }
    found = {method: rows for method, rows in found.items() if rows}
    head = f"{options.model or 'embedded'}, {options.size} x {options.size}"
    head += f", {options.attention} beyond {NATIVE}" if options.size > NATIVE else ""
    text = "\n\n".join((head, "\n".join(main_table(found)), "\n".join(pair_table(found)))) + "\n"
    (store.run / "subjects.md").write_text(text, encoding="utf-8")
    rows = [{**row, **origin(options.device)} for row in table_rows(found, options)]
    with (store.run / "subjects.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, tuple(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    picture_grid(found, options, store).save(store.run / "subjects.png")
    return text


# ---------------------------------------------------------------- running


def contenders_of(options: Options) -> tuple[str, ...]:
    return options.contenders or usual_contenders(family_of_model(options))


def run_subjects(options: Options, say: Say = print) -> str:
    """Make and judge everything that is not there yet; returns the tables as Markdown.

    Raises:
        ConfigError: the folder holds pictures that were made with other settings or weights, a method that the model
            cannot have, or a device that is not there.
    """
    from gensparse.engine.machine import pick_device

    pick_device(options.device)
    contenders = contenders_of(options)
    store = Store(options.run)
    names = ("model", "steps", "guidance", "dtype", "attention")
    store.check_settings({**{n: getattr(options, n) for n in names}, "weights": weights_of(options)})
    store.merge()
    share_work(work, options, options.workers, say)
    store = Store(options.run)
    store.merge()
    return report(options, store, contenders)


def work(options: Options, number: int, say: Say) -> None:
    """What worker `number` of the options' has to do: the cases whose index leaves this remainder."""
    before = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    try:
        store = Store(options.run, number if options.workers > 1 else None)
        own = [case for case in options.cases if case.index % options.workers == number]
        wanted = [Item(options.size, method, case) for case in own for method in contenders_of(options)]
        wanted = [item for item in wanted if item.key not in store.rows]
        if not wanted:
            return
        reader, maker = Reader.load(), Maker(options)
        for item in wanted:
            run_item(item, maker, reader, store, say)
    finally:
        torch.set_num_threads(before)


def weights_of(options: Options) -> str:
    """The first digits of the digest of the denoiser's weights, by which runs of other weights are told."""
    import hashlib

    from gensparse.embedded import embedded_path

    folder = folder_of(options.model) or embedded_path()
    digest = hashlib.sha256()
    for path in sorted(path for part in ("transformer", "unet") for path in (folder / part).glob("*.safetensors")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]
