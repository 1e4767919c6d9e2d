"""Built-in rewards, and the check of a user's own.

A reward is a function `reward(sample: Sample) -> float`, or `async def`; workers.environment runs it in a process of
its own. A configuration names it "package.module:function", or "exact_match" or "math_verify" for those below.
Invariant: a reward raises where it cannot judge, so that the sample is dropped with that reason instead of scored 0.
The driver calls `resolve` before anything starts.
"""

import difflib
import logging
import re

from configs.load import ConfigurationError
from workers.environment import RewardProcess, RewardProcessError, Sample

BUILT_IN = ("exact_match", "math_verify")
_IMPORT_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*", re.ASCII)
_GSM8K_MARK = "####"


def exact_match(sample: Sample) -> float:
    """1.0 for a completion that ended by itself and is the answer, outer white space aside; else 0.0."""
    return float(sample.finish_reason == "stop" and sample.completion.strip() == sample.answer.strip())


def math_verify(sample: Sample) -> float:
    """1.0 if the last mathematical expression of the completion equals the answer's (math-verify's rules), else 0.0.

    The answer is LaTeX or plain, such as "\\frac{1}{2}", "1,234" or "x^2+1"; of a GSM8K answer "... #### 42" only what
    follows the mark counts.

    Raises:
        ValueError: the answer is not mathematics, so no completion could be right.
    """
    from math_verify import parse, verify

    # math-verify's own time limits use SIGALRM and warn when they are off; the reward process has a limit already.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    answer = sample.answer.rpartition(_GSM8K_MARK)[2].strip()
    gold = parse(answer if "\\boxed" in answer else f"\\boxed{{{answer}}}", parsing_timeout=None)
    if not gold:
        raise ValueError(f"math-verify cannot parse the answer {answer!r}")
    return float(verify(gold, parse(sample.completion, parsing_timeout=None), timeout_seconds=None))


def resolve(import_path: str) -> str:
    """The reward's full import path, once it is known to be usable.

    A user's module is imported in a process of its own, as an environment worker will, so the driver neither waits
    for a module that hangs nor keeps what it imports.

    Raises:
        ConfigurationError: naming what is wrong with the path, the module or the function, and the fix.
    """
    name = import_path.removeprefix(f"{__name__}:")
    if name in BUILT_IN:
        return f"{__name__}:{name}"
    if not _IMPORT_PATH.fullmatch(import_path):
        near = difflib.get_close_matches(import_path, BUILT_IN, n=1)
        hint = f"did you mean {near[0]}?" if near else f"write package.module:function, or {' or '.join(BUILT_IN)}"
        raise ConfigurationError(f"reward {import_path!r}: {hint}")
    try:
        RewardProcess(import_path).kill()
    except RewardProcessError as error:
        fix = "modules are found from the folder where the run is started, on PYTHONPATH, or installed"
        raise ConfigurationError(f"{error} ({fix})") from error
    return import_path
