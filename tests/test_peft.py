"""The PEFT tuner: what PEFT does with an adapter type, with the same numbers as ``attach``."""

import copy
import enum
import pickle
import subprocess
import sys
import textwrap
import warnings

import pytest
import torch
from packaging.version import Version
from tiny_models import D, batch_of, bert, gpt2, gradients, image_batch, llama, llava, output_of, roberta_classifier, t5
from torch import nn
from transformers.integrations.peft import MIN_PEFT_VERSION

import routed_peft as rp
from routed_peft.routes import ROUTES

peft = pytest.importorskip("peft", minversion="0.20")

from routed_peft.integrations import peft as tuner  # noqa: E402

tuner.register()

pytestmark = pytest.mark.filterwarnings(
    "ignore:.gradient_checkpointing.:FutureWarning", "ignore:You are trying to modify a model with PEFT:UserWarning"
)
DC = 12
TARGETS = ["q_proj", "down_proj"]
OLD = tuple(map(int, peft.__version__.split(".")[:2])) < (0, 21)


def config(targets=TARGETS, **options):
    return tuner.RoutedPeftConfig(target_modules=targets, **{"r": 4, "condition_features": DC, **options})


def wake(model, adapter="default"):
    """B is zero at first, so that every update is; give it values."""
    generator = torch.Generator().manual_seed(sum(adapter.encode()))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if f".{adapter}.matrix_B" in name:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
    return model


def wrapped(make=llama, targets=TARGETS, **options):
    """A PeftModel in eval mode whose adapter does something."""
    return wake(peft.get_peft_model(make(), config(targets, **options))).eval()


def adapted(model):
    """The tuner's layers by path in the base model."""
    base = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    return {name: module for name, module in base.named_modules() if isinstance(module, tuner.RoutedPeftLayer)}


def condition(batch=2, tokens=3):
    return torch.randn(batch, tokens, DC, generator=torch.Generator().manual_seed(tokens))


def logits(model, batch, y=None):
    with torch.no_grad():
        return output_of(model(**batch, **({} if y is None else {"routed_condition": y})))


def attached_twin(base, model, adapter="default"):
    """``base`` with ``attach`` and the values of the PEFT model's adapter."""
    own = model.peft_config[adapter]
    options = {key: getattr(own, key) for key in ("r", "lora_alpha", "routing", "condition_features", "use_rslora")}
    rp.attach(base, rp.RoutedLoRAConfig(target_modules=list(own.target_modules), **options))
    with torch.no_grad():
        for name, layer in adapted(model).items():
            update, twin = layer.rpeft_update[adapter], base.get_submodule(name)
            twin.lora_A.copy_(update.A)
            twin.lora_B.copy_(update.B)
            if update.C is not None:
                twin.condition_A.copy_(update.C)
    return base


# ------------------------------------------------------------------------------------------------ registration
def run_python(code):
    return subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120)


def test_loading_without_register_fails(tmp_path):
    wrapped().save_pretrained(tmp_path)
    for load in ("peft.PeftModel.from_pretrained(model, path)", "model.load_adapter(path)"):
        done = run_python(f"""
            import sys
            sys.path[:0] = {sys.path!r}
            import peft, routed_peft, tiny_models
            model, path = tiny_models.llama(), {str(tmp_path)!r}
            {load}
        """)
        assert done.returncode != 0
        assert "KeyError: 'RPEFT'" in done.stderr.splitlines()[-1]


def test_a_config_before_register_says_so():
    done = run_python(f"""
        import sys
        sys.path[:0] = {sys.path!r}
        from routed_peft.integrations import peft
        peft.RoutedPeftConfig(target_modules=["q_proj"])
    """)
    assert "RoutedPeftError: call routed_peft.integrations.peft.register() first" in done.stderr


def test_the_core_never_imports_peft():
    done = run_python(f"""
        import sys
        sys.path[:0] = {sys.path!r}
        import routed_peft
        assert "peft" not in sys.modules
    """)
    assert done.returncode == 0, done.stderr


def test_without_peft_it_says_what_to_install():
    done = run_python(f"""
        import sys
        sys.path[:0] = {sys.path!r}
        sys.modules["peft"] = None
        from routed_peft.integrations import peft
    """)
    wanted = "ImportError: routed_peft.integrations.peft needs peft >= 0.20: pip install 'peft>=0.20'"
    assert done.stderr.splitlines()[-1] == wanted


def test_an_old_peft_is_refused(monkeypatch):
    monkeypatch.setattr(peft, "__version__", "0.19.1")
    with pytest.raises(ImportError, match="needs peft >= 0.20, found 0.19.1"):
        tuner.register()


def test_register_again_changes_nothing():
    before = list(peft.PeftType)
    tuner.register()
    assert list(peft.PeftType) == before


