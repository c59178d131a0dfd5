"""What works with what, measured: every method on the tiny denoiser of every family, and the page made from it.

python -P -m gensparse.testing.support_table docs/models.md
"""

import inspect
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import requires
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

import gensparse
from gensparse.errors import GensparseError
from gensparse.families import (
    FAMILIES,
    Layouts,
    TensorMemo,
    attention_modules,
    bound_call,
    family_named,
    family_of,
    notes_of,
)
from gensparse.layout import Layout
from gensparse.methods import METHODS, Method, as_method
from gensparse.subjects.cast import Concept, Subjects
from gensparse.subjects.read_masks import box_mask
from gensparse.testing.tiny import IMAGES, TINY, VIDEOS, tiny_denoiser, tiny_inputs, tiny_pipeline
from gensparse.testing.tiny.adapters import image_embeds, load_image_adapter

COMMAND = "python -P -m gensparse.testing.support_table docs/models.md"

GRIDS = {"picture": (1, 8, 12), "video": (3, 4, 6)}
"""Tokens of the measured calls."""

SETTINGS: Mapping[str, Mapping[str, str]] = {
    "auto": {"picture": "auto:dense_below=0", "video": "auto:dense_below=0"},
    "agentsd": {"sdxl": "agentsd:preset=sdxl"},
    "masactrl": {"picture": "masactrl:start=0"},
    "primecomposer": {"picture": "primecomposer:queries=object"},
}
"""Methods whose defaults are for other sizes or models only -> (kind or model -> what was measured in their place)."""

SUBJECTS: Mapping[str, Subjects] = {
    "consistory": Subjects(Concept("it", tokens=(1,))),
    "isolation_reposition": Subjects(
        Concept("it", mask=box_mask((0, 0, 0.5, 1), (4, 6)), region=box_mask((0.4, 0, 1, 1), (4, 6)))
    ),
    "magicface": Subjects(Concept("it", mask=box_mask((0, 0, 0.5, 1), (4, 6)), tokens=(1,))),
    "primecomposer": Subjects(
        Concept(
            "it", mask=box_mask((0.2, 0.2, 0.8, 0.8), (8, 12)), region=box_mask((0, 0, 0.8, 1), (8, 12)), tokens=(1,)
        )
    ),
}
"""Methods that have to know who is in the pictures -> what they are told; the first picture is the reference."""

_PROMPT = "a cat and a dog in ink style"
_REGIONS = [{"prompt": "a cat", "box": [0, 0, 0.5, 1]}, {"prompt": "a dog", "box": [0.5, 0, 1, 1]}]

PROMPTED: Mapping[str, Mapping[str, Any]] = {
    "autostudio": {"regions": _REGIONS, "background": "a field"},
    "boxdiff": {"prompt": _PROMPT, "regions": _REGIONS},
    "lpa": {"prompt": _PROMPT, "route": "lpa_full", "window": (0, 1000)},
    "mip_adapter": {"objects": ("cat", "dog")},
    "regional": {"regions": _REGIONS, "max_tokens": 16},
    "structured": {"prompt": _PROMPT},
}
"""Methods that encode prompts of their own -> their settings. They get the text encoders of a tiny pipeline."""

PAIRED = frozenset({"wan22"})
"""Models of which two take turns in a run."""

FITTED: Mapping[tuple[str, str], Mapping[str, Any]] = {("cosmos", "cosmos_sparse"): {"num_layers": 28}}
"""(model, method) -> options of the tiny denoiser, where a method is made for one size of a model."""

UNETS = frozenset({"sd15", "sdxl"})
"""Models that take image prompts by their names, and whose latents a method may move."""

ENCODING = frozenset({"flux", "flux_kontext", "sd15", "sdxl", "sd3", "sd35"})
"""Models whose prompts such methods encode; they refuse the others before that."""

STEPS = 4


# --------------------------------------------------------------------------------------------------------- measurement
@dataclass(frozen=True)
class Outcome:
    """What one method did on one model.

    Args:
        sparse, sites: attention sites that ran sparse, of so many.
        dense: why the others ran dense.
        refused: what `apply` said where it refused the method.
        faults: what must never happen, such as numbers that are not finite; empty for a method that works.
    """

    sparse: int = 0
    sites: int = 0
    dense: tuple[str, ...] = ()
    refused: str = ""
    faults: tuple[str, ...] = ()


@dataclass(frozen=True)
class Measured:
    """One row of the table: a tiny model, its sites and tokens by role, and every method's outcome."""

    name: str
    model_class: str
    roles: Mapping[str, tuple[int, str]]
    outcomes: Mapping[str, Outcome]


