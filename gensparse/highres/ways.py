"""Ways to a size beyond the trained one, as data: what users type behind `--highres`, and which settings each has.

What a way does stands in the pipelines; which family of models knows which ways, in `gensparse.families.checkpoints`.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from gensparse.errors import ConfigError, short, unknown_name

AUTO = "auto"
FORM = "NAME or NAME:key=value,key=value"


@dataclass(frozen=True)
class Setting:
    """What a setting takes.

    Args:
        kind: "number", "whole", "flag", "word", or "numbers": one for every enlargement, joined by "x" (1x0.5).
        low, high: bounds, both allowed.
        words: of a word.
        count: of numbers; None for any.
    """

    kind: str
    low: float = 0.0
    high: float = math.inf
    words: tuple[str, ...] = ()
    count: int | None = None

    @property
    def takes(self) -> str:
        """The values in words."""
        if self.kind == "flag":
            return "true or false"
        if self.kind == "word":
            return " or ".join(self.words)
        bounds = f"from {self.low:g}" + ("" if math.isinf(self.high) else f" to {self.high:g}")
        if self.kind == "numbers":
            many = "numbers" if self.count is None else f"{self.count} numbers"
            return f"{many} {bounds} joined by x, such as {'x'.join(['1', '0.5', '1'][: self.count or 2])}"
        return f"a {'whole ' if self.kind == 'whole' else ''}number {bounds}"

    def read(self, text: str) -> Any:
        """The value of a text; None where it is none."""
        word = text.strip().lower()
        if self.kind == "flag":
            return {"true": True, "false": False}.get(word)
        if self.kind == "word":
            return word if word in self.words else None
        if self.kind == "numbers":
            found = tuple(self._number(part) for part in word.split("x"))
            fits = None not in found and (self.count is None or len(found) == self.count)
            return found if fits else None
        return self._number(word)

    def _number(self, text: str) -> float | int | None:
        form = r"\d{1,9}" if self.kind == "whole" else r"\d{1,9}(?:\.\d{1,9})?"
        if not re.fullmatch(form, text):
            return None
        value = int(text) if self.kind == "whole" else float(text)
        return value if self.low <= value <= self.high else None


@dataclass(frozen=True)
class WayFacts:
    """One way.

    Args:
        about: what happens, in a few words; paper: where it was published.
        settings: key -> what it takes.
        method: the way is the size at once with this attention method, whose settings are the way's.
        strength: whether it can redo a chosen share of the noise range of a given picture.
        halves: whether the halves of the guidance may run one after the other.
        procedure: attention of larger stages of a way in `gensparse.pipelines.flux_ways`; "" for all others.
    """

    about: str
    paper: str = ""
    settings: Mapping[str, Setting] = field(default_factory=dict)
    method: str = ""
    strength: bool = True
    halves: bool = True
    procedure: str = ""


POSITIONS = ("auto", "base", "ntk", "ntk10", "yarn", "interpolate", "imax_clip", "dy_ntk", "dy_yarn")
"""Rules of `gensparse.highres.rope.RULES`, and the model's own choice."""

_SHARE = Setting("number", 0.0, 1.0)
_SHARES = Setting("numbers", 0.0, 1.0)

