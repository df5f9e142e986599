"""One product for all layers' conditions: what each layer would have computed by itself, and y read once."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from layers import NAMES
from tiny_models import D, awaken, bart, batch_of, bert, blip2, gradients, image_batch, llama, llava, output_of, t5
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import routed_peft as rp
from routed_peft import functional
from routed_peft.modules import RoutedLayer

pytestmark = pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable.:FutureWarning")

DC = 12
ROUTES = [name for name in NAMES if name != "none"]
TAPPED = {
    llava: ["q_proj", "v_proj", "down_proj"], blip2: r"language_model\..*\.(q_proj|fc2)", bart: ["q_proj", "v_proj"],
    t5: ["q", "wo"],
}  # fmt: skip


@pytest.fixture
def double():
    """Double precision, where a wrong gradient cannot pass for rounding."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def pair(make, config, tap=None):
    """The same model twice: conditions joined, and each layer's own."""
    joined = make()
    apart = copy.deepcopy(joined)
    rp.attach(joined, config, tap=tap, join_conditions=True)
    rp.attach(apart, config, tap=tap)
    with torch.no_grad():
        for name, p in awaken(joined).named_parameters():
            if name.endswith("condition_A"):
                p.mul_(10)
    apart.load_state_dict(joined.state_dict())
    return joined, apart


def lora(targets, **options):
    return rp.RoutedLoRAConfig(**{"target_modules": targets, "r": 4, "condition_features": DC, **options})


def adapter(targets, **options):
    return rp.RoutedAdapterConfig(**{"target_modules": targets, "r": 4, "condition_features": DC, **options})


def trained(model, batch, y=None, **condition):
    """The output, and the gradients of y and of the parameters."""
    model.zero_grad()
    y = None if y is None else y.clone().requires_grad_()
    given = {} if y is None else {"routed_condition": y}
    out = output_of(model(**batch, **given, **condition))
    (out * torch.linspace(-1, 1, out.numel()).reshape(out.shape).to(out.dtype)).mean().backward()
    return {"out": out.detach(), **gradients(model), **({} if y is None else {"y": y.grad})}


def assert_same(got, want, **tolerance):
    assert got.keys() == want.keys()
    for key in want:
        torch.testing.assert_close(got[key], want[key], msg=lambda text, key=key: f"{key}: {text}", **tolerance)


@pytest.fixture
def products(monkeypatch):
    """Counts [calls that encode conditions, calls of layers that project one themselves]."""
    counts = [0, 0]
    encode, apply = functional.encode_condition, functional.apply

    def counting_encode(*args, **options):
        counts[0] += 1
        return encode(*args, **options)

    def counting_apply(name, x, A, y, *args, **options):
        counts[1] += not isinstance(y, rp.ConditionState)
        return apply(name, x, A, y, *args, **options)

    monkeypatch.setattr(functional, "encode_condition", counting_encode)
    monkeypatch.setattr(functional, "apply", counting_apply)
    return counts


# ------------------------------------------------------------------------------------------------ the same
@pytest.mark.parametrize("routing", ROUTES)
@pytest.mark.parametrize("form", ["lora", "shared", "sequential"])
def test_outputs_and_gradients_are_those_of_each_layer_alone(routing, form, double, products):
    if form == "sequential":
        config = adapter(["query", "intermediate.dense"], routing=routing)
    else:
        config = lora(["query", "value"], routing=routing, condition_features=DC if form == "lora" else None)
    joined, apart = pair(bert, config)
    batch, y = batch_of(joined), torch.randn(2, 4, D if form == "shared" else DC)
    y[0, 3] = torch.nan  # is not valid
    options = {"routed_condition_mask": torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])}
    if routing == "cross_gram":
        options["routed_input_mask"] = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    got = trained(joined, batch, y, **options)
    assert products == [1, 0]
    assert_same(got, trained(apart, batch, y, **options), rtol=1e-9, atol=1e-12)
    assert products == [1, 4] and got["y"].abs().max() > 0


