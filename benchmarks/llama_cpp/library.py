"""A prebuilt llama.cpp, called through ctypes: tokenise, predict, generate, quantise.

    npm install node-llama-cpp

brings libllama for Linux without compiling anything (3.22.1 was used). Only the heads of the
parameter structs are described here, which newer releases leave as they are; each struct is given
more room than any release needs, which the calling convention of x86-64 and arm64 Linux allows.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int8, c_int32, c_uint32, c_void_p
from pathlib import Path

import numpy
import torch
from torch import Tensor

# llama.h, enum llama_ftype.
FILE_TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 7, "q3_k_m": 12, "q4_k_m": 15}
_ROOM = 1024
_LOG = ctypes.CFUNCTYPE(None, c_int32, c_char_p, c_void_p)


class _Opaque(ctypes.Structure):
    """Parameters whose defaults are taken as they come."""

    _fields_ = (("rest", c_int8 * _ROOM),)


class _ContextParameters(ctypes.Structure):
    _fields_ = (
        ("n_ctx", c_uint32),
        ("n_batch", c_uint32),
        ("n_ubatch", c_uint32),
        ("rest", c_int8 * _ROOM),
    )


class _QuantizeParameters(ctypes.Structure):
    _fields_ = (("nthread", c_int32), ("ftype", c_int32), ("rest", c_int8 * _ROOM))


class _Batch(ctypes.Structure):
    _fields_ = (
        ("n_tokens", c_int32),
        ("token", POINTER(c_int32)),
        ("embd", POINTER(c_float)),
        ("pos", POINTER(c_int32)),
        ("n_seq_id", POINTER(c_int32)),
        ("seq_id", POINTER(POINTER(c_int32))),
        ("logits", POINTER(c_int8)),
    )


# What is called, as llama.h declares it: result, arguments.
_FUNCTIONS: dict[str, tuple[object, list[object]]] = {
    "llama_model_default_params": (_Opaque, []),
    "llama_model_load_from_file": (c_void_p, [c_char_p, _Opaque]),
    "llama_model_free": (None, [c_void_p]),
    "llama_model_get_vocab": (c_void_p, [c_void_p]),
    "llama_model_quantize_default_params": (_QuantizeParameters, []),
    "llama_model_quantize": (c_uint32, [c_char_p, c_char_p, POINTER(_QuantizeParameters)]),
    "llama_context_default_params": (_ContextParameters, []),
    "llama_init_from_model": (c_void_p, [c_void_p, _ContextParameters]),
    "llama_free": (None, [c_void_p]),
    "llama_set_n_threads": (None, [c_void_p, c_int32, c_int32]),
    "llama_get_memory": (c_void_p, [c_void_p]),
    "llama_memory_clear": (None, [c_void_p, c_bool]),
    "llama_batch_init": (_Batch, [c_int32, c_int32, c_int32]),
    "llama_batch_free": (None, [_Batch]),
    "llama_decode": (c_int32, [c_void_p, _Batch]),
    "llama_get_logits": (POINTER(c_float), [c_void_p]),
    "llama_vocab_n_tokens": (c_int32, [c_void_p]),
    "llama_tokenize": (
        c_int32,
        [c_void_p, c_char_p, c_int32, POINTER(c_int32), c_int32, c_bool, c_bool],
    ),
    "llama_version": (c_char_p, []),
    "llama_log_set": (None, [_LOG, c_void_p]),
}


class LlamaCpp:
    """The library, and the files that are run by it."""

    def __init__(self, folder: Path) -> None:
        """Load the library from its folder, beside which its backends lie."""
        mode = ctypes.RTLD_GLOBAL
        for name in ("libggml-base*.so", "libggml.*so", "libllama.*so"):
            for path in sorted(folder.glob(name)):
                library = ctypes.CDLL(str(path), mode=mode)
                if name.startswith("libggml."):
                    library.ggml_backend_load_all_from_path.argtypes = [c_char_p]
                    library.ggml_backend_load_all_from_path(str(folder).encode())
        self._call = library
        for name, (result, arguments) in _FUNCTIONS.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
        self.messages: list[str] = []
        self._log = _LOG(self._hear)  # kept: the library calls it later
        library.llama_log_set(self._log, None)
        library.llama_backend_init()

    def _hear(self, level: int, text: bytes, _: object) -> None:
        if level >= 3:  # warnings and errors
            self.messages.append(text.decode(errors="replace").strip())

    @property
    def version(self) -> str:
        return self._call.llama_version().decode()

    def quantise(self, source: Path, target: Path, kind: str, threads: int = 2) -> None:
        """Write a file's weights in another type, as llama-quantize does."""
        parameters = self._call.llama_model_quantize_default_params()
        parameters.nthread, parameters.ftype = threads, FILE_TYPES[kind]
        code = self._call.llama_model_quantize(
            str(source).encode(), str(target).encode(), ctypes.byref(parameters)
        )
        if code:
            raise RuntimeError(f"{source} cannot be written as {kind}: {self.messages[-2:]}")

    @contextmanager
    def opened(self, path: Path, *, length: int = 2048, threads: int = 2) -> Iterator[Model]:
        """Yield the model of a file, for texts of up to ``length`` tokens."""
        model = self._call.llama_model_load_from_file(
            str(path).encode(), self._call.llama_model_default_params()
        )
        if not model:
            raise RuntimeError(f"{path} does not load: {self.messages[-2:]}")
        parameters = self._call.llama_context_default_params()
        parameters.n_ctx = parameters.n_batch = parameters.n_ubatch = length
        context = self._call.llama_init_from_model(model, parameters)
        if not context:
            raise RuntimeError(f"{path}: no context: {self.messages[-2:]}")
        self._call.llama_set_n_threads(context, threads, threads)
        try:
            yield Model(self._call, model, context, length)
        finally:
            self._call.llama_free(context)
            self._call.llama_model_free(model)


