"""Tiny transformers models with random weights, in eval mode, and what the tests do to all of them."""

import torch
import transformers as tf

D = 32  # hidden size of every model
SMALL = {"hidden_size": D, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 60}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def bert():
    return tf.BertModel(tf.BertConfig(**SMALL, **NO_DROPOUT)).eval()


def roberta_classifier():
    config = tf.RobertaConfig(**SMALL, **NO_DROPOUT, num_labels=3, pad_token_id=1)
    return tf.RobertaForSequenceClassification(config).eval()


def gpt2():
    config = tf.GPT2Config(
        n_embd=D, n_layer=2, n_head=4, vocab_size=60, n_positions=64, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return tf.GPT2LMHeadModel(config).eval()


def llama_config(**more):
    return tf.LlamaConfig(**{**SMALL, "num_key_value_heads": 2, "max_position_embeddings": 64, **more})


def llama(**more):
    return tf.LlamaForCausalLM(llama_config(**more)).eval()


def bart():
    config = tf.BartConfig(
        d_model=D, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=48, decoder_ffn_dim=48, vocab_size=60, max_position_embeddings=64, dropout=0.0,
    )  # fmt: skip
    return tf.BartForConditionalGeneration(config).eval()


def t5():
    config = tf.T5Config(
        d_model=D, d_kv=8, d_ff=48, num_layers=1, num_heads=4, vocab_size=60, dropout_rate=0.0, decoder_start_token_id=0
    )
    return tf.T5ForConditionalGeneration(config).eval()


def vit():
    config = tf.ViTConfig(
        hidden_size=D, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48, image_size=16, patch_size=8
    )
    return tf.ViTForImageClassification(config).eval()


def llava():
    vision = tf.CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
    )
    config = tf.LlavaConfig(vision_config=vision, text_config=llama_config(), image_token_id=59)
    return tf.LlavaForConditionalGeneration(config).eval()


IMAGE = 59  # the token that stands for an image patch
CLIP_VISION = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16,
    "patch_size": 8,
}  # fmt: skip


def qwen2_vl():
    text = {
        **SMALL, "num_key_value_heads": 2, "max_position_embeddings": 64,
        "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4},
        "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    vision = {
        "depth": 1, "embed_dim": 16, "hidden_size": D, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4,
        "spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3,
    }  # fmt: skip
    config = tf.Qwen2VLConfig(
        text_config=text, vision_config=vision, image_token_id=IMAGE, video_token_id=58, vision_start_token_id=57,
        vision_end_token_id=56,
    )  # fmt: skip
    return tf.Qwen2VLForConditionalGeneration(config).eval()


def paligemma():
    text = {
        **SMALL, "model_type": "gemma", "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    vision = {**CLIP_VISION, "model_type": "siglip_vision_model", "vision_use_head": False}
    config = tf.PaliGemmaConfig(
        text_config=text, vision_config=vision, image_token_index=IMAGE, projection_dim=D, hidden_size=D
    )
    return tf.PaliGemmaForConditionalGeneration(config).eval()


def blip2():
    qformer = {**SMALL, **NO_DROPOUT, "num_hidden_layers": 1, "encoder_hidden_size": 16}
    text = {
        "model_type": "opt", "hidden_size": D, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 48,
        "vocab_size": 60, "max_position_embeddings": 64, "word_embed_proj_dim": D, "dropout": 0.0,
    }  # fmt: skip
    vision = {**CLIP_VISION, "attention_dropout": 0.0}
    config = tf.Blip2Config(
        vision_config=vision, qformer_config=qformer, text_config=text, num_query_tokens=4, image_token_index=IMAGE
    )
    return tf.Blip2ForConditionalGeneration(config).eval()


def ast():
    config = tf.ASTConfig(
        hidden_size=D, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48, patch_size=8, max_length=32,
        num_mel_bins=16, frequency_stride=8, time_stride=8, num_labels=3,
    )  # fmt: skip
    return tf.ASTForAudioClassification(config).eval()


def dual_encoder():
    text = tf.BertConfig(**SMALL, **NO_DROPOUT)
    vision = tf.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, image_size=16, patch_size=8,
        **NO_DROPOUT,
    )  # fmt: skip
    config = tf.VisionTextDualEncoderConfig.from_vision_text_configs(vision, text, projection_dim=8)
    return tf.VisionTextDualEncoderModel(config).eval()


def clip():
    text = {**SMALL, "max_position_embeddings": 32, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = tf.CLIPConfig(text_config=text, vision_config=CLIP_VISION, projection_dim=8)
    return tf.CLIPModel(config).eval()


def image_batch(model, images=(1, 2), pad=0):
    """A batch for a vision-language model: sample i has images[i] images, then text; padding on the left."""
    kind = model.config.model_type
    patches, count = 4, sum(images)
    start, end = ([57], [56]) if kind == "qwen2_vl" else ([], [])
    rows = [
        (start + [IMAGE] * patches + end) * n + torch.randint(3, 50, (3,)).tolist() for n in images
    ]  # fmt: skip
    length = max(map(len, rows)) + pad
    ids = torch.tensor([[0] * (length - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    batch = {"input_ids": ids, "attention_mask": mask}
    if kind == "qwen2_vl":
        pixels = {"pixel_values": torch.randn(16 * count, 3 * 2 * 4 * 4)}
        pixels["image_grid_thw"] = torch.tensor([[1, 4, 4]] * count)
        pixels["mm_token_type_ids"] = (ids == IMAGE).int()
    else:
        pixels = {"pixel_values": torch.randn(count, 3, 16, 16)}
    if kind == "paligemma":
        batch["token_type_ids"] = torch.zeros_like(ids)
    return {**batch, **pixels}


def batch_of(model, batch=2, tokens=5):
    """Keyword arguments for a call of ``model``."""
    kind = model.config.model_type
    pixels = {"pixel_values": torch.randn(batch, 3, 16, 16)}
    if kind == "vit":
        return pixels
    if kind == "audio-spectrogram-transformer":
        return {"input_values": torch.randn(batch, 32, 16)}
    if kind in ("llava", "qwen2_vl", "paligemma", "blip-2"):
        return image_batch(model, images=(1,) * batch)
    ids = torch.randint(3, 58, (batch, tokens))
    more = {"decoder_input_ids": ids.flip(1)} if model.config.is_encoder_decoder else {}
    if kind in ("vision-text-dual-encoder", "clip"):
        more = pixels
    return {"input_ids": ids, **more}


def output_of(out):
    """The first tensor of a model's output."""
    return out[0]


def awaken(model):
    """Random values for the up-projections, which start at zero and would hide every mistake."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.rpartition(".")[2] in ("lora_B", "matrix_B", "up", "up_bias", "down_bias", "condition_bias"):
                p.copy_(torch.randn_like(p) * 0.3)
    return model


def gradients(model):
    """Gradients of the trainable parameters, by name."""
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
