"""Train the reader: `python samples/embedded/train_reader.py --run DIR --minutes 40`.

Fresh renderings only, spoiled in the ways pictures of a generator are: blur, noise, JPEG, wobbling outlines, tints. A
checkpoint is written every two minutes; started again with the same --run, training goes on where it stopped.
"""

import argparse
import csv
import io
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from gensparse.embedded.reader import CELL_CHANNELS, SIDE, STRIDE, Network, Reader, input_size, normalise
from gensparse.embedded.render import WHOLE, Window, render
from gensparse.embedded.scenes import ASPECTS, BACKGROUNDS, COLOURS, FILLS, SHAPES, Scene, Subject, random_scene

IGNORED = -1


@dataclass(frozen=True)
class Label:
    """A subject in picture coordinates: centre and radius in pixels; class indices; `hidden` ones are not judged."""

    y: float
    x: float
    radius: float
    shape: int
    colour: int
    fill: int
    hidden: bool


# ---------------------------------------------------------------- scenes beyond the grammar


def stray_subject(rng: np.random.Generator, low: float, high: float, taken: str) -> Subject:
    """A subject anywhere, of log-uniform radius, in any colour but `taken`."""
    colours = [c for c in COLOURS if c != taken]
    return Subject(
        shape=str(rng.choice(SHAPES)),
        colour=str(rng.choice(colours)),
        fill=str(rng.choice(FILLS, p=(0.4, 0.2, 0.2, 0.2))),
        size="medium",
        x=float(rng.uniform(0.04, 0.96)),
        y=float(rng.uniform(0.04, 0.96)),
        radius=float(math.exp(rng.uniform(math.log(low), math.log(high)))),
        rotation=float(rng.uniform(-24, 24)),
    )


def disturbed(scene: Scene, rng: np.random.Generator) -> Scene:
    """The scene as a faulty generator might draw it: subjects lost, added, moved, of odd sizes, overlapping."""
    subjects = tuple(s for s in scene.subjects if rng.random() > 0.35)
    subjects = tuple(
        replace(
            s,
            x=s.x + float(rng.normal(0, 0.03)),
            y=s.y + float(rng.normal(0, 0.03)),
            radius=s.radius * float(rng.uniform(0.75, 1.3)),
            rotation=s.rotation + float(rng.normal(0, 4)),
        )
        for s in subjects
    )
    extra = int(rng.choice((0, 1, 2, 4), p=(0.35, 0.3, 0.2, 0.15)))
    added = tuple(stray_subject(rng, 0.045, 0.3, scene.background_colour) for _ in range(extra))
    return replace(scene, subjects=subjects + added, relations=(), places=())


def close_up(scene: Scene, rng: np.random.Generator) -> tuple[Scene, Window]:
    """A window of 1/1.4 to 1/12 of the side, half of the time with tiny strays inside it."""
    zoom = float(2 ** rng.uniform(0.5, 3.6))
    side = 1 / zoom
    top, left = (float(v) for v in rng.uniform(0, 1 - side, 2))
    strays = []
    for _ in range(int(rng.choice((0, 1, 2), p=(0.45, 0.35, 0.2)))):
        stray = stray_subject(rng, 0.045 * side, 0.3 * side, scene.background_colour)
        strays.append(replace(stray, y=top + stray.y * side, x=left + stray.x * side))
    return replace(scene, subjects=scene.subjects + tuple(strays)), (top, left, top + side, left + side)


def portrait(scene: Scene, rng: np.random.Generator) -> tuple[Scene, Window]:
    """A window around one subject, one to three times as large as its box."""
    subject = scene.subjects[int(rng.integers(len(scene.subjects)))]
    half = subject.radius * float(rng.uniform(1.05, 3))
    dy, dx = (min(half / e, 0.5) for e in scene.extent)
    y = float(np.clip(subject.y + rng.uniform(-0.3, 0.3) * dy, dy, 1 - dy))
    x = float(np.clip(subject.x + rng.uniform(-0.3, 0.3) * dx, dx, 1 - dx))
    return scene, (y - dy, x - dx, y + dy, x + dx)


def example(seed: int, aspect: float) -> tuple[Scene, Window]:
    """What training picture `seed` shows."""
    rng = np.random.default_rng([seed, 11])
    scene, kind = random_scene(seed, aspect), rng.random()
    if kind < 0.2:
        return scene, WHOLE
    if kind < 0.45:
        return disturbed(scene, rng), WHOLE
    if kind < 0.65:
        return portrait(scene, rng)
    return close_up(disturbed(scene, rng) if rng.random() < 0.3 else scene, rng)


