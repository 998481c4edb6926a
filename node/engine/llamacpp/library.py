"""The C API of llama.cpp, from the shared object of the wheel `xllamacpp`, through ctypes.

Layouts of structs change between releases without notice, so the wheel is pinned exactly, and `load_library` compares
its version and the default parameters with what is declared here before anything else is called.
"""

import ctypes
import importlib.metadata
import importlib.util
import re
import sys
from collections.abc import Mapping
from ctypes import (
    POINTER,
    c_bool,
    c_char_p,
    c_float,
    c_int,
    c_int8,
    c_int32,
    c_int64,
    c_size_t,
    c_uint32,
    c_uint64,
    c_void_p,
)
from functools import cache
from pathlib import Path
from typing import Any, Final

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from node.engine.interface import AUTO, EngineError
from node.util.text import one_line

WHEEL: Final = "xllamacpp"
VERSION: Final = "2026.10.11549"

FLASH_ATTENTION_AUTO: Final = -1
FLASH_ATTENTION_ON: Final = 1
LOAD_MAPPED: Final = 1
"""LLAMA_LOAD_MODE_MMAP."""
SPLIT_NONE: Final = 0
"""LLAMA_SPLIT_MODE_NONE: all on `main_gpu`, or on no GPU where that is negative."""
F16: Final = 1
"""GGML_TYPE_F16."""
GGML_KV_TYPES: Final[Mapping[str, GGMLQuantizationType]] = {
    AUTO: GGMLQuantizationType.F16,
    "q8_0": GGMLQuantizationType.Q8_0,
}
"""The types of keys and values, by the switch `kv`."""

_ERROR: Final = 4
_CONTINUED: Final = 5
_RESERVE_BYTES: Final = 256
"""Behind each struct of parameters, so that a library with larger ones fails the comparison and not the process."""

EvalCallback = ctypes.CFUNCTYPE(c_bool, c_void_p, c_bool, c_void_p)
"""Asked before a tensor of the graph is computed whether it is wanted; then called with it. False ends the graph."""

Widening = ctypes.CFUNCTYPE(None, c_void_p, c_void_p, c_int64)
"""Widens elements of a type to f32."""

_AbortCallback = ctypes.CFUNCTYPE(None, c_char_p)
_LogCallback = ctypes.CFUNCTYPE(None, c_int, c_char_p, c_void_p)


class ModelParameters(ctypes.Structure):
    """`llama_model_params`."""

    _fields_ = (
        ("devices", c_void_p),
        ("tensor_buft_overrides", c_void_p),
        ("n_gpu_layers", c_int32),
        ("split_mode", c_int),
        ("load_mode", c_int),
        ("lazy_mode", c_int),
        ("main_gpu", c_int32),
        ("tensor_split", c_void_p),
        ("progress_callback", c_void_p),
        ("progress_callback_user_data", c_void_p),
        ("kv_overrides", c_void_p),
        ("vocab_only", c_bool),
        ("check_tensors", c_bool),
        ("use_extra_bufts", c_bool),
        ("no_host", c_bool),
        ("no_alloc", c_bool),
        ("load_mtp", c_bool),
        ("_reserve", c_int8 * _RESERVE_BYTES),
    )


class ContextParameters(ctypes.Structure):
    """`llama_context_params`."""

    _fields_ = (
        ("n_ctx", c_uint32),
        ("n_batch", c_uint32),
        ("n_ubatch", c_uint32),
        ("n_seq_max", c_uint32),
        ("n_rs_seq", c_uint32),
        ("n_outputs_max", c_uint32),
        ("n_outputs_max_per_seq", c_uint32),
        ("n_threads", c_int32),
        ("n_threads_batch", c_int32),
        ("ctx_type", c_int),
        ("rope_scaling_type", c_int),
        ("pooling_type", c_int),
        ("attention_type", c_int),
        ("flash_attn_type", c_int),
        ("rope_freq_base", c_float),
        ("rope_freq_scale", c_float),
        ("yarn_ext_factor", c_float),
        ("yarn_attn_factor", c_float),
        ("yarn_beta_fast", c_float),
        ("yarn_beta_slow", c_float),
        ("yarn_orig_ctx", c_uint32),
        ("defrag_thold", c_float),
        ("cb_eval", EvalCallback),
        ("cb_eval_user_data", c_void_p),
        ("type_k", c_int),
        ("type_v", c_int),
        ("moe_cache_size", c_size_t),
        ("abort_callback", c_void_p),
        ("abort_callback_data", c_void_p),
        ("embeddings", c_bool),
        ("offload_kqv", c_bool),
        ("no_perf", c_bool),
        ("op_offload", c_bool),
        ("swa_full", c_bool),
        ("kv_unified", c_bool),
        ("samplers", c_void_p),
        ("n_samplers", c_size_t),
        ("ctx_other", c_void_p),
        ("_reserve", c_int8 * _RESERVE_BYTES),
    )


