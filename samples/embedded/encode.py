"""Render and encode training pictures: `python samples/embedded/encode.py --run DIR --shards native=13 close=5`.

Kinds: `whole` (128 px whole pictures, 64 tokens), `native` (256 px, 256 tokens), `wide` (other aspect ratios of the
same area) and `close` (16 x 16 tokens cut from renderings at 2, 4, 8, 16 times the native size). A shard is one .npz
file: latents [N, tokens, 32] float16, seeds [N], aspect, position ids [G, tokens, 2] (rows, columns) in scene units,
each for N / G pictures in turn, what the tokens show (see meaning.py) and SAYINGS captions of every picture as token
ids of all tokenizers. `--workers` processes draw, one network on `--device` encodes what they have drawn.

Position ids: one unit is one native token (16 px of a 256 px picture), centre-aligned: token i of a grid with spacing
s lies at (i + 0.5) * s - 0.5: spacing 1 at the native size, 2 for whole pictures of 128 px, 1/zoom for close-ups.
"""

import argparse
import itertools
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from autoencoder import to_tensor
from data import NATIVE, overlap
from diffusers import AutoencoderTiny
from meaning import describe
from text import Tokens

from gensparse.embedded.render import Window, render
from gensparse.embedded.scenes import Scene, caption, random_scene

TOKEN = 16  # pixels per token
SHARD, GROUP = 1024, 32
SAYINGS = 4
CLOSE_SIDE, CLOSE_MARGIN = 256, 32
WIDE_GRIDS = ((12, 21), (21, 12), (14, 18), (18, 14))  # 252 tokens each: one shape to compile for
ZOOMS = (2, 4, 8, 16)
FIRST_SEED = {"whole": 1_000_000, "native": 20_000_000, "wide": 3_000_000, "close": 40_000_000}


@dataclass(frozen=True)
class Drawn:
    """A shard before it is encoded: pictures [N, height, width, 3] uint8, of which the part of `size` (rows, columns)
    latent cells from `corners` [G, 2] on is kept, and the rest of what the shard will hold."""

    pictures: np.ndarray
    corners: list[tuple[int, int]]
    size: tuple[int, int]
    facts: dict[str, np.ndarray]


