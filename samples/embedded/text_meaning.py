"""Teach the UNet's text encoders what captions mean: `python samples/embedded/text_meaning.py --run DIR --steps 500`.

A small decoder looks at what the UNet will see of a caption and says for each cell of an 8 x 8 plan what the picture
shows there. Captions cost nothing and no picture is needed, so words, their relations and places are learned at a
hundredth of the price that the UNet's own error would ask. The decoder is thrown away; DIR/text.pt keeps the encoders.
The first encoder starts from the CLIP of the shipped FLUX model.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from encode import grid_ids
from meaning import LABELS, Meaning, describe_scene, meaning_loss, stacked
from running import muon_and_adam
from text import PAIR_WIDTHS, POOLED, CaptionPair, encoder_pair, take_weights
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CLIPTextModel

from gensparse.embedded import embedded_path
from gensparse.embedded.scenes import BACKGROUNDS, COLOURS, Scene, caption, random_scene

CELLS = 8
WIDTH, LAYERS = 192, 2
TOKENS = 40  # no caption is longer, and words are not told what follows them
SEEDS = (20_000_000, 1 << 31)


class Encoders(torch.nn.Module):
    """Both text encoders and the decoder of the plan."""

    def __init__(self, captions: CaptionPair) -> None:
        super().__init__()
        self.clip, self.clip_2 = encoder_pair(captions)
        self.queries = torch.nn.Parameter(torch.randn(CELLS**2, WIDTH) * 0.5)
        self.words = torch.nn.Linear(sum(PAIR_WIDTHS), WIDTH)
        self.pooled = torch.nn.Linear(POOLED, WIDTH)
        layer = torch.nn.TransformerDecoderLayer(
            WIDTH, WIDTH // 32, 2 * WIDTH, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.plan = torch.nn.TransformerDecoder(layer, LAYERS)
        self.meaning = Meaning(WIDTH)
        self.ground = torch.nn.Linear(POOLED, len(BACKGROUNDS) + len(COLOURS))

    def forward(self, ids: torch.Tensor, ids_2: torch.Tensor) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
        """(what each cell shows, logits of the background's kind and colour)."""
        first = self.clip(ids, output_hidden_states=True).hidden_states[-2]
        second = self.clip_2(ids_2, output_hidden_states=True)
        words = self.words(torch.cat([first, second.hidden_states[-2]], -1))
        pooled = second.text_embeds
        seen = torch.cat([words, self.pooled(pooled)[:, None]], 1)
        cells = self.plan(self.queries.expand(len(ids), -1, -1), seen)
        return self.meaning(cells), self.ground(pooled)


def loss_of(model: Encoders, captions: CaptionPair, scenes: list[Scene], seeds: np.ndarray) -> torch.Tensor:
    """Error of the plan and of the background over captions of these scenes."""
    ids = grid_ids(CELLS, CELLS, 16 / CELLS)
    rows = stacked([describe_scene(scene, ids) for scene in scenes])
    labels = {name: torch.from_numpy(rows[name]) for name in LABELS}
    tokens = captions([caption(scene, int(seed)) for scene, seed in zip(scenes, seeds, strict=True)])
    # the gradient of fused attention is slower on CPUs at these sizes
    with sdpa_kernel(SDPBackend.MATH), torch.autocast("cpu", torch.bfloat16):
        read, ground = model(*(part[:, :TOKENS] for part in tokens))
    kinds = torch.tensor([BACKGROUNDS.index(scene.background) for scene in scenes])
    colours = torch.tensor([COLOURS.index(scene.background_colour) for scene in scenes])
    kind, colour = ground.float().split((len(BACKGROUNDS), len(COLOURS)), -1)
    cross_entropy = torch.nn.functional.cross_entropy
    return meaning_loss(read, labels) + 0.2 * (cross_entropy(kind, kinds) + cross_entropy(colour, colours))


def train(model: Encoders, captions: CaptionPair, steps: int, batch: int, lr: float, seed: int) -> list[float]:
    """Warm-up, then a rate that falls to zero. Returns the losses."""
    optimizers = muon_and_adam(model, lr, rest=("embedding", "meaning", "queries", "ground"))
    rng, losses = np.random.default_rng(seed), []
    for step in range(steps):
        factor = min(1, (step + 1) / 30) * (1 - step / steps)
        for optimizer, scale in zip(optimizers, (2.0, 1.0), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = lr * scale * factor
        seeds = rng.integers(*SEEDS, batch)
        loss = loss_of(model, captions, [random_scene(int(s)) for s in seeds], seeds)
        model.zero_grad(set_to_none=True)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        losses.append(loss.item())
        if len(losses) % 20 == 0:
            print(len(losses), round(float(np.mean(losses[-20:])), 4), flush=True)
    return losses


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    torch.manual_seed(args.seed)
    captions = CaptionPair()
    model = Encoders(captions)
    take_weights(model.clip, CLIPTextModel.from_pretrained(embedded_path() / "text_encoder", dtype=torch.float32))
    train(model, captions, args.steps, args.batch, args.lr, args.seed)
    torch.save({name: getattr(model, name).state_dict() for name in ("clip", "clip_2")}, args.run / "text.pt")


if __name__ == "__main__":
    main()
