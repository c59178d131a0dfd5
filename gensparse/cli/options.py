"""Every flag that more than one verb has: its spelling, its help and its panel, written down once."""

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

MODEL, REQUEST, SIZE, SPARSE = "Model", "Request", "Size", "Sparse attention"
MACHINE, OUTPUT, REUSE, SUBJECTS = "Machine", "Output", "Reuse", "Subjects"


def _option(kind: Any, *names: str, panel: str, help: str, **more: Any) -> Any:
    return Annotated[kind, typer.Option(*names, help=help, rich_help_panel=panel, show_default=False, **more)]


_Text, _Whole, _Real, _Flag = str | None, int | None, float | None, bool | None

REQUEST_OPTIONS: dict[str, Any] = {
    "model": _option(_Text, "-m", "--model", panel=MODEL, help="Alias, hub id or folder (embedded)"),
    "dtype": _option(_Text, "--dtype", panel=MODEL, help="auto|fp16|bf16|fp32 (auto: bf16 where the hardware has it)"),
    "lora": _option(list[str] | None, "--lora", panel=MODEL, help="PATH[:SCALE] of a LoRA; repeat for more"),
    "revision": _option(_Text, "--revision", panel=MODEL, help="Branch, tag or commit on the hub", hidden=True),
    "variant": _option(_Text, "--variant", panel=MODEL, help="Weight variant, for instance fp16", hidden=True),
    "trust_remote_code": _option(
        _Flag, "--trust-remote-code", panel=MODEL, help="Run the code that a model folder brings", hidden=True
    ),
    "local_files_only": _option(
        _Flag, "--local-files-only", panel=MODEL, help="Use downloaded files only", hidden=True
    ),
    "negative_prompt": _option(_Text, "-n", "--negative-prompt", panel=REQUEST, help="What to steer away from"),
    "steps": _option(_Whole, "--steps", "--num-inference-steps", panel=REQUEST, help="1 to 1000 (model's)"),
    "guidance": _option(_Real, "--guidance", "--guidance-scale", panel=REQUEST, help="0 to 100 (model's)"),
    "seed": _option(list[int] | None, "-s", "--seed", panel=REQUEST, help="Seed; repeat for more pictures (random)"),
    "num_images": _option(_Whole, "--num-images", panel=REQUEST, help="Pictures, seeds counted up (1)"),
    "size": _option(_Text, "--size", panel=SIZE, help="4096, 3840x2160 (width x height), 4k, 2x, 16:9@8mp (model's)"),
    "width": _option(_Whole, "--width", panel=SIZE, help="Pixels; together with --height", hidden=True),
    "height": _option(_Whole, "--height", panel=SIZE, help="Pixels; together with --width", hidden=True),
    "round": _option(_Text, "--round", panel=SIZE, help="nearest|up|strict: sizes the model cannot do (nearest)"),
    "attention": _option(
        _Text, "--attention", panel=SPARSE, help="auto|dense|NAME[:key=value,...], see `gensparse methods` (auto)"
    ),
    "highres": _option(
        _Text, "--highres", panel=SPARSE, help="auto|NAME[:key=value,...]: how sizes grow, see `models show` (auto)"
    ),
    "regions": _option(
        Path | None,
        "--regions",
        panel=REQUEST,
        help='JSON: [{"box": [x0, y0, x1, y1], "prompt": TEXT}] in 0..1, read by --highres c_upscale',
    ),
    "dense_steps": _option(_Whole, "--dense-steps", panel=SPARSE, help="First steps of each stage kept dense (0)"),
    "dense_layers": _option(
        _Text, "--dense-layers", panel=SPARSE, help="Layers kept dense, for instance 0,1,-1", hidden=True
    ),
    "config": _option(Path | None, "--config", panel=SPARSE, help="Method settings as a JSON file", hidden=True),
    "device": _option(_Text, "--device", panel=MACHINE, help="auto|cpu|cuda|cuda:1|mps (auto)"),
    "offload": _option(_Text, "--offload", panel=MACHINE, help="auto|none|model|group|sequential (GPUs) (auto)"),
    "quantize": _option(
        _Text, "--quantize", panel=MACHINE, help="auto|none|fp8|int8|nf4: weights of the denoiser (auto)"
    ),
    "tile": _option(
        _Text,
        "--tile",
        panel=MACHINE,
        help="Autoencoder: auto|none|64 to 8192 pixels|feather[:512]|synced[:512] (auto)",
    ),
    "chunk": _option(
        _Whole, "--chunk", panel=MACHINE, help="Tokens per piece of a feed-forward, 0 for all (auto)", hidden=True
    ),
    "max_vram": _option(_Text, "--max-vram", panel=MACHINE, help="Memory to use at most, 24GiB (what is free)"),
    "from_file": _option(Path | None, "--from", panel=REUSE, help="Picture or JSON whose request to repeat; flags win"),
    "preset": _option(_Text, "--preset", panel=REUSE, help="Start from a saved preset", hidden=True),
    "save_preset": _option(_Text, "--save-preset", panel=REUSE, help="Save these settings by name", hidden=True),
}

