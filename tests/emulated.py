"""The CUDA kernels on the CPU: builds csrc/emulator/ops_emulated.cpp with them and makes it a backend, "emulated"."""

import contextlib
import ctypes
import fcntl
import functools
import os
import re
from pathlib import Path

import torch
from torch.utils import cpp_extension

from routed_peft import ops

ROOT = Path(__file__).parent.parent
BUILD = ROOT / "build" / "emulated"
KERNELS = (  # as in setup.py
    "pack", "condition", "rank_one", "down_route", "route", "gram", "up_project", "routed",
    "grad_output", "route_grad", "grad_state", "gram_grad", "pooled_grad", "grad_input", "reduce", "rank_one_sweep",
    "rank_one_sum", "rank_one_weights", "rank_one_grad", "routed_grad",
)  # fmt: skip
SOURCES = ("csrc/emulator/ops_emulated.cpp", "csrc/torch/call.cpp")
FLAGS = (
    "-O2", "-g0", "-std=c++20", "-fvisibility=hidden", "-fno-strict-aliasing",  # as nvcc
    "-DTORCH_TARGET_VERSION=0x020b000000000000",
)  # fmt: skip


@functools.cache
def _library():
    """Built once and kept: ninja compiles again only what has changed."""
    BUILD.mkdir(parents=True, exist_ok=True)
    sources = [str(ROOT / source) for source in SOURCES]
    with open(BUILD / "mutex", "w") as mutex:
        fcntl.flock(mutex, fcntl.LOCK_EX)
        for name in KERNELS:  # a .cu file would go to nvcc
            wrapper, text = BUILD / f"{name}.cpp", f'#include "kernels/{name}.cu"\n'
            if not wrapper.exists() or wrapper.read_text() != text:
                wrapper.write_text(text)
            sources.append(str(wrapper))
        (BUILD / "lock").unlink(missing_ok=True)  # torch's own: a build that was killed leaves it, and all others wait
        cpp_extension.load(
            "routed_peft_emulated", sources, extra_cflags=list(FLAGS), extra_include_paths=[str(ROOT / "csrc")],
            build_directory=str(BUILD), is_python_module=False,
        )  # fmt: skip
    library = ctypes.CDLL(str(BUILD / "routed_peft_emulated.so"))
    library.routed_peft_emulated_launches.restype = ctypes.c_char_p
    library.routed_peft_emulated_options.restype = ctypes.c_bool
    ops.register("routed_peft_emulated")
    ops.BACKENDS["emulated"] = ops.Backend("cpu", torch.ops.routed_peft_emulated, True)
    return library


@functools.cache
def load():
    """Make ``backend="emulated"`` known."""
    _library()
    set_options()


def launches():
    """The kernels launched since the last call, by their bare names."""
    names = _library().routed_peft_emulated_launches().decode().splitlines()
    return [re.search(r"(\w+)_kernel", name)[1] for name in names]


def set_options(text=""):
    """RP_EMULATOR's options; those that are not named go back to their defaults."""
    text = ",".join(filter(None, [f"threads={min(os.cpu_count() or 1, 4)}", os.environ.get("RP_EMULATOR"), text]))
    if not _library().routed_peft_emulated_options(text.encode()):
        raise ValueError(f"the emulator does not know {text!r}")


@contextlib.contextmanager
def options(text):
    """``set_options`` for a while."""
    set_options(text)
    try:
        yield
    finally:
        set_options()


MODES = [
    f"schedule={schedule},copy={copy}" for schedule in ("forward", "reverse", "shuffled") for copy in ("wait", "issue")
]
