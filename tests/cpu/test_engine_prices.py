"""What a planned step is priced at, by what is in it."""

from memphi.engine.prices import CONVOLUTION_BYTES, price_slices, with_unexplained
from memphi.memory import costs
from tests.checkpoints import tiny_config
from tests.scenes import GREEDY, Request, Stage, clip, lively_model, tiny_tokenizer

CONFIG = tiny_config(short_tokens=4096, max_tokens=8192)
WINDOW_SECONDS = 8 * CONFIG.audio.window_tokens / 100


def priced(windows):
    """The first audio passes of a request with a clip of so many windows, each of one window."""
    stage = Stage(lively_model(CONFIG), tiny_tokenizer(), windows_per_pass=1)
    stage.submit(Request.ask("", [clip(1, windows * WINDOW_SECONDS)], sampling=GREEDY))
    passes, run = [], stage.loop.runner.run

    def run_priced(plan):
        if plan.slices:  # Later their prompt is gone.
            passes.append(price_slices(plan.slices, CONFIG, 4))
        return run(plan)

    stage.loop.runner.run = run_priced
    stage.run()
    return passes


def test_an_audio_pass_is_priced_by_the_sound_in_it():
    most = with_unexplained(costs.audio_pass(CONFIG, 1, 4).bytes) + CONVOLUTION_BYTES
    ((kind, whole),) = priced(1.0)
    ((_, short),) = priced(0.4)
    assert kind == "audio pass"
    assert short < whole < most
    first, inner, last = (n_bytes for _, n_bytes in priced(2.5))
    assert first < inner == most
    assert last < first


def test_windows_of_different_lengths_are_subsampled_apart():
    long, short = costs.WindowSize(40, 40), costs.WindowSize(8, 8)
    alike = costs.audio_pass(CONFIG, 3, 4, sizes=[long] * 3)
    different = costs.audio_pass(CONFIG, 3, 4, sizes=[long, short, long])
    assert different.bytes < alike.bytes
