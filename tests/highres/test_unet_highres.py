"""Views, DemoFusion, FreeScale and RectifiedHR as pure functions, at sizes that divide nothing."""

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from gensparse.errors import ConfigError
from gensparse.highres import demofusion, freescale, rectifiedhr, views

SIZES = [(7, 13), (16, 16), (1, 29), (31, 5), (40, 23)]


def normal(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def coverage(found: list[views.View], size: views.Size) -> torch.Tensor:
    count = torch.zeros(size)
    for view in found:
        view.of(count).add_(1)
    return count


# --- windows


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("window", "stride"), [((8, 8), (4, 4)), ((5, 7), (3, 2)), ((64, 3), (32, 3))])
def test_windows_cover_every_cell_and_stay_inside(size, window, stride):
    found = views.windows(size, window, stride)
    assert coverage(found, size).min() >= 1
    for view in found:
        assert 0 <= view.top < view.bottom <= size[0]
        assert 0 <= view.left < view.right <= size[1]
        assert (view.bottom - view.top, view.right - view.left) == tuple(map(min, size, window))


def test_number_of_windows_is_the_published_formula():
    for length in range(1, 200):
        for window, stride in ((64, 48), (32, 16), (9, 9)):
            published = int((length - window) / stride - 1e-6) + 2 if length > window else 1
            assert len(views.axis_starts(length, window, stride)) == published


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("seed", range(5))
def test_jittered_windows_cover_the_picture_and_move_within_reach(size, seed):
    window, stride = (8, 8), (4, 4)
    reach = views.window_jitter(window, stride)
    plain = views.windows(size, window, stride)
    moved = views.jittered(plain, size, reach, torch.Generator().manual_seed(seed))
    wide = (size[0] + 2 * reach[0], size[1] + 2 * reach[1])
    assert views.unpadded(coverage(moved, wide), reach).min() >= 1
    for view, start in zip(moved, plain, strict=True):
        assert abs(view.top - start.top - reach[0]) <= reach[0]
        assert abs(view.left - start.left - reach[1]) <= reach[1]
        assert (view.bottom - view.top, view.right - view.left) == (start.bottom - start.top, start.right - start.left)
        assert start.top > 0 or view.top <= reach[0]
        assert start.bottom < size[0] or view.bottom >= size[0] + reach[0]


def test_jitter_reaches_both_ends_and_comes_from_the_generator_alone():
    size, reach = (24, 40), (1, 2)
    plain = views.windows(size, (8, 8), (4, 4))
    state = torch.random.get_rng_state()
    drawn = [views.jittered(plain, size, reach, torch.Generator().manual_seed(seed)) for seed in range(60)]
    assert torch.equal(torch.random.get_rng_state(), state)
    assert drawn[3] == views.jittered(plain, size, reach, torch.Generator().manual_seed(3))
    middle = next(k for k, view in enumerate(plain) if view.top > 0 and view.bottom < 24 and 0 < view.left < 20)
    assert {view[middle].left - plain[middle].left - reach[1] for view in drawn} == {-2, -1, 0, 1, 2}
    assert {view[0].left for view in drawn} == {0, 1, 2}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("most", [1, 3, 100])
def test_averaging_windows_of_a_map_gives_the_map(size, most):
    x = normal(2, 3, *size)
    found = views.windows(size, (6, 9), (4, 5))
    sizes = []

    def predict(group):
        sizes.append(len(group))
        return torch.cat([view.of(x) for view in group])

    torch.testing.assert_close(views.averaged(predict, found, x, most), x)
    assert max(sizes) <= most
    assert sum(sizes) == len(found)


def test_overlaps_are_means():
    x = torch.zeros(1, 1, 1, 6)
    found = [views.View(0, 1, 0, 4), views.View(0, 1, 2, 6)]
    parts = {found[0]: 1.0, found[1]: 3.0}
    out = views.averaged(lambda group: torch.cat([torch.full((1, 1, 1, 4), parts[v]) for v in group]), found, x)
    assert out.flatten().tolist() == [1, 1, 2, 2, 3, 3]


def test_gaps_are_refused():
    with pytest.raises(ConfigError, match="stride"):
        views.axis_starts(10, 4, 5)


