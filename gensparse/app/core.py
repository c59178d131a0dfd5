"""What every tab of the page shares: settings, visitors, jobs, and the forms that other tabs may fill."""

import secrets
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gensparse.app.jobs import Engine, Job, Jobs
from gensparse.app.sessions import CLIENT, COOKIE, Sessions
from gensparse.app.settings import Settings
from gensparse.request import GenerateRequest
from gensparse.subjects.naming import MAX_SUBJECTS, parse_prompts, parse_subject

SWEEP = 600.0  # seconds between two looks for visitors who have gone


@dataclass
class Form:
    """The widgets of a tab that make up a request.

    Args:
        fields: name of a field of the form -> widget, in the order in which `updates` answers.
        tab: id of the tab, for `gr.Tabs(selected=...)`.
    """

    tab: str
    fields: dict[str, Any] = field(default_factory=dict)

    @property
    def widgets(self) -> list[Any]:
        return list(self.fields.values())

    def updates(self, values: Mapping[str, Any]) -> list[Any]:
        """What an event with the outputs `form.widgets` returns to fill the form; other fields stay as they are.

        Args:
            values: fields of a request, as `Request.to_dict` or a preset has them.
        """
        import gradio as gr

        shown = widget_values(values)
        return [gr.update(value=shown[name]) if name in shown else gr.skip() for name in self.fields]


def widget_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a request as a form shows them: attention is two of them, a list is text, a subject name and place."""
    out = dict(values)
    if isinstance(out.get("attention"), str):
        out["method"], _, out["settings"] = out.pop("attention").partition(":")
    seed = out.get("seed")
    if isinstance(seed, list | tuple):
        out["seed"] = seed[0] if seed else None
    if out.get("seed") is not None:
        out["random_seed"] = False
    if out.get("subject"):
        boxes = {name: box for name, *box in out.pop("layout", None) or ()}
        names = [parse_subject(text)[0] for text in out.pop("subject")]
        words = parse_prompts(out.pop("subject_prompt", None) or (), names)
        for number, name in enumerate((names + [""] * MAX_SUBJECTS)[:MAX_SUBJECTS], 1):
            out |= {f"name_{number}": name, f"words_{number}": words.get(name, "")}
            out[f"box_{number}"] = ", ".join(f"{x:g}" for x in boxes.get(name, ()))
    if isinstance(out.get("lora"), list | tuple):
        out["lora"] = "\n".join(out["lora"])
    return out


class App:
    """One server.

    Args:
        settings: how it runs.
        scratch: folder of gradio's own temporary files.
        engine: runs requests; by default a `gensparse.engine.Runner`. Tests pass their own.

    Attributes:
        jobs: the queue in front of the engine.
        sessions: the visitors.
        forms: by kind of request, once the page is built.
        page: the `gr.Blocks`; tabs: its `gr.Tabs`, to switch to one of them; items: its tabs by id.
    """

    def __init__(self, settings: Settings, scratch: Path, engine: Engine | None = None) -> None:
        if engine is None:
            from gensparse.engine import Runner

            engine = Runner()
        self.settings, self.limits = settings, settings.limits
        self.sessions = Sessions(settings.output_dir, scratch)
        self.jobs = Jobs(
            [engine],
            limit=self.limits.queue,
            per_owner=self.limits.per_session,
            grace=settings.grace,
            away=self.sessions.away,
            prepare=self._prepare if settings.preload else None,
        )
        self.forms: dict[str, Form] = {}
        self.page: Any = None
        self.tabs: Any = None
        self.items: dict[str, Any] = {}
        self._closed = threading.Event()
        if settings.shared:
            threading.Thread(target=self._sweep, daemon=True).start()

    def _prepare(self, engine: Any) -> None:
        if hasattr(engine, "prepare"):
            engine.prepare(GenerateRequest(device=self.settings.device, local_files_only=True))

    def _sweep(self) -> None:
        """Delete what visitors of a shared server left behind."""
        while not self._closed.wait(min(SWEEP, self.settings.keep)):
            self.sessions.sweep(self.settings.keep)

    def close(self) -> None:
        """Stop every job and drop the model."""
        self._closed.set()
        self.jobs.close()

    # -- who asks
    def owner(self, request: Any) -> str:
        """The visitor behind a `gr.Request`; one that says nothing about itself is a new visitor each time."""
        cookies = getattr(request, "cookies", None) or {}
        owner = self.sessions.owner(cookies.get(COOKIE), getattr(request, "session_hash", None))
        if owner is None:
            return CLIENT + secrets.token_hex(16)
        self.sessions.touch(owner)
        return owner

    def job(self, job_id: Any, request: Any) -> Job:
        """A job of the visitor behind a `gr.Request`.

        A visitor without a cookie proves with the id alone that a job is his. Raises ConfigError for any other job.
        """
        return self.jobs.get(job_id, self.owner(request), open_to_all=lambda job: job.owner.startswith(CLIENT))
