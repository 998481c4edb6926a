"""Acceleration methods: points in a space of independent switches, and the portfolio that is chosen from.

Switches of a session are chosen per job and hold on all its stages. Switches of a stage are its current policy; they
change slowly, because a policy per job would split batches.
"""

import enum
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from types import MappingProxyType
from typing import Any, Final

from protocol.measurements import ModelFacts, Objective, QualityBound, Workload


class Scope(enum.StrEnum):
    """Who sets a switch."""

    SESSION = "session"
    """Chosen per job, the same on all its stages."""
    STAGE = "stage"
    """Policy of a stage for all its sessions."""


@dataclass(frozen=True, slots=True)
class Switch:
    """One independent choice. The first setting is the baseline's; `lossy`: settings that may change greedy tokens."""

    scope: Scope
    settings: tuple[str, ...]
    lossy: frozenset[str] = frozenset()

    @property
    def baseline(self) -> str:
        """The baseline's setting."""
        return self.settings[0]


SWITCHES: Final[Mapping[str, Switch]] = MappingProxyType(
    {
        "activations": Switch(Scope.SESSION, ("fp32", "bf16", "int8"), lossy=frozenset({"bf16", "int8"})),
        "arithmetic": Switch(
            Scope.SESSION, ("fp32", "bf16", "int8", "w8a8"), lossy=frozenset({"bf16", "int8", "w8a8"})
        ),
        "engine": Switch(Scope.SESSION, ("eager", "fused", "onnxruntime")),
        "prefill_chunk": Switch(Scope.SESSION, ("none", "64", "128", "256")),
        "prefix_cache": Switch(Scope.SESSION, ("off", "on")),
        "speculation": Switch(Scope.SESSION, ("off", "ngram-4", "ngram-8", "draft-8")),
        "batching": Switch(Scope.STAGE, ("one", "static", "continuous")),
        "step_rows": Switch(Scope.STAGE, ("512", "256", "128", "64", "32")),
    }
)

VARIANTS: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {"eager": ("fp32",), "fused": ("fp32", "bf16", "int8", "w8a8"), "onnxruntime": ("fp32", "int8")}
)
"""The arithmetics of each engine."""


class MethodError(ValueError):
    """Invalid method. The message is one line for the user."""


@dataclass(frozen=True)
class Method:
    """A setting for every session switch."""

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
    def arithmetic(self) -> str:
        """The number format of weights and products."""
        return self.switches["arithmetic"]

    @property
    def activations(self) -> str:
        """The wire codec of hidden states between stages."""
        return self.switches["activations"]

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
    def kv_key(self) -> str:
        """What keys and values depend on besides the tokens: only sessions of one key may share them."""
        return f"{self.engine}/{self.arithmetic}/{self.activations}"

    @property
    def exact(self) -> bool:
        """Whether its greedy tokens equal those of fp32."""
        return not any(value in SWITCHES[switch].lossy for switch, value in self.switches.items())


def method(**switches: str) -> Method:
    """Return the method with these switches and the baseline's settings for all others. Raises MethodError."""
    chosen = {name: switch.baseline for name, switch in SWITCHES.items() if switch.scope is Scope.SESSION}
    for name, value in switches.items():
        if name not in SWITCHES:
            raise MethodError(f"unknown switch {name!r}: expected one of {', '.join(chosen)}")
        if name not in chosen:
            raise MethodError(f"{name} is a policy of a stage, set by each node, and not of a job")
        if value not in SWITCHES[name].settings:
            raise MethodError(f"invalid {name} {value!r}: expected one of {', '.join(SWITCHES[name].settings)}")
        chosen[name] = value
    if chosen["arithmetic"] not in VARIANTS[chosen["engine"]]:
        arithmetics = ", ".join(VARIANTS[chosen["engine"]])
        raise MethodError(f"engine={chosen['engine']} supports arithmetic {arithmetics}, not {chosen['arithmetic']}")
    return Method(MappingProxyType(chosen))


BASELINE: Final = method()
"""The reference method, exact by definition."""


def parse_method(text: str) -> Method:
    """Return the method of a user's text: `baseline`, or switches in any order over the baseline's settings.

    Raises MethodError.
    """
    if text == "baseline":
        return BASELINE
    switches: dict[str, str] = {}
    for part in text.split("|"):
        name, equals, value = part.strip().partition("=")
        if not equals:
            raise MethodError(f"invalid method {text[:80]!r}: expected baseline, or switch=value|switch=value")
        if name in switches:
            raise MethodError(f"switch {name} is given twice")
        switches[name] = value
    return method(**switches)


