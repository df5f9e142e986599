"""Whole models beside an image: tokens a second and memory of a training step and of generation, beside eager.

Every model is made from a config, with random weights. A LLaVA finds its condition, the image tokens, among its own
embeddings; GPT-2 and RoBERTa are given all tokens of a ViT, which is frozen and runs in each call. What is adapted is q
and v, of GPT-2 as two slices of c_attn that are routed together; one matrix projects input and condition, as in the
paper.

routed_peft  ``attach``; the LLaVA by ``tap="auto"``, the pairs by ``routed_condition=``.
eager        EagerLoRA below: as one writes it in torch, at its best. It knows where the image tokens stand, and keeps
             the projected condition for a whole generation.
base         the frozen model alone, the floor. It has nothing to train, so its gradients go to the embeddings: a
             little further down than an adapter's, and without an optimizer.

Tokens are those of the language model: in training all of its input, the image's among them, in generation the new
ones. The times are those of a user's clock. The first cell of a group (form, routing, way) holds routed_peft against
eager, measures all peers in turn, and every cell plays its own times back.
"""

from __future__ import annotations

import functools
import gc
import statistics
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import measure
import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from torch import Tensor, nn

import routed_peft as rp

PEERS = ["routed_peft", "eager", "base"]
ROUTINGS = ["gram", "mul"]
SCALING = 0.5
IMAGE = 3  # the token that stands for one of the image
ROUNDS = 20
CLOCK = measure.Recorded()


# ---- models


