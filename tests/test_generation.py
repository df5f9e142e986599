"""Generation: each token is the one that the whole sequence, run without a cache, has; and y is encoded once."""

import copy
import gc
import pickle
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import transformers as tf
from generating import NEVER, assert_same, generate, uncached
from tiny_models import IMAGE, D, bart, blip2, gpt2, image_batch, llama, llava, paligemma, qwen2_vl, t5
from tiny_models import awaken as wake

import routed_peft as rp
from routed_peft import delivery, functional
from routed_peft.modules import RoutedLayer

DC = 12
ENTRY = [llava, qwen2_vl, paligemma]
ENCODED = [bart, t5]
TARGETS = {
    llava: ["q_proj", "down_proj"], qwen2_vl: ["q_proj", "down_proj"], paligemma: ["q_proj", "down_proj"],
    blip2: r"language_model\..*\.(q_proj|fc2)", bart: ["q_proj", "fc2"], t5: ["q", "wo"], gpt2: ["c_attn", "c_fc"],
    llama: ["q_proj", "down_proj"],
}  # fmt: skip


def attached(make, tap="auto", targets=None, **options):
    model = make()
    if options.get("condition_source") != "in_sequence":
        options = {"condition_features": D if tap else DC, **options}
    rp.attach(model, rp.RoutedLoRAConfig(target_modules=targets or TARGETS[make], r=4, **options), tap=tap)
    with torch.no_grad():
        for name, p in wake(model).named_parameters():
            if name.endswith(("lora_B", "condition_A")):
                p.mul_(3 if name.endswith("lora_B") else 30)  # enough to change tokens: tiny models embed tiny numbers
    model.generation_config.forced_eos_token_id = None  # BART would force what these tests suppress
    return model


def prompt(model, images=(1, 1), batch=2):
    kind = model.config.model_type
    if kind == "blip-2":
        return image_batch(model, (1,) * len(images))
    if kind in ("llava", "qwen2_vl", "paligemma"):
        return image_batch(model, images)
    ids = torch.randint(3, 50, (batch, 5))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.fixture
def counted(monkeypatch):
    """Counts [encoded states, calls that project a condition themselves]."""
    counts = [0, 0]
    encode, apply = RoutedLayer._encode, functional.apply

    def counting_encode(*args):
        counts[0] += 1
        return encode(*args)

    def counting_apply(name, x, A, y, *args, **options):
        counts[1] += not isinstance(y, rp.ConditionState)
        return apply(name, x, A, y, *args, **options)

    monkeypatch.setattr(RoutedLayer, "_encode", counting_encode)
    monkeypatch.setattr(functional, "apply", counting_apply)
    return counts


def layers_of(model):
    return [module for module in model.modules() if isinstance(module, rp.RoutedLoRA)]


# ------------------------------------------------------------------------------------------------ by tap
@pytest.mark.parametrize(  # BLIP-2 with a static cache is below
    "make, static", [*((make, is_so) for make in (*ENTRY, *ENCODED) for is_so in (False, True)), (blip2, False)]
)
def test_a_tapped_generation_is_the_uncached_one(make, static, counted):
    model = attached(make)
    batch = prompt(model)
    options = {"cache_implementation": "static"} if static else {}
    got = generate(model, batch, **options)
    assert counted == [len(layers_of(model)), 0]  # once for each layer, at the prompt
    want = uncached(model, batch)
    assert_same(got, want)
    with rp.condition(model, torch.zeros(2, 1, D)):  # an image matters: without its update the logits are others
        assert not torch.allclose(uncached(model, batch)[1], want[1], atol=1e-3)


@pytest.mark.parametrize("make", ENTRY)
def test_in_sequence_generation_is_the_uncached_one(make, counted):
    model = attached(make, targets=["q_proj", "v_proj"], condition_source="in_sequence")
    batch = prompt(model, (1, 2))
    for options in ({}, {"cache_implementation": "static"}):
        counted[:] = [0, 0]
        got = generate(model, batch, **options)
        assert counted == [len(layers_of(model)), 0]
        assert_same(got, uncached(model, batch))


