"""Reading and writing model directories: safetensors and GGUF only, nothing executable.

An output directory appears whole or not at all: it is written beside its final name and renamed.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dotresize import distributed
from dotresize.baselines.adapters import is_sliced, load_sliced
from dotresize.checkpoint.source import config_of, first_line, locate, one_line, snapshot
from dotresize.checkpoint.uneven import load_uneven
from dotresize.merging.checkpoint import is_merged, load_merged
from dotresize.models import architecture_of, supported
from dotresize.models.bfloat16 import is_half_on_cpu, set_types
from dotresize.models.causal_lm import CausalLM
from dotresize.models.given import causal_model
from dotresize.models.layer_widths import ENTRY, set_inner_widths, take_inner_widths
from dotresize.models.torch_settings import usual_settings
from dotresize.offload.headers import check_stored, shards
from dotresize.offload.offloaded_model import open_model
from dotresize.ops.arguments import shown

# Directories being written; beside the output, for the final rename to be one step.
_PARTIAL = ".dotresize-partial-"


def load_with_tokenizer(
    source: str, device: torch.device, *, to_narrow: bool, work: Path | None = None
) -> tuple[CausalLM, Any]:
    """Return model and tokenizer from a directory, a .gguf file or a hub id.

    Weights keep their dtype on a GPU, and become float32 on a CPU, as GGUF weights do everywhere;
    the config says in which type they are stored. With a folder to ``work`` in,
    the model of a directory stays in its files (dotresize.offload). Raises ValueError in one line
    for what is missing or damaged, and, if it is ``to_narrow``, for an unsupported architecture.
    """
    transformers: Any = importlib.import_module("transformers")
    transformers.utils.logging.set_verbosity_error()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # each retry is a warning
    where, options = locate(source)
    own = None if to_narrow else _own_format(Path(where))
    if own is not None:
        with one_line(source):
            tokenizer = transformers.AutoTokenizer.from_pretrained(where, **options)
            model = own(Path(where))
            _place(model.module, device)
            return model, tokenizer
    if not sys.stderr.isatty() or os.environ.get("TQDM_DISABLE"):
        transformers.utils.logging.disable_progress_bar()
    with one_line(source):
        config = config_of(where, options)
    if to_narrow:
        architecture_of(config)
    if getattr(config, "transformers_weights", None) is not None:
        raise ValueError(
            f"model {source}: config names a weights file of its own (transformers_weights)"
        )
    widths = _inner_widths(source, config)
    if work is not None:
        with one_line(source):
            tokenizer = transformers.AutoTokenizer.from_pretrained(where, **options)
            return open_model(Path(where), config, device, work, widths), tokenizer
    if widths is not None:
        with one_line(source):
            tokenizer = transformers.AutoTokenizer.from_pretrained(where, **options)
            model = load_uneven(_downloaded(where), config, widths)
            _place(model.module, device)
            return model, tokenizer
    with one_line(source):
        is_gguf = "gguf_file" in options
        if not is_gguf and Path(where).is_dir():
            if to_narrow:
                check_stored(Path(where), config)
            else:
                shards(Path(where))
        weights = (
            {"dtype": torch.float32} if is_gguf else {"dtype": "auto", "use_safetensors": True}
        )
        module, problems = transformers.AutoModelForCausalLM.from_pretrained(
            where, config=config, output_loading_info=True, **weights, **options
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(where, **options)
    check_complete(source, problems)
    _forget_quantisation(module)
    if to_narrow:
        module = causal_model(module)
    _place(module, device)
    return CausalLM.in_memory(module.eval()), tokenizer


def _place(module: Any, device: torch.device) -> None:
    """Move a model to a device, where it computes as ``models.bfloat16.in_float32`` says."""
    module.to(device)
    if is_half_on_cpu(module):
        set_types(module, {}, torch.float32)


def check_complete(source: str, problems: dict[str, Any]) -> None:
    """Raise ValueError for weights that transformers found missing, or of another shape.

    problems: what ``from_pretrained`` returns with ``output_loading_info``.
    """
    for kind, names in problems.items():
        if names and kind != "unexpected_keys":
            first = sorted(map(str, names))[0]
            raise ValueError(f"model {source}: {kind.replace('_', ' ')}: {first}")


def outline(source: str) -> CausalLM:
    """Return the model of a directory, a .gguf file or a hub id as its config has it.

    Its parameters have shapes and no memory: what the config alone can refuse is refused before
    weights are read. Raises ValueError as ``load_with_tokenizer`` does.
    """
    config = read_config(source)
    where, _ = locate(source)
    widths = None if config is None else _inner_widths(source, config)
    if config is None:
        kind = json.loads((Path(where) / "config.json").read_text(encoding="utf-8"))["model_type"]
        raise ValueError(f"model {source}: is of type {kind}; give the model it was made of")
    architecture_of(config)
    transformers: Any = importlib.import_module("transformers")
    if (Path(where) / "config.json").is_file():
        with one_line(
            source
        ):  # a config of a million layers would take minutes even without memory
            check_stored(Path(where), config, widths)
    with one_line(source), torch.device("meta"):
        module = transformers.AutoModelForCausalLM.from_config(config)
        if widths is not None:
            set_inner_widths(architecture_of(config), module, widths)
    model = CausalLM.in_memory(module)
    model.architecture.check(module)
    return model


def read_config(source: str) -> Any:
    """Return a model's config, its weights unread; None for a directory in a format of ours."""
    transformers: Any = importlib.import_module("transformers")
    transformers.utils.logging.set_verbosity_error()
    where, options = locate(source)
    if _own_format(Path(where)) is not None:
        return None
    with one_line(source):
        return config_of(where, options)


