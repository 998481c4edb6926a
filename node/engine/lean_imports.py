"""Keeps out of a worker what transformers imports and no forward pass uses: over a hundred MiB of 320.

That is torch's compiler with sympy, its tensors over several machines, scipy, for losses, and what transformers uses of
accelerate, for models over several devices. It has to be called in a process before transformers is imported, and
changes nothing where that is too late.
"""

import importlib
import importlib.util
import sys
from collections.abc import Callable
from contextlib import suppress
from types import ModuleType
from typing import Any, Final

_COMPILER: Final = "torch._dynamo"
_UNUSED: Final = ("accelerate", "scipy")
"""Packages that transformers imports where they are installed."""

_DECORATORS: Final = ("allow_in_graph", "assume_constant_result", "disable")
"""Of functions, which only tell the compiler what to do with them."""


def import_lean() -> None:
    """Import transformers' base classes, which then stay without the rest for the life of the process."""
    if "transformers" in sys.modules or _COMPILER in sys.modules:
        return
    import torch

    # As in builds of torch without it; asked when modules are imported, and again by their functions.
    torch.distributed.is_available = lambda: False
    spec = importlib.util.find_spec(_COMPILER)
    if spec is None:
        return
    compiler = _UnusedCompiler(_COMPILER)
    compiler.__spec__, compiler.__path__ = spec, list(spec.submodule_search_locations or ())
    sys.modules[_COMPILER] = compiler
    torch._dynamo = compiler  # noqa: SLF001
    unused = [name for name in _UNUSED if name not in sys.modules]
    for name in unused:
        sys.modules[name] = None  # type: ignore[assignment]  # which makes it look as if it were not installed
    try:
        importlib.import_module("transformers.modeling_utils")
    finally:
        for name in unused:
            with suppress(KeyError):
                del sys.modules[name]


class _UnusedCompiler(ModuleType):
    """Torch's compiler as long as it only marks functions; it is imported as soon as more of it is used."""

    def __getattr__(self, name: str) -> Any:
        if name in _DECORATORS:
            return _mark
        if name.startswith("__"):
            raise AttributeError(name)
        if sys.modules.get(_COMPILER) is self:
            del sys.modules[_COMPILER]
        return getattr(importlib.import_module(_COMPILER), name)


def _mark(function: Callable[..., Any] | None = None, *_args: Any, **_options: Any) -> Any:
    return (lambda each: each) if function is None else function
