"""Vision- and audio-language models that tap="auto" knows by how they are built: tiny ones, with random weights."""

import inspect

import pytest
import torch
import transformers as tf
from generating import assert_same, generate, uncached
from tiny_models import (
    CLIP_VISION,
    IMAGE,
    SMALL,
    D,
    awaken,
    bart,
    gradients,
    image_batch,
    llama,
    llava,
    output_of,
)

import routed_peft as rp

TEXT = {
    **SMALL, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
MROPE = {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}}
TOKENS = {"image_token_id": IMAGE, "video_token_id": 58}
BOUNDS = {"vision_start_token_id": 57, "vision_end_token_id": 56}
QWEN_VISION = {
    "depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2,
    "temporal_patch_size": 2, "in_channels": 3, "out_hidden_size": D,
}  # fmt: skip
SIGLIP = {**CLIP_VISION, "model_type": "siglip_vision_model", "vision_use_head": False}
FINE = {"patch_size": 4}  # where the features of four patches become one


def text(model_type, **more):
    return {**TEXT, "model_type": model_type, **more}


# A family: a model, and the pixels of `count` images (or as many recordings) with what goes along.
def patches(count):
    return {"pixel_values": torch.randn(16 * count, 96), "image_grid_thw": torch.tensor([[1, 4, 4]] * count)}


def plain(count):
    return {"pixel_values": torch.randn(count, 3, 16, 16)}


def sized(count):
    return {**plain(count), "image_sizes": torch.tensor([[16, 16]] * count)}


def tiled(count):
    return {"pixel_values": torch.randn(count, 2, 3, 16, 16), "image_sizes": torch.tensor([[16, 16]] * count)}


def each_with_one(count):
    return {"pixel_values": torch.randn(count, 1, 3, 16, 16)}


def qwen2_5_vl():
    vision = {**QWEN_VISION, "window_size": 16, "fullatt_block_indexes": [1]}
    config = tf.Qwen2_5_VLConfig(text_config={**TEXT, **MROPE}, vision_config=vision, **TOKENS, **BOUNDS)
    return tf.Qwen2_5_VLForConditionalGeneration(config), patches


def qwen3_vl():
    vision = {**QWEN_VISION, "deepstack_visual_indexes": [0], "num_position_embeddings": 16}
    config = tf.Qwen3VLConfig(text_config={**TEXT, **MROPE}, vision_config=vision, **TOKENS, **BOUNDS)
    return tf.Qwen3VLForConditionalGeneration(config), patches


def qwen3_5():
    linear = {
        "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
        "layer_types": ["linear_attention", "full_attention"],
    }  # fmt: skip
    vision = {**QWEN_VISION, "num_position_embeddings": 16}
    config = tf.Qwen3_5Config(text_config={**TEXT, **MROPE, **linear}, vision_config=vision, **TOKENS, **BOUNDS)
    return tf.Qwen3_5ForConditionalGeneration(config), patches


def glm4v():
    rope = {"rope_parameters": {**MROPE["rope_parameters"], "partial_rotary_factor": 1.0}}
    bounds = {f"{kind}_{end}_token_id": 57 - (end == "end") for kind in ("image", "video") for end in ("start", "end")}
    vision = {**QWEN_VISION, "image_size": 16}
    config = tf.Glm4vConfig(text_config={**TEXT, **rope}, vision_config=vision, **TOKENS, **bounds)
    return tf.Glm4vForConditionalGeneration(config), patches


def llava_next():
    vision = {**CLIP_VISION, "model_type": "clip_vision_model"}
    config = tf.LlavaNextConfig(
        text_config=text("llama"), vision_config=vision, image_token_index=IMAGE, image_grid_pinpoints=[[16, 16]]
    )
    return tf.LlavaNextForConditionalGeneration(config), tiled


def llava_onevision():
    config = tf.LlavaOnevisionConfig(
        text_config=text("qwen2"), vision_config=SIGLIP, image_token_index=IMAGE, video_token_index=58,
        image_grid_pinpoints=[[16, 16]],
    )  # fmt: skip
    return tf.LlavaOnevisionForConditionalGeneration(config), tiled


def vipllava():
    vision = {**CLIP_VISION, "model_type": "clip_vision_model", "num_hidden_layers": 4}
    config = tf.VipLlavaConfig(
        text_config=text("llama"), vision_config=vision, image_token_index=IMAGE, vision_feature_layers=[-2, -3]
    )
    return tf.VipLlavaForConditionalGeneration(config), plain


