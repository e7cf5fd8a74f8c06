"""The command line: command name -> schema and function. The only file that knows them all.

Functions are named by text and imported when they are called, so that `--help` needs no jax.
"""

import difflib
import importlib
import io
import os
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llama_jax import config as schema
from llama_jax import flags, process
from llama_jax.ablate.settings import AblateConfig
from llama_jax.chat.settings import ChatConfig
from llama_jax.config import ConfigError, Schema
from llama_jax.convert.settings import ConvertConfig, VerifyConfig
from llama_jax.evaluate.settings import EvaluateConfig
from llama_jax.generate.settings import GenerateConfig
from llama_jax.plan.settings import PlanConfig
from llama_jax.train.supervisor import supervise

DONE, FAILED, BAD_USAGE, PREEMPTED = 0, 1, 2, 75


@dataclass(frozen=True)
class Command:
    """What a command reads and what it calls: function(config) -> exit code.

    repeats: it asks for the same memory at every step.
    """

    schema: type[Schema]
    function: str
    summary: str
    repeats: bool = False


COMMANDS = {
    "demo": Command(
        schema.DemoConfig,
        "llama_jax.demo:demo",
        "Train a small Llama on Python's own library and let it write (minutes, two cores).",
        repeats=True,
    ),
    "train": Command(
        schema.TrainConfig,
        "llama_jax.train.loop:train",
        "Pretrain, or continue a run that was stopped: the same command does both.",
        repeats=True,
    ),
    "ablate": Command(
        AblateConfig,
        "llama_jax.ablate.command:ablate",
        "Compare variants of the model at an equal budget: trains them all, and writes a report.",
        repeats=True,
    ),
    "plan": Command(
        PlanConfig,
        "llama_jax.plan.command:plan",
        "Say whether a run fits a TPU slice or GPUs and how fast it can go, without having them.",
    ),
    "generate": Command(
        GenerateConfig,
        "llama_jax.generate.command:generate_command",
        "Continue prompts with a model of any format: a run, a checkpoint, a folder, a .gguf.",
        repeats=True,
    ),
    "convert": Command(
        ConvertConfig,
        "llama_jax.convert.convert:convert",
        "Turn a model into another format: llama_jax, Hugging Face, Meta, GGUF.",
    ),
    "verify": Command(
        VerifyConfig,
        "llama_jax.convert.verify:verify",
        "Compare two models of any format: architecture, tokenizer, tensors, logits.",
    ),
    "chat": Command(
        ChatConfig,
        "llama_jax.chat.terminal:chat",
        "Talk with a chat model in the terminal.",
    ),
    "evaluate": Command(
        EvaluateConfig,
        "llama_jax.evaluate.command:evaluate",
        "Measure how well a model predicts a text: perplexity, bits per byte.",
    ),
    "tokenizer train": Command(
        schema.TokenizerTrainConfig,
        "llama_jax.tokenizer.train:train_tokenizer",
        "Train a SentencePiece tokenizer with LLaMA's settings.",
    ),
    "tokenizer inspect": Command(
        schema.TokenizerInspectConfig,
        "llama_jax.tokenizer.files:inspect_tokenizer",
        "Show a tokenizer, and how it cuts a text.",
    ),
    "data prepare": Command(
        schema.DataPrepareConfig,
        "llama_jax.data.prepare:prepare",
        "Tokenise a corpus into the shards that training reads.",
    ),
    "data inspect": Command(
        schema.DataInspectConfig,
        "llama_jax.data.inspect:inspect_corpus",
        "Check a prepared corpus and show rows of it.",
    ),
    "models": Command(
        schema.ModelsConfig,
        "llama_jax.models:list_models",
        "List every model of configs/models: parameters, FLOPs and cache bytes per token.",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns 0 done, 1 failed, 2 bad usage, 75 stopped after saving."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal may not have every character
            stream.reconfigure(errors="backslashreplace")
    args = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in args
    args = [a for a in args if a != "--debug"]
    try:
        name, rest = _command_name(args)
        if name is None:
            print(_overview())
            return DONE if not args or args[0] in ("-h", "--help") else BAD_USAGE
        command = COMMANDS[name]
        config = _parse(name, command, rest)
        if isinstance(config, schema.TrainConfig) and config.restarts:
            return supervise(
                lambda: _run(command, config),
                config.restarts,
                Path(config.out),
                2.0 * config.distributed.silence_seconds,
            )
        return _run(command, config)
    except SystemExit as stop:  # help has been printed, or a supervised child has ended
        return stop.code if isinstance(stop.code, int) else BAD_USAGE
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except ConfigError as error:
        return _report(error, BAD_USAGE, debug)
    except BrokenPipeError:  # the reader of our output has left, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except Exception as error:
        return _report(error, FAILED, debug)


def _run(command: Command, config: Schema) -> int:
    """Does what the command is for; returns its exit code."""
    if command.repeats:
        process.keep_freed_memory()
    module, function = command.function.split(":")
    return getattr(importlib.import_module(module), function)(config)


def _report(error: Exception, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    else:
        message = str(error) or type(error).__name__
        expected = isinstance(error, ValueError | OSError | RuntimeError)
        kind = "" if expected else f"{type(error).__name__}: "
        print(f"error: {kind}{message}", file=sys.stderr)
        if code == FAILED:
            print("(--debug shows where)", file=sys.stderr)
    return code


def _command_name(args: list[str]) -> tuple[str | None, list[str]]:
    """Splits off the command, one word or two; None when help on all commands is due.

    Raises ConfigError for a command that does not exist, naming the nearest.
    """
    for words in (2, 1):
        name = " ".join(args[:words])
        if len(args) >= words and name in COMMANDS:
            return name, args[words:]
    if not args or args[0].startswith("-"):
        return None, args
    group = [name for name in COMMANDS if name.split()[0] == args[0]]
    if group:
        if len(args) > 1 and not args[1].startswith("-"):
            raise ConfigError(f"'{args[0]} {args[1]}' is no command; there is {', '.join(group)}")
        print("\n".join(f"{name:20} {COMMANDS[name].summary}" for name in group))
        raise SystemExit(DONE if len(args) > 1 else BAD_USAGE)
    near = difflib.get_close_matches(args[0], COMMANDS, n=1)
    hint = f"did you mean '{near[0]}'?" if near else "--help lists the commands."
    raise ConfigError(f"'{args[0]}' is no command; {hint}")


def _overview() -> str:
    lines = [f"  {name:20} {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: llama-jax COMMAND [--config FILE.yaml] [--section.field VALUE ...]",
            "",
            "The LLaMA family (1, 2, 3.x) in JAX.",
            "",
            "commands:",
            *lines,
            "",
            "COMMAND --help lists every setting with its type, default and meaning.",
            "--debug shows where an error comes from.",
        ]
    )


def _parse(name: str, command: Command, args: list[str]) -> Schema:
    """The command's configuration: the values of its YAML file, flags on top, checked together."""
    if "--help" in args or "-h" in args:
        flags.print_help(name, command.summary, command.schema)
        raise SystemExit(DONE)
    given = flags.split(args, flags.positional(command.schema))
    files = [words for flag, words in given if flag == "config"]
    if any(len(words) != 1 for words in files) or len(files) > 1:
        raise ConfigError("--config takes one file, once")
    origin, values = "flags", {}
    if files:
        path = _config_path(files[0][0])
        origin, values = str(path), schema.read_yaml(path)
    settings = [(flag, words) for flag, words in given if flag != "config"]
    return schema.parse(command.schema, flags.merge(command.schema, values, settings), origin)


def _config_path(file: str) -> Path:
    """A file, or the name of one in configs/runs or configs/ablations."""
    folder = schema.configs_folder()
    named = [folder / kind / f"{file}.yaml" for kind in ("runs", "ablations")]
    return next((path for path in (Path(file), *named) if path.is_file()), Path(file))