@pytest.mark.parametrize("make", [*ENTRY, *ENCODED, blip2])
def test_tapped_beams_and_samples_are_those_of_each_prompt_alone(make, counted):
    model = attached(make)
    images = (1, 1) if make in (paligemma, blip2, *ENCODED) else (1, 2)  # PaliGemma's positions count padding
    batch = prompt(model, images)
    beams = {"num_beams": 3, "num_return_sequences": 2}
    got = generate(model, batch, **beams)[0]
    assert counted == [len(layers_of(model)), 0]
    assert got.shape[0] == 4
    start = 0
    for i in range(2):
        keep = batch["attention_mask"][i].bool()
        one = {}
        for name, value in batch.items():
            if name == "pixel_values":
                rows = value.shape[0] // sum(images)
                one[name] = value[start * rows : (start + images[i]) * rows]
            elif name == "image_grid_thw":
                one[name] = value[start : start + images[i]]
            else:
                one[name] = value[i : i + 1, keep]
        start += images[i]
        assert torch.equal(generate(model, one, **beams)[0][:, -5:], got[2 * i : 2 * i + 2, -5:])
    torch.manual_seed(0)
    sampled, logits = generate(model, batch, do_sample=True, num_return_sequences=2, top_k=0)
    again = _forced(model, batch, sampled, 2)
    torch.testing.assert_close(logits, again, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def _forced(model, batch, tokens, times):
    """Logits for the last 5 of ``tokens``, each row of the batch ``times`` times, without a cache."""
    many = {}
    for name, value in batch.items():
        if name in ("pixel_values", "image_grid_thw"):
            owners = (batch["input_ids"] == IMAGE).sum(1) // 4
            per = value.shape[0] // int(owners.sum())
            parts = value.split([int(n) * per for n in owners])
            many[name] = torch.cat([part for part in parts for _ in range(times)])
        else:
            many[name] = value.repeat_interleave(times, 0)
    if model.config.is_encoder_decoder:
        return model(**many, decoder_input_ids=tokens[:, :-1], use_cache=False).logits
    new = tokens[:, -5:]
    many["input_ids"] = torch.cat([many["input_ids"], new], 1)
    for name, fill in (("attention_mask", 1), ("token_type_ids", 1), ("mm_token_type_ids", 0)):
        if name in many:
            many[name] = torch.cat([many[name], torch.full_like(new, fill, dtype=many[name].dtype)], 1)
    return model(**many, use_cache=False).logits[:, -6:-1]


@pytest.mark.parametrize("make", [llava, bart])
def test_prompt_lookup_is_greedy(make, counted):
    model = attached(make)
    batch = {name: value[:1] for name, value in prompt(model).items()}
    ids = batch["input_ids"]
    ids[:, -3:] = ids[:, -1:]  # something to look up
    got = generate(model, batch, new=8, prompt_lookup_num_tokens=2, max_matching_ngram_size=1)
    assert counted == [len(layers_of(model)), 0]
    assert torch.equal(got[0][:, -8:], uncached(model, batch, new=8)[0][:, -8:])


chunked_prefill = pytest.mark.skipif(
    tuple(map(int, tf.__version__.split(".")[:2])) < (5, 23),
    reason="transformers' own prefill in chunks gives a LLaVA other tokens than a whole prompt",
)


@chunked_prefill
@pytest.mark.parametrize("in_sequence", [False, True])
def test_chunked_prefill_raises_where_images_are_split_and_else_works(in_sequence):
    options = {"condition_source": "in_sequence", "targets": ["q_proj"]} if in_sequence else {}
    model = attached(llava, **options)
    batch = prompt(model)
    want = uncached(model, batch)
    for size in (4, 5):  # the image is the first chunk, or in it
        assert_same(generate(model, batch, prefill_chunk_size=size), want)
    with pytest.raises(rp.UnsupportedError, match="prefill in chunks.*pass routed_condition"):
        generate(model, batch, prefill_chunk_size=3)
    with pytest.raises(rp.MissingConditionError):  # text before the image would run without it
        generate(model, {**batch, "input_ids": batch["input_ids"].flip(1)}, prefill_chunk_size=3)


@chunked_prefill
def test_chunked_prefill_works_with_an_explicit_condition(counted):
    model = attached(llava)
    batch, y = prompt(model), torch.randn(2, 3, D)
    want = uncached(model, batch, routed_condition=y)
    counted[:] = [0, 0]
    got = generate(model, batch, prefill_chunk_size=3, routed_condition=y)
    assert counted == [len(layers_of(model)), 0]
    assert_same(got, want)


# ------------------------------------------------------------------------------------------------ by keyword
@pytest.mark.parametrize("make", [gpt2, llama, bart, t5, llava, blip2])
def test_a_generation_with_the_keyword_is_the_uncached_one(make, counted):
    model = attached(make, tap=None, targets={bart: r".*decoder.*q_proj", llava: r".*language_model.*q_proj",
                                              t5: r"decoder.*\.q"}.get(make))  # fmt: skip
    batch, y = prompt(model), torch.randn(2, 4, DC)
    condition = {"routed_condition": y, "routed_condition_mask": torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])}
    for options in ({}, {"cache_implementation": "static"}):
        if make is blip2 and options:
            continue  # OPT has no static cache
        counted[:] = [0, 0]
        got = generate(model, batch, **condition, **options)
        assert counted == [len(layers_of(model)), 0]
        assert_same(got, uncached(model, batch, **condition))
    with rp.condition(model, *condition.values()):
        counted[:] = [0, 0]
        got = generate(model, batch)
        assert counted == [len(layers_of(model)), 0]
        assert_same(got, uncached(model, batch))
    assert not torch.allclose(uncached(model, batch, routed_condition=y.flip(0))[1], got[1], atol=1e-3)


