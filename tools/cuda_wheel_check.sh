#!/usr/bin/env bash
# The whole package with CUDA, built for every architecture on a machine without a GPU: it imports, it serves tensors on
# the CPU, and under a torch without CUDA it says what is wrong. It does not show that a kernel runs.
#
#   CUDA_TORCH_PYTHON   an interpreter whose torch has CUDA; without it, CUDA_TORCH is fetched, some 5 GB
#   PYTHON              an interpreter of the same version whose torch has no CUDA
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=$(command -v "${PYTHON:-python3}")
case $PYTHON in /*) ;; *) PYTHON=$PWD/$PYTHON ;; esac
CUDA_TORCH=${CUDA_TORCH:-torch==2.11.0}
unset PYTHONPATH # the sources must not stand in for what is installed
here=$PWD/build/cuda-wheel
fail() { printf 'FAILED: %s\n' "$1" >&2; exit 1; }

cuda_of() { "$1" -c 'import torch; print(torch.version.cuda or "none")'; }
version_of() { "$1" -c 'import sys; print(*sys.version_info[:2], sep=".")'; }

[ "$(cuda_of "$PYTHON")" = none ] || fail "the torch of PYTHON=$PYTHON has CUDA; the last step needs one without"
rm -rf "$here"
if [ -n "${CUDA_TORCH_PYTHON:-}" ]; then
  [ "$(version_of "$CUDA_TORCH_PYTHON")" = "$(version_of "$PYTHON")" ] || fail "two versions of Python"
  "$CUDA_TORCH_PYTHON" -m venv "$here/venv"
  # Its packages, and nothing written to it.
  "$CUDA_TORCH_PYTHON" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
    >"$("$here/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/torch.pth"
else
  "$PYTHON" -m venv "$here/venv"
  "$here/venv/bin/python" -m pip install -q "$CUDA_TORCH"
fi
python=$here/venv/bin/python
cuda=$(cuda_of "$python")
[ "$cuda" != none ] || fail "the torch to build against has no CUDA"
"$python" -m pip install -q 'setuptools>=77,<82' 'pybind11>=2.13' ninja wheel numpy transformers safetensors pytest

printf '\n=== build, with CUDA %s\n' "$cuda"
CUDA_HOME=$("$PYTHON" tools/cuda_home.py --fetch)
export CUDA_HOME ROUTED_PEFT_CUDA=1 MAX_JOBS=${MAX_JOBS:-2}
env -u TORCH_CUDA_ARCH_LIST PATH="$here/venv/bin:$PATH" \
  "$python" -m pip wheel -v --no-deps --no-build-isolation -w "$here" . >"$here/wheel.log" 2>&1 ||
  { tail -n 60 "$here/wheel.log"; fail "pip wheel"; }
grep -a 'routed_peft: CUDA on' "$here/wheel.log"
ls -l "$here"/*.whl
"$python" -m pip install -q --no-deps "$here"/*.whl

printf '\n=== import, and tensors on the CPU\n'
cd "$here" # not where the sources are
"$python" -c '
import routed_peft
info = routed_peft.build_info()
print(info)
assert info["extension"] and info["cuda"], "not a build with CUDA"
'
"$python" -m pytest -q -p no:cacheprovider -W error::UserWarning -k 'cpu and not reference' \
  ../../tests/test_invariants.py ../../tests/test_functional.py

printf '\n=== the same package under a torch without CUDA\n'
"$PYTHON" -m pip install -q --no-deps --no-index --target "$here/installed" "$here"/*.whl
PYTHONPATH=$here/installed "$PYTHON" -c '
import routed_peft, sys, torch
info = routed_peft.build_info()
print(info)
assert routed_peft.__file__.startswith(sys.argv[2]), routed_peft.__file__
assert not info["extension"], "it loads, and the text cannot be shown"
for part in (f"with CUDA {sys.argv[1]}", f"torch {torch.__version__}", "reinstall routed_peft"):
    assert part in info["reason"], part
' "$cuda" "$here/installed"
printf '\nthe package with CUDA builds, imports and serves the CPU; no kernel was run\n'
