"""`gensparse methods`: which sparse attention there is."""

import inspect
from dataclasses import MISSING, fields
from typing import Annotated, Any

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

    if STATE.output == "json":
        output.print_json({"methods": [describe(name, cls) for name, cls in METHODS.items()]})
        return
    rows = [("dense", "", "no sparsity")]
    rows += [(name, _defaults(cls), _summary(cls)) for name, cls in METHODS.items()]
    output.table("Methods", ("name", "defaults", "what it does"), rows)


@app.command("show")
def show_method(name: Annotated[str, typer.Argument(help="A name from `gensparse methods list`.")]) -> None:
    """Show one method: settings, defaults and source.

    Examples:

      gensparse methods show clear

      gensparse methods show neighborhood

      gensparse methods show sliding_window --json
    """
    from gensparse.cli import output
    from gensparse.cli.state import STATE
    from gensparse.errors import ConfigError, unknown_name
    from gensparse.methods import METHODS

    if name not in METHODS:
        raise ConfigError(unknown_name("method", name, METHODS))
    cls = METHODS[name]
    if STATE.output == "json":
        output.print_json(describe(name, cls))
        return
    output.print_out(f"{name}: {_source(cls)}\n")
    output.print_out(inspect.getdoc(cls) or "")
    output.print_out(f"\n--attention {name}:{_defaults(cls)}")


def describe(name: str, cls: type) -> dict[str, Any]:
    """A method as data."""
    settings = {item.name: _default(item) for item in fields(cls)}
    return {"name": name, "summary": _summary(cls), "source": _source(cls), "defaults": settings}


def _default(item: Any) -> Any:
    value = item.default if item.default is not MISSING else item.default_factory()
    return list(value) if isinstance(value, tuple) else value


def _defaults(cls: type) -> str:
    from gensparse.cli.requests import method_text

    text = method_text({"method": "x"} | {item.name: _default(item) for item in fields(cls)})
    return text.removeprefix("x").removeprefix(":")


def _summary(cls: type) -> str:
    return (inspect.getdoc(cls) or "").split("\n\n", 1)[0].replace("\n", " ")


def _source(cls: type) -> str:
    """First line of the method's module: what it is and where it was published."""
    module = inspect.getmodule(cls)
    return (inspect.getdoc(module) or "").split("\n", 1)[0] if module else ""
