"""A run that begins from drafts of its subjects: latents are drawn towards them in the first steps (2406.01388)."""

from typing import Any

import torch
from torch import Tensor

from gensparse.errors import ConfigError
from gensparse.subjects.drawer import guided_start


class DraftGuide:
    """AutoStudio's guidance by a picture composed of drafts (see `drawer.composed`).

        pipe.scheduler.set_timesteps(30)
        guide = DraftGuide(draft_latents, mask, noise, steps=10)
        pipe(prompt, latents=guide.first(pipe.scheduler), num_inference_steps=30, callback_on_step_end=guide)

    Before each of the first steps the latents inside the mask become 0.2 of themselves and 0.8 of the draft with the
    noise of that step.

    Args:
        draft: latents [1 or B, C, h, w] of the composed picture, scaled as the denoiser gets them.
        mask: [h, w], or at the size of the picture; every cell that is not fully background counts.
        noise: [1 or B, C, h, w], one for all steps.
        steps: first steps that are guided: 10 for Stable Diffusion 1.5 and 5 for XL, as published.

    Raises:
        ConfigError: shapes that do not fit, or no steps.
    """

    def __init__(self, draft: Tensor, mask: Tensor, noise: Tensor, steps: int = 10) -> None:
        if draft.dim() != 4 or draft.shape[1:] != noise.shape[1:]:
            raise ConfigError(
                f"A draft of {tuple(draft.shape)} and noise of {tuple(noise.shape)} do not fit; pass both as "
                "[B, C, h, w]."
            )
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise ConfigError(f"steps={steps!r} is not allowed; pass a number of steps from 1 up.")
        if mask.dim() != 2:
            raise ConfigError(f"A mask of {tuple(mask.shape)} is not allowed; pass (height, width).")
        self._draft, self._noise, self._steps = draft, noise, steps
        cells = torch.nn.functional.adaptive_max_pool2d(mask[None, None].float(), draft.shape[-2:])[0, 0]
        self._mask = (cells > 0).to(draft)

    def first(self, scheduler: Any) -> Tensor:
        """The latents to pass to the pipeline: the noise, guided for the first step."""
        sigma = float(scheduler.init_noise_sigma)
        return self.guided(self._noise * sigma, scheduler.timesteps[0], scheduler) / sigma

    def guided(self, latents: Tensor, timestep: Any, scheduler: Any) -> Tensor:
        """Latents as they enter the model at a timestep of a guided step."""
        times = torch.as_tensor(timestep).reshape(1).to(latents.device)
        noised = scheduler.add_noise(self._draft.to(latents), self._noise.to(latents), times)
        return guided_start(latents, noised, self._mask)

    def __call__(self, pipe: Any, index: int, timestep: Any, arguments: dict[str, Any]) -> dict[str, Any]:
        """For `callback_on_step_end`: after a step, guide the next one."""
        following = index + 1
        if following < min(self._steps, len(pipe.scheduler.timesteps)):
            latents = self.guided(arguments["latents"], pipe.scheduler.timesteps[following], pipe.scheduler)
            return {**arguments, "latents": latents}
        return arguments
