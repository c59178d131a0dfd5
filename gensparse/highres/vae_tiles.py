"""Autoencoders in tiles: the same picture as in one piece, in bounded memory, handed out as row strips.

Exact mode walks the network's own layers. Before a tile is computed, the region every layer needs is worked out from
the end to the start; each layer then runs on its region and is cropped to what the next one needs. So halos are paid
where they are cheap, and a tile equals the same part of the un-tiled result. GroupNorm depends on the whole picture:
its statistics are gathered over all tiles first (a pass per norm, from the latest stored map). Attention sees the whole
map.

Blended modes compute overlapping tiles of one size on their own and fade between them: faster for networks with
GroupNorm, not equal. "feather" calls the network per tile. "synced" runs all tiles layer by layer, with one set of
GroupNorm statistics for all of them, so that tiles have one tone; between two norms the maps of all tiles wait on the
CPU (as sync_tiled_decode of ScaleCrafter, arXiv 2310.07702, and FouriScale, arXiv 2403.12963; here a pixel that
several tiles share counts once).

The device holds one tile (and, in exact mode, keys and values of the mid-block's attention); all else is on the CPU.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from gensparse.errors import ConfigError
from gensparse.highres.latent_tiles import blend_rows, tile_starts
from gensparse.highres.stream import streamed_attention
from gensparse.highres.tiling import OVERLAP, Tiling

State = tuple[torch.Tensor, ...]  # the map, and behind it the skip connection while inside a residual block
Span = tuple[int, int]
Strips = Iterator[tuple[int, torch.Tensor]]
Reader = Callable[[Span, Span], torch.Tensor]

DEFAULT_MAP_BYTES = 1 << 30
CUT_BYTES = 1 << 28
BLOCK_BYTES = 1 << 26  # float32 copies that norms make at a time
EXACT = ("AutoencoderKL", "AutoencoderTiny", "AutoencoderKLQwenImage")  # classes whose layers are known
ATTENTION_TOKENS = 16_384  # tokens that are projected at a time


@dataclass(frozen=True)
class Layer:
    """One step of a network as tiles see it.

    Args:
        run: (state, norm scale, norm shift) -> state on a region of the map.
        radius: pixels of input needed around an output pixel (at input resolution, after striding).
        up, down: output pixels per input pixel, or the reverse.
        channels: of its widest map, at the finer of its two resolutions; 0 says nothing.
        norm: the GroupNorm at its start; its scale and shift [1, C, 1, 1] are given to `run`.
        whole: attention: (stored map, norm scale, norm shift) -> the whole new map on the CPU. `run` is its form for a
            map that is a tile.
    """

    run: Callable[[State, torch.Tensor | None, torch.Tensor | None], State]
    radius: int = 0
    up: int = 1
    down: int = 1
    channels: int = 0
    norm: nn.GroupNorm | None = None
    whole: Callable[["Map", torch.Tensor | None, torch.Tensor | None], torch.Tensor] | None = None

    def needs(self, span: Span, length: int) -> Span:
        """The input region for the output region `span`, inside an input of `length`."""
        if self.up > 1:
            return span[0] // self.up, -(-span[1] // self.up)
        start = max(0, span[0] * self.down - self.radius)
        stop = min(length, (span[1] - 1) * self.down + self.radius + 1)
        return start - start % self.down, stop


# --- layers of the supported networks -------------------------------------------------------------------------------


def _plain(function: Callable[[torch.Tensor], torch.Tensor], **geometry: int) -> Layer:
    return Layer(lambda state, scale, shift: (function(state[0]),), **geometry)


def _identity(x: torch.Tensor) -> torch.Tensor:
    return x


def _normed(
    x: torch.Tensor,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    act: Callable[[torch.Tensor], torch.Tensor] = _identity,
) -> torch.Tensor:
    """act(x * scale + shift), computed in float32 a few channels at a time."""
    assert scale is not None
    assert shift is not None
    step = max(1, BLOCK_BYTES // (4 * x.shape[-2] * x.shape[-1]))
    if step >= x.shape[1]:
        return act(torch.addcmul(shift, x.float(), scale).to(x.dtype))
    out = torch.empty_like(x)
    for start in range(0, x.shape[1], step):
        part = slice(start, start + step)
        out[:, part] = act(torch.addcmul(shift[:, part], x[:, part].float(), scale[:, part]).to(x.dtype))
    return out


def _norm_act_conv(norm: nn.GroupNorm, act: nn.Module, conv: nn.Module) -> Layer:
    def run(state: State, scale: torch.Tensor | None, shift: torch.Tensor | None) -> State:
        return (conv(_normed(state[0], scale, shift, act)),)

    return Layer(run, radius=1, channels=_widest(conv), norm=norm)


def _widest(module: nn.Module) -> int:
    """The most channels that a convolution in `module` takes or makes."""
    convs = [part for part in module.modules() if isinstance(part, nn.Conv2d | nn.Conv3d)]
    return max((max(conv.in_channels, conv.out_channels) for conv in convs), default=0)


def _resnet(block: Any) -> list[Layer]:
    """diffusers' ResnetBlock2D without time embedding: two layers, between which the input waits as skip."""
    norms = (block.norm1, block.norm2)
    if not all(isinstance(norm, nn.GroupNorm) for norm in norms) or block.upsample or block.downsample:
        raise ConfigError(f"Exact VAE tiles do not know this form of {type(block).__name__}; use mode='feather'.")

    def first(state: State, scale: torch.Tensor | None, shift: torch.Tensor | None) -> State:
        return block.conv1(_normed(state[0], scale, shift, block.nonlinearity)), state[0]

    def second(state: State, scale: torch.Tensor | None, shift: torch.Tensor | None) -> State:
        inner, skip = state
        inner = block.conv2(_normed(inner, scale, shift, block.nonlinearity))
        skip = skip if block.conv_shortcut is None else block.conv_shortcut(skip)
        inner = inner.add_(skip)  # in place: maps are large, and this one is new
        return (inner if block.output_scale_factor == 1 else inner / block.output_scale_factor,)

    wide = _widest(block)
    return [Layer(run, radius=1, channels=wide, norm=norm) for run, norm in zip((first, second), norms, strict=True)]


