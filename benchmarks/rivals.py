"""Other engines with the same model, for comparison, as far as they are installed.

Install them with `pip install ctranslate2 onnxruntime-genai onnx-ir`; the project needs none of them. Their formats of
the model are converted once, beside the models in the user's cache, which takes a minute or two. llama.cpp is left out:
PyPI has no wheels of its binding, and it reads GGUF files, which packages are not.
"""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from node.config import default_cache_dir
from node.models.store import Package

Generate = Callable[[list[list[int]], int], float]
"""Token ids of prompts of equal length, and how many tokens to generate for each; returns seconds."""


class NotInstalledError(Exception):
    """Another engine is not installed. The message says which and why."""


def rivals(package: Package, threads: int, device: torch.device) -> Iterator[tuple[str, Generate | NotInstalledError]]:
    """Yield each engine's name (engine/arithmetic) with its generate function, or the reason for its absence.

    On a GPU that is transformers only.
    """
    if device.type != "cpu":
        yield "transformers/fp32", _transformers(package, torch.float32, device)
        yield "transformers/bf16", _transformers(package, torch.bfloat16, device)
        return
    makers: Mapping[str, Callable[[Package, int, str], Generate]] = {
        "transformers/fp32": lambda package, _threads, _arithmetic: _transformers(package, torch.float32, device),
        "ctranslate2/fp32": _ctranslate2,
        "ctranslate2/int8": _ctranslate2,
        "onnxruntime-genai/fp32": _genai,
        "onnxruntime-genai/int4": _genai,
    }
    for name, make in makers.items():
        try:
            yield name, make(package, threads, name.partition("/")[2])
        except (ImportError, NotInstalledError) as error:
            yield name, NotInstalledError(" ".join(str(error).split())[:200])


def _transformers(package: Package, dtype: torch.dtype, device: torch.device) -> Generate:
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(_checkpoint(package), dtype=dtype)
    model.eval().to(device)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0

    def generate(prompts: list[list[int]], count: int) -> float:
        rows = torch.tensor(prompts, device=device)
        started_s = time.perf_counter()
        model.generate(rows, attention_mask=torch.ones_like(rows), max_new_tokens=count, do_sample=False).cpu()
        return time.perf_counter() - started_s

    return generate


def _ctranslate2(package: Package, threads: int, arithmetic: str) -> Generate:
    import ctranslate2
    from transformers import AutoTokenizer

    def convert(folder: Path) -> None:
        ctranslate2.converters.TransformersConverter(str(_checkpoint(package))).convert(str(folder), force=True)

    compute_type = {"fp32": "float32", "int8": "int8_float32"}[arithmetic]
    folder = _made(package, "ctranslate2", convert)
    generator = ctranslate2.Generator(str(folder), compute_type=compute_type, inter_threads=1, intra_threads=threads)
    tokenizer: Any = AutoTokenizer.from_pretrained(_checkpoint(package))

    def generate(prompts: list[list[int]], count: int) -> float:
        texts = [tokenizer.convert_ids_to_tokens(prompt) for prompt in prompts]
        started_s = time.perf_counter()
        generator.generate_batch(
            texts, max_length=count, min_length=count, sampling_topk=1, include_prompt_in_result=False
        )
        return time.perf_counter() - started_s

    return generate


def _genai(package: Package, threads: int, arithmetic: str) -> Generate:
    import onnxruntime_genai

    def build(folder: Path) -> None:
        builder: list[str | Path] = [
            sys.executable,
            "-m",
            "onnxruntime_genai.models.builder",
            "-i",
            _checkpoint(package),
            "-e",
            "cpu",
        ]
        options: list[str | Path] = ["-o", folder, "-p", arithmetic, "-c", folder / "build"]
        done = subprocess.run([*builder, *options], stdout=sys.stderr, check=False)
        if done.returncode:
            raise NotInstalledError("its model builder failed")
        file = folder / "genai_config.json"
        config = json.loads(file.read_text())
        config["model"]["decoder"]["session_options"] |= {"intra_op_num_threads": threads, "inter_op_num_threads": 1}
        file.write_text(json.dumps(config))

    model = onnxruntime_genai.Model(str(_made(package, f"genai-{arithmetic}-{threads}", build)))

    def generate(prompts: list[list[int]], count: int) -> float:
        length = len(prompts[0]) + count
        parameters = onnxruntime_genai.GeneratorParams(model)
        parameters.set_search_options(batch_size=len(prompts), do_sample=False, max_length=length, min_length=length)
        started_s = time.perf_counter()
        generator = onnxruntime_genai.Generator(model, parameters)
        generator.append_tokens(np.array(prompts, np.int32))
        for _ in range(count):
            generator.generate_next_token()
        return time.perf_counter() - started_s

    return generate


def _made(package: Package, name: str, make: Callable[[Path], None]) -> Path:
    """Return a folder with a converted model, made if it is missing."""
    folder = default_cache_dir() / "benchmarks" / f"{package.model_id[:16]}-{name}"
    if not folder.exists():
        building = folder.with_name(f"{folder.name}.building")
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir(parents=True)
        make(building)
        building.rename(folder)
    return folder


def _checkpoint(package: Package) -> Path:
    """Return the package as a folder of Hugging Face's kind."""
    from safetensors.torch import load_file, save_file

    def write(folder: Path) -> None:
        manifest = package.manifest
        (folder / "config.json").write_text(json.dumps(manifest.config))
        weights: dict[str, torch.Tensor] = {}
        for entry in (manifest.embed, *manifest.blocks, manifest.head):
            weights |= load_file(package.path_of(entry))
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            if (package.path / name).exists():
                shutil.copy(package.path / name, folder / name)

    return _made(package, "checkpoint", write)
