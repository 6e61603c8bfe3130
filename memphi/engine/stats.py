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
    encoded_units: int = 0
    open: int = 0
    """Requests that have not ended."""
    ended: Counter[str] = field(default_factory=Counter)
    """Requests by how they ended."""
    pauses: int = 0
    rungs: Counter[str] = field(default_factory=Counter)
    """Moves under memory pressure, by name."""
