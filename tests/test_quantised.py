"""Quantised base layers of bitsandbytes and torchao, as transformers loads them, on the CPU."""

import pytest
import torch
import transformers as tf
from tiny_models import awaken, llama

import routed_peft as rp

DC = 12
# 64: what bitsandbytes quantises to 4 bits by blocks of
SIZES = {"hidden_size": 64, "intermediate_size": 128}
KINDS = ["bitsandbytes 8 bit", "bitsandbytes 4 bit", "torchao weights", "torchao weights and activations"]

# what the libraries say when they are imported or used
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{text}")
    for text in (".*inputs will be cast", ".*Enum subclass", ".*_check_is_size", ".*torch.jit", ".*TypedStorage")
]


def quantisation(kind):
    """The config that transformers quantises by, and the class of the layer or of its weight."""
    if kind.startswith("bitsandbytes"):
        pytest.importorskip("bitsandbytes")
        if "8 bit" in kind:
            return tf.BitsAndBytesConfig(load_in_8bit=True), "Linear8bitLt"
        return tf.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32), "Linear4bit"
    torchao = pytest.importorskip("torchao.quantization")
    if "activations" in kind:
        return tf.TorchAoConfig(torchao.Int8DynamicActivationInt8WeightConfig()), "Int8Tensor"
    return tf.TorchAoConfig(torchao.Int8WeightOnlyConfig()), "Int8Tensor"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A directory with a model's weights."""
    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    llama(**SIZES).save_pretrained(path)
    return path


def loaded(saved, kind):
    """The model, and the name that its layers or their weights go by."""
    config, name = quantisation(kind)
    model = tf.AutoModelForCausalLM.from_pretrained(
        saved, quantization_config=config, dtype=torch.float32, device_map="cpu"
    )
    # In eval mode bitsandbytes packs 4-bit weights for some CPUs in a form that, for good, has no gradient.
    return model.train(), name


CONFIG = rp.RoutedLoRAConfig(target_modules="all-linear", r=4, condition_features=DC)


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_model_is_attached_saved_loaded_and_generates(kind, saved, tmp_path):
    model, name = loaded(saved, kind)
    ids, y = torch.randint(3, 50, (2, 5)), torch.randn(2, 3, DC)
    with torch.no_grad():
        plain = model(ids).logits
        assert len(rp.attach(model, CONFIG).names) == 14
        assert torch.equal(model(ids, routed_condition=y).logits, plain)  # the update starts at zero
        awaken(model)
        for layer in model.modules():
            if isinstance(layer, rp.RoutedLoRA):
                assert name in (type(layer.base_layer).__name__, type(layer.weight).__name__)
                assert layer.lora_A.dtype == layer.lora_B.dtype == torch.float32
                x = torch.randn(2, 5, layer.in_features)
                update = rp.functional.routed_lora(
                    x, layer.lora_A, y, layer.lora_B, layer.condition_A, routing="gram", scaling=layer.scaling
                )
                torch.testing.assert_close(layer(x, y), layer.base_layer(x) + update)
                with pytest.raises(rp.UnsupportedError, match="bake needs a dense nn.Linear or Conv1D base"):
                    layer.bake(y[:1])
        want = model(ids, routed_condition=y).logits
        rp.save_adapter(model, tmp_path)
        rp.detach(model)
        assert torch.equal(model(ids).logits, plain)
        rp.load_adapter(model, tmp_path)
        assert torch.equal(model(ids, routed_condition=y).logits, want)
    model.eval()
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    assert model.generate(ids, routed_condition=y, **options).shape == (2, 8)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "activations" not in kind])  # those are for inference
def test_a_quantised_model_trains(kind, saved):
    model, _ = loaded(saved, kind)
    rp.attach(model, CONFIG)
    awaken(model)
    ids, y = torch.randint(3, 50, (2, 5)), torch.randn(2, 3, DC)
    layer, x = model.model.layers[0].self_attn.q_proj, torch.randn(2, 5, 64, requires_grad=True)
    update = rp.functional.routed_lora(
        x, layer.lora_A, y, layer.lora_B, layer.condition_A, routing="gram", scaling=layer.scaling
    )
    (gradient,) = torch.autograd.grad(layer(x, y).square().sum(), x)
    (wanted,) = torch.autograd.grad((layer.base_layer(x) + update).square().sum(), x)
    torch.testing.assert_close(gradient, wanted)
    (base,) = torch.autograd.grad(layer.base_layer(x).square().sum(), x)
    assert base.norm() > 0  # it has its share
    losses = []
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(4):
        loss = model(ids, labels=ids, routed_condition=y).loss
        loss.backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
