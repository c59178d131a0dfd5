"""The engine on a real tiny pipeline: results, resume, cancel, retries, memory, and what is written."""

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms
from tiny_model import tiny_folder

from gensparse import engine, image_io
from gensparse.engine import Event, OutputOptions, Session, execute, open_model, resolve_request
from gensparse.engine import session as session_module
from gensparse.engine.loading import load_pipeline, parse_lora
from gensparse.engine.machine import memory_limit, pick_device, pick_dtype
from gensparse.errors import Cancelled, ConfigError, ModelError, NumericsError, OutputError, WontFitError
from gensparse.models import REGISTRY
from gensparse.request import GenerateRequest, UpscaleRequest

SIDES = [32, 64, 128]


def request(**values: Any) -> GenerateRequest:
    defaults = {
        "prompt": "a red circle",
        "model": str(tiny_folder()),
        "seed": (7,),
        "attention": "dense",
        "device": "cpu",
        "dtype": "fp32",
    }
    return GenerateRequest(**{**defaults, **values})


def run(job: Any, output: OutputOptions | None = None, **options: Any) -> engine.Result:
    return execute(job, output, **options)


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


class Steps:
    """Collects (stage, step) of every step; may set `cancel` after one of them."""

    def __init__(self, stop_after: tuple[int, int] | None = None) -> None:
        self.seen: list[tuple[int, int]] = []
        self.events: list[Event] = []
        self.cancel = threading.Event()
        self.stop_after = stop_after

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        if event.phase == "step":
            self.seen.append((event.stage, event.step))
            if self.seen[-1] == self.stop_after:
                self.cancel.set()


# ------------------------------------------------------------------------------------------------------------- results
def test_native_picture_is_written_with_its_request(tmp_path: Path) -> None:
    result = run(request(), OutputOptions(paths=(tmp_path / "a.png",)))
    assert pixels(tmp_path / "a.png").shape == (32, 32, 3)
    data = json.loads(json.dumps(result.to_dict()))
    assert data["outputs"][0] == {
        "path": str(tmp_path / "a.png"),
        "width": 32,
        "height": 32,
        "seed": 7,
        "sha256": result.outputs[0].sha256,
    }
    assert data["status"] == "ok"
    assert data["timings"]["total"] > 0
    assert data["memory"]["peak_ram_bytes"] > 1 << 20
    metadata = image_io.read_metadata(tmp_path / "a.png")
    assert metadata["request"]["prompt"] == "a red circle"
    assert metadata["request"]["steps"] == 3
    assert str(tmp_path.parent) not in json.dumps(metadata)


def test_same_request_gives_the_same_file(tmp_path: Path) -> None:
    sums = [run(request(), OutputOptions(paths=(tmp_path / f"{k}.png",))).outputs[0].sha256 for k in range(2)]
    assert sums[0] == sums[1]


def test_request_in_the_metadata_reproduces_the_picture(tmp_path: Path) -> None:
    run(request(size="48x80", steps=2), OutputOptions(paths=(tmp_path / "a.png",)))
    again = image_io.read_metadata(tmp_path / "a.png")["request"] | {"model": str(tiny_folder())}
    run(GenerateRequest.from_dict(again), OutputOptions(paths=(tmp_path / "b.png",)))
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_several_seeds_are_the_pictures_of_each_seed(tmp_path: Path) -> None:
    paths = tuple(tmp_path / f"{k}.png" for k in range(3))
    result = run(request(seed=(7,), num_images=3), OutputOptions(paths=paths))
    assert [o.seed for o in result.outputs] == [7, 8, 9]
    run(request(seed=(9,)), OutputOptions(paths=(tmp_path / "nine.png",)))
    assert paths[2].read_bytes() == (tmp_path / "nine.png").read_bytes()
    assert not np.array_equal(pixels(paths[0]), pixels(paths[1]))


def test_without_paths_the_picture_is_in_the_result() -> None:
    image = run(request()).outputs[0].image
    assert image is not None
    assert image.size == (32, 32)


