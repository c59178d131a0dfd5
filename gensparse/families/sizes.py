"""Sizes of image models that decide what a picture costs, read from their configs: weights, FLOPs, live activations.

Nothing here needs a weight. Activations were traced on the real layer shapes (docs/highres.md says how).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

Config = Mapping[str, Any]

FLUX_ENCODERS = 4_885_000_000  # T5-XXL 4.76 B and CLIP-L 0.12 B
SD15_ENCODERS = 123_000_000  # CLIP-L
SDXL_ENCODERS = 817_000_000  # CLIP-L 0.12 B and OpenCLIP bigG 0.69 B
SD3_ENCODERS = 5_580_000_000  # CLIP-L, OpenCLIP bigG and T5-XXL
QWEN_ENCODERS = 8_290_000_000  # Qwen2.5-VL-7B
PIXART_ENCODERS = 4_760_000_000  # T5-XXL


@dataclass(frozen=True)
class _WithAutoencoder:
    """What all models have: the sizes of their autoencoder."""

    vae_class: str = "AutoencoderKL"
    vae_channels: tuple[int, ...] = (128, 256, 512, 512)
    vae_convs: tuple[int, ...] = (7, 7, 7, 11)  # 3x3 convolutions of the decoder per level, full resolution first

    @property
    def vae_factor(self) -> int:
        return 2 ** (len(self.vae_channels) - 1)


@dataclass(frozen=True)
class _Transformer(_WithAutoencoder):
    """Sizes of a transformer whose tokens are 2 x 2 latent cells."""

    heads: int = 24
    head_dim: int = 128

    @property
    def width(self) -> int:
        return self.heads * self.head_dim

    @property
    def multiple(self) -> int:
        """Both sides of a picture are multiples of this many pixels: autoencoder factor times the cells of a token."""
        return 2 * self.vae_factor

    def tokens(self, height: int, width: int) -> int:
        """Picture tokens of a size in pixels."""
        return (height // self.multiple) * (width // self.multiple)


@dataclass(frozen=True)
class Architecture(_Transformer):
    """Sizes of a FLUX-type model that decide cost: read from its configs, so that no weights are needed."""

    double_blocks: int = 19
    single_blocks: int = 38
    in_channels: int = 64
    guidance_embeds: bool = True
    encoder_params: int = FLUX_ENCODERS

    @property
    def layers(self) -> int:
        return self.double_blocks + self.single_blocks

    @property
    def transformer_params(self) -> int:
        """Weights of the blocks: 12 d^2 per stream, and d^2 times 6 (double, twice) or 3 (single) for modulation."""
        return self.width**2 * (self.double_blocks * 36 + self.single_blocks * 15)

    @property
    def kept_params(self) -> int:
        """Weights that fp8 storage leaves alone: the modulations, which belong to norms."""
        return self.width**2 * (self.double_blocks * 12 + self.single_blocks * 3)

    @property
    def guidance_in_batch(self) -> bool:
        return False

    @property
    def blocks(self) -> str:
        """The layers in words."""
        return f"{self.double_blocks} double, {self.single_blocks} single, {self.heads} heads of {self.head_dim}"

    def activation_values(self, chunked: bool) -> float:
        """Live values per token at the peak of a call, traced: the single blocks, or rotating queries and keys."""
        return (13.3 if chunked else 17.3) * self.width

    def flops(self, tokens: int) -> tuple[float, float]:
        """(linear, dense attention) FLOP of one call."""
        return 24.0 * self.width**2 * self.layers * tokens, 4.0 * self.width * self.layers * tokens**2


@dataclass(frozen=True)
class JointArchitecture(_Transformer):
    """Sizes of a transformer whose blocks all have a picture and a text stream: Stable Diffusion 3, QwenImage.

    Args:
        dual_layers: blocks with a second attention, of the picture alone.
        text_ends: the last block has no text behind its attention.
        packed: latents come as tokens (QwenImage), not as a map.
        guidance_in_batch: the halves of the guidance are a batch of two, not two calls.
        values: live values per token and unit of width at the peak, whole and with feed-forwards in chunks.
    """

    layers: int = 24
    head_dim: int = 64
    dual_layers: int = 0
    text_ends: bool = True
    packed: bool = False
    in_channels: int = 16
    guidance_in_batch: bool = True
    values: tuple[float, float] = (12.8, 8.8)
    encoder_params: int = SD3_ENCODERS

    @property
    def transformer_params(self) -> int:
        """12 d^2 per stream and block, 6 d^2 of modulation; a second attention brings 7 d^2 more."""
        end = 13 if self.text_ends else 0  # no feed-forward, no output projection, two of six modulations
        return self.width**2 * (36 * self.layers + 7 * self.dual_layers - end)

    @property
    def kept_params(self) -> int:
        """Weights that fp8 storage leaves alone: the modulations, which belong to norms."""
        return self.width**2 * (12 * self.layers + 3 * self.dual_layers)

    @property
    def blocks(self) -> str:
        dual = f", {self.dual_layers} with a second attention" if self.dual_layers else ""
        return f"{self.layers} joint{dual}, {self.heads} heads of {self.head_dim}"

    def activation_values(self, chunked: bool) -> float:
        """Live values per token at the peak of one half of the guidance."""
        return self.values[chunked] * self.width

    def flops(self, tokens: int) -> tuple[float, float]:
        """(linear, dense attention) FLOP of one half of the guidance."""
        linear = (24.0 * self.layers + 8.0 * self.dual_layers) * self.width**2 * tokens
        return linear, 4.0 * self.width * (self.layers + self.dual_layers) * tokens**2


@dataclass(frozen=True)
class UNetArchitecture(_WithAutoencoder):
    """Sizes of a UNet that decide cost; the defaults are SDXL's, traced and counted on its real layer shapes.

    A token is a cell of the finest level with attention: 2 x 2 latent pixels of SDXL, one of Stable Diffusion 1.5.
    """

    transformer_params: int = 2_567_000_000
    layers: int = 19  # groups that offloading moves: blocks of the levels
    in_channels: int = 4
    width: int = 640
    head_dim: int = 64
    level: int = 1  # of the finest attention; 0 is the latent's own
    linear_flops: float = 1.467e9  # per token, convolutions and attention to text included
    attention_flops: float = 44_800.0  # per pair of tokens: 10 blocks of 640 channels, 60 of 1280 on a quarter
    values: tuple[float, float] = (20_150.0, 17_950.0)  # live per token at the peak, whole and in chunks
    encoder_params: int = SDXL_ENCODERS
    kept_params: int = 0
    guidance_in_batch: bool = True
    patch: int = 1  # latent cells that sides are multiples of

    @property
    def multiple(self) -> int:
        """Both sides of a picture are multiples of this many pixels."""
        return self.vae_factor * self.patch

    @property
    def blocks(self) -> str:
        return f"{self.width} channels where attention is finest"

    def tokens(self, height: int, width: int) -> int:
        """Picture tokens of a size in pixels."""
        side = 2**self.level * self.vae_factor
        return -(-height // side) * -(-width // side)

    def activation_values(self, chunked: bool) -> float:
        """Live values per token at the peak of one half of the guidance."""
        return self.values[chunked]

    def flops(self, tokens: int) -> tuple[float, float]:
        """(linear, dense attention) FLOP of one half of the guidance."""
        return self.linear_flops * tokens, self.attention_flops * tokens**2


SDXL = UNetArchitecture()


# --- from configs -------------------------------------------------------------------------------------------------


def flux_sizes(config: Config, vae: Config) -> Architecture:
    """From the configs of a FLUX transformer and its autoencoder."""
    return Architecture(
        double_blocks=int(config.get("num_layers", 19)),
        single_blocks=int(config.get("num_single_layers", 38)),
        heads=int(config.get("num_attention_heads", 24)),
        head_dim=int(config.get("attention_head_dim", 128)),
        in_channels=int(config.get("in_channels", 64)),
        guidance_embeds=bool(config.get("guidance_embeds", False)),
        **autoencoder(vae),
    )


def sd3_sizes(config: Config, vae: Config) -> JointArchitecture:
    """From the configs of a Stable Diffusion 3 transformer and its autoencoder."""
    return JointArchitecture(
        layers=int(config.get("num_layers", 18)),
        heads=int(config.get("num_attention_heads", 18)),
        head_dim=int(config.get("attention_head_dim", 64)),
        dual_layers=len(config.get("dual_attention_layers") or ()),
        in_channels=int(config.get("in_channels", 16)),
        **autoencoder(vae),
    )


def qwen_sizes(config: Config, vae: Config) -> JointArchitecture:
    """From the configs of a QwenImage transformer and its autoencoder; guidance is a second call."""
    return replace(
        QWEN,
        layers=int(config.get("num_layers", 60)),
        heads=int(config.get("num_attention_heads", 24)),
        head_dim=int(config.get("attention_head_dim", 128)),
        in_channels=int(config.get("in_channels", 64)),
        **autoencoder(vae),
    )


QWEN = JointArchitecture(
    layers=60,
    heads=24,
    head_dim=128,
    text_ends=False,
    packed=True,
    in_channels=64,
    guidance_in_batch=False,
    vae_class="AutoencoderKLQwenImage",
    vae_channels=(96, 192, 384, 384),
    encoder_params=QWEN_ENCODERS,
)


def unet_sizes(config: Config, vae: Config) -> UNetArchitecture:
    """From the configs of a UNet of Stable Diffusion 1.5, 2 or XL and its autoencoder."""
    channels = [int(c) for c in config.get("block_out_channels") or (320, 640, 1280, 1280)]
    attends = [_attends(kind) for kind in config.get("down_block_types") or _DOWN]
    level = attends.index(True)
    parts = list(_unet_layers(config, channels))
    heads = _per_level(config.get("num_attention_heads") or config.get("attention_head_dim") or 8, len(channels))
    linear = sum(2.0 * (part.params - part.text) * 4.0 ** (level - part.level) for part in parts)
    pairs = sum(4.0 * part.attends * 16.0 ** (level - part.level) for part in parts)
    per_cell = channels[0] * 4**level
    return UNetArchitecture(
        transformer_params=sum(part.params for part in parts) + _unet_rest(config, channels),
        layers=len(channels) * (2 * _layers_per_block(config) + 1) + 4,
        in_channels=int(config.get("in_channels", 4)),
        width=channels[level],
        head_dim=max(1, channels[level] // heads[level]),
        level=level,
        linear_flops=linear,
        attention_flops=pairs,
        values=(15.74 * per_cell, 14.02 * per_cell),  # the last convolutions at full size, as traced for SDXL
        **autoencoder(vae),
    )


def pixart_sizes(config: Config, vae: Config) -> UNetArchitecture:
    """From the configs of a PixArt transformer: tokens of 2 x 2 cells, and attention to text beside its own."""
    heads, head_dim = int(config.get("num_attention_heads", 16)), int(config.get("attention_head_dim", 72))
    layers, width = int(config.get("num_layers", 28)), heads * head_dim
    return UNetArchitecture(
        transformer_params=16 * width**2 * layers,
        layers=layers,
        in_channels=int(config.get("in_channels", 4)),
        width=width,
        head_dim=head_dim,
        linear_flops=28.0 * width**2 * layers,
        attention_flops=4.0 * width * layers,
        values=(13.0 * width, 9.0 * width),  # as Stable Diffusion 3; not traced
        patch=int(config.get("patch_size", 2)),
        **autoencoder(vae),
    )


def autoencoder(vae: Config) -> dict[str, Any]:
    """Class, channels and 3x3 convolutions per level of a decoder, the full resolution first."""
    label = str(vae.get("_class_name", "AutoencoderKL"))
    if label == "AutoencoderTiny":
        channels = vae.get("decoder_block_out_channels") or (64, 64, 64, 64)
        blocks = reversed(vae.get("num_decoder_blocks") or (3, 3, 3, 1))  # its list starts at the lowest level
        convs = tuple(3 * int(count) + 1 for count in blocks)  # three per block and one behind them
    elif "base_dim" in vae:  # AutoencoderKLQwenImage and AutoencoderKLWan: 3-D, of one frame here
        channels = [int(vae["base_dim"]) * int(m) for m in vae.get("dim_mult") or (1, 2, 4, 4)]
        convs = _kl_convs(int(vae.get("num_res_blocks") or 2), len(channels))
    else:
        channels = vae.get("block_out_channels") or (128, 256, 512, 512)
        convs = _kl_convs(int(vae.get("layers_per_block") or 2), len(channels))
    return {"vae_class": label, "vae_channels": tuple(int(c) for c in channels), "vae_convs": convs}


def _kl_convs(layers: int, levels: int) -> tuple[int, ...]:
    """Two per residual block, one for upsampling, and the middle block at the lowest level."""
    each = 2 * (layers + 1) + 1
    return (each,) * (levels - 1) + (each + 4,)


# --- layers of a UNet ---------------------------------------------------------------------------------------------

_DOWN = ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D")
_UP = ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D")


@dataclass(frozen=True)
class _Part:
    """Layers at one level: their weights, how many of them read the text alone, channels of all self-attentions."""

    level: int
    params: int
    attends: int = 0
    text: int = 0


def _attends(kind: str) -> bool:
    return "CrossAttn" in str(kind)


def _layers_per_block(config: Config) -> int:
    value = config.get("layers_per_block", 2)
    return int(value if isinstance(value, int) else value[0])


def _per_level(value: Any, levels: int) -> list[int]:
    return [int(value)] * levels if isinstance(value, int) else [int(v) for v in value]


def _unet_layers(config: Config, channels: Sequence[int]) -> list[_Part]:
    """Residual blocks, transformers and resampling convolutions of all levels."""
    levels, count, emb = len(channels), _layers_per_block(config), 4 * channels[0]
    depth = _per_level(config.get("transformer_layers_per_block") or 1, levels)
    cross = config.get("cross_attention_dim") or 1280
    cross = int(cross if isinstance(cross, int) else cross[0])
    down, up = config.get("down_block_types") or _DOWN, config.get("up_block_types") or _UP
    found = [_Part(0, 9 * int(config.get("in_channels", 4)) * channels[0])]
    before = channels[0]
    for level, kind in enumerate(down):
        out = channels[level]
        for layer in range(count):
            found.append(_Part(level, _resnet(before if layer == 0 else out, out, emb)))
            if _attends(kind):
                found.append(_transformer(level, out, depth[level], cross))
        if level + 1 < levels:
            found.append(_Part(level + 1, 9 * out * out))
        before = out
    last = levels - 1
    found += [_Part(last, _resnet(channels[-1], channels[-1], emb))] * 2
    found.append(_transformer(last, channels[-1], depth[-1], cross))
    before = channels[-1]
    for index, kind in enumerate(up):
        level = last - index
        out, skip = channels[level], channels[max(level - 1, 0)]
        for layer in range(count + 1):
            joined = (before if layer == 0 else out) + (skip if layer == count else out)
            found.append(_Part(level, _resnet(joined, out, emb)))
            if _attends(kind):
                found.append(_transformer(level, out, depth[level], cross))
        if level:
            found.append(_Part(level - 1, 9 * out * out))
        before = out
    found.append(_Part(0, 9 * channels[0] * int(config.get("out_channels", 4))))
    return found


def _resnet(before: int, out: int, emb: int) -> int:
    """Two 3x3 convolutions, the projection of the time, and of the input where channels change."""
    return 9 * before * out + 9 * out * out + emb * out + (before * out if before != out else 0)


def _transformer(level: int, width: int, depth: int, cross: int) -> _Part:
    """Projections, and per layer self-attention, attention to text, and a gated feed-forward."""
    each = 4 * width**2 + 2 * width**2 + 2 * width * cross + 12 * width**2
    return _Part(level, 2 * width**2 + depth * each, depth * width, 2 * depth * width * cross)


def _unet_rest(config: Config, channels: Sequence[int]) -> int:
    """Embeddings of time and, for SDXL, of sizes and pooled text."""
    emb = 4 * channels[0]
    added = int(config.get("projection_class_embeddings_input_dim") or 0)
    return channels[0] * emb + emb * emb + (added * emb + emb * emb if added else 0)
