"""Taps: the condition comes from the model's own call, and follows it."""

import copy
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from tiny_models import (
    IMAGE,
    D,
    awaken,
    bart,
    batch_of,
    blip2,
    clip,
    dual_encoder,
    gpt2,
    gradients,
    image_batch,
    llama,
    llava,
    output_of,
    paligemma,
    qwen2_vl,
    roberta_classifier,
    t5,
)
from torch import nn

import routed_peft as rp

pytestmark = pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable.:FutureWarning")

ENTRY = [llava, qwen2_vl, paligemma]
TARGETS = {
    llava: ["q_proj", "down_proj"], qwen2_vl: ["q_proj", "down_proj"], paligemma: ["q_proj", "down_proj"],
    blip2: r"language_model\..*\.(q_proj|fc2)", bart: ["q_proj", "fc2"], t5: ["q", "wo"],
    dual_encoder: ["query", "value"], clip: ["q_proj"],
}  # fmt: skip
WIDTH = {dual_encoder: 16, clip: 16}  # of the tapped condition, where it is not D


def tapped(make, targets=None, tap="auto", **options):
    model = make()
    if options.get("condition_source") != "in_sequence":
        options = {"condition_features": WIDTH.get(make, D), **options}
    targets = TARGETS[make] if targets is None else targets
    report = rp.attach(model, rp.RoutedLoRAConfig(target_modules=targets, r=4, **options), tap=tap)
    assert report.names
    with torch.no_grad():
        for name, p in awaken(model).named_parameters():
            if name.endswith("condition_A"):
                p.mul_(10)  # tiny models embed tiny numbers, and gram squares them
    return model


def image_features(model, batch):
    """[images, 4, D], as they stand among the embeddings."""
    keys = ("pixel_values", "image_grid_thw")
    out = model.get_image_features(**{key: batch[key] for key in keys if key in batch}, return_dict=True).pooler_output
    return torch.stack(list(out)) if not isinstance(out, torch.Tensor) else out


def text_only(batch):
    """The batch without its images."""
    keep = ("input_ids", "attention_mask", "token_type_ids")
    return {name: value.clamp(max=50) for name, value in batch.items() if name in keep}


def packed(model):
    """Two samples with an image each in one row; and the positions that tell attention so."""
    batch = image_batch(model, (1, 1))
    rows, length = batch["input_ids"].shape
    batch = {
        name: value.reshape(1, -1) if value.shape[:2] == (rows, length) else value for name, value in batch.items()
    }
    positions = torch.arange(length).repeat(rows)[None]
    if model.config.model_type == "qwen2_vl":
        positions = positions.expand(4, 1, -1)  # of the text, and of its rotary embedding
    return {**batch, "position_ids": positions + (model.config.model_type == "paligemma")}


