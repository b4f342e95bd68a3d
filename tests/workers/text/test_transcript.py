"""Text from tokens: pieces add up, characters stay whole, stop strings are never shown."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import pytest

from perdure.workers.text.transcript import Transcript

END = 256
PIECES = [bytes([byte]) for byte in range(256)] + [b"", b"ab", b"cd\xe2\x82", b"\xac"]


def read(
    tokens: Iterable[int], stops: Sequence[str] = (), max_tokens: int = 1000, min_tokens: int = 0
) -> tuple[Transcript, list[str]]:
    transcript = Transcript(PIECES, {END}, stops, max_tokens, prompt_tokens=3, min_tokens=min_tokens)
    pieces = []
    for token in tokens:
        pieces.append(transcript.add(token))
        if transcript.finish_reason:
            break
    return transcript, pieces


def test_a_character_is_shown_when_it_is_complete():
    """The euro sign comes in two tokens; before the second there is nothing to show of it."""
    _, pieces = read([258, 259])
    assert pieces == ["cd", "€"]


def test_an_unfinished_last_character_is_replaced():
    """Whether the last token, the end or nothing more comes, text and pieces agree."""
    for tokens, most in (([258], 1), ([258, END], 9)):
        transcript, pieces = read(tokens, max_tokens=most)
        assert "".join(pieces) == transcript.result()["text"] == "cd\ufffd"


def test_bytes_that_are_no_text_are_replaced_as_python_does():
    """Nonsense bytes neither fail nor stall the stream."""
    tokens = [0xFF, 0xE2, ord("a"), 0xC3, 0xA9, 0xF0, 0x9F]
    transcript, pieces = read(tokens, max_tokens=len(tokens))
    assert "".join(pieces) == bytes(tokens).decode("utf-8", "replace")
    assert transcript.finish_reason == "length"


def test_the_result_is_cut_before_the_stop_string():
    """The tokens of the stop string were generated, and count."""
    transcript, pieces = read(b"one END two", stops=["END"])
    assert pieces == ["o", "n", "e", " ", "", "", ""]
    assert transcript.result() == {
        "text": "one ",
        "token_ids": list(b"one END"),
        "finish_reason": "stop",
        "usage": {"prompt_tokens": 3, "completion_tokens": 7},
    }


def test_what_only_looked_like_a_stop_string_is_shown_later():
    """Held back until it is clear, then set free in one piece."""
    _, pieces = read(b"aENxb", stops=["END"])
    assert pieces == ["a", "", "", "ENx", "b"]


def test_held_back_text_is_set_free_by_the_end():
    """By the token that ends the text, and by the last token allowed."""
    assert read([*b"aEN", END], stops=["END"])[1] == ["a", "", "", "EN"]
    transcript, pieces = read(b"aEN", stops=["END"], max_tokens=3)
    assert pieces == ["a", "", "EN"]
    assert transcript.finish_reason == "length"


def test_a_stop_string_in_the_last_token_allowed_is_a_stop():
    """Both hold; the text decides."""
    assert read(b"aEND", stops=["END"], max_tokens=4)[0].finish_reason == "stop"


def test_the_token_that_ends_the_text_is_not_counted():
    """It has no text, and is none of the answer's tokens."""
    transcript, pieces = read([ord("a"), END])
    assert pieces == ["a", ""]
    assert transcript.result()["token_ids"] == [ord("a")]


@pytest.mark.parametrize("stops", [["aba"], ["ab", "ba"], ["abab", "bb"], ["aab", "b\n"]])
def test_every_short_text_is_cut_where_a_search_would_cut(stops):
    """All texts of six letters over two, against a search after each token."""
    for letters in itertools.product(b"ab", repeat=6):
        expected = bytes(letters).decode()
        for length in range(1, 7):
            places = [expected[:length].find(stop) for stop in stops]
            if found := [place for place in places if place >= 0]:
                expected = expected[: min(found)]
                break
        transcript, pieces = read(letters, stops, max_tokens=6)
        assert "".join(pieces) == transcript.result()["text"] == expected


def test_a_second_reading_gives_the_same_pieces():
    """What a resumed request relies on."""
    tokens = [*"grün €uro ENDE".encode(), 258, 259, END]
    assert read(tokens, stops=["ENDX"])[1] == read(tokens, stops=["ENDX"])[1]


@pytest.mark.parametrize(
    ("least", "text", "pieces"),
    [
        (0, "x", ["x", "", "", ""]),
        (2, "x", ["x", "", "", ""]),
        (3, "xabc", ["x", "a", "b", "c", "", "", ""]),
        (5, "xabc", ["x", "a", "b", "c", "", "", ""]),
        (6, "xabcabcd", ["x", "a", "b", "c", "a", "b", "c", "d"]),
    ],
)
def test_stop_strings_wait_for_min_tokens(least, text, pieces):
    """One that began before is no stop; one that begins with that token is."""
    transcript, found = read(b"xabcabcd", stops=["abc"], min_tokens=least)
    assert (found, transcript.result()["text"]) == (pieces, text)
