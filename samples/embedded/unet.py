"""Train the UNet of the SDXL kind with its text encoders: `python samples/embedded/unet.py --run DIR --minutes 120`.

The model of noise that StableDiffusionXLPipeline samples: it sees z = (latents + sigma * noise) / sqrt(1 + sigma^2) and
a timestep, and predicts the noise. First come whole pictures of 16 x 16 latent cells, which are cheap, then the native
32 x 32, other aspect ratios and close-ups. The rate stays level until the last `--decay-minutes`, so a run goes on from
its checkpoint when it is given more `--minutes`. It starts from the text encoders that text_meaning.py left in DIR.
"""

import argparse
import math
from pathlib import Path

import numpy as np
import torch
from diffusers import EulerDiscreteScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from meaning import Meaning, error_weights, meaning_loss
from running import Outcome, Run, muon_and_adam
from shards import Batch, Collection
from text import PAIR_WIDTHS, POOLED, CaptionPair, encoder_pair

WIDTHS = (48, 96, 128)
HEADS = (3, 3, 4)  # of 32 channels; the first level has no attention
TIME_WIDTH = 32  # of the embedding of each of the six sizes
NATIVE_CELLS = 32  # latent cells per side
# probability of each kind of batch, before and after the first `--whole-steps`
WHOLE = {"whole": 1.0}
MIXTURE = {"native": 0.72, "whole": 0.1, "close": 0.13, "wide": 0.05}
BATCH = {"whole": 40, "native": 24, "close": 24, "wide": 24}
LOG_SIGMA = {"whole": (0.2, 1.2), "native": (0.3, 1.2), "wide": (0.3, 1.2), "close": (-0.3, 1.1)}
# The background's colour is decided where the noise of a picture's mean is as large as the mean: sigma 3 to 30.
FAR, FAR_SHARE = math.log(3.0), 0.15
# Of the error in the noise: SNR + 1 as for v-prediction, in its units (1 + sigma^2), with an upper bound.
MOST_WEIGHT = 10.0
MEANING_WEIGHT = 0.1
RESIZED = 0.3  # share of whole pictures, and half of the close-ups, that say they are whole pictures of another size
EMA_DECAY = 0.995


def scheduler() -> EulerDiscreteScheduler:
    """SDXL's kind of schedule with more noise at its end (sigma 31, not 15): a picture of so few cells shows its mean
    colour through less."""
    return EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.016, beta_schedule="scaled_linear", timestep_spacing="trailing"
    )


def build_unet() -> UNet2DConditionModel:
    """SDXL's block types on three levels, self-attention on the second and third and in the middle."""
    unet = UNet2DConditionModel(
        sample_size=NATIVE_CELLS,
        in_channels=8,
        out_channels=8,
        block_out_channels=WIDTHS,
        layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=HEADS,  # the config's name for the number of heads
        transformer_layers_per_block=1,
        use_linear_projection=True,
        norm_num_groups=16,
        cross_attention_dim=sum(PAIR_WIDTHS),
        addition_embed_type="text_time",
        addition_time_embed_dim=TIME_WIDTH,
        projection_class_embeddings_input_dim=6 * TIME_WIDTH + POOLED,
    )
    silence_branches(unet)
    return unet


def silence_branches(unet: UNet2DConditionModel) -> None:
    """Start every residual branch, and the output, at zero (ADM, Dhariwal & Nichol 2021)."""
    for name, module in unet.named_modules():
        if name.endswith((".conv2", ".proj_out")) or name == "conv_out":
            torch.nn.init.zeros_(module.weight)
            torch.nn.init.zeros_(module.bias)


