"""Two processes that share a batch, by DDP and by FSDP2, have the gradients of a single process that has all of it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from distributed_cases import STEP, build, cases, output_for_two, peft, run, train_a_step

import routed_peft as rp

pytestmark = [
    pytest.mark.filterwarnings("ignore:.gradient_checkpointing.:FutureWarning"),
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo"),
]
PROGRAM = Path(__file__).with_name("distributed_cases.py")
SECONDS = 400  # for both processes; a minute is enough on an idle machine


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As in the two processes: gradients that nearly cancel show in which order torch adds."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """What two processes found, and the folder that they wrote to."""
    folder = tmp_path_factory.mktemp("pair")
    single = build(**STEP)
    train_a_step(single)
    rp.save_adapter(single, folder / "single")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    logs = [(folder / f"{rank}.log").open("w+") for rank in (0, 1)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", PROGRAM, str(rank), "2", folder],
            stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=environment,
        )
        for rank, log in enumerate(logs)
    ]  # fmt: skip
    try:
        codes = [process.wait(timeout=SECONDS) for process in processes]
    finally:
        for process in processes:
            process.kill()
    if any(codes):
        pytest.fail("".join(log.seek(0) or log.read()[-3000:] for log in logs))
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)], folder


def found_by(pair, name):
    """What each of the two processes found for ``name``; their tracebacks if they failed."""
    results = [found[name] for found in pair[0]]
    for rank, result in enumerate(results):
        assert not isinstance(result, str), f"rank {rank}:\n{result}"
    return results


@pytest.mark.parametrize("name", cases())
def test_gradients_are_those_of_a_single_process(pair, name):
    case = cases()[name]
    if case.get("kind") == "peft" and peft is None:
        pytest.skip("peft is not installed")
    wanted = run(**case)
    low = case.get("dtype") is not None
    for rank, got in enumerate(found_by(pair, name)):
        assert got.keys() == wanted.keys()
        for parameter, gradient in got.items():
            scale = wanted[parameter].abs().max().item()
            torch.testing.assert_close(
                gradient, wanted[parameter], rtol=0, atol=max(scale, 1e-6) * (2e-2 if low else 1e-5),
                msg=lambda text, where=f"rank {rank}, {parameter}": f"{where}: {text}",
            )  # fmt: skip
    assert any(gradient.abs().max() > 0 for gradient in wanted.values())


def test_a_sharded_adapter_is_saved_for_a_single_process_and_back(pair):
    model = build(**STEP)
    wanted = train_a_step(model)
    _, folder = pair
    fresh = build(**STEP)
    rp.load_adapter(fresh, folder / "sharded")
    torch.testing.assert_close(output_for_two(fresh), wanted, rtol=1e-5, atol=1e-6)
    for found in found_by(pair, "files"):
        assert found["there"]  # on every rank, once save_adapter is back
        torch.testing.assert_close(found["trained"], wanted, rtol=1e-5, atol=1e-6)
        for layers in (True, False):
            got = found[f"loaded, layers apart: {layers}"]
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(peft is None, reason="peft is not installed")
def test_a_sharded_peft_adapter_is_saved_for_a_single_process(pair):
    model = build(kind="peft", **STEP)
    wanted = train_a_step(model)
    _, folder = pair
    loaded = peft.PeftModel.from_pretrained(model.unload(), folder / "peft")
    torch.testing.assert_close(output_for_two(loaded), wanted, rtol=1e-5, atol=1e-6)
    for found in found_by(pair, "files"):
        torch.testing.assert_close(found["peft trained"], wanted, rtol=1e-5, atol=1e-6)
