"""Method: the frozen settings of one published way to make attention sparse, and what it does on a layout."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, Self

from gensparse.errors import ConfigError, unknown_name
from gensparse.layout import Layout
from gensparse.patterns import Pattern


@dataclass(frozen=True)
class Method(ABC):
    """Base of all methods: a frozen dataclass whose fields are the settings, checked when it is made."""

    name: ClassVar[str]
    """The word users type: `--attention NAME`, "method" in files."""
    version: ClassVar[int] = 1
    """Raised when the meaning of a setting changes, so that old files are refused instead of misread."""

    @abstractmethod
    def pattern(self, layout: Layout) -> Pattern:
        """Which key every query sees on `layout`; windows longer than the grid are shortened to it."""

    def why_not(self, layout: Layout) -> str | None:
        """Why calls with this layout must run dense, or None."""
        if any(segment.kind == "reference" for segment in layout.segments):
            return f"{self.name} has no rule for reference pictures"
        return None

    def logit_gain(self, layout: Layout, native_tokens: int | None) -> float:
        """Factor on the logits; 1 keeps the model's own scale.

        Args:
            native_tokens: picture tokens at the model's training size, None when nothing says it.
        """
        return 1.0

    def to_dict(self) -> dict[str, Any]:
        """Settings as JSON data: {"method": name, "version": n, ...}."""
        settings = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}
        return {"method": self.name, "version": self.version, **settings}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The method `to_dict` described; settings that are left out keep their defaults.

        Raises:
            ConfigError: an unknown method, version or setting, another method than this class, or a bad value.
        """
        settings = dict(data)
        chosen = cls._named(settings.pop("method", None))
        version = settings.pop("version", chosen.version)
        if version != chosen.version:
            raise ConfigError(
                f"{chosen.name} version={version!r} is not allowed; this release reads version {chosen.version}."
            )
        known = [field.name for field in fields(chosen)]
        for key in settings:
            if key not in known:
                raise ConfigError(unknown_name(f"setting of {chosen.name}", str(key), known))
        return chosen(**{key: tuple(v) if isinstance(v, list) else v for key, v in settings.items()})

    @classmethod
    def _named(cls, name: Any) -> type[Self]:
        from gensparse.methods import method_class

        chosen = cls if name is None and cls is not Method else method_class(name)
        if not issubclass(chosen, cls):
            raise ConfigError(f"method={name!r} is not {cls.__name__}; read it with Method.from_dict.")
        return chosen
