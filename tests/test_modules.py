"""The layers: when they may compute from the base weight, what they refuse, what bake makes of them."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from tiny_models import awaken
from torch import nn
from torch.nn.utils import parametrizations
from transformers.pytorch_utils import Conv1D

import routed_peft as rp
from routed_peft.routes import ROUTES

DC = 12


def layer_of(base=None, **options):
    options = {"r": 4, "condition_features": DC, **options}
    return awaken(rp.RoutedLoRA(nn.Linear(16, 24) if base is None else base, **options))


def conv1d(inputs=16, outputs=24):
    base = Conv1D(outputs, inputs)
    nn.init.normal_(base.bias)
    return base


def update_of(layer, x, y, **more):
    """What the layer adds, from the functional form."""
    return rp.functional.routed_lora(
        x, layer.lora_A, y, layer.lora_B, layer.condition_A, routing=layer.routing, scaling=layer.scaling,
        out_slices=layer.out_slices, route_across_slices=layer.route_across_slices,
        out_features=layer.out_features, **more,
    )  # fmt: skip


class Halved(nn.Linear):
    def forward(self, x):
        return super().forward(x) / 2


# ------------------------------------------------------------------------------------------------ without a condition
@pytest.mark.parametrize("base", [nn.Linear(16, 24), Halved(16, 24)])
def test_missing_base_is_the_frozen_layer_and_touches_every_parameter(base):
    layer, x = layer_of(base, missing="base"), torch.randn(2, 5, 16)
    layer.base_layer.requires_grad_(False)
    out = layer(x)
    assert torch.equal(out, base(x))
    out.sum().backward()  # a distributed run waits for these
    assert all(p.grad is not None and not p.grad.any() for p in (layer.lora_A, layer.lora_B, layer.condition_A))
    with torch.no_grad():
        assert not layer(x).requires_grad


@pytest.mark.parametrize("routing", ROUTES)
def test_missing_lora_routes_nothing(routing):
    layer, x = layer_of(missing="lora", routing=routing, lora_alpha=6), torch.randn(2, 5, 16)
    torch.testing.assert_close(layer(x), layer.base_layer(x) + 1.5 * x @ layer.lora_A.T @ layer.lora_B.T)


def test_adapter_without_a_condition():
    x = torch.randn(2, 5, 16)
    for residual in (True, False):
        layer = awaken(rp.RoutedAdapter(16, 4, condition_features=DC, missing="base", residual=residual))
        out = layer(x)
        assert torch.equal(out, x if residual else torch.zeros_like(x))
        out.sum().backward()
        assert all(p.grad is not None for p in layer.parameters())
        layer.missing = "lora"
        z = F.gelu(F.linear(x, layer.down, layer.down_bias))
        torch.testing.assert_close(layer(x), F.linear(z, layer.up, layer.up_bias) + (x if residual else 0))
        layer.missing = "error"
        with pytest.raises(rp.MissingConditionError, match="^RoutedAdapter ran without"):
            layer(x)


def test_routing_none_needs_no_condition():
    layer, x = layer_of(routing="none"), torch.randn(2, 5, 16)
    assert layer.condition_A is None
    torch.testing.assert_close(layer(x), layer.base_layer(x) + 4 * x @ layer.lora_A.T @ layer.lora_B.T)


def test_scaling():
    assert layer_of(lora_alpha=6).scaling == 1.5
    assert layer_of(lora_alpha=6, use_rslora=True).scaling == 3.0


def test_from_features():
    layer = rp.RoutedLoRA.from_features(16, 24, bias=False, dtype=torch.float64, r=2, routing="mul")
    assert type(layer.base_layer) is nn.Linear and layer.bias is None
    assert (layer.in_features, layer.out_features, layer.r, layer.routing) == (16, 24, 2, "mul")
    assert layer.lora_A.dtype == torch.float64 and layer.lora_A.shape == (2, 16) and not layer.lora_B.any()


# ------------------------------------------------------------------------------------------------ copies
def test_deepcopy_and_state_dict():
    layer, x, y = layer_of(), torch.randn(2, 5, 16), torch.randn(2, 3, DC)
    wanted = layer(x, y)
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(x, y), wanted)
    with torch.no_grad():
        twin.lora_B.zero_()
    assert torch.equal(layer(x, y), wanted)

    state = layer.state_dict()
    assert set(state) == {"base_layer.weight", "base_layer.bias", "lora_A", "lora_B", "condition_A"}
    fresh = layer_of()
    assert not torch.equal(fresh(x, y), wanted)
    fresh.load_state_dict(state)
    assert torch.equal(fresh(x, y), wanted)


# ------------------------------------------------------------------------------------------------ what reaches the call
def adapter_of(d_c=DC, **options):
    """A RoutedAdapter with every bias awake; d_c None shares ``down``."""
    return awaken(rp.RoutedAdapter(16, 4, condition_features=d_c, **options))


def adapted(layer, x, y, **more):
    """What the layer gives, from the functional form."""
    return rp.functional.routed_adapter(
        x, y, layer.down, layer.down_bias, layer.up, layer.up_bias, layer.condition_down, layer.condition_bias,
        routing=layer.routing, activation=layer.activation, residual=layer.residual, **more,
    )  # fmt: skip


@pytest.mark.parametrize("routing", ["gram", "gram_relu", "ones"])
def test_the_scale_reaches_every_form_of_a_call(routing):
    x, y = torch.randn(2, 5, 16), torch.randn(2, 4, DC)
    layer = layer_of(routing=routing, condition_scale="none")
    adapter = adapter_of(routing=routing, condition_scale="none")
    for each, of in (
        (layer, lambda **scale: layer.base_layer(x) + update_of(layer, x, y, **scale)),
        (adapter, lambda **scale: adapted(adapter, x, y, **scale)),
    ):
        wanted = of(scale="none")
        torch.testing.assert_close(each(x, y), wanted)
        torch.testing.assert_close(each(x, each.encode_condition(y)), wanted)
        assert not torch.allclose(wanted, of(scale="tokens"), atol=1e-3)


@pytest.mark.parametrize("routing", [name for name in ROUTES if name not in ("none", "gram_reshape")])
@pytest.mark.parametrize("pool", ["auto", "none", "first"])
def test_a_shared_projection_of_an_adapter_takes_its_bias_along(routing, pool):
    tokens = 1 if pool == "none" and ROUTES[routing].state == "tokens" else 4
    x, y, mask = torch.randn(2, 1, 16), torch.randn(2, tokens, 16), torch.ones(2, tokens, dtype=torch.bool)
    mask[0, 1:] = False
    layer = adapter_of(None, routing=routing, condition_pool=pool)
    wanted = adapted(layer, x, y, pool=pool, mask=mask)
    torch.testing.assert_close(layer(x, y, mask), wanted)
    torch.testing.assert_close(layer(x, layer.encode_condition(y, mask)), wanted)
    with torch.no_grad():
        layer.down_bias.zero_()
    assert not torch.allclose(layer(x, y, mask), wanted, atol=1e-3)


@pytest.mark.parametrize("hook", [False, True])
@pytest.mark.parametrize("in_sequence", [False, True])
def test_a_layer_takes_flat_batches(in_sequence, hook):
    layer = layer_of(
        routing="gram", **(dict(condition_features=None, condition_source="in_sequence") if in_sequence else {})
    )
    if hook:
        layer.base_layer.register_forward_hook(lambda module, args, out: out * 2)
    x, y, offsets = torch.randn(8, 16), torch.randn(4, DC), torch.tensor([0, 3, 8])
    mask = torch.tensor([1, 0, 1, 0, 1, 1, 0, 1])
    if in_sequence:
        got = layer(x, None, mask, cu_seqlens=offsets)
        alone = [layer(x[None, a:b], None, mask[None, a:b]) for a, b in ((0, 3), (3, 8))]
    else:
        got = layer(x, y, cu_seqlens=offsets, condition_cu_seqlens=torch.tensor([0, 3, 4]))
        alone = [layer(x[None, a:b], y[None, c:d]) for a, b, c, d in ((0, 3, 0, 3), (3, 8, 3, 4))]
    torch.testing.assert_close(got, torch.cat([each[0] for each in alone]))


def test_the_condition_s_dropout_is_its_own():
    x, y = torch.randn(2, 5, 16), torch.randn(2, 4, DC)
    none_left = layer_of(routing="mul", lora_dropout=0.0, condition_dropout=1.0).train()
    torch.testing.assert_close(none_left(x, y), none_left.base_layer(x))
    y_alone = layer_of(routing="add", lora_dropout=1.0, condition_dropout=0.0).train()
    torch.testing.assert_close(y_alone(x, y), y_alone.base_layer(x) + update_of(y_alone, torch.zeros_like(x), y))


def test_mask_index_and_input_mask_reach_the_function():
    x, y, index = torch.randn(3, 5, 16), torch.randn(2, 4, DC), torch.tensor([1, 0, 1])
    mask, valid = torch.tensor([[1, 1, 0, 1], [0, 1, 1, 0]]), torch.rand(3, 5) > 0.3
    for routing in ("gram", "cross_gram"):
        layer, adapter = layer_of(routing=routing), adapter_of(routing=routing)
        more = dict(mask=mask, index=index, input_mask=valid)
        wanted = layer.base_layer(x) + update_of(layer, x, y, **more)
        torch.testing.assert_close(layer(x, y, mask, index, input_mask=valid), wanted)
        torch.testing.assert_close(adapter(x, y, mask, index, input_mask=valid), adapted(adapter, x, y, **more))


@pytest.mark.parametrize("init", ["kaiming", "gaussian"])
def test_initial_values(init):
    torch.manual_seed(0)
    lora = rp.RoutedLoRA(nn.Linear(400, 300), r=64, condition_features=100)
    adapter = rp.RoutedAdapter(400, 64, condition_features=100)
    for layer, up, projections in (
        (lora, [lora.lora_B], [lora.lora_A, lora.condition_A]),
        (adapter, [adapter.up, adapter.up_bias, adapter.down_bias, adapter.condition_bias],
         [adapter.down, adapter.condition_down]),
    ):  # fmt: skip
        layer.reset_parameters(init)
        assert not any(p.any() for p in up)
        for p in projections:
            bound = p.shape[1] ** -0.5  # of Kaiming's uniform distribution with a = √5
            if init == "kaiming":
                assert 0.99 * bound < p.abs().max() <= bound
            assert abs(p.std() / (bound / 3**0.5 if init == "kaiming" else 1 / 64) - 1) < 0.05


# ------------------------------------------------------------------------------------------------ bake and merge
LINEAR = [name for name, route in ROUTES.items() if route.linear]
SLICES = [(None, False), ([(0, 8), (16, 24)], False), ([(0, 8), (16, 24)], True)]


def slice_id(value):
    return "whole" if value[0] is None else "mixed" if value[1] else "slices"


@pytest.mark.parametrize("base", ["linear", "linear without bias", "conv1d"])
@pytest.mark.parametrize("routing", LINEAR)
@pytest.mark.parametrize("slices", SLICES, ids=slice_id)
def test_bake_is_the_layer(base, slices, routing):
    base = conv1d() if base == "conv1d" else nn.Linear(16, 24, bias=base == "linear")
    layer = layer_of(base, routing=routing, out_slices=slices[0], route_across_slices=slices[1]).double()
    x, y, mask = torch.randn(1, 5, 16).double(), torch.randn(1, 3, DC).double(), torch.tensor([[1, 0, 1]])
    for given in ((y, mask), (y,), (y[:, 0],)):
        baked = layer.bake(*given)
        assert type(baked) is nn.Linear and not any(p.requires_grad for p in baked.parameters())
        torch.testing.assert_close(baked(x), layer(x, *given))
    assert not torch.allclose(baked(x), layer.base_layer(x))
    if routing != "none":
        torch.testing.assert_close(layer.bake(layer.encode_condition(y, mask))(x), layer(x, y, mask))


def test_bake_casts_to_the_base_dtype():
    layer, y = layer_of(nn.Linear(16, 24, dtype=torch.bfloat16)), torch.randn(1, 3, DC)
    baked, x = layer.bake(y), torch.randn(1, 5, 16).bfloat16()
    assert baked.weight.dtype == torch.bfloat16
    torch.testing.assert_close(baked(x), layer(x, y), rtol=0.05, atol=0.1)


def test_bake_takes_no_part_in_autocast():
    layer = layer_of()
    with torch.autocast("cpu", torch.bfloat16):
        baked = layer.bake(Y[:1])
    torch.testing.assert_close(baked(X), layer(X, Y[:1].expand(2, -1, -1)))


def test_bake_refuses():
    y = torch.randn(1, 3, DC)
    for routing in (name for name, route in ROUTES.items() if not route.linear):
        with pytest.raises(rp.UnsupportedError, match=f"routing '{routing}' is not linear"):
            layer_of(routing=routing).bake(y)
    with pytest.raises(rp.ConditionShapeError, match="bake takes 1 condition, got 2"):
        layer_of().bake(torch.randn(2, 3, DC))
    with pytest.raises(rp.UnsupportedError, match="a condition per input token"):
        layer_of(routing="mul", condition_pool="none").bake(y)
    with pytest.raises(rp.UnsupportedError, match="got Halved"):
        layer_of(Halved(16, 24)).bake(y)
    layer = layer_of()
    layer.base_layer.forward = lambda x: 3 * nn.functional.linear(x, layer.base_layer.weight)
    with pytest.raises(rp.UnsupportedError, match="bake cannot take the base layer's hooks or replaced forward along"):
        layer.bake(y)


def test_merge_raises():
    text = "a routed adapter depends on the condition and has no condition-free merged weight; use bake\\(condition\\)"
    with pytest.raises(rp.UnsupportedError, match=text):
        layer_of().merge()


# ------------------------------------------------------------------------------------------------ misuse
def named(**options):
    layer = layer_of(**options)
    layer.name = "layers.0.q_proj"
    return layer


Y = torch.randn(2, 4, DC)
X = torch.randn(2, 5, 16)
NAME = "^RoutedLoRA 'layers.0.q_proj'"


@pytest.mark.parametrize("given, text", [
    ((X, torch.randn(3, 4, DC)), ": input batch 2 does not match condition batch 3$"),
    ((X, torch.randn(2, 4, 10)), rf": condition must be \[batch, tokens, {DC}\], got \(2, 4, 10\)$"),
    ((X, torch.randn(2, 1, 4, DC)), rf": condition must be \[batch, tokens, {DC}\], got \(2, 1, 4, 12\)$"),
    ((X, Y, torch.ones(2, 5, dtype=torch.bool)), r": condition mask \(2, 5\) does not match condition \(2, 4\)$"),
    ((X, Y, torch.ones(2, 4)), ": condition mask must be bool or 0/1 integers, got torch.float32$"),
    ((X, torch.randn(3, 4, DC), None, torch.tensor([0, 7])), ": condition_index 7 is out of range for 3 conditions$"),
    ((X, torch.randn(3, 4, DC), None, torch.tensor([-1, 0])), ": condition_index -1 is out of range for 3 conditions$"),
    ((X, Y, None, torch.tensor([0, 1, 1])), r": input batch 2 does not match condition_index \(3,\)$"),
    ((X, Y, None, torch.tensor([0.0, 1.0])), ": condition_index must be integers"),
    ((X, torch.randn(2, 4, DC, device="meta")), ": condition is on meta, the layer input on cpu$"),
    ((X, torch.ones(2, 4, DC, dtype=torch.int64)), ": condition must be floating point, got torch.int64$"),
    ((X, torch.ones(2, 4, DC, dtype=torch.complex64)), ": condition must be floating point, got torch.complex64$"),
    ((torch.randn(2, 5, 17), Y), r": input must be \[..., 16\], got \(2, 5, 17\)$"),
    ((torch.randn(7, 16), Y), ": 7 input rows cannot be split over condition batch 2$"),
])  # fmt: skip
@pytest.mark.parametrize("fused", [True, False])
def test_shape_errors(given, text, fused):
    layer = named()
    if not fused and given[0].shape[-1] == 16:
        layer.base_layer.register_forward_hook(lambda *args: None)
    with pytest.raises(rp.ConditionShapeError, match=NAME + text) as caught:
        layer(*given)
    assert isinstance(caught.value, ValueError) and isinstance(caught.value, rp.RoutedPeftError)


def test_shared_width_is_explained():
    with pytest.raises(rp.ConditionShapeError, match=(
        NAME + r": condition must be \[batch, tokens, 16\], got \(2, 4, 12\); condition_features=None shares lora_A, "
        "so the condition needs in_features columns$"
    )):  # fmt: skip
        named(condition_features=None)(X, Y)


def test_no_condition():
    with pytest.raises(rp.MissingConditionError) as caught:
        named()(X)
    assert str(caught.value) == (
        "RoutedLoRA 'layers.0.q_proj' ran without a condition. "
        "Wrap the call in 'with routed_peft.condition(model, y):', pass 'routed_condition=y' to the model, or attach a "
        "tap; set missing='base' to fall back to the frozen layer."
    )


def test_other_float_dtypes_are_cast():
    layer = named()
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        torch.testing.assert_close(layer(X, Y.to(dtype)), layer(X, Y.to(dtype).float()))


def test_in_sequence_takes_no_condition_and_no_state():
    layer = named(condition_features=None, condition_source="in_sequence")
    mask = torch.ones(2, 5, dtype=torch.bool)
    with pytest.raises(rp.ConditionShapeError, match=NAME + ": condition_source='in_sequence'.*pass no condition"):
        layer(X, X, mask)
    with pytest.raises(rp.UnsupportedError, match=NAME + ": an in-sequence condition is part of the input"):
        layer.encode_condition(X)
    with pytest.raises(
        rp.ConditionShapeError, match=r"in-sequence condition mask \(2, 4\) does not match input \(2, 5\)"
    ):
        layer(X, condition_mask=mask[:, :4])


def test_backends_that_cannot_serve_raise():
    with pytest.raises(
        rp.UnsupportedError, match="backend='cuda' was asked for, and the input is on cpu; use backend='auto'"
    ):
        named(backend="cuda")(X, Y)
    with pytest.raises(rp.UnsupportedError, match="backend='cpu': .*use backend='auto'"):
        named(backend="cpu", routing="gram_reshape")(X, Y)


@pytest.mark.parametrize("kind", ["lora", "shared", "adapter"])
def test_stale_states(kind):
    if kind == "adapter":
        layer, x, y = awaken(rp.RoutedAdapter(16, 4, condition_features=DC)), X, Y
        read, unread = [layer.condition_down, layer.condition_bias], [layer.down, layer.up]
    else:
        layer = layer_of(condition_features=DC if kind == "lora" else None)
        x, y = X, Y if kind == "lora" else torch.randn(2, 4, 16)
        read = [layer.condition_A if kind == "lora" else layer.lora_A]
        unread = [layer.lora_B]
    for p in unread:
        state = layer.encode_condition(y)
        with torch.no_grad():
            p.mul_(1.5)
        torch.testing.assert_close(layer(x, state), layer(x, y))
    for p in read:
        state = layer.encode_condition(y)
        with torch.no_grad():
            p.mul_(1.5)
        for stale in (state, state.to(torch.float32), state.index_select(torch.tensor([1, 0]))):
            with pytest.raises(rp.StaleStateError, match="encoded before the parameters changed; encode it again$"):
                layer(x, stale)


def test_a_state_outlives_its_parameters_and_is_still_theirs():
    """Memory, and with it the id of a Python object, goes from a parameter that is gone to the next one."""
    layer = layer_of()
    files = [{name: torch.randn_like(value) for name, value in layer.state_dict().items()} for _ in range(3)]

    def load(file):
        layer.load_state_dict({name: value.clone() for name, value in file.items()}, assign=True)

    for _ in range(20):
        load(files[0])
        with torch.no_grad():
            state = layer.encode_condition(Y)
            for file in files[1:]:
                load(file)
                with pytest.raises(rp.StaleStateError, match="other parameters"):
                    layer(X, state)
    for _ in range(20):
        with torch.no_grad():
            first = layer_of()
            state = first.encode_condition(Y)
            del first
            with pytest.raises(rp.StaleStateError, match="other parameters"):
                layer_of()(X, state)


def test_a_state_of_inference_parameters_is_of_one_layer():
    """They count no versions, but they are somebody's."""
    with torch.inference_mode():
        first, second = layer_of(), layer_of()
        state = first.encode_condition(Y)
        torch.testing.assert_close(first(X, state), first(X, Y))
        with pytest.raises(rp.StaleStateError, match="other parameters"):
            second(X, state)


