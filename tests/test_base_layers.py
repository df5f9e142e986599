"""When a layer may compute from its base's weight, and when it has to call it."""

import copy
import functools
import warnings

import pytest
import torch
import torch.nn.functional as F
from test_modules import DC, Halved, conv1d, layer_of, update_of
from tiny_models import batch_of, t5
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import routed_peft as rp
from routed_peft.base_layers import may_read_weight, parameter_options


# ------------------------------------------------------------------------------------------------ reading base.weight
class Tagged(torch.Tensor):
    """A tensor subclass, as quantisation libraries use for weights."""


def forward_hook(base):
    base.register_forward_hook(lambda module, inputs, out: out * 2)


def forward_pre_hook(base):
    base.register_forward_pre_hook(lambda module, inputs: (inputs[0] + 1,))


def backward_hook(base):
    base.register_full_backward_hook(lambda module, grad_in, grad_out: None)


def backward_pre_hook(base):
    base.register_full_backward_pre_hook(lambda module, grad_out: None)


def replaced_forward(base):
    base.forward = lambda x: F.linear(x, base.weight) * 3


def parametrised(base):
    parametrize.register_parametrization(base, "weight", nn.Tanh())


def weight_norm(base):
    parametrizations.weight_norm(base)


def hooked_weight(base):
    """The old weight norm: the weight is a plain attribute that a hook computes."""
    weight = base.weight.detach()
    del base.weight
    base.weight = weight * 2


def tensor_subclass(base):
    base.weight = nn.Parameter(base.weight.detach().as_subclass(Tagged))


def sparse(base):
    base.weight = nn.Parameter(base.weight.detach().to_sparse_csr())


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.parametrize("change", [
    forward_hook, forward_pre_hook, backward_hook, backward_pre_hook, replaced_forward, parametrised, weight_norm,
    hooked_weight, tensor_subclass, sparse,
])  # fmt: skip
def test_a_changed_base_layer_is_called(change):
    layer, x, y = layer_of(), torch.randn(2, 5, 16), torch.randn(2, 3, DC)
    assert may_read_weight(layer.base_layer, x)
    change(layer.base_layer)
    assert not may_read_weight(layer.base_layer, x)
    with torch.no_grad():
        torch.testing.assert_close(
            torch.Tensor(layer(x, y)), torch.Tensor(layer.base_layer(x) + update_of(layer, x, y))
        )


@pytest.mark.parametrize(
    "base", [Halved(16, 24), nn.utils.skip_init(nn.modules.linear.NonDynamicallyQuantizableLinear, 16, 24)]
)
def test_a_subclass_is_called(base):
    nn.init.normal_(base.weight), nn.init.normal_(base.bias)
    layer, x, y = layer_of(base), torch.randn(2, 5, 16), torch.randn(2, 3, DC)
    assert not may_read_weight(base, x)
    torch.testing.assert_close(layer(x, y), base(x) + update_of(layer, x, y))


@pytest.mark.parametrize("register", [
    nn.modules.module.register_module_forward_hook, nn.modules.module.register_module_forward_pre_hook,
    nn.modules.module.register_module_full_backward_hook, nn.modules.module.register_module_full_backward_pre_hook,
])  # fmt: skip
def test_a_global_hook_sees_the_base_layer(register):
    layer, x, y = layer_of(), torch.randn(2, 5, 16, requires_grad=True), torch.randn(2, 3, DC)
    seen = []
    handle = register(lambda module, *more: seen.append(module))
    try:
        assert not may_read_weight(layer.base_layer, x)
        out = layer(x, y)
        out.sum().backward()
    finally:
        handle.remove()
    assert layer.base_layer in seen
    torch.testing.assert_close(out, layer.base_layer(x) + update_of(layer, x, y))
    assert may_read_weight(layer.base_layer, x)


def test_a_class_wide_forward_is_called(monkeypatch):
    layer, x, y = layer_of(), torch.randn(2, 5, 16), torch.randn(2, 3, DC)
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: F.linear(x, self.weight) * 3)
    assert not may_read_weight(layer.base_layer, x)
    torch.testing.assert_close(layer(x, y), layer.base_layer(x) + update_of(layer, x, y))


def test_a_class_wide_forward_of_conv1d_is_called(monkeypatch):
    base = conv1d()
    layer, x, y, own = layer_of(base), torch.randn(2, 5, 16), torch.randn(2, 3, DC), type(base).forward
    assert may_read_weight(base, x)
    monkeypatch.setattr(type(base), "forward", functools.wraps(own)(lambda self, x: own(self, x) * 3))
    assert not may_read_weight(base, x)
    torch.testing.assert_close(layer(x, y), base(x) + update_of(layer, x, y))
    with pytest.raises(rp.UnsupportedError, match="replaced forward"):
        layer.bake(y[:1])


def test_another_dtype_is_the_base_layer_s_business():
    layer, x, y = layer_of(nn.Linear(16, 24).double()), torch.randn(2, 5, 16), torch.randn(2, 3, DC)
    assert not may_read_weight(layer.base_layer, x)
    with pytest.raises(RuntimeError, match="dtype"):  # as base_layer(x) alone
        layer(x, y)
    layer.base_layer.forward = lambda x: F.linear(x.double(), layer.base_layer.weight, layer.base_layer.bias).float()
    torch.testing.assert_close(layer(x, y), layer.base_layer(x) + update_of(layer, x, y))


