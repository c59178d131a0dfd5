"""Profiles of a model's attention for `auto`, measured through the pipeline that requests run on."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from gensparse.calibrate import calibrate
from gensparse.engine.call import call_arguments
from gensparse.engine.resolve import open_model, resolve_request
from gensparse.engine.session import Session, fitting_estimate
from gensparse.errors import ConfigError
from gensparse.methods.profile import Profile
from gensparse.request import GenerateRequest


def profile_model(requests: Sequence[GenerateRequest], *, rows: int = 32, seed: int = 0) -> Profile:
    """Run requests of one model dense and measure what windows would lose in every head.

    Args:
        requests: prompts and sizes; each runs once per seed of its own.
        rows: sampled queries per attention call.
        seed: of the sampling.

    Raises:
        ConfigError: no request, or requests of several models.
        ModelError, WontFitError: as when they are generated.
    """
    models = {request.model for request in requests}
    if len(models) != 1:
        raise ConfigError(f"{len(models)} models are asked for; calibrate one model at a time.")
    ref = open_model(requests[0])
    jobs = [resolve_request(request.replace(attention="dense"), ref.info) for request in requests]
    jobs = [fitting_estimate(job)[0] for job in jobs]
    session = Session(ref, **jobs[0].loading)
    pipe = session.pipe
    pipe.set_progress_bar_config(disable=True)
    runs = [partial(_latents, pipe, call_arguments(j, j.picture(s), s)) for j in jobs for s in j.seeds]
    try:
        return calibrate(pipe, runs, rows=rows, seed=seed, model=ref.name)
    finally:
        session.close()


def _latents(pipe: Any, arguments: dict[str, Any]) -> None:
    pipe(**arguments, output_type="latent")
