"""Conditions reach the layers, and each recomputation sees the condition of its own forward."""

import copy
import io
import pickle
import threading

import pytest
import torch
import torch.utils.checkpoint
from tiny_models import awaken, batch_of, bert, gradients, llama, output_of
from torch import nn

import routed_peft as rp
from routed_peft.delivery import BoundCheckpoint, Delivered, Slot

pytestmark = pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable.:FutureWarning")

DC = 12


class Twice(nn.Module):
    """Two routed layers put in by hand."""

    def __init__(self, **options):
        super().__init__()
        self.first = rp.RoutedLoRA.from_features(8, 8, r=2, condition_features=DC, backend="reference", **options)
        self.second = rp.RoutedLoRA.from_features(8, 8, r=2, condition_features=DC, backend="reference", **options)

    def forward(self, x):
        return self.second(self.first(x).tanh())


def twice(**options):
    return awaken(Twice(**options))


def expected(model, x, y, mask=None):
    return model.second(model.first(x, y, mask).tanh(), y, mask)


def attached(make=llama, **options):
    model = make()
    targets = ["q_proj", "down_proj"] if make is llama else ["query", "value"]
    rp.attach(model, rp.RoutedLoRAConfig(target_modules=targets, r=4, condition_features=DC, **options))
    return awaken(model)


def in_thread(function):
    """Run ``function`` in another thread; its result, or its exception raised here."""
    result = []

    def run():
        try:
            result.append((function(), None))
        except Exception as error:
            result.append((None, error))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    value, error = result[0]
    if error is not None:
        raise error
    return value


# ------------------------------------------------------------------------------------------------ the context manager
def test_layers_put_in_by_hand_get_the_condition():
    model, x, y = twice(), torch.randn(2, 3, 8), torch.randn(2, 4, DC)
    with rp.condition(model, y):
        assert torch.equal(model(x), expected(model, x, y))
    assert model.first.slot is model.second.slot


def test_layers_added_later_share_the_slot():
    model, x, y = twice(), torch.randn(2, 3, 8), torch.randn(2, 4, DC)
    with rp.condition(model, y):
        model(x)
    slot = model.first.slot
    model.second = awaken(rp.RoutedLoRA.from_features(8, 8, r=2, condition_features=DC))
    with rp.condition(model, y):
        assert torch.equal(model(x), expected(model, x, y))
    assert model.second.slot is slot and model.first.slot is slot


def test_all_arguments_arrive():
    model, x, y = twice(routing="cross_gram"), torch.randn(3, 3, 8), torch.randn(2, 4, DC)
    mask, index = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0]]), torch.tensor([1, 0, 1])
    valid = torch.tensor([[1, 1, 0]] * 3)
    with rp.condition(model, y, mask, index=index, input_mask=valid):
        got = model(x)
    h = model.first(x, y, mask, index, input_mask=valid).tanh()
    assert torch.equal(got, model.second(h, y, mask, index, input_mask=valid))
    assert not torch.allclose(got, model.second(model.first(x, y, mask, index).tanh(), y, mask, index))


def test_nesting_restores_and_exceptions_clear():
    model, x = twice(), torch.randn(2, 3, 8)
    y1, y2 = torch.randn(2, 4, DC), torch.randn(2, 1, DC)
    with rp.condition(model, y1):
        with rp.condition(model, y2):
            assert torch.equal(model(x), expected(model, x, y2))
        assert torch.equal(model(x), expected(model, x, y1))
        with pytest.raises(KeyError), rp.condition(model, y2):
            raise KeyError
        assert torch.equal(model(x), expected(model, x, y1))
    with pytest.raises(rp.MissingConditionError):
        model(x)


def test_none_hides_the_outer_condition():
    model, x = twice(missing="base"), torch.randn(2, 3, 8)
    with rp.condition(model, torch.randn(2, 4, DC)), rp.condition(model, None):
        assert torch.equal(model(x), model.second.base_layer(model.first.base_layer(x).tanh()))


def test_in_sequence_layers_take_only_the_mask():
    layer = awaken(rp.RoutedLoRA.from_features(8, 8, r=2, condition_source="in_sequence"))
    x, mask = torch.randn(2, 5, 8), torch.tensor([[1, 1, 0, 0, 0], [0, 1, 1, 1, 0]])
    with rp.condition(layer, None, mask):
        got = layer(x)
    assert torch.equal(got, layer(x, condition_mask=mask))
    with rp.condition(layer, None), pytest.raises(rp.MissingConditionError):
        layer(x)


def test_condition_needs_a_routed_layer_and_a_condition():
    with (
        pytest.raises(rp.RoutedPeftError, match="Linear holds no routed layer.*attach"),
        rp.condition(nn.Linear(2, 2), torch.randn(1, 2)),
    ):
        pass
    with pytest.raises(TypeError, match="a Tensor, a ConditionState or None, got list"), rp.condition(twice(), [1.0]):
        pass


