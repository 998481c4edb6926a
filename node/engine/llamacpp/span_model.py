"""The weights of a span in llama.cpp, on one device."""

import ctypes
import weakref
from pathlib import Path
from typing import Final

from node.engine.device import CPU
from node.engine.interface import EngineError
from node.engine.llamacpp.library import LOAD_MAPPED, SPLIT_NONE, Library
from node.util.mapped_pages import drop_mapped_pages

_LONGEST_VALUE: Final = 256


class SpanModel:
    """A span that llama.cpp has loaded. `device`: torch's name of the one that computes it."""

    def __init__(self, library: Library, path: Path, device: str = CPU) -> None:
        self.library = library
        self.is_on_gpu: bool = device != CPU and library.llama_supports_gpu_offload()
        parameters = library.llama_model_default_params()
        parameters.load_mode = LOAD_MAPPED
        # One device only, for which its memory was planned: of the GPUs the one of this number, or none.
        parameters.split_mode = SPLIT_NONE
        parameters.main_gpu = int(device.partition(":")[2] or 0) if self.is_on_gpu else -1
        if not self.is_on_gpu:
            parameters.n_gpu_layers = 0
        library.take_error()
        self.handle = library.llama_model_load_from_file(str(path).encode(), parameters)
        if not self.handle:
            reason = library.take_error().rpartition("error loading model: ")[2] or "it does not say why"
            raise EngineError(f"llama.cpp cannot load the model: {reason}")
        # Of some types llama.cpp has made a copy in another order, and reads only that.
        drop_mapped_pages(path.resolve())
        weakref.finalize(self, library.llama_model_free, self.handle)
        if library.llama_model_is_recurrent(self.handle) or library.llama_model_is_hybrid(self.handle):
            raise EngineError("the architecture keeps a recurrent state, which cannot be rolled back: not supported")
        self.hidden_size: int = library.llama_model_n_embd(self.handle)
        self.vocabulary_size: int = library.llama_vocab_n_tokens(library.llama_model_get_vocab(self.handle))
        self.window: int = library.llama_model_n_swa(self.handle)
        """Positions of its sliding window, 0 for none."""
        self.is_latent = self._metadata(f"{self._metadata('general.architecture')}.attention.kv_lora_rank") not in {
            "",
            "0",
        }
        """Whether keys and values are parts of one row (multi-head latent attention), which has one type."""

    def _metadata(self, key: str) -> str:
        """Return a value of the model's metadata as text; empty where there is none."""
        text = ctypes.create_string_buffer(_LONGEST_VALUE)
        self.library.llama_model_meta_val_str(self.handle, key.encode(), text, _LONGEST_VALUE)
        return text.value.decode(errors="replace")
