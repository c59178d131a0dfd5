"""Train the transformer and its text encoders: `python samples/embedded/transformer.py --run DIR --minutes 80`.

Rectified flow as FluxPipeline samples it: x_s = (1 - s) * latents + s * noise, the network gets s and predicts
noise - latents. Stages (as shares of the time budget) go from whole pictures of 64 tokens, which are cheap and teach
what words mean, to the native size, other aspect ratios and close-ups. The learning rate stays up, then falls to zero
with the wall clock. A checkpoint every few minutes holds everything; starting again continues from it.
"""

import argparse
from pathlib import Path

import torch
from diffusers import FluxTransformer2DModel
from meaning import Meaning, error_weights, meaning_loss
from muon import Muon
from running import Outcome, Run
from shards import Batch, Collection
from text import Captions, clip_encoder, t5_encoder

from gensparse.embedded.scenes import caption, random_scene

# share of the time budget after which a mixture holds -> probability of each kind of batch
STAGES: tuple[tuple[float, dict[str, float]], ...] = (
    (0.0, {"whole": 1.0}),
    (0.4, {"native": 0.5, "wide": 0.05, "close": 0.1, "whole": 0.35}),
    (0.7, {"native": 0.6, "wide": 0.1, "close": 0.2, "whole": 0.1}),
)
BATCH = {"whole": 64, "native": 32, "wide": 32, "close": 32}
SIGMA = {"whole": (0.2, 1.1), "native": (0.3, 1.1), "wide": (0.3, 1.1), "close": (-0.3, 1.0)}
EMA_DECAY = 0.99
MEANING_BLOCK, MEANING_WEIGHT = 2, 0.1  # whose features the head reads


class Model(torch.nn.Module):
    """The three trained networks."""

    def __init__(self, captions: Captions) -> None:
        super().__init__()
        self.clip = clip_encoder(captions.clip)
        self.t5 = t5_encoder(captions.t5)
        for encoder in (self.clip, self.t5):  # at these sizes the gradient of fused attention is slower
            encoder.set_attn_implementation("eager")
        self.flux = FluxTransformer2DModel(
            patch_size=1,
            in_channels=32,
            num_layers=2,
            num_single_layers=6,
            attention_head_dim=64,
            num_attention_heads=3,
            joint_attention_dim=192,
            pooled_projection_dim=96,
            guidance_embeds=False,
            axes_dims_rope=(8, 28, 28),
        )
        zero_modulation(self.flux)
        self.meaning = Meaning(192)
        self.features: torch.Tensor | None = None
        self.flux.single_transformer_blocks[MEANING_BLOCK].register_forward_hook(self._keep)

    def _keep(self, _block, _inputs, outputs) -> None:
        self.features = outputs[1]

    def forward(self, tokens, sigma, ids, clip_ids, t5_ids):
        """(velocity [B, N, 32], what the head reads) for noisy tokens at noise level `sigma` [B]; `ids` [N, 3]."""
        pooled = self.clip(clip_ids).pooler_output
        words = self.t5(t5_ids)[0]
        text_ids = ids.new_zeros(words.shape[1], 3)
        velocity = self.flux(
            hidden_states=tokens,
            timestep=sigma,
            pooled_projections=pooled,
            encoder_hidden_states=words,
            img_ids=ids,
            txt_ids=text_ids,
            return_dict=False,
        )[0]
        read, self.features = self.meaning(self.features), None
        return velocity, read


@torch.no_grad()
def read_through(layer: torch.nn.Linear, old: torch.Tensor, new: torch.Tensor) -> None:
    """Make a layer that reads features `old` [N, C] read `new` ones, by the affine map between them that fits best."""
    more = torch.cat([new, torch.ones_like(new[:, :1])], 1)
    fit = torch.linalg.lstsq(more, old).solution
    layer.bias += layer.weight @ fit[-1]
    layer.weight.copy_(layer.weight @ fit[:-1].T)


def zero_modulation(flux: FluxTransformer2DModel) -> None:
    """Start every block as the identity and the output at zero (DiT, Peebles & Xie 2023)."""
    for name, module in flux.named_modules():
        if name.endswith((".linear",)) or name == "proj_out":
            torch.nn.init.zeros_(module.weight)
            torch.nn.init.zeros_(module.bias)


