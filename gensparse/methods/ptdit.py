"""PT-DiT: averaged proxy tokens carry global attention, windows carry detail (Qihoo-T2X, Wang et al. 2409.04005).

A model of its own, with weights of its own (Qihoo-T2I, `qihoo360/Qihoo-T2X`), not a method for other models; what
carries over to those is the method `proxy`. Names and shapes of all weights are those of the published checkpoint.
Needs diffusers, so it is not imported with the other methods.
"""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from gensparse.attention import sparse_attention
from gensparse.errors import ConfigError, ModelError
from gensparse.kernels.pool import pool_keys, proxy_tokens
from gensparse.layout import Grid, Layout
from gensparse.patterns import Blocks
from gensparse.plan import Plan, build_plan

MODES = ("mean", "first", "random")
POSITIONS = "pos_embed.pos_embed"
"""Key of the table of positions, which belongs to the training size."""

_HIDDEN = -10000.0  # added to the logits of padded text
_FREQUENCIES = 128  # of the timestep, sine and cosine each


class Attention(nn.Module):
    """Multi-head softmax attention with biases, without norms and positions.

    Args:
        dim: channels of queries and outputs; context: of keys and values, by default the same.
    """

    def __init__(self, dim: int, heads: int, context: int | None = None, bias: bool = True) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(dim, dim, bias)
        self.to_k, self.to_v = (nn.Linear(context or dim, dim, bias) for _ in range(2))
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])

    def forward(
        self, x: Tensor, context: Tensor | None = None, *, plan: Plan | None = None, key_bias: Tensor | None = None
    ) -> Tensor:
        """x [B, N, D] -> [B, N, D]; with a plan only its pairs, else all of them.

        Args:
            context: [B, M, C] keys and values, x itself when None.
            key_bias: [B, M] added to the logits.
        """
        source = x if context is None else context
        q, k, v = (
            layer(value).unflatten(-1, (self.heads, -1))
            for layer, value in ((self.to_q, x), (self.to_k, source), (self.to_v, source))
        )
        if plan is not None:
            out = sparse_attention(q, k, v, plan)
        else:
            mask = None if key_bias is None else key_bias[:, None, None].to(q.dtype)
            q, k, v = (value.transpose(1, 2) for value in (q, k, v))
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)
        return self.to_out[0](out.flatten(2))


