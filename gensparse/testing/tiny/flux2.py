"""FLUX.2: Mistral 3 as text encoder, position ids of four columns, parallel single blocks."""

from typing import Any

import torch
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2Pipeline, Flux2Transformer2DModel
from transformers import Mistral3Config, Mistral3ForConditionalGeneration

from gensparse.testing.tiny.language import decoder_settings
from gensparse.testing.tiny.parts import WIDTH, byte_tokenizer, normal, seeded, with_noise

# The text embedding joins three layers of the language model.
_LAYERS = (1, 2, 3)

# The pipeline's system message would fill the few tokens of a tiny call, so this template leaves it out.
_CHAT = (
    "{% for message in messages if message.role == 'user' %}"
    "{% for part in message.content if part.type == 'text' %}{{ part.text }}{% endfor %}{% endfor %}"
)


def pipeline(*, seed: int = 0) -> Flux2Pipeline:
    """A FLUX.2 pipeline: 4 pixels per token and axis. Calls need `text_encoder_out_layers` as in `call`."""
    tokenizer = byte_tokenizer(special=("[IMG]",), chat_template=_CHAT)
    config = Mistral3Config(
        text_config={"model_type": "mistral", "sliding_window": None, **decoder_settings(tokenizer)},
        vision_config={
            "model_type": "pixtral",
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 4,
        },
        image_token_index=tokenizer.convert_tokens_to_ids("[IMG]"),
    )
    with seeded(seed):
        text_encoder = Mistral3ForConditionalGeneration(config).eval()
        vae = AutoencoderKLFlux2(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(8, 16),
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=4,
            sample_size=32,
        ).eval()
    return Flux2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        transformer=denoiser(seed=seed),
    )


def denoiser(*, seed: int = 0) -> Flux2Transformer2DModel:
    """A double and a single block, 2 heads of 16, packed latents of 16 channels, guidance embedded."""
    with seeded(seed):
        model = Flux2Transformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=len(_LAYERS) * WIDTH,
            timestep_guidance_channels=32,
            axes_dims_rope=(4, 4, 4, 4),
        )
        return with_noise(model).eval()


def inputs(
    height: int,
    width: int,
    *,
    text: int = 5,
    batch: int = 2,
    seed: int = 0,
    references: tuple[tuple[int, int], ...] = (),
) -> dict[str, Any]:
    """Arguments of the denoiser for a grid of height x width tokens; `references` = sizes of reference pictures."""
    draw = normal(seed)
    grids = ((height, width), *references)
    # columns: picture (target 0, references 10, 20, ...), row, column, place in the text
    pictures = torch.cat([_ids(10 * number, rows, columns, 1) for number, (rows, columns) in enumerate(grids)])
    return {
        "hidden_states": draw(batch, len(pictures), 16),
        "encoder_hidden_states": draw(batch, text, len(_LAYERS) * WIDTH),
        "timestep": torch.full((batch,), 0.5),
        "guidance": torch.full((batch,), 3.0),
        "img_ids": pictures.expand(batch, -1, -1),
        "txt_ids": _ids(0, 1, 1, text).expand(batch, -1, -1),
    }


def _ids(picture: int, height: int, width: int, text: int) -> torch.Tensor:
    axes = (torch.arange(size) for size in (height, width, text))
    return torch.cartesian_prod(torch.tensor([picture]), *axes)


def call() -> dict[str, Any]:
    """Arguments of a cheap call of the pipeline: 8 x 12 tokens, 2 steps."""
    return {
        "prompt": "a cat",
        "height": 32,
        "width": 48,
        "num_inference_steps": 2,
        "guidance_scale": 3.0,
        "max_sequence_length": 16,
        "text_encoder_out_layers": _LAYERS,
        "output_type": "pt",
    }
