"""The values that go into and come out of an engine, its options and errors; `base.Engine` has the calls.

An engine serves one span of one model, in several variants of one calculation. `client.py` runs the real one in a
worker process; `node/testing/fake_engine.py` keeps a hash chain of its inputs, so that in a simulation a lost row, a
wrong replay, a wrong hit of the prefix cache or a swapped session changes tokens.
"""

from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, NamedTuple

from node.models.manifest import TOKENIZER_FILE
from node.models.store import Package
from protocol.identity import BlockRange, ModelId, SessionId
from protocol.messages import Sampling
from protocol.tensors import Tensor
from selector.cuts import Parts
from selector.task import BASELINES, Method, PackageFormat

PAGE_POSITIONS: Final = 32
"""Positions of one page in f32, the unit of KV allocation and of the prefix cache; see SpanInfo.page_positions."""

PAGE_HASH_BYTES: Final = 16
"""Bytes of the hash of a page of a prompt, which covers all pages before it."""


class EngineError(Exception):
    """The engine failed: the jobs in the call are lost. The message is one line for the user."""


class EngineCrashed(EngineError):
    """The worker process died: every session it held is lost."""


class EngineLost(Exception):
    """An engine has lost what its sessions held, and its process must end."""


class EngineFull(EngineError):
    """No KV memory for another session now."""


class NoVariantMemory(EngineError):
    """No memory for another variant beside those that are built."""


class SessionNotOpen(EngineError):
    """The engine does not hold the session, or it has not begun."""

    def __init__(self, session: SessionId) -> None:
        super().__init__(f"session {session.job}/{session.stage} is not open, or has not begun")


class StepFailed(EngineError):
    """Every slice of a step failed; `faults` has one for each."""

    def __init__(self, faults: Sequence["SliceFault"]) -> None:
        super().__init__(faults[0].message)
        self.faults = tuple(faults)


class BadRows(EngineError):
    """Rows that no engine could compute: their sender is at fault."""


class BadRequest(EngineError):
    """A text that no engine could go on with: what was asked for is at fault, such as a schema that admits nothing."""


class VariantNotReady(EngineError):
    """The session requests a variant that is not built (any more, or yet)."""


AUTO: Final = "auto"
"""The engine's own type of keys and values."""


class Variant(NamedTuple):
    """One way to calculate a span, with weights or KV memory of its own: `engine/arithmetic`, with `/kv` if not "auto".

    `engine`: "eager" (transformers' own layers), "fused", "onnxruntime" or "llamacpp". `arithmetic`: "fp32", "bf16",
    "int8" and "int4" (weights; activations are in bf16, and in onnxruntime of 8 bits, in blocks), "w8a8" (activations,
    too, row by row) or "native" (weights as published). `kv`: "auto", or "q8_0" for keys and values of 8.5 bits.
    """

    engine: str
    arithmetic: str
    kv: str = AUTO

    def __str__(self) -> str:
        name = f"{self.engine}/{self.arithmetic}"
        return name if self.kv == AUTO else f"{name}/{self.kv}"


def variant_of(method: Method) -> Variant:
    """Return the variant that a method runs."""
    return Variant(method.engine, method.arithmetic, method.kv)


REFERENCE: Final = Variant("eager", "fp32")
"""The reference of safetensors packages: available on every span, and exactness is measured against it."""


def reference_variant(package_format: str) -> Variant:
    """Return the reference of a package format: what exact methods agree with, on one machine alone."""
    return variant_of(BASELINES[PackageFormat(package_format)])


_PARTS: Final = {"eager": Parts.ANY, "fused": Parts.ANY, "llamacpp": Parts.PREFIX}


def parts_of(engine: str) -> Parts:
    """Return which parts of its span an engine runs: the graph of `onnxruntime` is the whole span."""
    return _PARTS.get(engine, Parts.WHOLE)


