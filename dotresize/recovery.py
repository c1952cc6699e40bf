"""A short training, after everything that needs none; by default distillation from the dense model.

    loss = mean over tokens of KL(softmax(dense logits) | softmax(narrow logits))

by transformers' Trainer: AdamW, cosine schedule with warm-up, gradients clipped at norm 1, bfloat16
products where the device has them. The checkpoint keeps its shape, its ties and its dtype. Trainer
writes its state into a working folder ten times, from which an interrupted run goes on. That
state is not part of the result; it is read back as plain tensors only.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import random
import re
import shutil
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor
from tqdm import tqdm

from dotresize.accounting import check_weights
from dotresize.calibration.given_tokens import check_tokens
from dotresize.merging.checkpoint import declared
from dotresize.models.given import transformers_model
from dotresize.models.torch_settings import usual_settings
from dotresize.ops.arguments import check_number, check_whole, shown

BATCH_WINDOWS = 2
LEARNING_RATE = 2e-4


def check(device: torch.device) -> None:
    """Raise ValueError where Trainer cannot run, or would train on another device."""
    try:
        import accelerate  # noqa: F401
    except ImportError:
        raise ValueError("recover needs accelerate: pip install 'dotresize[recover]'") from None
    if device.type == "cuda" and device.index not in (None, 0):
        raise ValueError(f"recover: trains on cuda:0, not {device}; choose by CUDA_VISIBLE_DEVICES")


@usual_settings()
@torch.inference_mode(False)
@torch.enable_grad()
def recover(
    dense: Any,
    narrow: Any,
    tokens: Tensor,
    *,
    folder: str | Path,
    learning_rate: float = LEARNING_RATE,
    batch_windows: int = BATCH_WINDOWS,
    seed: int = 0,
) -> dict[str, Any]:
    """Distil ``dense`` into ``narrow``, in place; one step for every ``batch_windows`` windows.

    Args:
        dense: the original model, on the device of ``narrow``.
        narrow: a plain narrowed model, or a merged one, with the same vocabulary.
        tokens: int64 (windows, length), each window used once.
        folder: for Trainer's state. The same run that was interrupted there goes on, and then ends
            with the weights it would have had; the caller removes it.
        learning_rate: at its highest, after the first tenth of the steps.
        seed: of the order of the windows.

    Returns:
        figures for the report: steps, tokens, learning rate, losses, seconds.

    Raises:
        ValueError: no windows; accelerate is missing; another run's folder; a loss that is not
            finite.

    Example:
        >>> import torch, transformers
        >>> config = transformers.LlamaConfig(
        ...     vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=4,
        ...     num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True)
        >>> model = transformers.LlamaForCausalLM(config)
        >>> tokens = torch.randint(0, 100, (8, 32))
        >>> import tempfile
        >>> from dotresize import compress, recover
        >>> narrow, _ = compress(model, tokens, width=24)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     figures = recover(model, narrow, tokens, folder=folder)
        >>> figures["steps"]
        4
    """
    dense, narrow = (
        transformers_model(model, name=name)
        for name, model in (("dense", dense), ("narrow", narrow))
    )
    for name, model in (("dense", dense), ("narrow", narrow)):
        if getattr(model, "get_output_embeddings", lambda: None)() is None:
            kind = type(model).__name__
            raise ValueError(f"{name}: {kind} has no head, whose predictions are learnt")
    for weight, value in (*narrow.named_parameters(), *dense.named_parameters()):
        if not value.is_floating_point() or value.dtype.itemsize < 2 or value.is_inference():
            kind = "made in inference mode" if value.is_inference() else f"of {value.dtype}"
            raise ValueError(f"weight {weight} is {kind}, which cannot be trained with")
    if not any(value.requires_grad for value in narrow.parameters()):
        raise ValueError("narrow: all its weights are frozen; call requires_grad_() on it")
    tokens = check_tokens(tokens, narrow.config.vocab_size)
    check_whole("batch_windows", batch_windows, 1)
    check_whole("seed", seed)
    if not check_number("learning_rate", learning_rate, "a positive number") > 0:
        raise ValueError(f"learning_rate {learning_rate:g}: must be positive")
    if not isinstance(folder, (str, Path)):
        raise ValueError(f"folder is {shown(folder)}: must be a directory's name")
    check(narrow.device)
    steps = len(tokens) // batch_windows
    if steps < 1:
        raise ValueError(f"recover: {len(tokens)} windows are less than a step of {batch_windows}")

    def divergence(outputs: Any, ids: Tensor, **_: Any) -> Tensor:
        with torch.no_grad():
            wanted = dense(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)
        found = outputs.logits.float().log_softmax(-1)
        loss = torch.nn.functional.kl_div(found, wanted, reduction="sum", log_target=True)
        if not torch.isfinite(loss):
            raise ValueError("recover: the loss is not finite; try a smaller learning rate")
        return loss / ids.numel()

    figures = fine_tune(
        narrow,
        [{"input_ids": window, "labels": window} for window in tokens],
        folder=folder,
        steps=steps,
        batch=batch_windows,
        learning_rate=learning_rate,
        seed=seed,
        loss=divergence,
    )
    return figures | {"tokens": tokens.numel()}


def fine_tune(
    model: Any,
    examples: list[Any],
    *,
    folder: str | Path,
    steps: int,
    batch: int = 8,
    learning_rate: float = LEARNING_RATE,
    seed: int = 0,
    loss: Callable[..., Tensor] | None = None,
    metric: Callable[[Any], float] | None = None,
    collate: Callable[[list[Any]], dict[str, Tensor]] | None = None,
) -> dict[str, Any]:
    """Train a model in place; parameters that are shared stay so.

    Args:
        model: narrowed or merged, of any transformers class.
        examples: inputs without the batch axis, with labels; or whatever ``collate`` takes.
        folder, learning_rate, seed: as of ``recover``.
        steps: of ``batch`` examples each, which are used again where they are too few.
        loss: of (outputs, labels); the model's own if not given.
        metric: of the model, higher is better: taken ten times, and the weights with the best are
            those that it ends with.
        collate: makes a batch of model inputs, with labels, of some examples, when their turn
            comes; by default they are stacked, and must be of one length.

    Returns:
        figures for the report: steps, learning rate, losses, seconds, and the metric's values.

    Raises ValueError as ``recover`` does.
    """
    check(model.device)
    import transformers

    tenth = math.ceil(steps / 10)
    choices = {"learning_rate": learning_rate, "seed": seed, "steps": steps, "batch": batch}
    _claim(Path(folder), model, examples, choices)
    device = model.device
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=batch,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=tenth,
        save_steps=tenth,
        save_total_limit=1,
        logging_steps=max(1, steps // 10),
        logging_strategy="steps",
        logging_nan_inf_filter=False,
        disable_tqdm=True,  # its own bar prints every log entry on stdout
        report_to=[],
        use_cpu=device.type == "cpu",
        bf16=device.type == "cuda" and torch.cuda.is_bf16_supported(),
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        seed=seed % 2**32,
    )
    if device.type == "cuda":
        arguments._n_gpu = 1  # several would share each step's windows
    start = time.perf_counter()
    dtypes = [parameter.dtype for parameter in model.parameters()]
    progress = tqdm(total=steps, desc="recover", unit="step", disable=None)
    best = None if metric is None else _Best(metric, Path(folder), tenth)
    try:
        with _generators_kept(), progress, declared(model), _own_names(model):
            trainer = transformers.Trainer(
                model=model.float().train(),
                args=arguments,
                train_dataset=examples,
                data_collator=collate,
                compute_loss_func=loss,
                callbacks=[_callback(progress, best)],
            )
            trainer.remove_callback(transformers.trainer_callback.PrinterCallback)
            trainer.train(resume_from_checkpoint=_last_state(Path(folder)))
        if best is not None:
            best.put_into(model)
    finally:
        for parameter, dtype in zip(model.parameters(), dtypes, strict=True):
            parameter.data = parameter.data.to(dtype)  # buffers stay: not of the checkpoint
        model.eval()
    check_weights(model)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {
        "steps": steps,
        "learning_rate": learning_rate,
        "losses": losses,
        "metric": None if best is None else best.values,
        "seconds": time.perf_counter() - start,
    }


class _Best:
    """The weights with the best metric so far, in the working folder."""

    def __init__(self, metric: Callable[[Any], float], folder: Path, every: int) -> None:
        self.values: dict[str, float] = {}
        self._metric, self._folder, self._every = metric, folder, every
        if (folder / "best.json").is_file():
            self.values = json.loads((folder / "best.json").read_text(encoding="utf-8"))

    def look(self, model: Any, step: int) -> None:
        if step % self._every or str(step) in self.values:
            return
        from safetensors.torch import save_file

        value = float(self._metric(model.eval()))
        if math.isnan(value):
            raise ValueError("recover: the metric is not a number")
        model.train()
        if not self.values or value > max(self.values.values()):
            weights = {name: p.detach().cpu().contiguous() for name, p in model.named_parameters()}
            save_file(weights, self._folder / "best.safetensors")
        self.values[str(step)] = value
        text = json.dumps(self.values)
        (self._folder / "best.json").write_text(text, encoding="utf-8")

    def put_into(self, model: Any) -> None:
        from safetensors.torch import load_file

        weights = load_file(self._folder / "best.safetensors")
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(weights[name])


def _callback(bar: Any, best: _Best | None) -> Any:
    """Return a callback of Trainer's that moves a bar, and looks for the best weights."""
    import transformers

    class Steps(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            bar.update(state.global_step - bar.n)
            if best is not None:
                best.look(others["model"], state.global_step)

    return Steps()


def _claim(folder: Path, model: Any, examples: list[Any], choices: dict[str, float]) -> None:
    """Claim a folder for a run; ValueError where it holds another run's state."""
    digest = hashlib.sha256()
    for example in examples:
        if not isinstance(example, dict):
            digest.update(repr(example).encode())
            continue
        for name in sorted(example):
            digest.update(torch.as_tensor(example[name]).cpu().contiguous().numpy().tobytes())
    for parameter in model.parameters():
        digest.update(parameter.detach().float().cpu().numpy().tobytes())
    mine = json.dumps({"inputs": digest.hexdigest(), **choices})
    path = folder / "run.json"
    if path.is_file() and path.read_text(encoding="utf-8") == mine:
        return
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"recover: {folder} holds something else; give an empty folder")
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(mine, encoding="utf-8")


def _last_state(folder: Path) -> str | None:
    """Return the newest complete state in the working folder; removes those that were cut short."""
    found = [path for path in folder.iterdir() if re.fullmatch(r"checkpoint-\d+", path.name)]
    found.sort(key=lambda path: int(path.name.split("-")[1]))
    while found:
        try:  # written last
            json.loads((found[-1] / "trainer_state.json").read_text(encoding="utf-8"))
            return str(found[-1])
        except (OSError, ValueError):
            shutil.rmtree(found.pop())
    return None


@contextlib.contextmanager
def _own_names(model: Any) -> Iterator[None]:
    """Have Trainer write the weights of its states by the model's own names.

    It reads them by these, whereas ``save_pretrained`` gives those of some models (experts, image
    encoders) the names of older versions: a state's weights would be passed over in silence.
    """
    model.save_pretrained = partial(model.save_pretrained, save_original_format=False)
    try:
        yield
    finally:
        del model.save_pretrained


@contextlib.contextmanager
def _generators_kept() -> Iterator[None]:
    """Give the random generators of the process back, all of which Trainer seeds."""
    ours, numpys = random.getstate(), numpy.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(ours)
            numpy.random.set_state(numpys)  # noqa: NPY002
