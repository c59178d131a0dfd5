import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from gensparse.highres.shift import flow_sigmas, shift_mu


@pytest.mark.parametrize("tokens", [64, 256, 1000, 4096, 16384, 65536])
def test_capped_never_exceeds_the_schedulers_own_limit(tokens):
    mu = shift_mu(tokens, max_shift=0.9)
    assert mu <= 0.9 * (1 + 1e-9)
    assert mu == shift_mu(tokens, max_shift=0.9, capped=False) or tokens > 4096


def test_all_numbers_are_the_schedulers():
    mu = shift_mu(256, base_tokens=64, max_tokens=256, base_shift=0.3, max_shift=0.8)
    assert mu == pytest.approx(0.8, abs=1e-12)
    assert shift_mu(4096, base_tokens=64, max_tokens=256, base_shift=0.3, max_shift=0.8) == 0.8


@pytest.mark.parametrize("mu", [0.5, 1.15])
def test_list_equals_the_diffusers_scheduler(mu):
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / 20, 20).tolist(), mu=mu)
    torch.testing.assert_close(flow_sigmas(20, mu=mu), scheduler.sigmas, rtol=1e-6, atol=0)


def test_without_a_shift_the_list_is_linear():
    torch.testing.assert_close(flow_sigmas(4), torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0]))


def test_stock_line_collapses_at_4096_and_the_cap_does_not():
    stock, capped = (flow_sigmas(28, mu=shift_mu(65536, capped=c)) for c in (False, True))
    assert stock[-2] > 0.999
    assert capped[-2] < 0.11
