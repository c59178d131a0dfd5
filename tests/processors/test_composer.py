"""Cross-attention in other hands: nothing is left behind, and the composer equals a loop over tokens in float64."""

import pytest
import torch

import gensparse
from gensparse.errors import ConfigError, UnsupportedProcessorError
from gensparse.processors.composer import Composer, Scene, ViewTexts
from gensparse.processors.text_attention import TextCall, text_attention
from gensparse.processors.variant import SITE, is_sparse
from gensparse.subjects.masks import to_grid
from gensparse.testing.tiny import tiny_denoiser, tiny_inputs

WORDS, LENGTHS = 4, (3, 3, 3)


def output(model, inputs):
    with torch.no_grad():
        return model(**inputs, return_dict=False)[0]


def state(model):
    modules = {name: m for name, m in model.named_modules() if getattr(m, "processor", None) is not None}
    found = {name: (id(m.processor), type(m.processor), vars(m).get(SITE)) for name, m in modules.items()}
    return found, len(model._forward_pre_hooks)


@pytest.mark.parametrize(("name", "grid"), [("sd15", (9, 14)), ("sdxl", (10, 6)), ("pixart", (5, 7))])
@pytest.mark.parametrize("sparse", [False, True])
def test_a_model_whose_calls_are_passed_on_is_the_model(name, grid, sparse):
    model, inputs = tiny_denoiser(name), tiny_inputs(name, (1, *grid))
    if sparse:
        gensparse.apply(model, "neighborhood:window=3x3")
    before, expected, seen = state(model), output(model, inputs), []
    with text_attention(model, lambda call: seen.append((call.name, call.grid, call.k.shape[1]))):
        assert torch.equal(output(model, inputs), expected)
    assert state(model) == before
    assert torch.equal(output(model, inputs), expected)
    cross = [n for n, m in model.named_modules() if n.endswith("attn2") and hasattr(m, "processor")]
    assert sorted({n for n, _, _ in seen}) == sorted(cross)
    assert all(words == 5 for _, _, words in seen)
    largest = max(rows * columns for _, (rows, columns), _ in seen)
    assert largest == grid[0] * grid[1]


def test_what_is_answered_is_used_and_errors_leave_no_trace():
    model, inputs = tiny_denoiser("sd15"), tiny_inputs("sd15", (1, 8, 8))
    before, plain = state(model), output(model, inputs)
    with text_attention(model, lambda call: torch.zeros_like(call.q)):
        assert not torch.equal(output(model, inputs), plain)

    def stop(call):
        raise RuntimeError("stop here")

    with pytest.raises(RuntimeError, match="stop here"), text_attention(model, stop):
        output(model, inputs)
    assert state(model) == before
    assert torch.equal(output(model, inputs), plain)


def test_fused_projections_share_a_processor_and_come_back():
    model, inputs = tiny_denoiser("sd15"), tiny_inputs("sd15", (1, 8, 8))
    model.fuse_qkv_projections()
    plain, before, seen = output(model, inputs), state(model), []
    with text_attention(model, lambda call: seen.append(call.name)):
        torch.testing.assert_close(output(model, inputs), plain, atol=1e-6, rtol=0)
    assert seen
    assert all(name.endswith("attn2") for name in seen)
    assert state(model) == before


def test_what_cannot_be_redirected_is_refused_and_unchanged():
    model = tiny_denoiser("sd15")
    model.set_attention_slice("max")
    before = state(model)
    with pytest.raises(UnsupportedProcessorError, match="slicing"), text_attention(model, lambda call: None):
        pass
    assert state(model) == before
    flux = tiny_denoiser("flux")
    with pytest.raises(ConfigError, match="no cross-attention"), text_attention(flux, lambda call: None):
        pass
    assert not any(is_sparse(m.processor) for m in flux.modules() if hasattr(m, "processor"))


# --- the composer


def call_of(rows: int, grid: tuple[int, int], words: int, *, mask: bool = False, seed: int = 0) -> TextCall:
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(rows, grid[0] * grid[1], 2, 8, generator=generator)
    k, v = (torch.randn(rows, words, 2, 8, generator=generator) for _ in "kv")
    given = None
    if mask:
        given = torch.zeros(rows, 2, 1, words)
        given[:, :, :, WORDS - 1] = -10000.0  # padding of the prompt, and of the second region
        if words > WORDS + 5:
            given[1::2, :, :, WORDS + 5] = -10000.0
    return TextCall("a", grid, q, k, v, given, 0.4)


