"""Acceleration methods: points in a space of independent switches, and the portfolio that is chosen from.

Switches of a session are chosen per job and hold on all its stages. Switches of a stage are its current policy; they
change slowly, because a policy per job would split batches.
"""

import enum
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from types import MappingProxyType
from typing import Any, Final

from protocol.measurements import ModelFacts, Objective, QualityBound, TaskKind, Workload
from protocol.stage_facts import StageFacts


class PackageFormat(enum.StrEnum):
    """The form in which a model was published, which decides what can compute it."""

    SAFETENSORS = "safetensors"
    GGUF = "gguf"


class Scope(enum.StrEnum):
    """Who sets a switch."""

    SESSION = "session"
    """Chosen per job, the same on all its stages."""
    STAGE = "stage"
    """Policy of a stage for all its sessions."""


@dataclass(frozen=True, slots=True)
class Switch:
    """One independent choice. `lossy`: settings that may change greedy tokens.

    The first setting is the baseline's, except for engine and arithmetic, where it depends on the package format.
    `implied`: whether a method does not name the baseline's setting, so that names from before the switch stay valid.
    """

    scope: Scope
    settings: tuple[str, ...]
    lossy: frozenset[str] = frozenset()
    implied: bool = False

    @property
    def baseline(self) -> str:
        """The baseline's setting."""
        return self.settings[0]


SWITCHES: Final[Mapping[str, Switch]] = MappingProxyType(
    {
        "activations": Switch(Scope.SESSION, ("fp32", "bf16", "int8"), lossy=frozenset({"bf16", "int8"})),
        "arithmetic": Switch(
            Scope.SESSION,
            ("fp32", "bf16", "int8", "w8a8", "int4", "native"),
            lossy=frozenset({"bf16", "int8", "w8a8", "int4"}),
        ),
        "engine": Switch(Scope.SESSION, ("eager", "fused", "onnxruntime", "llamacpp")),
        "kv": Switch(Scope.SESSION, ("auto", "q8_0"), lossy=frozenset({"q8_0"}), implied=True),
        "prefill_chunk": Switch(Scope.SESSION, ("none", "64", "128", "256")),
        "prefix_cache": Switch(Scope.SESSION, ("off", "on")),
        "speculation": Switch(Scope.SESSION, ("off", "ngram-4", "ngram-8", "draft-8")),
        "batching": Switch(Scope.STAGE, ("one", "static", "continuous")),
        "step_rows": Switch(Scope.STAGE, ("512", "256", "128", "64", "32")),
    }
)

VARIANTS: Final[Mapping[PackageFormat, Mapping[str, tuple[str, ...]]]] = MappingProxyType(
    {
        PackageFormat.SAFETENSORS: MappingProxyType(
            {"eager": ("fp32",), "fused": ("fp32", "bf16", "int8", "w8a8"), "onnxruntime": ("fp32", "int8", "int4")}
        ),
        PackageFormat.GGUF: MappingProxyType({"llamacpp": ("native",), "onnxruntime": ("native",)}),
    }
)
"""The engines of each package format, its reference first, with which an exact method must agree; and the arithmetics
of each, its usual one first. `native`: the weights as they were published, quantised or not."""

KV_TYPES: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {"eager": ("auto",), "fused": ("auto",), "onnxruntime": ("auto",), "llamacpp": ("auto", "q8_0")}
)
"""The types of each engine's keys and values. `auto`: its own; `q8_0`: of ggml, 8.5 bits an element."""

LOSSY_VARIANTS: Final = frozenset({("onnxruntime", "native")})
"""Engines and arithmetics whose every setting is exact elsewhere: this one rounds activations otherwise than llama.cpp
does."""

UNKNOWN_WEIGHT_TYPE: Final = "unknown"


class MethodError(ValueError):
    """Invalid method. The message is one line for the user."""


