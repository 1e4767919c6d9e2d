import pathlib
import subprocess
import sys

import pytest

from configs.load import ConfigurationError
from recipes import rewards
from workers.environment import EnvironmentWorker, Sample

SAMPLE_REWARDS = "tests.unit.workers.sample_rewards"


def sample(completion: str, answer: str, finish_reason: str = "stop") -> Sample:
    return Sample("?", completion, answer, finish_reason, [1])


def test_an_exact_match_ignores_outer_white_space_only():
    assert rewards.exact_match(sample(" 1347\n", "1347 ")) == 1.0
    assert rewards.exact_match(sample("13 47", "1347")) == 0.0
    assert rewards.exact_match(sample("1347.", "1347")) == 0.0


def test_an_exact_match_must_have_ended_by_itself():
    assert rewards.exact_match(sample("1347", "1347", finish_reason="length")) == 0.0


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        (r"Half of it is \boxed{0.5}.", "1/2"),
        (r"so $\frac{2}{4}$", r"\frac{1}{2}"),
        ("The total is 1234.", "1,234"),
        (r"\boxed{1 + x^2}", "x^2+1"),
        ("It takes 42", "6 * 7 = <<6*7=42>>42 apples\n#### 42"),
    ],
)
def test_math_verify_accepts_equal_mathematics(completion: str, answer: str):
    assert rewards.math_verify(sample(completion, answer)) == 1.0


@pytest.mark.parametrize(("completion", "answer"), [("43", "42"), ("", "42"), ("6 and 7", "6 * 7\n#### 42")])
def test_math_verify_refuses_other_mathematics(completion: str, answer: str):
    assert rewards.math_verify(sample(completion, answer)) == 0.0


def test_math_verify_raises_for_an_answer_that_is_no_mathematics():
    with pytest.raises(ValueError, match="cannot parse the answer ''"):
        rewards.math_verify(sample("42", "no number here ####"))


def test_math_verify_runs_in_an_environment_worker():
    worker = EnvironmentWorker(0, 1, "recipes.rewards:math_verify", 30.0, None)
    fields = {"prompt": "?", "answer": "1/2", "finish_reason": "stop", "tokens": [1]}
    answers = worker.score([fields | {"completion": "0.5"}, fields | {"completion": "0.6"}])
    worker.close()
    assert answers == [{"reward": 1.0, "invalid": None}, {"reward": 0.0, "invalid": None}]


def test_short_names_stand_for_the_built_in_rewards_which_need_no_check(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delattr(rewards, "RewardProcess")
    assert rewards.resolve("exact_match") == "recipes.rewards:exact_match"
    assert rewards.resolve("math_verify") == "recipes.rewards:math_verify"
    assert rewards.resolve("recipes.rewards:exact_match") == "recipes.rewards:exact_match"


def test_a_users_reward_is_found_without_being_imported_into_the_driver():
    program = (
        "import sys; from recipes.rewards import resolve\n"
        f"print(resolve({SAMPLE_REWARDS + ':length'!r}), {SAMPLE_REWARDS!r} in sys.modules)"
    )
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert printed.stdout.split() == [SAMPLE_REWARDS + ":length", "False"]


@pytest.mark.parametrize(
    ("import_path", "problem"),
    [
        ("exactmatch", "did you mean exact_match?"),
        ("my_rewards.py", "write package.module:function, or exact_match or math_verify"),
        ("os;x:y", "write package.module:function"),
        ("no_such_module:reward", "importing no_such_module failed with ModuleNotFoundError: No module named"),
        (f"{SAMPLE_REWARDS}:absent", "sample_rewards.py) has no absent"),
        (f"{SAMPLE_REWARDS}:NOT_A_FUNCTION", "is int, not a function"),
        (f"{SAMPLE_REWARDS}:two_arguments", "must take one argument, the sample"),
    ],
)
def test_a_reward_that_cannot_be_used_is_refused_with_the_fix(import_path: str, problem: str):
    with pytest.raises(ConfigurationError) as caught:
        rewards.resolve(import_path)
    assert import_path in str(caught.value)
    assert problem in str(caught.value)


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("1 / 0", "importing users_rewards failed with ZeroDivisionError: division by zero"),
        ("def reward(sample) return 1", "importing users_rewards failed with SyntaxError"),
        ("import sys; sys.exit(3)", "the process that imports it ended with status 3"),
    ],
)
def test_a_module_that_fails_on_import_is_refused_with_its_error(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, source: str, problem: str
):
    (tmp_path / "users_rewards.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigurationError) as caught:
        rewards.resolve("users_rewards:reward")
    assert problem in str(caught.value)
