"""The process that interprets a model's tokenizer and chat template: `python -m node.models.tokenizer_worker`.

Started by `tokenizer_service`; requests on its stdin and answers on its stdout are maps of msgpack. The files are a
stranger's, so the kernel bounds what they may cost: every request has a limit of processor time and one of time, at
which the process is killed by a signal that says which; its address space is bounded; it can write no file. It has no
state to save, and may be killed at any moment.
"""

import os
import resource
import signal
import sys
from array import array
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

import msgpack

from node.models.errors import ChatTemplateError, ModelError
from node.models.tokenizer import Tokenizer, TokenizerPanic, read_tokenizer

MAX_DECODED_CHARACTERS: Final = 1 << 20
"""Of one answer to `decode`: a decoder may make long texts of short tokens."""

_MAX_OPEN_FILES = 64


def main() -> None:
    """Answer requests until the daemon closes its end."""
    requests, answers = os.fdopen(os.dup(0), "rb", buffering=0), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is not an answer
    for kind, bound in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NOFILE, _MAX_OPEN_FILES),
    ):
        resource.setrlimit(kind, (bound, bound))
    for number in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(number, signal.SIG_DFL)
    tokenizer: Tokenizer | None = None
    for request in msgpack.Unpacker(requests, max_buffer_size=0):
        with _limits(request["cpu_s"], request["wall_s"]):
            try:
                if request["do"] == "load":
                    _limit_memory(request["load_bytes"])
                    tokenizer = read_tokenizer(Path(request["folder"]), request["files"], request["eos_token_ids"])
                    answer = _facts(tokenizer) if request["is_first"] else {}
                    _limit_memory(_address_space() + request["work_bytes"])
                else:
                    assert tokenizer is not None
                    answer = _answer(tokenizer, request)
                data = msgpack.packb(answer)
            except MemoryError:
                data = msgpack.packb({"error": "memory"})
            except TokenizerPanic as error:
                data = msgpack.packb({"error": "panic", "message": str(error)})
            except (ModelError, ChatTemplateError) as error:
                data = msgpack.packb({"error": "refused", "message": str(error).encode(errors="replace").decode()})
        try:
            answers.write(data)
            answers.flush()
        except BrokenPipeError:
            break
    sys.stderr.flush()
    os._exit(0)


def _facts(tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "vocabulary": tokenizer.vocabulary().to_map(),
        "has_chat_template": tokenizer.has_chat_template,
        "stop_tokens": tokenizer.stop_tokens,
    }


def _answer(tokenizer: Tokenizer, request: dict[str, Any]) -> dict[str, Any]:
    match request["do"]:
        case "render":
            return {"text": tokenizer.render_chat_text(request["messages"])}
        case "encode":
            tokens = tokenizer.encode(request["text"], add_special_tokens=request["add_special_tokens"])
            if len(tokens) > request["max_tokens"]:
                raise ModelError(f"the prompt has {len(tokens)} tokens; at most {request['max_tokens']} can be")
            return {"tokens": array("I", tokens).tobytes()}
        case "decode":
            texts = [tokenizer.decode(array("I", data)) for data in request["sequences"]]
            if sum(map(len, texts)) > MAX_DECODED_CHARACTERS:
                raise ModelError(
                    f"the model's tokenizer makes more than {MAX_DECODED_CHARACTERS} characters of a token"
                )
            return {"texts": texts}
        case unknown:
            raise AssertionError(f"{unknown} cannot be asked for")


@contextmanager
def _limits(cpu_s: float, wall_s: float) -> Iterator[None]:
    """Have the kernel end this process when the block takes longer."""
    signal.setitimer(signal.ITIMER_PROF, cpu_s)
    signal.setitimer(signal.ITIMER_REAL, wall_s)
    yield
    signal.setitimer(signal.ITIMER_PROF, 0)
    signal.setitimer(signal.ITIMER_REAL, 0)


def _limit_memory(size_bytes: int) -> None:
    with suppress(ValueError, OSError):  # as on macOS, which has no such limit
        resource.setrlimit(resource.RLIMIT_AS, (size_bytes, resource.RLIM_INFINITY))


def _address_space() -> int:
    try:
        return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    except OSError:
        return 1 << 30


if __name__ == "__main__":
    main()
