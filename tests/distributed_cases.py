"""What tests/test_distributed.py runs, both in its own process and, as a program, in two others that share the batch.

python tests/distributed_cases.py RANK WORLD FOLDER
"""

import sys
import traceback
from datetime import timedelta
from pathlib import Path

import torch
from tiny_models import awaken, batch_of, bert, image_batch, llama, llava, output_of
from torch import distributed, nn

import routed_peft as rp
from routed_peft.routes import ROUTES
from routed_peft.surgery import is_sharded, whole

try:
    import peft

    from routed_peft.integrations import peft as tuner

    tuner.register()
except ImportError:
    peft = None

DC, SAMPLES = 12, 4  # condition features; samples of all ranks together
SECONDS = 60  # after which a collective call that waits for a rank in vain raises

ALL_ROUTES = [name for name in ROUTES if name != "gram_reshape"]
CHECKPOINTS = {"no": None, "non-reentrant": False, "reentrant": True}


def cases():
    """Name -> the keywords of ``run``."""
    found = {}

    def add(mode, what, config, checkpoint="no", **case):
        found[f"{mode}, {what}, {checkpoint} checkpoints"] = {
            "mode": mode, "config": config, "reentrant": CHECKPOINTS[checkpoint], **case
        }  # fmt: skip

    for mode in ("ddp", "fsdp"):
        for routing in ALL_ROUTES:
            for delivery in ("keyword", "context"):
                for checkpoint in ("no", "non-reentrant"):
                    add(mode, f"{routing}, {delivery}", {"routing": routing}, checkpoint, delivery=delivery)
        for checkpoint in CHECKPOINTS:
            for source in ("external", "in_sequence"):
                tapped = {"condition_source": source, "condition_features": None}
                add(mode, f"{source}, tap", tapped, checkpoint, model="llava")
            add(mode, "adapter", {"routing": "mul"}, checkpoint, kind="adapter")
            add(mode, "peft", {"routing": "gram"}, checkpoint, kind="peft", model="llama")
        add(mode, "mul, keyword", {"routing": "mul"}, "reentrant")
        for kind in ("lora", "adapter", "peft"):
            for missing in ("base", "lora"):
                config = {"routing": "gram", "missing": missing}
                add(mode, f"{kind} with missing={missing}, rank 1 has no condition", config, kind=kind, lacking=True)
    for checkpoint in CHECKPOINTS:  # with a shared lora_A and with a projection of their own
        add("ddp", "joined, tap", {"condition_features": None}, checkpoint, model="llava", join=True)
        add("ddp", "joined", {"routing": "gram"}, checkpoint, join=True)
    for routing in ("mul", "gram"):
        add("fsdp", f"{routing}, base layers apart", {"routing": routing}, apart=True)
    add("fsdp", "bfloat16 base", {"routing": "gram"}, dtype=torch.bfloat16)
    return found


# ------------------------------------------------------------------------------------------------ one case
def build(model="bert", kind="lora", config=None, dtype=torch.float32, join=False):
    """The model of a case, in every process the same."""
    torch.manual_seed(0)
    base = {"bert": bert, "llama": llama, "llava": llava}[model]().to(dtype)
    options = {"r": 4, "condition_features": DC, **config}
    if model == "llava":
        options["tap"] = "auto"
    if kind == "peft":
        targets = ["q_proj", "down_proj"] if model == "llama" else ["query", "output.dense"]
        base = peft.get_peft_model(base, tuner.RoutedPeftConfig(target_modules=targets, **options))
    elif kind == "adapter":
        rp.attach(base, rp.RoutedAdapterConfig(target_modules=["attention.output"], **options))
    else:
        targets = ["query", "output.dense"] if model == "bert" else ["q_proj"]
        rp.attach(base, rp.RoutedLoRAConfig(target_modules=targets, **options), join_conditions=join)
    return awaken(base).train()


