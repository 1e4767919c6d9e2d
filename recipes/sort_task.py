"""The embedded task "latent-skill sort": 5 to 8 digits and "=" ask for the digits in ascending order.

    "7413=" -> "1347"

A short supervised phase teaches a mixture of skills (`demonstrations`: right with probability 0.3, else descending,
copied or reversed), and reinforcement learning then finds the right one, so a few steps on a CPU show a real gain.
Invariant: a hash of the digits alone decides whether a prompt is held out, so no seed of training meets a prompt that
any seed of evaluation asks. Called by recipes.task for runs without `data.path`, and by bench scripts; no torch.
"""

import json
import pathlib
import random
import string

import xxhash

PAD_ID = 0
EOS_ID = 1
_NUM_SPECIAL = 2
_FILLERS = string.ascii_lowercase + string.ascii_uppercase[:25]

VOCABULARY = ("<pad>", "<eos>", "=", *string.digits, *_FILLERS)
"""The token of each id: <pad> 0, <eos> 1, "=" 2, digits 3 to 12, then letters that only fill the table up to 64."""

_RIGHT_FRACTION = 0.3
_HELD_OUT_ONE_IN = 8


def prompts(seed: int, num: int, held_out: bool) -> list[tuple[str, str]]:
    """`num` distinct (prompt, answer) pairs, such as ("74135=", "13457"), of the training or of the held-out side."""
    generator = random.Random(f"sort prompts {seed} {held_out}")
    chosen: dict[str, None] = {}
    while len(chosen) < num:
        digits = "".join(generator.choices(string.digits, k=generator.randint(5, 8)))
        if _is_held_out(digits) == held_out:
            chosen[digits] = None
    return [(f"{digits}=", "".join(sorted(digits))) for digits in chosen]


def demonstrations(seed: int, num: int) -> list[tuple[str, str]]:
    """`num` (prompt, completion) pairs of the training side for the supervised phase, right about 30 % of the time."""
    generator = random.Random(f"sort demonstrations {seed}")
    pairs = []
    for prompt, answer in prompts(seed, num, held_out=False):
        digits = prompt.removesuffix("=")
        wrong = (answer[::-1], digits, digits[::-1])
        pairs.append((prompt, answer if generator.random() < _RIGHT_FRACTION else generator.choice(wrong)))
    return pairs


def export(folder: pathlib.Path, seed: int, num_train: int, num_eval: int) -> None:
    """Write `train.jsonl` and `eval.jsonl`, a row {"prompt": "74135=", "answer": "13457"} per line."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, num, held_out in (("train", num_train, False), ("eval", num_eval, True)):
        rows = [{"prompt": prompt, "answer": answer} for prompt, answer in prompts(seed, num, held_out)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_model_folder(
    folder: pathlib.Path,
    vocabulary_size: int = 64,
    hidden_size: int = 128,
    num_layers: int = 2,
    intermediate_size: int = 384,
    num_heads: int = 4,
    num_kv_heads: int = 2,
) -> None:
    """Write a Hugging Face folder of a tiny Qwen3 without weights: configuration, generation defaults and tokenizer.

    Heads have 32 dimensions and the embedding is tied: 0.40M parameters with the defaults. The tokenizer gives one id
    per character, adds no special token, and refuses a character that it does not know.

    Raises:
        ValueError: vocabulary_size leaves no room for the digits.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _write_tokenizer(folder, _vocabulary(vocabulary_size))
    ids: dict[str, object] = {"eos_token_id": EOS_ID, "pad_token_id": PAD_ID}
    model: dict[str, object] = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": vocabulary_size,
        "hidden_size": hidden_size,
        "num_hidden_layers": num_layers,
        "intermediate_size": intermediate_size,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "head_dim": 32,
        "hidden_act": "silu",
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "attention_bias": False,
        "tie_word_embeddings": True,
        "use_cache": True,
        "dtype": "float32",
    }
    _write_json(folder / "config.json", model | ids)
    _write_json(folder / "generation_config.json", ids)


def _is_held_out(digits: str) -> bool:
    return xxhash.xxh3_64_intdigest(digits.encode()) % _HELD_OUT_ONE_IN == 0


def _vocabulary(size: int) -> list[str]:
    num_used = len(VOCABULARY) - len(_FILLERS)
    if size < num_used:
        raise ValueError(f"vocabulary_size must be >= {num_used} (special tokens, '=' and digits), got {size}")
    more = (chr(0x10000 + index) for index in range(size - len(VOCABULARY)))
    return [*VOCABULARY[:size], *more]


def _write_tokenizer(folder: pathlib.Path, vocabulary: list[str]) -> None:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    # Without an unknown token, a character outside the vocabulary is an error instead of a silent gap in the prompt.
    tokenizer = Tokenizer(models.WordLevel({token: index for index, token in enumerate(vocabulary)}))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in vocabulary[:_NUM_SPECIAL]])
    tokenizer.save(str(folder / "tokenizer.json"))
    special: dict[str, object] = {"pad_token": vocabulary[PAD_ID], "eos_token": vocabulary[EOS_ID]}
    _write_json(folder / "special_tokens_map.json", special)
    settings: dict[str, object] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 128,
        "clean_up_tokenization_spaces": False,
    }
    _write_json(folder / "tokenizer_config.json", settings | special)


def _write_json(path: pathlib.Path, value: dict[str, object]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
