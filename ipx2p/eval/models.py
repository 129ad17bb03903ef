"""What is edited with what: models, their settings, and every edit that follows (layer 4).

The noise of an edit depends on its seed alone, so all models and settings start from the same. The
key of an edit is a hash of everything that shapes it: a run that is repeated, or has more models or
scales, computes only what is missing, and guidance that agrees at some scales shares its edits.
"""

import inspect
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ipx2p.data.listing import PICTURES
from ipx2p.diffusion.guidance.registry import SCHEMES
from ipx2p.diffusion.guidance.scheme import Scheme
from ipx2p.editing.settings import EditSettings, FolderSettings, check_needs
from ipx2p.errors import InputError, suggestion
from ipx2p.eval.cases import Case
from ipx2p.eval.records import BUILT_IN, Record, key_of
from ipx2p.fidelity import PLAIN
from ipx2p.files import digest_file
from ipx2p.weights.readers import find_folder

PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler", "wrapping")
# What every edit runs through, besides the files of its schemes.
CODE = (
    *("models/*.py", "diffusion/**/*.py", "editing/decoding.py", "editing/editor.py"),
    "editing/settings.py",
    *("images.py", "seeds.py", "stack.py", "fidelity.py", "transfer.py"),
)
SCALES = {"guidance_scale": "text", "image_guidance_scale": "image"}
KINDS = {item.name: type(item.default) for item in fields(EditSettings)}
_SETTING = rf"(?=(?:{'|'.join(KINDS)})=)"  # commas and @ also occur in stacks and paths


@dataclass
class EvalConfig:
    """What is compared, where it is computed, and what is reported.

    models: see `parse_models`; settings, with several values, are combined with one another, and
    None is what each model's folder says.
    networks: what measures, by name: clip, dino, lpips, dists. metrics: None is those of the
    benchmark, else the usual ones. baseline: the row that differences are also taken from.
    select_on: the manifest that scales are chosen on. grids: how many pictures are shown.
    """

    models: list[str] = field(default_factory=list)
    guidance: list[str] | None = None
    guidance_scale: list[float] | None = None
    image_guidance_scale: list[float] | None = None
    fidelity: list[str] | None = None
    window: list[int] | None = None
    sampler: list[str] | None = None
    spacing: str | None = None
    num_steps: list[int] | None = None
    seeds: list[int] = field(default_factory=lambda: [0])
    negative_instruction: str = ""
    weak_weights: str | None = None
    resolution: int | None = None
    networks: dict[str, str] = field(default_factory=dict)
    paper_compat: bool = False
    metrics: list[str] | None = None
    baseline: str | None = None
    select_on: Path | None = None
    grids: int = 4
    output: Path = Path("evaluation")
    device: str = "auto"
    dtype: str = "auto"
    batch_size: int = 4
    batch_branches: bool = True
    compile: bool = False

    def settings(self, usual: EditSettings, overrides: dict[str, Any]) -> list[EditSettings]:
        """Every combination, each once; InputError for one that cannot be edited with.

        Args:
            usual: of the model, where this says nothing. overrides: for it alone.
        """
        names = ("guidance", "fidelity", "window", "sampler", "num_steps", *reversed(SCALES))
        values = {name: getattr(self, name) for name in names}
        values["spacing"] = self.spacing and [self.spacing]
        values |= {name: [value] for name, value in overrides.items()}
        for name in (name for name, some in values.items() if some is None):
            values[name] = [getattr(usual, name)]
        unlike: dict[str, EditSettings] = {}
        for some in itertools.product(*values.values()):
            settings = EditSettings(**dict(zip(values, some, strict=True)))
            settings.check()
            has_weak = self.weak_weights is not None and bool(settings.spec.needs("weak"))
            check_needs(settings, [self.negative_instruction], has_weak)
            unlike.setdefault(key_of(described(settings)), settings)
        if not unlike:
            raise InputError("nothing to compare: every option needs at least one value")
        return [*unlike.values()]


@dataclass(frozen=True)
class Model:
    """One of the models that are compared.

    source: as it was typed: a weights folder or hub id, or a folder of pictures made elsewhere.
    settings: all that it edits with; none for a folder of pictures.
    """

    name: str
    source: str
    folder: Path
    settings: tuple[EditSettings, ...] = ()

    @property
    def has_weights(self) -> bool:
        """Whether it edits; else its pictures are there already."""
        return bool(self.settings)


