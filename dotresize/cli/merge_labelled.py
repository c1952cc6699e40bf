"""``dotresize merge-ff --task image|translation``: merge a model of labelled examples."""

from __future__ import annotations

import argparse
import copy
import hashlib
import logging
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from dotresize.accounting import check_weights, peak_memory, stage, unique_parameters, versions
from dotresize.checkpoint.origin import Origin
from dotresize.cli import card, report
from dotresize.cli.checks import check_recovery, find_device
from dotresize.cli.choices import RecoveryChoices, Source, chosen, settings
from dotresize.cli.examples import BATCH, TASKS, Example, Task
from dotresize.cli.merging import (
    MergeChoices,
    all_of,
    card_lines,
    check_plot,
    plot,
    remedy,
    saved,
)
from dotresize.cli.presets import EVAL_EXAMPLES, EXAMPLES
from dotresize.cli.resume import Stages, files_of, run_in_stages
from dotresize.cli.storage import Storage, check_dtype
from dotresize.cli.texts import Texts
from dotresize.merging.checkpoint import MergedStore, PlainStore
from dotresize.merging.merge import merge_feed_forward
from dotresize.merging.tie import dropped, gone_of
from dotresize.models.causal_lm import CausalLM
from dotresize.ops.backends import choose
from dotresize.recovery import fine_tune

# A score at most this share of the dense model's is warned of.
_BROKEN = 0.5

logger = logging.getLogger("dotresize")


@dataclass(frozen=True, kw_only=True)
class ExampleChoices:
    """The examples that a run reads.

    Attributes:
        calibration, eval: what ``Task.read`` takes; without the last, what is not calibrated on.
        examples: how many neurons are aligned and windows chosen by, drawn by ``seed``.
        eval_examples: how many to score on, at most, drawn as well.
    """

    task: str
    calibration: list[str] | None = None
    eval: list[str] | None = None
    examples: int
    eval_examples: int
    seed: int = 0

    def check(self) -> None:
        """Raise ValueError for a number that is none."""
        if not self.calibration:
            raise ValueError("--calibration: give labelled examples")
        for name in ("examples", "eval_examples"):
            if getattr(self, name) < 1:
                shown = f"--{name.replace('_', '-')} {getattr(self, name)}"
                raise ValueError(f"{shown}: must be at least 1")
        if not -(2**63) <= self.seed < 2**63:
            raise ValueError(f"--seed {self.seed}: must fit in 64 bits")


@dataclass
class _Examples:
    """The examples of a run: to align by, to train on, to score on."""

    calibration: list[Example]
    training: list[Example]
    held_out: list[Example]

    def digest(self, task: type[Task]) -> str:
        """Return the SHA-256 of all that they hold."""
        digest = hashlib.sha256()
        for example in (*self.calibration, *self.training, *self.held_out):
            digest.update(task.content(example))
        return digest.hexdigest()


def merge_labelled(args: argparse.Namespace) -> int:
    """Run the verb; return its exit code."""
    device = find_device(args.device)
    args.examples = EXAMPLES if args.examples is None else args.examples
    args.eval_examples = EVAL_EXAMPLES if args.eval_examples is None else args.eval_examples
    merging, choices = chosen(MergeChoices, args), chosen(ExampleChoices, args)
    recovery = chosen(RecoveryChoices, args)
    choices.check()
    check_dtype(args.dtype)
    choose(merging.backend, device)
    merging.check()
    check_recovery(recovery, device)
    task_type = TASKS[choices.task]
    found = _drawn(task_type, choices, 0 if recovery.recover is None else recovery.recover * BATCH)
    recorded = settings(args, Source, MergeChoices, ExampleChoices, RecoveryChoices)
    recorded |= {"model_files": files_of(args.model), "dtype": args.dtype}
    recorded["examples_sha256"] = found.digest(task_type)

    def check() -> None:
        if args.plot is not None:
            check_plot(args.plot, merging)

    def run(stages: Stages) -> int:
        with stage("reading the model", {}):
            task = task_type(args.model, device)
        check_weights(task.module)
        merging.check_layers(task.module)
        for examples in (found.calibration, found.training, found.held_out):
            task.check(examples)
        with stage("merging", {}, f"tries windows of {merging.merge} layers"):
            batches = list(task.batches(found.calibration))
            merged, main = merge_feed_forward(task.module, batches, **merging.given)
        for name, own in main["stacks"].items():
            first, *_, last = own["window"]
            logger.info("layers %d to %d of the %s become one feed-forward", first, last, name)
        judge = _Judge(task, found, recovery, args.seed, stages)
        rows = {"dense": judge.row("dense", task.module)} | judge.rows("merged", merged)
        if args.compare:
            rows |= _compared(merging, task, batches, judge, main["stacks"])
        main |= {
            "task": choices.task,
            "rows": rows,
            "versions": versions(),
            "peak_memory_bytes": peak_memory(),
            "settings": all_of(args) | recorded,
        }
        main["saved"] = saved(main["parameters"], plain=merging.plain)
        store = PlainStore(merged) if merging.plain else MergedStore(merged)
        made = CausalLM(merged, store)
        storage = Storage(args.dtype, quantised=False, texts=Texts({}, []))
        storage.round(made, main)
        storage.cast(made)
        with stage("writing", {}, args.out):
            card.write_output(
                args.out, made, task.processor, main, partial(_card, task), args.model
            )
        stages.remove()
        loader = f"transformers' {task.auto}" if merging.plain else "dotresize.load"
        if merging.plain:
            logger.info("--plain repeats the shared tensors: as many bytes as the dense model's")
        report.say(f"{_table(rows)}\n\n{args.out} loads with {loader}")
        if args.plot is not None:
            plot(args.plot, main, "loss")
        _warn(rows, remedy(merging, recovery))
        return 0

    also = {"compare": args.compare}
    return run_in_stages(args.out, recorded, also, resume=args.resume, check=check, run=run)


