"""ControlNets beside FLUX in every stage, on tiny models whose native size is 32 pixels."""

import logging

import pytest
import torch
from diffusers import FluxControlNetImg2ImgPipeline, FluxControlNetModel, FluxControlNetPipeline
from diffusers.models.controlnets.controlnet import ControlNetConditioningEmbedding
from PIL import Image

import gensparse
from gensparse import Reference, Region
from gensparse.errors import ConfigError
from gensparse.pipelines import FluxCustomizePipeline, FluxHighresPipeline, highres_class
from gensparse.testing.tiny import tiny_pipeline
from gensparse.testing.tiny.parts import WIDTH, seeded, with_noise

KINDS = ("latents", "hints", "union", "two")
MODES = {"union": {"control_mode": 1}}
SITES = {"latents": 2, "hints": 2, "union": 2, "two": 4}


def net(kind: str = "latents", seed: int = 1) -> FluxControlNetModel:
    """One double and one single block; with "hints" it reads pixels, 4 for a token, with "union" one of 3 modes."""
    with seeded(seed):
        model = FluxControlNetModel(
            patch_size=1,
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=WIDTH,
            pooled_projection_dim=WIDTH,
            axes_dims_rope=(4, 4, 8),
            num_mode=3 if kind == "union" else None,
            conditioning_embedding_channels=16 if kind == "hints" else None,
        )
        if kind == "hints":
            model.input_hint_block = ControlNetConditioningEmbedding(16, 3, (16, 16, 16))
        return with_noise(model).eval()


@pytest.fixture(scope="module")
def nets():
    return {**{kind: net(kind) for kind in KINDS[:3]}, "two": [net(seed=1), net(seed=2)]}


@pytest.fixture
def controlled(stock, nets):
    """kind -> (diffusers' pipeline, ours)."""

    def build(kind: str):
        parts = {name: part for name, part in stock.components.items() if name != "controlnet"}
        plain = FluxControlNetPipeline(**parts, controlnet=nets[kind])
        pipe = FluxHighresPipeline.from_pipe(plain)
        for one in (plain, pipe):
            one.set_progress_bar_config(disable=True)
        return plain, pipe

    return build


def picture(height: int = 40, width: int = 24, seed: int = 5) -> torch.Tensor:
    return torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(seed))


def shown(kind: str, *size: int):
    return [picture(*size), picture(*size, seed=6)] if kind == "two" else picture(*size)


def latents_of(pipe, **arguments) -> list[torch.Tensor]:
    """Latents of every stage."""
    found = []
    pipe(**arguments, callback_on_stage_end=lambda p, result: found.append(result.latents))
    return found


# --- the native size


def test_native_size_is_diffusers_pipeline_to_the_bit(controlled, call):
    plain, pipe = controlled("hints")
    given = Image.fromarray((picture(28, 36)[0].movedim(0, -1) * 255).byte().numpy())
    more = {"height": 28, "width": 36, "control_image": given, "controlnet_conditioning_scale": 0.7}
    more |= {"control_guidance_start": 0.25, "control_guidance_end": 0.75}
    more |= {"negative_prompt": "red", "true_cfg_scale": 2.5}
    assert torch.equal(pipe(**call(**more)).images, plain(**call(**more)).images)


@pytest.mark.parametrize("kind", ["latents", "union", "two"])
def test_native_size_is_diffusers_pipeline_but_for_the_sampled_control(controlled, call, kind, monkeypatch):
    """diffusers draws the control latents; ours are the mode, so that they draw nothing."""
    plain, pipe = controlled(kind)
    encode = pipe.vae.encode

    def certain(x, *args, **kwargs):
        out = encode(x, *args, **kwargs)
        monkeypatch.setattr(out.latent_dist, "sample", lambda generator=None: out.latent_dist.mode())
        return out

    monkeypatch.setattr(pipe.vae, "encode", certain)
    given = [x * 2 - 1 for x in shown(kind, 32, 32)] if kind == "two" else shown(kind, 32, 32) * 2 - 1
    more = {"height": 32, "width": 32, **MODES.get(kind, {})}
    # a list of scales: diffusers has no other form for several nets
    more |= {"controlnet_conditioning_scale": [0.9, 0.4]} if kind == "two" else {}
    expected = plain(**call(**more, control_image=given)).images
    images = pipe(**call(**more, control_image=shown(kind, 32, 32))).images
    torch.testing.assert_close(images, expected, rtol=0, atol=2e-5)


# --- the cascade


