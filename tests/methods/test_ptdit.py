"""PT-DiT's block and model beyond the published vectors: limits, any size, loading."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from gensparse.errors import ConfigError, ModelError
from gensparse.kernels import reference
from gensparse.layout import Layout
from gensparse.methods.ptdit import POSITIONS, PTDiT, PTDiTBlock, load_strictly, positions
from gensparse.patterns import Blocks

TINY = {
    "num_heads": 2,
    "head_dim": 16,
    "num_layers": 2,
    "cross_attention_dim": 32,
    "caption_channels": 12,
    "sample_size": 8,
    "compress_ratios": (1, 2, 2),
}


def noised(module: torch.nn.Module) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in module.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator) * 0.1)
    return module.eval()


def tiny(**changes) -> PTDiT:
    torch.manual_seed(0)
    return noised(PTDiT(**{**TINY, **changes}))


def block_of(window: tuple[int, int, int], proxy_window: tuple[int, int, int] | None = None) -> PTDiTBlock:
    torch.manual_seed(1)
    return noised(PTDiTBlock(32, 2, window=window, proxy_window=proxy_window or window))


def inputs(grid: tuple[int, int, int], batch: int = 2) -> tuple:
    """x, grid, text, text_bias, modulation of a block."""
    generator = torch.Generator().manual_seed(2)
    tokens = grid[0] * grid[1] * grid[2]
    x, text, modulation = (torch.randn(batch, *size, generator=generator) for size in ((tokens, 32), (5, 32), (192,)))
    return x, grid, text, None, modulation * 0.3


def latents(*size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    x, text = torch.randn(2, 4, *size, generator=generator), torch.randn(2, 5, 12, generator=generator)
    return x, torch.tensor([600.0, 400.0]), text, torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])


@torch.no_grad()
def block_loop(block: PTDiTBlock, x, grid, text, text_bias, modulation) -> torch.Tensor:
    """The block by its written steps, with dense masks."""

    def norm(t):
        return (t - t.mean(-1, keepdim=True)) / (t.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()

    def attend(layer, a, b, allowed=None):
        q, k, v = (f(t).unflatten(-1, (2, 16)) for f, t in ((layer.to_q, a), (layer.to_k, b), (layer.to_v, b)))
        mask = torch.ones(1, q.shape[1], k.shape[1], dtype=torch.bool) if allowed is None else allowed
        return layer.to_out[0](reference.attend(q, k, v, mask)[0].flatten(2))

    layout = Layout.joint(grid)
    window = tuple(map(min, block.window, grid))
    plain, shifted = (Blocks(window, s).dense_mask(layout) for s in (0, tuple(w // 2 for w in window)))
    table = block.scale_shift_table + modulation.unflatten(1, (6, 32))
    parts = [table[:, i : i + 1] for i in range(6)]
    own = block.proxy_scale_shift_table + modulation.unflatten(1, (6, 32))[:, :3]
    cells = Blocks(window).bind(layout).partition(0)
    proxies = torch.stack([x[:, torch.from_numpy(cells == c)].mean(1) for c in range(cells.max() + 1)], 1)
    proxies = proxies + attend(block.proxy_attn1, norm(proxies), norm(proxies))
    x = x + block.linear_1_visual(attend(block.pvisual_attn2, norm(x), norm(proxies)))
    y = norm(x) * (1 + parts[1]) + parts[0]
    x = x + parts[2] * attend(block.attn1, y, y, torch.from_numpy(plain))
    y = norm(x) * (1 + own[:, 1:2]) + own[:, :1]
    x = x + block.linear_2(own[:, 2:] * attend(block.attn3, y, y, torch.from_numpy(shifted)))
    x = x + attend(block.attn2, x, text)
    return x + parts[5] * block.ff(norm(x) * (1 + parts[4]) + parts[3])


@pytest.mark.parametrize(
    ("window", "grid"),
    [((1, 4, 4), (1, 8, 12)), ((2, 3, 4), (3, 7, 10)), ((4, 2, 2), (2, 5, 3)), ((1, 9, 9), (1, 1, 7))],
)
@torch.no_grad()
def test_block_follows_its_written_steps_on_any_grid(window: tuple, grid: tuple) -> None:
    block = block_of(window)
    arguments = inputs(grid)
    torch.testing.assert_close(block(*arguments), block_loop(block, *arguments), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_every_step_counts_and_samples_keep_their_own_timestep() -> None:
    block, (x, grid, text, bias, modulation) = block_of((1, 4, 4)), inputs((1, 8, 8))
    out = block(x, grid, text, bias, modulation)
    for name in ("proxy_attn1", "pvisual_attn2", "attn1", "attn2", "attn3", "ff"):
        weight = next(p for n, p in getattr(block, name).named_parameters() if n.endswith("weight"))
        kept = weight.clone()
        weight.mul_(1.5)
        assert (block(x, grid, text, bias, modulation) - out).abs().max() > 1e-4, name
        weight.copy_(kept)
    alone = block(x[1:], grid, text[1:], bias, modulation[1:])
    torch.testing.assert_close(alone, out[1:], atol=1e-5, rtol=0)
    assert (block(x, grid, text, bias, modulation.flip(0)) - out).abs().max() > 1e-3


@torch.no_grad()
def test_tokens_moved_inside_their_window_leave_the_proxies_as_they_are() -> None:
    block, (x, grid, *_) = block_of((1, 2, 2)), inputs((1, 4, 4))
    order = torch.arange(16)
    order[[0, 1, 4, 5]] = torch.tensor([5, 0, 1, 4])
    torch.testing.assert_close(block.proxies(x[:, order], grid), block.proxies(x, grid))
    assert not torch.equal(block.proxies(x[:, order], grid, "first"), block.proxies(x, grid, "first"))


def test_random_proxies_come_from_their_own_generator() -> None:
    block, (x, grid, *_) = block_of((1, 2, 2)), inputs((1, 4, 4))
    state = torch.random.get_rng_state()
    first, again, other = (block.proxies(x, grid, "random", torch.Generator().manual_seed(s)) for s in (5, 5, 6))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_several_proxies_per_window_need_a_grid_that_windows_divide() -> None:
    block = block_of((2, 4, 4), (2, 2, 2))
    assert block.proxies(*inputs((4, 8, 4))[:2]).shape == (2, 16, 32)
    for mode in ("mean", "first"):
        with pytest.raises(ConfigError, match=r"\(2, 4, 4\) do not divide the grid \(4, 8, 5\)"):
            block.proxies(*inputs((4, 8, 5))[:2], mode)


@torch.no_grad()
def test_model_runs_on_any_size_and_clip_and_windows_over_the_grid_are_dense() -> None:
    model = tiny()
    for size in ((1, 8, 8), (1, 6, 14), (3, 10, 4), (1, 2, 2)):
        assert model(*latents(*size)).sample.shape == (2, 8, *size)
    whole, dense = (
        tiny(compress_ratios=(1, 4, 4), shift_window=False),
        tiny(compress_ratios=(9, 9, 9), shift_window=False),
    )
    dense.load_state_dict(whole.state_dict())
    torch.testing.assert_close(whole(*latents(1, 8, 8)).sample, dense(*latents(1, 8, 8)).sample)


@torch.no_grad()
def test_padded_text_is_not_seen() -> None:
    model, (x, t, text, mask) = tiny(), latents(1, 8, 8)
    other = text.clone()
    other[0, 3:] += 3
    torch.testing.assert_close(model(x, t, other, mask).sample, model(x, t, text, mask).sample)
    assert (model(x, t, other).sample - model(x, t, text).sample).abs().max() > 1e-3


@torch.no_grad()
def test_positions_are_swapped_only_where_that_is_asked_for_and_matters() -> None:
    right, swapped = tiny(), tiny(reference_positions=True)
    swapped.load_state_dict(right.state_dict())
    assert torch.equal(right(*latents(1, 8, 8)).sample, swapped(*latents(1, 8, 8)).sample)
    assert (right(*latents(1, 8, 4)).sample - swapped(*latents(1, 8, 4)).sample).abs().max() > 1e-3
    table = positions((2, 3, 5), 32)
    assert torch.equal(positions((2, 5, 3), 32, 1.0, True), table)
    one = positions((1, 4, 4), 32, 2.0)[5]  # row 1, column 1
    angle = torch.tensor(0.5) * 10000.0 ** (-torch.arange(6) / 6)
    torch.testing.assert_close(one[8:14], angle.sin())
    torch.testing.assert_close(one[26:], angle.cos())


def test_saved_model_reloads_equal_through_diffusers(tmp_path: Path) -> None:
    model = tiny()
    model.save_pretrained(tmp_path)
    again = PTDiT.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(*latents(1, 8, 8)).sample, model(*latents(1, 8, 8)).sample)


def stored(model: PTDiT, folder: Path, **changes: torch.Tensor | None) -> Path:
    weights = {name: x.contiguous() for name, x in ({**model.state_dict()} | changes).items() if x is not None}
    save_file(weights, folder / "weights.safetensors")
    return folder / "weights.safetensors"


def test_checkpoint_of_another_size_loads_with_its_own_table(tmp_path: Path) -> None:
    model, larger = tiny(), tiny(sample_size=12)
    table = larger.state_dict()[POSITIONS].clone()
    larger.load_checkpoint(stored(model, tmp_path))
    assert torch.equal(larger.state_dict()[POSITIONS], table)
    assert torch.equal(larger.proj_out.weight, model.proj_out.weight)
    larger.load_checkpoint(stored(model, tmp_path, **{POSITIONS: None}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"proj_out.bias": None}, r"proj_out\.bias is missing"),
        ({"colour": torch.zeros(1)}, "colour is not in the model"),
        ({"proj_out.bias": torch.zeros(3)}, r"proj_out\.bias has shape \(3,\), not \(32,\)"),
    ],
)
def test_other_weights_are_refused_and_change_nothing(tmp_path: Path, change: dict, message: str) -> None:
    model = tiny()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    file = stored(tiny(), tmp_path, **{"proj_out.weight": torch.ones(32, 32), **change})
    with pytest.raises(ModelError, match=message):
        model.load_checkpoint(file)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


def test_files_that_are_no_safetensors_are_refused(tmp_path: Path) -> None:
    torch.save({}, tmp_path / "model.pt")
    (tmp_path / "broken.safetensors").write_bytes(b"not a checkpoint")
    messages = {
        "model.pt": "no safetensors",
        "broken.safetensors": "cannot be read",
        "none.safetensors": "cannot be read",
    }
    for name, message in messages.items():
        with pytest.raises(ModelError, match=message):
            load_strictly(tiny(), tmp_path / name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head_dim": 15}, "30 channels"),
        ({"compress_ratios": (1, 2)}, "compress_ratios"),
        ({"compress_ratios": (1, 0, 2)}, "compress_ratios"),
        ({"proxy_compress_ratios": (1, 2, 3)}, "must divide"),
        ({"cross_attention_dim": 16}, "cross_attention_dim=16"),
        ({"norm_type": "layer_norm"}, "norm_type='layer_norm'"),
        ({"activation_fn": "geglu"}, "activation_fn='geglu'"),
    ],
)
def test_settings_without_a_published_model_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PTDiT(**{**TINY, **change})


@pytest.mark.parametrize("shape", [(2, 4, 8, 8), (2, 4, 1, 7, 8), (2, 4, 1, 0, 8)])
def test_latents_of_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    _, t, text, mask = latents(1, 8, 8)
    with pytest.raises(ConfigError, match="2 divides"):
        tiny()(torch.zeros(shape), t, text, mask)
    with pytest.raises(ConfigError, match="proxy_mode='random'"):
        tiny()(torch.zeros(2, 4, 1, 8, 8), t, text, mask, proxy_mode="random")


def test_checkpointed_gradients_are_the_plain_ones() -> None:
    grads = []
    for checkpointing in (False, True):
        model = tiny()
        if checkpointing:
            model.enable_gradient_checkpointing()
        model(*latents(1, 8, 8)).sample.square().mean().backward()
        grads.append([p.grad for p in model.parameters()])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)
