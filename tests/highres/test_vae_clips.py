"""Tiles of an autoencoder of clips (QwenImage) on pictures."""

import pytest
import torch
from diffusers import AutoencoderKLQwenImage
from vae_cases import decoded, pixels, reader

from gensparse.errors import ConfigError
from gensparse.highres import vae_tiles
from gensparse.testing.tiny import with_noise


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    vae = AutoencoderKLQwenImage(
        base_dim=6,
        z_dim=4,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    return with_noise(vae, 0.1).eval()


@torch.no_grad()
def test_pictures_are_clips_of_one_frame(vae):
    picture, z = pixels(32, 48), torch.randn(1, 4, 8, 12)
    assert vae_tiles.takes_clips(vae)
    assert torch.equal(vae_tiles.decoded(vae, z), vae.decode(z[:, :, None]).sample[:, :, 0])
    assert torch.equal(vae_tiles.encoded(vae, picture), vae.encode(picture[:, :, None]).latent_dist.mode()[:, :, 0])


@torch.no_grad()
@pytest.mark.parametrize("tile", [24, 64])
@pytest.mark.parametrize("size", [(96, 136), (8, 200), (60, 44)])
def test_exact_tiles_equal_the_whole(vae, size, tile):
    z = torch.randn(1, 4, size[0] // 4, size[1] // 4, generator=torch.Generator().manual_seed(2))
    expected = vae_tiles.decoded(vae, z)
    assert expected.std() > 0.01
    assert expected.abs().max() <= 1
    assert vae_tiles.supports_exact(vae)
    torch.testing.assert_close(decoded(vae, z, tile=tile), expected, rtol=0, atol=1e-4)
    picture = pixels(*size)
    found = vae_tiles.encode_tiles(vae, reader(picture), size, tile=tile)
    torch.testing.assert_close(found, vae_tiles.encoded(vae, picture), rtol=0, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("mode", ["feather", "synced"])
def test_blended_tiles_are_near_the_whole(vae, mode):
    z = torch.randn(1, 4, 24, 33, generator=torch.Generator().manual_seed(2))
    expected = vae_tiles.decoded(vae, z)
    found = decoded(vae, z, tile=64, mode=mode, overlap=0.5)
    assert (found - expected).abs().mean() < 0.3 * expected.std()
    one = decoded(vae, z, tile=512, mode=mode)
    torch.testing.assert_close(one, expected, rtol=0, atol=1e-4)


def test_unknown_classes_are_named():
    with pytest.raises(ConfigError, match="AutoencoderKLQwenImage"):
        vae_tiles.decoder_layers(torch.nn.Linear(1, 1))
