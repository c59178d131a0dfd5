"""Teach text encoders what captions mean: `python samples/embedded/text_meaning.py --run DIR --model unet --steps 500`.

A small decoder looks at what the denoiser will see of a caption and says for each cell of an 8 x 8 plan what the
picture shows there. Captions cost nothing and no picture is needed, so words, their relations and places are learned
at a hundredth of the price that the denoiser's own error would ask. The decoder is thrown away; DIR/text.pt keeps the
encoders. The CLIP of FLUX, and the UNet's first one, start from the pipeline folder `--init`.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from encode import grid_ids
from meaning import LABELS, Meaning, describe_scene, meaning_loss, stacked
from running import muon_and_adam
from text import (
    PAIR_WIDTHS,
    POOLED,
    CaptionPair,
    Captions,
    clip_encoder,
    encoder_pair,
    t5_encoder,
    take_weights,
)
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CLIPTextModel

from gensparse.embedded import embedded_path
from gensparse.embedded.scenes import BACKGROUNDS, COLOURS, Scene, caption, random_scene

CELLS = 8
WIDTH, LAYERS = 192, 2
TOKENS = 40  # no caption is longer, and words are not told what follows them
SEEDS = (20_000_000, 1 << 31)


class Encoders(torch.nn.Module):
    """The text encoders of a denoiser, and the decoder of the plan."""

    def __init__(self, words: int, pooled: int) -> None:
        super().__init__()
        self.queries = torch.nn.Parameter(torch.randn(CELLS**2, WIDTH) * 0.5)
        self.words = torch.nn.Linear(words, WIDTH)
        self.pooled = torch.nn.Linear(pooled, WIDTH)
        layer = torch.nn.TransformerDecoderLayer(
            WIDTH, WIDTH // 32, 2 * WIDTH, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.plan = torch.nn.TransformerDecoder(layer, LAYERS)
        self.meaning = Meaning(WIDTH)
        self.ground = torch.nn.Linear(pooled, len(BACKGROUNDS) + len(COLOURS))

    def encode(self, ids: torch.Tensor, ids_2: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(words [B, length, width], pooled [B, width]) as the denoiser gets them."""
        raise NotImplementedError

    def forward(self, ids: torch.Tensor, ids_2: torch.Tensor) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
        """(what each cell shows, logits of the background's kind and colour)."""
        words, pooled = self.encode(ids, ids_2)
        seen = torch.cat([self.words(words), self.pooled(pooled)[:, None]], 1)
        cells = self.plan(self.queries.expand(len(ids), -1, -1), seen)
        return self.meaning(cells), self.ground(pooled)


class UNetEncoders(Encoders):
    """Two CLIPs, as SDXL reads them."""

    names = ("clip", "clip_2")

    def __init__(self, captions: CaptionPair, init: Path) -> None:
        super().__init__(sum(PAIR_WIDTHS), POOLED)
        self.clip, self.clip_2 = encoder_pair(captions)
        take_weights(self.clip, CLIPTextModel.from_pretrained(init / "text_encoder", dtype=torch.float32))

    def encode(self, ids: torch.Tensor, ids_2: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        first = self.clip(ids[:, :TOKENS], output_hidden_states=True).hidden_states[-2]
        second = self.clip_2(ids_2[:, :TOKENS], output_hidden_states=True)
        return torch.cat([first, second.hidden_states[-2]], -1), second.text_embeds


class FluxEncoders(Encoders):
    """T5 for words, CLIP for the pooled vector."""

    names = ("clip", "t5")

    def __init__(self, captions: Captions, init: Path) -> None:
        super().__init__(words=192, pooled=96)
        self.clip, self.t5 = clip_encoder(captions.clip), t5_encoder(captions.t5)
        take_weights(self.clip, CLIPTextModel.from_pretrained(init / "text_encoder", dtype=torch.float32))
        for encoder in (self.clip, self.t5):
            encoder.set_attn_implementation("eager")

    def encode(self, ids: torch.Tensor, ids_2: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.t5(ids_2)[0], self.clip(ids).pooler_output


MODELS = {"unet": (CaptionPair, UNetEncoders), "flux": (Captions, FluxEncoders)}


def loss_of(model: Encoders, captions: CaptionPair | Captions, scenes: list[Scene], seeds: np.ndarray) -> torch.Tensor:
    """Error of the plan and of the background over captions of these scenes."""
    ids = grid_ids(CELLS, CELLS, 16 / CELLS)
    rows = stacked([describe_scene(scene, ids) for scene in scenes])
    labels = {name: torch.from_numpy(rows[name]) for name in LABELS}
    tokens = captions([caption(scene, int(seed)) for scene, seed in zip(scenes, seeds, strict=True)])
    # the gradient of fused attention is slower on CPUs at these sizes
    with sdpa_kernel(SDPBackend.MATH), torch.autocast("cpu", torch.bfloat16):
        read, ground = model(*tokens)
    kinds = torch.tensor([BACKGROUNDS.index(scene.background) for scene in scenes])
    colours = torch.tensor([COLOURS.index(scene.background_colour) for scene in scenes])
    kind, colour = ground.float().split((len(BACKGROUNDS), len(COLOURS)), -1)
    cross_entropy = torch.nn.functional.cross_entropy
    return meaning_loss(read, labels) + 0.2 * (cross_entropy(kind, kinds) + cross_entropy(colour, colours))


def train(
    model: Encoders, captions: CaptionPair | Captions, steps: int, batch: int, lr: float, seed: int
) -> list[float]:
    """Warm-up, then a rate that falls to zero. Returns the losses."""
    optimizers = muon_and_adam(model, lr, rest=("embedding", "bias", "meaning", "queries", "ground"))
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
    parser.add_argument("--model", choices=MODELS, default="unet")
    parser.add_argument("--init", type=Path, help="pipeline folder of a FLUX model; the shipped one without")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    torch.manual_seed(args.seed)
    tokenizers, encoders = MODELS[args.model]
    captions = tokenizers()
    model = encoders(captions, args.init or embedded_path())
    train(model, captions, args.steps, args.batch, args.lr, args.seed)
    torch.save({name: getattr(model, name).state_dict() for name in model.names}, args.run / "text.pt")


if __name__ == "__main__":
    main()
