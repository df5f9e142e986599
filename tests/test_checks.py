"""Bad arguments: each raises an error that names the argument and both sizes; nothing is lost or silently wrong."""

import copy
import re
import warnings
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from cases import Case, worst
from torch._subclasses.fake_tensor import FakeTensorMode

import routed_peft as rp
from routed_peft import ConditionShapeError, ConditionState, StaleStateError, UnsupportedError, checks, functional, ops

X, Y = torch.randn(2, 5, 6), torch.randn(2, 4, 6)
A, B, C = torch.randn(3, 6), torch.randn(10, 3), torch.randn(3, 6)


def lora(x=X, y=Y, a=A, b=B, c=None, routing="mul", **options):
    return functional.routed_lora(x, a, y, b, c, routing=routing, scaling=1.0, **options)


def adapter(**changed):
    arguments = dict(down=A, b_down=torch.zeros(3), up=torch.randn(6, 3), b_up=torch.zeros(6)) | changed
    return functional.routed_adapter(X, Y, routing="mul", **arguments)


def encode(c, **options):
    return functional.encode_condition(Y, c, routing="gram", **options)


def onto(base, **options):
    return functional.apply("layer", X, A, Y, B, None, routing="mul", scaling=1.0, base=base, **options)


META = torch.device("meta")
WRONG = {
    "state of a whole bottleneck": (
        lambda: lora(
            y=ConditionState("gram", torch.randn(2, 6, 6)),
            a=torch.randn(6, 6),
            routing="gram",
            out_slices=[(0, 5), (7, 12)],
        ),
        r"shape \(2, 6, 6\) does not fit routing 'gram' at width 6 in 2 groups",
    ),
    "state of slices": (
        lambda: lora(
            y=ConditionState("gram", torch.randn(2, 6, 3)),
            a=torch.randn(6, 6),
            routing="gram",
            out_slices=[(0, 5), (7, 12)],
            route_across_slices=True,
        ),
        r"shape \(2, 6, 3\) does not fit routing 'gram' at width 6 in 1 group$",
    ),
    "rows of C": (lambda: lora(c=torch.randn(1, 6)), r"C has 1 rows, but A \(3, 6\) needs 3$"),
    "rows of C by the definition": (lambda: lora(c=torch.randn(1, 6), backend="reference"), "C has 1 rows"),
    "C as a vector": (lambda: lora(c=torch.randn(6)), r"^routed_lora: C must be a matrix, got \(6,\)$"),
    "C as a vector, encoded": (lambda: encode(torch.randn(6)), r"^encode_condition: C must be a matrix, got \(6,\)$"),
    "groups of C": (lambda: encode(torch.randn(8, 6), groups=3), "groups must divide the 8 rows of C, got 3$"),
    "beams under grad": (lambda: lora(torch.randn(4, 5, 6)), "input batch 4 does not match condition batch 2"),
    "rows": (lambda: lora(torch.randn(7, 6)), "7 input rows cannot be split over condition batch 2"),
    "condition device": (lambda: lora(y=Y.to(META)), "condition is on meta, the layer input on cpu"),
    "index device": (lambda: lora(index=torch.zeros(2, dtype=torch.int64, device=META)), "condition_index is on meta"),
    "parameter device": (lambda: lora(a=A.to(META)), "A is on meta, the layer input on cpu"),
    "mask device": (lambda: lora(mask=torch.ones(2, 4, dtype=torch.bool, device=META)), "condition_mask is on meta"),
    "encode device": (
        lambda: functional.encode_condition(Y, C.to(META), routing="mul"),
        "C is on meta, the condition on cpu",
    ),
    "input width": (lambda: lora(torch.randn(2, 5, 7)), r"input must be \[..., 6\], got \(2, 5, 7\)"),
    "no columns": (lambda: lora(torch.randn(2, 5, 0), a=torch.randn(3, 0)), r"A must be a matrix with columns"),
    "vector A": (lambda: lora(a=torch.randn(6)), r"A must be a matrix with columns, got \(6,\)"),
    "rank": (lambda: lora(b=torch.randn(10, 4)), r"A has 3 rows, but B \(10, 4\) needs 4"),
    "W": (lambda: functional.routed_linear(X, torch.randn(9, 6), None, Y, A, B, routing="mul", scaling=1.0), "9"),
    "bias": (lambda: adapter(b_up=torch.zeros(5)), r"bias must be \[6\], got \(5,\)"),
    "b_down": (lambda: adapter(b_down=torch.zeros(4)), r"b_down must be \[3\], got \(4,\)"),
    "b_C": (lambda: adapter(C=C, b_C=torch.zeros(4)), r"b_C must be \[3\], got \(4,\)"),
    "b_C alone": (lambda: adapter(b_C=torch.zeros(3)), "b_C goes with a C"),
    "encode b_C": (
        lambda: functional.encode_condition(Y, C, routing="mul", b_C=torch.zeros(4)),
        r"b_C must be \[3\], got \(4,\)",
    ),
    "base shape": (
        lambda: onto(torch.randn(2, 4, 10)),
        r"base must be torch.float32 \(2, 5, 10\), got .* \(2, 4, 10\)",
    ),
    "base dtype": (lambda: onto(torch.randn(2, 5, 10).half()), "base must be torch.float32 .*, got torch.float16"),
    "out_features in parts": (lambda: lora(out_features=10.0), "out_features must be integers, got .* 10.0"),
    "out_slices in parts": (lambda: lora(out_slices=[(0.0, 10.0)]), "out_slices and out_features must be integers"),
    "base device": (lambda: onto(torch.randn(2, 5, 10, device=META)), "base is on meta"),
    "residual": (lambda: adapter(up=torch.randn(7, 3), b_up=None), "as many outputs as inputs, got 7 and 6"),
    "seed dtype": (lambda: lora(dropout_p=0.5, seed=torch.zeros(1)), r"seed must be int64 \[1\]"),
    "seed size": (lambda: lora(dropout_p=0.5, seed=torch.zeros(2, dtype=torch.int64)), r"seed must be int64 \[1\]"),
    "slices overlap": (lambda: lora(a=torch.randn(6, 6), out_slices=[(0, 6), (4, 8)]), "non-empty and apart"),
    "slices select": (lambda: lora(a=torch.randn(6, 6), out_slices=[(0, 3), (4, 8)]), "out_slices select 7"),
    "out_features": (lambda: lora(out_features=12), "the output has 12 columns"),
    "index dtype": (lambda: lora(index=torch.zeros(2)), "condition_index must be integers"),
    "index range": (lambda: lora(index=torch.tensor([0, 7])), "condition_index 7 is out of range for 2 conditions"),
    "index size": (lambda: lora(index=torch.tensor([0, 1, 0])), r"input batch 2 does not match condition_index \(3,\)"),
    "mask size": (
        lambda: lora(mask=torch.ones(2, 5, dtype=torch.bool)),
        r"condition mask \(2, 5\) does not match condition \(2, 4\)",
    ),
    "mask dtype": (lambda: lora(mask=torch.ones(2, 4)), "condition mask must be bool or 0/1 integers"),
    "pairing": (lambda: lora(pool="none"), r"as many as the input has \(5\), got 4"),
    "cu_seqlens rank": (lambda: lora(X[0], cu_seqlens=torch.tensor(5)), r"cu_seqlens must be int32 or int64 \[batch"),
    "cu_seqlens end": (lambda: lora(X[0], cu_seqlens=torch.tensor([0, 2, 4])), "must rise from 0 to the 5 rows"),
    "cu_seqlens order": (lambda: lora(X[0], cu_seqlens=torch.tensor([0, 6, 5])), "must rise from 0 to the 5 rows"),
    "cu_seqlens 3-D": (lambda: lora(cu_seqlens=torch.tensor([0, 2, 2])), "cu_seqlens needs a flat input"),
    "flat mask": (
        lambda: lora(y=Y[0], condition_cu_seqlens=torch.tensor([0, 1, 4]), mask=torch.ones(4, dtype=torch.bool)),
        "a flat condition has no padding",
    ),
    "dropout": (lambda: lora(dropout_p=1.5), r"dropout_p must lie in \[0, 1\], got 1.5"),
}


