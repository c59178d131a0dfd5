"""Inversion gives the noise from which sampling draws the picture: exact rules in float64, and real schedulers."""

import math

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from gensparse.errors import ConfigError
from gensparse.subjects.inversion import inverted, sampled, seen, unseen

SIGMAS = (7.3, 3.1, 1.7, 0.8, 0.31, 0.07, 0.0)
SHAPE = (2, 3, 5, 7)


def draw(seed: int) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def linear(x: torch.Tensor, k: int) -> torch.Tensor:
    """The noise that is best guessed where pictures are Gaussian with variance 4."""
    return x * SIGMAS[k] / (4 + SIGMAS[k] ** 2)


def test_what_was_inverted_is_sampled_back() -> None:
    picture = draw(0)
    path = inverted(picture, SIGMAS, linear, rounds=60)
    assert len(path) == len(SIGMAS)
    back = sampled(path[0], SIGMAS, linear)
    for up, down in zip(path, back, strict=True):
        torch.testing.assert_close(up, down, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(path[0], picture, atol=1.0)


def test_rounds_come_nearer() -> None:
    picture = draw(1)
    errors = []
    for rounds in (0, 1, 2, 4):
        start = inverted(picture, SIGMAS, linear, rounds=rounds)[0]
        errors.append(float((sampled(start, SIGMAS, linear)[-1] - picture).abs().max()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.3 * errors[0]


def test_a_slope_that_depends_on_the_level_alone_needs_no_rounds() -> None:
    slopes = [draw(k) for k in range(len(SIGMAS) - 1)]
    path = inverted(draw(9), SIGMAS, lambda x, k: slopes[k])
    torch.testing.assert_close(sampled(path[0], SIGMAS, lambda x, k: slopes[k])[-1], draw(9), rtol=1e-12, atol=1e-12)


def test_it_is_the_reverse_of_ddim() -> None:
    scheduler = DDIMScheduler(clip_sample=False, set_alpha_to_one=False)
    scheduler.set_timesteps(6)
    abar = scheduler.alphas_cumprod.double()
    levels = [float(abar[int(t)]) for t in scheduler.timesteps] + [float(scheduler.final_alpha_cumprod)]
    sigmas = [math.sqrt((1 - a) / a) for a in levels]

    def slope(x: torch.Tensor, k: int) -> torch.Tensor:
        return torch.tanh(0.3 * seen(x, sigmas[k]))

    path = inverted(unseen(draw(2), sigmas[-1]), sigmas, slope, rounds=80)
    z = seen(path[0], sigmas[0])
    for t in scheduler.timesteps:
        z = scheduler.step(torch.tanh(0.3 * z), t, z).prev_sample
    torch.testing.assert_close(z, draw(2), rtol=1e-4, atol=1e-4)  # the scheduler's levels are float32


def test_it_is_the_reverse_of_flow_matching() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(7)
    sigmas = scheduler.sigmas.double().tolist()
    start = inverted(draw(3), sigmas, lambda z, k: torch.sin(z), rounds=60)[0]
    z = start
    for t in scheduler.timesteps:
        z = scheduler.step(torch.sin(z), t, z, return_dict=False)[0]
    torch.testing.assert_close(z, draw(3), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sigmas", [(1.0,), (0.5, 1.0, 0.0), (math.inf, 1.0), (1.0, -0.1)])
def test_levels_that_rise_are_refused(sigmas: tuple[float, ...]) -> None:
    for walk in (sampled, inverted):
        with pytest.raises(ConfigError, match="never rise"):
            walk(draw(0), sigmas, linear)


@pytest.mark.parametrize("rounds", [-1, 1.5, True])
def test_rounds_are_counted(rounds: object) -> None:
    with pytest.raises(ConfigError, match="rounds"):
        inverted(draw(0), SIGMAS, linear, rounds=rounds)
