"""Stop texts: however the answer arrives in pieces, it ends at the stop text that is complete first."""

from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st

from policies.chat.chat_protocol import TextDelta
from runtime.agent.stop_texts import StopTexts

letters = st.text("ab\n", max_size=12)
stop_texts = st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3).map(tuple)


def cut_whole(text: str, stops: tuple[str, ...]) -> str:
    """What is left of a whole text that is read letter by letter, until it ends in a stop text: without the longest."""
    for end in range(len(text) + 1):
        if ended := [stop for stop in stops if text[:end].endswith(stop)]:
            return text[: end - max(map(len, ended))]
    return text


def spoken(deltas: tuple[TextDelta, ...]) -> str:
    return "".join(delta.text for delta in deltas if delta.kind == "text")


@given(pieces=st.lists(letters, max_size=8), stops=stop_texts)
def test_streamed_in_any_pieces_the_answer_is_the_whole_text_cut(pieces: list[str], stops: tuple[str, ...]) -> None:
    ending = StopTexts(stops)
    shown = ""
    for piece in pieces:
        shown += spoken(ending.cut([TextDelta("text", piece)]))
        if ending.is_reached:
            break
    else:
        shown += spoken(ending.cut([], is_last=True))
    whole = "".join(pieces)
    assert shown == cut_whole(whole, stops)
    assert ending.is_reached == any(stop in whole for stop in stops)
    if stops:
        assert ending.text == shown


@example(pieces=["\na", "\n"], stops=("a", "\na\n"))
@given(pieces=st.lists(letters, max_size=8), stops=stop_texts)
def test_nothing_is_shown_that_must_be_taken_back_nor_held_without_need(
    pieces: list[str], stops: tuple[str, ...]
) -> None:
    ending = StopTexts(stops)
    shown = seen = ""
    for piece in pieces:
        seen += piece
        shown += spoken(ending.cut([TextDelta("text", piece)]))
        whole = cut_whole(seen, stops)
        assert whole.startswith(shown)
        held = whole[len(shown) :]
        assert not held or any(stop.startswith(held) for stop in stops)


def test_reasoning_passes_and_is_not_searched() -> None:
    ending = StopTexts(("end",))
    deltas = ending.cut([TextDelta("reasoning", "the end"), TextDelta("text", "the ")])
    assert deltas == (TextDelta("reasoning", "the end"), TextDelta("text", "the "))
    assert not ending.is_reached


def test_after_the_stop_nothing_more_is_said() -> None:
    ending = StopTexts(("end",))
    assert spoken(ending.cut([TextDelta("text", "at the end of it")])) == "at the "
    assert ending.cut([TextDelta("text", "more")]) == ()
    assert ending.cut([], is_last=True) == ()
