"""Our own loops give the same bits for any number of threads, and the same function on every instruction set."""

import os
import subprocess
import sys

import pytest
import torch
from cases import EVERY, Case

from routed_peft import build_info

# Sizes at which every product of the low-rank path is our own; the base layer's is the library's and promises nothing.
SHAPES = [dict(batch=3, n=70, m=40, d=72, r=20), dict(batch=1, n=700, m=5, d=40, r=8, d_c=24)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("routing", EVERY)
def test_bits_do_not_depend_on_threads(routing, dtype):
    before = torch.get_num_threads()
    try:
        for shape in SHAPES:
            for form in ("lora", "adapter"):
                case = Case(routing, form, dtype=dtype, dropout=0.1, **shape)
                results = []
                for threads in (1, 2, 3, 5, 1):
                    torch.set_num_threads(threads)
                    results.append(case.gradients("cpu"))
                for other in results[1:]:
                    for name, tensor in results[0].items():
                        assert tensor is None or torch.equal(tensor, other[name]), name
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(build_info()["cpu_isa"] != "amx", reason="large products of float32 are the library's")
def test_bits_of_large_products_do_not_depend_on_threads():
    """float32 by tiles (csrc/kernels/plan.h): all products of this call but the condition's."""
    before = torch.get_num_threads()
    case = Case("mul", "lora", batch=1, n=1030, m=3, d=512, out=1032, r=128, d_c=24, dtype=torch.float32, dropout=0.1)
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(case.gradients("cpu"))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for name, tensor in results[0].items():
            assert tensor is None or torch.equal(tensor, other[name]), name


SETS = ("baseline", "avx2", "avx512", "amx")
AGREE = """
import torch
from cases import EVERY, Case, worst
from routed_peft import build_info
for routing in EVERY:
    for form in ("linear", "adapter"):
        for name, tolerance in (("float32", 2e-5), ("float64", 1e-11), ("bfloat16", 0.05), ("float16", 0.01)):
            dtype = getattr(torch, name)
            case = Case(routing, form, n=9, m=33, d=37, r=13, d_c=21, dropout=0.2, dtype=dtype)
            got, want = case.gradients("cpu"), case.gradients("reference", dtype=torch.float64)
            for name in want:
                if want[name] is not None:
                    error = worst(got[name].double(), want[name])
                    assert error < tolerance, (routing, form, dtype, name, error)
print(build_info()["cpu_isa"])
"""


@pytest.mark.parametrize("isa", SETS)
def test_every_instruction_set(isa):
    """Each set that this machine has computes the same operator; one that it lacks falls back to the next lower."""
    here = os.path.dirname(__file__)
    path = os.pathsep.join([here, os.path.dirname(here), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "ROUTED_PEFT_ISA": isa, "PYTHONPATH": path}
    run = subprocess.run([sys.executable, "-c", AGREE], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    best = build_info()["cpu_isa"]
    assert run.stdout.strip() == SETS[min(SETS.index(isa), SETS.index(best))]