@pytest.mark.parametrize("name", WRONG)
def test_misuse(name):
    """After good calls, what was found for which must not be taken for these."""
    call, text = WRONG[name]
    with torch.no_grad():
        for good in (lora, adapter, lambda: onto(torch.randn(2, 5, 10))):
            good()
    with pytest.raises(ValueError, match=text) as caught:
        call()
    if name != "dropout":
        assert isinstance(caught.value, ConditionShapeError)


@pytest.mark.parametrize("argument", ["x", "y", "a", "b", "c", "mask", "index", "cu_seqlens", "seed"])
def test_what_is_no_tensor_is_named(argument):
    called = {"x": "the input", "y": "condition", "a": "A", "b": "B", "c": "C", "mask": "condition_mask"}
    name = called.get(argument, "condition_index" if argument == "index" else argument)
    with pytest.raises(TypeError, match=f"^routed_lora: {name} must be a Tensor, got list$"):
        lora(**{argument: [[1.0, 2.0]]})
    if argument in ("y", "c", "mask"):
        given = {"y": Y, "c": C, "mask": None} | {argument: [1.0]}
        with pytest.raises(TypeError, match=f"^encode_condition: {name} must be a Tensor, got list$"):
            functional.encode_condition(given["y"], given["c"], routing="mul", mask=given["mask"])


