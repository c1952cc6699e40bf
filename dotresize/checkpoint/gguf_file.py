"""A model directory as one GGUF file, which llama.cpp runs.

Written are Llama and Mistral (architecture "llama") and Qwen2 ("qwen2"), with tokenizer and chat
template, a tensor at a time, so that no more than one is in memory. Names and order of the entries
are those of llama.cpp's own converter. Any of them whose layers have feed-forwards of different
widths is written as "deci": the same function, with an entry for every layer.

llama.cpp's "llama" and "deci" rotate neighbouring pairs of channels where transformers rotates the
two halves of a head: rows (and biases) of queries and keys are interleaved,

    row 2 i + j of a head  <-  row i + j d / 2,    i < d / 2, j in {0, 1}.

Blocks of Q4_0 and Q8_0 are 32 numbers of a row. Rows that are no multiple of 32 stay in 16 bits,
and the table of a q4_0 file is in q8_0, as it is the head as well.
"""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors import safe_open
from torch import Tensor
from tqdm import tqdm

from dotresize import models
from dotresize.checkpoint import settle
from dotresize.checkpoint.gguf_vocabulary import CONVERTER, vocabulary
from dotresize.models.causal_lm import is_tied
from dotresize.models.layer_widths import differ, take_inner_widths
from dotresize.offload.headers import shards

# What --type accepts: the type of matrices, of the table, and llama.cpp's number for the file.
TYPES = {
    "f32": ("F32", "F32", "ALL_F32"),
    "f16": ("F16", "F16", "MOSTLY_F16"),
    "bf16": ("BF16", "BF16", "MOSTLY_BF16"),
    "q8_0": ("Q8_0", "Q8_0", "MOSTLY_Q8_0"),
    "q4_0": ("Q4_0", "Q8_0", "MOSTLY_Q4_0"),
}
SHAPES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2"}
# What old checkpoints store besides, and every reader computes.
_COMPUTED = ".rotary_emb.inv_freq"
BLOCK = 32


def check(out: str, kind: str) -> None:
    """Raise ValueError for a file that cannot be written, whatever the model."""
    if kind not in TYPES:
        raise ValueError(f"--type {kind}: must be one of {', '.join(TYPES)}")
    path = Path(out)
    if path.suffix.lower() != ".gguf":
        raise ValueError(f"output {out}: must end in .gguf")
    if path.exists() or path.is_symlink():
        raise ValueError(f"output {out}: exists")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"output {out}: its directory does not exist")
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise ValueError("export needs gguf: pip install 'dotresize[gguf]'") from None


def architecture_of(config: Any) -> str:
    """Return llama.cpp's architecture of a model.

    Its Qwen2 takes heads that are together as wide as the residual only; where the residual was
    narrowed, "llama" is the same function, which may have biases of queries, keys and values. So
    is "deci", which alone takes feed-forwards of different widths.
    """
    if differ(inner_widths(config)):
        return "deci"
    kind = SHAPES[config.model_type]
    whole = config.num_attention_heads * head_size(config) == config.hidden_size
    return kind if kind == "llama" or whole else "llama"


def inner_widths(config: Any) -> list[int]:
    """Return the feed-forward width of every layer."""
    family, config = models.architecture_of(config), copy.deepcopy(config)
    found = take_inner_widths(family, config)
    return found or [family.inner_width(config)] * config.num_hidden_layers


def check_config(config: Any) -> None:
    """Raise ValueError, naming the entry, for a model that has no form here."""
    kind = config.model_type
    if kind not in SHAPES:
        raise ValueError(
            f"model type {kind}: must be {', '.join(SHAPES)}; for others see llama.cpp's "
            "convert_hf_to_gguf.py, which takes layers of one width (compress --pad)"
        )
    rope = dict(config.rope_parameters)
    scaling = rope.get("rope_type", "default")
    own = architecture_of(config)
    known = ("default", "linear") if own == "qwen2" else ("default", "linear", "llama3")
    refused = {
        f"hidden_act {config.hidden_act}": config.hidden_act != "silu",
        f"rope_type {scaling}": scaling not in known,
        "partial_rotary_factor": rope.get("partial_rotary_factor", 1) != 1,
        "layers with sliding windows": kind == "qwen2"
        and "sliding_attention" in (getattr(config, "layer_types", None) or ()),
    }
    for name, given in refused.items():
        if given:
            raise ValueError(f"model: {name} is not written here; {CONVERTER}")