# ---------------------------------------------------------------- labels


def visible_share(scene: Scene, index: int, window: Window) -> float:
    """Share of a subject's disc that lies in the window and under no later subject."""
    subject, (height, width) = scene.subjects[index], scene.extent
    steps = (np.arange(12) + 0.5) / 6 - 1
    v, u = (g.ravel() for g in np.meshgrid(steps, steps, indexing="ij"))
    v, u = v[np.hypot(v, u) < 1], u[np.hypot(v, u) < 1]
    y, x = subject.y + v * subject.radius / height, subject.x + u * subject.radius / width
    seen = (y > window[0]) & (y < window[2]) & (x > window[1]) & (x < window[3])
    for other in scene.subjects[index + 1 :]:
        seen &= np.hypot((y - other.y) * height, (x - other.x) * width) > other.radius * 0.9
    return float(seen.mean())


def labels(scene: Scene, window: Window, height: int, width: int) -> list[Label]:
    """What the reader should find in `window` drawn at [height, width]; under a quarter visible counts as absent."""
    found = []
    for index, s in enumerate(scene.subjects):
        share = visible_share(scene, index, window)
        if share < 0.25:
            continue
        y = (s.y - window[0]) / (window[2] - window[0]) * height
        x = (s.x - window[1]) / (window[3] - window[1]) * width
        radius = s.radius / scene.extent[0] / (window[2] - window[0]) * height
        classes = SHAPES.index(s.shape), COLOURS.index(s.colour), FILLS.index(s.fill)
        found.append(Label(y, x, radius, *classes, hidden=share < 0.8 or radius < 4))
    return found


def background_label(scene: Scene, window: Window) -> tuple[int, int]:
    """(kind, colour) indices, IGNORED where a close-up shows too little of the background."""
    if window[2] - window[0] < 0.3:
        return IGNORED, IGNORED
    return BACKGROUNDS.index(scene.background), COLOURS.index(scene.background_colour)


@dataclass
class Targets:
    """Per-cell targets of a batch: heat [B, h, w]; judged [B, h, w] bool; own [B, h, w] weight of the class losses;
    place [B, 3, h, w]; classes [B, 3, h, w]; background [B, 2]."""

    heat: Tensor
    judged: Tensor
    own: Tensor
    place: Tensor
    classes: Tensor
    background: Tensor


def targets(items: list[list[Label]], background: list[tuple[int, int]], height: int, width: int) -> Targets:
    """Grids of all pictures of a batch."""
    rows, columns, count = height // STRIDE, width // STRIDE, len(items)
    heat, own = np.zeros((2, count, rows, columns), np.float32)
    judged = np.ones((count, rows, columns), bool)
    place = np.zeros((count, 3, rows, columns), np.float32)
    classes = np.zeros((count, 3, rows, columns), np.int64)
    cy, cx = (np.arange(rows) + 0.5)[:, None], (np.arange(columns) + 0.5)[None]
    for b, found in enumerate(items):
        for label in sorted(found, key=lambda one: -one.radius):
            y, x, radius = label.y / STRIDE, label.x / STRIDE, label.radius / STRIDE
            distance = np.hypot(cy - y, cx - x)
            if label.hidden:
                judged[b] &= distance > max(1.2, 0.4 * radius)
                continue
            core = distance <= max(0.75, 0.35 * radius)
            heat[b] = np.maximum(heat[b], np.exp(-0.5 * (distance / max(0.6, 0.2 * radius)) ** 2))
            nearest = np.unravel_index(distance.argmin(), distance.shape)
            heat[b][nearest], core[nearest] = 1.0, True
            own[b][core] = 1.0 / core.sum()
            grids = (np.broadcast_to(y - cy, core.shape), np.broadcast_to(x - cx, core.shape))
            for channel, grid in enumerate((*grids, np.full(core.shape, math.log(label.radius / SIDE)))):
                place[b, channel][core] = grid[core]
            for channel, value in enumerate((label.shape, label.colour, label.fill)):
                classes[b, channel][core] = value
    return Targets(*(torch.from_numpy(a) for a in (heat, judged, own, place, classes, np.array(background))))


# ---------------------------------------------------------------- spoiling