class Subject:
    """A tiny model to try methods on: it stands for a pipeline, with a scheduler that knows steps and training size."""

    do_classifier_free_guidance = False

    def __init__(self, name: str, **options: Any) -> None:
        self.name = name
        self.kind = "video" if name in VIDEOS else "picture"
        self.transformer = tiny_denoiser(name, **options)
        self.transformer_2 = tiny_denoiser(name, seed=1, **options) if name in PAIRED else None
        self.scheduler = FlowMatchEulerDiscreteScheduler()
        self.scheduler.set_timesteps(STEPS)
        self.inputs = self.arguments()
        self.ascending = self.model_class in FAMILIES and family_of(self.transformer).ascending_time
        self.output = self.run()

    def arguments(self) -> dict[str, Any]:
        """Of the denoiser."""
        return tiny_inputs(self.name, GRIDS[self.kind])

    @property
    def model_class(self) -> str:
        return type(self.transformer).__name__

    @torch.no_grad()
    def run(self, step: int = 0) -> Tensor:
        """What its denoisers answer, joined flat, at a step: a little later in time for each."""
        name = next(key for key in ("timestep", "timesteps", "t") if key in self.inputs)
        value = self.inputs[name] * (1 + (step if self.ascending else -step) / (2 * STEPS))
        value = value.to(self.inputs[name].dtype) if isinstance(value, Tensor) else value
        models = [model for model in (self.transformer, self.transformer_2) if model is not None]
        answers = [model(**{**self.inputs, name: value}, return_dict=False) for model in models]
        return torch.cat([tensor.flatten() for tensor in _tensors(answers)])

    def general(self, text: str, method: Method) -> str:
        """A sentence that says the same for all models, and where it is about none, for all methods."""
        text = text.replace(f"this {self.model_class}", "this model").replace(self.model_class, "this model")
        if self.model_class in FAMILIES:
            own = family_of(self.transformer).name
            text = text.replace(f"not {own};", "not this one;").replace(f"is of {own};", "is of another;")
        text = re.sub(r"but the model has \d+", "but the model has another number", text)
        text = text.replace(f"{method.name} has no rule for", "the method has no rule for")
        return text.split("; supported model classes are ")[0]


class Prompted(Subject):
    """With the text encoders of a tiny pipeline, and the text of its prompt."""

    def __init__(self, name: str, **options: Any) -> None:
        pipe = tiny_pipeline(name)
        self.encode_prompt, self.tokenizer = pipe.encode_prompt, getattr(pipe, "tokenizer", None)
        super().__init__(name, **options)
        self.scheduler = DDIMScheduler() if name in UNETS else self.scheduler
        self.scheduler.set_timesteps(STEPS)

    def arguments(self) -> dict[str, Any]:
        known = {"prompt": _PROMPT, "prompt_2": None, "prompt_3": None, "device": "cpu", "num_images_per_prompt": 1}
        known |= {"do_classifier_free_guidance": False, "max_sequence_length": 16}
        wanted = inspect.signature(self.encode_prompt).parameters
        with torch.no_grad():
            text = self.encode_prompt(**{key: value for key, value in known.items() if key in wanted})[0]
        inputs = tiny_inputs(self.name, GRIDS[self.kind], text=text.shape[1])
        own = inputs["encoder_hidden_states"]
        return {**inputs, "encoder_hidden_states": text.to(own.dtype).expand_as(own)}


class ImagePrompted(Prompted):
    """With an image-prompt adapter too, and two images."""

    def arguments(self) -> dict[str, Any]:
        load_image_adapter(self.transformer)
        inputs = super().arguments()
        return {**inputs, "added_cond_kwargs": {**inputs.get("added_cond_kwargs", {}), "image_embeds": image_embeds(2)}}


def measure(names: Sequence[str] = tuple(TINY)) -> list[Measured]:
    """Try every registered method on tiny models."""
    return [_measure(name) for name in names]


def _measure(name: str) -> Measured:
    subject, outcomes = Subject(name), {}
    prompted: Subject | None = None
    for key in METHODS:
        fitted = FITTED.get((name, key))
        own = SETTINGS.get(key, {})
        method = as_method(own.get(name, own.get(subject.kind, key)))
        if key in PROMPTED:
            method = as_method({"method": key, **PROMPTED[key]})
            prompted = prompted or (Prompted(name) if name in ENCODING else subject)
            with_images = key == "mip_adapter" and name in UNETS
            outcomes[key] = outcome(ImagePrompted(name) if with_images else prompted, method)
            continue
        outcomes[key] = outcome(subject if fitted is None else Subject(name, **fitted), method)
    return Measured(name, subject.model_class, _roles(subject), outcomes)


