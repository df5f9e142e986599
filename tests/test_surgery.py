"""attach, detach, check and the files, on tiny transformers models."""

import copy
from types import SimpleNamespace

import pytest
import torch
import transformers as tf
from tiny_models import (
    D,
    awaken,
    bart,
    batch_of,
    bert,
    blip2,
    dual_encoder,
    gpt2,
    llama,
    llama_config,
    llava,
    output_of,
    roberta_classifier,
    t5,
    vit,
)
from torch import nn

import routed_peft as rp
from routed_peft import taps
from routed_peft.surgery import AdaptedModule

DC = 12
TARGETS = {
    bert: ["query", "value"], roberta_classifier: ["query", "dense"], gpt2: ["c_attn", "c_fc"],
    llama: ["q_proj", "down_proj"], bart: ["q_proj", "fc2"], t5: ["q", "wo"], vit: ["q_proj", "fc1"],
}  # fmt: skip


def lora(targets, **options):
    return rp.RoutedLoRAConfig(**{"target_modules": targets, "r": 4, "condition_features": DC, **options})


def adapter(targets, **options):
    return rp.RoutedAdapterConfig(**{"target_modules": targets, "r": 4, "condition_features": DC, **options})


def snapshot(model):
    """All that attach and detach may touch: module types, parameters, values, flags, training modes, hooks."""
    return (
        [(name, type(module), id(module), module.training) for name, module in model.named_modules()],
        [(name, id(p), p.requires_grad, p._version) for name, p in model.named_parameters(remove_duplicate=False)],
        [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()],
        sorted(model.__dict__),
    )


def run(model, batch, y=None):
    with torch.no_grad():
        if y is None:
            return output_of(model(**batch))
        with rp.condition(model, y):
            return output_of(model(**batch))


# ------------------------------------------------------------------------------------------------ attach
@pytest.mark.parametrize("make", TARGETS)
def test_attach_adapts_freezes_and_detach_restores(make):
    model = make()
    next(model.parameters()).requires_grad_(False)  # a flag of the user's own
    batch, y = batch_of(model), torch.randn(2, 3, DC)
    before, plain = snapshot(model), run(model, batch)

    report = rp.attach(model, lora(TARGETS[make], exclude_modules=["classifier.dense"]))
    assert all(any(name.endswith("." + target) for target in TARGETS[make]) for name in report.names)
    assert len(report.names) == sum(isinstance(m, rp.RoutedLoRA) for m in model.modules()) >= 2
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {f"{n}.{p}" for n in report.names for p in ("lora_A", "lora_B", "condition_A")}
    assert torch.allclose(run(model, batch, y), plain, atol=1e-6)  # lora_B is zero
    with pytest.raises(rp.MissingConditionError, match=f"RoutedLoRA '{report.names[0]}' ran without"):
        run(model, batch)
    awaken(model)
    routed = run(model, batch, y)
    assert not torch.allclose(routed, plain, atol=1e-3)
    assert not torch.allclose(run(model, batch, torch.randn(2, 3, DC)), routed, atol=1e-5)

    rp.detach(model)
    assert snapshot(model) == before
    assert torch.equal(run(model, batch), plain)
    with pytest.raises(rp.RoutedPeftError, match="has no attached adapter"):
        rp.detach(model)


def test_training_modes_survive():
    model = bert().train()
    model.encoder.layer[1].eval()
    rp.attach(model, lora(["query"]))
    first, second = (model.encoder.layer[i].attention.self.query for i in (0, 1))
    assert first.training and not second.training and not second.base_layer.training


def test_patterns_and_init():
    model = llama()
    rp.attach(model, lora(["q_proj"], rank_pattern={r"0\..*": 2}, alpha_pattern={r"1\..*": 3.0}, init="gaussian"))
    first, second = (model.model.layers[i].self_attn.q_proj for i in (0, 1))
    assert (first.r, second.r, first.lora_alpha, second.lora_alpha) == (2, 4, 16, 3.0)
    assert second.lora_A.std() > 0.15  # N(0, 1/4); Kaiming would be uniform within 1/sqrt(32)
    for pattern in ("rank_pattern", "alpha_pattern"):
        with pytest.raises(rp.RoutedPeftError, match=f"{pattern}: 'k_proj' matches none of the 2"):
            rp.attach(llama(), lora(["q_proj"], **{pattern: {"k_proj": 3}}))