@dataclass(frozen=True)
class Method:
    """A setting for every session switch, but for implied ones."""

    switches: Mapping[str, str]

    @cached_property
    def name(self) -> str:
        """The canonical name: the switches, sorted."""
        return "|".join(f"{switch}={value}" for switch, value in sorted(self.switches.items()))

    @property
    def engine(self) -> str:
        """The engine."""
        return self.switches["engine"]

    @property
    def package_format(self) -> PackageFormat:
        """The package format that its engine computes in this arithmetic."""
        return _format_of(self.engine, self.arithmetic)

    @property
    def baseline(self) -> "Method":
        """The baseline that it is compared with: that of its package format."""
        return BASELINES[self.package_format]

    @property
    def arithmetic(self) -> str:
        """The number format of weights and products."""
        return self.switches["arithmetic"]

    @property
    def activations(self) -> str:
        """The wire codec of hidden states between stages."""
        return self.switches["activations"]

    @property
    def kv(self) -> str:
        """The type of keys and values."""
        return self.switches.get("kv", SWITCHES["kv"].baseline)

    @property
    def prefill_chunk(self) -> int | None:
        """Rows per chunk of a prompt; None for as many as fit."""
        value = self.switches["prefill_chunk"]
        return None if value == "none" else int(value)

    @property
    def prefix_cache(self) -> bool:
        """Whether the prefix cache is used."""
        return self.switches["prefix_cache"] == "on"

    @property
    def drafter(self) -> str:
        """The source of draft tokens: "off", "ngram" or "draft"."""
        return self.switches["speculation"].partition("-")[0]

    @property
    def draft_tokens(self) -> int:
        """Draft tokens per round, at most."""
        return int(self.switches["speculation"].partition("-")[2] or 0)

    @property
    def without_speculation(self) -> "Method":
        """The same method without speculative decoding, which changes when rows are computed, never their values."""
        return Method(MappingProxyType({**self.switches, "speculation": SWITCHES["speculation"].baseline}))

    @property
    def for_every_row(self) -> "Method":
        """The same method for tasks that need every row of the prompt: without prefix cache, nor speculation."""
        prefix_cache = {"prefix_cache": SWITCHES["prefix_cache"].baseline}
        return Method(MappingProxyType({**self.without_speculation.switches, **prefix_cache}))

    def suits(self, kind: TaskKind) -> bool:
        """Return whether it can serve tasks of a kind. Speculation is for text, also behind a prompt that is scored."""
        speculates = self.drafter != "off"
        return not (kind.needs_every_row and self.prefix_cache) and not (kind is TaskKind.EMBED and speculates)

    @property
    def kv_key(self) -> str:
        """What keys and values depend on besides the tokens: only sessions of one key may share them."""
        kv = () if self.kv == SWITCHES["kv"].baseline else (self.kv,)
        return "/".join((self.engine, self.arithmetic, *kv, self.activations))

    @property
    def exact(self) -> bool:
        """Whether its greedy tokens equal those of the package's reference on one machine alone."""
        if (self.engine, self.arithmetic) in LOSSY_VARIANTS:
            return False
        return not any(value in SWITCHES[switch].lossy for switch, value in self.switches.items())


def method(**switches: str) -> Method:
    """Return the method with these switches, the usual arithmetic of its engine, and the baseline's other settings.

    Raises MethodError.
    """
    chosen = {name: switch.baseline for name, switch in SWITCHES.items() if switch.scope is Scope.SESSION}
    for name, value in switches.items():
        if name not in SWITCHES:
            raise MethodError(f"unknown switch {name!r}: expected one of {', '.join(chosen)}")
        if name not in chosen:
            raise MethodError(f"{name} is a policy of a stage, set by each node, and not of a job")
        if value not in SWITCHES[name].settings:
            raise MethodError(f"invalid {name} {value!r}: expected one of {', '.join(SWITCHES[name].settings)}")
        chosen[name] = value
    engine = chosen["engine"]
    arithmetics = [each for variants in VARIANTS.values() for each in variants.get(engine, ())]
    if "arithmetic" not in switches:
        chosen["arithmetic"] = arithmetics[0]
    if chosen["arithmetic"] not in arithmetics:
        raise MethodError(f"engine={engine} supports arithmetic {', '.join(arithmetics)}, not {chosen['arithmetic']}")
    if chosen["kv"] not in (kv_types := KV_TYPES[chosen["engine"]]):
        raise MethodError(f"engine={chosen['engine']} supports kv {', '.join(kv_types)}, not {chosen['kv']}")
    for name, switch in SWITCHES.items():
        if switch.implied and chosen[name] == switch.baseline:
            del chosen[name]
    return Method(MappingProxyType(chosen))


