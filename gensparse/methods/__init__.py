"""Methods: published ways to make attention sparse, by name."""

from collections.abc import Mapping
from typing import Any

from gensparse.errors import ConfigError, unknown_name
from gensparse.methods.agentsd import AgentSD
from gensparse.methods.auto import Auto
from gensparse.methods.autostudio import AutoStudio
from gensparse.methods.base import START, At, Dense, Loaded, Method, Place, Recording, Subject
from gensparse.methods.biformer import BiFormer
from gensparse.methods.boxdiff import BoxDiff
from gensparse.methods.clear import Clear
from gensparse.methods.consistory import ConsiStory
from gensparse.methods.cosmos_sparse import CosmosSparse
from gensparse.methods.disendiff import DisenDiff
from gensparse.methods.double_window import DoubleWindow
from gensparse.methods.freecustom import FreeCustom
from gensparse.methods.freescale import FreeScale
from gensparse.methods.freeswim_window import FreeSwimWindow
from gensparse.methods.hidiffusion import HiDiffusion
from gensparse.methods.hilo import HiLo
from gensparse.methods.isolation_reposition import IsolationReposition
from gensparse.methods.long_distance import LongDistance
from gensparse.methods.lpa import LPA
from gensparse.methods.magicface import MagicFace
from gensparse.methods.masactrl import MasaCtrl
from gensparse.methods.mip_adapter import MipAdapter
from gensparse.methods.msw_msa import MswMsa
from gensparse.methods.neighborhood import Neighborhood
from gensparse.methods.primecomposer import PrimeComposer
from gensparse.methods.proxy import Proxy
from gensparse.methods.psa import PSA
from gensparse.methods.radial import Radial
from gensparse.methods.reference_only import ReferenceOnly
from gensparse.methods.regional import Regional
from gensparse.methods.scale_dit import ScaleDiT
from gensparse.methods.schedule import Schedule
from gensparse.methods.settings_text import as_number
from gensparse.methods.sliding_window import SlidingWindow
from gensparse.methods.storydiffusion import StoryDiffusion
from gensparse.methods.structured import Structured
from gensparse.methods.style_aligned import StyleAligned
from gensparse.methods.together import Together
from gensparse.methods.tokenflow import TokenFlow
from gensparse.methods.unavailable import UNAVAILABLE

METHODS: dict[str, type[Method]] = {
    "agentsd": AgentSD,
    "auto": Auto,
    "autostudio": AutoStudio,
    "biformer": BiFormer,
    "boxdiff": BoxDiff,
    "clear": Clear,
    "consistory": ConsiStory,
    "cosmos_sparse": CosmosSparse,
    "disendiff": DisenDiff,
    "double_window": DoubleWindow,
    "freecustom": FreeCustom,
    "freescale": FreeScale,
    "freeswim_window": FreeSwimWindow,
    "hidiffusion": HiDiffusion,
    "hilo": HiLo,
    "isolation_reposition": IsolationReposition,
    "long_distance": LongDistance,
    "lpa": LPA,
    "magicface": MagicFace,
    "masactrl": MasaCtrl,
    "mip_adapter": MipAdapter,
    "msw_msa": MswMsa,
    "neighborhood": Neighborhood,
    "primecomposer": PrimeComposer,
    "proxy": Proxy,
    "psa": PSA,
    "radial": Radial,
    "reference_only": ReferenceOnly,
    "regional": Regional,
    "scale_dit": ScaleDiT,
    "schedule": Schedule,
    "sliding_window": SlidingWindow,
    "storydiffusion": StoryDiffusion,
    "structured": Structured,
    "style_aligned": StyleAligned,
    "together": Together,
    "tokenflow": TokenFlow,
}

__all__ = [
    "LPA",
    "METHODS",
    "PSA",
    "START",
    "UNAVAILABLE",
    "AgentSD",
    "At",
    "Auto",
    "AutoStudio",
    "BiFormer",
    "BoxDiff",
    "Clear",
    "ConsiStory",
    "CosmosSparse",
    "Dense",
    "DisenDiff",
    "DoubleWindow",
    "FreeCustom",
    "FreeScale",
    "FreeSwimWindow",
    "HiDiffusion",
    "HiLo",
    "IsolationReposition",
    "Loaded",
    "LongDistance",
    "MagicFace",
    "MasaCtrl",
    "Method",
    "MipAdapter",
    "MswMsa",
    "Neighborhood",
    "Place",
    "PrimeComposer",
    "Proxy",
    "Radial",
    "Recording",
    "ReferenceOnly",
    "Regional",
    "ScaleDiT",
    "Schedule",
    "SlidingWindow",
    "StoryDiffusion",
    "Structured",
    "StyleAligned",
    "Subject",
    "Together",
    "TokenFlow",
    "as_method",
    "method_class",
    "parse_method",
    "parse_value",
]


def method_class(name: Any) -> type[Method]:
    """The class of a method.

    Raises:
        ConfigError: no method of that name; the nearest one is suggested.
    """
    if isinstance(name, str) and name in UNAVAILABLE:
        raise ConfigError(f"{name} is not available: {UNAVAILABLE[name]}.")
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
        settings[key] = parse_value(value)
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


def parse_value(text: str) -> Any:
    """A setting as typed: true, none, 16, 80x80, 1.5; anything else stays text, which the method then refuses."""
    parts = [_WORDS[part] if part in _WORDS else as_number(part) for part in text.lower().split("x")]
    if any(isinstance(part, str) for part in parts):
        return text
    return parts[0] if len(parts) == 1 else tuple(parts)


_WORDS = {"true": True, "false": False, "none": None}
