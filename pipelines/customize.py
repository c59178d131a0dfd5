"""What pipelines for several subjects share: pictures of the subjects run beside the new one in its first stage.

The rows of the references stand first in every denoiser call of the native stage. At every step they are what the
method wants: the clean picture at the noise of the step, drawn anew, or the latents through which an inversion of the
picture passes. Nothing of what the denoiser makes of them goes on. Larger stages do without them. Where a method has
to know the places of subjects and nobody gives them, the native stage is drawn once without subjects before.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from gensparse.attach import applied
from gensparse.errors import ConfigError, short, unknown_name
from gensparse.highres.stages import Stage, StageResult
from gensparse.methods import Method, as_method
from gensparse.methods.regional import FAMILIES as REGIONAL_FAMILIES
from gensparse.methods.subject_run import mixed
from gensparse.pipelines.multidiffusion import NAME as MULTIDIFFUSION
from gensparse.pipelines.multidiffusion import MultiDiffuses, MultiDiffusion
from gensparse.subjects.areas import Mask, Region, Regions
from gensparse.subjects.cast import Concept, Subjects, token_places
from gensparse.subjects.masks import to_grid
from gensparse.subjects.read_masks import read_mask
from gensparse.subjects.references import Fitted, Reference, checked_references
from gensparse.subjects.rehearsal import Noisy, box_of, changes, grown, missing_in, without

NOISED = ("freecustom", "magicface", "isolation_reposition", "reference_only", "storydiffusion")
"""Methods that see references at the noise of the step."""

INVERTED = ("masactrl", "style_aligned")
"""Methods that see references as an inversion of the picture passes them."""

MASKED = ("freecustom", "magicface", "isolation_reposition", "reference_only")
"""Methods that see nothing of a reference but what its mask keeps."""

CUT_OUT = ("freecustom", "magicface", "isolation_reposition")
"""Of these, methods whose references are cut out by the model itself where nobody gives a mask."""

COMPOSED = ("primecomposer",)
"""Methods that put an object, which has a region, into a background, which has none."""

FENCED = ("regional", MULTIDIFFUSION)
"""Methods by which every subject has a prompt in its region, and a negative one."""

AUTO = "auto"
"""What pipelines use for subjects where nothing is said: a method by the family of the model."""

USUAL = {"FLUX.1": "isolation_reposition"}
"""Family -> its method, by `gensparse bench subjects`."""

OTHERWISE = "freecustom"
"""The method of other families, and where subjects are neither in the prompt nor in a layout."""

REHEARSED = ("isolation_reposition",)
"""Methods that find where subjects are to be in a picture that is drawn without them first."""

WORDED = ("regional", "consistory", MULTIDIFFUSION)
"""Methods that know subjects by words, without pictures of them."""

ALIASES = {"isolation": "isolation_reposition"}
REGIONAL = ("isolation_reposition",)
UNETS = ("magicface", *COMPOSED)

Rows = Callable[[int], torch.Tensor]
"""Number of a noise level -> latents of all references there, as the pipeline's loop holds them."""


def settled_method(value: Any, family: str, unplaced: Sequence[str], prompts: Sequence[str] | None) -> Any:
    """What "auto" stands for; all other values as they are.

    Args:
        family: of the model; unplaced: subjects without a region; prompts: of all pictures, None where nobody knows.
    """
    if value != AUTO:
        return value
    usual = USUAL.get(family, OTHERWISE)
    lost = usual in REHEARSED and unplaced and (prompts is None or missing_in(prompts, unplaced))
    return OTHERWISE if lost else usual


def subject_method(value: Method | MultiDiffusion | str | Mapping[str, Any]) -> Method | MultiDiffusion:
    """The method for subjects that a text, dict or value names; not for "auto", see `settled_method`.

    Raises:
        ConfigError: none, or one that takes no subjects.
    """
    known = (*NOISED, *INVERTED, *COMPOSED, *WORDED)
    if isinstance(value, str):
        name, colon, rest = value.partition(":")
        value = ALIASES.get(name.strip(), name.strip()) + colon + rest
        if value.partition(":")[0] not in known:
            raise ConfigError(unknown_name("subject method", name.strip(), (AUTO, *known, *ALIASES)))
    fusion = MultiDiffusion.of(value)
    if fusion is not None:
        return fusion
    method = as_method(value)
    if method.name not in known:
        raise ConfigError(f"{method.name} takes no subjects; use one of {', '.join(known)}")
    return method