def _upsampler(module: Any) -> list[Layer]:
    nearest = _plain(lambda x: F.interpolate(x, scale_factor=2.0, mode="nearest"), up=2)
    return [nearest, _plain(module.conv, radius=1, channels=_widest(module.conv))]


def _downsampler(module: Any) -> Layer:
    """Stride 2 with one row and column of zeros behind the end (padding 0), or padding 1 on both sides."""
    return _plain(module, radius=2 if module.padding == 0 else 1, down=2, channels=_widest(module))


def _kl_block(block: Any) -> list[Layer]:
    layers = [layer for resnet in block.resnets for layer in _resnet(resnet)]
    layers += [layer for up in getattr(block, "upsamplers", None) or () for layer in _upsampler(up)]
    return layers + [_downsampler(down) for down in getattr(block, "downsamplers", None) or ()]


def _kl_mid(block: Any) -> list[Layer]:
    layers = _resnet(block.resnets[0])
    for attention, resnet in zip(block.attentions, block.resnets[1:], strict=True):
        if attention is not None:
            layers.append(_attention(attention))
        layers += _resnet(resnet)
    return layers


def _attention(attention: Any) -> Layer:
    """diffusers' Attention as VAEs have it: GroupNorm, one softmax over all pixels, and the input added again."""
    unknown = [name for name in ("spatial_norm", "norm_q", "norm_k", "added_kv_proj_dim") if getattr(attention, name)]
    if unknown or not isinstance(attention.group_norm, nn.GroupNorm):
        raise ConfigError(
            f"Exact VAE tiles do not know attention with {unknown or 'no GroupNorm'}; use mode='feather'."
        )

    def over(source: Map, scale: torch.Tensor | None, shift: torch.Tensor | None) -> torch.Tensor:
        return _mixed(attention, source, lambda x: _normed(x, scale, shift))

    return _whole_map(over, norm=attention.group_norm)


def _whole_map(
    over: Callable[["Map", torch.Tensor | None, torch.Tensor | None], torch.Tensor], norm: nn.GroupNorm | None = None
) -> Layer:
    """A layer that sees the whole map at once."""

    def run(state: State, scale: torch.Tensor | None, shift: torch.Tensor | None) -> State:
        return (over(Map(state, state[0].device), scale, shift).to(state[0].device),)

    return Layer(run, norm=norm, whole=over)