@pytest.mark.parametrize("make", [bart, t5])
def test_an_encoder_takes_the_keyword_s_condition_too(make, counted):
    """generate calls the encoder by itself, before the model and before the beams."""
    model = attached(make, tap=None, targets={bart: ["q_proj"], t5: ["q"]}[make])
    batch, y = prompt(model), torch.randn(2, 4, DC)
    got = generate(model, batch, routed_condition=y)
    assert counted == [sum(".decoder." in "." + name for name in model._routed_peft.report.names), 1]
    assert_same(got, uncached(model, batch, routed_condition=y))
    beams = {"num_beams": 3, "num_return_sequences": 2}
    got = generate(model, batch, routed_condition=y, **beams)[0]
    for i in range(2):
        one = {name: value[i : i + 1] for name, value in batch.items()}
        alone = generate(model, one, routed_condition=y[i : i + 1], **beams)[0]
        assert torch.equal(alone[:, -5:], got[2 * i : 2 * i + 2, -5:])


def test_a_wrong_condition_is_refused_as_in_a_plain_call():
    model = attached(gpt2, tap=None, targets=["c_attn"], condition_features=None)
    batch = prompt(model)
    with pytest.raises(rp.ConditionShapeError, match="shares lora_A, so the condition needs in_features columns"):
        generate(model, batch, routed_condition=torch.randn(2, 4, DC))
    with pytest.raises(rp.ConditionShapeError, match="input batch 2 does not match condition batch 3|batch 2"):
        generate(model, batch, routed_condition=torch.randn(3, 4, D))
    model = attached(llama, tap=None, targets=["q_proj"], condition_source="in_sequence")
    for wrong in ((2, 4), (1, 10)):  # the second has as many entries, in rows that are not the samples
        text = rf"in-sequence condition mask \({wrong[0]}, {wrong[1]}\) does not match input \(2, 5\)"
        with pytest.raises(rp.ConditionShapeError, match=text):
            generate(model, batch, routed_condition_mask=torch.ones(wrong, dtype=torch.bool))