def test_regex_and_exclude():
    report = rp.attach(llama(), lora(r".*\.(q_proj|norm)", exclude_modules=r".*\.1\..*"))
    assert report.names == ["model.layers.0.self_attn.q_proj"]
    assert report.skipped == {
        "model.layers.1.self_attn.q_proj": "in exclude_modules",
        "model.norm": "not a linear layer",
    }
    assert "model.norm: not a linear layer" in str(report) and str(report).startswith("1 modules adapted, 2 skipped")


def test_all_linear_leaves_towers_projectors_and_heads_alone():
    report = rp.attach(llava(), lora("all-linear"))
    assert len(report.names) == 14 and all(name.startswith("model.language_model.layers.") for name in report.names)
    reasons = {name: reason for name, reason in report.skipped.items()}
    assert reasons["lm_head"] == "an output head"
    assert reasons["model.multi_modal_projector.linear_1"] == "part of a projector"
    assert reasons["model.vision_tower.encoder.layers.0.mlp.fc1"] == "part of a vision or audio tower"
    assert len(reasons) == 12 + 2 + 1
    assert set(rp.attach(roberta_classifier(), lora("all-linear")).skipped) == {
        "classifier.dense",
        "classifier.out_proj",
    }
    assert len(rp.attach(gpt2(), lora("all-linear")).names) == 8


def test_all_linear_finds_the_head_that_the_model_names():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.unembed = nn.Linear(4, 4), nn.Linear(4, 9)

        def get_output_embeddings(self):
            return self.unembed

    assert rp.attach(Odd(), lora("all-linear")).skipped == {"unembed": "an output head"}


def test_all_linear_adapts_a_vision_model_on_its_own():
    config = tf.CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8
    )
    model = nn.Module()
    model.vision_model = tf.CLIPVisionModel(config)
    assert len(rp.attach(model, lora("all-linear")).names) == 6


def test_nothing_matched_names_the_nearest():
    model = llava()
    before = snapshot(model)
    text = (
        r"target_modules=\['nope'\] matched no Linear/Conv1D module of LlavaForConditionalGeneration; "
        r"nearest names: '\w+', '\w+', '\w+'$"
    )
    with pytest.raises(rp.RoutedPeftError, match=text):
        rp.attach(model, lora(["nope"]))
    with pytest.raises(rp.RoutedPeftError, match=r"\['v_porj'\] matched no .*nearest names: 'v_proj'"):
        rp.attach(model, lora(["q_proj", "v_porj"]))  # one good name does not hide a bad one
    with pytest.raises(rp.RoutedPeftError, match="nearest names: 'model.language_model.layers.0.self_attn.q_proj'"):
        rp.attach(model, lora("model.language_model.layers.0.self_attn.q_porj"))
    with pytest.raises(rp.RoutedPeftError, match=r"\['self_attn'\] matched no Linear/Conv1D module"):
        rp.attach(model, lora(["self_attn"]))
    with pytest.raises(rp.RoutedPeftError, match="can be adapted; 1 were left alone, such as .*in exclude_modules"):
        rp.attach(model, lora(["layers.1.self_attn.o_proj"], exclude_modules=["o_proj"]))
    assert snapshot(model) == before


def test_attach_twice_raises():
    model = bert()
    rp.attach(model, lora(["query"]))
    before = snapshot(model)
    with pytest.raises(rp.RoutedPeftError, match="already holds a routed layer, 'encoder.layer.0.*query'; detach"):
        rp.attach(model, lora(["query"]))
    assert snapshot(model) == before
    by_hand = nn.Sequential(rp.RoutedLoRA(nn.Linear(4, 4)), nn.Linear(4, 4))
    with pytest.raises(rp.RoutedPeftError, match="already holds a routed layer, '0'"):
        rp.attach(by_hand, lora(["1"]))


def test_a_layer_that_cannot_be_built_leaves_the_model_as_it_was():
    model = bert()
    before = snapshot(model)
    with pytest.raises(ValueError, match="out_slices"):
        rp.attach(model, lora(["query"], out_slices=[(0, 99)]))
    assert snapshot(model) == before


