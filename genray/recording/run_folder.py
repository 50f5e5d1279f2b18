"""One run's folder: configuration, metrics, checkpoints, the model and the results."""

import io
import json
import platform
from importlib import metadata

import torch
import yaml

import genray
from genray.config import load_stored_config, to_dict
from genray.core.flat import from_array
from genray.errors import CheckpointError, ConfigError, RunFolderError
from genray.recording.storage import Storage

MODEL_FORMAT = "genray-model/1"
LEARNERS = "learners"  # folder of the base learners' own models
STATE_FORMAT = "genray-state/1"


class RunFolder:
    """Everything a run leaves behind, under `<storage>/<name>`.

    Args:
        storage: path or URI of the folder that holds the runs.
        name: the run's name.
    """

    def __init__(self, storage: str, name: str):
        place, question, options = str(storage).partition("?")  # s3://bucket/prefix?region=...
        self.storage = Storage(f"{place.rstrip('/')}/{name}{question}{options}")

    @property
    def location(self) -> str:
        return self.storage.uri

    # --- opening ------------------------------------------------------------------------------------------------

    def check_free(self):
        """Whether a new run may start here.

        Raises:
            RunFolderError: a run is there already.
        """
        if self.storage.exists("config.yaml"):
            raise RunFolderError(
                f"{self.location}: a run of this name exists; choose another with --name, or go on with --resume"
            )

    def create(self, config, devices: list[str]):
        """Starts a new run: writes `config.yaml`."""
        record = {**to_dict(config), "versions": versions(devices)}
        self.storage.write("config.yaml", yaml.safe_dump(record, sort_keys=False, width=110).encode())

    def check_resumable(self, config):
        """Whether the run that is there is this run.

        Raises:
            RunFolderError: its configuration differs; the message names the first difference.
        """
        try:
            before = to_dict(load_stored_config(yaml.safe_load(self.storage.read("config.yaml"))))
        except (ConfigError, yaml.YAMLError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split("\n")[0].split())
            raise RunFolderError(f"{self.location}/config.yaml: not a genray run: {reason}") from None
        difference = first_difference(_resumed_part(before), _resumed_part(to_dict(config)))
        if difference:
            raise RunFolderError(f"{self.location}: cannot resume with another configuration: {difference}")

    # --- records ------------------------------------------------------------------------------------------------

    def write_metrics(self, records: list[dict]):
        """`metrics.jsonl`: one line an epoch, written anew so that a resumed run has every epoch once."""
        self.storage.write("metrics.jsonl", "".join(json.dumps(r) + "\n" for r in records).encode())

    def read_metrics(self) -> list[dict]:
        if not self.storage.exists("metrics.jsonl"):
            return []
        return [json.loads(line) for line in self.storage.read("metrics.jsonl").decode().splitlines()]

    def write_results(self, results: dict):
        self.storage.write("results.json", (json.dumps(results, indent=2) + "\n").encode())

    # --- weights ------------------------------------------------------------------------------------------------

    def write_model(self, name: str, state_dict: dict, model_metadata: dict):
        self.storage.write(name, model_bytes(state_dict, model_metadata))

    def write_state(self, state: dict, keep: int):
        """A checkpoint of the whole run; older ones beyond `keep` are removed after it is in place."""
        name = f"state-{state['step']:09d}.pt"
        self.storage.write(f"checkpoints/{name}", _to_bytes({"format": STATE_FORMAT, **_as_tensors(state)}))
        for old in self._states()[:-keep]:
            self.storage.delete(f"checkpoints/{old}")

    def read_newest_state(self) -> dict | None:
        """The newest checkpoint, or None where there is none.

        Raises:
            CheckpointError: it cannot be read.
        """
        states = self._states()
        if not states:
            return None
        path = f"checkpoints/{states[-1]}"
        try:
            content = torch.load(io.BytesIO(self.storage.read(path)), map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises many kinds for a broken file
            raise CheckpointError(f"{self.storage.path(path)}: not a readable checkpoint: {error}") from None
        if not isinstance(content, dict) or content.pop("format", None) != STATE_FORMAT:
            raise CheckpointError(f"{self.storage.path(path)}: expected a {STATE_FORMAT} checkpoint")
        return _as_arrays(content)

    def _states(self):
        return [n for n in self.storage.names("checkpoints") if n.startswith("state-") and n.endswith(".pt")]


def model_bytes(state_dict: dict, model_metadata: dict) -> bytes:
    """A model file: a plain tensor state dict with a small metadata dict, loadable with `weights_only=True`."""
    return _to_bytes({"format": MODEL_FORMAT, "state_dict": state_dict, "metadata": model_metadata})


def _resumed_part(plain):
    """What has to stay when a run goes on: all but where it computes, where its data lies and what it keeps."""
    learners = {
        name: {key: value for key, value in learner.items() if key != "resources"}
        for name, learner in plain["base_learners"].items()
    }
    same = {key: value for key, value in plain.items() if key not in ("device", "runtime")}
    data = {**plain["data"], "path": None, "download": None}
    return same | {"base_learners": learners, "data": data, "checkpoint": {**plain["checkpoint"], "keep": None}}


def first_difference(before, after, path=""):
    """The first leaf in which two plain configurations differ, in words; empty where they agree."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in [*before, *(k for k in after if k not in before)]:
            found = first_difference(before.get(key), after.get(key), f"{path}.{key}" if path else key)
            if found:
                return found
        return ""
    return "" if before == after else f"{path} was {before}, is {after}"


def versions(devices: list[str]) -> dict:
    """Versions of what computed a result."""
    found = {"python": platform.python_version(), "devices": devices, "genray": genray.__version__}
    for package in ("torch", "torchvision", "ray"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def _to_bytes(content):
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def _as_tensors(value):
    """Arrays become tensors, which is what `weights_only` loading knows."""
    if isinstance(value, dict):
        return {key: _as_tensors(item) for key, item in value.items()}
    return from_array(value) if hasattr(value, "__array_interface__") else value


def _as_arrays(value):
    if isinstance(value, dict):
        return {key: _as_arrays(item) for key, item in value.items()}
    return value.numpy() if torch.is_tensor(value) else value