def blur(pixels: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of [B, 3, H, W]."""
    reach = max(1, round(2.5 * sigma))
    kernel = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / sigma) ** 2)
    kernel = (kernel / kernel.sum()).repeat(3, 1, 1, 1)
    pixels = F.conv2d(F.pad(pixels, (reach, reach, 0, 0), mode="replicate"), kernel, groups=3)
    return F.conv2d(F.pad(pixels, (0, 0, reach, reach), mode="replicate"), kernel.transpose(2, 3), groups=3)


def rescale(pixels: Tensor, factor: float) -> Tensor:
    """Down and up again."""
    size = pixels.shape[-2:]
    small = F.interpolate(pixels, scale_factor=1 / factor, mode="bilinear", antialias=True)
    return F.interpolate(small, size=size, mode="bicubic", align_corners=False)


def wobble(pixels: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Smooth random displacement of a few pixels."""
    count, _, height, width = pixels.shape
    coarse = torch.randn(count, 2, height // 12, width // 12, generator=generator)
    shift = F.interpolate(coarse, (height, width), mode="bicubic", align_corners=False).permute(0, 2, 3, 1)
    identity = F.affine_grid(torch.eye(2, 3).repeat(count, 1, 1), [count, 3, height, width], align_corners=False)
    scaled = shift * strength * 2 / torch.tensor([width, height])
    return F.grid_sample(pixels, identity + scaled, padding_mode="border", align_corners=False)


def grain(pixels: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Noise at scales of 1, 3 and 8 pixels, as left by few sampling steps."""
    for scale in (1, 3, 8):
        shape = (len(pixels), 3, pixels.shape[2] // scale, pixels.shape[3] // scale)
        noise = torch.randn(shape, generator=generator) * strength * float(torch.rand((), generator=generator))
        pixels = pixels + F.interpolate(noise, pixels.shape[-2:], mode="bilinear", align_corners=False)
    return pixels


def tint(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Slight change of contrast and of each channel's level."""
    gain = 1 + 0.05 * torch.randn(len(pixels), 1, 1, 1, generator=generator)
    return pixels * gain + 0.04 * torch.randn(len(pixels), 3, 1, 1, generator=generator)


def jpeg(picture: np.ndarray, quality: int) -> np.ndarray:
    """Through JPEG and back."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=quality)
    return np.asarray(Image.open(buffer))


def spoil(pixels: Tensor, rng: np.random.Generator) -> Tensor:
    """Each group of eight pictures of [B, 3, H, W] in -1..1 gets its own mixture of faults; a fifth stays clean."""
    groups = []
    for group in pixels.split(8):
        generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
        if rng.random() < 0.8:
            if rng.random() < 0.45:
                group = wobble(group, float(rng.uniform(0.3, 1.8)), generator)
            if rng.random() < 0.3:
                group = blur(group, float(rng.uniform(0.4, 1.8)))
            if rng.random() < 0.25:
                group = rescale(group, float(rng.uniform(1.3, 2.6)))
            if rng.random() < 0.5:
                group = grain(group, float(rng.uniform(0.01, 0.12)), generator)
            if rng.random() < 0.6:
                group = tint(group, generator)
        groups.append(group)
    return torch.cat(groups).clamp(-1, 1).contiguous(memory_format=torch.channels_last)


# ---------------------------------------------------------------- batches and loss


def batch(first_seed: int, count: int) -> tuple[Tensor, Targets]:
    """Pictures [count, 3, H, W] of one aspect ratio, spoiled, with targets."""
    rng = np.random.default_rng([first_seed, 12])
    aspect = float(rng.choice(ASPECTS, p=(0.6, 0.1, 0.1, 0.1, 0.1)))
    height, width = input_size(aspect)
    pictures, items, background = [], [], []
    for seed in range(first_seed, first_seed + count):
        scene, window = example(seed, aspect)
        picture = render(scene, height, width, window)
        pictures.append(jpeg(picture, int(rng.integers(40, 95))) if rng.random() < 0.15 else picture)
        items.append(labels(scene, window, height, width))
        background.append(background_label(scene, window))
    return spoil(normalise(np.stack(pictures)), rng), targets(items, background, height, width)


def loss_of(cells: Tensor, background: Tensor, wanted: Targets) -> dict[str, Tensor]:
    """Focal loss of the heat map (CornerNet's form), L1 of places, cross entropy of classes; means per subject."""
    heat, place, *classes = cells.float().split(CELL_CHANNELS, 1)
    subjects = wanted.own.sum().clamp_min(1)
    score = heat[:, 0].sigmoid().clamp(1e-4, 1 - 1e-4)
    hit = wanted.heat == 1
    gain = torch.where(hit, (1 - score) ** 2 * score.log(), (1 - wanted.heat) ** 4 * score**2 * (1 - score).log())
    losses = {"heat": -(gain * (wanted.judged | hit)).sum() / subjects}
    losses["place"] = ((place - wanted.place).abs().sum(1) * wanted.own).sum() / subjects
    for channel, (name, logits) in enumerate(zip(("shape", "colour", "fill"), classes, strict=True)):
        entropy = F.cross_entropy(logits, wanted.classes[:, channel], reduction="none")
        losses[name] = (entropy * wanted.own).sum() / subjects
    kinds, colours = background.float().split((len(BACKGROUNDS), len(COLOURS)), 1)
    losses["kind"] = F.cross_entropy(kinds, wanted.background[:, 0], ignore_index=IGNORED)
    losses["back"] = F.cross_entropy(colours, wanted.background[:, 1], ignore_index=IGNORED)
    return losses


# ---------------------------------------------------------------- training


def check(network: Network, count: int = 200) -> dict[str, float]:
    """Shares read right on fresh clean scenes: exact number of subjects, then attributes of matched subjects."""
    training = network.training
    reader = Reader(network)
    scenes = [random_scene(seed) for seed in range(8_000_000, 8_000_000 + count)]
    readings = reader.read_many([render(s, SIDE * 2, SIDE * 2) for s in scenes])
    right = {"count": [], "shape": [], "colour": [], "fill": [], "kind": [], "back": []}
    for scene, reading in zip(scenes, readings, strict=True):
        right["count"].append(len(scene.subjects) == len(reading.subjects))
        right["kind"].append(scene.background == reading.background_kind)
        right["back"].append(scene.background_colour == reading.background_colour)
        for subject in scene.subjects:
            seen = min(
                reading.subjects,
                key=lambda s, t=subject: math.hypot(s.centre[0] - t.y, s.centre[1] - t.x),
                default=None,
            )
            for name in ("shape", "colour", "fill"):
                right[name].append(seen is not None and getattr(seen, name) == getattr(subject, name))
    network.train(training)
    return {name: round(float(np.mean(values)), 4) for name, values in right.items()}


def save(network: Network, path: Path) -> None:
    """Weights in half precision."""
    tensors = {k: v.half() if v.is_floating_point() else v for k, v in network.state_dict().items()}
    save_file({k: v.contiguous() for k, v in tensors.items()}, path)


def train(run: Path, minutes: float, size: int, rate: float) -> Network:
    """Train for `minutes` in all; the learning rate falls to zero as a cosine of the time spent."""
    network = Network().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(network.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.01)
    state = {"step": 0, "seconds": 0.0}
    if (run / "checkpoint.pt").exists():
        saved = torch.load(run / "checkpoint.pt", weights_only=True)
        network.load_state_dict(saved["network"])
        optimizer.load_state_dict(saved["optimizer"])
        state = saved["state"]
    start, kept = time.time() - state["seconds"], time.time()
    network.train()
    with (run / "reader.csv").open("a", newline="") as handle:
        while (progress := (time.time() - start) / (60 * minutes)) < 1:
            step = state["step"]
            for group in optimizer.param_groups:
                group["lr"] = rate * min(1, (step + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * progress))
            pixels, wanted = batch(step * size, size)
            with torch.autocast("cpu", torch.bfloat16):
                outputs = network(pixels)
            losses = loss_of(*outputs, wanted)
            optimizer.zero_grad(set_to_none=True)
            sum(losses.values()).backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 5.0)
            optimizer.step()
            state = {"step": step + 1, "seconds": time.time() - start}
            if state["step"] % 25 == 0:
                row = [state["step"], round(state["seconds"]), *(round(v.item(), 4) for v in losses.values())]
                csv.writer(handle).writerow(row)
                handle.flush()
                print(*row, flush=True)
            if time.time() - kept > 120:
                keep(run, network, optimizer, state)
                kept = time.time()
    keep(run, network, optimizer, state)
    return network


def keep(run: Path, network: Network, optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Write a checkpoint and the weights, and print how well they read."""
    content = {"network": network.state_dict(), "optimizer": optimizer.state_dict(), "state": state}
    torch.save(content, run / "checkpoint.new")
    (run / "checkpoint.new").replace(run / "checkpoint.pt")
    save(network, run / "reader.safetensors")
    print(check(network), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="folder of checkpoints and of the finished weights")
    parser.add_argument("--minutes", type=float, default=40)
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    args.run.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    network = train(args.run, args.minutes, args.batch, args.rate)
    print(check(network, 1000), flush=True)


if __name__ == "__main__":
    main()