def parse_models(config: EvalConfig) -> list[Model]:
    """Models as they are typed: `[NAME=]WEIGHTS[@SETTING=VALUE,...]`.

    A model without a name is named after the end of its path, as long as needed to be unique.
    Raises: InputError for weights that are not there, or settings that cannot be.
    """
    parsed = [_parse(text) for text in config.models]
    unnamed = list(dict.fromkeys(source for name, source, _ in parsed if not name))
    models: dict[str, Model] = {}
    for name, source, overrides in parsed:
        folder = Path(source).expanduser()
        if name in BUILT_IN:
            raise InputError(f"--models: {name!r} is a built-in row: write OTHER_NAME={source}")
        name = name or _shortest(source, unnamed)
        name = f"./{name}" if name in BUILT_IN else name
        settings: list[EditSettings] = []
        is_other = not (folder / "unet").is_dir() and not (folder / "config.yaml").is_file()
        if is_other and _has_pictures(folder):
            if overrides:
                raise InputError(f"--models: {source} holds pictures, which take no settings")
        else:
            folder = find_folder(source)
            settings = config.settings(FolderSettings.read(folder), overrides)
        earlier = models.get(name, Model(name, source, folder))
        if earlier.folder != folder:
            raise InputError(f"--models: two of them are called {name!r}: write NAME=WEIGHTS")
        unlike = {key_of(described(one)): one for one in (*earlier.settings, *settings)}
        models[name] = replace(earlier, settings=tuple(unlike.values()))
    settings = [one for model in models.values() for one in model.settings]
    if config.weak_weights and not any(one.spec.needs("weak") for one in settings):
        raise InputError(
            "a weak network is given, but no --guidance uses one: add autoguidance, or leave out "
            "--weak-weights"
        )
    return [*models.values()]


def _parse(text: str) -> tuple[str, str, dict[str, Any]]:
    """Name or "", source, settings."""
    text = text.rstrip("/")
    if not text:
        raise InputError("--models: one is empty: expected a weights folder or hub id")
    if Path(text).expanduser().exists():  # whatever its name has in it
        return "", text, {}
    source, *rest = re.split(rf"@{_SETTING}", text, maxsplit=1)
    overrides: dict[str, Any] = {}
    for pair in re.split(rf",{_SETTING}", rest[0]) if rest else ():
        setting, _, value = pair.partition("=")
        try:
            overrides[setting] = KINDS[setting](value)
        except ValueError:
            raise InputError(
                f"--models {text}: {setting} is {value!r}, expected a number"
            ) from None
    if not rest and (match := re.search(r"@(\w+)=", text)):
        raise InputError(
            f"--models {text}: no setting {match[1]!r}; {suggestion(match[1], [*KINDS])}"
        )
    named = re.match(r"([^/=@]+)=(.+)", source)
    if named and not Path(source).expanduser().exists():
        return named[1], named[2], overrides
    return "", source, overrides


def _shortest(source: str, others: Sequence[str]) -> str:
    """The end of a path, as much of it as no other has; `weights` of a run is left out."""

    def parts(path: str) -> tuple[str, ...]:
        return Path(path.removesuffix("/weights")).parts

    for count in range(1, len(parts(source)) + 1):
        if sum(parts(other)[-count:] == parts(source)[-count:] for other in others) == 1:
            return "/".join(parts(source)[-count:])
    return source


def _has_pictures(folder: Path) -> bool:
    return any(path.suffix.lower() in PICTURES for path in folder.rglob("*"))


def scales_of(settings: EditSettings) -> dict[str, float | None]:
    """Both scales by name; None for one that the guidance does not use."""
    unused = settings.spec.unused_scales
    return {
        name: None if condition in unused else getattr(settings, name)
        for name, condition in SCALES.items()
    }


def described(settings: EditSettings) -> dict[str, Any]:
    """What settings mean, however they were typed: stacks in full, no scale without effect."""
    stacks = {"guidance": str(settings.spec), "fidelity": str(settings.knobs)}
    return asdict(settings) | stacks | scales_of(settings)


def stacks_of(settings: Mapping[str, Any]) -> str | None:
    """Guidance of recorded settings and, unless it is plain, fidelity: `ip2p, wavelet`."""
    stacks = (settings.get("guidance"), settings.get("fidelity"))
    return ", ".join(one for one in stacks if one not in (None, PLAIN)) or None


