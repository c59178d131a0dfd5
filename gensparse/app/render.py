"""Jobs, plans and results as HTML. Everything that came from outside is escaped; nothing here draws a widget."""

import base64
import html
import io
import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from gensparse.app.jobs import Job, State
from gensparse.engine.values import Resolved, Result
from gensparse.engine.words import (
    PLAN_HEADER,
    attention_words,
    cause_and_remedy,
    command_of,
    describe,
    plan_row,
    plan_title,
    plan_totals,
    python_of,
    summary,
)
from gensparse.errors import ConfigError
from gensparse.estimate import Estimate, format_bytes, format_seconds
from gensparse.request import CustomizeRequest, Request, request_from_dict

PREVIEW_SIDE = 512
_JPEG_QUALITY = 82
_TEMPLATE = {ord(letter): f"&#{ord(letter)};" for letter in "{}$`"}


def esc(text: object) -> str:
    """Text as HTML, also inside templates: braces, dollars and backticks mean nothing in it either."""
    return html.escape(str(text)).translate(_TEMPLATE)


def error_card(text: str) -> str:
    """What went wrong, and what to do."""
    cause, remedy = cause_and_remedy(text)
    more = f"<p>Try: {esc(remedy)}</p>" if remedy else ""
    return f'<div class="gs-card gs-bad" role="alert"><p class="gs-cause">{esc(cause)}</p>{more}</div>'


# ---------------------------------------------------------------------------------------------------------------- jobs
def job_card(job: Job, position: int = 0) -> str:
    """Where a job is: its place in the queue, its progress with a small picture, or how it ended."""
    if job.state is State.FAILED:
        return error_card(job.error or "it failed") + _warnings(job.warnings)
    percent = round(100 * job.share)
    bar = (
        f'<div class="gs-progress" role="progressbar" aria-valuemin="0" aria-valuemax="100" aria-valuenow="{percent}">'
        f'<div style="width: {percent}%"></div></div>'
    )
    body = f"<p>{esc(job_words(job, position))}</p>"
    if job.state is State.RUNNING:
        body = bar + body + _preview(job)
    return f'<div class="gs-card" aria-live="polite">{body}{_warnings(job.warnings)}</div>'


def job_words(job: Job, position: int = 0) -> str:
    """The state of a job in words."""
    if job.state is State.QUEUED:
        before = position - 1
        return (
            "Next in the queue." if before < 1 else f"Waiting: {before} {'job' if before == 1 else 'jobs'} before it."
        )
    if job.state is State.RUNNING:
        doing = _sentence(describe(job.event)) if job.event is not None else "Starting."
        return f"Stopping after this step. {doing}" if job.stopping else doing
    if job.state is State.CANCELLED:
        return _sentence(f"cancelled: {job.reason}")
    if job.state is State.FAILED:
        return _sentence(job.error or "failed")
    return _sentence(f"done: {summary(job.result)}" if isinstance(job.result, Result) else "done")


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:].rstrip(".") + "."


def _warnings(texts: Sequence[str]) -> str:
    items = "".join(f"<li>{esc(text)}</li>" for text in texts)
    return f"<ul>{items}</ul>" if items else ""


def _preview(job: Job) -> str:
    image = job.preview
    if image is None:
        return ""
    if job.facts.get("encoded") is not image:  # once per picture, not once per look
        job.facts |= {"encoded": image, "uri": data_uri(image)}
    return f'<img class="gs-preview" alt="the picture so far" src="{job.facts["uri"]}">'


def data_uri(image: Any) -> str:
    """A small picture as part of a page."""
    small = image.convert("RGB")
    small.thumbnail((PREVIEW_SIDE, PREVIEW_SIDE))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=_JPEG_QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


