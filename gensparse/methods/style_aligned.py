"""StyleAligned: pictures take the style of the first one of their batch (Hertz et al. 2312.02133)."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import isfinite
from typing import TYPE_CHECKING, Any, ClassVar, Self

from gensparse.errors import ConfigError
from gensparse.methods.base import Place, Subject
from gensparse.methods.checks import flag
from gensparse.methods.freecustom import check_share
from gensparse.methods.subject_method import SubjectMethod, site_names, takes

if TYPE_CHECKING:  # methods are listed and described without torch
    from gensparse.methods.subject_run import SubjectRun


@dataclass(frozen=True)
class StyleAligned(SubjectMethod):
    """Every picture also sees the keys of the first one, after its queries and keys got the statistics of that one.

    The first picture of a half is the style reference; it is what it would be alone. Statistics are the mean and the
    deviation of a channel over the picture's tokens. To take the style of a given picture, invert it and pass its
    latents; inversion is not part of this method.

    Published for SDXL and Stable Diffusion 1.5. FLUX and Stable Diffusion 3, whose text is left as it is, and whose
    queries and keys are aligned after their rotation, and PixArt are an extension of ours without measurements.

    Args:
        queries, keys, values: which of them get the statistics of the reference.
        share: whether the keys of the reference are seen.
        full: instead of all that, all pictures of a half see all tokens of all of them; not where text stands in the
            sequence.
        scale: factor on the reference's keys; published is 0.5 for famous pictures.
        shift: added to the logits of the reference's keys; published is ln 2 (0.693) for transfer from a picture.
        group_norm: whether group norms of a UNet take their statistics over the picture and the reference together;
            published for Stable Diffusion 1.5 and for transfer.
        plain_layers: share of the layers that stay plain, spread evenly.
        layers: those that share, as numbers in the order of the computation or names, joined by +; "auto" for all.
        halves: 2 where both halves of guidance come in one batch, 1 where not; none asks the pipeline.

    Raises:
        ConfigError: a setting of the wrong type or range, or (when applied) a model of another family, full sharing
            beside text, or group norms of a model that has none.
    """

    name: ClassVar[str] = "style_aligned"
    fixed: ClassVar[int | None] = 1
    paper: ClassVar[str] = "Style Aligned Image Generation via Shared Attention (Hertz et al.), arXiv 2312.02133"
    licence: ClassVar[str] = "code Apache-2.0, none of it used; no weights"
    use: ClassVar[str] = "several pictures in one style, that of the first prompt or of an inverted picture"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "sdxl": {},
        "sd1.5": {"group_norm": True},
        "sdxl-transfer": {"group_norm": True, "shift": 0.6931471805599453},
        "sdxl-famous": {"group_norm": True, "scale": 0.5},
    }

    queries: bool = True
    keys: bool = True
    values: bool = False
    share: bool = True
    full: bool = False
    scale: float = 1.0
    shift: float = 0.0
    group_norm: bool = False
    plain_layers: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("queries", "keys", "values", "share", "full", "group_norm"):
            flag(self.name, name, getattr(self, name))
        for name in ("scale", "shift"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value):
                raise ConfigError(f"{self.name} {name}={value!r} is not allowed; pass a finite number.")
        check_share(self.name, "plain_layers", self.plain_layers)

    def resolved(self, subject: Subject) -> Self:
        settled = super().resolved(subject)
        if self.full and subject.family in ("FLUX.1", "Stable Diffusion 3"):
            raise ConfigError(
                f"{self.name} full=True needs pictures without text in the sequence, unlike {subject.family}; "
                "leave it out."
            )
        if self.group_norm and subject.family != "UNet":
            raise ConfigError(
                f"{self.name} group_norm=True needs a UNet, and {subject.family} has no group norms; leave it out."
            )
        names = site_names(subject)
        plain = plain_numbers(names, self.plain_layers)
        kept = [n for n, name in enumerate(names) if takes(settled.layers, n, name) and n not in plain]
        if not kept:
            raise ConfigError(f"{self.name} plain_layers={self.plain_layers} leaves no layer; pass less.")
        return replace(settled, layers="+".join(map(str, kept)), plain_layers=0.0) if plain else settled

    def load(self, subject: Subject, places: Mapping[str, Place]) -> "SubjectRun":
        from gensparse.methods.subject_views import StyleRun

        return StyleRun(self, subject, places)


def plain_numbers(names: list[str], share: float) -> set[int]:
    """Numbers of the layers that stay plain, in the order of the computation.

    Counted in diffusers' listing order (down, up, middle), as published: every L // int(share * L)-th of L layers, and
    above one half all others than those for 1 - share.
    """
    listed = sorted(range(len(names)), key=lambda n: (names[n].startswith("mid_block"), n))
    count = int(min(share, 1 - share) * len(names))
    if share == 1 or (count == 0 and share > 0.5):
        return set(listed)
    if count == 0:
        return set()
    hit = {listed[n] for n in range(0, len(names), len(names) // count)}
    return hit if share <= 0.5 else set(listed) - hit
