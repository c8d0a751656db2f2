"""An ONNX file run by onnxruntime: pictures in, float arrays out, on the device that was asked for.

The file is read once, and what is run is what its id names: a file that keeps its weights in other files is refused.
Every run has the same number of pictures, missing ones are blank: kernels are chosen alike, and what is computed for
a picture does not depend on how many are asked for at a time.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from util.extras import import_extra
from util.read import read_bytes

RUNTIME = "onnxruntime"
MAX_SIDE = 4096  # px of an input: what it says is believed no further
CUDA_BATCH = 8  # pictures of a run; on a CPU they run one by one, as more at a time gain nothing there
_FLOAT = "tensor(float)"
_EXTERNAL_FOLDER = "session.model_external_initializers_file_folder_path"
_QUIET = 4  # fatal errors alone: the others are raised too


class OnnxSession:
    """An ONNX file with one float input [batch, 3, H, W] of fixed H and W, whose batch is 1 or open.

    Attributes: file; id (the file's sha256); batch (pictures of a run); height and width (of the input, in pixels);
    metadata (the file's own, text by name).
    """

    def __init__(self, path: str | Path, device: torch.device | str = "cpu") -> None:
        """As many CPU threads as PyTorch has now.

        Raises FileNotFoundError, and ValueError naming the file if it cannot be run on `device` or takes another input.
        """
        self.file = Path(path)
        if not self.file.is_file():
            raise FileNotFoundError(f"no detector at {self.file}: an ONNX file is expected there")
        runtime = import_extra(RUNTIME, f"ONNX detectors ({self.file})")
        content = read_bytes(self.file, "detector")
        self.id = hashlib.sha256(content).hexdigest()
        self._errors = _errors_of(runtime)
        provider = _provider(self.file, runtime, torch.device(device))
        with self._named("is not an ONNX model that onnxruntime can read"):
            self._session = _open(runtime, content, provider)
            inputs = self._session.get_inputs()
            self.metadata: Mapping[str, str] = self._session.get_modelmeta().custom_metadata_map
        if self._session.get_providers()[0] != provider[0]:
            raise ValueError(f"{self.file} cannot be run on {device}: onnxruntime could not start {provider[0]}")
        shape = _input_shape(self.file, inputs)
        self._input_name = inputs[0].name
        self.height, self.width = shape[2], shape[3]
        self.batch = CUDA_BATCH if shape[0] != 1 and torch.device(device).type == "cuda" else 1

    @contextmanager
    def _named(self, what: str) -> Iterator[None]:
        """What onnxruntime raises inside becomes a ValueError of one line that begins with the file."""
        try:
            yield
        except self._errors as error:
            if "External data" in str(error):
                raise ValueError(
                    f"{self.file} keeps weights in another file, which its sha256 would not cover; "
                    "save it as one file (onnx.save without external data)"
                ) from error
            raise ValueError(f"{self.file} {what} ({' '.join(str(error).split())[-160:]})") from error

    def run(self, pixels: Sequence[np.ndarray]) -> list[list[np.ndarray]]:
        """pixels: n arrays [3, H, W] -> each picture's outputs without their batch dimension, in the file's order.

        Raises ValueError naming the file if it cannot be run, or gives numbers that are not finite.
        """
        found: list[list[np.ndarray]] = []
        for start in range(0, len(pixels), self.batch):
            part = pixels[start : start + self.batch]
            blobs = np.zeros((self.batch, 3, self.height, self.width), dtype=np.float32)
            blobs[: len(part)] = part
            with self._named("cannot be run by onnxruntime"):
                outputs = self._session.run(None, {self._input_name: blobs})
            self._check(outputs)
            found += [[output[row] for output in outputs] for row in range(len(part))]
        return found

    def _check(self, outputs: Sequence[Any]) -> None:
        for output in outputs:
            shape, kind = np.shape(output), np.asarray(output).dtype
            if kind.kind != "f" or len(shape) == 0 or shape[0] != self.batch:
                raise ValueError(
                    f"{self.file} gives {kind} {list(shape)}, expected are floats [{self.batch}, ...], a row a picture"
                )
            if not np.isfinite(output).all():
                raise ValueError(f"{self.file} gives NaN or infinite numbers")


def _open(runtime: ModuleType, content: bytes, provider: tuple[str, dict[str, Any]]) -> Any:
    """An InferenceSession: silent, with as many threads as PyTorch has, no file beside its own, and no other device."""
    options = runtime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
    options.log_severity_level = _QUIET
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # idle threads leave PyTorch's alone
    options.add_session_config_entry(_EXTERNAL_FOLDER, os.devnull)  # no file is found below it
    return runtime.InferenceSession(content, options, providers=[provider], enable_fallback=0)


def _provider(file: Path, runtime: ModuleType, device: torch.device) -> tuple[str, dict[str, Any]]:
    """onnxruntime's name of the device, and its options."""
    if device.type == "cpu":
        return "CPUExecutionProvider", {}
    name, known = "CUDAExecutionProvider", runtime.get_available_providers()
    if device.type != "cuda" or name not in known:
        raise ValueError(
            f"{file} cannot be run on {device}: the installed onnxruntime has {', '.join(known)}; "
            f"for CUDA install onnxruntime-gpu in place of onnxruntime, or choose --device cpu"
        )
    return name, {"device_id": device.index or 0}


def _input_shape(file: Path, inputs: Sequence[Any]) -> tuple[Any, ...]:
    """[batch, 3, H, W] of the only input; the batch may be a name."""
    if len(inputs) != 1:
        names = ", ".join(f"{each.name} {_shape_text(each.shape)}" for each in inputs) or "none"
        raise ValueError(f"{file} takes {len(inputs)} inputs ({names}), expected is one of shape [1, 3, H, W]")
    shape, kind = tuple(inputs[0].shape), inputs[0].type
    sides = shape[2:]
    is_fixed = (
        len(shape) == 4 and shape[1] == 3 and all(isinstance(side, int) and 0 < side <= MAX_SIDE for side in sides)
    )
    if not is_fixed or (isinstance(shape[0], int) and shape[0] != 1):
        raise ValueError(
            f"{file} takes an input of shape {_shape_text(shape)}, expected is a fixed size of at most {MAX_SIDE}: "
            "[1, 3, H, W] (YOLOX and YOLOv8: [1, 3, S, S], S a multiple of 32)"
        )
    if kind != _FLOAT:
        raise ValueError(f"{file} takes an input of type {kind}, expected is {_FLOAT} (32 bits)")
    return shape


def _shape_text(shape: Sequence[Any]) -> str:
    return f"[{', '.join(str(size) if isinstance(size, int) else '?' for size in shape)}]"


def _errors_of(runtime: ModuleType) -> tuple[type[Exception], ...]:
    """What onnxruntime raises: a dozen classes of its own without a common base; the last where a name is no text."""
    state = runtime.capi.onnxruntime_pybind11_state
    own = [each for each in vars(state).values() if isinstance(each, type) and issubclass(each, Exception)]
    return (*own, RuntimeError, ValueError)
