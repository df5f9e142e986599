"""Fine-tune a LLaVA with routed layers, by transformers' Trainer, on pictures that ship with scikit-image.

The task: a crop of one of eight pictures (a cat, a cup of coffee, a motorcycle, ...), and the question which picture it
is of, answered in words. Crops for testing come from parts of the pictures that no crop for training touches.

Without ``--model`` nothing is fetched: the model is a tiny LLaVA with random weights, written with its processor to
``--out``/base and loaded from there, exactly as a model from the hub is. Its weights stay frozen, so that everything it
learns is in the routed layers; it shows that the parts work together, not how well a trained model does.

    python examples/llava_finetune.py                                        # offline; a minute or two on two cores
    python examples/llava_finetune.py --model llava-hf/llava-1.5-7b-hf --lr 2e-4 --batch 8 --steps 100    # on a GPU
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import routed_peft as rp
from routed_peft.routes import ROUTES

PICTURES = {  # in scikit-image's wheel; the others it would download
    "astronaut": "an astronaut",
    "chelsea": "a cat",
    "coffee": "a cup of coffee",
    "hubble_deep_field": "a field of galaxies",
    "immunohistochemistry": "stained tissue",
    "retina": "a retina",
    "rocket": "a rocket",
    "stereo_motorcycle": "a motorcycle",
}
QUESTIONS = ["what is in the picture ?", "which picture is this crop of ?", "name what you see ."]
BLOCKS = 5  # each picture is cut into 5 x 5 blocks, of which these many are held out:
HELD_OUT = 5
TRAIN_CROPS, TEST_CROPS = 160, 32  # of each picture
IGNORED = -100  # the label of a token that has no part in the loss


# ------------------------------------------------------------------------------------------------ data
def load_crops(seed: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Training and test examples: a crop, a question, the answer."""
    try:
        from PIL import Image
        from skimage import data
    except ImportError as error:
        sys.exit(f"The pictures come with scikit-image, which is not there ({error}): pip install scikit-image pillow")
    generator = torch.Generator().manual_seed(seed)

    def below(bound: int) -> int:
        return int(torch.randint(bound, (), generator=generator))

    train: list[dict[str, Any]] = []
    test: list[dict[str, Any]] = []
    for picture, answer in PICTURES.items():
        loaded = getattr(data, picture)()
        image = Image.fromarray(loaded[0] if isinstance(loaded, tuple) else loaded).convert("RGB")
        width, height = image.width // BLOCKS, image.height // BLOCKS
        side = 3 * min(width, height) // 4
        order = torch.randperm(BLOCKS * BLOCKS, generator=generator).tolist()
        for examples, blocks, count in ((test, order[:HELD_OUT], TEST_CROPS), (train, order[HELD_OUT:], TRAIN_CROPS)):
            for number in range(count):
                row, column = divmod(blocks[number % len(blocks)], BLOCKS)
                left, top = column * width + below(width - side + 1), row * height + below(height - side + 1)
                crop = image.crop((left, top, left + side, top + side))
                examples.append({"image": crop, "question": QUESTIONS[below(len(QUESTIONS))], "answer": answer})
    return train, test