def _portfolio() -> Iterator[Method]:
    """Yield the useful combinations: each variant plain, for long prompts, and for repetitive text.

    A method that another one matches under every workload would only cost trials. So there is one chunk size, one
    number of draft tokens, and the prefix cache wherever a method is not the plain one.
    """
    yield BASELINE
    yield method(prefix_cache="on")
    yield method(prefill_chunk="128")
    yield method(prefill_chunk="128", prefix_cache="on")
    for engine, arithmetics in VARIANTS.items():
        for arithmetic in arithmetics if engine != BASELINE.engine else ():
            yield method(engine=engine, arithmetic=arithmetic)
            yield method(engine=engine, arithmetic=arithmetic, prefill_chunk="128", prefix_cache="on")
            yield method(engine=engine, arithmetic=arithmetic, prefix_cache="on", speculation="ngram-8")
    for engine, arithmetic in (("fused", "fp32"), ("fused", "bf16"), ("onnxruntime", "fp32"), ("onnxruntime", "int8")):
        yield method(engine=engine, arithmetic=arithmetic, prefix_cache="on", speculation="draft-8")
    for engine, arithmetic, activations in (
        ("fused", "bf16", "bf16"),
        ("onnxruntime", "fp32", "int8"),
        ("onnxruntime", "int8", "int8"),
    ):
        yield method(
            engine=engine, arithmetic=arithmetic, activations=activations, prefill_chunk="128", prefix_cache="on"
        )


PORTFOLIO: Final[Mapping[str, Method]] = MappingProxyType({each.name: each for each in _portfolio()})
"""The methods that are chosen from, by name: few enough to learn, diverse enough that one wins anywhere."""


@dataclass(frozen=True, slots=True)
class MeasuredQuality:
    """Effect of a lossy method on a model's output, relative to fp32.

    `perplexity_change`: relative, 0.01 is one per cent more. `mean_kl`: mean KL divergence in nats.
    `greedy_agreement`: share of positions with equal greedy tokens; no bound depends on it.
    """

    perplexity_change: float
    mean_kl: float
    greedy_agreement: float | None = None


def admits(bound: QualityBound, candidate: Method, quality: MeasuredQuality | None) -> bool:
    """Return whether a quality bound admits a method; a lossy one only if it was measured for the model."""
    if candidate.exact:
        return True
    if quality is None or bound is QualityBound.EXACT:
        return False
    if bound is QualityBound.NEAR:
        return quality.perplexity_change <= 0.01 and quality.mean_kl <= 0.02
    return quality.perplexity_change <= 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskContext:
    """What the choice of a method depends on: names and numbers, known before a job begins.

    The coordinator describes it, and it travels to the stages, which vote about it. None: not known. A feature that is
    measured, too, has the same name in `protocol.measurements`, from where it is copied by that name. `max_tokens`: new
    tokens asked for. `shared_prefix_share`: part of the prompt, 0 to 1, that recent prompts began with, too.
    `repetitiveness`: part of the prompt's tokens, 0 to 1, that an n-gram lookup predicts. `concurrency`: most jobs on
    any stage of the route, this one included. `hardware`: the stages' hardware classes in order, joined by "+".
    `link_s`: time per token that the links' latency adds. `transfer_s`: time that their bandwidth adds to the whole
    job, its rows in fp32.
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
        enums = {"objective": Objective(self.objective), "quality": QualityBound(self.quality)}
        return Workload(**{**shared, **enums, **values})

    def values(self) -> dict[str, str | float]:
        """Return the plain names and numbers, without what is not known."""
        pairs = ((field.name, getattr(self, field.name)) for field in fields(self))
        return {name: value if isinstance(value, str) else float(value) for name, value in pairs if value is not None}

    @classmethod
    def of(cls, values: Mapping[str, str | float]) -> "TaskContext":
        """Return the context in plain values from a peer; missing, unknown and invalid ones are left out."""
        taken: dict[str, Any] = {}
        for field in fields(cls):
            value = values.get(field.name)
            if isinstance(value, str):
                fits = field.type is str
            else:
                fits = value is not None and field.type is not str and value >= 0
            if fits and value is not None:
                taken[field.name] = value if field.type in {str, float} else int(value)
        return cls(**taken)


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, enum.StrEnum) else value
