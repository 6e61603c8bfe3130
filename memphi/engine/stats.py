"""What an engine has done so far, in counters."""

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Stats:
    """Counters since the engine began."""

    steps: int = 0
    prompt_tokens: int = 0
    """Computed, not found in the cache."""
    shared_tokens: int = 0
    """Found in the cache."""
    answer_tokens: int = 0
    drafted_tokens: int = 0
    """Guesses of answers' next tokens that were computed along."""
    accepted_tokens: int = 0
    """Those that were right, each of which saved its sequence a step."""
    encoded_units: int = 0
    shared_media: int = 0
    """Attachments whose embeddings were found in the cache, or were being made already."""
    open: int = 0
    """Requests that have not ended."""
    ended: Counter[str] = field(default_factory=Counter)
    """Requests by how they ended."""
    pauses: int = 0
    rungs: Counter[str] = field(default_factory=Counter)
    """Moves under memory pressure, by name."""
    waiting: int = 0
    """Requests that are not let in yet, or are paused."""
    accounts: dict[str, int] = field(default_factory=dict)
    """The budget's ledger: bytes by account."""
    mapped_bytes: int = 0
    """Memory that is behind the pool's pages."""
