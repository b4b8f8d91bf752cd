"""A plan: bundles x data x scenarios x methods x batch sizes x seeds x engines x routers; every cell is replayed."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr

from benchmarks import scenarios
from benchmarks.plans.tasks import Combination
from edge_adapt.config import Document, refusal, validated
from edge_adapt.errors import ConfigError, did_you_mean
from edge_adapt.located import MAX_BYTES, Loc, Located, Problem, read
from edge_adapt.methods.auto import AUTO
from edge_adapt.plugins import ENGINES, METHODS, ROUTERS, SOURCES, WRAPPERS, names
from edge_adapt.streams.corruptions import CORRUPTIONS
from edge_adapt.streams.data import DIGITS
from edge_adapt.streams.recorded import RECORDED

SUFFIXES = (".yaml", ".yml")
NO_ROUTER = "none"
REMEDY = "correct the plan; the README shows one"
Positive = Annotated[int, Field(ge=1)]
Whole = Annotated[int, Field(ge=0)]
Severity = Annotated[int, Field(ge=1, le=5)]
Names = Annotated[tuple[str, ...], Field(min_length=1)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class DataSpec(_Part):
    """Where frames come from."""

    path: str = Field(description="what `replay --data` takes; a relative path is relative to the plan")
    foreign: str | None = Field(None, description="images that a contaminated scenario mixes in; none: noise")


class ExportSpec(_Part):
    """What `edge-adapt export` is called with."""

    model: str = Field(description="zoo:NAME, package.module:factory, or a path to an .onnx file")
    weights: str | None = None
    calibration: str | None = None
    cut: str | None = None
    warm_up: str | None = None
    head: str | None = None
    estimate: bool = Field(False, description="fit the estimate of the error without labels, which takes a minute")


class BundleSpec(_Part):
    """A bundle that is there, or the recipe of one that is made once."""

    path: Path | None = None
    export: ExportSpec | None = None


class Grid(_Part):
    """Every combination of these."""

    bundles: Names = Field(description="some of those above")
    data: Names = Field(description="some of those above")
    scenarios: Names = ("continual",)
    methods: Names = Field(description="such as source and moments")
    batch_sizes: Annotated[tuple[Positive, ...], Field(min_length=1)] = (64,)
    seeds: Annotated[tuple[Whole, ...], Field(min_length=1)] = (0,)
    engines: Names = ("onnxruntime",)
    routers: Names = ("none",)
    severity: Severity = 5
    limit: Positive | None = None
    corruptions: tuple[str, ...] | None = None
    label_delay: Whole | None = Field(None, description="frames until the true label of a frame comes; null: never")
    estimate: bool = Field(False, description="the estimate without labels beside the error")
    settings: dict[str, dict[str, Any]] = Field(default_factory=dict, description="method -> its settings")
    threads: Positive = 1
    timeout_s: Annotated[float, Field(gt=0)] = 3600.0


class Plan(_Part):
    """What `edge-adapt replay plan.yaml` reads."""

    schema_: Literal[1] = Field(1, alias="schema")
    data: dict[str, DataSpec]
    bundles: dict[str, BundleSpec]
    grid: Annotated[tuple[Grid, ...], Field(min_length=1)]
    _folder: Path = PrivateAttr(Path())
    """Where relative paths begin. What is published of a plan holds none of this machine."""

    def combinations(self) -> list[Combination]:
        """The cells in the order of the plan; one that two grids ask for comes once."""
        return list(dict.fromkeys(made for grid in self.grid for made in _combinations(grid)))

    def used_bundles(self) -> dict[str, BundleSpec]:
        """Those that a grid asks for, with whole paths."""
        used = {name for grid in self.grid for name in grid.bundles}
        return {name: _rooted_bundle(spec, self._folder) for name, spec in self.bundles.items() if name in used}

    def used_data(self) -> dict[str, DataSpec]:
        """Those that a grid asks for, with whole paths."""
        used = {name for grid in self.grid for name in grid.data}
        return {name: _rooted_data(spec, self._folder) for name, spec in self.data.items() if name in used}


def is_plan(path: Path) -> bool:
    """Whether a path names a plan, not a bundle."""
    return path.suffix.lower() in SUFFIXES


def load_plan(path: Path) -> Plan:
    """Read a plan. Paths in it are relative to its folder. Raises: ConfigError with every mistake and its line."""
    try:
        with path.open("rb") as file:
            text = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"the plan {path} cannot be read: {error.strerror}", remedy="check the path") from error
    return parse_plan(text, str(path), folder=path.absolute().parent)


def parse_plan(text: str | bytes, where: str, *, folder: Path) -> Plan:
    """A plan from a text; `where` names it in errors. Raises: ConfigError with every mistake and its line."""
    try:
        document = validated(_full_form(read(text)), Plan, where, folder=None)
        problems = list(_problems(document))
        if problems:
            raise refusal(where, problems)
    except ConfigError as error:
        raise ConfigError(error.what, remedy=REMEDY) from None
    plan = document.settings
    plan._folder = folder
    return plan


def _full_form(found: Located) -> Located:
    """Short forms written out: one grid without a list, data and bundles that are a path alone."""
    value = found.value
    if not isinstance(value, dict):
        return found
    for part in ("data", "bundles"):
        if isinstance(value.get(part), dict):
            value[part] = {
                name: {"path": spec} if isinstance(spec, str) else spec for name, spec in value[part].items()
            }
    if isinstance(value.get("grid"), dict):
        value["grid"] = [value["grid"]]
        lines: dict[Loc, int] = {}
        for loc, line in found.lines.items():
            lines[loc if loc[:1] != ("grid",) or len(loc) == 1 else ("grid", 0, *loc[1:])] = line
        found.lines = lines
    return found


def _problems(document: Document[Plan]) -> Iterator[Problem]:
    """Names that mean nothing, whatever they are names of."""
    plan = document.settings
    for name, bundle in plan.bundles.items():
        if (bundle.path is None) == (bundle.export is None):
            yield document.problem(("bundles", name), "give either `path` or `export`")
    for number, grid in enumerate(plan.grid):
        known: Mapping[str, tuple[str, Iterable[str]]] = {
            "bundles": ("bundle", plan.bundles),
            "data": ("data", plan.data),
            "scenarios": ("scenario", scenarios.names()),
            "engines": ("engine", names(ENGINES)),
            "routers": ("router", [NO_ROUTER, *names(ROUTERS)]),
            "corruptions": ("corruption", CORRUPTIONS),
        }
        for part, (kind, options) in known.items():
            for place, name in enumerate(getattr(grid, part) or ()):
                if name not in options:
                    yield document.problem(("grid", number, part, place), _unknown(kind, name, options))
        for place, name in enumerate(grid.methods):
            if (wrong := unknown_method(name)) is not None:
                yield document.problem(("grid", number, "methods", place), wrong)
        for name in grid.settings:
            if name not in grid.methods:
                text = f"the grid has no method {name!r}; {did_you_mean(name, grid.methods)}"
                yield document.problem(("grid", number, "settings", name), text)


def unknown_method(name: str) -> str | None:
    """What is wrong with the name of a method or of a composition such as `moments+lame`; None: nothing."""
    host, *wrappers = name.split("+")
    if host != AUTO and host not in (hosts := names(METHODS)):
        return _unknown("method", host, [*hosts, AUTO])
    for wrapper in wrappers:
        if wrapper not in (known := names(WRAPPERS)):
            return _unknown("wrapper", wrapper, known)
    return None


def _unknown(kind: str, name: str, options: Iterable[str]) -> str:
    return f"there is no {kind} {name!r}; {did_you_mean(name, options)}"


def _combinations(grid: Grid) -> Iterator[Combination]:
    """Methods side by side on the same frames, in the order of the plan."""
    axes = (
        *(grid.bundles, grid.data, grid.scenarios, grid.engines, grid.batch_sizes, grid.routers),
        *(grid.methods, grid.seeds),
    )
    for bundle, data, scenario, engine, batch_size, router, method, seed in product(*axes):
        yield Combination(
            bundle=bundle,
            data=data,
            scenario=scenario,
            method=method,
            router=router,
            batch_size=batch_size,
            seed=seed,
            engine=engine,
            severity=grid.severity,
            limit=grid.limit,
            corruptions=grid.corruptions,
            label_delay=grid.label_delay,
            estimate=grid.estimate,
            settings=json.dumps(grid.settings.get(method, {}), sort_keys=True),
            threads=grid.threads,
            timeout_s=grid.timeout_s,
        )


def _rooted_data(spec: DataSpec, folder: Path) -> DataSpec:
    return spec.model_copy(update={"path": _place(spec.path, folder), "foreign": _place(spec.foreign, folder)})


def _rooted_bundle(spec: BundleSpec, folder: Path) -> BundleSpec:
    if spec.export is None:
        return spec.model_copy(update={"path": folder / (spec.path or "")})
    recipe = spec.export
    update = {part: _place(getattr(recipe, part), folder) for part in ("weights", "calibration", "warm_up", "head")}
    if recipe.model.endswith(".onnx"):
        update["model"] = _place(recipe.model, folder)
    return spec.model_copy(update={"export": recipe.model_copy(update=update)})


def _place(source: str | None, folder: Path) -> str | None:
    """A source of frames with its path below a folder; `har:PATH` keeps its kind, and so does any other."""
    if source is None or source == DIGITS:
        return source
    kind, colon, place = source.partition(":")
    if colon and kind in names(SOURCES):
        return source
    if colon and kind in RECORDED:
        return f"{kind}:{folder / place}"
    return str(folder / source)