@pytest.mark.parametrize("pool", ["none", "first", "mean"])
@pytest.mark.parametrize("routing", ["add", "gram"])
@pytest.mark.parametrize("tokens", [None, 1, 5])
def test_every_form_of_a_condition_joins(routing, pool, tokens, double, products):
    joined, apart = pair(bert, lora(["query", "value"], routing=routing, condition_pool=pool))
    y = torch.randn(2, DC) if tokens is None else torch.randn(2, tokens, DC)
    batch = batch_of(joined)
    got = trained(joined, batch, y)
    assert products == [1, 0]
    assert_same(got, trained(apart, batch, y), rtol=1e-9, atol=1e-12)


def test_layers_join_that_are_alike_and_the_others_are_as_ever(double, products):
    config = lora(
        ["c_attn", "c_fc", "c_proj"], out_slices=None, rank_pattern={r"h\.0\.mlp\..*": 6, r"h\.1\.mlp\.c_fc": 3},
        lora_dropout=0.0,
    )  # fmt: skip
    from tiny_models import gpt2

    joined, apart = pair(gpt2, config)
    batch, y = batch_of(joined), torch.randn(2, 4, DC)
    got = trained(joined, batch, y)
    assert products == [2, 1]  # ranks 4 and 6, each several times; rank 3 once
    assert_same(got, trained(apart, batch, y), rtol=1e-9, atol=1e-12)
    index = torch.tensor([1, 1, 0, 1])
    batch = batch_of(joined, batch=4)
    assert_same(trained(joined, batch, y, routed_condition_index=index),
                trained(apart, batch, y, routed_condition_index=index), rtol=1e-9, atol=1e-12)  # fmt: skip


def test_a_parametrised_projection_stays_apart(double):
    """It is another tensor at every look, so that no state could be told to be its layer's."""
    joined, apart = pair(llama, lora(["q_proj", "v_proj"]))
    for model in (joined, apart):
        layer = model.model.layers[0].self_attn.q_proj
        nn.utils.parametrizations.weight_norm(layer, "condition_A")
    y, batch = torch.randn(2, 4, DC), batch_of(llama())
    for gradients_on in (True, False):
        with torch.set_grad_enabled(gradients_on):
            got, want = (output_of(model(**batch, routed_condition=y)) for model in (joined, apart))
        torch.testing.assert_close(got, want)


def test_fused_slices_join(double, products):
    from tiny_models import gpt2

    for across in (False, True):
        products[:] = [0, 0]
        slices = [(0, D), (2 * D, 3 * D)]
        joined, apart = pair(gpt2, lora(["c_attn"], out_slices=slices, route_across_slices=across))
        batch, y = batch_of(joined), torch.randn(2, 4, DC)
        got = trained(joined, batch, y)
        assert products == [1, 0]
        assert_same(got, trained(apart, batch, y), rtol=1e-9, atol=1e-12)


def test_dropout_on_the_condition_draws_each_layer_its_own_mask(products):
    joined, apart = pair(bert, lora(["query", "value"], lora_dropout=0.5))
    batch, y = batch_of(joined), torch.randn(2, 4, DC)
    for model in (joined, apart):
        model.train()
    torch.manual_seed(1)
    got = trained(joined, batch, y)
    assert products == [0, 4]
    torch.manual_seed(1)
    assert_same(got, trained(apart, batch, y))
    joined.eval()
    joined(**batch, routed_condition=y)
    assert products == [1, 8]
    only_x, _ = pair(bert, lora(["query", "value"], lora_dropout=0.5, condition_dropout=0.0))
    only_x.train()
    only_x(**batch, routed_condition=y)
    assert products == [2, 8]


