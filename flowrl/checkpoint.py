"""Checkpoints that survive a kill at any moment.

    run_dir/latest_checkpointed_iteration.txt   the step to resume from, as veRL writes it
    run_dir/checkpoints/global_step_N/
        hf/                           weights, configs and tokenizer for `from_pretrained`
        training_state.safetensors    float32 masters, Adam moments, step counts
        state.json                    everything else a resumed run needs

A checkpoint is written under a hidden name, flushed to the disk and renamed, so a folder named
global_step_N is whole from its first moment. No file is a pickle: reading one runs no code.
In a distributed run one process calls these functions, and a run directory has one writer, which
may be a thread (flowrl.background_save).
"""

import errno
import json
import logging
import os
import re
import shutil
import socket
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from flowrl.background_save import BackgroundSave, host_copies
from flowrl.tensor_file import TensorSpec, plan_tensor_file

CHECKPOINTS_FOLDER = "checkpoints"
LATEST_FILE = "latest_checkpointed_iteration.txt"
HF_FOLDER = "hf"
TENSORS_FILE = "training_state.safetensors"
STATE_FILE = "state.json"
# What a resumed run reads of the two.
STATE_KEYS = ("reference_fingerprint", "sampler", "lookahead")
TENSOR_KINDS = ("master", "exp_avg", "exp_avg_sq", "step")

