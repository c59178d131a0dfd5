"""Families whose pictures come as packed tokens [B, N, C] behind the text: FLUX.1, Chroma, FLUX.2, QwenImage."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from gensparse.errors import ConfigError
from gensparse.families.base import whole_tokens
from gensparse.layout import Grid, Layout


def packed_layout_for(family: str) -> Callable[..., Layout]:
    """`Family.layout_for` of such a family."""

    def layout_for(
        height: int,
        width: int,
        *,
        n_text: int,
        vae_scale: int = 8,
        patch: int = 2,
        references: Iterable[tuple[int, int]] = (),
    ) -> Layout:
        """Layout of a picture of height x width pixels; sizes are cut down to whole tokens.

        Args:
            n_text: text tokens (`max_sequence_length` of the pipeline, where it pads to that).
            vae_scale: pixels per latent cell; patch: latent cells per token, both per axis.
            references: (height, width) of reference pictures in pixels, as the pipeline scales them.

        Raises:
            ConfigError: a picture holds no whole token.
        """

        def grid(height: int, width: int) -> Grid:
            token = vae_scale * patch
            rows, columns = whole_tokens(family, ("height", height, token), ("width", width, token))
            return 1, rows, columns

        extra = [grid(*size) for size in references]
        return Layout.joint(grid(height, width), text=n_text, text_first=True, references=extra)

    return layout_for


def scheduled_tokens(family: str) -> Callable[..., int]:
    """`Family.native_tokens` of families whose scheduler shifts its times by resolution."""

    def native_tokens(model: Any, scheduler_config: Mapping[str, Any] | None = None) -> int:
        """Picture tokens of the training size: the end of the scheduler's resolution shift (`max_image_seq_len`).

        Args:
            model: a pipeline, or its transformer together with `scheduler_config`.

        Raises:
            ConfigError: no scheduler config says it.
        """
        config = scheduler_config or getattr(getattr(model, "scheduler", None), "config", None) or {}
        if "max_image_seq_len" not in config:
            raise ConfigError(
                f"The training size of a {family} model stands in its scheduler config (max_image_seq_len), which was "
                "not given; pass the pipeline, or scheduler_config=pipe.scheduler.config."
            )
        return int(config["max_image_seq_len"])

    return native_tokens
