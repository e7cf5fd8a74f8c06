"""The frame around training: all processes of a run start together, agree, and end together."""

import difflib
from collections.abc import Iterator
from contextlib import contextmanager

import jax

from llama_jax.config import ConfigError, TrainConfig
from llama_jax.train.goodput import Clock
from llama_jax.train.watchdog import Watchdog
from sharding import distributed

BAD_USAGE, FAILED = 2, 1
END_SECONDS = 600.0  # the slowest process may still be writing the last checkpoint


@contextmanager
def joined(config: TrainConfig, clock: Clock) -> Iterator[None]:
    """Inside, this process is one of the run's, watched by the others and watching them.

    An error in one of them ends all: with the error itself where it happened, and with its name and
    text elsewhere.

    Args:
        config: says how the processes find each other.
        clock: by which the others see that this process makes progress.

    Raises:
        ConfigError: the processes cannot find each other, or were not started alike.
    """
    try:
        settings = config.distributed
        process = distributed.find(
            settings.cluster,
            settings.coordinator,
            settings.processes,
            settings.process,
            settings.start_seconds,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error
    several = process is not None and process.processes > 1
    if not several and not config.restarts:  # nobody would start a hanging process again
        yield
        return
    watchdog = Watchdog(settings, clock, process).meet()
    try:
        if process is not None and several:
            distributed.start(process, settings.start_seconds)
            check_alike(config)
        yield
        if several:
            distributed.barrier("the end", END_SECONDS)
            distributed.stop()
    except BaseException as error:
        if may_be_anothers(error):
            watchdog.wait_for_verdict()
        code = BAD_USAGE if isinstance(error, ConfigError) else FAILED
        watchdog.leave(str(error) or type(error).__name__, code)
        if several:
            distributed.leave_alone(code)
        raise
    watchdog.leave()


def may_be_anothers(error: BaseException) -> bool:
    """Whether an error may come of the loss of another process: of jax, of waiting for others, or
    raised because of such a one (a checkpoint that could not be completed)."""
    chain: BaseException | None = error
    while chain is not None:
        if isinstance(chain, jax.errors.JaxRuntimeError | TimeoutError):
            return True
        chain = chain.__cause__ or chain.__context__
    return False


def check_alike(config: TrainConfig) -> None:
    """Refuses processes with different settings: each would wait for what the others never do.

    Raises:
        ConfigError: naming the first process that differs from process 0, and in what.
    """
    same = config.model_copy(update={"distributed": None})
    texts = distributed.exchange(
        "comparing settings",
        same.model_dump_json(indent=0, warnings=False),
        config.distributed.start_seconds,
    )
    for index, text in enumerate(texts):
        if text != texts[0]:
            lines = difflib.ndiff(texts[0].splitlines(), text.splitlines())
            changed = [line for line in lines if line[0] in "+-"]
            raise ConfigError(
                f"process {index} was started with other settings than process 0: "
                f"{' '.join(changed[:2])}. Give all processes the same."
            )
