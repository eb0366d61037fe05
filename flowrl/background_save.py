"""One checkpoint at a time, written by a thread while training goes on.

A thread and not a process: the copy in host memory is written as it lies, and the other threads go
on, since safetensors 0.8 and Python release the interpreter's lock while they write (another thread
then waited 0.04 s at the longest).
"""

import threading
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

from torch import Tensor, nn
from transformers import PreTrainedModel


class BackgroundSave:
    """At most one write is in flight; its error is raised in the thread that asks."""

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._thread: threading.Thread | None = None  # None: nothing is in flight
        self._path = Path()
        self._is_saved = False
        self._error: OSError | ValueError | RuntimeError | None = None

    def start(self, path: Path, write: Callable[[], None]) -> None:
        """Call `write`, which makes the checkpoint `path`, once the write before it has ended."""
        self.wait()
        self._path, self._is_saved, self._error = path, False, None
        # A daemon: a write that hangs must not keep the process from ending.
        self._thread = threading.Thread(target=self._run, args=(write,), name="save", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise the error of a write that failed; one that goes on is not waited for."""
        if self._thread is not None and not self._thread.is_alive():
            self._finish()

    def wait(self) -> None:
        """Return when nothing is being written.

        Raises the error of a write that failed, and TimeoutError for one that takes longer than
        `timeout_s`, which is then given up.
        """
        if self._thread is None:
            return
        self._thread.join(self.timeout_s)
        if not self._thread.is_alive():
            self._finish()
            return
        self._thread = None  # whoever asks again is not held up a second time
        raise TimeoutError(
            f"checkpoint {self._path} is not written after {self.timeout_s:g} s; the earlier "
            "checkpoints are whole: see what holds up the disk, raise "
            "actor.checkpoint.async_save_timeout_s, or set actor.checkpoint.async_save=false"
        )

    def _run(self, write: Callable[[], None]) -> None:
        try:
            write()
        except (OSError, ValueError, RuntimeError) as error:
            self._error = error
        else:
            self._is_saved = True

    def _finish(self) -> None:
        self._thread = None
        error, self._error = self._error, None  # its frames hold what was to be written
        if error is not None:
            raise error
        if not self._is_saved:  # another error, which Python has shown when it ended the thread
            raise RuntimeError(
                f"checkpoint {self._path} was not saved, since its thread ended with the error "
                "above; the earlier checkpoints are whole"
            )


def host_copies(
    model: PreTrainedModel, tensors: dict[str, Tensor]
) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """Copies of a model and of tensors in host memory; what shares memory there shares it here."""
    copies: dict[object, Tensor] = {}

    def copy(tensor: Tensor) -> Tensor:
        key = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if key not in copies:  # a float32 weight is its own master
            copies[key] = tensor.detach().to("cpu", copy=True)
        return copies[key]

    known: dict[int, object] = {  # deepcopy takes these for copies that it has made already
        id(parameter): nn.Parameter(copy(parameter), requires_grad=False)
        for parameter in model.parameters()
    }
    known |= {id(buffer): copy(buffer) for buffer in model.buffers()}
    return deepcopy(model, known), {name: copy(tensor) for name, tensor in tensors.items()}