STEP_NAME = re.compile(r"global_step_(\d+)")
PREVIOUS_NAME = re.compile(r"\.(global_step_(\d+))\.previous")
SCRATCH_NAME = re.compile(r"\..+\.tmp-(\d+)-(.+)")
# A scratch folder of another host cannot be asked whether its writer lives; no save takes a day.
STALE_AFTER_S = 24 * 3600

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint; `path` holds hf/, training_state.safetensors and state.json."""

    step: int
    path: Path

    @property
    def hf(self) -> Path:
        """The folder that `from_pretrained` loads."""
        return self.path / HF_FOLDER


def save_checkpoint(
    run_dir: Path,
    step: int,
    *,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tensors: dict[str, Tensor],
    state: dict[str, Any],
    keep: int,
    background: BackgroundSave | None = None,
) -> Path:
    """Write checkpoint `step` of a policy in this process; see save_folder.

    `tensors` have any shape and device; besides them and the weights at most a shard of 5 GB is
    held in memory. With `background` everything is copied to host memory first, so the caller may
    change it at once: 14 bytes per bfloat16 parameter with AdamW's state, 12 per float32 one, until
    all is written. Raises ValueError also for a tensor dtype that safetensors lacks.
    """
    file = plan_tensor_file({name: TensorSpec.of(tensor) for name, tensor in tensors.items()})
    if background is not None:
        background.wait()  # before the copies: two sets of them might not fit
        model, tensors = host_copies(model, tensors)

    def write(folder: Path) -> None:
        _save_hf(folder / HF_FOLDER, model, tokenizer)
        file.write(folder / TENSORS_FILE, tensors.items())

    return save_folder(run_dir, step, write, state, keep, background)


def save_folder(
    run_dir: Path,
    step: int,
    write: Callable[[Path], None],
    state: dict[str, Any],
    keep: int,
    background: BackgroundSave | None = None,
) -> Path:
    """Write checkpoint `step`, name it the latest, then remove older ones beyond `keep`.

    `write` puts hf/ and the training state into the folder that it is given. A step that exists is
    replaced, and checkpoints of later steps (those of a run that was resumed further back) are left
    alone. With `background` all of it happens in that one's thread, which also keeps the OSError.
    Returns the folder of the checkpoint.

    Raises ValueError for a negative step, keep < 1 or a state that JSON would change, and OSError
    when the disk refuses; the earlier checkpoints are whole in every case.
    """
    if step < 0 or keep < 1:
        raise ValueError(f"step = {step}, keep = {keep}: a step is >= 0 and at least 1 is kept")
    state_text = _encode_state(state)
    final = run_dir / CHECKPOINTS_FOLDER / f"global_step_{step}"
    if background is None:
        _write_folder(final, step, write, state_text, keep)
    else:
        background.start(final, lambda: _write_folder(final, step, write, state_text, keep))
    return final


def _write_folder(
    final: Path, step: int, write: Callable[[Path], None], state_text: str, keep: int
) -> None:
    folder = final.parent
    scratch = _scratch_path(final)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _clean(folder)
        scratch.mkdir()
        write(scratch)
        (scratch / STATE_FILE).write_text(state_text, encoding="utf-8")
        _sync_tree(scratch)
        _rename_over(scratch, final)
        _write_latest(folder.parent, step)
    except (OSError, SafetensorError) as error:
        code = error.errno if isinstance(error, OSError) else None
        raise OSError(
            code or errno.EIO,
            f"checkpoint {final} was not saved: {error}; the earlier checkpoints are whole: make "
            "room on the disk or fix its permissions, then start the run again to resume",
        ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    _clean(folder)
    _prune(folder, step, keep)


def latest_checkpoint(run_dir: Path) -> Checkpoint | None:
    """The checkpoint that latest_checkpointed_iteration.txt names, None in a fresh run directory.

    Where that one is missing or damaged, the newest whole one, with a warning that says what is
    wrong. Headers and sizes are checked, the tensors are not read. Raises ValueError when there
    are checkpoints, or a file that names one, and none is whole.
    """
    found = _find_checkpoints(run_dir / CHECKPOINTS_FOLDER)
    latest = run_dir / LATEST_FILE
    steps = sorted(found, reverse=True)
    problems = []
    if latest.exists():
        text = latest.read_text(encoding="utf-8", errors="replace").strip()
        if text.isdecimal() and int(text) in found:
            steps.remove(int(text))
            steps.insert(0, int(text))
        else:
            problems.append(f"{latest} names {text[:32]!r}, which is not among the checkpoints")
    elif found:
        problems.append(f"{latest} is missing")
    else:
        return None
    for step in steps:
        damage = _damage(found[step])
        if damage is None:
            if problems:
                logger.warning("using checkpoint %s, since %s", found[step], "; ".join(problems))
            return Checkpoint(step, found[step])
        problems.append(damage)
    raise ValueError(
        f"no checkpoint in {run_dir} is whole: {'; '.join(problems)}; restore one from a copy, or "
        f"remove {latest} and {run_dir / CHECKPOINTS_FOLDER} to start from the beginning"
    )


def load_state(checkpoint: Checkpoint) -> dict[str, Any]:
    """Read the state that was saved, without the tensors; raises as load_training_state does."""
    return _read_json(checkpoint.path / STATE_FILE)


def load_training_state(checkpoint: Checkpoint) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the tensors (on the CPU, mapped from the file) and the state that were saved.

    Raises ValueError naming the file when one is missing, truncated, or not of its format; a
    pickle under either name is refused, never executed.
    """
    path = checkpoint.path / TENSORS_FILE
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise _damaged_file(path, error) from error
    return tensors, load_state(checkpoint)


def check_state(checkpoint: Checkpoint, state: dict[str, Any]) -> None:
    """Raise ValueError, naming file and key, unless the state has all that a run resumes from."""
    _refuse_missing(checkpoint.path / STATE_FILE, STATE_KEYS, state)


def check_tensors(checkpoint: Checkpoint, trained: Iterable[Collection[str]]) -> None:
    """Raise ValueError, naming file and tensor, unless all are there that a run resumes from.

    trained: names of the parameters of each optimiser. It has moments and counts of all of them,
    or, before its first update, of none.
    """
    path = checkpoint.path / TENSORS_FILE
    present = _tensor_names(path)
    for names in trained:
        kept = [{f"{kind}.{name}" for name in names} for kind in TENSOR_KINDS]
        has_moments = any(present & keys for keys in kept[1:])
        _refuse_missing(path, set().union(*kept) if has_moments else kept[0], present)