def reference(call, scene, semantic, grids, maps=None, content=None):
    """One token, one head at a time."""
    out = torch.zeros(call.q.shape, dtype=torch.float64)
    first = len(call.q) - len(scene.views) * scene.pictures
    bias = torch.zeros(len(call.q), 2, call.k.shape[1]) if call.mask is None else call.mask[:, :, 0]
    for row in range(len(call.q)):
        for token in range(call.q.shape[1]):
            for head in range(2):

                def attend(keys, added=None, row=row, token=token, head=head):
                    logits = torch.stack(
                        [call.q[row, token, head].double() @ call.k[row, n, head].double() for n in keys]
                    )
                    logits = 0.4 * logits + bias[row, head, keys].double()
                    weights = (logits if added is None else logits + added).softmax(0)
                    return weights @ call.v[row, keys, head].double()

                keys, added = list(range(scene.words)), None
                if row >= first and maps is not None:
                    relevant = maps[(row - first) % scene.pictures, token].double()
                    relevant = relevant.clamp_min(1e-3).log()
                    added = torch.where(content[(row - first) % scene.pictures], relevant, 0.0)
                own = attend(keys, added)
                if row >= first:
                    view = grids[(row - first) // scene.pictures].flatten(1)
                    texts = []
                    for region in range(len(view)):
                        if view[region, token]:
                            start = scene.words + sum(scene.lengths[:region])
                            texts += range(start, start + scene.lengths[region])
                    if texts:
                        own = (1 - semantic) * own + semantic * attend(texts)
                out[row, token, head] = own
    return out


def boxes(rows: int, columns: int) -> list[torch.Tensor]:
    """For two views three regions each: overlapping, absent and everywhere; then one that covers everything."""
    one = torch.zeros(3, rows, columns, dtype=torch.bool)
    one[0, : rows // 2], one[1, :, columns // 2 :] = True, True
    other = torch.zeros(3, rows, columns, dtype=torch.bool)
    other[2] = True
    return [one, other]


@pytest.mark.parametrize("grid", [(3, 5), (7, 2), (1, 1)])
@pytest.mark.parametrize(("halves", "mask"), [(2, False), (1, True), (2, True)])
def test_composed_attention_equals_a_loop_over_tokens(grid, halves, mask):
    masks = boxes(6, 10)
    views = (ViewTexts((0, 0.5, 0, 1), masks[0]), ViewTexts((0.5, 1, 0, 1), masks[1]))
    scene = Scene(views, 2, WORDS, LENGTHS)
    call = call_of(halves * 4, grid, scene.tokens, mask=mask)
    composer = Composer(0.3)
    with composer.composing(scene):
        found = composer(call)
    grids = [to_grid(own, grid, "nearest-exact") for own in masks]
    torch.testing.assert_close(found.double(), reference(call, scene, 0.3, grids), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mask", [False, True])
def test_screened_attention_equals_a_loop_over_tokens(mask):
    """The view is the whole picture at the size that was recorded, so that every token has its own relevance."""
    grid, content = (3, 4), torch.tensor([[False, True, True, False], [False, True, False, False]])
    scene = Scene((ViewTexts((0, 1, 0, 1), torch.zeros(0, 1, 1, dtype=torch.bool)),), 2, WORDS, ())
    composer, low = Composer(0.5, content), call_of(4, grid, WORDS, mask=mask, seed=3)
    with composer.recording(2):
        assert composer(low) is None
    maps = composer._maps["a"].flatten(1, 2)
    torch.testing.assert_close(maps.sum(-1), torch.ones(2, 12))
    call = call_of(4, grid, WORDS, mask=mask, seed=4)
    with composer.composing(scene):
        found = composer(call)
    relevant = maps / maps.amax(1, keepdim=True)
    expected = reference(call, scene, 0.5, [torch.zeros(0, *grid)], relevant, content)
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)
    plain = reference(call, scene, 0.5, [torch.zeros(0, *grid)])
    assert (expected[2:] - plain[2:]).abs().max() > 1e-2
    assert torch.equal(expected[:2], plain[:2])


def test_a_regions_prompt_changes_its_tokens_and_no_others():
    grid, masks = (6, 10), boxes(6, 10)[0]
    scene = Scene((ViewTexts((0, 1, 0, 1), masks),), 1, WORDS, LENGTHS)
    call, composer = call_of(2, grid, scene.tokens), Composer(0.5)
    with composer.composing(scene):
        before = composer(call)
        changed = call.k.clone()
        changed[:, WORDS : WORDS + 3] *= 3.0  # the first region's prompt
        after = composer(call._replace(k=changed))
    inside = masks[0].flatten()
    assert torch.equal(after[:1], before[:1])  # the unconditional half
    assert torch.equal(after[1, ~inside], before[1, ~inside])
    assert ((after[1, inside] - before[1, inside]).abs().amax((1, 2)) > 1e-4).all()


def test_equal_prompts_and_full_weights_are_plain_attention():
    grid, everywhere = (4, 5), torch.ones(1, 4, 5, dtype=torch.bool)
    call = call_of(2, grid, 2 * WORDS)
    twice = call._replace(**{name: x[:, :WORDS].repeat(1, 2, 1, 1) for name, x in (("k", call.k), ("v", call.v))})
    scene = Scene((ViewTexts((0, 1, 0, 1), everywhere),), 1, WORDS, (WORDS,))
    composer = Composer(0.5)
    plain = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (call.q, call.k[:, :WORDS], call.v[:, :WORDS])), scale=0.4
    ).transpose(1, 2)
    with composer.composing(scene):
        torch.testing.assert_close(composer(twice), plain, atol=1e-6, rtol=0)
        whole = Composer(1.0)
        with whole.composing(scene):
            alone = call._replace(k=call.k.roll(WORDS, 1), v=call.v.roll(WORDS, 1))
            torch.testing.assert_close(whole(alone)[1:], plain[1:], atol=1e-6, rtol=0)


