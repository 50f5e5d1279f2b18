"""One run's folder: configuration, metrics, checkpoints, the model and the results."""

import io
import json
import platform
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import yaml
from filelock import FileLock, Timeout

import genray
from genray import records
from genray.config import load_config, to_dict
from genray.config.load import yaml_mapping
from genray.core.flat import from_array
from genray.core.seal import check_seal, seal
from genray.errors import CheckpointError, ConfigError, RunFolderError, one_line
from genray.storage import Storage

MODEL_FORMAT = "genray-model/1"
LEARNERS = "learners"  # folder of the base learners' own models
IDENTITY = "data.json"
TRACKED = "trackers.json"
STATE_FORMAT = "genray-state/2"
# Everything of a run and, beside it, of its theta_g; `config.yaml` makes the folder a run's.
FILES = (
    *("results.json", "checkpoints", "metrics.jsonl", "tensorboard", "teacher", "pseudo_labels.npy", LEARNERS),
    *("model.pt", "model_last.pt", "model.onnx", "model_trades.pt", "model_robustbench.pt", "model.safetensors"),
    *("evaluation", "evaluations", "mixtures", TRACKED, IDENTITY, "config.yaml"),
)


class RunFolder:
    """Everything a run leaves behind, under `<storage>/<name>`.

    Args:
        storage: path or URI of the folder that holds the runs.
        name: the run's name.
    """

    def __init__(self, storage: Any, name: str):
        self.storage, self.replaces = Storage(storage) / name, False

    @property
    def location(self) -> str:
        """Path or URI for messages, without credentials."""
        return str(self.storage)

    # --- opening ------------------------------------------------------------------------------------------------

    @contextmanager
    def lock(self):
        """Locks the run against other processes, on a local or shared file system; the lock ends with its process.

        Object storage has no locks, so nothing is done there.

        Raises:
            RunFolderError: another process holds it, or the folder cannot be written.
        """
        if not self.storage.is_local:
            yield
            return
        folder = Path(self.storage.root)
        made = [f for f in (folder, *folder.parents) if not f.exists()]
        file = FileLock(folder / ".lock", timeout=0)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file.acquire()
        except Timeout:
            raise RunFolderError(f"{self.location}: another process works on this run; choose another --name") from None
        except OSError as error:
            raise RunFolderError(f"{self.location}: cannot be written: {error.strerror or error}") from None
        try:
            self.storage.remove_unfinished()
            yield
        finally:
            Path(file.lock_file).unlink(missing_ok=True)
            file.release()
            for empty in made:  # the run wrote nothing
                with suppress(OSError):
                    empty.rmdir()

    def check_free(self, overwrite: bool = False):
        """Checks that a new run may start here.

        Args:
            overwrite: `create` will replace an existing run.

        Raises:
            RunFolderError: a run exists already, or the folder to replace is not a run's.
        """
        if not self.storage.exists("config.yaml"):
            return
        if not overwrite:
            raise RunFolderError(
                f"{self.location}: a run of this name exists; choose another with --name, go on with --resume, or "
                "replace it with --overwrite"
            )
        try:
            is_run = {"training", "base_learners"} <= set(self._stored())
        except (ConfigError, TypeError, ValueError):
            is_run = False
        if not is_run:
            raise RunFolderError(f"{self.location}: config.yaml is not of a genray run; it is not overwritten")
        self.replaces = True

    def remove_replaced(self):
        """Removes the run to replace, without files that are not of a run. Its configuration is removed last, so
        that the folder counts as a run's until then."""
        for name in FILES if self.replaces else ():
            if self.storage.exists(name):
                self.storage.delete(name)
        self.replaces = False

    def create(self, config, devices: list[str], identity: dict):
        """Starts a new run: writes `data.json`, which images it is on, and `config.yaml`; a run that is to be replaced
        goes now."""
        self.remove_replaced()
        self.storage.write(IDENTITY, (json.dumps(identity, indent=1) + "\n").encode())
        record = {**to_dict(config), "versions": versions(devices)}
        self.storage.write("config.yaml", yaml.safe_dump(record, sort_keys=False, width=110).encode())

    def check_resumable(self, config, follows=()):
        """Checks that the existing run has this configuration.

        Args:
            config: of the run to resume.
            follows: its fields, as "section.field", that are not known before the data is.

        Raises:
            RunFolderError: its configuration differs; the message names the first difference.
        """
        try:
            before = to_dict(load_config(self._stored()))
        except (ConfigError, TypeError, ValueError) as error:
            reason = one_line(str(error).split("\n")[0])
            raise RunFolderError(f"{self.location}/config.yaml: not of this version of genray: {reason}") from None
        now = to_dict(config)
        for field in follows:
            section, _, name = field.partition(".")
            before[section][name] = now[section][name] = None
        for column in ("image_column", "label_column"):  # null is the one that is found, which a begun run names
            if None in (before["data"][column], now["data"][column]):
                before["data"][column] = now["data"][column] = None
        difference = records.first_difference(_resumed_part(before), _resumed_part(now))
        if difference:
            raise RunFolderError(f"{self.location}: cannot resume with another configuration: {difference}")

    def finished(self, config, follows=()) -> dict | None:
        """The final record of this run, or None if it has not ended.

        Raises:
            RunFolderError: the folder has another run, as in `check_resumable`.
        """
        if not self.is_complete(config):
            return None
        self.check_resumable(config, follows)
        try:
            return {**records.read(records.RunResults, self.storage, "results.json"), "folder": self.location}
        except records.Damaged:  # it is made anew from the newest checkpoint
            return None

    def is_complete(self, config) -> bool:
        """Whether all files of a finished run exist: writing one of them may have failed."""
        files = ("results.json", "config.yaml", "metrics.jsonl", "model.pt", "model_last.pt")
        return all(map(self.storage.exists, (*files, *(f"{LEARNERS}/{name}.pt" for name in config.base_learners))))

    def _stored(self):
        """The plain configuration of the existing run."""
        return yaml_mapping(self.storage.read("config.yaml"), "config.yaml")

    def check_data(self, identity: dict):
        """Checks that the existing run is on these images; a run without `data.json` passes.

        Raises:
            RunFolderError: on others; the message names the first part that differs.
        """
        if not self.storage.exists(IDENTITY):
            return
        try:
            before = records.read(records.DataRecord, self.storage, IDENTITY)
        except records.Damaged as error:
            raise RunFolderError(f"{self.location}: {error}") from None
        for part, now in identity.items():
            then = before.get(part)
            if then != now:
                raise RunFolderError(
                    f"{self.location}: the data are not those the run began with: {part} had "
                    f"{_identity_text(then)}, has {_identity_text(now)}"
                )

    # --- records ------------------------------------------------------------------------------------------------

    def write_metrics(self, epochs: list[dict]):
        """`metrics.jsonl`: one line an epoch, written anew so that a resumed run has every epoch once."""
        self.storage.write("metrics.jsonl", "".join(json.dumps(r) + "\n" for r in epochs).encode())

    def read_metrics(self) -> list[dict]:
        if not self.storage.exists("metrics.jsonl"):
            return []
        lines = self.storage.read("metrics.jsonl").splitlines()
        return [records.parse(records.EpochRecord, line) for line in lines]

    def write_results(self, results: dict):
        self.storage.write("results.json", (json.dumps(results, indent=2) + "\n").encode())

    def write_tracked(self, ids: dict[str, str]):
        """`trackers.json`: the ids of the run in the trackers, which a resumed run goes on with."""
        if ids:
            self.storage.write(TRACKED, (json.dumps(ids) + "\n").encode())

    def read_tracked(self) -> dict[str, str]:
        """As `write_tracked` wrote them; none of a damaged file, so that the run begins anew there."""
        if not self.storage.exists(TRACKED):
            return {}
        with suppress(records.Damaged):
            return records.read(records.TrackedRuns, self.storage, TRACKED)
        return {}

    # --- weights ------------------------------------------------------------------------------------------------

    def write_model(self, name: str, state_dict: dict, model_metadata: dict):
        self.storage.write(name, model_bytes(state_dict, model_metadata))

    def write_state(self, step: int, data: bytes, keep: int):
        """Writes a checkpoint of the run (`encode_state`), then removes older ones beyond `keep`."""
        name = _state_name(step)
        self.storage.write(f"checkpoints/{name}", data)
        older = [state for state in self._states() if state < name]
        for state in older[: max(0, len(older) - keep + 1)]:
            self.storage.delete(f"checkpoints/{state}")

    def read_newest_state(self, say=None) -> dict | None:
        """The newest undamaged checkpoint, or None without checkpoints.

        Args:
            say: callable that prints a line for each damaged one.

        Raises:
            CheckpointError: all checkpoints are damaged.
            StorageError: the storage does not answer.
        """
        damaged = []
        for name in reversed(self._states()):
            path = f"checkpoints/{name}"
            try:
                state = decode_state(self.storage.read(path))
            except CheckpointError as error:
                damaged.append(f"{self.storage.path(path)}: {error}")
                continue
            for problem in damaged if say else []:
                say(f"warning: {problem}; going on from {name}")
            return state
        if damaged:
            raise CheckpointError(f"no whole checkpoint is left: {'; '.join(damaged)}")
        return None

    def _states(self):
        return [n for n in self.storage.names("checkpoints") if n.startswith("state-") and n.endswith(".pt")]


