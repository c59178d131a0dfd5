"""`gensparse models check`: what a method would do on a checkpoint, from its configs alone."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_hub import serve

from gensparse.engine.support import check_support
from gensparse.errors import ConfigError, ModelError
from gensparse.testing.tiny import TINY, tiny_denoiser

Cli = Callable[..., tuple[int, str, str]]


def checkpoint(
    folder: Path, pipeline: str, parts: dict[str, str], *, vae: dict[str, Any] | None = None, **changes: Any
) -> Path:
    """A pipeline folder without weights: {part: tiny family} -> its configs."""
    folder.mkdir()
    index: dict[str, Any] = {"_class_name": pipeline, "vae": ["diffusers", "AutoencoderKL"]}
    for part, family in parts.items():
        model = tiny_denoiser(family)
        index[part] = ["diffusers", type(model).__name__]
        (folder / part).mkdir()
        config = json.loads(json.dumps(dict(model.config), default=str)) | {"_class_name": type(model).__name__}
        (folder / part / "config.json").write_text(json.dumps(config | changes))
    (folder / "vae").mkdir()
    (folder / "vae" / "config.json").write_text(json.dumps(vae or {}))
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture
def no_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading any weight file is an error."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr("gensparse.engine.session.load_pipeline", refuse)
    monkeypatch.setattr("safetensors.torch.load_file", refuse)
    monkeypatch.setattr("diffusers.models.modeling_utils.load_state_dict", refuse)


# ------------------------------------------------------------------------------------------------------------- answers
def test_a_pipeline_folder_is_judged_without_weights(cli: Cli, no_loading: None) -> None:
    ran = cli("models", "check", "TINY", "--attention", "clear:radius=2", "--size", "64x32", "--json")
    assert ran.code == 0, ran.err
    data = json.loads(ran.out)
    (part,) = data["parts"]
    assert (data["works"], data["generates"], data["pipeline"]) == (True, True, "FluxPipeline")
    assert (part["family"], part["sites"], part["sparse"], part["dense"]) == ("FLUX.1", {"joint": 2}, 2, {})
    assert part["grids"] == {"joint": [1, 8, 16]}
    assert part["tokens"]["joint"] == 8 * 16 + data["text"]
    assert part["density"] < 1
    assert part["native_tokens"] == 4096


def test_the_answer_in_words_names_everything_a_user_needs(cli: Cli) -> None:
    ran = cli("models", "check", "TINY", "--attention", "sliding_window:radius=2")
    assert ran.code == 0, ran.err
    for word in (
        "FluxTransformer2DModel",
        "FLUX.1",
        "2 of 2 attention modules",
        "joint",
        "sliding_window:radius=2: works",
    ):
        assert word in ran.out


def test_without_a_method_it_says_what_could_be_sparse(cli: Cli) -> None:
    data = json.loads(cli("models", "check", "flux.1-dev", "--size", "4096", "--json").out)
    (part,) = data["parts"]
    assert (part["sites"], part["attention"], part["sparse"], data["method"]) == ({"joint": 57}, 57, None, None)
    assert (part["grids"]["joint"], part["native_tokens"], data["text"]) == ([1, 256, 256], 4096, 512)


def test_an_alias_and_the_shipped_model_are_judged_too(cli: Cli) -> None:
    data = json.loads(cli("models", "check", "embedded", "--attention", "auto", "--json").out)
    assert data["works"] is False
    assert "dense is cheaper" in next(iter(data["parts"][0]["dense"]))
    assert "changes nothing here" in cli("models", "check", "embedded", "--attention", "auto").out


@pytest.mark.parametrize("name", sorted(set(TINY) - {"sana"}))
def test_every_family_is_covered(tmp_path: Path, name: str) -> None:
    model = tiny_denoiser(name)
    model.save_config(tmp_path / name)
    answer = check_support(str(tmp_path / name), "sliding_window:radius=1", height=256, width=384)
    (part,) = answer.parts
    assert (part.model, part.part) == (type(model).__name__, ".")
    assert answer.works
    assert part.sparse == sum(part.sites.values()) > 0
    assert set(part.grids) == set(part.sites)
    assert all(part.tokens[role] >= grid[0] * grid[1] * grid[2] > 1 for role, grid in part.grids.items())
    assert part.density is not None
    assert part.density < 1


def test_two_denoisers_take_turns(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "wan22", "WanPipeline", {"transformer": "wan", "transformer_2": "wan"})
    answer = check_support(str(folder), "radial", height=64, width=96, frames=9)
    assert [part.part for part in answer.parts] == ["transformer", "transformer_2"]
    assert answer.generates is False
    assert answer.frames == 9
    one = check_support(str(checkpoint(tmp_path / "wan", "WanPipeline", {"transformer": "wan"})), "radial")
    assert (one.height, one.width, one.frames) == (480, 832, 81)


def test_first_steps_are_told_apart_from_the_middle(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "video", "HunyuanVideoPipeline", {"transformer": "hunyuan_video"})
    (part,) = check_support(str(folder), "radial", height=64, width=96, frames=9).parts
    assert (part.sparse, dict(part.dense)) == (2, {})
    assert part.first_step == {"radial: the first steps stay dense": 2}


def test_levels_of_a_unet_have_tokens_of_their_own(tmp_path: Path) -> None:
    vae = {"_class_name": "AutoencoderKL", "block_out_channels": [8, 16, 16]}
    folder = checkpoint(tmp_path / "sd", "StableDiffusionPipeline", {"unet": "sd15"}, vae=vae)
    (part,) = check_support(str(folder), "msw_msa", height=100, width=76).parts
    assert part.grids == {"level0": (1, 25, 19), "level1": (1, 13, 10), "level2": (1, 7, 5)}
    assert part.sparse == part.sites["level0"] == 3
    assert sum(part.dense.values()) == part.sites["level1"] + part.sites["level2"]


@pytest.mark.parametrize(
    ("vae", "grid"),
    [
        ({"spatial_compression_ratio": 16, "temporal_compression_ratio": 8}, (3, 4, 6)),
        ({"scale_factor_spatial": 4, "scale_factor_temporal": 4}, (5, 16, 24)),
        ({}, (5, 8, 12)),
    ],
)
def test_sizes_follow_the_autoencoder_of_the_checkpoint(tmp_path: Path, vae: dict, grid: tuple) -> None:
    folder = checkpoint(tmp_path / "wan", "WanPipeline", {"transformer": "wan"}, vae=vae)
    (part,) = check_support(str(folder), height=128, width=192, frames=17).parts
    assert part.grids == {"self": grid}


def test_a_profile_beside_the_weights_is_found(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "m", "FluxPipeline", {"transformer": "flux"})
    (folder / "attention_profile.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"attention_profile\.json"):
        check_support(str(folder), "auto:dense_below=0")


# -------------------------------------------------------------------------------------------------------------- errors
def test_bad_methods_are_exit_2(cli: Cli) -> None:
    assert "did you mean clear" in cli("models", "check", "TINY", "--attention", "claer").err
    for method in ("claer", "clear:radius=0", "msw_msa", "cosmos_sparse"):
        ran = cli("models", "check", "TINY", "--attention", method)
        assert ran.code == 2, (method, ran.err)
        assert ran.out == ""
    assert "UNet" in cli("models", "check", "TINY", "--attention", "msw_msa").err


def test_bad_sizes_are_exit_2(cli: Cli) -> None:
    assert cli("models", "check", "TINY", "--size", "0").code == 2
    assert "holds no whole token" in cli("models", "check", "TINY", "--size", "1x1").err
    ran = cli("models", "check", "TINY", "--frames", "9")
    assert ran.code == 2
    assert "makes pictures" in ran.err


@pytest.mark.parametrize("model", ["no-such", "./none", "a.ckpt", "x.safetensors"])
def test_missing_and_refused_models_are_exit_4(cli: Cli, model: str) -> None:
    Path("a.ckpt").write_bytes(b"")
    ran = cli("models", "check", model)
    assert ran.code == 4
    assert "try:" in ran.err


def test_models_that_cannot_be_sparse_say_why(cli: Cli, tmp_path: Path) -> None:
    checkpoint(tmp_path / "sana", "SanaPipeline", {"transformer": "sana"})
    ran = cli("models", "check", tmp_path / "sana", "--attention", "clear")
    assert ran.code == 4
    assert "linear" in ran.err


def test_an_unsupported_class_gets_the_list(cli: Cli, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "m", "OtherPipeline", {"transformer": "flux"}, _class_name="DiTTransformer2DModel")
    ran = cli("models", "check", folder)
    assert ran.code == 4
    for word in ("DiTTransformer2DModel", "transformer", "WanTransformer3DModel", "UNet2DConditionModel"):
        assert word in ran.err


def test_a_pipeline_without_a_denoiser_says_what_is_needed(cli: Cli, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "m", "AudioPipeline", {})
    ran = cli("models", "check", folder)
    assert ran.code == 4
    assert "transformer" in ran.err


@pytest.mark.parametrize(
    "changes",
    [{"num_layers": 10**9}, {"num_layers": -1}, {"num_layers": "many"}, {"attention_head_dim": None}],
    ids=str,
)
def test_hostile_configs_are_refused_fast_and_by_name(tmp_path: Path, changes: dict[str, Any]) -> None:
    folder = checkpoint(tmp_path / "m", "FluxPipeline", {"transformer": "flux"}, **changes)
    with pytest.raises(ModelError, match=r"'m'.*transformer/config\.json"):
        check_support(str(folder))


def test_code_of_a_folder_is_never_run(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "m", "FluxPipeline", {"transformer": "flux"})
    (folder / "transformer" / "evil.py").write_text("raise SystemExit('ran')")
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"_class_name": ["evil", "EvilPipeline"], "transformer": ["evil", "FluxTransformer2DModel"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    answer = check_support(str(folder), "clear")
    assert (answer.pipeline, answer.works, answer.generates) == ("EvilPipeline", True, False)


def test_of_a_hub_model_only_json_is_fetched(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = checkpoint(tmp_path / "m", "WanPipeline", {"transformer": "wan"})
    (folder / "transformer" / "diffusion_pytorch_model.safetensors").write_bytes(b"x" * 64)
    (folder / "transformer" / "code.py").write_text("")
    with serve(folder) as (endpoint, log):
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        ran = cli("models", "check", "owner/model", "--attention", "sliding_window", "--size", "96x64", "--json")
    assert ran.code == 0, ran.err
    assert json.loads(ran.out)["name"] == "owner/model"
    fetched = {re.split(r"[?#]", line.rsplit("/", 1)[1])[0] for line in log if "/resolve/" in line}
    assert fetched
    assert all(name.endswith(".json") for name in fetched)


# -------------------------------------------------------------------------------------------------------- list and show
def test_list_tells_what_generate_runs_from_what_apply_changes(cli: Cli) -> None:
    data = json.loads(cli("models", "list", "--json").out)
    assert "FluxPipeline" in data["pipelines"]
    assert data["families"]["Wan"] == ["WanTransformer3DModel", "WanVACETransformer3DModel"]
    ran = cli("models", "list")
    assert "WanTransformer3DModel" in ran.out
    assert "flux.1-schnell" in ran.out


def test_show_of_a_class_tells_its_family(cli: Cli) -> None:
    ran = cli("models", "show", "SD3Transformer2DModel")
    assert ran.code == 0
    assert "Stable Diffusion 3" in ran.out
    assert "picture first" in ran.out
    assert json.loads(cli("models", "show", "MochiTransformer3DModel", "--json").out)["family"] == "Mochi"


def test_show_of_a_method_tells_paper_licence_use_and_presets(cli: Cli) -> None:
    ran = cli("methods", "show", "radial")
    for word in ("2506.19852", "Apache-2.0", "Long videos", "radial:preset=wan2.1-t2v-14b", "decay:"):
        assert word in ran.out
    data = json.loads(cli("methods", "show", "clear", "--json").out)
    assert {"paper", "licence", "use", "presets", "defaults", "settings"} <= set(data)
    assert data["settings"]["radius"]
