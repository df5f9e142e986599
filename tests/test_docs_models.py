"""docs/models.md: every block runs, and the table names the taps that attach finds."""

import re
import sys
from pathlib import Path

import pytest
import tiny_models
import torch

import routed_peft as rp

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs" / "models.md"
MODELS = {
    "LLaVA": "llava", "Qwen2-VL": "qwen2_vl", "PaliGemma": "paligemma", "BLIP-2": "blip2", "BART": "bart", "T5": "t5",
    "Text-image dual encoder": "dual_encoder", "CLIP": "clip", "RoBERTa": "roberta_classifier", "GPT-2": "gpt2",
    "Llama": "llama", "ViT": "vit", "AST": "ast",
}  # fmt: skip


def blocks():
    """The python blocks by heading, read as tools/check_docs.py reads README's."""
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        import check_docs
    finally:
        sys.path.pop(0)
    return {block.heading: block for block in check_docs.blocks(DOCUMENT.read_text()) if block.language == "python"}


def rows():
    """The table: model type -> the cells of its row."""
    lines = [line for line in DOCUMENT.read_text().splitlines() if line.startswith("| `")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {re.match(r"`([^`]+)`", row[0])[1]: row for row in cells if not row[0].startswith("`model_type`")}


def test_every_family_has_its_lines_and_its_row():
    assert set(blocks()) == set(MODELS)
    types = {getattr(tiny_models, make)().config.model_type for make in MODELS.values()}
    assert set(rows()) == types


@pytest.mark.parametrize("heading", MODELS)
def test_the_lines_of_a_family_run(heading):
    model = getattr(tiny_models, MODELS[heading])()
    block = blocks()[heading]
    given = {"rp": rp, "model": model, "batch": tiny_models.batch_of(model), "y": torch.randn(2, 3, 12)}
    exec(compile("\n" * (block.line - 1) + block.code, DOCUMENT, "exec"), given)

    report = model._routed_peft.report
    assert report.names
    kind = model.config.model_type
    assert (report.tap is not None) == (rows()[kind][2] != "–")
    found = given.get("loss")
    if found is None:
        found = tiny_models.output_of(given["out"]).float().square().mean()
    found.backward()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert set(tiny_models.gradients(model)) == trained
    assert any(grad.abs().max() > 0 for grad in tiny_models.gradients(model).values())
