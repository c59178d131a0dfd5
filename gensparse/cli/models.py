"""`gensparse models`: which models there are."""

from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="Supported models: list, show.")


@app.command("list")
def list_models() -> None:
    """List the models known by name.

    Examples:

      gensparse models list

      gensparse models list --json

      gensparse models show embedded
    """
    from dataclasses import asdict

    from gensparse.cli import output
    from gensparse.cli.state import STATE
    from gensparse.models import FAMILIES, REGISTRY

    if STATE.output == "json":
        output.print_json({"models": [asdict(info) for info in REGISTRY.values()], "pipelines": FAMILIES})
        return
    rows = [
        (m.alias, m.family, f"{m.native_size} px", m.licence, m.hub_id or "shipped", m.summary)
        for m in REGISTRY.values()
    ]
    output.table("Models", ("name", "family", "native", "licence", "source", "what it is"), rows)
    if STATE.output == "human":
        output.print_err(f"-m also takes any diffusers folder or hub id of: {', '.join(sorted(FAMILIES))}")


@app.command("show")
def show_model(
    model: Annotated[str, typer.Argument(help="Alias, hub id or folder.")],
    revision: Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit on the hub.")] = None,
) -> None:
    """Show one model; for `embedded` also the words it knows.

    Examples:

      gensparse models show embedded

      gensparse models show flux.1-dev

      gensparse models show ./my-flux-folder --json
    """
    from gensparse.cli import output
    from gensparse.cli.state import STATE
    from gensparse.engine import open_model
    from gensparse.request import GenerateRequest

    request = GenerateRequest(model=model, revision=revision, local_files_only=STATE.offline)
    ref = open_model(request, weights=False)
    info, arch = ref.info, ref.info.architecture
    facts = {
        "name": ref.name,
        "family": info.family,
        "source": info.hub_id or ("shipped" if ref.embedded else "local"),
        "licence": info.licence,
        "native_size": info.native_size,
        "sizes": f"multiples of {arch.multiple} px",
        "steps": info.steps,
        "guidance": f"{info.guidance:g} ({info.guidance_kind})",
        "prompt_tokens": info.max_sequence_length,
        "blocks": f"{arch.double_blocks} double, {arch.single_blocks} single, {arch.heads} heads of {arch.head_dim}",
        "parameters": f"{arch.transformer_params / 1e6:.0f} M in the transformer blocks",
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


def _vocabulary() -> list[str]:
    from gensparse.embedded import vocabulary

    return sorted(vocabulary())


def _wrapped(words: list[str]) -> str:
    import shutil
    import textwrap

    width = max(20, min(100, shutil.get_terminal_size((80, 24)).columns))
    return textwrap.fill(" ".join(words), width, initial_indent="  ", subsequent_indent="  ")
