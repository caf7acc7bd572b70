"""``psd``: the group of commands, and the place where errors become one line and an exit code."""

import errno
import importlib
import logging
import sys
from collections.abc import Sequence

import click

from cli.options import is_quiet
from pathsegdiff import __version__
from pathsegdiff.device import keep_freed_memory, wait_without_spinning
from pathsegdiff.errors import PathSegDiffError

#: Where each command lives; a module is imported only when its command is used.
COMMANDS = {
    "demo": "cli.demo:demo",
    "extract": "cli.extract:extract",
    "train-head": "cli.train_head:train_head",
    "eval": "cli.eval:evaluate",
    "compare": "cli.compare:compare",
    "predict": "cli.predict:predict",
    "pretrain": "cli.pretrain:pretrain",
    "models": "cli.models:models",
    "data": "cli.data:data",
    "cache": "cli.cache:cache",
    "probe": "cli.probe:probe",
    "sweep": "cli.sweep:sweep",
    "baseline": "cli.baseline:baseline",
    "reproduce": "cli.reproduce:reproduce",
    "bench": "cli.bench:bench",
    "doctor": "cli.doctor:doctor",
}
#: One line each, so that ``psd --help`` imports no command.
_SHORT_HELP = {
    "demo": "The whole pipeline on the embedded images.",
    "extract": "Cache the UNet features of a data set (stage 1).",
    "train-head": "Train the segmentation head from a store (stage 2).",
    "eval": "Score a trained head: metrics, intervals, overlays (stage 2).",
    "compare": "Two scored runs, image by image, with paired intervals.",
    "predict": "Segment image files of any size but whole slides.",
    "pretrain": "Train a diffusion model of your own.",
    "models": "Model bundles: list, show, pull, import, init.",
    "data": "Data sets: what is needed, where from, is it whole.",
    "cache": "Feature stores: contents, integrity, repair, export.",
    "probe": "One patch through stage 1, every number saved.",
    "sweep": "A grid of heads: timesteps, taps, learning rates, widths, few images.",
    "baseline": "A network on the images themselves, to compare with.",
    "reproduce": "The paper's tables.",
    "bench": "Speed and memory beside the plain way, on this machine.",
    "doctor": "Versions, machine, models, data, and what will not work.",
}


class _LazyGroup(click.Group):
    """A group whose commands are imported when they are called for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, name = COMMANDS[cmd_name].split(":")
        command = getattr(importlib.import_module(module), name)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(_SHORT_HELP.items()))


class _EchoHandler(logging.Handler):
    """Log records as plain lines on stderr; warnings and worse say what they are."""

    def emit(self, record: logging.LogRecord) -> None:
        prefix = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        click.echo(f"{prefix}{record.getMessage()}", err=True)


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="psd")
@click.option("-v", "--verbose", count=True, help="More log lines.")
@click.option("-q", "--quiet", count=True, help="Only warnings and errors.")
def psd(verbose: int, quiet: int) -> None:
    """Segment tissue from few labels with the features of a frozen diffusion model.

    \b
    Example:
      psd demo
      psd extract --dataset glas --t 50
      psd train-head
      psd eval
    """
    level = logging.DEBUG if verbose else logging.WARNING if quiet else logging.INFO
    logger = logging.getLogger("pathsegdiff")
    logger.handlers[:] = [_EchoHandler()]
    logger.setLevel(level)
    logger.propagate = False


def main(arguments: Sequence[str] | None = None) -> None:
    """Run ``psd`` and leave with its exit code: 0, 1 (user's error), 2 (usage), 130 (Ctrl-C)."""
    sys.exit(run(arguments))


def run_within(ctx: click.Context, arguments: Sequence[str], obj: object = None) -> None:
    """Run another command of ``psd`` from within one, as quietly; end with its code if it fails.

    Args:
        obj: ``ctx.obj`` of the command, for what no user would type.
    """
    code = run([*(["-q"] if is_quiet(ctx) else []), *arguments], obj)
    if code:
        ctx.exit(code)


def run(arguments: Sequence[str] | None = None, obj: object = None) -> int:
    """Run ``psd`` and return its exit code; a bug keeps its traceback."""
    keep_freed_memory()
    wait_without_spinning()
    try:
        result = psd.main(
            args=None if arguments is None else list(arguments),
            prog_name="psd",
            standalone_mode=False,
            obj=obj,
        )
        return result if isinstance(result, int) else 0
    except click.exceptions.Abort:  # click's name for Ctrl-C
        return _interrupted()
    except KeyboardInterrupt:
        return _interrupted()
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except PathSegDiffError as error:
        return _fail(str(error))
    except MemoryError:
        return _fail(_OUT_OF_MEMORY)
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, without importing torch
            raise
        return _fail(_OUT_OF_MEMORY)
    except OSError as error:
        if error.errno not in _USER_ERRNOS:
            raise
        where = f" ({error.filename})" if error.filename else ""
        return _fail(f"{_USER_ERRNOS[error.errno]}{where}; everything finished so far is kept")


_OUT_OF_MEMORY = (
    "out of memory; use a smaller --batch-size (train-head: a smaller --crop too; extract: fewer "
    "timesteps at once). Everything finished so far is kept"
)
_USER_ERRNOS = {
    errno.ENOSPC: "no space left on the disk; make room and run the same command again",
    errno.EDQUOT: "the disk quota is used up; make room and run the same command again",
    errno.EFBIG: "the file size limit was reached; raise it and run the same command again",
    errno.EACCES: "permission denied; choose a folder that you can write to",
    errno.EPERM: "operation not permitted; choose a folder that you can write to",
    errno.EROFS: "the file system is read-only; choose another folder",
    errno.ENOTDIR: "a part of the path is a file, not a folder; choose another path",
    errno.EEXIST: "a file stands where a folder has to be made; choose another path",
    errno.EISDIR: "a folder stands where a file has to be written; choose another path",
    errno.ELOOP: "the link leads back to itself; choose another path",
    errno.ENAMETOOLONG: "the name is too long; choose a shorter one",
    errno.ENOENT: "no such file or folder",
    errno.EIO: "the disk reported an input/output error",
}


def _fail(message: str) -> int:
    click.echo(f"Error: {message}", err=True)
    return 1


def _interrupted() -> int:
    click.echo("Interrupted; everything finished so far is kept.", err=True)
    return 130