def _identity_text(part):
    """The images of a split, or the file of the initial weights."""
    if part and "sha256" in part:
        return f"{part['path']} (sha256 {part['sha256'][:12]})"
    return f"{part['examples']} images ({part['fingerprint']})" if part else "none"


def model_bytes(state_dict: dict, model_metadata: dict) -> bytes:
    """A model file: a plain tensor state dict with a small metadata dict, loadable with `weights_only=True`."""
    return _to_bytes({"format": MODEL_FORMAT, "state_dict": state_dict, "metadata": model_metadata})


def _resumed_part(plain):
    """The fields that a resumed run must not change: all but devices, places of data, kept checkpoints, `loggers`,
    `runtime`.

    The images of files have other fingerprints than decoded ones, so these two may not replace each other.
    """
    learners = {
        name: {key: value for key, value in learner.items() if key not in ("resources", "workers")}
        for name, learner in plain["base_learners"].items()
    }
    same = {key: value for key, value in plain.items() if key not in ("device", "loggers", "runtime")}
    extra = plain["data"]["extra"]
    data = {**plain["data"], "path": None, "download": None, "extra": extra and {**extra, "path": None}}
    data |= {"home": data["home"] == "files", "cache": None, "decoding_workers": None}
    checkpoint = {**plain["checkpoint"], "keep": None}
    return same | {"base_learners": learners, "data": data, "checkpoint": checkpoint}