def is_quantised(source: str, parameters: int) -> bool:
    """Return whether a model's parameters are stored in fewer than 16 bits, most of them.

    parameters: how many it has.
    """
    where, options = locate(source)
    if "gguf_file" in options:  # whose size says so at once: to parse it takes seconds
        size = (Path(where) / options["gguf_file"]).stat().st_size
        return size < 15 / 8 * parameters
    config = Path(where) / "config.json"
    try:
        return "quantization_config" in json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # a hub id: transformers says what it reads
        return False


def parts_of(source: str) -> tuple[Path, Any, Any]:
    """Return folder, config and tokenizer of a model directory, its weights unread.

    ValueError where it is none that plain transformers loads, unless its config names a width for
    each feed-forward.
    """
    folder = snapshot(Path(source))
    if not folder.is_dir():
        raise ValueError(f"model {source}: must be a directory")
    config = read_config(source)
    if config is None:
        raise ValueError(f"model {source}: is no plain checkpoint, which plain transformers loads")
    transformers: Any = importlib.import_module("transformers")
    where, options = locate(source)
    with one_line(source):
        if not shards(folder):
            raise ValueError("has no safetensors files")
        return folder, config, transformers.AutoTokenizer.from_pretrained(where, **options)


@usual_settings()
def load(folder: str | Path) -> Any:
    """Return a model that plain transformers cannot load, from the directory that holds it.

    These are models with a map per location (baselines/adapters.py), with merged feed-forwards
    (merging/checkpoint.py), and with feed-forwards of a width for each layer
    (models/layer_widths.py). ValueError where the directory holds none of them.

    Example:
        >>> from dotresize import load
        >>> try:
        ...     load("a-plain-checkpoint")
        ... except ValueError as error:
        ...     print(error)
        model a-plain-checkpoint: has no format of ours; plain transformers loads others
    """
    if not isinstance(folder, (str, Path)):
        raise ValueError(f"folder is {shown(folder)}: must be a directory's name")
    found = snapshot(Path(folder))
    own = _own_format(found)
    if own is not None:
        with one_line(str(folder)):
            return own(found).module
    if found.is_dir() and (found / "config.json").is_file():
        config = read_config(str(folder))
        widths = _inner_widths(str(folder), config)
        if widths is not None:
            with one_line(str(folder)):
                return load_uneven(found, config, widths).module
    raise ValueError(f"model {folder}: has no format of ours; plain transformers loads others")


def _downloaded(where: str) -> Path:
    """Return a directory, or the one that holds what the hub has under an id."""
    if Path(where).is_dir():
        return Path(where)
    hub: Any = importlib.import_module("huggingface_hub")  # transformers' own
    return Path(hub.snapshot_download(where, allow_patterns=["*.safetensors", "*.json"]))


