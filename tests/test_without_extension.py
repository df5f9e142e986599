"""Without the C++ extension: everything still works, in plain torch."""

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import sys, tempfile, warnings
sys.modules["routed_peft._C"] = None  # as where it was not built
import torch
import routed_peft as rp
from tiny_models import awaken, batch_of, bert, output_of

assert rp.build_info()["extension"] is False and rp.build_info()["reason"]
x, y = torch.randn(2, 5, 16, requires_grad=True), torch.randn(2, 3, 12)
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    for routing in ("none", "mul", "gram", "cross_gram"):
        options = dict(r=4, routing=routing, condition_features=12, lora_dropout=0.1)
        layer = awaken(rp.RoutedLoRA.from_features(16, 24, **options))
        layer(x, y).sum().backward()
        if routing != "none":
            torch.testing.assert_close(layer.eval()(x, layer.encode_condition(y)), layer(x, y))
    adapter = awaken(rp.RoutedAdapter(16, 4, condition_features=12))
    adapter(x, y).sum().backward()
said = [str(one.message) for one in said if "routed_peft" in str(one.message)]
assert len(said) == 1 and "extension" in said[0], said

layer = awaken(rp.RoutedLoRA.from_features(16, 24, r=4, routing="gram", condition_features=12))
torch.testing.assert_close(layer.bake(y[:1])(x), layer(x, y[:1].expand(2, -1, -1)))
config = rp.RoutedLoRAConfig(target_modules=["query"], r=4, condition_features=12)
models = bert(), bert()
models[1].load_state_dict(models[0].state_dict())
rp.attach(models[0], config)
with tempfile.TemporaryDirectory() as folder:
    rp.save_adapter(awaken(models[0]), folder)
    rp.load_adapter(models[1], folder)
batch = batch_of(models[0])
with torch.no_grad():
    torch.testing.assert_close(*(output_of(model(**batch, routed_condition=y)) for model in models))
"""


def test_everything_still_works():
    tests = Path(__file__).parent
    path = os.pathsep.join([str(tests), str(tests.parent), os.environ.get("PYTHONPATH", "")])
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-3000:]
