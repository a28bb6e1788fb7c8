"""What --device and --dtype mean, wherever they are given; short memory; devices without float64."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import accelerate.state  # noqa: F401  (before torch is made to pretend)
import pytest
import torch
from elsewhere import MPS, Elsewhere, send
from tiny import tiny_model
from torch import Tensor

import care_mla
from care_mla.calibration import Collected, Propagation, collect_fisher, collect_moments
from care_mla.config import HealSettings, Recipe
from care_mla.errors import ConfigError
from care_mla.families import get_family
from care_mla.healing import processes
from care_mla.layouts import DenseProjections
from care_mla.runtime import devices, has_float64, memory_named, resolve_device, resolve_dtype, sums_device
from care_mla.text import TokenWindows

TEXT = {"samples": 4, "seqlen": 32}


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two CUDA devices, as far as torch is asked."""
    monkeypatch.setattr(torch, "cuda", SimpleNamespace(is_available=lambda: True, device_count=lambda: 2))
    monkeypatch.setattr(devices, "_working", lambda device, option: device)


@pytest.mark.parametrize("word", ["cpu", "CPU", " cpu ", "cpu:0", torch.device("cpu")])
def test_the_cpu_by_all_its_names(word: Any) -> None:
    assert resolve_device(word) == torch.device("cpu")


@pytest.mark.parametrize(
    ("word", "device"),
    [
        (None, "cuda"),
        ("auto", "cuda"),
        ("gpu", "cuda"),
        ("GPU", "cuda"),
        ("cuda", "cuda"),
        ("CUDA:1", "cuda:1"),
        (1, "cuda:1"),
        ("0", "cuda:0"),
        (torch.device("cuda", 1), "cuda:1"),
        ("cpu", "cpu"),
    ],
)
def test_accelerators_by_all_their_names(word: Any, device: str, two_gpus: None) -> None:
    assert resolve_device(word) == torch.device(device)


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("cuda:7", "cuda:0 to cuda:1"),
        (7, "cuda:0 to cuda:1"),
        ("mps", "no mps device.* cpu or cuda"),
        ("cuda:x", "a device is"),
    ],
)
def test_accelerators_that_are_not_there(word: Any, says: str, two_gpus: None) -> None:
    with pytest.raises(ConfigError, match=says):
        resolve_device(word)


def test_several_processes_have_a_device_each(two_gpus: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="--device cuda:1: each process has a device of its own; name --device cuda"):
        processes.make_accelerator("cuda:1", None, tmp_path / "out.logs")


def test_accelerate_is_told_the_device_of_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "ACCELERATE_TORCH_DEVICE"
    for before in (None, "cuda:3"):
        monkeypatch.delenv(name, raising=False) if before is None else monkeypatch.setenv(name, before)
        with processes._accelerate_on(torch.device("cuda", 1)):
            assert os.environ[name] == "cuda:1"
        with processes._accelerate_on(None):
            assert os.environ.get(name) == before
        assert os.environ.get(name) == before


@pytest.mark.parametrize("word", ["tpu", "meta", "", "cuda:-1", "cuda:0,1", "cpu:1", True, 1.5, torch.device("meta")])
def test_words_that_are_no_device(word: Any) -> None:
    with pytest.raises(ConfigError, match="--device"):
        resolve_device(word)


