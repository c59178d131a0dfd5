"""Write a pipeline folder: `python samples/embedded/export.py --run DIR --out gensparse/embedded/model`.

With `--model unet` the UNet: `--out gensparse/embedded/unet_model`. `--grid FILE` makes sixteen pictures.
"""

import argparse
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformer
import unet
from diffusers import (
    AutoencoderTiny,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    StableDiffusionXLPipeline,
)
from PIL import Image
from text import PAIR_LENGTH, T5_LENGTH, CaptionPair, Captions

NOTES = {
    "native_size": 256,
    "max_sequence_length": T5_LENGTH,
    "position_ids": "centre-aligned scene units: token i at spacing s lies at (i + 0.5) * s - 0.5; 1 at native size",
    "zooms": [0.5, 1, 2, 4, 8, 16],
    "num_inference_steps": 20,
    "true_cfg_scale": 3.5,
    # what the cascade uses unless told otherwise: only the last octave is redone at every size, from sigma 0.22 on
    "attention": "clear:radius=8",
    "dense_below_tokens": 1024,
    "cascade": {
        "share": [0.15],
        "guidance_factor": [1.0],
        "alpha": [1.0],
        "beta": [0.25],
        "sharpen": 0.0,
        "border": 6,
    },
}
UNET_NOTES = {
    "native_size": 256,
    "max_sequence_length": PAIR_LENGTH,
    "num_inference_steps": 25,
    "guidance_scale": 5.0,
    # as for FLUX: low frequencies stay those of the smaller picture, and little noise is put on it
    "cascade": {"share": [0.25], "alpha": [1.0], "beta": [0.25], "sharpen": 0.0},
}
PROMPTS = (
    "a red circle left of a blue star on a green striped background",
    "a yellow heart on a purple background",
    "a teal checkered square above an orange ring on a white plain background",
    "a large pink flower in the center on a black dotted background",
    "a white moon right of a brown cross on a blue wavy background",
    "a green triangle left of a red diamond and above a yellow star on a gray background",
    "a purple striped circle below a teal plain triangle on a yellow checkered background",
    "a small black star in the top left corner and a red heart in the bottom right corner on a white background",
    "a blue dotted ring on an orange background",
    "a brown square right of a pink moon on a teal striped background",
    "an orange flower above a blue diamond and left of a green cross on a white wavy background",
    "a gray heart left of a purple heart on a pink plain background",
    "a red striped square on a white background",
    "a black diamond below a white ring on a red dotted background",
    "a yellow checkered star in the center on a blue background",
    "a green cross",
)


def flux_pipeline(run: Path, weights: str = "ema") -> FluxPipeline:
    """The averaged (`ema`) or latest (`model`) weights of the run as a pipeline, float32."""
    captions = Captions()
    model = transformer.Model(captions)
    model.load_state_dict(_weights(run / "checkpoint.pt", weights), strict=False)
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.25, max_shift=0.5, base_image_seq_len=64, max_image_seq_len=256
        ),
        vae=AutoencoderTiny.from_pretrained(run / "vae"),
        text_encoder=model.clip.eval(),
        tokenizer=captions.clip,
        text_encoder_2=model.t5.eval(),
        tokenizer_2=captions.t5,
        transformer=model.flux.eval(),
    )


def unet_pipeline(run: Path, weights: str = "ema") -> StableDiffusionXLPipeline:
    """As `flux_pipeline`, of a run of unet.py."""
    captions = CaptionPair()
    model = unet.Model(captions)
    model.load_state_dict(_weights(run / "unet.pt", weights), strict=False)
    return sdxl_pipeline(model, captions, AutoencoderTiny.from_pretrained(run / "vae"))


def sdxl_pipeline(model: unet.Model, captions: CaptionPair, vae: AutoencoderTiny) -> StableDiffusionXLPipeline:
    """The networks of a training as a pipeline; an empty prompt is encoded, as it was in training."""
    return StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=model.clip.eval(),
        text_encoder_2=model.clip_2.eval(),
        tokenizer=captions.first,
        tokenizer_2=captions.second,
        unet=model.unet.eval(),
        scheduler=unet.scheduler(),
        force_zeros_for_empty_prompt=False,
        add_watermarker=False,
    )


def _weights(checkpoint: Path, name: str) -> dict[str, torch.Tensor]:
    return torch.load(checkpoint, weights_only=True, mmap=True)[name]


@dataclass(frozen=True)
class Kind:
    """How a model is put together, what its folder says to programs and people, and arguments of its calls."""

    pipeline: Callable[[Path, str], DiffusionPipeline]
    notes: dict[str, Any]
    guidance: str
    call: dict[str, Any]
    card: Path | None = None

    def arguments(self, steps: int | None, guidance: float | None) -> dict[str, Any]:
        """Arguments of a call; the notes' own numbers where none are given."""
        scale = self.notes[self.guidance] if guidance is None else guidance
        return {"num_inference_steps": steps or self.notes["num_inference_steps"], self.guidance: scale, **self.call}


KINDS = {
    "flux": Kind(flux_pipeline, NOTES, "true_cfg_scale", {"max_sequence_length": T5_LENGTH}),
    "unet": Kind(unet_pipeline, UNET_NOTES, "guidance_scale", {}, Path(__file__).with_name("unet_card.md")),
}


def picture_grid(
    pipe: DiffusionPipeline, arguments: dict[str, Any], height: int = 256, width: int = 256
) -> Image.Image:
    """The fixed prompts, four by four."""
    pictures = pipe(
        list(PROMPTS),
        negative_prompt=[""] * len(PROMPTS),
        height=height,
        width=width,
        generator=torch.Generator().manual_seed(0),
        **arguments,
    ).images
    grid = Image.new("RGB", (4 * width, 4 * height))
    for i, picture in enumerate(pictures):
        grid.paste(picture, (i % 4 * width, i // 4 * height))
    return grid


def write(pipe: DiffusionPipeline, folder: Path, notes: dict[str, Any] = NOTES, card: Path | None = None) -> None:
    """Save in half precision, with the facts no config class holds, and without names of local folders."""
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.to(torch.float16)
    pipe.save_pretrained(folder)
    (folder / "gensparse.json").write_text(json.dumps(notes, indent=2) + "\n")
    if card is not None:
        shutil.copyfile(card, folder / "README.md")
    for config in folder.glob("*/*config.json"):
        facts = json.loads(config.read_text())
        for name in ("_name_or_path", "is_local", "local_files_only"):
            facts.pop(name, None)
        config.write_text(json.dumps(facts, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--model", choices=KINDS, default="flux")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--grid", type=Path)
    parser.add_argument("--weights", choices=("ema", "model"), default="ema")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--guidance", type=float)
    args = parser.parse_args()
    kind = KINDS[args.model]
    if args.out:
        # a pipeline that has run keeps padding settings in its tokenizers, so a fresh one is written
        write(kind.pipeline(args.run, args.weights), args.out, kind.notes, kind.card)
    if args.grid:
        pipe = kind.pipeline(args.run, args.weights)
        pipe.set_progress_bar_config(disable=True)
        with torch.autocast("cpu", torch.bfloat16):
            picture_grid(pipe, kind.arguments(args.steps, args.guidance)).save(args.grid)


if __name__ == "__main__":
    main()
