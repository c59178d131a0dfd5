"""Regional prompting: every part of the picture reads its own prompt."""

import threading
import weakref
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

from gensparse.errors import ConfigError
from gensparse.layout import Layout, Segment
from gensparse.methods.base import START, At, Dense, Loaded, Place, Subject
from gensparse.methods.checks import whole
from gensparse.methods.cross_method import CrossLoaded, CrossMethod, encoded, reads_text
from gensparse.methods.steps import check_first_steps, first_steps
from gensparse.patterns import Pattern
from gensparse.subjects.areas import Regions

if TYPE_CHECKING:
    from torch import Tensor

    from gensparse.processors.regional import RegionalAttention
    from gensparse.processors.stages import Couple, Stages

REGION, BASE = "region", "base prompt"  # names of text segments, those of processors.regional
JOINT_STEPS = 5
FAMILIES = ("UNet", "FLUX.1", "Stable Diffusion 3")


@dataclass(frozen=True)
class Regional(CrossMethod):
    """Parts of the picture have prompts of their own, and on UNets negative prompts too. Training-free.

    The pipeline gets the prompt of the whole picture; regions add theirs, wherever they are, in any order and number.
    On UNets (Stable Diffusion 1.5, 2, XL) every picture token attends to the texts of its regions, each with a softmax
    of its own, and sums them by weight; pooled text and sizes of XL are the whole picture's (attention couple). On
    FLUX.1 and Stable Diffusion 3 texts of regions are extra text, every region's text and picture tokens see each other
    alone, and part of the result is plain attention to the whole picture's prompt (Regional-Prompting-FLUX). There the
    picture is one stream also in the single blocks, where the published code carries a second one; Stable Diffusion 3
    and the `window` are ours. The unconditional half is plain, but for negative prompts of regions on UNets.

    Args:
        regions: list of {"prompt", "box": [x0, y0, x1, y1] or "mask", "negative", "weight", "subject"}, boxes in shares
            of width and height, or the path of a layout file with it. "negative" and "weight" count on UNets.
        base_weight: share of the whole picture's prompt. On UNets its weight beside those of the regions, before they
            are divided by their sum; with 0 it only fills what no region covers. On joint models the share of plain
            attention.
        steps: first steps that have regions, a number or a share of the run; by default all on UNets, and 5 on joint
            models, where it is published for 5 to 10 of 24.
        background: prompt of what no region covers, on joint models; by default the whole picture's.
        double_interval, single_interval: every so many-th block of a kind has regions on joint models; in the others
            picture tokens read the whole picture's prompt.
        max_tokens: text tokens of every region on joint models.
        window: a method whose pattern limits who sees whom inside regions on FLUX.1, such as "clear:radius=16", with
            ";" for "," between its settings; for large pictures.
        guided: whether the first half of a batch is the unconditional one; by default the pipeline says it, and a bare
            model has none.

    Raises:
        ConfigError: no regions, a setting of another form, or (when applied) a bare model or one of another family.
    """

    name: ClassVar[str] = "regional"
    timed: ClassVar[bool] = True
    paper: ClassVar[str] = (
        "Training-free Regional Prompting for Diffusion Transformers (Chen et al.), arXiv 2411.02395; attention couple "
        "on UNets was published as code alone, in 2023"
    )
    licence: ClassVar[str] = "code under the GPL, the AGPL or without a licence, none of it used; no weights"
    use: ClassVar[str] = "several subjects in one picture, each in its place and with its own prompt"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "flux.1-dev": {"steps": 10, "base_weight": 0.1, "max_tokens": 512},
    }

    regions: Any = None
    base_weight: float = 0.2
    steps: int | float | None = None
    background: str | None = None
    double_interval: int = 1
    single_interval: int = 1
    max_tokens: int = 512
    window: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.regions is not None:
            object.__setattr__(self, "regions", Regions.of(self.regions))
        share = self.base_weight
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 1:
            raise ConfigError(f"regional base_weight={share!r} is not allowed; pass a number from 0 to 1.")
        if self.steps is not None:
            check_first_steps(self.name, "steps", self.steps)
        if not (self.background is None or isinstance(self.background, str)):
            raise ConfigError(f"regional background={self.background!r} is not allowed; pass a prompt, or none.")
        for name in ("double_interval", "single_interval", "max_tokens"):
            whole(self.name, name, getattr(self, name))
        if self.window is not None:
            object.__setattr__(self, "window", _window(self.window))

    def to_dict(self) -> dict[str, Any]:
        regions = None if self.regions is None else self.regions.to_list()
        plain = {name: value for name, value in vars(self).items() if name != "regions"}
        return {"method": self.name, "version": self.version, "regions": regions, **plain}

    def part(self, family: str) -> str:
        return "cross" if family == "UNet" else "self"

    def resolved(self, subject: Subject) -> Self:
        if subject.family not in FAMILIES:
            raise ConfigError(
                f"regional knows {', '.join(FAMILIES)}, not {subject.family}; take another method for this model."
            )
        if subject.family == "UNet":
            reads_text(self.name, subject)
        elif any(item.negative is not None for item in self.regions or ()):
            raise ConfigError(
                f"Negative prompts of regions act in cross-attention of UNets, and {type(subject.model).__name__} has "
                "none; leave 'negative' out."
            )
        if self.window is not None and subject.family != "FLUX.1":
            raise ConfigError(
                f"regional window={self.window!r} limits the joint attention of FLUX.1, not {subject.family}; leave it "
                "out."
            )
        return self

    def kind(self, place: Place) -> Hashable:
        """Whether a block has regions."""
        if place.role != "joint":
            return None
        single = place.name.startswith("single_")
        number = int(next(part for part in place.name.split(".") if part.isdigit()))
        return number % (self.single_interval if single else self.double_interval) == 0

    def active_at(self, at: At, joint: bool) -> bool:
        """Whether a step has regions."""
        if self.steps is None:
            return not joint or at.step < JOINT_STEPS
        return at.step < first_steps(self.steps, at)

    def load(self, subject: Subject, places: Mapping[str, Place]) -> Loaded:
        if self.regions is None:
            raise ConfigError(
                'regional has no regions; pass regions=[{"prompt": "a cat", "box": [0, 0, 0.5, 1]}, ...] or the path '
                "of a layout file."
            )
        return _Coupled(self, subject.owner) if subject.family == "UNet" else _Joint(self, subject)

    def pattern(self, layout: Layout, at: At = START) -> "RegionalAttention | Dense":
        from gensparse.processors.regional import RegionalAttention

        texts = [segment for segment in layout.segments if segment.kind == "text"]
        own = tuple(segment.length for segment in texts if segment.name.startswith(REGION))
        if not own:
            return Dense(
                "regional: the picture alone has no text" if not texts else "regional: no regions in this step"
            )
        base = sum(segment.length for segment in texts if segment.name.startswith(BASE))
        size = _size_of(texts[0])
        background = len(own) > len(self.regions)
        guided = texts[-1].name.endswith("halves") if base else False
        blend = float(self.base_weight) if at.kind is not False else 1.0
        limits = [self._limit(layout, tokens, at) if tokens else None for tokens in (sum(own), base)]
        return RegionalAttention(self.regions, size, own, background, base, blend, guided, *limits)

    def _limit(self, layout: Layout, text: int, at: At) -> Pattern | None:
        """What the window lets see, in a sequence of so many text tokens and the picture."""
        if self.window is None:
            return None
        from gensparse.methods import as_method

        method = as_method(self.window.replace(";", ","))
        found = method.pattern(Layout.image(*layout.grid[1:], text=text), at)
        return found if isinstance(found, Pattern) else None