def test_the_new_type_is_a_member_like_the_others():
    kind = peft.PeftType("RPEFT")
    assert isinstance(kind, peft.PeftType) and isinstance(kind, enum.Enum)
    assert kind is peft.PeftType.RPEFT is peft.PeftType["RPEFT"] and kind in list(peft.PeftType) and kind == "RPEFT"
    assert copy.deepcopy(kind) is kind and pickle.loads(pickle.dumps(kind)) is kind
    assert kind.name == kind.value == "RPEFT" and len({*peft.PeftType}) == len(peft.PeftType.__members__)


# ------------------------------------------------------------------------------------------------ the model's call
def test_a_fresh_adapter_changes_nothing():
    base = llama()
    batch = batch_of(base)
    wanted = logits(base, batch)
    model = peft.get_peft_model(base, config()).eval()
    torch.testing.assert_close(logits(model, batch, condition()), wanted)


@pytest.mark.parametrize("routing", [name for name in ROUTES if name not in ("gram_reshape", "cross_gram")])
def test_outputs_and_gradients_are_those_of_attach(routing):
    base = llama()
    batch = batch_of(base)
    model = wake(peft.get_peft_model(copy.deepcopy(base), config(routing=routing)))
    twin = attached_twin(base, model)
    y = condition()
    outs = [output_of(m(**batch, routed_condition=y)) for m in (model, twin)]
    assert torch.equal(*outs)
    for out in outs:
        out.square().mean().backward()
    for name, layer in adapted(model).items():
        update, other = layer.rpeft_update["default"], twin.get_submodule(name)
        assert torch.equal(update.A.grad, other.lora_A.grad) and torch.equal(update.B.grad, other.lora_B.grad)
        if update.C is not None:
            assert torch.equal(update.C.grad, other.condition_A.grad)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == set(gradients(model)) and all(".rpeft_update.default.matrix_" in name for name in trained)


@pytest.mark.parametrize("task", [None, "CAUSAL_LM", "FEATURE_EXTRACTION"])
def test_keyword_and_context_manager(task):
    model = wrapped(task_type=task)
    batch, y = batch_of(model), condition()
    out = logits(model, batch, y)
    with rp.condition(model, y):
        assert torch.equal(logits(model, batch), out)
    with pytest.raises(rp.MissingConditionError, match=r"layers\.0\.self_attn\.q_proj\.rpeft_update\.default"):
        logits(model, batch)
    assert not torch.equal(logits(model, batch, condition(tokens=2)), out)


@pytest.mark.parametrize("routing", ["none", "mul", "gram"])
def test_conv1d(routing):
    base = gpt2()
    batch, y = batch_of(base), condition()
    model = wake(peft.get_peft_model(copy.deepcopy(base), config(["c_attn", "c_fc"], routing=routing))).eval()
    assert torch.equal(logits(model, batch, y), logits(attached_twin(base, model), batch, y))


@pytest.mark.parametrize("make, targets", [(t5, ["q", "wo"]), (bert, ["query", "output.dense"])])
def test_other_models(make, targets):
    base = make()
    batch, y = batch_of(base), condition()
    model = wake(peft.get_peft_model(copy.deepcopy(base), config(targets, routing="mul"))).eval()
    assert torch.equal(logits(model, batch, y), logits(attached_twin(base, model), batch, y))


def test_a_tap_serves_the_language_model_and_skips_the_tower():
    base = llava()
    batch = image_batch(base)
    options = {"routing": "gram", "condition_features": None, "tap": "auto"}
    model = wake(peft.get_peft_model(copy.deepcopy(base), config(["q_proj"], **options))).eval()
    assert adapted(model) and all("language_model" in name for name in adapted(model))
    out = logits(model, batch)
    rp.attach(base, rp.RoutedLoRAConfig(target_modules=["q_proj"], r=4, tap="auto"))
    with torch.no_grad():
        for name, layer in adapted(model).items():
            base.get_submodule(name).lora_A.copy_(layer.rpeft_update["default"].A)
            base.get_submodule(name).lora_B.copy_(layer.rpeft_update["default"].B)
    assert torch.equal(out, logits(base, batch))
    tokens = [m.generate(**batch, max_new_tokens=4, do_sample=False, pad_token_id=0) for m in (model, base)]
    assert torch.equal(*tokens)


def test_a_tapped_adapter_loads_with_its_tap(tmp_path):
    base = llava()
    batch = image_batch(base)
    options = {"routing": "gram", "condition_features": None, "tap": "auto"}
    model = wake(peft.get_peft_model(copy.deepcopy(base), config(["q_proj"], **options))).eval()
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path)
    assert torch.equal(logits(loaded, batch), logits(model, batch))
    with pytest.raises(rp.UnsupportedError, match="share one tap"):
        loaded.add_adapter("other", config(["q_proj"], condition_features=None))


