"""A request's prompt as token ids and its sampling, within the limits of the model."""

import math
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from node.coordinator.chat import ChatFormat, ChatMessage, ToolFormat
from node.coordinator.submission import JobError, JobErrorCode, JobRequest
from node.models.errors import ModelError, TokenizerBusyError, TokenizerEndedError, TokenizerUnavailableError
from node.models.library import KnownModel
from protocol.limits import MAX_POSITIONS, MAX_STOP_TOKENS
from protocol.messages import Sampling

_FINAL_CHANNEL = "<|channel|>final<|message|>"
"""What a model that writes in channels puts before its answer: JSON that a schema makes sure of begins behind it."""

BUSY_RETRY_S = 2.0
"""When a client should retry while too many prompts wait for the model's tokenizer."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """The tokens of a prompt, and of a conversation also how the model will write."""

    tokens: tuple[int, ...]
    chat_format: ChatFormat | None = None


async def prompt_tokens(request: JobRequest, model: KnownModel) -> tuple[int, ...]:
    """Return the prompt as token ids; see `read_prompt`. Raises JobError."""
    return (await read_prompt(request, model)).tokens


async def read_prompt(request: JobRequest, model: KnownModel) -> Prompt:
    """Return the prompt, whether given as text, conversation or token ids. Raises JobError."""
    given = [form for form in (request.prompt, request.prompt_tokens, request.messages) if form is not None]
    if len(given) != 1:
        raise JobError(JobErrorCode.INVALID, "give exactly one of prompt, prompt tokens and messages")
    if request.stop and model.tokenizer.is_absent:
        raise JobError(JobErrorCode.INVALID, "stop needs text, and the model has no tokenizer: use stop_token_ids")
    if asker := request.origin.key_sha256:
        model = replace(model, tokenizer=model.tokenizer.asked_by(asker))
    chat_format: ChatFormat | None = None
    if request.json_schema:
        await _check_schema(request, model)
    try:
        if request.messages is not None:
            text = await _conversation(request, request.messages, model)
            chat_format = _chat_format(request, request.messages, model, text)
            tokens = await model.tokenizer.encode(text, add_special_tokens=False)
        elif request.prompt is not None:
            tokens = await model.tokenizer.encode(request.prompt)
        else:
            tokens = request.prompt_tokens or ()
        if request.truncate:
            tokens = tokens[: model.max_positions - _least_text(request)]
    except TokenizerUnavailableError as error:
        raise tokenizer_unavailable(error) from None
    except (ValueError, ModelError) as error:
        raise JobError(JobErrorCode.INVALID, str(error)) from None
    if not tokens:
        raise JobError(JobErrorCode.INVALID, "the prompt is empty: give at least one token")
    unknown = next((token for token in tokens if not 0 <= token < model.vocabulary_size), None)
    if unknown is not None:
        message = f"the prompt has the token id {unknown}: this model has 0 to {model.vocabulary_size - 1}"
        raise JobError(JobErrorCode.INVALID, message)
    return Prompt(tokens, chat_format)


def tokenizer_unavailable(error: TokenizerUnavailableError) -> JobError:
    """Return the error of a job that met it: one that clients try again."""
    is_busy, is_ending = isinstance(error, TokenizerBusyError), isinstance(error, TokenizerEndedError)
    code = JobErrorCode.FULL if is_busy else JobErrorCode.LEAVING if is_ending else JobErrorCode.FAILED
    return JobError(code, str(error), retry_after_s=BUSY_RETRY_S)


async def _check_schema(request: JobRequest, model: KnownModel) -> None:
    """Raise JobError where no text can follow the request's JSON Schema, or none would ever end."""
    if request.ignore_eos or not (model.tokenizer.stop_tokens or request.stop_token_ids):
        message = "a text that follows a JSON Schema ends with a stop token: the model has none, or ignore_eos is set"
        raise JobError(JobErrorCode.INVALID, message)
    try:
        fault = await model.tokenizer.schema_fault(request.json_schema)
    except TokenizerUnavailableError as error:
        raise tokenizer_unavailable(error) from None
    except ModelError as error:
        fault = str(error)
    if fault:
        raise JobError(JobErrorCode.INVALID, f"the JSON Schema is not usable: {fault}", param=request.json_schema_param)


async def _conversation(request: JobRequest, messages: Sequence[ChatMessage], model: KnownModel) -> str:
    """Return a conversation as text, by the model's chat template. Raises JobError, ModelError, ChatTemplateError."""
    if request.tools and model.tokenizer.tool_format is None:
        message = "the model's chat template knows no tools, or writes their calls in an unknown form"
        raise JobError(JobErrorCode.INVALID, f"{message}: choose another model, or leave out tools", param="tools")
    options = request.template_options
    if request.json_schema and model.tokenizer.reasoning_tokens is None:
        options = {"enable_thinking": False, **options}  # JSON cannot begin behind reasoning, as its end is not a token
    turns = [message.for_template() for message in messages]
    text = await model.tokenizer.render_chat_text(
        turns, request.tools, options, continue_final_message=request.continue_final_message
    )
    if request.json_schema and model.tokenizer.has_channels and not request.continue_final_message:
        text += _FINAL_CHANNEL
    return text


def chat_format_of(model: KnownModel) -> ChatFormat:
    """Return how a model writes what is not its answer."""
    tokenizer = model.tokenizer
    return ChatFormat(
        tools=ToolFormat(tokenizer.tool_format) if tokenizer.tool_format else None,
        reasons=tokenizer.reasons,
        channel="" if tokenizer.has_channels else None,
    )


