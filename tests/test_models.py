"""Every model family: attach, run, train, save, load, detach; with the condition by tap where there is one."""

import copy

import pytest
import torch
import transformers as tf
from tiny_models import (
    D,
    ast,
    awaken,
    bart,
    batch_of,
    blip2,
    clip,
    dual_encoder,
    gpt2,
    gradients,
    llama,
    llava,
    output_of,
    paligemma,
    qwen2_vl,
    roberta_classifier,
    t5,
    vit,
)

import routed_peft as rp

DC = 12
# targets of a LoRA; a block for an Adapter; width of the tapped condition, None where it is given
MODELS = {
    llava: (["q_proj", "v_proj"], r".*language_model.*\.mlp", D),
    qwen2_vl: (["q_proj", "v_proj"], r".*language_model.*\.mlp", D),
    paligemma: (["q_proj", "v_proj"], r".*language_model.*\.mlp", D),
    blip2: (["language_model.model.decoder.layers.0.self_attn.q_proj", "fc1"], r"language_model.*\.self_attn", D),
    bart: (["q_proj", "fc1"], r".*decoder.*\.self_attn", D),
    t5: (["q", "wi"], r"decoder.*\.DenseReluDense", D),
    dual_encoder: (["query", "output.dense"], r"text_model.*\.attention", 16),
    clip: (["q_proj", "fc1"], r"text_model.*\.mlp", 16),
    roberta_classifier: (["query", "value"], r".*layer\.\d\.attention", None),
    gpt2: (["c_attn", "c_fc"], r".*h\.\d\.mlp", None),
    llama: (["q_proj", "v_proj"], r".*layers\.\d\.mlp", None),
    # whose layers have other names in transformers 5.0
    vit: (r".*\.(q_proj|query|fc1|intermediate\.dense)", r".*(layers\.\d\.mlp|layer\.\d\.attention)", None),
    ast: (r".*\.(q_proj|query|fc1|intermediate\.dense)", r".*(layers\.\d\.mlp|layer\.\d\.attention)", None),
}


def configs(make):
    targets, blocks, width = MODELS[make]
    shared = {"r": 4, "condition_features": width or DC, "tap": "auto" if width else None}
    return {
        "lora": rp.RoutedLoRAConfig(target_modules=targets, **shared),
        "all-linear": rp.RoutedLoRAConfig(target_modules="all-linear", **shared),
        "sequential": rp.RoutedAdapterConfig(target_modules=blocks, **shared),
        "parallel": rp.RoutedAdapterConfig(target_modules=blocks, placement="parallel", **shared),
    }


def call(model, batch, y):
    out = model(**batch, **({} if y is None else {"routed_condition": y}))
    return output_of(out)


