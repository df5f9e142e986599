"""The example, end to end on its real data, with few steps."""

import importlib.util
import json
import statistics
import sys
from pathlib import Path

import pytest
import torch

EXAMPLE = Path(__file__).parents[1] / "examples" / "digits_vqa.py"


@pytest.fixture(scope="module")
def demo():
    threads = torch.get_num_threads()
    spec = importlib.util.spec_from_file_location("digits_vqa", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    yield module
    torch.set_num_threads(threads)


def test_it_learns_and_writes_its_results(demo, tmp_path, capsys):
    options = "--routes none gram --seeds 1 --steps 100 --batch 16 --vision-steps 300 --threads 1"
    results = demo.main([*options.split(), "--out", str(tmp_path)])

    assert results["vision_accuracy"] > 0.8
    guess = results["guessing"]["overall"]
    for method in results["methods"]:
        (run,) = method["runs"]
        assert statistics.fmean(run["losses"][-10:]) < 0.8 * statistics.fmean(run["losses"][:10])
        assert run["test"]["overall"] > guess + 0.03
        assert set(run["test"]) == {"overall", *demo.QUESTIONS}
        assert method["reload"]["same_answer"] == method["reload"]["asked"] > 100
        assert method["reload"]["largest_difference"] < 1e-3
        folder = tmp_path / f"lora-{method['route']}"
        assert (folder / "routed_config.json").is_file() and (folder / "routed_adapter.safetensors").is_file()

    # plain LoRA has no condition projection and gets a higher rank for it
    assert results["methods"][0]["runs"][0]["parameters"] == results["methods"][1]["runs"][0]["parameters"]
    written = json.loads((tmp_path / "results.json").read_text())
    assert written["methods"][1]["runs"][0]["test"] == results["methods"][1]["runs"][0]["test"]
    assert (tmp_path / "results.png").stat().st_size > 10_000
    table = capsys.readouterr().out
    assert "lora none" in table and "lora gram" in table and "ms/step" in table


@pytest.mark.parametrize(
    "options, message",
    [
        ("--routes nope", "invalid choice: 'nope'"),
        ("--steps 0", "--steps must be at least 1, got 0"),
        ("--lr -1", "--lr must be positive, got -1.0"),
        ("--pool none --routes gram mul", "--pool none needs as many image tokens as text tokens for mul"),
    ],
)
def test_bad_options_are_refused(demo, options, message, capsys):
    with pytest.raises(SystemExit):
        demo.main(options.split())
    assert message in capsys.readouterr().err


def test_a_text_model_that_is_not_there_is_refused(demo, tmp_path):
    with pytest.raises(SystemExit, match="--text-model"):
        demo.main(["--text-model", str(tmp_path), "--out", str(tmp_path / "out")])
