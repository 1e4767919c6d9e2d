import json
import pathlib
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from configs.load import ConfigurationError
from recipes import sort_task
from recipes.data import Dataset, Row, hold_out, load_rows, tokenize
from transport.types import Prompt

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "{{ message.content }}"
    "{% endfor %}{% if add_generation_prompt %}={% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One id per character; a plain string starts with <eos>, id 1, as other models start with their bos."""
    from tokenizers import Tokenizer, processors
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("model")
    sort_task.write_model_folder(folder)
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.post_processor = processors.TemplateProcessing(single="<eos> $A", special_tokens=[("<eos>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>")


def load(path: pathlib.Path) -> list[Row]:
    return load_rows(str(path), "prompt", "answer")


def refusal(path: pathlib.Path, *columns: str) -> str:
    with pytest.raises(ConfigurationError) as caught:
        load_rows(str(path), *(columns or ("prompt", "answer")))
    assert str(path) in str(caught.value)
    return str(caught.value)


def write(folder: pathlib.Path, *lines: str) -> pathlib.Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(line + "\n" for line in lines))
    return path


def write_row(folder: pathlib.Path, row: object) -> pathlib.Path:
    return write(folder, '{"prompt": "1+1?", "answer": "2"}', json.dumps(row))


def test_jsonl_rows_keep_their_line_numbers_and_numbers_become_text(tmp_path: pathlib.Path):
    messages = [{"role": "user", "content": "6*7?"}]
    path = write(
        tmp_path,
        '{"question": "1+1?", "result": 2, "other": null}',
        "",
        '{"question": "1/2?", "result": 0.5}',
        json.dumps({"question": messages, "result": "42"}),
    )
    assert load_rows(str(path), "question", "result") == [
        Row(1, "1+1?", "2"),
        Row(3, "1/2?", "0.5"),
        Row(4, messages, "42"),
    ]


def test_parquet_rows_are_the_same_as_jsonl_rows(tmp_path: pathlib.Path):
    path = tmp_path / "rows.parquet"
    messages = [[{"role": "user", "content": "6*7?"}], [{"role": "user", "content": "1+1?"}]]
    pyarrow.parquet.write_table(pyarrow.table({"prompt": messages, "answer": [42, 2], "other": [0, 0]}), path)
    assert load(path) == [Row(1, messages[0], "42"), Row(2, messages[1], "2")]


def test_a_missing_file_and_a_wrong_extension_are_named(tmp_path: pathlib.Path):
    assert "no such file" in refusal(tmp_path / "absent.jsonl")
    (tmp_path / "rows.csv").write_text("prompt,answer\n")
    assert "must be .jsonl (an object per line) or .parquet, got '.csv'" in refusal(tmp_path / "rows.csv")


def test_a_file_without_rows_is_refused(tmp_path: pathlib.Path):
    assert "has no rows" in refusal(write(tmp_path, "", "  "))


def test_a_line_that_is_not_json_is_named(tmp_path: pathlib.Path):
    path = write(tmp_path, '{"prompt": "1+1?", "answer": "2"}', '{"prompt": "1+2?", ')
    assert "line 2: not valid JSON" in refusal(path)
    path.write_bytes(b'{"prompt": "\xff", "answer": "2"}\n')
    assert "line 1: not valid JSON" in refusal(path)
    assert "line 1: not valid JSON" in refusal(write(tmp_path, "[" * 100_000))


def test_a_file_that_cannot_be_read_is_named(tmp_path: pathlib.Path):
    (tmp_path / "rows.jsonl").symlink_to("/proc/self/mem")
    assert "cannot be read" in refusal(tmp_path / "rows.jsonl")


def test_half_a_surrogate_pair_is_refused_and_a_whole_one_is_a_character(tmp_path: pathlib.Path):
    assert "line 1: not valid JSON" in refusal(write(tmp_path, r'{"prompt": "\ud83d", "answer": "2"}'))
    assert load(write(tmp_path, r'{"prompt": "\ud83d\ude00", "answer": "2"}')) == [Row(1, "\N{GRINNING FACE}", "2")]


def test_a_row_that_is_no_object_is_named(tmp_path: pathlib.Path):
    assert "line 2: expected an object with 'prompt' and 'answer', got list" in refusal(write_row(tmp_path, ["1", "2"]))


@pytest.mark.parametrize("column", ["prompt", "answer"])
def test_a_missing_column_is_named_with_the_columns_there_are_and_the_key_to_set(tmp_path: pathlib.Path, column: str):
    row = {"prompt": "1?", "answer": "1"} | {"text": "1"}
    del row[column]
    there = ", ".join(row)
    assert f"line 2: no column '{column}'; it has {there}: set data.{column}_column" in refusal(
        write_row(tmp_path, row)
    )

    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table({name: [value] for name, value in row.items()}), path)
    assert f"no column '{column}'; it has {there}: set data.{column}_column" in refusal(path)


