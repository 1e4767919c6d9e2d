"""What a run trains on: prompts, demonstrations, held-out prompts, and the policy it starts from.

`load_task` gives the built-in sort task or the user's files; recipes see one interface. It runs in the orchestrator
before any worker starts, so a bad row stops the run before a model is loaded.
"""

import hashlib
import pathlib
import shutil
import tempfile
from typing import TYPE_CHECKING, Any, Protocol

from configs.load import ConfigurationError
from configs.schema import ModelConfig, RecipeConfig, WarmStartConfig
from orchestrator.orchestrator import Orchestrator, PolicySource, derive_seed
from recipes import sort_task
from recipes.data import Dataset, hold_out, load_rows, tokenize
from recipes.supervised import fit
from transport.types import Completion, Prompt, Trajectory, TrajectoryGroup

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CACHE_FORMAT = "1"
NUM_SORT_PROMPTS = 8192


class Task(Protocol):
    """`policy` is where the trainer starts, `tokenizer_folder` where every tokenizer is read from."""

    policy: PolicySource
    tokenizer_folder: str
    held_out: list[Prompt]
    longest_prompt: int
    notes: list[str]
    """What a person should know of the data, such as rows that were dropped."""

    def prompts(self, step: int, num: int) -> list[Prompt]:
        """The prompts of a step, a function of the seed and the step alone."""

    def demonstrations(self, step: int, num: int) -> list[TrajectoryGroup]:
        """Prompts with the completion to imitate, as groups of one."""

    def decode(self, tokens: list[int]) -> str:
        """A completion as text, special tokens included, for people."""

    async def warm_start(self, orchestrator: Orchestrator) -> PolicySource:
        """Bring the trainer to the policy that reinforcement starts from, and say where that is kept."""


def load_task(config: RecipeConfig, num_held_out: int, warm_start: WarmStartConfig) -> Task:
    """The task that the configuration names.

    Raises:
        ConfigurationError: naming the file, row or column that is wrong.
    """
    if config.data.path is None:
        return SortTask(config, num_held_out, warm_start)
    return FileTask(config, num_held_out)


class FileTask:
    """The user's rows and model."""

    def __init__(self, config: RecipeConfig, num_held_out: int) -> None:
        data = config.data
        assert data.path is not None and config.model.path is not None
        folder = local_folder(config.model)
        self.policy = PolicySource(folder)
        self.tokenizer_folder = folder
        self._tokenizer = load_tokenizer(folder, config.model.trust_remote_code)
        rows = load_rows(data.path, data.prompt_column, data.answer_column)
        if data.eval_path is not None:
            held_out = load_rows(data.eval_path, data.prompt_column, data.answer_column)[:num_held_out]
        elif num_held_out > 0:
            rows, held_out = hold_out(rows, num_held_out, config.seed)
        else:
            held_out = []
        prompts, counts = tokenize(rows, self._tokenizer, data.max_prompt_tokens, data.long_prompts)
        longer = f"prompts longer than data.max_prompt_tokens={data.max_prompt_tokens}"
        self.notes = [f"{count} {longer} were {what}" for what, count in counts.items() if count > 0]
        self.held_out: list[Prompt] = []
        if held_out:
            self.held_out, counts = tokenize(held_out, self._tokenizer, data.max_prompt_tokens, data.long_prompts)
            self.notes += [f"{count} held-out {longer} were {what}" for what, count in counts.items() if count > 0]
        self.longest_prompt = max(len(prompt.tokens) for prompt in prompts + self.held_out)
        self._dataset = Dataset(prompts, config.seed, data.shuffle)

    def prompts(self, step: int, num: int) -> list[Prompt]:
        return self._dataset.batch(step, num)

    def demonstrations(self, step: int, num: int) -> list[TrajectoryGroup]:
        return [demonstration(prompt, prompt.answer, self._tokenizer) for prompt in self.prompts(step, num)]

    def decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens)

    async def warm_start(self, orchestrator: Orchestrator) -> PolicySource:
        return self.policy


