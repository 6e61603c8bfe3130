"""Clients of `server_overhead` in a process of their own: each reads a stream of a server's answers to its end.

Imports nothing but the standard library, so that many are there at once. Usage, by `server_overhead` alone:
python -m benchmarks.server_streams '{"url": ..., "first": ..., "answers": [[tokens, ...], ...]}'
"""

import asyncio
import json
import re
import sys
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

CHAT = "/v1/chat/completions"
READ_BYTES = 1 << 16
LAST_CHUNK = b"\r\n0\r\n\r\n"


async def ask(asked: dict[str, Any]) -> None:
    """What a process of clients does: connect, say so, wait for a line, read all streams, tell the tokens."""
    url, first = urlsplit(asked["url"]), asked["first"]
    connections = [await asyncio.open_connection(url.hostname, url.port) for _ in asked["answers"]]
    print("connected", flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    streams = [
        _hear_all(*connection, first + place, answers)
        for place, (connection, answers) in enumerate(zip(connections, asked["answers"], strict=True))
    ]
    print(sum(await asyncio.gather(*streams)), flush=True)


async def _hear_all(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int, answers: Sequence[int]
) -> int:
    """A stream's answers to their ends, one after another; their tokens as the server counted them."""
    heard = [await _hear(reader, writer, question(number, turn), tokens) for turn, tokens in enumerate(answers)]
    writer.close()
    return sum(heard)


async def _hear(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, asked: str, tokens: int) -> int:
    """One answer, without looking at what it says."""
    messages = [{"role": "user", "content": asked}]
    options = {"stream": True, "stream_options": {"include_usage": True}, "max_tokens": tokens}
    body = json.dumps({"messages": messages, **options}).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    writer.write(head.encode() + b"\r\n\r\n" + body)
    heard = b""
    while not (b"[DONE]" in heard and heard.endswith(LAST_CHUNK)):
        more = await reader.read(READ_BYTES)
        assert more, f"the stream breaks off: {heard.decode()}"
        heard = (heard + more)[-READ_BYTES:]
    found = re.search(rb'"completion_tokens":(\d+)', heard)
    assert found is not None, heard.decode()
    return int(found[1])


def question(number: int, turn: int) -> str:
    """Another for each answer."""
    return f"Count on from {number}, {turn}."


if __name__ == "__main__":
    asyncio.run(ask(json.loads(sys.argv[1])))
