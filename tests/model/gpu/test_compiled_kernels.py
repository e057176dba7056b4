"""Every kernel is compiled for A100 (sm_80) and H100 (sm_90) with the compiler that Triton brings; no GPU is needed.

What the interpreter cannot see: shared memory, registers, and whether the tensor cores and asynchronous copies are
used. In a process of its own where this one's Triton is the interpreter.
"""

import os
import re
import subprocess
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from visionmoe.model.gpu import (  # noqa: E402
    configs,
    products,
    reductions,
)
from visionmoe.model.gpu.configs import COLUMN_UNIT, ROW_UNIT, candidates, shared_bytes  # noqa: E402

SHARED = {80: 163 * 1024, 90: 227 * 1024}  # bytes that one program may use
D, F, E = 768, 3072, 8  # B/16
ROWS = {"E": E, "E_LANES": 8, "PRECISION": "ieee"}
UNITS = {"ROW_UNIT": ROW_UNIT, "COLUMN_UNIT": COLUMN_UNIT, "DOTS": F // COLUMN_UNIT + 1}
PRODUCTS = {
    "first": (products.first_kernel, ROWS | {"N": F, "K": D, "TANH": True, "SAVE": True}),
    "first, exact": (products.first_kernel, ROWS | {"N": F, "K": D, "TANH": False, "SAVE": False}),
    "second": (products.second_kernel, ROWS | {"N": D, "K": F, "K_LAST": True, "BIAS": True}),
    "gradient of tokens": (products.second_kernel, ROWS | {"N": D, "K": F, "K_LAST": False, "BIAS": False}),
    "first, backward": (products.first_backward_kernel, ROWS | UNITS | {"N": F, "K": D, "TANH": True}),
    "gradient of W2": (products.weight_gradient_kernel, {"M": D, "N": F, "GATHER_A": True, "PRECISION": "ieee"}),
    "gradient of W1": (products.weight_gradient_kernel, {"M": F, "N": D, "GATHER_A": False, "PRECISION": "ieee"}),
}
REDUCTIONS = {
    "combine": (reductions.combine_kernel, {"E": E, "D": D, "BLOCK_T": 8, "BLOCK_D": 256}),
    "second bias": (reductions.second_bias_kernel, {"E": E, "E_LANES": 8, "D": D, "DOTS": F // COLUMN_UNIT + 1,
                                                    "ROW_UNIT": ROW_UNIT, "BLOCK_D": 128}),
    "sum of units": (reductions.sum_units_kernel, {"N": F, "ROW_UNIT": ROW_UNIT, "BLOCK_U": 32, "BLOCK_N": 64}),
}  # fmt: skip
TYPES = {"token_ptr": "*i32", "offsets_ptr": "*i32", "table_ptr": "*i32", "weight_ptr": "*fp32", "dots_ptr": "*fp32",
         "bias_sums_ptr": "*fp32", "sums_ptr": "*fp32", "num_rows": "i32", "num_tokens": "i32",
         "ROWS": "i32"}  # fmt: skip


def compiled(function, constants, capability, dtype, warps=4, stages=3):
    names = function.arg_names
    types = {n: "constexpr" if n in constants else TYPES.get(n, f"*{dtype}") for n in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n.endswith("_ptr") or n == "ROWS"}
    source = ASTSource(fn=function, signature=types, constexprs=constants, attrs=aligned)
    options = {"num_warps": warps, "num_stages": stages}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def spilled_bytes(kernel, path: Path) -> int:
    """Local memory per thread, by the binary's own table."""
    path.write_bytes(kernel.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    out = subprocess.run([tool, "--dump-resource-usage", path], capture_output=True, text=True, check=True).stdout
    return int(re.search(r"STACK:(\d+)", out)[1])


def with_tiles(constants, config):
    return constants | config.kwargs


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_use_the_tensor_cores_of_an_h100(name, tmp_path):
    """bfloat16 with 8 warps on 128 x 128: wgmma, asynchronous copies, the tiles' shared memory, nothing spilled."""
    tuner, constants = PRODUCTS[name]
    (config,) = [c for c in tuner.configs if (c.kwargs["BLOCK_M"], c.kwargs["BLOCK_N"], c.num_warps) == (128, 128, 8)]
    kernel = compiled(tuner.fn, with_tiles(constants, config), 90, "bf16", config.num_warps, config.num_stages)
    assert "wgmma.mma_async" in kernel.asm["ptx"]
    assert "cp.async" in kernel.asm["ptx"]
    assert kernel.metadata.shared <= SHARED[90]
    assert kernel.metadata.shared == pytest.approx(shared_bytes(config, itemsize=2), rel=0.05)
    assert spilled_bytes(kernel, tmp_path / "kernel.cubin") <= (512 if "exact" in name else 0)


@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_products_compile_for_an_a100(name, dtype):
    tuner, constants = PRODUCTS[name]
    config = tuner.configs[-1]
    kernel = compiled(tuner.fn, with_tiles(constants, config), 80, dtype, config.num_warps, config.num_stages)
    assert ("mma.sync" in kernel.asm["ptx"]) == (dtype == "fp16")  # float32 is exact: no TF32
    assert kernel.metadata.shared <= SHARED[80]


@pytest.mark.parametrize("name", REDUCTIONS)
@pytest.mark.parametrize("capability", SHARED)
def test_reductions_compile(name, capability):
    function, constants = REDUCTIONS[name]
    kernel = compiled(function, constants, capability, "bf16")
    assert "ld.global.v4" in kernel.asm["ptx"] or "ld.global.v8" in kernel.asm["ptx"]  # whole vectors


@pytest.mark.slow
@pytest.mark.parametrize("capability", SHARED)
@pytest.mark.parametrize("name", ["first", "first, backward", "gradient of W2"])
def test_the_largest_candidate_that_fits_does_fit(name, capability):
    """By our own count of shared memory, and by the compiler's."""
    tuner, constants = PRODUCTS[name]
    fitting = [c for c in tuner.configs if shared_bytes(c, itemsize=2) <= SHARED[capability] - 4096]
    config = max(fitting, key=lambda c: shared_bytes(c, itemsize=2))
    tiles = with_tiles(constants, config)
    kernel = compiled(tuner.fn, tiles, capability, "bf16", config.num_warps, config.num_stages)
    assert SHARED[capability] // 2 < kernel.metadata.shared <= SHARED[capability]


@pytest.mark.parametrize("name", PRODUCTS)
def test_the_tuner_tries_what_suits_the_product(name, monkeypatch):
    """As the tuner asks, with the device's memory said here: for many rows, for few, and for a size below all tiles."""
    monkeypatch.setattr(configs, "shared_memory", lambda device: SHARED[90])
    tuner, constants = PRODUCTS[name]
    a = torch.empty(0, dtype=torch.bfloat16)
    many = tuner.early_config_prune(tuner.configs, {"a_ptr": a, "ROWS": 16384}, **constants)
    assert len(many) >= 5
    assert all(c.kwargs["BLOCK_M"] >= 64 for c in many)
    few = tuner.early_config_prune(tuner.configs, {"a_ptr": a, "ROWS": 32}, **constants)
    axis = "BLOCK_K" if "gradient of W" in name else "BLOCK_M"
    assert all(c.kwargs[axis] < 64 for c in few) or len(few) == 1
    tiny = {key: 8 for key in ("M", "N", "K") if key in constants}
    assert tuner.early_config_prune(tuner.configs, {"a_ptr": a, "ROWS": 16}, **constants | tiny)


def test_candidates_fit_into_memory():
    (tuner, _), everything = PRODUCTS["first"], 1 << 30
    sizes = (16384, F, D)
    for memory in (SHARED[90], SHARED[80], 99 * 1024):
        found = candidates(tuner.configs, sizes, 2, memory)
        assert max(shared_bytes(c, 2) for c in found) <= memory
        assert len(found) < len(candidates(tuner.configs, sizes, 2, everything)) or memory == SHARED[90]
    assert len(candidates(tuner.configs, sizes, 4, 1)) == 1  # none fits: the smallest
