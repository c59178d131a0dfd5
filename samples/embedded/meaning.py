"""What the tokens of a picture show, known exactly because scenes are drawn by program, and a head that reads it.

Guiding inner features by what a picture means speeds diffusion training up (REPA, Yu et al., 2025). The head is no part
of an exported model.
"""

from collections.abc import Mapping

import numpy as np
import torch

from gensparse.embedded.render import signed_distance
from gensparse.embedded.scenes import COLOURS, FILLS, SHAPES, Scene

NATIVE_TOKENS = 16  # per scene unit
SUBJECT_WEIGHT = 4.0  # of a token that shows part of a subject, against 1 for background: shapes are what is hard
CLASSES = {"shape": SHAPES, "colour": COLOURS, "fill": FILLS}
EDGE_POINTS = 4
LABELS = (*CLASSES, "edge")


class Meaning(torch.nn.Module):
    """Reads shape, colour and fill (class 0 = background) and edge distances off inner features [B, N, width]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.sizes = [len(names) + 1 for names in CLASSES.values()] + [EDGE_POINTS**2]
        self.layers = torch.nn.Sequential(
            torch.nn.LayerNorm(width),
            torch.nn.Linear(width, 256),
            torch.nn.SiLU(),
            torch.nn.Linear(256, sum(self.sizes)),
        )

    def forward(self, features: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.layers(features).split(self.sizes, -1)


def meaning_loss(read: tuple[torch.Tensor, ...], labels: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Cross entropies of the classes and squared error of the edge distances, weighted like the picture's error."""
    *classes, edge = (part.float() for part in read)
    terms = (edge - labels["edge"].float()).square().mean(-1)
    for name, logits in zip(CLASSES, classes, strict=True):
        terms = terms + torch.nn.functional.cross_entropy(logits.mT, labels[name].long(), reduction="none")
    return (terms * error_weights(labels["shape"])).mean()


def describe(scenes: list[Scene], ids: np.ndarray) -> dict[str, np.ndarray]:
    """What each token of each scene shows: `shape`, `colour`, `fill` [N, tokens] uint8 (0 = background) and `edge`
    [N, tokens, 16]; position ids [G, tokens, 2], each for N / G scenes in turn."""
    size = len(scenes) // len(ids)
    return stacked([describe_scene(scene, ids[i // size]) for i, scene in enumerate(scenes)])


def stacked(rows: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Labels of pictures as labels of a batch."""
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def describe_scene(scene: Scene, ids: np.ndarray) -> dict[str, np.ndarray]:
    """Labels of the tokens at position ids [tokens, 2] (rows, columns in scene units of native tokens)."""
    side = float(np.abs(ids[1] - ids[0]).max()) / NATIVE_TOKENS  # of a token
    centres = (ids + 0.5) / NATIVE_TOKENS
    steps = ((np.arange(EDGE_POINTS) + 0.5) / EDGE_POINTS - 0.5) * side
    points = centres[:, None, None] + np.stack(np.meshgrid(steps, steps, indexing="ij"), -1)
    edge = np.full((len(ids), EDGE_POINTS**2), 2.0, np.float32)
    row = {name: np.zeros(len(ids), np.uint8) for name in CLASSES}
    for subject in scene.subjects:
        distance = signed_distance(subject, scene.extent, points[..., 0], points[..., 1]).reshape(len(ids), -1) / side
        nearest = distance.mean(-1) < edge.mean(-1)
        edge[nearest] = distance[nearest]
        centre = (subject.y * scene.extent[0], subject.x * scene.extent[1])
        shown = np.abs(centres - centre).max(-1) < subject.radius * 1.05 + side / 2
        for name, names in CLASSES.items():
            row[name][shown] = names.index(getattr(subject, name)) + 1
    return {**row, "edge": edge.clip(-2, 2).astype(np.float16)}


def error_weights(shape: torch.Tensor) -> torch.Tensor:
    """Loss weights of tokens [B, tokens] by the shape they show, of mean 1 per picture, larger where a subject is."""
    weights = torch.where(shape > 0, SUBJECT_WEIGHT, 1.0)
    return weights / weights.mean(-1, keepdim=True)
