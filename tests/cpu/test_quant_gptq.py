"""Codes fitted to example inputs: the definition, a layer of the decoder, the texts."""

from itertools import pairwise

import pytest
import torch

from memphi.checkpoint.calibration import EXAMPLE_TOKENS, chosen_rows, conversations, example_rows, prose
from memphi.checkpoint.layout import read_config
from memphi.checkpoint.locate import locate
from memphi.config import group_size
from memphi.errors import CheckpointError
from memphi.inputs.tokenizer import Tokenizer
from memphi.model.quant import weights
from memphi.model.quant.calibration import choose_codes, half_quadratic, weighted_line
from memphi.model.quant.examples import Examples, adapted_linears
from memphi.model.quant.gptq import gptq, importance
from memphi.model.quant.weights import WEIGHTS
from memphi.model.rotary import rotary_table
from memphi.model.rows import Row, pack
from tests.checkpoints import tiny_config, tiny_model

CALIBRATED = pytest.mark.parametrize("scheme", ["int4", "fp8"])


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated(rows, columns, seed=0):
    """Inputs of very different sizes that come with each other, as those of a trained model do."""
    sizes = torch.logspace(0, -2, columns)[torch.randperm(columns, generator=torch.Generator().manual_seed(seed))]
    return (normal(rows, columns // 4) @ normal(columns // 4, columns, seed=1) + normal(rows, columns, seed=2)) * sizes


def made(scheme, matrix, hessian):
    weight = WEIGHTS[scheme](*matrix.shape)
    weight.store_calibrated(matrix, hessian)
    return weight


def by_itself(scheme, matrix):
    weight = WEIGHTS[scheme](*matrix.shape)
    weight.store(0, matrix)
    return weight


def meant(weight):
    return weight.dequantise(0, weight.out_features, torch.float32)


def lost(x, matrix, weight):
    """Of outputs, relatively."""
    exact = x.double() @ matrix.double().t()
    return float((x.double() @ meant(weight).double().t() - exact).norm() / exact.norm())


# --- the definition ------------------------------------------------------------------------------------------------


@CALIBRATED
@pytest.mark.parametrize("columns", [256, 96, 320, 40])
def test_outputs_lose_less_than_by_the_weights_alone(scheme, columns):
    """Groups that are full, ragged, or not full at all."""
    matrix, x, other = normal(64, columns), correlated(2000, columns), correlated(2000, columns)[-500:]
    weight = made(scheme, matrix, x[:1500].t() @ x[:1500])
    assert lost(other, matrix, weight) < 0.7 * lost(other, matrix, by_itself(scheme, matrix))


def test_feeding_errors_forward_is_what_helps_where_inputs_come_together(monkeypatch):
    matrix, x = normal(64, 256), correlated(2000, 256)
    fed = made("int4", matrix, x.t() @ x)
    monkeypatch.setattr(weights, "gptq", lambda matrix, hessian, rounded: matrix)
    assert lost(x, matrix, fed) < 0.8 * lost(x, matrix, made("int4", matrix, x.t() @ x))


def test_inputs_that_have_nothing_to_do_with_each_other_are_rounded_to_the_nearest():
    matrix, group = normal(16, 200), group_size(200)
    hessian = torch.eye(200)
    weight = made("int4", matrix, hessian)
    for first in range(0, 200, group):
        part = matrix[:, first : first + group]
        scale, shift = weighted_line(part, importance(hessian.diagonal())[first : first + group])
        nearest = choose_codes(part, scale, shift) * scale + shift
        assert torch.equal(meant(weight)[:, first : first + group], nearest)
    assert torch.equal(meant(made("fp8", matrix, hessian)), meant(by_itself("fp8", matrix)))


def test_the_best_line_under_equal_importance_is_no_worse_than_the_half_quadratic_one():
    groups = normal(512, 128)

    def error(scale, shift):
        return (groups - choose_codes(groups, scale, shift) * scale - shift).norm()

    assert error(*weighted_line(groups, torch.ones(128))) < 1.005 * error(*half_quadratic(groups))


def test_a_number_that_counts_more_is_met_better():
    groups, counts = normal(512, 128), torch.ones(128)
    counts[5] = 1000.0
    equal, heavy = (weighted_line(groups, each) for each in (torch.ones(128), counts))
    wrong = [(groups - choose_codes(groups, *line) * line[0] - line[1])[:, 5].norm() for line in (equal, heavy)]
    assert wrong[1] < 0.3 * wrong[0]


@CALIBRATED
def test_inputs_that_are_always_zero_change_nothing_for_the_others(scheme):
    matrix, x = normal(32, 192), correlated(1000, 192)
    x[:, 64:128] = 0  # A whole group.
    weight = made(scheme, matrix, x.t() @ x)
    assert torch.isfinite(meant(weight)).all()
    assert (meant(weight)[:, 64:128] - matrix[:, 64:128]).norm() < 0.14 * matrix[:, 64:128].norm()
    zero = made(scheme, matrix, torch.zeros(192, 192))
    assert (meant(zero) - matrix).norm() < 0.14 * matrix.norm()


@CALIBRATED
@pytest.mark.parametrize("size", [1e-8, 1e6])
def test_inputs_of_any_size_do(scheme, size):
    matrix, x = normal(32, 128), correlated(500, 128)
    weights = [made(scheme, matrix, x.t() @ x), made(scheme, matrix, (x * size).t() @ (x * size))]
    assert lost(x, matrix, weights[1]) == pytest.approx(lost(x, matrix, weights[0]), rel=0.05)


@CALIBRATED
def test_far_fewer_tokens_than_inputs_do(scheme):
    """The Hessian has a rank of eight, and inputs that are all but the same."""
    matrix, x = normal(32, 512), normal(8, 512) * 100 + 1000
    weight = made(scheme, matrix, x.t() @ x)
    assert torch.isfinite(meant(weight)).all()
    assert lost(x, matrix, weight) < lost(x, matrix, by_itself(scheme, matrix))


def by_elimination(matrix, hessian, rounded):
    """The same one column after another by the inverse itself, in fp64: optimal brain surgeon, as GPTQ begins."""
    matrix, hessian = matrix.double().clone(), hessian.double()
    inverse = (hessian + 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian))).inverse()
    stored = torch.empty_like(matrix)
    for number in hessian.diagonal().argsort(descending=True, stable=True).tolist():
        stored[:, number] = rounded(matrix[:, number], number)
        error = (matrix[:, number] - stored[:, number]) / inverse[number, number]
        matrix -= error[:, None] * inverse[number]
        inverse = inverse - inverse[:, number, None] * inverse[number] / inverse[number, number]
        inverse[number, number] = 1.0  # Done with; no other column has anything to do with it any more.
    return stored


