"""A user's own data: rows of a JSON Lines or Parquet file, checked, tokenised, and walked through in epochs.

    load_rows -> hold_out (if there is no evaluation file) -> tokenize -> Dataset.batch(step, size)

Invariant: every row is checked before the run starts and an error names file, row, column and fix; nothing is left out
without being counted. `Dataset.batch` depends on the seed and the step alone, so a resumed run needs no cursor.
Called by recipes.task for runs with `data.path`; imports neither torch nor transformers.
"""

import json
import math
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import tokenizers

from configs.load import ConfigurationError
from configs.schema import DataConfig
from transport.types import Prompt

LongPrompts = Literal["error", "drop", "truncate"]

_PARQUET_BATCH_ROWS = 8192


@dataclass(slots=True)
class Row:
    """One row as the file has it: `Row(3, "What is 6 times 7?", "42")`, or chat messages as the prompt.

    `number` is the line of a .jsonl file or the row of a .parquet file, counted from 1.
    """

    number: int
    prompt: str | list[dict[str, str]]
    answer: str


def load_rows(path: str, prompt_column: str, answer_column: str) -> list[Row]:
    """Every row of a .jsonl (blank lines aside) or .parquet file.

    A prompt is a string or a list of chat messages {role, content}; an answer is a string (perhaps empty) or a number.

    Raises:
        ConfigurationError: naming file, row and column that are wrong, and what would be right.
    """
    file = pathlib.Path(path).expanduser()
    readers = {".jsonl": _read_jsonl, ".parquet": _read_parquet}
    if not file.is_file():
        raise ConfigurationError(f"{path}: no such file (looked in {pathlib.Path.cwd()}); correct the path")
    if file.suffix not in readers:
        raise ConfigurationError(f"{path}: data must be .jsonl (an object per line) or .parquet, got {file.suffix!r}")
    try:
        numbered = readers[file.suffix](file, prompt_column, answer_column)
        rows = [_checked(file, number, values, prompt_column, answer_column) for number, values in numbered]
    except OSError as error:
        raise ConfigurationError(f"{path}: cannot be read ({error})") from error
    if not rows:
        raise ConfigurationError(f"{path}: has no rows; give it at least one")
    return rows


def hold_out(rows: Sequence[Row], num: int, seed: int) -> tuple[list[Row], list[Row]]:
    """Split rows into (training, `num` held out), drawn by `seed`, both in the order of the file.

    Raises:
        ConfigurationError: no row would be left to train on.
    """
    if num >= len(rows):
        raise ConfigurationError(
            f"holding out {num} of {len(rows)} rows leaves none to train on: add rows, hold out fewer, "
            "or give held-out prompts their own file (data.eval_path)"
        )
    chosen = set(np.random.default_rng(seed).choice(len(rows), size=num, replace=False).tolist())
    train = [row for index, row in enumerate(rows) if index not in chosen]
    return train, [rows[index] for index in sorted(chosen)]


def tokenize(
    rows: Sequence[Row], tokenizer: Any, max_prompt_tokens: int, long_prompts: LongPrompts
) -> tuple[list[Prompt], dict[str, int]]:
    """The rows as prompts, and how many were {"dropped": n, "truncated": n} for being longer than `max_prompt_tokens`.

    Chat messages go through the tokenizer's chat template with its generation prompt; a string is encoded as
    `tokenizer(text)` does. `Prompt.row` is the index in `rows`; a truncated prompt keeps its last tokens and all of its
    text.

    Args:
        tokenizer: a transformers tokenizer.

    Raises:
        ConfigurationError: a prompt cannot be rendered, has no tokens, or is too long under "error"; or none is left.
    """
    prompts = _encode(rows, tokenizer)
    counts = {"dropped": 0, "truncated": 0}
    kept = []
    for row, prompt in zip(rows, prompts, strict=True):
        num_tokens = len(prompt.tokens)
        if num_tokens == 0:
            raise ConfigurationError(f"row {row.number}: the tokenizer gives no tokens for this prompt; correct it")
        if num_tokens > max_prompt_tokens:
            if long_prompts == "error":
                raise _too_long(row, num_tokens, max_prompt_tokens)
            if long_prompts == "drop":
                counts["dropped"] += 1
                continue
            prompt.tokens = prompt.tokens[-max_prompt_tokens:]
            counts["truncated"] += 1
        kept.append(prompt)
    if not kept:
        raise ConfigurationError(
            f"all {counts['dropped']} prompts are longer than data.max_prompt_tokens={max_prompt_tokens} and were "
            "dropped: raise it, or set data.long_prompts=truncate"
        )
    return kept, counts


