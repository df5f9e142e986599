"""What the tests of generation share: a generation with its logits, and what it has to equal."""

import torch
from tiny_models import IMAGE

NEVER = [0, 1, 2, 56, 57, 58, IMAGE]  # tokens that mean something: padding, an end, an image


def generate(model, batch, new=5, **options):
    """Tokens and logits of ``generate``."""
    out = model.generate(
        **batch, max_new_tokens=new, min_new_tokens=new, suppress_tokens=NEVER, return_dict_in_generate=True,
        output_logits=True, pad_token_id=0, **{"do_sample": False, **options},
    )  # fmt: skip
    return out.sequences, torch.stack(out.logits, 1)


@torch.no_grad()
def uncached(model, batch, new=5, **condition):
    """The same, greedily, by running the whole sequence for each token."""
    encoded = model.config.is_encoder_decoder
    key = "decoder_input_ids" if encoded else "input_ids"
    batch, logits = dict(batch), []
    if encoded:
        start = model.generation_config.decoder_start_token_id
        batch[key] = torch.full((batch["input_ids"].shape[0], 1), start)
    for _ in range(new):
        last = model(**batch, **condition, use_cache=False).logits[:, -1]
        logits.append(last)
        token = last.index_fill(1, torch.tensor(NEVER), -torch.inf).argmax(-1, keepdim=True)
        batch[key] = torch.cat([batch[key], token], 1)
        suffix = int(model.config.model_type == "paligemma")  # its type of token; elsewhere text is 0, an image 1
        for name, fill in (("attention_mask", 1), ("token_type_ids", suffix), ("mm_token_type_ids", 0)):
            if name in batch and not encoded:
                batch[name] = torch.cat([batch[name], torch.full_like(token, fill, dtype=batch[name].dtype)], 1)
    return batch[key], torch.stack(logits, 1)


def assert_same(got, want):
    assert torch.equal(got[0][:, -want[1].shape[1] :], want[0][:, -want[1].shape[1] :])
    torch.testing.assert_close(got[1], want[1], rtol=1e-3, atol=1e-4)