def _mixed(attention: Any, source: "Map", norm: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """The attention over a stored map, rows by rows; the device holds keys, values and one block."""
    height, width = source.shape
    rows = max(1, ATTENTION_TOKENS // width)
    spans = [(top, min(top + rows, height)) for top in range(0, height, rows)]

    def read(span: Span) -> tuple[torch.Tensor, torch.Tensor]:
        (x,) = source.read(span, (0, width))
        return x, norm(x).flatten(2)[0].T

    def heads(tokens: torch.Tensor) -> torch.Tensor:
        return tokens.unflatten(-1, (attention.heads, -1)).transpose(0, 1)

    keys: torch.Tensor | None = None
    values: torch.Tensor | None = None
    for top, end in spans:
        _, tokens = read((top, end))
        k, v = heads(attention.to_k(tokens)), heads(attention.to_v(tokens))
        if keys is None:
            keys, values = (t.new_empty(t.shape[0], height * width, t.shape[-1]) for t in (k, v))
        keys[:, top * width : end * width], values[:, top * width : end * width] = k, v
    assert keys is not None
    assert values is not None
    out = torch.empty_like(source.tensors[0], device="cpu")
    for top, end in spans:
        x, tokens = read((top, end))
        mixed = streamed_attention(heads(attention.to_q(tokens)), keys, values)
        y = attention.to_out[0](mixed.transpose(0, 1).flatten(1)).T.reshape(x.shape)
        y = y + x if attention.residual_connection else y
        out[..., top:end, :] = (y / attention.rescale_output_factor).cpu()
    return out


def _kl_ends(network: Any) -> tuple[list[Layer], list[Layer]]:
    tail = _norm_act_conv(network.conv_norm_out, network.conv_act, network.conv_out)
    return [_plain(network.conv_in, radius=1, channels=_widest(network.conv_in))], [tail]


def _tiny_layer(module: nn.Module) -> Layer:
    if isinstance(module, nn.Conv2d):
        return _plain(module, radius=module.kernel_size[0] // 2, down=module.stride[0], channels=_widest(module))
    if isinstance(module, nn.Upsample):
        if module.mode != "nearest":
            raise ConfigError(f"Exact VAE tiles need nearest upsampling, not {module.mode!r}; use mode='feather'.")
        return _plain(module, up=int(module.scale_factor))
    convs = sum(isinstance(part, nn.Conv2d) and part.kernel_size[0] == 3 for part in module.modules())
    return _plain(module, radius=convs, channels=_widest(module))


# AutoencoderKLQwenImage: an autoencoder of clips, of which a picture is one frame. Its convolutions pad time with empty
# frames, its norms are over the channels of a pixel, so that nothing but the attention in its middle sees the picture.


def _still(conv: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """A convolution of clips on a clip of one frame, [B, C, H, W]."""
    return lambda x: conv(x[:, :, None])[:, :, 0]


def _still_norm(norm: nn.Module, act: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: act(norm(x[:, :, None])[:, :, 0])


def _still_conv(conv: nn.Module, before: Callable[[torch.Tensor], torch.Tensor] = _identity) -> Layer:
    apply = _still(conv)
    return _plain(lambda x: apply(before(x)), radius=conv.kernel_size[-1] // 2, channels=_widest(conv))


def _still_resnet(block: Any) -> list[Layer]:
    convs = [_still(conv) for conv in (block.conv1, block.conv2)]
    norms = [_still_norm(norm, block.nonlinearity) for norm in (block.norm1, block.norm2)]
    plain = isinstance(block.conv_shortcut, nn.Identity)
    shortcut = _identity if plain else _still(block.conv_shortcut)

    def first(state: State, scale: torch.Tensor | None, shift: torch.Tensor | None) -> State:
        return convs[0](norms[0](state[0])), shortcut(state[0])

    def second(state: State, scale: torch.Tensor | None, shift: torch.Tensor | None) -> State:
        inner, skip = state
        return (convs[1](norms[1](inner)).add_(skip),)

    return [Layer(run, radius=1, channels=_widest(block)) for run in (first, second)]


def _still_resample(block: Any) -> list[Layer]:
    """Twice as many pixels, or half; time is left out, as the autoencoder does for the first frame."""
    change, conv = block.resample[0], block.resample[1]
    if block.mode.startswith("upsample"):
        return [_plain(change, up=2), _plain(conv, radius=1, channels=_widest(conv))]
    return [_plain(block.resample, radius=2, down=2, channels=_widest(conv))]


class _OneHead:
    """QwenImageAttentionBlock by the names of diffusers' Attention."""

    heads, residual_connection, rescale_output_factor = 1, True, 1.0

    def __init__(self, block: Any) -> None:
        self.block, self.to_out = block, [self._out]

    def _project(self, tokens: torch.Tensor, part: int) -> torch.Tensor:
        conv = self.block.to_qkv
        weights, bias = (x.chunk(3)[part] for x in (conv.weight.flatten(1), conv.bias))
        return F.linear(tokens, weights, bias)

    def to_q(self, tokens: torch.Tensor) -> torch.Tensor:
        return self._project(tokens, 0)

    def to_k(self, tokens: torch.Tensor) -> torch.Tensor:
        return self._project(tokens, 1)

    def to_v(self, tokens: torch.Tensor) -> torch.Tensor:
        return self._project(tokens, 2)

    def _out(self, tokens: torch.Tensor) -> torch.Tensor:
        return F.linear(tokens, self.block.proj.weight.flatten(1), self.block.proj.bias)


def _still_attention(block: Any) -> Layer:
    return _whole_map(lambda source, scale, shift: _mixed(_OneHead(block), source, block.norm))


def _still_layers(blocks: Any) -> list[Layer]:
    """Blocks of the encoder or decoder, which are known by their parts."""
    layers: list[Layer] = []
    for block in blocks:
        if hasattr(block, "resnets"):
            attentions = getattr(block, "attentions", None) or [None] * (len(block.resnets) - 1)
            for k, resnet in enumerate(block.resnets):
                layers += _still_resnet(resnet)
                if k < len(attentions) and attentions[k] is not None:
                    layers.append(_still_attention(attentions[k]))
            layers += _still_layers(getattr(block, "upsamplers", None) or ())
        else:
            layers += _still_resample(block) if hasattr(block, "resample") else _still_resnet(block)
    return layers


def _still_ends(network: Any) -> tuple[list[Layer], list[Layer]]:
    tail = _still_conv(network.conv_out, _still_norm(network.norm_out, network.nonlinearity))
    return [_still_conv(network.conv_in)], [tail]


def decoder_layers(vae: nn.Module) -> list[Layer]:
    """The decoder of an AutoencoderTiny, AutoencoderKL or AutoencoderKLQwenImage as tile layers.

    Raises:
        ConfigError: any other class, or a form of these that exact tiles do not know.
    """
    kind, decoder = _kind(vae), vae.decoder
    if kind == "AutoencoderTiny":
        limit = _plain(lambda x: torch.tanh(x / 3) * 3)
        return [limit, *map(_tiny_layer, decoder.layers), _plain(lambda x: x.mul(2).sub_(1))]
    if kind == "AutoencoderKLQwenImage":
        head, tail = _still_ends(decoder)
        body = _still_layers([decoder.mid_block, *decoder.up_blocks])
        return [_still_conv(vae.post_quant_conv), *head, *body, *tail, _plain(lambda x: x.clamp(-1, 1))]
    head, tail = _kl_ends(decoder)
    before = [_plain(vae.post_quant_conv)] if vae.post_quant_conv is not None else []
    return before + head + _kl_mid(decoder.mid_block) + [x for b in decoder.up_blocks for x in _kl_block(b)] + tail


def encoder_layers(vae: nn.Module) -> list[Layer]:
    """The encoder as tile layers; see `decoder_layers`. Its result is the mode of the distribution."""
    kind, encoder = _kind(vae), vae.encoder
    if kind == "AutoencoderTiny":
        return [_plain(lambda x: x.add(1).div_(2)), *map(_tiny_layer, encoder.layers)]
    if kind == "AutoencoderKLQwenImage":
        head, tail = _still_ends(encoder)
        body = _still_layers([*encoder.down_blocks, encoder.mid_block])
        return [*head, *body, *tail, _still_conv(vae.quant_conv), _plain(lambda x: x.chunk(2, dim=1)[0])]
    head, tail = _kl_ends(encoder)
    after = [_plain(vae.quant_conv)] if vae.quant_conv is not None else []
    mode = _plain(lambda x: x.chunk(2, dim=1)[0])
    body = [x for b in encoder.down_blocks for x in _kl_block(b)]
    return head + body + _kl_mid(encoder.mid_block) + tail + after + [mode]


def _kind(vae: nn.Module) -> str:
    for kind in type(vae).__mro__:
        if kind.__name__ in EXACT:
            return kind.__name__
    raise ConfigError(f"Exact VAE tiles know {', '.join(EXACT)}, not {type(vae).__name__}; use mode='feather'.")


# --- the walk -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Map:
    """A stored map of one sample, kept where `tensors` are; `read` gives a region on the compute device."""

    tensors: State
    device: torch.device

    @property
    def shape(self) -> tuple[int, int]:
        return self.tensors[0].shape[-2], self.tensors[0].shape[-1]

    def read(self, rows: Span, cols: Span) -> State:
        return tuple(t[..., slice(*rows), slice(*cols)].to(self.device) for t in self.tensors)


@dataclass(frozen=True)
class Source:
    """A picture that is produced region by region and never stored."""

    reader: Reader
    shape: tuple[int, int]

    def read(self, rows: Span, cols: Span) -> State:
        return (self.reader(rows, cols),)


Norms = dict[int, tuple[torch.Tensor, torch.Tensor]]  # layer index -> scale and shift


def lengths(layers: Sequence[Layer], shape: tuple[int, int]) -> list[tuple[int, int]]:
    """The map's shape before every layer and behind the last."""
    shapes = [shape]
    for layer in layers:
        shapes.append(tuple(-(-n * layer.up // layer.down) for n in shapes[-1]))
    return shapes


def run_tile(
    layers: Sequence[Layer], norms: Norms, source: Map | Source, rows: Span, cols: Span, offset: int = 0
) -> State:
    """Layers on the region of `source` that gives exactly the output region rows x cols."""
    shapes = lengths(layers, source.shape)
    wanted = [(rows, cols)]
    for layer, shape in zip(reversed(layers), reversed(shapes[:-1]), strict=True):
        wanted.append(tuple(layer.needs(span, n) for span, n in zip(wanted[-1], shape, strict=True)))
    wanted.reverse()
    state = tuple(_fast_order(t) for t in source.read(*wanted[0]))
    for k, layer in enumerate(layers):
        state = layer.run(state, *norms.get(k + offset, (None, None)))
        state = _crop(state, layer, wanted[k], wanted[k + 1])
    return state


def _fast_order(x: torch.Tensor) -> torch.Tensor:
    """On CPUs convolutions run up to twice as fast with channels last; the order then stays through all layers."""
    return x.contiguous(memory_format=torch.channels_last) if x.device.type == "cpu" else x


def _crop(state: State, layer: Layer, have: tuple[Span, Span], want: tuple[Span, Span]) -> State:
    slices = []
    for (start, _), (low, high) in zip(have, want, strict=True):
        first = start * layer.up // layer.down
        slices.append(slice(low - first, high - first))
    return tuple(t[..., slices[0], slices[1]] for t in state)


class _Moments:
    """Mean and variance per group, merged tile by tile (Chan et al.) in float64."""

    def __init__(self, groups: int) -> None:
        self.groups, self.count = groups, 0
        self.mean: torch.Tensor | float = 0.0
        self.spread: torch.Tensor | float = 0.0

    def add(self, x: torch.Tensor) -> None:
        each = x.shape[1] // self.groups
        count = each * x.shape[0] * x.shape[-2] * x.shape[-1]
        step = max(1, BLOCK_BYTES // (4 * count))
        blocks = [x[:, each * g : each * (g + step)] for g in range(0, self.groups, step)]
        pairs = [torch.var_mean(b.float().reshape(b.shape[1] // each, -1), dim=1, correction=0) for b in blocks]
        variance, mean = (torch.cat(side).double() for side in zip(*pairs, strict=True))
        spread = variance * count
        total = self.count + count
        apart = mean - self.mean
        self.spread = self.spread + spread + apart**2 * (self.count * count / total)
        self.mean = self.mean + apart * (count / total)
        self.count = total

    def affine(self, norm: nn.GroupNorm) -> tuple[torch.Tensor, torch.Tensor]:
        """The norm as scale and shift, float32 [1, C, 1, 1]."""
        assert isinstance(self.mean, torch.Tensor)
        per_channel = norm.num_channels // self.groups
        rstd = (self.spread / self.count + norm.eps).rsqrt().repeat_interleave(per_channel)
        mean = self.mean.repeat_interleave(per_channel)
        scale = rstd * norm.weight.double() if norm.affine else rstd
        shift = -mean * scale + (norm.bias.double() if norm.affine else 0)
        return tuple(t.float().reshape(1, -1, 1, 1) for t in (scale, shift))


class _Walk:
    """One network on one sample: the latest stored map, where it lies in the network, and the norms known so far."""

    def __init__(
        self, layers: Sequence[Layer], source: Map | Source, tile: int, map_bytes: int, device: torch.device
    ) -> None:
        self.layers, self.source, self.start = layers, source, 0
        self.widest = _channels_of_the_finest(layers, source.shape)
        self.tile, self.map_bytes, self.device = tile, map_bytes, device
        self.norms: Norms = {}

    def strips(self) -> Strips:
        """The result, (first row, strip [1, C, rows, W]) from top to bottom."""
        self._settle()
        part, strip = self.layers[self.start :], None
        shape = lengths(part, self.source.shape)[-1]
        for rows, columns in self._tiles(part):
            for cols in columns:
                piece = run_tile(part, self.norms, self.source, rows, cols, offset=self.start)[0]
                if cols[0] == 0:
                    strip = piece.new_empty(1, piece.shape[1], rows[1] - rows[0], shape[1])
                strip[..., slice(*cols)] = piece
                del piece  # it would wait beside the next one
            yield rows[0], strip

    def _settle(self) -> None:
        """Gather every norm's statistics, and store maps on the way.

        A map is stored when it fits in `map_bytes`; else later passes start again from the last stored one. That
        bounds the memory and costs time only in the widest layers of large pictures. Small maps are also stored where
        the resolution changes, since halos of many layers add up across resolutions.
        """
        for stop, layer in enumerate(self.layers):
            if layer.whole is not None:
                moments = _Moments(layer.norm.num_groups) if layer.norm is not None else None
                self._advance(stop, None, moments)
                affine = (None, None) if moments is None else moments.affine(layer.norm)
                self.source, self.start = Map((layer.whole(self.source, *affine),), self.device), self.start + 1
            elif layer.norm is not None:
                moments = _Moments(layer.norm.num_groups)
                self._advance(stop, self.map_bytes, moments)
                self.norms[stop] = moments.affine(layer.norm)
            elif stop > self.start and (layer.up > 1 or self.layers[stop - 1].down > 1):
                self._advance(stop, min(self.map_bytes, CUT_BYTES))

    def _advance(self, stop: int, limit: int | None, moments: _Moments | None = None) -> None:
        """Run up to layer `stop` over all tiles, count `moments` there, and store that map if it fits in `limit`."""
        part = self.layers[self.start : stop]
        shape = lengths(part, self.source.shape)[-1]
        store: list[torch.Tensor] | None = None
        for number, (rows, cols) in enumerate((r, c) for r, columns in self._tiles(part) for c in columns):
            state = run_tile(part, self.norms, self.source, rows, cols, offset=self.start)
            if number == 0:
                store = _allocate(state, shape, limit)
                if store is None and moments is None:
                    return
            if moments is not None:
                moments.add(state[0])
            for whole, piece in zip(store or (), state, strict=store is not None):
                whole[..., slice(*rows), slice(*cols)] = piece
                del piece
            del state  # it would wait beside the next one
        if store is not None:
            self.source, self.start = Map(tuple(store), self.device), stop

    def _tiles(self, part: Sequence[Layer]) -> Iterator[tuple[Span, list[Span]]]:
        """Rows of output tiles of a pass over `part`: (row span, column spans).

        No map of a tile is larger than `tile` pixels, or has more values than one of `tile` pixels has at the picture's
        own resolution: coarser maps have more channels.
        """
        shapes = lengths(part, self.source.shape)
        height, width = shapes[-1]
        finest = 1.0  # map pixels per output pixel, of an axis
        for layer, before, after in zip(part, shapes, shapes[1:], strict=False):
            wide = max(1.0, (layer.channels or self.widest) / self.widest)
            finest = max(finest, max(before[0], after[0]) / height * math.sqrt(wide))
        side = max(1, int(self.tile / finest))
        columns = [(x, min(x + side, width)) for x in range(0, width, side)]
        for top in range(0, height, side):
            yield (top, min(top + side, height)), columns


def _channels_of_the_finest(layers: Sequence[Layer], shape: tuple[int, int]) -> int:
    """Channels of the widest map at the picture's own resolution."""
    shapes = lengths(layers, shape)
    finest = max(rows for rows, _ in shapes)
    ends = zip(layers, shapes, shapes[1:], strict=False)
    return max(1, *(layer.channels for layer, before, after in ends if max(before[0], after[0]) == finest))


def _allocate(state: State, shape: tuple[int, int], limit: int | None) -> list[torch.Tensor] | None:
    """Empty maps on the CPU for all of `state` at full size; None beyond `limit` bytes."""
    size = sum(t.shape[1] * t.element_size() for t in state) * shape[0] * shape[1]
    if limit is not None and size > limit:
        return None
    return [torch.empty(1, t.shape[1], *shape, dtype=t.dtype) for t in state]


# --- blended tiles ---------------------------------------------------------------------------------------------------


class _Synced:
    """Overlapping tiles of one picture that pass a network together: one GroupNorm for all of them.

    Args:
        layers: of the network.
        read: (row slice, column slice) in cells -> a tile's input on the compute device.
        shape, tile, overlap: of the picture and its tiles in cells (latent pixels).
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        read: Callable[[slice, slice], torch.Tensor],
        shape: tuple[int, int],
        tile: int,
        overlap: int,
    ) -> None:
        self.layers, self.read = layers, read
        self.spans = [[(s, s + min(tile, n)) for s in tile_starts(n, tile, overlap)] for n in shape]
        self.shares = [_shares(spans) for spans in self.spans]
        self.waiting: dict[tuple[int, int], State] = {}
        self.device = torch.device("cpu")
        self.done, self.affine = 0, (None, None)
        norms = [k for k, layer in enumerate(layers) if layer.norm is not None]
        for stop in norms:
            self._pass(stop)

    def finish(self, rows: slice, cols: slice) -> torch.Tensor:
        """The result of one tile, named by its cells; each may be asked for once."""
        state = self._run(rows.start, cols.start, len(self.layers))
        return state[0]

    def _pass(self, stop: int) -> None:
        """Run every tile up to the norm at layer `stop`, and count its statistics there."""
        norm = self.layers[stop].norm
        moments = _Moments(norm.num_groups)
        for (top, bottom), share in zip(self.spans[0], self.shares[0], strict=True):
            for (left, _), across in zip(self.spans[1], self.shares[1], strict=True):
                state = self._run(top, left, stop)
                each = state[0].shape[-2] / (bottom - top)  # map pixels of a cell
                own = (slice(round(a * each), round(b * each)) for a, b in (share, across))
                moments.add(state[0][(..., *own)])
                self.waiting[top, left] = tuple(t.cpu() for t in state)
                del state  # it would wait beside the next one
        self.done, self.affine = stop, moments.affine(norm)

    def _run(self, top: int, left: int, stop: int) -> State:
        """A tile from where it waits up to layer `stop`."""
        if self.done == 0 and (top, left) not in self.waiting:
            rows, cols = (
                next(s for s in spans if s[0] == at) for spans, at in zip(self.spans, (top, left), strict=True)
            )
            state: State = (self.read(slice(*rows), slice(*cols)),)
            self.device = state[0].device
        else:
            state = tuple(t.to(self.device) for t in self.waiting.pop((top, left)))
        for k in range(self.done, stop):
            state = self.layers[k].run(state, *(self.affine if k == self.done else (None, None)))
        return state


def _shares(spans: Sequence[Span]) -> list[Span]:
    """The part of each tile of an axis that counts: up to the middle of an overlap; relative to the tile."""
    middles = [(a[1] + b[0]) // 2 for a, b in pairwise(spans)]
    edges = [spans[0][0], *middles, spans[-1][1]]
    return [(low - start, high - start) for (start, _), (low, high) in zip(spans, pairwise(edges), strict=True)]


def _blended(
    vae: nn.Module,
    network: str,
    read: Callable[[slice, slice], torch.Tensor],
    shape: tuple[int, int],
    tiling: Tiling,
) -> Strips:
    """Strips of the decoder's or encoder's result; `read` gives a tile's input, named in cells."""
    scale = latent_scale(vae)
    cells = max(1, tiling.tile // scale)
    overlap = min(cells - 1, round(cells * tiling.overlap))
    out_scale = scale if network == "decoder" else 1
    if tiling.mode == "synced":
        layers = decoder_layers(vae) if network == "decoder" else encoder_layers(vae)
        run = _Synced(layers, read, shape, cells, overlap).finish
    elif network == "decoder":

        def run(rows: slice, cols: slice) -> torch.Tensor:
            return decoded(vae, read(rows, cols))
    else:

        def run(rows: slice, cols: slice) -> torch.Tensor:
            return encoded(vae, read(rows, cols))

    return blend_rows(run, shape, cells, overlap, out_scale=out_scale)


# --- what pipelines call --------------------------------------------------------------------------------------------


def wake(vae: nn.Module) -> None:
    """Let an offload hook move the autoencoder to its device, as its own decode() and encode() do."""
    hook = getattr(vae, "_hf_hook", None)
    if hasattr(hook, "pre_forward"):
        hook.pre_forward(vae)


def supports_exact(vae: nn.Module) -> bool:
    """Whether exact tiles know this autoencoder."""
    try:
        return bool(decoder_layers(vae) and encoder_layers(vae))
    except ConfigError:
        return False


def decode_strips(
    vae: nn.Module,
    latents: torch.Tensor,
    *,
    tile: int = 512,
    mode: str = "exact",
    overlap: float = OVERLAP,
    map_bytes: int = DEFAULT_MAP_BYTES,
    device: torch.device | None = None,
) -> Strips:
    """Decode one sample and yield (first row, strip [1, 3, rows, W] in about [-1, 1]) from top to bottom.

    Args:
        vae: one of the classes in `EXACT`; any class with decode() in feather mode.
        latents: [1, C, h, w], already divided by the scaling factor.
        tile: side of a tile in pixels of the picture.
        mode: "exact", "feather" or "synced"; see `gensparse.highres.tiling.Tiling`.
        overlap: share of a tile that the next one covers too (blended modes).
        map_bytes: largest intermediate map that is kept (exact mode of networks with GroupNorm).
        device: where the autoencoder computes, if its weights lie elsewhere between calls (feather mode only).
    """
    _check(latents)
    tiling = Tiling(mode, tile, overlap)
    wake(vae)
    weight = next(vae.parameters())
    device = device or weight.device
    latents = latents.to(weight.dtype)
    if mode != "exact":

        def read(rows: slice, cols: slice) -> torch.Tensor:
            return latents[..., rows, cols].to(device)

        yield from _blended(vae, "decoder", read, latents.shape[-2:], tiling)
        return
    yield from _Walk(decoder_layers(vae), Map((latents,), device), tile, map_bytes, device).strips()


def encode_tiles(
    vae: nn.Module,
    read: Reader,
    shape: tuple[int, int],
    *,
    tile: int = 512,
    mode: str = "exact",
    overlap: float = OVERLAP,
    map_bytes: int = DEFAULT_MAP_BYTES,
    device: torch.device | None = None,
) -> torch.Tensor:
    """Encode one picture that is read region by region; the mode of the distribution [1, C, h, w], not scaled.

    Args:
        read: (row span, column span) -> pixels [1, 3, rows, columns] in [-1, 1].
        shape: (height, width) of the picture in pixels.
        tile, mode, overlap, map_bytes, device: as for `decode_strips`.
    """
    tiling = Tiling(mode, tile, overlap)
    wake(vae)
    weight = next(vae.parameters())
    device = device or weight.device

    def load(rows: Span, cols: Span) -> torch.Tensor:
        return read(rows, cols).to(device, weight.dtype)

    if mode != "exact":
        scale = latent_scale(vae)

        def cells(rows: slice, cols: slice) -> torch.Tensor:
            return load(*((span.start * scale, span.stop * scale) for span in (rows, cols)))

        grid = (shape[0] // scale, shape[1] // scale)
        strips = _blended(vae, "encoder", cells, grid, tiling)
        return torch.cat([strip for _, strip in strips], dim=-2).to(device, weight.dtype)
    walk = _Walk(encoder_layers(vae), Source(load, shape), tile, map_bytes, device)
    return torch.cat([strip for _, strip in walk.strips()], dim=-2)


def takes_clips(vae: nn.Module) -> bool:
    """Whether an autoencoder wants clips [B, C, F, H, W]; a picture is a clip of one frame."""
    return any(isinstance(part, nn.Conv3d) for part in vae.modules())


def decoded(vae: nn.Module, latents: torch.Tensor) -> torch.Tensor:
    """Pictures [B, 3, H, W] of latents [B, C, h, w], by the autoencoder's own decode()."""
    if takes_clips(vae):
        return vae.decode(latents[:, :, None], return_dict=False)[0][:, :, 0]
    return vae.decode(latents, return_dict=False)[0]


def encoded(vae: nn.Module, pictures: torch.Tensor) -> torch.Tensor:
    """Latents [B, C, h, w] of pictures [B, 3, H, W], by the autoencoder's own encode(), not scaled."""
    if takes_clips(vae):
        return mode_of(vae.encode(pictures[:, :, None]))[:, :, 0]
    return mode_of(vae.encode(pictures))


def mode_of(encoding: Any) -> torch.Tensor:
    """The latents of an encode() result: a distribution's mode, or AutoencoderTiny's plain latents."""
    return encoding.latents if hasattr(encoding, "latents") else encoding.latent_dist.mode()


def latent_scale(vae: nn.Module) -> int:
    """Pixels per latent pixel: what the autoencoder says, or one halving between every two blocks of its config."""
    stated = getattr(vae, "spatial_compression_ratio", None)
    if isinstance(stated, int):
        return stated
    return 2 ** (len(vae.config.block_out_channels) - 1)


def _check(latents: torch.Tensor) -> None:
    if latents.ndim != 4 or latents.shape[0] != 1:
        raise ConfigError(
            f"decode_strips takes one sample [1, C, h, w], not {tuple(latents.shape)}; call it per sample."
        )


def fill(strips: Strips, out: torch.Tensor) -> torch.Tensor:
    """Write strips into a float picture `out` [1, 3, H, W]."""
    for top, strip in strips:
        out[..., top : top + strip.shape[-2], :] = strip
    return out


def fill_bytes(strips: Strips, out: torch.Tensor) -> torch.Tensor:
    """Write strips in [-1, 1] into a byte picture `out` [H, W, 3], rounded as diffusers' image processor does."""
    for top, strip in strips:
        levels = (strip[0] * 0.5 + 0.5).clamp_(0, 1).mul_(255).round_()
        out[top : top + strip.shape[-2]] = levels.to(torch.uint8).movedim(0, -1)
    return out