@pytest.mark.parametrize("beams", [1, 2])
def test_generate(beams):
    model = wrapped(task_type="CAUSAL_LM")
    batch, y = batch_of(model), condition()
    options = {"max_new_tokens": 5, "do_sample": False, "num_beams": beams, "pad_token_id": 0}
    together = model.generate(**batch, routed_condition=y, **options)
    for row in (0, 1):
        alone = model.generate(
            input_ids=batch["input_ids"][row : row + 1], routed_condition=y[row : row + 1], **options
        )
        assert torch.equal(together[row, : alone.shape[1]], alone[0])
    assert torch.equal(
        together, model.generate(**batch, routed_condition=y, use_cache=False, **options)
    )  # the cache's states are those of the prompt


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_is_exact(reentrant):
    model = wake(peft.get_peft_model(llama(), config(task_type="CAUSAL_LM"))).train()
    batch, ys = batch_of(model), [condition(tokens=2), condition(tokens=4)]

    def run():
        model.zero_grad()
        losses = [output_of(model(**batch, routed_condition=y)).square().mean() for y in ys]  # both before a backward
        sum(losses).backward()
        return gradients(model)

    wanted = run()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    got = run()
    assert wanted.keys() == got.keys()
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name], rtol=1e-5, atol=1e-7)


def test_compile_fullgraph():
    model = wrapped()
    model.get_base_model().config.use_cache = False
    batch, y = batch_of(model), condition()
    wanted = logits(model, batch, y)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(logits(compiled, batch, y), wanted)


def test_a_deep_copy_is_on_its_own():
    model = wrapped()
    twin = copy.deepcopy(model)
    batch, y = batch_of(model), condition()
    wanted = logits(model, batch, y)
    assert torch.equal(logits(twin, batch, y), wanted)
    with rp.condition(model, y), pytest.raises(rp.MissingConditionError):
        logits(twin, batch)


# ------------------------------------------------------------------------------------------------ files
def strict_load(base, path, **options):
    """Load, with whatever PEFT warns about (missing keys, unknown options) an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", FutureWarning)
        return peft.PeftModel.from_pretrained(base, path, **options)


@pytest.mark.parametrize("low_cpu", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"routing": "gram"},
        {"routing": "mul", "condition_pool": "first", "init": "gaussian"},
        {"routing": "add", "use_rslora": True, "condition_features": None},
    ],
)
def test_save_and_load_is_exact(options, low_cpu, tmp_path):
    base = llama()
    batch = batch_of(base)
    targets = TARGETS if options.get("condition_features", DC) else ["q_proj"]
    model = wake(peft.get_peft_model(copy.deepcopy(base), config(targets, **options))).eval()
    y = condition() if options.get("condition_features", DC) else torch.randn(2, 3, D)
    model.save_pretrained(tmp_path)
    loaded = strict_load(base, tmp_path, low_cpu_mem_usage=low_cpu)
    assert torch.equal(logits(loaded, batch, y), logits(model, batch, y))
    own, other = (m.peft_config["default"].to_dict() for m in (model, loaded))
    assert own | {"inference_mode": True, "auto_mapping": other["auto_mapping"]} == other


def test_no_name_in_a_file_reads_like_lora(tmp_path):
    from safetensors.torch import load_file

    wrapped(modules_to_save=["lm_head"]).save_pretrained(tmp_path)
    names = list(load_file(tmp_path / "adapter_model.safetensors"))
    assert len(names) == 3 * 4 + 1 and not any("lora_" in name or "base_layer" in name for name in names)
    assert sum(".rpeft_update.matrix_" in name for name in names) == 12


def test_an_option_from_the_future_is_told_and_dropped(tmp_path):
    wrapped().save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(file.read_text().replace('"bias"', '"gizmo": 1, "bias"'))
    with pytest.warns(UserWarning, match="gizmo"):
        peft.PeftModel.from_pretrained(llama(), tmp_path)


@pytest.mark.parametrize("adapter", ["default", "A", "rpeft", "q_proj"])
def test_awkward_adapter_names(adapter, tmp_path):
    base = llama()
    batch, y = batch_of(base), condition()
    model = wake(peft.get_peft_model(copy.deepcopy(base), config(), adapter_name=adapter), adapter).eval()
    model.save_pretrained(tmp_path)
    folder = tmp_path if adapter == "default" else tmp_path / adapter
    assert torch.equal(logits(strict_load(base, folder), batch, y), logits(model, batch, y))


def own_methods():
    """transformers' own adapter methods want a peft of their own choice; without it they refuse every adapter."""
    if Version(peft.__version__) < Version(MIN_PEFT_VERSION):
        pytest.skip(f"transformers' own adapter methods need peft {MIN_PEFT_VERSION}, this is {peft.__version__}")