# --------------------------------------------------------------------------------------------------------------- plans
def plan_card(resolved: Resolved, cost: Estimate) -> str:
    """What a request will cost, before it runs; the way out where it will not fit."""
    if not cost.fits:
        return error_card("; ".join(cost.advice) or "it will not fit into memory")
    time = "" if cost.seconds is None else f", about {format_seconds(cost.seconds)} per picture"
    limit = "" if cost.limit_bytes is None else f" of {format_bytes(cost.limit_bytes)}"
    head = f"{plan_title(resolved)}: about {format_bytes(cost.peak_bytes)}{limit}{time}"
    rows = table([dict(zip(PLAN_HEADER, plan_row(stage), strict=True)) for stage in cost.stages])
    lines = "".join(f"<p>{esc(line)}</p>" for line in plan_totals(cost))
    details = f'<details><summary class="gs-quiet">stages and memory</summary>{rows}{lines}</details>'
    return f'<div class="gs-card"><p>{esc(head)}</p>{_warnings(resolved.warnings)}{details}</div>'


def table(rows: Iterable[Mapping[str, object]]) -> str:
    """Rows with the same keys as a table."""
    listed = list(rows)
    if not listed:
        return ""
    head = "".join(f"<th>{esc(name)}</th>" for name in listed[0])
    body = "".join("<tr>" + "".join(f"<td>{esc(cell)}</td>" for cell in row.values()) + "</tr>" for row in listed)
    return f'<div class="gs-scroll"><table><tr>{head}</tr>{body}</table></div>'


# ------------------------------------------------------------------------------------------------------------- results
def what_ran(result: Result) -> str:
    """Attention, times, memory and versions of a result."""
    stages = [_stage(stage) for stage in result.attention.get("stages", [])]
    facts = {
        **{f"seconds, {name.replace('_', ' ')}": f"{value:.2f}" for name, value in result.timings.items()},
        **{name.replace("_bytes", "").replace("_", " "): format_bytes(size) for name, size in result.memory.items()},
        **result.versions,
    }
    rows = "".join(f"<tr><th>{esc(name)}</th><td>{esc(value)}</td></tr>" for name, value in facts.items())
    words = _sentence(", ".join(attention_words(result.attention.get("stages", []))))
    return f"<p>{esc(words)}</p>{table(stages)}<div class='gs-scroll'><table>{rows}</table></div>"


def _stage(stage: Mapping[str, Any]) -> dict[str, object]:
    method = stage.get("method")
    density = stage.get("density")
    dense = stage.get("dense")
    return {
        "stage": int(stage.get("stage", 0)) + 1,
        "size": f"{stage.get('width')}x{stage.get('height')}",
        "attention": method.get("method") if isinstance(method, Mapping) else method,
        "sparse layers": stage.get("sparse", 0),
        "density": f"{density:.4f}" if isinstance(density, float) else "",
        "backend": stage.get("backend", ""),
        "dense because": "; ".join(map(str, dense)) if isinstance(dense, Mapping) else "",
    }


def again(result: Result) -> tuple[str, str]:
    """(command line, Python) that make a result again, each with a button that copies it."""
    request = request_of_result(result)
    return copyable(_layout_file(request) + command_of(request)), copyable(python_of(request))


def _layout_file(request: Request) -> str:
    """The line of a shell that writes the file of places that the command names; "" where there are none."""
    if not isinstance(request, CustomizeRequest) or not request.layout:
        return ""
    places = [{"subject": name, "box": box} for name, *box in request.layout]
    return f"echo {shlex.quote(json.dumps(places))} > LAYOUT.json\n"


def request_of_result(result: Result, seed: int | None = None) -> Request:
    """The request that made a result, as it would be written into the picture."""
    values = dict(result.request)
    if values.get("kind") == "upscale":
        values["image"] = values.get("image") or "INPUT"
    try:
        request = request_from_dict(values)
    except ConfigError as error:  # cannot happen for what the engine answered
        raise ConfigError(f"the result does not say how it was made ({error})") from error
    return request if seed is None else request.replace(seed=(seed,), num_images=1)


def copyable(text: str) -> str:
    """Text with a button that copies it."""
    button = '<button type="button" data-gs-copy>Copy</button>'
    return f'<div class="gs-text"><pre>{esc(text)}</pre>{button}</div>'
