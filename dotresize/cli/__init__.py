"""Command line: ``dotresize compress | sweep | merge-ff | eval | export | bench | info``.

Exit codes: 0 done, 2 bad usage or bad input, 1 anything else; each failure is one line.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import signal
import sys
import threading
from typing import NoReturn

# Nothing here imports torch: it takes seconds, in which Ctrl-C and mistakes are answered, too.
from dotresize.cli.names import partial_folder
from dotresize.cli.parser import make_parser

logger = logging.getLogger("dotresize")


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    args = argparse.Namespace(verb=None)
    try:
        make_parser().parse_args(argv, namespace=args)
        args.typed = sys.argv[1:] if argv is None else argv
        if hasattr(args, "window"):
            args.default_window = args.window is None
            args.window = 512 if args.window is None else args.window
        logging.basicConfig(format="%(message)s", level=logging.WARNING)
        logger.setLevel(logging.INFO)
        if getattr(args, "quiet", False):
            os.environ["TQDM_DISABLE"] = "1"
            logging.getLogger("dotresize.stages").setLevel(logging.WARNING)
        if threading.current_thread() is threading.main_thread():
            for kill in (signal.SIGTERM, signal.SIGHUP):  # polite ones clean up like Ctrl-C does
                signal.signal(kill, _interrupt)
            # A shell starts background jobs with Ctrl-C ignored, which stays so.
            if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
                signal.signal(signal.SIGINT, _interrupt)
        if args.verb == "bench":
            from dotresize.benchmarks import command

            return _ended(command.run(args))
        # Here: transformers is slow to import, and the mistakes above are not.
        from dotresize.cli import commands

        return _ended(commands.run(args))
    except KeyboardInterrupt:
        return _interrupted(args)
    except Exception as error:
        if os.environ.get("DOTRESIZE_DEBUG"):
            raise
        # Modules that are interrupted while they are imported may make another error of it.
        if _asked():
            return _interrupted(args)
        # A backend that cannot run here is a RuntimeError of this package.
        if isinstance(error, ValueError) or type(error).__name__ == "BackendError":
            return _fail(_as_typed(str(error), args), 2)
        # No traceback in a user's face; DOTRESIZE_DEBUG=1 shows it.
        _stop_asking()
        kept = _stages_kept(args)
        return _fail(f"{type(error).__name__}: {error}{'; ' if kept else ''}{kept}", 1)


def _interrupt(*_: object) -> NoReturn:
    """Raise KeyboardInterrupt, and again after a while: what is raised in a ``__del__`` is lost."""
    sys.unraisablehook = _unraisable
    signal.signal(signal.SIGALRM, _interrupt)
    signal.setitimer(signal.ITIMER_REAL, 10.0)  # cleaning up takes less
    raise KeyboardInterrupt


def _unraisable(lost: sys.UnraisableHookArgs) -> None:
    """Say nothing of an interrupt that was lost, as it comes again."""
    if lost.exc_type is not KeyboardInterrupt:
        sys.__unraisablehook__(lost)


def _asked() -> bool:
    """Return whether an interrupt has arrived."""
    return signal.getitimer(signal.ITIMER_REAL)[0] > 0


def _interrupted(args: argparse.Namespace) -> int:
    _stop_asking()
    kept = "finished cases are kept" if args.verb == "bench" else "nothing was left behind"
    return _fail(f"interrupted; {_stages_kept(args) or kept}", 1)


def _ended(code: int) -> int:
    """Return the code of work that has ended, also where an interrupt was lost meanwhile."""
    _stop_asking()
    return code


def _stop_asking() -> None:
    """Let an interrupt that has arrived not come again."""
    signal.setitimer(signal.ITIMER_REAL, 0)


def _as_typed(message: str, args: argparse.Namespace) -> str:
    """Return a message with options as they are typed, not as Python has them."""
    known = vars(args).keys() - {"model", "out", "eval", "verb"}
    # Words that are no English are options wherever they stand, others where a message begins.
    plain = [name for name in known if "_" in name or name == "params"]
    if plain:
        pattern = rf"(?<![-\w])({'|'.join(sorted(plain, key=len, reverse=True))})(?!\w)"
        message = re.sub(pattern, lambda found: f"--{found[1].replace('_', '-')}", message)
    message = re.sub(r"\b(give|or) (width|energy|steps|method)\b", r"\1 --\2", message)
    message = message.replace("turn sensitivity off", "give --sensitivity off")
    first = re.match(r"\w+(?=[ :])", message)
    return f"--{message}" if first is not None and first[0] in known else message


def _stages_kept(args: argparse.Namespace) -> str:
    """Return what is left to go on from, if anything."""
    if args.verb not in ("compress", "merge-ff"):
        return ""
    try:
        folder = partial_folder(args.out)
        kept = folder.exists()
    except (OSError, ValueError):  # a name that no file system takes
        kept = False
    return f"{folder} is kept, --resume goes on from it" if kept else ""


def _fail(message: str, code: int) -> int:
    sys.stderr.write(f"dotresize: {' '.join(message.split())}\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
