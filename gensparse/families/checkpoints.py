"""Families of whole checkpoints that `generate` and `upscale` run: one row each, and no condition anywhere else.

A family is found from the pipeline class in model_index.json. What its denoiser attends to stands in the family's own
module; how a size beyond the trained one is reached, in `gensparse.highres.ways` and in the pipelines.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from gensparse.families import sizes
from gensparse.families.sizes import Config


@dataclass(frozen=True)
class Checkpoint:
    """One family.

    Args:
        family, title: what files and people call it.
        pipelines: classes of model_index.json whose checkpoints load.
        highres: our class in `gensparse.pipelines`.
        denoiser: its component with attention; attention: the module that knows its tokens.
        sizes: (denoiser config, autoencoder config) -> what decides its cost.
        ways: names of `gensparse.highres.ways.WAYS` that it knows; auto: the one for sizes beyond the native one.
        levels: what `strength` is a share of: noise levels of a flow whose shift follows its tokens ("dynamic") or is
            fixed ("static", see `shift`), or "steps", as diffusers counts it for models of noise.
        native: (denoiser config, scheduler config, sizes) -> pixels of a side at training; None where no config tells.
        facts: what a request leaves to the model: fields of `ModelInfo`.
        adapt: (denoiser config, sizes) -> further facts that only some of its checkpoints have.
        guidance: argument of the pipeline for classifier-free guidance; negative: whether it then needs a negative
            prompt to act.
        takes_length: the call has `max_sequence_length`.
        tokenizer: component that counts the tokens of a prompt.
        layout: arguments of the attention module's `layout_for` for the tokens that an estimate counts.
        libraries: libraries of model_index.json, beside diffusers and transformers, that are diffusers' own.
        needs: components without which a checkpoint is of another kind.
        automatic: attention of larger stages when a request leaves it open; None for a window of the native size.
        encoders: weights of the text encoders, where no files tell.
        channels: input channels of denoisers for text to picture; others are refused.
        unsaid: the negative prompt where none is given; with None pipelines have a default of their own.
        shift: of static noise levels.
        guides: stages in which classifier-free guidance acts: "all", or "native".
        cascade: fields of `CascadeSettings` in which its cascade differs from the defaults.
    """

    family: str
    title: str
    pipelines: tuple[str, ...]
    highres: str
    denoiser: str
    attention: str
    sizes: Callable[[Config, Config], Any]
    ways: tuple[str, ...]
    auto: str
    encoders: int
    levels: str
    native: Callable[[Config, Config, Any], int | None]
    facts: Mapping[str, Any]
    adapt: Callable[[Config, Any], Mapping[str, Any]] = lambda _config, _sizes: {}
    guidance: str = "guidance_scale"
    negative: bool = False
    takes_length: bool = True
    tokenizer: str = "tokenizer"
    layout: Callable[[Any], Mapping[str, Any]] = lambda arch: {"vae_scale": arch.vae_factor}
    libraries: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    automatic: str | None = None
    channels: tuple[int, ...] = ()
    unsaid: str | None = None
    shift: float = 1.0
    guides: str = "all"
    cascade: Mapping[str, Any] = field(default_factory=dict)


def _sampled(config: Config, _scheduler: Config, arch: Any) -> int | None:
    """`sample_size` in latent cells, one number or (height, width), as pixels."""
    size = config.get("sample_size")
    if isinstance(size, (list, tuple)):
        size = round((int(size[0]) * int(size[1])) ** 0.5)
    return int(size) * arch.vae_factor if size else None


def _scheduled(_config: Config, scheduler: Config, arch: Any) -> int | None:
    """Where the scheduler's time shift ends, in tokens, as pixels of a side."""
    tokens = scheduler.get("max_image_seq_len")
    return round(int(tokens) ** 0.5) * arch.multiple if tokens else None


def _distilled_flux(_config: Config, arch: sizes.Architecture) -> Mapping[str, Any]:
    return {} if arch.guidance_embeds else {"steps": 4, "guidance": 0.0, "max_sequence_length": 256}


def _turbo(config: Config, _arch: Any) -> Mapping[str, Any]:
    """SDXL-Turbo, known by its training size of 64 latent cells; it runs without guidance."""
    return {"steps": 4, "guidance": 0.0} if config.get("sample_size") == 64 else {}


_REAL_GUIDANCE: Mapping[str, Any] = {"guidance_factor": (1.0,)}  # one scale acts in all stages
_UNET_WAYS = ("none", "cascade", "hidiffusion", "freescale", "demofusion", "rectifiedhr", "c_upscale")