def test_prompt_can_stay_out_of_the_metadata(tmp_path: Path) -> None:
    options = OutputOptions(paths=(tmp_path / "a.png",), prompt_in_metadata=False, sidecar=True)
    run(request(prompt="my secret"), options)
    assert b"my secret" not in (tmp_path / "a.png").read_bytes()
    assert "my secret" not in (tmp_path / "a.json").read_text()


def test_events_name_stages_and_count_down(tmp_path: Path) -> None:
    steps = Steps()
    run(request(size="128"), on_event=steps)
    assert [e.phase for e in steps.events][:2] == ["load", "start"]
    assert [e.width for e in steps.events if e.phase == "step" and e.step == e.steps] == SIDES
    assert all(e.stages == 3 for e in steps.events if e.phase == "step")
    left = [e.eta for e in steps.events if e.phase == "step"]
    assert all(eta is not None and eta >= 0 for eta in left)


def test_previews_of_every_stage(tmp_path: Path) -> None:
    run(request(size="128"), OutputOptions(preview_dir=tmp_path))
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"0001-stage{k + 1}-{s}x{s}.png" for k, s in enumerate(SIDES)]


# -------------------------------------------------------------------------------------------------------------- resume
def test_draft_is_continued_without_computing_it_again(tmp_path: Path) -> None:
    run(request(size="128"), OutputOptions(paths=(tmp_path / "whole.png",)))
    stages = tmp_path / "stages"
    run(request(), OutputOptions(paths=(tmp_path / "draft.png",), stages_dir=stages))
    steps = Steps()
    options = OutputOptions(paths=(tmp_path / "big.png",), also_read=(stages,))
    run(request(size="128"), options, on_event=steps)
    assert {stage for stage, _ in steps.seen} == {1, 2}
    assert np.array_equal(pixels(tmp_path / "big.png"), pixels(tmp_path / "whole.png"))


@pytest.mark.parametrize(
    ("stop", "stages"), [((0, 2), {0, 1, 2}), ((1, 1), {1, 2}), ((1, 2), {2}), ((2, 1), set())], ids=str
)
def test_interrupted_run_resumes_to_the_same_picture(tmp_path: Path, stop: tuple[int, int], stages: set[int]) -> None:
    run(request(size="128"), OutputOptions(paths=(tmp_path / "whole.png",)))
    options = OutputOptions(paths=(tmp_path / "big.png",), stages_dir=tmp_path / "stages")
    first = Steps(stop_after=stop)
    with pytest.raises(Cancelled):
        run(request(size="128"), options, on_event=first, cancel=first.cancel)
    assert not (tmp_path / "big.png").exists()
    second = Steps()
    run(request(size="128"), options, on_event=second)
    assert {stage for stage, _ in second.seen} == stages
    assert np.array_equal(pixels(tmp_path / "big.png"), pixels(tmp_path / "whole.png"))
    kept = [p.name for p in (tmp_path / "stages").rglob("*.safetensors")]
    assert kept == ["stage-0.safetensors"]


@pytest.mark.parametrize(
    "change", [{"seed": (8,)}, {"prompt": "a blue star"}, {"steps": 4}, {"guidance": 3.0}], ids=str
)
def test_stages_of_another_request_are_not_used(tmp_path: Path, change: dict) -> None:
    run(request(), OutputOptions(stages_dir=tmp_path))
    steps = Steps()
    run(request(size="64", **change), OutputOptions(stages_dir=tmp_path), on_event=steps)
    assert (0, 1) in steps.seen


def test_damaged_stage_is_computed_again(tmp_path: Path) -> None:
    run(request(), OutputOptions(stages_dir=tmp_path))
    next(tmp_path.rglob("*.safetensors")).write_bytes(b"broken")
    steps = Steps()
    run(request(size="64"), OutputOptions(stages_dir=tmp_path), on_event=steps)
    assert (0, 1) in steps.seen