class Batch(ctypes.Structure):
    """`llama_batch`: rows of any sequences, as tokens or as embeddings."""

    _fields_ = (
        ("n_tokens", c_int32),
        ("token", POINTER(c_int32)),
        ("embd", POINTER(c_float)),
        ("pos", POINTER(c_int32)),
        ("n_seq_id", POINTER(c_int32)),
        ("seq_id", POINTER(POINTER(c_int32))),
        ("logits", POINTER(c_int8)),
    )


class TypeTraits(ctypes.Structure):
    """`ggml_type_traits`: of a type of tensors."""

    _fields_ = (
        ("type_name", c_char_p),
        ("blck_size", c_int64),
        ("blck_size_interleave", c_int64),
        ("type_size", c_size_t),
        ("is_quantized", c_bool),
        ("to_float", Widening),
        ("from_float_ref", c_void_p),
    )


MODEL_DEFAULTS: Final[Mapping[str, Any]] = {
    "devices": None, "tensor_buft_overrides": None, "n_gpu_layers": -1, "split_mode": 1, "load_mode": -1,
    "lazy_mode": 1, "main_gpu": 0, "tensor_split": None, "progress_callback": None,
    "progress_callback_user_data": None, "kv_overrides": None, "vocab_only": False, "check_tensors": False,
    "use_extra_bufts": True, "no_host": False, "no_alloc": False, "load_mtp": False,
}  # fmt: skip
CONTEXT_DEFAULTS: Final[Mapping[str, Any]] = {
    "n_ctx": 512, "n_batch": 2048, "n_ubatch": 512, "n_seq_max": 1, "n_rs_seq": 0, "n_outputs_max": 0,
    "n_outputs_max_per_seq": 1, "n_threads": 4, "n_threads_batch": 4, "ctx_type": 0, "rope_scaling_type": -1,
    "pooling_type": -1, "attention_type": -1, "flash_attn_type": FLASH_ATTENTION_AUTO, "rope_freq_base": 0.0,
    "rope_freq_scale": 0.0, "yarn_ext_factor": -1.0, "yarn_attn_factor": -1.0, "yarn_beta_fast": -1.0,
    "yarn_beta_slow": -1.0, "yarn_orig_ctx": 0, "defrag_thold": -1.0, "cb_eval_user_data": None, "type_k": F16,
    "type_v": F16, "moe_cache_size": 0, "abort_callback": None, "abort_callback_data": None, "embeddings": False,
    "offload_kqv": True, "no_perf": True, "op_offload": True, "swa_full": True, "kv_unified": False,
    "samplers": None, "n_samplers": 0, "ctx_other": None,
}  # fmt: skip
"""What `llama_*_default_params` return in this very release: where a field has moved, one of them differs."""

