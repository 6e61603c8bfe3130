"""OpenAI-compatible HTTP over an engine in another process, and the chat page; imports no torch."""