def _drawn(task: type[Task], choices: ExampleChoices, training: int) -> _Examples:
    """Return examples, each number drawn without repetition from those that there are.

    training: how many to train on, at most; the others of the calibration's first.
    """
    assert choices.calibration is not None
    every = task.read("--calibration", choices.calibration)
    generator = random.Random(choices.seed)
    generator.shuffle(every)
    drawn, others = every[: choices.examples], every[choices.examples :]
    if choices.eval is not None:
        held_out = task.read("--eval", choices.eval)
        generator.shuffle(held_out)
        return _Examples(drawn, [*others, *drawn][:training], held_out[: choices.eval_examples])
    if not others:
        raise ValueError(
            f"--examples {choices.examples}: leaves none of {len(every)} to score on; give --eval, "
            "or fewer --examples"
        )
    kept = min(choices.eval_examples, max(1, len(others) // 2)) if training else len(others)
    held_out = others[: min(kept, choices.eval_examples)]
    return _Examples(drawn, [*others[len(held_out) :], *drawn][:training], held_out)


class _Judge:
    """The figures of a model, and of what a short training makes of it."""

    def __init__(
        self, task: Task, found: _Examples, recovery: RecoveryChoices, seed: int, stages: Stages
    ) -> None:
        self._task, self._found, self._recovery = task, found, recovery
        self._seed, self._stages = seed, stages

    def row(self, name: str, model: Any) -> dict[str, Any]:
        """Return the figures of a model as it is."""
        with stage("evaluation", {}, f"of {name} on {len(self._found.held_out)} examples"):
            scores = self._task.scores(model, self._found.held_out)
        count = len(self._found.held_out)
        return {"parameters": unique_parameters(model), "scores": scores, "examples": count}

    def rows(self, name: str, model: Any) -> dict[str, dict[str, Any]]:
        """Return the figures of a model, and with ``--recover`` of what training makes of it."""
        found = {name: self.row(name, model)}
        if self._recovery.recover is None:
            return found
        with stage("recovery", {}, f"of {self._recovery.recover} steps"):
            training = fine_tune(
                model,
                self._found.training,
                collate=self._task.inputs,
                folder=self._stages.training(f"training-{name.replace(' ', '-')}"),
                steps=self._recovery.recover,
                batch=BATCH,
                learning_rate=self._recovery.learning_rate,
                seed=self._seed,
            )
        after = f"{name} + recovery"
        found[after] = self.row(after, model) | {"recovery": training}
        return found


def _compared(
    merging: MergeChoices,
    task: Task,
    batches: list[dict[str, Any]],
    judge: _Judge,
    stacks: dict[str, dict[str, Any]],
) -> dict[str, dict[str, Any]]:
    """Return figures of the same windows merged in other ways, and dropped but for the anchor."""
    starts = {name: found["window"][0] for name, found in stacks.items()}
    rows: dict[str, dict[str, Any]] = {}

    def add(name: str, make: Callable[[], Any]) -> None:
        try:
            rows.update(judge.rows(name, make()))
        except ValueError as error:  # it costs its row, and not the result
            logger.warning("%s: %s; left out of the comparison", name, error)

    for name, others in merging.others.items():
        given = merging.given | others | {"start": starts}
        add(name, partial(_merged, task, batches, given))
    module = copy.deepcopy(task.module)
    with dropped(module, gone_of(stacks)) as lost:
        add("layers dropped", lambda: module)
    for name in rows:
        if name.startswith("layers dropped"):
            rows[name]["parameters"] -= lost
    return rows


def _merged(task: Task, batches: list[dict[str, Any]], given: dict[str, Any]) -> Any:
    return merge_feed_forward(task.module, batches, **given)[0]


def _cells(rows: dict[str, dict[str, Any]]) -> list[tuple[str, list[str]]]:
    """Return the lines of a table with a column for each row: parameters, and the scores."""
    scores = next(iter(rows.values()))["scores"]
    parameters = [report.millions(row["parameters"]) for row in rows.values()]
    return [
        ("parameters, total", parameters),
        *((name, [f"{row['scores'][name]:.1f}" for row in rows.values()]) for name in scores),
    ]


def _table(rows: dict[str, dict[str, Any]]) -> str:
    return report.side_by_side(list(rows), _cells(rows))


def _warn(rows: dict[str, dict[str, Any]], advice: str) -> None:
    """Warn of a final model with half of the dense model's score, or less."""
    last = rows.get("merged + recovery", rows["merged"])["scores"]
    for name, before in rows["dense"]["scores"].items():
        if before and last[name] <= _BROKEN * before:
            logger.warning(
                "%s is %.1f, the dense model's %.1f; %s", name, last[name], before, advice
            )
            return


def _card(task: Task, found: dict[str, Any], name: str, origin: Origin) -> str:
    """Return the model card of a merged model."""
    plain = found["settings"]["plain"]
    shown = {"dense": "base", "merged": "this model"}
    if "merged + recovery" in found["rows"]:
        shown |= {"merged": "without recovery", "merged + recovery": "this model"}
    rows = {title: found["rows"][own] for own, title in shown.items()}
    return card.model_card(
        f"{name}, feed-forwards merged",
        origin,
        "transformers" if plain else "dotresize",
        card_lines(found, f"`{task.auto}.from_pretrained`"),
        list(rows),
        _cells(rows),
        pipeline=task.pipeline,
    )
