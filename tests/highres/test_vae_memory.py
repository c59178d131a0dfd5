"""Tiles of autoencoders: bounded memory by an allocation trace of real layer shapes, one tone, no seams."""

import math

import pytest
import torch
import torch.nn.functional as F
from vae_cases import decoded, kl, latents_for, pixels, reader, tiny

from gensparse.errors import ConfigError
from gensparse.highres import vae_tiles
from gensparse.highres.seams import borders, seam_score
from gensparse.highres.stream import streamed_attention
from gensparse.highres.tiling import Tiling, choose_tiling, parse_tiling
from gensparse.testing.live_bytes import LiveBytes, fake_tensors, materialised
from gensparse.testing.vae_peaks import DEVICE, flux_vae, peak

GIB = 1 << 30


# ------------------------------------------------------------------------------------------------------------ the trace
def test_the_trace_finds_the_known_peaks_of_one_piece() -> None:
    """1.5 and 1.25 GiB per megapixel in bf16."""
    assert peak("decode", 1024, 1024, None).peak[DEVICE] / GIB == pytest.approx(1.5, rel=0.02)
    assert peak("encode", 1024, 1024, None).peak[DEVICE] / GIB == pytest.approx(1.25, rel=0.02)


def test_the_trace_counts_views_once_and_forgets_what_is_freed() -> None:
    with LiveBytes() as count:
        a = torch.empty(1000, dtype=torch.float32)
        b, c = a[:500], a.view(10, 100)
        assert count.live["cpu"] == 4000
        del a, b
        assert count.live["cpu"] == 4000
        del c
        assert count.live["cpu"] == 0
        torch.empty(10)
    assert count.peak["cpu"] == 4000


@pytest.mark.parametrize("what", ["decode", "encode"])
def test_blended_tiles_need_the_same_for_any_size(what: str) -> None:
    """A tile of 1024 is a picture of one megapixel, see above: at most 2 GiB; one of 512 is a quarter of that."""
    peaks = [peak(what, 512, width, Tiling("feather", 512)).peak[DEVICE] for width in (896, 2048)]
    assert peaks[0] == peaks[1]
    assert peaks[0] <= 0.4 * GIB


@pytest.mark.parametrize(("mode", "what"), [("exact", "decode"), ("synced", "encode")])
def test_tiles_that_walk_the_layers_stay_small(mode: str, what: str) -> None:
    """Tiles of 320 pixels are a tenth of a megapixel; norms add their blocks. What has to wait is on the CPU."""
    count = peak(what, 512, 576, Tiling(mode, 320))
    assert count.peak[DEVICE] <= (2.0 / 10 + 0.1) * GIB
    assert count.peak["cpu"] > 0.1 * GIB


def test_attention_over_a_whole_map_makes_no_matrix() -> None:
    """The middle of FLUX's decoder at 2048 x 2048: 65,536 tokens of one head."""
    vae, side = flux_vae(), 256
    with fake_tensors(), torch.no_grad():
        materialised(vae, DEVICE)
        layer = next(layer for layer in vae_tiles.decoder_layers(vae) if layer.whole is not None)
        source = vae_tiles.Map((torch.empty(1, 512, side, side, dtype=torch.bfloat16),), torch.device(DEVICE))
        scale, shift = (torch.empty(1, 512, 1, 1, device=DEVICE) for _ in range(2))
        with LiveBytes() as count:
            layer.whole(source, scale, shift)
    assert count.largest[DEVICE] < side**4 / 100
    assert count.peak[DEVICE] < GIB


# ---------------------------------------------------------------------------------------------------------------- equal
@pytest.mark.parametrize(("queries", "keys"), [(64, 64), (7, 11), (1, 1000), (29, 3)])
def test_streamed_attention_is_attention(queries: int, keys: int) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, n, 16, generator=generator) * 3 for n in (29, 37, 37))
    got = streamed_attention(q, k, v, queries=queries, keys=keys)
    torch.testing.assert_close(got, F.scaled_dot_product_attention(q, k, v), rtol=1e-5, atol=1e-5)
    assert streamed_attention(q.half(), k.half(), v.half(), queries=queries, keys=keys).dtype == torch.float16