@pytest.mark.parametrize("broken", ["tap", "keywords", "layers"])
def test_an_error_half_way_leaves_the_model_as_it_was(broken, monkeypatch):
    model = bart()
    put, calls = model.set_submodule, []

    def refuse(*args):
        calls.append(args)
        if broken != "layers" or len(calls) == 2:  # after the first layer has been replaced
            raise KeyError("refused")
        return put(*args)

    owner, name = {
        "tap": (taps.DecoderTap, "_around"), "keywords": (model, "get_encoder"), "layers": (model, "set_submodule"),
    }[broken]  # fmt: skip
    monkeypatch.setattr(owner, name, refuse)
    if broken == "keywords":  # the taps ask for the encoder, too
        monkeypatch.setattr(taps, "_kind_of", lambda model, path: ("decoder", path))
    before = snapshot(model)
    config = lora(["q_proj"], condition_features=D, tap="model.decoder" if broken == "keywords" else "auto")
    with pytest.raises(KeyError, match="refused"):
        rp.attach(model, config)
    assert calls and snapshot(model) == before
    monkeypatch.undo()
    assert rp.attach(model, config).names


def test_a_tap_of_another_width_than_the_layers_take_is_refused():
    model = llava()
    before = snapshot(model)
    text = r"image tokens at the entry of 'model.language_model', has 32 features, and 2 of 14 layers take another "
    with pytest.raises(
        rp.ConditionShapeError, match=text + r"width: 2: .*down_proj \(48\), .*; condition_features=32 "
    ):
        rp.attach(model, lora("all-linear", condition_features=None, tap="auto"))
    with pytest.raises(rp.ConditionShapeError, match="14 of 14 layers take another width: 14: "):
        rp.attach(model, lora("all-linear", tap="auto"))
    with pytest.raises(rp.ConditionShapeError, match="has 32 features, and 2 of 2 layers .*2: .*mlp .48."):
        rp.attach(model, adapter(["mlp"], condition_features=48, tap="auto", exclude_modules=r".*vision.*"))
    assert snapshot(model) == before
    for make, targets, width in (
        (bart, ["fc2"], 32),
        (t5, ["wo"], 32),
        (dual_encoder, ["query"], 16),
        (blip2, ["fc2"], 32),
    ):
        with pytest.raises(rp.ConditionShapeError, match=f"has {width} features"):
            rp.attach(make(), lora(targets, condition_features=None if width == 32 else 32, tap="auto"))
    linear = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 6))
    with pytest.raises(rp.ConditionShapeError, match=r"output of '0', has 6 features, .* 1 \(12\)"):
        rp.attach(linear, lora(["1"], tap="0"))
    for options in ({"routing": "none"}, {"condition_source": "in_sequence"}):  # they take none of it
        rp.attach(llava(), lora("all-linear", condition_features=None, tap="auto", **options))


def test_a_shared_module_gets_one_adapter():
    model = nn.Module()
    model.a = nn.Linear(8, 8)
    model.b = model.a
    plain = model.a
    report = rp.attach(model, lora(["a", "b"]))
    assert report.names == ["a", "b"] and model.a is model.b and model.a.base_layer is plain
    rp.detach(model)
    assert model.a is plain and model.b is plain


def test_fused_slices_on_conv1d():
    model = gpt2()
    rp.attach(model, lora(["c_attn"], out_slices=[(0, D), (2 * D, 3 * D)]))
    awaken(model)
    layer = model.transformer.h[0].attn.c_attn
    x, y = torch.randn(2, 5, D), torch.randn(2, 3, DC)
    change = layer(x, y) - layer.base_layer(x)
    assert change[..., D : 2 * D].abs().max() < 1e-6 < change[..., :D].abs().max()


# ------------------------------------------------------------------------------------------------ refusals
class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj = nn.Linear(8, 8)
        self.experts = nn.ModuleList(nn.ModuleDict({"up_proj": nn.Linear(8, 8)}) for _ in range(2))


def test_moe_experts_are_refused():
    with pytest.raises(rp.UnsupportedError, match="'experts.0.up_proj' cannot be adapted: an expert.*exclude_modules"):
        rp.attach(Experts(), lora(["q_proj", "up_proj"]))
    for targets in ("all-linear", ".*_proj"):
        report = rp.attach(Experts(), lora(targets))
        assert report.names == ["q_proj"] and set(report.skipped) == {"experts.0.up_proj", "experts.1.up_proj"}
        assert all("which sample each belongs to is lost" in reason for reason in report.skipped.values())


def test_experts_under_another_name_are_refused():
    class ParallelExperts(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(2, 8, 8))

    model = nn.ModuleDict({"moe": nn.ModuleDict({"input_linear": ParallelExperts()}), "q_proj": nn.Linear(8, 8)})
    with pytest.raises(rp.UnsupportedError, match="'moe.input_linear' cannot be adapted: an expert"):
        rp.attach(model, lora(["q_proj", "input_linear"]))


