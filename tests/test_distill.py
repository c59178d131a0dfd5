"""samples/distill.py and samples/compare_with_dense.py: what is trained, kept, resumed, and loaded back."""

import argparse
import csv
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor, nn

import gensparse
from gensparse.errors import ConfigError
from gensparse.methods import Clear, SlidingWindow
from gensparse.testing.tiny import tiny_call, tiny_inputs, tiny_pipeline

SAMPLES = Path(__file__).resolve().parent.parent / "samples"
WINDOW = "clear:radius=2"


@pytest.fixture(autouse=True, scope="module")
def on_path() -> Iterator[None]:
    """Scripts import the modules beside them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SAMPLES)
        yield


@pytest.fixture(scope="module")
def distill(on_path: None) -> Callable[..., Path]:
    """`python samples/distill.py --tiny ...`; returns the written file."""
    import distill as script

    return lambda *words: script.main(["--tiny", *map(str, words)])


@pytest.fixture(scope="module")
def trained(distill: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Attention weights after 40 steps with the window."""
    folder = tmp_path_factory.mktemp("trained")
    return distill("--method", WINDOW, "--steps", 40, "--lr", 3e-3, "--flow", 0, "--out", folder)


def parts() -> ModuleType:
    import distillation.losses
    import distillation.models
    import distillation.student

    return distillation


def tiny() -> Any:
    return parts().models.load_pipeline("tiny", torch.float32)


@torch.no_grad()
def velocity(model: nn.Module, grid: tuple[int, int, int] = (1, 7, 10), name: str = "flux") -> Tensor:
    return model(**tiny_inputs(name, grid, batch=1), return_dict=False)[0]


# ---------------------------------------------------------------- what comes out


def test_trained_attention_loads_back_through_clear_and_lowers_the_error(trained: Path) -> None:
    model = tiny().transformer
    dense = velocity(model)
    with gensparse.applied(model, WINDOW):
        before = (velocity(model) - dense).norm()
    with gensparse.applied(model, Clear(radius=2, weights=str(trained)), strict=True):
        after = (velocity(model) - dense).norm()
    assert after < 0.9 * before
    assert torch.equal(velocity(model), dense)
    names = {name.split(".attn.")[1] for name in load_file(trained)}
    assert names == {f"{p}.{x}" for p in ("to_q", "to_k", "to_v", "to_out.0") for x in ("weight", "bias")}
    rows = list(csv.DictReader((trained.parent / "log.csv").open()))
    assert [int(row["step"]) for row in rows] == list(range(1, 41))
    assert float(rows[-1]["rate"]) == 3e-3 > float(rows[0]["rate"])


def test_pooling_weights_are_learned_in_every_layer_and_load_back(distill: Any, tmp_path: Path) -> None:
    method = "clear:radius=2,down_factor=2"
    file = distill("--method", method, "--lr", 1e-2, "--gradient-checkpointing", "--out", tmp_path)
    pools = {name: value for name, value in load_file(file).items() if name.endswith(".attn.processor.spatial_weight")}
    model = tiny().transformer
    assert len(pools) == len(model.attn_processors)
    for pool in pools.values():
        assert pool.shape == (1, 1, 1, 2, 1, 2, 1)
        assert not torch.allclose(pool, torch.full_like(pool, 0.25), atol=1e-3)
    with gensparse.applied(model, Clear(radius=2, down_factor=2, weights=str(file)), strict=True) as handle:
        velocity(model, (1, 8, 12))
        assert handle.report()["sparse"] == len(pools)


def test_lora_loads_back_through_the_pipeline_lowers_the_error_and_keeps_the_model(
    distill: Any, tmp_path: Path
) -> None:
    window = "neighborhood:window=3"
    rates = ("--steps", 40, "--lr", 1e-2, "--flow", 0)
    file = distill("--method", window, "--train", "lora", "--rank", 8, *rates, "--out", tmp_path)
    assert {min(value.shape) for value in load_file(file).values()} == {8}
    pipe = tiny()
    dense = velocity(pipe.transformer)
    with gensparse.applied(pipe, window):
        before = (velocity(pipe.transformer) - dense).norm()
    pipe.load_lora_weights(file.parent, weight_name=file.name)
    with gensparse.applied(pipe, window):
        after = (velocity(pipe.transformer) - dense).norm()
    assert after < 0.9 * before
    pipe.unload_lora_weights()
    assert torch.equal(velocity(pipe.transformer), dense)


# ---------------------------------------------------------------- interrupted and resumed