def test_old_drafts_are_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gensparse.engine.stages.KEPT_PICTURES", 2)
    (tmp_path / "mine").mkdir()
    for seed in range(4):
        run(request(seed=(seed,)), OutputOptions(stages_dir=tmp_path))
    assert len(list(tmp_path.rglob("stage-0.safetensors"))) == 2
    assert (tmp_path / "mine").is_dir()
    steps = Steps()
    run(request(seed=(3,), size="64"), OutputOptions(stages_dir=tmp_path), on_event=steps)
    assert {stage for stage, _ in steps.seen} == {1}


def test_stages_that_cannot_be_kept_are_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="stage 1"):
        run(request(), OutputOptions(stages_dir=tmp_path / "file"))


# -------------------------------------------------------------------------------------------------------------- cancel
def test_cancel_before_the_first_step_and_session_stays_usable() -> None:
    job = request()
    ref = open_model(job)
    resolved = resolve_request(job, ref.info)
    session = Session(ref)
    cancel = threading.Event()
    cancel.set()
    with pytest.raises(Cancelled):
        session.run(resolved, cancel=cancel)
    assert session.run(resolved).status == "ok"


def test_finished_pictures_survive_a_cancel(tmp_path: Path) -> None:
    paths = (tmp_path / "0.png", tmp_path / "1.png")
    cancel = threading.Event()

    def stop(event: Event) -> None:
        if event.phase == "write":
            cancel.set()  # the writing that began is finished

    result = run(request(num_images=2), OutputOptions(paths=paths), on_event=stop, cancel=cancel)
    assert result.status == "cancelled"
    assert [o.path for o in result.outputs] == [str(paths[0])]
    assert paths[0].exists()
    assert not paths[1].exists()


