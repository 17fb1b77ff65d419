"""The fused kernels of the tiled losses: interpreted on the processor, compiled for a GPU, and run where there is one."""

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
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vlm_train.objectives import tile_kernels, tile_maths, tiled

NAMES = ("softmax_sums", "softmax_grad", "sigmoid_sums", "sigmoid_grad")


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


def compiled(name: str, **options: Any) -> Any:
    """The kernel as `tile_kernels` compiles it, but for a Hopper card whether one is there or not."""
    kernel = getattr(tile_kernels, f"_{name}")
    shape = {"NUM_IDS": 1, "HEIGHT": tile_kernels.BLOCK[0], "WIDTH": tile_kernels.BLOCK[1]}
    types = {"image_ids": "*i64", "text_ids": "*i64", "num_rows": "i32", "num_columns": "i32"}
    signature = {name: "constexpr" if name in shape else types.get(name, "*fp32") for name in kernel.arg_names}
    aligned = {(place,): [["tt.divisibility", 16]] for place, name in enumerate(kernel.arg_names) if name not in shape}
    source = ASTSource(kernel, signature=signature, constexprs=shape, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={**tile_kernels.OPTIONS, **options})


@pytest.mark.slow
def test_kernels_compile_for_a_gpu_with_every_product_rounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for name in NAMES:
        machine_code = compiled(name).asm["sass"]
        assert machine_code.count("MUFU.EX2") > 0
        assert machine_code.count("FFMA") == 0
        assert machine_code.count("STL") == 0  # nothing spilled from registers
    fused = compiled("softmax_grad", enable_fp_fusion=True).asm["sass"]  # the twin
    assert fused.count("FFMA") > 0


def test_both_sets_of_functions_take_and_give_the_same() -> None:
    for name in NAMES:
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
