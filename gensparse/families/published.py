"""Configs of published denoisers, so that models known by name can be planned and checked without a file."""

from collections.abc import Mapping
from typing import Any

_SDXL: Mapping[str, Any] = {
    "_class_name": "UNet2DConditionModel",
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": (5, 10, 20),  # the config's name for the number of heads
    "transformer_layers_per_block": (1, 2, 10),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}

# as samples/embedded/unet.py trains it
_EMBEDDED_UNET = {
    **_SDXL,
    "sample_size": 32,
    "in_channels": 8,
    "out_channels": 8,
    "block_out_channels": (48, 96, 128),
    "attention_head_dim": (3, 3, 4),
    "transformer_layers_per_block": 1,
    "norm_num_groups": 16,
    "cross_attention_dim": 288,
    "addition_time_embed_dim": 32,
    "projection_class_embeddings_input_dim": 320,
}

_SD3: Mapping[str, Any] = {
    "_class_name": "SD3Transformer2DModel",
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 24,
    "num_attention_heads": 24,
    "attention_head_dim": 64,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 192,
}

_SD35_LARGE = {
    **_SD3,
    "num_layers": 38,
    "num_attention_heads": 38,
    "caption_projection_dim": 2432,
    "qk_norm": "rms_norm",
}

PUBLISHED: dict[str, Mapping[str, Any]] = {
    "sdxl": _SDXL,
    "embedded-unet": _EMBEDDED_UNET,
    "sdxl-turbo": {**_SDXL, "sample_size": 64},
    "sd1.5": {
        "_class_name": "UNet2DConditionModel",
        "sample_size": 64,
        "block_out_channels": (320, 640, 1280, 1280),
        "layers_per_block": 2,
        "attention_head_dim": 8,
        "cross_attention_dim": 768,
    },
    "sd3-medium": _SD3,
    "sd3.5-medium": {
        **_SD3,
        "dual_attention_layers": tuple(range(13)),
        "pos_embed_max_size": 384,
        "qk_norm": "rms_norm",
    },
    "sd3.5-large": _SD35_LARGE,
    "qwen-image": {
        "_class_name": "QwenImageTransformer2DModel",
        "patch_size": 2,
        "in_channels": 64,
        "out_channels": 16,
        "num_layers": 60,
        "num_attention_heads": 24,
        "attention_head_dim": 128,
        "joint_attention_dim": 3584,
        "axes_dims_rope": (16, 56, 56),
    },
}
"""Alias -> config of its denoiser."""

SCHEDULERS: dict[str, Mapping[str, Any]] = {"qwen-image": {"max_image_seq_len": 8192}}
"""Alias -> what its scheduler's config says about the size of training."""

VAES: dict[str, Mapping[str, Any]] = {
    "embedded-unet": {
        "_class_name": "AutoencoderTiny",
        "decoder_block_out_channels": (32, 32, 32, 32),
        "num_decoder_blocks": (4, 3, 2, 1),
    },
    "qwen-image": {"_class_name": "AutoencoderKLQwenImage", "base_dim": 96, "dim_mult": (1, 2, 4, 4)},
}
"""Alias -> config of its autoencoder, where it is not the usual AutoencoderKL of widths 128 to 512."""