class Model:
    """A model that has been opened."""

    def __init__(self, call: ctypes.CDLL, model: int, context: int, length: int) -> None:
        self._call, self._context, self._length = call, context, length
        self._vocabulary = call.llama_model_get_vocab(model)
        self._tokens = call.llama_vocab_n_tokens(self._vocabulary)

    def tokenise(self, text: str, *, special: bool = True) -> list[int]:
        """Return a text's token ids; special: with what the file says to put in front."""
        data = text.encode()
        room = len(data) + 16
        ids = (c_int32 * room)()
        count = self._call.llama_tokenize(
            self._vocabulary, data, len(data), ids, room, special, False
        )
        if count < 0:
            raise RuntimeError(f"the text has {-count} tokens, more than its bytes")
        return list(ids[:count])

    def logits(self, ids: list[int], *, first: int = 0, only_last: bool = False) -> Tensor:
        """Return logits of tokens, float32 (tokens, vocabulary); (1, vocabulary) of the last.

        first: position of the first of them; 0 forgets everything before.
        """
        if not 0 < len(ids) <= self._length:
            raise ValueError(f"{len(ids)} tokens: must be 1 to {self._length}")
        if first == 0:
            self._call.llama_memory_clear(self._call.llama_get_memory(self._context), True)
        batch = self._call.llama_batch_init(len(ids), 0, 1)
        try:
            batch.n_tokens = len(ids)
            for i, token in enumerate(ids):
                batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, first + i, 1
                batch.seq_id[i][0] = 0
                batch.logits[i] = int(not only_last or i == len(ids) - 1)
            if self._call.llama_decode(self._context, batch):
                raise RuntimeError("llama_decode failed")
            rows = 1 if only_last else len(ids)
            found = self._call.llama_get_logits(self._context)
            array = numpy.ctypeslib.as_array(found, shape=(rows, self._tokens))
            return torch.from_numpy(array.copy())
        finally:
            self._call.llama_batch_free(batch)

    def loss(self, window: Tensor) -> float:
        """Return the sum of next-token losses in a window, int64 (length,), its first given."""
        logits = self.logits(window.tolist())[:-1]
        return float(torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum"))

    def greedy(self, ids: list[int], count: int) -> tuple[list[int], float]:
        """Return the likeliest ``count`` tokens after a prompt, and tokens a second."""
        written = [int(self.logits(ids, only_last=True)[0].argmax())]
        start = time.perf_counter()
        while len(written) < count:
            position = len(ids) + len(written) - 1
            found = self.logits(written[-1:], first=position, only_last=True)
            written.append(int(found[0].argmax()))
        return written, (count - 1) / (time.perf_counter() - start)


def find() -> LlamaCpp:
    """Return the library of node-llama-cpp in ``node_modules``, or in DOTRESIZE_LLAMA_CPP."""
    given = os.environ.get("DOTRESIZE_LLAMA_CPP")
    folder = Path(given) if given else Path("node_modules/@node-llama-cpp/linux-x64/bins/linux-x64")
    if not list(folder.glob("libllama.*so")):
        raise SystemExit(
            f"{folder} holds no libllama: npm install node-llama-cpp, or set DOTRESIZE_LLAMA_CPP "
            "to the folder of a prebuilt one"
        )
    return LlamaCpp(folder.resolve())
