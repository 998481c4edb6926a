"""Exactness of every decoder-only architecture of the installed transformers: served exactly, or refused at import.

For each architecture a tiny random model is made from its config class, imported as `metaswarm model import` does, and
served by engines in this process: in one, two and three spans, three sessions of different lengths in each step,
chunked prefill, by the reference and the available fast variants. Greedy tokens must equal those of transformers'
`generate`. Exits with 1 if any differ, or if anything fails after import.
"""

import argparse
import itertools
import multiprocessing
import os
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"}
import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from node.engine.architecture import Reference, check_architecture, package_of, references_of, shrink, tiny_model
from node.engine.backends.batched import FAMILIES
from node.engine.interface import (
    REFERENCE,
    EngineError,
    EngineOptions,
    SessionOptions,
    SliceInput,
    Variant,
    source_from_package,
)
from node.engine.kv_allocator import KvAllocator
from node.engine.loading import describe
from node.engine.torch_shard import TorchShard
from node.models.store import Package
from protocol.identity import BlockRange, JobId, SessionId
from protocol.messages import Sampling
from protocol.tensors import Tensor, tensor_from_tokens, tokens_from_tensor

_CONTEXT = multiprocessing.get_context("forkserver")

Outcome = tuple[str, str]
"""One of exact, refused, WRONG and FAILED, and the reason."""

PROMPTS = ([5, 71, 38, 2, 94, 66, 17, 83, 49, 30, 12, 58, 77, 41, 9, 88, 63, 24, 55], [44, 7, 91], [*range(90, 13, -7)])
CHUNK = 6

# What a class has no default for, or a default with which transformers itself does not run.
INCOMPLETE: Mapping[str, Mapping[str, Any]] = {
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
    "dbrx": {"attn_config": {"rope_theta": 500000.0, "kv_n_heads": 8, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 6, "n_group": 8, "topk_group": 3, "topk_method": "group_limited_greedy"},
    "dots1": {"n_routed_experts": 8, "n_shared_experts": 2, "num_experts_per_tok": 2},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "lfm2_moe": {"layer_types": ["full_attention"] * 32},
    "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 8},
}
_ROPE: Mapping[str, Any] = {"rope_theta": 10000.0}
_LONG = {"rope_type": "longrope", "short_factor": [1.1] * 48, "long_factor": [4.0] * 48, **_ROPE}
# What a class's defaults do not show. The name begins with the model type.
VARIATIONS: Mapping[str, Mapping[str, Any]] = {
    "llama, tied": {"tie_word_embeddings": True},
    "llama, rope dynamic": {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, **_ROPE}},
    "llama, rope linear": {"rope_parameters": {"rope_type": "linear", "factor": 4.0, **_ROPE}},
    "llama, rope yarn": {
        "rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512, **_ROPE}
    },
    "phi3, rope longrope": {"max_position_embeddings": 131072, "rope_scaling": _LONG},
    "phimoe, rope longrope": {
        "max_position_embeddings": 131072,
        "rope_scaling": {
            **_LONG,
            "short_factor": [1.1] * 64,
            "long_factor": [4.0] * 64,
            "short_mscale": 1.2,
            "long_mscale": 1.3,
            "original_max_position_embeddings": 4096,
        },
    },
    "qwen2, sliding from block 14": {"use_sliding_window": True, "max_window_layers": 14},
    "falcon, alibi": {"alibi": True, "new_decoder_architecture": False, "multi_query": False},
    "falcon, new decoder": {
        "new_decoder_architecture": True,
        "num_kv_heads": 8,
        "num_attention_heads": 128,
        "hidden_size": 8192,
    },
    "gpt2, scaled by block": {"scale_attn_by_inverse_layer_idx": True},
    "opt, norms behind": {
        "do_layer_norm_before": False,
        "word_embed_proj_dim": 512,
        "hidden_size": 1024,
        "num_attention_heads": 16,
    },
    "gemma4_text, no inputs per block": {"hidden_size_per_layer_input": 0},
    "gemma4_text, shared keys and values": {"hidden_size_per_layer_input": 0, "num_kv_shared_layers": 10},
    "granitemoehybrid, attention only": {"layer_types": ["attention"] * 32},
    "lfm2, convolutions": {"layer_types": ["conv", "conv", "full_attention", "conv"] * 8},
}


def main() -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.architectures", description=__doc__)
    parser.add_argument("names", nargs="*", help="only these, such as phi3 or 'llama, tied'")
    parser.add_argument("--part", default="1/1", help="only a part of them: 2/4 is the second quarter")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="how many at a time")
    parser.add_argument("--timeout-s", type=float, default=120.0, help="for each")
    options = parser.parse_args()
    part, parts = map(int, options.part.split("/"))
    names = options.names or [*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *VARIATIONS][part - 1 :: parts]
    counts: Counter[str] = Counter()
    began_s = time.monotonic()
    _CONTEXT.set_forkserver_preload(["node.engine.architecture", "node.engine.torch_shard"])
    with ThreadPoolExecutor(options.processes) as pool:
        for name, (outcome, reason, took_s) in zip(
            names, pool.map(partial(_apart, timeout_s=options.timeout_s), names), strict=True
        ):
            counts[outcome] += 1
            print(f"{name:36} {outcome:8} {took_s:5.1f} s  {reason}", flush=True)
    summary = ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items()))
    print(f"{len(names)} architectures: {summary}; took {time.monotonic() - began_s:.0f} s")
    return int(any(counts[outcome] for outcome in ("WRONG", "FAILED")))


