"""The embedded UNet: its training in a few steps, the pipeline it becomes, and what is said while it is not there."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny, StableDiffusionXLPipeline

import gensparse
from gensparse.embedded import embedded_notes, embedded_path, load_embedded, load_folder, loader
from gensparse.embedded.quality import prompt_fidelity, share_right
from gensparse.embedded.reader import Reader
from gensparse.embedded.scenes import caption, parse_caption, random_scene
from gensparse.engine import execute, open_model
from gensparse.engine.plans import planned_stages
from gensparse.engine.resolve import resolve_request
from gensparse.errors import ConfigError, ModelError
from gensparse.families import family_of
from gensparse.families.published import PUBLISHED
from gensparse.families.sizes import unet_sizes
from gensparse.models import REGISTRY, resolve
from gensparse.pipelines import SDXLHighresPipeline
from gensparse.request import GenerateRequest

SAMPLES = Path(__file__).resolve().parents[2] / "samples" / "embedded"
PICTURES = 6


class Scripts:
    """The training scripts, which import each other as a user runs them."""

    def __init__(self):
        import encode
        import export
        import text
        import text_meaning
        import transformer
        import unet

        self.encode, self.export, self.text, self.text_meaning = encode, export, text, text_meaning
        self.transformer, self.unet = transformer, unet


@pytest.fixture(scope="module")
def scripts():
    before = set(sys.modules)
    sys.path.insert(0, str(SAMPLES))
    try:
        yield Scripts()
    finally:
        sys.path.remove(str(SAMPLES))
        for name in set(sys.modules) - before:
            file = getattr(sys.modules[name], "__file__", None)
            if file is not None and Path(file).parent == SAMPLES:
                del sys.modules[name]


@pytest.fixture(scope="module")
def vae():
    return AutoencoderTiny.from_pretrained(embedded_path() / "vae").eval()


@pytest.fixture(scope="module")
def latents(scripts, vae, tmp_path_factory):
    """A folder with one small shard of every kind, of close-ups with two windows."""
    folder, tokens = tmp_path_factory.mktemp("latents"), scripts.text.Tokens()
    grids = {"native": ((16, 16), 1.0), "whole": ((8, 8), 2.0), "wide": ((12, 21), 1.0)}
    for kind, grid in grids.items():
        drawn = scripts.encode.whole_pictures(tokens, range(PICTURES), *grid)
        np.savez(folder / f"{kind}-000.npz", **scripts.encode.finish(vae, drawn))
    drawn = scripts.encode.close_pictures(tokens, 40, PICTURES, PICTURES // 2)
    np.savez(folder / "close-000.npz", **scripts.encode.finish(vae, drawn))
    return folder


@pytest.fixture(scope="module")
def captions(scripts):
    return scripts.text.CaptionPair()


def options(scripts, run, latents, *more):
    return scripts.unet.read_options(["--run", str(run), "--latents", str(latents), "--whole-steps", "0", *more])


def trained(scripts, captions, run, latents, steps):
    """The state after so many steps, all restarts in this folder together."""
    args = options(scripts, run, latents, "--steps", str(steps))
    state = scripts.unet.new_run(args, captions)
    state.load()
    scripts.unet.train(state, args)
    return state


@pytest.fixture
def small_batches(scripts, monkeypatch):
    monkeypatch.setattr(scripts.unet, "BATCH", dict.fromkeys(scripts.unet.BATCH, 2))


def test_training_goes_on_where_it_stopped(scripts, captions, latents, small_batches, tmp_path):
    for name in ("once", "twice"):
        (tmp_path / name).mkdir()
    once = trained(scripts, captions, tmp_path / "once", latents, 2)
    for steps in (1, 2):
        twice = trained(scripts, captions, tmp_path / "twice", latents, steps)
    assert (once.step, twice.step) == (2, 2)
    for name, value in once.model.state_dict().items():
        torch.testing.assert_close(twice.model.state_dict()[name], value, atol=1e-6, rtol=1e-5)
    for name, value in once.ema.items():
        torch.testing.assert_close(twice.ema[name], value, atol=1e-6, rtol=1e-5)
    rows = [line.split(",") for line in (tmp_path / "once" / "unet.csv").read_text().splitlines()]
    assert [int(row[0]) for row in rows] == [1, 2]
    assert all(np.isfinite([float(x) for x in row[3:]]).all() for row in rows)


@pytest.mark.parametrize("kind", ["whole", "native", "wide", "close"])
def test_every_weight_that_the_pipeline_uses_learns_from_every_kind(scripts, captions, latents, small_batches, kind):
    unet = scripts.unet
    args = options(scripts, latents, latents)
    run = unet.new_run(args, captions)
    with torch.no_grad():  # branches that start at zero would hide what is behind them
        for parameter in run.model.unet.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    pictures = unet.Collection(latents, [kind], run.rng, "cpu").pick({kind: 1.0}, look=True)
    label, loss, numbers = unet.outcome(run, pictures.batch(2), unet.Noise("cpu"), run.model)
    loss.backward()
    assert label == kind
    assert loss.isfinite()
    assert all(number > 0 for number in numbers)
    idle = {name for name, p in run.model.named_parameters() if p.grad is None or not p.grad.any()}
    # SDXL reads the last layer but one of the first encoder
    assert {name for name in idle if not name.startswith(("clip.encoder.layers.1.", "clip.final_layer_norm."))} == set()


def test_a_folder_without_pictures_says_so(scripts, captions, tmp_path):
    args = options(scripts, tmp_path, tmp_path)
    with pytest.raises(ConfigError, match=r"encode\.py"):
        scripts.unet.train(scripts.unet.new_run(args, captions), args)


def test_the_rate_is_level_and_falls_at_the_end_only(scripts):
    rate = scripts.unet.rate
    assert [rate(step, 50.0, 30.0) for step in (0, 49, 99, 5000)] == [0.01, 0.5, 1.0, 1.0]
    assert [rate(5000, left, 30.0) for left in (30.0, 15.0, 0.0, -1.0)] == [1.0, 0.5, 0.0, 0.0]
    assert rate(5000, 0.0, 0.0) == 1.0  # a run that shall be continued


def test_latents_are_unpacked_as_they_were_packed(scripts):
    cells = torch.randn(2, 8, 24, 42)
    tokens = torch.from_numpy(scripts.encode.pack(cells)).float()
    torch.testing.assert_close(scripts.unet.unpack(tokens, 12), cells.half().float())


def test_sizes_say_where_a_close_up_is(scripts):
    ids = torch.zeros(256, 3)
    ids[:, 1:] = torch.from_numpy(scripts.encode.grid_ids(16, 16, 1 / 4, top=5, left=48))
    sizes, hidden = scripts.unet.say_sizes("close", ids, 64, np.random.default_rng(0))
    assert 0 < hidden.sum() < 64
    assert sizes[~hidden].unique(dim=0).tolist() == [[1024, 1024, 80, 768, 1024, 1024]]
    assert sizes[hidden].unique(dim=0).tolist() == [[1024, 1024, 0, 0, 1024, 1024]]


def test_whole_pictures_say_their_own_size_or_a_larger_one(scripts):
    ids = torch.zeros(12 * 21, 3)
    ids[:, 1:] = torch.from_numpy(scripts.encode.grid_ids(12, 21, 1.0))
    sizes, hidden = scripts.unet.say_sizes("wide", ids, 200, np.random.default_rng(0))
    own = (sizes == torch.tensor([192.0, 336, 0, 0, 192, 336])).all(1)
    assert 0.5 < own.float().mean() < 0.9
    assert (sizes[~own, 0] > 192).all()
    assert (sizes[~own, 0] <= 16 * 192).all()
    assert not sizes[:, 2:4].any()
    assert not hidden.any()
    small = torch.zeros(64, 3)
    small[:, 1:] = torch.from_numpy(scripts.encode.grid_ids(8, 8, 2.0))
    sizes, _ = scripts.unet.say_sizes("whole", small, 50, np.random.default_rng(0))
    assert sizes.unique(dim=0).tolist() == [[128, 128, 0, 0, 128, 128]]


def test_noise_levels_are_those_of_the_scheduler(scripts):
    levels, scheduler = scripts.unet.Noise("cpu"), scripts.unet.scheduler()
    torch.manual_seed(0)
    hidden = torch.arange(4000) % 2 == 0
    timesteps, sigmas = levels.draw("close", hidden)
    assert sigmas[hidden].max() <= 1.01
    assert sigmas.max() == levels.sigmas[-1] > 25
    assert ((timesteps >= 0) & (timesteps < 1000)).all()
    scheduler.set_timesteps(1000)
    at = {int(t): float(s) for t, s in zip(scheduler.timesteps, scheduler.sigmas, strict=False)}
    assert all(at[int(t)] == pytest.approx(float(s), rel=1e-4) for t, s in zip(timesteps, sigmas, strict=True))


def test_the_training_reads_captions_as_the_pipeline_does(scripts, captions, vae):
    model = scripts.unet.Model(captions).eval()
    pipe = scripts.export.sdxl_pipeline(model, captions, vae)
    texts = [caption(random_scene(seed)) for seed in range(3)] + [""]
    with torch.no_grad():
        words, pooled = model.encode(*captions(texts))
        own, negative, own_pooled, negative_pooled = pipe.encode_prompt(texts[:3], do_classifier_free_guidance=True)
    torch.testing.assert_close(own, words[:3])
    torch.testing.assert_close(own_pooled, pooled[:3])
    torch.testing.assert_close(negative, words[3:].expand(3, -1, -1))
    torch.testing.assert_close(negative_pooled, pooled[3:].expand(3, -1))


@pytest.mark.parametrize("model", ["unet", "flux"])
def test_text_encoders_start_from_what_captions_taught_them(scripts, captions, latents, tmp_path, model):
    scripts.text_meaning.main(["--run", str(tmp_path), "--model", model, "--steps", "2", "--batch", "4"])
    kept = torch.load(tmp_path / "text.pt", weights_only=True)
    if model == "unet":
        run = scripts.unet.new_run(options(scripts, tmp_path, latents), captions)
    else:
        run = scripts.transformer.new_run(scripts.transformer.read_options(["--run", str(tmp_path)]))
    assert set(kept) == {"clip", "clip_2" if model == "unet" else "t5"}
    for part, state in kept.items():
        own = getattr(run.model, part).state_dict()
        assert all(value.isfinite().all() and torch.equal(own[name], value) for name, value in state.items())


# ---------------------------------------------------------------- what it becomes


@pytest.fixture(scope="module")
def folder(scripts, captions, vae, tmp_path_factory):
    """A pipeline folder of untrained weights, written by the code that writes trained ones."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("unet_model")
    pipe = scripts.export.sdxl_pipeline(scripts.unet.Model(captions), captions, vae)
    torch.nn.init.normal_(pipe.unet.conv_out.weight, std=0.1)
    scripts.export.write(pipe, path, scripts.export.KINDS["unet"].notes)
    for part in (vae, pipe.unet):
        part.to(torch.float32)
    return path


