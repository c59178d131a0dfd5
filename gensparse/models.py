"""Which models there are, and whether a given one may be loaded: aliases, hub ids and local folders.

Nothing here loads a weight. Files are judged by name and by their JSON before anything else touches them: safetensors
only, no code from a model folder unless the caller trusts it.
"""

import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from gensparse.errors import ModelError, unknown_name
from gensparse.families.checkpoints import AT_ONCE, CHECKPOINTS, Checkpoint
from gensparse.families.checkpoints import PIPELINES as FAMILIES  # pipeline class of model_index.json -> family
from gensparse.families.published import PUBLISHED, SCHEDULERS, VAES
from gensparse.families.sizes import SDXL, Architecture, JointArchitecture, UNetArchitecture

PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl", ".pickle", ".msgpack", ".h5")
TRUSTED_LIBRARIES = ("diffusers", "transformers")
MAX_JSON = 4 << 20
OWN_FILES = ("gensparse.json", "attention_profile.json")  # what a model's folder may say to gensparse


AnyArchitecture = Architecture | JointArchitecture | UNetArchitecture

__all__ = [
    "FAMILIES",
    "PICKLES",
    "REGISTRY",
    "SDXL",
    "Architecture",
    "ModelInfo",
    "ModelRef",
    "UNetArchitecture",
    "resolve",
]


# ----------------------------------------------------------------------------------------------------------- registry
@dataclass(frozen=True)
class ModelInfo:
    """One entry of the registry: what a user can type and what a request leaves to the model."""

    alias: str
    family: str
    hub_id: str | None
    licence: str
    summary: str
    native_size: int = 1024  # pixels of a side
    steps: int = 28
    guidance: float = 3.5
    max_sequence_length: int = 512
    unconditional: bool = False  # trained with empty prompts
    architecture: AnyArchitecture = field(default_factory=Architecture)
    attention: str | None = None  # what `auto` uses beyond `dense_below` tokens; None: a window of the native size
    dense_below: int = 8192
    cascade: Mapping[str, Any] = field(default_factory=dict, hash=False)  # fields of highres.stages.CascadeSettings
    profile: str | None = None  # attention profile in the model's folder

    @property
    def guidance_kind(self) -> str:
        """What `guidance` sets: "embedded" (an input of the model), "cfg" (two passes per step) or "none"."""
        if getattr(self.architecture, "guidance_embeds", False):
            return "embedded"
        return "cfg" if self.unconditional else "none"

    @property
    def row(self) -> Checkpoint:
        """What its family is like."""
        return CHECKPOINTS[self.family]


_STABILITY = "Stability AI Community License"
_FLUX_DEV = "FLUX.1 [dev] Non-Commercial License"
_DISTILLED = Architecture(guidance_embeds=False)


def _published(alias: str, family: str, hub_id: str | None, licence: str, summary: str, **facts: Any) -> ModelInfo:
    """An entry whose sizes follow from the published config of its denoiser."""
    row, config = CHECKPOINTS[family], PUBLISHED[alias]
    known = facts_of(row, config, VAES.get(alias, {}), SCHEDULERS.get(alias, {}))
    if "encoders" in facts:
        known["architecture"] = replace(known["architecture"], encoder_params=facts.pop("encoders"))
    return ModelInfo(alias, family, hub_id, licence, summary, **{**known, **facts})


def facts_of(
    row: Checkpoint, config: Mapping[str, Any], vae: Mapping[str, Any], scheduler: Mapping[str, Any]
) -> dict[str, Any]:
    """Fields of `ModelInfo` that follow from the configs of a denoiser, its autoencoder and its scheduler."""
    arch = replace(row.sizes(config, vae), encoder_params=row.encoders)
    native = row.native(config, scheduler, arch)
    found = {**row.facts, **row.adapt(config, arch), "architecture": arch}
    return found if native is None else {**found, "native_size": native}