def inputs(model, rank, world):
    """This rank's part of the batch and of the condition."""
    torch.manual_seed(1)
    y = torch.randn(SAMPLES, 3, DC)
    images = model.config.model_type == "llava"
    batch = image_batch(model, images=(1,) * SAMPLES) if images else batch_of(model, batch=SAMPLES)
    part = slice(rank * SAMPLES // world, (rank + 1) * SAMPLES // world)
    return {name: value[part] for name, value in batch.items()}, None if images else y[part]


def wrap(model, mode, apart=False, layers=True):
    """The model, distributed over all ranks; by FSDP2 the layers, or also every base layer, in groups of their own."""
    if mode == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    if mode == "fsdp":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
        modules = dict(model.named_modules())
        groups = [module for name, module in modules.items() if apart and name.endswith(".base_layer")]
        groups += [m for m in modules.values() if layers and type(m).__name__ in ("BertLayer", "LlamaDecoderLayer")]
        for module in [*groups, model]:
            fully_shard(module, mesh=mesh)
    return model


def enable_checkpointing(model, reentrant):
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if reentrant:  # it lets gradients through its inputs only
        model.enable_input_require_grads()


def loss_of(model, batch, y, delivery):
    """Mean over the samples, so that the mean over ranks is that of the whole batch."""
    if delivery == "context" and y is not None:
        with rp.condition(model, y):
            return output_of(model(**batch)).float().square().mean()
    more = {} if y is None else {"routed_condition": y}
    return output_of(model(**batch, **more)).float().square().mean()


def gradients(model):
    """The whole gradients by name, whatever wraps the model."""
    return {name.removeprefix("module."): whole(p.grad) for name, p in model.named_parameters() if p.requires_grad}


def run(rank=0, world=1, *, mode, reentrant=None, delivery="keyword", lacking=False, apart=False, **case):
    """The gradients of one case; with ``lacking`` the second half of the samples has no condition."""
    model = build(**case)
    parts = [inputs(model, part, 2) for part in (0, 1)] if lacking and world == 1 else [inputs(model, rank, world)]
    if lacking and (rank == 1 or world == 1):
        parts[-1] = parts[-1][0], None
    if reentrant is not None:
        enable_checkpointing(model, reentrant)
    model = wrap(model, mode if world > 1 else None, apart)
    losses = [loss_of(model, *part, delivery) for part in parts]
    (sum(losses) / len(losses)).backward()
    return gradients(model)


# ------------------------------------------------------------------------------------------------ files
STEP = {"config": {"routing": "gram"}}


def train_a_step(model, rank=0, world=1):
    """One SGD step, then the output for the first two samples."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    loss_of(model, *inputs(model, rank, world), "keyword").backward()
    optimizer.step()
    optimizer.zero_grad()
    return output_for_two(model)


@torch.no_grad()
def output_for_two(model):
    model.eval()
    out = output_of(model(**inputs(model, 0, 2)[0], routed_condition=inputs(model, 0, 2)[1]))
    model.train()
    return out


def fsdp_files(rank, world, folder):
    """Train a step sharded and save; then load what a single process has saved."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    model = wrap(build(**STEP), "fsdp")
    found = {"trained": train_a_step(model, rank, world)}
    rp.save_adapter(model, folder / "sharded")
    found["there"] = (folder / "sharded" / "routed_adapter.safetensors").is_file()
    for layers in (True, False):
        model = wrap(build(**STEP), "fsdp", layers=layers)
        output_for_two(model)  # after which FSDP2 leaves the outermost group whole
        rp.load_adapter(model, folder / "single")
        assert all(is_sharded(p) for p in model.parameters())
        found[f"loaded, layers apart: {layers}"] = output_for_two(model)
        rp.save_adapter(model, folder / f"{rank}" / "again")  # gathered: rank 0 alone writes
        assert (folder / f"{rank}" / "again").is_dir() == (rank == 0)
    if peft is not None:
        model = wrap(build(kind="peft", **STEP), "fsdp")
        found["peft trained"] = train_a_step(model, rank, world)
        state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        if rank == 0:
            model.save_pretrained(folder / "peft", state_dict=state)
    return found


# ------------------------------------------------------------------------------------------------ the program
def main(rank, world, folder):
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world,
        timeout=timedelta(seconds=SECONDS),
    )  # fmt: skip
    results = {}

    def record(name, function, *args, **kwargs):
        try:
            results[name] = function(*args, **kwargs)
        except Exception:
            results[name] = traceback.format_exc()
        torch.save(results, folder / f"{rank}.pt")

    record("files", fsdp_files, rank, world, folder)
    for name, case in cases().items():
        if case.get("kind") != "peft" or peft is not None:
            record(name, run, rank, world, **case)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
