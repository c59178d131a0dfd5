"""Token order of NATTEN's permutation against its own output."""

import re

import numpy as np
import pytest
from golden_files import golden_params, load

from gensparse.testing.natten_order import token_order


def numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text))


@pytest.mark.parametrize("path", golden_params("natten", kinds=["token_permute"]))
def test_token_order_equals_official_permutation(path):
    _, arrays = load(path)
    for name, expected in arrays.items():
        grid, tile, dilation = map(numbers, name.split("_"))
        np.testing.assert_array_equal(token_order(grid, tile, dilation), expected, err_msg=name)


@pytest.mark.parametrize(
    ("grid", "tile", "dilation"), [((7,), (4,), (3,)), ((5, 1), (2, 3), (1, 1)), ((3, 7, 5), (2, 2, 4), (1, 3, 2))]
)
def test_every_token_has_exactly_one_slot(grid, tile, dilation):
    order = token_order(grid, tile, dilation)
    np.testing.assert_array_equal(np.sort(order[order >= 0]), np.arange(np.prod(grid)))
    assert order.shape[0] == np.prod(dilation)
