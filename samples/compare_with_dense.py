"""How far a method is from dense attention, before and after training: pictures, velocities, prompts.

python samples/compare_with_dense.py --model embedded --method clear:radius=2 --trained runs/r2/attention.safetensors

Every prompt is drawn dense and with the method, from the same noise. PSNR compares the pictures. The velocity error
compares what the denoisers answer to the very same input, along the dense run: norm of the difference over norm of the
dense answer. For the embedded model a reader tells how much of what the prompts ask for the pictures show.
Prompts and seeds take part in no training. Prints a table and, with --out, writes it as JSON with what it was made of.
"""

import argparse
import inspect
import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from distillation.models import EMBEDDED, TINY, default_call, load_pipeline, parse_call, prompts_for, run_pipeline
from distillation.student import load_trained, with_weights
from PIL import Image
from torch import Tensor, nn

import gensparse
from gensparse.embedded.quality import Interval, bootstrap, prompt_fidelity, share_right
from gensparse.embedded.reader import Reader
from gensparse.embedded.scenes import parse_caption
from gensparse.methods import Method, as_method

FIRST_SEED = 77_000_000


class Answer(NamedTuple):
    """One denoiser call of the dense run, and the velocity it gave."""

    call: dict[str, Any]
    velocity: Tensor

    def to(self, device: torch.device | str) -> "Answer":
        call = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in self.call.items()}
        return Answer(call, self.velocity.to(device))