def test_experts_in_three_dimensional_parameters_are_refused():
    config = tf.MixtralConfig(
        hidden_size=D, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, intermediate_size=16,
        vocab_size=60, num_local_experts=2,
    )  # fmt: skip
    model = tf.MixtralForCausalLM(config)
    assert any(p.dim() == 3 for p in model.model.layers[0].mlp.experts.parameters(recurse=False))
    with pytest.raises(rp.UnsupportedError, match="mlp.experts' cannot be adapted: an expert"):
        rp.attach(model, lora(["q_proj", "experts"]))
    assert not any("experts" in name for name in rp.attach(model, lora("all-linear")).names)


def test_children_of_modules_that_bypass_them_are_refused():
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    for model, name, reason in (
        (nn.ModuleDict({"attn": attention}), "attn.out_proj", "nn.MultiheadAttention reads"),
        (attention, "out_proj", "nn.MultiheadAttention reads"),
        (nn.ModuleDict({"block": layer}), "block.linear1", "nn.TransformerEncoderLayer reads"),
    ):
        with pytest.raises(rp.UnsupportedError, match=f"'{name}' cannot be adapted: {reason}"):
            rp.attach(model, lora([name]))
        with pytest.raises(rp.RoutedPeftError, match=f"left alone, such as .*: {reason}"):
            rp.attach(model, lora("all-linear"))


def test_the_bypass_of_transformer_encoder_layers_is_real():
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).eval().requires_grad_(False)
    layer.linear1 = rp.RoutedLoRA(layer.linear1, r=2)
    with torch.no_grad():
        layer(torch.randn(2, 3, 8))  # never asks for a condition: its linear1 was not called
    assert rp.check(layer, torch.randn(2, 3, 8)).never_ran == ["linear1"]
    layer.train()
    with pytest.raises(rp.MissingConditionError):
        layer(torch.randn(2, 3, 8))


@pytest.mark.parametrize("make", [llama, gpt2])
def test_cross_gram_on_a_causal_model_is_refused(make):
    with pytest.raises(rp.UnsupportedError, match="cannot be adapted: routing 'cross_gram' lets every token see"):
        rp.attach(make(), lora(TARGETS[make], routing="cross_gram"))
    with pytest.raises(rp.RoutedPeftError, match="left alone, such as .*: routing 'cross_gram'"):
        rp.attach(make(), lora(".*(c_attn|q_proj)", routing="cross_gram"))


def test_cross_gram_knows_the_causal_side():
    for model in (
        tf.LlamaModel(llama_config()),
        tf.BertModel(tf.BertConfig(**{**bert().config.to_dict(), "is_decoder": True})),
    ):
        with pytest.raises(rp.UnsupportedError, match="cross_gram"):
            rp.attach(model, lora(["q_proj"] if isinstance(model, tf.LlamaModel) else ["query"], routing="cross_gram"))
    for config in ({"is_decoder": True}, {"is_encoder_decoder": True}):  # models that mark no attention layer
        plain = nn.ModuleDict({"decoder": nn.ModuleDict({"q_proj": nn.Linear(8, 8)})})
        assert rp.attach(copy.deepcopy(plain), lora(["q_proj"], routing="cross_gram")).names
        plain.config = SimpleNamespace(**config)
        with pytest.raises(rp.UnsupportedError, match="cross_gram"):
            rp.attach(plain, lora(["q_proj"], routing="cross_gram"))
    assert rp.attach(bert(), lora(["query"], routing="cross_gram")).names
    assert rp.attach(vit(), lora(["q_proj"], routing="cross_gram")).names
    for make, q in ((bart, "q_proj"), (t5, "q")):
        with pytest.raises(rp.UnsupportedError, match="decoder.*cross_gram"):
            rp.attach(make(), lora([q], routing="cross_gram"))
        report = rp.attach(make(), lora(rf".*\.{q}", routing="cross_gram"))
        assert report.names and all("encoder." in name for name in report.names)
        assert report.skipped and all("decoder." in name for name in report.skipped)
    report = rp.attach(llava(), lora(r".*\.q_proj", routing="cross_gram"))
    assert report.names and all("vision_tower" in name for name in report.names)
    assert report.skipped and all("language_model" in name for name in report.skipped)


