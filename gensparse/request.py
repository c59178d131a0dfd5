"""Requests: one frozen dataclass per job.

The same dictionary is a set of command line flags, a JSON line of a batch, a preset of the app and the `gensparse`
entry in a picture's metadata. Importing this file loads neither torch nor diffusers.
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Self

from gensparse.errors import ConfigError, short, unknown_name
from gensparse.highres.tiling import parse_tiling
from gensparse.highres.ways import parse_way
from gensparse.subjects.naming import (
    Shown,
    check_layout,
    check_names,
    check_pictures,
    parse_prompts,
    parse_subject,
    subject_text,
)

VERSION = 1
MAX_PROMPT_CHARS = 200_000
MAX_SIDE = 65_536
MAX_REGIONS = 1024
MAX_SEED = 2**63 - 1
DTYPES = ("auto", "fp16", "bf16", "fp32")
QUANTIZE = ("auto", "none", "fp8", "int8", "nf4")
OFFLOADS = ("auto", "none", "model", "group", "sequential")
ROUNDING = ("nearest", "up", "strict")
TOGETHER = ("consistory",)  # subject methods that draw several pictures at once
MAX_TOGETHER = 8

SIZE_FORMS = "4096, 3840x2160 (width x height), 4k, 8k, 2x, 16:9@8mp"


# --------------------------------------------------------------------------------------------------------------- size
@dataclass(frozen=True)
class Size:
    """What `--size` said, before a model or a picture is known: pixels, a factor, or an aspect ratio with an area."""

    width: int | None = None
    height: int | None = None
    factor: float | None = None
    aspect: float | None = None
    pixels: float | None = None

    def resolve(
        self, *, base: tuple[int, int], multiple: int = 16, rounding: str = "nearest"
    ) -> tuple[tuple[int, int], str | None]:
        """Return ((height, width), note) in pixels; `base` = (height, width) that a factor multiplies.

        The note says what was rounded. Raises ConfigError when a side is not a multiple and rounding is "strict".
        """
        height, width = self._wanted(base)
        asked = (_whole(height), _whole(width))
        got = (_to_multiple(height, multiple, rounding), _to_multiple(width, multiple, rounding))
        if got == asked:
            return got, None
        said = f"{asked[1]}x{asked[0]}"
        if rounding == "strict":
            near = f"{_to_multiple(width, multiple, 'nearest')}x{_to_multiple(height, multiple, 'nearest')}"
            raise ConfigError(f"size {said} is not a multiple of {multiple} pixels; use {near}, or --round nearest|up")
        return got, f"size {said} rounded to {got[1]}x{got[0]} (multiples of {multiple} pixels)"

    def _wanted(self, base: tuple[int, int]) -> tuple[float, float]:
        if self.factor is not None:
            return base[0] * self.factor, base[1] * self.factor
        if self.aspect is not None and self.pixels is not None:
            return math.sqrt(self.pixels / self.aspect), math.sqrt(self.pixels * self.aspect)
        assert self.height is not None
        assert self.width is not None
        return self.height, self.width


def parse_size(text: str) -> Size:
    """Read 4096 | 3840x2160 | 4k | 2x | 16:9@8mp; raises ConfigError naming these forms."""
    word = str(text).strip().lower().replace("×", "x")
    if match := re.fullmatch(r"(\d{1,6})", word):
        return _pixels(text, int(match[1]), int(match[1]))
    if match := re.fullmatch(r"(\d{1,6})\s*x\s*(\d{1,6})", word):
        return _pixels(text, int(match[2]), int(match[1]))
    if match := re.fullmatch(r"(\d{1,2})k", word):
        return _pixels(text, int(match[1]) * 1024, int(match[1]) * 1024)
    if match := re.fullmatch(r"(\d{1,2}(?:\.\d{1,3})?)x", word):
        return _positive(text, Size(factor=float(match[1])), float(match[1]))
    if match := re.fullmatch(r"(\d{1,4}):(\d{1,4})@(\d{1,4}(?:\.\d{1,3})?)mp", word):
        return _aspect(text, int(match[1]), int(match[2]), float(match[3]) * 1e6)
    raise _bad_size(text)


def _bad_size(text: str, why: str = "is not a size") -> ConfigError:
    return ConfigError(f"size {short(text)} {why}; accepted forms: {SIZE_FORMS}")


def _pixels(text: str, height: int, width: int) -> Size:
    if not (0 < height <= MAX_SIDE and 0 < width <= MAX_SIDE):
        raise _bad_size(text, f"is outside 1 to {MAX_SIDE} pixels per side")
    return Size(width=width, height=height)


def _positive(text: str, size: Size, value: float) -> Size:
    if value <= 0:
        raise _bad_size(text, "is not above zero")
    return size


def _aspect(text: str, across: int, down: int, pixels: float) -> Size:
    if min(across, down) <= 0 or pixels <= 0 or max(across, down) / min(across, down) > 64:
        raise _bad_size(text, "needs a ratio between 1:64 and 64:1 and an area above zero")
    return Size(aspect=across / down, pixels=pixels)


def _whole(value: float) -> int:
    return max(1, math.floor(value + 0.5))


def _to_multiple(value: float, multiple: int, rounding: str) -> int:
    steps = math.ceil(value / multiple - 1e-9) if rounding == "up" else math.floor(value / multiple + 0.5)
    return max(1, steps) * multiple


def parse_bytes(text: str) -> int:
    """Read an amount of memory such as 24GiB, 16GB, 512MiB or a plain number of bytes."""
    match = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,6})?)\s*([kmgt]i?)?b?\s*", str(text).lower())
    if not match or float(match[1]) <= 0:
        raise ConfigError(f"memory {short(text)} is not an amount; write for example 24GiB, 16GB or 512MiB")
    unit = match[2] or ""
    base = 1024 if unit.endswith("i") else 1000
    return int(float(match[1]) * base ** " kmgt".index(unit[:1] or " "))


# ----------------------------------------------------------------------------------------------------------- requests
@dataclass(frozen=True, kw_only=True)
class Request:
    """Fields shared by every job; None (and "auto") leave the choice to the model."""

    kind: ClassVar[str] = ""
    # where and how a picture is computed, not which picture it is
    machine_fields: ClassVar[frozenset[str]] = frozenset({"device", "offload", "max_vram", "local_files_only", "token"})
    # pieces in which it is computed: they are repeated with it, but change no more than the last bits
    piece_fields: ClassVar[frozenset[str]] = frozenset({"tile", "chunk"})
    private_fields: ClassVar[frozenset[str]] = frozenset({"token"})

    prompt: str = ""
    negative_prompt: str = ""
    model: str = "embedded"
    revision: str | None = None
    variant: str | None = None
    dtype: str = "auto"
    lora: tuple[str, ...] = ()
    trust_remote_code: bool = False
    local_files_only: bool = False
    token: str | None = field(default=None, repr=False)
    steps: int | None = None
    guidance: float | None = None
    seed: tuple[int, ...] = ()
    num_images: int = 1
    size: str | None = None
    round: str = "nearest"
    attention: str = "auto"
    highres: str = "auto"  # how sizes beyond the native one are reached, see gensparse.highres.ways
    # prompts of rectangles for c_upscale: (left, top, right, bottom, prompt) in 0..1, see gensparse.subjects
    regions: tuple[tuple[float, float, float, float, str], ...] = ()
    dense_steps: int = 0
    dense_layers: tuple[int, ...] = ()
    offload: str = "auto"
    quantize: str = "auto"
    tile: str = "auto"  # of the autoencoder, see gensparse.highres.tiling
    chunk: int | None = None  # tokens of a feed-forward that are computed at a time; 0 is all
    max_vram: str | None = None
    device: str = "auto"

    def __post_init__(self) -> None:
        self._normalise()
        _check_text("prompt", self.prompt)
        _check_text("negative_prompt", self.negative_prompt)
        for name in ("model", "attention", "device", "highres"):
            _check_word(name, getattr(self, name))
        for name in ("revision", "variant", "token"):
            if getattr(self, name) is not None:
                _check_word(name, getattr(self, name))
        for name in ("trust_remote_code", "local_files_only"):
            _check_bool(name, getattr(self, name))
        self._check_numbers()
        _check_choice("dtype", self.dtype, DTYPES)
        _check_choice("offload", self.offload, OFFLOADS)
        _check_choice("quantize", self.quantize, QUANTIZE)
        _check_choice("round", self.round, ROUNDING)
        if self.size is not None:
            parse_size(self.size)
        parse_way(self.highres)
        object.__setattr__(self, "regions", _checked_regions(self.regions))
        _check_word("tile", self.tile)
        parse_tiling(self.tile)
        if self.max_vram is not None:
            parse_bytes(self.max_vram)

    def _normalise(self) -> None:
        """Accept lists, and a single value, where a tuple is stored (JSON has no tuples)."""
        for name in ("seed", "lora", "dense_layers"):
            object.__setattr__(self, name, _as_tuple(getattr(self, name)))
        for name in ("size", "tile"):
            if isinstance(getattr(self, name), int):
                object.__setattr__(self, name, str(getattr(self, name)))

    def _check_numbers(self) -> None:
        _check_int("num_images", self.num_images, 1, 10_000)
        _check_int("dense_steps", self.dense_steps, 0, 1_000)
        if self.chunk is not None:
            _check_int("chunk", self.chunk, 0, 1 << 24)
        if self.steps is not None:
            _check_int("steps", self.steps, 1, 1_000)
        if self.guidance is not None:
            _check_float("guidance", self.guidance, 0.0, 100.0)
        for seed in self.seed:
            _check_int("seed", seed, 0, MAX_SEED)
        for layer in self.dense_layers:
            _check_int("dense_layers", layer, -10_000, 10_000)
        for lora in self.lora:
            _check_word("lora", lora)

    # -- dictionaries
    def to_dict(self, *, portable: bool = False) -> dict[str, Any]:
        """Return a JSON-able dict; `portable` leaves out machine settings and every folder name."""
        out: dict[str, Any] = {"kind": self.kind, "version": VERSION}
        for item in fields(self):
            if item.name in self.private_fields or (portable and item.name in self.machine_fields):
                continue
            value = getattr(self, item.name)
            out[item.name] = list(value) if isinstance(value, tuple) else value
        return _without_paths(out) if portable else out

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Read what `to_dict` wrote. Raises ConfigError for another kind, a newer version or an unknown key."""
        values = dict(data)
        kind, version = values.pop("kind", cls.kind), values.pop("version", VERSION)
        if kind != cls.kind:
            raise ConfigError(f"request kind is {short(kind)}, expected {cls.kind!r}; use the command of that name")
        if version != VERSION:
            raise ConfigError(f"request version is {short(version)}, this gensparse reads {VERSION}; update gensparse")
        known = [item.name for item in fields(cls)]
        for key in values:
            if key not in known:
                raise ConfigError(unknown_name("request key", str(key), known))
        return cls(**values)

    def key(self) -> str:
        """sha256 of the request without its machine settings and pieces: the same key is the same picture."""
        data = {k: v for k, v in self.to_dict().items() if k not in self.machine_fields | self.piece_fields}
        return hashlib.sha256(json.dumps(data, sort_keys=True, ensure_ascii=True).encode()).hexdigest()

    def replace(self, **changes: Any) -> Self:
        return replace(self, **changes)


