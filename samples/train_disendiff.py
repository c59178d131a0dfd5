"""Learn two or more subjects from one picture, apart from each other, as DisenDiff does (arXiv 2403.18551).

python samples/train_disendiff.py --model sd-1.5 --image pets.png --concepts "cat" "dog" --output pets
python samples/train_disendiff.py --tiny                          # random weights and picture, seconds on a laptop

Trained are keys and values of cross-attention (as a LoRA, or wholly with --rank 0 as published) and a new word before
each class word: "<new1> cat and <new2> dog". The loss of diffusion comes with two on attention maps: the new word's map
binds to its class word's, and class words stay apart. What comes out is for diffusers' own loaders:

    pipe.load_lora_weights("pets", weight_name="lora.safetensors")
    pipe.load_textual_inversion("pets/new1.safetensors")              # and so on, one file per new word
"""

import argparse
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, DiffusionPipeline
from PIL import Image
from safetensors.torch import save_file

import gensparse
from gensparse.methods import DisenDiff
from gensparse.subjects.calibration import calibration_loss
from gensparse.testing.tiny import tiny_pipeline

STARTS = (42170, 47629, 43514)  # rows of CLIP's table that new words begin as, the last word's first


def add_words(pipe, count: int, classes: list[str]) -> tuple[list[str], torch.nn.Parameter, int]:
    """New words of the tokenizer with rows of the embedding; the table, and its first new row."""
    words = [f"<new{number + 1}>" for number in range(count)]
    pipe.tokenizer.add_tokens(words)
    first = len(pipe.tokenizer) - count
    pipe.text_encoder.resize_token_embeddings(len(pipe.tokenizer))
    table = pipe.text_encoder.get_input_embeddings().weight
    for number, name in enumerate(classes):
        place = count - 1 - number
        row = STARTS[place] if place < len(STARTS) and STARTS[place] < first else None
        own = pipe.tokenizer(name, add_special_tokens=False).input_ids[0]
        table.data[first + number] = table.data[own if row is None else row]
    return words, table, first


def trained(unet, rank: int) -> list[torch.nn.Parameter]:
    """Keys and values of cross-attention: a LoRA beside them, or themselves with rank 0."""
    unet.requires_grad_(False)
    if rank:
        from peft import LoraConfig

        unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=r".*attn2\.to_[kv]"))
    else:
        for name, weight in unet.named_parameters():
            weight.requires_grad_(".attn2.to_k." in name or ".attn2.to_v." in name)
    return [weight for weight in unet.parameters() if weight.requires_grad]


def pictures(paths: Iterable[Path], size: int) -> list[torch.Tensor]:
    """Pictures, cut square, [1, 3, size, size] in -1..1."""
    found = []
    for path in paths:
        picture = Image.open(path).convert("RGB")
        side = min(picture.size)
        left, top = (picture.width - side) // 2, (picture.height - side) // 2
        picture = picture.crop((left, top, left + side, top + side)).resize((size, size))
        values = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).reshape(size, size, 3)
        found.append(values.permute(2, 0, 1)[None] / 127.5 - 1)
    return found