_SIGNATURES: Final[Mapping[str, tuple[Any, ...]]] = {
    "llama_backend_init": (None,),
    "llama_log_set": (None, _LogCallback, c_void_p),
    "llama_print_system_info": (c_char_p,),
    "llama_model_default_params": (ModelParameters,),
    "llama_context_default_params": (ContextParameters,),
    "llama_model_load_from_file": (c_void_p, c_char_p, ModelParameters),
    "llama_model_free": (None, c_void_p),
    "llama_model_n_embd": (c_int32, c_void_p),
    "llama_model_n_layer": (c_int32, c_void_p),
    "llama_model_size": (c_uint64, c_void_p),
    "llama_model_meta_val_str": (c_int32, c_void_p, c_char_p, c_char_p, c_size_t),
    "llama_model_is_recurrent": (c_bool, c_void_p),
    "llama_model_is_hybrid": (c_bool, c_void_p),
    "llama_model_get_vocab": (c_void_p, c_void_p),
    "llama_vocab_n_tokens": (c_int32, c_void_p),
    "llama_init_from_model": (c_void_p, c_void_p, ContextParameters),
    "llama_free": (None, c_void_p),
    "llama_set_n_threads": (None, c_void_p, c_int32, c_int32),
    "llama_decode": (c_int32, c_void_p, Batch),
    "llama_get_logits": (c_void_p, c_void_p),
    "llama_get_logits_ith": (POINTER(c_float), c_void_p, c_int32),
    "llama_get_memory": (c_void_p, c_void_p),
    "llama_model_n_swa": (c_int32, c_void_p),
    "llama_n_ctx": (ctypes.c_uint32, c_void_p),
    "llama_memory_clear": (None, c_void_p, c_bool),
    "llama_supports_gpu_offload": (c_bool,),
    "llama_memory_seq_rm": (c_bool, c_void_p, c_int32, c_int32, c_int32),
    "llama_memory_seq_cp": (None, c_void_p, c_int32, c_int32, c_int32, c_int32),
    "llama_state_seq_get_size": (c_size_t, c_void_p, c_int32),
    "llama_state_seq_get_data": (c_size_t, c_void_p, c_void_p, c_size_t, c_int32),
    "llama_state_seq_set_data": (c_size_t, c_void_p, c_void_p, c_size_t, c_int32),
    "ggml_backend_reg_count": (c_size_t,),
    "ggml_backend_reg_get": (c_void_p, c_size_t),
    "ggml_backend_reg_name": (c_char_p, c_void_p),
    "ggml_set_abort_callback": (c_void_p, _AbortCallback),
    "ggml_get_type_traits": (POINTER(TypeTraits), c_int),
    "ggml_get_name": (c_char_p, c_void_p),
    "ggml_nbytes": (c_size_t, c_void_p),
    "ggml_backend_tensor_get": (None, c_void_p, c_void_p, c_size_t, c_size_t),
}


class Library:
    """The functions of llama.cpp that this engine calls, as attributes under their own names."""

    def __init__(self, path: Path) -> None:
        try:
            self._shared = ctypes.CDLL(str(path))
            for name, (result, *arguments) in _SIGNATURES.items():
                function = getattr(self._shared, name)
                function.restype, function.argtypes = result, arguments
                setattr(self, name, function)
        except (OSError, AttributeError) as error:
            if (lacking := _LACKING.match(str(error))) is not None:
                raise EngineError(f"{WHEEL} needs {lacking[1]} of the operating system: {_INSTALL_OPENMP}") from None
            raise EngineError(f"{WHEEL} {VERSION} is damaged ({one_line(error, 120)}): {_REINSTALL}") from None
        self._errors = _Log()
        self._callbacks = _LogCallback(self._errors), _AbortCallback(_tell_abort)
        self.llama_log_set(self._callbacks[0], None)
        self.ggml_set_abort_callback(self._callbacks[1])

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"llama.cpp's {name} is not declared in {__name__}")

    def check(self) -> None:
        """Raise EngineError unless the library's structs are those declared here, as far as defaults show it."""
        for struct, expected in (
            (self.llama_model_default_params(), MODEL_DEFAULTS),
            (self.llama_context_default_params(), CONTEXT_DEFAULTS),
        ):
            for field, value in expected.items():
                if getattr(struct, field) != value:
                    raise _other_layout(f"{type(struct).__name__}.{field} is {getattr(struct, field)}, not {value}")
        for kind in (GGMLQuantizationType.F16, GGMLQuantizationType.Q8_0, GGMLQuantizationType.Q4_K):
            traits = self.ggml_get_type_traits(kind).contents
            if (traits.blck_size, traits.type_size) != GGML_QUANT_SIZES[kind]:
                raise _other_layout(f"{kind.name} has {traits.type_size} bytes for {traits.blck_size} elements")

    def build(self) -> str:
        """Return the version and the backends that the library was built for, with their features, as one line."""
        backends = {
            self.ggml_backend_reg_name(self.ggml_backend_reg_get(number)).decode(): list[str]()
            for number in range(self.ggml_backend_reg_count())
        }
        return _described(backends, self.llama_print_system_info().decode())

    def keep_errors_quiet(self) -> None:
        """Write no more errors: of attempts that may fail."""
        self._errors.is_quiet = True

    def take_error(self) -> str:
        """Return the first error that llama.cpp has logged since the last call, as one line; empty where none was."""
        line, self._errors.first = self._errors.first, ""
        return line

    def widening(self, kind: GGMLQuantizationType) -> Any:
        """Return the function that widens elements of a type; it is false where there is none."""
        return self.ggml_get_type_traits(kind).contents.to_float