def _format_of(engine: str, arithmetic: str) -> PackageFormat:
    """Return the package format of a method, which may be unknown to this version."""
    formats = [each for each, variants in VARIANTS.items() if engine in variants]
    both = (each for each in formats if arithmetic in VARIANTS[each][engine])
    return next(both, formats[0] if formats else PackageFormat.SAFETENSORS)


BASELINES: Final[Mapping[PackageFormat, Method]] = MappingProxyType(
    {package_format: method(engine=next(iter(variants))) for package_format, variants in VARIANTS.items()}
)
"""The reference method of each package format, exact by definition."""

BASELINE: Final = BASELINES[PackageFormat.SAFETENSORS]


def baseline_of(name: str) -> Method:
    """Return the baseline that a method of this name is compared with, which may be unknown to this version."""
    switches = {switch: value for switch, _, value in (part.partition("=") for part in name.split("|"))}
    return BASELINES[_format_of(switches.get("engine", BASELINE.engine), switches.get("arithmetic", ""))]


def parse_method(text: str, package_format: str | None = None) -> Method:
    """Return the method of a user's text: `baseline`, or switches in any order over the baseline's settings.

    `package_format`: of the model, whose baseline is meant and whose engines are possible; None for a canonical name.
    Raises MethodError.
    """
    baseline = BASELINES[PackageFormat(package_format)] if package_format else BASELINE
    if text == "baseline":
        return baseline
    switches: dict[str, str] = {}
    for part in text.split("|"):
        name, equals, value = part.strip().partition("=")
        if not equals:
            raise MethodError(f"invalid method {text[:80]!r}: expected baseline, or switch=value|switch=value")
        if name in switches:
            raise MethodError(f"switch {name} is given twice")
        switches[name] = value
    if package_format:
        _check_format(switches, PackageFormat(package_format))
        usual = VARIANTS[PackageFormat(package_format)].get(switches.get("engine", baseline.engine))
        if usual:
            switches.setdefault("arithmetic", usual[0])
    return method(**{"engine": baseline.engine, **switches})


def _check_format(switches: Mapping[str, str], package_format: PackageFormat) -> None:
    """Raise MethodError for an engine or arithmetic that exists, but not for a package format."""
    engines = VARIANTS[package_format]
    possible = {"engine": set(engines), "arithmetic": {each for found in engines.values() for each in found}}
    for name, settings in possible.items():
        value = switches.get(name)
        if value in SWITCHES[name].settings and value not in settings:
            variants = ", ".join(f"engine={each}|arithmetic={'/'.join(found)}" for each, found in engines.items())
            raise MethodError(f"{name}={value} cannot serve this model, a {package_format} package: use {variants}")


_DRAFTED: Final = (("fused", "fp32"), ("fused", "bf16"), ("onnxruntime", "fp32"), ("onnxruntime", "int8"),
                   ("llamacpp", "native"))  # fmt: skip
"""Engine and arithmetic of the methods with a draft model."""

_NARROW: Final = (("fused", "bf16", "bf16"), ("onnxruntime", "fp32", "int8"), ("onnxruntime", "int8", "int8"),
                  ("llamacpp", "native", "bf16"), ("llamacpp", "native", "int8"))  # fmt: skip
"""Engine, arithmetic and wire codec of the methods with a narrower codec."""

_OUTRUN: Final = frozenset({"eager"})
"""References that exact methods outrun under every workload."""