@torch.no_grad()
def test_exact_tiles_with_attention_at_an_awkward_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention that matters, projected a row at a time; sides that no tile divides."""
    monkeypatch.setattr(vae_tiles, "ATTENTION_TOKENS", 40)
    vae, size = kl((16, 32, 32), 2), (212, 148)
    attention = vae.decoder.mid_block.attentions[0]
    for part in (attention.to_q, attention.to_k, attention.to_out[0]):
        part.weight.mul_(4)
    z, picture = latents_for(vae, *size), pixels(*size)
    whole, whole_z = vae.decode(z).sample, vae_tiles.mode_of(vae.encode(picture))
    torch.testing.assert_close(decoded(vae, z, tile=88), whole, rtol=0, atol=1e-3)
    tiled = vae_tiles.encode_tiles(vae, reader(picture), size, tile=88)
    torch.testing.assert_close(tiled, whole_z, rtol=0, atol=1e-3)
    attention.to_out[0].weight.zero_()
    assert (vae.decode(z).sample - whole).abs().max() > 0.01


def test_attention_of_another_form_is_named() -> None:
    vae = kl((8, 16))
    vae.decoder.mid_block.attentions[0].norm_q = torch.nn.LayerNorm(4)
    with pytest.raises(ConfigError, match=r"norm_q.*feather"):
        vae_tiles.decoder_layers(vae)


# ------------------------------------------------------------------------------------------------------------- one tone
def two_tones(vae, height: int, width: int) -> torch.Tensor:
    """Smooth latents, low on the left and high on the right: tiles see different statistics."""
    scale = vae_tiles.latent_scale(vae)
    h, w = height // scale, width // scale
    y, x = torch.meshgrid(torch.linspace(0, 1, h), torch.linspace(0, 1, w), indexing="ij")
    planes = [torch.tanh(6 * (x - 0.5)) * 2, torch.sin(5 * y + x), torch.cos(4 * x * y), x - y]
    return torch.stack(planes)[None]


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@torch.no_grad()
def test_one_norm_for_all_tiles_brings_them_close_to_the_whole() -> None:
    vae = kl((8, 16, 16), attention=False)
    z = two_tones(vae, 176, 304)
    whole = vae.decode(z).sample
    feather, synced = (decoded(vae, z, tile=96, mode=mode) for mode in ("feather", "synced"))
    assert error(synced, whole) < 0.5 * error(feather, whole)
    picture = whole.clamp(-1, 1)
    size, whole = tuple(picture.shape[-2:]), vae_tiles.mode_of(vae.encode(picture))
    got = [vae_tiles.encode_tiles(vae, reader(picture), size, tile=96, mode=mode) for mode in ("feather", "synced")]
    assert error(got[1], whole) < error(got[0], whole)


@torch.no_grad()
@pytest.mark.parametrize("build", [tiny, kl], ids=["tiny", "kl"])
def test_one_synced_tile_is_the_whole(build) -> None:
    vae, size = build(), (56, 104)
    z, picture = latents_for(vae, *size), pixels(*size)
    torch.testing.assert_close(decoded(vae, z, tile=104, mode="synced"), vae.decode(z).sample, rtol=0, atol=1e-4)
    got = vae_tiles.encode_tiles(vae, reader(picture), size, tile=104, mode="synced")
    torch.testing.assert_close(got, vae_tiles.mode_of(vae.encode(picture)), rtol=0, atol=1e-4)


@torch.no_grad()
def test_synced_tiles_need_a_network_that_is_known() -> None:
    other = torch.nn.Conv2d(4, 3, 1)
    other.config = type("Config", (), {"block_out_channels": (8, 8)})()
    with pytest.raises(ConfigError, match="feather"):
        next(vae_tiles.decode_strips(other, torch.zeros(1, 4, 8, 8), mode="synced"))


# ---------------------------------------------------------------------------------------------------------------- seams
def smooth(height: int, width: int) -> torch.Tensor:
    y, x = torch.meshgrid(torch.linspace(0, 3, height), torch.linspace(0, 4, width), indexing="ij")
    noise = torch.randn(3, height, width, generator=torch.Generator().manual_seed(3)) * 0.004
    return torch.stack([torch.sin(x + y), torch.cos(x * y), torch.sin(2 * x)]) * 0.5 + noise


@pytest.mark.parametrize("step", [0.01, -0.02])
def test_the_seam_score_fails_on_a_planted_seam(step: float) -> None:
    """One or two levels of 255 along one border of a smooth picture."""
    whole = smooth(160, 224)
    rows, columns = [64], [64, 128, 192]
    base = seam_score(whole, rows, columns)
    assert 0.9 < base < 1.1
    spoilt = whole.clone()
    spoilt[:, :, 128:] += step
    assert seam_score(spoilt, rows, columns) > 1.02 * base
    assert seam_score(spoilt, rows, [60, 124, 190]) < 1.02 * base  # not where it is


@pytest.mark.parametrize(("rows", "columns"), [([], []), ([0], []), ([160], []), ([], [224]), ([-1], [5])])
def test_seams_need_lines_inside_the_picture(rows: list[int], columns: list[int]) -> None:
    with pytest.raises(ConfigError):
        seam_score(smooth(160, 224), rows, columns)


@torch.no_grad()
@pytest.mark.parametrize("tiling", ["synced:192", "feather:192", "192"])
@pytest.mark.parametrize("network", ["kl", "tiny"])
def test_tiles_do_not_show(network: str, tiling: str) -> None:
    """Hard cuts between the same tiles do: those without any overlap."""
    vae = kl((8, 16, 16), attention=False) if network == "kl" else tiny()
    z, asked = two_tones(vae, 368, 432), parse_tiling(tiling)
    whole, got = vae.decode(z).sample, decoded(vae, z, **vars(asked))
    lines = [borders(n, asked, vae_tiles.latent_scale(vae)) for n in whole.shape[-2:]]
    assert all(lines)
    assert seam_score(got, *lines) <= 1.02 * seam_score(whole, *lines)
    if asked.mode == "feather" and network == "kl":
        hard = Tiling("feather", 192, 0.0)
        lines = [borders(n, hard, vae_tiles.latent_scale(vae)) for n in whole.shape[-2:]]
        assert seam_score(decoded(vae, z, **vars(hard)), *lines) > 1.02 * seam_score(whole, *lines)


# -------------------------------------------------------------------------------------------------------------- tilings
@pytest.mark.parametrize(
    ("text", "tiling"),
    [
        (None, None),
        ("none", None),
        ("auto", "auto"),
        (512, Tiling("exact", 512)),
        ("512", Tiling("exact", 512)),
        ("feather", Tiling("feather", 1024)),
        ("synced:768", Tiling("synced", 768)),
        ("feather:256:0.5", Tiling("feather", 256, 0.5)),
        ("feather:256:0", Tiling("feather", 256, 0.0)),
    ],
)
def test_tilings_have_a_text_form(text, tiling) -> None:
    assert parse_tiling(text) == tiling
    if isinstance(tiling, Tiling):
        assert parse_tiling(str(tiling)) == tiling


@pytest.mark.parametrize(
    "text", ["", "63", 63, 8193, "feather:8", "exact:512", "feather:512:0.9", "512:0.5", "blur", math.nan]
)
def test_other_tilings_are_refused(text) -> None:
    with pytest.raises(ConfigError, match="tile"):
        parse_tiling(text)


def test_auto_tiles_by_size_and_place() -> None:
    here = {"cpu": False, "in_place": True, "exact": True}
    assert choose_tiling("auto", (1024, 1024), **here) is None
    assert choose_tiling("auto", (1024, 1032), **here) == Tiling("exact", 768)
    assert choose_tiling("auto", (2048, 1024), **{**here, "cpu": True}) == Tiling("exact", 256)
    for lacking in ("in_place", "exact"):
        assert choose_tiling("auto", (2048, 1024), **{**here, lacking: False}) == Tiling("feather", 1024)
    with pytest.raises(ConfigError, match="synced tiles"):
        choose_tiling("synced", (64, 64), **{**here, "in_place": False})