def write(folder: Path, config: Any, tokenizer: Any, out: Path, kind: str, name: str) -> None:
    """Write the model of a directory as a GGUF file, whole or not at all.

    Args:
        folder: with safetensors under transformers' names.
        out: the file, which does not exist.
        kind: one of ``TYPES``.
        name: of the model, for people.

    Raises:
        ValueError: a model or tokenizer that has no form here, damaged files, numbers too large
            for the type.
    """
    check_config(config)
    descriptor, partial = tempfile.mkstemp(prefix=".dotresize-partial-", dir=out.absolute().parent)
    os.close(descriptor)
    try:
        _write(folder, config, tokenizer, Path(partial), kind, name)
        settle(Path(partial))
        os.rename(partial, out)
    finally:
        Path(partial).unlink(missing_ok=True)


def _write(folder: Path, config: Any, tokenizer: Any, path: Path, kind: str, name: str) -> None:
    import gguf

    writer = gguf.GGUFWriter(path, architecture_of(config))
    try:
        writer.add_name(name)
        writer.add_file_type(gguf.LlamaFileType[TYPES[kind][2]])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        _add_config(writer, config)
        _add_vocabulary(writer, tokenizer, config)
        tensors = _Tensors(folder, config, kind)
        for target, shape, dtype in tensors.listed():
            bytes_shape = gguf.quant_shape_to_byte_shape(shape, dtype) if _packed(dtype) else shape
            stored = {"F32": numpy.float32, "F16": numpy.float16}.get(dtype.name, numpy.uint8)
            size = int(numpy.prod(bytes_shape)) * numpy.dtype(stored).itemsize
            writer.add_tensor_info(target, bytes_shape, numpy.dtype(stored), size, raw_dtype=dtype)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for array in tqdm(tensors, desc="write", unit="tensor", total=len(tensors), disable=None):
            writer.write_tensor_data(array)
    finally:
        writer.close()


def _add_config(writer: Any, config: Any) -> None:
    import gguf

    head = head_size(config)
    window = getattr(config, "sliding_window", None) if config.model_type == "mistral" else None
    # llama.cpp has no window there; up to that many tokens both are the same.
    writer.add_context_length(min(config.max_position_embeddings, window or 2**31))
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    inner = inner_widths(config)
    uneven = differ(inner)
    writer.add_feed_forward_length(inner if uneven else inner[0])
    for add, count in (
        (writer.add_head_count, config.num_attention_heads),
        (writer.add_head_count_kv, config.num_key_value_heads),
    ):
        add([count] * len(inner) if uneven else count)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    # Not the width divided by the heads, which readers take without these.
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope.get("rope_type") == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])


def _add_vocabulary(writer: Any, tokenizer: Any, config: Any) -> None:
    found = vocabulary(tokenizer, config.vocab_size)
    writer.add_tokenizer_model(found.model)
    writer.add_tokenizer_pre(found.rule or "default")
    writer.add_token_list(found.pieces)
    writer.add_token_types(found.kinds)
    if found.merges:
        writer.add_token_merges(found.merges)
    if found.scores:
        writer.add_token_scores(found.scores)
    writer.add_add_space_prefix(found.prefixed)
    # Without these llama.cpp takes tokens of its own for the beginning and the end of text.
    named = tokenizer.bos_token_id if found.first is None else found.first
    for add, token in (
        (writer.add_bos_token_id, _id(named, config.bos_token_id)),
        (writer.add_eos_token_id, _id(tokenizer.eos_token_id, config.eos_token_id)),
        (writer.add_unk_token_id, tokenizer.unk_token_id),
        (writer.add_pad_token_id, tokenizer.pad_token_id),
    ):
        if token is not None:
            add(token)
    writer.add_add_bos_token(found.first is not None)
    writer.add_add_eos_token(found.last is not None)
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, dict):
        template = [{"name": name, "template": text} for name, text in template.items()]
    if template:
        writer.add_chat_template(template)