@pytest.fixture(scope="module")
def pipe(folder):
    pipe = SDXLHighresPipeline.from_pipe(load_folder(folder))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_the_folder_is_small_and_complete(folder):
    files = [f for f in folder.rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) <= 25e6
    assert not {f.suffix for f in files} & {".bin", ".pt", ".pkl", ".ckpt", ".py"}
    assert not [f for f in files if f.suffix == ".json" and "_name_or_path" in f.read_text()]
    plain = StableDiffusionXLPipeline.from_pretrained(folder)
    assert (plain.vae_scale_factor, plain.default_sample_size) == (8, 32)
    assert plain.tokenizer.model_max_length == plain.tokenizer_2.model_max_length == 77
    assert plain.tokenizer_2.pad_token == "!"
    assert plain.scheduler.config.prediction_type == "epsilon"


def test_it_has_the_blocks_of_sdxl(pipe):
    config = pipe.unet.config
    assert tuple(config.down_block_types) == ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D")
    assert config.addition_embed_type == "text_time"
    assert pipe.native.cells == 32
    assert pipe.native_size == 256
    levels = family_of(pipe.unet).sites(pipe.unet, [name for name, _ in pipe.unet.named_modules()])
    assert set(levels.values()) == {"level1", "level2"}


def call(pipe, size=256, **more):
    return pipe(
        "a red circle on a blue background",
        height=size,
        width=size,
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
        **more,
    ).images[0]


