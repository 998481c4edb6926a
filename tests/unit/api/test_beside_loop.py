"""What takes long to encode is encoded beside the event loop, and means the same."""

import json
import threading

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from node.api import endpoint
from node.api.beside_loop import encode_in_pieces
from node.api.openai import logprobs
from node.coordinator.submission import TokenLogprob
from tests.unit.api.fakes import FakeNode, chat_body

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(VALUES)
def test_encodes_as_a_whole(value: object) -> None:
    expected = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    assert encode_in_pieces(value) == encode_in_pieces(value, 0) == expected


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("most", [0, 1000])
async def test_many_log_probabilities_are_encoded_beside_the_event_loop(
    node: FakeNode, client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch, stream: bool, most: int
) -> None:
    threads: set[int] = set()
    text_of = logprobs._text

    def note_thread(token: TokenLogprob) -> str:
        threads.add(threading.get_ident())
        return text_of(token)

    monkeypatch.setattr(endpoint, "LOGPROBS_AT_ONCE", most)
    monkeypatch.setattr(logprobs, "_text", note_thread)
    body = chat_body(logprobs=True, top_logprobs=3, stream=stream)
    response = await client.post("/v1/chat/completions", json=body)
    assert response.status_code == 200
    assert "top_logprobs" in response.text
    assert threads
    assert (threading.get_ident() in threads) == (most > 0)
