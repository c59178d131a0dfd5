"""What a request will cost, from configs alone: tokens, density, FLOPs, memory per stage, and a calibrated time.

The constants come from traces of the real layer shapes on meta tensors (activations 6.5 GiB for 65,536 tokens of FLUX
in bf16, 5.0 with feed-forwards in chunks; 1.5 GiB per megapixel of un-tiled decoding); allocators and workspaces add
10-30%, which `MARGIN` covers.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any, Protocol

DTYPE_BYTES = {"fp16": 2, "bf16": 2, "fp32": 4}
DECODE_WIDTHS = 6.0  # live activations per pixel of a decoded tile, in channels of the full-resolution layers
EXACT_WIDTHS = 8.0  # the same of an exact tile, which is cut with its halo
ATTENTION_BLOCKS = 400 << 20  # of the streamed attention in the middle of an autoencoder
MARGIN = 1.2
RUNTIME_BYTES = 700 << 20  # torch, diffusers and transformers themselves
CHUNK = 4096  # tokens of a chunk; smaller ones save nothing more
WEIGHT_BYTES = {"fp8": 1.0, "int8": 1.0, "nf4": 0.5625}  # per weight; nf4 with a scale per 64 weights
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
    @property
    def kept_params(self) -> int:
        """Weights of the denoiser that fp8 storage leaves as they are."""
        ...

    @property
    def guidance_in_batch(self) -> bool:
        """Whether classifier-free guidance is a batch of two (UNets) rather than two calls."""
        ...

    def tokens(self, height: int, width: int) -> int:
        """Picture tokens of the finest attention."""
        ...

    def activation_values(self, chunked: bool) -> float:
        """Live values per token at the peak of a call."""
        ...

    def flops(self, tokens: int) -> tuple[float, float]:
        """(linear, dense attention) FLOP of one call."""
        ...


@dataclass(frozen=True)
class Memory:
    """Where weights wait and what is computed in pieces.

    Args:
        offload: "none", "model", "group" or "sequential": how many weights are resident.
        quantize: "none", "fp8", "int8" or "nf4": how the denoiser's weights are stored.
        tile: how the autoencoder is cut, as `gensparse.highres.tiling.parse_tiling` reads it.
        chunk: tokens of a feed-forward that are computed at a time; 0 is all.
        halves: run the halves of classifier-free guidance one after the other where they are a batch.
    """

    offload: str = "none"
    quantize: str = "none"
    tile: str = "auto"
    chunk: int = 0
    halves: bool = False

    def __str__(self) -> str:
        out = [f"--offload {self.offload}", f"--quantize {self.quantize}", f"--tile {self.tile}"]
        out += [f"chunks of {self.chunk} tokens"] if self.chunk else []
        return ", ".join(out + (["guidance in halves"] if self.halves else []))


@dataclass(frozen=True)
class Phase:
    """A part of the run: bytes of weights and of activations on the device while it lasts."""

    name: str
    weight_bytes: int
    activation_bytes: int

    @property
    def peak_bytes(self) -> int:
        return RUNTIME_BYTES + self.weight_bytes + int(MARGIN * self.activation_bytes)


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
    chunked_bytes: int = 0  # the same with feed-forwards in chunks
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
    memory: Memory = Memory()
    phases: tuple[Phase, ...] = ()
    host_bytes: int = 0  # weights that wait in main memory
    why: tuple[str, ...] = ()  # what was tried before `memory`, and why it was not taken
    host_lacks: bool = False  # main memory is too small for the weights that would wait there

    @property
    def fits(self) -> bool:
        return not self.host_lacks and (self.limit_bytes is None or self.peak_bytes <= self.limit_bytes)

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
    views: int = 0  # windows of `view` pixels that are computed in place of the whole map, `view_batch` at once
    view: tuple[int, int] = (0, 0)
    view_batch: int = 1
    beside: int = 1  # pictures in every call, with references beside the one that is made


def time_class(seconds: float) -> str:
    """A word for a duration, as honest as an estimate can be."""
    return next((word for limit, word in CLASSES if seconds < limit), "days")


def estimate(
    arch: Architecture,
    stages: Sequence[StageShape],
    *,
    n_text: int,
    dtype: str,
    memory: Memory = Memory(),
    limit_bytes: int | None = None,
    rates: Rates | None = None,
    from_picture: bool = False,
    can_offload: bool = True,
) -> Estimate:
    """Estimate one picture.

    Args:
        n_text: text tokens of one pass.
        dtype: "fp16", "bf16" or "fp32".
        memory: where weights wait and what is computed in pieces.
        limit_bytes: memory that may be used; None when unknown.
        rates: speed of the machine; None leaves times out.
        from_picture: the first stage starts from a given picture.
        can_offload: whether weights could wait in another memory: the picture then lies there too.
    """
    size = DTYPE_BYTES[dtype]
    stages_ = [_stage(arch, shape, n_text, size, memory, rates) for shape in stages]
    parts = _with_entries(arch, stages_, rates, from_picture)
    last = parts[-1]
    decode = decode_flops(arch) * last.height * last.width
    decode_seconds = decode / rates.decode if rates else None
    phases = _phases(arch, parts, size, memory, on_host=can_offload)
    busiest = max(phases, key=lambda phase: phase.peak_bytes)
    history = sum(4 * arch.in_channels * p.tokens * p.steps for p in parts) if len(parts) > 1 else 0
    peak = busiest.peak_bytes + (0 if can_offload else history)
    seconds = sum(p.seconds + p.enter_seconds for p in parts) + decode_seconds if rates else None
    total = sum(p.steps * (p.linear_flops + p.attention_flops) + p.enter_flops for p in parts) + decode
    host = 0 if memory.offload == "none" else stored_bytes(arch, size, memory.quantize) + arch.encoder_params * size
    found = Estimate(
        parts,
        busiest.weight_bytes,
        phases[-1].activation_bytes,
        decode,
        peak,
        total,
        seconds,
        decode_seconds,
        limit_bytes,
        (),
        memory,
        phases,
        host,
    )
    if found.fits:
        return found

    def again(memory: Memory, side: int | None = None) -> Estimate:
        shapes = stages if side is None else [replace(stages[-1], height=side, width=side)]
        return estimate(arch, shapes, n_text=n_text, dtype=dtype, memory=memory, can_offload=can_offload)

    return replace(found, advice=_advice(found, size, can_offload, again))


def _phases(
    arch: Architecture, parts: Sequence[StageEstimate], size: int, memory: Memory, *, on_host: bool
) -> tuple[Phase, ...]:
    """Reading the prompt, every stage, and decoding the last one."""
    encoders = arch.encoder_params * size
    denoiser = stored_bytes(arch, size, memory.quantize)
    if memory.offload == "none":
        weights = (denoiser + encoders,) * 3
    elif memory.offload == "model":  # one model at a time
        weights = (encoders, denoiser, 0)
    else:  # two groups of layers: one computes, one is fetched
        group = denoiser // max(1, arch.layers) * 2
        weights = (encoders // 24 * 2, group, 0)
    last = parts[-1]
    decode = decode_bytes(arch, last.height, last.width, size, memory.tile, on_host=on_host)
    stages = [(p, p.chunked_bytes if memory.chunk else p.activation_bytes) for p in parts]
    return (
        Phase("prompt", weights[0], 0),
        *(Phase(f"{p.width}x{p.height}", weights[1], used) for p, used in stages),
        Phase("decode", weights[2], decode),
    )


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


def _stage(
    arch: Architecture, shape: StageShape, n_text: int, size: int, memory: Memory, rates: Rates | None
) -> StageEstimate:
    tokens = arch.tokens(shape.height, shape.width) + n_text
    once = arch.tokens(*shape.view) + n_text if shape.views else tokens  # of one call
    calls = shape.passes * max(1, shape.views) * shape.beside
    linear, attention = (calls * flops for flops in arch.flops(once))
    attention *= shape.density
    batch = shape.beside * (shape.passes if arch.guidance_in_batch and not memory.halves else 1)
    batch *= min(shape.view_batch, max(1, shape.views))
    whole, pieces = (int(batch * arch.activation_values(chunked) * size * once) for chunked in (False, True))
    seconds = None
    if rates is not None:
        seconds = shape.steps * (linear / rates.linear + attention / rates.attention)
    facts = (shape.height, shape.width, shape.steps, tokens, shape.attention, shape.density)
    return StageEstimate(*facts, linear, attention, whole, pieces, seconds)


def stored_bytes(arch: Architecture, size: int, quantize: str) -> int:
    """Bytes of the denoiser's weights."""
    if quantize == "none":
        return arch.transformer_params * size
    kept = arch.kept_params if quantize == "fp8" else 0
    return int((arch.transformer_params - kept) * WEIGHT_BYTES[quantize]) + kept * size