class _Coupled(CrossLoaded):
    """Encodings of the regions' prompts on a UNet."""

    def __init__(self, method: Regional, owner: Any) -> None:
        super().__init__(method.guided, owner)
        self._method = method
        regions = method.regions
        negatives = [item.negative for item in regions]
        wanted = [item.prompt for item in regions] + [text for text in negatives if text is not None]
        found = encoded(method.name, owner, wanted)
        self._texts, rest = found[: len(regions)], iter(found[len(regions) :])
        self._negatives = [None if text is None else next(rest) for text in negatives]

    def stages(self, layout: Layout, at: At) -> "Stages | Dense":
        from gensparse.processors.stages import Stages

        if not self._method.active_at(at, joint=False):
            return Dense("regional: no regions in this step")
        grid = layout.grid[1:]
        couple = self.made((self._now.size, grid, self._now.where), lambda: self._couple(grid))
        return Stages(self.guided(at), grid, couple=couple)

    def look(self, at: At, arguments: dict[str, Any]) -> None:
        text = arguments["encoder_hidden_states"]
        self._now.where = (text.device, text.dtype)

    def _couple(self, grid: tuple[int, int]) -> "Couple":
        import torch

        from gensparse.processors.stages import Couple
        from gensparse.subjects.regions import couple_weights

        masks = torch.from_numpy(self._method.regions.masks(self._now.size, grid))
        weights = couple_weights(masks, float(self._method.base_weight), grid).to(self._now.where[0])
        texts = [text.to(*self._now.where) for text in self._texts]
        negatives = [None if text is None else text.to(*self._now.where) for text in self._negatives]
        wanted = any(text is not None for text in negatives)
        return Couple(weights, (None, *texts), (None, *negatives) if wanted else None)


class _Now(threading.local):
    """Of the running thread: what the text of this call is made of, and whose call was the first of the step."""

    texts: tuple[int, ...] = ()
    base: int = 0
    names: tuple[str, str] = (REGION, BASE)
    first: Any = None

    def __reduce__(self) -> "tuple[type[_Now], tuple[()]]":
        return _Now, ()


