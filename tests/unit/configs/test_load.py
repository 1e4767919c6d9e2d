import pathlib
import subprocess
import sys
from typing import Any

import pydantic
import pytest

from configs.load import ConfigurationError, dump, help_text, load
from recipes import grpo, sft


def refusal(*arguments: str, config_class: Any = grpo.Config) -> str:
    with pytest.raises(ConfigurationError) as caught:
        load(config_class, arguments)
    return str(caught.value)


def write(folder: pathlib.Path, text: str) -> str:
    path = folder / "config.yaml"
    path.write_text(text)
    return str(path)


def dotted(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Every leaf of a dumped config by its dotted key."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= dotted(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def test_without_arguments_a_recipe_has_its_defaults():
    assert load(grpo.Config, []) == grpo.Config()


def test_a_later_override_wins():
    assert load(grpo.Config, ["steps=3", "steps=4"]).steps == 4


def test_an_override_wins_over_the_file_wherever_it_stands_and_leaves_the_rest_of_its_section(tmp_path: pathlib.Path):
    path = write(tmp_path, "seed: 7\ntrainer:\n  num_workers: 3\n  weight_decay: 0.5\n")
    for arguments in ([path, "trainer.num_workers=4"], ["trainer.num_workers=4", path]):
        config = load(grpo.Config, arguments)
        assert (config.seed, config.trainer.num_workers, config.trainer.weight_decay) == (7, 4, 0.5)


def test_an_override_may_be_a_whole_section():
    assert load(grpo.Config, ["eval={every: 2, num_prompts: 3}"]).eval.num_prompts == 3


def test_values_are_read_as_yaml():
    arguments = ["trainer.learning_rate=2e-4", "trainer.betas=[0.8, 0.99]", "rollout.eager=false", "model.path=null"]
    config = load(grpo.Config, arguments)
    assert config.trainer.learning_rate == 0.0002
    assert config.trainer.betas == (0.8, 0.99)
    assert config.rollout.eager is False
    assert config.model.path is None


def test_a_number_in_scientific_notation_is_a_float_in_a_file_too(tmp_path: pathlib.Path):
    assert load(grpo.Config, [write(tmp_path, "trainer: {learning_rate: 2e-4}\n")]).trainer.learning_rate == 0.0002


def test_a_word_of_yaml_1_1_can_be_the_value_of_a_choice(tmp_path: pathlib.Path):
    assert load(grpo.Config, ["transport.verify=off"]).transport.verify == "off"
    assert load(grpo.Config, [write(tmp_path, "transport:\n  verify: off\n")]).transport.verify == "off"


@pytest.mark.parametrize("name", ["17", "2026-08-01", "1.5"])
def test_a_run_can_be_named_by_a_number_or_a_date(name: str):
    assert load(grpo.Config, [f"run_name={name}"]).run_name == name


@pytest.mark.parametrize("revision", ["1234567", "0017"])
def test_a_commit_of_digits_alone_is_kept_as_it_was_written(revision: str):
    assert load(grpo.Config, [f"model.revision={revision}"]).model.revision == revision


def test_an_unknown_key_is_refused_with_the_nearest_known_one():
    assert refusal("trainer.learning_rte=1") == "trainer.learning_rte: unknown key; did you mean trainer.learning_rate?"
    assert "step: unknown key; did you mean steps?" in refusal("step=1")


def test_an_unknown_key_like_no_other_points_to_the_help():
    assert refusal("zzz=1") == "zzz: unknown key; --help lists every key"


def test_a_key_of_another_recipe_is_unknown():
    assert "algorithm: unknown key" in refusal("algorithm.group_size=4", config_class=sft.Config)


def test_a_wrong_type_names_key_and_value():
    message = refusal("trainer.num_workers=many")
    assert message.startswith("trainer.num_workers: ")
    assert message.endswith("got 'many'")


@pytest.mark.parametrize(
    ("override", "got"),
    [
        ("trainer.num_workers=0", "got 0"),
        ("trainer.learning_rate=-1", "got -1"),
        ("trainer.learning_rate=.nan", "got nan"),
        ("rollout.top_p=1.5", "got 1.5"),
        ("transport.type=carrier_pigeon", "got 'carrier_pigeon'"),
    ],
)
def test_a_value_out_of_range_names_key_and_value(override: str, got: str):
    message = refusal(override)
    assert message.startswith(override.partition("=")[0] + ": ")
    assert message.endswith(got)


def test_every_mistake_is_reported_at_once():
    assert len(refusal("steps=0", "sed=1", "trainer.num_workers=x").splitlines()) == 3


@pytest.mark.parametrize(
    ("arguments", "fix"),
    [
        (["algorithm.group_size=1"], "use at least 2"),
        (["algorithm.num_minibatches=3", "algorithm.prompts_per_step=2"], "exceeds algorithm.prompts_per_step=2"),
        (["algorithm.max_staleness=1"], "set it to 0"),
        (["model.path=Qwen/Qwen3-0.6B"], "set data.path"),
        (["data.path=rows.jsonl"], "set model.path"),
        (["data.eval_path=rows.jsonl"], "set data.path"),
        (["model.trust_remote_code=true"], "model.revision=<commit>"),
        (["rollout.tensor_parallel_size=2", "cluster.gpus_per_worker=0.5"], "set cluster.gpus_per_worker=1"),
    ],
)
def test_an_impossible_combination_is_refused_and_the_message_names_the_fix(arguments: list[str], fix: str):
    assert fix in refusal(*arguments)


def test_the_possible_neighbours_of_impossible_combinations_are_accepted():
    load(grpo.Config, ["algorithm.group_size=2", "algorithm.num_minibatches=2", "algorithm.prompts_per_step=2"])
    arguments = ["model.path=a/b", "data.path=rows.jsonl", "model.trust_remote_code=true", "model.revision=abc"]
    assert load(grpo.Config, arguments).model.trust_remote_code
    for more in ("cluster.device=cpu", "rollout.tensor_parallel_size=1", "cluster.gpus_per_worker=1"):
        load(grpo.Config, ["rollout.tensor_parallel_size=2", "cluster.gpus_per_worker=0.5", more])


def test_every_rank_of_an_engine_is_a_worker_that_holds_a_model():
    # 2 train workers, 3 engines of 2 ranks, 1 environment worker.
    config = load(grpo.Config, ["rollout.num_workers=3", "rollout.tensor_parallel_size=2"])
    assert (config.num_model_workers(), config.num_workers()) == (8, 9)


@pytest.mark.parametrize("name", ["a/b", "../up", "..", ".", "a b", "a\\b", "ä"])
def test_a_run_name_that_is_no_plain_folder_name_is_refused(name: str):
    message = refusal(f"run_name='{name}'")
    assert message.startswith("run_name: becomes a folder")
    assert message.endswith(f"got {name!r}")


def test_a_plain_run_name_is_accepted():
    assert load(grpo.Config, ["run_name=grpo-1.5B_v3"]).run_name == "grpo-1.5B_v3"


def test_a_missing_file_is_named():
    assert refusal("absent.yaml") == "absent.yaml: no such configuration file (an override is written key=value)"


def test_two_files_are_refused_by_name():
    message = refusal("a.yaml", "b.yaml")
    assert message == "one configuration file at most, got 2: a.yaml, b.yaml"


@pytest.mark.parametrize(
    ("text", "reason"),
    [("- steps\n- seed\n", "expected a mapping of keys, got list"), ("steps: [1\n", "not valid YAML")],
)
def test_a_file_that_holds_no_mapping_is_named(tmp_path: pathlib.Path, text: str, reason: str):
    path = write(tmp_path, text)
    message = refusal(path)
    assert message.startswith(f"{path}: ")
    assert reason in message


def test_a_file_that_builds_python_objects_is_refused(tmp_path: pathlib.Path):
    assert "not valid YAML" in refusal(write(tmp_path, "steps: !!python/object/apply:os.getpid []\n"))


def test_an_empty_file_is_the_default_configuration(tmp_path: pathlib.Path):
    assert load(grpo.Config, [write(tmp_path, "# nothing yet\n")]) == grpo.Config()


def test_an_override_that_is_no_yaml_is_named():
    assert refusal("steps=[1").startswith("steps: '[1' is not a YAML value")


def test_an_override_below_a_plain_value_is_refused():
    assert refusal("trainer=3", "trainer.num_workers=2") == "trainer.num_workers: trainer is not a section"


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["run_name='17'", "transport.verify='off'", "trainer.learning_rate=1e-12", "trainer.betas=[0.5, 1]"],
        ["model.path=a/b", "data.path=rows.jsonl", "output_dir='yes'", "reward=math_verify"],
    ],
)
def test_a_dumped_configuration_loads_to_an_equal_one(tmp_path: pathlib.Path, arguments: list[str]):
    config = load(grpo.Config, arguments)
    assert load(grpo.Config, [write(tmp_path, dump(config))]) == config


