"""Wan 2.1, image to video: cross-attention to an image through keys and values of its own, next to the text's."""

from typing import Any

from diffusers import FlowMatchEulerDiscreteScheduler, WanImageToVideoPipeline, WanTransformer3DModel
from PIL import Image
from torch.nn.functional import pad
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel

from gensparse.testing.tiny import wan
from gensparse.testing.tiny.parts import WIDTH, normal, seeded

TEXT = 512
"""Text tokens: the attention takes the last 512 keys as text, those before them as the image."""

CHANNELS = 2 * wan.LATENTS + 4
"""Channels of the denoiser's input: the latents, a mask of 4 frames, the condition's latents."""


def pipeline(*, seed: int = 0) -> WanImageToVideoPipeline:
    """A Wan image-to-video pipeline with an image encoder of 5 tokens."""
    # the processor on Pillow, since the default one needs torchvision
    processor = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    return WanImageToVideoPipeline(
        **wan.shared_parts(seed=seed),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        image_processor=processor,
        image_encoder=_image_encoder(seed),
        transformer=denoiser(seed=seed),
    )


def denoiser(*, seed: int = 0, **more: Any) -> WanTransformer3DModel:
    """Wan's denoiser with a second pair of key and value projections in its cross-attention, in eval mode.

    Args:
        more: further or other arguments of `WanTransformer3DModel`.
    """
    inner = wan.SIZES["num_attention_heads"] * wan.SIZES["attention_head_dim"]
    image = {"image_dim": WIDTH, "added_kv_proj_dim": inner, "in_channels": CHANNELS}
    return wan.denoiser(seed=seed, **{**image, **more})


def inputs(frames: int, height: int, width: int, *, text: int = 5, batch: int = 2, seed: int = 0) -> dict[str, Any]:
    """Arguments of the denoiser for a grid of frames x height x width tokens and an image of 5 tokens.

    Args:
        text: text tokens that are not padding; there are 512 in all.
    """
    arguments = wan.inputs(frames, height, width, text=text, batch=batch, seed=seed, channels=CHANNELS)
    arguments["encoder_hidden_states"] = pad(arguments["encoder_hidden_states"], (0, 0, 0, TEXT - text))
    return {**arguments, "encoder_hidden_states_image": normal(seed + 1)(batch, 5, WIDTH)}


def call() -> dict[str, Any]:
    """Arguments of a cheap call of the pipeline: 3 x 4 x 5 tokens, 2 steps."""
    size = wan.video()
    image = Image.linear_gradient("L").convert("RGB").resize((size["width"], size["height"]))
    return {"image": image, **wan.text_embeds(TEXT), **size}


def _image_encoder(seed: int) -> CLIPVisionModel:
    config = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=37,
        num_attention_heads=4,
        num_hidden_layers=2,
        projection_dim=WIDTH,
        image_size=16,
        patch_size=8,
    )
    with seeded(seed):
        return CLIPVisionModel(config).eval()
