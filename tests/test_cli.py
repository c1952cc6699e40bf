"""The command line as a user runs it: results, exit codes, one line per mistake."""

from __future__ import annotations

import functools
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import PATIENCE, copy_of, fails

import dotresize
from dotresize.cli import main

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parent.parent


def test_compress_makes_a_directory_that_plain_transformers_loads(arguments, run_python, capsys):
    out = Path(arguments[2])
    assert main([*arguments, "--method", "dot"]) == 0
    printed = capsys.readouterr().out
    assert "transport + refit" in printed
    assert "perplexity, topics" in printed
    names = {path.name for path in out.iterdir()}
    assert {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "dotresize.json",
        "README.md",
    } < names
    assert not list(out.parent.glob("*partial*"))
    report = json.loads((out / "dotresize.json").read_text())
    widths = {"asked": 16.0, "energy": None, "old": 24, "new": 16}
    assert report["width"] == widths
    assert report["map"]["marginal_error"] < 1e-8
    assert report["settings"]["seed"] == 0
    assert report["seconds"]["calibration"] > 0
    assert report["peak_memory_bytes"]["host"] > 1e6
    assert report["versions"]["torch"] == torch.__version__
    card = (out / "README.md").read_text()
    assert "base_model" not in card  # a folder's name is no hub id
    assert "optimal transport of its channels" in card
    assert str(out.parent) not in card
    done = run_python(
        "import sys, torch\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "ids = AutoTokenizer.from_pretrained(sys.argv[1])('some text', return_tensors='pt')\n"
        "assert 'dotresize' not in sys.modules\n"
        "print(model.config.hidden_size, model(**ids).logits.shape)",
        str(out),
    )
    assert done.stdout.startswith("16 torch.Size([1, 9, 259])"), done.stderr


def test_two_runs_give_identical_files(arguments, tmp_path):
    again = [*arguments]
    again[2] = str(tmp_path / "again")
    assert main(arguments) == 0
    assert main(again) == 0
    one, two = (Path(a[2]) / "model.safetensors" for a in (arguments, again))
    assert one.read_bytes() == two.read_bytes()
    other = [*arguments, "--seed", "1"]
    other[2] = str(tmp_path / "other")
    assert main(other) == 0
    assert (Path(other[2]) / "model.safetensors").read_bytes() != one.read_bytes()


def test_compare_prints_every_method(arguments, capsys):
    assert main([*arguments, "--compare"]) == 0
    heading = capsys.readouterr().out.splitlines()[0].split()
    assert heading == ["dense", "magnitude", "PCA", "transport", "transport", "+", "refit"]
    report = json.loads((Path(arguments[2]) / "dotresize.json").read_text())
    assert [row["method"] for row in report["compared"]] == ["dense", "magnitude", "pca", "dot"]


def test_eval_agrees_with_the_table(arguments, text_file, capsys):
    assert main(arguments) == 0
    report = json.loads((Path(arguments[2]) / "dotresize.json").read_text())
    capsys.readouterr()
    small = ["--window", "32", "--eval-windows", "4", "--quiet"]
    assert main(["eval", arguments[2], str(text_file), *small]) == 0
    name, value = capsys.readouterr().out.split()
    assert name == "topics"
    assert float(value) == pytest.approx(report["perplexity"]["topics"], rel=1e-4)


def test_text_as_it_comes(arguments, capsys, tmp_path):
    """A byte-order mark, line separators inside JSON strings, two files of one name."""
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + b"some words " * 30)
    records = [json.dumps({"text": "one\u2028two\x0bthree " * 20}, ensure_ascii=False)] * 2
    (tmp_path / "a.jsonl").write_text("\n".join(records) + "\n", encoding="utf-8")
    arguments += ["--calibration", str(tmp_path / "a.jsonl")]
    arguments += ["--eval", str(tmp_path / "a.txt"), str(tmp_path / "a.jsonl")]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert f"perplexity, {tmp_path / 'a.txt'}" in printed
    assert f"perplexity, {tmp_path / 'a.jsonl'}" in printed


def test_eval_refuses_broken_weights(model_directory, text_file, tmp_path, capsys):
    from safetensors.torch import load_file, save_file

    bad = copy_of(model_directory, tmp_path / "nan")
    weights = load_file(bad / "model.safetensors")
    weights["model.norm.weight"][3] = torch.nan
    save_file(weights, bad / "model.safetensors", metadata={"format": "pt"})
    message = fails(["eval", str(bad), str(text_file), "--quiet"], capsys)
    assert "model.norm.weight of the model holds NaN" in message


def test_several_chat_templates_are_saved(arguments, tmp_path, model_directory):
    talkative = copy_of(model_directory, tmp_path / "talkative")
    (talkative / "additional_chat_templates").mkdir()
    (talkative / "additional_chat_templates" / "tool.jinja").write_text("{{ messages }}")
    (talkative / "chat_template.jinja").write_text("{{ messages[0] }}")
    arguments[1] = str(talkative)
    assert main(arguments) == 0
    assert (Path(arguments[2]) / "additional_chat_templates" / "tool.jinja").is_file()