def decode_flops(arch: Architecture) -> float:
    """FLOP per pixel of the decoder: its 3x3 convolutions at every level."""
    levels = enumerate(zip(arch.vae_channels, arch.vae_convs, strict=True))
    return sum(18.0 * channels**2 * convs * 4.0**-level for level, (channels, convs) in levels)


def decode_bytes(
    arch: Architecture, height: int, width: int, size: int, tile: str = "auto", *, on_host: bool = False
) -> int:
    """Peak bytes of decoding: activations of a tile, and the picture itself (float and 8 bit) unless `on_host`.

    Args:
        tile: as `gensparse.highres.tiling.parse_tiling` reads it.
    """
    from gensparse.highres.tiling import EXACT_TILE, UNTILED_AREA, Tiling, parse_tiling

    asked = parse_tiling(tile)
    if asked == "auto":
        asked = None if height * width <= UNTILED_AREA else Tiling(tile=EXACT_TILE)
    side = max(height, width) if asked is None else asked.tile
    pixels = min(height, side) * min(width, side)
    exact = isinstance(asked, Tiling) and asked.mode == "exact" and len(set(arch.vae_channels)) > 1
    activations = int(pixels * (EXACT_WIDTHS if exact else DECODE_WIDTHS) * arch.vae_channels[0] * size)
    if exact:  # keys and values of the middle, which see the whole picture
        coarse = height * width // 4 ** (len(arch.vae_channels) - 1)
        activations = max(activations, 2 * coarse * arch.vae_channels[-1] * size + ATTENTION_BLOCKS)
    return activations + (0 if on_host else height * width * 3 * 5)


