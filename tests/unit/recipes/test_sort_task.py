import json
import pathlib
import subprocess
import sys

import pytest

from recipes import sort_task


def test_an_answer_is_the_digits_of_its_prompt_in_ascending_order():
    for prompt, answer in sort_task.prompts(seed=0, num=200, held_out=False):
        digits, equals = prompt[:-1], prompt[-1]
        assert equals == "="
        assert 5 <= len(digits) <= 8
        assert answer == "".join(sorted(digits))


def test_prompts_are_distinct_and_depend_on_the_seed_alone():
    first = sort_task.prompts(seed=3, num=2000, held_out=True)
    assert len({prompt for prompt, _ in first}) == 2000
    assert first == sort_task.prompts(seed=3, num=2000, held_out=True)
    assert first != sort_task.prompts(seed=4, num=2000, held_out=True)


def test_more_prompts_of_a_seed_begin_with_the_same_prompts():
    assert sort_task.prompts(seed=0, num=50, held_out=False)[:20] == sort_task.prompts(seed=0, num=20, held_out=False)


def test_no_seed_trains_on_a_prompt_that_any_seed_holds_out():
    trained = {prompt for seed in range(4) for prompt, _ in sort_task.prompts(seed, 4000, held_out=False)}
    trained |= {prompt for seed in range(4) for prompt, _ in sort_task.demonstrations(seed, 4000)}
    held_out = {prompt for seed in range(4) for prompt, _ in sort_task.prompts(seed, 1000, held_out=True)}
    assert not trained & held_out


def test_demonstrations_are_right_three_times_in_ten_and_otherwise_one_of_three_mistakes():
    skills = {"right": 0, "descending": 0, "copied": 0, "reversed": 0}
    for prompt, completion in sort_task.demonstrations(seed=0, num=4000):
        digits = prompt[:-1]
        right = "".join(sorted(digits))
        kinds = {right: "right", right[::-1]: "descending", digits: "copied", digits[::-1]: "reversed"}
        assert len(kinds) == 4 or completion in kinds
        skills[kinds[completion]] += 1
    assert abs(skills["right"] / 4000 - 0.3) < 0.03
    for mistake in ("descending", "copied", "reversed"):
        assert abs(skills[mistake] / 4000 - 0.7 / 3) < 0.03


def test_export_writes_both_sides_as_rows_of_prompt_and_answer(tmp_path: pathlib.Path):
    sort_task.export(tmp_path / "data", seed=5, num_train=3, num_eval=2)
    for name, num, held_out in (("train", 3, False), ("eval", 2, True)):
        rows = [json.loads(line) for line in (tmp_path / "data" / f"{name}.jsonl").read_text().splitlines()]
        assert rows == [{"prompt": p, "answer": a} for p, a in sort_task.prompts(5, num, held_out)]


def test_the_tokenizer_gives_one_id_per_character_and_gives_text_back_without_spaces(tmp_path: pathlib.Path):
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    sort_task.write_model_folder(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer("7413=")["input_ids"] == [10, 7, 4, 6, 2]
    assert tokenizer.decode([4, 6, 7, 10, 1, 0, 0], skip_special_tokens=True) == "1347"
    backend = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert backend.decode([4, 6, 7, 10, 1, 0, 0]) == "1347"
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, len(tokenizer)) == (0, 1, 64)


def test_the_tokenizer_refuses_a_character_that_it_does_not_know(tmp_path: pathlib.Path):
    from tokenizers import Tokenizer

    sort_task.write_model_folder(tmp_path)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    with pytest.raises(Exception, match="Missing"):
        tokenizer.encode("1+2=")


def test_the_model_folder_describes_a_tied_qwen3_of_four_hundred_thousand_parameters(tmp_path: pathlib.Path):
    sort_task.write_model_folder(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["eos_token_id"], config["pad_token_id"], config["max_position_embeddings"]) == (1, 0, 128)
    attention = 128 * 128 + 2 * 128 * 64 + 128 * 128 + 2 * 32
    layer = attention + 3 * 128 * 384 + 2 * 128
    assert 64 * 128 + 2 * layer + 128 == 402176

    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    assert type(model).__name__ == "Qwen3ForCausalLM"
    assert sum(parameter.numel() for parameter in model.parameters()) == 402176


def test_a_larger_vocabulary_is_filled_with_characters_and_a_smaller_one_must_hold_the_digits(tmp_path: pathlib.Path):
    from tokenizers import Tokenizer

    sort_task.write_model_folder(tmp_path, vocabulary_size=1000)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == 1000
    assert tokenizer.encode(tokenizer.id_to_token(999)).ids == [999]
    with pytest.raises(ValueError, match=r">= 13 .* got 12"):
        sort_task.write_model_folder(tmp_path, vocabulary_size=12)


def test_the_driver_writes_the_model_folder_without_importing_torch(tmp_path: pathlib.Path):
    program = (
        "import pathlib, sys\n"
        "from recipes import sort_task\n"
        "sort_task.write_model_folder(pathlib.Path(sys.argv[1]))\n"
        "print(sorted({'torch', 'transformers', 'ray'} & set(sys.modules)))\n"
    )
    printed = subprocess.run([sys.executable, "-c", program, tmp_path], capture_output=True, text=True, check=True)
    assert printed.stdout.strip() == "[]"