def internvl():
    vision = {**CLIP_VISION, "model_type": "internvl_vision", "image_size": [16, 16], "patch_size": [4, 4]}
    config = tf.InternVLConfig(
        text_config=text("qwen2"), vision_config=vision, image_token_id=IMAGE, image_seq_length=4, downsample_ratio=0.5
    )
    return tf.InternVLForConditionalGeneration(config), plain


def smolvlm():
    vision = {**CLIP_VISION, **FINE, "model_type": "smolvlm_vision"}
    config = tf.SmolVLMConfig(
        text_config=text("llama"), vision_config=vision, image_token_id=IMAGE, scale_factor=2, pad_token_id=0
    )
    return tf.SmolVLMForConditionalGeneration(config), each_with_one


def idefics3():
    vision = {**CLIP_VISION, **FINE, "model_type": "idefics3_vision"}
    config = tf.Idefics3Config(
        text_config=text("llama"), vision_config=vision, image_token_id=IMAGE, scale_factor=2, pad_token_id=0
    )
    return tf.Idefics3ForConditionalGeneration(config), each_with_one


def gemma3():
    layers = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16, "query_pre_attn_scalar": 8}
    config = tf.Gemma3Config(
        text_config=text("gemma3_text", **layers), vision_config=SIGLIP, image_token_index=IMAGE,
        mm_tokens_per_image=4, boi_token_index=57, eoi_token_index=56,
    )  # fmt: skip
    model = tf.Gemma3ForConditionalGeneration(config)
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight)  # zeros, if not loaded
    return model, plain


def mistral3():
    vision = {**CLIP_VISION, **FINE, "model_type": "pixtral", "head_dim": 8}
    config = tf.Mistral3Config(
        text_config=text("mistral"), vision_config=vision, image_token_index=IMAGE, spatial_merge_size=2
    )
    return tf.Mistral3ForConditionalGeneration(config), sized


def aya_vision():
    config = tf.AyaVisionConfig(
        text_config=text("cohere2", sliding_window=16), vision_config={**SIGLIP, **FINE}, image_token_index=IMAGE,
        downsample_factor=2,
    )  # fmt: skip
    return tf.AyaVisionForConditionalGeneration(config), plain


def cohere2_vision():
    config = tf.Cohere2VisionConfig(
        text_config=text("cohere2", sliding_window=16), vision_config={**SIGLIP, **FINE}, image_token_id=IMAGE,
        downsample_factor=2, alignment_intermediate_size=24,
    )  # fmt: skip
    return tf.Cohere2VisionForConditionalGeneration(config), plain


def ovis2():
    vision = {
        **CLIP_VISION, **FINE, "model_type": "ovis2_vision_model", "vocab_size": 32, "hidden_stride": 2,
        "num_visual_indicator_tokens": 5,
    }  # fmt: skip
    config = tf.Ovis2Config(
        text_config=text("qwen2"), vision_config=vision, image_token_id=IMAGE, vocab_size=60, hidden_size=D,
        visual_indicator_token_ids=[51, 52, 53, 54, 55],
    )  # fmt: skip
    return tf.Ovis2ForConditionalGeneration(config), plain


def lfm2_vl():
    layers = {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}
    vision = {**CLIP_VISION, **FINE, "model_type": "siglip2_vision_model", "num_patches": 16, "vision_use_head": False}
    config = tf.Lfm2VlConfig(
        text_config=text("lfm2", **layers), vision_config=vision, image_token_id=IMAGE, downsample_factor=2,
        projector_hidden_size=24,
    )  # fmt: skip

    def pixels(count):
        return {
            "pixel_values": torch.randn(count, 16, 48), "spatial_shapes": torch.tensor([[4, 4]] * count),
            "pixel_attention_mask": torch.ones(count, 16, dtype=torch.long),
        }  # fmt: skip

    return tf.Lfm2VlForConditionalGeneration(config), pixels


def fuyu():
    config = tf.FuyuConfig(**TEXT, text_config=text("persimmon"), image_size=16, patch_size=8, image_token_id=IMAGE)
    return tf.FuyuForCausalLM(config), lambda count: {"image_patches": torch.randn(count, 4, 192)}


LISTENS = {
    "hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_mel_bins": 8,
    "max_source_positions": 16,
}  # fmt: skip


def voxtral():
    config = tf.VoxtralConfig(text_config=text("llama"), audio_config=LISTENS, audio_token_id=IMAGE)
    return tf.VoxtralForConditionalGeneration(config), lambda count: {"input_features": torch.randn(count, 8, 32)}