@pytest.mark.parametrize("kind", ["lora", "all-linear", "sequential", "parallel"])
@pytest.mark.parametrize("make", MODELS)
def test_attach_run_train_save_load_detach(make, kind, tmp_path):
    model, config = make(), configs(make)[kind]
    batch = batch_of(model)
    y = None if config.tap else torch.randn(2, 3, DC)
    with torch.no_grad():
        plain = output_of(model(**batch))
    report = rp.attach(model, config)
    with torch.no_grad():
        torch.testing.assert_close(call(model, batch, y), plain, rtol=1e-4, atol=1e-5)  # up-projections are zero
    given = {} if y is None else {"routed_condition": y}
    checked = rp.check(model, **batch, **given)
    assert checked.ran == report.names and not checked.never_ran

    awaken(model)
    call(model, batch, y).float().square().mean().backward()
    assert set(gradients(model)) == {name for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    with torch.no_grad():
        want = call(model, batch, y)
        assert not torch.allclose(want, plain, rtol=0, atol=1e-5)
    rp.save_adapter(model, tmp_path)

    rp.detach(model)
    with torch.no_grad():
        assert torch.equal(output_of(model(**batch)), plain)
        assert rp.load_adapter(model, tmp_path) == report
        assert torch.equal(call(model, batch, y), want)


@pytest.mark.parametrize("make", [make for make in MODELS if MODELS[make][2]])
def test_all_linear_with_a_tap_is_the_side_that_the_condition_is_for(make):
    report = rp.attach(make(), configs(make)["all-linear"])
    sides = {bart: "model.decoder.", t5: "decoder.", dual_encoder: "text_", clip: "text_"}
    assert all(sides.get(make, "language_model.") in name for name in report.names), report.names
    assert not any(part in name for name in report.names for part in ("lm_head", "vision", "visual", "projector"))


def test_a_fused_qkv_of_a_vision_tower_by_slices():
    model = qwen2_vl()
    config = rp.RoutedLoRAConfig(
        target_modules=["attn.qkv"], r=4, condition_features=DC, out_slices=[(0, 16), (32, 48)],
    )  # fmt: skip
    report = rp.attach(model, config)
    assert report.names == ["model.visual.blocks.0.attn.qkv"]
    awaken(model)
    layer = model.get_submodule(report.names[0])
    x, y = torch.randn(2, 5, 16), torch.randn(2, 3, DC)
    change = layer(x, y) - layer.base_layer(x)
    assert change[..., 16:32].abs().max() < 1e-6 < change[..., :16].abs().max()


def test_layers_of_two_dimensional_inputs_know_their_samples():
    """OPT's fc1 is called with [B·N, D]."""
    model = blip2()
    rp.attach(model, rp.RoutedLoRAConfig(target_modules=["fc1"], r=4, condition_features=DC))
    awaken(model)
    batch, y = batch_of(model), torch.randn(2, 3, DC)
    seen = []
    fc1 = model.language_model.model.decoder.layers[0].fc1
    fc1.register_forward_pre_hook(lambda module, args: seen.append(args[0].dim()))
    with torch.no_grad():
        both = model(**batch, routed_condition=y).logits
        second = model(**{k: v[1:] for k, v in batch.items()}, routed_condition=y[1:]).logits
    assert seen == [2, 2]
    torch.testing.assert_close(both[1:], second, rtol=1e-4, atol=1e-5)


def test_generate_and_trainer_find_the_keyword_in_the_signature():
    """What Trainer drops, and what generate refuses, is what the signature of forward lacks."""
    import inspect

    model = roberta_classifier()
    rp.attach(model, configs(roberta_classifier)["lora"])
    assert {"routed_condition", "routed_condition_mask", "labels"} <= set(inspect.signature(model.forward).parameters)
    with pytest.raises(ValueError, match="not used by the model.*nonsense"):
        generator = gpt2()
        rp.attach(generator, configs(gpt2)["lora"])
        generator.generate(**batch_of(generator), nonsense=1)


def test_a_projector_trained_along_is_saved_and_its_gradient_takes_both_ways(tmp_path):
    torch.manual_seed(1)
    base = llava()
    model, twin = base, copy.deepcopy(base)
    config = rp.RoutedLoRAConfig(
        target_modules=r".*\.(q_proj|down_proj)", r=4, condition_features=D, tap="auto", rank_pattern={"down_proj": 2},
        modules_to_save=["multi_modal_projector"],
    )  # fmt: skip
    report = rp.attach(awaken(model), config)
    awaken(model)
    assert all("language_model" in name for name in report.names)
    batch = batch_of(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(3):
        loss = model(**batch, labels=batch["input_ids"]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[0]
    weight = model.model.multi_modal_projector.linear_2.weight
    assert not torch.equal(weight, twin.model.multi_modal_projector.linear_2.weight)
    rp.save_adapter(model, tmp_path)
    rp.load_adapter(twin, tmp_path)
    with torch.no_grad():
        assert torch.equal(output_of(model(**batch)), output_of(twin(**batch)))
    with pytest.raises(rp.AdapterFileError, match="does not fit this 'paligemma' model.*the file lacks"):
        rp.load_adapter(paligemma(), tmp_path)


def test_labels_and_the_loss_pass_through():
    model = llava()
    rp.attach(model, configs(llava)["lora"])
    awaken(model)
    batch = batch_of(model)
    out = model(**batch, labels=batch["input_ids"])
    out.loss.backward()
    assert isinstance(out, tf.modeling_outputs.ModelOutput) and out.loss.isfinite()
    assert len(gradients(model)) == 3 * len(model._routed_peft.report.names)


def test_an_encoder_attached_by_itself_is_a_model_like_others():
    model = bart().model.encoder
    rp.attach(model, rp.RoutedLoRAConfig(target_modules=["q_proj"], r=4, condition_features=DC))
    awaken(model)
    ids, y = torch.randint(3, 50, (2, 5)), torch.randn(2, 3, DC)
    with torch.no_grad(), rp.condition(model, y):
        want = output_of(model(ids))
    with torch.no_grad():
        assert torch.equal(output_of(model(ids, routed_condition=y)), want)


def test_trainer_goes_on_from_its_own_checkpoint(tmp_path):
    """As docs/training.md says: of a model that is built and attached in the same way."""
    pytest.importorskip("accelerate")
    start = llama().state_dict()
    torch.manual_seed(1)
    ids, y = torch.randint(3, 50, (8, 6)), torch.randn(8, 3, DC)
    data = [{"input_ids": i, "labels": i, "routed_condition": c} for i, c in zip(ids, y, strict=True)]

    def train(folder, steps, resume=None):
        """The losses, and what was trained."""
        model = llama()
        model.load_state_dict(start)
        torch.manual_seed(2)
        rp.attach(model, rp.RoutedLoRAConfig(target_modules=["q_proj", "down_proj"], r=4, condition_features=DC))
        arguments = tf.TrainingArguments(
            str(folder), max_steps=steps, save_steps=2, logging_steps=1, per_device_train_batch_size=2, use_cpu=True,
            learning_rate=0.1, lr_scheduler_type="constant", report_to=[], disable_tqdm=True, seed=3,
        )  # fmt: skip
        trainer = tf.Trainer(model, arguments, train_dataset=data)
        trainer.train(resume_from_checkpoint=resume)
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        return losses, {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    losses, wanted = train(tmp_path / "whole", 4)
    train(tmp_path / "parts", 2)
    again, got = train(tmp_path / "parts", 4, resume=str(tmp_path / "parts" / "checkpoint-2"))
    assert again == losses and len({*losses}) == 4
    for name, value in wanted.items():
        torch.testing.assert_close(got[name], value)
        assert value.any(), name