@pytest.mark.parametrize("which", ["auto", "reference"])
def test_shapes_on_the_meta_device(which):
    layer = layer_of(backend=which).to("meta")
    x, y = torch.randn(2, 5, 16, device="meta"), torch.randn(2, 4, DC, device="meta")
    assert layer(x, y).shape == (2, 5, 24) and layer.encode_condition(y).tensor.shape == (2, 4, 4)


def test_another_device_is_the_base_layer_s_business():
    layer = layer_of()
    assert not may_read_weight(layer.base_layer, torch.randn(2, 5, 16, device="meta"))
    layer.base_layer.to("meta")
    assert not may_read_weight(layer.base_layer, torch.randn(2, 5, 16))
    assert not may_read_weight(layer.base_layer, torch.randn(2, 5, 16, device="meta"))


@pytest.mark.parametrize("base", [nn.Linear(16, 24), conv1d()])
def test_autocast_is_the_base_layer_s_business(base):
    layer, x, y = layer_of(base), torch.randn(2, 5, 16), torch.randn(2, 3, DC)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert not may_read_weight(base, x)
        out = layer(x, y)
        assert out.dtype == torch.bfloat16
        update = update_of(layer, x, y)  # rounded, which the layer's own is not before the sum
        atol = update.abs().max().item() * torch.finfo(torch.bfloat16).eps
        torch.testing.assert_close(out, base(x) + update, rtol=1.6e-2, atol=atol)
    assert may_read_weight(base, x)


@pytest.mark.parametrize("base", [nn.Linear(16, 24), nn.Linear(16, 24, bias=False), conv1d()])
def test_both_paths_agree(base):
    # float64: the base is drawn before any seed, and float32 may round the two paths apart for an unlucky one
    base, double = copy.deepcopy(base).double(), dict(dtype=torch.float64)
    layer, x, y = layer_of(base).double(), torch.randn(2, 5, 16, **double), torch.randn(2, 3, DC, **double)
    assert may_read_weight(base, x)
    fused = layer(x, y)
    fused.square().sum().backward()
    got = [p.grad.clone() for p in layer.parameters()]
    layer.zero_grad()
    base.register_forward_hook(lambda module, inputs, out: None)
    called = layer(x, y)
    called.square().sum().backward()
    torch.testing.assert_close(called, fused)
    torch.testing.assert_close([p.grad for p in layer.parameters()], got)


def test_the_base_output_is_not_written_to():
    kept = []
    layer, x, y = layer_of(), torch.randn(2, 5, 16), torch.randn(2, 3, DC)
    layer.base_layer.register_forward_hook(lambda module, inputs, out: kept.append((out, out.clone())))
    layer(x, y)
    assert torch.equal(*kept[0])


def test_quantised_layers_need_only_their_sizes():
    class Quantised(nn.Module):
        def __init__(self):
            super().__init__()
            self.in_features, self.out_features = 16, 24
            self.register_buffer("packed", torch.randint(-128, 127, (24, 16), dtype=torch.int8))

        def forward(self, x):
            return F.linear(x, self.packed.to(x.dtype) / 64)

    layer, x, y = layer_of(Quantised()), torch.randn(2, 5, 16), torch.randn(2, 3, DC)
    assert layer.lora_A.dtype == torch.float32
    torch.testing.assert_close(layer(x, y), layer.base_layer(x) + update_of(layer, x, y))
    with pytest.raises(rp.UnsupportedError, match="bake needs a dense nn.Linear or Conv1D base, got Quantised"):
        layer.bake(y[:1])
    with pytest.raises(TypeError, match="in_features and out_features, got LayerNorm"):
        rp.RoutedLoRA(nn.LayerNorm(4))


def test_a_base_that_loses_the_gradient_is_told():
    class ForInference(nn.Linear):
        def forward(self, x):
            with torch.no_grad():
                return super().forward(x)

    layer, x, y = layer_of(ForInference(16, 24)), torch.randn(2, 5, 16), torch.randn(2, 3, DC)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(x, y)  # nothing comes before it
        with torch.no_grad():
            layer(x.requires_grad_(), y)
        layer_of(nn.Linear(16, 24))(x, y)
    with pytest.warns(UserWarning, match="RoutedLoRA: the base layer gives its input no gradient"):
        layer(x, y)


@pytest.mark.parametrize("dtype, wanted", [
    (torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float64, torch.float64),
])  # fmt: skip
def test_parameter_dtypes(dtype, wanted):
    base = nn.Linear(16, 24, dtype=dtype)
    assert parameter_options(base)["dtype"] == wanted
    layer, y = layer_of(base), torch.randn(2, 3, DC)
    assert {p.dtype for p in (layer.lora_A, layer.lora_B, layer.condition_A)} == {wanted}
    out = layer(torch.randn(2, 5, 16, dtype=dtype), y)
    assert out.dtype == dtype
    out.sum().backward()
    assert layer.lora_A.grad.dtype == wanted


def test_t5_reads_the_weight_of_wo():
    model = t5()
    rp.attach(model, rp.RoutedLoRAConfig(target_modules=["wo"], r=4, condition_features=DC))
    for layer in (m for m in model.modules() if isinstance(m, rp.RoutedLoRA)):
        assert layer.weight is layer.base_layer.weight and layer.bias is layer.base_layer.bias
    with rp.condition(model, torch.randn(2, 3, DC)):
        assert len(rp.check(model, **batch_of(model)).ran) == 2