class Size(NamedTuple):
    d: int  # width of the language model
    layers: int
    vision_d: int
    vision_layers: int
    image: int  # pixels of a side
    patch: int
    batch: int
    text: int  # tokens of a sample beside those of its image
    r: int
    prompts: int = 4  # a batch of a generation
    new: int = 32
    vocabulary: int = 8000

    @property
    def patches(self) -> int:
        return (self.image // self.patch) ** 2


def heads(d: int) -> int:
    return max(1, d // 64)


def vision(s: Size) -> dict[str, int]:
    return dict(
        hidden_size=s.vision_d, intermediate_size=4 * s.vision_d, num_hidden_layers=s.vision_layers,
        num_attention_heads=heads(s.vision_d), image_size=s.image, patch_size=s.patch,
    )  # fmt: skip


def llava(s: Size) -> nn.Module:
    text = tf.LlamaConfig(
        hidden_size=s.d, intermediate_size=11 * s.d // 4, num_hidden_layers=s.layers, num_attention_heads=heads(s.d),
        vocab_size=s.vocabulary,
    )  # fmt: skip
    config = tf.LlavaConfig(vision_config=tf.CLIPVisionConfig(**vision(s)), text_config=text, image_token_id=IMAGE)
    return tf.LlavaForConditionalGeneration(config)


def gpt2(s: Size) -> nn.Module:
    config = tf.GPT2Config(
        n_embd=s.d, n_layer=s.layers, n_head=heads(s.d), n_positions=256, vocab_size=s.vocabulary, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    return tf.GPT2LMHeadModel(config)


def roberta(s: Size) -> nn.Module:
    config = tf.RobertaConfig(
        hidden_size=s.d, intermediate_size=4 * s.d, num_hidden_layers=s.layers, num_attention_heads=heads(s.d),
        vocab_size=s.vocabulary, num_labels=3,
    )  # fmt: skip
    return tf.RobertaForSequenceClassification(config)


class Form(NamedTuple):
    make: Callable[[Size], nn.Module]
    targets: list[str]
    size: str
    sees: bool = False  # the image is part of the model's own call
    merged: bool = False
    generates: bool = True


FORMS = {
    "llava": Form(llava, ["q_proj", "v_proj"], "llava", sees=True),
    "gpt2+vit": Form(gpt2, ["c_attn"], "pair", merged=True),
    "roberta+vit": Form(roberta, ["query", "value"], "pair", generates=False),
}
# A step of a small one takes two cores of a CPU about half a second; full is for a GPU, tiny for the tests.
SIZES = {
    "tiny": {
        "llava": Size(64, 2, 64, 2, 56, 14, batch=2, text=9, r=4, prompts=2, new=4, vocabulary=200),
        "pair": Size(64, 2, 64, 1, 48, 16, batch=2, text=9, r=4, prompts=2, new=4, vocabulary=200),
    },
    "small": {
        "llava": Size(512, 4, 192, 3, 112, 14, batch=4, text=96, r=16),
        "pair": Size(384, 6, 384, 2, 224, 16, batch=8, text=50, r=64),
    },
    "full": {
        "llava": Size(2048, 16, 1024, 24, 336, 14, batch=8, text=448, r=64, prompts=8, vocabulary=32000),
        "pair": Size(768, 12, 768, 12, 224, 16, batch=40, text=50, r=64, prompts=40, vocabulary=50257),
    },
}


# ---- eager


class EagerLoRA(nn.Module):
    """The layer as one writes it in torch; its parameters are called as RoutedLoRA's, to be loaded from there.

    The condition of the running call [batch, M, d] is ``holder.y``.
    """

    def __init__(self, base: nn.Module, r: int, routing: str, dropout: float, slices, holder: SimpleNamespace):
        super().__init__()
        weight = base.weight
        width, out = weight.shape if isinstance(base, tf.Conv1D) else weight.shape[::-1]
        self.blocks = [(slice(*s), slice(i * r, i * r + r)) for i, s in enumerate(slices or [(0, out)])]
        rows = sum(columns.stop - columns.start for columns, _ in self.blocks)
        self.base_layer, self.routing, self.dropout, self.holder = base, routing, dropout, holder
        self.lora_A = nn.Parameter(weight.new_zeros(r * len(self.blocks), width))
        self.lora_B = nn.Parameter(weight.new_zeros(rows, r))
        self.scaling = SCALING
        self.kept: tuple[Tensor | None, Tensor | None] = None, None

    def project(self) -> Tensor:
        y = self.holder.y
        if self.kept[0] is y:
            return self.kept[1]
        v = F.linear(F.dropout(y, self.dropout, self.training), self.lora_A)
        if self.routing == "mul":
            v = v.mean(1, keepdim=True)
        self.kept = (None, None) if torch.is_grad_enabled() else (y, v)
        return v

    def forward(self, x: Tensor) -> Tensor:
        h, v = F.linear(F.dropout(x, self.dropout, self.training), self.lora_A), self.project()
        z = h @ v.mT @ v / v.shape[1] if self.routing == "gram" else h * v
        out = self.base_layer(x)
        if len(self.blocks) == 1:
            return out + F.linear(z, self.lora_B) * self.scaling
        row = 0
        for columns, block in self.blocks:
            rows = slice(row, row + columns.stop - columns.start)
            out[..., columns] += F.linear(z[..., block], self.lora_B[rows]) * self.scaling
            row = rows.stop
        return out


# ---- a model with its peer's adapters


class Subject:
    """A model with a peer's adapters, their B random, for zeros would hide mistakes; its batch, and what is timed."""

    def __init__(self, form: Form, peer: str, routing: str, size: Size, device: str, dropout: float = 0.1):
        torch.manual_seed(0)
        self.form, self.peer, self.size, self.holder = form, peer, size, SimpleNamespace()
        with torch.device(device):
            self.model, self.vit = form.make(size), None
            if not form.sees:
                vit = tf.ViTModel(tf.ViTConfig(**vision(size)), add_pooling_layer=False)
                self.vit = vit.requires_grad_(False).eval()
            self._attach(routing, dropout)
            torch.manual_seed(1)  # the same batch for every peer
            tokens = size.text + (size.patches if form.sees else 0)
            self.ids = torch.randint(10, size.vocabulary, (max(size.batch, size.prompts), tokens))
            self.pixels = torch.randn(len(self.ids), 3, size.image, size.image)
            self.labels = self.ids if form.generates else torch.randint(3, (len(self.ids),))
        if form.sees:
            self.ids[:, : size.patches] = IMAGE
        if form.generates:  # no end before the last token
            self.model.generation_config.eos_token_id, self.model.generation_config.pad_token_id = None, 0
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-5) if self.trained else None

    def _attach(self, routing: str, dropout: float) -> None:
        d, form = self.size.d, self.form
        slices = [(0, d), (2 * d, 3 * d)] if form.merged else None
        options: dict[str, Any] = dict(r=self.size.r, routing=routing)
        self.model.requires_grad_(False)
        if self.peer == "base":
            embeddings = self.model.get_input_embeddings()
            embeddings.register_forward_hook(lambda _, __, out: out.requires_grad_(torch.is_grad_enabled()))
        elif self.peer == "eager":
            for name, module in list(self.model.named_modules()):
                if name.rpartition(".")[2] in form.targets and "vision_tower" not in name:
                    layer = EagerLoRA(module, slices=slices, holder=self.holder, dropout=dropout, **options)
                    self.model.set_submodule(name, layer)
            if form.sees:
                self.model.model.language_model.register_forward_pre_hook(self._note_image, with_kwargs=True)
        else:
            config = rp.RoutedLoRAConfig(
                target_modules=form.targets, lora_alpha=SCALING * self.size.r, lora_dropout=dropout,
                out_slices=slices, route_across_slices=form.merged, **options,
            )  # fmt: skip
            rp.attach(self.model, config, tap="auto" if form.sees else None)
        with torch.no_grad():
            for name, p in self.model.named_parameters():
                if name.endswith("lora_A"):
                    p.normal_(std=self.size.d**-0.5)
                elif name.endswith("lora_B"):
                    p.normal_(std=self.size.r**-0.5)

    def _note_image(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        embeddings = kwargs["inputs_embeds"]
        if embeddings.shape[1] > 1:  # the steps of a generation go on with the prompt's
            self.holder.y = embeddings[:, : self.size.patches].contiguous()

    def to(self, dtype: torch.dtype) -> None:
        self.model.to(dtype)
        if self.vit is not None:
            self.vit.to(dtype)
        self.pixels = self.pixels.to(dtype)

    def call(self, function: Callable, rows: int, **inputs) -> Any:
        """The model, or its generate, beside the images."""
        inputs |= {"input_ids": self.ids[:rows], "attention_mask": torch.ones_like(self.ids[:rows])}
        if self.vit is None:
            return function(**inputs, pixel_values=self.pixels[:rows])
        with torch.no_grad():
            y = self.vit(self.pixels[:rows]).last_hidden_state
        if self.peer == "routed_peft":
            inputs["routed_condition"] = y
        self.holder.y = y
        return function(**inputs)

    def forward(self) -> Any:
        return self.call(self.model, self.size.batch, labels=self.labels[: self.size.batch])

    def train(self) -> None:
        self.forward().loss.backward()
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()

    def generate(self, **options) -> Any:
        options |= {"max_new_tokens": self.size.new, "do_sample": False}
        return self.call(self.model.generate, self.size.prompts, **options)

    def tokens(self, way: str) -> int:
        return self.size.prompts * self.size.new if way == "generate" else self.ids[: self.size.batch].numel()

    def memory(self, way: str, device: str) -> dict[str, int | None]:
        found = {"peak_bytes": measure.peak_bytes(getattr(self, way), device)}
        if way == "train":
            fixed = {t.untyped_storage().data_ptr() for t in [*self.model.parameters(), *self.model.buffers()]}
            found["saved_bytes"] = measure.saved_bytes(self.forward, fixed)
        return found

    def evidence(self, way: str) -> dict[str, Tensor]:
        """Logits and gradients, and what is generated if that is the way, of few samples and without dropout."""
        whole, self.size = self.size, self.size._replace(batch=2, prompts=2, new=min(self.size.new, 8))
        self.model.eval()
        out = self.forward()
        out.loss.backward()
        found = {"logits": out.logits.detach()}
        found |= {f"gradient of {name}": p.grad for name, p in self.model.named_parameters() if p.requires_grad}
        self.optimizer.zero_grad()
        if way == "generate":
            made = self.generate(return_dict_in_generate=True, output_logits=True)
            assert made.sequences.shape[1] == self.ids.shape[1] + self.size.new, "the generation ended early"
            found |= {"tokens": made.sequences, "logits of the generation": torch.stack(made.logits, 1)}
        self.size = whole
        return found


def check(ours: Subject, eager: Subject, way: str, bound: float = 1e-4) -> float:
    """The largest difference of the two in float32, relative to its tensor's norm; raises where it is above bound."""
    eager.model.load_state_dict(ours.model.state_dict())
    got, want = ours.evidence(way), eager.evidence(way)
    assert [*got] == [*want], f"one has {[*got]}, the other {[*want]}"
    tokens = got.pop("tokens", None), want.pop("tokens", None)
    errors = {what: ((got[what] - value).norm() / value.norm()).item() for what, value in want.items()}
    worst = max(errors, key=errors.get)
    assert errors[worst] <= bound, f"{worst} is off by {errors[worst]:.1e} of its norm, at most {bound:.0e}"
    assert tokens[0] is None or torch.equal(*tokens), "the logits agree, the tokens do not"
    return errors[worst]


# ---- measuring


@functools.lru_cache(maxsize=1)  # the peers of a group follow each other
def measured(form: str, routing: str, way: str, size: str, dtype: str, device: str, seconds: float) -> dict[str, dict]:
    """By peer its times in seconds, and what else is said of it."""
    shape = SIZES[size][FORMS[form].size]
    subjects = {peer: Subject(FORMS[form], peer, routing, shape, device) for peer in PEERS}
    check(subjects["routed_peft"], subjects["eager"], way)
    samples, found = {}, {}
    for peer, subject in subjects.items():
        subject.to(measure.DTYPES[dtype])
        subject.model.train(way == "train")
        found[peer] = subject.memory(way, device)
        call = getattr(subject, way)
        samples[peer] = measure.wall(lambda i, call=call: call(), device)
    for peer, times in measure.interleaved(samples, ROUNDS, seconds).items():
        rate = subjects[peer].tokens(way) / statistics.median(times)
        found[peer] |= {"times": times, "tokens_per_second": rate}
    del subjects, samples, subject, call
    gc.collect()
    return found


CELLS = [  # in the order in which they run, group by group
    (form, routing, way, peer)
    for form, spec in FORMS.items()
    for routing in ROUTINGS
    for way in (("train", "generate") if spec.generates else ("train",))
    for peer in PEERS
]


def pytest_generate_tests(metafunc):
    shapes, peers = (metafunc.config.getoption(name, None) for name in ("--shapes", "--peers"))
    wanted = [
        cell
        for cell in CELLS
        if any(word in cell[0] for word in shapes or [""]) and (peers is None or cell[-1] in peers)
    ]
    metafunc.parametrize("form, routing, way, peer", wanted)


@pytest.mark.benchmark(timer=CLOCK.now)
def test_model(benchmark, request, form, routing, way, peer):
    option = request.config.getoption
    device = option("--device", None) or ("cuda" if torch.cuda.is_available() else "cpu")
    size = option("--size", None) or ("small" if device == "cpu" else "full")
    dtype = (option("--dtypes", None) or ["float32"])[0]
    seconds = 10 * option("--seconds", 2.0)  # a call of a model takes longer than one of a layer
    found = dict(measured(form, routing, way, size, dtype, device, seconds)[peer])
    times = found.pop("times")
    benchmark.group = "-".join([form, routing, way])
    benchmark.extra_info.update(
        kind="model", form=form, way=way, peer=peer, routing=routing, dtype=dtype, device=device, size=size,
        shape=SIZES[size][FORMS[form].size]._asdict(), **found,
    )  # fmt: skip
    CLOCK.load(times)
    benchmark.pedantic(CLOCK.play, rounds=len(times), iterations=1)
