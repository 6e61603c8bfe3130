"""The answers about each attachment alone, as one text: a line "name: answer" for each, in their order.

All are under way at once; what comes out of turn is kept until it is its turn.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from memphi.errors import MemphiError
from memphi.request import Delta, FinishReason
from memphi.server.answers import Answer
from memphi.server.errors import ApiError


class Shares:
    """The answers of one request that was divided."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        self._answers = [Answer() for _ in names]
        self._waiting: list[list[Delta]] = [[] for _ in names]
        self._turn = 0
        self._begun: set[int] = set()
        """Whose lines have been begun."""
        self.errors: dict[int, MemphiError] = {}

    def add(self, number: int, piece: Delta | MemphiError) -> Iterator[Delta]:
        """Take a piece of one answer; gives what can be told of the whole now, at last why it ended."""
        if isinstance(piece, MemphiError):
            self.errors[number] = piece
        else:
            self._waiting[number].append(piece)
        while self._turn < len(self._names):
            yield from self._tell(self._turn)
            if self._turn not in self.errors and self._answers[self._turn].finish_reason is None:
                return
            self._turn += 1
        reasons = [answer.finish_reason for answer in self._answers if answer.finish_reason is not None]
        if reasons:
            yield Delta("", (), next((reason for reason in reasons if reason is not FinishReason.STOP), reasons[0]))

    def listed(self, places: dict[str, str]) -> list[dict[str, Any]]:
        """Each answer, or why there is none; places are the paths of the attachments by their names."""
        listed: list[dict[str, Any]] = []
        for number, (name, answer) in enumerate(zip(self._names, self._answers, strict=True)):
            entry: dict[str, Any] = {"name": name, "param": places[name]}
            if number in self.errors:
                entry["error"] = ApiError.of(self.errors[number]).message
            elif answer.finish_reason is not None:
                entry |= {"content": answer.text, "finish_reason": answer.finish_reason.value}
            listed.append(entry)
        return listed

    def _tell(self, number: int) -> Iterator[Delta]:
        waiting, self._waiting[number] = self._waiting[number], []
        for delta in waiting:
            opening = "" if number in self._begun else ("\n" if self._begun else "") + f"{self._names[number]}: "
            self._begun.add(number)
            self._answers[number].add(delta)
            yield replace(delta, text=opening + delta.text, finish_reason=None)
