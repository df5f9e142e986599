"""routed_condition= and its companions on an attached model's own call."""

import copy
import functools
import inspect
import io
import types

import pytest
import torch
from tiny_models import awaken, batch_of, bert, gpt2, gradients, llama, output_of
from torch import nn

import routed_peft as rp
from routed_peft.delivery import KEYWORDS

DC = 12


def attached(make=bert, targets=("query", "value"), **options):
    model = make()
    rp.attach(model, rp.RoutedLoRAConfig(target_modules=list(targets), r=4, condition_features=DC, **options))
    return awaken(model)


def under(model, batch, y, mask=None, **more):
    with rp.condition(model, y, mask, **more):
        return output_of(model(**batch))


def test_the_keywords_are_the_context_manager():
    model = attached(routing="cross_gram")
    batch, y, mask = batch_of(model, batch=3), torch.randn(2, 4, DC), torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0]])
    index, valid = torch.tensor([1, 0, 1]), torch.tensor([[1, 1, 0, 0, 0]] * 3)
    got = output_of(
        model(
            **batch, routed_condition=y, routed_condition_mask=mask, routed_condition_index=index,
            routed_input_mask=valid,
        )
    )  # fmt: skip
    assert torch.equal(got, under(model, batch, y, mask, index=index, input_mask=valid))
    for left_out in ("mask", "index", "input_mask"):
        given = {"mask": mask, "index": index, "input_mask": valid}
        del given[left_out]
        if left_out == "index":
            given, mine = {"mask": mask[[1, 0, 1]], "input_mask": valid}, y[[0, 1, 1]]
        else:
            mine = y
        assert not torch.allclose(got, under(model, batch, mine, given.pop("mask", None), **given))


def test_the_condition_ends_with_the_call():
    model, batch = attached(), batch_of(attached())
    y1, y2 = torch.randn(2, 4, DC), torch.randn(2, 1, DC)
    model(**batch, routed_condition=y1)
    with pytest.raises(rp.MissingConditionError):
        model(**batch)
    with pytest.raises(IndexError):
        model(batch["input_ids"] + 100, routed_condition=y1)
    with pytest.raises(rp.ConditionShapeError):
        model(**batch, routed_condition=torch.randn(3, 4, DC))
    with pytest.raises(rp.MissingConditionError):
        model(**batch)
    with rp.condition(model, y2):
        assert torch.equal(output_of(model(**batch, routed_condition=y1)), under(model, batch, y1))
        assert torch.equal(output_of(model(**batch)), under(model, batch, y2))
    with pytest.raises(rp.MissingConditionError):
        model(**batch)


@pytest.mark.filterwarnings("error")
def test_a_hook_that_raises_before_the_call_leaves_the_slot_alone():
    model, batch, y = attached(), batch_of(attached()), torch.randn(2, 4, DC)

    def refuse(*args):
        raise KeyError("refused")

    handle = model.register_forward_pre_hook(refuse, prepend=True)
    with rp.condition(model, y):
        with pytest.raises(KeyError):
            model(**batch, routed_condition=y)
        handle.remove()
        assert torch.equal(output_of(model(**batch)), under(model, batch, y))


def test_a_call_that_broke_off_without_its_hooks_leaves_no_condition():
    """Under torch.compile an exception skips the hook that ends the call."""
    model, batch = attached(), batch_of(attached())
    model._routed_peft.wiring.keywords[0].before(model, (), {"routed_condition": torch.randn(2, 4, DC)})
    with pytest.raises(rp.MissingConditionError):
        model(**batch)


def test_earlier_hooks_do_not_see_the_keywords():
    model, seen = bert(), []
    model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(set(kwargs)), with_kwargs=True)
    rp.attach(model, rp.RoutedLoRAConfig(target_modules=["query"], condition_features=DC))
    batch = batch_of(model)
    model(**batch, routed_condition=torch.randn(2, 4, DC))
    assert seen == [set(batch)]


def test_a_call_within_the_call_has_its_own_condition():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(8, 8)
            self.last = nn.Linear(8, 8)

        def forward(self, x, inner=None):
            h = self.first(x)
            if inner is not None:
                h = h + self(x, routed_condition=inner)
            return self.last(h)

    model = Outer()
    rp.attach(model, rp.RoutedLoRAConfig(target_modules=["first", "last"], r=4, condition_features=DC))
    awaken(model)
    x, y, inner = torch.randn(2, 3, 8), torch.randn(2, 4, DC), torch.randn(2, 2, DC)
    got = model(x, inner, routed_condition=y)
    h = model.first(x, y) + model.last(model.first(x, inner), inner)
    torch.testing.assert_close(got, model.last(h, y))


