"""The page docs/methods.md, made from the method classes and from what was measured.

python -P -m gensparse.testing.methods_page docs/methods.md
"""

import csv
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gensparse.errors import ConfigError, short
from gensparse.methods import METHODS, parse_method
from gensparse.methods.describe import describe
from gensparse.methods.unavailable import UNAVAILABLE

COMMAND = "python -P -m gensparse.testing.methods_page docs/methods.md"

QUALITY = Path(__file__).resolve().parents[2] / "docs" / "benchmarks" / "methods_quality.csv"
"""What was measured on the embedded model, one number a row; only a checkout has it."""

COLUMNS = ("attention", "size", "prompts", "measure", "value", "low", "high", "commit")

HEAD = f"""# Methods

<!-- This page is made by a program, do not edit it: {COMMAND} -->

A method is one published way to make attention sparse. `gensparse.apply(pipe, "NAME")` and `--attention NAME` take it,
with settings as `NAME:key=value,key=value` (sizes per axis as `80x80`, flags as `true` or `false`), or with those
published for a model as `NAME:preset=MODEL`. In Python they are classes of `gensparse.methods`. Windows count tokens,
and grids smaller than a window shorten it. [models.md](models.md) says which method works on which model.

All code here is ours, written from the papers; licences below bind weights you load, and tell what the authors allow of
theirs. *Measured quality* is what the [embedded model](embedded.md) draws with the method: numbers of
[benchmarks/methods_quality.csv](benchmarks/methods_quality.csv), each with its 95% interval, and nothing where nothing
was measured. It says little about larger models.
"""


NOT_AVAILABLE = "## Not available\n\n" + "\n".join(f"- **{name}**: {why}." for name, why in UNAVAILABLE.items())


def page(quality: Path = QUALITY) -> str:
    """The text of docs/methods.md."""
    facts = [describe(cls) for cls in METHODS.values()]
    measured = read_quality(quality)
    lines = [f"| [`{item['name']}`](#{item['name']}) | {_sentence(item['use'])} |" for item in facts]
    table = "\n".join(["| method | when to take it |", "|---|---|", *lines])
    parts = [HEAD, table, *(_section(item, measured.get(item["name"], ())) for item in facts), NOT_AVAILABLE]
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def read_quality(path: Path) -> dict[str, list[dict[str, str]]]:
    """Rows of the table by method, checked; none where there is no file.

    Raises:
        ConfigError: other columns, an unknown method or setting, or a value that is no number.
    """
    if not path.is_file():
        return {}
    with open(path, encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
    if tuple(reader.fieldnames or ()) != COLUMNS:
        raise ConfigError(f"{path.name} has the columns {reader.fieldnames}; write {', '.join(COLUMNS)}.")
    found: dict[str, list[dict[str, str]]] = {}
    for number, row in enumerate(rows, start=2):
        if None in row or None in row.values():
            raise ConfigError(f"{path.name} line {number} has another number of values than there are columns.")
        for column in ("size", "prompts", "value", "low", "high"):
            _number(path, number, column, row[column])
        found.setdefault(parse_method(row["attention"]).name, []).append(row)
    return found


def _number(path: Path, line: int, column: str, text: str) -> None:
    try:
        float(text)
    except ValueError as error:
        raise ConfigError(f"{path.name} line {line} has {column}={short(text)}; write a number.") from error


def _section(item: Mapping[str, Any], measured: Sequence[Mapping[str, str]]) -> str:
    lines = [f"## {item['name']}", item["about"].replace("|", r"\|"), ""]
    lines += [
        f"- **When:** {_sentence(item['use'])}",
        f"- **Paper:** {_sentence(item['paper'])}",
        f"- **Licence:** {_sentence(item['licence'])}",
        f"- **Defaults:** `{item['text']}`",
    ]
    lines += [f"- `{item['name']}:preset={model}` is `{text}`" for model, text in item["presets"].items()]
    lines.append(f"- **Measured quality:** {'' if measured else 'not measured.'}".rstrip())
    if measured:
        lines += ["", "| settings | size | prompts | measure | value | commit |", "|---|---|---|---|---|---|"]
        lines += [_measured(row) for row in measured]
    if item["settings"]:
        lines += ["", "| setting | default | what it is |", "|---|---|---|"]
        lines += [_setting(item, name, text) for name, text in item["settings"].items()]
    return "\n".join(lines)


def _measured(row: Mapping[str, str]) -> str:
    interval = f"{row['value']} ({row['low']}..{row['high']})"
    return (
        f"| `{row['attention']}` | {row['size']} | {row['prompts']} | {row['measure']} | {interval} | {row['commit']} |"
    )


def _setting(item: Mapping[str, Any], name: str, text: str) -> str:
    value = item["defaults"][name]
    default = "x".join(map(str, value)) if isinstance(value, list) else str(value)
    return f"| `{name}` | {default} | {text.replace('|', chr(92) + '|')} |"


def _sentence(text: str) -> str:
    """With a capital letter and a stop."""
    return text[:1].upper() + text[1:] + ("" if text.endswith(".") else ".")


if __name__ == "__main__":
    text = page()
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(text, encoding="utf-8")
    else:
        sys.stdout.write(text)