# ------------------------------------------------------------------------------------------------------ invalid numbers
def broken_vae(when: Callable[[torch.Tensor], bool], value: float = float("nan")) -> Callable[..., Any]:
    """A loader whose decoder gives `value` everywhere when `when(output)`."""

    def load(*arguments: Any) -> Any:
        pipe = load_pipeline(*arguments)

        def spoil(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
            return torch.full_like(output, value) if when(output) else output

        pipe.vae.decoder.conv_out.register_forward_hook(spoil)
        return pipe

    return load


@pytest.mark.parametrize("size", ["32", "64"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0], ids=str)
def test_fault_25_half_precision_vae_is_retried_in_float32(tmp_path: Path, value: float, size: str) -> None:
    loader = broken_vae(lambda out: out.dtype != torch.float32, value)
    result = run(request(dtype="bf16", size=size), OutputOptions(paths=(tmp_path / "a.png",)), loader=loader)
    assert any("decoded again in fp32" in text for text in result.warnings)
    assert len(np.unique(pixels(tmp_path / "a.png"))) > 8


@pytest.mark.parametrize("value", [float("nan"), -1.0, 0.3], ids=["nan", "black", "constant"])
def test_fault_25_vae_that_stays_broken_is_a_numerics_error(tmp_path: Path, value: float) -> None:
    with pytest.raises(NumericsError, match="decoding"):
        run(request(), OutputOptions(paths=(tmp_path / "a.png",)), loader=broken_vae(lambda out: True, value))
    assert not (tmp_path / "a.png").exists()


def test_fault_25_latents_that_break_name_the_step(tmp_path: Path) -> None:
    def load(*arguments: Any) -> Any:
        pipe = load_pipeline(*arguments)
        calls = []

        def spoil(module: Any, inputs: Any, output: Any) -> Any:
            calls.append(1)
            return (output[0] * float("nan"), *output[1:]) if len(calls) > 2 else output

        pipe.transformer.register_forward_hook(spoil)
        return pipe

    with pytest.raises(NumericsError, match="step 1"):
        run(request(), loader=load)


# -------------------------------------------------------------------------------------------------------------- memory
def test_request_that_will_not_fit_is_refused_before_loading() -> None:
    def loader(*_: Any) -> Any:
        raise AssertionError("weights were loaded")

    with pytest.raises(WontFitError, match="are available"):
        run(request(size="16384", max_vram="1GiB"), loader=loader)


def test_out_of_memory_on_a_cpu_gives_advice() -> None:
    def loader(*_: Any) -> Any:
        raise MemoryError

    with pytest.raises(WontFitError, match="--size"):
        run(request(), loader=loader)


def test_out_of_memory_on_a_gpu_goes_down_the_ladder(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []

    def loader(ref: Any, dtype: str, device: str, offload: str, lora: Any) -> Any:
        tried.append(offload)
        pipe = load_pipeline(ref, dtype, "cpu", "none", lora)
        if offload != "sequential":

            def full(*_: Any) -> None:
                raise torch.OutOfMemoryError("CUDA out of memory")

            pipe.transformer.register_forward_pre_hook(full)
        return pipe

    monkeypatch.setattr(session_module, "peak_memory", lambda device: {})
    job = request()
    ref = open_model(job)
    session = Session(ref, device="cuda", loader=loader)
    result = session.run(resolve_request(job, ref.info))
    metadata = result.outputs[0].metadata
    assert metadata["run"]["tile"] == metadata["request"]["tile"] == "512"
    assert metadata["run"]["chunk"] == metadata["request"]["chunk"] == 4096
    assert tried == ["none", "model", "group", "sequential"]
    assert [text for text in result.warnings if "out of memory" in text] == [
        "out of memory: continued with --tile 512 --chunk 4096",
        *(f"out of memory: continued with --offload {name}" for name in tried[1:]),
    ]


def test_out_of_memory_keeps_finished_stages_and_takes_smaller_pieces_first(tmp_path: Path) -> None:
    """Also on CPUs. The second stage fails once; the first is not computed again, and the picture is the same."""
    loads, calls = [], []

    def loader(*arguments: Any, **more: Any) -> Any:
        loads.append(1)
        pipe = load_pipeline(*arguments, **more)

        def full_once(module: Any, inputs: Any, values: dict) -> None:
            calls.append(values["hidden_states"].shape[1])
            if calls[-1] > 64 and calls.count(calls[-1]) == 2:
                raise MemoryError

        pipe.transformer.register_forward_pre_hook(full_once, with_kwargs=True)
        return pipe

    result = run(request(size="64", tile="64", chunk=80), OutputOptions(paths=(tmp_path / "a.png",)), loader=loader)
    run(request(size="64"), OutputOptions(paths=(tmp_path / "b.png",)))
    assert loads == [1]
    native = [n for n in calls if n == 64]
    assert len(native) == 2 * 3  # guidance, three steps, computed once
    assert any("--tile 64 --chunk 20" in text for text in result.warnings)
    assert np.abs(pixels(tmp_path / "a.png").astype(int) - pixels(tmp_path / "b.png")).max() <= 1


@pytest.mark.parametrize(
    ("tile", "smaller"),
    [("auto", "512"), ("none", "512"), ("1024", "512"), ("100", "64"), ("synced:512", "synced:256")],
)
def test_smaller_tiles(tile: str, smaller: str) -> None:
    assert session_module.smaller_tile(tile) == smaller


# ---------------------------------------------------------------------------------------------- weights in fewer bits
def test_fp8_weights_are_recorded_and_repeated(tmp_path: Path) -> None:
    run(request(), OutputOptions(paths=(tmp_path / "whole.png",)))
    kept = []

    def loader(*arguments: Any, **more: Any) -> Any:
        kept.append(load_pipeline(*arguments, **more))
        return kept[-1]

    run(request(quantize="fp8"), OutputOptions(paths=(tmp_path / "a.png",)), loader=loader)
    block = kept[0].transformer.transformer_blocks[0]
    assert block.attn.to_q.weight.dtype == torch.float8_e4m3fn
    assert not np.array_equal(pixels(tmp_path / "a.png"), pixels(tmp_path / "whole.png"))
    metadata = image_io.read_metadata(tmp_path / "a.png")
    assert metadata["run"]["quantize"] == metadata["request"]["quantize"] == "fp8"
    again = GenerateRequest.from_dict(metadata["request"] | {"model": str(tiny_folder())})
    run(again, OutputOptions(paths=(tmp_path / "b.png",)))
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_int8_weights_are_stored_by_torchao(tmp_path: Path) -> None:
    run(request(), OutputOptions(paths=(tmp_path / "whole.png",)))
    kept = []

    def loader(*arguments: Any, **more: Any) -> Any:
        kept.append(load_pipeline(*arguments, **more))
        return kept[-1]

    run(request(quantize="int8"), OutputOptions(paths=(tmp_path / "a.png",)), loader=loader)
    weight = kept[0].transformer.transformer_blocks[0].attn.to_q.weight
    assert type(weight).__name__ == "Int8Tensor"
    assert (weight.qdata.dtype, weight.dtype) == (torch.int8, torch.float32)
    whole, stored = (pixels(tmp_path / f"{name}.png").astype(int) for name in ("whole", "a"))
    assert 0 < np.abs(stored - whole).max() <= 4
    assert image_io.read_metadata(tmp_path / "a.png")["run"]["quantize"] == "int8"


@pytest.mark.parametrize(("quantize", "words"), [("int8", "torchao or bitsandbytes"), ("nf4", "CUDA")])
def test_storage_that_cannot_work_here_is_refused_before_loading(
    quantize: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gensparse.engine.machine.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=words):
        resolve_request(request(quantize=quantize), open_model(request()).info)


def test_planning_for_another_machine_says_what_it_would_need(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gensparse.engine.machine.find_spec", lambda name: None)
    job = request(model="flux.1-dev", device="cuda", quantize="nf4", max_vram="16GB", size="4096", dtype="bf16")
    resolved, cost = engine.plan(job)
    assert any("pip install bitsandbytes" in text for text in resolved.warnings)
    assert cost.fits
    assert (resolved.request.offload, resolved.request.quantize, resolved.request.tile) == ("model", "nf4", "768")


def test_settings_of_memory_do_not_change_which_picture_it_is() -> None:
    one = request()
    assert one.key() == one.replace(tile="512", chunk=4096, offload="group").key()
    assert one.key() != one.replace(quantize="fp8").key()


@pytest.mark.parametrize(
    "bad",
    [{"tile": "big"}, {"tile": "32"}, {"tile": 9000}, {"chunk": -1}, {"chunk": True}, {"quantize": "int4"}],
    ids=str,
)
def test_bad_memory_settings_are_refused(bad: dict) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(bad))}|VAE tile"):
        request(**bad)


def test_memory_limit_follows_the_user() -> None:
    assert memory_limit("cpu", "24GiB") == 24 << 30
    free = memory_limit("cpu", None)
    assert free is not None
    assert free > 1 << 20


# ------------------------------------------------------------------------------------------------------------ resolving
def test_open_choices_are_filled_in() -> None:
    resolved = resolve_request(request(seed=(), size=None, steps=None), open_model(request()).info)
    job = resolved.request
    assert (job.size, job.steps, job.guidance, job.dtype) == ("32x32", 3, 2.0, "fp32")
    assert len(job.seed) == 1
    assert not resolved.warnings


@pytest.mark.parametrize(("steps", "dense"), [(1, 5), (3, 4)])
def test_fault_04_more_dense_steps_than_steps_are_clamped(steps: int, dense: int) -> None:
    resolved = resolve_request(request(steps=steps, dense_steps=dense), open_model(request()).info)
    assert resolved.request.dense_steps == steps
    assert "--dense-steps" in resolved.warnings[0]


def test_fault_05_empty_prompt_needs_a_model_that_knows_it() -> None:
    assert resolve_request(request(prompt=" "), open_model(request()).info)
    with pytest.raises(ConfigError, match="empty"):
        resolve_request(request(prompt=""), REGISTRY["flux.1-dev"])


def test_fault_05_truncated_prompt_is_counted() -> None:
    result = run(request(prompt="x" * 100))
    assert any("102 tokens" in t and "the last 86" in t for t in result.warnings), result.warnings


def test_negative_prompt_without_effect_is_said() -> None:
    resolved = resolve_request(request(negative_prompt="blur"), REGISTRY["flux.1-schnell"])
    assert "no effect" in resolved.warnings[0]
    assert not resolve_request(request(negative_prompt="blur"), open_model(request()).info).warnings


def test_unknown_method_is_refused_before_loading() -> None:
    with pytest.raises(ConfigError, match="clear"):
        resolve_request(request(attention="claer"), open_model(request()).info)


@pytest.mark.parametrize("device", ["cuda:99", "tpu", "gpu"])
def test_missing_device_is_a_config_error(device: str) -> None:
    with pytest.raises(ConfigError, match="device"):
        pick_device(device)


def test_dtype_of_each_device(monkeypatch: pytest.MonkeyPatch) -> None:
    for has, dtype in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr("gensparse.engine.machine.cpu_has_bf16", lambda has=has: has)
        assert pick_dtype("auto", "cpu") == dtype
    assert pick_dtype("fp16", "cpu") == "fp16"


def test_auto_attention_agrees_with_the_pipeline() -> None:
    from gensparse.pipelines import cascade

    info = REGISTRY["flux.1-dev"]
    assert info.dense_below == cascade.DENSE_BELOW


def test_stages_agree_with_the_pipeline() -> None:
    from gensparse.engine.resolve import stage_shapes

    for size in ("32", "128", "48x80", "200x72"):
        resolved = resolve_request(request(size=size), open_model(request()).info)
        pipe = load_pipeline(open_model(request()), "fp32", "cpu", "none", ())
        planned = pipe.plan(resolved.height, resolved.width, resolved.request.steps)
        assert [(s.height, s.width, s.steps) for s in stage_shapes(resolved)] == [
            (s.height, s.width, s.steps) for s in planned
        ]


# -------------------------------------------------------------------------------------------------------------- upscale
def photo(path: Path, height: int, width: int, mode: str = "RGB", **options: Any) -> Path:
    generator = np.random.default_rng(1)
    small = generator.integers(0, 256, (4, 5, len(mode)), dtype=np.uint8)
    Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC).save(path, **options)
    return path