@pytest.mark.parametrize("wrong", [{"routed_condition": "no tensor"}, {"routed_condition_index": torch.tensor([0, 0])}])
def test_a_call_within_the_call_that_is_refused_leaves_the_outer_one_its_condition(wrong):
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x, again=True):
            h = self.first(x)
            if again:
                with pytest.raises((TypeError, rp.ConditionShapeError)):
                    self(x, again=False, **wrong)
            return self.last(h)

    model = Outer()
    rp.attach(model, rp.RoutedLoRAConfig(target_modules=["first", "last"], r=4, condition_features=DC, missing="base"))
    awaken(model)
    x, y = torch.randn(2, 3, 8), torch.randn(2, 4, DC)
    want = model(x, again=False, routed_condition=y)
    assert torch.equal(model(x, routed_condition=y), want)
    with rp.condition(model, torch.randn(2, 4, DC)):
        assert torch.equal(model(x, routed_condition=y), want)


def test_an_input_mask_joins_a_condition_from_outside():
    model = attached(routing="cross_gram")
    batch, y, valid = batch_of(model), torch.randn(2, 4, DC), torch.tensor([[1, 1, 0, 0, 0]] * 2)
    with rp.condition(model, y):
        got = output_of(model(**batch, routed_input_mask=valid))
    assert torch.equal(got, under(model, batch, y, input_mask=valid))
    assert not torch.allclose(got, under(model, batch, y))
    with pytest.raises(rp.MissingConditionError):
        model(**batch, routed_input_mask=valid)


def test_wrong_keywords_are_refused():
    model, batch = attached(), batch_of(attached())
    with pytest.raises(TypeError, match="routed_condition takes a Tensor, a ConditionState or None, got list"):
        model(**batch, routed_condition=[1.0])
    with pytest.raises(rp.ConditionShapeError, match="routed_condition_index goes with routed_condition, which was"):
        model(**batch, routed_condition_index=torch.tensor([0, 1]))


# ------------------------------------------------------------------------------------------------ signature, patches
def test_the_signature_advertises_the_keywords_and_keeps_the_rest():
    model = bert()
    before = inspect.signature(model.forward)
    rp.attach(model, rp.RoutedLoRAConfig(target_modules=["query"], condition_features=DC))
    after = inspect.signature(model.forward)
    assert [name for name in after.parameters if name not in before.parameters] == list(KEYWORDS)
    assert [name for name in after.parameters if name not in KEYWORDS] == list(before.parameters)
    rp.detach(model)
    assert inspect.signature(model.forward) == before and "forward" not in model.__dict__


def doubled(model):
    """A patch of ``forward`` on the instance, as Liger makes them: it calls the class's forward itself."""

    def forward(self, *args, **kwargs):
        self.patched = True
        return type(self).forward(self, *args, **kwargs)

    model.forward = types.MethodType(forward, model)


def wrapped(model):
    """A patch of ``forward`` that calls what was there, as accelerate's."""
    before = model.forward

    def forward(*args, **kwargs):
        model.patched = True
        return before(*args, **kwargs)

    model.forward = forward


@pytest.mark.parametrize("patch", [doubled, wrapped])
@pytest.mark.parametrize("first", ["patch", "attach"])
def test_other_patches_of_forward_work_in_either_order(patch, first):
    model, plain = bert(), bert()
    plain.load_state_dict(model.state_dict())
    if first == "patch":
        patch(model)
    forward = model.forward
    for each in (model, plain):
        rp.attach(each, rp.RoutedLoRAConfig(target_modules=["query"], condition_features=DC))
    awaken(model)
    plain.load_state_dict(model.state_dict())
    if first == "attach":
        patch(model)
        forward = model.forward
    batch, y = batch_of(model), torch.randn(2, 4, DC)
    assert torch.equal(output_of(model(**batch, routed_condition=y)), output_of(plain(**batch, routed_condition=y)))
    assert model.patched
    rp.detach(model)
    rp.detach(plain)
    model.patched = False
    assert model.forward == forward  # the patch outlives the adapter
    assert torch.equal(output_of(model(**batch)), output_of(plain(**batch))) and model.patched


def test_copies_take_the_keywords_themselves():
    model = attached(gpt2, ["c_attn"])
    batch, y = batch_of(model), torch.randn(2, 4, DC)
    want = under(model, batch, y)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert (
            twin.forward.module is twin
            and twin._routed_peft.wiring.keywords[0].slot is not model._routed_peft.wiring.keywords[0].slot
        )
        assert torch.equal(output_of(twin(**batch, routed_condition=y)), want)
        assert twin.generate(**batch, routed_condition=y, max_new_tokens=2).shape[0] == 2
        with torch.no_grad():
            twin.transformer.h[0].attn.c_attn.lora_B.zero_()
        assert not torch.allclose(output_of(twin(**batch, routed_condition=y)), want)
        assert torch.equal(under(model, batch, y), want)
        rp.detach(twin)
        assert "forward" not in twin.__dict__ and output_of(twin(**batch)).shape == want.shape
    assert torch.equal(output_of(model(**batch, routed_condition=y)), want)