def test_what_is_missing_is_named():
    calls = {
        "routed_lora: A": lambda: functional.routed_lora(X, None, Y, B, C, routing="mul", scaling=1.0),
        "routed_lora: B": lambda: functional.routed_lora(X, A, Y, None, C, routing="mul", scaling=1.0),
        "routed_linear: W": lambda: functional.routed_linear(X, None, None, Y, A, B, C, routing="mul", scaling=1.0),
        "encode_condition: C": lambda: functional.encode_condition(Y, None, routing="mul"),
    }
    for argument, call in calls.items():
        with pytest.raises(TypeError, match=f"^{argument} must be a Tensor, got None$"):
            call()


@pytest.mark.parametrize(
    "options, text",
    [
        (dict(r=True), "r must be a positive integer, got True"),
        (dict(lora_alpha="16"), "lora_alpha must be a number, got '16'"),
        (dict(lora_dropout=None), "lora_dropout must lie in [0, 1], got None"),
        (dict(condition_dropout="0.1"), "condition_dropout must lie in [0, 1], got '0.1'"),
        (dict(condition_features=0), "condition_features must be a positive integer, got 0"),
        (dict(condition_features=2.5), "condition_features must be a positive integer, got 2.5"),
        (dict(out_slices=[0, 4]), "out_slices must be pairs (start, stop), got [0, 4]"),
        (dict(route_across_slices=True), "route_across_slices=True needs out_slices"),
        (
            dict(condition_source="in_sequence", condition_dropout=0.1),
            "condition_source='in_sequence' shares lora_dropout, so condition_dropout must be None",
        ),
    ],
    ids=str,
)
def test_options_of_a_layer_are_named(options, text):
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        rp.RoutedLoRA.from_features(6, 10, **options)
    if "lora_alpha" in options:
        with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
            rp.RoutedLoRAConfig(target_modules="all-linear", **options)


def test_numbers_of_numpy_are_options():
    layer = rp.RoutedLoRA.from_features(
        6, 10, r=np.int64(3), lora_alpha=np.float32(8), lora_dropout=np.float64(0.5), condition_features=np.int32(4),
        out_slices=zip((0, 8), (4, 10), strict=True),
    )  # fmt: skip
    assert layer.out_slices == [(0, 4), (8, 10)] and layer.lora_B.shape == (6, 3) and layer.condition_A.shape == (6, 4)


def test_overlapping_slices_are_refused_by_the_layer():
    with pytest.raises(ValueError, match="overlaps another slice"):
        rp.RoutedLoRA.from_features(6, 10, out_slices=[(0, 6), (4, 8)])