def test_an_optimizer_step_counts_for_what_it_wrote():
    other, layer = layer_of(), layer_of()
    layer.condition_A.requires_grad_(False)
    optimizer = torch.optim.AdamW([*other.parameters(), *layer.parameters()], lr=0.1, fused=True)
    state, wanted = layer.encode_condition(Y).to(torch.float32), layer(X, Y).detach()
    first, second = other(X, Y).sum(), layer(X, Y).sum()
    first.backward()
    optimizer.step()
    second.backward()  # none of its parameters had a gradient, so none was written
    torch.testing.assert_close(layer(X, state), wanted)
    optimizer.step()
    with torch.no_grad():
        torch.testing.assert_close(layer(X, state), layer(X, Y))  # of a frozen projection
    state = other.encode_condition(Y)
    optimizer.step()  # its gradient is still there
    with pytest.raises(rp.StaleStateError, match="before the parameters changed"):
        other(X, state)


def test_parameters_that_were_encoded_with_can_be_swapped():
    layer = layer_of()
    with torch.no_grad():  # a graph would hold on to them
        state = layer.encode_condition(Y)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        layer.double()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    with pytest.raises(rp.StaleStateError):
        layer(X.double(), state)
    files = [{name: torch.randn_like(value) for name, value in layer.state_dict().items()} for _ in range(2)]
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        with torch.no_grad():
            layer.load_state_dict(files[0], assign=True)
            state = layer.encode_condition(Y.double())
            torch.testing.assert_close(layer(X.double(), state), layer(X.double(), Y.double()))
            layer.load_state_dict(files[1], assign=True)  # the same object, and no version of it was ever counted
            with pytest.raises(rp.StaleStateError, match="before the parameters changed"):
                layer(X.double(), state)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def test_a_parametrised_projection_has_no_state():
    layer = layer_of()
    parametrizations.weight_norm(layer, "condition_A")
    with pytest.raises(rp.UnsupportedError, match="parametrised .* pass the condition with each call"):
        layer.encode_condition(Y)
    torch.testing.assert_close(layer.bake(Y[:1])(X), layer(X, Y[:1].expand(2, -1, -1)))
    adapter = awaken(rp.RoutedAdapter(16, 4, condition_features=DC))
    parametrizations.weight_norm(adapter, "condition_down")
    with pytest.raises(rp.UnsupportedError, match="parametrised"):
        adapter.encode_condition(Y)
    with pytest.raises(TypeError, match="condition must be a Tensor or a ConditionState, got NoneType"):
        layer.bake(None)


