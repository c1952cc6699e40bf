"""Shared pieces of the tests: the list of backends, and tiny models.

Without a GPU, Triton kernels run in its interpreter, which must be chosen before they are
imported; tests/aot_compile.py covers real compilation in a process of its own.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

ON_GPU = torch.cuda.is_available()
if not ON_GPU:
    os.environ["TRITON_INTERPRET"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell that runs the tests in the background has them, and what they start, ignore Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)

if os.environ.get("TRITON_INTERPRET") == "1":
    from dotresize.benchmarks.interpreter import patch_once

    patch_once()

BACKENDS = ("torch", "cpp", "triton")


# Seconds that another process may take before it is taken to hang, on a machine however busy.
PATIENCE = 900


def device_of(backend: str) -> torch.device:
    return torch.device("cuda" if backend == "triton" and ON_GPU else "cpu")


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(autouse=True)
def few_kept_axes(monkeypatch) -> None:
    """A tiny model has about as many channels as PCA leaves on their axes: none would be turned."""
    from dotresize.narrow import principal

    monkeypatch.setitem(principal.pca.__kwdefaults__, "kept_axes", 4)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Tiny models gain nothing from threads, and two test processes share the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# What a config must say besides, to be tiny.
_OF_KIND = {
    "opt": {"ffn_dim": 40, "word_embed_proj_dim": 24, "init_std": 0.3},
    "gpt2": {"n_inner": 40},
    "granite": {"residual_multiplier": 0.7, "embedding_multiplier": 3.0, "logits_scaling": 2.0},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 20},
}


# Rotations scaled as in Llama 3.1, for a tiny context.
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def tiny_model(kind: str = "llama", *, tied: bool = True, dtype=torch.float32, **changes):
    """A random model of 3 layers and width 24, its norms and biases not at their initial values."""
    import transformers

    choices = {
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": 259,
        "max_position_embeddings": 256,
        "tie_word_embeddings": tied,
        "initializer_range": 0.3,
        "bos_token_id": None,
        "eos_token_id": 256,
        "pad_token_id": 256,
    }
    config = transformers.AutoConfig.for_model(kind, **(choices | _OF_KIND.get(kind, {}) | changes))
    model = transformers.AutoModelForCausalLM.from_config(config, experts_implementation="eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                parameter.normal_(std=0.3)
    return model.to(dtype).eval()


@pytest.fixture(scope="session")
def model_directory(tmp_path_factory: pytest.TempPathFactory):
    """A tiny tied Llama with a byte-level tokenizer, saved as a plain checkpoint."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_model().save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>"
    ).save_pretrained(folder)
    return folder


def pieces_tokenizer(size: int = 320, prefix: str = "first"):
    """A tokenizer like Llama 2's: merges of characters, bytes for the rest, BOS in front."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, processors, trainers
    from tokenizers.pre_tokenizers import Metaspace

    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = Metaspace(prepend_scheme=prefix, split=False)
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(["hello world, it is new and a dash " * 20], trainer)
    described = json.loads(tokenizer.to_str())
    # A real one has only its first three tokens marked as special.
    described["added_tokens"] = described["added_tokens"][:3]
    tokenizer = Tokenizer.from_str(json.dumps(described))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory):
    """Some text of CPython's own, about 20 kB."""
    from pydoc_data import topics

    path = tmp_path_factory.mktemp("texts") / "topics.txt"
    path.write_text(topics.topics["assignment"] + topics.topics["formatstrings"], encoding="utf-8")
    return path


@pytest.fixture
def arguments(model_directory, text_file, tmp_path):
    """A complete small compress command; the output directory is the third word."""
    small = ["--window", "32", "--windows", "8", "--eval-windows", "4", "--quiet"]
    return [
        *("compress", str(model_directory), str(tmp_path / "out")),
        *("--width", "16", "--calibration", str(text_file), "--eval", str(text_file)),
        *small,
    ]


def fails(argv: list[str], capsys: pytest.CaptureFixture, *, code: int = 2) -> str:
    """Runs a command that must fail in one line; returns the line."""
    from dotresize.cli import main

    try:
        returned = main(argv)
    except SystemExit as stop:
        returned = stop.code
    captured = capsys.readouterr()
    assert returned == code, captured.err
    assert captured.out == ""
    assert captured.err.count("\n") == 1, captured.err
    assert captured.err.startswith("dotresize: ")
    assert "Traceback" not in captured.err
    return captured.err


def copy_of(model_directory: Path, folder: Path) -> Path:
    shutil.copytree(model_directory, folder)
    return folder


@pytest.fixture
def run_python():
    """Runs code in a new interpreter at the repository root, without the interpreter of Triton."""
    import subprocess
    import sys

    def run(code: str, *arguments: str, **environment: str):
        clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        return subprocess.run(
            [sys.executable, "-c", code, *arguments],
            cwd=Path(__file__).parent.parent,
            env=clean | environment,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )

    return run


@pytest.fixture
def run_at_simd_level(run_python):
    """Runs code with the C++ kernels forced to a SIMD level; skips where the machine lacks it."""
    report = (
        "from dotresize import backends\n"
        "found = backends()['cpp']\n"
        "print(found.get('simd'), found.get('reason'))\n"
        "if not found['available']: raise SystemExit\n"
    )

    def run(code: str, level: str) -> None:
        done = run_python(report + code, DOTRESIZE_SIMD=level)
        assert done.returncode == 0, done.stderr
        if f"{level} None" not in done.stdout:
            assert "this machine runs" in done.stdout
            pytest.skip(f"this machine has no {level}")

    return run