class KvCompatibilityKey(NamedTuple):
    """What keys and values depend on besides tokens: `variant/activations`.

    Variant and wire codec are the same on all stages of a job; cached pages may be used by sessions with the same key.
    """

    variant: Variant
    activations: str

    def __str__(self) -> str:
        return f"{self.variant}/{self.activations}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardSource:
    """The model's config and the files of one span.

    `config`: the content of config.json. `block_files`: by absolute block number, those of the span at least.
    `embed_file`: for a first span, and for a last one with tied embeddings. `head_file`: for a last span. `format`: of
    the files, "safetensors" or "gguf"; `common_file`: of GGUF files, the metadata and tensors that every span needs.
    `tokenizer_file`: for a last span, where the model has one; it may not be there.
    """

    model: ModelId
    config: Mapping[str, Any]
    block_files: Mapping[int, Path]
    embed_file: Path | None = None
    head_file: Path | None = None
    format: str = "safetensors"
    common_file: Path | None = None
    tokenizer_file: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """How an engine runs.

    `memory_bytes`: for weights and KV caches together; None takes half of the device's free memory. `kv_positions`: for
    all sessions together, if fewer than the memory allows. `threads`: None takes one for each physical core.
    `start_timeout_s`: limit of loading. `cache_dir`: disk cache of built variants, if any. `device`: torch's name of
    the device that computes and holds weights and KV caches: "cpu", "cuda:0" (also ROCm), "mps". `plan_rows`: whether
    `memory_bytes` includes the rows queued in the node: one for each position, as f32. `narrow_kv`: see SpanInfo.
    """

    memory_bytes: int | None = None
    kv_positions: int | None = None
    threads: int | None = None
    start_timeout_s: float = 600.0
    cache_dir: Path | None = None
    device: str = "cpu"
    plan_rows: bool = False
    narrow_kv: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionOptions:
    """How a session is calculated.

    `blocks`: the part of the span; None for all of it. `sampling`: given where the part has the model's last block, and
    only there. `activations`: codec of the output rows, "fp32", "bf16" or "int8". `prefix_cache`: whether cached pages
    are used, and this session's cached for others.
    """

    variant: Variant
    blocks: BlockRange | None = None
    sampling: Sampling | None = None
    activations: str = "fp32"
    prefix_cache: bool = True

    @property
    def kv_key(self) -> KvCompatibilityKey:
        """The key of its cached pages."""
        return KvCompatibilityKey(self.variant, self.activations)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefix:
    """The prompt's whole pages, as the prefix cache knows them.

    `namespace`: the coordinator's peer id, so that no peer can poison another's cache, and the blocks. `hashes`: of
    each whole page in order, PAGE_HASH_BYTES each, every one covering those before it.
    """

    namespace: str
    hashes: bytes

    def __iter__(self) -> Iterator[bytes]:
        """Return the hashes of the pages in order."""
        return (
            self.hashes[start : start + PAGE_HASH_BYTES]
            for start in range(0, len(self.hashes) - PAGE_HASH_BYTES + 1, PAGE_HASH_BYTES)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SpanInfo:
    """The span of an engine, and its limits."""

    model: ModelId
    blocks: BlockRange
    block_count: int
    """Blocks of the whole model."""
    hidden_size: int
    vocabulary_size: int
    max_positions: int
    """The longest session the model allows."""
    kv_bytes_per_position: int
    kv_positions: int
    """Positions that all sessions together may reserve, in whole pages."""
    weight_bytes: int
    load_s: float
    kv_shares: Mapping[str, float] = field(default_factory=dict)
    """By narrower type of keys and values, what a position takes of KV memory relative to the engine's own type."""
    max_sequences: int | None = None
    """Open sessions and closed ones with cached pages, together, where the engine limits them."""
    engine: str | None = None
    """The library that computes, its version and what it was built for, where that differs between machines."""
    device: str = "cpu"
    """What computes it, and holds its weights and KV memory."""
    narrow_kv: bool = False
    """Whether lossy variants in torch hold keys and values in bf16, and so twice as many positions in a page."""

    def page_positions(self, variant: Variant) -> int:
        """Return how many positions of a session in a variant a page of KV memory holds."""
        is_narrow = self.narrow_kv and variant.engine == "fused" and variant.arithmetic != "fp32"
        return 2 * PAGE_POSITIONS if is_narrow else PAGE_POSITIONS

    def part(self, blocks: BlockRange | None) -> "SpanInfo":
        """Return the info of a part of the span. Raises EngineError for blocks outside it."""
        if blocks is None or blocks == self.blocks:
            return self
        if not self.blocks.holds(blocks):
            raise EngineError(f"blocks {blocks} are not a part of {self.blocks}")
        return replace(self, blocks=blocks)

    @property
    def is_first(self) -> bool:
        """Whether the span embeds token ids."""
        return self.blocks.start == 0

    @property
    def is_last(self) -> bool:
        """Whether the span samples tokens."""
        return self.blocks.end == self.block_count


def session_part(info: SpanInfo, ready: Container[Variant], options: SessionOptions) -> SpanInfo:
    """Return the info of the part of a span that a session runs.

    Raises VariantNotReady where its variant is not, or does not run that part alone, EngineError for other blocks.
    """
    variant = options.variant
    if variant not in ready:
        raise VariantNotReady(f"the variant {variant} is not ready here")
    part = info.part(options.blocks)
    if not parts_of(variant.engine).include(part.blocks, info.blocks):
        raise VariantNotReady(f"the variant {variant} does not run blocks {part.blocks} of its span alone")
    return part


@dataclass(frozen=True, slots=True)
class SliceInput:
    """Rows of one session for one step.

    `tensor`: token ids i32 (rows,) on a first span, hidden states (rows, hidden_size) in any wire codec elsewhere.
    `position`: absolute position of the first row; rows already cached from there on are dropped first (a rollback).
    `draws`: number of trailing rows after each of which a last span draws a token. `drafts`: on a last span, drafts of
    the tokens that the trailing rows but the last yield, so one fewer than `draws`; drawing ends with the first
    rejected draft. `history`: on a last span, the tokens at all positions before the first that is drawn, where draws
    depend on them, or the prompt's tokens where these are scored; given with the first slice that draws or is scored,
    and again when a session is carried on.
    """

    session: SessionId
    position: int
    tensor: Tensor
    draws: int
    drafts: tuple[int, ...] = ()
    history: Sequence[int] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SliceOutput:
    """The output of a step for one slice.

    Hidden states (rows, hidden_size) in the session's codec; on a last span the tokens drawn, i32 (draws,), or with
    drafts 1 to draws of them; where log probabilities are sampled, too, rows of f32 as in `logprobs_from_tensor`. Where
    the prompt is scored, `Sampling.scored_rows` such rows come first. Where its embedding is wanted, it is the output
    of the slice that draws, f32 (1, hidden_size).
    """

    session: SessionId
    tensor: Tensor


class SliceFault(NamedTuple):
    """Why a slice failed; its session is closed.

    `by_rows`, `by_request`: the sender of the rows is at fault, or the job's request, and not this engine.
    """

    session: SessionId
    message: str
    by_rows: bool = False
    by_request: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """Outputs in the order of the inputs, without the slices that failed; seconds spent inside the forward passes.

    `left_out`: sessions whose slices have no output, as there was no time for the constraints of their texts. The same
    slices are to be in the next step, without their history.
    """

    outputs: tuple[SliceOutput, ...]
    compute_s: float
    faults: tuple[SliceFault, ...] = ()
    left_out: tuple[SessionId, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStatistics:
    """Counts of an engine."""

    reserved_positions: int
    """Held by sessions, in whole pages."""
    cached_positions: int
    """In the prefix cache without a session: evicted when sessions need the memory."""
    steps: int
    compute_s: float
    worker_pid: int | None


def source_from_package(package: Package, blocks: BlockRange) -> ShardSource:
    """Return where the files of a span lie in a model package."""
    manifest = package.manifest
    first, last = blocks.start == 0, blocks.end == manifest.block_count
    tokenizer = manifest.tokenizer_files if last else ()
    return ShardSource(
        model=manifest.model_id,
        config=manifest.config,
        block_files={block: package.path_of(manifest.blocks[block]) for block in range(blocks.start, blocks.end)},
        embed_file=package.path_of(manifest.embed) if first or (last and manifest.tied) else None,
        head_file=package.path_of(manifest.head) if last else None,
        format=manifest.format,
        common_file=None if manifest.common is None else package.path_of(manifest.common),
        tokenizer_file=next((package.path_of(file) for file in tokenizer if file.name == TOKENIZER_FILE), None),
    )
