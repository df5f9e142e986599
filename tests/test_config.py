"""The configs: what they refuse, what they save, and which modules they name."""

import dataclasses
import inspect
import json

import pytest

import routed_peft as rp
from routed_peft.config import RoutedConfig, ends_in, matches

LORA = {"target_modules": ["q_proj"]}


@pytest.mark.parametrize("config, layer, left_out", [
    (rp.RoutedLoRAConfig, rp.RoutedLoRA, {"base_layer", "backend"}),
    (rp.RoutedAdapterConfig, rp.RoutedAdapter, {"d_model", "residual", "backend", "device", "dtype"}),
])  # fmt: skip
def test_a_config_has_every_keyword_of_its_layer_with_its_default(config, layer, left_out):
    parameters = list(inspect.signature(layer.__init__).parameters.values())[1:]
    wanted = {p.name: p.default for p in parameters if p.name not in left_out}
    wanted.pop("r")
    entries = {entry.name: entry.default for entry in dataclasses.fields(config)}
    assert {name: entries[name] for name in wanted} == wanted
    options = config(**LORA).layer_options("a.q_proj")
    assert options.keys() - {"residual", "r"} == wanted.keys()
    assert options["r"] == 8


@pytest.mark.parametrize("argument, value, text", [
    ("target_modules", [], "target_modules must name"),
    ("target_modules", [3], "target_modules must be a list of names"),
    ("target_modules", "q(", "target_modules: 'q\\(' is not a regular expression"),
    ("exclude_modules", "all-linear", "exclude_modules must be"),
    ("exclude_modules", 4, "exclude_modules must be"),
    ("modules_to_save", "classifier", "modules_to_save must be a list"),
    ("r", 0, "r must be a positive integer, got 0"),
    ("r", True, "r must be a positive integer, got True"),
    ("r", 2.0, "r must be a positive integer, got 2.0"),
    ("routing", "grram", "routing must be one of .*got 'grram'"),
    ("condition_features", 0, "condition_features must be a positive integer"),
    ("condition_source", "internal", "condition_source must be one of"),
    ("condition_pool", "max", "condition_pool must be one of"),
    ("condition_scale", "sqrt", "condition_scale must be one of"),
    ("lora_dropout", 1.5, "lora_dropout must lie in"),
    ("condition_dropout", -0.1, "condition_dropout must lie in"),
    ("route_across_slices", True, "route_across_slices=True needs out_slices"),
    ("missing", "ignore", "missing must be one of"),
    ("init", "zeros", "init must be one of"),
    ("rank_pattern", ["q"], "rank_pattern must be a dict"),
    ("rank_pattern", {"q": 0}, "rank_pattern\\['q'\\] must be a positive integer"),
    ("rank_pattern", {"q(": 2}, "rank_pattern: 'q\\(' is not a regular expression"),
    ("alpha_pattern", {"q": "16"}, "alpha_pattern\\['q'\\] must be a number"),
])  # fmt: skip
def test_lora_values_out_of_range(argument, value, text):
    with pytest.raises(ValueError, match=text):
        rp.RoutedLoRAConfig(**{**LORA, argument: value})


@pytest.mark.parametrize("argument, value", [("condition_features", 8), ("condition_dropout", 0.1)])
def test_in_sequence_layers_have_no_projection_and_no_dropout_for_the_condition(argument, value):
    with pytest.raises(ValueError, match=f"condition_source='in_sequence' shares lora_.*, so {argument} must be None"):
        rp.RoutedLoRAConfig(
            **{
                **LORA,
                "condition_features": None,
                "condition_dropout": None,
                "condition_source": "in_sequence",
                argument: value,
            }
        )


@pytest.mark.parametrize("argument, value, text", [
    ("activation", "swish", "activation must be one of"),
    ("dropout", 2, "dropout must lie in"),
    ("placement", "before", "placement must be one of"),
    ("r", 0, "r must be"),
])  # fmt: skip
def test_adapter_values_out_of_range(argument, value, text):
    with pytest.raises(ValueError, match=text):
        rp.RoutedAdapterConfig(**{**LORA, argument: value})


