"""Encoder-decoders that tap="auto" knows by how they are built: tiny ones, with random weights."""

import pytest
import torch
import transformers as tf
from tiny_models import NO_DROPOUT, SMALL, D, awaken, gradients

import routed_peft as rp

TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
SIZES = {
    "d_model": D, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "vocab_size": 60, "dropout": 0.0, **TOKENS,
}  # fmt: skip


def text():
    ids = torch.randint(3, 50, (2, 6))
    ids[0, 4:] = 0
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def recordings():
    return {"input_features": torch.randn(2, 8, 32)}


def pictures():
    return {"pixel_values": torch.randn(2, 3, 16, 16)}


def mbart():
    return tf.MBartForConditionalGeneration(tf.MBartConfig(**SIZES, max_position_embeddings=64)), text


def pegasus():
    return tf.PegasusForConditionalGeneration(tf.PegasusConfig(**SIZES, max_position_embeddings=64)), text


def marian():
    return tf.MarianMTModel(tf.MarianConfig(**SIZES, max_position_embeddings=64)), text


def m2m_100():
    return tf.M2M100ForConditionalGeneration(tf.M2M100Config(**SIZES, max_position_embeddings=64)), text


def mt5():
    sizes = {"d_model": D, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4, "vocab_size": 60}
    return tf.MT5ForConditionalGeneration(tf.MT5Config(**sizes, dropout_rate=0.0, **TOKENS)), text


def whisper():
    config = tf.WhisperConfig(**SIZES, num_mel_bins=8, max_source_positions=16, max_target_positions=64)
    return tf.WhisperForConditionalGeneration(config), recordings


def vision_encoder_decoder():
    encoder = tf.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, image_size=16, patch_size=8,
        **NO_DROPOUT,
    )  # fmt: skip
    decoder = tf.BertConfig(
        **{**SMALL, "num_hidden_layers": 1}, **NO_DROPOUT, is_decoder=True, add_cross_attention=True
    )
    config = tf.VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    config.pad_token_id, config.decoder_start_token_id = 0, 1
    return tf.VisionEncoderDecoderModel(config=config), pictures


def pictures_and_text():
    ids = torch.randint(5, 50, (2, 8))
    ids[:, :5] = 4  # the picture's tokens
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(2, 3, 16, 16)}


def florence2():
    """Whose decoder is that of a model inside of it."""
    vision = {
        "embed_dim": (8, 16), "depths": (1, 1), "patch_size": (7, 3), "patch_stride": (4, 2), "patch_padding": (3, 1),
        "patch_prenorm": (False, True), "num_heads": (2, 2), "num_groups": (2, 2), "window_size": 2,
        "projection_dim": D, "drop_path_rate": 0.0,
    }  # fmt: skip
    text = {**SIZES, "max_position_embeddings": 64, "model_type": "bart"}
    config = tf.Florence2Config(vision_config=vision, text_config=text, image_token_id=4)
    return tf.Florence2ForConditionalGeneration(config), pictures_and_text


def blip2_t5():
    vision = {
        "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24, "image_size": 16,
        "patch_size": 8,
    }  # fmt: skip
    former = {**SMALL, "num_hidden_layers": 1, "encoder_hidden_size": 16}
    text = {
        "d_model": D, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4, "vocab_size": 60, "model_type": "t5",
        **TOKENS,
    }  # fmt: skip
    config = tf.Blip2Config(
        vision_config=vision, qformer_config=former, text_config=text, num_query_tokens=5, image_token_id=4
    )
    return tf.Blip2ForConditionalGeneration(config), pictures_and_text


FAMILIES = [mbart, pegasus, marian, m2m_100, mt5, whisper, vision_encoder_decoder, florence2]


def tapped(make):
    model, inputs_of = make()
    config = rp.RoutedLoRAConfig(
        target_modules=r".*decoder\..*\.(q_proj|v_proj|fc2|q|v|wo|query|value)", r=4, routing="gram",
        condition_features=D,
    )  # fmt: skip
    report = rp.attach(model.eval(), config, tap="auto")
    assert report.tap.startswith("encoder states at '") and len(report.names) >= 4
    with torch.no_grad():
        for name, p in awaken(model).named_parameters():
            if name.endswith(("lora_B", "condition_A")):
                p.mul_(10)  # enough to matter: tiny models embed tiny numbers
    return model, inputs_of()


@torch.no_grad()
def states(model, inputs):
    """The encoder's states, as the decoder gets them."""
    y = model(**inputs, decoder_input_ids=torch.ones(2, 1, dtype=torch.int64)).encoder_last_hidden_state
    return model.enc_to_dec_proj(y) if hasattr(model, "enc_to_dec_proj") else y


@pytest.mark.parametrize("make", FAMILIES)
def test_the_condition_is_the_encoder_s_states(make):
    model, inputs = tapped(make)
    call = {**inputs, "decoder_input_ids": torch.randint(3, 50, (2, 5))}
    y, mask = states(model, inputs), inputs.get("attention_mask")
    with torch.no_grad():
        got = model(**call).logits
        explicit = model(**call, routed_condition=y, routed_condition_mask=mask).logits
        torch.testing.assert_close(got, explicit, rtol=1e-4, atol=1e-5)
        y[0, 0] += 1
        other = model(**call, routed_condition=y, routed_condition_mask=mask).logits
        assert not torch.allclose(got[0], other[0], atol=1e-3)  # the condition matters
    model(**call).logits.float().square().mean().backward()
    assert set(gradients(model)) == {name for name, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
@pytest.mark.parametrize("make", FAMILIES)
def test_steps_with_a_cache_are_the_whole(make):
    model, inputs = tapped(make)
    tokens = torch.randint(3, 50, (2, 5))
    whole = model(**inputs, decoder_input_ids=tokens, use_cache=False).logits
    out = model(**inputs, decoder_input_ids=tokens[:, :3], use_cache=True)
    found = [out.logits]
    for at in (3, 4):
        states = tf.modeling_outputs.BaseModelOutput(last_hidden_state=out.encoder_last_hidden_state)
        mask = {name: value for name, value in inputs.items() if name == "attention_mask"}
        step = {"decoder_input_ids": tokens[:, at : at + 1], "past_key_values": out.past_key_values, **mask}
        out = model(encoder_outputs=states, **step, use_cache=True)
        found.append(out.logits)
    torch.testing.assert_close(torch.cat(found, 1), whole, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "make, path", [(florence2, "model.language_model.encoder"), (blip2_t5, "language_model.encoder"), (mt5, "encoder")]
)
def test_the_path_of_an_encoder_taps_its_decoder(make, path):
    model, inputs_of = make()
    config = rp.RoutedLoRAConfig(
        target_modules=r".*\.decoder\..*\.(q_proj|q)|decoder\..*\.q", r=4, condition_features=D
    )
    report = rp.attach(awaken(model.eval()), config, tap=path)
    assert report.tap == f"encoder states at '{path[: -len('encoder')]}decoder'"
    awaken(model)
    call = {**inputs_of(), "decoder_input_ids": torch.randint(5, 50, (2, 5))}
    with torch.no_grad():
        got = model(**call).logits
        with rp.condition(model, torch.zeros(2, 1, D)):
            assert not torch.allclose(model(**call).logits, got, atol=1e-4)