REGISTRY: dict[str, ModelInfo] = {
    info.alias: info
    for info in (
        ModelInfo(
            alias="embedded",
            family="flux",
            hub_id=None,
            licence="Apache-2.0",
            summary="shipped inside gensparse: coloured shapes, for demonstration and tests; no download",
            native_size=256,
            steps=20,
            guidance=3.5,
            max_sequence_length=32,
            unconditional=True,
            architecture=replace(
                _DISTILLED,
                double_blocks=2,
                single_blocks=6,
                heads=3,
                head_dim=64,
                in_channels=32,
                vae_class="AutoencoderTiny",
                vae_channels=(32, 32, 32, 32),
                vae_convs=(4, 7, 10, 13),
                encoder_params=3_000_000,
            ),
        ),
        _published(
            "embedded-unet",
            "sdxl",
            None,
            "Apache-2.0",
            "the same shapes, drawn by a small UNet of SDXL's kind: for what only UNets can do; no download",
            steps=25,
            guidance=5.0,
            encoders=1_400_000,
        ),
        ModelInfo("flux.1-dev", "flux", "black-forest-labs/FLUX.1-dev", _FLUX_DEV, "12 B parameters, guided"),
        ModelInfo(
            "flux.1-schnell",
            "flux",
            "black-forest-labs/FLUX.1-schnell",
            "Apache-2.0",
            "12 B parameters, 4 steps",
            steps=4,
            guidance=0.0,
            max_sequence_length=256,
            architecture=_DISTILLED,
        ),
        ModelInfo(
            "flux.1-krea-dev",
            "flux",
            "black-forest-labs/FLUX.1-Krea-dev",
            _FLUX_DEV,
            "12 B parameters, photographic look",
            guidance=4.5,
        ),
        _published(
            "sdxl",
            "sdxl",
            "stabilityai/stable-diffusion-xl-base-1.0",
            "CreativeML Open RAIL++-M",
            "2.6 B parameters",
        ),
        _published(
            "sdxl-turbo",
            "sdxl",
            "stabilityai/sdxl-turbo",
            _STABILITY,
            "2.6 B parameters, 4 steps without guidance, native 512",
        ),
        _published(
            "sd1.5",
            "sd15",
            "stable-diffusion-v1-5/stable-diffusion-v1-5",
            "CreativeML Open RAIL-M",
            "0.9 B parameters, native 512",
        ),
        _published(
            "sd3-medium",
            "sd3",
            "stabilityai/stable-diffusion-3-medium-diffusers",
            _STABILITY,
            "2 B parameters",
        ),
        _published("sd3.5-medium", "sd3", "stabilityai/stable-diffusion-3.5-medium", _STABILITY, "2.5 B parameters"),
        _published(
            "sd3.5-large",
            "sd3",
            "stabilityai/stable-diffusion-3.5-large",
            _STABILITY,
            "8 B parameters",
            guidance=3.5,
        ),
        _published("qwen-image", "qwenimage", "Qwen/Qwen-Image", "Apache-2.0", "20 B parameters, writes text well"),
    )
}

SHIPPED = tuple(alias for alias, info in REGISTRY.items() if info.hub_id is None)
"""Models that come with the package."""


# --------------------------------------------------------------------------------------------------------- resolution
@dataclass(frozen=True)
class ModelRef:
    """A model that passed every check: where its files are and what is known about it."""

    name: str  # alias, hub id or folder name: what may be written into metadata
    info: ModelInfo
    folder: Path | None  # None: only the facts of the registry are known (planning without files)
    revision: str | None = None
    variant: str | None = None
    remote_code: bool = False

    @property
    def embedded(self) -> bool:
        return self.info.alias in SHIPPED


def resolve(
    spec: str,
    *,
    revision: str | None = None,
    variant: str | None = None,
    local_files_only: bool = False,
    trust_remote_code: bool = False,
    token: str | None = None,
    weights: bool = True,
    shipped: Mapping[str, Callable[[], Path]] | None = None,
) -> ModelRef:
    """Find and check a model by alias, hub id (`owner/name`) or local folder.

    `shipped` gives the folder of each model that comes with the package, by alias.
    With `weights=False` only configs are read, and a registered model needs no files at all.
    Raises ModelError, with the remedy, when it is missing, gated, offline, unsupported or refused.
    """
    if looks_like_path(spec):
        return _check_local(Path(spec).expanduser(), variant, trust_remote_code, weights)
    info, name = REGISTRY.get(spec.lower()), spec.lower()
    if name in (shipped or {}):
        return _check_folder(shipped[name](), name, info, None, None, False, weights)
    if info is None and not re.fullmatch(r"[\w.-]+/[\w.-]+", spec):
        raise ModelError(_unknown(spec))
    info = info or _by_hub_id(spec)
    if info is not None and not weights:
        return ModelRef(info.alias, info, None, revision, variant)
    hub_id = info.hub_id if info and info.hub_id else spec
    folder = _download(hub_id, revision, variant, local_files_only, trust_remote_code, token, weights)
    return _check_folder(folder, info.alias if info else spec, info, revision, variant, trust_remote_code, weights)


