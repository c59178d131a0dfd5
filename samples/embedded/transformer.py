"""Train the transformer and its text encoders: `python samples/embedded/transformer.py --run DIR --minutes 80`.

Rectified flow as FluxPipeline samples it: x_s = (1 - s) * latents + s * noise, the network gets s and predicts
noise - latents. Stages (as shares of the time budget) go from whole pictures of 64 tokens, which are cheap and teach
what words mean, to the native size, other aspect ratios and close-ups. The learning rate stays up, then falls to zero
with the wall clock. A checkpoint every few minutes holds everything; starting again continues from it.
"""

import argparse
import csv
import signal
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import FluxTransformer2DModel
from muon import Muon
from text import Captions, clip_encoder, t5_encoder

from gensparse.embedded.render import signed_distance
from gensparse.embedded.scenes import COLOURS, FILLS, SHAPES, Scene, caption, random_scene

# share of the time budget after which a mixture holds -> probability of each kind of batch
STAGES: tuple[tuple[float, dict[str, float]], ...] = (
    (0.0, {"whole": 1.0}),
    (0.4, {"native": 0.5, "wide": 0.05, "close": 0.1, "whole": 0.35}),
    (0.7, {"native": 0.6, "wide": 0.1, "close": 0.2, "whole": 0.1}),
)
NATIVE_TOKENS = 16  # per scene unit
BATCH = {"whole": 64, "native": 32, "wide": 32, "close": 32}
SIGMA = {"whole": (0.2, 1.1), "native": (0.3, 1.1), "wide": (0.3, 1.1), "close": (-0.3, 1.0)}
EMA_DECAY = 0.99
SUBJECT_WEIGHT = 4.0  # of a token that shows part of a subject, against 1 for background: shapes are what is hard
# A head on the features of this block says what each token shows: shape, colour, fill and the edge on 4 x 4 points.
# Guiding inner features by what a picture means speeds diffusion training up (REPA, Yu et al., 2025); the scenes are
# drawn by program, so the meaning is known exactly. The head is not part of the exported model.
MEANING_BLOCK, MEANING_WEIGHT = 2, 0.1
CLASSES = {"shape": SHAPES, "colour": COLOURS, "fill": FILLS}
EDGE_POINTS = 4


class Model(torch.nn.Module):
    """The three trained networks."""

    def __init__(self, captions: Captions) -> None:
        super().__init__()
        self.clip = clip_encoder(captions.clip)
        self.t5 = t5_encoder(captions.t5)
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
        text_ids = torch.zeros(words.shape[1], 3)
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


class Pictures:
    """Shards of one kind; new ones are picked up while training."""

    def __init__(self, folder: Path, kind: str, rng: np.random.Generator) -> None:
        self.folder, self.kind, self.rng = folder, kind, rng
        self.shards: list[dict] = []
        self.seen: set[str] = set()

    def refresh(self) -> int:
        """Load shards that have appeared; returns how many there are."""
        for path in sorted(self.folder.glob(f"{self.kind}-[0-9][0-9][0-9].npz")):
            if path.name not in self.seen:
                with np.load(path) as data:
                    shard = {name: data[name] for name in data.files}
                shard["scenes"] = [random_scene(int(s), float(shard["aspect"])) for s in shard["seeds"]]
                shard |= describe(shard)
                self.shards.append(shard)
                self.seen.add(path.name)
        return len(self.shards)

    def batch(self, count: int) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor], list[str]]:
        """(latents [B, N, 32], ids [N, 3], labels, captions); pictures of a batch share their position ids."""
        shard = self.shards[self.rng.integers(len(self.shards))]
        groups, total = len(shard["ids"]), len(shard["seeds"])
        group = int(self.rng.integers(groups))
        size = total // groups
        picks = group * size + self.rng.choice(size, min(count, size), replace=False)
        latents = torch.from_numpy(shard["latents"][picks]).float()
        ids = torch.zeros(latents.shape[1], 3)
        ids[:, 1:] = torch.from_numpy(shard["ids"][group])
        labels = {name: torch.from_numpy(shard[name][picks]) for name in (*CLASSES, "edge", "weights")}
        return latents, ids, labels, [caption(shard["scenes"][i], int(self.rng.integers(1 << 31))) for i in picks]


