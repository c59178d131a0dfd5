"""Traced peaks of autoencoder tiles: `python -m gensparse.testing.vae_peaks` prints the table of docs/highres.md.

Real layer shapes, tensors without content. Tiles of one shape cost the same, so that each shape runs once per pass.
"""

import sys
from collections.abc import Iterator
from typing import Any

import torch

from gensparse.highres import vae_tiles
from gensparse.highres.tiling import Tiling, parse_tiling
from gensparse.testing.live_bytes import LiveBytes, fake_tensors, materialised

GIB = 1 << 30
DEVICE = "meta"  # stands for the GPU: what is on "cpu" is not in its memory


def flux_vae() -> Any:
    """The AutoencoderKL of FLUX.1, SD3 and (with another number of latent channels) SDXL and SD1.5, in bf16."""
    from diffusers import AutoencoderKL

    with torch.device("meta"):
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            latent_channels=16,
            norm_num_groups=32,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            use_quant_conv=False,
            use_post_quant_conv=False,
            sample_size=1024,
        )
    return vae.to(torch.bfloat16).eval().requires_grad_(False)


def peak(what: str, height: int, width: int, tiling: Tiling | None) -> LiveBytes:
    """Trace "decode" or "encode" of one picture in pixels; counts per device "meta" (the GPU) and "cpu"."""
    vae = flux_vae()
    with fake_tensors(), torch.no_grad():
        materialised(vae, DEVICE)
        with LiveBytes() as count:
            (_decode if what == "decode" else _encode)(vae, height, width, tiling)
    return count


def _decode(vae: Any, height: int, width: int, tiling: Tiling | None) -> None:
    latents = torch.empty(1, 16, height // 8, width // 8)
    if tiling is None:
        vae.decode(latents.to(DEVICE, torch.bfloat16))
        return
    picture = torch.empty(height, width, 3, dtype=torch.uint8)
    if tiling.mode == "exact":
        source = vae_tiles.Map((latents.to(torch.bfloat16),), torch.device(DEVICE))
        strips = _walk(vae_tiles.decoder_layers(vae), source, tiling)
    else:
        strips = vae_tiles.decode_strips(vae, latents, **vars(tiling))
    vae_tiles.fill_bytes(strips, picture)


def _encode(vae: Any, height: int, width: int, tiling: Tiling | None) -> None:
    picture = torch.empty(1, 3, height, width)
    if tiling is None:
        vae.encode(picture.to(DEVICE, torch.bfloat16))
        return

    def read(rows: tuple[int, int], cols: tuple[int, int]) -> torch.Tensor:
        return picture[..., slice(*rows), slice(*cols)].to(DEVICE, torch.bfloat16)

    if tiling.mode == "exact":
        source = vae_tiles.Source(read, (height, width))
        for _ in _walk(vae_tiles.encoder_layers(vae), source, tiling):
            pass
    else:
        vae_tiles.encode_tiles(vae, read, (height, width), **vars(tiling))


def _walk(layers: Any, source: Any, tiling: Tiling) -> Iterator[Any]:
    walk = _EachShapeOnce(layers, source, tiling.tile, vae_tiles.DEFAULT_MAP_BYTES, torch.device(DEVICE))
    return walk.strips()


class _EachShapeOnce(vae_tiles._Walk):
    """Exact tiles: the first, one of the middle and the last of each axis."""

    def _tiles(self, part: Any) -> Iterator[Any]:
        for span, columns in _ends(list(super()._tiles(part))):
            yield span, _ends(columns)


def _ends(items: list[Any]) -> list[Any]:
    return items if len(items) <= 3 else [items[0], items[1], items[-1]]


def main(arguments: list[str]) -> None:
    """Print a row per size in pixels and tiling, such as `4096 none feather:1024 768`."""
    sizes = [int(a) for a in arguments if a.isdigit() and int(a) >= 1024] or [2048, 4096, 8192]
    tilings = [a for a in arguments if not (a.isdigit() and int(a) >= 1024)] or ["none", "feather:1024", "768", "512"]
    for text in tilings:
        cells = []
        for size in sizes:
            counts = [peak(what, size, size, parse_tiling(text)) for what in ("decode", "encode")]
            gpu, cpu = ([c.peak[d] / GIB for c in counts] for d in (DEVICE, "cpu"))
            cells.append(f"{gpu[0]:.2f} / {gpu[1]:.2f} ({max(cpu):.1f})")
        print(f"| {text} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