@pytest.mark.parametrize("make", [gpt2, bart, blip2])
@pytest.mark.parametrize("indexed", [False, True])
def test_beams_expand_the_keyword_s_condition(make, indexed):
    """With an index, two questions about the second of two images: expanded rows would be others' conditions."""
    model = attached(make, tap=None, targets={bart: r".*decoder.*q_proj"}.get(make))
    batch, y = prompt(model, images=(1, 1)), torch.randn(2, 4, DC)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    index = torch.tensor([1, 1]) if indexed else torch.tensor([0, 1])
    condition = {"routed_condition": y, "routed_condition_mask": mask}
    if indexed:
        condition["routed_condition_index"] = index
    beams = {"num_beams": 3, "num_return_sequences": 2}
    got = generate(model, batch, **condition, **beams)[0]
    for i, of in enumerate(index.tolist()):
        one = {name: value[i : i + 1] for name, value in batch.items()}
        mine = {"routed_condition": y[of : of + 1], "routed_condition_mask": mask[of : of + 1]}
        assert torch.equal(generate(model, one, **mine, **beams)[0][:, -5:], got[2 * i : 2 * i + 2, -5:])


def test_beams_share_the_condition_of_a_surrounding_with(counted):
    model = attached(gpt2, tap=None)
    batch, y = prompt(model), torch.randn(2, 4, DC)
    want = generate(model, batch, routed_condition=y, num_beams=3)[0]
    counted[:] = [0, 0]
    with rp.condition(model, y):
        assert torch.equal(generate(model, batch, num_beams=3)[0], want)
    assert counted == [len(layers_of(model)), 0]
    with rp.condition(model, y, index=torch.tensor([1, 0])), pytest.raises(rp.ConditionShapeError, match="batch 6"):
        generate(model, batch, num_beams=3)


def test_an_in_sequence_mask_by_keyword_marks_rows_of_the_prompt(counted):
    model = attached(llama, tap=None, targets=["q_proj"], condition_source="in_sequence")
    batch = prompt(model)
    mask = torch.tensor([[1, 1, 0, 0, 0], [0, 1, 1, 1, 0]])
    got = generate(model, batch, routed_condition_mask=mask)
    assert counted == [len(layers_of(model)), 0]
    ids, logits = batch["input_ids"], []
    for step in range(5):
        longer = torch.nn.functional.pad(mask, (0, step))
        with torch.no_grad():
            logits.append(model(ids, routed_condition_mask=longer, use_cache=False).logits[:, -1])
        ids = torch.cat([ids, got[0][:, 5 + step : 6 + step]], 1)
    torch.testing.assert_close(got[1], torch.stack(logits, 1), rtol=1e-3, atol=1e-4)
    one = {name: value[:, :1] for name, value in batch.items()}  # a prompt as long as a step
    first = generate(model, one, new=2, routed_condition_mask=mask[:, :1].clone())[0]
    with torch.no_grad():
        whole = model(first[:, :2], routed_condition_mask=torch.tensor([[1, 0], [0, 0]]), use_cache=False).logits[:, -1]
    assert torch.equal(whole.index_fill(1, torch.tensor(NEVER), -torch.inf).argmax(-1), first[:, 2])


def test_the_second_turn_of_a_kept_cache_encodes_nothing(counted):
    model = attached(llava)
    batch = prompt(model)
    cache = tf.DynamicCache()
    first = generate(model, batch, past_key_values=cache)[0]
    counted[:] = [0, 0]
    longer = torch.cat([first, torch.randint(3, 50, (2, 3))], 1)
    got = model.generate(
        input_ids=longer, attention_mask=torch.ones_like(longer), past_key_values=cache, max_new_tokens=5,
        min_new_tokens=5, suppress_tokens=NEVER, do_sample=False, pad_token_id=0,
    )  # fmt: skip
    assert counted == [0, 0]
    whole = {**batch, "input_ids": longer, "attention_mask": torch.ones_like(longer)}
    assert torch.equal(got[:, -5:], uncached(model, whole)[0][:, -5:])


# ------------------------------------------------------------------------------------------------ never stale
def step(model, cache, **condition):
    with torch.no_grad():
        return model(torch.tensor([[7], [8]]), past_key_values=cache, **condition).logits


