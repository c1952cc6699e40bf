"""A narrowed checkpoint as GGUF: the names, shapes and head lengths that its readers ask for."""

from __future__ import annotations

import pytest
import torch
from conftest import tiny_model

from dotresize import compress

gguf = pytest.importorskip("gguf")
pytestmark = pytest.mark.usefixtures("one_thread")


def paired(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of q and k as GGUF's Llama has them: the two halves of a head's rotation interleaved."""
    halves = weight.view(heads, 2, weight.shape[0] // heads // 2, weight.shape[1])
    return halves.transpose(1, 2).reshape(weight.shape)


def write_gguf(model, path) -> None:
    """What llama.cpp's own converter writes of a Llama, without a tokenizer."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    # Not the width divided by the heads, which readers take without these.
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        kind = name.split(".")[-2]
        value = paired(weight, heads[kind]) if kind in heads else weight
        found = names.get_name(name, try_suffixes=(".weight",))
        assert found is not None, name
        writer.add_tensor(found, value.float().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("tied", [True, False])
def test_read_back_with_equal_logits(tied, tmp_path):
    import transformers

    tokens = torch.randint(259, (4, 24))
    narrow, _ = compress(tiny_model(tied=tied), tokens, width=16, ff_width=30)
    write_gguf(narrow, tmp_path / "narrow.gguf")
    fields = gguf.GGUFReader(tmp_path / "narrow.gguf").fields
    for key in ("key_length", "value_length"):
        assert fields[f"llama.attention.{key}"].contents() == narrow.config.head_dim == 8
    read = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="narrow.gguf", dtype=torch.float32
    )
    assert read.config.hidden_size == 16
    with torch.inference_mode():
        difference = read(input_ids=tokens).logits - narrow(input_ids=tokens).logits
    assert difference.abs().max() < 1e-4