# ------------------------------------------------------------------------------------------------ modules_to_save
def test_modules_to_save_train_and_may_not_overlap():
    model = roberta_classifier()
    report = rp.attach(model, lora("all-linear", modules_to_save=["classifier"]))
    assert all(p.requires_grad for p in model.classifier.parameters())
    assert not any(name.startswith("classifier") for name in report.names)
    with pytest.raises(rp.UnsupportedError, match="'classifier.dense' cannot be adapted: it overlaps modules_to_save"):
        rp.attach(roberta_classifier(), lora(["query", "dense"], modules_to_save=["classifier"]))
    with pytest.raises(rp.UnsupportedError, match="'encoder.layer.0' cannot be adapted: it overlaps"):
        rp.attach(bert(), adapter(["layer.0"], modules_to_save=["layer.0.output.dense"]))
    with pytest.raises(
        rp.RoutedPeftError, match=r"modules_to_save=\['clasifier'\] matched no module of Roberta.*'classifier'"
    ):
        rp.attach(roberta_classifier(), lora(["query"], modules_to_save=["clasifier"]))


# ------------------------------------------------------------------------------------------------ adapters
def test_sequential_adapters_on_linear_layers_and_blocks():
    for targets in (["attention.output.dense"], ["output"]):
        model = bert()
        batch, y = batch_of(model), torch.randn(2, 3, DC)
        plain, before = run(model, batch), snapshot(model)
        exclude = ["attention.output"] if targets == ["output"] else None
        report = rp.attach(model, adapter(targets, exclude_modules=exclude))
        assert len(report.names) == 2
        assert torch.allclose(run(model, batch, y), plain, atol=1e-6)
        awaken(model)
        assert not torch.allclose(run(model, batch, y), plain, atol=1e-3)
        rp.detach(model)
        assert snapshot(model) == before


def test_placements_are_the_formulas():
    base, x, y = nn.Linear(8, 8), torch.randn(2, 5, 8), torch.randn(2, 3, DC)
    for placement in ("sequential", "parallel"):
        model = nn.ModuleDict({"f": base})
        rp.attach(model, adapter(["f"], placement=placement))
        awaken(model)
        routed = model["f"].adapter
        with torch.no_grad(), rp.condition(model, y):
            got = model["f"](x)
            if placement == "sequential":
                wanted = base(x) + run_adapter(routed, base(x), y)
            else:
                wanted = base(x) + run_adapter(routed, x, y)
        torch.testing.assert_close(got, wanted)
        assert model["f"].weight is base.weight and model["f"].bias is base.bias


def run_adapter(routed, x, y):
    """The adapter's update alone."""
    out = routed(x, y)
    return out - x if routed.residual else out


@pytest.mark.parametrize("placement", ["sequential", "parallel"])
def test_adapters_around_attention_and_mlp(placement):
    """LLaMA calls its attention by keyword, and that returns a tuple."""
    model = llama()
    batch, y = batch_of(model), torch.randn(2, 3, DC)
    plain = run(model, batch)
    report = rp.attach(model, adapter(["self_attn", "mlp"], placement=placement))
    assert len(report.names) == 4
    with rp.condition(model, y):
        assert not rp.check(model, **batch).never_ran
    assert torch.allclose(run(model, batch, y), plain, atol=1e-6)
    awaken(model)
    assert not torch.allclose(run(model, batch, y), plain, atol=1e-3)
    layer = model.model.layers[0].self_attn
    assert isinstance(layer, AdaptedModule) and layer.layer_idx == 0 and layer.adapter.d_model == D


def test_adapters_refuse_what_has_no_width_or_no_forward():
    with pytest.raises(
        rp.UnsupportedError, match="'f' cannot be adapted: placement='parallel' needs equal widths.*8.*9"
    ):
        rp.attach(nn.ModuleDict({"f": nn.Linear(8, 9)}), adapter(["f"], placement="parallel"))
    with pytest.raises(rp.UnsupportedError, match="width of its output is unknown"):
        rp.attach(nn.ModuleDict({"f": nn.LayerNorm(8)}), adapter(["f"]))
    with pytest.raises(rp.UnsupportedError, match="a ModuleList has no forward"):
        rp.attach(llama(), adapter(["layers"]))
    with pytest.raises(rp.RoutedPeftError, match="selects 'model.layers.0.mlp.up_proj' and also 'model.layers.0.mlp'"):
        rp.attach(llama(), adapter(["mlp", "up_proj"]))
    with pytest.raises(rp.RoutedPeftError, match=r"matched no module of LlamaForCausalLM"):
        rp.attach(llama(), adapter(["mpl"]))


