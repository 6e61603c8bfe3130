"""Named workloads, what the card allows at most beside every figure, and one JSON document per run."""