def test_transformers_own_adapter_methods(tmp_path):
    own_methods()
    base = llama()
    batch, y = batch_of(base), condition()
    model = copy.deepcopy(base)
    model.add_adapter(config())
    wake(model)
    out = logits(model, batch, y)
    model.disable_adapters()
    assert torch.equal(logits(model, batch), logits(base, batch))
    model.enable_adapters()
    model.save_pretrained(tmp_path)
    base.load_adapter(str(tmp_path))
    assert torch.equal(logits(base, batch, y), out)
    tokens = [
        m.generate(**batch, routed_condition=y, max_new_tokens=4, do_sample=False, pad_token_id=0)
        for m in (base, model)
    ]
    assert torch.equal(*tokens)
    base.add_adapter(config(routing="mul", r=2), "second")
    wake(base, "second")
    assert not torch.allclose(logits(base, batch, y), out)
    base.set_adapter("default")
    assert torch.equal(logits(base, batch, y), out)
    base.delete_adapter("second")
    assert all(list(layer.rpeft_update) == ["default"] for layer in adapted(base).values())


# ------------------------------------------------------------------------------------------------ several adapters
def two_adapters():
    model = peft.get_peft_model(llama(), config(routing="gram"), adapter_name="a")
    model.add_adapter("b", config(["q_proj", "up_proj"], routing="mul", r=2, condition_pool="first"))
    return wake(wake(model, "a"), "b").eval()


def only(model, adapter):
    """What the model gives with one adapter."""
    model.set_adapter(adapter)
    return model


def test_set_disable_and_delete():
    model = two_adapters()
    batch, y = batch_of(model), condition()
    base = model.get_base_model()
    a, b = (logits(only(model, name), batch, y) for name in "ab")
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all(".b.matrix_" in name for name in trained)
    with model.disable_adapter():
        plain = logits(model, batch)
    assert not torch.allclose(a, b) and not torch.allclose(a, plain)
    model.delete_adapter("a")
    assert torch.equal(logits(model, batch, y), b)
    assert not any(".a.matrix_" in name for name in model.state_dict())
    assert set(adapted(model)) >= {name for name, m in base.named_modules() if name.endswith("up_proj")}


def test_two_active_adapters_add_up():
    model = two_adapters()
    layer = adapted(model)["model.layers.0.self_attn.q_proj"]
    x, y = torch.randn(2, 5, D), condition()
    with rp.condition(model, y):
        outs = {name: only(model, name) and layer(x) for name in "ab"}
        model.base_model.set_adapter(["a", "b"])
        both = layer(x)
    base = layer.base_layer(x)
    torch.testing.assert_close(both - base, outs["a"] - base + outs["b"] - base, rtol=1e-4, atol=1e-5)
    weights, leaves = torch.randn_like(both), {name: p for name, p in layer.named_parameters() if "rpeft" in name}
    together = torch.autograd.grad(both, leaves.values(), weights)
    for name, got in zip(leaves, together, strict=True):
        own = outs["a" if ".a." in name else "b"]
        (apart,) = torch.autograd.grad(own, leaves[name], weights, retain_graph=True)
        torch.testing.assert_close(got, apart, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("names", [["a", "b", "a"], ["__base__", "b", "a"], ["b"] * 3])
@pytest.mark.parametrize("how", ["keyword", "index", "masked", "context"])
def test_an_adapter_for_each_sample(names, how):
    model = two_adapters()
    batch = batch_of(model, batch=3)
    y = condition(2 if how == "index" else 3, 4)
    more = {"routed_condition": y}
    if how == "index":
        more["routed_condition_index"] = torch.tensor([1, 0, 1])
    if how == "masked":
        more["routed_condition_mask"] = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]])

    def row(row, name):
        alone = {key: value[row : row + 1] for key, value in batch.items()}
        keep = more["routed_condition_index"][row : row + 1] if how == "index" else torch.tensor([row])
        mask = more.get("routed_condition_mask")
        only(model, "a" if name == "__base__" else name)
        if name == "__base__":
            with model.disable_adapter():
                return logits(model, alone)
        with rp.condition(model, y[keep], None if mask is None else mask[keep]):
            return logits(model, alone)

    wanted = torch.cat([row(i, name) for i, name in enumerate(names)])
    only(model, "a")
    with torch.no_grad():
        if how == "context":
            with rp.condition(model, y):
                got = output_of(model(**batch, adapter_names=names))
        else:
            got = output_of(model(**batch, **more, adapter_names=names))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make, targets", [(llama, TARGETS), (t5, ["q", "wo"])])