def _chat_format(request: JobRequest, messages: Sequence[ChatMessage], model: KnownModel, text: str) -> ChatFormat:
    """Return how a model continues a conversation, which is `text` by its chat template."""
    continued = messages[-1].content if request.continue_final_message else ""
    ends = text.rstrip()
    began = ends.endswith("<think>") or continued.rfind("<think>") > continued.rfind("</think>")
    may_reason = model.tokenizer.reasons
    if request.json_schema:
        is_closed = ends.endswith("</think>") or request.template_options.get("enable_thinking") is False
        may_reason = model.tokenizer.reasoning_tokens is not None and (began or not is_closed)
    chat_format = chat_format_of(model)
    if chat_format.channel is not None and (request.json_schema or request.continue_final_message):
        chat_format = replace(chat_format, channel="final")
    return replace(chat_format, reasons=may_reason, reasoning_began=may_reason and began)


async def prompt_text(request: JobRequest, model: KnownModel) -> str:
    """Return the text of a prompt that was given as text or token ids; empty where the model has no text."""
    if request.prompt_tokens is None or model.tokenizer.is_absent:
        return request.prompt or ""
    try:
        (text,) = await model.tokenizer.decode(request.prompt_tokens)
    except ModelError as error:
        raise JobError(JobErrorCode.FAILED, str(error), may_quote=True) from None
    return text


def sampling_of(request: JobRequest, model: KnownModel, prompt: Prompt) -> Sampling:
    """Return a request's sampling, within the model's limits. Raises JobError.

    `max_tokens` is an upper bound: where the model's context holds fewer, the text ends with the context, as it does
    without a limit.
    """
    prompt_length = len(prompt.tokens)
    room = model.max_positions - prompt_length
    least = _least_text(request)
    if room < least:
        raise JobError(
            JobErrorCode.CONTEXT_LENGTH,
            f"the prompt has {prompt_length} tokens, and the model's context holds {model.max_positions}, "
            "answer included: shorten the prompt",
        )
    wanted = room if request.max_tokens is None else request.max_tokens
    if wanted < least:
        raise JobError(JobErrorCode.INVALID, f"max_tokens is {wanted}: use at least 1", param="max_tokens")
    if not (math.isfinite(request.temperature) and 0 <= request.temperature <= 100 and 0 < request.top_p <= 1):
        raise JobError(JobErrorCode.INVALID, "temperature must be 0 to 100, and top_p above 0 and at most 1")
    _check_tokens("stop_token_ids", request.stop_token_ids, model)
    _check_tokens("logit_bias", (token for token, _ in request.logit_bias), model)
    own_stops = () if request.ignore_eos else model.tokenizer.stop_tokens
    stop_tokens = tuple(dict.fromkeys((*own_stops, *request.stop_token_ids)))
    if len(stop_tokens) > MAX_STOP_TOKENS:
        most = MAX_STOP_TOKENS - len(own_stops)
        message = f"stop_token_ids may have at most {most} entries with this model, which has {len(own_stops)} itself"
        raise JobError(JobErrorCode.INVALID, message, param="stop_token_ids")
    count = request.top_logprobs if request.top_logprobs is not None or not request.prompt_logprobs else 0
    begin, end = _reasoning_tokens(request, model, prompt.chat_format)
    sampling = Sampling(
        temperature=request.temperature,
        top_p=request.top_p,
        seed=secrets.randbits(32) if request.seed is None else request.seed & (2**64 - 1),
        max_tokens=1 if request.pooling else min(room, wanted),
        stop_tokens=stop_tokens,
        top_k=request.top_k if request.top_k < model.vocabulary_size else 0,
        min_p=request.min_p,
        repetition_penalty=request.repetition_penalty,
        frequency_penalty=request.frequency_penalty,
        presence_penalty=request.presence_penalty,
        logit_bias=request.logit_bias,
        logprobs=0 if count is None else min(count, model.vocabulary_size) + 1,
        json_schema=request.json_schema,
        prompt_logprobs=request.prompt_logprobs,
        reasoning_end=end,
        reasoning_begin=begin,
        pooling=request.pooling,
        penalty_window=request.penalty_window,
        min_length=min(prompt_length + request.min_tokens, MAX_POSITIONS) if request.min_tokens else 0,
    )
    return replace(sampling, prompt_length=prompt_length) if sampling.needs_history else sampling


def _least_text(request: JobRequest) -> int:
    """Return how many tokens of text a job has at least."""
    return 0 if request.pooling or (request.prompt_logprobs and request.max_tokens == 0) else 1


def _reasoning_tokens(
    request: JobRequest, model: KnownModel, chat_format: ChatFormat | None
) -> tuple[int | None, int | None]:
    """Return the tokens that begin and end reasoning before JSON: None for what does not come."""
    tokens = model.tokenizer.reasoning_tokens
    if not request.json_schema or tokens is None or chat_format is None or not chat_format.reasons:
        return None, None
    begin, end = tokens
    return None if chat_format.reasoning_began else begin, end


def _check_tokens(param: str, tokens: Iterable[int], model: KnownModel) -> None:
    for token in tokens:
        if not 0 <= token < model.vocabulary_size:
            message = f"{param}: {token} is not a token id of this model, which has 0 to {model.vocabulary_size - 1}"
            raise JobError(JobErrorCode.INVALID, message, param=param)