def test_kept_states_are_of_the_condition_and_the_parameters_that_are():
    model = attached(gpt2, tap=None)
    batch, y = prompt(model), torch.randn(2, 4, DC)
    mask = torch.ones(2, 4, dtype=torch.bool)

    def both(change):
        """A decode step after ``change``, with the cache that kept states and with one that never did."""
        outs = []
        for keeps in (True, False):
            mine, own = y.clone(), mask.clone()
            cache = tf.DynamicCache()
            with torch.no_grad():
                model(**batch, past_key_values=cache, routed_condition=mine, routed_condition_mask=own)
                step(model, cache, routed_condition=mine, routed_condition_mask=own)
                new = change(mine, own)
            if not keeps:
                del cache._routed_peft
                new = [t.clone() for t in new]
            outs.append(step(model, cache, routed_condition=new[0], routed_condition_mask=new[1]))
            for layer in layers_of(model):
                layer.condition_A.data.copy_(saved[layer])
        return outs

    saved = {layer: layer.condition_A.detach().clone() for layer in layers_of(model)}
    plain = both(lambda y, mask: (y, mask))
    torch.testing.assert_close(*plain)

    def train(y, mask):
        for layer in layers_of(model):
            layer.condition_A.add_(0.5)
        return y, mask

    for change in (
        lambda y, mask: (y.flip(0), mask),  # another condition
        lambda y, mask: (y.mul_(-2).add_(1), mask),  # the same tensor, written
        lambda y, mask: (y, mask.logical_and_(torch.tensor([True, True, False, False]))),
        lambda y, mask: (y, torch.tensor([[True, False, False, False]] * 2)),
        train,
    ):
        kept, fresh = both(change)
        torch.testing.assert_close(kept, fresh, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(kept, plain[0], atol=1e-3)


def test_an_inference_tensor_that_is_written_is_seen():
    """It counts no versions, so nothing of it is kept."""
    model = attached(gpt2, tap=None)
    outs = []
    with torch.inference_mode():
        batch, y = prompt(model), torch.randn(2, 4, DC)
        for same in (True, False):
            mine, cache = y.clone(), tf.DynamicCache()
            model(**batch, past_key_values=cache, routed_condition=mine)
            mine.mul_(-2).add_(1)
            outs.append(step(model, cache, routed_condition=mine if same else mine.clone()))
    torch.testing.assert_close(*outs)


def test_an_emptied_cache_takes_a_mask_for_a_new_prompt():
    model = attached(llama, tap=None, targets=["q_proj"], condition_source="in_sequence")
    mask, cache = torch.tensor([[1, 1, 0, 0, 0], [0, 1, 1, 1, 0]]), tf.DynamicCache()
    with torch.no_grad():
        model(**prompt(model), past_key_values=cache, routed_condition_mask=mask)
        cache.reset()
        batch = prompt(model)
        got = model(**batch, past_key_values=cache, routed_condition_mask=mask).logits
        torch.testing.assert_close(got, model(**batch, routed_condition_mask=mask).logits)


IN_SEQUENCE = {"condition_source": "in_sequence", "targets": ["q_proj", "v_proj"]}
PROJECTOR = "model.multi_modal_projector"


@pytest.mark.parametrize("missing", ["error", "base", "lora"])
@pytest.mark.parametrize("tap", [None, "auto"])
def test_in_sequence_rows_without_a_usable_state_raise(missing, tap):
    """The frozen layer, which missing="base" gives a call without a condition, would be silently wrong."""
    model = attached(llava if tap else llama, tap=tap, **IN_SEQUENCE, missing=missing)
    batch, one = prompt(model), torch.tensor([[7], [8]])
    mask = {} if tap else {"routed_condition_mask": torch.tensor([[1, 1, 0, 0, 0]] * 2)}

    def run(prompt_grad=False, step_grad=False, autocast=False):
        with torch.set_grad_enabled(prompt_grad):
            cache = model(**batch, **mask, past_key_values=tf.DynamicCache()).past_key_values
        with torch.set_grad_enabled(step_grad), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return model(input_ids=one, past_key_values=cache, **mask)

    run()
    for how in ({"prompt_grad": True}, {"step_grad": True}, {"prompt_grad": True, "step_grad": True}):
        with pytest.raises(rp.UnsupportedError, match="marked rows .* were in an earlier call .* without gradients"):
            run(**how)
    with pytest.raises(rp.UnsupportedError, match="marked rows .* were in an earlier call .* the same dtype"):
        run(autocast=True)


def language_model(make, tap, **options):
    targets = {bart: TARGETS[bart], blip2: TARGETS[blip2]}.get(make, r".*language_model.*(q_proj|v_proj)")
    return attached(make, tap=tap, **{**options, "targets": targets})


def prefilled(model, batch):
    """A cache that holds the prompt, and a function for a step of some of its rows with such a cache."""
    kind = model.config.model_type
    called, more = model, {}
    with torch.no_grad():
        if kind == "bart":
            more = {"encoder_outputs": model.get_encoder()(batch["input_ids"])}
            cache = model(**more, decoder_input_ids=torch.tensor([[2], [2]])).past_key_values
        elif kind == "blip-2":
            called = model.language_model
            cache = model(**batch, use_cache=True).language_model_outputs.past_key_values
        else:
            cache = model(**batch, use_cache=True).past_key_values

    @torch.no_grad()
    def step(cache, rows=(0, 1)):
        ids = torch.tensor([[7], [8]])[list(rows)]
        return called(**{"decoder_input_ids" if more else "input_ids": ids}, past_key_values=cache, **more).logits

    return cache, step


@pytest.mark.parametrize(
    "make, tap, options",
    [
        (llava, "auto", {}),
        (llava, "auto", IN_SEQUENCE),
        (llava, PROJECTOR, {}),
        (bart, "auto", {}),
        (blip2, "auto", {}),
    ],
)
def test_the_rows_of_a_cache_take_their_condition_along(make, tap, options):
    model = language_model(make, tap, **options)
    cache, step = prefilled(model, prompt(model))
    first = copy.deepcopy(cache)
    want = step(first), step(first)
    for moves, rows in (
        ([("reorder_cache", torch.tensor([1, 0]))], [1, 0]),
        ([("batch_select_indices", torch.tensor([1]))], [1]),
        ([("batch_repeat_interleave", 2)], [0, 0, 1, 1]),
        ([("batch_repeat_interleave", 2), ("reorder_cache", torch.tensor([3, 1, 0, 2]))], [1, 0, 0, 1]),
    ):
        moved = copy.deepcopy(cache)
        for method, argument in moves:
            getattr(moved, method)(argument)
        for wanted in want:  # and for good
            torch.testing.assert_close(step(moved, rows), wanted[rows], rtol=1e-4, atol=1e-5)


def test_the_rows_of_an_in_sequence_mask_by_keyword_move_too():
    model = attached(llama, tap=None, **IN_SEQUENCE)
    batch, cache = prompt(model), tf.DynamicCache()
    mask = {"routed_condition_mask": torch.tensor([[1, 1, 0, 0, 0], [0, 0, 1, 1, 1]])}
    with torch.no_grad():
        model(**batch, past_key_values=cache, **mask)
        want = step(model, copy.deepcopy(cache), **mask)
        cache.reorder_cache(torch.tensor([1, 0]))
        got = model(torch.tensor([[8], [7]]), past_key_values=cache, **mask).logits
    torch.testing.assert_close(got, want.flip(0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{}, IN_SEQUENCE])
def test_a_cache_that_lost_its_image_raises(options):
    model = language_model(llava, "auto", **options, missing="base")
    cache, step = prefilled(model, prompt(model))
    for kept in (True, False):
        cropped = copy.deepcopy(cache)
        cropped.crop(-3)  # the text
        step(cropped)
        if not kept:
            cropped.crop(-2)  # the step, and a token of the image
            with pytest.raises(rp.UnsupportedError, match="the tap at .*cropped, and tokens that the condition was"):
                step(cropped)
    emptied = copy.deepcopy(cache)
    emptied.crop(-7)
    other = prompt(model)
    with torch.no_grad():
        got = model(**other, past_key_values=emptied).logits
        torch.testing.assert_close(got, model(**other).logits, rtol=1e-4, atol=1e-5)


def test_a_watched_cache_is_copied_pickled_and_freed_as_any_other():
    model = language_model(llava, "auto")
    cache, _ = prefilled(model, prompt(model))
    twin = pickle.loads(pickle.dumps(cache))
    twin.reorder_cache(torch.tensor([1, 0]))
    for mine, other in zip(cache.layers, twin.layers, strict=True):
        assert torch.equal(mine.keys, other.keys[[1, 0]]) and not torch.equal(mine.keys, other.keys)
    with torch.no_grad(), pytest.raises(rp.MissingConditionError):  # what was remembered stays in its process
        model(input_ids=torch.tensor([[7], [8]]), past_key_values=twin)
    gc.disable()
    try:
        gone = weakref.ref(cache)
        shallow = copy.copy(cache)
        del cache
        assert gone() is None
    finally:
        gc.enable()
    with pytest.raises(rp.RoutedPeftError, match="reorder_cache of a shallow copy of a cache that is gone"):
        shallow.reorder_cache(torch.tensor([1, 0]))


def test_an_encoder_mask_that_is_written_between_steps_is_seen():
    for inference in (False, True):
        model = attached(bart)
        ids, outs = torch.randint(3, 50, (2, 5)), []
        with torch.inference_mode(inference), torch.no_grad():
            encoded = model.get_encoder()(ids)
            for same in (True, False):
                mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 0, 0, 0]])
                call = {"encoder_outputs": encoded, "decoder_input_ids": torch.tensor([[7], [8]])}
                cache = model(**call, attention_mask=mask).past_key_values
                before = model(**call, attention_mask=mask, past_key_values=copy.deepcopy(cache)).logits
                mask.fill_(1)
                mine = mask if same else mask.clone()
                outs.append(model(**call, attention_mask=mine, past_key_values=cache).logits)
            torch.testing.assert_close(*outs)
            assert not torch.allclose(outs[0], before, atol=1e-3)