@dataclass(frozen=True, kw_only=True)
class GenerateRequest(Request):
    """Text to picture, from the model's own size up to any size."""

    kind: ClassVar[str] = "generate"


@dataclass(frozen=True, kw_only=True)
class UpscaleRequest(Request):
    """One picture to a larger one; `size` defaults to twice the picture."""

    kind: ClassVar[str] = "upscale"

    image: str = ""
    strength: float = 0.3  # share of the noise range that is redone: 0 keeps the picture, 1 starts from noise
    faithful: bool = True  # correct the result until it shrinks to the given picture
    mask: str | None = None  # a picture whose white marks what may change; the rest is enlarged plainly

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_word("image", self.image)
        if self.mask is not None:
            _check_word("mask", self.mask)
        _check_bool("faithful", self.faithful)
        _check_float("strength", self.strength, 0.0, 1.0)


@dataclass(frozen=True, kw_only=True)
class CustomizeRequest(GenerateRequest):
    """Text and subjects to picture: subjects by pictures of them, or by words, as the method takes them."""

    kind: ClassVar[str] = "customize"

    subject: tuple[str, ...] = ()  # NAME=IMAGE[@MASK][,IMAGE[@MASK]...] each, or NAME alone
    layout: tuple[tuple[str, float, float, float, float], ...] = ()  # (name, left, top, right, bottom) in 0..1
    subject_method: str = "auto"
    subject_prompt: tuple[str, ...] = ()  # NAME=TEXT each: of the subject's pictures or region, else its name
    subject_negative: tuple[str, ...] = ()  # NAME=TEXT each: what is not to be in its region, for subjects by words
    more_prompts: tuple[str, ...] = ()  # of further pictures, where the method draws several together

    def _normalise(self) -> None:
        super()._normalise()
        for name in ("subject", "subject_prompt", "subject_negative", "more_prompts"):
            object.__setattr__(self, name, _as_tuple(getattr(self, name)))
        if self.more_prompts and self.num_images == 1:
            object.__setattr__(self, "num_images", len(self.prompts))

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_word("subject_method", self.subject_method)
        for item in self.subject:
            _check_word("subject", item)
        for item in self.subject_prompt:
            _check_text("subject_prompt", item)
        for item in self.subject_negative:
            _check_text("subject_negative", item)
        for item in self.more_prompts:
            _check_text("prompt", item)
        names = list(self.shown)
        if not names:
            raise ConfigError("no subject is given; add --subject NAME=IMAGE for each, or use generate")
        parse_prompts(self.subject_prompt, names)
        parse_prompts(self.subject_negative, names, "negative prompt")
        object.__setattr__(self, "layout", check_layout(self.layout, names))
        self._check_set()

    def _check_set(self) -> None:
        if self.more_prompts and not self.together:
            raise ConfigError(
                f"{len(self.prompts)} prompts are given, and {self.subject_method.partition(':')[0]} draws one picture "
                "at a time; use --subject-method consistory, or --turns"
            )
        if self.more_prompts and max(self.num_images, len(self.seed)) != len(self.prompts):
            raise ConfigError(
                f"{len(self.prompts)} prompts are given and {max(self.num_images, len(self.seed))} pictures are asked "
                "for; give one prompt for all pictures, or one for each"
            )
        if self.together and max(self.num_images, len(self.seed)) > MAX_TOGETHER:
            raise ConfigError(
                f"{max(self.num_images, len(self.seed))} pictures are asked for and all are drawn at once; give at "
                f"most {MAX_TOGETHER}"
            )

    @property
    def shown(self) -> dict[str, tuple[Shown, ...]]:
        """Pictures of every subject, by name; none of those that are given by words alone."""
        items = [parse_subject(item) for item in self.subject]
        check_names([name for name, _ in items])
        check_pictures([len(shown) for _, shown in items])
        return dict(items)

    @property
    def prompts(self) -> tuple[str, ...]:
        """Of all pictures that are drawn together."""
        return (self.prompt, *self.more_prompts)

    @property
    def together(self) -> bool:
        """Whether all pictures are drawn in one call, seeing each other."""
        return self.subject_method.partition(":")[0].strip() in TOGETHER