_LACKING: Final = re.compile(r"(lib[\w.+-]+): cannot open shared object file")
_INSTALL_OPENMP: Final = "install it, with `apt-get install libgomp1` on Debian and Ubuntu if it is libgomp.so.1"
_REINSTALL: Final = f"install it again with `pip install --force-reinstall {WHEEL}=={VERSION}`"


def _described(backends: Mapping[str, list[str]], system_info: str) -> str:
    """Return the backends with what `NAME : FEATURE = 1 | FEATURE = 1 | …`, for one after another, says of them."""
    features: list[str] = []
    for part in filter(None, map(str.strip, system_info.split("|"))):
        name, _, feature = part.rpartition(" : ")
        if name:
            features = backends.get(name, [])
        key, _, value = feature.partition(" = ")
        features += [key] if value == "1" else [f"{key} {value}"] if value != "0" else []
    listed = (f"{name} ({', '.join(found)})" if found else name for name, found in backends.items())
    return f"{WHEEL} {importlib.metadata.version(WHEEL)} for {', '.join(listed)}"


def _other_layout(difference: str) -> EngineError:
    return EngineError(f"{WHEEL} is laid out otherwise than this engine was written for ({difference}): {_REINSTALL}")


@cache
def load_library() -> Library:
    """Return llama.cpp, opened and compared once in a process. Raises EngineError, with what to do about it."""
    spec = importlib.util.find_spec(WHEEL)
    folders = spec.submodule_search_locations if spec is not None else None
    if not folders:
        raise EngineError(
            f"GGUF packages need the wheel {WHEEL}, which is not installed (no wheel for {sys.platform}?): "
            f"`pip install {WHEEL}=={VERSION}`"
        )
    installed = importlib.metadata.version(WHEEL)
    if installed.partition("+")[0] != VERSION:  # what follows is a build for a GPU
        raise EngineError(f"{WHEEL} {installed} is installed, and this engine is written for {VERSION}: {_REINSTALL}")
    shared = [path for folder in folders for path in Path(folder).glob(f"{WHEEL}*.so")]
    if not shared:
        raise EngineError(f"{WHEEL} {installed} has no shared object in {folders[0]}: {_REINSTALL}")
    _check_size(shared[0])
    library = Library(shared[0])
    library.check()
    library.llama_backend_init()
    return library


def _check_size(shared: Path) -> None:
    """Raise EngineError for a shared object that was cut short: loading that may end the process by a signal."""
    listed = {Path(file.locate()): file.size for file in importlib.metadata.files(WHEEL) or ()}
    expected, found = listed.get(shared), shared.stat().st_size
    if expected is not None and found != expected:
        what = f"{shared.name} has {found} bytes, not {expected}"
        raise EngineError(f"{WHEEL} {VERSION} is damaged ({what}): {_REINSTALL}")


def _tell_abort(message: bytes | None) -> None:
    """Write why llama.cpp ends this process, instead of a trace."""
    sys.stderr.write(f"llama.cpp: {one_line((message or b'').decode(errors='replace'))}\n")


class _Log:
    """Writes llama.cpp's errors to stderr, a line each. Its warnings are about what is meant so here."""

    def __init__(self) -> None:
        self.first = ""
        """The first error since it was taken: those that follow are consequences."""
        self.is_quiet = False
        self._is_shown = False

    def __call__(self, level: int, text: bytes | None, _: object) -> None:
        if level != _CONTINUED:
            self._is_shown = level >= _ERROR
        if self._is_shown and (line := one_line((text or b"").decode(errors="replace"))):
            self.first = self.first or line
            if not self.is_quiet:
                sys.stderr.write(f"llama.cpp: {line}\n")
