"""MIP-Adapter: image prompts of several objects, each where its name is relevant (2409.17920)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from gensparse.errors import ConfigError, ModelError
from gensparse.layout import Layout
from gensparse.methods.base import At, Dense, Loaded, Place, Subject
from gensparse.methods.cross_method import CrossLoaded, CrossMethod, encoded, image_prompts, offsets, word_lists
from gensparse.methods.weights import find, opened, place_of
from gensparse.subjects.areas import Regions

if TYPE_CHECKING:
    from torch import Tensor

    from gensparse.processors.stages import Merge, Stages

FILE = "model_sdxl.safetensors"
"""Name of the converted checkpoint that is looked for in a folder."""


@dataclass(frozen=True)
class MipAdapter(CrossMethod):
    """Several reference images merged position by position, instead of all of them everywhere.

    Where an object's name is relevant to a position its image counts, so that identities mix less. Load the checkpoint
    with diffusers' own `pipe.load_ip_adapter`, which reads all of it but one weight per layer; this method reads that
    one from the same file. Published files are pickles: convert them by `gensparse models convert`. Without weights it
    is the tuning-free variant, for any IP-Adapter, which the paper has for Stable Diffusion XL; on Stable Diffusion 1.5
    the same formula is ours. Images go to the pipeline in the order of the names, `ip_adapter_image=[[cat, dog]]`, and
    their strength is `pipe.set_ip_adapter_scale`: 0.75 for sdxl, 0.65 for sdxl_plus, as published.

    Args:
        objects: names of the objects, in the order of their images; with commas, or a list.
        weights: the converted checkpoint: a safetensors file, a folder with model_sdxl.safetensors, or owner/name of a
            hub repository with that file; None for the tuning-free variant.
        pictures: images of every object, which follow each other; by default one each. Their tokens are averaged.
        regions: where each object may be, in the order of the names, as for `regional`; ours, by default anywhere.
        guided: whether the first half of a batch is the unconditional one; by default the pipeline says it, and a bare
            model has none.

    Raises:
        ConfigError: no names, a setting of another form, or (when applied) a bare model, one that is no UNet, or a
            checkpoint of another UNet.
        ModelError: (when applied) weights that are missing or damaged, or have no weight of this method.
    """

    name: ClassVar[str] = "mip_adapter"
    paper: ClassVar[str] = (
        "Resolving Multi-Condition Confusion for Finetuning-Free Personalized Image Generation (Huang et al.), "
        "arXiv 2409.17920"
    )
    licence: ClassVar[str] = "code and weights without a licence, none of the code used"
    use: ClassVar[str] = (
        "two or more reference images of different objects on SDXL, with or without the trained weights"
    )

    objects: tuple[str, ...] | None = None
    weights: str | None = None
    pictures: tuple[int, ...] | None = None
    regions: Any = None

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "objects", word_lists(self.name, "objects", self.objects))
        place_of(self.name, self.weights)
        count = len(self.objects or ())
        if self.pictures is not None:
            counts = self.pictures if isinstance(self.pictures, tuple | list) else (self.pictures,)
            whole = all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in counts)
            if not whole or len(counts) != count:
                raise ConfigError(
                    f"mip_adapter pictures={self.pictures!r} is not allowed for {count} objects; pass a number of "
                    "images for each."
                )
            object.__setattr__(self, "pictures", tuple(counts))
        if self.regions is not None:
            object.__setattr__(self, "regions", Regions.of(self.regions))
            if len(self.regions) != count:
                raise ConfigError(
                    f"mip_adapter has {len(self.regions)} regions for {count} objects; pass one per object."
                )

    def to_dict(self) -> dict[str, Any]:
        plain = {name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items()}
        plain["regions"] = None if self.regions is None else self.regions.to_list()
        return {"method": self.name, "version": self.version, **plain}

    def load(self, subject: Subject, places: Mapping[str, Place]) -> Loaded:
        if not self.objects:
            raise ConfigError(
                "mip_adapter needs the names of the objects; pass objects=, in the order of their images."
            )
        return _Named(self, subject)


class _Named(CrossLoaded):
    """Encodings of the names, and the weight that diffusers does not read."""

    def __init__(self, method: MipAdapter, subject: Subject) -> None:
        import torch

        super().__init__(method.guided, subject.owner)
        assert method.objects is not None
        self._method = method
        self._names = torch.stack(encoded(method.name, subject.owner, method.objects), 1)
        self._empty = encoded(method.name, subject.owner, [""])[0][:, None].expand_as(self._names)
        own = [offsets(method.name, subject.owner, name) for name in method.objects]
        self._lengths = torch.tensor([[max(1, sum(b > a for a, b in spans)) for spans in own]])
        self._weights = {} if method.weights is None else text_weights(method.weights, subject.model)

    def notes(self, place: Place) -> "Tensor | None":
        return self._weights.get(place.name)

    def look(self, at: At, arguments: dict[str, Any]) -> None:
        images, wanted = image_prompts(arguments), sum(self._method.pictures or ()) or self._names.shape[1]
        if images not in (0, wanted):
            raise ConfigError(
                f"mip_adapter has {self._names.shape[1]} objects of {wanted} images, and the call has {images} images; "
                "pass one per object, or say pictures=."
            )
        self._now.prompted = images > 0
        text = arguments["encoder_hidden_states"]
        self._now.where = (text.device, text.dtype)

    def stages(self, layout: Layout, at: At) -> "Stages | Dense":
        from gensparse.processors.stages import Stages

        if not self._now.prompted:
            return Dense("mip_adapter: the call has no image prompts; load an IP-Adapter and pass ip_adapter_image")
        grid = layout.grid[1:]
        merge = self.made((self._now.size, grid, self._now.where), lambda: self._merge(grid))
        return Stages(self.guided(at), grid, images=merge)

    def _merge(self, grid: tuple[int, int]) -> "Merge":
        import torch

        from gensparse.processors.stages import Merge

        regions = self._method.regions
        masks = None
        if regions is not None:
            masks = torch.from_numpy(regions.masks(self._now.size, grid)).flatten(1).to(self._now.where[0])
        names, empty = (text.to(*self._now.where) for text in (self._names, self._empty))
        return Merge(names, empty, self._lengths, masks, self._method.pictures or ())


def text_weights(weights: str, model: Any) -> "dict[str, Tensor]":
    """`text_to_weight` [C] of every cross-attention layer of a UNet, by the name of its module.

    Args:
        weights: see `MipAdapter`.

    Raises:
        ModelError: no such file, or one without these weights.
        ConfigError: the weights of another UNet.
    """
    path = find("mip_adapter", weights, FILE)
    names = [name.removesuffix(".processor") for name in model.attn_processors]
    found = {}
    with opened("mip_adapter", path) as file:
        for key in file.keys():  # noqa: SIM118 - not a dict
            parts = key.split(".")
            if parts[0] != "ip_adapter" or parts[2:] != ["text_to_weight", "weight"] or not parts[1].isdigit():
                continue
            number, value = int(parts[1]), file.get_tensor(key)
            layer = model.get_submodule(names[number]) if number < len(names) else None
            if layer is None or value.numel() != layer.to_q.out_features:
                raise ConfigError(
                    f"mip_adapter weights: {path.name} has {key} of {tuple(value.shape)}, which fits no layer of this "
                    f"{type(model).__name__}; use the model that the checkpoint was trained on."
                )
            found[names[number]] = value.flatten()
    if not found:
        raise ModelError(
            f"mip_adapter weights: {path.name} has no text_to_weight; pass the converted MIP-Adapter checkpoint, or "
            "weights=none for a plain IP-Adapter."
        )
    return found
