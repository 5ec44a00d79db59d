"""The `genrec` command: one module a subcommand, each with a `Config` dataclass and `run(config)`.

Exit codes: 0 done · 1 unexpected failure · 2 wrong arguments, configuration or input · 3 the machine refused (disk
full, no permission, directory in use) · 130 interrupted.
"""

from __future__ import annotations

import importlib
import itertools
import os
import sys
import traceback
from argparse import RawDescriptionHelpFormatter
from typing import Any, get_type_hints

COMMANDS = {
    "features": "raw event logs → event sequences, vocabulary and item features (Parquet)",
    "tokenize": "item features → semantic ids (RQ-VAE)",
    "train": "sequences and semantic ids → UGT weights: pretrain, finetune, align",
    "evaluate": "Recall and NDCG of a trained model beside its baselines, and a report to look at",
    "recommend": "what to show next to a user of the log, or after a history you type",
    "export": "a trained run → ONNX, a TensorRT engine, a model repository for Triton Inference Server",
    "serve": "a trained run on a Triton Inference Server, until interrupted",
    "loadtest": "throughput and latency of a server, under as many clients as you like",
    "demo-ui": "a page to look at: pick a user or type a history, see what is recommended and why",
    "bench": "a page of charts for a benchmark run, and what moved since another",
    "profile": "where the time of training, generation or one operator goes: Nsight reports, traces, tables",
    "doctor": "versions, which kernels are native, what the machine has",
}


def main(argv: list[str] | None = None) -> int:
    """Run one subcommand; returns the exit code. Every expected failure is one sentence on stderr."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(_usage())
        return 0 if argv else 2
    command = argv[0]
    if command not in COMMANDS:
        return _fail("genrec", f"unknown command {command!r}; expected one of {', '.join(COMMANDS)}", 2)
    try:
        return _run(command, argv[1:])
    except KeyboardInterrupt:
        return _fail(f"genrec {command}", "interrupted", 130)
    except (PermissionError, BlockingIOError) as error:
        return _fail(f"genrec {command}", str(error), 3)
    except (ValueError, TypeError, FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError) as error:
        return _fail(f"genrec {command}", str(error), 2)
    except OSError as error:
        return _fail(f"genrec {command}", str(error), 3)
    except Exception as error:
        return _fail(f"genrec {command}", f"unexpected {type(error).__name__}: {error}", 1)


def _run(command: str, argv: list[str]) -> int:
    try:
        module = importlib.import_module(f"genrec.cli.{command.replace('-', '_')}")
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        return _fail(
            f"genrec {command}",
            "PyTorch is not installed; pip install 'torch>=2.11,<2.14', in the build that fits this machine",
            2,
        )
    kinds = getattr(module, "COMMANDS", None)
    if kinds is None:
        config_class = module.Config
    else:
        if argv and argv[0] not in ("-h", "--help"):
            if argv[0] not in kinds:
                raise ValueError(f"unknown kind {argv[0]!r}; expected one of {', '.join(kinds)}")
            command, config_class, argv = f"{command} {argv[0]}", kinds[argv[0]], argv[1:]
        else:
            print(f"{module.__doc__}\ngenrec {command} {{{','.join(kinds)}}} --help explains its keys.")
            sys.exit(0 if argv else 2)  # as argparse does for the others
    first = next(iter(config_class.__dataclass_fields__))
    if first == "run" and argv and not argv[0].startswith("-"):  # RUN may be given by its place
        argv = ["--run", *argv]
    module.run(_parse(command, config_class, str(module.__doc__), argv))
    return 0


def _parse(command: str, config_class: Any, description: str, argv: list[str]) -> Any:
    """The Config from --config files and --key values, in the order given; unknown keys are refused."""
    from jsonargparse import ArgumentError, ArgumentParser, DefaultHelpFormatter, set_parsing_settings

    class HelpFormatter(RawDescriptionHelpFormatter, DefaultHelpFormatter):
        """Keeps the lines of the module's docstring, where the examples are."""

    set_parsing_settings(docstring_parse_attribute_docstrings=True)  # the line under a field is its help
    parser = ArgumentParser(
        prog=f"genrec {command}",
        usage=f"genrec {command} [--config FILE] [--key value ...]",
        description=description,
        formatter_class=HelpFormatter,
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="config", help="YAML file with any of these keys; later arguments win")
    # jsonargparse would look for the types of inherited fields in the module of the class that inherits them
    config_class.__init__.__annotations__ = get_type_hints(config_class)
    parser.add_class_arguments(config_class)
    try:
        values = parser.instantiate(parser.parse_args(argv))
    except ArgumentError as error:
        files = [value for key, value in itertools.pairwise(argv) if key == "--config"]
        where = f"{', '.join(files)}: " if files and "config:" in str(error) else ""  # a file, not a key, is wrong
        raise ValueError(f"{where}{error} (genrec {command} --help lists the keys)") from None
    return config_class(**{name: values[name] for name in config_class.__dataclass_fields__})


def _fail(where: str, message: str, code: int) -> int:
    if os.environ.get("GENREC_DEBUG"):
        traceback.print_exc()
    print(f"{where}: error: {' '.join(message.split())}", file=sys.stderr)
    return code


def _usage() -> str:
    rows = "\n".join(f"  {name:<10} {what}" for name, what in COMMANDS.items())
    return (
        f"usage: genrec COMMAND [--config FILE] [--key value ...]\n\n{rows}\n\ngenrec COMMAND --help explains its keys."
    )
