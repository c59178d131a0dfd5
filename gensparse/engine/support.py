"""Whether a method works on a checkpoint, from its configs alone: no weight is read and nothing is run."""

import inspect
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gensparse.errors import ConfigError, ModelError, UnsupportedProcessorError
from gensparse.families import CROSS, FAMILIES, Family, family_of
from gensparse.families.published import PUBLISHED
from gensparse.families.sizes import Architecture
from gensparse.layout import Grid, Layout
from gensparse.methods import At, Method, as_method
from gensparse.models import FAMILIES as PIPELINES
from gensparse.models import ModelInfo, components, find_configs, own_facts, read_json

if TYPE_CHECKING:
    from torch import nn

PARTS = ("transformer", "transformer_2", "unet", "controlnet")
"""Components with attention that a method can change; a ControlNet takes an `apply` of its own."""

STEPS = 50
"""Length of the run that an answer is about: its first step and its middle."""

PICTURE, CLIP, FRAMES = (1024, 1024), (480, 832), 81
"""(height, width) pixels and frames, where no size is given."""

_MOST_LAYERS = 1024  # blocks of a config of unknown origin


@dataclass(frozen=True)
class Part:
    """One denoiser of a model, and what a method would do on it.

    Args:
        part: its name in the pipeline, "." for a denoiser on its own; model: its class; family: of that class.
        attention: modules with attention; sites: those that a method may change, by role.
        grids: (F, H, W) tokens that the sites of a role see; tokens: with text and registers.
        native_tokens: picture or clip tokens of the training size; None where nothing says it.
        sparse: sites that would run sparse in the middle of a run; None without a method.
        dense: why the others would not: {reason: sites}; first_step: the same for the first step where it differs.
        density: share of the query-key pairs that sparse sites would compute, mean over them; None where nobody knows.
    """

    part: str
    model: str
    family: str
    attention: int
    sites: Mapping[str, int]
    grids: Mapping[str, Grid]
    tokens: Mapping[str, int]
    native_tokens: int | None = None
    sparse: int | None = None
    dense: Mapping[str, int] = field(default_factory=dict)
    first_step: Mapping[str, int] = field(default_factory=dict)
    density: float | None = None


@dataclass(frozen=True)
class Support:
    """The answer of `check_support`.

    Args:
        name: of the checkpoint; pipeline: its class, None for a denoiser on its own.
        generates: whether `gensparse generate` can run it too.
        method: its settings as data, None where none was asked for.
        height, width: pixels; frames: of a clip; text: tokens: the size that the answer is about.
    """

    name: str
    pipeline: str | None
    generates: bool
    method: Mapping[str, Any] | None
    height: int
    width: int
    frames: int | None
    text: int | None
    parts: tuple[Part, ...]

    @property
    def works(self) -> bool:
        """Whether the method makes anything sparse; without a method, whether there is anything to make sparse."""
        return any(part.sites if part.sparse is None else part.sparse for part in self.parts)

    def to_dict(self) -> dict[str, Any]:
        """JSON data."""
        return {**asdict(self), "works": self.works}


@dataclass(frozen=True)
class _Configs:
    """What the files of a checkpoint say: its denoisers, autoencoder and scheduler."""

    name: str
    pipeline: str | None
    denoisers: Mapping[str, Mapping[str, Any]]
    folder: Path | None = None
    vae: Mapping[str, Any] = field(default_factory=dict)
    scheduler: Mapping[str, Any] = field(default_factory=dict)
    text: int | None = None


def check_support(
    spec: str,
    method: Method | str | Mapping[str, Any] | None = None,
    *,
    height: int | None = None,
    width: int | None = None,
    frames: int | None = None,
    text: int | None = None,
    **source: Any,
) -> Support:
    """What a method would do on a checkpoint at a size.

    Args:
        spec: alias, hub id, pipeline folder, or folder of one denoiser; of a hub id only JSON files are fetched.
        height, width: pixels; frames: of a clip; text: tokens. What is left out is that of a usual call.
        source: `revision`, `local_files_only`, `token` of `gensparse.models.find_configs`.

    Raises:
        ModelError: no such checkpoint, one without a supported denoiser, or one that cannot be made sparse.
        ConfigError: an unknown method or setting, a method that does not fit the model, or a size it cannot have.
    """
    chosen = None if method is None else as_method(method)
    configs = _configs(spec, source)
    models = {part: _skeleton(configs, part, config) for part, config in configs.denoisers.items()}
    size = _size(next(iter(models.values())), configs, height, width, frames, text)
    return Support(
        configs.name,
        configs.pipeline,
        configs.pipeline in PIPELINES,
        None if chosen is None else chosen.to_dict(),
        size["height"],
        size["width"],
        size.get("frames"),
        size.get("n_text"),
        tuple(_part(name, models, configs, chosen, size) for name in models),
    )


