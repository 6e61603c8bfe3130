"""On CUDA the model computes what it computes on the CPU, whichever backend, dtype and division into steps."""

from dataclasses import replace

import pytest
import torch

from memphi.model.attention import EagerAttention, SdpaAttention
from memphi.model.phi4mm import Phi4MM
from memphi.model.rotary import rotary_table
from memphi.model.rows import pack
from memphi.verify import trace_memphi, verify
from tests.checkpoints import tiny_checkpoint, tiny_config, tiny_model
from tests.oracle import (
    PlainPool,
    all_logits,
    cut_media,
    largest_difference,
    make_image,
    make_row,
    mode_prompts,
    parity_config,
)

DEVICE = torch.device("cuda")
FP32_TOLERANCE = 1e-3
BF16_ERROR = 3e-2

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


@pytest.fixture(scope="module")
def source():
    """Heads of the official size, which the fast kernels take, in a small model."""
    config = parity_config(tiny_config(hidden_size=768, heads=6, kv_heads=2, intermediate_size=256))
    vision = replace(config.vision, hidden_size=144, heads=2)
    audio = replace(config.audio, hidden_size=128, heads=2)
    return tiny_model(replace(config, vision=vision, audio=audio))


@pytest.fixture(scope="module")
def prompts(source):
    return mode_prompts(source.config)


def on_device(source, dtype=torch.float32, attention=None):
    model = Phi4MM(source.config, attention)
    model.load_state_dict(source.state_dict())
    return model.to(DEVICE, dtype).eval()


@torch.inference_mode()
def logits_of(model, prompts):
    """Every logit of prompts computed as rows of one step, on the host."""
    ids, rows, media = [], [], []
    for prompt in prompts:
        media += [(len(ids) + start, embedded) for start, embedded in model.encode_media(prompt)]
        rows.append(make_row(model, prompt))
        ids += prompt.ids
    logits = model(torch.tensor(ids, device=model.device), rows, media, logits_at=range(len(ids)))
    return logits.float().cpu()


@torch.inference_mode()
def chunked_logits(model, prompt, size):
    """A prompt's logits computed in chunks over a pool."""
    pool, media, logits = PlainPool(model), model.encode_media(prompt), []
    pages = pool.take(len(prompt.ids))
    for past in range(0, len(prompt.ids), size):
        ids = torch.tensor(prompt.ids[past : past + size], device=model.device)
        pieces = cut_media(media, past, past + len(ids))
        logits.append(model(ids, [make_row(model, prompt, len(ids), past, pages)], pieces, pool, range(len(ids))))
    return torch.cat(logits).float().cpu()


@torch.inference_mode()
def decoded_logits(model, prompts, tokens):
    """The last logits of prompts whose last tokens are computed one by one, all rows in each step."""
    pool, logits, firsts = PlainPool(model), [], [len(prompt.ids) - tokens for prompt in prompts]
    pages = [pool.take(len(prompt.ids)) for prompt in prompts]
    ids, rows, media = [], [], []
    for prompt, first, own in zip(prompts, firsts, pages, strict=True):
        media += cut_media(model.encode_media(prompt), 0, first, len(ids))
        rows.append(make_row(model, prompt, first, 0, own))
        ids += prompt.ids[:first]
    model(torch.tensor(ids, device=model.device), rows, media, pool)
    for step in range(tokens):
        pasts = [first + step for first in firsts]
        rows = [make_row(model, *of, own) for *of, own in zip(prompts, [1] * len(prompts), pasts, pages, strict=True)]
        ids = [prompt.ids[past] for prompt, past in zip(prompts, pasts, strict=True)]
        logits.append(model(torch.tensor(ids, device=model.device), rows, (), pool))
    return torch.stack(logits, dim=1).flatten(0, 1).float().cpu()  # [prompts * tokens, vocab_size]


def relative_error(a, b):
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("attention", [EagerAttention(), SdpaAttention()])
@pytest.mark.parametrize("mode", range(4))
def test_fp32_equals_the_cpu(source, prompts, mode, attention):
    expected = all_logits(source, prompts[mode])
    got = logits_of(on_device(source, attention=attention), [prompts[mode]])
    assert largest_difference(got, expected) <= FP32_TOLERANCE