def test_calls_of_image_prompts_and_outside_are_left_to_the_model():
    composer = Composer(0.5)
    assert composer(call_of(2, (2, 2), WORDS)) is None
    scene = Scene((ViewTexts((0, 1, 0, 1), torch.ones(1, 2, 2, dtype=torch.bool)),), 1, WORDS, (3,))
    with composer.composing(scene):
        assert composer(call_of(2, (2, 2), 9)) is None
    assert composer(call_of(2, (2, 2), WORDS + 3)) is None
    with pytest.raises(ConfigError, match=r"is 1\.5"):
        Composer(1.5)


@pytest.mark.parametrize("name", ["sd15", "pixart"])
def test_in_a_model_a_regions_prompt_reaches_the_tokens_of_its_region_alone(name):
    """Outputs of the first cross-attention layer, behind its projections and image embedding."""
    model, grid = tiny_denoiser(name), (8, 10)
    inputs = tiny_inputs(name, (1, *grid), text=WORDS)
    texts = torch.randn(2, sum(LENGTHS), inputs["encoder_hidden_states"].shape[-1])
    masks, seen = boxes(*grid)[0], []
    first = next(module for path, module in model.named_modules() if path.endswith("attn2"))
    hook = first.register_forward_hook(lambda _m, _a, out: seen.append(out))
    composer, scene = Composer(0.5), Scene((ViewTexts((0, 1, 0, 1), masks),), 1, WORDS, LENGTHS)
    with text_attention(model, composer), composer.composing(scene):
        for change in (0.0, 1.0):
            own = texts.clone()
            own[:, LENGTHS[0] : 2 * LENGTHS[0]] += change * texts.roll(1, 1)[:, : LENGTHS[0]]
            call = {**inputs, "encoder_hidden_states": torch.cat([inputs["encoder_hidden_states"], own], 1)}
            if name == "pixart":
                call["encoder_attention_mask"] = torch.ones(2, WORDS + sum(LENGTHS))
            output(model, call)
    hook.remove()
    before, after = (out.reshape(2, grid[0] * grid[1], -1) for out in seen[:: len(seen) // 2])
    inside = masks[1].flatten()
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[1, ~inside], after[1, ~inside])
    assert ((before - after)[1, inside].abs().amax(-1) > 1e-5).all()