def _portfolio(package_format: PackageFormat) -> Iterator[Method]:
    """Yield the useful combinations: each variant plain, for long prompts, and for repetitive text.

    A method that another one matches under every workload would only cost trials. So there is one chunk size, one
    number of draft tokens, and the prefix cache wherever a method is not the plain one; and no speculation with a
    reference that others outrun.
    """
    variants = VARIANTS[package_format]
    reference, *faster = variants
    yield method(engine=reference)
    yield method(engine=reference, prefix_cache="on")
    yield method(engine=reference, prefill_chunk="128")
    yield method(engine=reference, prefill_chunk="128", prefix_cache="on")
    for engine in faster if reference in _OUTRUN else variants:
        for arithmetic in variants[engine]:
            if engine != reference:
                yield method(engine=engine, arithmetic=arithmetic)
                yield method(engine=engine, arithmetic=arithmetic, prefill_chunk="128", prefix_cache="on")
            yield method(engine=engine, arithmetic=arithmetic, prefix_cache="on", speculation="ngram-8")
    for engine, arithmetic in _DRAFTED:
        if arithmetic in variants.get(engine, ()):
            yield method(engine=engine, arithmetic=arithmetic, prefix_cache="on", speculation="draft-8")
    for engine, arithmetic, activations in _NARROW:
        if arithmetic in variants.get(engine, ()):
            yield method(
                engine=engine, arithmetic=arithmetic, activations=activations, prefill_chunk="128", prefix_cache="on"
            )
    for engine in VARIANTS[package_format]:
        for kv in KV_TYPES[engine][1:]:
            yield method(engine=engine, kv=kv, prefix_cache="on")
            yield method(engine=engine, kv=kv, prefill_chunk="128", prefix_cache="on")


PORTFOLIOS: Final[Mapping[PackageFormat, Mapping[str, Method]]] = MappingProxyType(
    {
        package_format: MappingProxyType({each.name: each for each in _portfolio(package_format)})
        for package_format in PackageFormat
    }
)
"""The methods that are chosen from, by package format and name: few enough to learn, diverse enough that one wins
anywhere."""

_EVERY_ROW: Final[Mapping[PackageFormat, Mapping[str, Method]]] = MappingProxyType(
    {
        package_format: MappingProxyType({each.for_every_row.name: each.for_every_row for each in methods.values()})
        for package_format, methods in PORTFOLIOS.items()
    }
)
"""Those that tasks are served with that need every row of the prompt."""

PORTFOLIO: Final[Mapping[str, Method]] = MappingProxyType(
    {name: each for known in (PORTFOLIOS, _EVERY_ROW) for methods in known.values() for name, each in methods.items()}
)
"""The methods of all package formats and kinds of task."""


_HALF_PRECISION: Final = frozenset({"bf16", "f16"})
_WIDENED_VARIANTS: Final = frozenset({("onnxruntime", "fp32")})
"""What would hold weights published in two bytes in four, where another variant computes as exactly with two."""


