"""Small autoencoders with random weights, and what goes in and out of them."""

import torch
from diffusers import AutoencoderKL, AutoencoderTiny

from gensparse.highres import vae_tiles
from gensparse.testing.tiny import with_noise


def tiny(channels: int = 8, blocks: tuple[int, ...] = (3, 2, 1, 1)) -> AutoencoderTiny:
    torch.manual_seed(0)
    vae = AutoencoderTiny(
        encoder_block_out_channels=(channels,) * 4,
        decoder_block_out_channels=(channels,) * 4,
        num_encoder_blocks=blocks[::-1],
        num_decoder_blocks=blocks,
    )
    return with_noise(vae, 0.03).eval()


def kl(channels=(8, 16, 16), layers: int = 1, attention: bool = True, quant: bool = True) -> AutoencoderKL:
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=channels,
        layers_per_block=layers,
        latent_channels=4,
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        mid_block_add_attention=attention,
        use_quant_conv=quant,
        use_post_quant_conv=quant,
    )
    return with_noise(vae, 0.05).eval()


def pixels(height: int, width: int) -> torch.Tensor:
    return torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


def reader(picture: torch.Tensor):
    return lambda rows, cols: picture[..., slice(*rows), slice(*cols)]


def latents_for(vae, height: int, width: int) -> torch.Tensor:
    scale = vae_tiles.latent_scale(vae)
    return torch.randn(1, 4, height // scale, width // scale, generator=torch.Generator().manual_seed(2))


def decoded(vae, z, **options) -> torch.Tensor:
    scale = vae_tiles.latent_scale(vae)
    out = torch.full((1, 3, z.shape[-2] * scale, z.shape[-1] * scale), float("nan"), dtype=z.dtype)
    return vae_tiles.fill(vae_tiles.decode_strips(vae, z, **options), out)