def test_a_pickled_state_is_no_layer_s():
    layer = layer_of()
    with torch.no_grad():
        state = layer.encode_condition(Y)
    assert layer(X, copy.copy(state)).shape == layer(X, copy.deepcopy(state)).shape
    moved = pickle.loads(pickle.dumps(state))
    assert torch.equal(moved.tensor, state.tensor) and "versions" not in repr(state)
    with pytest.raises(rp.StaleStateError, match="other parameters"):
        layer(X, moved)


def test_a_stale_state_cannot_be_baked():
    layer = layer_of()
    state = layer.encode_condition(Y[:1])
    with torch.no_grad():
        layer.condition_A.mul_(2)
    with pytest.raises(rp.StaleStateError):
        layer.bake(state)


def test_the_state_of_another_layer_is_refused():
    first, second = named(), named()
    state = first.encode_condition(Y)
    for call in (lambda: second(X, state), lambda: copy.deepcopy(first)(X, state)):
        with pytest.raises(rp.StaleStateError, match=NAME + ": this ConditionState was encoded with other parameters"):
            call()
    with rp.condition(second, state), pytest.raises(rp.StaleStateError, match="other parameters"):
        second(X)
    second.routing = "mul"  # which it would be refused for as well
    for call in (lambda: second(X, state), lambda: second.bake(state.index_select(torch.tensor([0])))):
        with pytest.raises(rp.StaleStateError, match="other parameters"):
            call()
    with pytest.raises(rp.ConditionShapeError, match="the ConditionState is for routing 'gram', not 'mul'"):
        first.routing = "mul"
        first(X, state)


