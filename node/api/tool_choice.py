"""What a request's tools, its choice among them and its format of the answer mean for the text."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from node.api.fields import refuse
from node.api.output_parser import ParserRules
from node.api.schemas import call_schema
from node.coordinator.submission import JobRequest

CHAT_TEXT: Final = ParserRules(reasoning=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolChoice:
    """The tools that the model may call, and how the text is read.

    `schema`: a JSON Schema that the text follows, or empty. `param`: the field of the request that it comes from.
    """

    tools: tuple[Mapping[str, Any], ...] = ()
    rules: ParserRules = CHAT_TEXT
    schema: str = ""
    param: str = ""

    def apply(self, job: JobRequest) -> JobRequest:
        """Return a job with them. Raises ApiError where the text cannot follow the schema."""
        if not self.schema:
            return replace(job, tools=self.tools)
        if job.continue_final_message:
            refuse(self.param, "takes a text from its beginning: the last turn cannot be the assistant's")
        return replace(job, tools=self.tools, json_schema=self.schema, json_schema_param=self.param)


def choose_tools(
    tools: tuple[Mapping[str, Any], ...],
    choice: str,
    *,
    single: bool = False,
    schema: str = "",
    param: str = "response_format",
) -> ToolChoice:
    """Return what `none`, `auto`, `required` or the name of a tool means. Raises ApiError.

    `schema`: of the answer, from the field `param`. Where the model may call a tool or answer, the text follows the
    schema of either.
    """
    if choice not in {"auto", "none"} and not tools:
        refuse("tool_choice", "requires tools")
    if not tools or choice == "none":
        return ToolChoice(schema=schema, param=param)
    parameters = {tool["function"]["name"]: tool["function"].get("parameters") or {} for tool in tools}
    forced = ParserRules(reasoning=True, tools=parameters, forced=True, single=True)
    if choice == "auto":
        if schema:
            return ToolChoice(tools=tools, rules=forced, schema=call_schema(param, tools, schema), param=param)
        return ToolChoice(tools=tools, rules=ParserRules(reasoning=True, tools=parameters, single=single))
    if choice != "required" and choice not in parameters:
        refuse("tool_choice", f"names {choice!r}, which is not among the tools")
    chosen = [tool for tool in tools if choice in {"required", tool["function"]["name"]}]
    return ToolChoice(tools=tools, rules=forced, schema=call_schema("tools", chosen), param="tools")