def recorded(settings: EditSettings) -> dict[str, Any]:
    """Settings as a record has them, see `Record`."""
    spec = settings.spec
    values = asdict(settings) | scales_of(settings) | settings.in_full
    effective = spec.effective_scales or (None, None)
    return values | {
        f"effective_{name}": scale for name, scale in zip(SCALES, effective, strict=True)
    }


@dataclass(frozen=True)
class Trial:
    """One edit to be made, or a built-in row, of one case: a `Record` before there is a picture.

    edit: the key of its picture. Trials with the same share it: guidance that is the same at some
    scales, and cases that differ in their target. after: the trial whose result is edited.
    """

    case: Case
    model: Model | str
    settings: EditSettings | None
    seed: int | None
    edit: str
    made_with: dict[str, Any]
    selects: bool = False
    after: "Trial | None" = None

    @property
    def source_key(self) -> str:
        """Equal for trials that edit the same picture."""
        return self.case.digest if self.after is None else self.after.edit

    @property
    def depth(self) -> int:
        """How many edits come before it."""
        return 0 if self.after is None else self.after.depth + 1

    def record(self, **made: Any) -> Record:
        """Its record, once it is made."""
        case, model = self.case, self.model
        captions = case.captions or (None, None)
        about = {
            "name": case.name,
            "group": case.group or case.digest,
            "task": case.task,
            "instruction": case.instruction,
            "source": str(case.source),
            "source_digest": case.digest,
            "target": case.target and str(case.target),
            "target_digest": case.target_digest,
            "source_caption": captions[0],
            "target_caption": captions[1],
            "benchmark": case.benchmark,
            "is_step": case.is_step,
        }
        name = model if isinstance(model, str) else model.name
        settings = self.settings and recorded(self.settings)
        record = Record(
            *("", self.edit, about, name, settings, self.seed, self.made_with),
            **made,
            selects=self.selects,
        )
        return replace(record, key=key_of([self.edit, record.place, case.mask_digest]))

    @cached_property
    def key(self) -> str:
        """The key of its record."""
        return self.record(picture=None).key


def make_trials(
    cases: Sequence[Case],
    model: Model,
    seeds: Sequence[int],
    made_with: dict[str, Any],
    *,
    weak: str | None = None,
    selects: bool = False,
) -> list[Trial]:
    """Every case with all settings of a model, and seeds.

    Args:
        made_with: what else shapes every edit: digest of the weights, resolution, precision.
        weak: digest of the second network's weights, which shapes the edits that need one.
    """
    shaping = {name: value for name, value in made_with.items() if name != "weights"}
    trials = []
    for one in model.settings:
        schemes = [one.spec.base, *(modifier.scheme for modifier in one.spec.acting)]
        digests = [digest_file(path) for path in files_of(schemes)]
        stacks = [one.spec.canonical, str(one.knobs.acting)]
        guided = [one.sampler, one.spacing, one.num_steps, one.window, *stacks, digests]
        made = made_with
        if one.spec.needs("weak"):
            guided.append(weak)
            made = made_with | {"weak_digest": weak}
        for seed in dict.fromkeys(seeds):
            earlier: dict[str, Trial] = {}
            for case in cases:
                after = earlier[case.after] if case.after else None
                trial = Trial(case, model, one, seed, "", made, selects, after)
                asked = {"source": trial.source_key, "instruction": case.instruction, "seed": seed}
                edit = key_of([asked, guided, shaping])
                earlier[case.name] = replace(trial, edit=edit)
            trials += earlier.values()
    return trials


def weights_digest(folder: Path) -> str:
    """A hash of everything in a weights folder that an edit depends on."""
    paths = sorted(path for part in PARTS for path in (folder / part).glob("*") if path.is_file())
    return key_of([[str(path.relative_to(folder)), digest_file(path)] for path in paths])


def code_digest() -> str:
    """A hash of the code that every edit runs through, with any scheme."""
    return key_of([digest_file(path) for path in code_files()])


def code_files() -> list[Path]:
    """The files of that code; those of the report are not among them."""
    package = Path(__file__).parents[1]
    paths = {path for pattern in CODE for path in package.glob(pattern)}
    return sorted(paths - {*files_of(SCHEMES.values())})


def files_of(schemes: Iterable[Scheme]) -> list[Path]:
    """The files of schemes: an edit is redone if one of its schemes has changed."""
    return sorted({Path(inspect.getsourcefile(scheme.make)) for scheme in schemes})
