"""What is written beside the pixels: metadata, attention summary, and the warnings of a run."""

import hashlib
import platform
from collections.abc import Mapping
from typing import Any

from gensparse import image_io
from gensparse.engine.machine import versions
from gensparse.engine.values import Resolved
from gensparse.image_io import Picture
from gensparse.models import ModelRef
from gensparse.request import Request, UpscaleRequest


def build_metadata(
    request: Request,
    resolved: Resolved,
    *,
    offload: str,
    attention: list[dict[str, Any]],
    source: Picture | None,
    key: str | None = None,
    subjects: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What is written into a picture; no date, so that the same request gives the same file."""
    import torch

    run: dict[str, Any] = {
        "device": resolved.device.split(":")[0],
        "dtype": resolved.dtype,
        "offload": offload,
        "quantize": request.quantize,
        "tile": request.tile,
        "chunk": request.chunk,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "attention": attention,
    }
    out = {
        "gensparse": image_io.METADATA_VERSION,
        "request": request.to_dict(portable=True),
        "licence": resolved.info.licence,
        "run": run,
        "versions": versions(),
    }
    if source is not None:
        out["source_sha256"] = source.sha256
        if source.mask is not None:
            out["mask_sha256"] = source.mask.sha256
    files = {name: facts for name, facts in (subjects or {}).items() if facts}
    if files:
        out["subjects_sha256"] = files
    if key is not None:
        out["key"] = key
    return out


def job_key(request: Request, source_sha256: str | None = None, mask_sha256: str | None = None) -> str:
    """sha256 of what was asked for: equal keys ask for the same picture, of whatever name, on whatever machine.

    Seeds that were left open stay open, so that the same command finds what it made before.
    """
    same = request.replace(image="-", mask=None) if isinstance(request, UpscaleRequest) else request
    files = f"{source_sha256} {mask_sha256}" if mask_sha256 else source_sha256
    return hashlib.sha256(f"{same.key()} {files}".encode()).hexdigest()


def word_warnings(ref: ModelRef, request: Request) -> list[str]:
    """Words of the prompt that the embedded model does not know; needs no weights."""
    if not ref.embedded or not request.prompt:
        return []
    from gensparse.embedded import unknown_words

    out = []
    for word, near in unknown_words(request.prompt).items():
        hint = f"did you mean {', '.join(near)}?" if near else "see `gensparse models show embedded`"
        out.append(f"the embedded model does not know {word[:40]!r}; {hint}")
    return out


def length_warnings(ref: ModelRef, pipe: Any, request: Request) -> list[str]:
    """How much of a long prompt the model does not read."""
    tokenizer = getattr(pipe, ref.info.row.tokenizer, None)
    limit, out = ref.info.max_sequence_length, []
    texts = {"the prompt": request.prompt}
    texts |= {f"the prompt of region {number}": region[-1] for number, region in enumerate(request.regions, 1)}
    for name, text in texts.items():
        if tokenizer is None or not text:
            continue
        count = len(tokenizer(text, truncation=False, verbose=False)["input_ids"])
        if count > limit:
            out.append(f"{name} has {count} tokens, the model reads {limit}: the last {count - limit} are ignored")
    return out


def reproduction_warnings(metadata: Mapping[str, Any]) -> list[str]:
    """Why running a picture's request again may not give the same bits here."""
    import torch

    out = []
    then, now = metadata.get("versions"), versions()
    for name in now if isinstance(then, Mapping) else ():
        if isinstance(then.get(name), str) and then[name] != now[name]:
            out.append(f"made with {name} {then[name][:20]}, here is {now[name]}: bits may differ")
    if "mask_sha256" in metadata:
        out.append("made with a mask, which a picture does not hold: give it again by --mask")
    run = metadata.get("run")
    threads = run.get("threads") if isinstance(run, Mapping) else None
    if isinstance(threads, int) and threads != torch.get_num_threads():
        out.append(f"made with {threads} threads, here are {torch.get_num_threads()}: bits may differ")
    return out
