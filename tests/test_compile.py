"""Whole models: under torch.compile with a cache and with changing sizes, exported, and in low precision."""

import copy

import pytest
import torch
import transformers as tf
from test_generation import IN_SEQUENCE, PROJECTOR, attached, prompt
from tiny_models import awaken as wake
from tiny_models import batch_of, bert, gradients, image_batch, llama, llava, output_of, t5

import routed_peft as rp

DC = 12
LANGUAGE_MODEL = {"targets": r".*language_model.*q_proj"}


@pytest.fixture
def compiled():
    """Compiles in one graph."""
    torch.compiler.reset()
    yield lambda f, backend="eager": torch.compile(f, fullgraph=True, backend=backend)
    torch.compiler.reset()


def delivered(make, tap, **options):
    """A model, and the keywords that give a call its condition where no tap does."""
    if make is bert:
        model = bert()
        rp.attach(model, rp.RoutedLoRAConfig(target_modules=["query", "value"], r=4, condition_features=DC))
        return wake(model), {"routed_condition": torch.randn(2, 4, DC)}
    model = attached(make, tap=tap, **{**(LANGUAGE_MODEL if make is llava else {}), **options})
    return model, {} if tap else {"routed_condition": torch.randn(2, 4, DC)}


def cache_for(model, static):
    if model.config.is_encoder_decoder:
        return tf.EncoderDecoderCache(tf.DynamicCache(), tf.DynamicCache())
    return tf.StaticCache(model.config.get_text_config(), max_cache_len=16) if static else tf.DynamicCache()


# ------------------------------------------------------------------------------------------------ torch.compile
@pytest.mark.parametrize(
    "make, tap, static, compiles_prompt",
    [
        (llama, None, True, False),
        (llava, "auto", False, True),
        (llava, PROJECTOR, False, False),
        (t5, "auto", False, False),
    ],
)
@torch.no_grad()
def test_calls_with_a_cache_compile_without_a_break(compiled, make, tap, static, compiles_prompt):
    """Steps after an eager or a compiled prompt: none without the condition, and soon none that recompiles."""
    model, y = delivered(make, tap, missing="base")
    batch, step = prompt(model), {"input_ids": torch.tensor([[7], [8]])}
    if make is t5:
        batch = {"encoder_outputs": model.get_encoder()(batch["input_ids"]), "decoder_input_ids": step["input_ids"]}
        step = batch
    known, cache = cache_for(model, static), cache_for(model, static)
    want = [model(**call, **y, past_key_values=known).logits for call in (batch, *[step] * 4)]
    fast = compiled(model)
    first = (fast if compiles_prompt else model)(**batch, **y, past_key_values=cache).logits
    torch.testing.assert_close(first, want[0], rtol=1e-4, atol=1e-5)
    for wanted, stance in zip(want[1:], ["default", "default", "fail_on_recompile", "fail_on_recompile"], strict=True):
        with torch.compiler.set_stance(stance):
            got = fast(**step, **y, past_key_values=cache).logits
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    rp.detach(model)
    plain = cache_for(model, static)
    model(**batch, past_key_values=plain)
    assert not torch.allclose(model(**step, past_key_values=plain).logits, want[1], atol=1e-4)


@pytest.mark.parametrize("first", ["with", "without"])
@pytest.mark.parametrize("how", ["keyword", "context"])
@torch.no_grad()
def test_a_compiled_call_has_the_condition_of_its_own(compiled, how, first):
    """Whatever the calls before it had, eager or compiled."""
    model = attached(llama, tap=None, missing="base")
    batch, y = prompt(model), torch.randn(2, 4, DC)

    def call(f, given):
        if not given:
            return output_of(f(**batch))
        if how == "keyword":
            return output_of(f(**batch, routed_condition=y))
        with rp.condition(model, y):
            return output_of(f(**batch))

    wanted = {given: call(model, given) for given in (True, False)}  # leaves a slot that was used behind
    assert not torch.allclose(wanted[True], wanted[False])
    f = compiled(model)
    for given in (True, False, True, True, False) if first == "with" else (False, True, False, False, True):
        torch.testing.assert_close(call(f, given), wanted[given])


