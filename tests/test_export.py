"""``dotresize export``: what the file holds, read back by others' code, and what is refused."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from conftest import LLAMA3_ROPE, fails, pieces_tokenizer, tiny_model

from dotresize import compress, save
from dotresize.cli import main
from dotresize.models import architecture_of
from dotresize.models.layer_widths import set_inner_widths

gguf = pytest.importorskip("gguf")
pytestmark = pytest.mark.usefixtures("one_thread")

TEXTS = ["Hello world 1234", "  it's\n\nnew", "naïve dash", "", "a  b\tc"]


def saved(model, tokenizer, folder: Path) -> Path:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def bytes_tokenizer(model_directory):
    import transformers

    return transformers.AutoTokenizer.from_pretrained(model_directory)


def read(path: Path) -> tuple[dict, dict]:
    """Return the entries and the tensors of a file, these in float32."""
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {
        tensor.name: torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        for tensor in reader.tensors
    }
    return fields, tensors


def read_back(path: Path, config):
    """Return a transformers model made of a file's tensors, by the names that gguf gives them."""
    import transformers

    _, tensors = read(path)
    kept = gguf.GGUFReader(path).fields["general.architecture"].contents() == "qwen2"
    kind = gguf.MODEL_ARCH.QWEN2 if kept else gguf.MODEL_ARCH.LLAMA
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    state = model.state_dict()
    for name in state:
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        value = tensors[names.get_name(name, try_suffixes=(".weight", ".bias"))]
        part = name.split(".")[-2]
        if part in ("q_proj", "k_proj") and not kept:
            heads = value.view(-1, config.head_dim, *value.shape[1:])
            value = torch.cat([heads[:, 0::2], heads[:, 1::2]], 1).reshape(value.shape)
        state[name] = value.view(state[name].shape)
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state)
    return model


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama", {}),
        ("llama", {"tied": False, "attention_bias": True}),
        ("mistral", {"tied": False}),
        ("qwen2", {}),  # narrowed, its heads are wider than its residual: written as llama
        ("qwen2", {"num_attention_heads": 3, "num_key_value_heads": 1, "width": 24}),
    ],
)
def test_f32_has_the_logits_of_transformers(kind, changes, bytes_tokenizer, tmp_path):
    tokens = torch.randint(259, (4, 24))
    changes = dict(changes)
    width = changes.pop("width", 16 if changes.get("attention_bias") else 18)
    narrow, _ = compress(
        tiny_model(kind, **changes), tokens, width=width, ff_width=30, self_windows=0
    )
    folder = saved(narrow, bytes_tokenizer, tmp_path / "narrow")
    assert main(["export", str(folder), str(tmp_path / "n.gguf"), "--type", "f32", "--quiet"]) == 0
    fields, tensors = read(tmp_path / "n.gguf")
    assert fields["general.architecture"] == (
        "qwen2" if kind == "qwen2" and width == 24 else "llama"
    )
    # llama.cpp's qwen2 has no place for heads of another width.
    if fields["general.architecture"] == "qwen2":
        assert tensors["blk.0.attn_q.weight"].numel() == width * width
    back = read_back(tmp_path / "n.gguf", narrow.config)
    with torch.no_grad():
        assert torch.equal(back(tokens).logits, narrow(tokens).logits)


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2"])
def test_a_width_for_each_layer_is_written_as_deci(kind, bytes_tokenizer, tmp_path):
    """Every layer has its entry, and the tensors are those of the model."""
    model = tiny_model(kind)
    widths = [40, 32, 24]
    set_inner_widths(architecture_of(model.config), model, widths)
    save(model, tmp_path / "uneven")
    bytes_tokenizer.save_pretrained(tmp_path / "uneven")
    path = tmp_path / "n.gguf"
    command = ["export", str(tmp_path / "uneven"), str(path), "--type", "f32", "--quiet"]
    assert main(command) == 0
    fields, tensors = read(path)
    assert fields["general.architecture"] == "deci"
    assert fields["deci.feed_forward_length"] == widths
    assert fields["deci.attention.head_count"] == [model.config.num_attention_heads] * 3
    assert fields["deci.attention.head_count_kv"] == [model.config.num_key_value_heads] * 3
    for i, width in enumerate(widths):
        found = tensors[f"blk.{i}.ffn_down.weight"]
        assert found.shape == (24, width)
        assert torch.equal(found, model.model.layers[i].mlp.down_proj.weight)
        heads = tensors[f"blk.{i}.attn_k.weight"].view(-1, model.config.head_dim, 24)
        halves = torch.cat([heads[:, 0::2], heads[:, 1::2]], 1).reshape(-1, 24)
        assert torch.equal(halves, model.model.layers[i].self_attn.k_proj.weight)


