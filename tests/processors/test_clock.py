"""Steps of a run counted from timesteps."""

import torch

from gensparse.processors.clock import Clock


def steps(clock: Clock, timesteps: list[float]) -> list[int]:
    return [clock.tick(t) for t in timesteps]


def test_equal_timesteps_share_a_step() -> None:
    assert steps(Clock(), [1.0, 1.0, 0.5, 0.5, 0.25]) == [0, 0, 1, 1, 2]


def test_a_jump_up_starts_a_new_run() -> None:
    assert steps(Clock(), [1.0, 0.5, 0.1, 1.0, 0.5]) == [0, 1, 2, 0, 1]


def test_restart_starts_a_new_run_below_the_last_timestep() -> None:
    clock = Clock()
    assert steps(clock, [1.0, 0.8]) == [0, 1]
    clock.restart()
    assert steps(clock, [0.6, 0.4]) == [0, 1]


def test_tensors_of_any_shape_count_by_their_largest_value() -> None:
    clock = Clock()
    first = [torch.tensor(900), torch.full((2,), 900.0), torch.tensor([[0.0, 900.0], [900.0, 900.0]])]
    assert [clock.tick(t) for t in first] == [0, 0, 0]
    assert clock.tick(torch.tensor([700, 0])) == 1


def test_equal_timesteps_at_different_moments_are_different_steps() -> None:
    clock = Clock()
    # the scheduler's times, and what is left of them in half precision
    calls = [(1000.0, 1000.0), (1000.0, 1000.0), (1000.0, 999.0), (1000.0, 999.0), (996.0, 997.0)]
    assert [clock.tick(timestep, moment) for timestep, moment in calls] == [0, 0, 1, 1, 2]


def test_moments_count_only_where_timesteps_are_equal() -> None:
    clock = Clock()
    # a scheduler that does not tell where it is, and a second run that starts where the first one ended
    assert [clock.tick(timestep, 1000.0) for timestep in (900.0, 800.0, 800.0, 900.0)] == [0, 1, 1, 0]
    clock.restart()
    assert clock.tick(900.0, 500.0) == 0


def test_timesteps_that_were_set_anew_start_a_new_run_below_the_last_one() -> None:
    """A run was interrupted, and the next one changes a picture, so that it starts late."""
    clock, first, second = Clock(), [900, 700, 500, 300], [900, 700, 500, 300]
    assert [clock.tick(t, plan=first) for t in (900, 700)] == [0, 1]
    assert clock.first == 900
    assert [clock.tick(t, plan=second) for t in (500, 500, 300)] == [0, 0, 1]
    assert clock.first == 500
