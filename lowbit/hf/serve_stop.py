"""Stop strings as OpenAI has them: the answer ends before the first of them.

transformers stops generating with the token that completes a stop string, and sends that token's text too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

__all__ = ["StopCut"]


class StopCut:
    """Passes a text that comes in pieces on, up to the first stop string in it.

    An end of the text that may become a stop string is held back until it is one or is not.

    Args:
        stops: the strings, none of them empty.
        found: called once, when a stop string is found.
    """

    def __init__(self, stops: Sequence[str], found: Callable[[], None] = lambda: None) -> None:
        self._stops, self._found = stops, found
        self._held = ""
        self._stopped = False

    def feed(self, piece: str) -> str:
        """The next piece; returns what is certain to be part of the answer, perhaps nothing."""
        if self._stopped:
            return ""
        text = self._held + piece
        ends = [at for at in map(text.find, self._stops) if at >= 0]
        if ends:
            self._stopped, self._held = True, ""
            self._found()
            return text[: min(ends)]
        kept = len(text) - self._longest_beginning(text)
        self._held = text[kept:]
        return text[:kept]

    def flush(self) -> str:
        """What was held back, when no more text follows it."""
        held, self._held = self._held, ""
        return held

    def _longest_beginning(self, text: str) -> int:
        """Characters at the end of ``text`` that a stop string begins with."""
        longest = max(map(len, self._stops), default=0)
        return next(
            (n for n in range(min(longest - 1, len(text)), 0, -1) if any(s.startswith(text[-n:]) for s in self._stops)),
            0,
        )
