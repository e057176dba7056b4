"""Entry point: finds the command, parses its options, and turns every user's mistake into one line and exit code 2."""

import contextlib
import importlib
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence

from visionmoe import __version__
from visionmoe.allocation import keep_freed_memory
from visionmoe.cli import options
from visionmoe.cli.parse import UsageError, closest, expanded_shards, parse
from visionmoe.cli.signals import SIGNALS, Stopped, ended_by_signals, exit_code, say
from visionmoe.distributed import LAUNCHED
from visionmoe.files import one_line

# command -> (its options, the module whose function `run(options)` does it)
COMMANDS = {
    "train": (options.Train, "visionmoe.cli.training"),
    "finetune": (options.Finetune, "visionmoe.cli.training"),
    "evaluate": (options.Evaluate, "visionmoe.cli.evaluation"),
    "analyze": (options.Analyze, "visionmoe.cli.analyze"),
    "fewshot": (options.Fewshot, "visionmoe.cli.fewshot"),
    "sweep": (options.Sweep, "visionmoe.cli.sweep"),
    "tune": (options.Tune, "visionmoe.cli.tune"),
    "convert": (options.Convert, "visionmoe.cli.convert"),
    "info": (options.Info, "visionmoe.cli.info"),
    "plan": (options.Plan, "visionmoe.cli.plan"),
    "upcycle": (options.Upcycle, "visionmoe.cli.upcycle"),
    "bench": (options.Bench, "visionmoe.cli.bench"),
}
# top-level module -> the extra that installs it
EXTRAS = {
    "matplotlib": "figures",
    "tensorboard": "tensorboard",
    "timm": "timm",
    "datasets": "data",
    "pyarrow": "data",
}
DONE, FAILED, MISTAKE = 0, 1, 2


class _StandardError(logging.Handler):
    """One line per record, on what standard error is at that moment."""

    def emit(self, record: logging.LogRecord) -> None:
        print(f"{record.levelname.lower()}: {one_line(record.getMessage())}", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. Returns 0 when it did what was asked, 2 for a user's mistake, 130 for Ctrl-C, 143 for SIGTERM,
    else 1.

    With the environment variable VISIONMOE_DEBUG set, errors keep their traceback.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    name = arguments[0] if arguments else ""
    speaks = _is_first() and LAUNCHED not in os.environ  # of signals: of processes that --nproc starts, who starts them
    try:
        if name in ("", "-h", "--help", "help"):
            print(_help())
            return DONE if name else MISTAKE
        if name == "--version":
            print(f"visionmoe {__version__}")
            return DONE
        with ended_by_signals(speaks) as started:
            return _run(name, arguments[1:], started)
    except KeyboardInterrupt as stop:
        number = stop.number if isinstance(stop, Stopped) else signal.SIGINT
        if speaks:
            say(number)
        return exit_code(number)
    except BrokenPipeError:  # the reader of our output went away, as in `visionmoe info ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except (ValueError, OSError, ModuleNotFoundError) as error:
        if os.environ.get("VISIONMOE_DEBUG") or not _is_mistake(error):
            raise
        command = f"visionmoe {name}" if name in COMMANDS else "visionmoe"
        print(f"{command}: {_message(error)}{expanded_shards(arguments)}", file=sys.stderr)
        return MISTAKE
    except (RuntimeError, MemoryError) as error:
        if type(error).__name__ == "LostRankError":
            print(f"visionmoe {name}: {error}", file=sys.stderr)
            return FAILED
        if os.environ.get("VISIONMOE_DEBUG") or not _is_out_of_memory(error):
            raise
        reason = one_line(str(error)).rpartition("DefaultCPUAllocator: ")[2].partition(". ")[0] or "of Python"
        print(f"visionmoe {name}: out of memory ({reason}); a smaller --batch-size needs less (of a training run: "
              "--set data.batch_size=N, or --set accumulation=N)", file=sys.stderr)  # fmt: skip
        return FAILED


def _run(name: str, arguments: list[str], started: Callable[[], None]) -> int:
    """started: is called when what is imported before the work is there."""
    if name not in COMMANDS:
        raise UsageError(f"unknown command {name!r}; {closest(name, COMMANDS)}")
    kind, module = COMMANDS[name]
    chosen = parse(kind, arguments, prog=f"visionmoe {name}")
    if chosen is None:  # --help was asked for and printed
        return DONE
    if (processes := getattr(chosen, "nproc", None)) is not None and "RANK" not in os.environ:
        if processes < 1:
            raise UsageError(f"--nproc must be >= 1, got {processes}")
        if processes > 1:
            from visionmoe.distributed.launch import launch

            started()
            code = launch(processes, [name, *arguments])
            for number in SIGNALS:
                if code == exit_code(number):
                    raise Stopped(number)
            return code
    keep_freed_memory()
    with _first_speaks(), warnings_on_stderr(), _job():
        command = importlib.import_module(module)
        started()
        return command.run(chosen) or DONE


def _is_first() -> bool:
    """Whether this process is the only one of its job, or the first."""
    return os.environ.get("RANK", "0") == "0"


@contextlib.contextmanager
def _first_speaks() -> Iterator[None]:
    """Within it, what processes print that are not the first of their job is not seen."""
    if _is_first():
        yield
        return
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


def _job() -> contextlib.AbstractContextManager:
    """The job of processes that torchrun started, where it did."""
    if "RANK" not in os.environ:
        return contextlib.nullcontext()
    from visionmoe.distributed.world import joined

    return joined()


def _help() -> str:
    lines = [f"  {name:<10} {(kind.__doc__ or '').splitlines()[0]}" for name, (kind, _) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: visionmoe COMMAND [OPTIONS]",
            "",
            "Sparse vision transformers (V-MoE): train, evaluate, convert, and choose the compute at run time.",
            "",
            "commands:",
            *lines,
            "",
            "`visionmoe COMMAND --help` lists the options of a command, `visionmoe --version` prints the version.",
        ]
    )


def _is_mistake(error: BaseException) -> bool:
    """False for a module that is missing although no extra provides it: that is a fault of the installation."""
    return not isinstance(error, ModuleNotFoundError) or (error.name or "").partition(".")[0] in EXTRAS


def _is_out_of_memory(error: BaseException) -> bool:
    """By name and text, because torch is not imported here: of Python, of a GPU, and of torch's CPU allocator."""
    texts = ("can't allocate memory", "not enough memory")
    return type(error).__name__ in ("MemoryError", "OutOfMemoryError") or any(text in str(error) for text in texts)


def _message(error: BaseException) -> str:
    if isinstance(error, ModuleNotFoundError):
        module = (error.name or "").partition(".")[0]
        return f"this needs {module}, which is not installed: pip install 'visionmoe[{EXTRAS[module]}]'"
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return one_line(f"{error.filename}: {error.strerror}")
    return one_line(str(error) or type(error).__name__)


@contextlib.contextmanager
def warnings_on_stderr() -> Iterator[None]:
    """Within it, warnings of this package are lines on standard error; of several processes those of the first."""
    logger, handler = logging.getLogger("visionmoe"), _StandardError(logging.WARNING if _is_first() else logging.ERROR)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
