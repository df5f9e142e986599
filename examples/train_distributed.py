"""One program for one process, DDP and FSDP2: the questions about digits of digits_vqa.py, with checkpoints and resume.

A frozen sentence encoder with routed LoRAs answers questions about handwritten digits; the condition is the scan
itself. The batch is shared among the processes, so that every way to run it computes the same, up to rounding:

    python examples/train_distributed.py
    torchrun --nproc-per-node 2 examples/train_distributed.py                       # DDP
    torchrun --nproc-per-node 2 examples/train_distributed.py --fsdp                # FSDP2
    accelerate launch --num_processes 2 --multi_gpu examples/train_distributed.py   # DDP; FSDP2 with --use_fsdp

Kill it and run the same line with ``--resume``: it goes on at the last checkpoint, with the losses it would have had. A
checkpoint holds whole tensors, so one process can go on with what two have begun, and the other way round.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from digits_vqa import Data, accuracy, ask, build, load_data, load_text
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from tqdm import tqdm

import routed_peft as rp
from routed_peft.routes import ROUTES

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True, strict=False)


# ------------------------------------------------------------------------------------------------ processes
def launched() -> bool:
    """Whether torchrun, or accelerate by it, has started this process as one of several."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def rank() -> int:
    return distributed.get_rank() if distributed.is_initialized() else 0


def world() -> int:
    return distributed.get_world_size() if distributed.is_initialized() else 1


def start(device: str) -> torch.device:
    """Meet the other processes; the device of this one."""
    local = torch.device(device, int(os.environ.get("LOCAL_RANK", 0))) if device == "cuda" else torch.device(device)
    if local.type == "cuda":
        torch.cuda.set_device(local)
    if launched():
        distributed.init_process_group("nccl" if local.type == "cuda" else "gloo")
    return local


def distribute(model: nn.Module, fsdp: bool, device: torch.device) -> nn.Module:
    """The model that is trained: by FSDP2, with each layer of the encoder a group of its own, or by DDP."""
    if fsdp:
        mesh = init_device_mesh(device.type, (world(),))
        for layer in model.text.encoder.layer:
            fully_shard(layer, mesh=mesh)
        return fully_shard(model, mesh=mesh)
    if world() > 1:
        return nn.parallel.DistributedDataParallel(model)
    return model


def mean_over_ranks(value: Tensor) -> float:
    value = value.detach().double()
    if world() > 1:
        distributed.all_reduce(value)
    return value.item() / world()