def find_configs(
    spec: str,
    *,
    revision: str | None = None,
    local_files_only: bool = False,
    token: str | None = None,
    shipped: Mapping[str, Callable[[], Path]] | None = None,
) -> tuple[str, ModelInfo | None, Path | None]:
    """(name, what is known about it, folder with its JSON files) of any diffusers model, of whatever family.

    Unlike `resolve` it judges no weights and no family, since nothing but JSON is read. A registered model of the hub
    has no folder: what is known about it is enough. Raises ModelError when the model is missing, gated or offline.
    """
    if looks_like_path(spec):
        folder = _local_folder(Path(spec).expanduser())
        return folder.resolve().name, None, folder
    info, name = REGISTRY.get(spec.lower()), spec.lower()
    if name in (shipped or {}):
        return name, info, shipped[name]()
    info = info or _by_hub_id(spec)
    if info is not None and revision is None:
        return info.alias, info, None
    hub_id = info.hub_id if info and info.hub_id else spec
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", hub_id):
        raise ModelError(_unknown(spec))
    return hub_id, info, _download(hub_id, revision, None, local_files_only, False, token, weights=False)


def looks_like_path(spec: str) -> bool:
    """Whether `spec` names a file or folder rather than an alias or a hub id."""
    marked = bool(re.match(r"[~./\\]|[A-Za-z]:[\\/]", spec)) or "\\" in spec or spec.count("/") > 1
    return marked or spec.lower().endswith((*PICKLES, ".safetensors", ".gguf")) or bool(spec and Path(spec).is_dir())


def registered(spec: str) -> ModelInfo | None:
    """What is known of a model by its alias or hub id, before any file is looked at."""
    return REGISTRY.get(spec.lower()) or _by_hub_id(spec)


def _by_hub_id(hub_id: str) -> ModelInfo | None:
    return next((info for info in REGISTRY.values() if (info.hub_id or "").lower() == hub_id.lower()), None)


def _unknown(spec: str) -> str:
    return unknown_name("model", spec, list(REGISTRY)) + "; a hub id (owner/name) or a folder work too"


def _check_local(path: Path, variant: str | None, trust_remote_code: bool, weights: bool) -> ModelRef:
    return _check_folder(_local_folder(path), path.name, None, None, variant, trust_remote_code, weights)


def _local_folder(path: Path) -> Path:
    if path.suffix.lower() in PICKLES:
        raise ModelError(
            f"model file {path.name!r} is a pickle, which can run code when opened, and is refused; "
            "use a diffusers folder with safetensors weights"
        )
    if not path.exists():
        raise ModelError(f"model folder {path.name!r} does not exist; give an existing folder, a hub id or an alias")
    if path.is_file():
        raise ModelError(f"{path.name!r} is a single file; give the diffusers folder that contains model_index.json")
    return path


# ------------------------------------------------------------------------------------------------------ folder checks
def _check_folder(
    folder: Path,
    name: str,
    info: ModelInfo | None,
    revision: str | None,
    variant: str | None,
    trust_remote_code: bool,
    weights: bool,
) -> ModelRef:
    files = [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()]
    index = read_json(folder / "model_index.json", name)
    family = check_index(index, name)
    code = custom_code(index, files, lambda part: read_json(folder / part / "config.json", name))
    _refuse_code(code, name, trust_remote_code)
    if weights:
        check_weights(index, files, name)
        _check_variant(variant, files, name)
        variant = variant or only_variant(index, files)
    facts = _facts(folder, name, index, family, info)
    return ModelRef(name, facts, folder, revision, variant, remote_code=bool(code))


def read_json(path: Path, name: str) -> dict[str, Any]:
    """Read a small JSON object of a model folder; ModelError when it is missing, huge or no object."""
    try:
        if path.stat().st_size > MAX_JSON:
            raise ModelError(f"model {name!r}: {path.name} is larger than {MAX_JSON} bytes; it is no config, refused")
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(
            f"model {name!r} has no {path.parent.name}/{path.name}; give a complete diffusers folder"
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"model {name!r}: {path.name} is not valid JSON; download the model again") from error
    if not isinstance(data, dict):
        raise ModelError(f"model {name!r}: {path.name} is not a JSON object; download the model again")
    return data


