"""A recording on its way to a transcript: cut at silence, some segments heard at once, all told in their order."""

import asyncio
import math
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

from memphi.inputs.media import audio_media
from memphi.inputs.segments import LONGEST_SECONDS, Segment, cut_recording, measure_recording
from memphi.request import Delta, FinishReason, Media, Request
from memphi.server.answers import Run, accept
from memphi.server.errors import ApiError
from memphi.server.service import Service
from memphi.server.transcripts import Passage, Transcript

ROW_SHARE = 2
"""One recording takes at most one of so many of the engine's rows, so that others are answered meanwhile."""

Ask = Callable[[Media, float], Request]
"""The request for what is said in a segment of so many seconds."""


class Lane:
    """A segment that is being heard, and what it brought so far."""

    def __init__(self, passage: Passage) -> None:
        self.passage = passage
        self._mailbox: asyncio.Queue[Delta | Exception] = asyncio.Queue()

    async def fill(self, service: Service, run: Run) -> None:
        """Hear the segment to its end; errors are for whoever reads."""
        try:
            async with aclosing(service.engine.submit(run)) as deltas:
                async for delta in deltas:
                    self._mailbox.put_nowait(delta)
        except Exception as error:
            self._mailbox.put_nowait(error)

    async def deltas(self) -> AsyncGenerator[Delta, None]:
        while True:
            piece = await self._mailbox.get()
            if isinstance(piece, Exception):
                raise piece
            if piece.finish_reason is FinishReason.CANCELLED:
                raise ApiError.later(503, "the server is shutting down", "server_draining")
            yield piece
            if piece.finish_reason is not None:
                return


class Recording:
    """One recording, and the transcript that it becomes."""

    def __init__(self, service: Service, media: Media, seconds: float, ask: Ask, arrived: float) -> None:
        """arrived is when it came (time.perf_counter)."""
        self.transcript = Transcript(seconds)
        self._first_token_seconds: float | None = None
        self._seconds = 0.0
        self._service = service
        self._media = media
        self._ask = ask
        self._arrived = arrived
        rows = max(1, service.rows // ROW_SHARE)
        self._places = min(rows, math.ceil(2 * seconds / LONGEST_SECONDS))

    @property
    def price(self) -> dict[str, int]:
        """What the prompts of all segments take."""
        footprints = [passage.footprint for passage in self.transcript.passages]
        page_tokens = self._service.page_tokens
        return {
            "prompt_tokens": sum(footprint.prompt_tokens for footprint in footprints),
            "audio_tokens": sum(footprint.audio_tokens for footprint in footprints),
            "pages": sum(-(-footprint.prompt_tokens // page_tokens) for footprint in footprints),
        }

    @property
    def timings(self) -> dict[str, float]:
        first = self._first_token_seconds or self._seconds
        return {"first_token_seconds": round(first, 6), "seconds": round(self._seconds, 6)}

    async def pieces(self) -> AsyncGenerator[tuple[str, Delta], None]:
        """What is added to the transcript, piece by piece; closing this ends all that runs.

        Raises MemphiError for a segment that fails and ApiError where too many requests wait already.
        """
        lanes: asyncio.Queue[Lane | Exception | None] = asyncio.Queue()
        tasks = set[asyncio.Task[None]]()
        with self._service.places(self._places):
            tasks.add(asyncio.create_task(self._feed(lanes, tasks)))
            try:
                while (lane := await lanes.get()) is not None:
                    if isinstance(lane, Exception):
                        raise lane
                    self.transcript.passages.append(lane.passage)
                    async with aclosing(lane.deltas()) as deltas:
                        async for delta in deltas:
                            self._first_token_seconds = self._first_token_seconds or self._elapsed()
                            yield self.transcript.add(delta), delta
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
        self._note_end()

    async def hear(self) -> Transcript:
        """The whole transcript."""
        async with aclosing(self.pieces()) as pieces:
            async for _ in pieces:
                pass
        return self.transcript

    async def _feed(self, lanes: "asyncio.Queue[Lane | Exception | None]", tasks: set[asyncio.Task[None]]) -> None:
        """Cut, and open a lane for each segment as soon as there is a place for it."""
        places = asyncio.Semaphore(self._places)

        def leave(task: asyncio.Task[None]) -> None:
            tasks.discard(task)
            places.release()

        try:
            segments = cut_recording(self._media, self._service.settings.limits.media)
            loop = asyncio.get_running_loop()
            while (segment := await loop.run_in_executor(self._service.decoding, next, segments, None)) is not None:
                if segment.silent:
                    self.transcript.silences.append((segment.start_seconds, segment.end_seconds))
                    continue
                await places.acquire()
                run = await self._accept(segment)
                lane = Lane(Passage(segment.start_seconds, segment.end_seconds, run[0].footprint))
                lanes.put_nowait(lane)
                task = asyncio.create_task(lane.fill(self._service, run))
                tasks.add(task)
                task.add_done_callback(leave)
        except Exception as error:
            lanes.put_nowait(error)
        else:
            lanes.put_nowait(None)

    async def _accept(self, segment: Segment) -> Run:
        def ask() -> Request:
            media = audio_media(segment.samples.values, segment.samples.rate, self._media.name)
            return self._ask(media, segment.end_seconds - segment.start_seconds)

        run = (await accept(self._service, [await asyncio.to_thread(ask)])).runs[0]
        assert isinstance(run, tuple)
        return run

    def _elapsed(self) -> float:
        return time.perf_counter() - self._arrived

    def _note_end(self) -> None:
        self._seconds = self._elapsed()
        tokens = sum(len(passage.ids) for passage in self.transcript.passages)
        self._service.metrics.note_answer(self._first_token_seconds or self._seconds, self._seconds, tokens)


async def open_recording(service: Service, media: Media, ask: Ask) -> Recording:
    """Measure a recording, whether it is damaged anywhere included; raises MediaError."""
    arrived = time.perf_counter()
    loop, limits = asyncio.get_running_loop(), service.settings.limits.media
    seconds = await loop.run_in_executor(service.decoding, measure_recording, media, limits)
    return Recording(service, media, seconds, ask, arrived)
