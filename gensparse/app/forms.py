"""From what a visitor sent to a request: every value is checked here, whatever the page allowed him to type.

Values arrive as JSON: from widgets, or from anybody who can write an HTTP request.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gensparse.app.settings import Limits, Settings
from gensparse.errors import ConfigError, short, unknown_name
from gensparse.highres.ways import parse_way
from gensparse.request import CustomizeRequest, GenerateRequest, Request, UpscaleRequest, parse_size

SHARED_FIELDS = (
    "prompt",
    "negative_prompt",
    "model",
    "size",
    "attention",
    "dense_steps",
    "steps",
    "guidance",
    "seed",
    "num_images",
    "highres",
)
FIELDS = {
    GenerateRequest.kind: SHARED_FIELDS,
    UpscaleRequest.kind: (*SHARED_FIELDS, "strength", "faithful"),
    CustomizeRequest.kind: (*SHARED_FIELDS, "subject_method"),
}
"""What a visitor may decide, by kind of request."""

FILLED = {**FIELDS, CustomizeRequest.kind: (*FIELDS[CustomizeRequest.kind], "subject", "subject_prompt", "layout")}
"""What settings out of a picture may fill; of subjects their names, words and places, never files."""

LOCAL_FIELDS = ("lora",)
"""What only the person at this machine may decide: it names files."""

REFUSED = (
    "token",
    "trust_remote_code",
    "output",
    "output_dir",
    "device",
    "revision",
    "variant",
    "max_vram",
    "image",
    "mask",
)
"""What nobody decides through the page."""


def models_here() -> list[str]:
    """Models of the registry whose files are on this machine, the embedded one first."""
    from huggingface_hub import try_to_load_from_cache

    from gensparse.embedded import is_shipped
    from gensparse.models import REGISTRY

    def present(alias: str, hub_id: str | None) -> bool:
        if hub_id is None:
            return is_shipped(alias)
        return isinstance(try_to_load_from_cache(hub_id, "model_index.json"), str)

    return [info.alias for info in REGISTRY.values() if present(info.alias, info.hub_id)]


def generate_request(values: Mapping[str, Any], settings: Settings) -> GenerateRequest:
    """A checked request. Raises ConfigError with one sentence for the first value that is not allowed."""
    return GenerateRequest(**_checked(GenerateRequest, values, settings))


def upscale_request(
    values: Mapping[str, Any], settings: Settings, image: Path, size: tuple[int, int]
) -> UpscaleRequest:
    """A checked request for a picture of `size` = (height, width) that was uploaded. Raises ConfigError."""
    checked = _checked(UpscaleRequest, values, settings)
    request = UpscaleRequest(**checked, image=str(image))
    _check_result(parse_size(request.size or "2x").resolve(base=size, multiple=1)[0], settings.limits)
    return request


def customize_request(values: Mapping[str, Any], settings: Settings, subjects: Mapping[str, Any]) -> CustomizeRequest:
    """A checked request with the subjects that `cast.read` gave. Raises ConfigError."""
    return CustomizeRequest(**_checked(CustomizeRequest, values, settings), **subjects)


def subject_methods() -> tuple[str, ...]:
    """Names of the methods for subjects."""
    from gensparse.pipelines.customize import ALIASES, AUTO, COMPOSED, INVERTED, NOISED, WORDED

    short_names = {name: alias for alias, name in ALIASES.items()}
    return tuple(short_names.get(name, name) for name in (AUTO, *NOISED, *INVERTED, *COMPOSED, *WORDED))


def _checked(cls: type[Request], values: Mapping[str, Any], settings: Settings) -> dict[str, Any]:
    limits, allowed = settings.limits, FIELDS[cls.kind] + (() if settings.shared else LOCAL_FIELDS)
    for name in values:
        if name in REFUSED or (settings.shared and name in LOCAL_FIELDS):
            raise ConfigError(f"{name} is not accepted by this page; use the command line on the machine itself")
        if name not in allowed:
            raise ConfigError(unknown_name("field", str(name), allowed))
    given = {name: value for name, value in values.items() if value is not None and value != ""}
    out: dict[str, Any] = {"device": settings.device, "local_files_only": True}
    for name in ("prompt", "negative_prompt"):
        if name in given:
            out[name] = checked_text(name, given[name], limits.prompt)
    for name, low, high in _whole_numbers(limits):
        if name in given:
            out[name] = whole(name, given[name], low, high)
    if "seed" in out:
        out["seed"] = (out["seed"],)
    for name, high in (("guidance", limits.guidance), ("strength", 1.0)):
        if name in given:
            out[name] = _real(name, given[name], 0.0, high)
    if "highres" in given:
        out["highres"] = _way(given["highres"], settings)
    if "faithful" in given:
        out["faithful"] = given["faithful"]
    if "size" in given:
        out["size"] = checked_text("size", given["size"], 40)
    out["model"] = _model(given.get("model", "embedded"), settings)
    out["attention"] = _attention(given.get("attention", "auto"), settings)
    if "subject_method" in given:
        out["subject_method"] = _subject_method(given["subject_method"], settings)
    if "lora" in given:
        out["lora"] = _lora(given["lora"])
    if cls is not UpscaleRequest:
        _check_result(size_asked(out), limits)
    return out


def _whole_numbers(limits: Limits) -> tuple[tuple[str, int, int], ...]:
    return (
        ("steps", 1, limits.steps),
        ("seed", 0, limits.seed),
        ("num_images", 1, limits.images),
        ("dense_steps", 0, limits.steps),
    )


def size_asked(values: Mapping[str, Any]) -> tuple[int, int]:
    """(height, width) before it is rounded; models that are not of the registry count as 1024 pixels wide."""
    from gensparse.models import REGISTRY

    info = REGISTRY.get(values["model"])
    native = info.native_size if info else 1024
    return parse_size(values.get("size") or "1x").resolve(base=(native, native), multiple=1)[0]


def _check_result(size: tuple[int, int], limits: Limits) -> None:
    height, width = size
    if max(size) > limits.side:
        raise ConfigError(
            f"the result would be {width}x{height}; this server makes at most {limits.side} pixels a side"
        )


def _model(value: object, settings: Settings) -> str:
    """A model that is on this machine; a folder only where nobody else can reach the server."""
    name, known = checked_text("model", value, 200), models_here()
    if name in known:
        return name
    from gensparse.models import REGISTRY, looks_like_path

    if "://" in name:
        raise ConfigError("model is an address, which is not fetched; choose a model that is on this machine")
    if not settings.shared and looks_like_path(name):
        return name
    if name.lower() in REGISTRY:
        raise ConfigError(f"model {name!r} is not on this machine; fetch it once with `gensparse generate -m {name}`")
    raise ConfigError(unknown_name("model", name, known))


def _attention(value: object, settings: Settings) -> str:
    """A method that exists, without files on a shared server."""
    from gensparse.engine.resolve import check_attention

    text = checked_text("attention", value, settings.limits.attention).strip()
    if settings.shared:
        _refuse_files("attention", text)
    check_attention(text)
    return text


def _subject_method(value: object, settings: Settings) -> str:
    """A method for subjects, without files on a shared server; whether there is one of that name, planning says."""
    from gensparse.methods import METHODS
    from gensparse.pipelines.customize import ALIASES

    text = checked_text("subject_method", value, settings.limits.attention).strip()
    name, colon, rest = text.partition(":")
    name = ALIASES.get(name.strip(), name.strip())
    if settings.shared and name in METHODS:
        _refuse_files("subject_method", name + colon + rest)
    return text


def _refuse_files(field: str, text: str) -> None:
    """Raise ConfigError for a method that names files, before one is made of it, which may open them."""
    from gensparse.engine.reuse import without_files

    _, files = without_files(text)
    if files:
        raise ConfigError(f"{field} names a file ({', '.join(files)}), which this page does not open; leave it out")


def _way(value: object, settings: Settings) -> str:
    """A way to large sizes, without files on a shared server."""
    text = checked_text("highres", value, settings.limits.attention)
    if settings.shared and ("/" in text or "\\" in text):
        raise ConfigError("highres names a file, which this page does not open; leave it out")
    parse_way(text)
    return text


def _lora(value: object) -> tuple[str, ...]:
    """LoRA files of this machine; nothing is looked for elsewhere."""
    from gensparse.engine.loading import check_lora, parse_lora

    items = value if isinstance(value, list | tuple) else str(value).splitlines()
    out = tuple(checked_text("lora", item, 1000).strip() for item in items if str(item).strip())
    check_lora(out)
    for item in out:
        if not Path(parse_lora(item)[0]).is_file():
            raise ConfigError(f"lora {short(item)} is no file on this machine; give PATH or PATH:SCALE")
    return out


# ------------------------------------------------------------------------------------------------------- single values
def checked_text(name: str, value: object, most: int) -> str:
    if not isinstance(value, str):
        raise ConfigError(f"{name} is {short(value)}; give text")
    if len(value) > most:
        raise ConfigError(f"{name} has {len(value)} characters, this server reads at most {most}; shorten it")
    return value


def _number(name: str, value: object, low: float, high: float) -> float:
    """A finite number; text that is one counts, because older clients send text."""
    wrong = ConfigError(f"{name} is {short(value)}; give a number from {low:.15g} to {high:.15g}")
    if isinstance(value, bool) or not isinstance(value, int | float | str) or len(str(value)) > 40:
        raise wrong
    try:
        number = value if isinstance(value, int) else float(value)
    except ValueError:
        raise wrong from None
    if not math.isfinite(number) or not low <= number <= high:
        raise wrong
    return number


def whole(name: str, value: object, low: int, high: int) -> int:
    number = _number(name, value, low, high)
    if number != int(number):
        raise ConfigError(f"{name} is {short(value)}; give a whole number from {low} to {high}")
    return int(number)


def _real(name: str, value: object, low: float, high: float) -> float:
    return float(_number(name, value, low, high))