def check_index(index: Mapping[str, Any], name: str) -> str:
    """The family of a model_index.json; ModelError with the list of what works otherwise."""
    found = index.get("_class_name")
    label = found[-1] if isinstance(found, list) else found
    if "transformer_2" in index:
        raise ModelError(
            f"model {name!r} ({label}) has two transformers and its family is not supported; supported: {_families()}"
        )
    if isinstance(label, str) and label in FAMILIES:
        return _complete(index, label, name)
    if isinstance(label, str) and label in AT_ONCE:
        raise ModelError(
            f"model {name!r} ({label}) runs in Python only: gensparse.pipelines.{AT_ONCE[label]} makes its large "
            f"pictures, see docs/highres.md; supported here: {_families()}"
        )
    raise ModelError(
        f"model {name!r} is of the unsupported family {label!r}; supported: {_families()}; what methods can do with it "
        f"in Python: `gensparse models check {name}`"
    )


def _complete(index: Mapping[str, Any], label: str, name: str) -> str:
    """The family of a pipeline class, if the checkpoint has what tells it from its kin."""
    row, there = CHECKPOINTS[FAMILIES[label]], components(index)
    for part in (row.denoiser, "vae", *row.needs):
        if part not in there:
            raise ModelError(f"model {name!r} ({label}) has no {part}; give a complete checkpoint of {row.title}")
    return row.family


def _families() -> str:
    pipelines = ", ".join(sorted(FAMILIES))
    return f"{', '.join(sorted(set(FAMILIES.values())))} (pipeline classes {pipelines}; see `gensparse models list`)"