def test_each_thread_has_its_own_condition():
    model, x = twice(), torch.randn(2, 3, 8)
    y1, y2 = torch.randn(2, 4, DC), torch.randn(2, 4, DC)
    entered, leave = threading.Event(), threading.Event()

    def other():
        with rp.condition(model, y2):
            entered.set()
            assert leave.wait(30)
            return model(x)

    results = []
    thread = threading.Thread(target=lambda: results.append(other()))
    with rp.condition(model, y1):
        thread.start()
        assert entered.wait(30)
        mine = model(x)
        leave.set()
        thread.join()
    assert torch.equal(mine, expected(model, x, y1)) and torch.equal(results[0], expected(model, x, y2))
    with rp.condition(model, y1), pytest.raises(rp.MissingConditionError):
        in_thread(lambda: model(x))


def test_a_part_attached_on_its_own_hears_the_whole_model():
    inner, outer = attached(bert), nn.ModuleDict()
    outer["text"], outer["more"] = inner, twice()
    y = torch.randn(2, 4, DC)
    batch = batch_of(inner)
    with rp.condition(inner, y):
        alone = output_of(inner(**batch))
    with rp.condition(outer, y):
        assert torch.equal(output_of(inner(**batch)), alone)
        outer["more"](torch.randn(2, 3, 8))


# ------------------------------------------------------------------------------------------------ copies
def test_a_deep_copy_has_its_own_slot():
    model, x, y = twice(), torch.randn(2, 3, 8), torch.randn(2, 4, DC)
    with rp.condition(model, y):
        twin = copy.deepcopy(model)
        with pytest.raises(rp.MissingConditionError):
            twin(x)
    assert twin.first.slot is twin.second.slot and twin.first.slot is not model.first.slot
    with rp.condition(twin, y):
        assert torch.equal(twin(x), expected(model, x, y))
        with pytest.raises(rp.MissingConditionError):
            model(x)


def test_a_pickled_slot_is_empty():
    slot = Slot()
    with slot.holding(Delivered(torch.ones(1), None, None, None)):
        assert pickle.loads(pickle.dumps(slot)).value() is None
    model, x, y = twice(), torch.randn(2, 3, 8), torch.randn(2, 4, DC)
    with rp.condition(model, y):
        before = model(x)
        buffer = io.BytesIO()
        torch.save(model, buffer)
    buffer.seek(0)
    twin = torch.load(buffer, weights_only=False)
    assert twin.first.slot is twin.second.slot
    with rp.condition(twin, y):
        assert torch.equal(twin(x), before)


def test_slots_are_not_in_the_state_dict():
    model = twice()
    keys = set(model.state_dict())
    with rp.condition(model, torch.randn(2, 4, DC)):
        assert set(model.state_dict()) == keys


# ------------------------------------------------------------------------------------------------ checkpointing
def enable(model, reentrant):
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()  # transformers' own condition for reentrant checkpoints


def run(model, backward_in_thread=False, order=(0, 1)):
    """Two forwards under two conditions that a trainable projector makes, then the backwards: all gradients."""
    torch.manual_seed(1)
    projector = nn.Linear(6, DC)
    images, masks = torch.randn(2, 2, 3, 6), torch.tensor([[[1, 1, 1], [1, 0, 0]], [[1, 1, 0], [1, 1, 1]]])
    batches = [batch_of(model) for _ in range(2)]
    model.zero_grad()
    losses = []
    for image, mask, batch in zip(images, masks, batches, strict=True):
        with rp.condition(model, projector(image), mask):
            losses.append(output_of(model(**batch)).square().mean())
    for i in order:
        if backward_in_thread:
            in_thread(losses[i].backward)
        else:
            losses[i].backward()
    return {**gradients(model), **{f"projector.{k}": g for k, g in gradients(projector).items()}}


def assert_close(got, wanted):
    assert got.keys() == wanted.keys()
    for name in wanted:
        assert wanted[name].abs().max() > 0, f"{name} has no gradient to compare"
        torch.testing.assert_close(got[name], wanted[name], rtol=1e-4, atol=1e-7, msg=name)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("make", [llama, bert])
def test_checkpointed_gradients_equal_the_plain_ones(make, reentrant):
    model = attached(make)
    model.train()
    wanted = run(model)
    assert any("projector" in name for name in wanted)
    enable(model, reentrant)
    assert_close(run(model), wanted)
    assert_close(run(model, order=(1, 0)), wanted)
    assert_close(run(model, backward_in_thread=True), wanted)


