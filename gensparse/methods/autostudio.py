"""AutoStudio's drawer: every object's text and image prompt where a layout puts it (2406.01388)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from gensparse.errors import ConfigError
from gensparse.layout import Layout
from gensparse.methods.base import At, Dense, Loaded, Place, Subject
from gensparse.methods.cross_method import CrossLoaded, CrossMethod, encoded, image_prompts
from gensparse.methods.steps import check_first_steps, first_steps
from gensparse.subjects.areas import Regions

if TYPE_CHECKING:
    from gensparse.processors.stages import Couple, Drawer, Stages


@dataclass(frozen=True)
class AutoStudio(CrossMethod):
    """Cross-attention to the whole prompt, the background and every object at once, weighted by a layout of boxes.

    The pipeline gets the whole prompt (`AutoStudio.prompt` writes the published one) and, with an IP-Adapter, one image
    per object in their order: `ip_adapter_image=[[...]]`, a white picture for an object without one, and
    `pipe.set_ip_adapter_scale(0.7)`. Inside boxes the background's text counts negative, as published. In the last
    steps the picture is drawn as usual, without image prompts. The authors' language-model agents are not part of it: a
    layout comes from you. First latents from drafts of single objects are `gensparse.subjects.drafts.DraftGuide`.
    Stable Diffusion 1.5 and XL.

    Args:
        regions: the objects: list of {"prompt": phrase, "box": [x0, y0, x1, y1]}, boxes in shares of width and height,
            or the path of a layout file.
        background: prompt of the background; none for an empty one.
        present: which objects have a reference image; by default all. Of the others only the text counts.
        fuse: weight of an object's text in its box, and of the background's image prompt outside.
        parallel_steps: first steps that are drawn by the layout, a number or a share of the run; published as 20 of 30.
        guided: whether the first half of a batch is the unconditional one; by default the pipeline says it, and a bare
            model has none.

    Raises:
        ConfigError: no objects, regions with masks, a setting of another form, or (when applied) a bare model or one
            that is no UNet.
    """

    name: ClassVar[str] = "autostudio"
    timed: ClassVar[bool] = True
    paper: ClassVar[str] = (
        "AutoStudio: Crafting Consistent Subjects in Multi-turn Interactive Image Generation (Cheng et al.), "
        "arXiv 2406.01388"
    )
    licence: ClassVar[str] = "code without a licence, none of it used; weights are those of the IP-Adapter you load"
    use: ClassVar[str] = "stories with the same subjects in several pictures, laid out by boxes, on UNets"

    regions: Any = None
    background: str | None = None
    present: tuple[bool, ...] | None = None
    fuse: tuple[float, float] = (1.2, 0.0)
    parallel_steps: int | float = 0.667

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.regions is not None:
            object.__setattr__(self, "regions", Regions.of(self.regions))
            if any(item.box is None for item in self.regions):
                raise ConfigError("autostudio lays objects out by boxes, and a region has a mask; give its box.")
        if not (self.background is None or isinstance(self.background, str)):
            raise ConfigError(f"autostudio background={self.background!r} is not allowed; pass a prompt, or none.")
        if self.present is not None:
            flags = tuple(self.present) if isinstance(self.present, tuple | list) else (self.present,)
            if len(flags) != len(self.regions or ()) or not all(isinstance(item, bool) for item in flags):
                raise ConfigError(f"autostudio present={self.present!r} is not allowed; pass true or false per object.")
            object.__setattr__(self, "present", flags)
        pair = self.fuse if isinstance(self.fuse, tuple | list) else ()
        if len(pair) != 2 or not all(isinstance(n, int | float) and not isinstance(n, bool) and n >= 0 for n in pair):
            raise ConfigError(f"autostudio fuse={self.fuse!r} is not allowed; pass two numbers from 0 up, as (1.2, 0).")
        object.__setattr__(self, "fuse", (float(pair[0]), float(pair[1])))
        check_first_steps(self.name, "parallel_steps", self.parallel_steps)

    @property
    def prompt(self) -> str:
        """The whole prompt, as published: the background and all objects.

        Objects of one subject count together, and parts of a subject ("2-1" of "2") not at all.
        """
        counts: dict[str, list[str]] = {}
        for number, item in enumerate(self.regions or ()):
            if "-" not in item.subject:
                counts.setdefault(item.subject or f" {number}", []).append(item.prompt)
        texts = [f"{len(own) if len(own) > 1 else ''}{own[0]}" for own in counts.values()]
        return f"{self.background or ''} with" + "".join(f" {text}," for text in texts)

    def to_dict(self) -> dict[str, Any]:
        plain = {name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items()}
        plain["regions"] = None if self.regions is None else self.regions.to_list()
        return {"method": self.name, "version": self.version, **plain}

    def load(self, subject: Subject, places: Mapping[str, Place]) -> Loaded:
        if self.regions is None:
            raise ConfigError(
                'autostudio has no objects; pass regions=[{"prompt": "a cat", "box": [0, 0, 0.5, 1]}, ...].'
            )
        return _Drawn(self, subject.owner)


class _Drawn(CrossLoaded):
    """Encodings of background and objects."""

    def __init__(self, method: AutoStudio, owner: Any) -> None:
        super().__init__(method.guided, owner)
        self._method = method
        self._texts = encoded(method.name, owner, [method.background or "", *(item.prompt for item in method.regions)])

    def look(self, at: At, arguments: dict[str, Any]) -> None:
        images, objects = image_prompts(arguments), len(self._method.regions)
        if images not in (0, objects):
            raise ConfigError(
                f"autostudio has {objects} objects, and the call has {images} images; pass one image per object, a "
                "white one for an object without."
            )
        text = arguments["encoder_hidden_states"]
        self._now.where = (text.device, text.dtype)

    def stages(self, layout: Layout, at: At) -> "Stages | Dense":
        from gensparse.processors.stages import Drawer, Stages

        grid, method = layout.grid[1:], self._method
        if at.step >= first_steps(method.parallel_steps, at):
            return Stages(self.guided(at), grid, images=Drawer(None))
        couple, images = self.made((self._now.size, grid, self._now.where), lambda: self._layers(grid))
        return Stages(self.guided(at), grid, couple=couple, images=images)

    def _layers(self, grid: tuple[int, int]) -> "tuple[Couple, Drawer]":
        from gensparse.subjects.drawer import layout_weights

        (height, width), method = self._now.size, self._method
        boxes = [
            (x0 * width, y0 * height, (x1 - x0) * width, (y1 - y0) * height)
            for x0, y0, x1, y1 in (item.box for item in method.regions)
        ]
        weights = layout_weights(boxes, self._now.size, method.fuse).to(self._now.where[0])
        present = method.present or (True,) * len(boxes)
        texts = (None, *(text.to(*self._now.where) for text in self._texts))
        return drawn(weights, grid, texts, None, present)


def drawn(
    weights: Any, grid: tuple[int, int], texts: Any, negatives: Any, present: tuple[bool, ...], lead: int = 0
) -> "tuple[Couple, Drawer]":
    """The stages of a call from layout weights [2, M, H, W] at pixels, and M texts (global, background, objects).

    Args:
        negatives: M texts of the unconditional half; None where they are all the call's own, whose weights sum to 1.
        present: which objects have a reference image.
        lead: images the adapter has before those of the objects, see `Drawer`.
    """
    from gensparse.processors.stages import Couple, Drawer
    from gensparse.subjects.drawer import on_grid

    text, image = on_grid(weights, grid).flatten(2)
    couple = Couple(text, texts, negatives, remember=1)
    return couple, Drawer(image, (True, True, *present), lead)