def test_one_compiled_call_without_a_condition_leaves_the_next_ones_alone():
    layer = wake(rp.RoutedLoRA.from_features(8, 6, r=4))
    model = torch.nn.Sequential(layer)
    x, y = torch.randn(2, 3, 8), torch.randn(2, 4, 8)
    with rp.condition(model, y):
        wanted = model(x)
    torch.compiler.reset()
    f = torch.compile(model, backend="eager")
    for _ in range(2):
        with pytest.raises(rp.MissingConditionError):
            f(x)
        with rp.condition(model, y):
            torch.testing.assert_close(f(x), wanted)


@torch.no_grad()
def test_compiled_in_sequence_steps_raise(compiled):
    """Their states are kept outside of graphs; in a graph the frozen layer would be silently wrong."""
    model = attached(llava, **IN_SEQUENCE, missing="base")
    batch, one = prompt(model), torch.tensor([[7], [8]])
    cache = model(**batch).past_key_values
    with pytest.raises(Exception, match="were in an earlier call with this cache"):
        compiled(model)(input_ids=one, past_key_values=copy.deepcopy(cache))
    torch.compiler.reset()
    cache = compiled(model)(**batch).past_key_values
    with pytest.raises(rp.UnsupportedError, match="were in an earlier call with this cache"):
        model(input_ids=one, past_key_values=cache)


@pytest.mark.parametrize("make, tap", [(bert, None), (llava, "auto")])
def test_other_sizes_do_not_recompile(compiled, make, tap):
    """Input tokens N and condition tokens M: once for the first sizes, once for all others; bert with gradients."""
    model, _ = delivered(make, tap)
    fast = compiled(model, "aot_eager" if make is bert else "eager")
    for i, (n, m) in enumerate(((5, 8), (7, 9), (9, 12), (6, 10))):  # of gram, all go through S
        if make is llava:
            batch = {**image_batch(model, (1, 1), pad=n), "use_cache": False}
        else:
            batch = {"input_ids": torch.randint(3, 50, (2, n)), "routed_condition": torch.randn(2, m, DC)}
        results = []
        for call in (model, fast):
            model.zero_grad()
            stance = "fail_on_recompile" if i > 1 and call is fast else "default"
            with torch.compiler.set_stance(stance), torch.set_grad_enabled(make is bert):
                out = output_of(call(**batch))
            if make is bert:
                (out * torch.linspace(-1, 1, out.numel()).reshape(out.shape)).mean().backward()
            results.append({"out": out.detach(), **gradients(model)})
        assert len(results[0]) == (13 if make is bert else 1)
        for key, wanted in results[0].items():
            torch.testing.assert_close(results[1][key], wanted, rtol=1e-3, atol=1e-5, msg=key)