@pytest.mark.parametrize("tied", [True, False])
def test_transformers_reads_it(tied, bytes_tokenizer, tmp_path):
    import transformers

    tokens = torch.randint(259, (4, 24))
    narrow, _ = compress(tiny_model(tied=tied), tokens, width=16, ff_width=30, self_windows=0)
    folder = saved(narrow, bytes_tokenizer, tmp_path / "narrow")
    assert main(["export", str(folder), str(tmp_path / "n.gguf"), "--type", "f32", "--quiet"]) == 0
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="n.gguf")
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, narrow(tokens).logits)


@pytest.mark.parametrize(
    ("kind", "most"), [("f16", 1e-3), ("bf16", 8e-3), ("q8_0", 0.02), ("q4_0", 0.2)]
)
def test_smaller_types(kind, most, bytes_tokenizer, tmp_path):
    model = tiny_model("mistral", hidden_size=32, intermediate_size=40)
    folder = saved(model, bytes_tokenizer, tmp_path / "model")
    path = tmp_path / f"{kind}.gguf"
    assert main(["export", str(folder), str(path), "--type", kind, "--quiet"]) == 0
    _, tensors = read(path)
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    assert types["blk.0.attn_norm.weight"] == "F32"
    assert types["blk.0.ffn_up.weight"] == kind.upper()
    # Rows of 40 are no blocks of 32.
    assert types["blk.0.ffn_down.weight"] == ("F16" if kind.startswith("q") else kind.upper())
    assert types["token_embd.weight"] == ("Q8_0" if kind == "q4_0" else kind.upper())
    want = model.model.layers[0].mlp.up_proj.weight.detach()
    found = tensors["blk.0.ffn_up.weight"].view(want.shape)
    assert (found - want).norm() < most * want.norm()
    assert not torch.equal(found, want)


def test_scaled_rotations(bytes_tokenizer, tmp_path):
    model = tiny_model(rope_parameters=LLAMA3_ROPE)
    folder = saved(model, bytes_tokenizer, tmp_path / "model")
    assert main(["export", str(folder), str(tmp_path / "m.gguf"), "--type", "f32", "--quiet"]) == 0
    fields, tensors = read(tmp_path / "m.gguf")
    plain = 5e5 ** -(torch.arange(0, 8, 2) / 8)
    torch.testing.assert_close(
        plain / tensors["rope_freqs.weight"], model.model.rotary_emb.inv_freq
    )
    assert fields["llama.rope.freq_base"] == 5e5