def test_a_state_already_has_its_mask():
    layer = named()
    with pytest.raises(rp.ConditionShapeError, match="already has its mask"):
        layer(X, layer.encode_condition(Y), torch.ones(2, 4, dtype=torch.bool))


@pytest.mark.parametrize("options, text", [
    ({"r": 0}, "r must be a positive integer"),
    ({"routing": "grram"}, "routing must be one of"),
    ({"condition_source": "x"}, "condition_source must be one of"),
    ({"condition_pool": "max"}, "condition_pool must be one of"),
    ({"condition_scale": "x"}, "condition_scale must be one of"),
    ({"missing": "x"}, "missing must be one of"),
    ({"backend": "x"}, "backend must be one of"),
    ({"lora_dropout": 2.0}, "lora_dropout must lie in"),
    ({"condition_dropout": -1.0}, "condition_dropout must lie in"),
    ({"out_slices": [(0, 25)]}, "out_slices"),
    ({"out_slices": [(4, 4)]}, "out_slices"),
    ({"condition_source": "in_sequence"}, "condition_features must be None"),
])  # fmt: skip
def test_options_out_of_range(options, text):
    with pytest.raises(ValueError, match=text):
        layer_of(**options)


def test_dropout_is_for_training_and_independent():
    layer = layer_of(lora_dropout=0.5).eval()
    assert torch.equal(layer(X, Y), layer(X, Y))
    layer.train()
    torch.manual_seed(1)
    a, b = layer(X, Y), layer(X, Y)
    torch.manual_seed(1)
    assert torch.equal(layer(X, Y), a) and not torch.equal(a, b)
    full = layer_of(lora_dropout=1.0, condition_dropout=0.0).train()
    torch.testing.assert_close(full(X, Y), full.base_layer(X))


def test_every_route_reads_the_condition():
    for routing in ROUTES:
        layer = layer_of(routing=routing)
        same = torch.allclose(layer(X, Y), layer(X, torch.randn_like(Y)))
        assert same == (routing == "none"), routing
