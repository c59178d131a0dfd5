"""The registry and what may be loaded: pickles, foreign code, unsupported families, offline and gated hubs."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from fake_hub import make_cache, make_folder, serve

from gensparse.errors import ModelError
from gensparse.models import REGISTRY, SHIPPED, Architecture, resolve


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache, and no token."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    return tmp_path / "cache"


def use_hub(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    monkeypatch.setenv("HF_ENDPOINT", endpoint)


# ------------------------------------------------------------------------------------------------------------- registry
def test_registry_entries_are_complete() -> None:
    for alias, info in REGISTRY.items():
        assert info.alias == alias
        assert info.licence
        assert info.native_size % info.architecture.multiple == 0


def test_flux_has_the_published_number_of_weights() -> None:
    flux = Architecture()
    assert flux.transformer_params == pytest.approx(11.9e9, rel=0.02)
    assert (flux.width, flux.layers, flux.multiple) == (3072, 57, 16)


def test_registry_knows_the_shipped_model() -> None:
    from gensparse.engine import open_model
    from gensparse.request import GenerateRequest

    shipped = open_model(GenerateRequest(), weights=True).info.architecture
    listed = REGISTRY["embedded"].architecture
    assert replace(shipped, encoder_params=0) == replace(listed, encoder_params=0)


@pytest.mark.parametrize("alias", [name for name in REGISTRY if name not in SHIPPED])
def test_registered_models_can_be_planned_without_files(cache: Path, alias: str) -> None:
    ref = resolve(alias.upper(), weights=False)
    assert (ref.name, ref.folder) == (alias, None)


def test_hub_id_of_a_registered_model_is_recognised(cache: Path) -> None:
    assert resolve("black-forest-labs/flux.1-DEV", weights=False).info.alias == "flux.1-dev"


# -------------------------------------------------------------------------------------------------------- local folders
def test_local_folder_gives_its_own_sizes(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "mine")
    notes = {"native_size": 256, "num_inference_steps": 7, "true_cfg_scale": 2.5, "attention": "clear", "steps": "x"}
    (folder / "gensparse.json").write_text(json.dumps(notes))
    ref = resolve(str(folder))
    arch = ref.info.architecture
    assert (ref.name, arch.double_blocks, arch.single_blocks, arch.width, arch.multiple) == ("mine", 2, 3, 64, 16)
    assert (ref.info.native_size, ref.info.steps, ref.info.guidance, ref.info.attention) == (256, 7, 2.5, "clear")
    assert ref.info.guidance_kind == "cfg"


@pytest.mark.parametrize("value", [True, "256", -5, None, [256]])
def test_nonsense_in_gensparse_json_is_left_aside(tmp_path: Path, value: object) -> None:
    folder = make_folder(tmp_path / "mine")
    (folder / "gensparse.json").write_text(json.dumps({"native_size": value}))
    assert resolve(str(folder)).info.native_size == 1024


@pytest.mark.parametrize("name", ["evil.ckpt", "evil.pt", "evil.pth", "evil.bin", "Evil.PKL"])
def test_pickle_file_is_refused_unopened(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(b"\x80\x04cos\nsystem\n")
    with pytest.raises(ModelError, match="pickle"):
        resolve(str(path))
    with pytest.raises(ModelError, match="pickle"):
        resolve(name)  # by name alone, existing or not


@pytest.mark.parametrize("weights", ["pytorch_model.bin", "model.ckpt", "model.pt"])
def test_folder_with_pickles_only_is_refused(tmp_path: Path, weights: str) -> None:
    with pytest.raises(ModelError, match=weights):
        resolve(str(make_folder(tmp_path / "m", weights=weights)))


def test_folder_without_weights_is_incomplete(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "m")
    (folder / "vae" / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="no weights in vae/"):
        resolve(str(folder))
    assert resolve(str(folder), weights=False).folder == folder


@pytest.mark.parametrize(
    "index",
    [
        {"transformer": ["evil", "Net"]},
        {"_class_name": ["pipeline", "FluxPipeline"]},
    ],
    ids=["component", "pipeline"],
)
def test_code_of_a_model_is_named_and_needs_trust(tmp_path: Path, index: dict) -> None:
    folder = make_folder(tmp_path / "m", **index)
    (folder / "transformer" / "evil.py").write_text("raise SystemExit('ran')")
    with pytest.raises(ModelError, match=r"(evil|pipeline)\.py.*--trust-remote-code"):
        resolve(str(folder))
    assert resolve(str(folder), trust_remote_code=True).remote_code


def test_auto_map_is_code_too(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "m")
    (folder / "text_encoder" / "config.json").write_text(json.dumps({"auto_map": {"AutoModel": "evil.Net"}}))
    with pytest.raises(ModelError, match="text_encoder"):
        resolve(str(folder))


def test_unsupported_family_lists_the_supported_ones(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"KandinskyPipeline.*supported: flux"):
        resolve(str(make_folder(tmp_path / "m", _class_name="KandinskyPipeline")))


def test_families_of_python_alone_name_their_pipeline(tmp_path: Path) -> None:
    from gensparse import pipelines
    from gensparse.families.checkpoints import AT_ONCE

    ours = {name for name in pipelines.__all__ if name.endswith("DirectPipeline")}
    assert set(AT_ONCE.values()) == ours
    for stock, name in AT_ONCE.items():
        assert stock in [cls.__name__ for cls in getattr(pipelines, name).__mro__]
    with pytest.raises(ModelError, match=r"ZImagePipeline.*in Python only: gensparse\.pipelines\.ZImageDirectPipeline"):
        resolve(str(make_folder(tmp_path / "m", _class_name="ZImagePipeline")))


def test_two_transformers_are_refused_not_half_served(tmp_path: Path) -> None:
    index = {"_class_name": "WanPipeline", "transformer_2": ["diffusers", "WanTransformer3DModel"]}
    with pytest.raises(ModelError, match="two transformers"):
        resolve(str(make_folder(tmp_path / "m", **index)))


@pytest.mark.parametrize("text", ["", "{", "[]", "nan", "[" * 100_000])
def test_broken_index_is_a_model_error(tmp_path: Path, text: str) -> None:
    folder = make_folder(tmp_path / "m")
    (folder / "model_index.json").write_text(text)
    with pytest.raises(ModelError, match=r"model_index\.json"):
        resolve(str(folder))


def test_impossible_sizes_are_a_model_error(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "m")
    (folder / "transformer" / "config.json").write_text(json.dumps({"num_layers": "many"}))
    with pytest.raises(ModelError, match="impossible sizes"):
        resolve(str(folder))


def test_single_file_and_missing_folder_are_explained(tmp_path: Path) -> None:
    (tmp_path / "flux.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match="single file"):
        resolve(str(tmp_path / "flux.safetensors"))
    for spec in (str(tmp_path / "no"), "C:\\models\\flux", "..\\flux", "~/no/such/folder"):
        with pytest.raises(ModelError, match="does not exist"):
            resolve(spec)


@pytest.mark.parametrize(("spec", "hint"), [("flux.1-de", "flux.1-dev"), ("embeded", "embedded"), ("", "known")])
def test_unknown_alias_suggests_the_nearest(spec: str, hint: str) -> None:
    with pytest.raises(ModelError, match=hint):
        resolve(spec)


# ------------------------------------------------------------------------------------------------------------------ hub
def test_offline_uses_the_cache(cache: Path, tmp_path: Path) -> None:
    make_cache(cache, make_folder(tmp_path / "m"))
    ref = resolve("owner/model", local_files_only=True)
    assert ref.name == "owner/model"
    assert ref.folder is not None
    assert (ref.folder / "model_index.json").is_file()


@pytest.mark.parametrize("revision", [None, "v2"])
def test_offline_and_not_cached_names_the_remedy(cache: Path, monkeypatch: pytest.MonkeyPatch, revision: str) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelError, match=r"cache.*--offline"):
        resolve("owner/absent", revision=revision)


@pytest.mark.parametrize(
    ("refuse", "words"),
    [
        ((403, "GatedRepo"), "gated.*accept its terms.*HF_TOKEN"),
        ((401, "RepoNotFound"), "not found"),
        ((404, "RepoNotFound"), "not found"),
        ((404, "RevisionNotFound"), "no revision 'v9'"),
        ((500, "Oops"), "could not be fetched"),
    ],
    ids=lambda value: str(value[1]) if isinstance(value, tuple) else "",
)
def test_what_the_hub_refuses_becomes_one_sentence(
    cache: Path, monkeypatch: pytest.MonkeyPatch, refuse: tuple[int, str], words: str
) -> None:
    with serve(None, refuse=refuse) as (endpoint, _):
        use_hub(monkeypatch, endpoint)
        with pytest.raises(ModelError, match=words) as error:
            resolve("owner/model", revision="v9", token="hf_verysecret")
    assert "hf_verysecret" not in str(error.value)
    assert error.value.__cause__ is None


def test_dead_hub_is_a_model_error(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_hub(monkeypatch, "http://127.0.0.1:9")
    with pytest.raises(ModelError, match="network"):
        resolve("owner/model")


def test_download_takes_safetensors_only(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_folder(tmp_path / "m")
    for extra in ("vae/model.bin", "vae/model.fp16.safetensors", "vae/run.py", "flux.safetensors", "picture.jpg"):
        (folder / extra).write_bytes(b"x")
    with serve(folder) as (endpoint, log):
        use_hub(monkeypatch, endpoint)
        ref = resolve("owner/model")
    assert ref.folder is not None
    got = {p.relative_to(ref.folder).as_posix() for p in ref.folder.rglob("*") if p.is_file()}
    assert "vae/model.safetensors" in got
    assert not got & {"vae/model.bin", "vae/model.fp16.safetensors", "vae/run.py", "flux.safetensors", "picture.jpg"}
    assert not [line for line in log if "model.bin" in line]


def test_hub_model_with_pickles_is_refused_before_any_download(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_folder(tmp_path / "m", weights="pytorch_model.bin")
    with serve(folder) as (endpoint, log):
        use_hub(monkeypatch, endpoint)
        with pytest.raises(ModelError, match="pickle"):
            resolve("owner/model")
    assert not [line for line in log if ".bin" in line]


@pytest.mark.parametrize("variant", ["fp16", None])
def test_download_takes_one_set_of_weights(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variant: str | None
) -> None:
    """The variant's files where a part has them; without a name, those of a part that has nothing else."""
    folder = make_folder(tmp_path / "m")
    (folder / "vae" / "model.fp16.safetensors").write_bytes(b"")
    if variant is None:
        (folder / "vae" / "model.safetensors").unlink()
    with serve(folder) as (endpoint, _):
        use_hub(monkeypatch, endpoint)
        ref = resolve("owner/model", variant=variant)
    assert ref.folder is not None
    assert ref.variant == "fp16"
    got = {p.relative_to(ref.folder).as_posix() for p in ref.folder.rglob("*.safetensors")}
    assert "vae/model.fp16.safetensors" in got
    assert "transformer/model.safetensors" in got
    assert "vae/model.safetensors" not in got