def test_a_path_s_condition_is_remembered(counted):
    """tap=path at the projector, whose output is the whole condition where each sample has one image."""
    model = language_model(llava, PROJECTOR, missing="base")
    batch = prompt(model)
    got = generate(model, batch)
    assert counted == [len(layers_of(model)), 0]
    assert_same(got, uncached(model, batch))
    torch.manual_seed(1)
    other = {**batch, "pixel_values": torch.randn_like(batch["pixel_values"])}
    assert not torch.allclose(got[1], uncached(model, other)[1], atol=1e-3)
    beams = generate(model, batch, num_beams=3)[0]
    one = [generate(model, {name: value[i : i + 1] for name, value in batch.items()}, num_beams=3)[0] for i in (0, 1)]
    assert torch.equal(beams, torch.cat(one))
    with torch.no_grad():
        cache = model(**batch).past_key_values
        with pytest.raises(rp.UnsupportedError, match="given a condition when the cache already held tokens"):
            model(**batch, past_key_values=cache)


@pytest.mark.parametrize("make", ENCODED)
def test_a_path_to_the_encoder_is_the_decoder_s_tap(make):
    path = "model.encoder" if make is bart else "encoder"
    model = attached(make, tap=path, missing="base")
    assert model._routed_peft.report.tap == f"encoder states at '{path.replace('encoder', 'decoder')}'"
    batch = prompt(model)
    batch["attention_mask"][0, -2:] = 0
    got = generate(model, batch)
    assert_same(got, uncached(model, batch))
    rp.detach(model)
    assert not torch.allclose(uncached(model, batch)[1], got[1], atol=1e-3)


