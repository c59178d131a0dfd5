"""The released MSW-MSA code path (bicubic on odd grids) against golden outputs of the authors' functions."""

import pytest
import torch
from golden_files import golden_params, load

from gensparse.layout import Layout
from gensparse.patterns import MSW
from gensparse.testing.msw_reference import msw_attention


@pytest.mark.parametrize("path", golden_params("msw_msa"))
def test_released_code_path(path):
    _, arrays = load(path)
    q, k, v, out = (torch.from_numpy(arrays[name]) for name in ("q", "k", "v", "out"))
    grid = (int(arrays["height"]), int(arrays["width"]))
    result = msw_attention(q, k, v, grid, int(arrays["heads"]), int(arrays["shift_index"]))
    assert (result - out).abs().max() <= 1e-5


@pytest.mark.parametrize(("grid", "index"), [((6, 20), 1), ((8, 12), 3), ((2, 2), 0)])
def test_even_grids_equal_the_pattern(grid, index):
    """Also where a short window switches the roll off."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, grid[0] * grid[1], 8, generator=generator)
    mask = torch.from_numpy(MSW(index).dense_mask(Layout.image(*grid))[0])
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    assert torch.allclose(msw_attention(q, k, v, grid, 1, index), dense, atol=1e-5)