@pytest.mark.parametrize(
    ("prompt", "problem"), [("", "is empty"), ("  ", "is empty"), (None, "is null"), (7, "is 7 (int)")]
)
def test_a_prompt_that_is_empty_or_no_text_is_named(tmp_path: pathlib.Path, prompt: object, problem: str):
    message = refusal(write_row(tmp_path, {"prompt": prompt, "answer": "2"}))
    assert f"line 2, column 'prompt': {problem}; a prompt is a string or a list of chat messages" in message


@pytest.mark.parametrize(
    ("answer", "problem"),
    [(None, "null"), (True, "True (bool)"), ([1], "[1] (list)"), (float("nan"), "nan (float)")],
)
def test_an_answer_that_is_missing_or_no_text_is_named(tmp_path: pathlib.Path, answer: object, problem: str):
    message = refusal(write_row(tmp_path, {"prompt": "1?", "answer": answer}))
    assert f"line 2, column 'answer': is {problem}; an answer is a string or a number" in message


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        ([], "an empty list"),
        (["6*7?"], "message 1 is '6*7?' (str)"),
        ([{"role": "user", "content": "a"}, {"content": "b"}], "message 2 is malformed: it has no role"),
        ([{"role": "user"}], "message 1 is malformed: it has no content"),
        ([{"role": "user", "content": ["a"]}], "message 1 is malformed: its content is ['a'] (list)"),
    ],
)
def test_malformed_chat_messages_are_named(tmp_path: pathlib.Path, messages: object, problem: str):
    message = refusal(write_row(tmp_path, {"prompt": messages, "answer": "2"}))
    assert "line 2, column 'prompt':" in message
    assert problem in message
    assert 'each message is {"role": string, "content": string}' in message


def test_a_bad_parquet_row_is_named_by_its_row_and_a_broken_file_by_its_name(tmp_path: pathlib.Path):
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["1?", "2?", None], "answer": ["1", "2", "3"]}), path)
    assert "row 3, column 'prompt': is null" in refusal(path)
    path.write_bytes(b"not parquet at all")
    assert "not a readable Parquet file" in refusal(path)


def test_strings_get_the_tokenizers_special_tokens_and_chats_those_of_the_template(tokenizer: Any):
    tokenizer.chat_template = CHAT_TEMPLATE
    chat = [{"role": "system", "content": "1"}, {"role": "user", "content": "2"}]
    prompts, counts = tokenize([Row(1, "12=", "a"), Row(2, chat, "b")], tokenizer, 4, "error")
    assert prompts == [Prompt(0, [1, 4, 5, 2], "12=", "a"), Prompt(1, [4, 5, 2], "12=", "b")]
    assert counts == {"dropped": 0, "truncated": 0}


def test_chat_messages_need_a_chat_template_that_accepts_them(tokenizer: Any):
    tokenizer.chat_template = None
    with pytest.raises(
        ConfigurationError, match=r"row 5: the prompt is a list of chat messages, but .* no chat template"
    ):
        tokenize([Row(5, [{"role": "user", "content": "1"}], "1")], tokenizer, 4, "error")
    tokenizer.chat_template = CHAT_TEMPLATE
    with pytest.raises(ConfigurationError, match="row 5: the chat template refuses these messages: no tools here"):
        tokenize([Row(5, [{"role": "tool", "content": "1"}], "1")], tokenizer, 4, "error")