WAYS: dict[str, WayFacts] = {
    "none": WayFacts("the size at once, as the plain pipeline does it"),
    "direct": WayFacts(
        "the size at once, with positions stretched to it and the time shift of the trained size",
        "YaRN and NTK; the dy_ rules are DyPE, arXiv 2510.20766, patent pending according to its authors",
        {"position": Setting("word", words=POSITIONS)},
    ),
    "cascade": WayFacts(
        "stages that double, each led by the smaller picture's low frequencies",
        "HiFlow, arXiv 2504.06232",
        {
            "share": _SHARES,
            "alpha": _SHARES,
            "beta": _SHARES,
            "ratio": Setting("numbers", 0.001, 10.0),
            "guidance_factor": Setting("numbers", 0.0, 100.0),
            "low_pass": Setting("word", words=("fft", "dwt")),
            "sharpen": Setting("number", 0.0, 10.0),
            "border": Setting("whole", 0, 64),
        },
    ),
    "hidiffusion": WayFacts(
        "the size at once, with smaller deep features in the first steps and windows",
        "HiDiffusion, arXiv 2311.17528",
        method="hidiffusion",
    ),
    "freescale": WayFacts(
        "stages from the noised enlargement, attention in windows and over the whole map, dilated convolutions",
        "FreeScale, arXiv 2412.09626",
        {
            "restart": Setting("number", 0.0, 0.99),
            "cosine_scale": Setting("number", 0.01, 100.0),
            "freeu": Setting("flag"),
            "jitter": Setting("flag"),
            "fusion": Setting("word", words=("spatial", "reference")),
            "dilated_steps": _SHARE,
        },
    ),
    "demofusion": WayFacts(
        "windows of the native size and dilated views at every step; at zoom 4 each step is 65 native ones",
        "DemoFusion, arXiv 2311.16973",
        {
            "scales": Setting("numbers", 0.0, 100.0, count=3),
            "sigma": Setting("number", 0.01, 100.0),
            "view_batch": Setting("whole", 1, 1024),
            "jitter": Setting("flag"),
        },
    ),
    "c_upscale": WayFacts(
        "windows of the native size led by the smaller picture, one jump to the target",
        "C-Upscale, arXiv 2505.16976",
        {
            "structure": _SHARE,
            "semantic": _SHARE,
            "screening": Setting("flag"),
            "share": _SHARE,
            "merge": Setting("word", words=("mean", "hann")),
            "view_batch": Setting("whole", 1, 1024),
        },
        halves=False,
    ),
    "clear": WayFacts(
        "stages that double, each noised and denoised anew with CLEAR attention and a static time shift",
        "CLEAR, arXiv 2412.16112",
        {
            "radius": Setting("whole", 1, 4096),
            "strength": _SHARE,
            "shift": Setting("number", 0.01, 100.0),
            "guidance_factor": Setting("number", 0.01, 100.0),
        },
        procedure="clear:radius=16,proportional=true",
    ),
    "scale_dit": WayFacts(
        "one jump; tokens see their window, text and the native picture as anchors; an experiment without LoRA",
        "Scale-DiT, arXiv 2510.16325",
        {"ratio": Setting("whole", 1, 64), "share": _SHARE, "guidance_factor": Setting("number", 0.01, 100.0)},
        procedure="scale_dit",
    ),
    "rectifiedhr": WayFacts(
        "one run whose size and guidance rise near its end",
        "RectifiedHR, arXiv 2503.02537",
        {
            "count": Setting("whole", 1, 8),
            "guidance": Setting("numbers", 0.01, 1000.0, count=3),
            "switches": Setting("numbers", 0.01, 10.0, count=3),
        },
        strength=False,
    ),
}
"""Name -> what is known about it; `auto` is the choice of the model's family among these."""


class Asked(NamedTuple):
    """What `--highres` said: a way (or "auto") and the settings that were given."""

    name: str
    settings: Mapping[str, Any]
    text: str

    @property
    def rest(self) -> str:
        """The settings as text."""
        return self.text.partition(":")[2].strip()


def parse_way(text: object) -> Asked:
    """Read "cascade", "freescale:cosine_scale=1,jitter=false", "auto".

    Settings of a way that is an attention method are left as text: the method reads them.

    Raises:
        ConfigError: an unknown way or setting, or a value that it does not take.
    """
    if not isinstance(text, str) or len(text) > 1000:
        raise ConfigError(f"highres is {short(text)}; give {FORM}, NAME one of {AUTO}, {', '.join(WAYS)}")
    name, colon, rest = (part.strip() for part in text.partition(":"))
    if name == AUTO and not colon:
        return Asked(AUTO, {}, AUTO)
    if name not in WAYS:
        raise ConfigError(unknown_name("highres", name, (AUTO, *WAYS)))
    way, found = WAYS[name], {}
    if way.method:
        return Asked(name, {}, f"{name}:{rest}" if rest else name)
    for item in filter(None, (part.strip() for part in rest.split(","))):
        key, equals, value = (part.strip() for part in item.partition("="))
        if key not in way.settings:
            known = ", ".join(way.settings) or "none"
            raise ConfigError(f"highres {name} has no setting {short(key)}; it has {known}")
        if not equals or key in found:
            raise ConfigError(f"highres setting {short(item)} has another form; write each once, as {FORM}")
        found[key] = way.settings[key].read(value)
        if found[key] is None:
            raise ConfigError(f"highres {name}:{key} is {short(value)}; give {way.settings[key].takes}")
    return Asked(name, found, f"{name}:{rest}" if found else name)
