"""What a request asks for, as token ids and as sampling, within the limits of its model."""

import math
import secrets

from node.jobs.interface import JobError, JobErrorCode, JobRequest
from node.models.errors import ModelError
from node.models.library import KnownModel
from node.models.tokenizer import NoTokenizer
from protocol.messages import Sampling

DEFAULT_MAX_TOKENS = 512
"""New tokens of a job that names no limit, as far as the model's context allows."""


def prompt_tokens(request: JobRequest, model: KnownModel) -> tuple[int, ...]:
    """Return the prompt as token ids; the request gives it as text, as a conversation, or as ids.

    Raises JobError.
    """
    given = [form for form in (request.prompt, request.prompt_tokens, request.messages) if form is not None]
    if len(given) != 1:
        raise JobError(JobErrorCode.INVALID, "give exactly one of prompt, prompt tokens and messages")
    if request.stop and isinstance(model.tokenizer, NoTokenizer):
        raise JobError(JobErrorCode.INVALID, "the model has no tokenizer: its answer has no text that `stop` could end")
    try:
        if request.messages is not None:
            turns = [{"role": message.role, "content": message.content} for message in request.messages]
            tokens = tuple(model.tokenizer.render_chat(turns))
        elif request.prompt is not None:
            tokens = tuple(model.tokenizer.encode(request.prompt))
        else:
            tokens = request.prompt_tokens or ()
    except (ValueError, ModelError) as error:
        raise JobError(JobErrorCode.INVALID, str(error)) from None
    if not tokens:
        raise JobError(JobErrorCode.INVALID, "the prompt is empty")
    if not all(0 <= token < model.vocabulary_size for token in tokens):
        raise JobError(JobErrorCode.INVALID, f"token ids of this model are 0 to {model.vocabulary_size - 1}")
    return tokens


def sampling_of(request: JobRequest, model: KnownModel, prompt_length: int) -> Sampling:
    """Return how to draw a request's tokens, within the model's limits. Raises JobError."""
    room = model.max_positions - prompt_length
    wanted = request.max_tokens
    if room < 1 or (wanted is not None and wanted > room):
        raise JobError(
            JobErrorCode.CONTEXT_LENGTH,
            f"the prompt has {prompt_length} tokens and {wanted or 'some'} new ones are asked for, "
            f"but the model's context holds {model.max_positions}: shorten the prompt or ask for fewer",
        )
    if wanted is not None and wanted < 1:
        raise JobError(JobErrorCode.INVALID, "max_tokens must be at least 1")
    if not (math.isfinite(request.temperature) and 0 <= request.temperature <= 100 and 0 < request.top_p <= 1):
        raise JobError(JobErrorCode.INVALID, "temperature must be at least 0, and top_p above 0 and at most 1")
    return Sampling(
        temperature=request.temperature,
        top_p=request.top_p,
        seed=secrets.randbits(32) if request.seed is None else request.seed & (2**64 - 1),
        max_tokens=min(room, DEFAULT_MAX_TOKENS) if wanted is None else wanted,
        stop_tokens=() if request.ignore_eos else model.tokenizer.stop_tokens,
    )