def test_in_sequence_shares_lora_a():
    with pytest.raises(ValueError, match="condition_features must be None"):
        rp.RoutedLoRAConfig(**LORA, condition_source="in_sequence", condition_features=4)


def test_targets_must_be_given():
    with pytest.raises(TypeError, match="target_modules"):
        rp.RoutedLoRAConfig()


CONFIGS = [
    rp.RoutedLoRAConfig(
        target_modules=("q_proj",), r=4, routing="mul", condition_features=12, out_slices=[(0, 4), (8, 12)],
        rank_pattern={"layers.0.*": 2}, alpha_pattern={"q_proj": 4.5}, modules_to_save=("score",), init="gaussian",
    ),
    rp.RoutedAdapterConfig(target_modules=r".*mlp", placement="parallel", activation="relu", exclude_modules=["x"]),
]  # fmt: skip


@pytest.mark.parametrize("config", CONFIGS)
def test_round_trip_through_json(config):
    values = json.loads(json.dumps(config.to_dict()))
    assert RoutedConfig.from_dict(values) == config
    assert type(config).from_dict(values) == config
    assert type(RoutedConfig.from_dict(values)) is type(config)


def test_from_dict_shows_both_sides():
    values = CONFIGS[0].to_dict()
    with pytest.raises(rp.AdapterFileError, match="unknown keys \\['use_dora'\\]; RoutedLoRAConfig knows .*use_rslora"):
        RoutedConfig.from_dict({**values, "use_dora": True})
    with pytest.raises(rp.AdapterFileError, match="format_version 2, this version reads 1"):
        RoutedConfig.from_dict({**values, "format_version": 2})
    with pytest.raises(rp.AdapterFileError, match="format_version None, this version reads 1"):
        RoutedConfig.from_dict({key: value for key, value in values.items() if key != "format_version"})
    with pytest.raises(rp.AdapterFileError, match="kind 'ia3', expected 'lora' or 'adapter'"):
        RoutedConfig.from_dict({**values, "kind": "ia3"})
    with pytest.raises(rp.AdapterFileError, match="kind 'lora', expected 'adapter'"):
        rp.RoutedAdapterConfig.from_dict(values)
    with pytest.raises(rp.AdapterFileError, match="lacks target_modules"):
        RoutedConfig.from_dict({key: value for key, value in values.items() if key != "target_modules"})
    with pytest.raises(rp.AdapterFileError, match="format_version is 7, this version reads 1"):
        rp.RoutedLoRAConfig(**LORA, format_version=7)


def test_names():
    assert matches(["q_proj"], "a.0.q_proj") and matches(["q_proj"], "q_proj") and matches(["0.q_proj"], "a.0.q_proj")
    assert not matches(["q_proj"], "a.my_q_proj") and not matches(["q_proj"], "a.q_proj.base_layer")
    assert matches(r".*\.(q|v)_proj", "a.q_proj") and not matches(r"q_proj", "a.q_proj")  # the whole path
    assert ends_in("q_proj", "a.q_proj") and ends_in(r"layers\.1\..*", "m.layers.1.q_proj")
    assert not ends_in("proj", "a.q_proj") and not ends_in(r"1\..*", "m.layers.11.q_proj")


def test_patterns_choose_rank_and_alpha():
    config = rp.RoutedLoRAConfig(
        target_modules=["q_proj"], rank_pattern={r"0\.q_proj": 2, "q_proj": 5}, alpha_pattern={r"1\.q_proj": 3}
    )
    assert [config.layer_options(f"layers.{i}.q_proj")["r"] for i in (0, 1)] == [2, 5]
    assert [config.layer_options(f"layers.{i}.q_proj")["lora_alpha"] for i in (0, 1)] == [16, 3]


@pytest.mark.parametrize("init", ["pissa", "olora", "orthogonal"])
def test_inits_that_assume_a_plain_update_are_refused_with_the_reason(init):
    with pytest.raises(rp.UnsupportedError, match="depends on the condition"):
        rp.RoutedLoRAConfig(target_modules=["q_proj"], init=init)