def test_info(capsys):
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    assert "cpp     available" in printed
    assert "transformers" in printed
    assert main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["dotresize"] == dotresize.__version__
    assert found["backends"]["cpp"]["available"] is True
    assert found["versions"]["torch"] == torch.__version__


def test_resume_of_a_finished_output(arguments, capsys):
    assert main(arguments) == 0
    stamp = (Path(arguments[2]) / "model.safetensors").stat().st_mtime_ns
    assert main([*arguments, "--resume"]) == 0
    assert (Path(arguments[2]) / "model.safetensors").stat().st_mtime_ns == stamp
    capsys.readouterr()
    assert "another ridge" in fails([*arguments, "--resume", "--ridge", "0.5"], capsys)
    (Path(arguments[2]) / "model.safetensors").unlink()
    assert "its weights are missing" in fails([*arguments, "--resume"], capsys)
    (Path(arguments[2]) / "dotresize.json").write_text("[1]")
    assert "not the record of a finished run" in fails([*arguments, "--resume"], capsys)


def start(arguments: list[str], **options) -> subprocess.Popen:
    clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    clean["OMP_NUM_THREADS"] = "1"  # as this process has, whose results are compared
    return subprocess.Popen(
        [sys.executable, "-m", "dotresize", *arguments],
        cwd=ROOT,
        env=clean,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def test_no_room_while_saving(arguments):
    """Files may not grow past 16 kB: the weights do not fit, as on a full disk."""
    limit = (16 * 1024, 16 * 1024)
    arguments += ["--windows", "2", "--self-windows", "0"]  # what lies on disk meanwhile does fit
    process = start(arguments, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit))
    _, error = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1, error
    assert "Traceback" not in error
    assert error.strip().splitlines()[-1].startswith("dotresize: ")
    assert not Path(arguments[2]).exists()
    assert "out.partial is kept, --resume goes on from it" in error
    assert not list(Path(arguments[2]).parent.rglob(".dotresize-partial*"))
    assert main([*arguments, "--resume"]) == 0


def test_no_room_for_the_tokenizer(arguments, tmp_path, model_directory):
    """The weights fit, a large tokenizer does not; its writer has an error type of its own."""
    fat = copy_of(model_directory, tmp_path / "fat")
    path = fat / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["added_tokens"] += [
        {"id": i, "content": f"<extra {i}>"} | dict.fromkeys(flags, False)
        for i in range(257, 259)
        for flags in [("single_word", "lstrip", "rstrip", "normalized", "special")]
    ]
    tokenizer["added_tokens"][-1]["content"] = "x" * 400_000
    path.write_text(json.dumps(tokenizer))
    arguments[1] = str(fat)
    limit = (300_000, 300_000)
    process = start(arguments, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit))
    _, error = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1, error
    assert "Traceback" not in error
    assert "File too large" in error
    assert not Path(arguments[2]).exists()


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_interrupted(arguments, how):
    # A shell starts its background jobs, this test perhaps among them, with SIGINT ignored.
    wanted = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = start([*arguments, "--windows", "100000"], preexec_fn=wanted)
    try:
        assert "width 24 -> 16" in process.stderr.readline()
        time.sleep(0.5)
        process.send_signal(how)
        _, error = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
    assert process.returncode == 1, error
    assert "interrupted" in error
    assert "Traceback" not in error
    assert not Path(arguments[2]).exists()
    assert not list(Path(arguments[2]).parent.glob("*partial*"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_backend_that_cannot_run(arguments):
    process = start([*arguments, "--backend", "triton"])
    out, error = process.communicate(timeout=PATIENCE)
    assert process.returncode == 2
    assert error == (
        "dotresize: --backend 'triton' cannot run here: no CUDA or ROCm device is visible to "
        "torch\n"
    )
    assert out == ""


def write_gguf(path: Path, model_directory: Path) -> None:
    """The tiny model as a float32 GGUF file with its byte-level tokenizer."""
    import gguf
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoTokenizer

    config = AutoConfig.from_pretrained(model_directory)
    weights = load_file(model_directory / "model.safetensors")
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    tokens = AutoTokenizer.from_pretrained(model_directory).get_vocab()
    names = sorted(tokens, key=tokens.get)
    names += [f"<unused {i}>" for i in range(config.vocab_size - len(names))]
    writer.add_tokenizer_model("gpt2")
    names[-1] = "ab"  # a tokenizer of this kind must have a merge
    writer.add_token_list(names)
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(256)
    writer.add_bos_token_id(256)
    table = {"embed_tokens": "token_embd", "norm": "output_norm"}
    parts = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    for name, weight in weights.items():
        words = name.removeprefix("model.").removesuffix(".weight").split(".")
        if words[0] == "layers":
            target = f"blk.{words[1]}.{parts['.'.join(words[2:])]}"
        else:
            target = table[words[0]]
        writer.add_tensor(f"{target}.weight", weight.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf_model(arguments, tmp_path, model_directory, capsys):
    path = tmp_path / "tiny.GGUF"
    write_gguf(path, model_directory)
    arguments[1] = str(path)
    assert main(arguments) == 0, capsys.readouterr().err
    config = json.loads((Path(arguments[2]) / "config.json").read_text())
    assert config["hidden_size"] == 16
    assert "quantization_config" not in config