def components(index: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """name -> (library, class) of the components that are present."""
    pairs = {k: v for k, v in index.items() if isinstance(v, list) and len(v) == 2 and not k.startswith("_")}
    return {k: (str(v[0]), str(v[1])) for k, v in pairs.items() if v[0] is not None}


def custom_code(index: Mapping[str, Any], files: Iterable[str], config: Any) -> list[str]:
    """Names of the Python files of a model that loading it would run."""
    listed = set(files)
    found: list[str] = []
    own = FAMILIES.get(str(index.get("_class_name")), "")
    trusted = (*TRUSTED_LIBRARIES, *(CHECKPOINTS[own].libraries if own else ()))
    if isinstance(index.get("_class_name"), list):
        found.append(f"{index['_class_name'][0]}.py")
    for part, (library, _) in components(index).items():
        if library not in trusted or f"{part}/{library}.py" in listed:
            found.append(f"{part}/{library}.py" if f"{part}/{library}.py" in listed else library)
        elif f"{part}/config.json" in listed and "auto_map" in (config(part) or {}):
            found.append(f"{part} (auto_map in its config.json)")
    return found


def _refuse_code(code: list[str], name: str, trusted: bool) -> None:
    if code and not trusted:
        raise ModelError(
            f"model {name!r} would run code of its own: {', '.join(code)}; read it, then pass --trust-remote-code"
        )


def check_weights(index: Mapping[str, Any], files: Iterable[str], name: str) -> None:
    """Every model component needs safetensors weights. ModelError names the pickles or the missing component."""
    listed = list(files)
    for part, (_, cls) in components(index).items():
        if re.search(r"Tokenizer|Scheduler|Processor|FeatureExtractor", cls):
            continue
        inside = [f for f in listed if PurePosixPath(f).parent.as_posix() == part]
        if any(f.endswith(".safetensors") for f in inside):
            continue
        pickles = [f for f in inside if f.lower().endswith(PICKLES)]
        if pickles:
            raise ModelError(
                f"model {name!r} offers only pickle weights ({pickles[0]}), which can run code and are refused; "
                "convert it to safetensors"
            )
        raise ModelError(f"model {name!r} has no weights in {part}/; download it completely")


# --------------------------------------------------------------------------------------------------------------- facts
def _facts(folder: Path, name: str, index: Mapping[str, Any], family: str, info: ModelInfo | None) -> ModelInfo:
    """The registry entry, corrected by the configs of the folder and by its gensparse.json."""
    row = CHECKPOINTS[family]
    found = _read_facts(folder, name, row, index)
    if info is None:
        base = ModelInfo(name, family, None, "unknown: see the model's own card", "local or hub model", **found)
    else:
        base = replace(info, family=family, architecture=found["architecture"])
    own = read_json(folder / "gensparse.json", name) if (folder / "gensparse.json").is_file() else {}
    profile = folder / OWN_FILES[1]
    return replace(base, profile=str(profile) if profile.is_file() else None, **own_facts(own))


def _read_facts(folder: Path, name: str, row: Checkpoint, index: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `ModelInfo` that the configs of the denoiser and the autoencoder tell."""
    config = read_json(folder / row.denoiser / "config.json", name)
    vae = read_json(folder / "vae" / "config.json", name)
    path = folder / "scheduler" / "scheduler_config.json"
    scheduler = read_json(path, name) if path.is_file() else {}
    try:
        found = facts_of(row, config, vae, scheduler)
    except (TypeError, ValueError, AttributeError, IndexError) as error:
        raise ModelError(f"model {name!r}: its configs hold impossible sizes ({error}); download it again") from error
    if found["architecture"].in_channels not in (row.channels or (found["architecture"].in_channels,)):
        raise ModelError(
            f"model {name!r}: its denoiser takes {found['architecture'].in_channels} channels, as models for "
            f"inpainting or editing do; {row.title} models for text to picture take {row.channels[0]}"
        )
    encoders = [part for part in components(index) if part.startswith("text_encoder")]
    stored = sum(_stored_params(folder / part) for part in encoders)
    if any(any((folder / part).glob("*.safetensors")) for part in encoders):
        found["architecture"] = replace(found["architecture"], encoder_params=stored)
    return found


# key of gensparse.json -> (field, type, lowest value)
_OWN_NUMBERS = {
    "native_size": ("native_size", int, 16),
    "max_sequence_length": ("max_sequence_length", int, 1),
    "num_inference_steps": ("steps", int, 1),
    "true_cfg_scale": ("guidance", float, 0),
    "guidance_scale": ("guidance", float, 0),
    "dense_below_tokens": ("dense_below", int, 0),
}


def own_facts(own: Mapping[str, Any]) -> dict[str, Any]:
    """What a model says about itself in gensparse.json; values of another type are left aside."""
    out: dict[str, Any] = {}
    for key, (name, kind, low) in _OWN_NUMBERS.items():
        value = own.get(key)
        if isinstance(value, (int, float)) and not isinstance(value, bool) and value >= low:
            out[name] = kind(value)
    if "guidance" in out:
        out["unconditional"] = True  # a scale for classifier-free guidance: the empty prompt was trained
    if isinstance(own.get("attention"), str):
        out["attention"] = own["attention"]
    if isinstance(own.get("cascade"), dict):
        out["cascade"] = own["cascade"]
    return out


def _stored_params(folder: Path) -> int:
    """Weights in the safetensors files of a component, counted in their headers; of one variant where there are two."""
    files = sorted(folder.glob("*.safetensors"))
    plain = [path for path in files if variant_of(path.name) is None]
    return sum(_params_in(path) for path in plain or files)


def _params_in(path: Path) -> int:
    """Weights of one file; half of its bytes where it has no readable header."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length)) if 0 < length <= _MAX_HEADER else {}
        shapes = [entry["shape"] for key, entry in header.items() if key != "__metadata__"]
        return sum(math.prod(map(int, shape)) for shape in shapes)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return path.stat().st_size // 2


_MAX_HEADER = 100 << 20


# ----------------------------------------------------------------------------------------------------------------- hub
def offline(local_files_only: bool) -> bool:
    """Whether the network may not be used: by flag or by HF_HUB_OFFLINE."""
    return local_files_only or os.environ.get("HF_HUB_OFFLINE", "").strip().lower() in ("1", "true", "yes", "on")


def _download(
    hub_id: str,
    revision: str | None,
    variant: str | None,
    local_files_only: bool,
    trust_remote_code: bool,
    token: str | None,
    weights: bool,
) -> Path:
    """The local snapshot of a hub model, downloaded after its file list was judged. Raises ModelError."""
    from huggingface_hub import HfApi, constants, snapshot_download

    no_network = offline(local_files_only)
    options: dict[str, Any] = {"revision": revision, "cache_dir": constants.HF_HUB_CACHE, "token": token}
    try:
        if no_network:
            return Path(snapshot_download(hub_id, local_files_only=True, **options))
        endpoint = os.environ.get("HF_ENDPOINT") or constants.ENDPOINT
        listing = HfApi(endpoint=endpoint).model_info(hub_id, revision=revision, token=token)
        files = [item.rfilename for item in listing.siblings or ()]
        wanted = ["*.json"]
        if weights:
            index = _remote_index(hub_id, files, {**options, "revision": listing.sha, "endpoint": endpoint})
            check_index(index, hub_id)
            check_weights(index, files, hub_id)
            wanted = _wanted_files(index, files, variant, trust_remote_code)
        pinned = {**options, "revision": listing.sha, "endpoint": endpoint}
        return Path(snapshot_download(hub_id, allow_patterns=wanted, **pinned))
    except ModelError:
        raise
    except Exception as error:
        raise _hub_error(error, hub_id, revision, no_network) from None  # its text may quote request headers


def _remote_index(hub_id: str, files: list[str], options: dict[str, Any]) -> dict[str, Any]:
    from huggingface_hub import hf_hub_download

    if "model_index.json" not in files:
        raise ModelError(f"model {hub_id!r} is no diffusers pipeline (no model_index.json); supported: {_families()}")
    return read_json(Path(hf_hub_download(hub_id, "model_index.json", **options)), hub_id)


def _wanted_files(index: Mapping[str, Any], files: list[str], variant: str | None, code: bool) -> list[str]:
    """The component files to fetch: configs, tokenizers, one set of safetensors (the variant's where it has one)."""
    parts, variant = set(components(index)), variant or only_variant(index, files)
    named = {PurePosixPath(f).parent.as_posix() for f in files if variant and variant_of(f) == variant}
    wanted = ["model_index.json", *OWN_FILES, *(["*.py"] if code else [])]
    for file in files:
        path = PurePosixPath(file)
        part = path.parent.as_posix()
        if part not in parts or path.suffix.lower() in PICKLES:
            continue
        if path.suffix == ".py" and not code:
            continue
        if path.suffix == ".safetensors" and variant_of(file) != (variant if part in named else None):
            continue
        wanted.append(file)
    return wanted


_VARIANT = re.compile(r"\.(fp16|bf16|fp8|non_ema|ema)(?=[.-])")


def variant_of(file: str) -> str | None:
    """The variant in the name of a weight file: fp16 of model.fp16.safetensors."""
    found = _VARIANT.search(PurePosixPath(file).name) if file.endswith(".safetensors") else None
    return found[1] if found else None


def only_variant(index: Mapping[str, Any], files: Iterable[str]) -> str | None:
    """The variant to load although none was asked for: that of a component which has nothing else."""
    listed = [PurePosixPath(f) for f in files if f.endswith(".safetensors")]
    for part in components(index):
        names = {variant_of(path.name) for path in listed if path.parent.as_posix() == part}
        if names and None not in names:
            return min(filter(None, names), key=lambda name: (name != "fp16", name))
    return None


def _check_variant(variant: str | None, files: Iterable[str], name: str) -> None:
    there = sorted(set(filter(None, map(variant_of, files))))
    if variant is not None and variant not in there:
        raise ModelError(
            f"model {name!r} has no weights of the variant {variant!r}; "
            + (f"it has {', '.join(there)}" if there else "leave --variant out")
        )


def _hub_error(error: Exception, hub_id: str, revision: str | None, no_network: bool) -> ModelError:
    """The one sentence for what the hub client raised, by kind, without quoting headers or tokens."""
    kind = {cls.__name__ for cls in type(error).__mro__}
    if "GatedRepoError" in kind:
        return ModelError(
            f"model {hub_id!r} is gated; accept its terms on https://huggingface.co/{hub_id}, then set HF_TOKEN"
        )
    if "RevisionNotFoundError" in kind:
        return ModelError(f"model {hub_id!r} has no revision {revision!r}; give a branch, tag or commit that exists")
    if "RepositoryNotFoundError" in kind:
        return ModelError(
            f"model {hub_id!r} was not found on the hub; check its name, or set HF_TOKEN if it is private"
        )
    if "OfflineModeIsEnabled" in kind or no_network:
        at = f" at revision {revision!r}" if revision else ""
        return ModelError(
            f"model {hub_id!r}{at} is not in the local cache and the network is switched off; "
            "run once without --offline, --local-files-only and HF_HUB_OFFLINE"
        )
    if "HFValidationError" in kind:
        return ModelError(f"{hub_id!r} is not a valid hub id; write owner/name")
    return ModelError(
        f"model {hub_id!r} could not be fetched ({type(error).__name__}); check the network, "
        "or pass --local-files-only to use the cache"
    )
