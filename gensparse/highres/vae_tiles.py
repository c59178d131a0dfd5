"""Autoencoders in tiles: the same picture as in one piece, in bounded memory, handed out as row strips.

Exact mode walks the network's own layers. Before a tile is computed, the region every layer needs is worked out from
the end to the start; each layer then runs on its region and is cropped to what the next one needs. So halos are paid
where they are cheap, and a tile equals the same part of the un-tiled result. GroupNorm depends on the whole picture:
its statistics are gathered over all tiles first (a pass per norm, from the latest stored map). Attention sees the whole
map.

Feather mode decodes overlapping tiles on their own and blends them: faster for networks with GroupNorm, not equal.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from gensparse.errors import ConfigError
from gensparse.highres.latent_tiles import blend_rows

State = tuple[torch.Tensor, ...]  # the map, and behind it the skip connection while inside a residual block
Span = tuple[int, int]
Strips = Iterator[tuple[int, torch.Tensor]]
Reader = Callable[[Span, Span], torch.Tensor]

DEFAULT_MAP_BYTES = 1 << 30
CUT_BYTES = 1 << 28


@dataclass(frozen=True)
class Layer:
    """One step of a network as tiles see it.

    Args:
        run: (state, norm scale, norm shift) -> state on a region of the map.
        radius: pixels of input needed around an output pixel (at input resolution, after striding).
        up, down: output pixels per input pixel, or the reverse.
        norm: the GroupNorm at its start; its scale and shift [1, C, 1, 1] are given to `run`.
        whole: needs the whole map at once (attention).
    """

    run: Callable[[State, torch.Tensor | None, torch.Tensor | None], State]
    radius: int = 0
    up: int = 1
    down: int = 1
    norm: nn.GroupNorm | None = None
    whole: bool = False

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


def _normed(x: torch.Tensor, scale: torch.Tensor | None, shift: torch.Tensor | None) -> torch.Tensor:
    assert scale is not None
    assert shift is not None
    return torch.addcmul(shift, x.float(), scale).to(x.dtype)


def _norm_act_conv(norm: nn.GroupNorm, act: nn.Module, conv: nn.Module) -> Layer:
    return Layer(lambda state, scale, shift: (conv(act(_normed(state[0], scale, shift))),), radius=1, norm=norm)


def _resnet(block: Any) -> list[Layer]:
    """diffusers' ResnetBlock2D without time embedding: two layers, between which the input waits as skip."""
    norms = (block.norm1, block.norm2)
    if not all(isinstance(norm, nn.GroupNorm) for norm in norms) or block.upsample or block.downsample:
        raise ConfigError(f"Exact VAE tiles do not know this form of {type(block).__name__}; use mode='feather'.")

    def first(state: State, scale: torch.Tensor | None, shift: torch.Tensor | None) -> State:
        return block.conv1(block.nonlinearity(_normed(state[0], scale, shift))), state[0]

    def second(state: State, scale: torch.Tensor | None, shift: torch.Tensor | None) -> State:
        inner, skip = state
        inner = block.conv2(block.nonlinearity(_normed(inner, scale, shift)))
        skip = skip if block.conv_shortcut is None else block.conv_shortcut(skip)
        return ((skip + inner) / block.output_scale_factor,)

    return [Layer(first, radius=1, norm=norms[0]), Layer(second, radius=1, norm=norms[1])]


def _upsampler(module: Any) -> list[Layer]:
    nearest = _plain(lambda x: F.interpolate(x, scale_factor=2.0, mode="nearest"), up=2)
    return [nearest, _plain(module.conv, radius=1)]


def _downsampler(module: Any) -> Layer:
    """Stride 2 with one row and column of zeros behind the end (padding 0), or padding 1 on both sides."""
    return _plain(module, radius=2 if module.padding == 0 else 1, down=2)


def _kl_block(block: Any) -> list[Layer]:
    layers = [layer for resnet in block.resnets for layer in _resnet(resnet)]
    layers += [layer for up in getattr(block, "upsamplers", None) or () for layer in _upsampler(up)]
    return layers + [_downsampler(down) for down in getattr(block, "downsamplers", None) or ()]


