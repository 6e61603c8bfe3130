"""The doctor with a real torch, and the command as a person meets it."""

import json
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from memphi import doctor
from memphi.checkpoint.loader import load_model
from memphi.checkpoint.quantisation import quantise_folder
from memphi.cli import main
from memphi.doctor import CHECKS, Finding, Machine
from memphi.memory.devices import find_card
from tests.checkpoints import tiny_checkpoint

CARD = find_card("RTX 3090")
OLD_CARD = find_card("T4")
SMI = "| NVIDIA-SMI 580.65.06   Driver Version: 580.65.06   CUDA Version: 13.0 |"
NEW_SMI = "| NVIDIA-SMI 610.10   KMD Version: 610.10   CUDA UMD Version: 13.3 |"


def finding(name, card=None, model="demo"):
    return Finding(name, *CHECKS[name](Machine(model, card)))


@pytest.fixture
def run(monkeypatch, capsys):
    def run_doctor(*words):
        monkeypatch.setattr(sys, "argv", ["memphi", "doctor", *map(str, words)])
        monkeypatch.setattr(doctor, "present_card", lambda: None)
        try:
            main()
            code = 0
        except SystemExit as left:
            code = left.code or 0
        return code, *capsys.readouterr()

    return run_doctor


@pytest.fixture
def cuda_build(monkeypatch):
    """As if torch were built for CUDA 13.0 and could use a card."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_80", "sm_86", "sm_90"])
    return monkeypatch


def test_every_check_is_a_line(run):
    code, out, err = run("--model", "demo")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert [line[6:17].strip() for line in lines] == list(CHECKS)
    assert {line[:4].strip() for line in lines} <= {"ok", "warn"}
    assert "complete: official layout" in out


@pytest.mark.parametrize(
    ("obstacle", "status"), [(None, "ok"), ("Triton is not installed", "warn"), ("Triton needs a C compiler", "warn")]
)
def test_a_card_needs_what_builds_kernels(monkeypatch, obstacle, status):
    monkeypatch.setattr("memphi.model.kernels.launch.why_not_built", lambda: obstacle)
    found = finding("triton", CARD)
    assert found.status == status
    assert obstacle is None or f"{obstacle}; until then" in found.advice
    assert finding("triton").status == "ok"


def test_a_document_says_the_same(run):
    code, out, err = run("--model", "demo", "--json")
    document = json.loads(out)
    assert (code, err, document["model"], document["fit"]) == (0, "", "demo", True)
    assert [item["name"] for item in document["findings"]] == list(CHECKS)
    assert all(set(item) == {"name", "status", "found", "advice"} for item in document["findings"])


def test_one_failure_is_the_exit_code(run):
    code, out, _ = run("--model", "nothing")
    assert code == 1
    assert [line for line in out.splitlines() if line.startswith("fail")] == [
        "fail  model files  'nothing' is no folder; give a folder, a hub name like "
        "microsoft/Phi-4-multimodal-instruct, demo or random"
    ]


def test_torch_has_to_fit_the_card(cuda_build):
    assert finding("torch", CARD).status == "ok"
    cuda_build.setattr(torch.cuda, "get_arch_list", lambda: ["sm_90", "sm_120"])
    assert "without kernels for RTX 3090" in finding("torch", CARD).found
    cuda_build.setattr(torch.cuda, "is_available", lambda: False)
    assert "cannot use RTX 3090" in finding("torch", CARD).found
    cuda_build.setattr(torch.version, "cuda", None)
    assert "without CUDA, but here is RTX 3090" in finding("torch", CARD).found
    assert finding("torch").status == "ok"
    cuda_build.setattr(torch, "__version__", "2.9.1+cu128")
    assert finding("torch").advice == "install torch 2.11 or newer"


@pytest.mark.parametrize(
    ("said", "status", "words"),
    [
        (SMI, "ok", "580.65.06, for CUDA up to 13.0"),
        (NEW_SMI, "ok", "610.10, for CUDA up to 13.3"),
        (SMI.replace("13.0", "12.8"), "fail", "for CUDA up to 12.8, and torch wants 13.0"),
        (
            "Failed to initialize NVML: Driver/library version mismatch\n",
            "fail",
            "nvidia-smi says: Failed to initialize",
        ),
        ("", "fail", "nvidia-smi says: nothing"),
    ],
)
def test_the_driver_has_to_fit_torch(cuda_build, said, status, words):
    cuda_build.setattr(doctor.shutil, "which", lambda name: f"/usr/bin/{name}")
    cuda_build.setattr(doctor, "_nvidia_smi", lambda: said)
    found = finding("driver", CARD)
    assert found.status == status
    assert words in found.found


def test_attention_needs_a_card_and_a_build_with_flash(cuda_build):
    cuda_build.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    assert finding("attention", CARD).status == "ok"
    assert finding("attention", OLD_CARD).advice == "expect long prompts to be slow"
    cuda_build.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: False)
    assert finding("attention", CARD).status == "warn"


def test_mapping_says_what_is_missing(cuda_build):
    cuda_build.setattr("memphi.cache.pool.why_not_mapped", lambda device: "the package cuda-bindings is not installed")
    assert finding("mapping", CARD).advice == "pip install cuda-bindings"
    cuda_build.setattr("memphi.cache.pool.why_not_mapped", lambda device: None)
    assert finding("mapping", CARD).status == "ok"


def test_an_older_folder_whose_adapters_have_16_bits_is_complete(tmp_path):
    """They are quantised while they are read."""
    source, folder = tiny_checkpoint(tmp_path / "model"), tmp_path / "small"
    quantise_folder(source, folder, "int4")
    kept = {name: tensor for name, tensor in tensors_of(folder).items() if ".lora_" not in name}
    wide = {name: tensor for name, tensor in tensors_of(source).items() if ".lora_" in name}
    for file in (*folder.glob("*.safetensors"), folder / "model.safetensors.index.json"):
        file.unlink()
    save_file(kept | wide, folder / "model.safetensors", {"format": "pt"})
    load_model(folder, "cpu", torch.bfloat16)
    found = finding("model files", model=str(folder))
    assert (found.status, found.advice) == ("ok", None), found.found


def tensors_of(folder):
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def test_a_folder_with_a_shard_too_few_is_a_failure(tmp_path):
    folder = tiny_checkpoint(tmp_path / "model")
    found = finding("model files", model=str(folder))
    assert (found.status, found.advice) == ("ok", None)
    next(iter(sorted(folder.glob("*.safetensors")))).unlink()
    found = finding("model files", model=str(folder))
    assert found.status == "fail"
    assert "is missing" in found.found
    assert found.advice == "copy or download the folder again"


def test_the_hub_s_cache_is_looked_into_and_nothing_is_downloaded(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("memphi.checkpoint.locate._download", pytest.fail)
    assert finding("model files", model="someone/something").status == "warn"
    cached = tmp_path / "models--someone--something"
    tiny_checkpoint(cached / "snapshots" / "abc")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("abc")
    found = finding("model files", model="someone/something")
    assert found.status == "ok"
    assert "snapshots/abc is complete: official layout" in found.found
    next((cached / "snapshots" / "abc").glob("*.safetensors")).unlink()
    assert finding("model files", model="someone/something").advice == "`memphi ask` goes on with the download"


@pytest.mark.parametrize("model", ["a/b/c", "../nowhere"])
def test_a_name_that_is_none_is_one_sentence(run, model):
    code, out, _ = run("--model", model)
    assert code == 1
    assert f"fail  model files  '{model}' is neither a folder nor a hub name" in out