def _id(token: int | None, otherwise: Any) -> int | None:
    """Return a token, or the first that a config names instead; None for none."""
    if token is not None:
        return token
    return otherwise[0] if isinstance(otherwise, (list, tuple)) else otherwise


def head_size(config: Any) -> int:
    """Return the channels of an attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


class _Tensors:
    """The tensors of a file in order, read one after the other as they are written."""

    def __init__(self, folder: Path, config: Any, kind: str) -> None:
        import gguf

        self._architecture = architecture_of(config)
        architecture = gguf.MODEL_ARCH[self._architecture.upper()]
        names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
        self._config, self._types = config, TYPES[kind]
        self._quantise, self._dtypes = gguf.quantize, gguf.GGMLQuantizationType
        self._entries: list[tuple[str, str, Path, tuple[int, ...]]] = []
        for path in shards(folder):
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - not a dictionary
                    tied = name == "lm_head.weight" and is_tied(config)
                    if tied or name.endswith(_COMPUTED):
                        continue
                    target = names.get_name(name, try_suffixes=(".weight", ".bias"))
                    if target is None:
                        raise ValueError(f"tensor {name} has no name in GGUF; {CONVERTER}")
                    shape = tuple(file.get_slice(name).get_shape())
                    self._entries.append((target, name, path, shape))
        self._entries.sort(key=lambda entry: _order(entry[0]))
        self._factors = _frequency_factors(config)

    def __len__(self) -> int:
        return len(self._entries) + (self._factors is not None)

    def listed(self) -> Iterator[tuple[str, tuple[int, ...], Any]]:
        """Yield name, shape and type of every tensor."""
        if self._factors is not None:
            yield "rope_freqs.weight", tuple(self._factors.shape), self._dtypes.F32
        for target, _, _, shape in self._entries:
            yield target, shape, self._dtype(target, shape)

    def __iter__(self) -> Iterator[numpy.ndarray]:
        if self._factors is not None:
            yield self._factors.numpy()
        for target, name, path, shape in self._entries:
            with safe_open(path, framework="pt") as file:
                weight = self._interleaved(name, file.get_tensor(name).float())
            if not torch.isfinite(weight).all():
                raise ValueError(f"weight {name} of the model holds NaN or Inf")
            dtype = self._dtype(target, shape)
            if dtype == self._dtypes.F16 and weight.abs().max() > 65504:
                raise ValueError(f"weight {name} does not fit into f16; give --type bf16 or f32")
            yield self._quantise(weight.contiguous().numpy(), dtype)

    def _dtype(self, target: str, shape: tuple[int, ...]) -> Any:
        if len(shape) == 1:  # norms and biases
            return self._dtypes.F32
        matrices, table, _ = self._types
        name = table if target in ("token_embd.weight", "output.weight") else matrices
        if name in ("Q4_0", "Q8_0") and shape[-1] % BLOCK:
            name = "F16"
        return self._dtypes[name]

    def _interleaved(self, name: str, weight: Tensor) -> Tensor:
        part = name.split(".")[-2]
        if self._architecture == "qwen2" or part not in ("q_proj", "k_proj"):
            return weight
        halves = weight.view(-1, 2, head_size(self._config) // 2, *weight.shape[1:])
        return halves.transpose(1, 2).reshape(weight.shape)


def _order(target: str) -> tuple[int, int, str]:
    """Return where a tensor lies in the file: embeddings, layers, the rest."""
    parts = target.split(".")
    if parts[0] == "blk":
        return 1, int(parts[1]), target
    return (0 if parts[0] == "token_embd" else 2), 0, target


def _packed(dtype: Any) -> bool:
    return dtype.name not in ("F32", "F16")


def _frequency_factors(config: Any) -> Tensor | None:
    """Return what llama.cpp divides each rotation's frequency by, where a config scales them."""
    if config.rope_parameters.get("rope_type") != "llama3":
        return None
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    size = head_size(config)
    steps = torch.arange(0, size, 2, dtype=torch.float32, device="cpu") / size
    return (config.rope_parameters["rope_theta"] ** -steps / scaled).float()