# ------------------------------------------------------------------------------------------------------- configs, model
def _configs(spec: str, source: Mapping[str, Any]) -> _Configs:
    from gensparse.embedded import SHIPPED

    name, info, folder = find_configs(spec, shipped=SHIPPED, **source)
    if folder is None:
        assert info is not None, "what has no files is registered"
        return _registered(info)
    if not (folder / "model_index.json").is_file() and (folder / "config.json").is_file():
        config = read_json(folder / "config.json", name)
        return _Configs(name, None, {".": config}, folder)  # the folder of a denoiser on its own
    index = read_json(folder / "model_index.json", name)
    label = index.get("_class_name")
    listed = components(index)
    found = {part: read_json(folder / part / "config.json", name) for part in PARTS if part in listed}
    if not found:
        raise ModelError(
            f"model {name!r} ({label}) has no {', '.join(PARTS)}, which hold the attention; give the folder of a "
            "diffusion pipeline or of its denoiser"
        )
    own = own_facts(_optional(folder / "gensparse.json", name))
    read = {part: _optional(folder / part / file, name) for part, file in _FACTS.items()}
    return _Configs(
        name,
        str(label[-1] if isinstance(label, list) else label),
        {part: {"_class_name": listed[part][1], **config} for part, config in found.items()},
        folder,
        read["vae"],
        read["scheduler"],
        own.get("max_sequence_length", None if info is None else info.max_sequence_length),
    )


_FACTS = {"vae": "config.json", "scheduler": "scheduler_config.json"}


def _optional(path: Path, name: str) -> dict[str, Any]:
    return read_json(path, name) if path.is_file() else {}


