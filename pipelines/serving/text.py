"""Text as it is written: whole characters, up to a stop string."""

from collections.abc import Sequence

from pipelines.data.tokenise import Tokenizer

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """The text of tokens that come one by one. Held back: the rest of a character, and what may begin a stop string."""

    def __init__(self, tokenizer: Tokenizer, stop_strings: Sequence[str] = ()) -> None:
        self.tokenizer = tokenizer
        self.stop_strings = stop_strings
        self.stopped = False  # a stop string has come; nothing follows
        self._tokens: list[int] = []
        self._from = 0  # tokens before are not decoded again; those up to `_read` give text that is known
        self._read = 0
        self._held = ""

    def add(self, token: int) -> str:
        """The text that is certain with a further token."""
        self._tokens.append(token)
        known = self.tokenizer.decode(self._tokens[self._from : self._read])
        text = self.tokenizer.decode(self._tokens[self._from :])
        if text.endswith(_REPLACEMENT):  # bytes that further ones may make a character
            return ""
        self._from, self._read = self._read, len(self._tokens)
        return self._release(text[len(known) :], final=False)

    def finish(self) -> str:
        """What was held back, when no token follows."""
        known = self.tokenizer.decode(self._tokens[self._from : self._read])
        text = self.tokenizer.decode(self._tokens[self._from :])
        self._read = len(self._tokens)
        return self._release(text[len(known) :], final=True)

    def _release(self, text: str, *, final: bool) -> str:
        if self.stopped:
            return ""
        held = self._held + text
        places = [at for stop in self.stop_strings if (at := held.find(stop)) >= 0]
        if places:
            self.stopped, self._held = True, ""
            return held[: min(places)]
        keep = 0 if final else max((_overlap(held, stop) for stop in self.stop_strings), default=0)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of `text` that may begin `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
