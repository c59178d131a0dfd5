"""Teach a model to live with sparse attention: CLEAR's training, for flow-matching transformers and any method.

accelerate launch samples/distill.py --model embedded --method clear:radius=2 --train attention --out runs/r2
accelerate launch samples/distill.py --model black-forest-labs/FLUX.1-dev --prompts prompts.txt --out runs/r16 \\
    --method clear:radius=16 --train lora --rank 16 --mixed-precision bf16 --gradient-checkpointing --batch 1
python samples/distill.py --tiny --out runs/tiny

First the model makes samples of its own (dense), which are kept on disk. Then the same model with the method on it
learns three things: noise minus data, the dense prediction, and the dense attention outputs (Liu, Tan, Wang, "CLEAR",
arXiv 2412.16112). Ctrl-C or SIGTERM saves and ends; --resume continues, to the weights of an uninterrupted run.
Explained in docs/distill.md.
"""

import argparse
import hashlib
import signal
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from distillation.cache import SampleCache
from distillation.course import Course
from distillation.lesson import Lesson
from distillation.losses import attention_sites
from distillation.models import TINY, check_trainable, default_call, load_pipeline, parse_call, prompts_for
from distillation.student import AttentionStudent, LoraStudent, Student

from gensparse.errors import ConfigError
from gensparse.methods import Method, Schedule, as_method


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded", help="'embedded', a pipeline folder, or a hub name")
    parser.add_argument("--method", default="clear:radius=4", help="as for gensparse.apply, for example clear:radius=4")
    parser.add_argument("--train", choices=("attention", "lora"), default="attention")
    parser.add_argument("--rank", type=int, default=16, help="of the LoRA")
    parser.add_argument("--steps", type=int, help="default: 1000, with --tiny 4")
    parser.add_argument("--out", type=Path, required=True, help="folder for weights, checkpoint and log.csv")
    parser.add_argument("--resume", action="store_true", help="continue the run in --out")
    parser.add_argument("--tiny", action="store_true", help="a tiny model with random weights, seconds")
    samples = parser.add_argument_group("samples the model makes of itself")
    samples.add_argument("--prompts", type=Path, help="one per line; the embedded model has its own")
    samples.add_argument("--count", type=int, default=256, help="samples (the authors: 10000)")
    samples.add_argument("--batch", type=int, default=8, help="samples per batch, when made and when trained on")
    samples.add_argument("--data", type=Path, help="where they are kept (default: OUT/samples)")
    samples.add_argument(
        "--call", action="append", default=[], metavar="KEY=VALUE", help="argument of the pipeline, may be repeated"
    )
    loss = parser.add_argument_group("losses")
    loss.add_argument("--flow", type=float, default=1.0, help="weight of noise minus data")
    loss.add_argument("--prediction", type=float, default=0.5, help="weight of the dense model's prediction")
    loss.add_argument("--attention", type=float, default=0.5, help="weight of its attention outputs")
    loss.add_argument("--watch-every", type=int, default=4, help="of so many attention layers one is compared")
    loss.add_argument("--noise", choices=("schedule", "normal"), default="schedule", help="distribution of its levels")
    rate = parser.add_argument_group("optimizer")
    rate.add_argument("--optimizer", choices=("adamw", "prodigy"), default="adamw")
    rate.add_argument("--lr", type=float, help="default: 1e-4, with prodigy 1")
    rate.add_argument("--warmup", type=int, help="steps (default: 500, at most a tenth of the run)")
    rate.add_argument("--fall", action="store_true", help="let the rate fall to zero like a cosine")
    rate.add_argument("--accumulate", type=int, default=1, help="batches per step and process")
    rate.add_argument("--mixed-precision", choices=("no", "bf16", "fp16"), help="default: as accelerate is set")
    rate.add_argument("--gradient-checkpointing", action="store_true", help="less memory, a third more time")
    rate.add_argument("--cpu", action="store_true", help="even where there is a GPU")
    rate.add_argument("--seed", type=int, default=0)
    rate.add_argument("--save-every", type=int, default=100, help="steps between checkpoints")
    options = parser.parse_args(argv)
    options.steps = (4 if options.tiny else 1000) if options.steps is None else options.steps
    if options.tiny:
        options.model, options.count, options.batch = TINY, 4, 2
    for name in ("rank", "steps", "count", "batch", "watch_every", "accumulate", "save_every"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is {getattr(options, name)}; pass at least 1")
    options.lr = options.lr or (1.0 if options.optimizer == "prodigy" else 1e-4)
    options.warmup = min(500, options.steps // 10) if options.warmup is None else options.warmup
    return options


class Interrupt:
    """In its `with` block, Ctrl-C and SIGTERM ask for an end after the work in hand; a second Ctrl-C ends at once."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator, self._asked = accelerator, False

    def __enter__(self) -> "Interrupt":
        self._before = {kind: signal.signal(kind, self._ask) for kind in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for kind, handler in self._before.items():
            signal.signal(kind, handler)

    def _ask(self, *_: object) -> None:
        self._asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def __call__(self) -> bool:
        """Whether to end; all processes get the same answer, or they would wait for each other."""
        if self._accelerator.num_processes == 1:
            return self._asked
        asked = torch.tensor(float(self._asked), device=self._accelerator.device)
        return bool(self._accelerator.reduce(asked, "sum"))


def make_samples(options: argparse.Namespace, accelerator: Accelerator, pipe: Any, stop: Interrupt) -> SampleCache:
    """The cached samples; those that are missing are made first, shared out among the processes."""
    size, ranks = options.batch, accelerator.num_processes
    batches = -(-options.count // size)
    prompts = prompts_for(options.model, batches * size, options.prompts)
    call = {**default_call(options.model), **parse_call(options.call)}
    source = options.prompts.read_bytes() if options.prompts else b"grammar"
    digest = hashlib.sha256(source).hexdigest()[:16]
    settings = {"model": options.model, "prompts": digest, "batch": size, "call": call, "seed": options.seed}
    with accelerator.main_process_first():
        cache = SampleCache(options.data or options.out / "samples", settings, batches)
    for first in range(0, batches, ranks):
        if stop():
            raise SystemExit("Interrupted while samples were made; the same command goes on.")
        index = first + accelerator.process_index
        if index < batches:
            start = index * size
            cache.make(pipe, index, prompts[start : start + size], call, options.seed * 1_000_003 + start)
    accelerator.wait_for_everyone()
    return cache


def main(argv: list[str] | None = None) -> Path:
    """Run everything; returns the file with the trained weights."""
    options = parse(argv)
    method = as_method(options.method)
    if getattr(method, "weights", None) is not None:
        raise ConfigError(f"--method {options.method} brings weights; training starts from the model's own, without.")
    if isinstance(method, Schedule):
        raise ConfigError(
            "A schedule cannot be trained, for lessons have no order in time; train its phases one by one."
        )
    options.out.mkdir(parents=True, exist_ok=True)
    if (options.out / "checkpoint.pt").exists() and not options.resume:
        raise ConfigError(f"{options.out} holds a run already; pass --resume, or another --out.")
    accelerator = Accelerator(
        gradient_accumulation_steps=options.accumulate, mixed_precision=options.mixed_precision, cpu=options.cpu
    )
    options.mixed_precision = accelerator.mixed_precision
    with Interrupt(accelerator) as stop:
        student, course = run(options, method, accelerator, stop)
    path = student.path(options.out)
    if accelerator.is_main_process:
        student.export(options.out)
        print(f"step {course.step} of {options.steps}: {path}")
    accelerator.end_training()
    return path


def run(
    options: argparse.Namespace, method: Method, accelerator: Accelerator, stop: Interrupt
) -> tuple[Student, Course]:
    """Samples, then lessons."""
    dtype = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[options.mixed_precision]
    pipe = load_pipeline(options.model, dtype).to(accelerator.device)
    transformer = check_trainable(pipe)
    cache = make_samples(options, accelerator, pipe, stop)
    for name in [name for name in pipe.components if name.startswith(("vae", "text_encoder", "image_encoder"))]:
        setattr(pipe, name, None)  # only the denoiser is needed from here on

    sites = attention_sites(transformer)
    set_seed(options.seed)  # of the LoRA's first weights
    if options.train == "lora":
        student: Student = LoraStudent(pipe, transformer, sites, options.rank, method)
    else:
        student = AttentionStudent(transformer, sites, method)
    if options.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    course = Course(options, accelerator, student)
    model, course.optimizer = accelerator.prepare(transformer, course.optimizer)
    if options.resume and course.checkpoint.exists():
        course.load()
    course.train(model, Lesson(options, pipe, student, accelerator), cache, stop)
    return student, course


if __name__ == "__main__":
    main()