KINDS: dict[str, type[Request]] = {cls.kind: cls for cls in (GenerateRequest, UpscaleRequest, CustomizeRequest)}


def request_from_dict(data: Mapping[str, Any]) -> Request:
    """Read a request of any kind, as `inspect` and `--from` need it."""
    kind = data.get("kind", GenerateRequest.kind)
    if not isinstance(kind, str) or kind not in KINDS:
        raise ConfigError(unknown_name("request kind", str(kind), list(KINDS)))
    return KINDS[kind].from_dict(data)


# ----------------------------------------------------------------------------------------------------------- checking
def _as_tuple(value: Any) -> tuple[Any, ...]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)


def _checked_regions(items: Any) -> tuple[tuple[float, float, float, float, str], ...]:
    """Regions from the entries of a regions file, or from what this function gave."""
    if items == () or items == []:
        return ()
    from gensparse.subjects.region_prompts import as_region_prompts

    flat = items if isinstance(items, list | tuple) else ()
    named = [_named(item) for item in flat] if flat else items
    found = as_region_prompts(named)
    if len(found) > MAX_REGIONS:
        raise ConfigError(f"{len(found)} regions are given; give at most {MAX_REGIONS}")
    for region in found:
        _check_text("the prompt of a region", region.prompt)
    return tuple((*region.box, region.prompt) for region in found)