@pytest.mark.parametrize("dtype, rtol", [(torch.bfloat16, 3e-2), (torch.float32, 1e-4)])
def test_autocast_and_half_precision_are_within_rounding(dtype, rtol):
    joined, apart = pair(bert, lora(["query", "value"]))
    batch, y = batch_of(joined), torch.randn(2, 4, DC)
    exact = trained(apart, batch, y)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        got, want = trained(joined, batch, y), trained(apart, batch, y)

    def error(gradients):  # of all of them: what rounding does to one depends on where it hits
        return sum(((gradients[key] - exact[key]).norm() / exact[key].norm()).square() for key in exact).sqrt()

    assert all(got[key].dtype == want[key].dtype for key in want)
    if dtype == torch.float32:
        assert error(got) <= rtol
    else:
        assert error(got) <= 1.2 * error(want)
    for model in (joined, apart):
        model.to(dtype)
    with torch.no_grad():
        a, b = (output_of(model(**batch, routed_condition=y)).double() for model in (joined, apart))
    assert (a - b).norm() <= rtol * b.norm()


# ------------------------------------------------------------------------------------------------ calls
def test_each_call_has_its_own_product(double, products):
    """Two forwards before the backward, an optimiser step between two calls, all within one ``with``."""
    joined, apart = pair(bert, lora(["query", "value"]))
    batch, y = batch_of(joined), torch.randn(2, 4, DC)
    results = []
    for model in (joined, apart):
        optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
        with rp.condition(model, y):
            losses = [output_of(model(**batch)).square().mean() for _ in range(2)]
            for loss in losses:
                loss.backward()
            optimiser.step()
            losses.append(output_of(model(**batch)).square().mean())
        losses[-1].backward()
        results.append({"losses": torch.stack(losses).detach(), **gradients(model)})
    assert_same(*results, rtol=1e-9, atol=1e-12)
    assert products == [3, 12]