@pytest.mark.parametrize("train", ["attention", "lora"])
def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(distill: Any, tmp_path: Path, train: str) -> None:
    common = ("--method", WINDOW, "--train", train, "--accumulate", 2, "--warmup", 3, "--data", tmp_path / "data")
    whole = load_file(distill(*common, "--steps", 5, "--out", tmp_path / "whole"))
    distill(*common, "--steps", 2, "--out", tmp_path / "parts")
    resumed = load_file(distill(*common, "--steps", 5, "--out", tmp_path / "parts", "--resume"))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    logs = [[row[3:] for row in csv.reader((tmp_path / run / "log.csv").open())] for run in ("whole", "parts")]
    assert logs[0] == logs[1]


def test_a_stop_saves_what_was_trained_and_the_run_goes_on(
    distill: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import distill as script

    asked = iter([False, False, False, True])  # two batches of samples, one step
    with monkeypatch.context() as patched:
        patched.setattr(script.Interrupt, "__call__", lambda self: next(asked))
        distill("--method", WINDOW, "--out", tmp_path)
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 1
    with pytest.raises(ConfigError, match="--resume"):
        distill("--method", WINDOW, "--out", tmp_path)
    with pytest.raises(ConfigError, match="another method"):
        distill("--method", "clear:radius=3", "--out", tmp_path, "--resume")
    distill("--method", WINDOW, "--out", tmp_path, "--resume")
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 4


def test_samples_of_other_settings_are_refused_and_finished_ones_kept(distill: Any, tmp_path: Path) -> None:
    distill("--method", WINDOW, "--steps", 1, "--out", tmp_path / "a", "--data", tmp_path / "data")
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "data").glob("*.safetensors")}
    distill("--method", "clear:radius=3", "--steps", 1, "--out", tmp_path / "b", "--data", tmp_path / "data")
    assert times == {path: path.stat().st_mtime_ns for path in (tmp_path / "data").glob("*.safetensors")}
    with pytest.raises(ConfigError, match="call"):
        distill("--call", "num_inference_steps=3", "--out", tmp_path / "c", "--data", tmp_path / "data")