def check_subjects(
    method: Method,
    family: str,
    names: Sequence[str],
    placed: Sequence[str],
    words: str | None,
    *,
    pictured: Sequence[str] | None = None,
    prompts: Sequence[str] | None = None,
    negatives: Sequence[str] = (),
) -> None:
    """What can be known to be wrong before anything is encoded.

    Args:
        family: of the model, as `gensparse.families` names it.
        names: of the subjects, once per reference picture; placed: those with a region; words: the prompt, None where
            nobody knows.
        pictured: those with a picture, by default all.
        prompts: of all pictures that are drawn together; None where nobody knows.
        negatives: subjects with a negative prompt.

    Raises:
        ConfigError: another number of subjects, a model, or subjects without what the method needs.
    """
    if negatives and (method.name not in FENCED or (method.name == "regional" and family != "UNet")):
        raise ConfigError(
            f"{', '.join(negatives)} has a negative prompt, for which {method.name} on {family} has no place; use "
            f"{MULTIDIFFUSION}, or regional on a UNet such as SDXL"
        )
    missing = list(dict.fromkeys(name for name in names if name not in placed))
    shown = list(dict.fromkeys(names if pictured is None else pictured))
    if method.name in WORDED:
        _check_words(method, family, names, placed, shown, prompts)
        return
    unseen = [name for name in dict.fromkeys(names) if name not in shown]
    if unseen:
        raise ConfigError(
            f"{method.name} needs a picture of {', '.join(unseen)} (NAME=IMAGE); give one, or use regional or "
            "consistory, which take subjects by words"
        )
    if method.name in COMPOSED and family == "UNet":
        _check_composed(method, names, placed, words)
        return
    fixed = None if method.name in COMPOSED else getattr(method, "fixed", None)
    if fixed is not None and len(names) != fixed:
        what = "subject" if len(set(names)) == len(names) else "picture of a subject"
        raise ConfigError(f"{method.name} takes {fixed} {what}, and {len(names)} are given; leave the others out")
    if method.name in UNETS and family != "UNet":
        raise ConfigError(f"{method.name} works on UNets such as SDXL, not on {family}; use freecustom or isolation")
    if method.name in REHEARSED and missing:
        scenes = prompts if prompts is not None else (words,)
        unsaid = missing if None in scenes else missing_in(scenes, missing)
        if unsaid:
            raise ConfigError(
                f"{method.name} needs to know where {', '.join(unsaid)} is to be; name it in the prompt, give it a "
                "box in a layout, or take freecustom"
            )
    if method.name == "magicface" and words is not None:
        unsaid = [name for name in missing if name.lower() not in words.lower()]
        if unsaid:
            raise ConfigError(
                f"magicface needs {', '.join(unsaid)} in the prompt or in a layout; name it in one of them"
            )


def _check_words(
    method: Method,
    family: str,
    names: Sequence[str],
    placed: Sequence[str],
    pictured: Sequence[str],
    prompts: Sequence[str] | None,
) -> None:
    """The same for methods that take subjects by words."""
    if pictured:
        raise ConfigError(
            f"{method.name} takes subjects by words, and {', '.join(pictured)} has a picture; leave it out, or use "
            "freecustom or isolation"
        )
    if method.name in FENCED:
        missing = [name for name in names if name not in placed]
        if method.name == "regional" and family not in REGIONAL_FAMILIES:
            raise ConfigError(
                f"regional works on {', '.join(REGIONAL_FAMILIES)}, not on {family}; choose another model"
            )
        if missing:
            raise ConfigError(
                f"{method.name} needs to know where {', '.join(missing)} is to be; give it a box in a layout"
            )
        return
    if family != "UNet":
        raise ConfigError(f"{method.name} works on UNets such as SDXL, not on {family}; choose another model")
    if placed:
        raise ConfigError(f"{method.name} leaves places to the model; leave the layout of {', '.join(placed)} out")
    if prompts is None:
        return
    if len(prompts) < 2:
        raise ConfigError(
            f"{method.name} makes pictures agree with each other, and one is asked for; ask for two or more, with "
            "--num-images, several seeds or several prompts"
        )
    unsaid = [name for name in names if sum(name.lower() in text.lower() for text in prompts) < 2]
    if unsaid:
        raise ConfigError(
            f"{method.name} finds subjects by their words, and fewer than two of the {len(prompts)} prompts say "
            f"{', '.join(unsaid)}; name it in them"
        )


