import pytest
import torch
from diffusers import AutoencoderDC
from vae_cases import decoded, kl, latents_for, pixels, reader, tiny

from gensparse.errors import ConfigError
from gensparse.highres import vae_tiles

VAES = {"tiny": tiny, "kl": kl, "kl-no-attention": lambda: kl((8, 16), 2, attention=False, quant=False)}


@torch.no_grad()
@pytest.mark.parametrize("map_bytes", [1 << 30, 10_000])
@pytest.mark.parametrize(("size", "tile"), [((96, 160), 64), ((104, 72), 40), ((8, 200), 64), ((72, 72), 512)])
@pytest.mark.parametrize("name", VAES)
def test_tiles_equal_the_whole(name, size, tile, map_bytes):
    vae = VAES[name]()
    z, picture = latents_for(vae, *size), pixels(*size)
    expected, expected_z = vae.decode(z).sample, vae_tiles.mode_of(vae.encode(picture))
    assert expected.std() > 0.01
    torch.testing.assert_close(decoded(vae, z, tile=tile, map_bytes=map_bytes), expected, rtol=0, atol=1e-4)
    z = vae_tiles.encode_tiles(vae, reader(picture), size, tile=tile, map_bytes=map_bytes)
    torch.testing.assert_close(z, expected_z, rtol=0, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", ["tiny", "kl"])
def test_tiles_equal_the_whole_at_1024_pixels(name):
    vae = tiny(4, (1, 1, 1, 1)) if name == "tiny" else kl((4, 4, 4, 4), attention=False)
    z, picture = latents_for(vae, 1024, 1024), pixels(1024, 1024)
    torch.testing.assert_close(decoded(vae, z, tile=384), vae.decode(z).sample, rtol=0, atol=1e-3)
    encoded = vae_tiles.encode_tiles(vae, reader(picture), (1024, 1024), tile=384)
    torch.testing.assert_close(encoded, vae_tiles.mode_of(vae.encode(picture)), rtol=0, atol=1e-3)


class Peak:
    """Largest map, in bytes, that any convolution of a network receives or makes."""

    def __init__(self, network: torch.nn.Module) -> None:
        self.bytes = 0
        for module in network.modules():
            if isinstance(module, torch.nn.Conv2d):
                module.register_forward_hook(self.look)

    def look(self, module, inputs, output) -> None:
        self.bytes = max(self.bytes, *(t.numel() * t.element_size() for t in (*inputs, output)))


@torch.no_grad()
@pytest.mark.parametrize(
    ("build", "sides", "tile"),
    [(lambda: tiny(4, (1, 1, 1, 1)), (256, 320), 64), (lambda: kl((4, 8), 1, attention=False), (96, 128), 32)],
    ids=["tiny", "kl"],
)
def test_no_layer_sees_more_than_a_tile_and_its_halo(build, sides, tile):
    """Bounded memory: twice the pixels, the same largest map per layer, with no map stored."""
    peaks = []
    for side in sides:
        vae = build()
        peak = Peak(vae)
        for _ in vae_tiles.decode_strips(vae, latents_for(vae, side, side), tile=tile, map_bytes=1):
            pass
        vae_tiles.encode_tiles(vae, reader(pixels(side, side)), (side, side), tile=tile, map_bytes=1)
        peaks.append(peak.bytes)
    assert peaks[1] == peaks[0]
    assert peaks[0] < 4 * 8 * sides[1] ** 2 / 2


@torch.no_grad()
def test_stored_maps_stay_below_the_limit(monkeypatch):
    vae, sizes = kl((8, 16), 2, attention=False, quant=False), []
    allocate = vae_tiles._allocate

    def counted(state, shape, limit):
        store = allocate(state, shape, limit)
        sizes.append(sum(t.numel() * t.element_size() for t in store or ()))
        return store

    monkeypatch.setattr(vae_tiles, "_allocate", counted)
    z = latents_for(vae, 128, 128)
    result = decoded(vae, z, tile=64, map_bytes=300_000)
    assert 0 < max(sizes) <= 300_000
    assert 0 in sizes
    torch.testing.assert_close(result, vae.decode(z).sample, rtol=0, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", ["tiny", "kl-no-attention"])
def test_bfloat16_stays_close_to_the_whole(name):
    vae = VAES[name]().to(torch.bfloat16)
    z = latents_for(vae, 96, 96).to(torch.bfloat16)
    expected = vae.decode(z).sample.float()
    result = decoded(vae, z, tile=64).float()
    assert (result - expected).norm() / expected.norm() < 0.02


@torch.no_grad()
def test_strips_come_in_order_and_cover_the_picture_once():
    vae = tiny(4, (1, 1, 1, 1))
    rows = [(top, strip.shape) for top, strip in vae_tiles.decode_strips(vae, latents_for(vae, 168, 80), tile=64)]
    assert rows == [(0, (1, 3, 64, 80)), (64, (1, 3, 64, 80)), (128, (1, 3, 40, 80))]


@torch.no_grad()
def test_byte_picture_equals_the_image_processors():
    from diffusers.image_processor import VaeImageProcessor

    vae = tiny(4, (1, 1, 1, 1))
    z = latents_for(vae, 96, 64)
    out = torch.full((96, 64, 3), 77, dtype=torch.uint8)
    vae_tiles.fill_bytes(vae_tiles.decode_strips(vae, z, tile=512), out)
    expected = VaeImageProcessor().postprocess(vae.decode(z).sample, output_type="pil")[0]
    assert bytes(out.numpy()) == expected.tobytes()


@torch.no_grad()
@pytest.mark.parametrize("name", VAES)
def test_feather_mode_blends_near_the_whole(name):
    vae, size = VAES[name](), (96, 136)
    z, picture = latents_for(vae, *size), pixels(*size)
    result = decoded(vae, z, tile=64, mode="feather")
    assert torch.isfinite(result).all()
    encoded = vae_tiles.encode_tiles(vae, reader(picture), size, tile=64, mode="feather")
    assert encoded.shape == vae_tiles.mode_of(vae.encode(picture)).shape
    if name == "tiny":
        assert (result - vae.decode(z).sample).abs().mean() < 0.3 * vae.decode(z).sample.std()


def test_offload_hook_wakes_the_autoencoder():
    vae, woken = tiny(4, (1, 1, 1, 1)), []
    vae._hf_hook = type("Hook", (), {"pre_forward": lambda self, module: woken.append(module)})()
    next(vae_tiles.decode_strips(vae, torch.zeros(1, 4, 4, 4), tile=64))
    assert woken == [vae]


def test_other_autoencoders_are_named_and_the_way_out_is_said():
    other = AutoencoderDC.__new__(AutoencoderDC)
    assert not vae_tiles.supports_exact(other)
    with pytest.raises(ConfigError, match=r"AutoencoderDC.*feather"):
        vae_tiles.decoder_layers(other)


@pytest.mark.parametrize(
    ("shape", "options"),
    [((2, 4, 8, 8), {}), ((4, 8, 8), {}), ((1, 4, 8, 8), {"tile": 0}), ((1, 4, 8, 8), {"mode": "fast"})],
)
def test_wrong_arguments_are_refused(shape, options):
    with pytest.raises(ConfigError):
        next(vae_tiles.decode_strips(tiny(4, (1, 1, 1, 1)), torch.zeros(shape), **options))
