"""Weights into memory: the pipeline of a checked model, LoRA files, and their place on the device."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gensparse.engine.machine import quantizer, torch_dtype
from gensparse.engine.subjects import CLASSES
from gensparse.errors import ConfigError, ModelError
from gensparse.models import PICKLES, ModelRef

if TYPE_CHECKING:
    import torch


def load_pipeline(
    ref: ModelRef,
    dtype: str,
    device: str,
    offload: str,
    lora: Sequence[str],
    *,
    quantize: str = "none",
    subjects: bool = False,
) -> Any:
    """Load the high-resolution pipeline of a checked model. Raises ModelError when the files do not load.

    Args:
        quantize: "none", "fp8", "int8" or "nf4": how the denoiser's weights are stored; the rest stays in `dtype`.
        subjects: the pipeline that takes them.
    """
    at_once = quantize in ("int8", "nf4")  # these are stored so while they are read
    with _no_bars():
        pipe = _load_weights(ref, torch_dtype(dtype), quantize if at_once else "none", subjects)
    adapters = dict(_load_lora(pipe, item) for item in lora)
    if adapters and at_once:  # beside the weights: those are stored in fewer bits than could take it
        pipe.set_adapters(list(adapters), list(adapters.values()))
    elif adapters:
        for name, scale in adapters.items():
            pipe.fuse_lora(adapter_names=[name], lora_scale=scale)
    if quantize == "fp8":
        import torch

        denoiser_of(pipe).enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch_dtype(dtype))
    _place(pipe, device, offload)
    return pipe


def denoiser_of(pipe: Any) -> Any:
    """The component with attention."""
    return pipe.transformer if getattr(pipe, "transformer", None) is not None else pipe.unet


def _quantization(part: str, quantize: str, dtype: "torch.dtype") -> dict[str, Any]:
    """The argument of `from_pretrained` that stores the weights of `part` in 8 or 4 bits; none for "none"."""
    if quantize == "none":
        return {}
    from diffusers import BitsAndBytesConfig, TorchAoConfig
    from diffusers.quantizers import PipelineQuantizationConfig

    config: Any
    if quantize == "nf4":
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    elif quantizer(quantize) == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig

        config = TorchAoConfig(Int8WeightOnlyConfig())
    else:
        config = BitsAndBytesConfig(load_in_8bit=True)
    return {"quantization_config": PipelineQuantizationConfig(quant_mapping={part: config})}


def _load_weights(ref: ModelRef, dtype: "torch.dtype", quantize: str, subjects: bool) -> Any:
    from gensparse import pipelines

    row = ref.info.row
    cls = getattr(pipelines, CLASSES[row.highres] if subjects else row.highres)
    assert ref.folder is not None, "models without files can only be planned"
    if ref.embedded and quantize == "none":
        from gensparse.embedded import load_folder

        return cls.from_pipe(load_folder(ref.folder, dtype))
    try:
        return cls.from_pretrained(
            ref.folder,
            dtype=dtype,
            use_safetensors=True,
            variant=ref.variant,
            local_files_only=True,
            trust_remote_code=ref.remote_code,
            **_quantization(row.denoiser, quantize, dtype),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"model {ref.name!r} could not be loaded ({_first_line(error)}); download it again") from error


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    """Without the loading bars of diffusers and transformers, which would draw over our own progress."""
    from diffusers.utils import logging as ours
    from transformers.utils import logging as theirs

    shown = [library for library in (ours, theirs) if library.is_progress_bar_enabled()]
    for library in shown:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in shown:
            library.enable_progress_bar()


def parse_lora(text: str) -> tuple[str, float]:
    """Split PATH[:SCALE]; a colon of a Windows drive is not a scale."""
    path, colon, scale = text.rpartition(":")
    if not colon or len(path) <= 1 or "/" in scale or "\\" in scale:
        return text, 1.0
    try:
        return path, float(scale)
    except ValueError as error:
        raise ConfigError(f"LoRA scale is {scale!r}; write PATH or PATH:0.8") from error


def _load_lora(pipe: Any, item: str) -> tuple[str, float]:
    """(name, scale) of an adapter that was loaded."""
    path, scale = parse_lora(item)
    part = "transformer" if getattr(pipe, "transformer", None) is not None else "unet"
    name = f"lora{len(pipe.get_list_adapters().get(part, [])) if hasattr(pipe, 'get_list_adapters') else 0}"
    try:
        pipe.load_lora_weights(path, adapter_name=name, use_safetensors=True)
        return name, scale
    except ImportError as error:
        raise ModelError("LoRA files need peft; install it with `pip install gensparse[lora]`") from error
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"LoRA {Path(path).name!r} could not be loaded ({_first_line(error)}); check it") from error


def check_lora(items: Sequence[str]) -> None:
    """Check LoRA files by name before any weight is loaded. Raises ModelError for pickles and missing files."""

    for item in items:
        path, _ = parse_lora(item)
        if path.lower().endswith(PICKLES):
            raise ModelError(f"LoRA {Path(path).name!r} is a pickle, which can run code; use a .safetensors file")
        if path.lower().endswith(".safetensors") and not Path(path).is_file():
            raise ModelError(f"LoRA file {Path(path).name!r} does not exist; check its path")


def _place(pipe: Any, device: str, offload: str) -> None:
    if offload == "none" or device == "cpu":
        pipe.to(device)
    elif offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif offload == "group":
        import torch

        target = torch.device(device)
        # the autoencoder is small, and exact tiles need its weights in place
        pipe.enable_group_offload(
            onload_device=target, offload_type="block_level", num_blocks_per_group=1, exclude_modules=["vae"]
        )
    else:
        pipe.enable_sequential_cpu_offload(device=device)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
