"""BoxDiff: latents are moved until objects are in their boxes, by the gradient of attention maps (2307.10816)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from gensparse.errors import ConfigError
from gensparse.layout import Layout
from gensparse.methods.base import At, Dense, Loaded, Place, Subject
from gensparse.methods.checks import flag, whole
from gensparse.methods.cross_method import CrossLoaded, CrossMethod, offsets
from gensparse.subjects.areas import Regions

if TYPE_CHECKING:
    from torch import Tensor

    from gensparse.processors.stages import Stages

REFINED = {0: 0.05, 10: 0.5, 20: 0.8}
"""Step -> how strongly the weakest object has to fill its box before the run goes on."""


@dataclass(frozen=True)
class BoxDiff(CrossMethod):
    """Objects of the prompt are drawn into boxes. Training-free: before each of the first steps the latents are moved
    down the gradient of what the attention maps of the objects' words miss of their boxes.

        handle = gensparse.apply(pipe, BoxDiff(prompt, regions=[{"prompt": "cat", "box": [0, 0, 0.5, 1]}]))
        pipe(prompt, callback_on_step_end=handle.on_step_end)

    The callback moves the latents for every step but the first. For the published run, which also moves them before the
    first step, set the scheduler's timesteps and pass `latents=handle.start(pipe, noise, encoder_hidden_states=...)`.
    Each guided step costs a forward and a backward pass more, on the conditional prompt alone, and the maps of the
    layers at 1/32 of the picture's size, tokens times words. Attention that another method made sparse has gradients
    too. Published for Stable Diffusion 1.x at 512 x 512; other sizes and XL are ours. One picture per prompt.

    Args:
        prompt: the prompt of the call; the pipeline gets the same.
        regions: the objects: list of {"prompt": words of the prompt, "box": [x0, y0, x1, y1]}, boxes in shares of width
            and height. The last token of the words counts.
        steps: first steps that are guided; published as 25 of 50.
        scale: length of a move, times a factor that falls from 1 to half over a run.
        share: of the tokens in a box, and outside, the strongest, that count.
        reach: tokens around the borders of a box that count for its corners.
        smooth: blur the maps.
        refine: moves at most before steps 0, 10 and 20, until every object fills its box well enough; 0 for none.
        coarseness: latent cells per token and axis of the layers whose maps count.
        guided: whether the first half of a batch is the unconditional one; by default the pipeline says it, and a bare
            model has none.

    Raises:
        ConfigError: a setting of another form, or (when applied) words that are not in the prompt, a bare model, or one
            that is no UNet; at the first guided step: no layer of that coarseness.
    """

    name: ClassVar[str] = "boxdiff"
    paper: ClassVar[str] = (
        "BoxDiff: Text-to-Image Synthesis with Training-Free Box-Constrained Diffusion (Xie et al.), arXiv 2307.10816"
    )
    licence: ClassVar[str] = "code without a licence, none of it used; no weights"
    use: ClassVar[str] = (
        "objects in boxes without any further prompts, on Stable Diffusion 1.5, where time matters less"
    )
    timed: ClassVar[bool] = True

    prompt: str | None = None
    regions: Any = None
    steps: int = 25
    scale: float = 20.0
    share: float = 0.2
    reach: int = 1
    smooth: bool = True
    refine: int = 20
    coarseness: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.prompt is None or isinstance(self.prompt, str)):
            raise ConfigError(f"boxdiff prompt={self.prompt!r} is not allowed; pass the prompt of the call.")
        if self.regions is not None:
            object.__setattr__(self, "regions", Regions.of(self.regions))
            if any(item.box is None for item in self.regions):
                raise ConfigError("boxdiff puts objects into boxes, and a region has a mask; give its box.")
        whole(self.name, "steps", self.steps)
        whole(self.name, "refine", self.refine, low=0)
        whole(self.name, "reach", self.reach, low=0)
        whole(self.name, "coarseness", self.coarseness)
        flag(self.name, "smooth", self.smooth)
        for name, high in (("scale", float("inf")), ("share", 1.0)):
            value = getattr(self, name)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not 0 < value <= high or value == float("inf"):
                raise ConfigError(f"boxdiff {name}={value!r} is not allowed; pass a number above 0, at most {high}.")

    def to_dict(self) -> dict[str, Any]:
        data = {**vars(self), "regions": None if self.regions is None else self.regions.to_list()}
        return {"method": self.name, "version": self.version, **data}

    def load(self, subject: Subject, places: Mapping[str, Place]) -> Loaded:
        if not self.prompt or self.regions is None:
            raise ConfigError(
                'boxdiff needs the prompt and its objects; pass prompt= and regions=[{"prompt": "cat", "box": [...]}].'
            )
        return _Guiding(self, subject)


class _Guiding(CrossLoaded):
    """Moves latents between steps; during its own passes the sites keep their maps."""

    def __init__(self, method: BoxDiff, subject: Subject) -> None:
        from gensparse.subjects.words import tokens_of

        super().__init__(method.guided, subject.owner)
        self._method, self._model = method, subject.model
        prompt = method.prompt or ""
        spans = offsets(method.name, subject.owner, prompt)
        self._tokens = []
        for item in method.regions:
            found = tokens_of(prompt, [item.prompt], spans)
            if not found:
                raise ConfigError(f"boxdiff: {item.prompt!r} does not stand in the prompt; use its own words.")
            first = spans[found[0]][0]  # of its first place in the prompt
            self._tokens.append(max(number for number in found if spans[number][1] <= first + len(item.prompt)))
        self._words = len(spans)
        self._book: Any = None
        self._seen: dict[str, Any] = {}

    def look(self, at: At, arguments: dict[str, Any]) -> None:
        if self._book is None:
            self._seen = {
                name: value for name, value in arguments.items() if name not in ("self", "sample", "timestep")
            }
            self._halved = self.guided(at)

    def stages(self, layout: Layout, at: At) -> "Stages | Dense":
        from gensparse.processors.stages import Stages

        if self._book is None or at.coarseness != self._method.coarseness:
            return Dense("boxdiff acts between the steps")
        grid = layout.grid[1:]
        self._book.grids = frozenset({grid})
        return Stages(False, grid, book=self._book)

    def step_end(self, pipe: Any, index: int, timestep: Any, arguments: dict[str, Any]) -> dict[str, Any]:
        times, following = pipe.scheduler.timesteps, index + 1
        if following >= min(self._method.steps, len(times)):
            return {}
        return {"latents": self._moved(pipe, arguments["latents"], following, _conditional(self._seen, self._halved))}

    def start(self, pipe: Any, latents: "Tensor", arguments: dict[str, Any]) -> "Tensor":
        sigma = float(pipe.scheduler.init_noise_sigma)
        return self._moved(pipe, latents * sigma, 0, arguments) / sigma

    def undo(self) -> None:
        super().undo()
        self._seen = {}

    def _moved(self, pipe: Any, latents: "Tensor", step: int, arguments: dict[str, Any]) -> "Tensor":
        """Latents for a step, moved once, or at some steps until the objects fill their boxes."""
        total = len(pipe.scheduler.timesteps)
        length = self._method.scale * (1 - 0.5 * step / max(1, total - 1)) ** 0.5
        latents, worst = self._move(pipe, latents, step, arguments, length)
        for _ in range(self._method.refine if step in REFINED else 0):
            if worst <= 1 - REFINED[step]:
                break
            latents, worst = self._move(pipe, latents, step, arguments, length)
        return latents

    def _move(
        self, pipe: Any, latents: "Tensor", step: int, arguments: dict[str, Any], length: float
    ) -> "tuple[Tensor, float]":
        """One move, and by how much the weakest object missed its box before it."""
        import torch

        from gensparse.processors.stages import MapBook
        from gensparse.subjects.boxdiff import box_loss, box_tokens, token_maps

        time = pipe.scheduler.timesteps[step]
        self._book = MapBook(frozenset(), conditional=False)
        try:
            with torch.enable_grad():
                x = latents.detach().requires_grad_()
                sample = pipe.scheduler.scale_model_input(x, time)
                self._model(sample, time, **{**arguments, "return_dict": False})
                maps = self._book.take().mean(dim=(0, 2))
                (grid,) = self._book.grids
                size = self._now.size
                boxes = [
                    box_tokens((x0 * size[1], y0 * size[0], x1 * size[1], y1 * size[0]), grid, size)
                    for x0, y0, x1, y1 in (item.box for item in self._method.regions)
                ]
                losses = []
                for own in maps:
                    planes = own.unflatten(0, grid)[..., : self._words]
                    planes = token_maps(planes, self._tokens, self._method.smooth)
                    losses.append(box_loss(planes, boxes, self._method.share, self._method.reach))
                loss = torch.stack([loss for loss, _ in losses]).sum()
                (slope,) = torch.autograd.grad(loss, x)
            worst = max(float(miss.detach()) for _, miss in losses)
        finally:
            self._book = None
        return (latents - length * slope).detach(), worst


def _conditional(arguments: Mapping[str, Any], guided: bool) -> dict[str, Any]:
    """Arguments of a call of both halves, cut to the conditional one."""
    import torch

    def half(value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.dim() and value.shape[0] > 1 and value.shape[0] % 2 == 0:
            return value[value.shape[0] // 2 :]
        if isinstance(value, dict):
            return {key: half(item) for key, item in value.items()}
        return [half(item) for item in value] if isinstance(value, list) else value

    return {key: half(value) if guided else value for key, value in arguments.items()}