def upscale(path: Path, **values: Any) -> UpscaleRequest:
    defaults = {"model": str(tiny_folder()), "seed": (1,), "attention": "dense", "device": "cpu", "image": str(path)}
    return UpscaleRequest(**{**defaults, **values})


@pytest.mark.parametrize("size", [(40, 56), (37, 41), (1, 1)], ids=str)
def test_upscaled_size_is_exact(tmp_path: Path, size: tuple[int, int]) -> None:
    source = photo(tmp_path / "in.png", *size)
    run(upscale(source), OutputOptions(paths=(tmp_path / "out.png",)))
    assert pixels(tmp_path / "out.png").shape == (2 * size[0], 2 * size[1], 3)


@pytest.mark.parametrize("kind", ["png", "webp", "tiff"])
def test_upscale_keeps_alpha_and_profile(tmp_path: Path, kind: str) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    source = photo(tmp_path / "in.png", 24, 40, "RGBA", icc_profile=profile)
    target = tmp_path / f"out.{kind}"
    run(upscale(source), OutputOptions(paths=(target,), image_format=kind))
    out = Image.open(target)
    assert (out.mode, out.size, out.info["icc_profile"]) == ("RGBA", (80, 48), profile)
    want = Image.open(source).getchannel("A").resize((80, 48), Image.Resampling.LANCZOS)
    assert np.array_equal(np.asarray(out.getchannel("A")), np.asarray(want))


