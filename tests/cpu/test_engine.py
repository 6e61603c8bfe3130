"""The engine on a tiny random model in fp32: what may not change an answer does not."""

import gc
from dataclasses import replace

import pytest
import torch

from memphi.checkpoint.loader import load_model
from memphi.config import EngineConfig
from memphi.engine import gauge, preparation
from memphi.engine.engine import Engine, load
from memphi.errors import DoesNotFitError, RequestError, WorkerError
from memphi.inputs.prompt import prepare
from memphi.inputs.tokenizer import Tokenizer
from memphi.model.rows import Row
from memphi.request import FinishReason, InputMode, Message, Request, SamplingParams
from tests.checkpoints import tiny_checkpoint, tiny_config
from tests.scenes import GREEDY, mixed_requests, picture


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    config = tiny_config(short_tokens=4096, max_tokens=8192)
    return tiny_checkpoint(tmp_path_factory.mktemp("engine") / "model", config, torch.float32)


def engine(folder, **settings):
    model = load_model(folder, "cpu", torch.float32)
    for name, weight in model.language.layers.named_parameters():
        if weight.dim() == 2 and not name.endswith(".b"):
            weight.mul_(6)  # a tied random model would only repeat its last token
    return Engine(model, Tokenizer.from_folder(folder), EngineConfig(**settings))


@pytest.fixture(scope="module")
def plain(folder):
    return engine(folder)


def test_what_was_accepted_is_held_to_no_other_limits(plain, monkeypatch):
    """Those within which a caller accepts a request may be wider than usual."""
    within, prepare = [], preparation.prepare

    def note(request, config, tokenizer, limits, **options):
        within.append(limits)
        return prepare(request, config, tokenizer, limits, **options)

    monkeypatch.setattr(preparation, "prepare", note)
    plain.generate(Request.ask("What is it?", [picture(1)], sampling=SamplingParams(max_tokens=1)))
    assert [limits.pixels > 10**15 and limits.seconds == float("inf") for limits in within] == [True]


def test_modes_are_chosen_by_content():
    modes = [request.mode for request in mixed_requests()]
    assert modes == [
        InputMode.TEXT,
        InputMode.VISION,
        InputMode.SPEECH,
        InputMode.VISION_SPEECH,
        InputMode.VISION,
    ]
    assert [mode.adapter for mode in modes] == [None, "vision", "speech", "vision", "vision"]
    assert [mode.audio_head for mode in modes[2:4]] == ["speech", "vision"]


@pytest.mark.parametrize(
    "sampling", [GREEDY, replace(GREEDY, temperature=1.0, top_p=0.9, seed=3), replace(GREEDY, repetition_penalty=1.3)]
)
def test_a_batch_of_mixed_modes_equals_each_request_alone(plain, sampling):
    requests = mixed_requests(sampling)
    together = plain.generate(requests)
    alone = [plain.generate(request) for request in requests]
    assert [result.ids for result in together] == [result.ids for result in alone]
    assert [result.text for result in together] == [result.text for result in alone]
    assert len({result.ids for result in together}) == len(requests)
    assert all(len(set(result.ids)) > 4 for result in together)


@pytest.mark.parametrize("settings", [{"step_tokens": 7}, {"step_tokens": 64, "rows": 2}, {"rows": 1}])
def test_chunks_and_waiting_change_nothing(plain, folder, settings):
    requests = mixed_requests()
    assert [r.ids for r in engine(folder, **settings).generate(requests)] == [r.ids for r in plain.generate(requests)]


def test_streamed_pieces_make_the_whole_answer(plain):
    for request in mixed_requests():
        pieces = list(plain.stream(request))
        result = plain.generate(request)
        assert "".join(piece.text for piece in pieces) == result.text
        assert pieces[-1].finish_reason is result.finish_reason is FinishReason.LENGTH


def test_crossing_into_the_long_regime_equals_starting_over(folder, tmp_path):
    config = tiny_config(short_tokens=64, max_tokens=512)
    crossing = engine(tiny_checkpoint(tmp_path / "model", config, torch.float32))
    request = Request.ask("a b c d e f g h", [picture(5, 60, 60)], sampling=replace(GREEDY, max_tokens=40))
    prompt_tokens = crossing.measure(request).prompt_tokens
    assert prompt_tokens < 64 < prompt_tokens + 40
    crossed = crossing.generate(request)
    model, tokens = crossing.model, list(crossed.ids)
    prompt = prepare(request, config, crossing.tokenizer)
    ids = [*prompt.ids, *tokens]
    media = [(prompt.spans[0].start, model.encode_images(prompt.images)[0])]
    for length in range(64, len(ids)):
        row = Row(length, adapter="vision", long=length > 64)
        logits = model(torch.tensor(ids[:length]), [row], media)
        allowed = torch.from_numpy(crossing.tokenizer.known_ids(config.language.vocab_size))
        assert int(logits[0].masked_fill(~allowed, -torch.inf).argmax()) == ids[length]
    assert len(set(tokens)) > 5