def test_a_patch_that_shows_the_signature_it_wraps_can_outlive_the_adapter():
    model, batch, y = attached(), batch_of(attached()), torch.randn(2, 4, DC)
    model.forward = functools.wraps(model.forward)(
        lambda *args, before=model.forward, **kwargs: before(*args, **kwargs)
    )
    rp.detach(model)
    plain = output_of(model(**batch))
    rp.attach(model, rp.RoutedLoRAConfig(target_modules=["query"], condition_features=DC))
    assert [*inspect.signature(model.forward).parameters].count("routed_condition") == 1
    assert torch.allclose(output_of(model(**batch, routed_condition=y)), plain, atol=1e-6)


def test_a_replica_of_data_parallel_runs_its_own_parameters():
    model = attached(gpt2, ["c_attn"])
    batch, y = batch_of(model), torch.randn(2, 4, DC)
    with torch.no_grad():
        want = output_of(model(**batch, routed_condition=y))
        replica = model._replicate_for_data_parallel()
        replica._modules["lm_head"] = nn.Linear(32, 7)
        assert output_of(replica(**batch, routed_condition=y)).shape[-1] == 7
        assert torch.equal(output_of(model(**batch, routed_condition=y)), want)
        with pytest.raises(rp.UnsupportedError, match="routed_condition_index would point into a part of it"):
            replica(**batch, routed_condition=y, routed_condition_index=torch.tensor([0, 1]))
    rp.detach(model)
    assert "_replicate_for_data_parallel" not in model.__dict__


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable.:FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_take_the_keyword_s_condition_along(reentrant):
    model = attached(llama, ["q_proj", "down_proj"])
    model.train()
    projector, images, batch = nn.Linear(6, DC), torch.randn(2, 2, 3, 6), batch_of(model)

    def run():
        model.zero_grad()
        projector.zero_grad()
        losses = [output_of(model(**batch, routed_condition=projector(y))).square().mean() for y in images]
        sum(losses).backward()
        return {**gradients(model), "projector": projector.weight.grad.clone()}

    wanted = run()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    got = run()
    assert got.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name], rtol=1e-4, atol=1e-7, msg=name)


def test_the_keyword_compiles_without_a_break():
    model = attached()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    batch = batch_of(model)
    with torch.no_grad():
        for tokens in (3, 4):
            y = torch.randn(2, tokens, DC)
            torch.testing.assert_close(output_of(compiled(**batch, routed_condition=y)), under(model, batch, y))


def test_a_graph_break_in_a_compiled_model_ends():
    model = attached()
    batch, y = batch_of(model), torch.randn(2, 4, DC)
    want = output_of(model(**batch, routed_condition=y))
    inner, plain = model.encoder, type(model.encoder).forward

    def broken(self, *args, **kwargs):
        torch._dynamo.graph_break()
        return plain(self, *args, **kwargs)

    inner.forward = types.MethodType(broken, inner)
    model.compile(backend="eager")
    torch.testing.assert_close(output_of(model(**batch, routed_condition=y)), want)


def test_conditions_left_out_of_order_are_an_error_and_leave_nothing():
    model = attached()
    batch, (first, second) = batch_of(model), torch.randn(2, 2, 4, DC)

    def holding():
        with rp.condition(model, first):
            yield

    steps = holding()
    next(steps)
    with pytest.raises(rp.RoutedPeftError, match="another order"):
        with rp.condition(model, second):
            steps.close()
    with pytest.raises(rp.MissingConditionError):
        model(**batch)


@pytest.mark.parametrize(
    "index, text",
    [
        (torch.tensor([-1, 0]), "routed_condition_index -1 is out of range for 2 conditions"),
        (torch.tensor([0, 2]), "routed_condition_index 2 is out of range for 2 conditions"),
        (torch.tensor([1.9, 0.0]), r"must be integers \[batch\], got torch.float32"),
        (torch.tensor([True, False]), r"must be integers \[batch\], got torch.bool"),
        (torch.tensor([[0, 1]]), r"must be integers \[batch\], got torch.int64 \(1, 2\)"),
        (torch.tensor([0]), r"input batch 2 does not match routed_condition_index \(1,\)"),
    ],
)
def test_generate_asks_of_an_index_what_a_call_does(index, text):
    model = attached(gpt2, ("c_attn",))
    ids = torch.randint(3, 20, (2, 4))
    with pytest.raises(rp.ConditionShapeError, match=text):
        model.generate(input_ids=ids, routed_condition=torch.randn(2, 4, DC), routed_condition_index=index)