class Collator:
    """Examples to a batch: the prompts padded on the left, and with ``answers`` those behind, padded on the right."""

    def __init__(self, processor: Any, answers: bool = True) -> None:
        self.processor, self.answers = processor, answers

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        tokenizer = self.processor.tokenizer
        prompts = [
            self.processor.apply_chat_template(
                [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": example["question"]}]}],
                add_generation_prompt=True,
            )
            for example in examples
        ]
        batch = dict(
            self.processor(
                images=[example["image"] for example in examples], text=prompts, padding=True, padding_side="left",
                return_tensors="pt",
            )
        )  # fmt: skip
        if not self.answers:
            return batch
        answers = tokenizer(
            [example["answer"] + tokenizer.eos_token for example in examples], padding=True, padding_side="right",
            add_special_tokens=False, return_tensors="pt",
        )  # fmt: skip
        labels = answers["input_ids"].masked_fill(answers["attention_mask"] == 0, IGNORED)
        batch["labels"] = torch.cat([torch.full_like(batch["input_ids"], IGNORED), labels], 1)
        for name in ("input_ids", "attention_mask"):
            batch[name] = torch.cat([batch[name], answers[name]], 1)
        return batch


# ------------------------------------------------------------------------------------------------ model
def make_tiny_base(folder: Path, seed: int) -> None:
    """Write a tiny LLaVA with random weights, and a processor for it, as ``save_pretrained`` writes any model."""
    import transformers as tf
    from tokenizers import Tokenizer, models, pre_tokenizers

    special = ["<pad>", "<s>", "</s>", "<unk>", "<image>"]
    text = " ".join([*QUESTIONS, *PICTURES.values(), "USER : ASSISTANT"])
    words = special + sorted(set(text.split()))
    numbers = {word: number for number, word in enumerate(words)}
    tokens = Tokenizer(models.WordLevel(numbers, unk_token="<unk>"))
    tokens.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = tf.PreTrainedTokenizerFast(
        tokenizer_object=tokens, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        additional_special_tokens=["<image>"],
    )  # fmt: skip
    pixels, patch = 32, 8
    processor = tf.LlavaProcessor(
        tf.CLIPImageProcessor(size={"shortest_edge": pixels}, crop_size={"height": pixels, "width": pixels}),
        tokenizer, patch_size=patch, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=(
            "{% for message in messages %}USER: {% for part in message['content'] %}"
            "{% if part['type'] == 'image' %}<image>{% else %} {{ part['text'] }}{% endif %}"
            "{% endfor %} ASSISTANT:{% endfor %}"
        ),
    )  # fmt: skip
    # Wide enough weights that every layer passes on what it gets: with the default 0.02, which suits training from
    # scratch, the frozen projector's output would be all but zero.
    vision = tf.CLIPVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, image_size=pixels,
        patch_size=patch,
    )  # fmt: skip
    language = tf.LlamaConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
        vocab_size=len(words), max_position_embeddings=128, initializer_range=0.1, pad_token_id=numbers["<pad>"],
        bos_token_id=numbers["<s>"], eos_token_id=numbers["</s>"],
    )  # fmt: skip
    config = tf.LlavaConfig(vision_config=vision, text_config=language, image_token_id=numbers["<image>"])
    torch.manual_seed(seed)
    tf.LlavaForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)


def load_processor(where: str) -> Any:
    from transformers import AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(where)
    except (OSError, ValueError) as error:
        sys.exit(f"--model {where}: {error}")
    if getattr(processor, "chat_template", None) is None:
        sys.exit(f"--model {where}: its processor has no chat template, which the prompts are made with")
    return processor


def load_base(where: str, args: argparse.Namespace) -> Any:
    """The model as it was published, on its device, in eval mode."""
    from transformers import AutoModelForImageTextToText

    try:
        model = AutoModelForImageTextToText.from_pretrained(where, dtype=torch.bfloat16 if args.bf16 else torch.float32)
    except (OSError, ValueError) as error:
        sys.exit(f"--model {where}: {error}")
    return model.to(args.device).eval()


def digest(model: torch.nn.Module) -> str:
    """Of all weights and buffers of a model without routed layers."""
    total = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        total.update(name.encode())
        total.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return total.hexdigest()


@torch.no_grad()
def answer(model: Any, processor: Any, examples: list[dict[str, Any]], args: argparse.Namespace) -> list[str]:
    """What the model generates for each example, greedily."""
    model.eval()
    collate = Collator(processor, answers=False)
    longest = max(len(ids) for ids in processor.tokenizer(list(PICTURES.values()), add_special_tokens=False).input_ids)
    texts: list[str] = []
    for start in range(0, len(examples), args.batch):
        batch = {name: value.to(args.device) for name, value in collate(examples[start : start + args.batch]).items()}
        tokens = model.generate(
            **batch, max_new_tokens=longest + 1, do_sample=False, pad_token_id=processor.tokenizer.pad_token_id
        )
        new = tokens[:, batch["input_ids"].shape[1] :]
        texts += processor.tokenizer.batch_decode(new, skip_special_tokens=True)
    return [text.strip() for text in texts]