@pytest.mark.parametrize("beams", [1, 2])
def test_generate_with_an_adapter_for_each_sample(make, targets, beams):
    model = peft.get_peft_model(make(), config(targets, routing="mul"), adapter_name="a")
    model.add_adapter("b", config(targets, routing="gram", r=2))
    wake(wake(model, "a"), "b").eval()
    ids, y = torch.randint(3, 50, (3, 5)), condition(3)
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "num_beams": beams, "pad_token_id": 0}
    names = ["b", "a", "b"]
    got = model.generate(input_ids=ids, routed_condition=y, adapter_names=names, **options)
    for row, name in enumerate(names):
        alone = only(model, name).generate(input_ids=ids[row : row + 1], routed_condition=y[row : row + 1], **options)
        assert torch.equal(got[row], alone[0]), row


def test_in_sequence_with_an_adapter_for_each_sample():
    options = {"condition_source": "in_sequence", "condition_features": None}
    model = peft.get_peft_model(llama(), config(["q_proj"], **options), adapter_name="a")
    model.add_adapter("b", config(["q_proj"], routing="mul", r=2, **options))
    wake(wake(model, "a"), "b").eval()
    ids, mask = torch.randint(3, 50, (3, 5)), torch.tensor([[1, 1, 0, 0, 0], [0, 1, 1, 1, 0], [1, 0, 0, 0, 0]])
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    names = ["b", "a", "b"]
    got = model.generate(input_ids=ids, routed_condition_mask=mask, adapter_names=names, **options)
    for row, name in enumerate(names):
        alone = only(model, name).generate(
            input_ids=ids[row : row + 1], routed_condition_mask=mask[row : row + 1], **options
        )
        assert torch.equal(got[row], alone[0]), row


def test_beams_share_the_condition_of_their_sample():
    """Given around the call, a condition is not repeated for the beams, as generate does with the keyword's."""
    model = two_adapters()
    ids, y = torch.randint(3, 50, (3, 5)), condition(3)
    options = {"max_new_tokens": 4, "do_sample": False, "num_beams": 2, "pad_token_id": 0}
    options["adapter_names"] = ["b", "a", "b"]
    wanted = model.generate(input_ids=ids, routed_condition=y, **options)
    with rp.condition(model, y):
        assert torch.equal(model.generate(input_ids=ids, **options), wanted)


def test_the_base_layer_s_output_is_not_written_to():
    model = two_adapters()
    layer = adapted(model)["model.layers.0.self_attn.q_proj"]
    held = []
    layer.base_layer.register_forward_hook(lambda module, args, out: held.append((out, out.clone())))
    with rp.condition(model, condition()), torch.no_grad():
        layer(torch.randn(2, 5, D), adapter_names=["a", "b"])
    assert len(held) == 1 and torch.equal(*held[0])


def test_flat_inputs_with_an_adapter_for_each_sample():
    model = two_adapters()
    layer = adapted(model)["model.layers.0.self_attn.q_proj"]
    x, y = torch.randn(3, 5, D), condition(3)
    with rp.condition(model, y), torch.no_grad():
        wanted = layer(x, adapter_names=["a", "b", "b"])
        assert torch.equal(layer(x.reshape(15, D), adapter_names=["a", "b", "b"]), wanted.reshape(15, -1))


def test_wrong_adapter_names_raise_and_leave_no_hooks():
    model = two_adapters()
    batch, y = batch_of(model), condition()
    wanted = logits(only(model, "a"), batch, y)
    for names, error, text in (
        (["a", "nope"], ValueError, "non-existing adapter.*nope"),
        (["a", "b", "a"], rp.ConditionShapeError, "input batch 2 does not match adapter_names, of which there are 3"),
    ):
        with pytest.raises(error, match=text), torch.no_grad():
            model(**batch, routed_condition=y, adapter_names=names)
        assert torch.equal(logits(model, batch, y), wanted)
    with pytest.raises(rp.ConditionShapeError, match="input batch 2 does not match condition batch 3"), torch.no_grad():
        model(**batch, routed_condition=condition(3), adapter_names=["a", "b"])
    with pytest.raises(rp.ConditionShapeError, match="input batch 2 does not match condition_index 3"), torch.no_grad():
        model(**batch, routed_condition=y, routed_condition_index=torch.tensor([0, 1, 0]), adapter_names=["a", "b"])
    with pytest.raises(ValueError, match="training mode"):
        model.train()(**batch, routed_condition=y, adapter_names=["a", "b"])


def test_modules_to_save_with_an_adapter_for_each_sample():
    model = peft.get_peft_model(llama(), config(modules_to_save=["lm_head"]), adapter_name="a")
    model.add_adapter("b", config(routing="mul", modules_to_save=["lm_head"]))
    wake(wake(model, "a"), "b").eval()
    with torch.no_grad():
        model.get_parameter("base_model.model.lm_head.modules_to_save.b.weight").add_(0.1)
    batch, y = batch_of(model), condition()
    wanted = torch.stack([logits(only(model, name), batch, y)[row] for row, name in enumerate("ba")])
    with torch.no_grad():
        got = output_of(model(**batch, routed_condition=y, adapter_names=["b", "a"]))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------ options
