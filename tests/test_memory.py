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

routing, form = sys.argv[1:]
dtype = torch.bfloat16 if form == "bfloat16" else torch.float32

def call(samples, n):
    x = torch.ones(samples, n, d, dtype=dtype, requires_grad=True)
    y = torch.randn(samples, 8, d).to(dtype)
    A, B = (torch.randn(*sizes).to(dtype).requires_grad_() for sizes in ((r, d), (d, r)))
    W, dout = torch.randn(d, d).to(dtype), torch.ones(samples, n, d, dtype=dtype)
    options = dict(routing=routing, dropout_p=0.1, backend="cpu")
    before = peak()
    if form == "adapter":
        out = functional.routed_adapter(x, y, A, None, B, None, **options)
    elif form == "lora":
        out = functional.routed_lora(x, A, y, B, scaling=1.0, **options)
    else:  # Conv1D's weight lies the other way round
        out = functional.routed_linear(x, W.t() if form == "conv1d" else W, None, y, A, B, scaling=1.0, **options)
    forward = peak()
    out.backward(dout)
    return forward - before, peak() - forward

call(2, 10)  # warm: code, threads' scratch
print(rows * d * dtype.itemsize, *call(40, 500))
"""


ROUTINGS = ["none", "mul", "expand", "gram", "gram_relu", "cross_gram", "ones"]
FORMS = ["linear", "conv1d", "adapter", "bfloat16"]


@pytest.mark.parametrize(
    "routing, form",
    [*((routing, "lora") for routing in ROUTINGS), *(("gram", form) for form in FORMS), ("mul", "adapter")],
)
def test_peak_memory(routing, form):
    root = os.path.dirname(os.path.dirname(__file__))
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, routing, form], env=env, capture_output=True, text=True, check=True
    )
    full, forward, backward = map(int, run.stdout.split())
    assert 0.9 * full < forward < 1.25 * full, "forward: the output and nothing else of its size"
    assert 0.9 * full < backward < 1.25 * full, "backward: dx and nothing else of its size"
