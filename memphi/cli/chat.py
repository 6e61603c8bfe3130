"""`memphi chat`: a conversation in the terminal."""

import contextlib
import os
import shlex
import sys
from typing import TYPE_CHECKING

import typer

from memphi.cli import options
from memphi.cli.terminal import load_engine, open_attachments, stream_answer, tell
from memphi.config import DEFAULT_MODEL
from memphi.errors import MediaError, MemphiError

if TYPE_CHECKING:
    from memphi.engine.engine import Engine
    from memphi.request import Detail, Media, Message, OnPressure, SamplingParams

COMMANDS = "/attach FILE adds a picture or recording to your next message, /new starts over, /quit ends"


def chat(
    attach: options.Attachments = [],  # noqa: B006
    model: options.Model = DEFAULT_MODEL,
    device: options.Device = "auto",
    dtype: options.Dtype = "bf16",
    attention: options.AttentionBackend = "auto",
    memory: options.Memory = None,
    kv_cache: options.KvCache = "on",
    cache_format: options.CacheFormat = "auto",
    pin: options.Pins = [],  # noqa: B006
    merge: options.Merge = None,
    kernels: options.Kernels = "auto",
    scheme: options.Scheme = "auto",
    allocator: options.Allocator = "default",
    debug_cuda: options.DebugCuda = False,
    detail: options.Detail = "auto",
    on_pressure: options.OnPressure = "wait",
    system: options.System = None,
    max_tokens: options.MaxTokens = options.DEFAULT_MAX_TOKENS,
    temperature: options.Temperature = 0.0,
    top_p: options.TopP = 1.0,
    top_k: options.TopK = None,
    min_p: options.MinP = 0.0,
    repetition_penalty: options.RepetitionPenalty = 1.0,
    seed: options.Seed = 0,
    stop: options.Stop = [],  # noqa: B006
) -> None:
    """Talk over several turns. Attachments given with -a go with the first message; type /help for commands."""
    from memphi.request import SamplingParams

    config = options.engine_config(
        memory, kv_cache, pin, merge, kernels=kernels, scheme=scheme, cache_format=cache_format
    )
    sampling = SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop=tuple(stop),
    )
    if "-" in attach:
        raise typer.BadParameter("stdin (-) is where the conversation comes from; attach a file")
    media = open_attachments(attach)
    engine = load_engine(model, device, dtype, attention, config, allocator, debug_cuda)
    Conversation(engine, system, sampling, media, detail, on_pressure).run()


class Conversation:
    """The turns so far and the attachments that wait for the next message."""

    def __init__(
        self,
        engine: "Engine",
        system: str | None,
        sampling: "SamplingParams",
        attachments: "tuple[Media, ...]" = (),
        detail: "Detail" = "auto",
        on_pressure: "OnPressure" = "wait",
    ) -> None:
        self.engine = engine
        self.system = system
        self.sampling = sampling
        self.attachments = options.with_detail(attachments, detail)
        self.detail = detail
        self.on_pressure = on_pressure
        self.messages: tuple[Message, ...] = ()
        self._start_over()

    def run(self) -> None:
        """Read lines until the end of input; a turn that fails is told on stderr and forgotten, attachments and all."""
        print(COMMANDS, file=sys.stderr)
        while (line := _read_line()) is not None and line != "/quit":
            try:
                self._take(line)
            except MemphiError as error:
                tell(str(error))

    def _take(self, line: str) -> None:
        command, rest = (*line.split(maxsplit=1), "", "")[:2]
        if command == "/new":
            self.attachments = ()
            self._start_over()
        elif command == "/attach":
            self._attach(rest.strip())
        elif command == "/help":
            print(COMMANDS, file=sys.stderr)
        elif command.startswith("/") and command[1:].isalpha():
            tell(f"there is no command {command}; {COMMANDS}")
        elif line or self.attachments:
            self._say(line)

    def _attach(self, source: str) -> None:
        if source in ("", "-"):
            raise MediaError("/attach needs the name of a file or a URL, as in /attach photo.jpg")
        self.attachments += options.with_detail(open_attachments([_as_meant(source)]), self.detail)

    def _say(self, text: str) -> None:
        from memphi.request import Message, Request

        attachments, self.attachments = self.attachments, ()
        messages = (*self.messages, Message("user", (*attachments, text)))
        try:
            answer = stream_answer(self.engine, Request(messages, self.sampling, self.on_pressure))
        except MemphiError as error:
            tell(str(error))
            if attachments:
                names = ", ".join(media.name for media in attachments)
                tell(f"no longer attached: {names}; /attach again what the next message is about")
        else:
            self.messages = (*messages, Message("assistant", (answer,)))

    def _start_over(self) -> None:
        from memphi.request import Message

        self.messages = () if self.system is None else (Message("system", (self.system,)),)


def _as_meant(typed: str) -> str:
    """A path as terminals paste it, in quotes or with escaped blanks, or from the home folder: where there is one."""
    with contextlib.suppress(ValueError):
        parts = shlex.split(typed)
        if len(parts) == 1 and not os.path.exists(typed) and os.path.exists(path := os.path.expanduser(parts[0])):
            return path
    return typed


def _read_line() -> str | None:
    """One line from the person, None at the end of input; the prompt goes to stderr."""
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):  # Windows has none, and edits lines by itself
            import readline  # noqa: F401  (gives line editing and history to input())
    print("> ", end="", file=sys.stderr, flush=True)
    try:
        return input().strip()
    except EOFError:
        return None