class Model(torch.nn.Module):
    """The three trained networks, and the head that reads features of the 16 x 16 level."""

    def __init__(self, captions: CaptionPair, device: str = "cpu") -> None:
        super().__init__()
        self.clip, self.clip_2 = encoder_pair(captions)
        self.unet = build_unet().to(memory_format=torch.channels_last)
        if device == "cpu":  # where the gradient of fused attention is slower
            self.unet.set_attn_processor(AttnProcessor())
        self.meaning = Meaning(WIDTHS[-1])
        self.features: torch.Tensor | None = None
        self.unet.up_blocks[0].register_forward_hook(self._keep)

    def _keep(self, _block, _inputs, output: torch.Tensor) -> None:
        self.features = output

    def encode(self, ids: torch.Tensor, ids_2: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(words [B, 77, 288], pooled [B, POOLED]) as StableDiffusionXLPipeline takes them from its encoders."""
        first = self.clip(ids, output_hidden_states=True)
        second = self.clip_2(ids_2, output_hidden_states=True)
        return torch.cat([first.hidden_states[-2], second.hidden_states[-2]], -1), second.text_embeds

    def forward(self, z, timestep, words, pooled, sizes):
        """(noise [B, 8, h, w], what the head reads) for noisy latents at timesteps [B]; sizes [B, 6] as SDXL has it."""
        noise = self.unet(
            z,
            timestep,
            encoder_hidden_states=words,
            added_cond_kwargs={"text_embeds": pooled, "time_ids": sizes},
            return_dict=False,
        )[0]
        read, self.features = self.meaning(self.features.flatten(2).mT), None
        return noise, read


def unpack(tokens: torch.Tensor, rows: int) -> torch.Tensor:
    """Tokens [B, h * w, 4C] -> latents [B, C, 2h, 2w], channels last: `encode.pack` backwards."""
    batch, count, channels = tokens.shape
    blocks = tokens.view(batch, rows, count // rows, channels // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    latents = blocks.reshape(batch, channels // 4, 2 * rows, 2 * count // rows)
    return latents.contiguous(memory_format=torch.channels_last)


def say_sizes(kind: str, ids: torch.Tensor, count: int, rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """(sizes [count, 6], hidden [count]): original size, crop and target size of each picture in pixels.

    A close-up names the whole picture's size and its own place in it, as windows of larger pictures do when they are
    made. Some whole pictures and close-ups are said to be whole pictures of some larger size, because that is what
    larger pictures are told, with small deep features or with plain ones; `hidden`: close-ups that say so.
    """
    spacing = float((ids[1] - ids[0]).abs().max())
    rows, columns = (len(ids[:, axis].unique()) for axis in (1, 2))
    other = torch.from_numpy(rng.random(count) < {"close": 0.5, "whole": 0.0}.get(kind, RESIZED))
    if kind == "close":
        place = [16 * round(float((at + 0.5) / spacing - 0.5)) for at in ids[0, 1:]]
        side = 256 / spacing
        sizes = torch.tensor([side, side, *place, side, side]).repeat(count, 1)
        sizes[other, 2:4] = 0.0
        return sizes, other
    sizes = torch.tensor([16.0 * rows, 16.0 * columns, 0.0, 0.0, 16.0 * rows, 16.0 * columns]).repeat(count, 1)
    larger = torch.from_numpy(2.0 ** rng.uniform(0, 4, count)).float()
    sizes[other] *= larger[other, None]
    return sizes.round(), torch.zeros(count, dtype=torch.bool)


class Noise:
    """Noise levels of the scheduler's timesteps, and how training draws them."""

    def __init__(self, device: str) -> None:
        kept = scheduler().alphas_cumprod.to(device)
        self.sigmas = ((1 - kept) / kept).sqrt()
        self.logs = self.sigmas.log()

    def draw(self, kind: str, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(timesteps, sigmas) [B]; `hidden`: pictures whose scale must be seen, hence with less noise than picture."""
        mean, std = LOG_SIGMA[kind]
        log = torch.randn_like(hidden, dtype=torch.float32) * std + mean
        chosen, height = torch.rand(2, len(hidden), device=hidden.device)
        log = torch.where(chosen < FAR_SHARE, FAR + height * (self.logs[-1] - FAR), log)
        log = torch.where(hidden, -log.abs(), log)
        timesteps = torch.searchsorted(self.logs, log).clamp(max=len(self.logs) - 1)
        return timesteps, self.sigmas[timesteps]


def outcome(run: Run, batch: Batch, noise_levels: Noise, compute) -> Outcome:
    """One batch: its kind, the loss, and (error of the noise, error of the meaning)."""
    device, rows = batch.latents.device, len(batch.ids[:, 1].unique())
    clean = unpack(batch.latents, rows)
    said = say_sizes(batch.kind, batch.ids, len(clean), run.rng)
    sizes, hidden = (part.to(device, non_blocking=True) for part in said)
    timesteps, sigma = noise_levels.draw(batch.kind, hidden)
    noise, level = torch.randn_like(clean), sigma[:, None, None, None]
    z = (clean + level * noise) / (1 + level**2).sqrt()
    with torch.autocast(device.type, torch.bfloat16):
        words, pooled = run.model.encode(batch.words["first"], batch.words["second"])
        found, read = compute(z, timesteps, words, pooled, sizes)
    error = (found.float() - noise).square().mean(1) * (1 + sigma**2).clamp(max=MOST_WEIGHT)[:, None, None]
    weights = error_weights(batch.labels["shape"]).view(len(clean), rows, -1)
    weights = weights.repeat_interleave(2, 1).repeat_interleave(2, 2)
    meaning = meaning_loss(read, batch.labels)
    loss = (error * weights).mean() + MEANING_WEIGHT * meaning
    return batch.kind, loss, (error.detach().mean(), meaning.detach())


def rate(step: int, minutes_left: float, decay_minutes: float) -> float:
    """Share of the full learning rate: warm-up over 100 steps, level, then linearly to zero at the end."""
    falling = max(0.0, minutes_left / decay_minutes) if decay_minutes else 1.0
    return min(1.0, (step + 1) / 100, falling)


def new_run(args: argparse.Namespace, captions: CaptionPair) -> Run:
    """A run at its first step, with the text encoders of text_meaning.py if there are any."""
    torch.manual_seed(args.seed)
    model = Model(captions, args.device)
    if (args.run / "text.pt").exists():
        for name, state in torch.load(args.run / "text.pt", weights_only=True).items():
            getattr(model, name).load_state_dict(state)
    model.to(args.device)
    return Run(
        model,
        muon_and_adam(model, args.lr, rest=("embedding", "meaning", "conv_in", "conv_out")),
        (2 * args.lr, args.lr),
        args.run / "unet.pt",
        seed=args.seed,
        ema_decay=EMA_DECAY,
    )


def train(run: Run, args: argparse.Namespace) -> None:
    """Until the budget is spent."""
    pictures, levels = Collection(args.latents, BATCH, run.rng, args.device), Noise(args.device)
    compute = torch.compile(run.model, dynamic=False) if args.compile else run.model

    def one() -> Outcome:
        run.set_rate(rate(run.step, args.minutes - run.spent / 60, args.decay_minutes))
        source = pictures.pick(WHOLE if run.step < args.whole_steps else MIXTURE, look=run.step % 50 == 0)
        batch = source.batch(args.batch_factor * BATCH[source.kind])
        # wide pictures come in several shapes and seldom: not worth compiling
        return outcome(run, batch, levels, run.model if source.kind == "wide" else compute)

    run.train(one, args.minutes, args.run / "unet.csv", args.save_minutes, args.steps)


def read_options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="folder of the checkpoint and the curve")
    parser.add_argument("--latents", type=Path, help="folder of encoded pictures; DIR/latents without")
    parser.add_argument("--minutes", type=float, default=120, help="time budget over all restarts")
    parser.add_argument("--steps", type=int, help="end after so many steps, all restarts together")
    parser.add_argument("--whole-steps", type=int, default=800, help="first steps, with small whole pictures only")
    parser.add_argument("--decay-minutes", type=float, default=0, help="last minutes, in which the rate falls to zero")
    parser.add_argument("--lr", type=float, default=1e-3, help="of AdamW; Muon takes twice as much")
    parser.add_argument("--save-minutes", type=float, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch-factor", type=int, default=1, help="larger batches, for GPUs")
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args(arguments)
    args.latents = args.latents or args.run / "latents"
    return args


def main(arguments: list[str] | None = None) -> None:
    args = read_options(arguments)
    run = new_run(args, CaptionPair())
    run.load()
    train(run, args)


if __name__ == "__main__":
    main()
