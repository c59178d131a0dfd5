"""Methods: published ways to make attention sparse, by name."""

from collections.abc import Mapping
from typing import Any

from gensparse.errors import ConfigError, unknown_name
from gensparse.methods.agentsd import AgentSD
from gensparse.methods.auto import Auto
from gensparse.methods.base import START, At, Dense, Loaded, Method, Place, Recording, Subject
from gensparse.methods.biformer import BiFormer
from gensparse.methods.clear import Clear
from gensparse.methods.cosmos_sparse import CosmosSparse
from gensparse.methods.double_window import DoubleWindow
from gensparse.methods.freescale import FreeScale
from gensparse.methods.freeswim_window import FreeSwimWindow
from gensparse.methods.hidiffusion import HiDiffusion
from gensparse.methods.hilo import HiLo
from gensparse.methods.long_distance import LongDistance
from gensparse.methods.msw_msa import MswMsa
from gensparse.methods.neighborhood import Neighborhood
from gensparse.methods.proxy import Proxy
from gensparse.methods.psa import PSA
from gensparse.methods.radial import Radial
from gensparse.methods.scale_dit import ScaleDiT
from gensparse.methods.schedule import Schedule
from gensparse.methods.sliding_window import SlidingWindow

METHODS: dict[str, type[Method]] = {
    "agentsd": AgentSD,
    "auto": Auto,
    "biformer": BiFormer,
    "clear": Clear,
    "cosmos_sparse": CosmosSparse,
    "double_window": DoubleWindow,
    "freescale": FreeScale,
    "freeswim_window": FreeSwimWindow,
    "hidiffusion": HiDiffusion,
    "hilo": HiLo,
    "long_distance": LongDistance,
    "msw_msa": MswMsa,
    "neighborhood": Neighborhood,
    "proxy": Proxy,
    "psa": PSA,
    "radial": Radial,
    "scale_dit": ScaleDiT,
    "schedule": Schedule,
    "sliding_window": SlidingWindow,
}

__all__ = [
    "METHODS",
    "PSA",
    "START",
    "AgentSD",
    "At",
    "Auto",
    "BiFormer",
    "Clear",
    "CosmosSparse",
    "Dense",
    "DoubleWindow",
    "FreeScale",
    "FreeSwimWindow",
    "HiDiffusion",
    "HiLo",
    "Loaded",
    "LongDistance",
    "Method",
    "MswMsa",
    "Neighborhood",
    "Place",
    "Proxy",
    "Radial",
    "Recording",
    "ScaleDiT",
    "Schedule",
    "SlidingWindow",
    "Subject",
    "as_method",
    "method_class",
    "parse_method",
]


def method_class(name: Any) -> type[Method]:
    """The class of a method.

    Raises:
        ConfigError: no method of that name; the nearest one is suggested.
    """
    if not isinstance(name, str) or name not in METHODS:
        raise ConfigError(unknown_name("method", str(name), METHODS))
    return METHODS[name]


def parse_method(text: str) -> Method:
    """A method from "name" or "name:key=value,key=value"; sizes per axis as 80x80, flags as true or false, none.

    Raises:
        ConfigError: an unknown name or setting, a value that is not allowed, or text of another form.
    """
    name, _, rest = text.strip().partition(":")
    settings: dict[str, Any] = {"method": name.strip()}
    own = method_class(name.strip()).read_text(rest)
    if own is not None:
        return Method.from_dict({**settings, **own})
    for item in filter(None, (part.strip() for part in rest.split(","))):
        key, equals, value = (part.strip() for part in item.partition("="))
        if not equals or not key or not value:
            raise ConfigError(f"{item!r} in {text!r} is not a setting; write name:key=value,key=value.")
        if key in settings or key == "version":
            raise ConfigError(f"{key!r} may stand only once in {text!r} and must be a setting of the method.")
        settings[key] = _value(value)
    return Method.from_dict(settings)


def as_method(method: Method | str | Mapping[str, Any]) -> Method:
    """A method given as a value, as text ("clear:radius=16") or as the dict of `Method.to_dict`.

    Raises:
        ConfigError: anything else, or text or data that names no method.
    """
    if isinstance(method, Method):
        return method
    if isinstance(method, str):
        return parse_method(method)
    if isinstance(method, Mapping):
        return Method.from_dict(method)
    raise ConfigError(f"method={method!r} is not a method; pass Clear(radius=16), 'clear:radius=16' or its dict.")


def _value(text: str) -> Any:
    """true, none, 16, 80x80, 1.5; anything else stays text, which the method then refuses by name."""
    parts = [_WORDS[part] if part in _WORDS else _number(part) for part in text.lower().split("x")]
    if any(isinstance(part, str) for part in parts):
        return text
    return parts[0] if len(parts) == 1 else tuple(parts)


_WORDS = {"true": True, "false": False, "none": None}


def _number(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
