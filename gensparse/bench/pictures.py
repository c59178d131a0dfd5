"""Pictures that are measured: test prompts of the embedded models, and every way in which their pictures are made."""

import inspect
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import torch
from PIL import Image

from gensparse.bench.measure import Use, watched
from gensparse.bench.store import Store
from gensparse.embedded.render import render
from gensparse.embedded.scenes import Scene, caption, random_scene
from gensparse.errors import ConfigError

if TYPE_CHECKING:
    from gensparse.bench.quality import Options

FIRST_SEED = 9_500_000  # scenes that no training has seen
CROP = 256  # pixels per side of crops at full resolution
BICUBIC, RENDERING, STOCK, CASCADE = "bicubic", "rendering", "stock", "cascade"


@dataclass(frozen=True)
class Prompt:
    """One test prompt, the scene it was said of, and the seed of its noise."""

    index: int
    seed: int
    text: str
    scene: Scene


@dataclass(frozen=True)
class Item:
    """One picture to make: `size` is "native" or pixels per side, `method` a contender or a baseline."""

    size: str
    method: str
    prompt: Prompt

    @property
    def key(self) -> str:
        return f"{self.size}/{self.method}/{self.prompt.index}/{self.prompt.seed}"

    @property
    def file_name(self) -> str:
        return self.key.replace("/", "_").replace(":", "_").replace("=", "_")


def prompts(count: int) -> list[Prompt]:
    """The first `count` test prompts; scenes whose caption came out empty are passed over."""
    found: list[Prompt] = []
    seed = FIRST_SEED
    while len(found) < count:
        scene = random_scene(seed)
        if text := caption(scene, seed):
            found.append(Prompt(len(found), seed, text, scene))
        seed += 1
    return found


class Contender(NamedTuple):
    """What makes a picture at a large size.

    Args:
        way: name of `gensparse.highres.ways`, or "stock" for the plain pipeline of diffusers.
        text: the way with its settings.
        attention: a method, "dense" or "auto".
    """

    way: str
    text: str
    attention: str

    @classmethod
    def read(cls, text: str) -> Self:
        """From WAY, WAY+ATTENTION, or ATTENTION for the cascade; a word that is both is an attention method.

        Raises:
            ConfigError: no way, attention method or setting of that name.
        """
        from gensparse.highres.ways import WAYS, parse_way
        from gensparse.methods import METHODS, parse_method

        way, plus, attention = (part.strip() for part in text.partition("+"))
        name = way.partition(":")[0]
        if not plus:
            attention = "dense" if name == STOCK else "auto"
            if name != STOCK and (name not in WAYS or name in METHODS):
                way, attention = CASCADE, way
        if attention not in ("dense", "auto"):
            parse_method(attention)
        if way == STOCK:
            return cls(STOCK, way, attention)
        asked = parse_way(way)
        if asked.name in WAYS and WAYS[asked.name].method:  # its settings are the method's
            parse_method(asked.text)
        return cls(asked.name, way, attention)

    def check(self, model: str | None) -> None:
        """ConfigError for a way that the model does not have."""
        row = model_info(model).row
        if self.way != STOCK and self.way not in row.ways:
            raise ConfigError(f"{self.way} is no way of {row.title}; choose {STOCK} or one of {', '.join(row.ways)}")


class NativeStage:
    """A stage store that keeps a prompt's native stage, so that every method continues the same draft."""

    def __init__(self):
        self.result = None

    def load(self, index: int):
        return self.result if index == 0 else None

    def save(self, index: int, result) -> None:
        self.result = result if index == 0 else self.result