def test_no_accelerator_is_said_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch warns of an old driver, and says that there is no device."""

    def absent() -> bool:
        warnings.warn("CUDA initialization: the driver is too old", stacklevel=1)
        return False

    monkeypatch.setattr(torch, "cuda", SimpleNamespace(is_available=absent, device_count=lambda: 0))
    for kind in ("xpu", "backends"):
        monkeypatch.setattr(torch, kind, SimpleNamespace(is_available=bool, mps=SimpleNamespace(is_available=bool)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert resolve_device(None) == torch.device("cpu")
        with pytest.raises(ConfigError, match=r"no cuda device here \(CUDA initialization: the driver is too old\)"):
            resolve_device("cuda")
        with pytest.raises(ConfigError, match="no accelerator here"):
            resolve_device("gpu")


def test_a_device_that_is_there_and_cannot_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "cuda", SimpleNamespace(is_available=lambda: True, device_count=lambda: 1))
    with pytest.raises(ConfigError, match="--device cuda: the device is there but cannot be used"):
        resolve_device(None)


@pytest.mark.parametrize(
    ("word", "dtype"),
    [
        (None, "auto"),
        ("auto", "auto"),
        ("bf16", torch.bfloat16),
        ("BFloat16", torch.bfloat16),
        ("torch.bfloat16", torch.bfloat16),
        (torch.bfloat16, torch.bfloat16),
        ("fp16", torch.float16),
        ("half", torch.float16),
        ("fp32", torch.float32),
        ("float", torch.float32),
    ],
)
def test_dtypes_by_all_their_names(word: Any, dtype: Any) -> None:
    assert resolve_dtype(word) == dtype
    name = str(dtype).removeprefix("torch.")
    assert Recipe.make(dtype=word).dtype == name
    if dtype != torch.float16:
        assert HealSettings.make(precision=word).precision == name


@pytest.mark.parametrize("word", ["float64", torch.float64, "int8", torch.int8, "fp8", "nf4", "brain", "", 16])
def test_other_dtypes_are_one_sentence(word: Any) -> None:
    for refused in (
        lambda: resolve_dtype(word),
        lambda: Recipe.make(dtype=word),
        lambda: HealSettings.make(precision=word),
        lambda: care_mla.load("/no/such/model", dtype=word),
    ):
        with pytest.raises(ConfigError, match="float32"):
            refused()


def test_devices_and_dtypes_are_refused_before_anything_is_read(
    tiny: Callable[..., Path], tmp_path: Path, text_file: Path
) -> None:
    source, out = tiny(), tmp_path / "out"
    commands: list[Callable[..., Any]] = [
        lambda **options: care_mla.calibrate(source, out, calibration="/no/text.txt", **options),
        lambda **options: care_mla.evaluate(source, "/no/text.txt", **options),
    ]
    for command in commands:
        for options in ({"device": "tpu"}, {"device": torch.device("meta")}, {"dtype": torch.float64}):
            with pytest.raises(ConfigError, match="--device|--dtype"):
                command(**options)
    with pytest.raises(ConfigError, match="--device"):
        care_mla.convert(source, out, kv_save=0.5, device="tpu", calibration={"calibration": "/no/text.txt"})
    with pytest.raises(ConfigError, match="--device"):
        care_mla.heal(source, out, device="tpu")
    with pytest.raises(ConfigError, match="device_map both say"):
        care_mla.load(source, device="auto", device_map="auto")
    assert not out.exists()


def test_python_takes_torch_objects_and_statistics_say_what_was_used(
    tiny: Callable[..., Path], tmp_path: Path, text_file: Path
) -> None:
    stats = care_mla.calibrate(
        tiny(), tmp_path / "stats", calibration=str(text_file), device=torch.device("cpu"), dtype=torch.bfloat16, **TEXT
    )
    manifest = care_mla.convert(
        tiny(), tmp_path / "out", stats=stats, kv_save=0.5, method="care", dtype=torch.float16, device="CPU"
    )
    assert (manifest["calibration"]["dtype"], manifest["calibration"]["device"]) == ("bfloat16", "cpu")
    assert manifest["recipe"]["dtype"] == "float16"
    assert care_mla.load(tmp_path / "out").dtype == torch.float16
    assert care_mla.load(tmp_path / "out", dtype="FP32", device=None).dtype == torch.float32


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: not enough memory: you tried"),
        RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"),
        MemoryError(),
    ],
)
def test_short_memory_says_what_to_lower(error: BaseException) -> None:
    said = pytest.raises(ConfigError, match="out of memory on cpu while it ran: lower --seqlen")
    with said, memory_named("it ran", torch.device("cpu"), "lower --seqlen"):
        raise error


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match="shapes"), memory_named("it ran", torch.device("cpu"), "nothing"):
        raise RuntimeError("shapes do not fit")


@pytest.mark.parametrize("fisher", [False, True])
def test_calibration_out_of_memory_is_one_sentence(
    fisher: bool, tiny: Callable[..., Path], tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def short(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("transformers.models.llama.modeling_llama.LlamaMLP.forward", short)
    with pytest.raises(ConfigError, match=r"out of memory .*--batch-size \(now 8\) or --seqlen \(now 32\)"):
        care_mla.calibrate(tiny(), tmp_path / "stats", calibration=str(text_file), fisher=fisher, **TEXT)
    with pytest.raises(ConfigError, match=r"out of memory .*--seqlen \(now 32\)"):
        care_mla.evaluate(tiny(), str(text_file), seqlen=32)
    assert not (tmp_path / "stats").exists()


# --- devices without float64 ------------------------------------------------------------------------------------------


def test_sums_live_where_float64_is() -> None:
    assert has_float64(torch.device("cpu")) and has_float64(torch.device("cuda"))
    assert sums_device(MPS) == torch.device("cpu") and sums_device(torch.device("cuda:1")) == torch.device("cuda:1")


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
def test_no_float64_is_made_on_a_device_without_it(name: str, weighted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Statistics of a model that says it is on such a device are those of the same model on the CPU."""
    weights = torch.tensor([1.0, 0.5, 2.0, 1.0] if weighted else [1.0] * 4, dtype=torch.float64)
    ids = torch.randint(3, 250, (4, 12), generator=torch.Generator().manual_seed(0))
    windows = TokenWindows(ids, torch.tensor([12, 12, 9, 12]), weights)
    family = get_family(tiny_model(name).config.to_dict())

    def statistics(model: Any) -> dict[str, Tensor]:
        forward_only, both = Collected(), Collected()
        collect_moments(model, family, windows, forward_only, with_inputs=True, normalized=name == "qwen3")
        collect_fisher(model, family, windows, both, normalized=name == "qwen3")
        refit = Propagation(model, family, windows, ridge=0.1).refit(0, bent)
        sinks = [
            forward_only.moments,
            both.moments,
            both.fisher,
            forward_only.normalized,
            both.normalized,
            both.normalized_fisher,
        ]
        found = [sink[1] for sink in sinks if sink]
        tensors = {f"{i} {key}": t for i, sums in enumerate(found) for key, t in sums.to_tensors().items()}
        return {**tensors, "refit": refit.weight}

    model = tiny_model(name)
    attention = model.model.layers[0].self_attn
    bent = DenseProjections(
        attention.k_proj.weight.detach().double() + 0.01, attention.v_proj.weight.detach().double(), None, None
    )
    here = statistics(model)
    with Elsewhere():
        there = statistics(send(tiny_model(name)))
    for key, tensor in here.items():
        assert type(there[key]) is Tensor
        torch.testing.assert_close(there[key], tensor, rtol=1e-6, atol=1e-8)