def test_adapter_width_in_a_vision_tower():
    model = llava()
    rp.attach(model, adapter(["vision_tower.encoder.layers.0.mlp", "language_model.layers.0.mlp"]))
    assert {m.d_model for m in model.modules() if isinstance(m, rp.RoutedAdapter)} == {16, D}


def test_adapted_outputs_must_start_with_a_tensor():
    class Odd(nn.Linear):
        def forward(self, x):
            return {"x": super().forward(x)}

    model = nn.ModuleDict({"f": Odd(8, 8)})
    rp.attach(model, adapter(["f"]))
    with pytest.raises(rp.ConditionShapeError, match="RoutedAdapter 'f'.*got dict"):
        model["f"](torch.randn(1, 2, 8))
    model = llama()
    rp.attach(model, adapter(["mlp"], placement="parallel"))
    with pytest.raises(rp.ConditionShapeError, match="needs the module's input as its first argument"):
        model.model.layers[0].mlp(x=torch.randn(1, 2, D))


def test_half_precision_base_has_single_precision_adapters():
    model = llama().to(torch.bfloat16)
    rp.attach(model, adapter(["mlp"], placement="parallel"))
    awaken(model)
    assert model.model.layers[0].mlp.adapter.down.dtype == torch.float32
    assert run(model, batch_of(model), torch.randn(2, 3, DC)).dtype == torch.bfloat16


# ------------------------------------------------------------------------------------------------ check
def test_check_reports_and_restores():
    model = llava()
    rp.attach(model, lora(["layers.0.self_attn.q_proj"]))
    model.train()
    model.model.language_model.layers[1].eval()
    before, text = snapshot(model), {"input_ids": torch.randint(3, 50, (2, 5))}
    with rp.condition(model, torch.randn(2, 3, DC)):
        report = rp.check(model, **text)
    assert report.ran == ["model.language_model.layers.0.self_attn.q_proj"]
    assert report.never_ran == ["model.vision_tower.encoder.layers.0.self_attn.q_proj"]
    assert str(report) == f"1 of 2 routed layers ran; never ran: {report.never_ran[0]}"
    assert snapshot(model) == before
    with pytest.raises(rp.MissingConditionError):
        rp.check(model, **text)
    assert snapshot(model) == before


def test_check_keeps_a_replaced_forward():
    layer = rp.RoutedLoRA(nn.Linear(4, 4), r=2, missing="base")
    own = layer.forward = lambda x: x
    assert rp.check(nn.Sequential(layer), torch.randn(1, 2, 4)).ran == ["0"]
    assert layer.forward is own


def test_check_runs_without_gradients_or_dropout():
    seen = []

    class Probe(nn.Module):
        def __init__(self):
            super().__init__()
            self.f = rp.RoutedLoRA(nn.Linear(4, 4), r=2, missing="base")

        def forward(self, x):
            seen.append((torch.is_grad_enabled(), self.training))
            return self.f(x)

    assert str(rp.check(Probe(), torch.randn(1, 2, 4))) == "1 of 1 routed layers ran"
    assert seen == [(False, False)]


def test_generation_keeps_the_condition():
    model = llama(eos_token_id=None)
    rp.attach(model, lora(["q_proj", "down_proj"]))
    awaken(model)
    ids, y = torch.randint(3, 58, (2, 4)), torch.randn(2, 3, DC)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    with rp.condition(model, y):
        cached = model.generate(ids, **options)
        plain = model.generate(ids, use_cache=False, **options)
    assert torch.equal(cached, plain) and cached.shape == (2, 9)


def test_a_residual_stream_keeps_its_dtype_under_autocast():
    model = bert()
    batch, y = batch_of(model), torch.randn(2, 3, DC)
    with torch.autocast("cpu", torch.bfloat16):
        plain = run(model, batch)
        rp.attach(model, adapter(["attention.output", "1.output"]))
        adapted = run(model, batch, y)
    assert adapted.dtype == plain.dtype == torch.float32
    assert torch.equal(adapted, plain)  # up is zero


def test_a_wrapper_of_the_attached_model_is_named():
    model = bert()
    rp.attach(model, lora(["query"]))
    with pytest.raises(rp.RoutedPeftError, match="DataParallel is a wrapper of the attached model; pass its .module"):
        rp.detach(nn.DataParallel(model))