def portfolio(
    package_format: str, weight_type: str = UNKNOWN_WEIGHT_TYPE, kind: TaskKind = TaskKind.GENERATE
) -> Sequence[Method]:
    """Return the methods that tasks of a kind may be served with, unless a job names another.

    `weight_type`: of the model; of methods as exact, those that take twice its memory are left out.
    """
    known = _EVERY_ROW if kind.needs_every_row else PORTFOLIOS
    methods = known[PackageFormat(package_format)].values()
    left_out = _WIDENED_VARIANTS if weight_type in _HALF_PRECISION else frozenset()
    return tuple(each for each in methods if (each.engine, each.arithmetic) not in left_out)


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskContext:
    """What the choice of a method depends on: names and numbers, known before a job begins.

    The coordinator describes it, and it travels to the stages, which vote about it. None: not known. A feature that is
    measured, too, has the same name in `protocol.measurements`, from where it is copied by that name. `weight_type`:
    what most of the model's weights are published in, as `bf16`, `f32`, `q4_1` or `q4_k`. `max_tokens`: new tokens
    asked for, 0 for none. `shared_prefix_share`: part of the prompt, 0 to 1, that recent prompts began with, too.
    `repetitiveness`: part of the prompt's tokens, 0 to 1, that an n-gram lookup predicts. `concurrency`: most jobs on
    any stage of the route, this one included. `hardware`: the stages' hardware classes in order, joined by "+".
    `link_s`: time per token that the links' latency adds. `transfer_s`: time that their bandwidth adds to the whole
    job, its rows in fp32. `stage_facts`: of the route's stages, in order; empty where not all are known.
    """

    architecture: str = "unknown"
    block_count: int = 0
    hidden_size: int = 0
    vocabulary_size: int = 0
    weight_bytes: int = 0
    intermediate_size: int | None = None
    head_count: int | None = None
    kv_head_count: int | None = None
    expert_count: int | None = None
    active_expert_count: int | None = None
    head_size: int | None = None
    block_bytes: int | None = None
    block_parameters: int | None = None
    active_block_parameters: int | None = None
    kv_bytes_per_token: int | None = None
    weight_type: str = UNKNOWN_WEIGHT_TYPE
    prompt_tokens: int = 1
    max_tokens: int = 1
    shared_prefix_share: float = 0.0
    repetitiveness: float = 0.0
    concurrency: int = 1
    stage_count: int = 1
    hardware: str = "unknown"
    link_s: float = 0.0
    transfer_s: float = 0.0
    objective: str = "latency"
    quality: str = "exact"
    task_kind: str = "generate"
    stage_facts: tuple[StageFacts, ...] = ()

    @classmethod
    def from_parts(cls, model: ModelFacts, workload: Workload | None = None, **values: Any) -> "TaskContext":
        """Return the context with the features that a model and a workload have in common with it, and `values`."""
        names = {field.name for field in fields(cls)}
        parts = (model,) if workload is None else (model, workload)
        shared = {f.name: _plain(getattr(part, f.name)) for part in parts for f in fields(part) if f.name in names}
        return cls(**{**shared, **values})

    def to_workload(self, **values: Any) -> Workload:
        """Return a workload with the features that it has in common with the context, and `values`."""
        names = {field.name for field in fields(self)} - values.keys()
        shared = {field.name: getattr(self, field.name) for field in fields(Workload) if field.name in names}
        shared |= {"objective": Objective(self.objective), "quality": QualityBound(self.quality)}
        return Workload(**{**shared, "task_kind": TaskKind(self.task_kind), **values})

    def values(self) -> dict[str, str | float]:
        """Return the plain names and numbers, without what is not known, and without the stages' facts."""
        pairs = ((name, getattr(self, name)) for name in _PLAIN)
        return {name: value if isinstance(value, str) else float(value) for name, value in pairs if value is not None}

    @classmethod
    def of(cls, values: Mapping[str, str | float], stage_facts: Sequence[StageFacts] = ()) -> "TaskContext":
        """Return the context in plain values from a peer; missing, unknown and invalid ones are left out."""
        taken: dict[str, Any] = {}
        for name, kind in _PLAIN.items():
            value, least, most = values.get(name), _LEAST.get(name, 0.0), _MOST.get(name, math.inf)
            if value is not None and (
                kind is str if isinstance(value, str) else kind is not str and least <= value <= most
            ):
                taken[name] = value if kind in {str, float} else int(value)
        if taken.get("task_kind") not in (*TaskKind, None):  # one of a later version
            del taken["task_kind"]
        return cls(**taken, stage_facts=tuple(stage_facts))


_PLAIN: Final[Mapping[str, Any]] = {each.name: each.type for each in fields(TaskContext) if each.name != "stage_facts"}
"""The names of a context's plain values and their types."""

_LEAST: Final = dict.fromkeys(("prompt_tokens", "concurrency", "stage_count"), 1.0)
_MOST: Final = {"shared_prefix_share": 1.0, "repetitiveness": 1.0}


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, enum.StrEnum) else value