def _kl_mid(block: Any) -> list[Layer]:
    layers = _resnet(block.resnets[0])
    for attention, resnet in zip(block.attentions, block.resnets[1:], strict=True):
        if attention is not None:
            layers.append(Layer(lambda state, scale, shift, run=attention: (run(state[0]),), whole=True))
        layers += _resnet(resnet)
    return layers


def _kl_ends(network: Any) -> tuple[list[Layer], list[Layer]]:
    tail = _norm_act_conv(network.conv_norm_out, network.conv_act, network.conv_out)
    return [_plain(network.conv_in, radius=1)], [tail]


def _tiny_layer(module: nn.Module) -> Layer:
    if isinstance(module, nn.Conv2d):
        return _plain(module, radius=module.kernel_size[0] // 2, down=module.stride[0])
    if isinstance(module, nn.Upsample):
        if module.mode != "nearest":
            raise ConfigError(f"Exact VAE tiles need nearest upsampling, not {module.mode!r}; use mode='feather'.")
        return _plain(module, up=int(module.scale_factor))
    convs = sum(isinstance(part, nn.Conv2d) and part.kernel_size[0] == 3 for part in module.modules())
    return _plain(module, radius=convs)


def decoder_layers(vae: nn.Module) -> list[Layer]:
    """The decoder of an AutoencoderTiny or AutoencoderKL as tile layers.

    Raises:
        ConfigError: any other class, or a form of these that exact tiles do not know.
    """
    kind, decoder = _kind(vae), vae.decoder
    if kind == "AutoencoderTiny":
        limit = _plain(lambda x: torch.tanh(x / 3) * 3)
        return [limit, *map(_tiny_layer, decoder.layers), _plain(lambda x: x.mul(2).sub_(1))]
    head, tail = _kl_ends(decoder)
    before = [_plain(vae.post_quant_conv)] if vae.post_quant_conv is not None else []
    return before + head + _kl_mid(decoder.mid_block) + [x for b in decoder.up_blocks for x in _kl_block(b)] + tail


def encoder_layers(vae: nn.Module) -> list[Layer]:
    """The encoder as tile layers; see `decoder_layers`. Its result is the mode of the distribution."""
    kind, encoder = _kind(vae), vae.encoder
    if kind == "AutoencoderTiny":
        return [_plain(lambda x: x.add(1).div_(2)), *map(_tiny_layer, encoder.layers)]
    head, tail = _kl_ends(encoder)
    after = [_plain(vae.quant_conv)] if vae.quant_conv is not None else []
    mode = _plain(lambda x: x.chunk(2, dim=1)[0])
    body = [x for b in encoder.down_blocks for x in _kl_block(b)]
    return head + body + _kl_mid(encoder.mid_block) + tail + after + [mode]


def _kind(vae: nn.Module) -> str:
    for kind in type(vae).__mro__:
        if kind.__name__ in ("AutoencoderTiny", "AutoencoderKL"):
            return kind.__name__
    raise ConfigError(
        f"Exact VAE tiles know AutoencoderKL and AutoencoderTiny, not {type(vae).__name__}; use mode='feather'."
    )


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
        values = x.float().reshape(self.groups, -1)
        variance, mean = torch.var_mean(values, dim=1, correction=0)
        count, mean, spread = values.shape[1], mean.double(), variance.double() * values.shape[1]
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
            yield rows[0], strip

    def _settle(self) -> None:
        """Gather every norm's statistics, and store maps on the way.

        A map is stored when it fits in `map_bytes`; else later passes start again from the last stored one. That
        bounds the memory and costs time only in the widest layers of large pictures. Small maps are also stored where
        the resolution changes, since halos of many layers add up across resolutions.
        """
        for stop, layer in enumerate(self.layers):
            if layer.whole:
                self._advance(stop, None)
                self._run_whole(layer)
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
        if store is not None:
            self.source, self.start = Map(tuple(store), self.device), stop

    def _run_whole(self, layer: Layer) -> None:
        height, width = self.source.shape
        state = layer.run(self.source.read((0, height), (0, width)), None, None)
        self.source, self.start = Map(tuple(t.cpu() for t in state), self.device), self.start + 1

    def _tiles(self, part: Sequence[Layer]) -> Iterator[tuple[Span, list[Span]]]:
        """Rows of output tiles of a pass over `part`: (row span, column spans); its finest map gets tiles of `tile`."""
        shapes = lengths(part, self.source.shape)
        height, width = shapes[-1]
        side = max(1, self.tile * height // max(rows for rows, _ in shapes))
        columns = [(x, min(x + side, width)) for x in range(0, width, side)]
        for top in range(0, height, side):
            yield (top, min(top + side, height)), columns


def _allocate(state: State, shape: tuple[int, int], limit: int | None) -> list[torch.Tensor] | None:
    """Empty maps on the CPU for all of `state` at full size; None beyond `limit` bytes."""
    size = sum(t.shape[1] * t.element_size() for t in state) * shape[0] * shape[1]
    if limit is not None and size > limit:
        return None
    return [torch.empty(1, t.shape[1], *shape, dtype=t.dtype) for t in state]


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
    map_bytes: int = DEFAULT_MAP_BYTES,
    device: torch.device | None = None,
) -> Strips:
    """Decode one sample and yield (first row, strip [1, 3, rows, W] in about [-1, 1]) from top to bottom.

    Args:
        vae: AutoencoderTiny or AutoencoderKL; any class with decode() in feather mode.
        latents: [1, C, h, w], already divided by the scaling factor.
        tile: side of a tile in pixels of the picture.
        mode: "exact" or "feather".
        map_bytes: largest intermediate map that is kept (exact mode of networks with GroupNorm).
        device: where the autoencoder computes, if its weights lie elsewhere between calls (feather mode only).
    """
    _check(latents, tile, mode)
    wake(vae)
    weight = next(vae.parameters())
    device = device or weight.device
    latents = latents.to(weight.dtype)
    if mode == "feather":
        scale = latent_scale(vae)

        def read(rows: slice, cols: slice) -> torch.Tensor:
            return vae.decode(latents[..., rows, cols].to(device), return_dict=False)[0]

        cells = max(1, tile // scale)
        yield from blend_rows(read, latents.shape[-2:], cells, cells // 4, out_scale=scale)
        return
    yield from _Walk(decoder_layers(vae), Map((latents,), device), tile, map_bytes, device).strips()


def encode_tiles(
    vae: nn.Module,
    read: Reader,
    shape: tuple[int, int],
    *,
    tile: int = 512,
    mode: str = "exact",
    map_bytes: int = DEFAULT_MAP_BYTES,
    device: torch.device | None = None,
) -> torch.Tensor:
    """Encode one picture that is read region by region; the mode of the distribution [1, C, h, w], not scaled.

    Args:
        read: (row span, column span) -> pixels [1, 3, rows, columns] in [-1, 1].
        shape: (height, width) of the picture in pixels.
        tile, mode, map_bytes, device: as for `decode_strips`.
    """
    wake(vae)
    weight = next(vae.parameters())
    device = device or weight.device

    def load(rows: Span, cols: Span) -> torch.Tensor:
        return read(rows, cols).to(device, weight.dtype)

    scale = latent_scale(vae)
    if mode == "feather":
        cells = max(1, tile // scale)

        def encoded(rows: slice, cols: slice) -> torch.Tensor:
            return mode_of(vae.encode(load((rows.start, rows.stop), (cols.start, cols.stop))))

        grid = (shape[0] // scale, shape[1] // scale)
        strips = blend_rows(encoded, grid, cells, cells // 4, in_scale=scale)
        return torch.cat([strip for _, strip in strips], dim=-2).to(weight.dtype)
    walk = _Walk(encoder_layers(vae), Source(load, shape), tile, map_bytes, device)
    return torch.cat([strip for _, strip in walk.strips()], dim=-2)


def mode_of(encoded: Any) -> torch.Tensor:
    """The latents of an encode() result: a distribution's mode, or AutoencoderTiny's plain latents."""
    return encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mode()


def latent_scale(vae: nn.Module) -> int:
    """Pixels per latent pixel, from the config (one halving between every two blocks)."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


def _check(latents: torch.Tensor, tile: int, mode: str) -> None:
    if mode not in ("exact", "feather"):
        raise ConfigError(f"The VAE tile mode is {mode!r}; choose 'exact' or 'feather'.")
    if tile < 1:
        raise ConfigError(f"The VAE tile is {tile} pixels; give at least 64.")
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
