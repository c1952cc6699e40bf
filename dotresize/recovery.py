"""A short distillation from the dense model, after everything that needs no training.

    loss = mean over tokens of KL(softmax(dense logits) | softmax(narrow logits))

by transformers' Trainer: AdamW, cosine schedule with warm-up, gradients clipped at norm 1, bfloat16
products where the device has them. The checkpoint keeps its shape, its ties and its dtype. Trainer
writes its state into a working folder ten times, from which an interrupted run goes on. That
state is not part of the result; it is read back as plain tensors only.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

BATCH_WINDOWS = 2
LEARNING_RATE = 2e-4


def check() -> None:
    """ValueError where Trainer cannot run."""
    try:
        import accelerate  # noqa: F401
    except ImportError:
        raise ValueError("recover needs accelerate: pip install 'dotresize[recover]'") from None


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
        narrow: a plain narrowed model, with the same vocabulary.
        tokens: int64 (windows, length), each window used once.
        folder: for Trainer's state. A run that was interrupted there goes on, and then ends with
            the weights it would have had; the caller removes it.
        learning_rate: at its highest, after the first tenth of the steps.
        seed: of the order of the windows.

    Returns:
        figures for the report: steps, tokens, learning rate, losses, seconds.

    Raises:
        ValueError: no windows; accelerate is missing; the loss is not finite.
    """
    check()
    import transformers

    steps = len(tokens) // batch_windows
    if steps < 1:
        raise ValueError(f"recover: {len(tokens)} windows are less than a step of {batch_windows}")
    device, dtype = narrow.device, narrow.dtype
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=batch_windows,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=math.ceil(steps / 10),
        save_steps=math.ceil(steps / 10),
        save_total_limit=1,
        logging_steps=max(1, steps // 10),
        logging_strategy="steps",
        disable_tqdm=True,  # its own bar prints every log entry on stdout
        report_to=[],
        use_cpu=device.type == "cpu",
        bf16=device.type == "cuda" and torch.cuda.is_bf16_supported(),
        dataloader_pin_memory=False,
        seed=seed,
    )

    def divergence(outputs: Any, ids: Tensor, **_: Any) -> Tensor:
        with torch.no_grad():
            wanted = dense(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)
        found = outputs.logits.float().log_softmax(-1)
        loss = torch.nn.functional.kl_div(found, wanted, reduction="sum", log_target=True)
        return loss / ids.numel()

    start = time.perf_counter()
    trainer = transformers.Trainer(
        model=narrow.float().train(),
        args=arguments,
        train_dataset=[{"input_ids": window, "labels": window} for window in tokens],
        compute_loss_func=divergence,
    )
    trainer.remove_callback(transformers.trainer_callback.PrinterCallback)
    with tqdm(total=steps, desc="recover", unit="step", disable=None) as progress:
        trainer.add_callback(_progress(progress))
        trainer.train(resume_from_checkpoint=_last_state(Path(folder)))
    narrow.to(dtype).eval()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    if not all(map(math.isfinite, losses)):
        raise ValueError("recover: the loss is not finite; use a smaller learning rate")
    return {
        "steps": steps,
        "tokens": tokens.numel(),
        "learning_rate": learning_rate,
        "losses": losses,
        "seconds": time.perf_counter() - start,
    }


def _progress(bar: Any) -> Any:
    """A callback of Trainer's that moves a bar."""
    import transformers

    class Progress(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            bar.update(state.global_step - bar.n)

    return Progress()


def _last_state(folder: Path) -> str | None:
    """The newest complete state in the working folder; those that were cut short are removed."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    while found:
        try:  # written last
            json.loads((found[-1] / "trainer_state.json").read_text(encoding="utf-8"))
            return str(found[-1])
        except (OSError, ValueError):
            shutil.rmtree(found.pop())
    return None