class Answers:
    """Records every `every`-th step of a run in a `with` block, in main memory."""

    def __init__(self, model: nn.Module, every: int) -> None:
        self.model, self.every, self.found = model, every, []
        self._times: list[float] = []

    def __enter__(self) -> list[Answer]:
        self._hook = self.model.register_forward_hook(self._keep, with_kwargs=True)
        return self.found

    def __exit__(self, *_: object) -> None:
        self._hook.remove()

    def _keep(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        bound = inspect.signature(type(model).forward).bind(model, *args, **kwargs).arguments
        call = {name: value for name, value in bound.items() if name != "self"}
        now = float(call["timestep"].max())
        if now not in self._times:
            self._times.append(now)
        if (self._times.index(now) - self.every // 2) % self.every == 0:
            self.found.append(Answer({**call, "return_dict": False}, output[0]).to("cpu"))


class Result(NamedTuple):
    """What one kind of attention gave: a number per prompt."""

    name: str
    pictures: list[Image.Image]
    errors: list[float]  # relative, of the velocity


@torch.no_grad()
def compare(pipe: Any, method: str, trained: Path | None, prompts: Sequence[str], options: Any) -> list[Result]:
    """Dense, the method, and the method on trained weights, batch by batch."""
    model, call = pipe.transformer, {**default_call(options.model), **parse_call(options.call)}
    batches = [range(i, min(i + options.batch, len(prompts))) for i in range(0, len(prompts), options.batch)]
    dense, kept = Result("dense", [], [0.0] * len(prompts)), []
    results = [dense]

    def draw(batch: range) -> list[Image.Image]:
        return run_pipeline(pipe, [prompts[i] for i in batch], call, [FIRST_SEED + i for i in batch], "pil")

    for batch in batches:
        with Answers(model, options.every) as answers:
            dense.pictures.extend(draw(batch))
        kept.append(answers)
    for name, attention, file in variants(method, trained, options.dense_too):
        if file is not None:
            load_trained(pipe, file)
        result = Result(name, [], [])
        with gensparse.applied(pipe, attention, strict=True) if attention else nullcontext():
            for batch, answers in zip(batches, kept, strict=True):
                result.pictures.extend(draw(batch))
                result.errors.extend(velocity_errors(model, answers))
        results.append(result)
    return results


def variants(method: str, trained: Path | None, dense_too: bool) -> list[tuple[str, Method | None, Path | None]]:
    """(name, method or None for dense, file to put on the model before) of what is compared, in this order."""
    found: list[tuple[str, Method | None, Path | None]] = [(method, as_method(method), None)]
    if trained:
        own = with_weights(as_method(method), trained)
        found.append((f"{method}, trained", own or as_method(method), None if own else trained))
        if dense_too:
            found.append(("dense, trained", None, trained if own else None))
    return found


def velocity_errors(model: nn.Module, answers: Sequence[Answer]) -> list[float]:
    """Relative error of every sample of a batch, over all recorded calls."""
    lost = norm = 0.0
    for answer in (answer.to(model.device) for answer in answers):
        velocity = model(**answer.call)[0]
        lost = lost + (velocity - answer.velocity).float().square().flatten(1).sum(1)
        norm = norm + answer.velocity.float().square().flatten(1).sum(1)
    return (lost / norm).sqrt().tolist()


def psnr(a: Image.Image, b: Image.Image) -> float:
    """Peak signal-to-noise ratio of two pictures in dB; 100 for equal ones."""
    difference = np.asarray(a, np.float64) - np.asarray(b, np.float64)
    return min(100.0, 10 * np.log10(255**2 / max(np.square(difference).mean(), 1e-9)))


def measured(results: Sequence[Result], prompts: Sequence[str], reader: Reader | None) -> list[dict[str, Any]]:
    """A row per result: means over the prompts with their 95% intervals."""
    rows = []
    for result in results:
        near = [psnr(own, other) for own, other in zip(result.pictures, results[0].pictures, strict=True)]
        row = {"attention": result.name, "psnr_db": mean(near), "velocity_error": mean(result.errors)}
        if reader is not None:
            readings = reader.read_many(result.pictures)
            scores = [prompt_fidelity(r, parse_caption(text)) for r, text in zip(readings, prompts, strict=True)]
            row["right"] = bootstrap(scores, share_right)
        rows.append(row)
    return rows


def mean(values: Sequence[float]) -> Interval:
    return bootstrap(values, lambda drawn: float(np.mean(drawn)))


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows in Markdown; a dense run has no distance to itself."""
    lines = ["| attention | PSNR to dense, dB | velocity error, % | right attributes, % |", "|---|---|---|---|"]
    for row in rows:
        itself = row["attention"] == "dense"
        cells = ["" if itself else shown(row["psnr_db"]), "" if itself else shown(row["velocity_error"], 100)]
        cells.append(shown(row["right"], 100) if "right" in row else "")
        lines.append(f"| {row['attention']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def shown(interval: Interval, scale: float = 1.0) -> str:
    value, low, high = (f"{scale * number:.1f}" for number in (interval.value, interval.low, interval.high))
    return f"{value} ({low}..{high})"


def sheet(results: Sequence[Result], columns: int) -> Image.Image:
    """A row of pictures per kind of attention."""
    width, height = results[0].pictures[0].size
    image = Image.new("RGB", (columns * width, len(results) * height))
    for row, result in enumerate(results):
        for column, picture in enumerate(result.pictures[:columns]):
            image.paste(picture, (column * width, row * height))
    return image


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    """Run the comparison; returns its rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=EMBEDDED, help="'embedded', a pipeline folder, or a hub name")
    parser.add_argument("--method", default="clear:radius=4")
    parser.add_argument("--trained", type=Path, help="weights or LoRA written by samples/distill.py")
    parser.add_argument("--prompts", type=Path, help="one per line; the embedded model has its own")
    parser.add_argument("--count", type=int, default=48, help="prompts")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--every", type=int, default=4, help="of so many steps one is compared by velocity")
    parser.add_argument("--call", action="append", default=[], metavar="KEY=VALUE", help="argument of the pipeline")
    parser.add_argument("--dense-too", action="store_true", help="also the trained weights without the method")
    parser.add_argument("--mixed-precision", choices=("no", "bf16"), default="no")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="JSON file")
    parser.add_argument("--sheet", type=Path, help="picture of the first six prompts")
    parser.add_argument("--tiny", action="store_true", help="a tiny model with random weights")
    options = parser.parse_args(argv)
    if options.tiny:
        options.model, options.count, options.batch, options.every = TINY, 3, 2, 1
    prompts = prompts_for(options.model, options.count, options.prompts, held_out=True)
    pipe = load_pipeline(options.model, torch.float32 if options.mixed_precision == "no" else torch.bfloat16)
    results = compare(pipe.to(options.device), options.method, options.trained, prompts, options)
    rows = measured(results, prompts, Reader.load() if options.model == EMBEDDED else None)
    print(table(rows))
    if options.sheet:
        sheet(results, 6).save(options.sheet)
    if options.out:
        settings = {key: str(value) for key, value in vars(options).items()}
        numbers = [{k: asdict(v) if isinstance(v, Interval) else v for k, v in row.items()} for row in rows]
        options.out.write_text(json.dumps({"settings": settings, "rows": numbers}, indent=1), encoding="utf-8")
    return rows


if __name__ == "__main__":
    main()