def test_a_part_without_gradients_leaves_the_others_theirs(double):
    """What the first layer is given without a graph is no state for the second."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            with torch.no_grad():
                x = self.first(x)
            return self.last(x)

    joined, apart = pair(Two, lora(["first", "last"]))
    x, y = torch.randn(2, 3, 8), torch.randn(2, 4, DC)
    results = []
    for model in (joined, apart):
        out = model(x, routed_condition=y)
        out.square().mean().backward()
        results.append({key: p for key, p in gradients(model).items() if key.startswith("last")})
    assert results[0]["last.condition_A"].abs().max() > 0
    assert_same(*results, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("make", [llava, blip2, bart, t5])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_gradients_are_the_plain_ones(make, reentrant, double, products):
    """Two forwards before the backward, by tap, with a trained layer before the condition; also in another thread."""
    joined, apart = pair(make, lora(TAPPED[make], condition_features=D), tap="auto")
    before = {llava: "multi_modal_projector.linear_2", blip2: "language_projection", bart: "encoder.layers.0.fc2",
              t5: "encoder.block.0.layer.1.DenseReluDense.wo"}[make]  # fmt: skip
    batches = [batch_of(joined), batch_of(joined)]
    extra = {} if make in (bart, t5) else {"use_cache": False}

    def run(model, backward=lambda loss: loss.backward()):
        model.zero_grad()
        losses = [output_of(model(**batch, **extra)).square().mean() for batch in batches]
        for loss in losses:
            backward(loss)
        return gradients(model)

    for model in (joined, apart):
        name = next(name for name, _ in model.named_modules() if name.endswith(before))
        model.get_submodule(name).weight.requires_grad_()
        model.train()
    wanted = run(apart)
    assert wanted[name + ".weight"].abs().max() > 0
    products[:] = [0, 0]
    assert_same(run(joined), wanted, rtol=1e-7, atol=1e-11)
    assert products == [2, 0]
    joined.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if reentrant:
        joined.enable_input_require_grads()
    with ThreadPoolExecutor(1) as pool:
        for backward in (lambda loss: loss.backward(), lambda loss: pool.submit(loss.backward).result()):
            products[:] = [0, 0]
            assert_same(run(joined, backward), wanted, rtol=1e-7, atol=1e-11)
            assert products == [2, 0]  # none in what is recomputed


@pytest.mark.parametrize("make", [llava, bart, llama])
def test_a_generation_makes_one_product(make, products):
    tap = None if make is llama else "auto"
    targets = TAPPED.get(make, ["q_proj", "v_proj"])
    joined, apart = pair(make, lora(targets, condition_features=DC if tap is None else D), tap=tap)
    batch = image_batch(joined, (1, 1)) if make is llava else {"input_ids": torch.randint(3, 50, (2, 5))}
    given = {} if tap else {"routed_condition": torch.randn(2, 4, DC)}
    for beams in (1, 3):
        options = {"max_new_tokens": 5, "do_sample": False, "num_beams": beams, "return_dict_in_generate": True,
                   "output_logits": True, "pad_token_id": 0}  # fmt: skip
        products[:] = [0, 0]
        got = joined.generate(**batch, **given, **options)
        assert products == [1, 0]
        want = apart.generate(**batch, **given, **options)
        assert torch.equal(got.sequences, want.sequences)
        torch.testing.assert_close(torch.stack(got.logits), torch.stack(want.logits), rtol=1e-3, atol=1e-5)


def test_encoder_and_decoder_share_the_product_of_their_call(products):
    joined, apart = pair(t5, lora(["q", "wo"]))
    batch, y = batch_of(joined), torch.randn(2, 4, DC)
    got = output_of(joined(**batch, routed_condition=y))
    assert products == [1, 0]
    torch.testing.assert_close(got, output_of(apart(**batch, routed_condition=y)), rtol=1e-4, atol=1e-5)


def test_a_cache_does_not_keep_the_graph_of_its_prompt():
    joined, _ = pair(llava, lora(TAPPED[llava], condition_features=D), tap="auto")
    cache = joined(**batch_of(joined), use_cache=True).past_key_values
    (memory,) = cache._routed_peft.by_slot.values()
    assert memory.tapped is not None and memory.tapped.joint is None


def test_layers_that_cannot_join_are_left_out(products):
    class Widths(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c, self.d = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x):
            return self.b(self.a(x))

    joined, apart = pair(Widths, lora(["a", "b", "c", "d"], condition_features=None))
    x, y = torch.randn(2, 3, 8), torch.randn(2, 4, 8)
    got = joined(x, routed_condition=y)  # c and d take another width, and do not run
    assert products == [1, 0]
    torch.testing.assert_close(got, apart(x, routed_condition=y))
    joined.a.backend = "reference"
    torch.testing.assert_close(joined(x, routed_condition=y), got)
    assert products == [1, 4]
    inside, _ = pair(bert, lora(["query"], condition_features=None, condition_source="in_sequence"))
    with pytest.raises(rp.MissingConditionError):
        inside(**batch_of(inside), routed_condition=torch.randn(2, 4, D))
    assert products == [1, 4]


def test_a_replica_encodes_for_itself(products):
    """nn.DataParallel's replicas have the model's hooks, and layers and parameters on other devices."""
    joined, _ = pair(lambda: nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), lora(["0", "1"]))
    replica = joined._replicate_for_data_parallel()
    for name in ("0", "1"):
        setattr(replica, name, joined.get_submodule(name)._replicate_for_data_parallel())
        for key, p in joined.get_submodule(name).named_parameters(recurse=False):
            setattr(replica.get_submodule(name), key, p.detach() * 2)
    x, y = torch.randn(2, 3, 8), torch.randn(2, 4, DC)
    assert not torch.allclose(replica(x, routed_condition=y), joined(x, routed_condition=y))
    assert products == [1, 2]


def test_copies_join_by_themselves(products):
    joined, _ = pair(llava, lora(TAPPED[llava], condition_features=D), tap="auto")
    batch = batch_of(joined)
    twin = copy.deepcopy(joined)
    with torch.no_grad():
        want = output_of(twin(**batch))
        assert products == [1, 0]
        for p in joined.parameters():
            p.zero_()
        assert torch.equal(output_of(twin(**batch)), want)
    rp.detach(twin)
    assert not any(isinstance(module, RoutedLayer) for module in twin.modules())


def test_a_wrong_condition_is_told_by_the_layer():
    joined, _ = pair(bert, lora(["query", "value"]))
    batch = batch_of(joined)
    with pytest.raises(rp.ConditionShapeError, match=r"RoutedLoRA 'encoder.* condition must be \[batch, tokens, 12\]"):
        joined(**batch, routed_condition=torch.randn(2, 4, DC + 1))
    with pytest.raises(rp.ConditionShapeError, match=r"RoutedLoRA 'encoder.* mask \(2, 5\) does not match condition"):
        joined(
            **batch, routed_condition=torch.randn(2, 4, DC), routed_condition_mask=torch.ones(2, 5, dtype=torch.bool)
        )
    with pytest.raises(rp.ConditionShapeError, match="input batch 2 does not match condition batch 3"):
        joined(**batch, routed_condition=torch.randn(3, 4, DC))


def test_sharded_parameters_are_refused_in_training_and_others_stay_apart(products):
    class FSDPModule:
        """Stands for torch's, which it is told by."""

    joined, apart = pair(bert, lora(["query", "value"]))
    batch, y = batch_of(joined), torch.randn(2, 4, DC)
    layer = joined.encoder.layer[0]
    plain = type(layer)
    layer.__class__ = type("FSDPBertLayer", (FSDPModule, plain), {})
    with pytest.raises(rp.UnsupportedError, match=r"parameters are sharded \(FSDPBertLayer\): attach without"):
        joined(**batch, routed_condition=y)
    with torch.no_grad():
        joined(**batch, routed_condition=y)
    layer.__class__ = plain
    products[:] = [0, 0]
    held = next(module for module in joined.modules() if isinstance(module, RoutedLayer))

    class Sharded(nn.Parameter):
        """No plain tensor, as a DTensor is none."""

    held.condition_A = Sharded(held.condition_A.detach())
    torch.testing.assert_close(
        output_of(joined(**batch, routed_condition=y)), output_of(apart(**batch, routed_condition=y))
    )
    assert products == [1, 1 + 4]


