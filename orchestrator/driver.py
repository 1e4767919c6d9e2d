"""The command line of every recipe: parse, validate, check the machine, start or join Ray, run, report.

Exit codes: 0 done; 2 the configuration or the machine is wrong, said before Ray starts; 1 the run failed, with the
cause and the resume command on the last lines; 143 after SIGTERM and 130 after Ctrl-C, with a checkpoint of the last
step. The driver imports neither torch nor vllm.
"""

import importlib
import math
import os
import pathlib
import shlex
import signal
import sys
import time
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

from configs.load import ConfigurationError, dump, help_text, load
from configs.schema import RecipeConfig
from orchestrator.run_state import Checkpoint, check_identity, identity_of, newest_checkpoint

POLL_S = 0.25
ANSWER_TIMEOUT_S = 60.0

Show = Callable[[dict[str, Any]], None]
"""Takes a message of orchestrator/progress.py."""

WORKER_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MALLOC_MMAP_THRESHOLD_": str(2 << 30),  # freed tensors stay with the process: fewer page faults
    "MALLOC_TRIM_THRESHOLD_": str(4 << 30),
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "NIXL_LOG_LEVEL": "ERROR",
    # A worker outlives an error of NCCL's, and says it: every wait of ours has a deadline. The second: at once.
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
    "TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}


class Stopped(Exception):  # noqa: N818
    """A signal asked the run to end, and it has."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


class StopRequest:
    """Remembers the first SIGTERM or Ctrl-C while a run goes on; the second one ends the process at once.

    A flag, not an exception: Ray's compiled calls turn an exception raised by a handler into another one.
    """

    number: int | None = None

    def listen(self) -> None:
        """From now on; Ray puts its own handlers in place when it starts, so call this after."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        signal.signal(number, signal.SIG_DFL)


def main(recipe: str, arguments: Sequence[str] | None = None) -> int:
    """Run a recipe: a module with a Config class, `check(config)` and `train(config, orchestrator)`."""
    from orchestrator.preflight import preflight

    arguments = sys.argv[1:] if arguments is None else list(arguments)
    module = importlib.import_module(recipe)
    if "--help" in arguments or "-h" in arguments:
        print(help_text(module.Config, recipe))
        return 0
    try:
        config = _named(load(module.Config, arguments), recipe)
        preflight(config)
        module.check(config)
        run_dir, checkpoint = _run_folder(recipe, config)
    except ConfigurationError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if checkpoint is not None and checkpoint.state.step >= config.steps:
        print(f"{run_dir} is finished at step {checkpoint.state.step}: give more steps=, or another run_name=")
        return 0
    return _run(recipe, config, run_dir, arguments)


def _named(config: RecipeConfig, recipe: str) -> RecipeConfig:
    name = config.run_name or f"{recipe.rpartition('.')[2]}-{time.strftime('%Y%m%d-%H%M%S')}"
    return config.model_copy(update={"run_name": name})


def _run_folder(recipe: str, config: RecipeConfig) -> tuple[pathlib.Path, Checkpoint | None]:
    """Make the run's folder, find what it resumes from, and write the resolved config.

    Raises:
        ConfigurationError: the folder cannot be written, or holds a run of something else.
    """
    run_dir = pathlib.Path(config.output_dir).resolve() / config.run_name
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        checkpoint = newest_checkpoint(run_dir)
        if checkpoint is not None:
            check_identity(checkpoint, identity_of(recipe, config))
        (run_dir / "config.yaml").write_text(dump(config))
    except OSError as error:
        raise ConfigurationError(f"run_name: {run_dir} cannot be used as a run folder: {error}") from error
    return run_dir, checkpoint


def _run(recipe: str, config: RecipeConfig, run_dir: pathlib.Path, arguments: Sequence[str]) -> int:
    from orchestrator.progress import Progress
    from orchestrator.report import write_report

    kept = [argument for argument in arguments if not argument.startswith("run_name=")]
    resume = shlex.join([_python(), "-m", recipe, *kept, f"run_name={config.run_name}"])
    stop = StopRequest()
    code, failure = 1, ""
    try:
        with Progress(f"{recipe} {config.run_name}") as progress:
            next_step = _with_ray(recipe, config, run_dir, progress.update, stop)
        code = 0 if next_step >= config.steps else 1
        if code == 1:
            failure = f"error: the recipe ended at step {next_step} of {config.steps}"
    except Stopped as stopped:
        code, failure = stopped.exit_code, f"stopped by {stopped}"
    except KeyboardInterrupt:  # before Ray was up and the signals ours
        code, failure = 128 + signal.SIGINT, "stopped by SIGINT"
    except ConfigurationError as error:
        code, failure = 2, f"error: {error}"
    except RunFailed as error:
        failure = f"error: {error}"
    metrics = run_dir / "metrics.jsonl"
    if metrics.exists() and metrics.stat().st_size > 0:
        print(f"report: {write_report(run_dir)}")
    if failure:
        print(failure, file=sys.stderr)
    if code not in (0, 2):
        print(f"logs: {run_dir / 'logs'}\nresume with: {resume}", file=sys.stderr)
    return code


