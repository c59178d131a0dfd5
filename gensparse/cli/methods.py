"""`gensparse methods`: which sparse attention there is."""

import textwrap
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="Sparse attention methods: list, show.")


@app.command("list")
def list_methods() -> None:
    """List the methods that --attention takes.

    Examples:

      gensparse methods list

      gensparse methods show clear

      gensparse generate "a blue star" --size 2048 --attention clear:radius=8
    """
    from gensparse.cli import output
    from gensparse.cli.state import STATE
    from gensparse.methods import METHODS
    from gensparse.methods.describe import describe
    from gensparse.methods.unavailable import UNAVAILABLE

    facts = [describe(cls) for cls in METHODS.values()]
    if STATE.output == "json":
        output.print_json({"methods": facts, "not_available": UNAVAILABLE})
        return
    rows = [("dense", "no sparsity", "small pictures; the model as it is")]
    rows += [(item["name"], item["summary"], item["use"]) for item in facts]
    output.table("Methods", ("name", "what it does", "when to take it"), rows)
    output.table("Not available", ("name", "why"), list(UNAVAILABLE.items()))


@app.command("show")
def show_method(name: Annotated[str, typer.Argument(help="A name from `gensparse methods list`.")]) -> None:
    """Show one method: what it does, paper, licence, when to take it, settings, defaults and published settings.

    Examples:

      gensparse methods show clear

      gensparse methods show neighborhood

      gensparse methods show sliding_window --json
    """
    from gensparse.cli import output
    from gensparse.cli.state import STATE
    from gensparse.methods import method_class
    from gensparse.methods.describe import describe
    from gensparse.methods.unavailable import UNAVAILABLE

    if name in UNAVAILABLE:
        if STATE.output == "json":
            output.print_json({"name": name, "not_available": UNAVAILABLE[name]})
        else:
            output.print_out(f"{name} is not available: {UNAVAILABLE[name]}.")
        return
    facts = describe(method_class(name))
    if STATE.output == "json":
        output.print_json(facts)
        return
    output.print_out(f"{facts['about']}\n")
    output.facts({"paper": facts["paper"], "licence": facts["licence"], "when": facts["use"]})
    if facts["settings"]:
        output.print_out("\nsettings")
        for key, text in facts["settings"].items():
            output.print_out(_indented(f"{key}: {text}"))
    output.print_out(f"\n--attention {facts['text']}")
    for model, text in facts["presets"].items():
        output.print_out(f"--attention {name}:preset={model:<24} = {text}")


def _indented(text: str) -> str:
    return textwrap.fill(text, 100, initial_indent="  ", subsequent_indent="      ")