def _check_composed(method: Method, names: Sequence[str], placed: Sequence[str], words: str | None) -> None:
    """`check_subjects` of a background and an object."""
    if len(names) != 2 or len(set(names)) != 2 or len(placed) != 1:
        raise ConfigError(
            f"{method.name} takes two pictures, a background without a box and an object with one, and "
            f"{len(names)} are given, {len(placed)} with a box; give both by NAME=IMAGE, the object's box in a layout"
        )
    if getattr(method, "confine", False) and words is not None and placed[0].lower() not in words.lower():
        raise ConfigError(
            f"{method.name} keeps the words {placed[0]!r} to the object's place; name it in the prompt, or set "
            "confine=false"
        )


@dataclass(eq=False)
class Cast:
    """Who is in the pictures of a call.

    Args:
        references: one per picture, those of a subject side by side; of subjects by words one each.
        scenes: prompts of the pictures of the call.
        seed: of the noise on references.
        found: subject -> where a rehearsal has put it, a mask for each picture of the call.
    """

    references: tuple[Reference, ...]
    method: Method
    scenes: tuple[str, ...] | None
    seed: int = 0
    found: Mapping[str, tuple[torch.Tensor, ...]] = field(default_factory=dict)

    @property
    def prompt(self) -> str | None:
        """Of the first picture; None where it is given as embeddings."""
        return self.scenes[0] if self.scenes else None

    @property
    def worded(self) -> bool:
        """Whether subjects are known by words, so that no reference stands in the batch."""
        return self.method.name in WORDED

    @property
    def composed(self) -> bool:
        """Whether an object is put into a background."""
        return self.method.name in COMPOSED

    @property
    def pair(self) -> tuple[Reference, Reference]:
        """The background and the object."""
        first, second = sorted(self.references, key=lambda item: item.region is not None)
        return first, second

    def by_words(self, tokenizer: Any) -> tuple[Method, Subjects | None]:
        """The method of subjects without pictures, and what it is told about them."""
        if self.method.name == "regional":
            return replace(self.method, regions=[_region(item) for item in self.references]), None
        concepts = []
        for item in self.references:
            places = [token_places(tokenizer, text, item.name) for text in self.scenes or ()]
            if not any(places):
                raise ConfigError(f"{self.method.name} finds no {item.name!r} in the prompts; name it there.")
            concepts.append(Concept(item.name, tokens=places))
        return self.method, Subjects(*concepts)

    @property
    def inverted(self) -> bool:
        return self.method.name in INVERTED

    @property
    def unplaced(self) -> list[str]:
        """Subjects whose places only a rehearsal can tell."""
        if self.method.name not in REHEARSED:
            return []
        return list(dict.fromkeys(item.name for item in self.references if item.region is None))

    @property
    def prompts(self) -> list[str]:
        return [item.text for item in self.references]

    def subjects(self, fitted: Sequence[Fitted], size: tuple[int, int], tokenizer: Any) -> Subjects:
        """What the method is told about them."""
        concepts = []
        for item, own in zip(self.references, fitted, strict=True):
            words = ()
            if self.method.name == "magicface" and item.region is None:
                words = token_places(tokenizer, self.prompt or "", item.name)
                if not words:
                    raise ConfigError(
                        f"magicface finds no {item.name!r} in the prompt; name it there, or give a region."
                    )
            mask = own.shown if self.method.name in MASKED else own.mask
            if mask is None and self.method.name == "isolation_reposition":
                mask = own.area
            number = sum(known.subject == item.name for known in concepts)
            name = f"{item.name} ({number + 1})" if number else item.name
            place = {"regions": self.found[item.name]} if item.name in self.found else {"region": item.place(size)}
            concepts.append(Concept(name, mask=mask, tokens=words, subject=item.name, **place))
        return Subjects(*concepts)


