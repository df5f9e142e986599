"""examples/train_distributed.py: alone, under torchrun and accelerate, killed and resumed."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"
STEPS = 9
OPTIONS = ["--steps", str(STEPS), "--batch", "8", "--save-every", "3", "--test-images", "4", "--device", "cpu"]
# The process that writes the losses is killed, as by the kernel, when it has written that of one step.
KILLED = """
import os, signal, sys
sys.path.insert(0, {examples!r})
import train_distributed as program
add = program.Losses.add
def add_or_die(self, step, loss):
    add(self, step, loss)
    if step == {step}:
        os.kill(os.getpid(), signal.SIGKILL)
program.Losses.add = add_or_die
program.main(sys.argv[1:])
"""
TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ACCELERATE = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]


@pytest.fixture(scope="module")
def program():
    """The example as a module, on one thread, as its processes are."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    sys.path.insert(0, str(EXAMPLES))  # where it finds digits_vqa.py, as it does when it is run
    spec = importlib.util.spec_from_file_location("train_distributed", EXAMPLES / "train_distributed.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(EXAMPLES))
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def undisturbed(program, tmp_path_factory):
    """The losses of a run in one process."""
    folder = tmp_path_factory.mktemp("undisturbed")
    return losses_in(folder, program.main([*OPTIONS, "--out", str(folder)]))


def losses_in(folder, results=None):
    lines = [json.loads(line) for line in (folder / "losses.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    losses = [line["loss"] for line in lines]
    if results is not None:
        assert results["losses"] == losses[len(losses) - len(results["losses"]) :]
    return losses


def launch(launcher, folder, *options, killed_at=None):
    """Run the example in processes of its own; its output."""
    script = EXAMPLES / "train_distributed.py"
    if killed_at is not None:
        script = folder / "killed.py"
        script.write_text(KILLED.format(examples=str(EXAMPLES), step=killed_at))
    command = [sys.executable, "-W", "ignore", *(["-m", *launcher] if launcher else []), str(script)]
    # The launcher's processes must find what this one has found, say an installation that is not.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [*command, *OPTIONS, "--out", str(folder), *options],
        capture_output=True, text=True, timeout=300, env=environment, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert (done.returncode == 0) == (killed_at is None), done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_killed_and_resumed_in_one_process(program, undisturbed, tmp_path, capsys):
    launch(None, tmp_path, killed_at=5)
    assert losses_in(tmp_path) == undisturbed[:5]  # the fourth and fifth step are behind the checkpoint
    results = program.main([*OPTIONS, "--out", str(tmp_path), "--resume"])
    assert losses_in(tmp_path, results) == undisturbed  # the same bits
    assert len(results["losses"]) == STEPS - 3
    assert "Resumed behind step 3." in capsys.readouterr().out
    assert (tmp_path / "adapter" / "routed_adapter.safetensors").is_file()
    assert len(undisturbed) == STEPS and undisturbed[-1] < undisturbed[0]


def test_killed_and_resumed_in_every_other_way(undisturbed, tmp_path):
    """DDP, killed; FSDP2 goes on, killed; accelerate's launcher goes on to the end."""
    launch(TORCHRUN, tmp_path, killed_at=5)
    assert losses_in(tmp_path) == pytest.approx(undisturbed[:5], rel=1e-4)
    launch(TORCHRUN, tmp_path, "--fsdp", "--resume", killed_at=8)
    assert losses_in(tmp_path) == pytest.approx(undisturbed[:8], rel=1e-4)
    said = launch(ACCELERATE, tmp_path, "--resume")
    assert losses_in(tmp_path) == pytest.approx(undisturbed, rel=1e-4)
    assert "DDP: 2 x 4 questions per step on cpu." in said and "Resumed behind step 6." in said
    assert (tmp_path / "adapter" / "routed_adapter.safetensors").is_file()


def test_another_run_s_checkpoint_is_refused(program, tmp_path):
    few = ["--steps", "1", "--batch", "2", "--test-images", "1", "--out", str(tmp_path)]
    program.main(few)
    with pytest.raises(SystemExit, match="'seed': 0.*not with.*'seed': 1"):
        program.main([*few, "--seed", "1", "--resume"])


@pytest.mark.parametrize(
    "options, message",
    [
        ("--steps 0", "--steps must be at least 1, got 0"),
        ("--lr 0", "--lr must be positive, got 0.0"),
        ("--fsdp", "--fsdp needs a launcher"),
        ("--routing nope", "invalid choice: 'nope'"),
    ],
)
def test_bad_options_are_refused(program, options, message, capsys):
    with pytest.raises(SystemExit):
        program.main(options.split())
    assert message in capsys.readouterr().err


def test_a_batch_that_cannot_be_shared_is_refused(program, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(SystemExit):
        program.parse(["--batch", "32"])
    assert "--batch 32 cannot be shared by 3 processes" in capsys.readouterr().err
