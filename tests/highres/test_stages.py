import math
from itertools import pairwise

import pytest
import torch

from gensparse.errors import ConfigError
from gensparse.highres.stage_store import FolderStageStore
from gensparse.highres.stages import (
    CascadeSettings,
    Stage,
    StageResult,
    native_shape,
    plan_stages,
    round_size,
    stage_sizes,
    steps_within,
)


def test_hiflow_defaults_for_flux_at_4096():
    stages = plan_stages(4096, 4096, (1024, 1024))
    assert [(s.height, s.width, s.steps) for s in stages] == [(1024, 1024, 30), (2048, 2048, 16), (4096, 4096, 10)]
    assert [(s.alpha, s.beta, s.ratio) for s in stages[1:]] == [(1.0, 0.25, 0.2), (0.5, 0.5, 0.2)]
    assert [round(3.5 * s.guidance_factor, 6) for s in stages] == [3.5, 4.5, 6.0]


@pytest.mark.parametrize("native", [256, 512, 1024])
@pytest.mark.parametrize(
    "size", [(4096, 4096), (2160, 3840), (4096, 3072), (2048, 6144), (8192, 8192), (1040, 1008), (16, 4096), (4096, 16)]
)
def test_cascade_grows_by_about_two_to_the_exact_target(size, native):
    sizes = stage_sizes(*size, (native, native))
    assert sizes[-1] == size
    assert all(side % 16 == 0 and side >= 16 for pair in sizes for side in pair)
    areas = [h * w for h, w in sizes]
    assert areas == sorted(set(areas))
    assert all(b / a < 2.45**2 for a, b in pairwise(areas))
    if min(size) > 256:
        assert all(abs(math.log(w / h) - math.log(size[1] / size[0])) < 0.06 for h, w in sizes)


def test_target_of_native_area_is_one_stage():
    assert stage_sizes(1024, 1024, (1024, 1024)) == [(1024, 1024)]
    assert stage_sizes(256, 1024, (512, 512)) == [(256, 1024)]
    assert stage_sizes(64, 64, (1024, 1024)) == [(64, 64)]


def test_larger_factor_needs_fewer_stages():
    assert stage_sizes(4096, 4096, (256, 256), factor=4.0) == [(256, 256), (1024, 1024), (4096, 4096)]
    with pytest.raises(ConfigError, match="above 1"):
        stage_sizes(4096, 4096, (256, 256), factor=1.0)


def test_native_shape_prefers_the_right_aspect_ratio():
    assert native_shape(4096, 3072, (256, 256)) == (320, 240)
    assert native_shape(3072, 4096, (256, 256)) == (240, 320)
    assert native_shape(512, 512, (256, 256), multiple=4) == (256, 256)


def test_settings_spread_their_last_entry_over_all_later_stages():
    settings = CascadeSettings(share=(0.5, 0.25), alpha=(1.0,), patch_shift=False)
    stages = plan_stages(4096, 4096, (256, 256), steps=20, settings=settings)
    assert [s.steps for s in stages] == [20, 10, 5, 5, 5]
    assert {s.alpha for s in stages[1:]} == {1.0}
    assert not any(s.patch_shift for s in stages)


def test_few_steps_keep_at_least_one_per_stage():
    assert [s.steps for s in plan_stages(4096, 4096, (1024, 1024), steps=1)] == [1, 1, 1]


@pytest.mark.parametrize("size", [(4095, 4096), (4096, 4090), (0, 16), (-16, 16)])
def test_size_off_the_grid_is_refused_with_the_nearest(size):
    with pytest.raises(ConfigError, match="multiples of 16"):
        plan_stages(*size, (1024, 1024))


@pytest.mark.parametrize(
    "wrong",
    [{"height": 0}, {"width": True}, {"steps": -1}, {"steps": 2.5}, {"alpha": 1.5}, {"beta": -0.1}, {"ratio": 0.0},
     {"low_pass": "db4"}],
)  # fmt: skip
def test_stage_refuses(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Stage(**{"height": 64, "width": 64, "steps": 4, **wrong})


def test_round_size_rounds_half_up_and_never_to_zero():
    assert [round_size(n, 16) for n in (1, 8, 24, 40, 100.0)] == [16, 16, 32, 48, 96]


def test_steps_within_strength():
    sigmas = (1.0, 0.75, 0.5, 0.25, 0.0)
    assert [steps_within(sigmas, s) for s in (0.0, 0.25, 0.3, 0.5, 0.99, 1.0)] == [0, 1, 1, 2, 3, 4]
    with pytest.raises(ConfigError, match="strength"):
        steps_within(sigmas, 1.2)


def result(history=(2, 3)) -> StageResult:
    latents = torch.randn(2, 6, 16, dtype=torch.bfloat16)
    x0 = {step: torch.randn(2, 4, 4, 6) for step in history}
    return StageResult(1, 32, 48, (1.0, 0.1 + 0.2, 1 / 3, 0.05, 0.0), latents, x0)


def test_result_serves_only_its_own_stage():
    done, stage = result(), Stage(32, 48, 2)
    assert done.serves(stage, done.sigmas, range(2, 4))
    assert not done.serves(stage, done.sigmas, range(1, 4))
    assert not done.serves(Stage(48, 32, 2), done.sigmas, ())
    assert not done.serves(stage, (1.0, 0.0), ())
    assert not done.serves(stage, (1.0, 0.3, 1 / 3, 0.05, 0.0), ())


def test_folder_store_gives_back_every_bit(tmp_path):
    store, done = FolderStageStore(tmp_path / "new" / "folder"), result()
    assert store.load(1) is None
    store.save(1, done)
    again = store.load(1)
    assert (again.index, again.height, again.width, again.sigmas) == (1, 32, 48, done.sigmas)
    assert again.latents.dtype == torch.bfloat16
    assert torch.equal(again.latents, done.latents)
    assert again.history.keys() == {2, 3}
    assert all(torch.equal(again.history[k], done.history[k]) for k in (2, 3))
    assert [path.name for path in store.folder.iterdir()] == ["stage-1.safetensors"]


@pytest.mark.parametrize("damage", [b"", b"not a tensor file", None])
def test_damaged_stage_counts_as_missing(tmp_path, damage):
    store = FolderStageStore(tmp_path)
    store.save(0, result())
    whole = store.path(0).read_bytes()
    store.path(0).write_bytes(whole[: len(whole) // 2] if damage is None else damage)
    assert store.load(0) is None
