"""The arguments of every verb, in groups, with an example each."""

from __future__ import annotations

import argparse

from dotresize import __version__
from dotresize.cli.argument_groups import Groups, Parser
from dotresize.cli.presets import (
    DEFAULT,
    EVAL_EXAMPLES,
    EXAMPLES,
    MERGE_WINDOWS,
    PRESETS,
    SELECT_WINDOWS,
)

_MODEL = "directory, .gguf file or hub id"
# What is not an option.
_WORDS = {
    "compress": "MODEL OUT --calibration FILE ... ",
    "sweep": "MODEL DIR --calibration FILE ... --eval FILE ... ",
    "merge-ff": "MODEL OUT --merge K --calibration FILE ... ",
    "eval": "MODEL FILE ... ",
    "export": "OUT FILE.gguf ",
    "bench": "[WHAT ...] ",
}
_EXAMPLES = {
    "compress": "dotresize compress HuggingFaceTB/SmolLM2-135M OUT --calibration wiki.txt news.txt",
    "sweep": "dotresize sweep MODEL PAGE --calibration wiki.txt --eval held-out.txt",
    "merge-ff": "dotresize merge-ff MODEL OUT --merge 4 --calibration wiki.txt --plain",
    "eval": "dotresize eval OUT held-out.txt",
    "export": "dotresize export OUT model.gguf --type q8_0",
    "bench": "dotresize bench sinkhorn --out rows.jsonl",
}


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = Parser(prog="dotresize", description="Make a language model narrower.")
    parser.add_argument("--version", action="version", version=f"dotresize {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, parser_class=Parser)

    def verb(name: str, text: str) -> argparse.ArgumentParser:
        example = _EXAMPLES.get(name)
        return verbs.add_parser(
            name,
            help=text,
            description=f"{text[0].upper()}{text[1:]}.",
            usage=None if example is None else f"dotresize {name} {_WORDS.get(name, '')}[options]",
            epilog=None if example is None else f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    _add_compress(verb("compress", "narrow a model into a new directory"))
    _add_sweep(verb("sweep", "methods and widths side by side, on one HTML page"))
    _add_merging(verb("merge-ff", "let neighbouring layers share one feed-forward"))
    evaluate = verb("eval", "perplexity of each text file")
    evaluate.add_argument("model", metavar="MODEL", help=_MODEL)
    evaluate.add_argument("eval", nargs="+", metavar="FILE", help="text or .jsonl")
    _add_common(Groups(evaluate))
    _add_export(verb("export", "write a model directory as a GGUF file for llama.cpp"))
    _add_bench(verb("bench", "time the CPU operators beside every installed peer"))
    info = verb("info", "backends, devices and versions")
    info.add_argument("--json", action="store_true", help="as one JSON object")
    return parser


def _add_compress(compress: argparse.ArgumentParser) -> None:
    compress.add_argument("model", metavar="MODEL", help=_MODEL)
    compress.add_argument("out", metavar="OUT", help="directory to make")
    groups = Groups(compress)
    compress.add_argument(
        "--preset",
        default=DEFAULT,
        help=f"how much work: {', '.join(PRESETS)} ({DEFAULT}); --windows and --search say "
        "otherwise",
    )
    size = groups["how narrow"]
    size.add_argument(
        "--params",
        type=float,
        help="share of the parameters to keep (0.8 if no size is given): feed-forwards are "
        "narrowed, or what --search finds",
    )
    size.add_argument(
        "--params-count",
        default="total",
        help="what --params is a share of: total or non_embedding (total)",
    )
    size.add_argument(
        "--search",
        action=argparse.BooleanOptionalAction,
        help="--search measures which shape spends --params best, both widths and a layer or two "
        "less; --no-search narrows feed-forwards alone wherever they can meet it (a search where "
        "they would keep less than half, and with --preset best)",
    )
    size.add_argument(
        "--width",
        type=float,
        help="instead, of the residual stream: a share up to 1, or an exact number (0.8 if "
        "no size is given, and --params would take a search that cannot be had)",
    )
    size.add_argument(
        "--energy", type=float, help="instead: the share of the activations' variance to keep"
    )
    _add_narrowing(groups, windows=None)
    groups["method"].add_argument(
        "--targets", metavar="FILE", help="JSON list of the neurons that stay (the largest)"
    )
    size.add_argument(
        "--layer-widths",
        action="store_true",
        help="give each layer a feed-forward width of its own, as many neurons in all as equal "
        "widths would have: less is lost, but plain transformers does not load it yet; "
        "dotresize.load and llama.cpp do",
    )
    groups["output"].add_argument(
        "--pad",
        action="store_true",
        help="with --layer-widths: fill all layers up with zeros to the widest, so that plain "
        "transformers loads it; larger than --params asks for",
    )
    groups["output"].add_argument(
        "--compare",
        action="store_true",
        help="also evaluate the dense model and plain methods at the same size, without refit",
    )
    groups["output"].add_argument(
        "--report", metavar="DIR", help="directory to make for an HTML page about the run"
    )
    _add_dtype(groups)
    _add_recovery(groups)
    groups["running"].add_argument(
        "--memory",
        metavar="SIZE",
        help="host memory to stay below, such as 3GB: the model is read by layers, never whole",
    )
    groups["running"].add_argument(
        "--resume",
        action="store_true",
        help="go on from the finished stages in OUT.partial; nothing if OUT is complete",
    )


def _add_sweep(sweep: argparse.ArgumentParser) -> None:
    sweep.add_argument("model", metavar="MODEL", help=_MODEL)
    sweep.add_argument("out", metavar="DIR", help="directory to make, for the page")
    groups = Groups(sweep)
    groups["how narrow"].add_argument(
        "--widths", type=float, nargs="+", default=[0.9, 0.8, 0.7, 0.6], help="(0.9 0.8 0.7 0.6)"
    )
    sweep.set_defaults(energy=None, params=None, targets=None)
    _add_narrowing(groups, windows=32)


def _add_narrowing(groups: Groups, *, windows: int | None) -> None:
    """Add the options of verbs that narrow; windows: see ``_add_texts``."""
    size = groups["how narrow"]
    size.add_argument("--ff-width", type=float, help="of the feed-forward blocks, as --width")
    size.add_argument(
        "--multiple-of",
        type=int,
        metavar="N",
        help="widths become multiples of N (of 256, 128, 64 or 32, the largest that fits)",
    )
    size.add_argument(
        "--keep-type",
        action="store_true",
        help="refuse a width for which a llama would be saved as mistral",
    )
    size.add_argument(
        "--tensor-parallel",
        type=int,
        default=1,
        metavar="N",
        help="how many devices will share it: the feed-forward width can be divided by N as well",
    )
    method = groups["method"]
    method.add_argument("--method", default="dot", help="dot, pca, magnitude, slicegpt (dot)")
    method.add_argument("--scope", default="global", help="global or location (global)")
    method.add_argument(
        "--ff-method",
        default="eliminate",
        help="eliminate, nystrom, magnitude or transport (eliminate)",
    )
    method.add_argument("--reg", type=float, help="of dot, times the mean cost (3)")
    method.add_argument(
        "--steps",
        type=float,
        help="of dot: transports in a row, or inf for their limit (inf; 1 if --targets is given)",
    )
    method.add_argument("--factor", help="of dot with a number of --steps: polar or qr (polar)")
    method.add_argument(
        "--sensitivity",
        metavar="on|off",
        help="of dot and pca: heed what the output feels, by a backward pass (on for the limit of "
        "dot alone)",
    )
    method.add_argument(
        "--no-refit", action="store_true", help="leave the weights as absorption makes them"
    )
    method.add_argument("--ridge", type=float, help="of the refit (by how much text there is)")
    method.add_argument("--untie", action="store_true", help="give a tied head its own weights")
    _add_texts(groups, windows=windows)
    groups["text"].add_argument(
        "--self-windows",
        type=int,
        help="windows that the model writes itself, one more source (as many as --windows)",
    )
    groups["text"].add_argument(
        "--unseen",
        action="extend",
        nargs="+",
        metavar="FILE",
        help="more of them, of kinds that the calibration has not; the page shows them apart",
    )
    _add_common(groups)


def _add_merging(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=_MODEL)
    parser.add_argument("out", metavar="OUT", help="directory to make")
    groups = Groups(parser)
    method = groups["method"]
    method.add_argument(
        "--merge", type=int, required=True, metavar="K", help="layers that share a feed-forward"
    )
    method.add_argument(
        "--anchor", default="first", help="whose order the others take: first, middle, last (first)"
    )
    method.add_argument("--no-permute", action="store_true", help="average them as they are")
    method.add_argument(
        "--soft", type=float, metavar="REG", help="align by transport plans, not by permutations"
    )
    method.add_argument("--start", type=int, help="first layer (the best of all windows)")
    method.add_argument(
        "--select-windows",
        type=int,
        help=f"calibration windows whose perplexity chooses the layers ({SELECT_WINDOWS})",
    )
    output = groups["output"]
    output.add_argument(
        "--compare",
        action="store_true",
        help="also without permutation, softly aligned, and without the layers, each recovered too",
    )
    output.add_argument(
        "--plain",
        action="store_true",
        help="repeat the shared tensors in an ordinary directory: every tool loads it, and the "
        "file is as large as the dense model's",
    )
    output.add_argument(
        "--plot",
        metavar="FILE",
        help="draw what every window loses: perplexity, or a labelled task's loss (needs "
        "matplotlib)",
    )
    _add_dtype(groups)
    _add_recovery(groups)
    groups["running"].add_argument(
        "--resume", action="store_true", help="go on with an interrupted --recover in OUT.partial"
    )
    _add_texts(groups, windows=None, meant=str(MERGE_WINDOWS))
    text = groups["text"]
    text.add_argument(
        "--task",
        default="lm",
        help="lm; image: --calibration and --eval are folders with a folder of images for each "
        "label; translation: each is two files, whose lines translate each other; --merge and "
        "--start are of encoder and decoder alike (lm)",
    )
    text.add_argument(
        "--examples",
        type=int,
        help="of images or sentence pairs: how many neurons are aligned and layers chosen by "
        f"({EXAMPLES})",
    )
    text.add_argument(
        "--eval-examples", type=int, help=f"and how many are scored, at most ({EVAL_EXAMPLES})"
    )
    _add_common(groups)


def _add_dtype(groups: Groups) -> None:
    groups["output"].add_argument(
        "--dtype",
        default="auto",
        help="how weights are stored: auto, float32, bfloat16 or float16 (auto: as they were read; "
        "of a quantised model bfloat16, if predictions stay the same, else float32)",
    )


def _add_recovery(groups: Groups) -> None:
    recovery = groups["training afterwards"]
    recovery.add_argument(
        "--recover",
        type=int,
        metavar="STEPS",
        help="train it for so many steps: distil the dense model into it, or, of a labelled task, "
        "learn the labels (needs accelerate)",
    )
    recovery.add_argument(
        "--learning-rate", type=float, default=2e-4, help="of --recover, at its highest (2e-4)"
    )


def _add_texts(groups: Groups, *, windows: int | None, meant: str = "by --preset") -> None:
    """Add the texts; windows: how many, None where that is found out later, and ``meant`` said."""
    text = groups["text"]
    text.add_argument(
        "--calibration",
        action="extend",
        nargs="+",
        metavar="FILE",
        help="text or .jsonl; each file gives an equal share of the windows",
    )
    text.add_argument(
        "--windows",
        type=int,
        default=windows,
        help=f"calibration windows ({meant if windows is None else windows})",
    )
    text.add_argument(
        "--seed",
        type=int,
        default=0,
        help="places the windows, and draws what the model writes (0)",
    )
    text.add_argument(
        "--eval",
        action="extend",
        nargs="+",
        metavar="FILE",
        help="texts to evaluate on (windows of the calibration files that are not calibrated on)",
    )
    groups["running"].add_argument(
        "--backend", default="auto", help="auto, triton, cpp or torch (auto)"
    )


def _add_common(groups: Groups) -> None:
    groups["text"].add_argument(
        "--window", type=int, help="tokens per window (512, or the model's positions if fewer)"
    )
    groups["text"].add_argument(
        "--eval-windows",
        type=int,
        help="evaluate this many windows of each text, spread evenly (all; without --eval 4)",
    )
    running = groups["running"]
    running.add_argument("--device", default="auto", help="auto, cpu, cuda, ... (auto)")
    running.add_argument("--quiet", action="store_true", help="no progress bars, no stages")


def _add_export(export: argparse.ArgumentParser) -> None:
    export.add_argument("model", metavar="OUT", help="directory of a Llama, Mistral or Qwen2")
    export.add_argument("out", metavar="FILE.gguf", help="file to write")
    export.add_argument(
        "--type", default="f16", metavar="TYPE", help="f32, f16, bf16, q8_0 or q4_0 (f16)"
    )
    export.add_argument("--quiet", action="store_true", help="no progress bars")


def _add_bench(bench: argparse.ArgumentParser) -> None:
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