def audioflamingo3():
    config = tf.AudioFlamingo3Config(text_config=text("qwen2"), audio_config=LISTENS, audio_token_id=IMAGE)

    def recordings(count):
        mask = torch.ones(count, 32, dtype=torch.long)
        return {"input_features": torch.randn(count, 8, 32), "input_features_mask": mask}

    return tf.AudioFlamingo3ForConditionalGeneration(config), recordings


FAMILIES = [
    qwen2_5_vl, qwen3_vl, qwen3_5, glm4v, llava_next, llava_onevision, vipllava, internvl, smolvlm, idefics3, gemma3,
    mistral3, aya_vision, cohere2_vision, ovis2, lfm2_vl, fuyu, voxtral,
    audioflamingo3,
]  # fmt: skip


@torch.no_grad()
def features_of(model, pixels):
    """The features [tokens, D] of each image, as they stand among the embeddings."""
    if "input_features" in pixels:
        found = model.model.get_audio_features(*pixels.values(), return_dict=True).pooler_output
        return [*found.reshape(len(pixels["input_features"]), -1, D)]
    out = model.model.get_image_features(*pixels.values(), return_dict=True)
    images = out.last_hidden_state if out.pooler_output is None else out.pooler_output  # the former in a Fuyu
    return [image.reshape(-1, D) for image in images]


def batch_of(model, pixels_of, images):
    """A batch whose sample i has images[i] images and then text, padded on the left; and the samples' conditions."""
    pixels = pixels_of(sum(images))
    features, rows, conditions = iter(features_of(model, pixels)), [], []
    for count in images:
        mine = [next(features) for _ in range(count)]
        row = [token for image in mine for token in [57] + [IMAGE] * len(image) + [56]]
        rows.append(row + torch.randint(3, 50, (3,)).tolist())
        conditions.append(torch.cat(mine))
    length = max(map(len, rows))
    ids = torch.tensor([[0] * (length - len(row)) + row for row in rows])
    batch = {"input_ids": ids, "attention_mask": (ids != 0).long(), **pixels}
    for name in ("mm_token_type_ids", "token_type_ids"):
        if name in inspect.signature(model.model.forward).parameters:
            batch[name] = (ids == IMAGE).long()
    return batch, conditions


def tapped(make, **options):
    model, pixels_of = make()
    if options.get("condition_source") != "in_sequence":
        options = {"condition_features": D, **options}
    names = r".*\.(q_proj|v_proj|down_proj|w2|query_key_value|dense_4h_to_h)"
    config = rp.RoutedLoRAConfig(target_modules=names, r=4, routing="gram", **options)
    report = rp.attach(model.eval(), config, tap="auto")
    assert report.names and all("vision" not in name for name in report.names)
    with torch.no_grad():
        for name, p in awaken(model).named_parameters():
            if name.endswith(("lora_B", "condition_A")):
                p.mul_(30)  # enough to change tokens: tiny models embed tiny numbers
    return model, pixels_of


@pytest.mark.parametrize("make", FAMILIES)
def test_the_condition_is_the_images_features(make):
    model, pixels_of = tapped(make)
    batch, conditions = batch_of(model, pixels_of, (1, 2))
    y = torch.nn.utils.rnn.pad_sequence(conditions, batch_first=True)
    mask = torch.arange(y.shape[1]) < torch.tensor([[len(condition)] for condition in conditions])
    with torch.no_grad():
        got = output_of(model(**batch))
        explicit = output_of(model(**batch, routed_condition=y, routed_condition_mask=mask))
        torch.testing.assert_close(got, explicit, rtol=1e-4, atol=1e-5)
        y[0, 0] += 1
        other = output_of(model(**batch, routed_condition=y, routed_condition_mask=mask))
        assert not torch.allclose(got[0], other[0], atol=1e-3)  # the condition matters
        alone = {name: batch[name].clamp(max=50) for name in ("input_ids", "attention_mask")}
        with pytest.raises(rp.MissingConditionError):
            model(**alone)
    model(**batch).logits.float().square().mean().backward()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert set(gradients(model)) == trained


@pytest.mark.parametrize("make", FAMILIES)
def test_in_sequence_layers_take_their_own_rows_at_the_image_tokens(make):
    model, pixels_of = tapped(make, condition_source="in_sequence")
    batch, _ = batch_of(model, pixels_of, (1, 2))
    mask = batch["input_ids"] == IMAGE
    with torch.no_grad():
        got = output_of(model(**batch))
        assert torch.equal(got, output_of(model(**batch, routed_condition_mask=mask)))
        last = mask[1].nonzero()[-1]
        mask[1, last] = False
        less = output_of(model(**batch, routed_condition_mask=mask))
    assert torch.equal(got[0], less[0]) and not torch.allclose(got[1, last:], less[1, last:])


