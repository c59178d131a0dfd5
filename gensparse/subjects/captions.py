"""Prompts for regions by a vision-language model that lies on the user's disk."""

from pathlib import Path
from typing import Any

from gensparse.errors import ConfigError, short
from gensparse.subjects.region_prompts import Box

QUESTION = (
    "Describe what this part of a larger picture shows, in one sentence of at most 50 words: objects, materials, "
    "textures, light. Do not guess what lies outside."
)


class VisionCaptioner:
    """Calls a vision-language model for every region: (picture of the region, box) -> its prompt.

    The model is loaded from a folder by transformers' pipeline "image-text-to-text" at the first call; nothing is
    downloaded, and models that need code of their own are refused. `release()` gives its memory back.

    Args:
        path: folder of the model with its processor.
        question: what it is asked about every region.
        max_new_tokens: of an answer; text encoders of Stable Diffusion read 75.
        options: further arguments of `transformers.pipeline`, such as device="cuda" or dtype=torch.bfloat16.

    Raises:
        ConfigError: no such folder, or (at the first call) a model that cannot be loaded from it.
    """

    def __init__(self, path: str | Path, *, question: str = QUESTION, max_new_tokens: int = 75, **options: Any) -> None:
        self.path = Path(path).expanduser()
        if not (self.path / "config.json").is_file():
            raise ConfigError(
                f"The vision-language model {short(str(path))} is no folder with a config.json; download one yourself "
                "and give its folder, or give the regions in a JSON file."
            )
        if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int) or max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens is {max_new_tokens!r}; give a number of tokens from 1 up.")
        self.question, self.max_new_tokens, self._options = question, max_new_tokens, options
        self._pipe: Any = None

    def __call__(self, image: Any, box: Box) -> str:
        """The model's answer about a region (a PIL picture), without line breaks."""
        content = [{"type": "image", "image": image.convert("RGB")}, {"type": "text", "text": self.question}]
        chat = [{"role": "user", "content": content}]
        found = self._loaded()(
            text=chat,
            max_new_tokens=self.max_new_tokens,
            return_full_text=False,
            generate_kwargs={"do_sample": False},
        )
        return " ".join(str(found[0]["generated_text"]).split())

    def release(self) -> None:
        """Forget the loaded model."""
        self._pipe = None

    def _loaded(self) -> Any:
        if self._pipe is None:
            from transformers import pipeline

            options = {**self._options, "trust_remote_code": False, "local_files_only": True}
            try:
                self._pipe = pipeline("image-text-to-text", model=str(self.path), **options)
            except (OSError, ValueError, KeyError, ImportError, TypeError) as error:
                raise ConfigError(
                    f"The folder {short(str(self.path))} holds no vision-language model that transformers can load "
                    f"({_first_line(error)}); give one of the task image-text-to-text without code of its own."
                ) from error
        return self._pipe


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