def test_a_delivered_condition_takes_no_mask_or_index_of_the_call():
    model = torch.nn.Sequential(rp.RoutedLoRA.from_features(6, 10, r=3))
    with rp.condition(model, Y), pytest.raises(ConditionShapeError, match="go with a condition argument"):
        model[0](X, condition_index=torch.tensor([1, 0]))


STATE = rp.ConditionState("mul", torch.randn(2, 3))
ALIKE = [  # each differs from the first, or another one, in one thing that the answer depends on
    {}, dict(scaling=2.0), dict(routing="expand"), dict(routing="add"), dict(pool="first"), dict(routing="gram"),
    dict(routing="gram", scale="none"), dict(activation="relu"), dict(state_or_y=STATE), dict(state_or_y=Y[:, 0]),
    dict(x=X.double()), dict(x=X[:, :3]), dict(x=X.bfloat16()), dict(A=A.repeat(2, 1), B=B.repeat(1, 2)),
    dict(A=A.repeat(2, 1), out_slices=[(0, 5), (7, 12)], out_features=12),
    dict(A=A.repeat(2, 1), out_slices=[(0, 5), (7, 12)], out_features=13),
    dict(A=A.repeat(2, 1), out_slices=[(0, 6), (7, 11)], out_features=12),
    dict(A=A.repeat(2, 1), out_slices=[(0, 5), (7, 12)], out_features=12, route_across_slices=True),
    dict(W=torch.randn(10, 6)), dict(bias=torch.randn(10)), dict(base=torch.randn(2, 5, 10)), dict(C=C),
    dict(b_down=torch.randn(3)), dict(C=C, b_C=torch.randn(3)), dict(B=torch.randn(6, 3)),
    dict(B=torch.randn(6, 3), residual=True), dict(dropout_p=1.0), dict(dropout_p=1.0, condition_dropout_p=0.0),
    dict(backend="reference"), dict(mask=torch.eye(2, 4).bool()), dict(index=torch.tensor([1, 0])),
    dict(x=torch.randn(4, 5, 6)), dict(x=torch.randn(6, 5, 6)),  # beams for each condition
    dict(x=torch.randn(3, 5, 6), index=torch.tensor([1, 0, 1], dtype=torch.int32)),
    dict(x=torch.randn(2, 4, 6), routing="cross_gram", mask=torch.eye(2, 4).long()),
    dict(x=torch.randn(2, 4, 6), routing="cross_gram", input_mask=torch.eye(2, 4).long()),
    dict(dropout_p=0.5, seed=torch.tensor([3])),
]  # fmt: skip
# Whose values the answer depends on: they come between the calls that are like them.
OTHER_VALUES = [
    dict(mask=torch.ones(2, 4).bool()), dict(index=torch.tensor([0, 0])), dict(dropout_p=0.5, seed=torch.tensor([4])),
    dict(x=torch.randn(2, 4, 6), routing="cross_gram", input_mask=torch.ones(2, 4).long()),
]  # fmt: skip


def test_what_was_found_for_a_call_serves_only_its_like(monkeypatch):
    def run(changed):
        given = dict(x=X, A=A, state_or_y=Y, B=B, C=None, routing="mul", scaling=1.0) | changed
        return functional.apply("layer", **given)

    with torch.no_grad():
        wanted = []
        for changed in ALIKE:
            monkeypatch.setattr(functional, "_found", {})
            wanted.append(run(changed))
        monkeypatch.setattr(functional, "_found", {})
        for _ in range(2):
            for changed, out in zip(ALIKE, wanted, strict=True):
                assert torch.equal(run(changed), out), changed
        with torch.autocast("cpu", torch.bfloat16):
            assert run({}).dtype == torch.bfloat16
        assert len(functional._found) == len(ALIKE) - 1 + 1  # no reference; and under autocast
        monkeypatch.setattr(functional, "check_call", None)
        for changed in OTHER_VALUES:
            run(changed)
        for changed, out in zip(ALIKE, wanted, strict=True):
            if "backend" not in changed:
                assert torch.equal(run(changed), out), changed
        with pytest.raises(ConditionShapeError, match="condition_index 2 is out of range for 2 conditions"):
            run(dict(index=torch.tensor([1, 2])))
    monkeypatch.setattr(functional, "check_call", checks.check_call)
    with pytest.raises(ConditionShapeError, match="input batch 4 does not match condition batch 2"):
        run(dict(x=torch.randn(4, 5, 6)))  # with gradients these are no beams