def _refuse_missing(path: Path, needed: Collection[str], present: Collection[str]) -> None:
    missing = sorted(key for key in needed if key not in present)
    if missing:
        raise ValueError(
            f"{path} lacks {len(missing)} of {len(needed)} entries, first {missing[0]}: resume "
            "with the settings and the flowrl that wrote it, restore it from a copy, remove the "
            "folder of this checkpoint to use an older one, or use another run directory"
        )


def export_hf(source: Path, destination: Path, step: int | None = None) -> Path:
    """Copy the hf/ folder of a checkpoint to `destination`, which appears whole or not at all.

    `source` is a run directory (its latest checkpoint, or `step`) or a global_step_N folder.
    Returns the destination. Raises ValueError when the source holds no whole checkpoint or the
    destination is a file or a folder that is not empty, and OSError when the disk refuses.
    """
    hf = _export_source(source, step)
    _check_hf(hf)
    destination = destination.resolve()  # a rename replaces an empty folder, but no link to one
    if destination.exists() and not (destination.is_dir() and not any(destination.iterdir())):
        raise ValueError(f"{destination} exists and is not an empty folder; name another one")
    if destination.is_relative_to(hf.resolve()):
        raise ValueError(f"{destination} lies in {hf}, which is to be copied; name another folder")
    scratch = _scratch_path(destination)
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(scratch, ignore_errors=True)
        shutil.copytree(hf, scratch)
        _sync_tree(scratch)
        os.replace(scratch, destination)
        _sync(destination.parent)
    except OSError as error:  # shutil.Error, which copytree raises, is one without an errno
        raise OSError(
            error.errno or errno.EIO,
            f"{hf} was not exported to {destination}: {error}; make room on the disk or name a "
            "folder that may be written",
        ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return destination


def _encode_state(state: dict[str, Any]) -> str:
    for key, value in state.items():
        try:
            is_same = isinstance(key, str) and json.loads(_to_json(value)) == value
        except (TypeError, ValueError) as error:
            raise ValueError(f"state[{key!r}] = {value!r:.80} is not JSON: {error}") from error
        if not is_same:
            raise ValueError(
                f"state[{key!r}] = {value!r:.80} would come back from JSON as another value; use "
                "str keys, lists in place of tuples, and put tensors among the tensors"
            )
    return _to_json(state)


def _to_json(value: Any) -> str:
    return json.dumps(value, indent=1, allow_nan=False)


def _save_hf(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    # The tokenizer goes first: on a full disk the tokenizers package raises a bare Exception, the
    # gigabytes that follow an OSError or a SafetensorError.
    tokenizer.save_pretrained(folder)
    # save_pretrained refuses a generation config with, say, a temperature but no do_sample. Some
    # published models have one, and it would end their run at the first checkpoint.
    generation_config = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        # Each shard of a CUDA model is copied to the host whole.
        model.save_pretrained(folder, max_shard_size="5GB")
    finally:
        model.generation_config = generation_config
    if generation_config is not None:
        generation_config.to_json_file(folder / "generation_config.json")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_tree(folder: Path) -> None:
    for parent, _, files in os.walk(folder, topdown=False):
        for name in files:
            _sync(Path(parent, name))
        _sync(Path(parent))


def _rename_over(scratch: Path, final: Path) -> None:
    """Give `scratch` its final name; a folder that has it already steps aside first.

    A folder that is not empty cannot be renamed over. Between the two renames the old one is
    still found, as .global_step_N.previous.
    """
    if final.exists():
        os.rename(final, final.with_name(f".{final.name}.previous"))
    os.rename(scratch, final)
    _sync(final.parent)


def _write_latest(run_dir: Path, step: int) -> None:
    scratch = run_dir / f".{LATEST_FILE}.tmp"
    with open(scratch, "w", encoding="utf-8") as file:
        file.write(str(step))
        file.flush()
        os.fsync(file.fileno())
    os.replace(scratch, run_dir / LATEST_FILE)
    _sync(run_dir)


def _scratch_path(final: Path) -> Path:
    return final.with_name(f".{final.name}.tmp-{os.getpid()}-{socket.gethostname()}")


def _is_stale(scratch: Path, name: re.Match[str]) -> bool:
    """Whether the writer of a scratch folder is gone. Asked while this process has none."""
    pid, host = int(name[1]), name[2]
    if time.time() - scratch.stat().st_mtime > STALE_AFTER_S:
        return True
    if host != socket.gethostname():
        return False
    if pid == os.getpid():
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # it lives, under another user
        return False
    return False


def _clean(folder: Path) -> None:
    """Undo or finish what a killed writer left."""
    for path in sorted(folder.iterdir()):
        if match := PREVIOUS_NAME.fullmatch(path.name):
            final = folder / match[1]
            if final.exists():
                _remove(path)
            else:
                os.rename(path, final)
        elif (match := SCRATCH_NAME.fullmatch(path.name)) and _is_stale(path, match):
            _remove(path)


def _prune(folder: Path, step: int, keep: int) -> None:
    """Remove the checkpoints older than the newest `keep` whole ones up to `step`."""
    num_whole = 1  # the one just saved
    for older, path in sorted(_find_checkpoints(folder).items(), reverse=True):
        if older >= step:
            continue
        if num_whole < keep:
            num_whole += _damage(path) is None
        else:
            _remove(path)


def _remove(path: Path) -> None:
    """Remove a folder, first from view: a half removed one would look like a damaged checkpoint."""
    hidden = path if path.name.startswith(".") else _scratch_path(path)
    try:
        os.rename(path, hidden)
        shutil.rmtree(hidden)
    except OSError as error:  # what was saved is whole, so the run need not end here
        logger.warning("could not remove %s: %s; it only costs disk space", hidden, error)


def _find_checkpoints(folder: Path) -> dict[int, Path]:
    """Step -> folder, including one that stepped aside for a replacement that never came."""
    found = {}
    if folder.is_dir():
        for path in folder.iterdir():
            if match := PREVIOUS_NAME.fullmatch(path.name):
                found.setdefault(int(match[2]), path)
            elif match := STEP_NAME.fullmatch(path.name):
                found[int(match[1])] = path
    return found


def _damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, None when it is whole."""
    try:
        _read_json(path / STATE_FILE)
        _tensor_names(path / TENSORS_FILE)
        _check_hf(path / HF_FOLDER)
    except ValueError as error:
        return str(error)
    return None


def _damaged_file(path: Path, reason: object) -> ValueError:
    return ValueError(
        f"{path} is missing or damaged ({reason}): restore it from a copy, or remove the folder "
        "of this checkpoint to use an older one"
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # bad JSON and bad UTF-8 are ValueErrors
        raise _damaged_file(path, error) from error
    if not isinstance(value, dict):
        raise _damaged_file(path, f"a {type(value).__name__}, not a JSON object")
    return value


def _tensor_names(path: Path) -> set[str]:
    """Names in a safetensors file, whose header is found to fit its size."""
    try:
        with safe_open(path, framework="pt") as file:
            return set(file.keys())
    except (OSError, SafetensorError) as error:
        raise _damaged_file(path, error) from error


def _weight_files(hf: Path) -> Iterator[Path]:
    index = hf / "model.safetensors.index.json"
    if not index.exists():
        yield hf / "model.safetensors"
        return
    shards = _read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise _damaged_file(index, "it lists no weights")
    for name in sorted(set(shards.values())):
        yield hf / name


def _check_hf(hf: Path) -> None:
    _read_json(hf / "config.json")
    for path in _weight_files(hf):
        _tensor_names(path)


def _export_source(source: Path, step: int | None) -> Path:
    if (source / HF_FOLDER).is_dir():
        if step is not None:
            raise ValueError(f"{source} is one checkpoint; give the run directory with step {step}")
        return source / HF_FOLDER
    if step is None:
        checkpoint = latest_checkpoint(source)
        if checkpoint is None:
            raise ValueError(f"{source} is no run directory and no global_step_N folder")
        return checkpoint.hf
    found = _find_checkpoints(source / CHECKPOINTS_FOLDER)
    if step not in found:
        raise ValueError(f"{source} has no checkpoint of step {step}, but of {sorted(found)}")
    return found[step] / HF_FOLDER