def test_upscale_to_jpg_keeps_the_profile(tmp_path: Path) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    source = photo(tmp_path / "in.png", 24, 40, "RGBA", icc_profile=profile)
    run(upscale(source), OutputOptions(paths=(tmp_path / "out.jpg",), image_format="jpg"))
    out = Image.open(tmp_path / "out.jpg")
    assert (out.mode, out.info["icc_profile"]) == ("RGB", profile)


def test_upscale_follows_exif_rotation(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    source = photo(tmp_path / "in.jpg", 24, 40, exif=exif)
    run(upscale(source), OutputOptions(paths=(tmp_path / "out.png",)))
    assert Image.open(tmp_path / "out.png").size == (48, 80)


def test_upscale_metadata_names_no_folder_but_the_source(tmp_path: Path) -> None:
    source = photo(tmp_path / "in.png", 24, 40)
    run(upscale(source), OutputOptions(paths=(tmp_path / "out.png",)))
    metadata = image_io.read_metadata(tmp_path / "out.png")
    assert metadata["request"]["image"] == "in.png"
    assert len(metadata["source_sha256"]) == 64
    assert b"compositeWithTrainedAlgorithmicMedia" in (tmp_path / "out.png").read_bytes()


# ---------------------------------------------------------------------------------------------------------------- LoRA
@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("a.safetensors", ("a.safetensors", 1.0)),
        ("a.safetensors:0.5", ("a.safetensors", 0.5)),
        ("C:\\l\\a.safetensors", ("C:\\l\\a.safetensors", 1.0)),
        ("C:\\l\\a.safetensors:-1", ("C:\\l\\a.safetensors", -1.0)),
        ("owner/name:2", ("owner/name", 2.0)),
    ],
)
def test_lora_with_scale(text: str, parsed: tuple[str, float]) -> None:
    assert parse_lora(text) == parsed


