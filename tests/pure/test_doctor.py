"""What the doctor says of machines that are not here; none of these checks needs torch."""

import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest

from memphi import doctor
from memphi.config import DEFAULT_MODEL
from memphi.doctor import CHECKS, Finding, Machine, examine
from memphi.errors import MemphiError
from memphi.memory.costs import GIB
from memphi.memory.devices import DeviceFacts, find_card

RTX_4060 = replace(find_card("RTX 4060"), free_bytes=7 * GIB)
RTX_4090 = find_card("RTX 4090")


def finding(name, card=None, model=DEFAULT_MODEL):
    return Finding(name, *CHECKS[name](Machine(model, card)))


def nvidia_smi_says(monkeypatch, text):
    monkeypatch.setattr(doctor, "_nvidia_smi", lambda *arguments: text)


def test_a_check_that_fails_in_itself_does_not_stop_the_others(monkeypatch):
    def crash(machine):
        raise OSError("no such thing\nand more")

    def refuse(machine):
        raise MemphiError("one sentence")

    monkeypatch.setattr(doctor, "present_card", lambda: None)
    monkeypatch.setattr(doctor, "CHECKS", {"a": crash, "b": refuse, "c": lambda machine: ("warn", "so", "do this")})
    assert list(examine()) == [
        Finding("a", "fail", "could not be checked: OSError: no such thing"),
        Finding("b", "fail", "one sentence"),
        Finding("c", "warn", "so", "do this"),
    ]


def test_these_checks_import_no_torch():
    names = ["python", "card", "neighbours", "memory", "host memory", "triton", "decoders", "tokenizer", "hub cache"]
    code = (
        "import sys; from memphi.doctor import CHECKS, Machine; machine = Machine('demo', None)\n"
        f"assert all(CHECKS[name](machine)[0] != 'fail' for name in {names})\nassert 'torch' not in sys.modules"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert said.returncode == 0, said.stderr


@pytest.mark.parametrize(
    ("capability", "status", "words"),
    [
        ((8, 9), "ok", "compute capability 8.9"),
        ((12, 0), "ok", "compute capability 12.0"),
        ((7, 5), "warn", "no units for bf16; use --dtype fp16"),
        ((7, 0), "warn", "untried; compare an answer or two with --dtype fp16 with --device cpu"),
        ((10, 0), "warn", "untried; compare an answer or two with --device cpu"),
    ],
)
def test_a_card_is_judged_by_its_capability(capability, status, words):
    found = finding("card", DeviceFacts("cuda", "NVIDIA X", GIB, GIB, capability))
    assert found.status == status
    assert words in f"{found.found}; {found.advice}"


def test_a_hidden_card_is_told_from_none(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert finding("card").found == "no NVIDIA card"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "CUDA_VISIBLE_DEVICES is ''" in finding("card").found


def test_neighbours_on_the_card_are_named(monkeypatch):
    nvidia_smi_says(monkeypatch, "4242, /usr/bin/python3, 3072 MiB\n4243, Xorg, 200 MiB\n")
    found = finding("neighbours", RTX_4060)
    assert (found.status, found.found) == (
        "warn",
        "pid, program, memory: 4242, /usr/bin/python3, 3072 MiB; 4243, Xorg, 200 MiB",
    )
    nvidia_smi_says(monkeypatch, "No devices were found\n")
    assert finding("neighbours", RTX_4060) == Finding(
        "neighbours", "ok", "no other program computes on the card; 1.0 GiB of it are in use"
    )


def test_memory_that_suffices_is_told_with_the_least_that_would():
    found = finding("memory", RTX_4090)
    assert found.status == "ok"
    assert found.found.startswith("23.9 GiB of 23.9 GiB free on RTX 4090; memphi would take ")
    least = float(found.found.rpartition("at least ")[2].removesuffix(" GiB"))
    assert 2 < least < 4  # in 4 bits, its layers on the host


def test_memory_that_does_not_suffice_is_a_failure_with_the_planner_s_words():
    full = replace(RTX_4060, free_bytes=2 * GIB)
    found = finding("memory", full)
    assert (found.status, found.found) == ("fail", "2.0 GiB of 8.0 GiB free on RTX 4060")
    assert found.advice.startswith("the model does not fit: it needs at least ")
    assert finding("memory", full, "demo").status == "ok"


def test_little_host_memory_is_warned_of(monkeypatch):
    monkeypatch.setattr(doctor, "this_machine", lambda: DeviceFacts("cpu", "here", 8 * GIB, 2 * GIB))
    assert finding("host memory").status == "warn"
    assert finding("host memory").found == "2.0 GiB of 8.0 GiB available"


def test_a_disk_too_full_for_the_download_is_a_failure(monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "not" / "yet"))
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: SimpleNamespace(free=GIB))
    found = finding("hub cache", model="someone/something")
    assert (found.status, found.found) == (
        "fail",
        f"{tmp_path / 'not' / 'yet'} holds 0 bytes, 1.0 GiB of the disk are free",
    )
    assert finding("hub cache", model="demo").status == "ok"


@pytest.mark.parametrize(
    ("built_for", "capability", "runs"),
    [
        ("sm_86", (8, 6), True),
        ("sm_86", (8, 9), True),
        ("sm_90", (8, 9), False),
        ("sm_80", (9, 0), False),
        ("sm_120", (12, 0), True),
        ("sm_90a", (9, 0), True),
        ("compute_80", (9, 0), True),
        ("gfx90a", (9, 0), False),
    ],
)
def test_which_kernels_run_on_which_card(built_for, capability, runs):
    assert doctor._runs_on(built_for, capability) == runs
