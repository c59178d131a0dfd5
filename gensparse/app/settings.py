"""Settings of a server: who may reach it, what a visitor may ask for, and where results go."""

import ipaddress
import math
from dataclasses import dataclass, field
from pathlib import Path

from gensparse.errors import ConfigError, short

MB = 1_000_000
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one request of a visitor may contain; checked on the server, whatever the page showed.

    Args:
        side: pixels of a result's longer side.
        steps, images, guidance: of one request, the largest.
        prompt: characters of the prompt, and of the negative prompt.
        attention: characters of an attention setting.
        name: characters of the name of a subject.
        seed: the largest; every whole number up to it survives JavaScript.
        upload: bytes of an uploaded picture; upload_pixels: of all pictures of a request, told by their headers.
        body: bytes of any other request.
        queue: jobs that wait; per_session: jobs of one visitor that wait or run.
        dense: pixels of a side up to which "compare with dense" is offered.
    """

    side: int = 8192
    steps: int = 100
    images: int = 4
    guidance: float = 30.0
    prompt: int = 2000
    attention: int = 200
    name: int = 60
    seed: int = 2**53 - 1
    upload: int = 80 * MB
    upload_pixels: int = 150_000_000
    body: int = MB
    queue: int = 16
    per_session: int = 17
    dense: int = 2048


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a server runs.

    Args:
        host, port: address; port None takes a free one.
        share: also open a public tunnel.
        auth: (user, password) that visitors must give; needed where others than this machine can reach the server.
        output_dir: folder of the results; each visitor gets a folder of a random name in it.
        device: of the worker, as `--device` takes it.
        grace: seconds that a job goes on after its visitor has gone.
        keep: seconds after which the results of a shared server are deleted.
        preload: load the embedded model before the first request.

    Raises:
        ConfigError: a shared server without a password, or a value out of range.
    """

    host: str = "127.0.0.1"
    port: int | None = 7860
    share: bool = False
    auth: tuple[str, str] | None = field(default=None, repr=False)
    output_dir: Path = Path("gensparse-out") / "app"
    device: str = "auto"
    grace: float = 60.0
    keep: float = 86_400.0
    preload: bool = True
    limits: Limits = Limits()

    def __post_init__(self) -> None:
        if self.shared and (self.auth is None or not all(self.auth)):
            raise ConfigError("a server that others can reach needs a password; pass --auth USER:PASS")
        if self.port is not None and not 0 <= self.port <= 65_535:
            raise ConfigError(f"port is {short(self.port)}; give a number from 1 to 65535")
        for name, low, high in (("side", 64, 16_384), ("queue", 1, 10_000)):
            value = getattr(self.limits, name)
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                raise ConfigError(f"the largest {name} is {short(value)}; give a whole number from {low} to {high}")
        if not (self.grace > 0 and math.isfinite(self.grace)):
            raise ConfigError(f"grace is {short(self.grace)}; give seconds above zero")

    @property
    def shared(self) -> bool:
        """Whether others than the person at this machine can reach the server."""
        return self.share or not is_loopback(self.host)


def is_loopback(host: str) -> bool:
    """Whether an address can be reached from this machine only."""
    if host in LOOPBACK_NAMES:
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
