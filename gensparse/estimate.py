"""What a request will cost, from configs alone: tokens, density, FLOPs, memory per stage, and a calibrated time.

The constants come from traces of the real layer shapes on meta tensors (activations 6.5 GiB for 65,536 tokens of FLUX
in bf16; 1.5 GiB per megapixel of un-tiled decoding); allocators and workspaces add 10-30%, which `MARGIN` covers.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any, Protocol

DTYPE_BYTES = {"fp16": 2, "bf16": 2, "fp32": 4}
ACTIVATION_WIDTHS = 17.3  # live activations per token, in hidden widths
DECODE_WIDTHS = 6.0  # live activations per pixel of a decoded tile, in channels of the full-resolution layers
TILE = 1024  # side of the largest tile that is decoded at once
MARGIN = 1.2
RUNTIME_BYTES = 700 << 20  # torch, diffusers and transformers themselves
GIB = 1 << 30

CLASSES = ((10, "seconds"), (60, "under a minute"), (600, "minutes"), (3600, "tens of minutes"), (86400, "hours"))


class Architecture(Protocol):
    """The sizes of a model that decide its cost (`gensparse.models.Architecture`)."""

    in_channels: int
    vae_channels: tuple[int, ...]
    vae_convs: tuple[int, ...]
    encoder_params: int

    @property
    def width(self) -> int: ...
    @property
    def layers(self) -> int: ...
    @property
    def multiple(self) -> int: ...
    @property
    def transformer_params(self) -> int: ...


@dataclass(frozen=True)
class StageEstimate:
    """One stage: pixels, steps and the cost of one step (all passes of the guidance)."""

    height: int
    width: int
    steps: int
    tokens: int
    attention: str
    density: float
    linear_flops: float
    attention_flops: float
    activation_bytes: int
    seconds: float | None = None  # of all steps
    enter_flops: float = 0.0  # decoding the smaller picture and encoding its enlargement
    enter_seconds: float | None = None


@dataclass(frozen=True)
class Rates:
    """Sustained speed of one device in FLOP/s, measured on the shapes of the model at hand."""

    linear: float
    attention: float
    decode: float


@dataclass(frozen=True)
class Estimate:
    """The cost of one picture."""

    stages: tuple[StageEstimate, ...]
    weight_bytes: int
    decode_bytes: int
    decode_flops: float
    peak_bytes: int
    total_flops: float
    seconds: float | None
    decode_seconds: float | None
    limit_bytes: int | None
    advice: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        return self.limit_bytes is None or self.peak_bytes <= self.limit_bytes

    @property
    def time_class(self) -> str | None:
        return None if self.seconds is None else time_class(self.seconds)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"fits": self.fits, "time_class": self.time_class}


@dataclass(frozen=True)
class StageShape:
    """What the estimate needs to know of a stage: pixels, steps, and its attention."""

    height: int
    width: int
    steps: int
    attention: str = "dense"
    density: float = 1.0
    passes: int = 1  # calls of the model per step: 2 with classifier-free guidance


def time_class(seconds: float) -> str:
    """A word for a duration, as honest as an estimate can be."""
    return next((word for limit, word in CLASSES if seconds < limit), "days")


def estimate(
    arch: Architecture,
    stages: Sequence[StageShape],
    *,
    n_text: int,
    dtype: str,
    offload: str = "none",
    limit_bytes: int | None = None,
    rates: Rates | None = None,
    from_picture: bool = False,
    can_offload: bool = True,
) -> Estimate:
    """Estimate one picture.

    Args:
        n_text: text tokens of one pass.
        dtype: "fp16", "bf16" or "fp32".
        offload: "none", "model", "group" or "sequential": how many weights are resident.
        limit_bytes: memory that may be used; None when unknown.
        rates: speed of the machine; None leaves times out.
        from_picture: the first stage starts from a given picture.
        can_offload: whether weights could wait in another memory; only the advice depends on it.
    """
    size = DTYPE_BYTES[dtype]
    parts = _with_entries(arch, [_stage(arch, shape, n_text, size, rates) for shape in stages], rates, from_picture)
    last = parts[-1]
    decode = decode_flops(arch) * last.height * last.width
    decode_seconds = decode / rates.decode if rates else None
    weights = resident_bytes(arch, size, offload)
    decode_memory = decode_bytes(arch, last.height, last.width, size)
    history = sum(4 * arch.in_channels * p.tokens * p.steps for p in parts) if len(parts) > 1 else 0
    busy = max(max(p.activation_bytes for p in parts), decode_memory)
    peak = RUNTIME_BYTES + weights + int(MARGIN * busy) + history
    seconds = sum(p.seconds + p.enter_seconds for p in parts) + decode_seconds if rates else None
    total = sum(p.steps * (p.linear_flops + p.attention_flops) + p.enter_flops for p in parts) + decode
    advice = _advice(arch, parts, size, offload if can_offload else None, peak, limit_bytes)
    return Estimate(parts, weights, decode_memory, decode, peak, total, seconds, decode_seconds, limit_bytes, advice)


def _with_entries(
    arch: Architecture, parts: list[StageEstimate], rates: Rates | None, from_picture: bool
) -> tuple[StageEstimate, ...]:
    """Add what it costs to enter each stage: decode the one before (unless a picture was given), encode."""
    out, before = [], 0
    for index, part in enumerate(parts):
        entered = from_picture or index > 0
        flops = decode_flops(arch) * (before + part.height * part.width) if entered else 0.0
        out.append(replace(part, enter_flops=flops, enter_seconds=flops / rates.decode if rates else None))
        before = part.height * part.width
    return tuple(out)


def _stage(arch: Architecture, shape: StageShape, n_text: int, size: int, rates: Rates | None) -> StageEstimate:
    image = (shape.height // arch.multiple) * (shape.width // arch.multiple)
    tokens = image + n_text
    linear = shape.passes * 24.0 * arch.width**2 * arch.layers * tokens
    attention = shape.passes * 4.0 * arch.width * arch.layers * shape.density * tokens**2
    activation = int(ACTIVATION_WIDTHS * arch.width * size * tokens)
    seconds = None
    if rates is not None:
        seconds = shape.steps * (linear / rates.linear + attention / rates.attention)
    facts = (shape.height, shape.width, shape.steps, tokens, shape.attention, shape.density)
    return StageEstimate(*facts, linear, attention, activation, seconds)


def resident_bytes(arch: Architecture, size: int, offload: str) -> int:
    """Bytes of weights on the device at the busiest moment."""
    denoiser, encoders = arch.transformer_params * size, arch.encoder_params * size
    if offload == "none":
        return denoiser + encoders
    if offload == "model":
        return max(denoiser, encoders)
    return denoiser // max(1, arch.layers) * 2


def decode_flops(arch: Architecture) -> float:
    """FLOP per pixel of the decoder: its 3x3 convolutions at every level."""
    levels = enumerate(zip(arch.vae_channels, arch.vae_convs, strict=True))
    return sum(18.0 * channels**2 * convs * 4.0**-level for level, (channels, convs) in levels)


def decode_bytes(arch: Architecture, height: int, width: int, size: int) -> int:
    """Peak bytes of decoding by tiles: the activations of one tile and the picture itself (float and 8 bit)."""
    tile = min(height, TILE) * min(width, TILE)
    return int(tile * DECODE_WIDTHS * arch.vae_channels[0] * size) + height * width * 3 * 5


# --------------------------------------------------------------------------------------------------------------- advice
def _advice(
    arch: Architecture,
    parts: Sequence[StageEstimate],
    size: int,
    offload: str | None,
    peak: int,
    limit: int | None,
) -> tuple[str, ...]:
    """What would make a request fit that does not."""
    if limit is None or peak <= limit:
        return ()
    out = [f"needs about {peak / GIB:.1f} GiB, {limit / GIB:.1f} GiB are available"]
    for choice in ("model", "group"):
        smaller = peak - resident_bytes(arch, size, "none") + resident_bytes(arch, size, choice)
        if offload == "none" and smaller <= limit:
            out.append(f"--offload {choice} brings it to about {smaller / GIB:.1f} GiB")
            break
    if size == 4:
        out.append("--dtype bf16 halves weights and activations")
    side = _largest_side(arch, parts, size, offload or "none", peak, limit)
    if side:
        out.append(f"--size {side} fits")
    elif len(out) == 1:
        out.append("use a smaller model or a machine with more memory")
    return tuple(out)


def _largest_side(
    arch: Architecture, parts: Sequence[StageEstimate], size: int, offload: str, peak: int, limit: int
) -> int | None:
    """The largest square of 1024 pixels steps that fits, by the share of memory that grows with the area."""
    last = parts[-1]
    area = last.height * last.width
    fixed = RUNTIME_BYTES + resident_bytes(arch, size, offload)
    room = limit - fixed
    if room <= 0:
        return None
    side = int(math.sqrt(area * room / max(1, peak - fixed)))
    side = side // 1024 * 1024 if side >= 1024 else side // 64 * 64
    return side or None


def format_bytes(count: float) -> str:
    """Bytes as GiB or MiB."""
    return f"{count / GIB:.1f} GiB" if count >= GIB else f"{count / (1 << 20):.0f} MiB"


def format_seconds(seconds: float) -> str:
    """Seconds as 12 s, 3 min 05 s or 2 h 10 min."""
    whole = round(seconds)
    if whole < 90:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{whole} s"
    if whole < 5400:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


# ---------------------------------------------------------------------------------------------------------- calibration
@lru_cache(maxsize=8)
def calibrate(device: str, dtype: str, width: int, head_dim: int) -> Rates:
    """Measure this machine for about 0.2 s on a linear layer and an attention call of the model's own width."""
    import torch
    from torch.nn.functional import conv2d, scaled_dot_product_attention

    kind = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    work = 2e11 if device.startswith("cuda") else 2e9  # FLOP of one call: enough to be busy, short enough to repeat
    rows = int(min(4096, max(16, work / (8 * width**2))))
    tokens = int(min(4096, max(64, math.sqrt(work / (4 * width)))))
    heads, channels, side = max(1, width // head_dim), 64, 128
    with torch.inference_mode():
        x = torch.randn(rows, width, device=device, dtype=kind)
        w = torch.randn(width, 4 * width, device=device, dtype=kind)
        q = torch.randn(1, heads, tokens, head_dim, device=device, dtype=kind)
        p = torch.randn(1, channels, side, side, device=device, dtype=kind)
        f = torch.randn(channels, channels, 3, 3, device=device, dtype=kind)
        linear = _rate(lambda: torch.nn.functional.gelu(x @ w), 8.0 * rows * width**2, device)
        attention = _rate(lambda: scaled_dot_product_attention(q, q, q), 4.0 * tokens**2 * heads * head_dim, device)
        decode = _rate(lambda: conv2d(p, f, padding=1).relu_(), 18.0 * channels**2 * side**2, device)
    return Rates(linear, attention, decode)


def _rate(work: Callable[[], Any], flops: float, device: str, budget: float = 0.06) -> float:
    """FLOP/s of `work`, the best of as many calls as fit in `budget` seconds after one warm-up."""
    import torch

    def once() -> float:
        start = time.perf_counter()
        work()
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    once()
    best, spent = math.inf, 0.0
    while spent < budget:
        seconds = once()
        best, spent = min(best, seconds), spent + max(seconds, 1e-6)
    return flops / max(best, 1e-9)