class Customizes(MultiDiffuses):
    """Mixed into a pipeline of stages, in front of it; families say how references get into a call."""

    _cast: Cast | None

    def _init_stages(self) -> None:
        super()._init_stages()
        self._cast = None

    @contextmanager
    def _with_subjects(
        self,
        prompt: Any,
        subjects: Any,
        method: Method | str | Mapping[str, Any],
        family: str,
        options: Mapping[str, Any],
        regions: Any = None,
    ) -> Iterator[None]:
        """For the time of one call."""
        if regions is not None:
            with self._with_regions(Regions.of(regions), regions_method(method, subjects), options):
                yield
            return
        if subjects is None or (isinstance(subjects, list | tuple) and not subjects):
            yield
            return
        references = checked_references(subjects)
        if options.get("image") is not None:
            raise ConfigError("subjects act where a picture is drawn anew, and image= is given; leave one of both out.")
        texts = None if prompt is None else (prompt,) if isinstance(prompt, str) else tuple(prompt)
        copies = options.get("num_images_per_prompt") or 1
        scenes = None if texts is None else tuple(text for text in texts for _ in range(copies))
        unplaced = [item.name for item in references if item.region is None]
        chosen = subject_method(settled_method(method, family, unplaced, scenes))
        check_subjects(
            chosen,
            family,
            [item.name for item in references],
            list(dict.fromkeys(item.name for item in references if item.region is not None)),
            None if scenes is None else scenes[0],
            pictured=[item.name for item in references if item.picture is not None],
            prompts=scenes,
            negatives=[item.name for item in references if item.negative is not None],
        )
        if isinstance(chosen, MultiDiffusion):
            own = Regions(tuple(_region(item) for item in references))
            with self._with_regions(own, chosen, options):
                yield
            return
        self._cast = Cast(references, chosen, scenes, int(getattr(chosen, "seed", 0)))
        try:
            yield
        finally:
            self._cast = None

    @contextmanager
    def _shared(self, cast: Cast, fitted: Sequence[Fitted], stage: Stage) -> Iterator[None]:
        """The method of the subjects on the model, and what it says in the report of the stage."""
        subjects = cast.subjects(fitted, (stage.height, stage.width), self.tokenizer)
        with applied(self, cast.method, subjects=subjects) as handle:
            handle.restart(steps=self._num_timesteps)
            yield
            facts = {"method": cast.method.to_dict(), "names": list(subjects.names), **handle.report()}
            cut = {name: box_of(own.mask) for name, own in zip(subjects.names, fitted, strict=True) if own.cut}
            if cut:
                facts["cut out"] = cut
            if cast.found:
                facts["found"] = {name: [box_of(mask) for mask in masks] for name, masks in cast.found.items()}
            self.attention_report[-1]["subjects"] = facts

    def _answers(self, prompts: list[str], drawn: torch.Tensor, stage: Stage, run: Any) -> Callable[[Noisy], Any]:
        """Of a noise, the answers [prompts, C, h, w] of the model to a drawn picture [1, ...] with that noise."""
        raise NotImplementedError

    def _cut_out(
        self, cast: Cast, fitted: Sequence[Fitted], clean: torch.Tensor, stage: Stage, run: Any
    ) -> list[Fitted]:
        """References with masks for those that have none, where the method wants them: what shows their name.

        Args:
            clean: latents of the references as `_answers` takes them.
        """
        if cast.method.name not in CUT_OUT:
            return list(fitted)
        found = []
        for item, own, latents in zip(cast.references, fitted, clean.split(1), strict=True):
            if not own.marked:
                prompts = [item.text, without(item.text, item.name) or ""]
                maps = changes(self._answers(prompts, latents, stage, run), cast.seed)
                (mask,) = grown(maps.cpu(), _bytes(own.pixels[0]))
                inside = to_grid(own.area, tuple(mask.shape)).bool()
                own = replace(own, mask=mask & inside if bool((mask & inside).any()) else inside, cut=True)
            found.append(own)
        return found

    def _placed(self, cast: Cast, drawn: torch.Tensor, stage: Stage, run: Any, vae_tile: int | str | None) -> Cast:
        """The cast with places for subjects that have none, looked up in the pictures of a rehearsal."""
        assert cast.scenes is not None, "checked when the call began"
        names = cast.unplaced
        found: dict[str, list[torch.Tensor]] = {name: [] for name in names}
        pictures = self._decode_result(StageResult(0, stage.height, stage.width, (), drawn.cpu()), vae_tile)
        for one, picture, scene in zip(drawn.split(1), pictures, cast.scenes, strict=True):
            prompts = [scene, *(without(scene, name) or "" for name in names)]
            maps = changes(self._answers(prompts, one, stage, run), cast.seed)
            for name, mask in zip(names, grown(maps.cpu(), _bytes(picture)), strict=True):
                found[name].append(mask)
        self._decoded = None
        return replace(cast, found={name: tuple(masks) for name, masks in found.items()})

    @contextmanager
    def _told_by_words(self, cast: Cast) -> Iterator[Any]:
        """The same for subjects without pictures; gives the handle of the method."""
        method, subjects = cast.by_words(self.tokenizer)
        with applied(self, method, subjects=subjects) as handle:
            handle.restart(steps=self._num_timesteps)
            yield handle
            names = [item.name for item in cast.references]
            self.attention_report[-1]["subjects"] = {"method": method.to_dict(), "names": names, **handle.report()}

    def _clean(
        self, cast: Cast, fitted: Sequence[Fitted], stage: Stage, tile: Any, device: torch.device
    ) -> torch.Tensor:
        """Clean latents [R, C, h, w] of all references, float32."""
        size = (stage.height, stage.width)
        return torch.cat([self._encode(item.pixels, size, 0.0, tile, device) for item in fitted]).to(device).float()