def test_modules_to_save(tmp_path):
    base = roberta_classifier()
    model = wake(peft.get_peft_model(copy.deepcopy(base), config(["query"], routing="mul", task_type="SEQ_CLS")))
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert any("classifier.modules_to_save.default" in name for name in trained)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "modules_to_save" in name:
                p.add_(0.1)
    model.eval().save_pretrained(tmp_path)
    batch, y = batch_of(base), condition()
    assert torch.equal(logits(strict_load(base, tmp_path), batch, y), logits(model, batch, y))


def test_rank_and_alpha_patterns_and_rslora(tmp_path):
    options = {"rank_pattern": {"down_proj": 2}, "alpha_pattern": {r"layers\.1\..*": 3}, "use_rslora": True}
    model = wrapped(r=4, lora_alpha=8, **options)
    for name, layer in adapted(model).items():
        update = layer.rpeft_update["default"]
        r, alpha = 2 if "down" in name else 4, 3 if "layers.1" in name else 8
        assert update.r == r and update.A.shape == (r, layer.in_features) and update.scaling == alpha / r**0.5
    model.save_pretrained(tmp_path)
    batch, y = batch_of(model), condition()
    base = copy.deepcopy(model).unload()
    assert torch.equal(logits(strict_load(base, tmp_path), batch, y), logits(model, batch, y))
    with pytest.raises(rp.RoutedPeftError, match="rank_pattern: 'nope' matches none"):
        wrapped(rank_pattern={"nope": 2})


def test_init():
    model = peft.get_peft_model(llama(), config(init="gaussian", r=8))
    layers = adapted(model).values()
    a = torch.cat([layer.rpeft_update["default"].A.flatten() for layer in layers])
    assert a.std().item() == pytest.approx(1 / 8, rel=0.1)  # by default uniform with a deviation of 1 / sqrt(3 · in)
    assert all(layer.rpeft_update["default"].B.abs().max() == 0 for layer in layers)


def test_all_linear_leaves_towers_projectors_and_heads_alone(tmp_path):
    base = llava()
    batch = image_batch(base)
    options = {"condition_features": None, "tap": "auto", "routing": "mul", "exclude_modules": ["down_proj"]}
    model = wake(peft.get_peft_model(copy.deepcopy(base), config("all-linear", **options))).eval()
    twin = copy.deepcopy(base)
    chosen = {key: value for key, value in options.items() if key != "routing"}
    report = rp.attach(twin, rp.RoutedLoRAConfig(target_modules="all-linear", r=4, routing="mul", **chosen))
    assert list(adapted(model)) == report.names
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path)
    assert list(adapted(loaded)) == report.names
    assert torch.equal(logits(loaded, batch), logits(model, batch))
    model.add_adapter("more", config("all-linear", **options))
    assert list(adapted(model)) == report.names


def test_exclude_modules():
    model = wrapped(exclude_modules=["down_proj", "layers.0.self_attn.q_proj"])
    assert list(adapted(model)) == ["model.layers.1.self_attn.q_proj"]


def test_layers_to_transform():
    model = wrapped(targets=["q_proj"], layers_to_transform=[1])
    assert list(adapted(model)) == ["model.layers.1.self_attn.q_proj"]


@pytest.mark.parametrize("bias", ["all", "rpeft_only"])
def test_biases(bias, tmp_path):
    if OLD:
        with pytest.raises(rp.UnsupportedError, match="does not save them"):
            config(bias=bias)
        return
    base = bert()
    model = wake(peft.get_peft_model(copy.deepcopy(base), config(["query"], routing="mul", bias=bias)))
    biases = [name for name, p in model.named_parameters() if p.requires_grad and name.endswith(".bias")]
    assert len(biases) == (
        2 if bias == "rpeft_only" else sum(name.endswith("bias") for name, _ in base.named_parameters())
    )
    with torch.no_grad():
        for name in biases:
            model.get_parameter(name).add_(0.1)
    model.eval().save_pretrained(tmp_path)
    batch, y = batch_of(base), condition()
    assert torch.equal(logits(strict_load(base, tmp_path), batch, y), logits(model, batch, y))


@pytest.mark.parametrize("autocast", [True, False])
def test_the_dtype_of_the_adapter(autocast, tmp_path):
    model = peft.get_peft_model(llama().bfloat16(), config(), autocast_adapter_dtype=autocast)
    wanted = torch.float32 if autocast else torch.bfloat16
    assert {p.dtype for name, p in model.named_parameters() if "rpeft_" in name} == {wanted}
    wake(model)
    batch, y = batch_of(model), condition()
    model.eval()
    twin = copy.deepcopy(model).double()
    model(**batch, routed_condition=y).logits.float().square().mean().backward()
    assert {g.dtype for g in gradients(model).values()} == {wanted}
    out = logits(model, batch, y)
    assert out.dtype == torch.bfloat16
    twin(**batch, routed_condition=y.double()).logits.square().mean().backward()
    want = logits(twin, batch, y.double())
    assert (out.double() - want).norm() < 0.03 * want.norm()
    for name, exact in gradients(twin).items():
        assert (gradients(model)[name].double() - exact).norm() < 0.1 * exact.norm(), name
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(model).unload(), tmp_path, autocast_adapter_dtype=autocast)
    assert {p.dtype for name, p in loaded.named_parameters() if "rpeft_" in name} == {wanted}
    assert torch.equal(logits(loaded, batch, y), out)