SUBJECT_OPTIONS: dict[str, Any] = {
    "subject": _option(
        list[str] | None,
        "--subject",
        panel=SUBJECTS,
        help="NAME=IMAGE[@MASK][,IMAGE[@MASK]...], or NAME alone; repeat for up to 5 subjects",
    ),
    "subject_prompt": _option(
        list[str] | None, "--subject-prompt", panel=SUBJECTS, help="NAME=TEXT: what it looks like; repeat (its name)"
    ),
    "subject_negative": _option(
        list[str] | None,
        "--subject-negative",
        panel=SUBJECTS,
        help="NAME=TEXT: what is not to be in its box, of subjects by words; repeat (that of the picture)",
        hidden=True,
    ),
    "layout": _option(
        Path | None, "--layout", panel=SUBJECTS, help='JSON: [{"subject": NAME, "box": [x0, y0, x1, y1]}], in 0..1'
    ),
    "subject_method": _option(
        _Text,
        "--subject-method",
        panel=SUBJECTS,
        help="auto|freecustom|magicface|isolation|reference_only|storydiffusion|masactrl|style_aligned|primecomposer, "
        "or by words regional|consistory|multidiffusion, with [:key=value,...] (auto)",
    ),
}

OUTPUT_OPTIONS: dict[str, Any] = {
    "output": _option(_Text, "-o", "--output", panel=OUTPUT, help="FILE, DIR/ or - for stdout (a new run folder)"),
    "image_format": _option(_Text, "--image-format", panel=OUTPUT, help="png|webp|jpg|tiff (by file name, else png)"),
    "overwrite": _option(_Flag, "--overwrite", panel=OUTPUT, help="Replace existing files"),
    "no_metadata": _option(_Flag, "--no-metadata", panel=OUTPUT, help="Write pixels only"),
    "no_prompt": _option(_Flag, "--no-prompt", panel=OUTPUT, help="Leave the prompt out of the metadata"),
    "sidecar": _option(_Flag, "--sidecar", panel=OUTPUT, help="Also write the metadata as FILE.json", hidden=True),
    "preview_dir": _option(
        Path | None, "--preview-dir", panel=OUTPUT, help="Keep a small picture of every stage here", hidden=True
    ),
}


def _show_all(ctx: typer.Context, wanted: bool) -> None:
    if wanted:
        for parameter in ctx.command.params:
            if hasattr(parameter, "hidden"):
                parameter.hidden = False
        typer.echo(ctx.get_help())
        raise typer.Exit


_HELP_ALL = Annotated[
    bool, typer.Option("--help-all", is_eager=True, callback=_show_all, help="Show every option and exit.")
]


def with_options(*groups: Mapping[str, Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Add groups of options to a verb `function(flags, own...)`; those given arrive in the dict `flags`."""

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        shared = {name: kind for group in groups for name, kind in group.items()}
        own = [p for p in inspect.signature(function).parameters.values() if p.name != "flags"]

        def command(**values: Any) -> None:
            values.pop("help_all")
            given = {name: values.pop(name) for name in shared}
            function({k: v for k, v in given.items() if v is not None and v != []}, **values)

        keyword = inspect.Parameter.KEYWORD_ONLY
        parameters = [p.replace(kind=keyword) for p in own]
        parameters += [inspect.Parameter(n, keyword, default=None, annotation=t) for n, t in shared.items()]
        parameters.append(inspect.Parameter("help_all", keyword, default=False, annotation=_HELP_ALL))
        command.__signature__ = inspect.Signature(parameters)
        command.__annotations__ = {p.name: p.annotation for p in parameters}
        command.__name__, command.__doc__ = function.__name__, function.__doc__
        return command

    return decorate