# --- pure helpers ---------------------------------------------------------------------------------------------------


def _bytes(picture: torch.Tensor) -> np.ndarray:
    """A picture [3, H, W] in -1..1 as bytes [H, W, 3]."""
    return ((picture.float().cpu() + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()


def _region(item: Reference) -> Region:
    """A subject by words, in its place."""
    place = {"box": item.region} if isinstance(item.region, tuple) else {"mask": Mask.of(read_mask(item.region))}
    return Region(item.text, negative=item.negative, subject=item.name, **place)


def regions_method(method: Any, subjects: Any) -> MultiDiffusion:
    """The method for `regions=` of a pipeline.

    Raises:
        ConfigError: another one than multidiffusion, or subjects beside regions.
    """
    if subjects:
        raise ConfigError("regions= and subjects= are given; say subjects in prompts of regions, or leave one out.")
    fusion = MultiDiffusion() if method == AUTO else MultiDiffusion.of(method)
    if fusion is None:
        raise ConfigError(
            f"regions= are for subject_method={MULTIDIFFUSION!r}, and subject_method={short(method)} is given; use it, "
            "or gensparse.apply(pipe, Regional(regions))."
        )
    return fusion


def nearest_level(shares: Sequence[float], wanted: float) -> int:
    """Number of the noise level that comes nearest to a share of noise."""
    return min(range(len(shares)), key=lambda k: abs(shares[k] - wanted))


def noise_of(noisy: Noisy, like: torch.Tensor) -> torch.Tensor:
    """The noise of a comparison, float32, drawn on the CPU so that it is the same on every device."""
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(mixed(noisy.seed))).to(like.device)


def noise_at(clean: torch.Tensor, cast: Cast, step: int) -> torch.Tensor:
    """Noise of the references at a step, on the CPU so that it is the same on every device."""
    number = step if getattr(cast.method, "fresh_noise", True) else 0
    drawn = [
        torch.randn(one.shape, generator=torch.Generator().manual_seed(mixed(cast.seed, number, place)))
        for place, one in enumerate(clean)
    ]
    return torch.stack(drawn).to(clean)


def joined(references: torch.Tensor, own: torch.Tensor, halves: int = 1) -> torch.Tensor:
    """References in front of the pictures, in every half of a batch."""
    pairs = zip(references.to(own).chunk(halves), own.chunk(halves), strict=True)
    return torch.cat([torch.cat(pair) for pair in pairs])


def parted(x: torch.Tensor, count: int, pictures: int) -> torch.Tensor:
    """A batch without the first `count` rows of every half, of which `pictures` are left."""
    return torch.cat([half[count:] for half in x.split(count + pictures)])


def rejoined(whole: torch.Tensor, changed: torch.Tensor, count: int, pictures: int) -> torch.Tensor:
    """What a callback made of `parted(whole)`, behind the references again; halves that it dropped stay dropped.

    Args:
        whole: [halves * (count + pictures), ...].
        changed: [left * pictures, ...], the last halves.
    """
    left = changed.shape[0] // pictures
    references = [half[:count] for half in whole.split(count + pictures)][-left:]
    return joined(torch.cat(references), changed, left)


def told_to_callbacks(
    on_step: Callable[..., dict] | None,
    inputs: Sequence[str],
    rows: Callable[[int], torch.Tensor],
    count: int,
    pictures: int,
    beside: Sequence[str],
) -> Callable[..., dict]:
    """A step callback that puts the references of the next step in place, around the caller's own.

    The caller's sees tensors of its pictures alone.

    Args:
        rows: number of a step that is done -> latents of the references behind it.
        beside: names of the tensors that have rows of the references too, in every half of guidance.
    """

    def after(pipe: Any, i: int, t: torch.Tensor, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        own = {k: parted(x, count, pictures) if k in beside and x is not None else x for k, x in values.items()}
        changed: dict[str, torch.Tensor] = {}
        if on_step is not None:
            changed = dict(on_step(pipe, i, t, {name: own[name] for name in inputs}))
        latents = changed.pop("latents", own["latents"])
        back = {
            k: rejoined(values[k], x, count, pictures) if k in beside and x is not None else x
            for k, x in changed.items()
        }
        return {**back, "latents": joined(rows(i), latents)}

    return after
