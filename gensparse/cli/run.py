"""What `generate` and `upscale` share: run a request, write its pictures, say where they are."""

from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gensparse import image_io
from gensparse.cli import output
from gensparse.cli.paths import Target, plan_target, stage_folders_near
from gensparse.cli.progress import Progress
from gensparse.cli.state import STATE
from gensparse.errors import ConfigError
from gensparse.request import Request, parse_size

if TYPE_CHECKING:
    from gensparse.engine import Output, OutputOptions, Result, Runner


def run_requests(requests: Sequence[Request], flags: Mapping[str, Any]) -> None:
    """Run requests one after the other, from their flags to their pictures and paths on stdout."""
    from gensparse.engine import Runner

    if len(requests) > 1 and not str(flags.get("output") or "/").endswith(("/", "\\")):
        raise ConfigError(f"{len(requests)} pictures need a folder; use -o FOLDER/")
    if "from_file" in flags:
        warn_of_differences(flags["from_file"], requests[0])
    runner = Runner()
    for request in requests:
        run_one(runner, request, flags)


def run_one(runner: "Runner", request: Request, flags: Mapping[str, Any]) -> None:
    """Run one request into the files that `-o` names, and show the result."""
    count = max(len(request.seed), request.num_images)
    target = plan_target(flags.get("output"), flags.get("image_format"), count, overwrite=_on(flags, "overwrite"))
    cancel = STATE.interrupts.cancel if STATE.interrupts else None
    try:
        with Progress() as progress:
            options = output_options(flags, target)
            result = runner.execute(request, options, on_event=progress.on_event, cancel=cancel)
    finally:
        target.clean()
    if target.paths:
        show_result(result)
    else:
        output.write_bytes(_encoded(result.outputs[0], target.image_format, request, flags))


def output_options(flags: Mapping[str, Any], target: Target, *, key: str | None = None) -> "OutputOptions":
    """The engine's output options from flags."""
    from gensparse.engine import OutputOptions

    previews = flags.get("preview_dir")
    if previews is not None:
        plan_target(f"{previews}/", None, 1, overwrite=True)
    return OutputOptions(
        paths=target.paths,
        image_format=target.image_format,
        overwrite=_on(flags, "overwrite"),
        metadata=not _on(flags, "no_metadata"),
        prompt_in_metadata=not _on(flags, "no_prompt"),
        sidecar=_on(flags, "sidecar"),
        preview_dir=previews,
        stages_dir=target.stages_dir,
        also_read=stage_folders_near(flags["from_file"]) if "from_file" in flags else (),
        key=key,
    )


def _on(flags: Mapping[str, Any], name: str) -> bool:
    return bool(flags.get(name, False))


def warn_of_differences(source: Path, request: Request) -> None:
    """Say before the work why the result will not be the picture it starts from."""
    from gensparse.engine import reproduction_warnings

    metadata = image_io.read_metadata(source)
    output.warn(reproduction_warnings(metadata))
    before = metadata["request"].get("size")
    if request.kind != "generate" or not before or not request.size:
        return
    (height, width), _ = parse_size(before).resolve(base=(1, 1), multiple=1)
    (new_height, new_width), _ = parse_size(request.size).resolve(base=(height, width), multiple=1)
    if abs(new_height * width / (height * new_width) - 1) > 0.02:
        output.warn([f"{source.name} is {width}x{height}: another aspect ratio gives another picture"])


def _encoded(item: "Output", kind: str, request: Request, flags: Mapping[str, Any]) -> bytes:
    assert item.image is not None
    buffer = BytesIO()
    metadata = None if _on(flags, "no_metadata") else item.metadata
    image_io.encode_image(item.image, buffer, kind, metadata=metadata, from_picture=request.kind == "upscale")
    return buffer.getvalue()


# ------------------------------------------------------------------------------------------------------------- results
def show_result(result: "Result") -> None:
    """The result on stdout in the format in force, a summary on stderr."""
    from gensparse.engine.words import summary

    if STATE.output == "json":
        output.print_json(result.to_dict())
        return
    if STATE.output == "human":
        output.print_err(summary(result))
    for item in result.outputs:
        text = str(item.path)
        if STATE.output == "agent":
            text = f"{item.path} {item.width}x{item.height} seed={item.seed} sha256={(item.sha256 or '')[:12]}"
        output.print_out(text)
    if STATE.output == "agent":
        output.print_out(summary(result))