def test_layers_share_the_index_of_beams():
    checks._kept_beams.cache_clear()
    x, state = torch.randn(4, 5, 6), ConditionState("gram", torch.randn(2, 3, 3))
    with torch.no_grad():
        out = lora(x, state, routing="gram")
        torch.testing.assert_close(out, lora(x, state, routing="gram", index=torch.tensor([0, 0, 1, 1])))
        assert torch.equal(lora(x, state, routing="gram"), out)
        assert checks._kept_beams.cache_info()[:2] == (1, 1)  # hits, misses
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fake = ConditionState("gram", mode.from_tensor(state.tensor))
            assert lora(mode.from_tensor(x), fake, routing="gram").shape == out.shape
        assert checks._kept_beams.cache_info().misses == 1
        torch.compile(lambda x, t: lora(x, ConditionState("gram", t), routing="gram"), backend="eager")(x, state.tensor)
        assert checks._kept_beams.cache_info()[:2] == (1, 1)


def test_a_call_without_gradients_takes_the_short_op_where_it_will_do(monkeypatch):
    taken = []
    calls = torch.ops.routed_peft
    short = SimpleNamespace(
        infer=lambda *a: (taken.append("infer"), calls.infer(*a))[1],
        forward=lambda *a: (taken.append("forward"), calls.forward(*a))[1],
    )
    monkeypatch.setitem(ops.BACKENDS, "cpu", replace(ops.BACKENDS["cpu"], ops=short))
    for changed in (*ALIKE, dict(state_or_y=STATE, C=C)):
        given = dict(x=X, A=A, state_or_y=Y, B=B, C=None, routing="mul", scaling=1.0) | changed
        taken.clear()
        outs = []
        with monkeypatch.context() as patch, torch.no_grad():
            for _ in range(2):
                patch.setattr(functional, "_found", {})
                outs.append(functional.apply("layer", **given))
                patch.setattr(functional, "_few_numbers", lambda options: None)
        rest = {"C", "b_down", "dropout_p", "mask", "input_mask"} & {*changed}
        rest = rest and "state_or_y" not in changed  # whose projection was used before
        assert taken == [] if "backend" in changed else taken == ["forward" if rest else "infer", "forward"], changed
        assert torch.equal(*outs), changed
    taken.clear()
    functional.apply("layer", X, A, Y, B, None, routing="mul", scaling=1.0)  # something may yet ask for a gradient
    assert taken == ["forward"]


def test_names_that_are_none():
    for bad in (dict(routing=["mul"]), dict(backend=["cpu"]), dict(scale=["none"])):
        with pytest.raises(ValueError, match="must be one of"):
            lora(**bad)


def test_the_dtype_under_autocast_of_any_device():
    class Elsewhere:
        dtype, device, is_cpu, is_cuda = torch.float32, torch.device("mps"), False, False

    assert functional.compute_dtype(Elsewhere) == torch.float32
    torch.set_autocast_enabled("mps", True)
    try:
        assert functional.compute_dtype(Elsewhere) == torch.get_autocast_dtype("mps") == torch.float16
    finally:
        torch.set_autocast_enabled("mps", False)


def test_what_was_found_does_not_fill_the_memory(monkeypatch):
    monkeypatch.setattr(functional, "_found", {})
    monkeypatch.setattr(functional, "_MOST_FOUND", 4)
    with torch.no_grad():
        for n in range(1, 9):
            lora(torch.randn(2, n, 6))
            assert 1 <= len(functional._found) <= 4