@pytest.mark.parametrize("in_sequence", [False, True])
@pytest.mark.parametrize("make", ENTRY)
def test_samples_packed_into_a_row_are_refused(make, in_sequence):
    model = tapped(make, condition_source="in_sequence" if in_sequence else "external")
    batch = packed(model)
    length = batch["input_ids"].shape[1]
    positions, bounds = batch.pop("position_ids"), torch.tensor([0, length // 2, length], dtype=torch.int32)
    samples = torch.arange(2).repeat_interleave(length // 2)[None]
    with torch.no_grad():
        for more in ({"position_ids": positions}, {"cu_seq_lens_q": bounds}, {"seq_idx": samples}):
            with pytest.raises(rp.UnsupportedError, match="takes a row of input_ids for one sample"):
                model(**batch, **more)
        for more in ({}, {"cu_seq_lens_q": bounds[::2]}, {"seq_idx": samples * 0}):  # one sample with two images
            assert output_of(model(**batch, **more)).isfinite().all()


@pytest.mark.parametrize("fill", [0, 1])
def test_positions_of_padding_are_no_packing(fill):
    model = tapped(llava)
    batch = image_batch(model, (1, 2), pad=1)
    turned = {**batch, **{name: batch[name].flip(1) for name in ("input_ids", "attention_mask")}}
    for each in (batch, turned):  # on the left, and on the right
        mask = each["attention_mask"]
        positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, fill)
        with torch.no_grad():
            assert output_of(model(**each, position_ids=positions)).isfinite().all()


# ------------------------------------------------------------------------------------------------ what is tapped
@pytest.mark.parametrize("make", ENTRY)
def test_the_language_model_s_entry_is_the_images_features(make):
    model = tapped(make)
    batch = image_batch(model, (1, 2))
    with torch.no_grad():
        features = image_features(model, batch)
        y, mask = torch.zeros(2, 8, D), torch.tensor([[1] * 4 + [0] * 4, [1] * 8])
        y[0, :4], y[1] = features[0], features[1:].flatten(0, 1)
        got, explicit = output_of(model(**batch)), output_of(
            model(**batch, routed_condition=y, routed_condition_mask=mask)
        )  # fmt: skip
        torch.testing.assert_close(got, explicit, rtol=1e-4, atol=1e-5)
        y[0, 0] += 1
        other = output_of(model(**batch, routed_condition=y, routed_condition_mask=mask))
        assert not torch.allclose(got[0], other[0], atol=1e-3)  # the condition matters


# PaliGemma counts its positions from the start of the row, padding too, whatever is attached.
@pytest.mark.parametrize("make", [llava, qwen2_vl])
def test_samples_keep_their_own_images(make):
    """A sample in a ragged, padded batch is what it is alone."""
    model = tapped(make)
    batch = image_batch(model, (1, 2, 1), pad=2)
    first = {name: value[:1] for name, value in batch.items()}
    if make is qwen2_vl:
        first["pixel_values"] = batch["pixel_values"][:16]
    keep = first["attention_mask"][0].bool()
    for name in ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"):
        if name in first:
            first[name] = first[name][:, keep]
    with torch.no_grad():
        both, alone = output_of(model(**batch)), output_of(model(**first))
    torch.testing.assert_close(both[0, -3:], alone[0, -3:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", ENTRY)
def test_in_sequence_layers_take_their_own_rows_at_the_image_tokens(make):
    model = tapped(make, targets=["q_proj"], condition_source="in_sequence")
    batch = image_batch(model, (1, 2))
    mask = batch["input_ids"] == IMAGE
    with torch.no_grad():
        got = output_of(model(**batch))
        assert torch.equal(got, output_of(model(**batch, routed_condition_mask=mask)))
        mask[1, 0] = ~mask[1, 0]
        assert not torch.allclose(got[1], output_of(model(**batch, routed_condition_mask=mask))[1])


def test_video_tokens_are_a_condition_too():
    model = tapped(qwen2_vl)
    ids = torch.tensor([[57] + [IMAGE] * 4 + [56, 57] + [58] * 4 + [56, 7, 8]])
    batch = {
        "input_ids": ids, "mm_token_type_ids": (ids == IMAGE).int() + 2 * (ids == 58).int(),
        "pixel_values": torch.randn(16, 96), "image_grid_thw": torch.tensor([[1, 4, 4]]),
        "pixel_values_videos": torch.randn(16, 96), "video_grid_thw": torch.tensor([[1, 4, 4]]),
    }  # fmt: skip
    with torch.no_grad():
        video = model.get_video_features(batch["pixel_values_videos"], batch["video_grid_thw"]).pooler_output[0]
        y = torch.cat([image_features(model, batch)[0], video])[None]
        got, explicit = output_of(model(**batch)), output_of(model(**batch, routed_condition=y))
        torch.testing.assert_close(got, explicit, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(got, output_of(model(**batch, routed_condition=y[:, :4])), atol=1e-4)


def test_blip2_taps_its_projection():
    model = tapped(blip2)
    batch = batch_of(model)
    with torch.no_grad():
        y = model.get_image_features(batch["pixel_values"], return_dict=True).pooler_output
        got, explicit = output_of(model(**batch)), output_of(model(**batch, routed_condition=y))
        torch.testing.assert_close(got, explicit, rtol=1e-4, atol=1e-6)
        assert not torch.allclose(got, output_of(model(**batch, routed_condition=y.flip(0))), atol=1e-4)


@pytest.mark.parametrize("make", [bart, t5])
@pytest.mark.parametrize("float_mask", [False, True])
def test_decoders_tap_the_encoder_s_states(make, float_mask):
    model = tapped(make)
    batch = batch_of(model)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    batch["attention_mask"] = mask.float() if float_mask else mask
    with torch.no_grad():
        y = model.get_encoder()(batch["input_ids"], attention_mask=mask).last_hidden_state
        got = output_of(model(**batch))
        assert torch.equal(got, output_of(model(**batch, routed_condition=y, routed_condition_mask=mask)))
        short = {"input_ids": batch["input_ids"][:1, :3], "decoder_input_ids": batch["decoder_input_ids"][:1]}
        torch.testing.assert_close(got[:1], output_of(model(**short)), rtol=1e-4, atol=1e-5)  # padded = alone


def test_an_encoder_mask_of_another_form_is_refused():
    model = tapped(bart)
    ids, y = torch.randint(3, 50, (2, 4)), torch.randn(2, 5, D)
    with pytest.raises(rp.ConditionShapeError, match=r"encoder attention mask \[batch, tokens\], got \(2, 1, 4, 5\)"):
        model.model.decoder(ids, encoder_hidden_states=y, encoder_attention_mask=torch.ones(2, 1, 4, 5))


@pytest.mark.parametrize("make", [dual_encoder, clip])
def test_dual_encoders_tap_the_vision_model(make):
    model = tapped(make)
    batch = batch_of(model)
    with torch.no_grad():
        y = model.vision_model(batch["pixel_values"]).last_hidden_state
        got = output_of(model(**batch))
        assert torch.equal(got, output_of(model(**batch, routed_condition=y)))
        # k texts for each image are no beams: which text goes with which image would be a guess
        four = {**batch, "input_ids": batch["input_ids"].repeat(2, 1)}
        with pytest.raises(rp.ConditionShapeError, match="input batch 4 does not match"):
            model(**four)


def test_a_path_taps_any_module_s_output():
    class TwoTowers(nn.Module):
        def __init__(self):
            super().__init__()
            self.see, self.read = nn.Linear(6, 12), nn.Linear(8, 8)

        def forward(self, image, x, twice=False):
            y = self.see(image)
            if twice:
                self.see(image)
            return self.read(x) + y.mean()

    model = TwoTowers()
    report = rp.attach(model, rp.RoutedLoRAConfig(target_modules="all-linear", r=4, condition_features=12), tap="see")
    assert report.names == ["read"] and report.skipped == {"see": "it runs where the output of 'see' is not known"}
    assert report.tap == "output of 'see'" and "condition: output of 'see'" in str(report)
    awaken(model)
    image, x = torch.randn(2, 3, 6), torch.randn(2, 5, 8)
    y = model.see(image)
    assert torch.equal(model(image, x), model.read(x, y) + y.mean())
    with pytest.raises(rp.MissingConditionError):
        model.read(x)  # the condition ended with the call
    with pytest.raises(rp.UnsupportedError, match="'see', ran twice in one call"):
        model(image, x, twice=True)
    with pytest.raises(rp.ConditionShapeError, match=r"output of 'see' must be .* got \(2, 3, 1, 12\)"):
        model(image[:, :, None], x)
    rp.detach(model)
    assert not model.see._forward_hooks


def test_only_what_makes_images_asks_for_their_tokens():
    class Listens(nn.Module):
        def __init__(self):
            super().__init__()
            self.config = SimpleNamespace(model_type="other", image_token_id=7, to_dict=dict)
            self.audio_tower, self.read = nn.Linear(6, 12), nn.Linear(8, 8)

        def forward(self, input_ids, sound, x):
            self.audio_tower(sound)
            return self.read(x)

    model = Listens()
    rp.attach(model, rp.RoutedLoRAConfig(target_modules=["read"], r=4, condition_features=12), tap="audio_tower")
    out = model(torch.tensor([[7, 1], [2, 3]]), torch.randn(2, 3, 6), torch.randn(2, 5, 8))
    assert out.isfinite().all()  # one sound for each row, whichever has an image


def test_as_many_images_as_samples_are_not_one_for_each():
    """A path's outputs are of images, one after another: two of the first sample are not one of the second."""
    model = llava()
    config = rp.RoutedLoRAConfig(target_modules=r".*language_model.*q_proj", r=4)
    rp.attach(model, config, tap="model.multi_modal_projector")
    awaken(model)
    assert model(**image_batch(model, (1, 1))).logits.isfinite().all()
    for images, row in (((2, 0), 1), ((0, 2), 0)):
        for grad in (True, False):
            with (
                torch.set_grad_enabled(grad),
                pytest.raises(rp.UnsupportedError, match=f"row {row} has no image token"),
            ):
                model(**image_batch(model, images))
    assert model(**image_batch(model, (1, 1))).logits.isfinite().all()


# ------------------------------------------------------------------------------------------------ the condition follows
@pytest.mark.parametrize(
    "make, in_sequence", [*((make, is_so) for make in ENTRY for is_so in (False, True)), (blip2, False)]
)
def test_a_text_only_batch_never_sees_an_earlier_image(make, in_sequence):
    options = {"condition_source": "in_sequence"} if in_sequence else {}
    model = tapped(make, targets=["layers.0.self_attn.q_proj"] if make is blip2 else ["q_proj"], **options)
    batch = batch_of(model)
    text = text_only(batch)
    run = model.language_model if make is blip2 else model
    with torch.no_grad():
        out = model(**batch)
        for call in (run, run.generate):
            with pytest.raises(rp.MissingConditionError):
                call(**text, **({} if call is run else {"max_new_tokens": 2}))
        model.generate(**batch, max_new_tokens=2)
        with pytest.raises(rp.MissingConditionError):
            run(**text)
        with pytest.raises(rp.MissingConditionError):  # image tokens without an image
            run(**{**text, "input_ids": batch["input_ids"]})
    assert output_of(out).isfinite().all()


@pytest.mark.parametrize("make", [llava, bart, dual_encoder])
def test_missing_base_is_the_frozen_model_for_text_alone(make):
    model = tapped(make, missing="base")
    batch = batch_of(model)
    with torch.no_grad():
        output_of(model(**batch))
        part, text = (model, text_only(batch)) if make is llava else (
            (model.text_model, {"input_ids": batch["input_ids"]}) if make is dual_encoder
            else (model.model.decoder, {"input_ids": batch["input_ids"]})
        )  # fmt: skip
        got = output_of(part(**text))
        rp.detach(model)
        torch.testing.assert_close(got, output_of(part(**text)))


@pytest.mark.parametrize("in_sequence", [False, True])
def test_an_emptied_cache_forgets_the_image(in_sequence):
    from transformers import DynamicCache, StaticCache

    options = {"condition_source": "in_sequence"} if in_sequence else {}
    model = tapped(llava, targets=["q_proj"], **options)
    batch = batch_of(model)
    for cache in (DynamicCache(), StaticCache(config=model.config.get_text_config(), max_cache_len=32)):
        with torch.no_grad():
            model(**batch, past_key_values=cache)
            cache.reset()
            with pytest.raises(rp.MissingConditionError):
                model(**text_only(batch), past_key_values=cache)
            cache.reset()
            with pytest.raises(rp.MissingConditionError):  # one token, as a decode step has
                model(batch["input_ids"][:, -1:], past_key_values=cache)


@pytest.mark.parametrize("in_sequence", [False, True])
def test_an_emptied_cache_stays_without_the_image(in_sequence):
    """A step after the text prompt that took the emptied cache is as far from the image as the prompt."""
    from transformers import DynamicCache

    options = {"condition_source": "in_sequence"} if in_sequence else {}
    model = tapped(llava, targets=["q_proj"], missing="base", **options)
    batch, cache = batch_of(model), DynamicCache()
    text = text_only(batch)["input_ids"]
    with torch.no_grad():
        model(**batch, past_key_values=cache)
        cache.reset()
        model(text, past_key_values=cache)
        got = model(text[:, :1], past_key_values=cache).logits
        rp.detach(model)
        want = model(torch.cat([text, text[:, :1]], 1)).logits[:, -1:]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [bart, t5])
def test_a_decoder_s_condition_is_that_of_the_call_whatever_the_cache_had(make):
    model = tapped(make)
    states = [model.get_encoder()(batch_of(model)["input_ids"]).last_hidden_state for _ in range(2)]
    ids = torch.randint(3, 50, (2, 1))
    with torch.no_grad():
        outs = []
        for keeps in (True, False):
            cache = model(encoder_outputs=(states[0],), decoder_input_ids=ids).past_key_values
            model(encoder_outputs=(states[0],), decoder_input_ids=ids, past_key_values=cache)
            if not keeps:
                cache.__dict__.pop("_routed_peft", None)
            out = model(encoder_outputs=(states[1],), decoder_input_ids=ids, past_key_values=cache)
            outs.append(out.logits)
    torch.testing.assert_close(*outs)


@pytest.mark.parametrize("own_cache", [False, True])
@pytest.mark.parametrize("in_sequence", [False, True])
def test_each_cache_has_its_own_image(own_cache, in_sequence):
    """Two conversations that take turns, and a second turn of text: as one uncached run."""
    from transformers import DynamicCache

    options = {"condition_source": "in_sequence"} if in_sequence else {}
    model = tapped(llava, targets=["q_proj"], **options)
    batches = [batch_of(model), batch_of(model)]
    more = torch.randint(3, 50, (2, 3))
    with torch.no_grad():
        outs = [model(**b, **({"past_key_values": DynamicCache()} if own_cache else {})) for b in batches]
        for batch, out in zip(batches, outs, strict=True):
            twin = copy.deepcopy(out.past_key_values)
            long = {"input_ids": torch.cat([batch["input_ids"], more], 1), "pixel_values": batch["pixel_values"]}
            want = output_of(model(**long))[:, -3:]
            for cache in (out.past_key_values, twin):
                got = model(input_ids=more, past_key_values=cache).logits
                torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_images_for_a_cache_that_holds_tokens_raise():
    model = tapped(llava)
    batch = batch_of(model)
    with torch.no_grad():
        cache = model(**batch).past_key_values
        with pytest.raises(rp.UnsupportedError, match="given a condition when the cache already held tokens"):
            model(**batch, past_key_values=cache)
        y = torch.randn(2, 3, D)
        model(**batch, past_key_values=cache, routed_condition=y)  # what is given needs no tap
        with pytest.raises(rp.MissingConditionError):  # the error left nothing behind
            model(**text_only(batch))


def test_images_without_input_ids_raise():
    model = tapped(llava)
    batch = batch_of(model)
    embeds = model.get_input_embeddings()(batch["input_ids"])
    call = {"inputs_embeds": embeds, "pixel_values": batch["pixel_values"]}
    with torch.no_grad(), pytest.raises(rp.UnsupportedError, match="image tokens in input_ids, which this call does"):
        model(**call)
    with torch.no_grad():
        model(**call, routed_condition=torch.randn(2, 3, D))


def test_an_aborted_generate_of_blip2_leaves_nothing():
    model = tapped(blip2)
    batch = batch_of(model)
    with pytest.raises(ValueError, match="not used by the model"):  # after the projection, before the language model
        model.generate(**batch, nonsense=1)
    with torch.no_grad(), pytest.raises(rp.MissingConditionError):
        model.language_model(**text_only(batch))
    with pytest.raises(IndexError):  # the same in a call
        model(**{**batch, "input_ids": batch["input_ids"] + 100})
    with torch.no_grad(), pytest.raises(rp.MissingConditionError):
        model.language_model(**text_only(batch))
    model.get_image_features(batch["pixel_values"])  # and a projection by itself
    with torch.no_grad(), pytest.raises(rp.MissingConditionError):
        model.language_model(**text_only(batch))


@pytest.mark.parametrize("make", [llava, blip2, bart, dual_encoder])
def test_what_is_given_comes_before_the_tap(make):
    model, batch = tapped(make), batch_of(make())
    y = torch.randn(2, 3, WIDTH.get(make, D))
    with torch.no_grad():
        by_tap = output_of(model(**batch))
        given = output_of(model(**batch, routed_condition=y))
        assert not torch.allclose(by_tap, given, atol=1e-4)
        with rp.condition(model, y):
            assert torch.equal(output_of(model(**batch)), given)
        assert torch.equal(output_of(model(**batch)), by_tap)
        with rp.condition(model, None), pytest.raises(rp.MissingConditionError):
            model(**batch)


def test_the_input_mask_joins_a_tapped_condition():
    model = tapped(dual_encoder, routing="cross_gram")
    batch, valid = batch_of(model), torch.tensor([[1, 1, 0, 0, 0]] * 2)
    with torch.no_grad():
        y = model.vision_model(batch["pixel_values"]).last_hidden_state
        got = model(**batch, routed_input_mask=valid).text_embeds
        assert torch.equal(got, model(**batch, routed_condition=y, routed_input_mask=valid).text_embeds)
        assert not torch.allclose(got, model(**batch).text_embeds, atol=1e-4)


def test_copies_tap_themselves():
    model = tapped(llava)
    batch = batch_of(model)
    with torch.no_grad():
        want = output_of(model(**batch))
        twin = copy.deepcopy(model)
        with pytest.raises(rp.MissingConditionError):  # a copy knows nothing of the original's caches
            twin(batch["input_ids"][:, :1], past_key_values=model(**batch).past_key_values)
        rp.detach(model)
        assert torch.equal(output_of(twin(**batch)), want)


@pytest.mark.parametrize("missing", ["error", "base", "lora"])
@pytest.mark.parametrize("routing", ["add", "mul", "expand", "gram", "gram_relu", "ones"])
@pytest.mark.parametrize("in_sequence", [False, True])
def test_a_text_sample_among_images_has_no_condition_token(routing, missing, in_sequence):
    """Its V is 0, whatever ``missing`` says of calls: as alone under "lora" for add, else as alone under "base"."""
    options = {"condition_source": "in_sequence"} if in_sequence else {}
    model = tapped(llava, targets=["q_proj", "v_proj"], routing=routing, missing=missing, **options)
    batch = image_batch(model, (1, 0))
    keep = batch["attention_mask"][1].bool()
    with torch.no_grad():
        got = output_of(model(**batch))[1, keep]
        for layer in model.modules():
            if isinstance(layer, rp.RoutedLoRA):
                layer.missing = "lora" if routing == "add" else "base"
        alone = output_of(model(input_ids=batch["input_ids"][1:, keep]))[0]
        torch.testing.assert_close(got, alone, rtol=1e-4, atol=1e-5)
        rp.detach(model)
        frozen = output_of(model(input_ids=batch["input_ids"][1:, keep]))[0]
        assert torch.allclose(got, frozen, atol=1e-4) == (routing != "add")


# ------------------------------------------------------------------------------------------------ training
@pytest.fixture
def double():
    """Double precision, where a wrong gradient cannot pass for rounding."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("make", [llava, qwen2_vl, paligemma, blip2, bart, t5])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_gradients_equal_the_plain_ones(make, reentrant, double):
    """Two forwards before the backward, with a trainable projector on the way to the condition."""
    model = tapped(make)
    model.train()
    projector = {
        llava: "multi_modal_projector.linear_2", qwen2_vl: "merger.mlp.2", paligemma: "projector.linear",
        blip2: "language_projection", bart: "encoder.layers.0.fc2", t5: "encoder.block.0.layer.1.DenseReluDense.wo",
    }[make]  # fmt: skip
    name = next(name for name, _ in model.named_modules() if name.endswith(projector))
    weight = model.get_submodule(name).weight.requires_grad_()
    batches = [batch_of(model), batch_of(model)]
    extra = {} if make in (bart, t5) else {"use_cache": False}

    def run(backward=lambda loss: loss.backward()):
        model.zero_grad()
        losses = [output_of(model(**batch, **extra)).square().mean() for batch in batches]
        for loss in losses:
            backward(loss)
        return gradients(model)

    wanted = run()
    conditions = [layer.condition_A for layer in model.modules() if isinstance(layer, rp.RoutedLoRA)]
    values = [p.detach().clone() for p in conditions]
    for p in conditions:
        p.data.zero_()
    assert not torch.allclose(run()[name + ".weight"], wanted[name + ".weight"], rtol=1e-3)  # y has a part in it
    for p, value in zip(conditions, values, strict=True):
        p.data.copy_(value)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    with ThreadPoolExecutor(1) as pool:
        for backward in (lambda loss: loss.backward(), lambda loss: pool.submit(loss.backward).result()):
            got = run(backward)
            assert got.keys() == wanted.keys() and weight.grad is not None
            for key in wanted:
                torch.testing.assert_close(got[key], wanted[key], rtol=1e-6, atol=1e-9, msg=key)


@pytest.mark.parametrize("reentrant", [False, True])
def test_in_sequence_masks_are_bound(reentrant):
    model = tapped(llava, targets=["q_proj"], condition_source="in_sequence")
    model.train()
    batches = [image_batch(model, (1, 1)), image_batch(model, (1, 2))]

    def run():
        model.zero_grad()
        sum(output_of(model(**batch)).square().mean() for batch in batches).backward()
        return gradients(model)

    wanted = run()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    got = run()
    assert got.keys() == wanted.keys()
    for key in wanted:
        torch.testing.assert_close(got[key], wanted[key], rtol=1e-3, atol=1e-6, msg=key)


def test_checkpoints_of_a_part_that_is_called_alone_are_bound():
    model = tapped(llava)
    model.train()
    batch = batch_of(model)

    def run():
        model.zero_grad()
        losses = [model.model(**batch)[0].square().mean() for _ in range(2)]
        losses[0].backward()
        return gradients(model)

    wanted = run()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    got = run()
    for key in wanted:
        torch.testing.assert_close(got[key], wanted[key], rtol=1e-3, atol=1e-6, msg=key)


# ------------------------------------------------------------------------------------------------ attach
@pytest.mark.parametrize("make", [*ENTRY, blip2, bart, t5, dual_encoder, clip])
def test_towers_are_left_alone_and_detach_restores(make):
    model = make()
    plain = output_of(model(**batch_of(model)))  # first: transformers notes things on modules as they run
    hooks = [(len(m._forward_pre_hooks), len(m._forward_hooks), sorted(m.__dict__)) for m in model.modules()]
    targets = {dual_encoder: r".*\.(query|q_proj)", t5: ["q"]}.get(make, ["q_proj"])
    report = rp.attach(model, rp.RoutedLoRAConfig(target_modules=targets, r=4, condition_features=WIDTH.get(make, D)),
                       tap="auto")  # fmt: skip
    side = {bart: "model.decoder.", t5: "decoder.", dual_encoder: "text_model.", clip: "text_model."}.get(
        make, "language_model."
    )
    assert report.names and all(side in name for name in report.names)
    assert report.tap is not None and (make in (qwen2_vl, blip2) or report.skipped)  # those have a fused qkv
    assert all("is not known" in reason for reason in report.skipped.values())
    assert all(layer.ran and not layer.never_ran for layer in [rp.check(model, **batch_of(model))])
    rp.detach(model)
    assert hooks == [(len(m._forward_pre_hooks), len(m._forward_hooks), sorted(m.__dict__)) for m in model.modules()]
    assert output_of(model(**batch_of(model))).shape == plain.shape


def test_a_tap_that_is_not_there_is_refused():
    model = roberta_classifier()
    with pytest.raises(
        rp.UnsupportedError, match=r"no tap for model type 'roberta' \(it knows blip-2, .*routed_condition"
    ):
        rp.attach(model, rp.RoutedLoRAConfig(target_modules=["query"]), tap="auto")
    with pytest.raises(rp.RoutedPeftError, match="tap='encoder.nope': RobertaFor.* has no module of that path"):
        rp.attach(model, rp.RoutedLoRAConfig(target_modules=["query"], tap="encoder.nope"))
    with pytest.raises(rp.RoutedPeftError, match="12 modules match|modules match, such as 'roberta.*is not known"):
        rp.attach(model, rp.RoutedLoRAConfig(target_modules=["query"]), tap="roberta")
    assert not any(isinstance(m, rp.RoutedLoRA) for m in model.modules())
    with pytest.raises(ValueError, match="tap must be None, 'auto' or the path of a module, got 3"):
        rp.RoutedLoRAConfig(target_modules=["query"], tap=3)
    for make in (bart, blip2, dual_encoder):
        with pytest.raises(rp.UnsupportedError, match="in_sequence' needs the positions"):
            rp.attach(
                make(), rp.RoutedLoRAConfig(target_modules=TARGETS[make], condition_source="in_sequence"), tap="auto"
            )
    for make in (gpt2, llama):
        with pytest.raises(rp.UnsupportedError, match="no tap for model type"):
            rp.attach(make(), rp.RoutedLoRAConfig(target_modules=["c_attn"]) if make is gpt2
                      else rp.RoutedLoRAConfig(target_modules=["q_proj"]), tap="auto")  # fmt: skip


def test_the_tap_argument_leaves_the_config_as_it_was():
    config = rp.RoutedLoRAConfig(target_modules=["q_proj"], condition_features=D)
    assert rp.attach(llava(), config, tap="auto").tap and config.tap is None


@pytest.mark.parametrize("in_sequence", [False, True])
def test_a_tap_compiles_without_a_break(in_sequence):
    options = {"condition_source": "in_sequence"} if in_sequence else {}
    model = tapped(llava, targets=["q_proj"], **options)
    compiled = torch.compile(model, fullgraph=True, backend="eager")  # what the tracer makes of it; ops: elsewhere
    with torch.no_grad():
        for batch in (batch_of(model), image_batch(model, (1, 2))):
            want = output_of(model(**batch, use_cache=False))
            torch.testing.assert_close(output_of(compiled(**batch, use_cache=False)), want, rtol=1e-4, atol=1e-5)


def test_the_tap_is_saved_and_loaded(tmp_path):
    model = tapped(llava)
    batch = batch_of(model)
    with torch.no_grad():
        want = output_of(model(**batch))
        rp.save_adapter(model, tmp_path)
        rp.detach(model)
        report = rp.load_adapter(model, tmp_path)
        assert report.tap == "image tokens at the entry of 'model.language_model'"
        assert torch.equal(output_of(model(**batch)), want)
