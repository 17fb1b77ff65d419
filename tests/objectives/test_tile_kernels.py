"""The fused kernels of the tiled losses: interpreted on the processor, compiled for a GPU, run where there is one."""

from __future__ import annotations

import inspect
import logging
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
from kernels_on_tiles import arguments, in_fp32
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from vlm_train.objectives import tile_kernels, tile_maths, tiled


def kernels_on_tiles(**environment: str) -> None:
    """Runs kernels_on_tiles.py; a failure shows what it printed."""
    path = Path(__file__).with_name("kernels_on_tiles.py")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", str(path)]
    ended = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stdout + ended.stderr


@pytest.mark.slow
def test_interpreted_kernels_agree_with_torch() -> None:
    kernels_on_tiles(TRITON_INTERPRET="1")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_kernels_on_a_gpu_agree_with_torch() -> None:
    kernels_on_tiles(TRITON_INTERPRET="0")


class HopperAtHand:
    """What Triton asks of a driver before it launches."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@pytest.mark.slow
def test_kernels_compile_for_a_gpu_with_every_product_rounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Called as on a GPU up to the launch itself, so that the arguments are those of a run."""
    compile_only, codes = JITFunction.run, {}

    def run(self: JITFunction, *args: Any, warmup: bool, **options: Any) -> None:
        codes[self.__name__] = compile_only(self, *args, warmup=True, **options).asm["sass"]

    given = {name: in_fp32(values) for name, values in arguments(80, 144, 1, 20, 14.0, 0).items()}
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(JITFunction, "run", run)
    monkeypatch.setattr(triton.runtime.driver, "_active", HopperAtHand())
    for name, values in given.items():
        getattr(tile_kernels, name)(*values)
        assert codes[f"_{name}"].count("MUFU.EX2") > 0
        assert codes[f"_{name}"].count("FFMA") == 0
        assert codes[f"_{name}"].count("STL") == 0  # nothing spilled from registers
    monkeypatch.setitem(tile_kernels.OPTIONS, "enable_fp_fusion", True)  # the twin
    tile_kernels.softmax_grad(*given["softmax_grad"])
    assert codes["_softmax_grad"].count("FFMA") > 0


def test_both_sets_of_functions_take_and_give_the_same() -> None:
    for name in ("softmax_sums", "softmax_grad", "sigmoid_sums", "sigmoid_grad"):
        assert inspect.signature(getattr(tile_kernels, name)) == inspect.signature(getattr(tile_maths, name))


def test_kernels_are_chosen_on_a_gpu_that_runs_them_and_only_in_fp32(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    on_gpu: Any = SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.float32)
    monkeypatch.setattr(logging.getLogger("vlm_train"), "propagate", True)
    monkeypatch.setattr(tiled, "_kernels", tiled._kernels.__wrapped__)
    monkeypatch.setattr(tile_kernels, "check", lambda device: None)
    assert tiled.maths_for(on_gpu) is tile_kernels
    assert tiled.maths_for(SimpleNamespace(device=on_gpu.device, dtype=torch.float64)) is tile_maths  # type: ignore[arg-type]
    assert tiled.maths_for(torch.zeros(1)) is tile_maths

    def fails(device: torch.device) -> None:
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(tile_kernels, "check", fails)
    assert tiled.maths_for(on_gpu) is tile_maths
    assert "without its fused kernels on cuda:0" in caplog.text and "C compiler" in caplog.text