# ------------------------------------------------------------------------------------------------ checkpoints
class Checkpoint:
    """The trained weights, the optimizer and the step, in one file that is there as a whole or not at all."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.file, self.settings = folder / "checkpoint.pt", settings

    def save(self, model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Every process has to call it; the first one writes."""
        weights, state = get_state_dict(model, optimizer, options=WHOLE)
        if rank() == 0:
            new = self.file.with_suffix(".new")
            torch.save({"weights": weights, "optimizer": state, "step": step, "settings": self.settings}, new)
            new.replace(self.file)

    def load(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
        """Load it, if there is one; how many steps were made."""
        if not self.file.exists():
            return 0
        saved = torch.load(self.file, map_location="cpu", weights_only=True)
        if saved["settings"] != self.settings:
            sys.exit(f"--resume: {self.file} was made with {saved['settings']}, not with {self.settings}")
        set_state_dict(
            model, optimizer, model_state_dict=saved["weights"], optim_state_dict=saved["optimizer"], options=WHOLE
        )
        return saved["step"]


class Losses:
    """One line for each step in losses.jsonl; a resumed run goes on behind the checkpoint's step."""

    def __init__(self, file: Path, step: int) -> None:
        kept = file.read_text().splitlines()[:step] if step else []
        file.write_text("".join(line + "\n" for line in kept))
        self.file = file.open("a")

    def add(self, step: int, loss: float) -> None:
        self.file.write(json.dumps({"step": step, "loss": loss}) + "\n")
        self.file.flush()


# ------------------------------------------------------------------------------------------------ training
def train(
    model: nn.Module, data: Data, device: torch.device, checkpoint: Checkpoint, args: argparse.Namespace
) -> list[float]:
    """Train ``model``, which is distributed already; the losses of the steps that were made here."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], args.lr, weight_decay=0.01)
    first = checkpoint.load(model, optimizer) if args.resume else 0
    log = Losses(args.out / "losses.jsonl", first) if rank() == 0 else None
    warmup = max(1, args.steps // 10)
    part = slice(rank() * args.batch // world(), (rank() + 1) * args.batch // world())
    losses: list[float] = []
    if rank() == 0 and first:
        print(f"Resumed behind step {first}.", flush=True)
    # disable=None: silent where there is no terminal
    progress = tqdm(range(first + 1, args.steps + 1), initial=first, total=args.steps, disable=rank() > 0 or None)
    for step in progress:
        # The batch depends on the seed and the step alone, so there is no state of a data loader to save.
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        images, words, target = data.sample(args.batch, generator)
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(step / warmup, (args.steps + 1 - step) / max(1, args.steps - warmup))
        loss = F.cross_entropy(ask(model, data, images[part], words[part]), target[part].to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(mean_over_ranks(loss))
        if log is not None:
            log.add(step, losses[-1])
            progress.set_postfix(loss=f"{losses[-1]:.3f}")
            if step % max(1, args.steps // 10) == 0:
                tqdm.write(f"step {step}: loss {losses[-1]:.3f}")
        if step % args.save_every == 0 or step == args.steps:
            checkpoint.save(model, optimizer, step)
    return losses


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--fsdp", action="store_true", help="shard the model (FSDP2) instead of copying it (DDP)")
    add("--resume", action="store_true", help="go on at the checkpoint in --out, if there is one")
    add("--routing", choices=list(ROUTES), default="mul", help="route (%(default)s)")
    add("--rank", type=int, default=16, help="of the adapters (%(default)s)")
    add("--steps", type=int, default=200, help="training steps (%(default)s)")
    add("--batch", type=int, default=32, help="questions per step, of all processes together (%(default)s)")
    add("--lr", type=float, default=4e-3, help="learning rate (%(default)s)")
    add("--seed", type=int, default=0, help="of the weights and the batches (%(default)s)")
    add("--save-every", type=int, default=50, help="steps from checkpoint to checkpoint (%(default)s)")
    add("--test-images", type=int, default=100, help="held-out digits to ask about at the end (%(default)s)")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: a GPU if there is one")
    add("--text-model", metavar="PATH", help="path or Hugging Face id of a BERT instead of the packaged MiniLM")
    add("--out", type=Path, default=Path("distributed_results"), metavar="DIR", help="for the results (%(default)s)")
    args = parser.parse_args(argv)
    for name in ("rank", "steps", "batch", "save_every", "test_images"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    if not args.lr > 0:
        parser.error(f"--lr must be positive, got {args.lr}")
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    args.fsdp |= os.environ.get("ACCELERATE_USE_FSDP") == "true"
    if args.fsdp and not launched():
        parser.error("--fsdp needs a launcher: torchrun --nproc-per-node 2 examples/train_distributed.py --fsdp")
    processes = int(os.environ["WORLD_SIZE"]) if launched() else 1
    if args.batch % processes:
        parser.error(f"--batch {args.batch} cannot be shared by {processes} processes")
    return args


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Train, test, save the adapter, and return the results."""
    args = parse(argv)
    device = start(args.device)
    args.out.mkdir(parents=True, exist_ok=True)
    args.bf16, args.pool = False, "auto"  # what digits_vqa.py asks for, too
    text, tokenizer = load_text(args)
    data = load_data(tokenizer, None)
    for name in ("tokens", "ids", "mask"):
        setattr(data, name, getattr(data, name).to(device))
    model = build(text, data, "lora", args.routing, args.seed, args).to(device)
    model.eval()  # the encoder's dropout would draw other numbers in each process
    settings = {name: getattr(args, name) for name in ("routing", "rank", "steps", "batch", "lr", "seed", "text_model")}
    way = "FSDP2" if args.fsdp else "DDP" if world() > 1 else "one process"
    if rank() == 0:
        print(f"{way}: {world()} x {args.batch // world()} questions per step on {device.type}.", flush=True)
    distributed_model = distribute(model, args.fsdp, device)
    losses = train(distributed_model, data, device, Checkpoint(args.out, settings), args)
    scores = accuracy(distributed_model, data, data.split["test"][: args.test_images])
    rp.save_adapter(model, args.out / "adapter")
    if rank() == 0:
        print(f"{scores['overall']:.1%} of the answers about held-out digits are right; adapter in {args.out}/adapter.")
    if distributed.is_initialized():
        distributed.destroy_process_group()
    return {"losses": losses, "test": scores}


if __name__ == "__main__":
    main()
