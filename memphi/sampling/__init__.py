"""From logits to ids, and from ids to the end of an answer."""
