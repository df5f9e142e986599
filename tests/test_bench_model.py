"""The models of benchmarks/bench_model.py, tiny: eager is the same model as routed_peft, and another one is noticed."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import bench_model as bench

CASES = [(form, routing) for form in bench.FORMS for routing in bench.ROUTINGS]
WAYS = [(*case, way) for case in CASES for way in ("train", "generate")[: 1 + bench.FORMS[case[0]].generates]]


def pair(form, routing, dropout=0.1):
    spec = bench.FORMS[form]
    size = bench.SIZES["tiny"][spec.size]
    return [bench.Subject(spec, peer, routing, size, "cpu", dropout) for peer in ("routed_peft", "eager")]


@pytest.mark.parametrize("form, routing, way", WAYS)
def test_eager_is_the_same_model(form, routing, way):
    ours, eager = pair(form, routing)
    assert bench.check(ours, eager, way) < 1e-5
    assert {name for name, _ in ours.model.named_parameters()} == {name for name, _ in eager.model.named_parameters()}
    assert 2 * len(ours.model._routed_peft.report.names) == len(ours.trained) == len(eager.trained) > 0


@pytest.mark.parametrize("form, routing", CASES)
def test_another_eager_is_noticed(form, routing, monkeypatch):
    monkeypatch.setattr(
        bench.EagerLoRA, "scaling", property(lambda self: 0.51, lambda self, value: None), raising=False
    )
    with pytest.raises(AssertionError, match="is off by"):
        bench.check(*pair(form, routing), "train")


@pytest.mark.parametrize("form", ["llava", "gpt2+vit"])
def test_a_generation_without_its_condition_is_noticed(form, monkeypatch):
    ours, eager = pair(form, "gram")
    project = bench.EagerLoRA.project

    def forgetful(self):
        return project(self) * (0 if self.kept[0] is self.holder.y else 1)

    monkeypatch.setattr(bench.EagerLoRA, "project", forgetful)
    with pytest.raises(AssertionError, match="logits of the generation is off by"):
        bench.check(ours, eager, "generate")


def test_eager_projects_the_condition_once_a_generation(monkeypatch):
    _, eager = pair("llava", "gram")
    eager.model.eval()
    widths, linear = [], bench.F.linear

    def counting(x, weight, *bias):
        if any(weight is p for p in eager.trained):
            widths.append(x.shape[1])
        return linear(x, weight, *bias)

    monkeypatch.setattr(bench.F, "linear", counting)
    eager.generate()
    # of a layer: the prompt and its image at first, then one token at a time, A and B each
    assert len(widths) == len(eager.trained) // 2 * (1 + 2 * eager.size.new)


@pytest.mark.parametrize("form", bench.FORMS)
def test_a_step_trains_the_adapter_alone(form):
    for subject in pair(form, "mul"):
        subject.model.train()
        before = {name: p.clone() for name, p in subject.model.named_parameters()}
        subject.train()
        moved = {name for name, p in subject.model.named_parameters() if not torch.equal(p, before[name])}
        assert moved == {name for name in before if name.endswith(("lora_A", "lora_B"))}


@pytest.mark.parametrize("way", ["train", "generate"])
def test_a_group_is_measured(way):
    found = bench.measured("gpt2+vit", "mul", way, "tiny", "float32", "cpu", 0.0)
    assert [*found] == bench.PEERS
    for result in found.values():
        assert len(result["times"]) == bench.measure.LEAST_ROUNDS and result["tokens_per_second"] > 0
        assert ("saved_bytes" in result) == (way == "train")
    if way == "train":
        assert found["base"]["saved_bytes"] < found["routed_peft"]["saved_bytes"] < found["eager"]["saved_bytes"]