def outcome(subject: Subject, method: Method) -> Outcome:
    """Apply a method, run it (methods that look at the step: a run of 4), remove it, and look at all of it."""
    try:
        handle = gensparse.apply(subject, method)
    except GensparseError as error:
        return Outcome(refused=subject.general(str(error), method))
    except Exception as error:
        return Outcome(faults=(f"apply() raised {type(error).__name__}: {error}",))
    try:
        found = _run(subject, method, handle)
    except GensparseError as error:
        found = Outcome(refused=f"At its first call: {subject.general(str(error), method)}")
    except Exception as error:
        found = Outcome(faults=(f"the call raised {type(error).__name__}: {error}",))
    finally:
        handle.remove()
    if not torch.equal(subject.run(), subject.output):
        found = replace(found, faults=(*found.faults, "remove() does not bring back the output bit for bit"))
    return found


def _run(subject: Subject, method: Method, handle: Any) -> Outcome:
    """The step with the most sparse sites; a method that wants a small picture of the call first gets it."""
    found = []
    if method.name in SUBJECTS:
        handle.use(SUBJECTS[method.name])
    if method.records:
        frames, height, width = GRIDS[subject.kind]
        ratio = getattr(method, "ratio", 1)
        handle.record(**tiny_inputs(subject.name, (frames, height // ratio, width // ratio)))
    for step in range(STEPS if method.timed else 1):
        finite = bool(torch.isfinite(subject.run(step)).all())
        if method.name == "boxdiff":  # acts between steps
            rest = {key: value for key, value in subject.inputs.items() if key not in ("sample", "timestep")}
            finite = finite and bool(handle.start(subject, subject.inputs["sample"], **rest).isfinite().all())
        report = handle.report()
        sites = report["sparse"] + sum(report["dense"].values())
        reasons = tuple(subject.general(reason, method) for reason in report["dense"])
        faults = () if finite else ("the output is not finite",)
        found.append(Outcome(report["sparse"], sites, reasons, faults=faults))
    best = max(found, key=lambda item: item.sparse)
    return replace(best, faults=next((item.faults for item in found if item.faults), ()))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)


def _roles(subject: Subject) -> dict[str, tuple[int, str]]:
    """Role -> (number of sites, order of the tokens of a call), as the family reads them; empty where it refuses."""
    model = subject.transformer
    modules = attention_modules(model)
    bound = bound_call(model, (), subject.inputs).arguments
    try:
        family = family_of(model)
        sites = list(family.sites(model, modules).values())
        layouts: Layouts = family.read_layouts(model, bound, TensorMemo())
    except GensparseError:
        return {}
    return {role: (sites.count(role), _order(layouts[role])) for role in dict.fromkeys(sites)}


_WORDS = {"target": "picture", "reference": "reference pictures", "pad": "padding"}


def _order(layout: Layout | tuple[Layout, ...]) -> str:
    """text, picture, reference pictures ...; runs of equal kinds once."""
    first = layout[0] if isinstance(layout, tuple) else layout
    kinds = [segment.kind for segment in first.segments]
    runs = [kind for kind, before in zip(kinds, [None, *kinds], strict=False) if kind != before]
    words = [("clip" if kind == "target" and first.grid[0] > 1 else _WORDS.get(kind, kind)) for kind in runs]
    return ", ".join(words) + (" (every sample its own length)" if isinstance(layout, tuple) else "")


# ---------------------------------------------------------------------------------------------------------------- page
HEAD = f"""# Models and methods: what works

<!-- This page is made by a program, do not edit it: {COMMAND} -->

`gensparse.apply(pipe, method)` looks at the class of the denoiser, never at a checkpoint's name: every checkpoint of a
class below works alike. Tested with diffusers {{versions}}. `gensparse models check FOLDER --attention METHOD` answers
for one checkpoint, from its config alone. What `gensparse generate` can run is a shorter list: `gensparse models list`.

## Methods on models
Measured, not promised: each method was applied to a tiny model of each family (random weights, CPU), ran, and was
removed again; the output was finite, and afterwards equal bit for bit to that before. The test suite makes this table
anew and fails where it differs. [methods.md](methods.md) says what the methods are.

- A number: so many attention layers ran sparse, which are all that the family has. `1 of 2`: the others stay dense, for
  the reason in the note.
- `dense`: the method can be applied, but every layer runs dense, for the reason in the note and in `handle.report()`.
- `no`: `apply` refuses it with the sentence in the note, and the model is left as it was.

{{settings}}"""

FAMILIES_HEAD = """## Families
Sites are the attention layers that a method may change; cross-attention to text, text refiners and linear attention are
none and stay as they are. In brackets: sites of the tiny model of the table above.

| family | classes of diffusers | tiny models | role of sites: tokens of a call |
|---|---|---|---|
"""


def page(rows: Sequence[Measured]) -> str:
    """The text of docs/models.md."""
    notes: dict[str, int] = {}
    pictures = [row for row in rows if row.name in IMAGES]
    videos = [row for row in rows if row.name in VIDEOS]
    parts = [HEAD.format(versions=_versions(), settings=_settings())]
    for title, group in (("Pictures", pictures), ("Videos", videos)):
        if group:
            parts.append(f"### {title}\n{_matrix(group, notes)}")
    lines = [f"{number}. {text}" for text, number in notes.items()]
    parts.append("### Notes\n" + "\n".join(lines) if lines else "")
    parts.append(FAMILIES_HEAD + "\n".join(_family_line(*item, rows) for item in _modules().items()))
    parts.append("### What to know of each\n" + "\n".join(map(_about, _modules().values())))
    return "\n\n".join(part for part in parts if part) + "\n"


def _matrix(rows: Sequence[Measured], notes: dict[str, int]) -> str:
    lines = ["| method | " + " | ".join(row.name for row in rows) + " |", "|---" * (len(rows) + 1) + "|"]
    for method in rows[0].outcomes:
        lines.append(f"| `{method}` | " + " | ".join(_cell(row.outcomes[method], notes) for row in rows) + " |")
    return "\n".join(lines)


def _cell(item: Outcome, notes: dict[str, int]) -> str:
    if item.faults:
        return "FAULT" + _mark(item.faults, notes)
    if item.refused:
        return "no" + _mark((item.refused,), notes)
    if item.sparse == item.sites:
        return str(item.sparse)
    return (f"{item.sparse} of {item.sites}" if item.sparse else "dense") + _mark(item.dense, notes)


def _mark(reasons: Sequence[str], notes: dict[str, int]) -> str:
    numbers = [notes.setdefault(reason, len(notes) + 1) for reason in reasons]
    return f"<sup>{' '.join(map(str, numbers))}</sup>"


def _settings() -> str:
    texts = [
        f"`{text}` on {what}{'s' if what in GRIDS else ''}" for own in SETTINGS.values() for what, text in own.items()
    ]
    sizes = " and ".join("x".join(map(str, grid)) + f" for {kind}s" for kind, grid in GRIDS.items())
    told = (
        "Methods for several subjects got a reference picture and a generated one in a batch, without guidance. "
        f"Methods with prompts of their own ({_names(PROMPTED)}) got two regions or names, and the text encoders of a "
        "tiny pipeline; they act on cross-attention of UNets, whose layers are counted there."
    )
    return f"Methods have their default settings, except {', '.join(texts)}. Grids are {sizes}, in tokens. {told}"


def _names(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _versions() -> str:
    """The range of diffusers that the package asks for."""
    line = next(item for item in requires("gensparse") or () if item.startswith("diffusers"))
    limits = sorted(line.removeprefix("diffusers").split(","), reverse=True)
    return " and ".join(limits)


def _modules() -> dict[str, list[str]]:
    """Module of a family -> its model classes."""
    found: dict[str, list[str]] = {}
    for model_class, module in FAMILIES.items():
        found.setdefault(module, []).append(model_class)
    return found


def _family_line(module: str, classes: Sequence[str], rows: Sequence[Measured]) -> str:
    own = [row for row in rows if FAMILIES.get(row.model_class) == module]
    roles: dict[str, list[str]] = {}
    for row in own:
        for role, (count, order) in row.roles.items():
            roles.setdefault(f"{role}: {order}", []).append(f"{count} in {row.name}")
    sites = "<br>".join(f"{text} ({', '.join(counts)})" for text, counts in roles.items()) or "none"
    names, tiny = ", ".join(f"`{item}`" for item in classes), ", ".join(row.name for row in own) or "none"
    return f"| {family_named(classes[0]).name} | {names} | {tiny} | {sites if own else 'not in the tables above'} |"


def _about(classes: Sequence[str]) -> str:
    return f"- **{family_named(classes[0]).name}.** {notes_of(classes[0])}"


if __name__ == "__main__":
    text = page(measure())
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(text, encoding="utf-8")
    else:
        sys.stdout.write(text)