class Maker:
    """Makes the picture of an item; the pipeline is loaded when first needed."""

    def __init__(self, options: "Options", store: Store):
        self.options, self.store = options, store
        self.loaded = None
        self.drafts: dict[tuple[int, str], NativeStage] = {}
        self.used: dict[str, Use] = {}  # by items made in this run

    def __call__(self, item: Item) -> Image.Image:
        side = self.side(item)
        if item.method == RENDERING:
            return Image.fromarray(render(item.prompt.scene, side, side))
        if item.method == BICUBIC:
            return self.native(item.prompt).resize((side, side), Image.Resampling.BICUBIC)
        return self.native(item.prompt) if item.size == "native" else self.enlarged(item)

    def side(self, item: Item) -> int:
        return self.options.native if item.size == "native" else int(item.size)

    def native(self, prompt: Prompt) -> Image.Image:
        """The seed's native picture, kept or made; its rendering when only baselines are run."""
        if self.options.baselines:
            return self(Item("native", RENDERING, prompt))
        self.make_natives([prompt])
        return Image.open(self.store.picture_path(Item("native", "dense", prompt))).convert("RGB")

    def make_natives(self, wanted: list[Prompt]) -> None:
        """Native pictures of those prompts that have none yet, as one batch."""
        missing = [i for i in (Item("native", "dense", p) for p in wanted) if not self.store.picture_path(i).exists()]
        if missing:
            found = self._run(self.pipeline, missing, {"attention": "dense", "stage_store": None})
            for item, picture in zip(missing, found, strict=True):
                self.store.save_picture(item, picture)

    def enlarged(self, item: Item) -> Image.Image:
        """The picture of a contender; cascades of one prompt and size continue one native stage."""
        contender = Contender.read(item.method)
        if contender.way == STOCK:
            return self.stock(item, contender.attention)
        key, draft = (item.prompt.index, item.size), None
        if contender.text == CASCADE:
            if key not in self.drafts:
                self.drafts = {key: NativeStage()}
            draft = self.drafts[key]
        asked = {"attention": contender.attention, "stage_store": draft, **self.way(contender, self.side(item))}
        return self._run(self.pipeline, [item], asked)[0]

    def way(self, contender: Contender, side: int) -> dict[str, Any]:
        """What the pipeline is told of a way; nothing of the cascade as the model has it."""
        from gensparse.engine.plans import cascade_settings
        from gensparse.highres.stages import plan_stages
        from gensparse.highres.ways import WAYS, parse_way

        if contender.text == CASCADE:
            return {}
        info, asked = model_info(self.options.model), parse_way(contender.text)
        if info.row.levels == "steps" or WAYS[asked.name].procedure:
            return {"highres": asked.text}
        if asked.name != CASCADE:
            return {"highres": asked.name, **asked.settings}
        own, steps = cascade_settings(info, asked.settings), self.options.steps or info.steps
        native, multiple = (info.native_size,) * 2, info.architecture.multiple
        return {"stages": plan_stages(side, side, native, steps=steps, multiple=multiple, settings=own)}

    def stock(self, item: Item, attention: str) -> Image.Image:
        """The picture of diffusers' own pipeline at the size, on the same weights."""
        from gensparse.attach import applied

        ours = self.pipeline
        plain = next(cls for cls in type(ours).__mro__ if cls.__module__.startswith("diffusers.pipelines."))
        wanted = inspect.signature(plain.__init__).parameters
        pipe = plain(**{name: part for name, part in ours.components.items() if name in wanted})
        pipe.set_progress_bar_config(disable=True)
        facts, arguments = getattr(ours, "gensparse_config", {}), {}
        takes = inspect.signature(plain.__call__).parameters
        if "max_sequence_length" in takes and "max_sequence_length" in facts:  # FLUX does not mask padding
            arguments["max_sequence_length"] = facts["max_sequence_length"]
        with nullcontext() if attention == "dense" else applied(pipe, attention):
            return self._run(pipe, [item], arguments)[0]

    @property
    def pipeline(self) -> Any:
        """Ours, loaded on first use."""
        if self.loaded is None:
            self.loaded = load_pipeline(self.options)
        return self.loaded

    def _run(self, pipe: Any, batch: list[Item], arguments: dict[str, Any]) -> list[Image.Image]:
        side, info = self.side(batch[0]), model_info(self.options.model)
        guidance = info.guidance if self.options.guidance is None else self.options.guidance
        with watched(self.options.device) as use:
            pictures = pipe(
                prompt=[item.prompt.text for item in batch],
                negative_prompt=[""] * len(batch),
                height=side,
                width=side,
                generator=[torch.Generator().manual_seed(item.prompt.seed) for item in batch],
                num_inference_steps=self.options.steps or info.steps,
                **{info.row.guidance: guidance},
                **arguments,
            ).images
        self.used |= {item.key: use.shared(len(batch)) for item in batch}
        return pictures


def load_pipeline(options: "Options") -> Any:
    """The embedded model, or the checkpoint folder or name of the options, in its pipeline of stages."""
    from gensparse.embedded import embedded_path, load_folder
    from gensparse.pipelines import highres_class

    stock = load_folder(folder_of(options.model) or embedded_path(), getattr(torch, str(options.dtype)))
    pipe = highres_class(stock).from_pipe(stock).to(options.device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def model_info(model: str | None) -> Any:
    """What is known of a model: its steps, its guidance and the argument that takes it."""
    from gensparse.embedded import embedded_path
    from gensparse.models import resolve

    return resolve(str(folder_of(model) or embedded_path())).info


def folder_of(model: str | None) -> Path | None:
    """The folder of a model by its name or path; None for the shipped FLUX model."""
    from gensparse.embedded import SHIPPED

    if model is None:
        return None
    return SHIPPED[model]() if model in SHIPPED else Path(model)