CHECKPOINTS: dict[str, Checkpoint] = {
    row.family: row
    for row in (
        Checkpoint(
            family="flux",
            title="FLUX.1",
            pipelines=("FluxPipeline", "FluxImg2ImgPipeline", "FluxHighresPipeline"),
            highres="FluxHighresPipeline",
            denoiser="transformer",
            attention="flux",
            sizes=sizes.flux_sizes,
            ways=("none", "cascade", "direct", "clear", "scale_dit"),
            auto="cascade",
            encoders=sizes.FLUX_ENCODERS,
            levels="dynamic",
            native=_scheduled,
            facts={"native_size": 1024, "steps": 28, "guidance": 3.5, "max_sequence_length": 512},
            adapt=_distilled_flux,
            guidance="true_cfg_scale",
            negative=True,
            tokenizer="tokenizer_2",
            guides="native",
        ),
        Checkpoint(
            family="sdxl",
            title="Stable Diffusion XL",
            pipelines=("StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline", "SDXLHighresPipeline"),
            highres="SDXLHighresPipeline",
            denoiser="unet",
            attention="unet",
            sizes=sizes.unet_sizes,
            ways=_UNET_WAYS,
            auto="cascade",
            encoders=sizes.SDXL_ENCODERS,
            levels="steps",
            native=_sampled,
            facts={
                "native_size": 1024,
                "steps": 50,
                "guidance": 5.0,
                "max_sequence_length": 77,
                "unconditional": True,
            },
            adapt=_turbo,
            takes_length=False,
            tokenizer="tokenizer_2",
            layout=lambda arch: {"vae_scale": arch.vae_factor, "level": arch.level},
            needs=("text_encoder",),  # the refiner has none
            automatic="auto",
            channels=(4, 8),  # 8: the embedded UNet's
        ),
        Checkpoint(
            family="sd15",
            title="Stable Diffusion 1.5 and 2",
            pipelines=("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "SD15HighresPipeline"),
            highres="SD15HighresPipeline",
            denoiser="unet",
            attention="unet",
            sizes=sizes.unet_sizes,
            ways=_UNET_WAYS,
            auto="cascade",
            encoders=sizes.SD15_ENCODERS,
            levels="steps",
            native=_sampled,
            facts={"native_size": 512, "steps": 50, "guidance": 7.5, "max_sequence_length": 77, "unconditional": True},
            takes_length=False,
            layout=lambda arch: {"vae_scale": arch.vae_factor, "level": arch.level},
            libraries=("stable_diffusion",),
            automatic="auto",
            channels=(4,),
        ),
        Checkpoint(
            family="sd3",
            title="Stable Diffusion 3 and 3.5",
            pipelines=("StableDiffusion3Pipeline", "StableDiffusion3Img2ImgPipeline", "SD3HighresPipeline"),
            highres="SD3HighresPipeline",
            denoiser="transformer",
            attention="sd3",
            sizes=sizes.sd3_sizes,
            ways=("none", "cascade"),
            auto="cascade",
            encoders=sizes.SD3_ENCODERS,
            levels="static",
            native=_sampled,
            facts={
                "native_size": 1024,
                "steps": 28,
                "guidance": 7.0,
                "max_sequence_length": 256,
                "unconditional": True,
            },
            tokenizer="tokenizer_3",
            shift=3.0,
            cascade=_REAL_GUIDANCE,
        ),
        Checkpoint(
            family="qwenimage",
            title="QwenImage",
            pipelines=("QwenImagePipeline", "QwenImageImg2ImgPipeline", "QwenImageHighresPipeline"),
            highres="QwenImageHighresPipeline",
            denoiser="transformer",
            attention="qwenimage",
            sizes=sizes.qwen_sizes,
            ways=("none", "cascade", "direct"),
            auto="cascade",
            encoders=sizes.QWEN_ENCODERS,
            levels="dynamic",
            native=_scheduled,
            facts={
                "native_size": 1328,
                "steps": 50,
                "guidance": 4.0,
                "max_sequence_length": 512,
                "unconditional": True,
            },
            guidance="true_cfg_scale",
            negative=True,
            cascade=_REAL_GUIDANCE,
        ),
        Checkpoint(
            family="pixart",
            title="PixArt",
            pipelines=("PixArtSigmaPipeline", "PixArtAlphaPipeline", "PixArtHighresPipeline"),
            highres="PixArtHighresPipeline",
            denoiser="transformer",
            attention="pixart",
            sizes=sizes.pixart_sizes,
            ways=("none", "cascade", "demofusion", "rectifiedhr", "c_upscale"),
            auto="cascade",
            encoders=sizes.PIXART_ENCODERS,
            levels="steps",
            native=_sampled,
            facts={
                "native_size": 1024,
                "steps": 20,
                "guidance": 4.5,
                "max_sequence_length": 300,
                "unconditional": True,
            },
            automatic="auto",
            channels=(4,),
            unsaid="",
        ),
    )
}
"""Family -> its row."""

PIPELINES: dict[str, str] = {name: row.family for row in CHECKPOINTS.values() for name in row.pipelines}
"""Pipeline class of model_index.json -> family."""

AT_ONCE = {
    f"{name}Pipeline": f"{name}DirectPipeline"
    for name in ("Chroma", "Flux2", "Flux2Klein", "HunyuanImage", "Lumina2", "ZImage")
}
"""Pipeline class of model_index.json -> class of `gensparse.pipelines` that makes its large pictures in Python only."""
