"""docs/training.md: every block runs."""

import sys
from pathlib import Path

import pytest
import torch
from tiny_models import batch_of, gradients, llama
from torch import distributed

import routed_peft as rp

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs" / "training.md"


def blocks():
    """The python blocks by heading, read as tools/check_docs.py reads README's."""
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        import check_docs
    finally:
        sys.path.pop(0)
    return {block.heading: block for block in check_docs.blocks(DOCUMENT.read_text()) if block.language == "python"}


@pytest.fixture
def alone(tmp_path):
    """A process group of one, as for torchrun --nproc-per-node 1."""
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.skipif(not distributed.is_gloo_available(), reason="this torch has no gloo")
@pytest.mark.parametrize("heading", ["PEFT", "DDP", "FSDP2"])
def test_the_lines_run(heading, alone):
    assert set(blocks()) == {"PEFT", "DDP", "FSDP2"}
    model = llama()
    given = {"rp": rp, "torch": torch, "model": model, "batch": batch_of(model), "y": torch.randn(2, 3, 12)}
    if heading == "PEFT":
        given["peft"] = pytest.importorskip("peft", minversion="0.20")
    block = blocks()[heading]
    exec(compile("\n" * (block.line - 1) + block.code, DOCUMENT, "exec"), given)
    loss = given["loss"] if "loss" in given else given["out"].logits.square().mean()
    loss.backward()
    trained = {name for name, p in given["model"].named_parameters() if p.requires_grad}
    assert trained == set(gradients(given["model"])) and len(trained) == 3 * 4