@pytest.mark.parametrize(("lora", "words"), [("evil.ckpt", "pickle"), ("no.safetensors", "does not exist")])
def test_bad_lora_is_refused_before_loading(lora: str, words: str) -> None:
    with pytest.raises(ModelError, match=words):
        run(request(lora=(lora,)), loader=lambda *_: pytest.fail("weights were loaded"))


def test_lora_changes_the_picture(tmp_path: Path) -> None:
    from peft import LoraConfig

    pipe = load_pipeline(open_model(request()), "fp32", "cpu", "none", ())
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    from peft.utils import get_peft_model_state_dict

    layers = get_peft_model_state_dict(pipe.transformer)
    pipe.save_lora_weights(tmp_path, transformer_lora_layers=layers)
    file = str(tmp_path / "pytorch_lora_weights.safetensors")
    plain = run(request()).outputs[0].image
    for scale, changed in ((0.0, False), (1.0, True)):
        image = run(request(lora=(f"{file}:{scale}",))).outputs[0].image
        assert (np.abs(np.asarray(image, float) - np.asarray(plain, float)).max() > 1) == changed


# ------------------------------------------------------------------------------------------------------- live previews
def test_live_previews_grow_and_change_no_bit(tmp_path: Path) -> None:
    plain, watched = tmp_path / "plain.png", tmp_path / "watched.png"
    job = request(size="128x64", steps=4, highres="cascade")
    run(job, OutputOptions(paths=(plain,)))
    seen: list[Event] = []
    run(job, OutputOptions(paths=(watched,), live_preview=True), on_event=seen.append)
    assert watched.read_bytes() == plain.read_bytes()
    shown = [event for event in seen if event.preview is not None]
    assert shown, "no small picture was sent"
    sketches = [event for event in shown if event.step < event.steps]
    finished = [event for event in shown if event.step == event.steps]
    assert sketches
    assert all(max(event.preview.size) <= 256 for event in sketches)
    assert [event.stage for event in finished] == list(range(finished[-1].stages - 1)), "each stage but the last"
    for event in shown:
        width, height = event.preview.size
        assert 1.7 < width / height < 2.3  # the sides of a stage are multiples of a token


def test_without_wish_no_previews_are_made() -> None:
    seen: list[Event] = []
    run(request(), on_event=seen.append)
    assert all(event.preview is None for event in seen)