def main(options: argparse.Namespace) -> None:
    torch.manual_seed(options.seed)
    if options.tiny:
        pipe, size, own = tiny_pipeline("sd15"), 32, [torch.rand(1, 3, 32, 32) * 2 - 1]
        regular, mask = [torch.rand(1, 3, 32, 32) * 2 - 1], None
    else:
        pipe, size = DiffusionPipeline.from_pretrained(options.model), options.size
        own = pictures([options.image], size)
        regular = pictures(sorted(options.regular.iterdir()) if options.regular else [], size)
        mask = None
        if options.mask is not None:
            grey = Image.open(options.mask).convert("L").resize((size // 8, size // 8))
            mask = torch.frombuffer(bytearray(grey.tobytes()), dtype=torch.uint8).reshape(grey.height, grey.width) > 127
    pipe.to(options.device)
    noise_plan = DDPMScheduler.from_config(pipe.scheduler.config)
    words, table, first = add_words(pipe, len(options.concepts), options.concepts)
    caption = " and ".join(f"{word} {name}" for word, name in zip(words, options.concepts, strict=True))
    pipe.vae.requires_grad_(False)
    pipe.text_encoder.requires_grad_(False)
    table.requires_grad_(True)
    weights = trained(pipe.unet, options.rank)
    optimizer = torch.optim.AdamW(weights, lr=options.lr, weight_decay=1e-2)
    optimizer.add_param_group({"params": [table], "weight_decay": 0.0})
    handle = gensparse.apply(pipe.unet, DisenDiff())

    def loss_of(picture: torch.Tensor, prompt: str, inside: torch.Tensor | None) -> tuple[torch.Tensor, list[int]]:
        """Loss of diffusion for a picture, and the tokens of its prompt."""
        with torch.no_grad():
            latents = pipe.vae.encode(picture.to(options.device)).latent_dist.sample() * pipe.vae.config.scaling_factor
        noise = torch.randn_like(latents)
        time = torch.randint(0, noise_plan.config.num_train_timesteps, (1,), device=latents.device)
        ids = pipe.tokenizer(
            prompt,
            padding="max_length",
            truncation=True,
            max_length=pipe.tokenizer.model_max_length,
            return_tensors="pt",
        ).input_ids.to(options.device)
        text = pipe.text_encoder(ids)[0]
        error = F.mse_loss(
            pipe.unet(noise_plan.add_noise(latents, noise, time), time, text).sample, noise, reduction="none"
        )
        loss = error.mean() if inside is None else (error * inside).sum() / inside.expand_as(error).sum().clamp(min=1)
        return loss, ids[0].tolist()

    for step in range(options.steps):
        for _ in range(options.accumulate):
            inside = None if mask is None else mask.float().to(options.device)
            loss, tokens = loss_of(own[0], f"a photo of {caption}", inside)
            places = [tokens.index(first + number) for number in range(len(words))]
            bind, separate = calibration_loss(handle.maps()[:, 0], [(place, place + 1) for place in places])
            total = loss + options.alpha * (bind + separate)
            if regular:
                prompt = f"a photo of {options.concepts[step % len(options.concepts)]}"
                total = total + loss_of(regular[step % len(regular)], prompt, None)[0]
            (total / options.accumulate).backward()
        assert table.grad is not None
        table.grad[:first] = 0  # words that were there before
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step + 1}: diffusion {loss:.4f}, binding {bind:.4f}, separation {separate:.4f}", flush=True)

    handle.remove()
    options.output.mkdir(parents=True, exist_ok=True)
    if options.rank:
        from peft import get_peft_model_state_dict

        state = {f"unet.{name}": weight for name, weight in get_peft_model_state_dict(pipe.unet).items()}
        save_file(
            {name: weight.contiguous().cpu() for name, weight in state.items()}, options.output / "lora.safetensors"
        )
    else:  # copy them in by pipe.unet.load_state_dict(load_file(...), strict=False)
        state = {name: weight for name, weight in pipe.unet.named_parameters() if weight.requires_grad}
        save_file(
            {name: weight.data.contiguous().cpu() for name, weight in state.items()},
            options.output / "keys.safetensors",
        )
    for number, word in enumerate(words):  # pipe.load_textual_inversion("pets/new1.safetensors")
        row = table.data[first + number].clone()[None].cpu()
        save_file({word: row}, options.output / f"{word.strip('<>')}.safetensors")
    print(*sorted(path.name for path in options.output.glob("*.safetensors")))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="random weights, no download")
    parser.add_argument("--model", default="stable-diffusion-v1-5/stable-diffusion-v1-5")
    parser.add_argument("--image", type=Path, help="the picture with all subjects")
    parser.add_argument("--mask", type=Path, help="where they are, white; the whole picture counts without it")
    parser.add_argument(
        "--regular", type=Path, help="folder of pictures of the classes, so that they are not forgotten"
    )
    parser.add_argument("--concepts", nargs="+", default=["cat", "dog"], help="class words, two or more")
    parser.add_argument("--output", type=Path, default=Path("disendiff"))
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--accumulate", type=int, default=4, help="passes per step")
    parser.add_argument("--lr", type=float, default=1e-5)
    parser.add_argument("--alpha", type=float, default=0.01, help="weight of the losses on attention maps")
    parser.add_argument("--rank", type=int, default=16, help="of the LoRA; 0 trains keys and values themselves")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    if chosen.tiny:
        chosen.steps, chosen.accumulate, chosen.device = min(chosen.steps, 2), 1, "cpu"
    elif chosen.image is None:
        parser.error("--image is missing")
    main(chosen)