class _Joint(Loaded):
    """Encodings of the regions' prompts, which become extra text of a joint model in the steps that have regions."""

    def __init__(self, method: Regional, subject: Subject) -> None:
        from gensparse.families import TensorMemo

        self._method, self._model, self._now, self._memo = method, subject.model, _Now(), TensorMemo()
        self._batched = subject.family != "FLUX.1"
        self._cell = int(getattr(subject.owner, "vae_scale_factor", None) or 8)
        background = [] if method.background is None else [method.background]
        prompts = [*(item.prompt for item in method.regions), *background]
        found = encoded(method.name, subject.owner, prompts, method.max_tokens)
        self._texts = found[: len(method.regions)]
        self._background = found[len(method.regions)] if background else None

    def begin(self, at: At, arguments: dict[str, Any]) -> bool:
        self._now.texts = ()
        if not self._method.active_at(at, joint=True) or not self._conditional(at, arguments):
            return False
        grid = self._grid(arguments)
        if grid is None:
            return False
        size = self._pixels(grid, arguments)
        text = arguments["encoder_hidden_states"]
        own = [part.to(text).expand(len(text), -1, -1) for part in self._texts]
        if self._uncovered(size, grid):
            background = text if self._background is None else self._background.to(text).expand(len(text), -1, -1)
            own.append(background)
        guided = self._guided(at)
        method = self._method
        kept = method.base_weight > 0 or guided or max(method.double_interval, method.single_interval) > 1
        parts = [*own, text] if kept else own
        self._now.texts = tuple(part.shape[1] for part in own)
        self._now.base = text.shape[1] if kept else 0
        mark = f"{size[0]}x{size[1]}"
        self._now.names = (f"{REGION} {mark}", f"{BASE} of both halves" if guided else BASE)
        arguments["encoder_hidden_states"] = _joined(parts)
        ids = arguments.get("txt_ids")
        if ids is not None:
            total = sum(self._now.texts) + self._now.base
            arguments["txt_ids"] = ids[..., :1, :].expand(*ids.shape[:-2], total, ids.shape[-1])
        return True

    def layout(self, layout: Layout, at: At) -> Layout:
        """The text of the call by region."""
        texts = self._now.texts
        if not texts or not any(segment.kind == "text" for segment in layout.segments):
            return layout
        names = self._now.names
        parts = [Segment("text", length, name=names[0]) for length in texts]
        parts += [Segment("text", self._now.base, name=names[1])] if self._now.base else []
        segments: list[Segment] = []
        for segment in layout.segments:
            segments += parts if segment.kind == "text" else [segment]
        return Layout(tuple(segments))

    def undo(self) -> None:
        self._now.texts = ()

    def _guided(self, at: At) -> bool:
        own = self._method.guided
        return self._batched and bool(at.guided if own is None else own)

    def _conditional(self, at: At, arguments: Mapping[str, Any]) -> bool:
        """Whether this is the conditional call of the step, where the pipeline calls once for each half."""
        if self._batched:
            return True
        text = arguments["encoder_hidden_states"]
        if at.call == 0:
            self._now.first = weakref.ref(text)
            return True
        return self._now.first is not None and self._now.first() is text

    def _grid(self, arguments: Mapping[str, Any]) -> tuple[int, int] | None:
        from gensparse.errors import LayoutMismatchError
        from gensparse.families import family_of

        try:
            layout = family_of(self._model).read_layouts(self._model, arguments, self._memo)["joint"]
        except LayoutMismatchError:
            return None  # the sites say why
        if any(segment.kind == "reference" for segment in layout.segments):
            return None
        return layout.grid[1:]

    def _pixels(self, grid: tuple[int, int], arguments: Mapping[str, Any]) -> tuple[int, int]:
        latents = arguments["hidden_states"]
        if latents.dim() == 4:
            return latents.shape[-2] * self._cell, latents.shape[-1] * self._cell
        return grid[0] * 2 * self._cell, grid[1] * 2 * self._cell

    def _uncovered(self, size: tuple[int, int], grid: tuple[int, int]) -> bool:
        from gensparse.processors.regional import token_masks

        return not bool(token_masks(self._method.regions, size, grid).any(0).all())


def _joined(parts: "list[Tensor]") -> "Tensor":
    import torch

    return torch.cat(parts, 1)


def _size_of(segment: Segment) -> tuple[int, int]:
    """Height and width of the picture in pixels, as the name of a region's text tells them."""
    height, _, width = segment.name.rpartition(" ")[2].partition("x")
    return int(height), int(width)


def _window(value: Any) -> str:
    """A method as text with ";" between its settings."""
    from gensparse.methods import as_method
    from gensparse.methods.describe import method_text

    method = as_method(value.replace(";", ",") if isinstance(value, str) else value)
    if isinstance(method, CrossMethod) or method.records or method.name in ("auto", "schedule", "regional"):
        raise ConfigError(
            f"regional window={method.name!r} is not allowed; pass a method that is a mask, such as 'clear:radius=16'."
        )
    return method_text(method.to_dict()).replace(",", ";")
