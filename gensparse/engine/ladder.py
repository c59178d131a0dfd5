"""Which weights wait where, and what is computed in pieces: the first rung of a ladder that fits.

From fast and faithful to slow: everything resident, one model at a time, weights in 8 and then in 4 bits, layers
fetched one by one. On every rung feed-forwards are first computed whole, then in chunks, which costs almost nothing.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from gensparse.estimate import CHUNK, EXACT_WIDTHS, GIB, Architecture, Estimate, Memory, decode_bytes, format_bytes

LADDER = (
    ("none", "none"),
    ("model", "none"),
    ("model", "fp8"),
    ("model", "nf4"),
    ("group", "none"),
    ("group", "fp8"),
)
"""(offload, quantize) of GPUs when both are "auto"."""

OFFLOADS = ("none", "model", "group", "sequential")
QUANTIZED = ("none", "fp8", "nf4")

TILES = (1024, 768, 512, 256)
TILE_SHARE = 10  # a tile takes at most this part of the memory: larger ones gain nothing
LARGEST_PIECE = 2  # decoding in one piece takes at most this part


def rungs(arch: Architecture, offload: str, quantize: str, *, gpu: bool, quantizers: Sequence[str]) -> Iterator[Memory]:
    """Offload and quantization to try in turn; what the request fixes stays.

    Args:
        offload, quantize: of the request, "auto" or fixed.
        gpu: whether weights can wait in another memory.
        quantizers: what is installed.
    """
    if not gpu:
        yield Memory("none" if offload == "auto" else offload, "none" if quantize == "auto" else quantize)
        return
    if offload == "auto" and quantize == "auto":
        pairs = LADDER
    elif offload == "auto":
        pairs = tuple((choice, quantize) for choice in OFFLOADS[:3])
    elif quantize == "auto":
        pairs = tuple((offload, choice) for choice in QUANTIZED)
    else:
        pairs = ((offload, quantize),)
    for chosen, stored in pairs:
        if stored in ("none", quantize, *quantizers):
            yield Memory(chosen, stored, halves=arch.guidance_in_batch and chosen != "none")


def pick_tile(arch: Architecture, height: int, width: int, size: int, limit: int, resident: int) -> str:
    """How a GPU of `limit` bytes decodes a picture while `resident` bytes of weights stay: one piece, or a tile."""
    whole = decode_bytes(arch, height, width, size, "none", on_host=True)
    if whole * 1.2 <= min(limit - resident, limit // LARGEST_PIECE):
        return "none"

    def fits(tile: int) -> bool:
        return tile**2 * EXACT_WIDTHS * arch.vae_channels[0] * size <= limit / TILE_SHARE

    return str(next((tile for tile in TILES if fits(tile)), TILES[-1]))


def choose(
    cost: Callable[[Memory], Estimate],
    steps: Sequence[Memory],
    *,
    host_bytes: int | None = None,
    chunk: int | None = None,
    tile: Callable[[Estimate], str] | None = None,
) -> Estimate:
    """The estimate of the first rung that fits; of the leanest one when none does.

    Args:
        cost: the estimate of a choice.
        steps: rungs, see `rungs`.
        host_bytes: main memory for weights that wait there; None when unknown.
        chunk: tokens of a chunk that the request fixes; None tries whole feed-forwards first.
        tile: the tile of the autoencoder for an estimate without one; None leaves it as it is.
    """
    tried: list[str] = []
    found: list[Estimate] = []
    for step in steps:
        for pieces in (0, CHUNK) if chunk is None else (chunk,):
            memory = replace(step, chunk=pieces)
            item = cost(memory)
            if tile is not None:
                item = cost(replace(memory, tile=tile(item)))
            found.append(item)
            lacks = host_bytes is not None and item.host_bytes > host_bytes
            if item.fits and not lacks:
                return replace(item, why=tuple(tried))
            need = f"{format_bytes(item.host_bytes)} of main memory" if lacks else format_bytes(item.peak_bytes)
            tried.append(f"{_named(memory)} needs {need}")
    fitting = [item for item in found if item.fits]  # the device has room, main memory has not
    best = min(fitting or found, key=lambda item: item.peak_bytes)
    if best.fits and host_bytes is not None:
        best = replace(
            best,
            advice=(
                f"needs about {best.host_bytes / GIB:.1f} GiB of main memory for waiting weights, "
                f"{host_bytes / GIB:.1f} GiB are available",
                "--offload none on a larger GPU, or a smaller model",
            ),
            host_lacks=True,
        )
    return replace(best, why=tuple(tried))


def _named(memory: Memory) -> str:
    out = [f"offload {memory.offload}", *([f"quantize {memory.quantize}"] if memory.quantize != "none" else [])]
    out += ["guidance in halves"] if memory.halves else []
    return " and ".join(out) + (" in chunks" if memory.chunk else "")