def _apart(name: str, timeout_s: float) -> tuple[str, str, float]:
    """Examine an architecture in a process of its own, which has everything imported already."""
    start_s = time.monotonic()
    receiving, sending = _CONTEXT.Pipe(duplex=False)
    process = _CONTEXT.Process(target=_answer, args=(name, sending))
    process.start()
    sending.close()
    try:
        outcome, reason = receiving.recv() if receiving.poll(timeout_s) else ("FAILED", f"not done in {timeout_s:g} s")
    except EOFError:
        outcome, reason = "FAILED", "the process died"
    finally:
        process.kill()
        process.join()
    return str(outcome), str(reason), time.monotonic() - start_s


def _answer(name: str, sending: Connection) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    sending.send(examine(name))


def examine(name: str) -> Outcome:
    """Import a tiny model of an architecture, serve it, and compare."""
    model_type = name.partition(",")[0]
    content = {"model_type": model_type, **INCOMPLETE.get(model_type, {}), **VARIATIONS.get(name, {})}
    try:
        names = check_architecture(content)
    except EngineError as error:
        return "refused", str(error)
    try:
        described = describe(content)
        model = tiny_model(shrink(described.config))
        references = references_of(model, PROMPTS)
        with tempfile.TemporaryDirectory() as folder:
            package = package_of(model, Path(folder), names)
            return _serve(package, references)
    except Exception as error:  # noqa: BLE001  # whatever it is, it would have hit those whom the model is served to
        return "FAILED", f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _serve(package: Package, references: Sequence[Reference]) -> Outcome:
    count = package.manifest.block_count
    variants = [REFERENCE]
    if package.manifest.model_type in FAMILIES:
        variants += [Variant("fused", "fp32"), Variant("onnxruntime", "fp32")]
    done = set()
    for spans in range(1, min(3, count) + 1):
        edges = [count * edge // spans for edge in range(spans + 1)]
        engines = [_Engine(package, BlockRange(start, end)) for start, end in itertools.pairwise(edges)]
        for variant in variants:
            try:
                for engine in engines:
                    engine.shard.prepare(variant)
            except EngineError:
                continue  # not offered for this model
            done.add(variant.engine)
            tokens = _decode(engines, references, variant)
            for session, reference in enumerate(references):
                if tokens[session] != list(reference.tokens):
                    return "WRONG", f"{variant.engine}, {spans} spans, session {session}: {tokens[session]}"
    return "exact", ", ".join(sorted(done))


class _Engine:
    """The engine of one span, with its sessions and their pages."""

    def __init__(self, package: Package, blocks: BlockRange) -> None:
        options = EngineOptions(kv_positions=512, memory_bytes=1 << 30, threads=1)
        self.shard = TorchShard(source_from_package(package, blocks), blocks, options)
        self.pages = KvAllocator(self.shard.info)

    def begin(self, session: SessionId, positions: int, variant: Variant) -> None:
        """Open a session and begin it."""
        self.pages.open(session, positions, None)
        sampling = Sampling(max_tokens=1) if self.shard.info.is_last else None
        options = SessionOptions(sampling=sampling, variant=variant)
        self.shard.begin(session, options, self.pages.begin(session, options))

    def close(self, session: SessionId) -> None:
        """Close a session."""
        self.pages.close(session, keep=False)
        self.shard.close(session)


def _decode(engines: Sequence[_Engine], references: Sequence[Reference], variant: Variant) -> list[list[int]]:
    """Return the greedy tokens of each session, all of which take part in every step until they have theirs."""
    sessions = [SessionId(JobId(f"{number:032x}"), 0) for number in range(len(references))]
    for engine, (session, reference) in itertools.product(engines, zip(sessions, references, strict=True)):
        engine.begin(session, len(reference.prompt) + len(reference.tokens), variant)
    texts = [list(reference.prompt) for reference in references]
    read = [0] * len(references)
    while True:
        ends = [min(len(text), start + CHUNK) for text, start in zip(texts, read, strict=True)]
        active = [
            number
            for number, reference in enumerate(references)
            if len(texts[number]) < len(reference.prompt) + len(reference.tokens)
        ]
        if not active:
            break
        rows: dict[int, Tensor] = {
            number: tensor_from_tokens(texts[number][read[number] : ends[number]]) for number in active
        }
        for engine in engines:
            slices = [
                SliceInput(
                    session=sessions[number],
                    position=read[number],
                    tensor=rows[number],
                    draws=int(ends[number] == len(texts[number])),
                )
                for number in active
            ]
            outputs = engine.shard.step(slices).outputs
            rows = {number: output.tensor for number, output in zip(active, outputs, strict=True)}
        for number in active:
            if ends[number] == len(texts[number]):
                texts[number] += tokens_from_tensor(rows[number])
            read[number] = ends[number]
    for engine, session in itertools.product(engines, sessions):
        engine.close(session)
    return [text[len(reference.prompt) :] for text, reference in zip(texts, references, strict=True)]


if __name__ == "__main__":
    sys.exit(main())
