"""The LLaVA example, as a user runs it, with few steps."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[1] / "examples" / "llava_finetune.py"


def run(*options, path=None):
    env = dict(os.environ, HF_HUB_OFFLINE="1")  # whatever it needed from the network would fail
    if path is not None:
        env["PYTHONPATH"] = os.pathsep.join([str(path), env.get("PYTHONPATH", "")])
    command = [sys.executable, str(EXAMPLE), *map(str, options)]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def example():
    """The example as a module, for what needs no process of its own."""
    spec = importlib.util.spec_from_file_location("llava_finetune", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One run: its folder, its results and what it printed."""
    out = tmp_path_factory.mktemp("llava")
    done = run("--steps", 40, "--batch", 16, "--device", "cpu", "--out", out)
    assert done.returncode == 0, done.stderr[-3000:]
    return out, json.loads((out / "results.json").read_text()), done.stdout


def test_it_learns_from_some_crops_and_answers_about_others(finished):
    _, results, printed = finished
    losses = results["logged_losses"]
    assert losses[-1] < 0.5 * losses[0]
    assert results["after"]["loss"] < 0.5 * results["before"]["loss"]
    assert results["before"]["accuracy"] == 0  # of random weights
    assert results["after"]["accuracy"] > results["guessing"] + 0.1
    assert "trainable (1.82%)" in printed and "One call: 4 of 4 routed layers ran." in printed


def test_only_routed_parameters_train_and_the_adapter_alone_is_the_result(finished):
    out, results, printed = finished
    assert results["base_unchanged"] is True
    assert results["tap"] == "image tokens at the entry of 'model.language_model'"
    # lora_A [8, 128] and lora_B [128, 8] of q_proj and v_proj in both layers of the language model
    assert results["trainable"] == len(results["layers"]) * 2 * 8 * 128 == 8192
    assert all(".language_model." in name for name in results["layers"])
    assert results["reload"] == {"largest_logit_difference": 0.0, "same_answers": True}
    assert "bit for bit" in printed
    assert {file.name for file in (out / "adapter").iterdir()} == {"routed_config.json", "routed_adapter.safetensors"}


def test_a_model_in_a_folder_is_loaded_like_one_of_the_hub(finished, tmp_path):
    out, _, _ = finished
    options = "--routing gram --targets all-linear --own-projection --rank 2 --no-gradient-checkpointing --bf16"
    few = "--steps 1 --batch 64 --device cpu --threads 1"
    done = run("--model", out / "base", *options.split(), *few.split(), "--out", tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((tmp_path / "results.json").read_text())
    assert len(results["layers"]) == 14 and not (tmp_path / "base").exists()
    assert results["base_unchanged"] is True and results["reload"]["same_answers"] is True


def test_without_the_pictures_it_fails_and_says_what_to_install(tmp_path):
    (tmp_path / "skimage").mkdir()
    (tmp_path / "skimage" / "__init__.py").write_text("raise ImportError('no skimage')\n")
    done = run("--out", tmp_path / "out", path=tmp_path)
    assert done.returncode == 1
    assert "pip install scikit-image" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "options, message",
    [
        ("--steps 0", "--steps must be at least 1, got 0"),
        ("--lr 0", "--lr must be positive, got 0.0"),
        ("--routing cross_gram", "invalid choice: 'cross_gram'"),
    ],
)
def test_bad_options_are_refused(example, options, message, capsys):
    with pytest.raises(SystemExit):
        example.main(options.split())
    assert message in capsys.readouterr().err


def test_a_model_that_is_not_there_is_refused(example, tmp_path):
    with pytest.raises(SystemExit, match="--model .*nowhere: "):
        example.main(["--model", str(tmp_path / "nowhere"), "--out", str(tmp_path / "out")])


def test_layers_that_the_condition_does_not_fit_are_refused_before_training(example, finished, tmp_path):
    options = ["--model", str(finished[0] / "base"), "--device", "cpu", "--out", str(tmp_path)]
    with pytest.raises(SystemExit, match=r"128 features, and 2 of 14 layers take .*down_proj \(256\)"):
        example.main([*options, "--targets", "all-linear"])
    with pytest.raises(SystemExit, match=r"target_modules=\['nope'\] matched no .* nearest names"):
        example.main([*options, "--targets", "nope"])


def test_crops_for_testing_share_no_pixel_with_those_for_training(example, monkeypatch):
    """Every crop lies in one block, and no block has crops of both kinds."""
    from PIL import Image

    boxes = []
    crop = Image.Image.crop

    def noting(image, box):
        boxes.append((image.width // example.BLOCKS, image.height // example.BLOCKS, box))
        return crop(image, box)

    monkeypatch.setattr(Image.Image, "crop", noting)
    train, test = example.load_crops(seed=3)
    per_picture = example.TEST_CROPS + example.TRAIN_CROPS
    assert len(boxes) == len(train) + len(test) == len(example.PICTURES) * per_picture
    for start in range(0, len(boxes), per_picture):
        blocks = []
        for width, height, (left, top, right, bottom) in boxes[start : start + per_picture]:
            blocks.append((left // width, top // height))
            assert blocks[-1] == ((right - 1) // width, (bottom - 1) // height)
        tested, trained = set(blocks[: example.TEST_CROPS]), set(blocks[example.TEST_CROPS :])
        assert len(tested) == example.HELD_OUT and len(trained) == example.BLOCKS**2 - example.HELD_OUT
        assert not tested & trained