def _registered(info: ModelInfo) -> _Configs:
    """The configs of a model that is known by name, so that no file is needed."""
    arch, row = info.architecture, info.row
    vae = {"_class_name": arch.vae_class, "block_out_channels": arch.vae_channels}
    if info.alias in PUBLISHED:
        parts = {row.denoiser: PUBLISHED[info.alias]}
        return _Configs(info.alias, row.pipelines[0], parts, None, vae, {}, info.max_sequence_length)
    assert isinstance(arch, Architecture), "other families have published configs"
    config = {
        "_class_name": "FluxTransformer2DModel",
        "num_layers": arch.double_blocks,
        "num_single_layers": arch.single_blocks,
        "num_attention_heads": arch.heads,
        "attention_head_dim": arch.head_dim,
        "in_channels": arch.in_channels,
        "guidance_embeds": arch.guidance_embeds,
    }
    scheduler = {"max_image_seq_len": (info.native_size // arch.multiple) ** 2}
    return _Configs(info.alias, "FluxPipeline", {"transformer": config}, None, vae, scheduler, info.max_sequence_length)


def _named(part: str) -> str:
    return "denoiser" if part == "." else part


def _class_of(config: Mapping[str, Any]) -> str:
    return str(config.get("_class_name", ""))


def _skeleton(configs: _Configs, part: str, config: Mapping[str, Any]) -> "nn.Module":
    """The denoiser of a config, its weights on no device.

    Raises:
        ModelError: a class of no supported family, or a config that no model can be made of.
    """
    import diffusers
    from accelerate import init_empty_weights

    label, name = _class_of(config), configs.name
    cls = getattr(diffusers, label, None) if label in FAMILIES else None
    if cls is None:
        raise ModelError(
            f"model {name!r}: its {_named(part)} is {label or 'of no class'}, which belongs to no supported family; "
            f"supported model classes are {', '.join(sorted(FAMILIES))}"
        )
    layers = {k: v for k, v in config.items() if "layers" in k and isinstance(v, int) and not 0 <= v <= _MOST_LAYERS}
    if layers:
        raise ModelError(f"model {name!r}: {part}/config.json has {layers}, which no model has; download it again")
    try:
        with init_empty_weights():
            model = cls.from_config({key: value for key, value in config.items() if key != "_name_or_path"})
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0][:200]
        raise ModelError(
            f"model {name!r}: no {label} can be made of {part}/config.json ({type(error).__name__}: {reason}); "
            "download it again"
        ) from error
    if configs.folder is not None:  # where methods look for files beside the weights
        model.register_to_config(_name_or_path=str(configs.folder / part))
    return model


# --------------------------------------------------------------------------------------------------------------- size
def _size(
    model: "nn.Module", configs: _Configs, height: int | None, width: int | None, frames: int | None, text: int | None
) -> dict[str, int]:
    """Arguments of the family's `layout_for`.

    Raises:
        ConfigError: frames for a family of pictures.
    """
    family = family_of(model)
    known = inspect.signature(family.layout_for).parameters
    if frames is not None and "frames" not in known:
        raise ConfigError(f"{family.name} makes pictures, but {frames} frames were given; leave them out")
    out: dict[str, int] = {}
    if "frames" in known:
        out["frames"] = frames or _default(known["frames"], FRAMES)
    usual = CLIP if out.get("frames", 1) > 1 else PICTURE
    out["height"], out["width"] = height or usual[0], width or usual[1]
    if "n_text" in known:
        out["n_text"] = _default(known["n_text"], configs.text or 512) if text is None else text
    facts = {**_vae_facts(configs.vae), "patch_time": model.config.get("patch_size_t")}
    return out | {key: int(value) for key, value in facts.items() if key in known and value}


def _default(parameter: inspect.Parameter, otherwise: int) -> int:
    return otherwise if parameter.default is inspect.Parameter.empty else parameter.default


def _vae_facts(vae: Mapping[str, Any]) -> dict[str, Any]:
    """Pixels and frames per latent cell, where the config of the autoencoder says it; None elsewhere."""
    space = vae.get("spatial_compression_ratio") or vae.get("scale_factor_spatial")
    if space is None and vae.get("_class_name") in ("AutoencoderKL", "AutoencoderKLCogVideoX"):
        space = 2 ** (len(vae.get("block_out_channels") or (1,)) - 1)
    if space is None and vae.get("_class_name") == "AutoencoderTiny":
        channels = vae.get("encoder_block_out_channels") or vae.get("block_out_channels") or (1,)
        space = 2 ** (len(channels) - 1)
    return {
        "vae_scale": space,
        "vae_time": vae.get("temporal_compression_ratio") or vae.get("scale_factor_temporal"),
    }


def _layouts(family: Family, roles: Mapping[str, int], size: Mapping[str, int]) -> dict[str, Layout]:
    """Layout of every role: UNets have one per level; roles of the picture alone have no text."""
    out = {}
    for role in roles:
        own = dict(size)
        place = role.removeprefix(CROSS)
        if place.startswith("level"):
            own["level"] = int(place.removeprefix("level"))
        if role not in ("joint", "self") and "n_text" in own:
            own["n_text"] = 0
        out[role] = family.layout_for(own.pop("height"), own.pop("width"), **own)
    return out


# ------------------------------------------------------------------------------------------------------------- answer
class _Owner:
    """Stands for the pipeline of the models: its scheduler's config, and how many denoisers take turns."""

    def __init__(self, scheduler: Mapping[str, Any]) -> None:
        self.scheduler = type("Scheduler", (), {"config": scheduler})()


def _part(
    name: str, models: Mapping[str, "nn.Module"], configs: _Configs, method: Method | None, size: Mapping[str, int]
) -> Part:
    from gensparse.attach.attachment import Attachment
    from gensparse.attach.settings import Settings
    from gensparse.methods import SlidingWindow

    model = models[name]
    family = family_of(model)
    turns = sum(part != "controlnet" for part in models)
    settings = Settings(SlidingWindow() if method is None else method)
    try:
        # a family whose attention cannot be sparse says so here, and so do methods that do not fit
        family.sites(model, [key for key, _ in model.named_modules()])
    except ConfigError as error:
        raise ModelError(f"model {configs.name!r}: {error}") from error
    attachment = Attachment(model, settings, _Owner(configs.scheduler), denoisers=max(1, turns))
    try:
        attachment.check()
    except UnsupportedProcessorError as error:
        raise ModelError(f"model {configs.name!r}: {error}") from error
    sites = dict(Counter(place.role for place in attachment.places.values()))
    layouts = _layouts(family, sites, size)
    part = Part(
        name,
        type(model).__name__,
        family.name,
        len(attachment.modules),
        sites,
        {role: layout.grid for role, layout in layouts.items()},
        {role: layout.tokens for role, layout in layouts.items()},
        attachment.subject.native_tokens,
    )
    return part if method is None else _with_forecast(part, attachment, layouts)


def _with_forecast(part: Part, attachment: Any, layouts: Mapping[str, Layout]) -> Part:
    middle = attachment.forecast(layouts, At(step=STEPS // 2, steps=STEPS))
    sparse, dense = _counted(middle)
    first: Mapping[str, int] = {}
    if attachment.method.timed:
        first = _counted(attachment.forecast(layouts, At(step=0, steps=STEPS)))[1]
    known = [density for _, density in middle.values() if density is not None]
    density = sum(known) / len(known) if known else None
    return replace(part, sparse=sparse, dense=dense, first_step=first if first != dense else {}, density=density)


def _counted(forecast: Mapping[str, tuple[str, float | None]]) -> tuple[int, dict[str, int]]:
    counts = Counter(outcome for outcome, _ in forecast.values())
    return counts.pop("sparse", 0), dict(counts)
