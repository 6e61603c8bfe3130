"""The options that several commands share."""

from typing import Annotated, Literal

import typer

Model = Annotated[
    str, typer.Option("--model", "-m", help="A folder, a hub name, `demo` (a shipped toy) or `random` (full size).")
]
Device = Annotated[str, typer.Option(help="auto, cuda, cuda:N, cpu, or mps (untested).")]
Dtype = Annotated[Literal["bf16", "fp16", "fp32"], typer.Option(help="Number format of the weights.")]
AttentionBackend = Annotated[
    Literal["auto", "eager", "sdpa"], typer.Option("--attention", help="Attention backend; auto picks the fastest.")
]
Attachments = Annotated[
    list[str],
    typer.Option("--attach", "-a", help="An image or a recording: path, URL, or - for stdin. May be repeated."),
]
System = Annotated[str | None, typer.Option(help="A system prompt.")]
MaxTokens = Annotated[int, typer.Option(min=1, help="New tokens at most.")]
Temperature = Annotated[float, typer.Option(help="0: always the likeliest token.")]
TopP = Annotated[float, typer.Option(help="Sample from the likeliest tokens that make up this share.")]
TopK = Annotated[int | None, typer.Option(help="Sample from this many likeliest tokens.")]
MinP = Annotated[float, typer.Option(help="Drop tokens less likely than this share of the likeliest.")]
RepetitionPenalty = Annotated[float, typer.Option(help="Above 1: make tokens that occurred less likely.")]
Seed = Annotated[int, typer.Option(help="The same seed gives the same answer.")]
Stop = Annotated[list[str], typer.Option(help="End the answer at this text. May be repeated.")]
IgnoreEos = Annotated[bool, typer.Option("--ignore-eos", help="Go on to --max-tokens whatever the model says.")]
DEFAULT_MAX_TOKENS = 1024
