"""Steps are decided in integers: every id is computed once, in order, within the step's share."""

import subprocess
import sys

from hypothesis import given
from hypothesis import strategies as st

from memphi.config import LanguageConfig
from memphi.engine.scheduler import commit, plan_step
from memphi.engine.sequence import Sequence
from memphi.request import FinishReason, Footprint, InputMode, Prompt, SamplingParams


def language(short_tokens=4096, max_tokens=131072):
    return LanguageConfig(10, 8, 8, 1, 2, 1, 1e-5, 1e4, 4, (1.0,) * 2, (2.0,) * 2, short_tokens, max_tokens)


def sequence(number, tokens, config=None, **sampling):
    prompt = Prompt((7,) * tokens, (), (), (), Footprint(InputMode.TEXT, tokens, (), ()))
    return Sequence(number, prompt, SamplingParams(**sampling), config or language())


def finish(sequences, step_tokens, stop_ids=(), token=7):
    """Run the loop with a model that always says `token`; returns the ids computed per sequence, in order."""
    computed = {s.id: [] for s in sequences}
    for _ in range(10_000):
        running = [s for s in sequences if s.finish_reason is None]
        if not running:
            return computed
        plan = plan_step(running, step_tokens)
        assert 0 < sum(row.tokens for row in plan.rows) <= step_tokens
        for row in plan.rows:
            computed[row.sequence.id] += range(row.past, row.past + row.tokens)
        commit(plan, {row.sequence.id: token for row in plan.rows if row.samples}, stop_ids)
    raise AssertionError("the loop does not end")


@given(st.lists(st.tuples(st.integers(1, 50), st.integers(1, 20)), min_size=1, max_size=8), st.integers(1, 40))
def test_every_sequence_ends_and_computes_each_id_once(sizes, step_tokens):
    sequences = [sequence(i, tokens, max_tokens=new) for i, (tokens, new) in enumerate(sizes)]
    computed = finish(sequences, step_tokens)
    for (tokens, new), s in zip(sizes, sequences, strict=True):
        assert len(s.answer) == new
        assert computed[s.id] == list(range(tokens + new - 1))


def test_running_answers_go_before_long_prompts():
    answering, prompt = sequence(1, 5), sequence(0, 100)
    answering.computed = 4
    plan = plan_step([prompt, answering], 10)
    assert [(row.sequence.id, row.tokens) for row in plan.rows] == [(1, 1), (0, 9)]


def test_crossing_into_the_long_regime_starts_over_once():
    s = sequence(0, 6, language(short_tokens=8), max_tokens=5)
    computed = finish([s], 100)
    # At 9 tokens the cache is void: all of them are computed again.
    assert computed[0] == [*range(6), 6, 7, *range(9), 9]
    assert s.long


def test_a_stop_id_ends_an_answer_unless_ignored():
    stopped, ignoring = sequence(0, 3, max_tokens=4), sequence(1, 3, max_tokens=4, ignore_eos=True)
    finish([stopped, ignoring], 100, stop_ids=(7,))
    assert (stopped.finish_reason, len(stopped.answer)) == (FinishReason.STOP, 1)
    assert (ignoring.finish_reason, len(ignoring.answer)) == (FinishReason.LENGTH, 4)


def test_the_context_bounds_an_answer_without_a_limit():
    s = sequence(0, 6, language(max_tokens=10))
    finish([s], 100)
    assert len(s.ids) == 10


def test_deciding_imports_no_torch():
    code = "import sys, memphi.engine.scheduler, memphi.sampling.stop; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
