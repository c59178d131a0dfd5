"""`gensparse models`: which models there are, what `generate` can run, and what methods can make sparse."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from gensparse.engine.support import Part, Support

app = typer.Typer(no_args_is_help=True, help="Supported models: list, show, check, convert.")


@app.command("list")
def list_models() -> None:
    """List the models that `generate` knows by name, and the classes whose attention `apply` can make sparse.

    Examples:

      gensparse models list

      gensparse models list --json

      gensparse models show embedded
    """
    from dataclasses import asdict

    from gensparse.cli import output
    from gensparse.cli.state import STATE
    from gensparse.models import FAMILIES, REGISTRY

    classes = _model_classes()
    if STATE.output == "json":
        models = [asdict(info) for info in REGISTRY.values()]
        output.print_json({"models": models, "pipelines": FAMILIES, "families": classes})
        return
    rows = [
        (m.alias, m.family, f"{m.native_size} px", m.licence, m.hub_id or "shipped", m.summary)
        for m in REGISTRY.values()
    ]
    output.table("Models of generate", ("name", "family", "native", "licence", "source", "what it is"), rows)
    if STATE.output == "human":
        output.print_out(f"-m also takes any diffusers folder or hub id of: {', '.join(sorted(FAMILIES))}\n")
    lines = [(family, ", ".join(names)) for family, names in classes.items()]
    output.table("Families of gensparse.apply() in Python", ("family", "classes of diffusers"), lines)


@app.command("show")
def show_model(
    model: Annotated[str, typer.Argument(help="Alias, hub id or folder; or a model class of diffusers.")],
    revision: Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit on the hub.")] = None,
) -> None:
    """Show one model; for `embedded` also the words it knows, for a model class what its family is like.

    Examples:

      gensparse models show embedded

      gensparse models show ./my-flux-folder --json

      gensparse models show WanTransformer3DModel
    """
    from gensparse.cli import output
    from gensparse.cli.state import STATE
    from gensparse.families import FAMILIES

    if model in FAMILIES:
        _show_family(model)
        return
    from gensparse.engine import open_model
    from gensparse.request import GenerateRequest

    request = GenerateRequest(model=model, revision=revision, local_files_only=STATE.offline)
    ref = open_model(request, weights=False)
    info, arch = ref.info, ref.info.architecture
    facts = {
        "name": ref.name,
        "family": f"{info.family} ({info.row.title})",
        "source": info.hub_id or ("shipped" if ref.embedded else "local"),
        "licence": info.licence,
        "native_size": info.native_size,
        "sizes": f"multiples of {arch.multiple} px",
        "steps": info.steps,
        "guidance": f"{info.guidance:g} ({info.guidance_kind})",
        "prompt_tokens": info.max_sequence_length,
        "highres": f"{', '.join(info.row.ways)} (auto: {info.row.auto})",
        "blocks": arch.blocks,
        "parameters": f"{arch.transformer_params / 1e6:.0f} M in the blocks of the denoiser",
        "autoencoder": arch.vae_class,
    }
    words = _vocabulary() if ref.embedded else []
    if STATE.output == "json":
        output.print_json(facts | ({"vocabulary": words} if words else {}))
        return
    output.facts(facts)
    if words:
        output.print_out(f"vocabulary ({len(words)} words)")
        output.print_out(_wrapped(words))


@app.command("check")
def check_model(
    model: Annotated[str, typer.Argument(help="Diffusers folder (of a pipeline or a denoiser), hub id or alias.")],
    attention: Annotated[
        str | None, typer.Option("--attention", help="NAME[:key=value,...], as in `gensparse methods list`.")
    ] = None,
    size: Annotated[
        str | None, typer.Option("--size", help="Pixels, as in generate (1024x1024; clips 832x480).")
    ] = None,
    frames: Annotated[int | None, typer.Option("--frames", min=1, help="Frames of a clip (81).")] = None,
    text: Annotated[int | None, typer.Option("--text", min=0, help="Text tokens (the model's, else 512).")] = None,
    revision: Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit on the hub.")] = None,
) -> None:
    """Say whether a method works on a checkpoint, from its configs alone: no weights, no GPU, nothing is run.

    It covers every family whose attention `gensparse.apply()` can make sparse; `generate` runs fewer of them. Exit code
    2: a bad method, or one that does not fit this model; 4: no such model, or one that cannot be made sparse.

    Examples:

      gensparse models check ./wan2.1 --attention radial --size 1280x720 --frames 81

      gensparse models check stabilityai/stable-diffusion-3.5-medium --attention clear:radius=8 --size 2048

      gensparse models check ./my-unet --json
    """
    import os

    from gensparse.cli import output
    from gensparse.cli.state import STATE
    from gensparse.engine.support import check_support
    from gensparse.request import parse_size

    pixels: tuple[int | None, int | None] = (None, None)
    if size is not None:
        pixels = parse_size(size).resolve(base=(1024, 1024), multiple=1)[0]
    answer = check_support(
        model,
        attention,
        height=pixels[0],
        width=pixels[1],
        frames=frames,
        text=text,
        revision=revision,
        local_files_only=STATE.offline,
        token=os.environ.get("HF_TOKEN") or None,
    )
    if STATE.output == "json":
        output.print_json({"status": "ok", **answer.to_dict()})
        return
    _print_answer(answer, attention)


@app.command("convert")
def convert_weights(
    source: Annotated[Path, typer.Argument(help="Pickled checkpoint: .bin, .pt, .pth or .ckpt.", metavar="FILE")],
    output_file: Annotated[
        Path | None, typer.Option("-o", "--output", help="Result (.safetensors); beside FILE by default.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a result that exists.")] = False,
) -> None:
    """Write a pickled checkpoint as a safetensors file, without running what is in the pickle.

    Some weights, such as those of MIP-Adapter, are published as pickles, which could run code when opened. They are
    read as tensors and plain containers alone; a file that wants more is refused. Exit code 4: refused, damaged or
    missing; 6: the result exists or cannot be written.

    Examples:

      gensparse models convert model_sdxl.bin

      gensparse models convert ip-adapter.bin -o weights/ip-adapter.safetensors

      gensparse models convert old.ckpt --overwrite --json
    """
    from gensparse.cli import output
    from gensparse.cli.state import STATE
    from gensparse.engine.convert import convert

    done = convert(source, output_file, overwrite=overwrite)
    if STATE.output == "json":
        output.print_json({"status": "ok", **done._asdict(), "path": str(done.path)})
        return
    extra = f", {done.left_out} values that are no tensors left out" if done.left_out else ""
    output.print_out(f"{done.path}: {done.tensors} tensors, {done.bytes} bytes{extra}")


def _print_answer(answer: "Support", attention: str | None) -> None:
    from gensparse.cli import output

    frames = f", {answer.frames} frames" if answer.frames else ""
    text = f", {answer.text} text tokens" if answer.text else ""
    runs = "yes" if answer.generates else "no; use it in Python with gensparse.apply(pipe, method)"
    output.facts(
        {
            "model": answer.name,
            "pipeline": answer.pipeline or "a denoiser on its own",
            "generate": runs,
            "size": f"{answer.width}x{answer.height}{frames}{text}",
        }
    )
    for part in answer.parts:
        output.print_out("")
        output.facts(_part_facts(part))
    if attention is not None:
        verdict = "works" if answer.works else "changes nothing here: every site would run dense"
        output.print_out(f"\n{attention}: {verdict}")


def _part_facts(part: "Part") -> dict[str, object]:
    native = "not known" if part.native_tokens is None else part.native_tokens
    facts: dict[str, object] = {
        "part": "the denoiser" if part.part == "." else part.part,
        "class": f"{part.model} ({part.family})",
        "sites": f"{sum(part.sites.values())} of {part.attention} attention modules",
        "native tokens": native,
    }
    for role, count in part.sites.items():
        grid = "x".join(map(str, part.grids[role][0 if part.grids[role][0] > 1 else 1 :]))
        facts[f"  {role}"] = f"{count} sites, {part.tokens[role]} tokens, grid {grid}"
    if part.sparse is not None:
        share = "" if part.density is None else f", {part.density:.1%} of the query-key pairs"
        facts["sparse"] = f"{part.sparse} sites{share if part.sparse else ''}"
        facts["dense"] = _reasons(part.dense)
        if part.first_step:
            facts["first step"] = _reasons(part.first_step)
    return facts


def _reasons(dense: Mapping[str, int]) -> str:
    return "; ".join(f"{count} sites: {reason}" for reason, count in dense.items()) or "none"


def _model_classes() -> dict[str, list[str]]:
    """Family -> its model classes."""
    from gensparse.families import FAMILIES, family_named

    found: dict[str, list[str]] = {}
    for name in FAMILIES:
        found.setdefault(family_named(name).name, []).append(name)
    return found


def _show_family(model_class: str) -> None:
    from gensparse.cli import output
    from gensparse.cli.state import STATE
    from gensparse.families import family_named, notes_of

    family = family_named(model_class)
    facts: dict[str, Any] = {
        "class": model_class,
        "family": family.name,
        "classes": _model_classes()[family.name],
        "notes": notes_of(model_class),
    }
    if STATE.output == "json":
        output.print_json(facts)
        return
    output.facts(facts | {"classes": ", ".join(facts["classes"])})


def _vocabulary() -> list[str]:
    from gensparse.embedded import vocabulary

    return sorted(vocabulary())


def _wrapped(words: list[str]) -> str:
    import shutil
    import textwrap

    width = max(20, min(100, shutil.get_terminal_size((80, 24)).columns))
    return textwrap.fill(" ".join(words), width, initial_indent="  ", subsequent_indent="  ")
