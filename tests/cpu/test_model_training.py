"""The modules can be trained as they stand: gradients reach every weight that takes part, and no other."""

import pytest
import torch

from memphi.model.attention import EagerAttention, SdpaAttention
from memphi.model.phi4mm import Phi4MM
from memphi.model.rows import Row
from tests.checkpoints import tiny_model
from tests.oracle import largest_difference, make_row, mode_prompts, parity_config

BACKENDS = {"eager": EagerAttention(), "sdpa": SdpaAttention()}


def trainable(backend):
    source = tiny_model(parity_config())
    model = Phi4MM(source.config, BACKENDS[backend])
    model.load_state_dict(source.state_dict())
    return model.train()


def loss_of(model, prompt):
    """Cross-entropy of the last tokens, media encoded with gradients."""
    embeddings = {
        "image": model.encode_images(prompt.images),
        "audio": model.encode_clips(prompt.clips, prompt.mode.audio_head),
    }
    media = [(span.start, embeddings[span.kind][span.index]) for span in prompt.spans]
    tokens = len(prompt.ids)
    ids = torch.tensor(prompt.ids)
    logits = model(ids, [make_row(model, prompt)], media, logits_at=range(tokens - 5, tokens - 1))
    return torch.nn.functional.cross_entropy(logits, ids[-4:])


def takes_part(name, mode):
    """Whether a weight has a say in a mode: spec 3.2 and section 4 and 5's parts."""
    images, audio = mode.value & 1, mode.value & 2
    if ".adapters." in name:
        return f".adapters.{mode.adapter}." in name
    if name.startswith("audio_projectors."):
        return bool(audio) and name.startswith(f"audio_projectors.{mode.audio_head}.")
    if name.startswith(("vision.", "image_projector.")):
        return bool(images)
    return name.startswith("language.") or (name.startswith("audio.") and bool(audio))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", range(4))
def test_gradients_reach_every_weight_that_takes_part(mode, backend):
    model = trainable(backend)
    prompt = mode_prompts(model.config)[mode]
    loss_of(model, prompt).backward()
    for name, weight in model.named_parameters():
        assert (weight.grad is not None) == takes_part(name, prompt.mode), name
        if weight.grad is not None:
            assert weight.grad.isfinite().all(), name
            # A key's bias adds the same to all of a query's scores, which the softmax does not see.
            assert weight.grad.any() or name.endswith("attention.key.bias"), name


@pytest.mark.parametrize("mode", range(4))
def test_both_backends_give_the_same_gradients(mode):
    models = [trainable(backend) for backend in BACKENDS]
    for model in models:
        loss_of(model, mode_prompts(model.config)[mode]).backward()
    for (name, one), other in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        if one.grad is not None:
            assert largest_difference(one.grad, other.grad) <= 1e-4, name


def test_rows_under_different_adapters_train_in_one_step():
    model = trainable("sdpa")
    rows = [Row(5, adapter="vision"), Row(4, adapter="speech"), Row(3)]
    model(torch.arange(12), rows, logits_at=range(12)).square().mean().backward()
    layer = model.language.layers[0].mlp.gate_up
    assert all(layer.adapters[name].a.grad.any() and layer.adapters[name].b.grad.any() for name in layer.adapters)


def test_a_few_steps_lower_the_loss():
    model = trainable("sdpa")
    prompt = mode_prompts(model.config)[3]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = loss_of(model, prompt)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