# --- dilated views


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("step", [(1, 1), (2, 2), (3, 2), (4, 4)])
def test_dilated_views_are_strided_slices_and_come_back(size, step):
    x = normal(2, 3, *size)
    whole = views.padded_to(x, step)
    assert torch.equal(whole[..., whole.shape[-2] - size[0] :, whole.shape[-1] - size[1] :], x)
    parts = views.dilated_views(whole, step)
    for k, (a, b) in enumerate((a, b) for a in range(step[0]) for b in range(step[1])):
        assert torch.equal(parts[2 * k : 2 * k + 2], whole[..., a :: step[0], b :: step[1]])
    assert torch.equal(views.from_dilated(parts, step), whole)


def test_sides_that_a_step_does_not_divide_are_refused():
    with pytest.raises(ConfigError, match="pad"):
        views.dilated_views(normal(1, 1, 5, 6), (2, 2))


# --- demofusion


def test_weights_fall_from_the_guide_to_the_picture():
    found = [demofusion.weights(t) for t in (1000, 700, 300, 0)]
    assert found[0] == (1, 1, 1)
    assert found[-1] == pytest.approx((0, 0, 0.01))
    assert all(a > b for pair in pairwise(found) for a, b in zip(*pair, strict=True))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scale", [1, 2, 4])
def test_blur_keeps_the_moments_of_every_sample(size, scale):
    x = normal(3, 4, *size) * torch.tensor([0.5, 1.0, 3.0]).view(3, 1, 1, 1) + 0.7
    out = demofusion.blurred(x, scale, 0.8)
    for got, expected in zip(demofusion.moments(out), demofusion.moments(x), strict=True):
        torch.testing.assert_close(got, expected)
    assert torch.allclose(out[1:2], demofusion.blurred(x[1:2], scale, 0.8), atol=1e-6)


def test_blur_is_the_two_dimensional_convolution():
    x, kernel = normal(2, 3, 9, 14), demofusion.gaussian_kernel(5, 0.9)
    expected = F.conv2d(x.flatten(0, 1)[:, None], kernel[None, None], padding=2).view(x.shape)
    torch.testing.assert_close(demofusion.gaussian_blur(x, 5, 0.9), expected)


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ((4096, 4096), [(1024, 1024, 1), (2048, 2048, 2), (3072, 3072, 3), (4096, 4096, 4)]),
        ((2048, 4096), [(512, 1024, 1), (1024, 2048, 2), (1536, 3072, 3), (2048, 4096, 4)]),
        ((1024, 1024), [(1024, 1024, 1)]),
        ((1000, 2600), [(336, 864, 1), (664, 1736, 2), (1000, 2600, 3)]),
    ],
)
def test_phases_grow_by_the_native_side(target, expected):
    assert demofusion.phases(*target, 1024) == [demofusion.Phase(*phase) for phase in expected]


# --- freescale


@pytest.mark.parametrize("kind", freescale.FUSIONS)
@pytest.mark.parametrize("size", SIZES)
def test_fusion_of_equal_maps_is_the_map(kind, size):
    x = normal(2, *size, 6)
    assert torch.equal(freescale.fused(x, x, 4, kind), x)
    constant = torch.full((1, *size, 6), 2.5)
    assert torch.equal(freescale.fused(constant, constant.clone(), 3, kind), constant)


def test_fusion_takes_low_frequencies_from_the_local_map_and_high_ones_from_the_whole():
    rows = torch.arange(40).view(1, 40, 1, 1).expand(1, 40, 40, 1).float()
    low, high = torch.ones(1, 40, 40, 1), (-1.0) ** rows
    inside = (slice(None), slice(8, -8), slice(8, -8))
    assert freescale.fused(low, high, 4)[inside].sub(1 + high[inside]).abs().max() < 0.05
    assert freescale.fused(high, low, 4)[inside].abs().max() < 0.05


def test_at_the_native_size_the_local_map_is_all():
    local, whole = normal(1, 5, 7, 4), normal(1, 5, 7, 4, seed=1)
    torch.testing.assert_close(freescale.fused(local, whole, 1), local)


def test_spatial_low_pass_is_a_depthwise_convolution():
    x = normal(2, 9, 6, 5)
    kernel = demofusion.gaussian_kernel(7, 1.0).expand(5, 1, 7, 7)
    expected = F.conv2d(x.movedim(-1, 1), kernel, padding=3, groups=5).movedim(1, -1)
    torch.testing.assert_close(freescale.low_pass(x, 4), expected)


def test_unknown_fusion_is_refused():
    with pytest.raises(ConfigError, match="spatial"):
        freescale.low_pass(normal(1, 4, 4, 2), 2, "3d")