def optimizers(model: Model, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside blocks and text layers, AdamW for the rest."""
    inner, outer = [], []
    for name, parameter in model.named_parameters():
        hidden = ("transformer_blocks" in name or "layers" in name or ".block." in name) and ".linear." not in name
        table = "relative_attention_bias" in name
        (inner if hidden and parameter.ndim == 2 and not table else outer).append(parameter)
    return [
        Muon(inner, lr=2 * lr, weight_decay=0.01),
        torch.optim.AdamW(outer, lr=lr, betas=(0.9, 0.98), weight_decay=0.0, foreach=True),
    ]


def losses(batch: Batch, compute: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(total, plain error of the velocity, error of the meaning) on one batch, noise levels logit-normal."""
    latents, (mean, std) = batch.latents, SIGMA[batch.kind]
    sigma = torch.sigmoid(torch.randn(len(latents), device=latents.device) * std + mean)
    noise = torch.randn_like(latents)
    level = sigma[:, None, None]
    with torch.autocast(latents.device.type, torch.bfloat16):
        ids = batch.ids.to(latents.device, non_blocking=True)
        words = (batch.words["clip"], batch.words["t5"])
        velocity, read = compute((1 - level) * latents + level * noise, sigma, ids, *words)
    error = (velocity.float() - (noise - latents)).square().mean(-1)
    meaning = meaning_loss(read, batch.labels)
    total = (error * error_weights(batch.labels["shape"])).mean() + MEANING_WEIGHT * meaning
    return total, error.detach().mean(), meaning.detach()


class FluxRun(Run):
    """A run whose rate and mixture follow the share of the time budget that is spent."""

    def __init__(self, args: argparse.Namespace) -> None:
        torch.manual_seed(args.seed)
        self.args = args
        model = Model(Captions()).to(args.device)
        rates = (2 * args.lr, args.lr)
        path = args.run / "checkpoint.pt"
        super().__init__(model, optimizers(model, args.lr), rates, path, seed=args.seed, ema_decay=EMA_DECAY)

    def start_from(self, folder: Path) -> None:
        """Take the weights of a finished pipeline folder; optimizers and clock start anew."""
        parts = {"flux": "transformer", "clip": "text_encoder", "t5": "text_encoder_2"}
        for name, part in parts.items():
            module = getattr(self.model, name)
            trained = type(module).from_pretrained(folder / part, torch_dtype=torch.float32)
            module.load_state_dict(trained.state_dict())

    def take_text(self) -> None:
        """The text encoders of text_meaning.py, if there are any.

        A trained transformer goes on reading what it knows: its first layers for text get the linear maps from the new
        features to the old ones that fit best, and training has to find only what is new in them.
        """
        if (self.args.run / "text.pt").exists():
            before = self.features()
            for name, state in torch.load(self.args.run / "text.pt", weights_only=True).items():
                getattr(self.model, name).load_state_dict(state)
            if self.args.init:
                flux = self.model.flux
                layers = (flux.context_embedder, flux.time_text_embed.text_embedder.linear_1)
                for layer, old, new in zip(layers, before, self.features(), strict=True):
                    read_through(layer, old, new)
        self.restart_average()

    @torch.no_grad()
    def features(self, count: int = 4000) -> tuple[torch.Tensor, torch.Tensor]:
        """(words [N, 192], pooled [count, 96]) of random captions."""
        texts = [caption(random_scene(seed), seed) for seed in range(count)]
        clip_ids, t5_ids = (ids.to(self.args.device) for ids in Captions()(texts))
        words = torch.cat([self.model.t5(part)[0] for part in t5_ids.split(500)])
        pooled = torch.cat([self.model.clip(part).pooler_output for part in clip_ids.split(500)])
        return words.flatten(0, 1), pooled

    @property
    def progress(self) -> float:
        """Share of the time budget spent."""
        return self.spent / (60 * self.args.minutes)

    @property
    def height(self) -> float:
        """Share of the full rate: warm-up over 100 steps, level until `--decay-from`, then linearly to zero."""
        return min(1, (self.step + 1) / 100, max(0.0, (1 - self.progress) / (1 - self.args.decay_from)))


def new_run(args: argparse.Namespace) -> FluxRun:
    """A run at its first step: weights of `--init`, then text encoders of text_meaning.py, where there are any."""
    run = FluxRun(args)
    if args.init:
        run.start_from(args.init)
    run.take_text()
    return run


def mixture(progress: float) -> dict[str, float]:
    """The kinds of batches at this point of the budget."""
    return [kinds for start, kinds in STAGES if start <= progress][-1]


def train(run: FluxRun) -> None:
    """Until the budget is spent."""
    args = run.args
    pictures = Collection(args.run / "latents", BATCH, run.rng, args.device)
    compute = torch.compile(run.model, dynamic=False) if args.compile else run.model

    def one() -> Outcome:
        source = pictures.pick(mixture(max(run.progress, args.stage_from)), look=run.step % 50 == 0)
        run.set_rate(run.height)
        batch = source.batch(args.batch_factor * BATCH[source.kind])
        # wide pictures come seldom: not worth compiling
        loss, *numbers = losses(batch, run.model if source.kind == "wide" else compute)
        return source.kind, loss, numbers

    run.train(one, args.minutes, args.run / "transformer.csv", args.save_minutes, args.steps)


def read_options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=80, help="time budget over all restarts")
    parser.add_argument("--lr", type=float, default=1e-3, help="of AdamW; Muon takes twice as much")
    parser.add_argument(
        "--decay-from", type=float, default=0.5, help="share of the budget at which the rate starts to fall"
    )
    parser.add_argument("--stage-from", type=float, default=0, help="skip the stages before this share of the budget")
    parser.add_argument("--steps", type=int, help="end after so many steps, all restarts together")
    parser.add_argument("--save-minutes", type=float, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--init", type=Path, help="pipeline folder whose weights a new run starts from")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch-factor", type=int, default=1, help="larger batches, for GPUs")
    parser.add_argument("--compile", action="store_true")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    args = read_options(arguments)
    run = new_run(args)
    run.load()
    train(run)


if __name__ == "__main__":
    main()