@pytest.mark.parametrize("kind", KINDS)
def test_scale_0_is_no_control_and_scale_1_changes_every_stage(controlled, call, kind):
    _, pipe = controlled(kind)
    height, width = (124, 76) if kind == "latents" else (60, 44)
    more = {"height": height, "width": width, "attention": "neighborhood:window=5x3"}
    planned = pipe.plan(height, width, 4)
    assert any(stage.patch_shift for stage in planned)
    control = {"control_image": shown(kind), **MODES.get(kind, {})}
    without = latents_of(pipe, **call(**more))
    alone = [report["sparse"] for report in pipe.attention_report if "sparse" in report]
    none = latents_of(pipe, **call(**more, **control, controlnet_conditioning_scale=0.0))
    full = latents_of(pipe, **call(**more, **control))
    assert len(without) == len(planned) == (3 if kind == "latents" else 2)
    assert all(torch.equal(a, b) for a, b in zip(without, none, strict=True))
    assert all(float((a - b).abs().max()) > 1e-3 for a, b in zip(without, full, strict=True))
    first, *larger = pipe.attention_report
    assert first["method"] == "dense"
    assert "sparse" not in first
    assert (
        [report["sparse"] for report in larger] == [n + SITES[kind] for n in alone] == [2 + SITES[kind]] * len(larger)
    )
    for report in larger:
        assert report["dense"] == report["calls"]["dense"] == {}
        assert sum(own["sparse"] for own in report["beside"]) == SITES[kind]
        assert report["calls"]["sparse"] > sum(own["calls"]["sparse"] for own in report["beside"]) > 0


def test_the_control_picture_comes_in_the_size_of_each_stage(controlled, call, nets):
    _, pipe = controlled("hints")
    seen = []
    look = nets["hints"].register_forward_pre_hook(
        lambda m, a, k: seen.append((tuple(k["controlnet_cond"].shape[-2:]), k["hidden_states"].shape[1])),
        with_kwargs=True,
    )
    try:
        pipe(**call(height=64, width=64, control_image=picture(), attention="dense"))
    finally:
        look.remove()
    assert pipe.plan(64, 64, 4)[1].patch_shift
    assert list(dict.fromkeys(seen)) == [((32, 32), 64), ((68, 68), 289), ((64, 64), 256)]


def test_positions_are_the_transformers_and_all_is_taken_out_again(controlled, call, nets):
    _, pipe = controlled("latents")
    own, seen = (pipe.transformer.pos_embed, nets["latents"].pos_embed), []

    def look(p, i, t, values):
        seen.append((p.stage, nets["latents"].pos_embed is p.transformer.pos_embed))
        p._interrupt = len(seen) == 6
        return values

    pipe(**call(height=128, width=128, control_image=picture(), attention="clear:radius=3", callback_on_step_end=look))
    assert set(seen) == {(0, False), (1, True), (2, True)} or set(seen) == {(0, False), (1, True)}
    assert (pipe.transformer.pos_embed, nets["latents"].pos_embed) == own
    assert not nets["latents"]._forward_pre_hooks
    assert not pipe.transformer._forward_pre_hooks


def test_window_over_the_whole_grid_equals_dense(controlled, call):
    _, pipe = controlled("union")
    more = {"height": 64, "width": 48, "control_image": picture(), "control_mode": 2}
    dense = pipe(**call(**more, attention="dense")).images
    window = pipe(**call(**more, attention="neighborhood:window=99x99")).images
    torch.testing.assert_close(window, dense, rtol=0, atol=1e-4)


def test_what_was_applied_beforehand_stays(controlled, call, nets):
    _, pipe = controlled("latents")
    more = {"height": 64, "width": 64, "control_image": picture()}
    with gensparse.applied(pipe, "clear:radius=3"), gensparse.applied(nets["latents"], "clear:radius=2") as own:
        pipe(**call(**more))
        assert own.active
        assert [report["sparse"] for report in pipe.attention_report] == [4, 4]
        assert own.report()["method"]["radius"] == 2


def test_nets_are_not_run_behind_their_end(controlled, call, nets):
    _, pipe = controlled("latents")
    calls = []
    look = nets["latents"].register_forward_pre_hook(lambda m, a, k: calls.append(pipe.stage), with_kwargs=True)
    more = {"height": 64, "width": 64, "control_image": picture(), "attention": "dense"}
    try:
        pipe(**call(**more, control_guidance_end=0.75))
    finally:
        look.remove()
    steps = pipe.plan(64, 64, 4)[1].steps
    assert (calls.count(0), calls.count(1)) == (3, steps - 1)