@pytest.mark.parametrize("way", ["cascade", "freescale", "demofusion", "rectifiedhr"])
def test_every_way_to_a_larger_picture_runs(pipe, way):
    picture = call(pipe, 384, highres=way)
    assert picture.shape == (384, 384, 3)
    assert np.isfinite(picture).all()


def test_hidiffusion_reduces_its_deep_features(folder):
    pipe = load_folder(folder)
    pipe.set_progress_bar_config(disable=True)
    plain = call(pipe, 384)
    with gensparse.applied(pipe, "hidiffusion") as handle:
        picture = call(pipe, 384)
        report = handle.report()
    assert report["raunet"]["block"] == [0]
    assert report["sparse"] == 5  # the attention of the 2 + 3 pairs of the second level
    assert np.isfinite(picture).all()
    assert np.abs(picture - plain).max() > 1e-3
    assert np.array_equal(call(pipe, 384), plain)


def test_the_engine_knows_the_folder_and_makes_its_pictures(folder):
    info = resolve(str(folder)).info
    assert (info.family, info.native_size, info.steps, info.guidance) == ("sdxl", 256, 25, 5.0)
    job = GenerateRequest(prompt="a red circle", model=str(folder), steps=1, seed=(3,), dtype="fp32", device="cpu")
    (output,) = execute(job).outputs
    assert output.image.size == (256, 256)