def pack(latents: torch.Tensor) -> np.ndarray:
    """[B, C, 2h, 2w] -> tokens [B, h * w, 4C], as FluxPipeline packs them."""
    batch, channels, height, width = latents.shape
    blocks = latents.view(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return blocks.reshape(batch, height * width // 4, channels * 4).half().cpu().numpy()


def grid_ids(rows: int, columns: int, spacing: float, top: int = 0, left: int = 0) -> np.ndarray:
    """Position ids [rows * columns, 2] of a window that starts at token (top, left) of a grid with this spacing."""
    y = (top + np.arange(rows) + 0.5) * spacing - 0.5
    x = (left + np.arange(columns) + 0.5) * spacing - 0.5
    return np.stack(np.meshgrid(y, x, indexing="ij"), -1).reshape(-1, 2).astype(np.float32)


@torch.no_grad()
def encode(vae: AutoencoderTiny, pictures: np.ndarray, batch: int = 16) -> torch.Tensor:
    """Latents of equally large pictures, float32."""
    device = next(vae.parameters()).device
    with torch.autocast(device.type, torch.bfloat16):
        parts = [
            vae.encoder(to_tensor(pictures[i : i + batch], device)).float() for i in range(0, len(pictures), batch)
        ]
    return torch.cat(parts)


def finish(vae: AutoencoderTiny, drawn: Drawn, batch: int = 16) -> dict[str, np.ndarray]:
    """The shard of what was drawn."""
    latents, (rows, columns) = encode(vae, drawn.pictures, batch), drawn.size
    groups = latents.chunk(len(drawn.corners))
    kept = [part[:, :, y : y + rows, x : x + columns] for part, (y, x) in zip(groups, drawn.corners, strict=True)]
    return {"latents": pack(torch.cat(kept)), **drawn.facts}


# ------------------------------------------------------------------------------------------------------------- drawing
def whole_pictures(tokens: Tokens, seeds: range, grid: tuple[int, int], spacing: float) -> Drawn:
    """Whole pictures on one token grid."""
    rows, columns = grid
    scenes = [random_scene(seed, columns / rows) for seed in seeds]
    pictures = np.stack([render(scene, rows * TOKEN, columns * TOKEN) for scene in scenes])
    facts = facts_of(tokens, seeds, scenes, grid_ids(rows, columns, spacing)[None])
    return Drawn(pictures, [(0, 0)], (2 * rows, 2 * columns), facts)


def facts_of(tokens: Tokens, seeds, scenes: list[Scene], ids: np.ndarray) -> dict[str, np.ndarray]:
    """What a shard says of its pictures besides their latents."""
    said = [
        caption(scene, SAYINGS * seed + i) for seed, scene in zip(seeds, scenes, strict=True) for i in range(SAYINGS)
    ]
    return {
        "ids": ids,
        "seeds": np.array(seeds),
        "aspect": np.float64(scenes[0].aspect),
        **describe(scenes, ids),
        **{name: part.reshape(len(scenes), SAYINGS, -1) for name, part in tokens(said).items()},
    }


def cut_scenes(window: Window, first_seed: int, count: int) -> list[int]:
    """`count` seeds, from `first_seed` on, of scenes in most of which the window cuts a subject."""
    seeds, seed = [], first_seed
    while len(seeds) < count:
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


def close_group(first_seed: int, count: int) -> tuple[list[np.ndarray], tuple[int, int], np.ndarray, list[int]]:
    """(pictures, corner in latent cells, ids, seeds) of one window at one zoom in `count` scenes.

    Drawn with a margin, so that borders look as they do inside a large picture. One window per group, because FLUX
    takes one table of position ids per batch.
    """
    rng = np.random.default_rng([first_seed, 9])
    zoom = int(rng.choice(ZOOMS))
    side, outer = NATIVE * zoom, CLOSE_SIDE + 2 * CLOSE_MARGIN
    top, left = (_offset(side, rng) for _ in range(2))
    y, x = (min(max(t - CLOSE_MARGIN, 0), side - outer) for t in (top, left))
    window = (top / side, left / side, (top + CLOSE_SIDE) / side, (left + CLOSE_SIDE) / side)
    seeds = cut_scenes(window, first_seed, count)
    grown = (y / side, x / side, (y + outer) / side, (x + outer) / side)
    pictures = [render(random_scene(seed), outer, outer, grown) for seed in seeds]
    tokens = CLOSE_SIDE // TOKEN
    ids = grid_ids(tokens, tokens, 1 / zoom, top // TOKEN, left // TOKEN)
    return pictures, ((top - y) // 8, (left - x) // 8), ids, seeds


def close_pictures(tokens: Tokens, first_seed: int, count: int, group: int) -> Drawn:
    """`count` close-ups in groups; all members of a group have the same position ids."""
    groups = [close_group(first_seed + 8 * group * g, group) for g in range(count // group)]
    seeds = [seed for *_, own in groups for seed in own]
    facts = facts_of(tokens, seeds, [random_scene(seed) for seed in seeds], np.stack([ids for *_, ids, _ in groups]))
    pictures = np.stack([picture for drawn, *_ in groups for picture in drawn])
    return Drawn(pictures, [corner for _, corner, *_ in groups], (CLOSE_SIDE // 8, CLOSE_SIDE // 8), facts)


def draw(tokens: Tokens, kind: str, index: int, group: int = GROUP) -> Drawn:
    """Shard number `index` of a kind, not yet encoded."""
    first = FIRST_SEED[kind]
    if kind == "close":
        return close_pictures(tokens, first + index * 8 * SHARD, SHARD, group)
    seeds = range(first + index * SHARD, first + (index + 1) * SHARD)
    if kind == "wide":
        return whole_pictures(tokens, seeds, WIDE_GRIDS[index % len(WIDE_GRIDS)], 1.0)
    return whole_pictures(tokens, seeds, *(((16, 16), 1.0) if kind == "native" else ((8, 8), 2.0)))


def drawings(wanted: list[tuple[str, int]], workers: int, group: int) -> Iterator[tuple[str, int, Drawn]]:
    """Everything wanted, as it becomes ready."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # this process goes on to fork
    tokens = Tokens()
    if workers < 2:
        for kind, index in wanted:
            yield kind, index, draw(tokens, kind, index, group)
        return
    context = multiprocessing.get_context("fork" if hasattr(os, "fork") else "spawn")
    waiting = iter(wanted)
    with ProcessPoolExecutor(workers, context) as pool:
        running = {pool.submit(draw, tokens, *job, group): job for job in itertools.islice(waiting, 2 * workers)}
        while running:
            done = next(as_completed(running))
            job = running.pop(done)
            if (following := next(waiting, None)) is not None:
                running[pool.submit(draw, tokens, *following, group)] = following
            yield *job, done.result()


def in_turn(shards: dict[str, int], folder: Path) -> list[tuple[str, int]]:
    """The shards that are not there yet, kinds mixed so that all of them are there early."""
    jobs = [((index + 0.5) / count, kind, index) for kind, count in shards.items() for index in range(count)]
    return [(kind, index) for _, kind, index in sorted(jobs) if not shard_path(folder, kind, index).exists()]


def shard_path(folder: Path, kind: str, index: int) -> Path:
    return folder / f"{kind}-{index:03}.npz"


def shard_count(text: str) -> tuple[str, int]:
    """ "native=13" -> ("native", 13)."""
    kind, _, count = text.partition("=")
    if kind not in FIRST_SEED or not count.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not KIND=NUMBER with a kind of {', '.join(FIRST_SEED)}")
    return kind, int(count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--shards", type=shard_count, nargs="+", required=True, metavar="KIND=NUMBER")
    parser.add_argument("--workers", type=int, default=1, help="processes that draw")
    parser.add_argument("--group", type=int, default=GROUP, help="close-ups that share a window; at least a batch")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    folder = args.run / "latents"
    folder.mkdir(exist_ok=True)
    vae, batch = None, 16 if args.device == "cpu" else 128
    for kind, index, drawn in drawings(in_turn(dict(args.shards), folder), args.workers, args.group):
        if vae is None:  # loaded late: what forks must not have started a GPU
            vae = AutoencoderTiny.from_pretrained(args.run / "vae").to(args.device, memory_format=torch.channels_last)
        target = shard_path(folder, kind, index)
        partial = target.with_suffix(".part.npz")
        np.savez(partial, **finish(vae, drawn, batch))
        partial.rename(target)
        print(target.name, flush=True)


if __name__ == "__main__":
    main()