def versions(devices: list[str]) -> dict:
    """Versions of the packages that compute a result."""
    found = {"python": platform.python_version(), "devices": devices, "genray": genray.__version__}
    for package in ("torch", "torchvision", "ray"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def _state_name(step):
    return f"state-{step:09d}.pt"


def encode_state(state: dict) -> bytes:
    """A checkpoint as the bytes of a sealed file."""
    return _to_bytes({"format": STATE_FORMAT, **_as_tensors(state)})


def decode_state(data: bytes) -> dict:
    """The state that `encode_state` encoded.

    Raises:
        CheckpointError: not a whole checkpoint of this format.
    """
    try:
        check_seal(data)
        content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types for a broken file
        raise CheckpointError(f"not a readable checkpoint: {one_line(error)}") from None
    if not isinstance(content, dict) or content.pop("format", None) != STATE_FORMAT:
        raise CheckpointError(f"not a {STATE_FORMAT} checkpoint")
    return _as_arrays(content)


def _to_bytes(content):
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return seal(buffer)


def _as_tensors(value):
    """Arrays as tensors, the only arrays that `weights_only` loading reads."""
    if isinstance(value, dict):
        return {key: _as_tensors(item) for key, item in value.items()}
    if not hasattr(value, "__array_interface__"):
        return value
    # torch.save compares addresses: an empty array may have that of another array, an empty tensor has 0.
    return from_array(value) if value.size else torch.empty_like(from_array(value))


def _as_arrays(value):
    if isinstance(value, dict):
        return {key: _as_arrays(item) for key, item in value.items()}
    return value.numpy() if torch.is_tensor(value) and value.dtype != torch.bfloat16 else value
