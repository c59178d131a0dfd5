"""The attention lab without its page: who sees whom under a method or pattern, on a model at a size, and what it costs.

Everything here is a function of plain values. Nothing of size tokens x tokens is made: a picture asks the pattern about
one query, and numbers are counted from the plan's tiles.
"""

import inspect
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from gensparse import patterns
from gensparse.engine.reuse import FILES_OF_METHODS, without_files
from gensparse.errors import ConfigError, unknown_name
from gensparse.families import FAMILIES, Family, family_named
from gensparse.layout import Grid, Layout, Segment
from gensparse.methods import METHODS, At, Auto, Dense, Method, MswMsa, Place, Subject, parse_method, parse_value
from gensparse.methods.describe import describe, docs, method_text
from gensparse.methods.profile import GridProfile, Profile
from gensparse.methods.subject_method import SubjectMethod
from gensparse.models import REGISTRY, ModelInfo
from gensparse.patterns import Pattern, RoutedPattern, Text
from gensparse.patterns.anchors import ANCHORS

if TYPE_CHECKING:
    from gensparse.estimate import Rates
    from gensparse.patterns.draw import Drawing

MAX_SIDE, MAX_TEXT, MAX_FRAMES = 8192, 4096, 257
MAX_TOKENS = 300_000
STEPS = 50  # of the run whose moment is looked at
HEADS = 24  # of a model whose heads are not known


