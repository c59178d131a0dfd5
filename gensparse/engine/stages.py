"""Finished stages of a picture, kept so that an interrupted run continues and a draft grows."""

import contextlib
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from gensparse.engine.machine import versions
from gensparse.engine.values import Resolved
from gensparse.errors import OutputError
from gensparse.image_io import Picture
from gensparse.request import Request

KEPT_PICTURES = 32  # per output folder
KEY_LENGTH = 24
_SAME_NATIVE = ("auto", "none", "cascade")  # ways whose native stage is the plain pipeline's, to the bit


class StageCache:
    """Finished stages of one picture, in memory and in folders: written to the first, read from all.

    Args:
        folders: where stages lie; the first is written to when `writable`.
        keep_native: leave the native stage behind when the picture is written, so that a larger run can continue it.
    """

    def __init__(self, folders: Sequence[Path], *, writable: bool, keep_native: bool) -> None:
        from gensparse.highres.stage_store import FolderStageStore

        self._stores = [FolderStageStore(folder) for folder in folders]
        self._writable = writable and bool(folders)
        self._keep_native = keep_native
        self._memory: dict[int, Any] = {}
        self._reports: dict[int, dict[str, Any]] = {}

    def load(self, index: int) -> Any:
        """The stage's result, or None."""
        result = self._memory.get(index)
        for store in self._stores:
            result = result if result is not None else store.load(index)
        return result

    def save(self, index: int, result: Any) -> None:
        """Keep a finished stage, unless its numbers broke. Raises OutputError when the folder cannot be written."""
        if not bool(result.latents.isfinite().all()):
            return  # an autoencoder that overflowed, computed again in float32
        self._memory[index] = result
        if not self._writable:
            return
        folder = self._stores[0].folder
        try:
            self._stores[0].save(index, result)
        except (OSError, SafetensorError) as error:
            raise OutputError(f"could not keep stage {index + 1} in {str(folder)!r} ({error}); free space") from error

    def keep_report(self, index: int, report: Mapping[str, Any]) -> None:
        """Keep what the attention of a stage reported, so that a resumed picture can still say it."""
        self._reports[index] = json.loads(json.dumps(report, default=str))
        if self._writable:
            with contextlib.suppress(OSError):
                _report_path(self._stores[0].folder, index).write_text(json.dumps(self._reports[index]))

    def reports(self) -> list[dict[str, Any]]:
        """The reports of all stages, whichever run made them."""
        found = dict(self._reports)
        for store in self._stores:
            for path in store.folder.glob("stage-*.json"):
                with contextlib.suppress(OSError, ValueError):
                    found.setdefault(int(path.stem.removeprefix("stage-")), json.loads(path.read_text()))
        return [found[index] for index in sorted(found)]

    def finish(self) -> None:
        """The picture is written: drop what only an interrupted run would need."""
        self._memory.clear()
        if not self._writable:
            return
        store = self._stores[0]
        native = (store.path(0), _report_path(store.folder, 0)) if self._keep_native else ()
        with contextlib.suppress(OSError):
            for path in store.folder.glob("stage-*"):
                if path not in native:
                    path.unlink()
            store.folder.rmdir()  # only when nothing is left
        _prune(store.folder.parent)


def _prune(root: Path) -> None:
    """Drop the oldest stages of a folder, so that drafts do not pile up."""
    with contextlib.suppress(OSError):
        folders = [p for p in root.iterdir() if p.is_dir() and len(p.name) == KEY_LENGTH]
        for folder in sorted(folders, key=lambda p: p.stat().st_mtime, reverse=True)[KEPT_PICTURES:]:
            for path in folder.glob("stage-*"):
                path.unlink(missing_ok=True)
            folder.rmdir()


def _report_path(folder: Path, index: int) -> Path:
    return folder / f"stage-{index}.json"


def stage_key(
    request: Request, resolved: Resolved, source: Picture | None, subjects: Mapping[str, Any] | None = None
) -> str:
    """Name of the folder of a picture's stages: everything that decides its bits except the final size."""
    import torch

    data = request.replace(size=None).to_dict()
    for name in request.machine_fields | request.piece_fields | {"round", "image", "mask", "subject"}:
        data.pop(name, None)
    if request.highres in _SAME_NATIVE:
        data.pop("highres")
    data |= {"device": resolved.device, "threads": torch.get_num_threads(), "versions": versions()}
    data["source"] = source.sha256 if source else None
    data["mask"] = source.mask.sha256 if source and source.mask else None
    if subjects is not None:  # by their bytes and their order, not by their files' names
        data["subjects"] = list(subjects.items())
    data["size"] = resolved.request.size if source else None
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:KEY_LENGTH]
