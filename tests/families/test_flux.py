"""FLUX family: the layout of a call from its position ids."""

import pytest
import torch

from gensparse.errors import ConfigError, LayoutMismatchError
from gensparse.families import FAMILIES, Family, TensorMemo, family_of, flux


def position_ids(
    height: int, width: int, *, spacing: float = 1.0, offset: float = 0.0, picture: float = 0
) -> torch.Tensor:
    ids = torch.zeros(height, width, 3)
    ids[..., 0] = picture
    ids[..., 1] = torch.arange(height)[:, None] * spacing + offset
    ids[..., 2] = torch.arange(width) * spacing + offset
    return ids.reshape(-1, 3)


def bound(ids: torch.Tensor, text: int = 5) -> dict[str, torch.Tensor]:
    tokens = ids.shape[-2]
    return {
        "hidden_states": torch.empty(2, tokens, 16),
        "encoder_hidden_states": torch.empty(2, text, 32),
        "img_ids": ids,
    }


GRIDS = [(8, 6), (6, 8), (1, 7), (7, 1), (1, 1), (2, 2), (13, 17), (1, 2), (2, 1)]


@pytest.mark.parametrize(("height", "width"), GRIDS)
@pytest.mark.parametrize(("spacing", "offset"), [(1, 0), (1 / 2, 1 / 4), (1 / 16, -3.28125), (1 / 3, 7.1), (1, 100)])
def test_grid_is_read_whatever_the_spacing_and_offset(height: int, width: int, spacing: float, offset: float) -> None:
    layout = flux.read_layout(bound(position_ids(height, width, spacing=spacing, offset=offset)))
    assert layout.grid == (1, height, width)
    assert [(s.kind, s.length) for s in layout.segments] == [("text", 5), ("target", height * width)]


@pytest.mark.parametrize(("height", "width"), [(3, 601), (600, 4), (512, 8)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_ids_that_merge_neighbours_still_give_the_grid(
    height: int, width: int, dtype: torch.dtype
) -> None:
    ids = position_ids(height, width).to(dtype)
    if dtype is torch.bfloat16:
        assert len(ids.float().unique()) < max(height, width)
    assert flux.read_layout(bound(ids)).grid == (1, height, width)


def test_ids_with_a_batch_axis_are_read_like_plain_ones() -> None:
    ids = position_ids(5, 3)
    assert flux.read_layout({**bound(ids), "img_ids": ids[None]}) == flux.read_layout(bound(ids))


def test_pictures_of_column_zero_become_target_and_references() -> None:
    ids = torch.cat([position_ids(4, 6), position_ids(5, 3, picture=1), position_ids(2, 2, picture=2)])
    layout = flux.read_layout(bound(ids, text=7))
    assert [(s.kind, s.shape) for s in layout.segments] == [
        ("text", (1, 1, 7)),
        ("target", (1, 4, 6)),
        ("reference", (1, 5, 3)),
        ("reference", (1, 2, 2)),
    ]


@pytest.mark.parametrize("spoil", ["shuffled", "transposed", "torn", "mirrored"])
def test_ids_that_are_no_raster_are_refused_not_guessed(spoil: str) -> None:
    ids = position_ids(6, 8)
    spoiled = {
        "shuffled": ids[torch.randperm(48, generator=torch.Generator().manual_seed(0))],
        "transposed": ids.reshape(6, 8, 3).transpose(0, 1).reshape(-1, 3),
        "torn": ids[:-3],
        "mirrored": ids.flip(0),
    }[spoil]
    with pytest.raises(LayoutMismatchError):
        flux.read_layout(bound(spoiled))


def test_ids_of_another_length_than_the_picture_are_refused() -> None:
    arguments = {**bound(position_ids(6, 8)), "hidden_states": torch.empty(2, 47, 16)}
    with pytest.raises(LayoutMismatchError, match="47 picture tokens, but img_ids describe 48"):
        flux.read_layout(arguments)


@pytest.mark.parametrize("missing", ["img_ids", "hidden_states", "encoder_hidden_states"])
def test_a_call_without_what_the_layout_needs_is_refused(missing: str) -> None:
    arguments = bound(position_ids(6, 8))
    del arguments[missing]
    with pytest.raises(LayoutMismatchError, match="img_ids"):
        flux.read_layout(arguments)


class Counted:
    def __init__(self) -> None:
        self.reads = 0

    def __call__(self, tensor: torch.Tensor) -> float:
        self.reads += 1
        return float(tensor.sum())


def test_memo_reads_the_same_tensor_once_and_notices_every_change() -> None:
    memo, read, ids = TensorMemo(), Counted(), torch.ones(4)
    assert [memo.get(ids, read) for _ in range(3)] == [4.0] * 3
    assert read.reads == 1
    ids += 1
    assert memo.get(ids, read) == 8.0
    assert memo.get(ids.clone(), read) == 8.0
    assert read.reads == 3


def test_memo_never_takes_a_new_tensor_at_an_old_address_for_the_old_one() -> None:
    memo = TensorMemo()
    for height, width in [(6, 8), (8, 6), (6, 8), (4, 12)]:
        layout = flux.read_layout(bound(position_ids(height, width)), memo)
        assert layout.grid == (1, height, width)


def test_memo_works_on_inference_tensors() -> None:
    with torch.inference_mode():
        ids = position_ids(3, 5)
        memo = TensorMemo()
        assert flux.read_layout(bound(ids), memo).grid == flux.read_layout(bound(ids), memo).grid == (1, 3, 5)


@pytest.mark.parametrize(
    ("size", "options", "grid"),
    [((4096, 4096), {}, (256, 256)), ((1000, 777), {}, (62, 48)), ((32, 48), {"vae_scale": 2}, (8, 12))],
)
def test_layout_for_pixels_needs_no_weights(
    size: tuple[int, int], options: dict[str, int], grid: tuple[int, int]
) -> None:
    layout = flux.layout_for(*size, n_text=512, **options)
    assert layout.grid == (1, *grid)
    assert layout.tokens == 512 + grid[0] * grid[1]


def test_layout_for_a_picture_below_one_token_is_refused() -> None:
    with pytest.raises(ConfigError, match="height=15"):
        flux.layout_for(15, 64, n_text=5)


def test_native_tokens_come_from_the_scheduler_and_from_nowhere_else() -> None:
    assert flux.native_tokens(None, {"max_image_seq_len": 256}) == 256
    with pytest.raises(ConfigError, match="max_image_seq_len"):
        flux.native_tokens(torch.nn.Linear(1, 1))


def test_family_is_found_from_the_class_or_a_base_class() -> None:
    model_class = type("FluxTransformer2DModel", (torch.nn.Module,), {})
    subclass = type("Mine", (model_class,), {})
    assert family_of(model_class()) is family_of(subclass()) is flux.FAMILY


def test_unknown_model_is_refused_with_the_supported_classes() -> None:
    with pytest.raises(ConfigError, match=r"Linear belongs to no supported family.*FluxTransformer2DModel"):
        family_of(torch.nn.Linear(1, 1))


@pytest.mark.parametrize("name", FAMILIES)
def test_every_registered_class_has_a_family(name: str) -> None:
    assert isinstance(family_of(type(name, (torch.nn.Module,), {})()), Family)