def test_an_answer_ends_at_a_stop_string_and_shows_nothing_of_it(plain):
    request = Request.ask("Say something.", sampling=replace(GREEDY, max_tokens=30))
    whole = plain.generate(request).text
    stop = whole[8:11]
    stopped = plain.generate(replace(request, sampling=replace(request.sampling, stop=(stop,))))
    assert stopped.text == whole[: whole.index(stop)]
    assert stopped.finish_reason is FinishReason.STOP


def test_what_is_older_than_the_work_is_spared_by_collections_until_it_is_done(plain):
    assert gc.get_freeze_count() == 0
    stream = plain.stream(mixed_requests()[0])
    next(stream)
    assert gc.get_freeze_count() > 1000
    list(stream)
    plain.generate(mixed_requests()[0])  # Whose end is told after it was noted that there was no work any more.
    assert gc.get_freeze_count() == 0


def test_closing_a_stream_frees_what_it_held(plain):
    stream = plain.stream(mixed_requests()[1])
    next(stream)
    stream.close()
    plain.generate(mixed_requests()[0])  # the stream's end has been read before it
    plain.loop.scheduler.check()
    assert not plain.loop.scheduler.sequences
    assert plain.loop.scheduler.reservations.claimed_pages == 0


def test_a_bad_request_names_its_fault_and_the_next_one_works(plain):
    with pytest.raises(RequestError, match="no messages"):
        plain.generate(Request(()))
    with pytest.raises(DoesNotFitError, match="8192"):
        plain.generate(Request.ask("word " * 9000))
    assert plain.generate(mixed_requests()[0]).text


def test_an_attention_that_is_none_is_refused():
    with pytest.raises(RequestError, match="attention is 'flash'; it must be one of auto, eager, sdpa"):
        load("demo", "cpu", attention="flash")


def test_a_conversation_keeps_its_mode(plain):
    first = Message("user", (picture(6), "What is it?"))
    turns = (first, Message("assistant", ("A cat.",)), Message("user", ("What colour?",)))
    request = Request(turns, GREEDY)
    assert request.mode is InputMode.VISION
    assert plain.generate(request).footprint.image_tokens > 0


def test_ids_without_a_token_are_never_sampled(plain):
    known = plain.tokenizer.known_ids(plain.model.config.language.vocab_size)
    sampling = SamplingParams(max_tokens=200, ignore_eos=True, temperature=100.0)
    assert all(known[i] for i in plain.generate(Request.ask("x", sampling=sampling)).ids)


def test_a_closed_engine_leaves_the_device_to_others(folder, monkeypatch):
    caps = []
    monkeypatch.setattr(gauge, "cap_allocator", lambda _device, n_bytes: caps.append(n_bytes))
    closed = engine(folder)
    assert caps[-1] > 0
    closed.close()
    assert caps[-1] is None


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), ValueError("a damaged file")])
def test_a_load_that_fails_leaves_the_device_to_others(folder, monkeypatch, error):
    caps = []
    monkeypatch.setattr("memphi.engine.device.cap_allocator", lambda _device, n_bytes: caps.append(n_bytes))
    monkeypatch.setattr("memphi.engine.engine.load_model", lambda *_: (_ for _ in ()).throw(error))
    with pytest.raises((DoesNotFitError, ValueError)):
        load(str(folder), "cpu")
    assert caps[0] > 0
    assert caps[-1] is None


def test_an_engine_that_stopped_leaves_the_device_to_others(folder, monkeypatch):
    caps = []
    monkeypatch.setattr(gauge, "cap_allocator", lambda _device, n_bytes: caps.append(n_bytes))
    stopped = engine(folder)
    monkeypatch.setattr(stopped.loop, "step", lambda: (_ for _ in ()).throw(RuntimeError("a bug")))
    with pytest.raises(WorkerError, match="a bug"):
        stopped.generate(mixed_requests()[0])
    stopped.close()
    assert caps[-1] is None