def test_what_old_checkpoints_store_besides(bytes_tokenizer, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = saved(tiny_model(), bytes_tokenizer, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert main(["export", str(folder), str(tmp_path / "m.gguf"), "--quiet"]) == 0
    assert not [name for name in read(tmp_path / "m.gguf")[1] if "rot" in name]


def test_several_chat_templates(bytes_tokenizer, tmp_path):
    bytes_tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    folder = saved(tiny_model(), bytes_tokenizer, tmp_path / "model")
    assert main(["export", str(folder), str(tmp_path / "m.gguf"), "--quiet"]) == 0
    fields, _ = read(tmp_path / "m.gguf")
    assert fields["tokenizer.chat_template"] == "{{ messages }}"
    assert fields["tokenizer.chat_template.tool_use"] == "{{ tools }}"


def test_byte_pairs(bytes_tokenizer, tmp_path):
    bytes_tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    folder = saved(tiny_model(), bytes_tokenizer, tmp_path / "model")
    assert main(["export", str(folder), str(tmp_path / "m.gguf"), "--quiet"]) == 0
    fields, _ = read(tmp_path / "m.gguf")
    assert fields["tokenizer.ggml.model"] == "gpt2"
    assert fields["tokenizer.ggml.pre"] == "gpt-2"
    pieces = fields["tokenizer.ggml.tokens"]
    assert len(pieces) == 259
    for piece, i in bytes_tokenizer.get_vocab().items():
        assert pieces[i] == piece
    assert pieces[258] == "[PAD258]"
    assert fields["tokenizer.ggml.add_bos_token"] is False
    assert fields["tokenizer.ggml.eos_token_id"] == bytes_tokenizer.eos_token_id
    assert fields["tokenizer.chat_template"] == bytes_tokenizer.chat_template
    assert fields["tokenizer.ggml.token_type"][256] == gguf.TokenType.CONTROL


def merged_by_score(text: str, pieces: list[str], scores: list[float]) -> list[int]:
    """What llama.cpp's SentencePiece does: the best scored neighbours first, then bytes."""
    known = {piece: i for i, piece in enumerate(pieces)}
    parts = list(text)
    while True:
        pairs = [
            (-scores[known[a + b]], i)
            for i, (a, b) in enumerate(itertools.pairwise(parts))
            if a + b in known
        ]
        if not pairs:
            break
        i = min(pairs)[1]
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    ids = []
    for part in parts:
        whole = known.get(part)
        ids += [known[f"<0x{b:02X}>"] for b in part.encode()] if whole is None else [whole]
    return ids


@pytest.mark.parametrize("prefix", ["first", "never"])
def test_pieces_with_scores(prefix, tmp_path):
    tokenizer = pieces_tokenizer(prefix=prefix)
    folder = saved(tiny_model(vocab_size=400), tokenizer, tmp_path / "model")
    assert main(["export", str(folder), str(tmp_path / "m.gguf"), "--quiet"]) == 0
    fields, _ = read(tmp_path / "m.gguf")
    assert fields["tokenizer.ggml.model"] == "llama"
    assert fields["tokenizer.ggml.add_bos_token"] is True
    assert fields["tokenizer.ggml.bos_token_id"] == 1
    assert fields["tokenizer.ggml.add_space_prefix"] is (prefix == "first")
    assert fields["tokenizer.ggml.token_type"][3:259] == [gguf.TokenType.BYTE] * 256
    for text in TEXTS[:1] + TEXTS[2:3] + ["hello new world", "it is a dash"]:
        spaced = ("▁" if prefix == "first" else "") + text.replace(" ", "▁")
        ids = merged_by_score(
            spaced, fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.scores"]
        )
        assert [1, *ids] == tokenizer(text)["input_ids"], text


def test_what_is_refused(model_directory, bytes_tokenizer, tmp_path, capsys):
    import transformers
    from tokenizers import pre_tokenizers

    out = str(tmp_path / "m.gguf")
    (tmp_path / "there.gguf").write_text("x")
    model = str(model_directory)
    gemma = str(saved(tiny_model("gemma"), bytes_tokenizer, tmp_path / "gemma"))
    odd = str(saved(tiny_model(), bytes_tokenizer, tmp_path / "odd"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(odd)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Punctuation(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.save_pretrained(odd)
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
    scaled = str(saved(tiny_model(rope_parameters=yarn), bytes_tokenizer, tmp_path / "yarn"))
    capsys.readouterr()
    for words, said in (
        ((model, out, "--type", "q5_k"), "--type q5_k: must be one of f32, f16, bf16, q8_0, q4_0"),
        ((model, str(tmp_path / "m.bin")), "must end in .gguf"),
        ((model, str(tmp_path / "there.gguf")), "exists"),
        ((model, str(tmp_path / "no" / "m.gguf")), "its directory does not exist"),
        ((str(tmp_path / "none"), out), "must be a directory"),
        ((gemma, out), "model type gemma: must be llama, mistral, qwen2; for others see llama.cpp"),
        ((odd, out), "splits text by Punctuation and ByteLevel of its own"),
        ((scaled, out), "rope_type yarn is not written here"),
    ):
        assert said in fails(["export", *words, "--quiet"], capsys), words
    assert sorted(p.name for p in tmp_path.iterdir()) == ["gemma", "odd", "there.gguf", "yarn"]


def test_nothing_is_left_of_a_file_that_fails(bytes_tokenizer, tmp_path, capsys):
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[3, 3] = 7e4
    folder = saved(model, bytes_tokenizer, tmp_path / "model")
    capsys.readouterr()
    said = fails(["export", str(folder), str(tmp_path / "m.gguf"), "--quiet"], capsys)
    assert "model.layers.2.mlp.up_proj.weight does not fit into f16" in said
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