def describe(shard: dict) -> dict[str, np.ndarray]:
    """What each token of each picture shows: `shape`, `colour`, `fill` [N, tokens] (0 = background), `edge` [N, tokens,
    16], and loss `weights` of mean 1 per picture, larger where a subject is."""
    size = len(shard["seeds"]) // len(shard["ids"])
    rows = [_describe(scene, shard["ids"][i // size]) for i, scene in enumerate(shard["scenes"])]
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def _describe(scene: Scene, ids: np.ndarray) -> dict[str, np.ndarray]:
    side = float(np.abs(ids[1] - ids[0]).max()) / NATIVE_TOKENS  # of a token
    centres = (ids + 0.5) / NATIVE_TOKENS
    steps = ((np.arange(EDGE_POINTS) + 0.5) / EDGE_POINTS - 0.5) * side
    points = centres[:, None, None] + np.stack(np.meshgrid(steps, steps, indexing="ij"), -1)
    edge = np.full((len(ids), EDGE_POINTS**2), 2.0, np.float32)
    row = {name: np.zeros(len(ids), np.int64) for name in CLASSES}
    for subject in scene.subjects:
        distance = signed_distance(subject, scene.extent, points[..., 0], points[..., 1]).reshape(len(ids), -1) / side
        nearest = distance.mean(-1) < edge.mean(-1)
        edge[nearest] = distance[nearest]
        centre = (subject.y * scene.extent[0], subject.x * scene.extent[1])
        shown = np.abs(centres - centre).max(-1) < subject.radius * 1.05 + side / 2
        for name, names in CLASSES.items():
            row[name][shown] = names.index(getattr(subject, name)) + 1
    weights = np.where(row["shape"] > 0, SUBJECT_WEIGHT, 1.0)
    return {
        **row,
        "edge": edge.clip(-2, 2).astype(np.float16),
        "weights": (weights / weights.mean()).astype(np.float32),
    }


def losses(
    captions: Captions, pictures: Pictures, compute: torch.nn.Module
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(total, plain error of the velocity, error of the meaning) on one batch, noise levels logit-normal."""
    latents, ids, labels, words = pictures.batch(BATCH[pictures.kind])
    clip_ids, t5_ids = captions(words)
    mean, std = SIGMA[pictures.kind]
    sigma = torch.sigmoid(torch.randn(len(latents)) * std + mean)
    noise = torch.randn_like(latents)
    level = sigma[:, None, None]
    with torch.autocast("cpu", torch.bfloat16):
        velocity, read = compute((1 - level) * latents + level * noise, sigma, ids, clip_ids, t5_ids)
    error = (velocity.float() - (noise - latents)).square().mean(-1)
    meaning = meaning_loss(read, labels)
    return (error * labels["weights"]).mean() + MEANING_WEIGHT * meaning, error.detach().mean(), meaning.detach()


def meaning_loss(read: tuple[torch.Tensor, ...], labels: dict[str, torch.Tensor]) -> torch.Tensor:
    """Cross entropies of the classes and squared error of the edge distances, weighted like the velocity."""
    *classes, edge = (part.float() for part in read)
    terms = (edge - labels["edge"].float()).square().mean(-1)
    for name, logits in zip(CLASSES, classes, strict=True):
        terms = terms + torch.nn.functional.cross_entropy(logits.mT, labels[name], reduction="none")
    return (terms * labels["weights"]).mean()


class Run:
    """Everything a checkpoint holds, and the clock."""

    def __init__(self, args: argparse.Namespace) -> None:
        torch.manual_seed(args.seed)
        self.captions = Captions()
        self.model = Model(self.captions)
        self.ema = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        self.optimizers = optimizers(self.model, args.lr)
        self.rng = np.random.default_rng(args.seed)
        self.step, self.spent, self.stopped = 0, 0.0, False
        self.args, self.path = args, args.run / "checkpoint.pt"

    def stop(self, *_: object) -> None:
        """Finish the step in hand, save and end."""
        self.stopped = True

    def save(self) -> None:
        """Write the checkpoint beside the old one, then replace it."""
        state = {
            "model": self.model.state_dict(),
            "ema": self.ema,
            "optimizers": [o.state_dict() for o in self.optimizers],
            "rng": self.rng.bit_generator.state,
            "torch_rng": torch.get_rng_state(),
            "step": self.step,
            "spent": self.spent,
        }
        partial = self.path.with_suffix(".part")
        torch.save(state, partial)
        partial.rename(self.path)

    def load(self) -> None:
        """Continue from the checkpoint, if there is one."""
        if not self.path.exists():
            return
        state = torch.load(self.path, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.ema = state["ema"]
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.rng.bit_generator.state = state["rng"]
        torch.set_rng_state(state["torch_rng"])
        self.step, self.spent = state["step"], state["spent"]

    def start_from(self, folder: Path) -> None:
        """Take the weights of a finished pipeline folder; optimizers and clock start anew."""
        parts = {"flux": "transformer", "clip": "text_encoder", "t5": "text_encoder_2"}
        for name, part in parts.items():
            module = getattr(self.model, name)
            trained = type(module).from_pretrained(folder / part, torch_dtype=torch.float32)
            module.load_state_dict(trained.state_dict())
        self.ema = {name: p.detach().clone() for name, p in self.model.named_parameters()}

    @property
    def progress(self) -> float:
        """Share of the time budget spent."""
        return self.spent / (60 * self.args.minutes)

    def set_rate(self) -> None:
        """Warm-up over 100 steps, level until `--decay-from` of the budget, then linearly to zero."""
        factor = min(1, (self.step + 1) / 100, max(0.0, (1 - self.progress) / (1 - self.args.decay_from)))
        for optimizer, scale in zip(self.optimizers, (2.0, 1.0), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = self.args.lr * scale * factor

    @torch.no_grad()
    def average(self) -> None:
        """Exponential moving average of the weights, with a warm-up."""
        decay = min(EMA_DECAY, (1 + self.step) / (10 + self.step))
        parameters = [p.detach() for p in self.model.parameters()]
        torch._foreach_lerp_(list(self.ema.values()), parameters, 1 - decay)


def mixture(progress: float) -> dict[str, float]:
    """The kinds of batches at this point of the budget."""
    return [kinds for start, kinds in STAGES if start <= progress][-1]


def train(run: Run) -> None:
    """Until the budget is spent."""
    pictures = {kind: Pictures(run.args.run / "latents", kind, run.rng) for kind in BATCH}
    compute = torch.compile(run.model, dynamic=False) if run.args.compile else run.model
    last_save, ready = time.time(), set()
    with (run.args.run / "transformer.csv").open("a", newline="") as handle:
        writer = csv.writer(handle)
        while run.progress < 1 and not run.stopped:
            start = time.time()
            if run.step % 50 == 0 or not ready:
                ready = {kind for kind, source in pictures.items() if source.refresh()}
            kinds = {
                kind: weight
                for kind, weight in mixture(max(run.progress, run.args.stage_from)).items()
                if kind in ready
            }
            kind = str(run.rng.choice(list(kinds), p=np.array(list(kinds.values())) / sum(kinds.values())))
            run.set_rate()
            # wide pictures come in several shapes and seldom: not worth compiling
            loss, plain, meaning = losses(run.captions, pictures[kind], run.model if kind == "wide" else compute)
            run.model.zero_grad(set_to_none=True)
            loss.backward()
            for optimizer in run.optimizers:
                optimizer.step()
            run.average()
            run.step += 1
            run.spent += time.time() - start
            writer.writerow(
                [run.step, round(run.spent, 1), kind, *(round(x.item(), 5) for x in (plain, meaning, loss))]
            )
            if run.step % 20 == 0:
                handle.flush()
            if time.time() - last_save > 60 * run.args.save_minutes:
                run.save()
                last_save = time.time()
    run.save()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=80, help="time budget over all restarts")
    parser.add_argument("--lr", type=float, default=1e-3, help="of AdamW; Muon takes twice as much")
    parser.add_argument(
        "--decay-from", type=float, default=0.5, help="share of the budget at which the rate starts to fall"
    )
    parser.add_argument("--stage-from", type=float, default=0, help="skip the stages before this share of the budget")
    parser.add_argument("--save-minutes", type=float, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--init", type=Path, help="pipeline folder whose weights a new run starts from")
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    run = Run(args)
    if args.init and not run.path.exists():
        run.start_from(args.init)
    run.load()
    signal.signal(signal.SIGTERM, run.stop)
    train(run)


if __name__ == "__main__":
    main()
