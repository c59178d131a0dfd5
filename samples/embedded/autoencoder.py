"""Train the autoencoder: `python samples/embedded/autoencoder.py --run DIR --minutes 10`.

AutoencoderTiny, 8x, 8 latent channels. Latents are kept at zero mean and unit variance per channel by a loss term; at
the end the rest is folded into the encoder's last layer, and the decoder alone is tuned to the frozen encoder.
"""

import argparse
import csv
import math
import time
from pathlib import Path

import numpy as np
import torch
from data import autoencoder_picture, crop_window
from diffusers import AutoencoderTiny
from muon import Muon

from gensparse.embedded.render import render
from gensparse.embedded.scenes import random_scene

LATENT_CHANNELS = 8


def build() -> AutoencoderTiny:
    """The architecture; the decoder stays under 0.3 MFLOP per pixel."""
    return AutoencoderTiny(
        encoder_block_out_channels=(32, 32, 32, 32),
        decoder_block_out_channels=(32, 32, 32, 32),
        num_encoder_blocks=(1, 2, 3, 3),
        num_decoder_blocks=(4, 3, 2, 1),
        latent_channels=LATENT_CHANNELS,
        scaling_factor=1.0,
        shift_factor=0.0,
    )


def to_tensor(pictures: np.ndarray, device: torch.device | str = "cpu") -> torch.Tensor:
    """uint8 [B, H, W, 3] -> float [B, 3, H, W] in -1..1, channels last."""
    return (torch.from_numpy(pictures).to(device).float() / 127.5 - 1).permute(0, 3, 1, 2)


def picture_loss(out: torch.Tensor, target: torch.Tensor, l1: float) -> torch.Tensor:
    """Squared error of pixels and of their differences along both axes, plus `l1` times the absolute errors.

    Absolute errors sharpen edges but stall at flat pictures when they lead from the start: raise `l1` with time.
    """
    difference = out - target
    errors = (difference, difference.diff(dim=2), difference.diff(dim=3))
    return sum(e.square().mean() + l1 * e.abs().mean() for e in errors)


def whitening_loss(latents: torch.Tensor) -> torch.Tensor:
    """Distance of each channel's batch mean from 0 and log standard deviation from 0."""
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    return (mean.square() + std.clamp_min(1e-4).log().square()).mean()


def psnr(vae: AutoencoderTiny, pictures: np.ndarray) -> float:
    """Mean PSNR in dB over pictures."""
    with torch.no_grad():
        target = to_tensor(pictures)
        out = vae.decode(vae.encode(target).latents).sample.clamp(-1, 1)
        errors = ((out - target) / 2).square().mean((1, 2, 3))
    return float((-10 * errors.log10()).mean())


def held_out(zoom: float, count: int = 16) -> np.ndarray:
    """Fresh pictures: whole at 256 px for zoom 1, whole at 128 px for 0.5, else 128-px close-ups."""
    out = []
    for seed in range(9_000_000, 9_000_000 + count):
        scene = random_scene(seed)
        side = 128 if zoom != 1 else 256
        window = crop_window(scene, zoom, side, np.random.default_rng(seed))
        out.append(render(scene, side, side, window))
    return np.stack(out)


def report(vae: AutoencoderTiny) -> dict[str, float]:
    """PSNR by zoom."""
    return {f"psnr_{zoom:g}": round(psnr(vae, held_out(zoom)), 2) for zoom in (0.5, 1, 2, 4, 8, 16)}


def train(vae: AutoencoderTiny, pool: np.ndarray, minutes: float, batch: int, lr: float, log: Path, decoder_only: bool):
    """Run for `minutes` of wall clock; the learning rate falls to zero as a cosine of the time spent."""
    parameters = list(vae.decoder.parameters() if decoder_only else vae.parameters())
    optimizers = [
        Muon([p for p in parameters if p.ndim > 1], lr=lr),
        torch.optim.AdamW([p for p in parameters if p.ndim == 1], lr=lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    rng, start, step = np.random.default_rng(0), time.time(), 0
    with log.open("a", newline="") as handle:
        writer = csv.writer(handle)
        while (progress := (time.time() - start) / (60 * minutes)) < 1:
            for group in (g for o in optimizers for g in o.param_groups):
                group["lr"] = lr * min(1, (step + 1) / 50) * (0.5 + 0.5 * math.cos(math.pi * progress))
            target = to_tensor(pool[np.sort(rng.choice(len(pool), batch, replace=False))])
            with torch.autocast("cpu", torch.bfloat16):
                with torch.set_grad_enabled(not decoder_only):
                    latents = vae.encoder(target)
                noisy = latents + torch.randn_like(latents) * 0.1 * torch.rand(batch, 1, 1, 1)
                out = vae.decoder(noisy)
            loss = picture_loss(out.float(), target, l1=0.3 * (1.0 if decoder_only else progress))
            total = loss if decoder_only else loss + 0.1 * whitening_loss(latents.float())
            vae.zero_grad(set_to_none=True)
            total.backward()
            for optimizer in optimizers:
                optimizer.step()
            step += 1
            if step % 50 == 0:
                row = [step, round(time.time() - start), round(loss.item(), 5), round(total.item() - loss.item(), 5)]
                writer.writerow(row)
                handle.flush()
                print(*row, flush=True)
            if step % 250 == 0:
                print(report(vae), flush=True)


@torch.no_grad()
def fold_whitening(vae: AutoencoderTiny, pool: np.ndarray) -> None:
    """Make latents exactly zero-mean and unit-variance per channel by rescaling the encoder's last convolution."""
    latents = torch.cat([vae.encoder(to_tensor(pool[i : i + 64])) for i in range(0, 1024, 64)])
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    last = vae.encoder.layers[-1]
    last.weight /= std[:, None, None, None]
    last.bias.copy_((last.bias - mean) / std)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--tune-minutes", type=float, default=2)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--pictures", type=int, default=12_000)
    parser.add_argument("--lr", type=float, default=3e-3)
    args = parser.parse_args()
    torch.manual_seed(0)
    pool = np.stack([autoencoder_picture(seed) for seed in range(args.pictures)])
    vae = build().to(memory_format=torch.channels_last)
    log = args.run / "autoencoder.csv"
    train(vae, pool, args.minutes, args.batch, args.lr, log, decoder_only=False)
    print("joint", report(vae), flush=True)
    fold_whitening(vae, pool)
    train(vae, pool, args.tune_minutes, args.batch, args.lr / 4, log, decoder_only=True)
    print("tuned", report(vae), flush=True)
    vae.save_pretrained(args.run / "vae")


if __name__ == "__main__":
    main()