@pytest.mark.parametrize("reentrant", [False, True])
def test_backward_under_another_condition_uses_the_forward_s(reentrant):
    model = attached()
    model.train()
    y, batch = torch.randn(2, 3, DC), batch_of(model)

    def one():
        model.zero_grad()
        with rp.condition(model, y):
            loss = output_of(model(**batch)).square().mean()
        with rp.condition(model, torch.randn(2, 3, DC)):
            loss.backward()
        return gradients(model)

    wanted = one()
    enable(model, reentrant)
    assert_close(one(), wanted)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_enabled_inside_the_with_is_bound_before_the_forward(reentrant):
    model = attached()
    model.train()
    y, batch = torch.randn(2, 3, DC), batch_of(model)
    with rp.condition(model, y):
        enable(model, reentrant)
        loss = output_of(model(**batch)).square().mean()
        bound = [
            m for m in model.modules() if isinstance(getattr(m, "_gradient_checkpointing_func", None), BoundCheckpoint)
        ]
        enable(model, reentrant)  # as Trainer does; the next forward binds again
        loss = loss + output_of(model(**batch)).square().mean()
    assert len(bound) >= 2
    loss.backward()
    assert gradients(model)


def test_binding_is_idempotent_and_detach_undoes_it():
    model = attached()
    enable(model, False)
    own = model.model.layers[0]._gradient_checkpointing_func
    for _ in range(3):
        with rp.condition(model, torch.randn(2, 3, DC)):
            model(**batch_of(model))
    bound = model.model.layers[0]._gradient_checkpointing_func
    assert isinstance(bound, BoundCheckpoint) and bound.function is own and len(bound.slots) == 1
    rp.detach(model)
    assert model.model.layers[0]._gradient_checkpointing_func is own


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_copy_of_a_checkpointed_model_binds_its_own_slot(reentrant):
    model = attached()
    enable(model, reentrant)
    run(model)
    twin = copy.deepcopy(model)
    assert_close(run(twin), run(model))


def by_hand(layer):
    layer.mlp.down_proj = awaken(rp.RoutedLoRA(layer.mlp.down_proj, r=4, condition_features=DC))


def attach_part(layer):
    rp.attach(layer.mlp, rp.RoutedLoRAConfig(target_modules=["down_proj"], r=4, condition_features=DC))
    awaken(layer.mlp)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("add", [by_hand, attach_part])
def test_layers_without_a_root_hook_are_bound_by_the_context(add, reentrant):
    """Layers put in by hand, and parts with slots of their own that come later."""
    model = llama()
    model.train()
    rp.attach(
        model.model.layers[0].self_attn, rp.RoutedLoRAConfig(target_modules=["q_proj"], r=4, condition_features=DC)
    )
    awaken(model)
    reference = copy.deepcopy(model)
    enable(model, reentrant)
    assert_close(run(model), run(reference))  # binds the first slot
    add(model.model.layers[0])
    reference.model.layers[0].mlp = copy.deepcopy(model.model.layers[0].mlp)
    assert_close(run(model), run(reference))


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_state_is_bound_too(reentrant):
    model = llama()
    rp.attach(model, rp.RoutedLoRAConfig(target_modules=["layers.1.mlp.down_proj"], r=4, condition_features=DC))
    awaken(model).train()
    layer = model.model.layers[1].mlp.down_proj
    y, batch = torch.randn(2, 3, DC), batch_of(model)

    def one():
        model.zero_grad()
        with rp.condition(model, layer.encode_condition(y)):
            loss = output_of(model(**batch)).square().mean()
        loss.backward()
        return gradients(model)

    wanted = one()
    enable(model, reentrant)
    assert_close(one(), wanted)
    assert any("condition_A" in name for name in wanted)  # the gradient went through the state


@pytest.mark.parametrize("reentrant", [False, True])
def test_in_sequence_masks_are_bound(reentrant):
    model = llama()
    rp.attach(model, rp.RoutedLoRAConfig(target_modules=["q_proj"], r=4, condition_source="in_sequence"))
    awaken(model).train()
    masks, batch = torch.tensor([[[1, 1, 0, 0, 0]] * 2, [[0, 0, 0, 1, 1]] * 2]), batch_of(model)

    def one():
        model.zero_grad()
        losses = []
        for mask in masks:
            with rp.condition(model, None, mask):
                losses.append(output_of(model(**batch)).square().mean())
        sum(losses).backward()
        return gradients(model)

    wanted = one()
    enable(model, reentrant)
    assert_close(one(), wanted)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_missing_condition_stays_missing_in_recomputation(reentrant):
    model = attached(missing="lora")
    model.train()
    batch = batch_of(model)

    def one():
        model.zero_grad()
        loss = output_of(model(**batch)).square().mean()
        with rp.condition(model, torch.randn(2, 3, DC)):
            loss.backward()
        return gradients(model)

    def unrouted(found):
        """Without a condition, condition_A is touched (for distributed runs) and nothing more."""
        assert not any(g.any() for name, g in found.items() if name.endswith("condition_A"))
        return {name: g for name, g in found.items() if not name.endswith("condition_A")}

    wanted = unrouted(one())
    enable(model, reentrant)
    assert_close(unrouted(one()), wanted)