def test_the_registered_sizes_are_those_that_are_trained(scripts):
    built = scripts.unet.build_unet().config
    for name, value in PUBLISHED["embedded-unet"].items():
        if not name.startswith("_"):
            assert built[name] == value, name
    listed = REGISTRY["embedded-unet"]
    assert listed.native_size == 256
    assert listed.architecture.transformer_params == unet_sizes(built, {}).transformer_params


# ---------------------------------------------------------------- as it ships


def test_an_unknown_kind_names_the_known_ones():
    with pytest.raises(ConfigError, match="unet"):
        embedded_path("une")


def test_the_shipped_one_is_complete():
    pipe = load_embedded(kind="unet")
    assert isinstance(pipe, StableDiffusionXLPipeline)
    assert pipe.unet.config.sample_size * pipe.vae_scale_factor == embedded_notes("unet")["native_size"]
    assert sum(f.stat().st_size for f in embedded_path("unet").rglob("*") if f.is_file()) <= 25e6


def test_the_shipped_one_draws_what_the_words_say():
    pipe = load_embedded(kind="unet")
    words = "a red circle left of a blue star on a green striped background"
    noise = torch.Generator().manual_seed(0)
    picture = pipe(words, num_inference_steps=25, guidance_scale=5.0, generator=noise).images[0]
    assert share_right([prompt_fidelity(Reader.load().read(picture), parse_caption(words))]) > 0.85


def test_a_missing_one_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(loader._FOLDERS, "unet", "not_there")
    with pytest.raises(ModelError, match=r"embedded-unet.*train\.py"):
        load_embedded(kind="unet")
    with pytest.raises(ModelError, match="embedded-unet"):
        open_model(GenerateRequest(model="embedded-unet"))


def test_its_own_cascade_acts_in_the_pipeline_and_in_plans():
    pipe = SDXLHighresPipeline.from_pipe(load_embedded(kind="unet"))
    again = SDXLHighresPipeline.from_pipe(pipe)
    planned = [stage.steps for stage in pipe.plan(1024, 1024, 20)]
    assert planned == [20, 5, 5] == [stage.steps for stage in again.plan(1024, 1024, 20)]
    asked = pipe.plan(1024, 1024, 20, "cascade:share=0.5")
    assert [stage.steps for stage in asked] == [20, 10, 10]
    assert asked[1].beta == 0.25  # what was not asked for is the model's
    request = GenerateRequest(model="embedded-unet", prompt="a ring", size="1024", steps=20)
    resolved = resolve_request(request, open_model(request, weights=False).info)
    assert planned_stages(resolved) == pipe.plan(1024, 1024, 20)
