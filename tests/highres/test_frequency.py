import numpy as np
import pytest
import pywt
import torch

from gensparse.highres.frequency import (
    butterworth,
    db4_matrices,
    fft_low_pass,
    guide_estimate,
    guided_velocity,
    haar_low_pass,
    imax_velocity,
    low_pass,
    swap_low_band,
)

SIZES = [(16, 16), (24, 18), (7, 13), (2, 2), (1, 5), (9, 8)]


def picture(height: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", ["fft", "dwt"])
def test_low_pass_of_a_constant_is_the_constant(kind, size):
    constant = torch.full((1, 4, *size), 3.25)
    torch.testing.assert_close(low_pass(constant, kind), constant, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("size", SIZES)
def test_haar_is_idempotent(size):
    once = haar_low_pass(picture(*size))
    torch.testing.assert_close(haar_low_pass(once), once, rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", SIZES)
def test_fft_low_pass_works_on_each_channel_alone(size):
    x = picture(*size)
    together = fft_low_pass(x, 0.3)
    assert together.shape == x.shape
    for b in range(2):
        for c in range(3):
            full = torch.fft.ifft2(torch.fft.fft2(x[b, c]) * butterworth(*size, 0.3)).real
            torch.testing.assert_close(together[b, c], full, rtol=0, atol=1e-5)


def test_butterworth_keeps_low_and_drops_high():
    mask = butterworth(64, 64, 0.2)
    assert mask[0, 0] == 1
    assert mask[32, 32] < 1e-4
    assert mask[0, 6] > 0.5 > mask[0, 7]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_input_gives_float32(dtype):
    x = picture(16, 12).to(dtype)
    assert low_pass(x).dtype == low_pass(x, "dwt").dtype == torch.float32
    torch.testing.assert_close(low_pass(x), low_pass(x.float()))


@pytest.mark.parametrize("size", [(16, 16), (15, 9), (8, 31), (7, 7), (5, 3), (2, 64)])
def test_db4_equals_pywavelets(size):
    x, guide = picture(*size, seed=1), picture(*size, seed=2)
    low, bands = pywt.dwt2(x.numpy(), "db4", mode="symmetric")
    swapped = pywt.idwt2((pywt.dwt2(guide.numpy(), "db4", mode="symmetric")[0], bands), "db4", mode="symmetric")
    rows, cols = db4_matrices(size[0])[0], db4_matrices(size[1])[0]
    np.testing.assert_allclose((rows @ x @ cols.T).numpy(), low, atol=2e-5)
    np.testing.assert_allclose(swap_low_band(x, guide).numpy(), swapped[..., : size[0], : size[1]], atol=2e-5)


def test_swapping_with_itself_changes_nothing():
    x = picture(12, 20)
    assert torch.equal(swap_low_band(x, x), x)


def test_full_direction_guidance_takes_the_references_low_frequencies():
    x0, reference = picture(16, 16, 1), picture(16, 16, 2)
    torch.testing.assert_close(haar_low_pass(guide_estimate(x0, reference, 1.0, "dwt")), haar_low_pass(reference))
    assert torch.equal(guide_estimate(x0, reference, 0.0), x0)


def test_without_weights_the_velocity_is_the_models():
    z, v, reference = (picture(8, 8, s) for s in range(3))
    guided, _ = guided_velocity(z, v, reference, 0.6, 0.0, 0.0, (z, z))
    torch.testing.assert_close(guided, v, rtol=1e-4, atol=1e-5)


def test_acceleration_follows_the_references_change():
    z, v, reference = (picture(8, 8, s) for s in range(3))
    _, v_ref = guided_velocity(z, v, reference, 0.6, 0.0, 0.0)
    before, before_ref = picture(8, 8, 4), picture(8, 8, 5)
    guided, _ = guided_velocity(z, v, reference, 0.6, 0.0, 1.0, (before, before_ref))
    torch.testing.assert_close(guided, before + v_ref - before_ref)


def test_imax_constant_replaces_the_low_band():
    v, z, guide = (picture(8, 8, s) for s in range(3))
    corrected = imax_velocity(v, z, guide, 700.0, 0.3, "constant")
    towards = (z - guide) / (0.7 + 1e-6)
    torch.testing.assert_close(haar_low_pass(corrected), haar_low_pass(towards), rtol=1e-4, atol=1e-5)
