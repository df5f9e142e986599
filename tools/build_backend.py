"""setuptools' build backend, plus one rule: build against the torch that will run the extension.

Build isolation hides the environment's torch, and a torch listed under [build-system] would make
pip fetch the newest one: gigabytes, and not the one the extension will meet. So the environment's
own torch is put back in sight, and only an environment without any gets it as a requirement.
"""

import importlib
import json
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version

from setuptools import build_meta as _setuptools
from setuptools.build_meta import *  # noqa: F403

MINIMUM = "2.11"  # the stable C++ interface that csrc/torch is written against


def _environment_path() -> list[str]:
    """The sys.path of this very interpreter without pip's isolation, which is two variables."""
    hidden = ("PYTHONPATH", "PYTHONNOUSERSITE")
    env = {name: value for name, value in os.environ.items() if name not in hidden}
    ask = [sys.executable, "-c", "import json, sys; print(json.dumps(sys.path))"]
    return json.loads(subprocess.check_output(ask, env=env, text=True))


def _torch_version() -> str | None:
    importlib.invalidate_caches()
    try:
        return version("torch")
    except PackageNotFoundError:
        return None


def use_environment_torch() -> bool:
    """Make the environment's torch importable; False where there is none."""
    found = _torch_version()
    if found is None:
        before = list(sys.path)
        # At the end, so that what the isolated build asked for still comes first.
        sys.path += [entry for entry in _environment_path() if entry and entry not in before]
        found = _torch_version()
        if found is None:
            sys.path[:] = before
            return False
    if _release(found) < _release(MINIMUM):
        raise SystemExit(f"routed_peft needs torch >= {MINIMUM}, not the {found} found here")
    return True


def _release(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:2])


def _requirements(config_settings=None) -> list[str]:
    return [] if use_environment_torch() else [f"torch>={MINIMUM}"]


def _with_torch(hook):
    def run(*args, **kwargs):
        use_environment_torch()
        return hook(*args, **kwargs)

    return run


get_requires_for_build_wheel = get_requires_for_build_editable = _requirements
prepare_metadata_for_build_wheel = _with_torch(_setuptools.prepare_metadata_for_build_wheel)
prepare_metadata_for_build_editable = _with_torch(_setuptools.prepare_metadata_for_build_editable)
build_wheel = _with_torch(_setuptools.build_wheel)
build_editable = _with_torch(_setuptools.build_editable)