# --------------------------------------------------------------------------------------------------------------- advice
def _advice(found: Estimate, size: int, can_offload: bool, again: Callable[..., Estimate]) -> tuple[str, ...]:
    """What would make a request fit that does not."""
    limit, memory = found.limit_bytes or 0, found.memory
    out = [f"needs about {found.peak_bytes / GIB:.1f} GiB, {limit / GIB:.1f} GiB are available"]
    for choice in ("model", "group"):
        smaller = again(replace(memory, offload=choice)).peak_bytes
        if can_offload and memory.offload == "none" and smaller <= limit:
            out.append(f"--offload {choice} brings it to about {smaller / GIB:.1f} GiB")
            break
    if size == 4:
        out.append("--dtype bf16 halves weights and activations")
    side = _largest_side(found, lambda side: again(memory, side).peak_bytes <= limit)
    if side:
        out.append(f"--size {side} fits")
    elif len(out) == 1:
        out.append("use a smaller model or a machine with more memory")
    return tuple(out)


def _largest_side(found: Estimate, fits: Callable[[int], bool]) -> int | None:
    """The largest square that fits, in steps of 1024 pixels, or of 64 below."""
    last = found.stages[-1]
    top = int(math.sqrt(last.height * last.width))
    sides = [*range(top // 1024 * 1024, 0, -1024), *range(960, 0, -64)]
    return next((side for side in sides if side < top and fits(side)), None)


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