class Int8Linear(nn.Module):
    """A linear layer without a weight, as quantised layers are."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("codes", (linear.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)

    def forward(self, x):
        return x @ (self.codes.to(x.dtype) * self.scale.to(x.dtype)).t()


@pytest.mark.parametrize("targets", [["q_proj", "down_proj"], "all-linear"])
def test_a_quantised_base(targets, tmp_path):
    base = llama()
    for name, module in list(base.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            base.set_submodule(name, Int8Linear(module))
    batch, y = batch_of(base), condition()
    plain = logits(base, batch)
    model = peft.get_peft_model(copy.deepcopy(base), config(targets))
    assert len(adapted(model)) == (4 if targets != "all-linear" else 14)
    torch.testing.assert_close(logits(model, batch, y), plain)
    wake(model)
    output_of(model(**batch, routed_condition=y)).square().mean().backward()
    assert len(gradients(model)) == 3 * len(adapted(model)) and all(
        g.abs().max() > 0 for g in gradients(model).values()
    )
    model.eval().save_pretrained(tmp_path)
    assert torch.equal(logits(strict_load(base, tmp_path), batch, y), logits(model, batch, y))


def test_offloaded_weights_are_fetched_by_their_hooks():
    accelerate = pytest.importorskip("accelerate")
    model = wrapped()
    batch, y = batch_of(model), condition()
    wanted = logits(model, batch, y)
    accelerate.cpu_offload(model.get_base_model(), execution_device=torch.device("cpu"))
    assert all(p.is_meta for p in model.parameters())  # where nothing can be read behind the hooks' back
    # Not bit by bit: the base layer runs by itself here, and in one product with its update there.
    torch.testing.assert_close(logits(model, batch, y), wanted)


def test_dropout_follows_the_mode_of_the_layer_it_wraps():
    model = peft.get_peft_model(llama(), config(lora_dropout=0.5))  # llama() is in eval mode
    wake(model)
    batch, y = batch_of(model), condition()
    assert torch.equal(logits(model, batch, y), logits(model, batch, y))
    model.train()
    assert not torch.equal(logits(model, batch, y), logits(model, batch, y))


def test_missing_base():
    model = wrapped(missing="base")
    batch = batch_of(model)
    with model.disable_adapter():
        wanted = logits(model, batch)
    assert torch.equal(logits(model, batch), wanted)
    model.train()
    output_of(model(**batch)).square().mean().backward()
    assert len(gradients(model)) == 12 and all(g.abs().max() == 0 for g in gradients(model).values())


# ------------------------------------------------------------------------------------------------ merge, bake, unload
def test_merging_raises():
    model = wrapped()
    for merge in (model.merge_and_unload, model.merge_adapter, next(iter(adapted(model).values())).merge):
        with pytest.raises(rp.UnsupportedError, match=r"use bake\(condition\)"):
            merge()
    batch, y = batch_of(model), condition()
    assert logits(model, batch, y).isfinite().all()  # nothing was changed


@pytest.mark.filterwarnings("ignore")  # PEFT's, about the tied embedding
def test_merging_raises_before_anything_is_unloaded():
    model = wrapped(modules_to_save=["embed_tokens"])  # comes before the first adapted layer
    with pytest.raises(rp.UnsupportedError):
        model.merge_and_unload()
    assert type(model.get_base_model().model.embed_tokens).__name__ == "ModulesToSaveWrapper"


def test_weighted_adapters_are_refused():
    model = two_adapters()
    with pytest.raises(rp.UnsupportedError, match="no combination of routed adapters"):
        model.add_weighted_adapter(["a", "b"], [0.5, 0.5], "c", combination_type="linear")


@pytest.mark.parametrize("routing", ["none", "add", "mul", "gram"])
def test_bake(routing):
    model = wrapped(routing=routing)
    layer = adapted(model)["model.layers.0.self_attn.q_proj"]
    x, y = torch.randn(1, 5, D), condition(1)
    baked = layer.bake(y)
    with rp.condition(model, y):
        torch.testing.assert_close(baked(x), layer(x), rtol=1e-4, atol=1e-5)


def test_bake_takes_one_adapter():
    model = two_adapters()
    layer = adapted(model)["model.layers.0.self_attn.q_proj"]
    y = condition(1)
    a, b = (only(model, name) and layer.bake(y).weight for name in "ab")
    model.base_model.set_adapter(["a", "b"])
    with pytest.raises(ValueError, match=r"bake takes one adapter, active are \['a', 'b'\]"):
        layer.bake(y)
    assert torch.equal(layer.bake(y, adapter_name="a").weight, a) and torch.equal(layer.bake(y, None, "b").weight, b)


def test_unload_gives_the_model_back():
    base = llama()
    batch = batch_of(base)
    wanted, methods = logits(base, batch), dict(base.__dict__)
    bare = wrapped(lambda: base).unload()
    assert torch.equal(logits(bare, batch), wanted) and not adapted(bare)
    assert not bare._forward_pre_hooks and not bare._forward_hooks
    assert "forward" not in methods and "forward" not in bare.__dict__ and "generate" not in bare.__dict__
    rp.attach(bare, rp.RoutedLoRAConfig(target_modules=["q_proj"]))  # nothing is in the way


# ------------------------------------------------------------------------------------------------ what is refused
def test_what_cannot_be_adapted_is_refused_before_anything_changes():
    base = llama()
    before = {name: type(module) for name, module in base.named_modules()}
    for options, error, text in (
        ({"targets": ["nope"]}, rp.RoutedPeftError, "nearest names"),
        ({"routing": "cross_gram"}, rp.UnsupportedError, "breaks a causal model"),
        ({"targets": ["q_proj"], "tap": "nope"}, rp.RoutedPeftError, "no module of that path"),
    ):
        with pytest.raises(error, match=text):
            peft.get_peft_model(base, config(**options))
        assert {name: type(module) for name, module in base.named_modules()} == before


@pytest.mark.parametrize(
    "options, text",
    [
        ({"routing": "nope"}, "routing"),
        ({"r": 0}, "r must be a positive integer, got 0"),
        ({"bias": "lora_only"}, "bias"),
        ({"init": "pissa"}, "depends on the condition"),
        ({"targets": []}, "target_modules must name at least one module"),
        ({"format_version": 9}, "format_version"),
    ],
)
def test_bad_options(options, text):
    with pytest.raises((ValueError, rp.RoutedPeftError), match=text):
        config(**options)


def test_other_adapters_in_the_model_are_refused():
    base = llama()
    rp.attach(base, rp.RoutedLoRAConfig(target_modules=["v_proj"], condition_features=DC))
    with pytest.raises(rp.RoutedPeftError, match="already holds a routed layer, 'model.layers.0.self_attn.v_proj'"):
        peft.get_peft_model(base, config(["q_proj"]))
    rp.detach(base)
    own_methods()
    base.add_adapter(peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(
        rp.UnsupportedError, match="'model.layers.0.self_attn.q_proj' already has an adapter of another"
    ):
        base.add_adapter(config(["q_proj"]), "routed")
    model = wrapped()
    with pytest.raises(rp.RoutedPeftError, match="already holds a routed layer"):
        rp.attach(model, rp.RoutedLoRAConfig(target_modules=["v_proj"]))


# ------------------------------------------------------------------------------------------------ Trainer
@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Losses of three steps by Trainer, without checkpointing."""
    return train(tmp_path_factory.mktemp("plain"), None)