def test_pictures_of_your_own_and_direct_sizes_are_controlled_too(stock, controlled, call, nets):
    parts = {n: p for n, p in stock.components.items() if n in FluxControlNetPipeline.__init__.__code__.co_varnames}
    parts = {n: p for n, p in parts.items() if n not in ("image_encoder", "feature_extractor", "controlnet")}
    pipe = FluxHighresPipeline.from_pipe(FluxControlNetImg2ImgPipeline(**parts, controlnet=nets["latents"]))
    pipe.set_progress_bar_config(disable=True)
    assert pipe.controlnet is nets["latents"]
    for own in ({"image": picture(30, 30), "strength": 0.6}, {"highres": "direct"}, {"highres": "clear"}):
        more = {"height": 60, "width": 44, "attention": "dense", **own}
        assert not torch.equal(pipe(**call(**more)).images, pipe(**call(**more, control_image=picture())).images)


# --- arguments


def test_arguments_that_do_not_fit_are_refused_before_the_first_step(controlled, pipe, call, monkeypatch):
    monkeypatch.setattr(pipe.transformer, "forward", lambda *a, **k: pytest.fail("the model ran"))
    one = {"height": 64, "width": 64, "control_image": picture()}
    with pytest.raises(ConfigError, match="no ControlNet"):
        pipe(**call(**one))
    for kind, wrong, match in (
        ("union", {}, "control_mode=None is not allowed; this union ControlNet takes 0 to 2"),
        ("union", {"control_mode": 3}, "0 to 2"),
        ("latents", {"control_mode": 1}, "no union"),
        ("latents", {"controlnet_conditioning_scale": float("nan")}, "conditioning_scale"),
        ("latents", {"controlnet_conditioning_scale": [1.0, 0.5]}, "2 values for 1"),
        ("latents", {"control_guidance_start": 0.6, "control_guidance_end": 0.5}, "control_guidance_start"),
        ("latents", {"control_image": picture()[:, :2]}, "RGB"),
        ("latents", {"highres": "scale_dit"}, "anchors"),
        ("two", {}, "2 ControlNets, but 1 control"),
    ):
        with pytest.raises(ConfigError, match=match):
            controlled(kind)[1](**call(**{**one, **wrong}))


def test_subjects_and_control_pictures_are_not_combined(stock, nets, call):
    parts = {name: part for name, part in stock.components.items() if name != "controlnet"}
    pipe = FluxCustomizePipeline.from_pipe(FluxControlNetPipeline(**parts, controlnet=nets["latents"]))
    pipe.set_progress_bar_config(disable=True)
    cat = Reference("cat", Image.new("RGB", (16, 16), "red"))
    with pytest.raises(ConfigError, match="ControlNets have no references"):
        pipe(**call(height=32, width=32, control_image=picture(), subjects=[cat]))


def test_a_pipeline_with_its_controlnet_is_saved_and_loaded(controlled, call, tmp_path):
    _, pipe = controlled("latents")
    more = {"height": 32, "width": 32, "control_image": picture()}
    pipe.save_pretrained(tmp_path)
    again = FluxHighresPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    torch.testing.assert_close(again(**call(**more)).images, pipe(**call(**more)).images, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["sdxl", "sd3"])
def test_a_controlnet_that_no_stage_runs_is_said(caplog, name):
    stock = tiny_pipeline(name)
    stock.controlnet = net()
    with caplog.at_level(logging.WARNING, logger="gensparse"):
        highres_class(stock).from_pipe(stock)
    assert "is left out" in caplog.text


def test_regions_are_controlled_as_a_whole(stock, nets, call):
    parts = {name: part for name, part in stock.components.items() if name != "controlnet"}
    pipe = FluxCustomizePipeline.from_pipe(FluxControlNetPipeline(**parts, controlnet=nets["latents"]))
    pipe.set_progress_bar_config(disable=True)
    given = {"height": 24, "width": 40, "control_image": picture(24, 40), "num_inference_steps": 2}
    plain = pipe(**call(**given, prompt="a dog")).images
    assert torch.equal(pipe(**call(**given), regions=[Region("a dog", box=(0, 0, 1, 1))]).images, plain)
    given |= {"height": 64, "width": 96, "highres": "none"}
    with pytest.raises(ConfigError, match="in windows"):
        pipe(**call(**given), regions=[Region("a dog", box=(0, 0, 1, 1))])