# ------------------------------------------------------------------------------------------------ what nobody bound
def unbound_run(model, x, ys, reentrant, backward=lambda loss: loss.backward(), during=None):
    """Forwards under ``ys`` through a checkpoint that routed_peft cannot know, then a backward."""
    losses = []
    for y in ys:
        with rp.condition(model, y):
            out = torch.utils.checkpoint.checkpoint(model, x.requires_grad_(), use_reentrant=reentrant)
            losses.append(out.square().mean())
    if during is None:
        backward(losses[0])
    else:
        with rp.condition(model, during):
            backward(losses[0])


@pytest.mark.parametrize("reentrant", [False, True])
def test_an_unbound_recomputation_raises(reentrant):
    model, x, y1, y2 = twice(), torch.randn(2, 3, 8), torch.randn(2, 3, DC), torch.randn(2, 3, DC)
    model.first.name = "layers.0"
    text = (
        "RoutedLoRA 'layers.0': no condition during recomputation: checkpointing was enabled by a function routed_peft "
    )
    text += "did not bind; pass the condition as an argument of the layer"
    with pytest.raises(rp.MissingConditionError, match=text):  # the slot is empty
        unbound_run(model, x, [y1], reentrant)
    with pytest.raises(rp.MissingConditionError, match=text):  # it holds another condition
        unbound_run(model, x, [y1, y2], reentrant, during=y2)
    with pytest.raises(rp.MissingConditionError, match=text):  # in another thread
        unbound_run(model, x, [y1], reentrant, backward=lambda loss: in_thread(loss.backward), during=y1)


@pytest.mark.parametrize("reentrant", [False, True])
def test_missing_base_does_not_hide_an_unbound_recomputation(reentrant):
    model, x, y = twice(missing="base"), torch.randn(2, 3, 8), torch.randn(2, 3, DC)
    with pytest.raises(rp.MissingConditionError, match="recomputation"):
        unbound_run(model, x, [y], reentrant)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_condition_entered_inside_the_recomputed_function_is_trusted(reentrant):
    model, x, y = twice(), torch.randn(2, 3, 8, requires_grad=True), torch.randn(2, 3, DC)

    def conditioned(x, y):
        with rp.condition(model, y):
            return model(x)

    torch.utils.checkpoint.checkpoint(conditioned, x, y, use_reentrant=reentrant).square().mean().backward()
    got = gradients(model)
    model.zero_grad()
    conditioned(x, y).square().mean().backward()
    assert_close(got, gradients(model))


@pytest.mark.parametrize("reentrant", [False, True])
def test_an_unbound_checkpoint_around_bound_ones_raises(reentrant):
    """The inner, bound ones run again in the outer's recomputation and must not bind what the slot holds then."""
    model = attached()
    enable(model, False)
    y1, y2, batch = torch.randn(2, 3, DC), torch.randn(2, 3, DC), batch_of(model)
    embeds = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()

    def whole(embeds):
        return model(inputs_embeds=embeds, use_cache=False)[0]

    with rp.condition(model, y1):
        loss = torch.utils.checkpoint.checkpoint(whole, embeds, use_reentrant=reentrant).square().mean()
    with rp.condition(model, y2), pytest.raises(rp.MissingConditionError, match="recomputation"):
        loss.backward()


def test_explicit_conditions_need_no_binding():
    model, x, y = twice(), torch.randn(2, 3, 8, requires_grad=True), torch.randn(2, 3, DC)
    torch.utils.checkpoint.checkpoint(expected, model, x, y, use_reentrant=False).square().mean().backward()
    got = gradients(model)
    model.zero_grad()
    expected(model, x, y).square().mean().backward()
    assert_close(got, gradients(model))


# ------------------------------------------------------------------------------------------------ torch.compile
def test_compile_fullgraph_reads_the_slot():
    model, x = twice(), torch.randn(2, 3, 8)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for tokens in (3, 3, 4):
        y = torch.randn(2, tokens, DC)
        with rp.condition(model, y):
            torch.testing.assert_close(compiled(x), expected(model, x, y))


@pytest.mark.parametrize("layerwise", [False, True])
def test_compile_fullgraph_of_an_attached_model_with_checkpointing(layerwise):
    model = attached()
    model.config.use_cache = False  # transformers logs about it while tracing, which breaks the graph
    model.train()
    wanted = run(model)
    enable(model, False)
    model.disable_input_require_grads()  # a hook of transformers that cannot be traced
    if layerwise:
        for layer in model.model.layers:
            layer.compile(fullgraph=True, backend="aot_eager")
    else:
        model.compile(fullgraph=True, backend="aot_eager")
    assert_close(run(model), wanted)