@pytest.mark.parametrize("recipe", [grpo, sft])
def test_help_lists_every_key_with_its_default_and_a_meaning(recipe: Any):
    lines = help_text(recipe.Config, recipe.__name__).splitlines()
    assert lines[0] == f"usage: python -m {recipe.__name__} [CONFIG.yaml] [dotted.key=value ...]"
    keys = {line.partition(" = ")[0]: index for index, line in enumerate(lines) if " = " in line and line[0] != " "}
    assert keys.keys() == dotted(recipe.Config().model_dump(mode="json")).keys()
    for key, index in keys.items():
        assert lines[index + 1].startswith("    "), key
        assert len(lines[index + 1].strip()) > 10, key
        assert lines[index + 1].strip() != "None", key


def test_help_shows_the_default_that_the_recipe_has_and_not_the_one_of_the_shared_section():
    assert sft.Config().trainer.learning_rate == 0.002
    (line,) = (line for line in help_text(sft.Config, "recipes.sft").splitlines() if "trainer.learning_rate =" in line)
    assert float(line.partition(" = ")[2]) == 0.002


def test_setting_one_key_of_a_section_leaves_the_recipes_other_defaults_alone():
    assert load(sft.Config, ["trainer.num_workers=1"]).trainer.learning_rate == 0.002


def test_a_configuration_is_frozen():
    config = load(grpo.Config, [])
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        config.steps = 3
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        config.trainer.num_workers = 3


def test_no_key_can_be_added_to_a_configuration():
    with pytest.raises(pydantic.ValidationError):
        grpo.Config(step=3)


def test_what_the_driver_imports_before_it_has_checked_the_input_is_light():
    modules = (
        "configs.schema configs.load transport.types transport.layout transport.plan transport.names "
        "recipes.grpo recipes.sft orchestrator.driver orchestrator.preflight"
    )
    program = (
        "import importlib, sys\n"
        f"for name in {modules.split()}: importlib.import_module(name)\n"
        "print(*sorted({'torch', 'ray', 'vllm', 'transformers'} & set(sys.modules)))"
    )
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert finished.stdout.split() == []
