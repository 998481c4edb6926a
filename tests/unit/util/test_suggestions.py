import pytest

from node.util.suggestions import did_you_mean, suggestion

NAMES = ("smollm2-135m-instruct", "status", "MEMORY")


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("stauts", "status"),
        ("memroy", "MEMORY"),
        ("smollm2", "smollm2-135m-instruct"),
        ("SmolLM2-135M", "smollm2-135m-instruct"),
        ("st", None),
        ("quite another", None),
        ("x" * 10_000, None),
    ],
)
def test_suggests_what_is_close_or_begins_so(name: str, meant: str | None) -> None:
    assert suggestion(name, NAMES) == meant
    assert did_you_mean(name, NAMES) == ("" if meant is None else f"; did you mean {meant!r}?")
