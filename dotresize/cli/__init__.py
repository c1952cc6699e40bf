"""Command line: ``dotresize compress | sweep | merge-ff | eval | bench | info``.

Exit codes: 0 done, 2 bad usage or bad input, 1 anything else; each failure is one line.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import threading
from typing import NoReturn

# Nothing here imports torch: it takes seconds, in which Ctrl-C and mistakes are answered, too.
from dotresize import __version__
from dotresize.cli.names import partial_folder

logger = logging.getLogger("dotresize")


class _Parser(argparse.ArgumentParser):
    """A parser that says one line per mistake, without the usage text in front of it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"dotresize: {message} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="dotresize", description="Make a language model narrower.")
    parser.add_argument("--version", action="version", version=f"dotresize {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, parser_class=_Parser)

    compress = verbs.add_parser("compress", help="narrow a model into a new directory")
    _add_compress(compress)
    sweep = verbs.add_parser("sweep", help="methods and widths side by side, on one HTML page")
    sweep.add_argument("model", metavar="MODEL", help="directory, .gguf file or hub id")
    sweep.add_argument("out", metavar="DIR", help="directory to make, for the page")
    sweep.add_argument(
        "--widths", type=float, nargs="+", default=[0.9, 0.8, 0.7, 0.6], help="(0.9 0.8 0.7 0.6)"
    )
    sweep.set_defaults(energy=None, params=None, targets=None)
    _add_narrowing(sweep)

    merge = verbs.add_parser("merge-ff", help="let neighbouring layers share one feed-forward")
    _add_merging(merge)

    evaluate = verbs.add_parser("eval", help="perplexity of each text file")
    evaluate.add_argument("model", metavar="MODEL", help="directory, .gguf file or hub id")
    evaluate.add_argument("eval", nargs="+", metavar="FILE", help="text or .jsonl")
    _add_common(evaluate)

    export = verbs.add_parser("export", help="write a model directory as a GGUF file for llama.cpp")
    export.add_argument("model", metavar="OUT", help="directory of a Llama, Mistral or Qwen2")
    export.add_argument("out", metavar="FILE.gguf", help="file to write")
    export.add_argument(
        "--type", default="f16", metavar="TYPE", help="f32, f16, bf16, q8_0 or q4_0 (f16)"
    )
    export.add_argument("--quiet", action="store_true", help="no progress bars")

    bench = verbs.add_parser("bench", help="time the CPU operators beside every installed peer")
    bench.add_argument(
        "what",
        nargs="*",
        metavar="WHAT",
        help="l1, gradient, sinkhorn, assignment, scaling (all but scaling)",
    )
    bench.add_argument("--sizes", default="small", help="small or all (small)")
    bench.add_argument("--rounds", type=int, default=7, help="interleaved rounds (7)")
    bench.add_argument("--threads", type=int, help="for everyone alike (as torch has)")
    bench.add_argument(
        "--limit", type=float, default=20.0, help="seconds a call may take to be timed (20)"
    )
    bench.add_argument("--out", metavar="FILE", help="append the rows as JSON lines")
    bench.add_argument("--plot", metavar="FILE", help="draw time against size (needs matplotlib)")
    bench.add_argument("--quiet", action="store_true", help="the tables only")

    verbs.add_parser("info", help="backends, devices and versions")
    return parser


def _add_compress(compress: argparse.ArgumentParser) -> None:
    compress.add_argument("model", metavar="MODEL", help="directory, .gguf file or hub id")
    compress.add_argument("out", metavar="OUT", help="directory to make")
    compress.add_argument(
        "--width",
        type=float,
        help="of the residual stream: share up to 1, or an exact number (all of it; "
        "0.8 where no size is given and no budget can be measured, as with --memory)",
    )
    compress.add_argument(
        "--energy", type=float, help="instead: the share of the activations' variance to keep"
    )
    compress.add_argument(
        "--params",
        type=float,
        help="instead: share of the parameters, split over both widths (0.8 if no size is given)",
    )
    compress.add_argument(
        "--params-count",
        default="total",
        help="what --params is a share of: total or non_embedding (total)",
    )
    compress.add_argument(
        "--targets", metavar="FILE", help="JSON list of the neurons that stay (the largest)"
    )
    compress.add_argument(
        "--compare",
        action="store_true",
        help="also evaluate dense, magnitude, pca and dot without refit, on the same calibration",
    )
    _add_recovery(compress)
    compress.add_argument(
        "--report", metavar="DIR", help="directory to make for an HTML page about the run"
    )
    compress.add_argument(
        "--memory",
        metavar="SIZE",
        help="host memory to stay below, such as 3GB: the model is read by layers, never whole",
    )
    compress.add_argument(
        "--resume",
        action="store_true",
        help="go on from the finished stages in OUT.partial; nothing if OUT is complete",
    )
    _add_narrowing(compress)


def _add_narrowing(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--method", default="pca", help="pca, dot, magnitude, slicegpt (pca)")
    parser.add_argument("--scope", default="global", help="global or location (global)")
    parser.add_argument("--ff-width", type=float, help="of the feed-forward blocks, as --width")
    parser.add_argument(
        "--multiple-of",
        type=int,
        metavar="N",
        help="of what widths are a multiple (256, 128, 64 or 32: the largest one near enough)",
    )
    parser.add_argument(
        "--keep-type",
        action="store_true",
        help="refuse a width for which a llama would be saved as mistral",
    )
    parser.add_argument(
        "--tensor-parallel",
        type=int,
        default=1,
        metavar="N",
        help="devices it will be split over; the feed-forward width is a multiple of N times more",
    )
    parser.add_argument(
        "--ff-method",
        default="eliminate",
        help="eliminate, nystrom, magnitude or transport (eliminate)",
    )
    parser.add_argument("--reg", type=float, default=3.0, help="of dot, times the mean cost (3)")
    parser.add_argument("--steps", type=int, default=1, help="transports in a row, of dot (1)")
    parser.add_argument("--factor", default="polar", help="of dot: polar or qr (polar)")
    parser.add_argument(
        "--no-refit", action="store_true", help="leave the weights as absorption makes them"
    )
    parser.add_argument("--ridge", type=float, help="of the refit (0.1)")
    parser.add_argument("--untie", action="store_true", help="give a tied head its own weights")
    parser.add_argument(
        "--self-windows",
        type=int,
        help="windows that the model writes itself, one more source (a third of --windows)",
    )
    _add_texts(parser, windows=32)
    parser.add_argument(
        "--unseen",
        action="extend",
        nargs="+",
        metavar="FILE",
        help="more of them, of kinds that the calibration has not; the page shows them apart",
    )
    _add_common(parser)


def _add_merging(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="directory, .gguf file or hub id")
    parser.add_argument("out", metavar="OUT", help="directory to make")
    parser.add_argument(
        "--merge", type=int, required=True, metavar="K", help="layers that share a feed-forward"
    )
    parser.add_argument(
        "--anchor", default="first", help="whose order the others take: first, middle, last (first)"
    )
    parser.add_argument("--no-permute", action="store_true", help="average them as they are")
    parser.add_argument(
        "--soft", type=float, metavar="REG", help="align by transport plans, not by permutations"
    )
    parser.add_argument("--start", type=int, help="first layer (the best of all windows)")
    parser.add_argument(
        "--select-windows",
        type=int,
        default=4,
        help="calibration windows whose perplexity chooses the layers (4)",
    )
    parser.add_argument(
        "--compare",
        action="store_true",
        help="also without permutation, softly aligned, and without the layers, each recovered too",
    )
    parser.add_argument(
        "--plot", metavar="FILE", help="draw the perplexity of every window (needs matplotlib)"
    )
    parser.add_argument(
        "--plain",
        action="store_true",
        help="repeat the shared tensors in an ordinary directory: every tool loads it, and the "
        "file is as large as the dense model's",
    )
    _add_recovery(parser)
    parser.add_argument(
        "--resume", action="store_true", help="go on with an interrupted --recover in OUT.partial"
    )
    _add_texts(parser, windows=20)
    _add_common(parser)


def _add_recovery(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--recover",
        type=int,
        metavar="STEPS",
        help="then distil the dense model into it, for so many steps (needs accelerate)",
    )
    parser.add_argument(
        "--learning-rate", type=float, default=2e-4, help="of --recover, at its highest (2e-4)"
    )


def _add_texts(parser: argparse.ArgumentParser, *, windows: int) -> None:
    parser.add_argument(
        "--calibration",
        action="extend",
        nargs="+",
        metavar="FILE",
        help="text or .jsonl; each file gives an equal share of the windows",
    )
    parser.add_argument("--backend", default="auto", help="auto, triton, cpp or torch (auto)")
    parser.add_argument(
        "--windows", type=int, default=windows, help=f"calibration windows ({windows})"
    )
    parser.add_argument("--seed", type=int, default=0, help="places the windows (0)")
    parser.add_argument(
        "--eval", action="extend", nargs="+", metavar="FILE", help="texts to evaluate on"
    )


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--window", type=int, help="tokens per window (512, or the model's positions if fewer)"
    )
    parser.add_argument(
        "--eval-windows", type=int, help="evaluate this many windows, spread evenly (all)"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ... (auto)")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    args = argparse.Namespace(verb=None)
    try:
        _parser().parse_args(argv, namespace=args)
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

            return command.run(args)
        # Here: transformers is slow to import, and the mistakes above are not.
        from dotresize.cli import commands

        return commands.run(args)
    except KeyboardInterrupt:
        _stop_asking()
        kept = "finished cases are kept" if args.verb == "bench" else "nothing was left behind"
        return _fail(f"interrupted; {_stages_kept(args) or kept}", 1)
    except Exception as error:
        if os.environ.get("DOTRESIZE_DEBUG"):
            raise
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
    signal.setitimer(signal.ITIMER_REAL, 2.0)  # cleaning up takes less
    raise KeyboardInterrupt


def _unraisable(lost: sys.UnraisableHookArgs) -> None:
    """Say nothing of an interrupt that was lost, as it comes again."""
    if lost.exc_type is not KeyboardInterrupt:
        sys.__unraisablehook__(lost)


def _stop_asking() -> None:
    """Let an interrupt that has arrived not come again."""
    signal.setitimer(signal.ITIMER_REAL, 0)


def _as_typed(message: str, args: argparse.Namespace) -> str:
    """Return a message that begins with an option's name as Python has it, with the one typed."""
    name, space, rest = message.partition(" ")
    end = ":" if name.endswith(":") else ""
    name = name.removesuffix(":")
    if name in ("model", "out", "eval", "verb") or not hasattr(args, name):
        return message
    return f"--{name.replace('_', '-')}{end}{space}{rest}"


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