@pytest.mark.parametrize("attention", [EagerAttention(), SdpaAttention()])
def test_bf16_is_near_the_cpus_fp32(source, prompts, attention):
    """All modes as rows of one step, so that the kernel for rows of different lengths is used where there is one."""
    expected = torch.cat([all_logits(source, prompt) for prompt in prompts])
    got = logits_of(on_device(source, torch.bfloat16, attention), prompts)
    assert 1e-4 < relative_error(got, expected) <= BF16_ERROR


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-4), (torch.bfloat16, BF16_ERROR)])
@pytest.mark.parametrize("size", [1, 7, 16, 1000])
def test_chunks_over_a_cache_equal_the_whole(source, prompts, size, dtype, limit):
    model = on_device(source, dtype)
    for prompt in prompts:
        assert relative_error(chunked_logits(model, prompt, size), logits_of(model, [prompt])) <= limit


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-4), (torch.bfloat16, BF16_ERROR)])
@pytest.mark.parametrize("attention", [EagerAttention(), SdpaAttention()])
def test_rows_of_different_lengths_that_decode_in_one_step_equal_the_whole(source, prompts, attention, dtype, limit):
    model, tokens = on_device(source, dtype, attention), 3
    expected = torch.cat([logits_of(model, [prompt])[-tokens:] for prompt in prompts])
    assert relative_error(decoded_logits(model, prompts, tokens), expected) <= limit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_a_layer_never_waits_for_the_device(source, prompts, dtype):
    """With a row that starts, one that goes on and two that decode."""
    model = on_device(source, dtype)
    pool = PlainPool(model)
    parts = zip(prompts, (9, 5, 1, 1), (0, 6, 10, 11), strict=True)
    rows = [make_row(model, prompt, tokens, past, pool.take(past + tokens)) for prompt, tokens, past in parts]
    packing = pack(rows, DEVICE, pool.page_tokens)
    config = model.config.language
    x = torch.randn(16, config.hidden_size, device=DEVICE, dtype=dtype)
    rotary = rotary_table(config, packing.positions, packing.long, dtype)
    torch.cuda.set_sync_debug_mode("error")
    try:
        model.language.layers[0](x, packing, rotary, pool)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("kernels", [False, True])
@torch.inference_mode()
def test_a_step_of_prompts_never_waits_for_the_device(source, prompts, kernels):
    """From ids on the device to scores, once what is compiled and kept is there."""
    model = on_device(source, torch.bfloat16)
    model.use_kernels(kernels)
    pool = PlainPool(model, page_tokens=16)
    parts = zip(prompts, (9, 5, 1, 1), (0, 6, 10, 11), strict=True)
    rows = [make_row(model, prompt, tokens, past, pool.take(past + tokens)) for prompt, tokens, past in parts]
    ids = torch.arange(16, device=DEVICE)
    model(ids, rows, cache=pool, logits_at=[8, 13])
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(ids, rows, cache=pool, logits_at=[8, 13])
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, FP32_TOLERANCE), (torch.bfloat16, BF16_ERROR)])
@torch.inference_mode()
def test_crops_with_and_without_padding_equal_the_cpus_and_nobody_waits(source, dtype, limit):
    side = source.config.vision.patches
    images = [make_image(source.config, 2, 1, valid, seed=i) for i, valid in enumerate([None, (side + 3, 3), None])]
    crops = torch.cat([torch.from_numpy(image.crops) for image in images])
    mask = torch.cat([torch.from_numpy(image.patch_mask) for image in images])
    expected, model, there = source.encode_crops(crops, mask), on_device(source, dtype), crops.to(DEVICE, dtype)
    model.encode_crops(there, mask)
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = model.encode_crops(there, mask)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert relative_error(got.float().cpu(), expected) <= limit


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-4), (torch.bfloat16, BF16_ERROR)])
def test_rows_of_all_modes_in_one_step_equal_each_alone(source, prompts, dtype, limit):
    model = on_device(source, dtype)
    alone = torch.cat([logits_of(model, [prompt]) for prompt in prompts])
    assert relative_error(logits_of(model, prompts), alone) <= limit


def test_greedy_answers_equal_the_cpus(source, prompts):
    model = on_device(source)
    for prompt in prompts:
        assert trace_memphi(model, prompt, 12).answer == trace_memphi(source, prompt, 12).answer


def test_a_long_clip_equals_the_cpu(source):
    frames = torch.randn(9001, source.config.audio.mel_bins, generator=torch.Generator().manual_seed(0)) + 10
    with torch.inference_mode():
        expected = source.audio([frames, frames[:50]])
        got = on_device(source).audio([frames.to(DEVICE), frames[:50].to(DEVICE)])
    for one, other in zip(got, expected, strict=True):
        assert largest_difference(one.cpu(), other) <= FP32_TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", range(4))
def test_gradients_equal_the_cpus(source, prompts, mode, dtype):
    gradients = []
    for model in (on_device(source, dtype), Phi4MM(source.config)):
        model.load_state_dict(source.state_dict())
        prompt = prompts[mode]
        ids = torch.tensor(prompt.ids, device=model.device)
        logits = model(ids, [make_row(model, prompt)], model.encode_media(prompt), logits_at=range(len(ids) - 1))
        torch.nn.functional.cross_entropy(logits.float(), ids[1:]).backward()
        weights = [weight.grad for weight in model.parameters() if weight.grad is not None]
        gradients.append(torch.cat([weight.float().cpu().flatten() for weight in weights]))
    assert relative_error(*gradients) <= (1e-3 if dtype == torch.float32 else 0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_verify_agrees_on_the_device(tmp_path, dtype):
    folder = tiny_checkpoint(tmp_path / "model", dtype=torch.float32)
    for report in verify(str(folder), DEVICE, dtype):
        assert report.agrees, report
        assert dtype != torch.float32 or report.ours == report.theirs