# ------------------------------------------------------------------------------------------------ torch.export
@pytest.mark.filterwarnings("ignore")  # torch's own
@pytest.mark.parametrize(
    "make, tap, strict",
    [(bert, None, False), (bert, None, True), (llava, "auto", False), (llava, "auto", True), (llama, None, False),
     (llava, PROJECTOR, False), (t5, "auto", False)],
)  # fmt: skip
def test_an_exported_model_takes_each_call_s_condition(make, tap, strict):
    model, _ = delivered(make, tap)
    batch = {**batch_of(model), **({} if make is bert else {"use_cache": False})}
    if tap is None:
        batch["routed_condition"] = torch.randn(2, 4, DC)
    model(**batch)  # first: transformers prepares its models when they run
    program = torch.export.export(model, (), batch, strict=strict).module()
    changed = "routed_condition" if tap is None else "input_ids" if make is t5 else "pixel_values"
    new = batch[changed].flip(0)
    other = {**batch, changed: new}
    with torch.no_grad():
        want, before = output_of(model(**other)), output_of(model(**batch))
        torch.testing.assert_close(output_of(program(**other)), want, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(output_of(program(**batch)), before, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(want, before, atol=1e-4)


@pytest.mark.parametrize("grad", [False, True])
def test_a_conv1d_under_compile(grad, compiled):
    base = tf.pytorch_utils.Conv1D(24, 16)
    layer = wake(rp.RoutedLoRA(base, r=4, condition_features=DC, out_slices=[(0, 8), (16, 24)]))
    x, y = torch.randn(2, 5, 16), torch.randn(2, 3, DC)
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(compiled(layer)(x, y), layer(x, y))


# ------------------------------------------------------------------------------------------------ precision
FULL, BRAIN, HALF = torch.float32, torch.bfloat16, torch.float16


@pytest.mark.parametrize(
    "base, autocast", [(FULL, None), (BRAIN, None), (HALF, None), (FULL, BRAIN), (FULL, HALF), (BRAIN, BRAIN)]
)
def test_every_delivery_returns_the_dtype_of_the_base_layer(base, autocast):
    """By keyword and by tap, with gradients in the parameters' float32, and as the model was before."""
    for tap in (None, "auto"):
        model = llava().to(base)
        batch = batch_of(model)
        batch["pixel_values"] = batch["pixel_values"].to(base)
        seen = []

        def note(module, args, out, seen=seen):
            seen.append(out.dtype)

        def run(model, batch=batch, seen=seen, **given):
            del seen[:]
            with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
                out = model(**batch, **given).logits
            return out, list(seen)

        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                module.register_forward_hook(note)
        plain, dtypes = run(model)
        options = rp.RoutedLoRAConfig(target_modules=["q_proj", "down_proj"], r=4, condition_features=32, tap=tap,
                                      exclude_modules=r".*vision.*")  # fmt: skip
        rp.attach(model, options)
        for module in model.modules():
            if isinstance(module, rp.RoutedLoRA):
                module.base_layer._forward_hooks.clear()  # which is part of the routed layer now
                module.register_forward_hook(note)
        for y_dtype in (FULL, BRAIN):
            given = {} if tap else {"routed_condition": torch.randn(2, 4, 32, dtype=y_dtype)}
            out, now = run(model, **given)
            assert now == dtypes and out.dtype == plain.dtype
            torch.testing.assert_close(out, plain, rtol=0.1, atol=0.05)  # the updates start at zero
        wake(model)
        out, _ = run(model, **given)
        out.float().square().mean().backward()
        got = gradients(model)
        assert got and all(gradient.dtype == torch.float32 for gradient in got.values())


@pytest.mark.parametrize("tap", [None, "auto"])
def test_float16_trains_with_a_gradient_scaler(tap):
    """Its gradients are float32's, within rounding, and lead down; a step with an infinite one is left out."""
    model = llava()
    options = rp.RoutedLoRAConfig(target_modules=LANGUAGE_MODEL["targets"], r=4, condition_features=32, tap=tap)
    rp.attach(model, options)
    for name, p in wake(model).named_parameters():
        if tap and name.endswith("condition_A"):
            p.data.mul_(20)  # tiny models embed tiny numbers, and gram squares them
    batch = batch_of(model)
    given = {} if tap else {"routed_condition": torch.randn(2, 4, 32)}

    def loss_of(half):
        with torch.autocast("cpu", torch.float16, enabled=half):
            return model(**batch, **given, labels=batch["input_ids"]).loss

    loss_of(False).backward()
    exact = gradients(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-1)
    losses = []
    for step in range(6):
        optimiser.zero_grad()
        losses.append(loss_of(True))
        scaler.scale(losses[-1]).backward()
        if step == 0:
            scaler.unscale_(optimiser)
            for name, gradient in gradients(model).items():
                assert gradient.dtype == torch.float32
                assert (gradient - exact[name]).norm() < 0.05 * exact[name].norm() or exact[name].norm() < 1e-6, name
        scaler.step(optimiser)
        scaler.update()
    assert losses[-1].item() < losses[0].item() - 0.005

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    optimiser.zero_grad()
    before = [p.detach().clone() for p in model.parameters()]
    scaler.scale(loss_of(True)).backward()
    scaler.step(optimiser)
    scaler.update()
    assert scaler.get_scale() < 2.0**40
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
