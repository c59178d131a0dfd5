"""Render and encode training pictures: `python samples/embedded/encode.py --run DIR --kind whole --shards 8`.

Kinds: `whole` (128 px whole pictures, 64 tokens), `native` (256 px, 256 tokens), `wide` (other aspect ratios of the
same area) and `close` (16 x 16 tokens cut from renderings at 2, 4, 8, 16 times the native size). A shard is one .npz
file: latents [N, tokens, 32] float16, seeds [N], aspect, position ids [G, tokens, 2] (rows, columns) in scene units,
each for N / G pictures in turn.

Position ids: one unit is one native token (16 px of a 256 px picture), centre-aligned: token i of a grid with spacing
s lies at (i + 0.5) * s - 0.5: spacing 1 at the native size, 2 for whole pictures of 128 px, 1/zoom for close-ups.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from autoencoder import to_tensor
from data import NATIVE, overlap
from diffusers import AutoencoderTiny

from gensparse.embedded.render import Window, render
from gensparse.embedded.scenes import random_scene

TOKEN = 16  # pixels per token
SHARD, GROUP = 1024, 32
CLOSE_SIDE, CLOSE_MARGIN = 256, 32
WIDE_GRIDS = ((12, 21), (21, 12), (14, 18), (18, 14))  # 252 tokens each: one shape to compile for
ZOOMS = (2, 4, 8, 16)
FIRST_SEED = {"whole": 1_000_000, "native": 2_000_000, "wide": 3_000_000, "close": 4_000_000}


def pack(latents: torch.Tensor) -> np.ndarray:
    """[B, C, 2h, 2w] -> tokens [B, h * w, 4C], as FluxPipeline packs them."""
    batch, channels, height, width = latents.shape
    blocks = latents.view(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return blocks.reshape(batch, height * width // 4, channels * 4).half().numpy()


def grid_ids(rows: int, columns: int, spacing: float, top: int = 0, left: int = 0) -> np.ndarray:
    """Position ids [rows * columns, 2] of a window that starts at token (top, left) of a grid with this spacing."""
    y = (top + np.arange(rows) + 0.5) * spacing - 0.5
    x = (left + np.arange(columns) + 0.5) * spacing - 0.5
    return np.stack(np.meshgrid(y, x, indexing="ij"), -1).reshape(-1, 2).astype(np.float32)


@torch.no_grad()
def encode(vae: AutoencoderTiny, pictures: list[np.ndarray]) -> torch.Tensor:
    """Latents of equally large pictures, float32."""
    with torch.autocast("cpu", torch.bfloat16):
        parts = [vae.encoder(to_tensor(np.stack(pictures[i : i + 16]))).float() for i in range(0, len(pictures), 16)]
    return torch.cat(parts)


def whole_shard(vae: AutoencoderTiny, seeds: range, grid: tuple[int, int], spacing: float) -> dict[str, np.ndarray]:
    """Whole pictures on one token grid."""
    rows, columns = grid
    scenes = [random_scene(seed, columns / rows) for seed in seeds]
    pictures = [render(scene, rows * TOKEN, columns * TOKEN) for scene in scenes]
    return {
        "latents": pack(encode(vae, pictures)),
        "ids": grid_ids(rows, columns, spacing)[None],
        "seeds": np.array(seeds),
        "aspect": np.float64(columns / rows),
    }


def cut_scenes(window: Window, first_seed: int) -> list[int]:
    """GROUP seeds, from `first_seed` on, of scenes in most of which the window cuts a subject."""
    seeds, seed = [], first_seed
    while len(seeds) < GROUP:
        scene = random_scene(seed)
        if any(overlap(window, scene.box(i)) for i in range(len(scene.subjects))) or seed % 8 == 0:
            seeds.append(seed)
        seed += 1
    return seeds


def _offset(side: int, rng: np.random.Generator) -> int:
    """Where a close-up starts on one axis of a picture of `side` pixels; a third of them lie at a border."""
    last = (side - CLOSE_SIDE) // TOKEN
    if rng.random() < 1 / 3:
        return int(rng.integers(2)) * last * TOKEN
    return int(rng.integers(last + 1)) * TOKEN


def close_group(vae: AutoencoderTiny, first_seed: int) -> tuple[torch.Tensor, np.ndarray, list[int]]:
    """(latents, ids, seeds) of one window at one zoom in GROUP scenes.

    Encoded with a margin, so that borders look as they do inside a large picture. One window per group, because FLUX
    takes one table of position ids per batch.
    """
    rng = np.random.default_rng([first_seed, 9])
    zoom = int(rng.choice(ZOOMS))
    side = NATIVE * zoom
    outer = min(CLOSE_SIDE + 2 * CLOSE_MARGIN, side)
    top, left = (_offset(side, rng) for _ in range(2))
    y, x = (min(max(t - CLOSE_MARGIN, 0), side - outer) for t in (top, left))
    seeds = cut_scenes((top / side, left / side, (top + CLOSE_SIDE) / side, (left + CLOSE_SIDE) / side), first_seed)
    grown = (y / side, x / side, (y + outer) / side, (x + outer) / side)
    latents = encode(vae, [render(random_scene(seed), outer, outer, grown) for seed in seeds])
    size, y, x = CLOSE_SIDE // 8, (top - y) // 8, (left - x) // 8
    tokens = CLOSE_SIDE // TOKEN
    ids = grid_ids(tokens, tokens, 1 / zoom, top // TOKEN, left // TOKEN)
    return latents[:, :, y : y + size, x : x + size], ids, seeds


def close_shard(vae: AutoencoderTiny, first_seed: int) -> dict[str, np.ndarray]:
    """Groups of close-ups; all members of a group have the same position ids."""
    groups = [close_group(vae, first_seed + 1000 * g) for g in range(SHARD // GROUP)]
    return {
        "latents": pack(torch.cat([latents for latents, _, _ in groups])),
        "ids": np.stack([ids for _, ids, _ in groups]),
        "seeds": np.array([seed for _, _, seeds in groups for seed in seeds]),
        "aspect": np.float64(1.0),
    }


def make_shard(vae: AutoencoderTiny, kind: str, index: int) -> dict[str, np.ndarray]:
    """Shard number `index` of a kind."""
    first = FIRST_SEED[kind]
    if kind == "close":
        return close_shard(vae, first + index * 1000 * SHARD // GROUP)
    seeds = range(first + index * SHARD, first + (index + 1) * SHARD)
    if kind == "wide":
        return whole_shard(vae, seeds, WIDE_GRIDS[index % len(WIDE_GRIDS)], 1.0)
    return whole_shard(vae, seeds, *(((16, 16), 1.0) if kind == "native" else ((8, 8), 2.0)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--kind", choices=FIRST_SEED, required=True)
    parser.add_argument("--shards", type=int, default=8)
    args = parser.parse_args()
    folder = args.run / "latents"
    folder.mkdir(exist_ok=True)
    vae = AutoencoderTiny.from_pretrained(args.run / "vae").to(memory_format=torch.channels_last).eval()
    for index in range(args.shards):
        target = folder / f"{args.kind}-{index:03}.npz"
        if not target.exists():
            partial = target.with_suffix(".part.npz")
            np.savez(partial, **make_shard(vae, args.kind, index))
            partial.rename(target)
            print(target.name, flush=True)


if __name__ == "__main__":
    main()