def _inner_widths(source: str, config: Any) -> list[int] | None:
    """Take the feed-forward width of every layer off a config that names them; see there."""
    if not config.to_dict().get(ENTRY) or config.model_type not in supported():
        return None  # other families read the entry themselves
    with one_line(source):
        return take_inner_widths(architecture_of(config), config)


def _own_format(folder: Path) -> Callable[[Path], CausalLM] | None:
    """Return what loads a directory of ours; None for others."""
    if is_sliced(folder):
        return load_sliced
    return load_merged if is_merged(folder) else None


def _forget_quantisation(model: Any) -> None:
    """Take the old format's name off a dequantised model, which could not be saved with it."""
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    if getattr(model, "hf_quantizer", None) is not None:
        model.hf_quantizer = None
    model.is_quantized = False


@usual_settings()
def save(model: Any, folder: str | Path) -> None:
    """Write a model that ``compress`` has returned into a new directory, whole or not at all.

    ``save_pretrained`` does the same for a plain checkpoint. It knows nothing of feed-forwards of
    a width for each layer, which this names in the config; ``load`` reads what is written.

    Raises:
        ValueError: no transformers model of a supported family, or one with a map for each
            location, whose directories the command line writes; a directory that is not empty.

    Example:
        >>> import tempfile, torch, transformers
        >>> config = transformers.LlamaConfig(
        ...     vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=4,
        ...     num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True)
        >>> from dotresize import compress, load, save
        >>> model = transformers.LlamaForCausalLM(config)
        >>> tokens = torch.randint(0, 100, (8, 32))
        >>> narrow, report = compress(model, tokens, ff_width=48, layer_widths=True)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(narrow, folder)
        ...     again = load(folder) if report["feed_forward"]["layers"] else narrow
        >>> torch.equal(again(tokens).logits, narrow(tokens).logits)
        True
    """
    if not isinstance(folder, (str, Path)):
        raise ValueError(f"folder is {shown(folder)}: must be a directory's name")
    own = CausalLM.in_memory(causal_model(model))
    path = check_output(folder)
    if path.is_dir():
        path.rmdir()
    write_whole(path, own.save)


def check_output(out: str | Path) -> Path:
    """Raise ValueError unless ``out`` can become a new directory.

    It must be absent or empty, and its parent writable.
    """
    path = Path(out)
    try:
        if path.is_symlink():
            raise ValueError(f"output {path}: must not be a symbolic link")
        if path.is_dir() and any(path.iterdir()):
            raise ValueError(f"output {path}: the directory exists and is not empty")
        if path.exists() and not path.is_dir():
            raise ValueError(f"output {path}: a file of that name exists")
        parent = path.absolute().parent
        while not parent.exists():
            parent = parent.parent
        # Nothing but trying says whether a directory of that name can be made there.
        with tempfile.TemporaryDirectory(prefix=_PARTIAL, dir=parent) as probe:
            (Path(probe) / path.name).mkdir()
    except OSError as error:
        raise ValueError(f"output {path}: {error.strerror}") from None
    return path


def write_whole(out: str | Path, fill: Callable[[Path], None]) -> None:
    """Make directory ``out`` with what ``fill`` writes into the directory it is given.

    Either all of it appears under the final name or nothing does. Of several processes the first
    writes.
    """
    if distributed.rank():
        return
    path = check_output(out)
    path.absolute().parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=_PARTIAL, dir=path.absolute().parent))
    try:
        fill(partial)
        settle(partial, *partial.rglob("*"))
        partial.rename(path.absolute())
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def settle(*paths: Path) -> None:
    """Give files the permissions that new ones have, and wait until they are on the disk."""
    umask = os.umask(0)
    os.umask(umask)
    for path in paths:
        path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)
        if path.is_file():
            with path.open("rb") as handle:
                os.fsync(handle.fileno())


def write_directory(model: CausalLM, tokenizer: Any, folder: Path) -> None:
    """Write a complete model directory: config, weights, generation config, tokenizer."""
    try:
        model.save(folder)
        tokenizer.save_pretrained(folder)
    except OSError:
        raise
    except Exception as error:  # the Rust writers report a full disk by errors of their own
        raise OSError(first_line(error)) from error