@pytest.mark.parametrize("make", FAMILIES)
def test_a_generation_is_the_uncached_one(make):
    model, pixels_of = tapped(make)
    batch, _ = batch_of(model, pixels_of, (1, 1))
    want = uncached(model, batch, 3)
    assert_same(generate(model, batch, 3), want)
    with rp.condition(model, torch.zeros(2, 1, D)):  # an image matters: without its update the logits are others
        assert not torch.allclose(uncached(model, batch, 3)[1], want[1], atol=1e-3)


def instructblip():
    qformer = {**SMALL, "num_hidden_layers": 1, "encoder_hidden_size": 16}
    opt = {"model_type": "opt", "hidden_size": D, "word_embed_proj_dim": D, "ffn_dim": 48, "num_hidden_layers": 1}
    config = tf.InstructBlipConfig(
        vision_config=CLIP_VISION, qformer_config=qformer, text_config={**opt, "num_attention_heads": 4},
        image_token_index=IMAGE,
    )  # fmt: skip
    return tf.InstructBlipForConditionalGeneration(config)


def mllama():
    vision = {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_global_layers": 1, "image_size": 16,
        "patch_size": 8, "attention_heads": 2, "intermediate_layers_indices": [0], "vision_output_dim": 32,
    }  # fmt: skip
    layers = {"cross_attention_layers": [1], "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    config = tf.MllamaConfig(vision_config=vision, text_config={**TEXT, **layers}, image_token_index=IMAGE)
    return tf.MllamaForConditionalGeneration(config)


@pytest.mark.parametrize("make", [instructblip, mllama])
def test_a_model_of_another_build_is_not_known(make):
    """One whose generate does not call the model around its language model, and one of cross-attention."""
    with pytest.raises(rp.UnsupportedError, match=f"no tap for model type '{make.__name__}'"):
        rp.attach(make(), rp.RoutedLoRAConfig(target_modules=["q_proj"]), tap="auto")


class Bare(torch.nn.Module):
    """Has all but what puts the images among the embeddings."""

    def __init__(self):
        super().__init__()
        self.config, self.language_model = llava().config, llama().model

    def forward(self, input_ids=None, pixel_values=None):
        return self.language_model(inputs_embeds=self.embedded(input_ids, pixel_values))

    def embedded(self, input_ids, pixel_values):
        return self.language_model.embed_tokens(input_ids)


class Full(Bare):
    def embedded(self, input_ids, pixel_values):
        embeds = super().embedded(input_ids, None)
        return embeds.masked_scatter((input_ids == IMAGE)[..., None], pixel_values)


class WithoutPixels(Full):
    def forward(self, input_ids=None):
        return super().forward(input_ids)


class OfAudio(Full):
    def forward(self, input_ids=None, input_values=None):
        return super().forward(input_ids, input_values)


class WithEncoder(Full):
    def __init__(self):
        super().__init__()
        self.language_model = bart().model


class WithItsOwnLoop(Full):
    def _sample(self):
        raise NotImplementedError

    _sample.__module__ = "transformers.models.its_own"


def test_what_a_model_must_have_to_be_known():
    config = rp.RoutedLoRAConfig(target_modules=["q_proj"], r=4)
    for kind in (Full, OfAudio):
        assert rp.attach(kind(), config, tap="auto").tap == "image tokens at the entry of 'language_model'"
    for kind in (Bare, WithoutPixels, WithEncoder, WithItsOwnLoop):
        with pytest.raises(rp.UnsupportedError, match="no tap for model type 'llava'"):
            rp.attach(kind(), config, tap="auto")


class WithoutEmbeddings(tf.LlavaModel):
    def forward(self, input_ids=None, pixel_values=None, attention_mask=None, **more):
        return self.language_model(input_ids=input_ids, attention_mask=attention_mask)


class Longer(tf.LlavaModel):
    def forward(self, input_ids=None, pixel_values=None, attention_mask=None, **more):
        return self.language_model(inputs_embeds=self.get_input_embeddings()(torch.cat([input_ids] * 2, 1)))


@pytest.mark.parametrize("kind, got", [(WithoutEmbeddings, "none"), (Longer, r"\(2, 22, 32\)")])
def test_a_language_model_that_is_not_given_the_prompt_s_embeddings_has_no_images(kind, got):
    model = llava()
    model.model.__class__ = kind
    rp.attach(model, rp.RoutedLoRAConfig(target_modules=["q_proj"], r=4), tap="auto")
    with pytest.raises(rp.UnsupportedError, match=rf"a call with input_ids \(2, 11\), and got {got}; pass"):
        model(**image_batch(model))
