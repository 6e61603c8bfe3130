"""Guess how a sequence goes on from what it has had before: prompt-lookup speculation. Integers only.

A step reads all weights, however few tokens it computes: while rows are few, more tokens cost it next to nothing. So a
row's next ids are guessed and computed along, and kept as far as the sampler chooses the same. Guesses therefore decide
how many steps an answer takes, never which ids it has.
"""

from collections.abc import Sequence
from itertools import takewhile

NGRAMS = (3, 2)
"""How many of the last ids must have occurred before; fewer follow each other by chance."""
MOST_DRAFTS = 15
"""A row of 16 tokens is at most 16 times as fast: beyond, there is little left to win, and much to compute in vain."""
TOKEN_COST = 0.1
"""What a draft adds to a step at most, as a share of it: a score over the vocabulary, a draw, its attention."""
DECAY = 0.8
"""What an estimate keeps of the past at each step: it follows a text that begins or ends to repeat in some five."""
RETRY_TOKENS = 32
"""Where drafts do not pay, one is tried after so many tokens: a thirtieth of the steps, each a tenth dearer."""
LEARNT_AT_ONCE = 4096
"""Ids that are indexed in one step at most, some milliseconds: a prompt of 100,000 holds no step up."""


class Drafts:
    """What one sequence's ids were followed by, and how often that came true.

    The index grows with the ids, which are only ever appended to; it takes some 250 bytes of host memory for each.
    """

    def __init__(self, never: frozenset[int] = frozenset()) -> None:
        """never are ids that are not proposed: what ends an answer, what media stand on."""
        self._never = never
        self._after: dict[tuple[int, ...], int] = {}  # n ids -> the place after their latest occurrence
        self._learnt = NGRAMS[-1]
        self._kept, self._tried = 1.0, 2.0
        self._retry_at = 0

    def learn(self, ids: Sequence[int]) -> bool:
        """Index further ids, a bounded number at once; returns whether all are indexed."""
        end = min(len(ids), self._learnt + LEARNT_AT_ONCE)
        for n in NGRAMS:
            first = max(self._learnt, n)
            columns = (ids[first - n + i : max(end - n + i, 0)] for i in range(n))
            self._after.update(zip(zip(*columns, strict=True), range(first, end), strict=True))
        self._learnt = max(self._learnt, end)
        return self._learnt >= len(ids)

    def propose(self, ids: Sequence[int], most: int) -> tuple[int, ...]:
        """What followed the last ids at their latest earlier occurrence, as many as pay and `most` at most.

        An occurrence that reaches into the last ids themselves is a period, which goes on.
        """
        most = min(most, self._worth(len(ids))) if most > 0 else 0
        if most < 1 or not self.learn(ids):
            return ()
        place = next((after for n in NGRAMS if (after := self._after.get(tuple(ids[-n:])))), None)
        if place is None:
            return ()
        followed = (ids[place + i % (len(ids) - place)] for i in range(most))
        return tuple(takewhile(lambda number: number not in self._never, followed))

    def note(self, proposed: int, kept: int, length: int) -> None:
        """Learn that of so many drafts so many were right, the sequence now being of this length."""
        self._kept = self._kept * DECAY + kept
        self._tried = self._tried * DECAY + min(kept + 1, proposed)  # What follows the first wrong one tells nothing.
        self._retry_at = length + RETRY_TOKENS

    def _worth(self, length: int) -> int:
        """How many drafts pay: the last one is kept if all before it are too, and is to be worth what it costs."""
        share = self._kept / self._tried
        worth = next((n for n in range(MOST_DRAFTS, 0, -1) if share**n >= TOKEN_COST), 0)
        return worth or int(length >= self._retry_at)