@pytest.mark.parametrize(
    "make, path, text",
    [
        (t5, "encoder.block.0", "in the encoder"),
        (bart, "model.encoder.layers.0", "in the encoder"),
        (blip2, "vision_model", "outside of Blip2ForConditionalGeneration's own call"),
    ],
)
def test_a_path_whose_output_generate_would_lose_is_refused(make, path, text):
    with pytest.raises(rp.UnsupportedError, match=f"tap='{path}': generate runs this module {text}.*use tap='auto'"):
        attached(make, tap=path)


def test_two_threads_generate_from_their_own_images():
    model = attached(llava)
    batches = [prompt(model), prompt(model, (2, 1)), prompt(model, (1, 2))]
    want = [generate(model, batch)[0] for batch in batches]
    with ThreadPoolExecutor(3) as pool:
        for _ in range(3):
            got = list(pool.map(lambda batch: generate(model, batch)[0], batches))
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_in_sequence_states_of_old_parameters_raise():
    model = attached(llava, targets=["q_proj"], condition_source="in_sequence")
    batch = prompt(model)
    with torch.no_grad():
        cache = model(**batch).past_key_values
        step(model, cache)
        layers_of(model)[0].lora_A.add_(0.1)
    with pytest.raises(rp.StaleStateError, match="encoded before the parameters changed"):
        step(model, cache)


