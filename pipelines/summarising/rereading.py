"""Summaries by a model without memory, which reads a long text in pieces: `rolling` and `map_reduce`.

Each is a program for one document: a generator that asks a few prompts at a time, gets their replies and ends with the
last one. Prompts are put together from pieces whose lengths are known, so that none is longer than the model's context;
nothing of a document is left out. Pieces and replies are token ids.
"""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

from pipelines.summarising.documents import DocumentError
from pipelines.summarising.instruct import InstructModel, Reply
from pipelines.summarising.text_pieces import Pieces

INSTRUCTION = "Write a summary of it in one paragraph: who takes part, what happens, and how it ends."
DEFAULT_PIECE_LEN = 1024
_LEAST_PIECE_LEN = 32  # a context that leaves less room is refused
_ASKED_AT_ONCE = 16  # prompts of one document: more would only hold more of it in memory

Frame = list[list[int]]
Program = Generator[list[list[int]], list[Reply], Reply]


@dataclass(frozen=True)
class Frames:
    """What stands around the texts of every kind of prompt."""

    whole: Frame  # one text: all of it
    first: Frame  # one text: its beginning
    further: Frame  # two texts: the summary so far, what comes next
    part: Frame  # one text: some part
    merge: Frame  # one text: summaries of parts, one after the other
    gap: list[int]  # between those


def frames(model: InstructModel, instruction: str) -> Frames:
    """The prompts of a model; `instruction` says what is wanted of "it", the text that stands before."""
    asked = "\n\n" + instruction
    return Frames(
        whole=model.frame(["Here is a text:\n\n", asked]),
        first=model.frame(["Here is the beginning of a long text:\n\n", asked]),
        further=model.frame(
            [
                "Here is a summary of a long text so far:\n\n",
                "\n\nHere is how the text goes on:\n\n",
                f"{asked} Keep what the summary so far tells and add what is new.",
            ]
        ),
        part=model.frame(["Here is a part of a long text:\n\n", asked]),
        merge=model.frame(
            ["Here are summaries of the parts of one long text, in their order:\n\n", f"{asked} Make them one summary."]
        ),
        gap=model.encode("\n\n")[0],
    )


def overhead(frame: Frame) -> int:
    """Tokens of a prompt beside its texts."""
    return sum(map(len, frame))


def filled(frame: Frame, *texts: Sequence[int]) -> list[int]:
    """The prompt with its texts."""
    ids = list(frame[0])
    for text, after in zip(texts, frame[1:], strict=True):
        ids += [*text, *after]
    return ids


@dataclass(frozen=True)
class Room:
    """How the tokens of a context are shared out."""

    context_len: int
    max_new_tokens: int
    piece_len: int  # tokens of a piece at most

    def left(self, frame: Frame) -> int:
        """Tokens that the texts of a prompt may have together."""
        return self.context_len - self.max_new_tokens - overhead(frame)


def most_new_tokens(name: str, frames: Frames, context_len: int) -> int:
    """The longest summaries for which every prompt of a strategy has room; below 1 where there is none at all."""
    piece = _LEAST_PIECE_LEN
    needs = {  # beside its frame and what is written, a prompt has to hold so many summaries and other tokens
        "rolling": [(frames.whole, 0, piece), (frames.first, 0, piece), (frames.further, 1, piece)],
        "map_reduce": [(frames.whole, 0, piece), (frames.part, 0, piece), (frames.merge, 2, len(frames.gap))],
    }
    return min((context_len - overhead(frame) - others) // (1 + summaries) for frame, summaries, others in needs[name])


class Reading:
    """The pieces of one document, counted."""

    def __init__(self, pieces: Pieces, room: Room) -> None:
        self._pieces = pieces
        self._room = room
        self.num_tokens = 0
        self.num_pieces = 0

    def take(self, most: int) -> list[int] | None:
        """The next piece, of at most so many tokens and at most `piece_len`; None at the end."""
        piece = self._pieces.take(min(most, self._room.piece_len))
        if piece is None:
            return None
        self.num_tokens += len(piece.ids)
        self.num_pieces += 1
        return piece.ids

    @property
    def ended(self) -> bool:
        """Whether nothing is left."""
        return self._pieces.ended


def rolling(reading: Reading, frames: Frames, room: Room) -> Program:
    """The summary so far is carried from piece to piece as text."""
    piece = reading.take(min(room.left(frames.whole), room.left(frames.first)))
    if piece is None:
        raise DocumentError("the document is empty")
    (reply,) = yield [filled(frames.whole if reading.ended else frames.first, piece)]
    while (piece := reading.take(room.left(frames.further) - len(reply.ids))) is not None:
        (reply,) = yield [filled(frames.further, reply.ids, piece)]
    return reply


def map_reduce(reading: Reading, frames: Frames, room: Room) -> Program:
    """Every piece is summarised alone, then summaries of neighbours together, until one is left."""
    most = min(room.left(frames.whole), room.left(frames.part))
    piece = reading.take(most)
    if piece is None:
        raise DocumentError("the document is empty")
    if reading.ended:
        (reply,) = yield [filled(frames.whole, piece)]
        return reply
    level: list[Reply] = []
    while piece is not None:
        prompts: list[list[int]] = []
        while piece is not None and len(prompts) < _ASKED_AT_ONCE:
            prompts.append(filled(frames.part, piece))
            piece = reading.take(most)
        level += yield prompts
    while len(level) > 1:
        level = yield from _merged(level, frames, room)
    return level[0]


def _merged(level: Sequence[Reply], frames: Frames, room: Room) -> Generator[list[list[int]], list[Reply], list[Reply]]:
    """Summaries of as many neighbours as a prompt has room for; at least two, so that fewer are left."""
    groups: list[list[Reply]] = [[]]
    size = 0
    for reply in level:
        added = len(reply.ids) + len(frames.gap)
        if groups[-1] and size + added > room.left(frames.merge) + len(frames.gap):
            groups.append([])
            size = 0
        groups[-1].append(reply)
        size += added
    merged: list[Reply] = []
    for start in range(0, len(groups), _ASKED_AT_ONCE):
        some = groups[start : start + _ASKED_AT_ONCE]
        prompts = [filled(frames.merge, _joined(group, frames.gap)) for group in some if len(group) > 1]
        replies = iter((yield prompts) if prompts else ())
        merged += [next(replies) if len(group) > 1 else group[0] for group in some]
    return merged


def _joined(group: Sequence[Reply], gap: Sequence[int]) -> list[int]:
    ids = list(group[0].ids)
    for reply in group[1:]:
        ids += [*gap, *reply.ids]
    return ids


PROGRAMS: dict[str, Callable[[Reading, Frames, Room], Program]] = {"rolling": rolling, "map_reduce": map_reduce}