class Dataset:
    """Prompts in an endless walk of epochs: each prompt once an epoch, in an order drawn from (seed, epoch).

    With 5 prompts and batches of 2, step 2 is the last prompt of epoch 0 and the first of epoch 1.
    """

    def __init__(self, prompts: Sequence[Prompt], seed: int, shuffle: bool) -> None:
        assert prompts, "a data set needs a prompt"
        self._prompts = prompts
        self._seed = seed
        self._shuffle = shuffle

    def __len__(self) -> int:
        return len(self._prompts)

    def batch(self, step: int, size: int) -> list[Prompt]:
        """The `size` prompts of `step`, counted from 0; every step of a run asks for the same size."""
        positions = range(step * size, (step + 1) * size)
        epochs = range(positions.start // len(self), (positions.stop - 1) // len(self) + 1)
        orders = {epoch: self._order(epoch) for epoch in epochs}
        return [self._prompts[orders[at // len(self)][at % len(self)]] for at in positions]

    def _order(self, epoch: int) -> np.ndarray:
        if not self._shuffle:
            return np.arange(len(self))
        return np.random.default_rng((self._seed, epoch)).permutation(len(self))


def _read_jsonl(file: pathlib.Path, prompt_column: str, answer_column: str) -> Iterator[tuple[int, dict[str, Any]]]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                values = json.loads(line)
                if b"\\u" in line:
                    json.dumps(values, ensure_ascii=False).encode()  # half a surrogate pair is JSON, but no text
            except (ValueError, RecursionError) as error:
                raise ConfigurationError(
                    f"{file} line {number}: not valid JSON ({error}); one object per line"
                ) from error
            if not isinstance(values, dict):
                raise ConfigurationError(
                    f"{file} line {number}: expected an object with {prompt_column!r} and {answer_column!r}, "
                    f"got {type(values).__name__}"
                )
            yield number, values


def _read_parquet(file: pathlib.Path, prompt_column: str, answer_column: str) -> Iterator[tuple[int, dict[str, Any]]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file) as parquet:
            names = parquet.schema_arrow.names
            columns = [name for name in (prompt_column, answer_column) if name in names]
            if len(columns) < 2:
                missing = prompt_column if prompt_column not in names else answer_column
                raise ConfigurationError(f"{file}: {_no_column(missing, prompt_column, names)}")
            batches = parquet.iter_batches(_PARQUET_BATCH_ROWS, columns=columns)
            yield from enumerate((values for batch in batches for values in batch.to_pylist()), start=1)
    except pyarrow.ArrowException as error:
        raise ConfigurationError(f"{file}: not a readable Parquet file ({error})") from error


def _checked(file: pathlib.Path, number: int, values: dict[str, Any], prompt_column: str, answer_column: str) -> Row:
    where = f"{file} {'line' if file.suffix == '.jsonl' else 'row'} {number}"
    for column in (prompt_column, answer_column):
        if column not in values:
            raise ConfigurationError(f"{where}: {_no_column(column, prompt_column, values)}")
    prompt, answer = values[prompt_column], values[answer_column]
    if isinstance(prompt, list):
        _check_messages(f"{where}, column {prompt_column!r}", prompt)
    elif not isinstance(prompt, str) or not prompt.strip():
        problem = "is empty" if isinstance(prompt, str) else f"is {_shown(prompt)}"
        raise ConfigurationError(
            f"{where}, column {prompt_column!r}: {problem}; a prompt is a string or a list of chat messages"
        )
    is_missing = isinstance(answer, float) and not math.isfinite(answer)  # pandas writes a missing number as NaN
    if is_missing or isinstance(answer, bool) or not isinstance(answer, str | int | float):
        raise ConfigurationError(
            f"{where}, column {answer_column!r}: is {_shown(answer)}; an answer is a string or a number"
        )
    return Row(number, prompt, str(answer))


def _check_messages(where: str, messages: list[Any]) -> None:
    shape = 'each message is {"role": string, "content": string}'
    if not messages:
        raise ConfigurationError(f"{where}: an empty list of chat messages; {shape}")
    for index, message in enumerate(messages, start=1):
        if not isinstance(message, dict):
            raise ConfigurationError(f"{where}: message {index} is {_shown(message)}; {shape}")
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                problem = f"its {key} is {_shown(message[key])}" if key in message else f"it has no {key}"
                raise ConfigurationError(f"{where}: message {index} is malformed: {problem}; {shape}")


def _shown(value: object) -> str:
    return "null" if value is None else f"{value!r:.40} ({type(value).__name__})"


def _no_column(column: str, prompt_column: str, names: Iterable[str]) -> str:
    key = "data.prompt_column" if column == prompt_column else "data.answer_column"
    return f"no column {column!r}; it has {', '.join(names) or 'none'}: set {key}"


def _encode(rows: Sequence[Row], tokenizer: Any) -> list[Prompt]:
    """Chat templates write their own special tokens; plain strings get those that the tokenizer adds."""
    prompts = [
        Prompt(index, [], row.prompt if isinstance(row.prompt, str) else _rendered(row, tokenizer), row.answer)
        for index, row in enumerate(rows)
    ]
    for is_chat in (False, True):
        chosen = [prompt for prompt, row in zip(prompts, rows, strict=True) if isinstance(row.prompt, list) == is_chat]
        if not chosen:
            continue
        texts = [prompt.text for prompt in chosen]
        encoded = tokenizer(texts, add_special_tokens=False) if is_chat else tokenizer(texts)
        for prompt, tokens in zip(chosen, encoded["input_ids"], strict=True):
            prompt.tokens = tokens
    return prompts


def _rendered(row: Row, tokenizer: Any) -> str:
    import jinja2

    if tokenizer.chat_template is None:
        raise ConfigurationError(
            f"row {row.number}: the prompt is a list of chat messages, but the model's tokenizer has no chat template: "
            "use a chat model, or write prompts as strings"
        )
    try:
        return str(tokenizer.apply_chat_template(row.prompt, tokenize=False, add_generation_prompt=True))
    except jinja2.TemplateError as error:
        raise ConfigurationError(f"row {row.number}: the chat template refuses these messages: {error}") from error


def check_files(config: DataConfig, model_path: str | None, num_held_out: int) -> None:
    """Read every row of the files that a configuration names, and measure prompts where that needs no transformers.

    Raises:
        ConfigurationError: naming the first row that is wrong, or too few rows to hold any out.
    """
    if config.path is None or model_path is None:
        return
    rows = load_rows(config.path, config.prompt_column, config.answer_column)
    if config.eval_path is not None:
        rows = rows + load_rows(config.eval_path, config.prompt_column, config.answer_column)
    else:
        hold_out(rows, num_held_out, seed=0)
    tokenizer_file = pathlib.Path(model_path) / "tokenizer.json"
    if config.long_prompts == "error" and tokenizer_file.is_file():
        _check_lengths(rows, tokenizer_file, config.max_prompt_tokens)


def _check_lengths(rows: Sequence[Row], tokenizer_file: pathlib.Path, limit: int) -> None:
    """Chat messages are left to `tokenize`, which renders them."""
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(tokenizer_file))
    except Exception as error:  # the library raises nothing narrower
        raise ConfigurationError(f"model.path: {tokenizer_file} is not a tokenizer: {error}") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    texts = [row for row in rows if isinstance(row.prompt, str)]
    for row, encoding in zip(texts, tokenizer.encode_batch([str(row.prompt) for row in texts]), strict=True):
        if len(encoding.ids) > limit:
            raise _too_long(row, len(encoding.ids), limit)


def _too_long(row: Row, num_tokens: int, limit: int) -> ConfigurationError:
    return ConfigurationError(
        f"row {row.number}: the prompt has {num_tokens} tokens, data.max_prompt_tokens is {limit}: raise it, or set "
        "data.long_prompts to drop (leave such rows out) or truncate (keep their last tokens) instead of error"
    )