def test_states_are_of_the_layer_that_kept_them():
    """They are found by a number that a later layer may get as well."""
    states, key = delivery.States(), "key"
    first, second = (rp.RoutedLoRA.from_features(6, 10, r=3) for _ in range(2))
    state = states.keep(first, key, first.encode_condition(torch.randn(2, 4, 6)))
    assert states.find(first, key) is state and states.find(first, "other") is None
    states._kept[id(second)] = states._kept[id(first)]
    assert states.find(second, key) is None
    del states._kept[id(second)], first
    gc.collect()
    states.keep(second, key, state)
    assert [*states._kept] == [id(second)]  # nothing of the layer that is gone


def test_nothing_is_kept_where_gradients_are_wanted(counted):
    model = attached(gpt2, tap=None)
    batch, y = prompt(model), torch.randn(2, 4, DC, requires_grad=True)
    cache = tf.DynamicCache()
    model(**batch, past_key_values=cache, routed_condition=y)
    out = model(torch.tensor([[7], [8]]), past_key_values=cache, routed_condition=y).logits
    assert counted == [0, 2 * len(layers_of(model))]
    out.square().mean().backward()
    assert y.grad.abs().max() > 0


def test_dropout_is_drawn_at_each_step_in_training_mode(counted):
    model = attached(gpt2, tap=None, lora_dropout=0.5)
    layers_of(model)[0].train()
    generate(model, prompt(model), routed_condition=torch.randn(2, 4, DC))
    assert counted == [len(layers_of(model)) - 1, 5]


def test_generation_in_inference_mode(counted):
    for make, tap in ((llava, "auto"), (bart, "auto"), (gpt2, None)):
        model = attached(make, tap=tap)
        batch = prompt(model)
        condition = {} if tap else {"routed_condition": torch.randn(2, 4, DC)}
        want = uncached(model, batch, **condition)
        counted[:] = [0, 0]
        with torch.inference_mode():
            got = generate(model, batch, **condition)
        assert counted == [len(layers_of(model)), 0]
        assert_same(got, want)


def test_a_cache_s_memory_is_not_pickled_and_dies_with_the_model():
    import gc
    import pickle

    model = attached(llava)
    with torch.no_grad():
        cache = model(**prompt(model)).past_key_values
    assert len(cache._routed_peft.by_slot) == 1
    assert len(pickle.loads(pickle.dumps(cache))._routed_peft.by_slot) == 0
    del model
    gc.collect()
    assert len(cache._routed_peft.by_slot) == 0


def test_adapters_generate_too(counted):
    model = llava()
    rp.attach(
        model, rp.RoutedAdapterConfig(target_modules=[f"language_model.layers.{i}.mlp" for i in (0, 1)], r=4,
                                      condition_features=D), tap="auto",
    )  # fmt: skip
    wake(model)
    batch = prompt(model)
    got = generate(model, batch)
    assert counted == [2, 0]
    assert_same(got, uncached(model, batch))


def test_a_layer_that_runs_twice_in_the_prompt_has_no_one_in_sequence_state():
    model = llava()
    model.model.language_model.layers[1].mlp = model.model.language_model.layers[0].mlp
    config = rp.RoutedLoRAConfig(target_modules=["up_proj"], r=4, condition_source="in_sequence")
    rp.attach(model, config, tap="auto")
    model.eval()
    inputs = prompt(wake(model))
    with torch.no_grad():
        model(**inputs)  # as a whole there is nothing to tell apart
        with pytest.raises(rp.UnsupportedError, match="more than once in the prompt"):
            model.generate(**inputs, max_new_tokens=3, do_sample=False)