class FeedForward(nn.Module):
    """Linear to 4 D, GELU (tanh), linear back."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        first = nn.Module()
        first.proj = nn.Linear(dim, 4 * dim)
        self.net = nn.ModuleList([first, nn.Identity(), nn.Linear(4 * dim, dim)])

    def forward(self, x: Tensor) -> Tensor:
        return self.net[2](F.gelu(self.net[0].proj(x), approximate="tanh"))


class PTDiTBlock(nn.Module):
    """One block: proxies attend to each other, tokens to proxies, to their window, to a shifted window, to text.

    Args:
        window: tokens (F, H, W) per window; proxy_window: tokens per proxy, whose rows and columns divide the window's.
        shift_window: whether the block has the shifted window.
        context: channels of the text.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        window: Grid,
        proxy_window: Grid,
        context: int | None = None,
        shift_window: bool = True,
        bias: bool = True,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.window, self.eps = window, eps
        # one proxy per window and frames axis: the published code has no other
        self.per_window: Grid = (1, window[1] // proxy_window[1], window[2] // proxy_window[2])
        self.proxy_attn1 = Attention(dim, heads, bias=bias)
        self.pvisual_attn2 = Attention(dim, heads, bias=bias)
        self.linear_1_visual = _zeroed(nn.Linear(dim, dim))
        self.attn1 = Attention(dim, heads, bias=bias)
        self.attn2 = Attention(dim, heads, context, bias)
        self.attn3 = Attention(dim, heads, bias=bias) if shift_window else None
        self.linear_2 = _zeroed(nn.Linear(dim, dim)) if shift_window else None
        self.ff = FeedForward(dim)
        self.scale_shift_table = nn.Parameter(torch.randn(6, dim) / dim**0.5)
        self.proxy_scale_shift_table = nn.Parameter(torch.randn(3, dim) / dim**0.5) if shift_window else None

    def forward(
        self,
        x: Tensor,
        grid: Grid,
        text: Tensor,
        text_bias: Tensor | None,
        modulation: Tensor,
        mode: str = "mean",
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """x [B, F*H*W, D] -> the same.

        Args:
            grid: (F, H, W); ragged windows at the end of an axis are allowed.
            text: [B, L, C] and text_bias [B, L] added to its logits.
            modulation: [B, 6 D] of the timestep.
            mode: which token stands for a window, see `proxies`.

        Raises:
            ConfigError: several proxies per window, or other proxies than means, on a grid that windows do not divide.
        """
        table = modulation.unflatten(1, (6, -1))
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.scale_shift_table + table).unsqueeze(2).unbind(1)
        proxies = self.proxies(x, grid, mode, generator)
        proxies = proxies + self.proxy_attn1(self._norm(proxies))
        x = x + self.linear_1_visual(self.pvisual_attn2(self._norm(x), self._norm(proxies)))
        x = x + gate1 * self.attn1(self._norm(x) * (1 + scale1) + shift1, plan=self._plan(grid, False, x.device))
        if self.attn3 is not None:
            shift, scale, gate = (self.proxy_scale_shift_table + table[:, :3]).unsqueeze(2).unbind(1)
            own = self.attn3(self._norm(x) * (1 + scale) + shift, plan=self._plan(grid, True, x.device))
            x = x + self.linear_2(gate * own)
        x = x + self.attn2(x, text, key_bias=text_bias)
        return x + gate2 * self.ff(self._norm(x) * (1 + scale2) + shift2)

    def proxies(self, x: Tensor, grid: Grid, mode: str = "mean", generator: torch.Generator | None = None) -> Tensor:
        """Tokens that stand for windows, [B, windows * proxies per window, D].

        Args:
            mode: "mean" of the tokens; the "first" one; or a "random" one of `generator`, drawn for all samples alike.

        Raises:
            ConfigError: other proxies than one mean per window, on a grid that windows do not divide.
        """
        window = self._window(grid)
        if mode == "mean" and self.per_window == (1, 1, 1):
            return pool_keys(x[:, :, None], grid, window, None)[:, :, 0]
        if any(n % w for n, w in zip(grid, window, strict=True)):
            raise ConfigError(
                f"PT-DiT windows of {window} do not divide the grid {grid}, which only one mean per window allows; "
                "pass another size."
            )
        return proxy_tokens(x, grid, window, self.per_window, mode, generator)

    def _window(self, grid: Grid) -> Grid:
        frames, rows, columns = map(min, self.window, grid)
        return frames, rows, columns

    def _plan(self, grid: Grid, shifted: bool, device: torch.device) -> Plan:
        window = self._window(grid)
        # an axis of one window is cut in halves too: the published mask does not wrap
        shift = tuple(size // 2 for size in window) if shifted else 0
        return build_plan(Blocks(window, shift), Layout.joint(grid), device=device)

    def _norm(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], eps=self.eps)


class PTDiT(ModelMixin, ConfigMixin):
    """Text to picture (or clip) by proxy tokens; the defaults are those of Qihoo-T2I-1B.

    It predicts the velocity towards the data in the first channels of its output: negate it for diffusers' flow-match
    schedulers.

    Args:
        num_heads, head_dim: of every attention; cross_attention_dim is their product.
        in_channels, out_channels: of the latent.
        sample_size: latent rows and columns of the training size, of which the table of positions is stored.
        frame: latent frames of that table.
        patch_size: latent cells per token and axis; a token is one latent frame.
        caption_channels: of the text embedding.
        compress_ratios: window (F, H, W) in tokens. The paper keeps 8 x 8 windows per frame at every size.
        proxy_compress_ratios: tokens per proxy, by default the whole window.
        shift_window: the second, shifted window.
        reference_positions: make the table of positions of a frame as high as wide and as wide as high, which the
            published code does; it matters for pictures that are not square.
        attention_bias, activation_fn, num_embeds_ada_norm, norm_type, norm_elementwise_affine, norm_eps: as published;
            other values are refused.

    Raises:
        ConfigError: settings that contradict each other, or that no published model has.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ("PTDiTBlock",)
    _repeated_blocks = ("PTDiTBlock",)

    @register_to_config
    def __init__(
        self,
        num_heads: int = 16,
        head_dim: int = 72,
        in_channels: int = 4,
        out_channels: int = 8,
        num_layers: int = 28,
        cross_attention_dim: int = 1152,
        attention_bias: bool = True,
        sample_size: int = 32,
        frame: int = 1,
        patch_size: int = 2,
        activation_fn: str = "gelu-approximate",
        num_embeds_ada_norm: int = 1000,
        norm_type: str = "ada_norm_single",
        norm_elementwise_affine: bool = False,
        norm_eps: float = 1e-6,
        caption_channels: int = 4096,
        compress_ratios: Sequence[int] = (1, 8, 8),
        proxy_compress_ratios: Sequence[int] | None = None,
        shift_window: bool = True,
        reference_positions: bool = False,
    ) -> None:
        super().__init__()
        dim = num_heads * head_dim
        window = _sizes("compress_ratios", compress_ratios)
        proxy_window = (
            window if proxy_compress_ratios is None else _sizes("proxy_compress_ratios", proxy_compress_ratios)
        )
        _check(
            dim,
            window,
            proxy_window,
            cross_attention_dim=(cross_attention_dim, dim),
            activation_fn=(activation_fn, "gelu-approximate"),
            norm_type=(norm_type, "ada_norm_single"),
            norm_elementwise_affine=(norm_elementwise_affine, False),
        )
        self.patch_size, self.out_channels = patch_size, out_channels
        self.gradient_checkpointing = False
        side = sample_size // patch_size
        self.pos_embed = Patches(
            in_channels, dim, patch_size, (frame, side, side), max(sample_size // 64, 1), reference_positions
        )
        self.transformer_blocks = nn.ModuleList(
            PTDiTBlock(
                dim,
                num_heads,
                window=window,
                proxy_window=proxy_window,
                context=cross_attention_dim,
                shift_window=shift_window,
                bias=attention_bias,
                eps=norm_eps,
            )
            for _ in range(num_layers)
        )
        self.scale_shift_table = nn.Parameter(torch.randn(2, dim) / dim**0.5)
        self.proj_out = nn.Linear(dim, patch_size**2 * out_channels)
        self.adaln_single = TimestepModulation(dim)
        self.caption_projection = TextProjection(caption_channels, dim)

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor | None = None,
        proxy_mode: str = "mean",
        generator: torch.Generator | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Latents [B, C, F, H, W] -> prediction [B, out_channels, F, H, W].

        Args:
            timestep: [B], 1000 times the noise level. Its sines are made in fp32, whatever the model's precision.
            encoder_hidden_states: [B, L, caption_channels]; encoder_attention_mask [B, L], 1 for text that counts.
            proxy_mode, generator: see `PTDiTBlock.proxies`.

        Raises:
            ConfigError: latents of another shape, sizes that are no whole patches, or an unknown mode.
        """
        grid = self._grid(hidden_states)
        if proxy_mode not in MODES or (proxy_mode == "random" and generator is None):
            raise ConfigError(
                f"PT-DiT proxy_mode={proxy_mode!r} is not allowed; pass 'mean', 'first', or 'random' with a generator."
            )
        dtype = self.proj_out.weight.dtype
        x = self.pos_embed(hidden_states.to(dtype), grid)
        modulation, embedded = self.adaln_single(timestep, dtype)
        text = self.caption_projection(encoder_hidden_states.to(dtype))
        bias = None if encoder_attention_mask is None else (1 - encoder_attention_mask.float()) * _HIDDEN
        for block in self.transformer_blocks:
            arguments = (x, grid, text, bias, modulation, proxy_mode, generator)
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                x = self._gradient_checkpointing_func(block, *arguments)
            else:
                x = block(*arguments)
        shift, scale = (self.scale_shift_table + embedded[:, None]).unsqueeze(2).unbind(1)
        x = self.proj_out(F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift)
        out = self._unpatched(x, grid)
        return Transformer2DModelOutput(sample=out) if return_dict else (out,)

    def load_checkpoint(self, path: str | Path) -> None:
        """Load published weights from a safetensors file, every one of them.

        The table of positions may be of another size; it is made anew then. Convert a `.pt` once: load it with
        weights_only=True, take what stands under "model" or "state_dict", and save it as safetensors.

        Raises:
            ModelError: the file is missing or damaged, is no safetensors file, or its weights are not those of this
                model; it is unchanged then.
        """
        load_strictly(self, path, optional=(POSITIONS,))

    def _grid(self, latents: Tensor) -> Grid:
        patch = self.patch_size
        if latents.ndim != 5 or any(size % patch or not size for size in latents.shape[-2:]):
            raise ConfigError(
                f"PT-DiT got latents of shape {tuple(latents.shape)}; pass (batch, channels, frames, height, width) "
                f"with height and width that {patch} divides."
            )
        frames, height, width = latents.shape[-3:]
        return frames, height // patch, width // patch

    def _unpatched(self, x: Tensor, grid: Grid) -> Tensor:
        patch = self.patch_size
        x = x.unflatten(2, (patch, patch, self.out_channels)).unflatten(1, grid)  # [B, F, H, W, p, q, C]
        frames, rows, columns = grid
        return x.permute(0, 6, 1, 2, 4, 3, 5).reshape(len(x), self.out_channels, frames, rows * patch, columns * patch)


class Patches(nn.Module):
    """Latents [B, C, F, H, W] -> tokens [B, F*H*W, D] with sines and cosines of their positions.

    Args:
        grid: (F, H, W) of the stored table; others are made when they are needed.
        scale: positions are divided by it.
        swapped: see `reference_positions` of `PTDiT`.
    """

    def __init__(self, channels: int, dim: int, patch: int, grid: Grid, scale: float, swapped: bool) -> None:
        super().__init__()
        self.grid, self.scale, self.swapped = grid, scale, swapped
        self.proj = nn.Conv2d(channels, dim, patch, patch)
        table = positions(grid, dim, scale, swapped)
        self.register_buffer("pos_embed", table.unflatten(0, (1, grid[0], grid[1] * grid[2])))

    def forward(self, latents: Tensor, grid: Grid) -> Tensor:
        x = self.proj(latents.transpose(1, 2).flatten(0, 1)).flatten(2).transpose(1, 2)
        x = x.unflatten(0, (len(latents), -1)).flatten(1, 2)
        dim = x.shape[-1]
        own = self.pos_embed.flatten(0, 2) if grid == self.grid else positions(grid, dim, self.scale, self.swapped)
        return x + own.to(x)


class TimestepModulation(nn.Module):
    """AdaLN-single: a timestep [B] -> modulation [B, 6 D] and embedding [B, D]."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.emb = nn.Module()
        self.emb.timestep_embedder = nn.Module()
        self.emb.timestep_embedder.linear_1 = nn.Linear(2 * _FREQUENCIES, dim)
        self.emb.timestep_embedder.linear_2 = nn.Linear(dim, dim)
        self.linear = nn.Linear(dim, 6 * dim)

    def forward(self, timestep: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        power = torch.arange(_FREQUENCIES, device=timestep.device, dtype=torch.float32) / _FREQUENCIES
        angle = timestep.float()[:, None] * 10000.0**-power
        own = self.emb.timestep_embedder
        embedded = own.linear_2(F.silu(own.linear_1(torch.cat([angle.cos(), angle.sin()], -1).to(dtype))))
        return self.linear(F.silu(embedded)), embedded


class TextProjection(nn.Module):
    """Text [B, L, C] -> [B, L, D]: linear, GELU (tanh), linear."""

    def __init__(self, channels: int, dim: int) -> None:
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(channels, dim), nn.Linear(dim, dim)

    def forward(self, text: Tensor) -> Tensor:
        return self.linear_2(F.gelu(self.linear_1(text), approximate="tanh"))


@lru_cache(maxsize=8)
def positions(grid: Grid, dim: int, scale: float = 1.0, swapped: bool = False) -> Tensor:
    """Sines and cosines of the positions of a grid (F, H, W), fp32 [F*H*W, dim]; not to be written to.

    A quarter of the channels tells the frame, three eighths the column, three eighths the row, each its sines first.

    Args:
        dim: a multiple of 16.
        scale: coordinates are divided by it.
        swapped: number the tokens of a frame as if it were W x H.
    """
    frames, rows, columns = grid
    width = rows if swapped else columns
    token = torch.arange(frames * rows * columns)
    inside = token % (rows * columns)
    parts = ((token // (rows * columns), dim // 4), (inside % width, 3 * dim // 8), (inside // width, 3 * dim // 8))
    columns_of = []
    for place, size in parts:
        power = torch.arange(size // 2, dtype=torch.float64) / (size // 2)
        angle = (place / scale).double()[:, None] * 10000.0**-power
        columns_of += [angle.sin(), angle.cos()]
    return torch.cat(columns_of, 1).float()


def load_strictly(model: nn.Module, path: str | Path, optional: Sequence[str] = ()) -> None:
    """Load a safetensors file into a model; names and shapes must be equal.

    Args:
        optional: names that may be missing or of another shape, and are not loaded then.

    Raises:
        ModelError: the file cannot be read, or names or shapes differ; the model is unchanged then.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = Path(path)
    if file.suffix != ".safetensors":
        raise ModelError(f"{file.name} is no safetensors file; convert the checkpoint once and pass the result.")
    try:
        given = load_file(file)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{file.name} cannot be read: {error}") from error
    own = model.state_dict()
    given = {name: x for name, x in given.items() if name not in optional or _fits(x, own.get(name))}
    differences = [
        *(f"{name} is missing" for name in sorted(set(own) - set(given) - set(optional))),
        *(f"{name} is not in the model" for name in sorted(set(given) - set(own))),
        *(
            f"{name} has shape {tuple(given[name].shape)}, not {tuple(own[name].shape)}"
            for name in sorted(set(given) & set(own))
            if not _fits(given[name], own[name])
        ),
    ]
    if differences:
        more = f" and {len(differences) - 3} more" if len(differences) > 3 else ""
        raise ModelError(f"{file.name} does not fit this {type(model).__name__}: {'; '.join(differences[:3])}{more}.")
    model.load_state_dict({**own, **given}, strict=True)


def _fits(x: Tensor, own: Tensor | None) -> bool:
    return own is not None and x.shape == own.shape


def _zeroed(layer: nn.Linear) -> nn.Linear:
    """A layer that gives 0 until it is trained."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def _sizes(name: str, value: Sequence[int]) -> Grid:
    sizes = tuple(value)
    if len(sizes) != 3 or not all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in sizes):
        raise ConfigError(f"PT-DiT {name}={value!r} is not allowed; pass three positive integers (F, H, W).")
    frames, rows, columns = sizes
    return frames, rows, columns


def _check(dim: int, window: Grid, proxy_window: Grid, **fixed: tuple[Any, Any]) -> None:
    """ConfigError unless the settings belong together."""
    if dim % 16:
        raise ConfigError(f"PT-DiT has {dim} channels (heads times head_dim), which 16 must divide; pass other sizes.")
    if any(w % p for w, p in zip(window[1:], proxy_window[1:], strict=True)):
        raise ConfigError(
            f"PT-DiT proxy_compress_ratios={proxy_window} must divide compress_ratios={window} in rows and columns."
        )
    for name, (value, only) in fixed.items():
        if value != only:
            raise ConfigError(f"PT-DiT {name}={value!r} is not allowed; published models have {only!r}.")