def test_it_is_elimination_by_the_inverse_hessian():
    matrix, x = normal(64, 300), correlated(4000, 300)

    def rounded(column, number):
        return (column * 8).round() / 8

    wanted = by_elimination(matrix, x.t() @ x, rounded)
    real = gptq(matrix, x.t() @ x, rounded)
    # In fp32 a number halfway between two may go to the other, and those after it hear of that.
    assert (real.double() == wanted).float().mean() > 0.97
    losses = [float(((each.double() - matrix) @ x.double().t()).norm()) for each in (real, wanted)]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


def test_numbers_that_are_none_are_told():
    with pytest.raises(CheckpointError, match="infinite or none at all of the example texts, so no codes"):
        made("int4", normal(8, 64), torch.full((64, 64), torch.nan))


# --- a layer -------------------------------------------------------------------------------------------------------


def test_a_layer_is_quantised_by_what_reaches_it_and_passes_on_what_it_became():
    model = tiny_model(tiny_config())
    config, layer, lengths = model.config, model.language.layers[0], [40, 64, 7]
    hidden = normal(sum(lengths), config.language.hidden_size)
    rows = Examples(config.language, lengths, hidden.clone())
    originals = {name: linear.weight.clone() for name, linear in adapted_linears(layer).items()}
    seen = {}
    for name, linear in adapted_linears(layer).items():
        linear.register_forward_pre_hook(lambda _, inputs, name=name: seen.update({name: inputs[0]} | seen))
    made_of = {}
    for linear in rows.quantise(layer, WEIGHTS["int4"]):
        assert torch.equal(linear.original, originals[linear.name])
        made_of[linear.name] = linear.weight
    assert made_of.keys() == {"attention.qkv", "attention.out", "mlp.gate_up", "mlp.down"}
    for name, weight in made_of.items():
        alone = made("int4", originals[name], seen[name].t() @ seen[name])
        assert all(torch.equal(a, b) for a, b in zip(weight.buffers(), alone.buffers(), strict=True))
        assert torch.equal(adapted_linears(layer)[name].weight, meant(weight))
    for linear in adapted_linears(layer).values():
        linear._forward_pre_hooks.clear()
    packing = pack([Row(length) for length in lengths], hidden.device)
    rotary = rotary_table(config.language, packing.positions, packing.long, hidden.dtype)
    torch.testing.assert_close(rows._hidden, layer(hidden, packing, rotary, None))


def test_rows_go_in_batches_and_long_ones_alone(monkeypatch):
    monkeypatch.setattr("memphi.model.quant.examples.EXAMPLE_BATCH_TOKENS", 50)
    model = tiny_model(tiny_config())
    layer, lengths = model.language.layers[0], [20, 30, 1, 64, 50]
    hidden = normal(sum(lengths), model.config.language.hidden_size)
    apart = Examples(model.config.language, lengths, hidden.clone())
    assert [span for span, _, _ in apart._batches] == [slice(*pair) for pair in pairwise((0, 50, 51, 115, 165))]
    monkeypatch.setattr("memphi.model.quant.examples.EXAMPLE_BATCH_TOKENS", 1000)
    together = Examples(model.config.language, lengths, hidden.clone())
    for rows in (apart, together):
        rows.advance(layer)
    torch.testing.assert_close(apart._hidden, together._hidden)


# --- the texts -----------------------------------------------------------------------------------------------------


def test_the_texts_fill_the_tokens_and_begin_with_conversations():
    folder = locate("demo").folder
    tokenizer = Tokenizer.from_folder(folder)
    rows = example_rows(tokenizer, read_config(folder))
    assert 0.9 * EXAMPLE_TOKENS < sum(map(len, rows)) <= EXAMPLE_TOKENS
    assert rows[0][0] == tokenizer.special("<|user|>")
    assert tokenizer.special("<|assistant|>") in rows[0]
    assert len(conversations()) < len(rows)
    # So much prose that a vocabulary of long words fills them as well.
    assert len(prose()) > 4.5 * EXAMPLE_TOKENS


def test_rows_that_do_not_fit_are_left_out():
    assert chosen_rows([[1] * 4, [2] * 8, [3]], range(100, 107), 3, tokens=10) == [[1] * 4, [3], [100, 101, 102]]


def test_a_tokenizer_of_another_model_is_told():
    folder = locate("demo").folder
    with pytest.raises(CheckpointError, match=r"makes the id \d+ and config.json has 64; they are of different models"):
        example_rows(Tokenizer.from_folder(folder), tiny_config(vocab_size=64))