def _named(item: Any) -> Any:
    """(left, top, right, bottom, prompt) as an entry of a regions file; anything else as it is."""
    if isinstance(item, list | tuple) and len(item) == 5:
        return {"box": list(item[:4]), "prompt": item[4]}
    return item


def _check_text(name: str, value: object) -> None:
    if not isinstance(value, str):
        raise ConfigError(f"{name} is {short(value)}; give text")
    if "\0" in value:
        raise ConfigError(f"{name} contains a NUL character; remove it")
    if any("\ud800" <= letter <= "\udfff" for letter in value):
        raise ConfigError(f"{name} holds half a character (a lone surrogate); write it as valid UTF-8")
    if len(value) > MAX_PROMPT_CHARS:
        raise ConfigError(f"{name} has {len(value)} characters; at most {MAX_PROMPT_CHARS} are read, shorten it")


def _check_word(name: str, value: object) -> None:
    if not isinstance(value, str) or not value or len(value) > 4096 or "\0" in value:
        raise ConfigError(f"{name} is {short(value)}; give a text of 1 to 4096 characters")


def _check_bool(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise ConfigError(f"{name} is {short(value)}; give true or false")


def _check_choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{name} is {short(value)}; choose one of {', '.join(allowed)}")


def _check_int(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ConfigError(f"{name} is {short(value)}; give a whole number from {low} to {high}")


def _check_float(name: str, value: object, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise ConfigError(f"{name} is {short(value)}; give a number from {low:g} to {high:g}")


# ------------------------------------------------------------------------------------------------------------ privacy
def file_name(path: str) -> str:
    """The last part of a path of any system, without folders."""
    return re.split(r"[\\/]", path.rstrip("\\/"))[-1]


def _without_paths(values: dict[str, Any]) -> dict[str, Any]:
    """Keep hub ids and aliases, but only the file name of anything that is a path."""
    out = dict(values)
    for name in ("model", "image", "mask"):
        if isinstance(out.get(name), str) and (name != "model" or _is_path(out[name])):
            out[name] = file_name(out[name])
    out["lora"] = [file_name(item) if _is_path(item) else item for item in out.get("lora", [])]
    if "subject" in out:
        out["subject"] = [_subject_without_folders(item) for item in out["subject"]]
    for name in ("attention", "subject_method"):  # weights and profiles of methods
        if isinstance(out.get(name), str):
            out[name] = re.sub(r"(?<==)[^=,;]+", lambda m: _without_folders(m[0]), out[name])
    return out


def _subject_without_folders(text: str) -> str:
    name, shown = parse_subject(text)
    return subject_text(name, [Shown(file_name(image), mask and file_name(mask)) for image, mask in shown])


def _without_folders(text: str) -> str:
    return file_name(text) if _is_path(text) else text


def _is_path(text: str) -> bool:
    """True for anything but an alias or an `owner/name` hub id."""
    return bool(re.search(r"\\|^[~./]|^[A-Za-z]:|/.*/", text))
