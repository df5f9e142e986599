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
    return tf.LlamaConfig(**SMALL, num_key_value_heads=2, max_position_embeddings=64, **more)


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


def batch_of(model, batch=2, tokens=5):
    """Keyword arguments for a call of ``model``."""
    if model.config.model_type == "vit":
        return {"pixel_values": torch.randn(batch, 3, 16, 16)}
    ids = torch.randint(3, 58, (batch, tokens))
    more = {"decoder_input_ids": ids.flip(1)} if model.config.is_encoder_decoder else {}
    return {"input_ids": ids, **more}


def output_of(out):
    """The first tensor of a model's output."""
    return out[0]


def awaken(model):
    """Random values for the up-projections, which start at zero and would hide every mistake."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.rpartition(".")[2] in ("lora_B", "up", "up_bias", "down_bias"):
                p.copy_(torch.randn_like(p) * 0.3)
    return model


def gradients(model):
    """Gradients of the trainable parameters, by name."""
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