def train(folder, reentrant):
    from transformers import Trainer, TrainingArguments

    torch.manual_seed(0)
    model = wake(peft.get_peft_model(llama(), config(task_type="CAUSAL_LM")))
    ids, ys = torch.randint(3, 50, (12, 6)), torch.randn(12, 3, DC)
    data = [{"input_ids": i, "labels": i, "routed_condition": y} for i, y in zip(ids, ys, strict=True)]
    options = {} if reentrant is None else {
        "gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}
    }  # fmt: skip
    args = TrainingArguments(
        output_dir=str(folder), max_steps=3, per_device_train_batch_size=4, learning_rate=1e-2, logging_steps=1,
        report_to="none", use_cpu=True, save_strategy="steps", save_steps=3, disable_tqdm=True, **options,
    )  # fmt: skip
    trainer = Trainer(model=model, args=args, train_dataset=data)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], model, folder


@pytest.mark.filterwarnings("ignore")
def test_trainer_writes_the_adapter(trained):
    losses, model, folder = trained
    assert len(losses) == 3 and losses[2] < losses[0]
    loaded = peft.PeftModel.from_pretrained(llama_like(model), folder / "checkpoint-3")
    batch, y = batch_of(model), condition()
    assert torch.equal(logits(loaded, batch, y), logits(model.eval(), batch, y))


def llama_like(model):
    return copy.deepcopy(model).unload()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("reentrant", [False, True])
def test_trainer_with_checkpointing(trained, reentrant, tmp_path):
    assert train(tmp_path, reentrant)[0] == pytest.approx(trained[0], rel=1e-6)