# ------------------------------------------------------------------------------------------------ what it saves
class Reads(TorchDispatchMode):
    """Counts the ops that read a tensor with the rows of y, and the bytes that they read of such."""

    def __init__(self, y):
        super().__init__()
        self.shapes = {tuple(y.shape), (y.shape[0] * y.shape[1], y.shape[2])}
        self.ops, self.bytes = 0, 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        read = [t for t in args if isinstance(t, torch.Tensor) and tuple(t.shape) in self.shapes]
        if read and not op.is_view:
            self.ops += 1
            self.bytes += sum(t.numel() * t.element_size() for t in read)
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("trains_y", [False, True])
def test_y_is_read_once_instead_of_once_for_each_layer(trains_y):
    """24 layers: a BERT with 12 blocks, query and value. The numbers of docs/models.md."""
    import transformers as tf

    def make():
        return tf.BertModel(tf.BertConfig(
            hidden_size=64, num_hidden_layers=12, num_attention_heads=4, intermediate_size=64, vocab_size=60,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        ))  # fmt: skip

    joined, apart = pair(make, lora(["query", "value"], condition_features=80))
    batch, y = batch_of(joined), torch.randn(2, 49, 80, requires_grad=trains_y)
    found = []
    for model in (apart, joined):
        y.grad = None
        with Reads(y) as forward:
            loss = output_of(model(**batch, routed_condition=y)).square().mean()
        with Reads(y) as backward:
            loss.backward()
        found.append((forward, backward))
    (forward, backward), (forward_joined, backward_joined) = found
    assert (forward.ops, forward_joined.ops) == (24, 1)
    assert (backward.ops, backward_joined.ops) == ((24 + 23, 1) if trains_y else (24, 1))  # 23: sums of 24 gradients
    assert (forward.bytes, forward_joined.bytes) == (752640, 31360)
    assert (backward.bytes, backward_joined.bytes) == (
        (752640 + 2 * 23 * 31360, 31360) if trains_y else (752640, 31360)
    )


def test_joined_layers_stay_apart_under_compile():
    joined, apart = pair(bert, lora(["query", "value"]))
    batch, y = batch_of(joined), torch.randn(2, 3, DC)
    compiled = torch.compile(joined, backend="aot_eager")
    for model in (compiled, apart):
        output_of(model(**batch, routed_condition=y)).square().sum().backward()
    got, want = gradients(joined), gradients(apart)
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=1e-5)