@pytest.mark.parametrize(
    ("size", "native", "window", "zoom"),
    [
        ((128, 128), 64, (64, 64), 2),
        ((128, 256), 64, (32, 64), 4),
        ((64, 64), 64, (64, 64), 1),
        ((37, 101), 16, (6, 16), 6),
        ((1, 50), 10, (1, 10), 5),
        ((5, 9), 16, (5, 9), 1),
    ],
)
def test_token_windows_have_the_maps_shape(size, native, window, zoom):
    found = freescale.token_windows(size, native)
    assert found.window == window
    assert freescale.zoom(size, native) == zoom
    assert coverage(views.windows(size, found.window, found.stride), size).min() >= 1


@pytest.mark.parametrize("size", [(7, 13), (16, 16), (1, 5), (31, 4), (9, 22)])
@pytest.mark.parametrize("dilation", [1, 2, 3, 4])
@pytest.mark.parametrize("stride", [1, 2])
def test_dilated_convolution_by_parts_is_the_dilated_convolution(size, dilation, stride):
    conv = torch.nn.Conv2d(3, 4, 3, stride=stride, padding=1)
    x = normal(2, 3, *size)
    cut = freescale.Dilation(size, dilation, stride)
    expected = F.conv2d(x, conv.weight, conv.bias, stride=stride, padding=dilation, dilation=dilation)
    with torch.no_grad():
        torch.testing.assert_close(cut.join(conv(cut.split(x))), expected, rtol=1e-5, atol=1e-5)


def test_dilated_convolutions_of_sdxl_are_the_published_ones():
    expected = ["down_blocks.1.downsamplers.0.conv"]
    expected += [f"{b}.resnets.{k}.conv{n}" for b in ("down_blocks.2", "mid_block") for k in (0, 1) for n in (1, 2)]
    assert list(freescale.dilated_convs(3, 2)) == expected


def test_restart_steps():
    assert [freescale.restart_step(n) for n in (50, 30, 7)] == [15, 9, 2]
    assert freescale.restart_step(4, freescale.RESTART["sdxl-turbo"]) == 2


# --- rectifiedhr


@pytest.mark.parametrize(
    ("recipe", "steps", "switches", "guidance"),
    [
        (rectifiedhr.SDXL_2K, 50, [0, 30, 50], [5, 30]),
        (rectifiedhr.SDXL_4K, 50, [0, 40, 47, 50], [5, 5 + 45 * math.sqrt(0.5), 50]),
        (rectifiedhr.Recipe(1), 20, [0, 20], [5]),
        (rectifiedhr.SDXL_2K, 10, [0, 6, 10], [5, 30]),
    ],
)
def test_published_schedules(recipe, steps, switches, guidance):
    assert rectifiedhr.switch_steps(recipe, steps) == switches
    assert rectifiedhr.guidance_scales(recipe) == pytest.approx(guidance)
    assert sum(rectifiedhr.segment_lengths(switches)) == steps


@pytest.mark.parametrize(
    ("base", "target", "count", "expected"),
    [
        ((1024, 1024), (2048, 2048), 2, [(1024, 1024), (2048, 2048)]),
        ((1024, 1024), (4096, 4096), 3, [(1024, 1024), (2560, 2560), (4096, 4096)]),
        ((768, 1536), (2048, 4096), 3, [(768, 1536), (1408, 2816), (2048, 4096)]),
        ((904, 1160), (1000, 1288), 3, [(904, 1160), (952, 1232), (1000, 1288)]),
        ((512, 512), (512, 512), 1, [(512, 512)]),
    ],
)
def test_sizes_grow_by_the_shorter_side(base, target, count, expected):
    assert rectifiedhr.sizes(base, target, count) == expected


def test_recipes_by_zoom():
    assert [rectifiedhr.recipe_for(zoom).count for zoom in (1, 1.05, 1.5, 2, 2.2, 2.5, 4)] == [1, 1, 2, 2, 2, 3, 3]


def test_too_few_steps_and_wrong_recipes_are_refused():
    with pytest.raises(ConfigError, match="too few"):
        rectifiedhr.switch_steps(rectifiedhr.SDXL_4K, 4)
    for wrong in ({"count": 0}, {"count": 2, "switches": (0.8, 0.5, 1.0)}, {"count": 2, "switches": (0.0, 1.0, 1.0)}):
        with pytest.raises(ConfigError):
            rectifiedhr.Recipe(**wrong)
