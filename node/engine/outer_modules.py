"""Finds the modules of a model before its first block and behind its last one.

By tracing the model's own forward pass, not by names: XGLM's final norm is called `layer_norm`, as an embedding's norm
is elsewhere, and a last span without it gives wrong tokens without any error. The pass costs next to nothing: blocks
return their input, and modules with weights give zeros of the right shape.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from node.engine.interface import EngineError
from node.models.layout import Part, part_of

_ROWS = 2
_WRAPPINGS: tuple[Callable[[Any], Any], ...] = (
    lambda hidden: hidden,
    lambda hidden: (hidden, None),
    lambda hidden: (hidden,),
    lambda hidden: (hidden, None, None),
)
"""What blocks of different architectures return."""


@dataclass(frozen=True, slots=True)
class OuterModules:
    """The modules with weights that a forward pass calls outside of the blocks, by their paths."""

    before: frozenset[str]
    """They make the first block's input of token ids."""
    behind: frozenset[str]
    """They make logits of the last block's output."""

    def part_of(self, weight: str) -> Part | None:
        """Return the part of a package that a parameter of the model belongs to."""
        owner = weight.rpartition(".")[0]
        if owner in self.before | self.behind:
            return "head" if owner in self.behind else "embed"
        return part_of(weight)


class _NotAStackError(Exception):
    """The pass is not a plain stack of blocks; the message says why."""


class _Trace:
    """One forward pass with stand-ins for everything that has weights."""

    def __init__(self, model: nn.Module, path: str, wrap: Callable[[Any], Any]) -> None:
        blocks = model.get_submodule(path)
        assert isinstance(blocks, nn.ModuleList)
        self._blocks = list(blocks)
        self._wrap = wrap
        self._width = 0
        self._passed = 0
        self._calls: dict[str, set[str]] = {}
        self._replaced: dict[nn.Module, Callable[..., Any]] = {}
        for number, block in enumerate(self._blocks):
            self._replaced[block] = partial(self._pass, number)
        for name, module in model.named_modules():
            if not name.startswith(f"{path}.") and next(module.parameters(recurse=False), None) is not None:
                self._replaced[module] = partial(self._stand_in, name, module)

    def run(self, model: nn.Module, options: Mapping[str, Any]) -> OuterModules:
        for module, forward in self._replaced.items():
            module.forward = forward
        try:
            with torch.inference_mode():
                model(**options)
        finally:
            for module in self._replaced:
                del module.forward
        if self._passed < len(self._blocks):
            raise _NotAStackError(f"only {self._passed} of its {len(self._blocks)} blocks are run")
        between = sorted(name for name, sides in self._calls.items() if sides != {"before"} and sides != {"behind"})
        if between:
            raise _NotAStackError(f"{between[0]} is used at more than one end of the blocks, or between them")
        before, behind = (
            frozenset(name for name, sides in self._calls.items() if sides == {side}) for side in ("before", "behind")
        )
        return OuterModules(before, behind)

    def _pass(self, number: int, *inputs: Any, **options: Any) -> Any:
        hidden = inputs[0] if inputs else options.get("hidden_states")
        if number != self._passed:
            raise _NotAStackError("its blocks are not run one after another, each once")
        if not isinstance(hidden, torch.Tensor) or hidden.dim() != 3 or hidden.shape[:2] != (1, _ROWS):
            raise _NotAStackError("its blocks do not map one row of hidden states for each token to another")
        self._passed += 1
        return self._wrap(hidden)

    def _stand_in(self, name: str, module: nn.Module, *inputs: Any, **options: Any) -> Any:
        side = "before" if not self._passed else "behind" if self._passed == len(self._blocks) else "between"
        self._calls.setdefault(name, set()).add(side)
        tensors = (value for value in options.values() if isinstance(value, torch.Tensor))
        first = inputs[0] if inputs else next(tensors, None)
        match module:
            case nn.Embedding():
                return torch.zeros(1, _ROWS, module.embedding_dim)
            case nn.Linear():
                assert isinstance(first, torch.Tensor)
                return first.new_zeros(*first.shape[:-1], module.out_features)
            case _:
                return first


def trace_outer_modules(model: nn.Module, base: nn.Module, path: str) -> OuterModules:
    """Follow the forward pass of a whole model, described or loaded, whose blocks stand at `path`.

    Raises EngineError where the blocks are not a plain stack, or a module is used on both sides of them.
    """
    options = {
        "input_ids": torch.zeros(1, _ROWS, dtype=torch.long),
        "position_ids": torch.arange(_ROWS).unsqueeze(0),
        "use_cache": False,
    }
    options = select_options(options, accepted_options(model.forward, base.forward))
    faults: list[_NotAStackError] = []
    for wrap in _WRAPPINGS:
        try:
            return _Trace(model, path, wrap).run(model, options)
        except _NotAStackError as error:
            faults.append(error)
        except Exception:  # noqa: BLE001, S112  # an untested architecture may raise anything
            continue
    raise EngineError(f"{faults[0] if faults else 'its forward pass is not a plain stack of blocks'}")


def accepted_options(forward: Callable[..., Any], inner: Callable[..., Any] | None = None) -> frozenset[str]:
    """Return the parameters of a forward pass; also those of the inner one if it passes unknown ones on."""
    parameters = inspect.signature(forward).parameters
    hands_on = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    return frozenset(parameters) | (accepted_options(inner) if inner is not None and hands_on else frozenset())


def select_options(options: Mapping[str, Any], names: frozenset[str]) -> dict[str, Any]:
    """Return the options that are among the names."""
    return {name: value for name, value in options.items() if name in names}
