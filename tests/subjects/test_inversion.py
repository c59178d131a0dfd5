"""Inversion gives the noise from which sampling draws the picture: exact rules in float64, and real schedulers."""

import math

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from gensparse.errors import ConfigError
from gensparse.subjects.inversion import inverted, inverted_by_solver, sampled, seen, solved, unseen

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


# --------------------------------------------------------------------------------------------------------- DPM-Solver++
def eps(x: torch.Tensor, sigma: float) -> torch.Tensor:
    """The noise in x = picture + sigma * noise where pictures are normal around 0.7: known exactly."""
    return sigma * (x - 0.7) / (0.3**2 + sigma**2)


def exact(x: torch.Tensor, sigma: float, sigma_next: float) -> torch.Tensor:
    """Where the solution through x at sigma is at another level."""
    return 0.7 + (x - 0.7) * ((0.3**2 + sigma_next**2) / (0.3**2 + sigma**2)) ** 0.5


def levels_of(steps: int) -> list[float]:
    high, low = 14.0 ** (1 / 7), 0.03 ** (1 / 7)
    return [(high + (low - high) * k / (steps - 1)) ** 7 for k in range(steps)] + [0.0]


@pytest.mark.parametrize("steps", [3, 7, 20])
def test_the_solver_is_that_of_diffusers(steps: int) -> None:
    from diffusers import DPMSolverMultistepScheduler

    scheduler = DPMSolverMultistepScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    scheduler.set_timesteps(steps)
    sigmas = scheduler.sigmas.tolist()
    x = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0)) * sigmas[0]
    own = solved(x, sigmas, lambda x, k: eps(x, sigmas[k]))
    z = seen(x, sigmas[0])
    for k, t in enumerate(scheduler.timesteps):
        z = scheduler.step(eps(unseen(z, sigmas[k]), sigmas[k]), t, z, return_dict=False)[0]
        torch.testing.assert_close(z, seen(own[k + 1], sigmas[k + 1]), rtol=0, atol=2e-4)


def test_the_solver_is_of_second_order_both_ways() -> None:
    """Twice as many steps, a quarter of the error; first order would leave half of it."""
    x = torch.linspace(-1.0, 2.0, 9, dtype=torch.float64)
    down, up = [], []
    for steps in (20, 40, 80):
        # evenly in log sigma, without the step to 0, which is of first order
        sigmas = [14.0 * (0.05 / 14.0) ** (k / steps) for k in range(steps + 1)]

        def slope(x: torch.Tensor, k: int, sigmas: list[float] = sigmas) -> torch.Tensor:
            return eps(x, sigmas[k])

        start = 0.7 + 14.0 * x
        down.append(float((solved(start, sigmas, slope)[-1] - exact(start, 14.0, 0.05)).abs().max()))
        path = inverted_by_solver(x, sigmas, slope)
        assert len(path) == steps + 1
        assert torch.equal(path[-1], x)
        up.append(float((path[0] - exact(x, 0.05, 14.0)).abs().max() / 14.0))
    assert down[0] / down[1] > 3
    assert down[1] / down[2] > 3
    assert up[0] / up[1] > 1.9  # its first step is plain
    first = inverted(x, levels_of(20), lambda x, k: eps(x, levels_of(20)[k]))[0]
    second = inverted_by_solver(x, levels_of(20), lambda x, k: eps(x, levels_of(20)[k]))[0]
    aim = exact(x, 0.0, 14.0)
    assert (second - aim).abs().max() < (first - aim).abs().max()


def test_what_the_solver_inverts_it_draws_again() -> None:
    x, errors = torch.linspace(-1.0, 2.0, 9, dtype=torch.float64), []
    for steps in (10, 40):
        sigmas = levels_of(steps)
        path = inverted_by_solver(x, sigmas, lambda x, k, sigmas=sigmas: eps(x, sigmas[k]))
        back = solved(path[0], sigmas, lambda x, k, sigmas=sigmas: eps(x, sigmas[k]))
        errors.append(float((back[-1] - x).abs().max()))
    assert errors[1] < errors[0] / 2
    assert errors[1] < 0.05


def test_levels_that_the_solver_cannot_walk_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"sigmas\[-2\]"):
        inverted_by_solver(torch.zeros(1), [1.0, 0.0, 0.0], lambda x, k: x)
    with pytest.raises(ConfigError, match="never rise"):
        solved(torch.zeros(1), [1.0, 2.0], lambda x, k: x)
    assert len(inverted_by_solver(torch.zeros(1), [1.0, 0.0], lambda x, k: x + 1)) == 2
    equal = solved(torch.ones(1), [2.0, 1.0, 1.0, 0.5], lambda x, k: x)  # a level twice changes nothing
    torch.testing.assert_close(equal[1], equal[2])
    assert torch.isfinite(equal[3]).all()