class SortTask:
    """The built-in task; its supervised phase is done once per configuration and kept under `output_dir`."""

    def __init__(self, config: RecipeConfig, num_held_out: int, warm_start: WarmStartConfig) -> None:
        self._seed, self._warm_start, self._trainer = config.seed, warm_start, config.trainer
        trainer = config.trainer
        learns_by = (trainer.betas, trainer.adam_epsilon, trainer.weight_decay, trainer.max_grad_norm)
        settings = f"{CACHE_FORMAT} {config.seed} {warm_start!r} {config.model!r} {learns_by}"
        name = "sort-" + hashlib.sha256(settings.encode()).hexdigest()[:16]
        self._cache = pathlib.Path(config.output_dir).resolve() / ".cache" / name
        self.tokenizer_folder = str(self._cache / "initial")
        if not (self._cache / "initial" / "config.json").is_file():
            sort_task.write_model_folder(self._cache / "initial")
        self._kept = PolicySource(str(self._cache / "warm" / "policy"))
        is_kept = (self._cache / "warm").is_dir()
        self.policy = self._kept if is_kept else PolicySource(self.tokenizer_folder, pretrained=False)
        self._tokenizer = load_tokenizer(self.tokenizer_folder, False)
        self.notes: list[str] = []
        prompts = self._tokenize(sort_task.prompts(config.seed, NUM_SORT_PROMPTS, held_out=False))
        self._dataset = Dataset(prompts, config.seed, config.data.shuffle)
        self.held_out = self._tokenize(sort_task.prompts(config.seed, num_held_out, held_out=True))
        self.longest_prompt = max(len(prompt.tokens) for prompt in prompts + self.held_out)

    def prompts(self, step: int, num: int) -> list[Prompt]:
        return self._dataset.batch(step, num)

    def demonstrations(self, step: int, num: int) -> list[TrajectoryGroup]:
        pairs = sort_task.demonstrations(derive_seed(self._seed, "demonstrations", step), num)
        return [
            demonstration(prompt, answer, self._tokenizer)
            for prompt, (_, answer) in zip(self._tokenize(pairs), pairs, strict=True)
        ]

    def decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens)

    async def warm_start(self, orchestrator: Orchestrator) -> PolicySource:
        if self.policy == self._kept or orchestrator.checkpoint is not None:
            return self._kept
        config = self._trainer.model_copy(
            update={"learning_rate": self._warm_start.learning_rate, "schedule": "constant", "warmup_steps": 0}
        )
        await fit(orchestrator, self, config, self._warm_start)
        temporary = pathlib.Path(tempfile.mkdtemp(prefix="being-written-", dir=self._cache))
        await orchestrator.save_policy(temporary, self.tokenizer_folder)
        self._keep(temporary)
        return self._kept

    def _keep(self, folder: pathlib.Path) -> None:
        try:
            folder.rename(self._cache / "warm")
        except OSError:  # another run of the same configuration was first
            shutil.rmtree(folder)

    def _tokenize(self, pairs: list[tuple[str, str]]) -> list[Prompt]:
        rows = self._tokenizer([prompt for prompt, _ in pairs])["input_ids"] if pairs else []
        return [
            Prompt(row, tokens, prompt, answer)
            for row, (tokens, (prompt, answer)) in enumerate(zip(rows, pairs, strict=True))
        ]


def demonstration(prompt: Prompt, answer: str, tokenizer: "PreTrainedTokenizerBase") -> TrajectoryGroup:
    """A given completion, ended by the tokenizer's end-of-sequence token, as if it had been sampled with logprob 0."""
    tokens = [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    return TrajectoryGroup(prompt, [Trajectory(Completion(tokens, [0.0] * len(tokens), "stop", -1), reward=0.0)])


def local_folder(model: ModelConfig) -> str:
    """The model's folder; a hub id is downloaded, its revision pinned, so that every worker reads the same files.

    Raises:
        ConfigurationError: the hub has no such model, or cannot be reached.
    """
    assert model.path is not None
    if pathlib.Path(model.path).is_dir():
        return model.path
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return huggingface_hub.snapshot_download(model.path, revision=model.revision)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ConfigurationError(
            f"model.path: {model.path} is no folder here and could not be had from the hub: {one_line(error)}"
        ) from error


def load_tokenizer(folder: str, trust_remote_code: bool) -> Any:
    """The model's tokenizer.

    Raises:
        ConfigurationError: the folder has none that loads, or it has no end-of-sequence token.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"model.path: no tokenizer loads from {folder}: {one_line(error)}") from error
    if tokenizer.eos_token_id is None:
        raise ConfigurationError(f"model.path: the tokenizer of {folder} has no eos_token: set it in its config")
    return tokenizer


def one_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def check_context(model: ModelConfig, folder: str, longest: int) -> None:
    """Raises ConfigurationError if the longest prompt and completion together exceed the model's context."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=model.trust_remote_code)
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"model.path: {folder}/config.json cannot be used: {one_line(error)}") from error
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and longest > limit:
        raise ConfigurationError(
            f"rollout.max_tokens: the longest prompt and completion have {longest} tokens together, {folder} has a "
            f"context of {limit}: lower rollout.max_tokens or data.max_prompt_tokens"
        )
