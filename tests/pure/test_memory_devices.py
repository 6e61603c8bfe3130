"""Cards by their names, nvidia-smi's line, and this machine."""

import subprocess

import pytest

from memphi.errors import DeviceError
from memphi.memory import devices
from memphi.memory.costs import GIB, MIB
from memphi.memory.devices import CARDS, DeviceFacts, find_card, present_card, this_machine
from memphi.memory.learned import Excess, Learned, keep, key_of


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("RTX 4060", "RTX 4060"),
        ("rtx4060", "RTX 4060"),
        ("4090", "RTX 4090"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("4060 ti", "RTX 4060 Ti 8GB"),
        ("RTX 4060 Ti 16GB", "RTX 4060 Ti 16GB"),
        ("4060-laptop", "RTX 4060 Laptop"),
        ("A100", "A100 40GB"),
        ("a100-80gb", "A100 80GB"),
        ("NVIDIA H100 80GB HBM3", "H100 80GB"),
        ("H100", "H100 80GB"),
        ("Tesla T4", "T4"),
        ("A10", "A10"),
        ("A10G", "A10G"),
        ("L40S", "L40S"),
        ("RTX 6000 Ada", "RTX 6000 Ada"),
    ],
)
def test_a_card_is_found_by_what_people_call_it(text, name):
    assert find_card(text).name == name


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_every_card_is_found_by_its_own_name(card):
    facts = find_card(card.name)
    assert (facts.name, facts.kind, facts.capability) == (card.name, "cuda", card.capability)
    assert facts.total_bytes == facts.free_bytes == int(card.memory_gib * GIB)


@pytest.mark.parametrize("text", ["RTX 4096", "Radeon 7900", "", "!", "nvidia"])
def test_an_unknown_card_is_one_sentence_with_close_names(text):
    with pytest.raises(DeviceError, match="--memory") as error:
        find_card(text)
    if text == "RTX 4096":
        assert "RTX 4090" in str(error.value)


def said(text):
    return lambda *_, **__: subprocess.CompletedProcess([], 0, stdout=text)


def test_nvidia_smi_tells_of_the_card_that_is_here(monkeypatch, tmp_path):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    learned = Learned(key_of("NVIDIA H100 80GB HBM3"), {"vision pass": Excess(5, 0.5)})
    keep(learned)
    monkeypatch.setattr(devices.subprocess, "run", said("NVIDIA H100 80GB HBM3, 81559, 81072, 9.0\n"))
    assert present_card() == DeviceFacts("cuda", "NVIDIA H100 80GB HBM3", 81559 * MIB, 81072 * MIB, (9, 0), learned)


@pytest.mark.parametrize("line", ["", "No devices were found\n", "NVIDIA X, [N/A], [N/A], 9.0\n", "A, 1, 2\n"])
def test_what_nvidia_smi_cannot_tell_is_no_card(monkeypatch, line):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(devices.subprocess, "run", said(line))
    assert present_card() is None


@pytest.mark.parametrize("visible", ["", "-1"])
def test_a_hidden_card_is_no_card(monkeypatch, visible):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(devices.subprocess, "run", said("NVIDIA H100 80GB HBM3, 81559, 81072, 9.0\n"))
    assert present_card() is None


@pytest.mark.parametrize(
    ("visible", "number", "asked"), [(None, 0, "0"), (None, 1, "1"), ("3,GPU-5", 1, "GPU-5"), ("3,GPU-5", 2, None)]
)
def test_a_card_has_the_number_that_programs_see(monkeypatch, visible, number, asked):
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    commands = []
    answer = said("NVIDIA H100 80GB HBM3, 81559, 81072, 9.0\n")
    monkeypatch.setattr(devices.subprocess, "run", lambda command, **kept: commands.append(command) or answer())
    assert (present_card(number) is None) == (asked is None)
    assert [command[-1] for command in commands] == ([f"--id={asked}"] if asked else [])


def test_without_nvidia_smi_there_is_no_card(monkeypatch):
    def missing(*_, **__):
        raise FileNotFoundError

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(devices.subprocess, "run", missing)
    assert present_card() is None


def test_this_machine_has_memory():
    facts = this_machine()
    assert facts.kind == "cpu"
    assert 0 < facts.free_bytes <= facts.total_bytes


V2, V1 = (
    ("memory.max", "memory.current", ""),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_"),
)


@pytest.mark.parametrize(("limit", "used", "prefix"), [V2, V1])
def test_files_that_were_read_make_way(monkeypatch, tmp_path, limit, used, prefix):
    monkeypatch.setattr(devices, "_host_memory", lambda: (64 * GIB, 60 * GIB))
    monkeypatch.setattr(devices, "CGROUPS", tmp_path)
    (tmp_path / limit).parent.mkdir(exist_ok=True)
    (tmp_path / limit).write_text(f"{16 * GIB}\n")
    (tmp_path / used).write_text(f"{15 * GIB}\n")
    (tmp_path / limit).with_name("memory.stat").write_text(f"anon {GIB}\n{prefix}inactive_file {12 * GIB}\n")
    assert this_machine() == DeviceFacts("cpu", "this machine's CPU", 16 * GIB, 13 * GIB)
    (tmp_path / limit).write_text("max\n")
    assert this_machine().free_bytes == 60 * GIB


def test_a_container_s_limit_counts(monkeypatch):
    monkeypatch.setattr(devices, "_host_memory", lambda: (64 * GIB, 60 * GIB))
    monkeypatch.setattr(devices, "_container_memory", lambda: (16 * GIB, 2 * GIB))
    assert this_machine() == DeviceFacts("cpu", "this machine's CPU", 16 * GIB, 14 * GIB)
    monkeypatch.setattr(devices, "_container_memory", lambda: (None, 0))
    assert this_machine().free_bytes == 60 * GIB
