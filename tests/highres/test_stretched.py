"""The three forms of rotary tables on a larger grid, against the published frequencies."""

import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rope_formulas import frequencies

from gensparse.errors import ConfigError
from gensparse.highres.rope import ntk_theta
from gensparse.highres.stretched import POSITIONS, LatentPositions, LookupPositions, Rotary

GOLDEN = Path(__file__).parents[1] / "golden" / "highres-rope" / "flux_rope.npz"
DIMS, THETA, NATIVE = (16, 56, 56), 10000.0, 64


def found(kind: str, grid: tuple[int, int], rule: str, time: float, isotropic: bool = False) -> list[torch.Tensor]:
    """Rotations of one step along rows and along columns, complex128 [28] each, as a model of the kind gets them."""
    own = [torch.ones(9, dim // 2, dtype=torch.complex128) for dim in DIMS]
    model = SimpleNamespace(
        pos_embed=SimpleNamespace(axes_dim=DIMS, theta=THETA),
        rope=SimpleNamespace(rope_dim=DIMS, theta=THETA),
        embedder=SimpleNamespace(freqs_cis=own, axes_dim=DIMS, theta=THETA),
    )
    path = {"ids": "pos_embed", "latents": "rope", "lookup": "embedder.freqs_cis"}[kind]
    table = Rotary(path, kind, isotropic).stand_in(model, grid, NATIVE, rule).at(time)
    if kind == "lookup":
        assert table[0] is own[0]
        assert [len(part) for part in table] == [9, max(9, grid[0]), max(9, grid[1])]
        return [table[1][1], table[2][1]]
    if kind == "ids":
        cos, sin = table(torch.tensor([[0.0, 1, 0], [0, 0, 1]]))
        rows = torch.complex(cos, sin)[:, ::2].to(torch.complex128)
    else:
        cos, sin = table(torch.zeros(1, 4, 1, *grid))
        rows = torch.complex(cos, sin)[[grid[1], 1], ::2].to(torch.complex128)
    return [rows[0, 8:36], rows[1, 36:]]


def cases():
    """(file's key, size in pixels, rule, time) of every static and dynamic rule that stands alone."""
    for key in np.load(GOLDEN).files:
        match = re.fullmatch(rf"px(\d+)_({'|'.join(POSITIONS)})(?:_t([\d.]+))?", key)
        if match:
            yield pytest.param(key, int(match[1]), match[2], float(match[3] or 1.0), id=f"golden-highres-rope-{key}")


@pytest.mark.parametrize(("key", "pixels", "rule", "time"), cases())
def test_every_form_has_the_published_frequencies(key, pixels, rule, time):
    golden, side = np.load(GOLDEN), pixels // 16
    mscale = float(golden[re.sub(r"_t[\d.]+$", "", key) + "_mscale"])
    for kind in ("ids", "lookup", "latents"):
        for number, grid in enumerate(((side, 2), (2, side))):  # axes are stretched each by its own length
            axis = found(kind, grid, rule, time)[number]
            assert np.allclose(axis.angle().numpy(), golden[key], rtol=2e-6, atol=1e-7)
            assert np.allclose(axis.abs().numpy(), mscale, rtol=2e-7)


@pytest.mark.parametrize("kind", ["ids", "lookup", "latents"])
@pytest.mark.parametrize("rule", POSITIONS)
def test_axes_are_stretched_each_or_alike(kind, rule):
    grid = (97, 40)
    for isotropic in (False, True):
        for axis, side in zip(found(kind, grid, rule, 0.4, isotropic), grid, strict=True):
            expected, factor = frequencies(56, THETA, max(grid) if isotropic else side, NATIVE, _time(rule), rule)
            assert np.allclose(axis.angle().numpy(), expected, rtol=2e-6, atol=1e-7)
            assert np.allclose(axis.abs().numpy(), factor, rtol=2e-7)


def _time(rule: str) -> float:
    return 0.4 if rule.startswith("dy_") else 1.0


def test_tables_are_made_anew_for_another_time_only():
    own = [torch.ones(9, n, dtype=torch.complex64) for n in (4, 8, 8)]
    for rule, same in (("yarn", True), ("dy_yarn", False)):
        table = LookupPositions(own, (8, 16, 16), 256.0, (20, 30), 8, rule)
        assert (table.at(0.9) is table.at(0.3)) is same
        assert table.at(0.3)[1].dtype == torch.complex64
        module = LatentPositions((16, 16), 256.0, (20, 30), 8, rule)
        module.set_time(0.9)
        first = module(torch.zeros(1, 4, 20, 30))
        module.set_time(0.3)
        assert (module(torch.zeros(1, 4, 20, 30)) is first) is same
        assert first[0].shape == (600, 32)


def test_frames_are_not_stretched():
    table = LatentPositions((8, 16, 16), 256.0, (20, 30), 8, "yarn")
    cos, _ = table(torch.zeros(1, 4, 3, 20, 30))
    assert cos.shape == (1800, 40)
    frames = torch.arange(3).double()[:, None] * torch.tensor([256.0 ** (-2 * j / 8) for j in range(4)]).double()
    expected = frames.cos().repeat_interleave(2, 1).float()[:, None].expand(3, 600, 8).reshape(1800, 8)
    torch.testing.assert_close(cos[:, :8], expected, rtol=0, atol=1e-6)


def test_an_axis_of_one_frequency_keeps_it():
    assert ntk_theta(10000.0, 2, 4.0) == 10000.0


def test_rules_of_the_stages_are_refused():
    for rule, words in (("ntk10", "stages of FLUX.1"), ("stretch", "choose 'auto' or one of base, ntk, yarn")):
        with pytest.raises(ConfigError, match=words):
            Rotary("pos_embed", "ids").stand_in(SimpleNamespace(), (99, 99), 64, rule)
