"""From flags to a request: a file or preset to start from, then what was typed."""

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gensparse.cli.options import OUTPUT_OPTIONS
from gensparse.cli.state import STATE
from gensparse.errors import ConfigError, short
from gensparse.request import MAX_PROMPT_CHARS, CustomizeRequest, GenerateRequest, Request, UpscaleRequest

_NOT_FIELDS = ("width", "height", "config", "from_file", "preset", "save_preset", *OUTPUT_OPTIONS)


def generate_request(flags: Mapping[str, Any], prompt: str | None) -> GenerateRequest:
    """The request of `generate` and `plan`."""
    return _build(GenerateRequest, flags, prompt, {})


def upscale_request(flags: Mapping[str, Any], prompt: str | None, image: Path) -> UpscaleRequest:
    """The request of `upscale` for one picture."""
    return _build(UpscaleRequest, flags, prompt, {"image": str(image)})


PLACED = ("regional", "multidiffusion")
"""Methods whose subjects are words in places: a layout says all of them."""


def customize_request(
    flags: Mapping[str, Any], prompt: str | None, more_prompts: Sequence[str] = ()
) -> CustomizeRequest:
    """The request of `customize`, and of `plan` with subjects."""
    own = {k: v for k, v in flags.items() if k != "layout"}
    given: dict[str, Any] = {"more_prompts": [repair(text) for text in more_prompts]} if more_prompts else {}
    if "layout" in flags:
        from gensparse.subjects.naming import layout_names, read_layout

        given["layout"] = read_layout(flags["layout"])
        if "subject" not in flags and flags.get("subject_method", "").partition(":")[0] in PLACED:
            own["subject"] = layout_names(given["layout"])
    return _build(CustomizeRequest, own, prompt, given)


def _build(cls: type[Request], flags: Mapping[str, Any], prompt: str | None, own: dict[str, Any]) -> Any:
    values = {k: v for k, v in _start(cls, flags).items() if k in cls.__dataclass_fields__}
    values |= {k: v for k, v in flags.items() if k not in _NOT_FIELDS} | own
    if "seed" in flags or "num_images" in flags:
        values["num_images"] = flags.get("num_images", 1)
    if prompt is not None:
        values["prompt"] = repair(prompt)
    if "negative_prompt" in values:
        values["negative_prompt"] = repair(values["negative_prompt"])
    if "width" in flags or "height" in flags:
        values["size"] = _sides(flags)
    if "config" in flags:
        from gensparse.engine.presets import read_object
        from gensparse.methods.describe import method_text

        values["attention"] = method_text(read_object(flags["config"]))
    if "regions" in flags:
        values["regions"] = _regions(flags["regions"])
    if isinstance(values.get("dense_layers"), str):
        values["dense_layers"] = _layers(values["dense_layers"])
    values["local_files_only"] = bool(values.get("local_files_only", False)) or STATE.offline
    values["token"] = os.environ.get("HF_TOKEN") or None
    request = cls.from_dict({"kind": cls.kind, **values})
    if "save_preset" in flags:
        from gensparse.engine.presets import save_preset

        save_preset(flags["save_preset"], request)
    return request


# ---------------------------------------------------------------------------------------------------- where to start
def _start(cls: type[Request], flags: Mapping[str, Any]) -> dict[str, Any]:
    """Values that flags override: from --preset or --from."""
    if "preset" in flags and "from_file" in flags:
        raise ConfigError("--preset and --from are both given; use one of them")
    if "preset" in flags:
        from gensparse.engine.presets import read_preset

        data = read_preset(flags["preset"])
        return {k: v for k, v in data.items() if k not in ("kind", "version")}
    if "from_file" not in flags:
        return {}
    from gensparse.engine.reuse import request_of
    from gensparse.image_io import read_metadata

    metadata = read_metadata(flags["from_file"])
    kind = metadata["request"].get("kind", cls.kind)
    if kind != cls.kind:
        raise ConfigError(f"{flags['from_file'].name!r} was made by {short(kind)}; use the command of that name")
    return request_of(metadata)


# ------------------------------------------------------------------------------------------------------- single flags
def read_prompt(argument: str | None, option: str | None, file: Path | None) -> str | None:
    """The prompt from one of its four places: argument, -p, --prompt-file, or `-` for stdin."""
    given = [item for item in (argument, option, file) if item is not None]
    if len(given) > 1:
        raise ConfigError("the prompt is given more than once; use the argument, -p or --prompt-file")
    if file is not None:
        try:
            with open(file, encoding="utf-8-sig") as source:
                return source.read(MAX_PROMPT_CHARS + 1).strip("\r\n")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
            raise ConfigError(f"cannot read prompt file {file.name!r}: {reason}; give a text file") from error
    text = argument if argument is not None else option
    if text == "-":
        return sys.stdin.read(MAX_PROMPT_CHARS + 1).strip("\r\n")
    return text


def repair(text: str) -> str:
    """Text of a command line whose bytes the locale could not decode, read as UTF-8 where that works."""
    if not any("\ud800" <= letter <= "\udfff" for letter in text):
        return text
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _sides(flags: Mapping[str, Any]) -> str:
    if "size" in flags:
        raise ConfigError("--size is given together with --width or --height; use one of both")
    if "width" not in flags or "height" not in flags:
        raise ConfigError("--width and --height belong together; give both, or --size")
    return f"{flags['width']}x{flags['height']}"


def _regions(path: Path) -> list[Any]:
    """The regions of a file as data."""
    from gensparse.subjects.region_prompts import FORM, read_region_prompts

    found = read_region_prompts(path)
    if not found:
        raise ConfigError(f"regions file {path.name!r} holds no region; give {FORM}")
    return [(*region.box, region.prompt) for region in found]


def _layers(text: str) -> list[int]:
    try:
        return [int(item) for item in text.split(",") if item.strip()]
    except ValueError as error:
        raise ConfigError(f"--dense-layers is {text[:60]!r}; give numbers such as 0,1,-1") from error
