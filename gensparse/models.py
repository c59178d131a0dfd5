"""Which models there are, and whether a given one may be loaded: aliases, hub ids and local folders.

Nothing here loads a weight. Files are judged by name and by their JSON before anything else touches them: safetensors
only, no code from a model folder unless the caller trusts it.
"""

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from gensparse.errors import ModelError, unknown_name

PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl", ".pickle", ".msgpack", ".h5")
TRUSTED_LIBRARIES = ("diffusers", "transformers")
MAX_JSON = 4 << 20
OWN_FILES = ("gensparse.json", "attention_profile.json")  # what a model's folder may say to gensparse


# ----------------------------------------------------------------------------------------------------------- registry
@dataclass(frozen=True)
class Architecture:
    """Sizes of a FLUX-type model that decide cost: read from its configs, so that no weights are needed."""

    double_blocks: int = 19
    single_blocks: int = 38
    heads: int = 24
    head_dim: int = 128
    in_channels: int = 64
    guidance_embeds: bool = True
    vae_class: str = "AutoencoderKL"
    vae_channels: tuple[int, ...] = (128, 256, 512, 512)
    vae_convs: tuple[int, ...] = (7, 7, 7, 11)  # 3x3 convolutions of the decoder per level, full resolution first
    encoder_params: int = 4_885_000_000  # T5-XXL 4.76 B and CLIP-L 0.12 B

    @property
    def width(self) -> int:
        return self.heads * self.head_dim

    @property
    def layers(self) -> int:
        return self.double_blocks + self.single_blocks

    @property
    def vae_factor(self) -> int:
        return 2 ** (len(self.vae_channels) - 1)

    @property
    def multiple(self) -> int:
        """Both sides of a picture are multiples of this many pixels: autoencoder factor times the 2x2 packing."""
        return 2 * self.vae_factor

    @property
    def transformer_params(self) -> int:
        """Weights of the blocks: 12 d^2 per stream, and d^2 times 6 (double, twice) or 3 (single) for modulation."""
        return self.width**2 * (self.double_blocks * 36 + self.single_blocks * 15)

    @property
    def kept_params(self) -> int:
        """Weights that fp8 storage leaves alone: the modulations, which belong to norms."""
        return self.width**2 * (self.double_blocks * 12 + self.single_blocks * 3)

    @property
    def guidance_in_batch(self) -> bool:
        return False

    def tokens(self, height: int, width: int) -> int:
        """Picture tokens of a size in pixels."""
        return (height // self.multiple) * (width // self.multiple)

    def activation_values(self, chunked: bool) -> float:
        """Live values per token at the peak of a call, traced: the single blocks, or rotating queries and keys."""
        return (13.3 if chunked else 17.3) * self.width

    def flops(self, tokens: int) -> tuple[float, float]:
        """(linear, dense attention) FLOP of one call."""
        return 24.0 * self.width**2 * self.layers * tokens, 4.0 * self.width * self.layers * tokens**2


@dataclass(frozen=True)
class UNetArchitecture:
    """Sizes of an SDXL-type UNet that decide cost: traced and counted on its real layer shapes.

    A token is a cell of the finest level with attention: 2 x 2 latent pixels.
    """

    transformer_params: int = 2_567_000_000
    layers: int = 19  # groups that offloading moves: blocks of the levels
    in_channels: int = 4
    width: int = 640
    head_dim: int = 64
    linear_flops: float = 1.467e9  # per token, convolutions and attention to text included
    attention_flops: float = 44_800.0  # per pair of tokens: 10 blocks of 640 channels, 60 of 1280 on a quarter
    values: tuple[float, float] = (20_150.0, 17_950.0)  # live per token at the peak, whole and in chunks
    vae_class: str = "AutoencoderKL"
    vae_channels: tuple[int, ...] = (128, 256, 512, 512)
    vae_convs: tuple[int, ...] = (7, 7, 7, 11)
    encoder_params: int = 817_000_000  # CLIP-L 0.12 B and OpenCLIP bigG 0.69 B
    kept_params: int = 0
    guidance_in_batch: bool = True

    @property
    def vae_factor(self) -> int:
        return 2 ** (len(self.vae_channels) - 1)

    @property
    def multiple(self) -> int:
        """Both sides of a picture are multiples of this many pixels."""
        return self.vae_factor

    def tokens(self, height: int, width: int) -> int:
        """Picture tokens of a size in pixels."""
        side = 2 * self.vae_factor
        return -(-height // side) * -(-width // side)

    def activation_values(self, chunked: bool) -> float:
        """Live values per token at the peak of one half of the guidance."""
        return self.values[chunked]

    def flops(self, tokens: int) -> tuple[float, float]:
        """(linear, dense attention) FLOP of one half of the guidance."""
        return self.linear_flops * tokens, self.attention_flops * tokens**2


SDXL = UNetArchitecture()


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
    architecture: Architecture = Architecture()
    attention: str | None = None  # what `auto` uses beyond `dense_below` tokens; None: a window of the native size
    dense_below: int = 8192
    cascade: Mapping[str, Any] = field(default_factory=dict, hash=False)  # fields of highres.stages.CascadeSettings
    profile: str | None = None  # attention profile in the model's folder

    @property
    def guidance_kind(self) -> str:
        """What `guidance` sets: "embedded" (an input of the model), "cfg" (two passes per step) or "none"."""
        if self.architecture.guidance_embeds:
            return "embedded"
        return "cfg" if self.unconditional else "none"


_FLUX_DEV = "FLUX.1 [dev] Non-Commercial License"
_DISTILLED = Architecture(guidance_embeds=False)

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
    )
}