# ---------------------------------------------------------------- what it refuses


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("clear:weights=file.safetensors", "without"),
        ("schedule:0=clear:radius=2;1=clear:radius=3", "phases one by one"),
        ("auto", "leaves every layer dense .*auto: dense is cheaper"),
    ],
)
def test_methods_that_cannot_be_trained_say_why(distill: Any, tmp_path: Path, method: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        distill("--method", method, "--out", tmp_path)


@pytest.mark.parametrize("family", ["sdxl", "lumina2"])
def test_models_that_do_not_flow_from_noise_to_data_are_refused(family: str) -> None:
    with pytest.raises(ConfigError, match="cannot be distilled"):
        parts().models.check_trainable(tiny_pipeline(family))


# ---------------------------------------------------------------- the parts


@pytest.mark.parametrize("family", ["sd3", "chroma"])
def test_other_families_learn_by_the_same_code(family: str, tmp_path: Path) -> None:
    from distillation.cache import SampleCache
    from distillation.lesson import Lesson

    pipe = tiny_pipeline(family)
    pipe.set_progress_bar_config(disable=True)
    model = parts().models.check_trainable(pipe)
    call = {k: v for k, v in tiny_call(family).items() if k not in ("prompt", "output_type")} | {"negative_prompt": ""}
    cache = SampleCache(tmp_path, {}, 1)
    cache.make(pipe, 0, ["a cat", "a dog"], call, 5)
    assert len(cache.lessons) == {"sd3": 1, "chroma": 2}[family]  # guidance in one batch, or call by call
    sites = parts().losses.attention_sites(model)
    student = parts().student.AttentionStudent(model, sites, SlidingWindow(radius=2))
    options = argparse.Namespace(noise="schedule", flow=1.0, prediction=0.5, attention=0.5, watch_every=1)
    lesson = Lesson(options, pipe, student, Accelerator(mixed_precision="no"))
    sample = cache.read(*cache.lessons[-1])
    found = lesson(model, sample, torch.Generator().manual_seed(0))
    assert all(term > 0 for term in found)
    assert all(parameter.grad is not None for parameter in student.parameters.values())


def test_the_first_step_is_recorded_as_the_pipeline_ran_it(tmp_path: Path) -> None:
    from distillation.cache import SampleCache

    pipe, call = tiny(), {**tiny_call("flux"), "num_inference_steps": 3}
    prompts, call = ["a cat", "a dog"], {k: v for k, v in call.items() if k not in ("prompt", "output_type")}
    cache = SampleCache(tmp_path, {}, 1)
    cache.make(pipe, 0, prompts, call, 7)
    sample = cache.read(0, 0)
    generators = [torch.Generator().manual_seed(seed) for seed in (7, 8)]
    latents = pipe(prompts, generator=generators, output_type="latent", return_dict=False, **call)[0]
    assert torch.equal(sample.latents, latents)
    with torch.no_grad():
        text, pooled, _ = pipe.encode_prompt(prompts, None, max_sequence_length=16)
    assert torch.equal(sample.call["encoder_hidden_states"], text)
    assert torch.equal(sample.call["pooled_projections"], pooled)
    assert sample.time_unit == 1.0
    assert sample.levels == tuple(pipe.scheduler.sigmas.tolist())


def test_the_teacher_keeps_the_weights_the_model_came_with() -> None:
    pipe = tiny()
    model = pipe.transformer
    dense, sites = velocity(model), parts().losses.attention_sites(model)
    for student in (
        parts().student.AttentionStudent(model, sites, Clear()),
        parts().student.LoraStudent(pipe, model, sites, 2, Clear()),
    ):
        with torch.no_grad():
            for parameter in student.parameters.values():
                parameter.add_(0.3)
        trained = velocity(model)
        assert not torch.equal(trained, dense)
        with student.teacher():
            torch.testing.assert_close(velocity(model), dense, atol=1e-6, rtol=0)
        assert torch.equal(velocity(model), trained)
        student.restore({name: value - 0.3 for name, value in student.state().items()})


def test_watched_sites_are_every_fourth_that_lies_in_a_single_block() -> None:
    model = tiny_pipeline("flux", double_blocks=3, single_blocks=7).transformer
    chosen = parts().losses.watched_sites(model, 4)
    assert chosen == [f"single_transformer_blocks.{i}.attn" for i in (1, 5)]  # sites 4 and 8 of the model
    sd3 = tiny_pipeline("sd3").transformer
    assert parts().losses.watched_sites(sd3, 2) == parts().losses.attention_sites(sd3)[::2]


def test_a_watch_collects_outputs_inside_its_block_only() -> None:
    model = tiny().transformer
    watch = parts().losses.Watch(model, parts().losses.watched_sites(model, 1))
    with watch as seen:
        velocity(model)
    velocity(model)
    assert [tuple(x.shape) for x in seen] == [(1, 75, 32)] * 3


def test_losses_are_the_three_mean_squares() -> None:
    ones = torch.ones(2, 3)
    found = parts().losses.losses(ones, 3 * ones, 4 * ones, [ones, ones], [2 * ones, 6 * ones])
    assert [term.item() for term in found] == [4, 9, 13]
    assert found.weighted((1.0, 0.5, 2.0)).item() == 4 + 4.5 + 26


def test_noise_levels_follow_the_steps_of_the_pipeline() -> None:
    levels = (1.0, 0.9, 0.3, 0.0)
    drawn = parts().losses.noise_levels(4000, levels, "schedule", torch.Generator().manual_seed(0))
    shares = [((drawn <= high) & (drawn > low)).float().mean() for high, low in itertools.pairwise(levels)]
    torch.testing.assert_close(torch.stack(shares), torch.full((3,), 1 / 3), atol=0.03, rtol=0)
    normal = parts().losses.noise_levels(4000, levels, "normal", torch.Generator().manual_seed(0))
    torch.testing.assert_close(normal.logit().std(), torch.tensor(1.0), atol=0.05, rtol=0)
    assert 0 < normal.min() < normal.max() < 1


# ---------------------------------------------------------------- the comparison


def test_the_comparison_finds_no_distance_for_a_whole_window_and_some_for_a_small_one(
    trained: Path, tmp_path: Path
) -> None:
    import compare_with_dense

    whole = compare_with_dense.main(["--tiny", "--method", "clear:radius=100"])[1]
    assert whole["velocity_error"].value < 1e-4
    assert whole["psnr_db"].value > 60
    out, sheet = tmp_path / "rows.json", tmp_path / "sheet.png"
    rows = compare_with_dense.main(
        [
            "--tiny",
            "--method",
            WINDOW,
            "--trained",
            str(trained),
            "--dense-too",
            "--out",
            str(out),
            "--sheet",
            str(sheet),
        ]
    )
    assert [row["attention"] for row in rows] == ["dense", WINDOW, f"{WINDOW}, trained", "dense, trained"]
    before, after, changed = (row["velocity_error"].value for row in rows[1:])
    assert before > after > 0
    assert changed > 1e-3  # the file was loaded
    assert json.loads(out.read_text())["rows"][2]["velocity_error"]["value"] == after
    assert sheet.stat().st_size > 0


def test_the_script_runs_as_users_start_it(tmp_path: Path) -> None:
    command = [sys.executable, str(SAMPLES / "distill.py"), "--tiny", "--steps", "1", "--mixed-precision", "bf16"]
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([*command, "--out", str(tmp_path)], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "step 1 of 1" in done.stdout
    assert (tmp_path / "attention.safetensors").stat().st_size > 0