# -------------------------------------------------------------------------------------------------------------- models
@dataclass(frozen=True)
class LabModel:
    """A model, or a family of models, whose tokens can be laid out without weights.

    Args:
        key: short name; label: what people read.
        model_class: class of diffusers' denoiser, a key of `FAMILIES`.
        size: (height, width) pixels to start with; frames: of a clip, None for pictures; text: tokens.
        level: of a UNet: 0 for the latent cells, each further one halves them.
        sites: names of the attention modules in order, where they are known.
        info: what the registry knows, with the sizes that decide cost; None for a family without them.
    """

    key: str
    label: str
    model_class: str
    size: tuple[int, int]
    text: int = 0
    frames: int | None = None
    level: int | None = None
    sites: tuple[str, ...] = ()
    info: ModelInfo | None = None

    @property
    def family(self) -> Family:
        return family_named(self.model_class)

    @property
    def layers(self) -> int:
        """Attention layers, as far as they are known; methods that alternate over layers need at least two."""
        return len(self.sites) or _LAYERS.get(self.key, 32)

    @property
    def arch(self) -> Any:
        """The sizes that decide cost, see `gensparse.families.sizes`; None where they are not known."""
        return None if self.info is None else self.info.architecture

    @property
    def role(self) -> str:
        return "joint" if self.level is None else f"level{self.level}"

    @property
    def heads(self) -> int:
        return HEADS if self.arch is None else self.arch.width // self.arch.head_dim

    @property
    def native_tokens(self) -> int | None:
        """Picture tokens at the size of training, for UNets the latent cells."""
        if self.info is None:
            return None
        native, arch = self.info.native_size, self.info.architecture
        return arch.tokens(native, native) if self.level is None else (native // arch.vae_factor) ** 2

    def place(self, layer: int) -> Place:
        """An attention layer."""
        name = self.sites[layer] if self.sites else f"transformer_blocks.{layer}.attn"
        return Place(self.role, layer, self.layers, self.heads, name)

    def layout(self, height: int, width: int, *, text: int = 0, frames: int | None = None) -> Layout:
        """What the tokens of a call are at a size in pixels.

        Raises:
            ConfigError: a size out of range, or more than `MAX_TOKENS` tokens.
        """
        _within("height", height, 16, MAX_SIDE, "pixels")
        _within("width", width, 16, MAX_SIDE, "pixels")
        _within("text", text, 0, MAX_TEXT, "tokens")
        if self.frames is not None:
            _within("frames", frames, 1, MAX_FRAMES, "frames")
        sizes: dict[str, Any] = {"n_text": text, "frames": frames, "level": self.level}
        if self.info is not None:
            sizes |= self.info.row.layout(self.info.architecture)
        known = inspect.signature(self.family.layout_for).parameters
        own = {name: value for name, value in sizes.items() if name in known and value is not None}
        layout = self.family.layout_for(height, width, **own)
        if layout.tokens > MAX_TOKENS:
            raise ConfigError(
                f"{width}x{height} has {layout.tokens:,} tokens here, and the lab draws up to {MAX_TOKENS:,}; choose a "
                "smaller size."
            )
        return layout


_LAYERS = {"Cosmos": 28}  # of families whose methods ask for the number: Cosmos-Predict2 2B
_CLIP, _PICTURE = (480, 832), (2048, 2048)
_CLIP_FRAMES = 33


@lru_cache(maxsize=1)
def lab_models() -> dict[str, LabModel]:
    """Every model and family of the lab by its key: those of the registry first, whose sizes are known."""
    found = [_registered(info) for info in REGISTRY.values()]
    seen = {model.family.name for model in found}
    for model_class in FAMILIES:
        family = family_named(model_class)
        if family.name in seen or "ControlNet" in model_class:
            continue
        seen.add(family.name)
        found += _of_family(model_class, family)
    return {model.key: model for model in found}


def _registered(info: ModelInfo) -> LabModel:
    from gensparse.embedded import is_shipped
    from gensparse.engine import open_model
    from gensparse.request import GenerateRequest

    if is_shipped(info.alias):  # its folder lies in the package and knows more
        info = open_model(GenerateRequest(model=info.alias), weights=False).info
    arch, module = info.architecture, f"gensparse.families.{info.row.attention}"
    model_class = next(name for name, place in FAMILIES.items() if place == module and "ControlNet" not in name)
    level = getattr(arch, "level", None)
    side = min(MAX_SIDE, 4 * info.native_size)
    return LabModel(
        info.alias,
        f"{info.alias}: {re.split('[;:]', info.summary)[0]}",
        model_class,
        (side, side),
        0 if level is not None else info.max_sequence_length,
        level=level,
        sites=_sites(info),
        info=info,
    )


def _sites(info: ModelInfo) -> tuple[str, ...]:
    """Names of the attention modules in the order of the computation; of UNets those of their finest attention."""
    arch = info.architecture
    if getattr(arch, "level", None) is not None:
        return _UNET_SITES.get(info.family, ())
    joint = [f"transformer_blocks.{n}.attn" for n in range(getattr(arch, "double_blocks", arch.layers))]
    return (*joint, *(f"single_transformer_blocks.{n}.attn" for n in range(getattr(arch, "single_blocks", 0))))


def _of_family(model_class: str, family: Family) -> list[LabModel]:
    known = inspect.signature(family.layout_for).parameters
    clip = "frames" in known
    try:
        text = int(_default(known["n_text"], 512)) if "n_text" in known else 0
        frames = _CLIP_FRAMES if clip else None
        label, size = f"{family.name}: {'clips' if clip else 'pictures'}", _CLIP if clip else _PICTURE
        model = LabModel(family.name, label, model_class, size, text, frames)
        model.layout(*model.size, text=text, frames=frames)
    except ConfigError:  # a family without attention that could be sparse
        return []
    return [model]


def _unet_sites(levels: Mapping[str, int]) -> tuple[str, ...]:
    return tuple(
        f"{block}.attentions.{a}.transformer_blocks.0.attn1" for block, count in levels.items() for a in range(count)
    )


_UNET_SITES = {
    "sdxl": _unet_sites({"down_blocks.1": 2, "up_blocks.1": 3}),
    "sd15": _unet_sites({"down_blocks.0": 2, "up_blocks.3": 3}),
}


def _default(parameter: inspect.Parameter, otherwise: int) -> int:
    return otherwise if parameter.default is inspect.Parameter.empty else parameter.default


def lab_model(key: str) -> LabModel:
    """A model by its key.

    Raises:
        ConfigError: no such model.
    """
    models = lab_models()
    if key not in models:
        raise ConfigError(unknown_name("model of the lab", str(key), list(models)))
    return models[key]


# ------------------------------------------------------------------------------------------ methods, patterns, settings
@dataclass(frozen=True)
class Setting:
    """One setting of a method or pattern: its name, what it is called, the text of its default, and what it is."""

    name: str
    label: str
    value: str
    info: str = ""


PATTERNS: dict[str, dict[str, Any]] = {
    "Disc": {"radius": 16},
    "Box": {"radius": 8},
    "InwardWindow": {"half": 16},
    "SlidingTiles": {"tile": 8, "window": 3},
    "Neighborhood": {"window": 33},
    "Blocks": {"window": 16},
    "Halo": {"block": 8, "halo": 4},
    "Grid": {"grid": 8},
    "LongDistance": {"group": 8, "interval": 8},
    "Stripes": {"width": 4},
    "CrissCross": {},
    "Planes": {},
    "MSW": {"index": 1},
    "Radial": {"decay": 0.2, "block": 64},
    "Pooled": {"cells": 8, "weights": "mean", "bias": "log_count"},
    "Proxy": {"window": 8},
    "Pyramid": {},
    "VaryingWindow": {"window": 8, "bias": "log_count"},
    "HiLo": {"window": 8, "heads": 24, "low_heads": 12},
}
"""Patterns that need nothing but numbers, and the settings they start with."""

NEED_MORE = {
    "Aligned": "it is about reference pictures",
    "AnchorStream": "it is about the low-resolution stream of Scale-DiT, see the method scale_dit",
    "Anchors": "it needs a low-resolution picture, see the method scale_dit",
    "Clusters": "its keys are chosen at run time",
    "Intersection": "it combines patterns",
    "Isolation": "it needs a map of subjects",
    "KeyMask": "it needs a mask",
    "PerHead": "it combines patterns",
    "Policy": "it is about segments, not places",
    "PyramidBlocks": "its keys are chosen at run time, see the method psa",
    "QueryMask": "it needs a mask",
    "References": "it is about reference pictures",
    "Regions": "it needs masks and texts of regions",
    "Text": "it is about text, and part of every pattern here",
    "TopRegions": "its keys are chosen at run time, see the method biformer",
    "Union": "it combines patterns",
}
"""Patterns that are not in the lab, and why."""

_HIDDEN = {"Pooled": ("name", "exclude")}  # settings that are no numbers or words


def is_pattern(name: str) -> bool:
    """Whether a choice of the lab is a pattern rather than a method."""
    return name in PATTERNS


def about(name: str) -> str:
    """What a method or pattern is, in a few sentences."""
    if is_pattern(name):
        return docs(getattr(patterns, name))[0]
    facts = describe(_method_class(name))
    return f"{facts['about']}\n\nWhen: {facts['use']}\n\nPaper: {facts['paper']}"


def settings_of(name: str) -> tuple[Setting, ...]:
    """The settings of a method or pattern with their defaults as text."""
    if is_pattern(name):
        cls = getattr(patterns, name)
        info = docs(cls)[1]
        known = [item for item in fields(cls) if item.init and item.name not in _HIDDEN.get(name, ())]
        return tuple(
            Setting(f.name, _words(f.name), _text(PATTERNS[name].get(f.name, f.default)), info.get(f.name, ""))
            for f in known
        )
    cls = _method_class(name)
    facts = describe(cls)
    own = cls.write_text(facts["defaults"])
    if own is not None:  # a method with a form of its own
        return (Setting("", "settings", own, " ".join(facts["settings"].values())),)
    named = {f.name for f in fields(cls) if f.name in FILES_OF_METHODS and "str" in str(f.type)}
    return tuple(
        Setting(key, _words(key), _text(value), facts["settings"].get(key, ""))
        for key, value in facts["defaults"].items()
        if not (key in named and value is None)
    )


def presets_of(name: str) -> dict[str, dict[str, str]]:
    """Published settings of a method: model -> {setting: text}."""
    if is_pattern(name):
        return {}
    cls = _method_class(name)
    return {model: {key: _text(value) for key, value in own.items()} for model, own in cls.presets.items()}


def attention_text(name: str, values: Mapping[str, str]) -> str:
    """The text of a method with these settings, as `--attention` takes it; defaults and empty values are left out.

    Raises:
        ConfigError: no such method, or a setting that is not allowed, or names a file.
    """
    wanted = {}
    for item in settings_of(name):
        text = _typed(values.get(item.name, ""))
        if text and text != item.value:
            wanted[item.name] = text
    if list(wanted) == [""]:
        text = f"{name}:{wanted['']}"
    else:
        text = f"{name}:{','.join(f'{key}={value}' for key, value in wanted.items())}" if wanted else name
    kept, files = without_files(text)  # before a method is made of it, which may open files
    if files:
        raise ConfigError(f"The lab reads no files; leave out {', '.join(files)}.")
    return kept


def pattern_of(name: str, values: Mapping[str, str]) -> Pattern:
    """A pattern with these settings.

    Raises:
        ConfigError: a setting that is not allowed.
    """
    cls = getattr(patterns, name)
    given = {item.name: _typed(values.get(item.name, "")) or item.value for item in settings_of(name)}
    read = {key: text if key == "bias" and text == "none" else parse_value(text) for key, text in given.items()}
    levels = {key: value if isinstance(value, tuple) else (value,) for key, value in read.items()}
    return cls(**(levels if name == "Pyramid" else read))


def _method_class(name: str) -> type[Method]:
    if name not in METHODS:
        raise ConfigError(unknown_name("method or pattern", str(name), [*METHODS, *PATTERNS]))
    return METHODS[name]


def _typed(text: Any) -> str:
    """What was typed into a field: 80, 80 and 80,80 and (80, 80) both mean 80x80."""
    text = str(text if text is not None else "").strip().strip("()")
    return re.sub(r"\s*[,×]\s*", "x", text) if re.fullmatch(r"[\w.]+(\s*[,×]\s*[\w.]+)+", text) else text


def _text(value: Any) -> str:
    if value is MISSING:
        return ""
    data = list(value) if isinstance(value, tuple) else value
    return method_text({"method": "x", "y": data}).removeprefix("x:y=")


def _words(name: str) -> str:
    return name.replace("_", " ")


# ----------------------------------------------------------------------------------------------------- what it would do
@dataclass(frozen=True)
class View:
    """What a method or pattern does in one layer at one moment.

    Args:
        model, height, width: of what; layout: its tokens.
        attention: text for `--attention`; "" for a bare pattern.
        acting: the method that acts there, None for a bare pattern or where nothing is sparse.
        pattern: which key a query sees; None where there is no picture.
        why: why there is no picture; "" where there is one.
        density: share of the pairs, where it is known without a pattern.
        groups: names of the entries of a menu, one for every pattern of the pattern; empty without a menu.
        notes: what to know.
    """

    model: LabModel
    height: int
    width: int
    layout: Layout
    attention: str = ""
    acting: Method | None = None
    pattern: Pattern | None = None
    why: str = ""
    density: float | None = None
    groups: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def look(
    model_key: str,
    name: str,
    values: Mapping[str, str],
    *,
    height: int,
    width: int,
    text: int | None = None,
    frames: int | None = None,
    layer: int = 0,
    moment: float = 0.5,
) -> View:
    """What a method or pattern does.

    Args:
        model_key: of `lab_models`; name: a method or pattern; values: its settings as text, see `settings_of`.
        height, width: pixels; text: tokens; frames: of a clip; what is left out is the model's.
        layer: number of the attention layer; moment: of the run, from 0 (first step) to 1 (last step).

    Raises:
        ConfigError: a size or setting that is not allowed.
    """
    model = lab_model(model_key)
    text = model.text if text is None else text
    frames = model.frames if frames is None else frames
    layout = model.layout(height, width, text=text, frames=frames)
    _within("layer", layer, 0, model.layers - 1, "counted from 0")
    view = View(model, height, width, layout, notes=_cut_note(model, layout, height, width))
    if is_pattern(name):
        chosen = pattern_of(name, values).clamped(layout.grid)
        joined = chosen if isinstance(chosen, patterns.Radial) or len(layout.segments) == 1 else chosen | Text()
        joined.bind(layout)  # refuses settings that do not fit the grid
        return _with_menu(replace(view, pattern=joined), None, None)
    view = replace(view, attention=attention_text(name, values))
    try:
        return _of_method(view, layer, round(moment * (STEPS - 1)))
    except ConfigError as error:  # it does not fit the model or the size, and says so
        return replace(view, why=str(error))


def _cut_note(model: LabModel, layout: Layout, height: int, width: int) -> tuple[str, ...]:
    if model.arch is None or model.level is not None:
        return ()
    multiple = model.arch.multiple
    cut = tuple(axis * multiple for axis in layout.grid[1:])
    if cut == (height, width):
        return ()
    return (f"{width}x{height} is cut to {cut[1]}x{cut[0]}: sides are multiples of {multiple} pixels",)


def _of_method(view: View, layer: int, step: int) -> View:
    model, layout, name = view.model, view.layout, view.attention
    if name == "auto" and model.info is not None:
        name = _auto(model.info, view.height, view.width)
        if name == "dense":
            most = model.info.dense_below
            return replace(view, why=f"auto runs dense up to {most:,} picture tokens, where there is little to save")
        view = view if name == "auto" else replace(view, notes=(*view.notes, f"auto takes {name} here"))
    method = parse_method(name)
    if method.casts or isinstance(method, SubjectMethod):
        why = f"{method.name} lets pictures of a batch see each other; who sees whom depends on the subjects of a run."
        return replace(view, why=why)
    if method.part(model.family.name) == "cross":
        return replace(view, why=f"{method.name} acts on the attention from picture to text, which is not drawn here.")
    method = _settled(method, model)
    place = model.place(layer)
    recorded = _anchors(method, layout) if method.records else ()
    coarseness = model.family.coarseness(model.role) if model.level is not None else 1
    at = At(
        kind=method.kind(place),
        role=model.role,
        step=step,
        steps=STEPS,
        layout=layout,
        coarseness=coarseness,
        recorded=recorded,
    )
    active = method.active(at)
    if isinstance(active, Dense):
        return replace(view, why=f"This layer runs dense at this moment: {active.reason}")
    acting, at = active
    view = replace(view, acting=acting)
    reason = acting.why_not(layout, model.role)
    if reason is not None:
        return replace(view, why=f"It runs dense here: {reason}")
    what = acting.pattern(layout, at)
    if isinstance(what, Dense):
        return replace(view, why=f"This layer runs dense at this moment: {what.reason}")
    if isinstance(what, RoutedPattern):
        from gensparse.plan import build_plan

        why = (
            f"{acting.name} chooses its keys at run time, from the queries and keys of every call, so no picture holds "
            "for all of them."
        )
        return replace(view, why=why, density=build_plan(what, layout).density)
    if not isinstance(what, Pattern):
        known = getattr(what, "density", None)
        why = f"{acting.name} is an operator: it computes attention in several calls of its own instead of one mask."
        return replace(view, why=why, density=None if known is None else known(layout))
    return _with_menu(replace(view, pattern=what), acting.heads(at, model.heads), model.heads)


def _auto(info: ModelInfo, height: int, width: int) -> str:
    """What Generate takes for "auto" in a stage of this size."""
    from gensparse.engine.resolve import attention_at
    from gensparse.engine.values import Resolved
    from gensparse.request import GenerateRequest

    request = GenerateRequest(model=info.alias, prompt="-")
    return attention_at(Resolved(request, info, height, width, "cpu", "fp32"), height, width)


def _settled(method: Method, model: LabModel) -> Method:
    """The method with what it leaves to the model filled in; weights are never looked for."""
    subject = Subject(model.family.name, _sketch(model), model.native_tokens)  # type: ignore[arg-type]
    if isinstance(method, MswMsa):  # the windows alone; what hidiffusion does besides needs the UNet itself
        return MswMsa.resolved(method, subject)
    try:
        return method.resolved(subject)
    except (AttributeError, KeyError, TypeError):  # a sketch has no modules
        raise ConfigError(f"{method.name} looks into the model itself, which is not loaded here.") from None


def _sketch(model: LabModel) -> Any:
    """Stands for the denoiser where a method only asks for its class, its folder and the names of its modules."""

    class Sketch:
        config = SimpleNamespace(_name_or_path=_folder(model))

        def named_modules(self) -> list[tuple[str, None]]:
            return [(name, None) for name in model.sites]

    Sketch.__name__ = model.model_class
    return Sketch()


def _folder(model: LabModel) -> str:
    """Where the model's profile lies; "" without one."""
    return str(Path(model.info.profile).parent) if model.info is not None and model.info.profile else ""


def _anchors(method: Method, layout: Layout) -> tuple[Segment, ...]:
    """What a method that records would have recorded: a picture smaller by its ratio."""
    rows, columns = (max(1, side // getattr(method, "ratio", 4)) for side in layout.grid[1:])
    return (Segment("reference", rows * columns, (1, rows, columns), ANCHORS),)


def _with_menu(view: View, heads: Sequence[int] | None, count: int | None) -> View:
    assert view.pattern is not None, "asked for only with a pattern"
    groups = view.pattern.bind(view.layout).groups
    if groups == 1:
        return view
    names = []
    for entry in range(groups):
        own = [number for number, chosen in enumerate(heads or ()) if chosen == entry]
        of = f" ({_ranges(own)} of {count})" if own else " (no head in this layer)" if heads else ""
        names.append(f"{entry + 1} of {groups}{of}")
    return replace(view, groups=tuple(names))


def _ranges(numbers: Sequence[int]) -> str:
    """[1, 2, 3, 7] as "heads 1-3, 7"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    text = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
    return f"head{'s' if len(numbers) > 1 else ''} {text}"


# ------------------------------------------------------------------------------------------------------------- pictures
def scale_for(grid: Grid) -> int:
    """Pixels of a token, so that a picture or the frames of a clip fit a page."""
    room = 480 if grid[0] == 1 else 240
    return max(1, min(24, round(room / max(grid[1:]))))


def centre(grid: Grid) -> Grid:
    """The token in the middle."""
    frames, rows, columns = (axis // 2 for axis in grid)
    return frames, rows, columns


def sight(view: View, query: Grid | None = None, group: int = 0) -> "Drawing":
    """The picture of what a query sees, and how many keys; a query outside the grid moves inside.

    Raises:
        ConfigError: a view without a pattern.
    """
    from gensparse.patterns.draw import drawn

    if view.pattern is None:
        raise ConfigError(view.why or "there is nothing to draw")
    grid = view.layout.grid
    place = tuple(min(max(0, int(at)), n - 1) for at, n in zip(query or centre(grid), grid, strict=True))
    entry = group if 0 <= group < max(1, len(view.groups)) else 0
    return drawn(view.pattern, view.layout, place, group=entry, scale=scale_for(grid), bare=True)


def token_under(grid: Grid, x: int, y: int) -> Grid | None:
    """(frame, row, column) of the token at a pixel of `sight`'s picture; None beside the target."""
    from gensparse.patterns.draw import token_at

    return token_at(grid, scale_for(grid), int(x), int(y))


# ----------------------------------------------------------------------------------------------------------------- cost
@dataclass(frozen=True)
class Row:
    """One line of the comparison; `source` says how it is known."""

    what: str
    dense: str
    sparse: str
    source: str


@dataclass(frozen=True)
class Cost:
    """Dense against sparse, for one call of the model.

    Args:
        tokens, keys: of a call, keys with the extra ones.
        density: share of all pairs that a query sees, mean over the menu; visited: that is computed, in whole tiles.
        q_tile, k_tile: tokens (F, H, W) of a tile; None where no plan is made beforehand.
        rows: lines for a table.
        notes: what is measured and what is derived.
    """

    tokens: int
    keys: int
    density: float
    visited: float | None
    q_tile: Grid | None
    k_tile: Grid | None
    rows: tuple[Row, ...]
    notes: tuple[str, ...]


_COUNTED, _DERIVED, _MEASURED = "counted", "derived", "derived from measured speed"


def cost(view: View, *, rates: "Rates | None" = None, dtype: str = "bf16", device: str = "") -> Cost | None:
    """What a call of the model costs, dense and with this attention; None where nothing is known.

    Times are those of `gensparse plan`: the same function, on a run of one step.

    Args:
        rates: speed of the machine; None leaves times out.
        dtype: of the numbers; device: what the speed was measured on, for the notes.

    Raises:
        PlanTooLargeError: lists of tiles that pass their limits.
    """
    tokens = view.layout.tokens
    if view.pattern is None:
        if view.density is None:
            return None
        rows, notes = _rows(view, view.density, None, rates, dtype, device)
        return Cost(tokens, tokens, view.density, None, None, None, rows, notes)
    from gensparse.plan import build_plan

    plan = build_plan(view.pattern, view.layout)
    stats = plan.stats()
    visited = stats["visited_pairs"] / (tokens * plan.keys)
    rows, notes = _rows(view, stats["density"], visited, rates, dtype, device, stats["bytes"], plan.keys)
    return Cost(tokens, plan.keys, stats["density"], visited, stats["q_tile"], stats["k_tile"], rows, notes)


def _rows(
    view: View,
    density: float,
    visited: float | None,
    rates: "Rates | None",
    dtype: str,
    device: str,
    lists: int | None = None,
    keys: int | None = None,
) -> tuple[tuple[Row, ...], tuple[str, ...]]:
    from gensparse.estimate import DTYPE_BYTES, StageShape, estimate, format_bytes, format_seconds

    tokens, arch = view.layout.tokens, view.model.arch
    pairs = tokens * (keys or tokens)
    out = [
        Row("tokens", f"{tokens:,}", f"{tokens:,}" + _extra(keys, tokens), _COUNTED),
        Row("query-key pairs that are seen", _count(tokens**2), f"{_count(density * pairs)} ({density:.2%})", _COUNTED),
    ]
    if visited is not None:
        computed = f"{_count(visited * pairs)} ({visited:.2%})"
        out.append(Row("pairs that are computed, in whole tiles", _count(tokens**2), computed, _COUNTED))
    if lists is not None:
        size = format_bytes(lists) if lists >= 1 << 20 else f"{lists / 1024:.0f} KiB"
        out.append(Row("lists of tiles, once for all layers", "none", size, _COUNTED))
    if arch is None:
        known = ", ".join(model.key for model in lab_models().values() if model.arch is not None)
        return tuple(out), (f"FLOP, memory and time need the sizes of a model; they are known of {known}.",)
    each, from_sizes = DTYPE_BYTES[dtype], f"{_DERIVED}, {dtype}"
    own = format_bytes(4 * tokens * arch.width * each)
    out.append(Row("queries, keys, values and output of a layer", own, own, from_sizes))
    scores = view.model.heads * tokens**2 * each
    kept = format_bytes(scores * (density if visited is None else visited) * pairs / tokens**2)
    out.append(Row("scores of a layer, which fused kernels never store", format_bytes(scores), kept, from_sizes))
    picture = math.prod(view.layout.grid)
    shape = StageShape(view.height, view.width, 1)
    both = [
        estimate(arch, [part], n_text=tokens - picture, dtype=dtype, rates=rates).stages[0]
        for part in (shape, replace(shape, attention=view.attention or "pattern", density=density))
    ]
    flops = [_work(stage.attention_flops) for stage in both]
    out.append(Row("work of attention, all layers", flops[0], flops[1], _DERIVED))
    total = [_work(stage.linear_flops + stage.attention_flops) for stage in both]
    out.append(Row("work of one call of the model", total[0], total[1], _DERIVED))
    if rates is None:
        return tuple(out), ()
    times = [format_seconds(stage.attention_flops / rates.attention) for stage in both]
    out.append(Row("time of attention", times[0], times[1], _MEASURED))
    times = [format_seconds(stage.seconds or 0.0) for stage in both]
    out.append(Row("time of one call of the model", times[0], times[1], _MEASURED))
    note = (
        f"Measured on {device or 'this machine'} in {dtype}: how fast a linear layer and dense attention of the "
        "model's width run. Times are derived from it as gensparse plan does: work divided by speed. They assume "
        "that sparse attention computes a pair as fast as dense attention; whole tiles, short lists and kernels that "
        "are not tuned for this machine make it slower."
    )
    return tuple(out), (note,)


def _extra(keys: int | None, tokens: int) -> str:
    return f" and {keys - tokens:,} extra keys" if keys and keys > tokens else ""


def _work(flops: float) -> str:
    """FLOP as TFLOP or PFLOP."""
    return f"{flops / 1e12:.3g} TFLOP" if flops < 1e15 else f"{flops / 1e15:.3g} PFLOP"


def _count(number: float) -> str:
    """1234567 as 1.23 M."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:,.0f}"


def speeds(model: LabModel, device: str = "auto") -> tuple["Rates | None", str, str]:
    """(speed of this machine on a model's shapes, dtype, device), measured once per process in about 0.2 s.

    The speed is None for a model whose sizes are not known.
    """
    from gensparse.engine.machine import pick_device, pick_dtype
    from gensparse.estimate import calibrate

    device = pick_device(device)
    dtype = pick_dtype("auto", device)
    if model.arch is None:
        return None, dtype, device
    return calibrate(device, dtype, model.arch.width, model.arch.head_dim), dtype, device


# -------------------------------------------------------------------------------------------------------------- profile
def profile_of(model: LabModel) -> Profile | None:
    """The measured attention profile in the model's folder, if there is one."""
    path = None if model.info is None else model.info.profile
    return None if path is None else Profile.load(path)


def grid_names(profile: Profile) -> list[str]:
    """The measured sizes of a profile."""
    return [_grid_name(entry.grid) for entry in profile.grids]


def chart(profile: Profile, grid_name: str | None = None, *, error: bool = False) -> list[dict[str, Any]]:
    """Points of a chart: {"layer", "window", "value"}, means over the heads of a layer.

    Args:
        grid_name: one of `grid_names`; the largest by default.
        error: the error of the output instead of the share of attention that a window keeps.
    """
    names = grid_names(profile)
    entry = profile.grids[names.index(grid_name) if grid_name in names else -1]
    points = []
    for number, layer in enumerate(entry.layers):
        for window, heads in enumerate(zip(*(layer.error if error else layer.kept), strict=True)):
            point = {"layer": _layer_name(number, layer.name), "window": _window_name(entry, window)}
            points.append({**point, "value": sum(heads) / len(heads)})
    return points


def _grid_name(grid: Grid) -> str:
    return " x ".join(str(n) for n in grid[0 if grid[0] > 1 else 1 :]) + " tokens"


def _window_name(entry: GridProfile, window: int) -> str:
    rows, columns = (2 * radius + 1 for radius in entry.windows[window][1:])
    return f"{rows} x {columns}"


def _layer_name(number: int, name: str) -> str:
    """transformer_blocks.0.attn as "00 double 0": numbered, so that charts keep the order."""
    match = re.search(r"(single_)?transformer_blocks\.(\d+)", name)
    kind = f"{'single' if match[1] else 'double'} {match[2]}" if match else name
    return f"{number:02d} {kind}"


# --------------------------------------------------------------------------------------------------------------- Python
def python_code(view: View, query: Grid | None = None, group: int = 0) -> str:
    """The same in Python, ready to run (where a pipeline is needed it is called `pipe`)."""
    blocks = []
    if view.attention:
        blocks += [_apply_code(view)]
    if view.pattern is not None:
        blocks += [_draw_code(view, query, group)]
    return "\n\n".join(blocks) + "\n"


def _apply_code(view: View) -> str:
    # what auto takes for the model here
    taken = view.acting if view.attention == "auto" else None
    method = taken or parse_method(view.attention)
    if isinstance(method, Auto):
        method = Method.from_dict(method.to_dict())
    value, names = _value_code(method)
    return "\n".join(
        [
            "import gensparse",
            f"from gensparse.methods import {', '.join(sorted(names))}",
            "",
            f"handle = gensparse.apply(pipe, {value})  # pipe: a diffusers pipeline",
            "# pictures are made here",
            "handle.remove()",
        ]
    )


def _value_code(method: Method) -> tuple[str, set[str]]:
    """A method as Python with what is not a default, and the names to import."""
    names = {type(method).__name__}
    items = []
    for item in fields(method):
        value = getattr(method, item.name)
        if not item.init or value == item.default:
            continue
        names |= _methods_in(value)
        items.append(f"{item.name}={value!r}")
    return f"{type(method).__name__}({', '.join(items)})", names


def _methods_in(value: Any) -> set[str]:
    if isinstance(value, Method):
        return {type(value).__name__}
    return set().union(*map(_methods_in, value)) if isinstance(value, tuple) else set()


def _draw_code(view: View, query: Grid | None, group: int) -> str:
    text = repr(view.pattern)
    names = sorted({word for word in re.findall(r"\b[A-Z]\w+", text) if word in patterns.__all__})
    layout, extra = _layout_code(view.layout)
    grid = view.layout.grid
    place = tuple(query or centre(grid))[0 if grid[0] > 1 else 1 :]
    menu = f", group={group}" if group else ""
    return "\n".join(
        [
            f"from gensparse import {', '.join(sorted({'Layout', 'build_plan', *extra}))}",
            f"from gensparse.patterns import {', '.join(names)}",
            "",
            f"layout = {layout}",
            f"pattern = {text}",
            "print(build_plan(pattern, layout).stats())",
            f'pattern.draw(layout, {place}, scale={scale_for(grid)}{menu}).save("sight.png")',
        ]
    )


def _layout_code(layout: Layout) -> tuple[str, set[str]]:
    """A layout as Python, and further names to import."""
    text = sum(segment.length for segment in layout.segments if segment.kind == "text")
    for first in (True, False):
        if Layout.joint(layout.grid, text=text, text_first=first) == layout:
            words = f", text={text}, text_first={first}" if text else ""
            return f"Layout.joint({layout.grid}{words})", set()
    return repr(layout), {"Segment"}


def _within(name: str, value: Any, low: int, high: int, unit: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ConfigError(f"{name}={value!r} is not allowed here; give a whole number from {low} to {high} ({unit}).")
