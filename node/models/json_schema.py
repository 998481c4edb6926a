"""JSON Schemas that texts follow, as `llguidance` interprets them: only in processes with limits."""

from typing import Any, Final

import llguidance

from node.util.text import one_line

_LIMITS: Final[dict[str, Any]] = {
    "initial_lexer_fuel": 500_000, "step_lexer_fuel": 100_000, "step_max_items": 50_000, "max_lexer_states": 50_000,
    "max_grammar_size": 100_000, "verbose_errors": False,
}  # fmt: skip

_FORM: Final[Any] = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""JSON on one line: a model could go on with white space for ever."""


def make_matcher(tokenizer: llguidance.LLTokenizer, schema: str) -> llguidance.LLMatcher:
    """Return the matcher of a schema, which keeps its errors as state. Raises ValueError unless it is an object."""
    limits = llguidance.LLParserLimits(**_LIMITS)
    return llguidance.LLMatcher(tokenizer, _grammar_of(schema), log_level=0, limits=limits)


def schema_fault(schema: str) -> str:
    """Return why texts cannot follow a JSON Schema; empty if they can."""
    try:
        fault = llguidance.LLMatcher.validate_grammar(
            _grammar_of(schema), None, limits=llguidance.LLParserLimits(**_LIMITS)
        )
    except ValueError as error:
        fault = str(error)
    return one_line(fault, 300) if fault else ""


def _grammar_of(schema: str) -> str:
    return str(llguidance.LLMatcher.grammar_from_json_schema(schema, overrides=_FORM))