class RunFailed(Exception):  # noqa: N818
    """The run ended with an error; the message is its cause."""


def _python() -> str:
    """This interpreter as one would type it here."""
    path = pathlib.Path(sys.executable)
    return str(path.relative_to(pathlib.Path.cwd()) if path.is_relative_to(pathlib.Path.cwd()) else path)


def _with_ray(recipe: str, config: RecipeConfig, run_dir: pathlib.Path, show: Show, stop: StopRequest) -> int:
    """Start or join Ray, run, and leave nothing of ours behind."""
    import ray

    from transport.run_folder import remove_dead_folders

    remove_dead_folders()
    try:
        start_ray(config.num_workers())
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ConfigurationError(f"Ray did not start: {error}") from error
    stop.listen()
    try:
        return _drive(recipe, config, run_dir, show, stop)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, ConfigurationError):
            raise ConfigurationError(str(error.cause)) from error
        (run_dir / "error.txt").write_text(str(error))
        raise RunFailed(f"{type(error.cause).__name__}: {error.cause}") from error
    except ray.exceptions.GetTimeoutError as error:
        raise RunFailed(f"the orchestrator did not answer within {ANSWER_TIMEOUT_S:.0f} s") from error
    except ray.exceptions.RayError as error:
        raise RunFailed(f"the orchestrator died: {error}") from error
    finally:
        ray.shutdown()
        remove_dead_folders()  # of our workers, which were killed


def start_ray(num_workers: int) -> None:
    """Join the cluster at RAY_ADDRESS, or start one on this machine."""
    import ray

    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": True}
    if "RAY_ADDRESS" in os.environ:
        ray.init(runtime_env={"env_vars": WORKER_ENVIRONMENT}, **quiet)
        return
    os.environ |= WORKER_ENVIRONMENT
    os.environ.setdefault("RAY_worker_niceness", "0")  # else any other process starves the workers
    # A logical count: the workers of a laptop share its cores, Ray only has to admit them.
    ray.init(
        address="local",
        num_cpus=max(num_workers, os.cpu_count() or 1),
        include_dashboard=False,
        object_store_memory=512 << 20,
        **quiet,
    )
    token = pathlib.Path.home() / ".ray" / "auth_token"
    if token.exists():
        token.chmod(0o600)


def _drive(recipe: str, config: RecipeConfig, run_dir: pathlib.Path, show: Show, stop: StopRequest) -> int:
    """Run the orchestrator actor to its end, showing what it says; returns the next step to do."""
    import ray

    from orchestrator.orchestrator import Orchestrator

    _link_logs(run_dir)
    actor: Any = ray.remote(Orchestrator).options(num_cpus=0, max_restarts=0).remote(recipe, config, str(run_dir))
    finished = actor.run.remote()
    shown, done, give_up_s = 0, False, math.inf
    while not done and time.monotonic() < give_up_s:
        done = bool(ray.wait([finished], timeout=POLL_S)[0])
        for message in ray.get(actor.messages.remote(shown), timeout=ANSWER_TIMEOUT_S):
            show(message)
            shown += 1
        if stop.number is not None and give_up_s == math.inf:
            show({"kind": "note", "text": f"{signal.Signals(stop.number).name}: finishing the step and saving"})
            ray.get(actor.stop.remote(), timeout=ANSWER_TIMEOUT_S)
            give_up_s = time.monotonic() + config.deadline.longest_step_s()
    next_step = ray.get(finished) if done else 0
    if stop.number is not None and next_step < config.steps:
        raise Stopped(stop.number)
    return next_step


def _link_logs(run_dir: pathlib.Path) -> None:
    """`logs` in the run's folder leads to what Ray and the workers print."""
    import ray

    link = run_dir / "logs"
    node: Any = ray._private.worker._global_node
    session = pathlib.Path(node.get_logs_dir_path())
    link.unlink(missing_ok=True)
    link.symlink_to(session)