def test_a_long_prompt_is_an_error_that_names_its_row_lengths_and_policies(tokenizer: Any):
    with pytest.raises(ConfigurationError) as caught:
        tokenize([Row(4, "12=", "a"), Row(9, "1234=", "b")], tokenizer, 4, "error")
    for part in ("row 9", "has 6 tokens", "data.max_prompt_tokens is 4", "error", "drop", "truncate"):
        assert part in str(caught.value)


def test_long_prompts_are_dropped_or_truncated_to_their_last_tokens_and_counted(tokenizer: Any):
    rows = [Row(4, "12=", "a"), Row(9, "1234=", "b")]
    prompts, counts = tokenize(rows, tokenizer, 4, "drop")
    assert (prompts, counts) == ([Prompt(0, [1, 4, 5, 2], "12=", "a")], {"dropped": 1, "truncated": 0})
    prompts, counts = tokenize(rows, tokenizer, 4, "truncate")
    assert prompts[1] == Prompt(1, [5, 6, 7, 2], "1234=", "b")
    assert counts == {"dropped": 0, "truncated": 1}


def test_dropping_every_prompt_is_an_error(tokenizer: Any):
    with pytest.raises(ConfigurationError, match=r"all 2 prompts are longer than data.max_prompt_tokens=4"):
        tokenize([Row(1, "1234=", "a"), Row(2, "12345=", "b")], tokenizer, 4, "drop")


def test_a_prompt_without_tokens_is_an_error(tokenizer: Any):
    tokenizer.chat_template = "{% for message in messages %}{% endfor %}"
    with pytest.raises(ConfigurationError, match="row 3: the tokenizer gives no tokens"):
        tokenize([Row(3, [{"role": "user", "content": "1"}], "a")], tokenizer, 4, "error")


def dataset(num: int, seed: int = 0, shuffle: bool = True) -> Dataset:
    return Dataset([Prompt(row, [row], str(row), "") for row in range(num)], seed, shuffle)


def rows_of(data: Dataset, steps: range, size: int) -> list[int]:
    return [prompt.row for step in steps for prompt in data.batch(step, size)]


def test_without_shuffling_batches_walk_through_the_rows_and_straddle_epochs():
    data = dataset(5, shuffle=False)
    assert [rows_of(data, range(step, step + 1), 2) for step in range(4)] == [[0, 1], [2, 3], [4, 0], [1, 2]]
    assert rows_of(data, range(1), 12) == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1]


def test_every_epoch_visits_each_row_once_in_an_order_of_its_own():
    rows = rows_of(dataset(10), range(10), 3)
    epochs = [rows[start : start + 10] for start in (0, 10, 20)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_a_batch_depends_on_seed_and_step_alone():
    resumed = dataset(10, seed=3)
    assert rows_of(resumed, range(7, 9), 4) == rows_of(dataset(10, seed=3), range(9), 4)[28:]
    assert rows_of(dataset(10, seed=4), range(5), 4) != rows_of(resumed, range(5), 4)


def test_holding_out_splits_the_rows_without_overlap_by_seed():
    rows = [Row(number, f"{number}?", "") for number in range(1, 101)]
    train, held_out = hold_out(rows, 10, seed=0)
    assert len(held_out) == 10
    assert sorted(train + held_out, key=lambda row: row.number) == rows
    assert (train, held_out) == hold_out(rows, 10, seed=0)
    assert held_out != hold_out(rows, 10, seed=1)[1]


def test_holding_out_every_row_is_refused():
    rows = [Row(number, f"{number}?", "") for number in range(1, 4)]
    assert [len(part) for part in hold_out(rows, 2, seed=0)] == [1, 2]
    with pytest.raises(ConfigurationError, match="holding out 3 of 3 rows"):
        hold_out(rows, 3, seed=0)