# pipeline class of model_index.json -> family
FAMILIES = {"FluxPipeline": "flux", "FluxImg2ImgPipeline": "flux", "FluxHighresPipeline": "flux"}


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
        return self.info.alias == "embedded"


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
    info = REGISTRY.get(spec.lower())
    if info is None and not re.fullmatch(r"[\w.-]+/[\w.-]+", spec):
        raise ModelError(_unknown(spec))
    if info is not None and info.hub_id is None:
        folder = (shipped or {})[info.alias]()
        return _check_folder(folder, info.alias, info, None, None, False, weights)
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
    info = REGISTRY.get(spec.lower())
    if info is not None and info.hub_id is None:
        return info.alias, info, (shipped or {})[info.alias]()
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
        return FAMILIES[label]
    raise ModelError(f"model {name!r} is of the unsupported family {label!r}; supported: {_families()}")


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
    if isinstance(index.get("_class_name"), list):
        found.append(f"{index['_class_name'][0]}.py")
    for part, (library, _) in components(index).items():
        if library not in TRUSTED_LIBRARIES:
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
    arch = architecture(folder, name, index)
    base = info or ModelInfo(name, family, None, "unknown: see the model's own card", "local or hub model")
    if info is None and not arch.guidance_embeds:
        base = replace(base, steps=4, guidance=0.0, max_sequence_length=256)
    own = read_json(folder / "gensparse.json", name) if (folder / "gensparse.json").is_file() else {}
    profile = folder / OWN_FILES[1]
    return replace(base, architecture=arch, profile=str(profile) if profile.is_file() else None, **own_facts(own))


# key of gensparse.json -> (field, type, lowest value)
_OWN_NUMBERS = {
    "native_size": ("native_size", int, 16),
    "max_sequence_length": ("max_sequence_length", int, 1),
    "num_inference_steps": ("steps", int, 1),
    "true_cfg_scale": ("guidance", float, 0),
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


def architecture(folder: Path, name: str, index: Mapping[str, Any]) -> Architecture:
    """Read the sizes of a FLUX folder from transformer/config.json and vae/config.json."""
    dit = read_json(folder / "transformer" / "config.json", name)
    vae = read_json(folder / "vae" / "config.json", name)
    vae_class = str(vae.get("_class_name", "AutoencoderKL"))
    tiny = vae_class == "AutoencoderTiny"
    channels = vae.get("decoder_block_out_channels" if tiny else "block_out_channels") or (128, 256, 512, 512)
    encoders = {"text_encoder", "text_encoder_2"} & set(index)
    try:
        return Architecture(
            double_blocks=int(dit.get("num_layers", 19)),
            single_blocks=int(dit.get("num_single_layers", 38)),
            heads=int(dit.get("num_attention_heads", 24)),
            head_dim=int(dit.get("attention_head_dim", 128)),
            in_channels=int(dit.get("in_channels", 64)),
            guidance_embeds=bool(dit.get("guidance_embeds", False)),
            vae_class=vae_class,
            vae_channels=tuple(int(c) for c in channels),
            vae_convs=_tiny_convs(vae) if tiny else _kl_convs(vae, len(channels)),
            encoder_params=sum(_stored_bytes(folder / part) for part in encoders) // 2,
        )
    except (TypeError, ValueError) as error:
        raise ModelError(f"model {name!r}: its configs hold impossible sizes ({error}); download it again") from error


def _tiny_convs(vae: Mapping[str, Any]) -> tuple[int, ...]:
    """AutoencoderTiny: three convolutions per block and one behind them; its list starts at the lowest level."""
    return tuple(3 * int(count) + 1 for count in reversed(vae.get("num_decoder_blocks") or (3, 3, 3, 1)))


def _kl_convs(vae: Mapping[str, Any], levels: int) -> tuple[int, ...]:
    """AutoencoderKL: two per residual block, one for upsampling, and the middle block at the lowest level."""
    each = 2 * (int(vae.get("layers_per_block") or 2) + 1) + 1
    return (each,) * (levels - 1) + (each + 4,)


def _stored_bytes(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.glob("*.safetensors"))


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
    """The component files to fetch: configs, tokenizers, and one set of safetensors (the variant's when named)."""
    parts = set(components(index))
    wanted = ["model_index.json", *OWN_FILES, *(["*.py"] if code else [])]
    for file in files:
        path = PurePosixPath(file)
        if path.parent.as_posix() not in parts or path.suffix.lower() in PICKLES:
            continue
        if path.suffix == ".py" and not code:
            continue
        if path.suffix == ".safetensors" and variant is None and _is_variant(path.name):
            continue
        wanted.append(file)
    return wanted


def _is_variant(name: str) -> bool:
    return bool(re.search(r"\.(fp16|bf16|fp8|non_ema|ema)[.-]", name))


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
