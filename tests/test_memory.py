"""No full-size temporaries: a call's peak memory grows by its output (backward: by dx) and by what is rank-wide."""

import os
import subprocess
import sys

import pytest

MEASURE = """
import resource
import sys
import torch
from routed_peft import functional

torch.set_num_threads(1)
rows, d, r = 40 * 500, 1024, 16

def peak():  # bytes
    try:  # what getrusage says on Linux starts at the peak of the process that started this one
        with open("/proc/self/status") as status:
            return 1024 * next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    except FileNotFoundError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

def call(samples, n):
    x = torch.ones(samples, n, d, requires_grad=True)
    y = torch.randn(samples, 8, d)
    A, B = torch.randn(r, d, requires_grad=True), torch.randn(d, r, requires_grad=True)
    dout = torch.ones(samples, n, d)
    before = peak()
    out = functional.routed_lora(x, A, y, B, routing=sys.argv[1], scaling=1.0, dropout_p=0.1, backend="cpu")
    forward = peak()
    out.backward(dout)
    return forward - before, peak() - forward

call(2, 10)  # warm: code, threads' scratch
print(rows * d * 4, *call(40, 500))
"""


@pytest.mark.parametrize("routing", ["none", "mul", "expand", "gram", "gram_relu", "cross_gram", "ones"])
def test_peak_memory(routing):
    root = os.path.dirname(os.path.dirname(__file__))
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    run = subprocess.run([sys.executable, "-c", MEASURE, routing], env=env, capture_output=True, text=True, check=True)
    full, forward, backward = map(int, run.stdout.split())
    assert 0.9 * full < forward < 1.25 * full, "forward: the output and nothing else of its size"
    assert 0.9 * full < backward < 1.25 * full, "backward: dx and nothing else of its size"