def test_a_fallback_is_told_once(monkeypatch):
    monkeypatch.setattr(ops, "_told", set())
    layer = rp.RoutedLoRA.from_features(6, 10, r=3, routing="gram_reshape")
    with pytest.warns(UserWarning, match="plain torch reference backend.*gram_reshape"):
        layer(X, Y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(X, Y)


LIMITS = [
    (300, 1, torch.bfloat16, r"width 300 is not supported by the CUDA kernels for bfloat16 \(supported: 1..256\)"),
    (8, 17, torch.float32, r"17 output slices are not supported by the CUDA kernels \(supported: 1..16\)"),
    (
        8,
        1,
        torch.float64,
        r"dtype float64 is not supported by the CUDA kernels \(supported: bfloat16, float16, float32\)",
    ),
]


@pytest.mark.parametrize("width, slices, dtype, text", LIMITS, ids=str)
def test_what_the_kernels_do_not_take(kernels, monkeypatch, width, slices, dtype, text):
    x = torch.randn(2, 5, 6, dtype=dtype, device=kernels.device)
    a, b = (t.to(x.device, dtype) for t in (torch.randn(width * slices, 6), torch.randn(slices, width)))
    options = dict(routing="none", scaling=1.0, out_slices=[(i, i + 1) for i in range(slices)])
    with pytest.raises(UnsupportedError, match=f"{text}; use backend='auto'"):
        functional.routed_lora(x, a, None, b, backend=kernels, **options)
    if kernels == "emulated":  # as if it were what such tensors always go to
        monkeypatch.setitem(ops.BACKENDS, "cpu", ops.BACKENDS["emulated"])
        monkeypatch.setattr(functional, "_found", {})
    monkeypatch.setattr(ops, "_told", set())
    with pytest.warns(UserWarning, match=f"plain torch reference backend: {text}"):
        functional.routed_lora(x, a, None, b, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        functional.routed_lora(x, a, None, b, **options)


def test_supports_speaks_of_kernels(monkeypatch):
    assert rp.supports("gram", 300, torch.float64, "cpu") == (True, "")
    monkeypatch.setitem(ops._built, "cuda", False)
    assert rp.supports("gram", 8, torch.bfloat16, "cuda") == (False, "the C++ extension was built without CUDA")
    monkeypatch.setitem(ops._built, "cuda", True)
    monkeypatch.setattr(ops, "_old_gpu", lambda device: "")
    assert rp.supports("gram", 256, torch.bfloat16, "cuda:1") == (True, "")
    for width, slices, dtype, text in LIMITS:
        if slices == 1:
            assert re.match(text, rp.supports("gram", width, dtype, "cuda")[1])
    monkeypatch.setattr(ops, "_old_gpu", lambda device: f"old {device}")
    assert rp.supports("gram", 8, torch.float16, "cuda:0") == (False, "old cuda:0")
    assert rp.supports("gram", 8, torch.float32, "mps")[1] == "this version has no kernels for mps"
    assert not rp.supports("gram_reshape", 8, torch.float32, "cuda")[0]


def test_build_info_says_what_cuda_serves(monkeypatch):
    class Built:
        CUDA, CUDA_ARCHS = "13.0", "8.0;9.0a;12.0+PTX"

        @staticmethod
        def build_info():
            return {"cuda": True}

    monkeypatch.setattr(ops, "extension", Built)
    monkeypatch.setattr(ops, "_built_with", lambda: Built)
    info = rp.build_info()
    assert info["cuda_version"] == "13.0" and info["cuda_archs"] == "8.0;9.0a;12.0+PTX"
    assert info["cuda_widths"] == (1, 256) and info["cuda_dtypes"] == ("bfloat16", "float16", "float32")
    assert info["cuda_by_torch"] == {"base layer": "the vendor's products"}


def test_an_old_gpu_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    needed = "routed_peft's CUDA kernels need compute capability 8.0 or newer, this GPU has 7.5"
    assert ops._old_gpu.__wrapped__(torch.device("cuda:0")) == needed


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
@pytest.mark.parametrize("kind", [{}, {"foreach": True}, {"fused": True}], ids=str)
def test_no_optimizer_step_goes_unseen(optimizer, kind):
    layer = rp.RoutedLoRA.from_features(6, 10, r=3)
    state = layer.encode_condition(Y)
    layer(X, state).sum().backward()
    optimizer(layer.parameters(), lr=0.1, **kind).step()
    with pytest.raises(StaleStateError, match="before the parameters changed"):
        layer(X, state)


class Raw(torch.optim.SGD):
    """Writes as bitsandbytes' optimizers do."""

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                p.data.sub_(group["lr"] * p.grad)


@pytest.mark.parametrize("optimizer", [Raw, None], ids=["raw", "bitsandbytes"])
def test_no_write_behind_autograd_s_back_by_an_optimizer_goes_unseen(optimizer):
    optimizer = optimizer or pytest.importorskip("bitsandbytes").optim.Adam
    layer = rp.RoutedLoRA.from_features(64, 64, r=8)
    torch.nn.init.normal_(layer.lora_B)
    x, y = torch.randn(2, 5, 64), torch.randn(2, 4, 64)
    state, before = layer.encode_condition(y), layer.lora_A.detach().clone()
    layer(x, y).sum().backward()
    optimizer(layer.parameters(), lr=0.1).step()
    assert not torch.equal(layer.lora_A, before)
    with pytest.raises(StaleStateError, match="before the parameters changed"):
        layer(x, state)


def test_a_compiled_optimizer_step_is_counted():
    layer = rp.RoutedLoRA.from_features(6, 10, r=3)
    twin = copy.deepcopy(layer)
    optimizers = [torch.optim.AdamW(each.parameters(), lr=0.1) for each in (layer, twin)]
    state = layer.encode_condition(Y)
    for each in (layer, twin):
        each(X, Y).sum().backward()
    torch.compile(optimizers[0].step, backend="aot_eager")()
    optimizers[1].step()
    for p, q in zip(layer.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q)
    with pytest.raises(StaleStateError, match="before the parameters changed"):
        layer(X, state)


def test_states_can_be_compared():
    layer = rp.RoutedLoRA.from_features(6, 10, r=3)
    first, second = layer.encode_condition(Y), layer.encode_condition(Y)
    assert first == first and first != second and len({first, second}) == 2


def test_a_replaced_parameter_makes_a_state_foreign():
    layer = rp.RoutedAdapter(6, 3)
    state = layer.encode_condition(Y)
    layer.down = torch.nn.Parameter(torch.randn(3, 6))
    with pytest.raises(StaleStateError, match="other parameters"):
        layer(X, state)


def test_weights_of_another_dtype_are_cast():
    """Under autocast the input becomes bfloat16, and a float32 W with it; its gradient stays float32."""
    w = torch.randn(10, 6, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = functional.routed_linear(X, w, None, Y, A, B, routing="mul", scaling=1.0)
    out.sum().backward()
    assert out.dtype == torch.bfloat16 and w.grad.dtype == torch.float32


def test_one_condition_token_beside_a_flat_input(backend):
    """pool="none" pairs tokens, and one token pairs with all of them, flat or not."""
    t = backend.take(Case("mul", "lora", dtype=backend.dtype).tensors()[0])
    flat = dict(routing="mul", scaling=1.0, pool="none", backend=backend)
    y, offsets = t["y"][:, 0], torch.tensor([0, 5, 10], device=backend.device)
    got = functional.routed_lora(t["x"].flatten(0, 1), t["A"], y, t["B"], cu_seqlens=offsets, **flat)
    assert worst(got.view(2, 5, -1), functional.routed_lora(t["x"], t["A"], y, t["B"], **flat)) < backend.close


@pytest.mark.parametrize("shape", [(0, 5, 6), (0, 6)])
def test_no_sample_at_all(backend, shape):
    """An empty batch beside conditions that nobody uses: an empty output, and gradients of zero."""
    leaves = [t.clone().to(backend.device).requires_grad_() for t in (torch.randn(shape), A, Y, B)]
    nobody = torch.zeros(0, dtype=torch.int64, device=backend.device)
    out = lora(leaves[0], leaves[2], leaves[1], leaves[3], index=nobody, backend=backend)
    assert out.shape == (*shape[:-1], 10)
    out.sum().backward()
    assert all(t.grad is None or not t.grad.any() for t in leaves)


# ------------------------------------------------------------------------------------------------ the ops themselves
def raw(routing=4, source=1, **changed):
    """Arguments of torch.ops.routed_peft.backward for a gram call, and its saved tensors."""
    tensors = [X, A, B, Y, None, None, None, None, None, None, None, None, None, None, None]
    numbers = [2, routing, source, 0, 1, 1, [], 10, 1.0, 0.0, 0.0, 0, False]
    saved = dict(
        zip(("out", "T", "state", "kept"), torch.ops.routed_peft.forward(*tensors, None, *numbers, 2), strict=True)
    )
    saved["dout"] = torch.randn_like(saved.pop("out"))
    saved |= changed
    return saved["dout"], saved["T"], saved["state"], saved["kept"], *tensors, *numbers


LONG = (  # gram goes through S
    [torch.randn(2, 30, 6), A, B, torch.randn(2, 20, 6), *[None] * 11],
    [2, 4, 1, 0, 1, 1, [], 10, 1.0, 0.0, 0.0, 0, False],
)  # fmt: skip
HOSTILE = {
    "kept is huge": dict(kept=torch.randn(200000, 64)),
    "kept is half": dict(kept=torch.randn(8, 3).half()),
    "kept is small": dict(kept=torch.randn(1, 1)),
    "kept is turned": dict(kept=torch.randn(3, 8).T),
    "kept is nothing": dict(kept=torch.empty(0)),
    "T is half": dict(T=torch.randn(10, 3).half()),
    "T is small": dict(T=torch.randn(9, 3)),
    "state is small": dict(state=torch.randn(1)),
    "state is elsewhere": dict(state=torch.randn(2, 3, 3, device="meta")),
    "dout is small": dict(dout=torch.randn(2, 4, 10)),
    "dout is half": dict(dout=torch.randn(2, 5, 10).half()),
}


def test_backward_op_wants_the_state_that_the_forward_went_through():
    out, t, state, kept = torch.ops.routed_peft.forward(*LONG[0], None, *LONG[1], 2)
    assert state.shape == (2, 3, 3)
    for given in (torch.empty(0), state[:1], state.flatten()[:5]):
        with pytest.raises(RuntimeError, match="the state or V must be saved|state has"):
            torch.ops.routed_peft.backward(0b1111, torch.randn_like(out), t, given, kept, *LONG[0], *LONG[1])
    with pytest.raises(RuntimeError, match="call it with save=2"):
        torch.ops.routed_peft.backward(0b1111, torch.randn_like(out), t, state, torch.empty(0), *LONG[0], *LONG[1])


@pytest.mark.parametrize("name", HOSTILE)
def test_backward_op_reads_no_memory_that_is_not_its_own(name):
    torch.ops.routed_peft.backward(0b1111, *raw())
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.ops.routed_peft.backward(0b1111, *raw(**HOSTILE[name]))


@pytest.mark.parametrize("kept", [torch.empty(0), torch.randn(300000, 64), torch.randn(8, 3).half()])
def test_encode_backward_op_reads_no_memory_that_is_not_its_own(kept):
    state, good = torch.ops.routed_peft.encode(Y, C, None, None, 4, 0, 1, 1, True)
    torch.ops.routed_peft.encode_backward(3, state, good, Y, C, None, None, 4, 0, 1, 1)
    with pytest.raises(RuntimeError):
        torch.ops.routed_peft.encode_backward(3, state, kept, Y, C, None, None, 4, 0, 1, 1)


def test_a_storage_that_was_resized_away():
    gone = Y.clone()
    gone.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="no memory behind it"):
        torch.ops.routed_peft.encode(gone, C, None, None, 4, 0, 1, 1, False)
