"""Properties of detokenization and stop strings, for any tokens and any cuts."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from resplit.errors import ModelError, RequestError
from resplit.gateway.openai.text import Detokenizer, StopStrings, Text

WORDS = st.text(alphabet="ab ", max_size=30)
STOPS = st.lists(st.text(alphabet="ab ", min_size=1, max_size=4), max_size=4)


def _shown(text: Text, ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(text)
    return [detokenizer.push(token) for token in ids] + [detokenizer.flush()]


@given(ids=st.lists(st.integers(min_value=0, max_value=319), max_size=40))
def test_the_pieces_of_any_tokens_join_to_the_decoded_text(text: Text, ids: list[int]) -> None:
    assert "".join(_shown(text, ids)) == text.decode(ids)


@given(words=st.text(max_size=20))
@example("e\u0301 🙂 \ufffd 👩‍👩‍👧 日本")
def test_a_character_of_many_tokens_is_shown_whole_and_as_soon_as_it_is_complete(text: Text, words: str) -> None:
    shown = _shown(text, list(text.encode(words)))
    assert "".join(shown) == words
    if "\ufffd" not in words:
        assert not any("\ufffd" in piece for piece in shown)
        assert shown[-1] == ""  # no complete character was held back


def test_the_end_of_text_and_other_special_tokens_are_not_shown(text: Text) -> None:
    hello, end = text.encode("hello"), next(iter(text.stop_ids))
    assert "".join(_shown(text, [end, *hello, end])) == "hello"


@given(words=WORDS, stops=STOPS, cuts=st.lists(st.integers(min_value=0, max_value=30), max_size=8))
def test_a_stop_string_is_found_wherever_the_text_is_cut(words: str, stops: list[str], cuts: list[int]) -> None:
    borders = sorted({0, len(words), *(cut for cut in cuts if cut < len(words))})
    filtered = StopStrings(stops)
    shown = "".join(filtered.push(words[a:b]) for a, b in pairwise(borders)) + filtered.flush()
    assert shown == _cut_at_the_first_to_end(words, stops)
    assert filtered.found == any(stop in words for stop in stops)


def _cut_at_the_first_to_end(words: str, stops: list[str]) -> str:
    for end in range(len(words) + 1):
        if found := [stop for stop in stops if words[:end].endswith(stop)]:
            return words[: end - max(map(len, found))]
    return words


@given(words=WORDS, stops=STOPS)
def test_no_part_of_a_stop_string_is_shown_before_it_is_certain(words: str, stops: list[str]) -> None:
    filtered, whole, shown = StopStrings(stops), _cut_at_the_first_to_end(words, stops), ""
    for letter in words:
        shown += filtered.push(letter)
        assert whole.startswith(shown)


def test_text_that_cannot_become_a_stop_string_is_not_held_back() -> None:
    filtered = StopStrings(["END"])
    assert [filtered.push(piece) for piece in ("some E", "N", "x", "EN")] == ["some ", "", "ENx", ""]


def test_a_conversation_is_encoded_up_to_the_start_of_the_answer(text: Text) -> None:
    ids = text.encode_chat([{"role": "user", "content": "the fox"}])
    assert text._tokenizer.decode(ids) == "<|user|>the fox<|end|><|assistant|>"


def test_a_conversation_that_the_template_refuses_is_a_bad_request(text: Text) -> None:
    with pytest.raises(RequestError, match="starts with a user"):
        text.encode_chat([{"role": "assistant", "content": "no"}])


def test_the_lower_bound_on_tokens_never_exceeds_their_number(text: Text) -> None:
    words = " ".join(["jumps over the lazy dog"] * 20)
    assert 0 < text.least_tokens(words) <= len(text.encode(words))


def test_a_saved_folder_gives_the_same_tokens_and_all_stop_ids(text: Text, tmp_path: Path) -> None:
    text._tokenizer.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [0, 9]}')
    again = Text.from_folder(tmp_path, stop_ids=[11])
    assert again.encode("läßt 日本") == text.encode("läßt 日本")
    assert again.stop_ids == {0, 9, 11}


def test_generation_settings_that_are_not_json_are_named_in_the_error(text: Text, tmp_path: Path) -> None:
    text._tokenizer.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(ModelError, match="generation_config"):
        Text.from_folder(tmp_path)


def test_a_folder_without_a_tokenizer_is_named_in_the_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=str(tmp_path)):
        Text.from_folder(tmp_path)
