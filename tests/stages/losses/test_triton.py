"""The Triton kernels on a machine without a GPU.

They are interpreted in a process of their own, and compiled for an H100.
"""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton.backends.nvidia")

STAGES = Path(__file__).parents[1]
TYPES = {"raw": "*bf16", "logits": "*bf16", "ids": "*i64", "labels": "*i64", "coolness": "fp32"}
INTEGERS = ("stride", "V", "K", "C", "programs")


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels' tests run as they are")
def test_the_kernels_are_right_under_the_interpreter() -> None:
    """Triton reads the variable when it is imported, so not here."""
    files = [
        STAGES / "losses/test_vocabulary_triton.py",
        STAGES / "targets/test_block_sums_triton.py",
    ]
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")
    }
    environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *map(str, files)]
    done = subprocess.run(
        words, capture_output=True, text=True, env=environment, cwd=STAGES.parents[1], timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    counted = done.stdout.splitlines()[-1]
    assert re.match(r"\d{2,} passed", counted), counted
    assert "skipped" not in counted


@pytest.mark.parametrize(
    ("temperature", "scale", "softcap"),
    [(1.0, 1.0, None), (2.0, 0.5, 30.0)],
    ids=["plain", "all that a head may have"],
)
@pytest.mark.parametrize("name", ["_look", "_spread"])
def test_the_losses_kernels_compile_for_an_h100(
    name: str, temperature: float, scale: float, softcap: float | None, own_cache: None
) -> None:
    from stillroom.stages.losses import vocabulary_triton as passes_triton

    constants = {"TEMPERED": temperature != 1.0, "SCALE": scale, "SOFTCAP": softcap, "ENTRIES": 64}
    constants |= {"WIDTH": 8, "UNIT": 8}
    kernel = getattr(passes_triton, name)
    ptx = assembly(kernel, constants, warps=8, multiples=("V",))
    wide = 2 * passes_triton.UNROLL.value  # for whole tiles and for what is left of a row
    assert len(re.findall(r"ld\.global\S*\.v4", ptx)) == wide
    assert len(re.findall(r"st\.global\S*\.v4", ptx)) == (wide if name == "_spread" else 0)
    assert ".local" not in ptx  # nothing is spilled
    # An odd vocabulary in padded rows: what is left of a row goes one by one. A number that is 1 is
    # a constant.
    odd = assembly(kernel, constants | {"K": 1}, warps=8)
    assert len(re.findall(r"ld\.global\S*\.v4", odd)) == wide // 2


@pytest.mark.parametrize("temperatures", [(1.0,), (1.0, 2.0, 4.0)])
def test_the_scoring_kernel_compiles_for_an_h100(
    temperatures: tuple[float, ...], own_cache: None
) -> None:
    from stillroom.stages.targets import block_sums_triton as targets_triton
    from stillroom.stages.targets.block_sums import BLOCK, LEAST

    constants = {
        "TEMPERATURES": temperatures,
        "BLOCK": BLOCK,
        "BLOCKS": targets_triton.BLOCKS,
        "LEAST": LEAST,
    }
    kernel = targets_triton._block_sums
    ptx = assembly(kernel, constants, warps=4, multiples=("V", "stride"))
    loads = targets_triton.BLOCKS * BLOCK // (4 * 32 * 8)  # 4 warps, 8 values at once
    assert (
        len(re.findall(r"ld\.global\S*\.v4", ptx)) == len(re.findall(r"ld\.global", ptx)) == loads
    )
    assert assembly(kernel, constants | {"C": 1, "programs": 1}, warps=4)


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels are compiled here and now."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def assembly(
    kernel: Any, constants: dict[str, Any], *, warps: int, multiples: tuple[str, ...] = ()
) -> str:
    """PTX for compute capability 9.0; ptxas has seen it.

    `multiples`: numbers that are such of 16, as pointers are.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    def kind(name: str) -> str:
        if name in constants:
            return "constexpr"
        return "i32" if name in INTEGERS else TYPES.get(name, "*fp32")

    names = kernel.arg_names
    aligned = [i for i, name in enumerate(names) if kind(name).startswith("*") or name in multiples]
    source = ASTSource(
        fn=kernel,
        signature={name: kind(name) for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    made = triton.compile(
        source,
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": warps, "enable_fp_fusion": True},
    )
    assert len(made.asm["cubin"]) > 1000
    return made.asm["ptx"]