def accuracy(texts: list[str], examples: list[dict[str, Any]]) -> float:
    """Share of answers that are right word for word."""
    return sum(text == example["answer"] for text, example in zip(texts, examples, strict=True)) / len(examples)


# ------------------------------------------------------------------------------------------------ the program
def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", metavar="ID", help="Hugging Face id or folder of a LLaVA, instead of the tiny random one")
    add("--routing", choices=[r for r in ROUTES if ROUTES[r].causal], default="mul", help="route (%(default)s)")
    add("--rank", type=int, default=8, help="of every routed layer (%(default)s)")
    add("--targets", nargs="+", default=["q_proj", "v_proj"], metavar="NAME", help="layers to adapt, or all-linear")
    add(
        "--own-projection",
        action="store_true",
        help="of the condition, in each layer; the paper shares the input's, "
        "which needs layers as wide as the image tokens",
    )
    add("--steps", type=int, default=800, help="training steps (%(default)s)")
    add("--batch", type=int, default=32, help="examples per step (%(default)s)")
    add("--lr", type=float, default=1e-2, help="learning rate; the default suits the tiny model (%(default)s)")
    add("--seed", type=int, default=0, help="of the crops, the adapter, the order and the tiny model (%(default)s)")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: a GPU if there is one")
    add("--bf16", action=argparse.BooleanOptionalAction, help="base model in bfloat16 (on a GPU)")
    add("--gradient-checkpointing", action=argparse.BooleanOptionalAction, default=True, help="recompute activations")
    add("--threads", type=int, help="of torch (1 for the tiny model, which is too small to share, else its own choice)")
    add("--out", type=Path, default=Path("llava_results"), metavar="DIR", help="for the results (%(default)s)")
    args = parser.parse_args(argv)
    for name in ("rank", "steps", "batch", "threads"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(args, name)}")
    if not args.lr > 0:
        parser.error(f"--lr must be positive, got {args.lr}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU")
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.bf16 is None:
        args.bf16 = args.device == "cuda"
    if args.threads is None and args.model is None:
        args.threads = 1
    args.targets = "all-linear" if args.targets == ["all-linear"] else args.targets
    return args


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Fine-tune, test, save, load, and return what is also written to results.json."""
    args = parse(argv)
    start = time.perf_counter()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    try:
        import accelerate  # noqa: F401  (Trainer's own message comes only after the model is loaded)
    except ImportError:
        sys.exit("transformers' Trainer needs accelerate: pip install accelerate")
    from transformers import Trainer, TrainingArguments, set_seed

    train, test = load_crops(args.seed)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        sys.exit(f"--out {args.out}: {error.strerror}")
    where = args.model
    if where is None:
        where = str(args.out / "base")
        make_tiny_base(Path(where), args.seed)
    processor = load_processor(where)
    model = load_base(where, args)
    before = digest(model)
    print(f"{len(train)} crops to train on, {len(test)} from other parts of {len(PICTURES)} pictures to test with.")

    collate = Collator(processor)
    probe = {name: value.to(args.device) for name, value in collate(test[:: len(test) // 8]).items()}
    set_seed(args.seed)
    width = model.config.get_text_config().hidden_size if args.own_projection else None
    try:
        config = rp.RoutedLoRAConfig(
            target_modules=args.targets, r=args.rank, routing=args.routing, condition_features=width
        )
        report = rp.attach(model, config, tap="auto")
        checked = rp.check(model, **probe)
    except rp.RoutedPeftError as error:
        sys.exit(f"{type(model).__name__}: {error}")
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    print(f"{len(report.names)} layers routed by the {report.tap}; {len(report.skipped)} matching layers left alone.")
    print(f"{trainable:,} of {total:,} parameters are trainable ({trainable / total:.2%}).")
    print(f"One call: {checked}.", flush=True)
    # Named anew in transformers 5; the old name works there with a warning.
    recompute = "activation" if "activation_checkpointing" in TrainingArguments.__dataclass_fields__ else "gradient"
    options = TrainingArguments(
        output_dir=str(args.out), max_steps=args.steps, learning_rate=args.lr, warmup_steps=args.steps // 20,
        per_device_train_batch_size=args.batch, per_device_eval_batch_size=args.batch, bf16=args.bf16, seed=args.seed,
        **{f"{recompute}_checkpointing": args.gradient_checkpointing},
        **{f"{recompute}_checkpointing_kwargs": {"use_reentrant": False}},
        use_cpu=args.device == "cpu", logging_steps=max(1, args.steps // 10), save_strategy="no", report_to="none",
        remove_unused_columns=False, prediction_loss_only=True, dataloader_pin_memory=args.device == "cuda",
    )  # fmt: skip
    trainer = Trainer(model=model, args=options, train_dataset=train, eval_dataset=test, data_collator=collate)
    results: dict[str, Any] = {"before": {"loss": trainer.evaluate()["eval_loss"]}}
    results["before"]["accuracy"] = accuracy(answer(model, processor, test, args), test)
    clock = time.perf_counter()
    trainer.train()
    results["ms_per_step"] = 1000 * (time.perf_counter() - clock) / args.steps
    results["logged_losses"] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    results["after"] = {"loss": trainer.evaluate()["eval_loss"]}
    texts = answer(model, processor, test, args)
    results["after"]["accuracy"] = accuracy(texts, test)

    adapter = args.out / "adapter"
    rp.save_adapter(model, adapter)
    with torch.no_grad():
        logits = model(**probe).logits
    rp.detach(model)
    results["base_unchanged"] = digest(model) == before
    del trainer, model  # a large model is there only once

    model = load_base(where, args)
    rp.load_adapter(model, adapter)
    with torch.no_grad():
        loaded = model(**probe).logits
    results["reload"] = {
        "largest_logit_difference": (loaded - logits).abs().max().item(),
        "same_answers": answer(model, processor, test, args) == texts,
    }

    guess = max(sum(e["answer"] == a for e in test) for a in PICTURES.values()) / len(test)
    print(f"\n{'held-out crops':24}{'loss':>8}{'right answers':>16}      (always the same answer: {guess:.1%})")
    for name in ("before", "after"):
        print(f"{name + ' training':24}{results[name]['loss']:8.3f}{results[name]['accuracy']:16.1%}")
    for text, example in list(zip(texts, test, strict=True))[:: len(test) // 8]:
        verdict = "" if text == example["answer"] else f"it is {example['answer']}"
        print(f"  {example['question']:34} {text!r:28} {verdict}".rstrip())
    results.update(
        settings={name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()},
        torch=torch.__version__, routed_peft=rp.build_info(), trainable=trainable, parameters=total, guessing=guess,
        tap=report.tap, layers=report.names, seconds=time.perf_counter() - start,
    )  # fmt: skip
    (args.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    size = sum(file.stat().st_size for file in adapter.iterdir())
    print(f"{adapter}: {size / 1024:.0f} KiB. {results['ms_per_step']:.0f} ms/step, {results['seconds']:.0f} s in all.")
    if not results["base_unchanged"]:
        sys.exit("The base model's weights changed.")
    if results["reload"] != {"largest_logit_difference": 0.0, "same_answers": True}:
        sys.exit(f"The adapter, loaded into a fresh base model, differs: {results['reload']}")
    print("Loaded into a fresh base model, the adapter gives the same logits and the same answers, bit for bit.")
    return results


if __name__ == "__main__":
    main()
