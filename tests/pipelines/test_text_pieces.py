"""Pieces of a text: together they are the text, none is too long, and they end where sentences do."""

import numpy as np
import pytest

from pipelines.summarising.text_pieces import Pieces


class Words:
    """Every word with the space before it is a token; long words are several."""

    def encode(self, text: str) -> tuple[list[int], list[int]]:
        starts = [n for n in range(len(text)) if n == 0 or text[n] == " " or n % 5 == 0]
        return [ord(text[n]) for n in starts], starts


class Bytes:
    def encode(self, text: str) -> tuple[list[int], list[int]]:
        starts = [n for n, char in enumerate(text) for _ in char.encode()]
        return list(text.encode()), starts


def pieces(encoder: Words | Bytes, text: str, most: int, chunk: int = 7) -> list[str]:
    data = text.encode()
    taken = Pieces(encoder, [data[n : n + chunk] for n in range(0, len(data), chunk)])
    found = []
    while (piece := taken.take(most)) is not None:
        assert piece.ids == encoder.encode(piece.text)[0]
        found.append(piece.text)
    assert taken.ended
    return found


@pytest.mark.parametrize("encoder", [Words(), Bytes()])
@pytest.mark.parametrize("most", [8, 33, 100, 5000])
def test_pieces_are_the_text_and_none_is_too_long(encoder: Words | Bytes, most: int) -> None:
    draw = np.random.default_rng(0)
    text = "".join(draw.choice(list("abc æø。.\n   日"), 3000))
    found = pieces(encoder, text, most)
    assert "".join(found) == text
    assert all(0 < len(encoder.encode(piece)[0]) <= most for piece in found)
    assert len(found) <= 3 * (len(encoder.encode(text)[0]) // most + 1)


def test_a_piece_ends_with_a_paragraph_or_a_sentence_where_one_ends_late_in_it() -> None:
    text = "One. " * 15 + "A paragraph ends.\n\n" + "Another begins. " * 10
    assert pieces(Bytes(), text, 100)[0].endswith("ends.\n\n")
    assert pieces(Bytes(), "word " * 5 + "End. " + "word " * 40, 36)[0] == "word " * 5 + "End. "


def test_text_without_any_place_to_cut_is_cut_all_the_same() -> None:
    assert list(map(len, pieces(Bytes(), "x" * 250, 100))) == [100, 100, 50]


def test_no_text_gives_no_piece() -> None:
    assert pieces(Bytes(), "", 10) == []


def test_bytes_that_are_no_text_are_refused_where_they_stand() -> None:
    taken = Pieces(Bytes(), [b"good " * 10, b"\xff"])
    with pytest.raises(UnicodeDecodeError, match="not UTF-8 at byte 50"):
        taken.take(60)
