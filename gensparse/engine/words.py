"""Progress, plans, results and requests in words: the same on the command line and in the browser."""

import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from gensparse.engine.values import Event, Resolved, Result
from gensparse.estimate import Estimate, format_bytes, format_seconds
from gensparse.request import Request, UpscaleRequest

PLAN_HEADER = ("size", "steps", "tokens", "attention", "density", "TFLOP/step", "memory / in chunks", "time")


# ------------------------------------------------------------------------------------------------------------ progress
def describe(event: Event) -> str:
    """One event in words."""
    if event.phase == "load":
        return "loading the model"
    many = f"picture {event.picture + 1}/{event.pictures}, " if event.pictures > 1 else ""
    if event.phase == "write":
        return f"{many}writing"
    size = f" {event.width}x{event.height}" if event.width else ""
    left = f", {format_seconds(event.eta)} left" if event.eta is not None else ""
    if event.phase == "start":
        return f"{many}reading the prompt"
    if event.phase == "decode":
        return f"{many}decoding{size}{left}"
    return f"{many}stage {event.stage + 1}/{event.stages}{size}, step {event.step}/{event.steps}{left}"


# --------------------------------------------------------------------------------------------------------------- plans
def plan_title(resolved: Resolved) -> str:
    """What a plan is about."""
    return f"{resolved.info.alias}: {resolved.width}x{resolved.height}, {resolved.dtype} on {resolved.device}"


def plan_row(stage: Any) -> tuple[str, ...]:
    """One stage, under `PLAN_HEADER`."""
    return (
        f"{stage.width}x{stage.height}",
        str(stage.steps),
        str(stage.tokens),
        stage.attention,
        f"{stage.density:.4f}",
        f"{(stage.linear_flops + stage.attention_flops) / 1e12:.3g}",
        f"{format_bytes(stage.activation_bytes)} / {format_bytes(stage.chunked_bytes)}",
        "" if stage.seconds is None else format_seconds(stage.seconds),
    )


def plan_totals(cost: Estimate) -> list[str]:
    """Memory, choice, work, time and advice, line by line."""
    limit = "" if cost.limit_bytes is None else f" of {format_bytes(cost.limit_bytes)}"
    out = [f"memory  about {format_bytes(cost.peak_bytes)}{limit} (weights {format_bytes(cost.weight_bytes)})"]
    for phase in cost.phases:
        parts = f"weights {format_bytes(phase.weight_bytes)}, activations {format_bytes(phase.activation_bytes)}"
        out.append(f"        {phase.name}: {parts}")
    if cost.host_bytes:
        out.append(f"        main memory: {format_bytes(cost.host_bytes)} of waiting weights")
    out.append(f"choice  {cost.memory}")
    out += [f"        since {reason}" for reason in cost.why]
    out.append(f"work    {cost.total_flops / 1e12:.3g} TFLOP per picture")
    if cost.seconds is not None:
        out.append(f"time    {cost.time_class}, about {format_seconds(cost.seconds)} per picture on this machine")
    out += [f"advice  {line}" for line in cost.advice]
    return out


# ------------------------------------------------------------------------------------------------------------- results
def summary(result: Result) -> str:
    """One line: seconds, memory, attention."""
    parts = [format_seconds(result.timings.get("total", 0.0))]
    memory = result.memory.get("peak_vram_bytes") or result.memory.get("peak_ram_bytes")
    if memory:
        parts.append(f"peak {format_bytes(memory)}")
    parts += [str(item) for item in attention_words(result.attention.get("stages", []))]
    return ", ".join(parts)


def attention_words(stages: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the attention reports say, in a few words."""
    subjects = [
        f"subjects by {_method_name(stage['subjects'].get('method'))}" for stage in stages if "subjects" in stage
    ]
    sparse = [stage for stage in stages if stage.get("sparse") and "subjects" not in stage]
    if not sparse:
        return subjects or ["dense attention"]
    density = sparse[-1].get("density")
    words = f"sparse attention in {len(sparse)} of {len(stages)} enlarged stages"
    return [*subjects, f"{words}, density {density:.3f} in the last" if isinstance(density, float) else words]


def _method_name(method: Any) -> str:
    return str(method.get("method") if isinstance(method, Mapping) else method)


# ------------------------------------------------------------------------------------------------------------ requests
def settings_of(request: Request) -> dict[str, Any]:
    """The fields of a request that are no defaults, without prompt and picture."""
    own = ("prompt", "num_images", "image", *request.private_fields)
    items = {name: getattr(request, name) for name in request.__dataclass_fields__ if name not in own}
    return {k: v for k, v in items.items() if v not in (request.__dataclass_fields__[k].default, None, ())}


def command_of(request: Request) -> str:
    """The command line that makes a request again."""
    upscales = isinstance(request, UpscaleRequest)
    words = ["gensparse", request.kind]
    more = getattr(request, "more_prompts", ())
    for name, value in settings_of(request).items():
        words += [] if name == "more_prompts" else _flag(name, value)
    words += ["INPUT"] if upscales else []
    if more:
        words += [word for text in (request.prompt, *more) for word in ("-p", text)]
    elif request.prompt:
        words += ["-p", request.prompt] if upscales else ["--", request.prompt]
    return " ".join(shlex.quote(clean(word)) for word in words)


def python_of(request: Request) -> str:
    """Lines of Python that make a request again."""
    values = {"prompt": request.prompt} if request.prompt else {}
    if isinstance(request, UpscaleRequest):
        values["image"] = "INPUT.png"
    lines = [f"    {name}={value!r}," for name, value in {**values, **settings_of(request)}.items()]
    name = type(request).__name__
    return "\n".join(
        [
            "from pathlib import Path",
            "",
            "from gensparse.engine import OutputOptions, execute",
            f"from gensparse.request import {name}",
            "",
            f"request = {name}(",
            *lines,
            ")",
            'print(execute(request, OutputOptions(paths=(Path("picture.png"),))).outputs[0].path)',
            "",
        ]
    )


def _flag(name: str, value: Any) -> list[str]:
    flag = "--" + name.replace("_", "-")
    if name in ("layout", "regions"):
        return [flag, f"{name.upper()}.json"]
    if name == "dense_layers":
        return [f"{flag}={','.join(map(str, value))}"]
    values = value if isinstance(value, tuple) else (value,)
    if isinstance(value, bool):
        return [flag] if value else []
    return [word for item in values for word in (flag, str(item))]


def clean(text: str) -> str:
    """Untrusted text without control characters, which a terminal would obey."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def cause_and_remedy(text: str) -> tuple[str, str]:
    """The sentence of an error as its cause and what to do about it ("" where it does not say)."""
    cause, _, remedy = re.sub(r"\s+", " ", text).strip().partition("; ")
    return cause, remedy
