"""Files that are written whole or not at all, on local and other file systems, and the run folder on top of them."""

import builtins
import io
import os
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT
from pyarrow import fs

from genray.__main__ import main
from genray.config import load_config, to_dict
from genray.core.seal import seal
from genray.errors import CheckpointError, RunFolderError
from genray.recording.run_folder import RunFolder, encode_state
from genray.recording.table import results_table
from genray.reporting.results import Results
from genray.storage import Storage, without_secrets


def local(folder):
    return Storage(str(folder))


def by_uri(folder):
    return Storage(folder.as_uri())


def subtree(folder):
    """A file system that is not the local one, as an object store is not."""
    storage = Storage(str(folder))
    storage.filesystem, storage.root = fs.SubTreeFileSystem(str(folder), fs.LocalFileSystem()), "prefix"
    assert not storage.is_local
    return storage


def in_memory(folder):
    storage = Storage(f"mock://{folder}")
    assert not storage.is_local
    return storage


@pytest.fixture(params=[local, by_uri, subtree, in_memory])
def storage(request, tmp_path):
    folder = {local: tmp_path / "new folder", by_uri: tmp_path / "new folder"}.get(request.param, tmp_path)
    return request.param(folder)


# --- storage -------------------------------------------------------------------------------------------------------


def test_write_read_exists_names_delete(storage):
    assert not storage.exists() and not storage.exists("a.txt") and storage.names() == []
    storage.write("b.txt", b"two")
    storage.write("a.txt", b"one")
    storage.write("sub/deeper/c.bin", bytes(range(256)))
    assert storage.exists() and storage.exists("a.txt") and storage.exists("sub/deeper/c.bin")
    assert storage.names() == ["a.txt", "b.txt"]  # files only, sorted
    assert storage.names("sub") == [] and storage.names("sub/deeper") == ["c.bin"] and storage.names("none") == []
    assert storage.read("sub/deeper/c.bin") == bytes(range(256))
    storage.write("a.txt", b"longer than before")
    assert storage.read("a.txt") == b"longer than before"
    storage.write("a.txt", b"")
    assert storage.read("a.txt") == b""
    storage.delete("a.txt")
    assert not storage.exists("a.txt") and storage.names() == ["b.txt"]


def test_absent_file_cannot_be_read(storage):
    with pytest.raises(RunFolderError, match=r"absent\.pt: cannot be read"):
        storage.read("absent.pt")


def test_path_and_file_uri_are_the_same_place(tmp_path):
    local(tmp_path / "r").write("x", b"1")
    assert by_uri(tmp_path / "r").read("x") == b"1" and (tmp_path / "r" / "x").read_bytes() == b"1"
    assert by_uri(tmp_path).is_local and local(tmp_path).is_local


def test_relative_path_is_the_working_directorys(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    storage = Storage("runs/one")
    monkeypatch.chdir("/")
    storage.write("x", b"1")
    assert (tmp_path / "runs" / "one" / "x").read_bytes() == b"1"


class Full:
    """A file on a full disk: a few bytes, then an error."""

    def __init__(self, real):
        self.real = real

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.real.close()

    def write(self, data):
        self.real.write(data[:3])
        self.real.flush()
        raise OSError(28, "No space left on device")


def fail_while_writing(monkeypatch):
    real_open = builtins.open
    monkeypatch.setattr(builtins, "open", lambda path, mode="r", **kw: Full(real_open(path, mode, **kw)))


def fail_while_flushing(monkeypatch):
    def fsync(descriptor):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fsync)


def fail_while_renaming(monkeypatch):
    def replace(source, target):
        raise OSError(13, "Permission denied")

    monkeypatch.setattr(os, "replace", replace)


@pytest.mark.parametrize("fail", [fail_while_writing, fail_while_flushing, fail_while_renaming])
def test_a_failing_write_leaves_the_old_file(tmp_path, monkeypatch, fail):
    storage = local(tmp_path)
    storage.write("state.pt", b"old and whole")
    with monkeypatch.context() as patch:
        fail(patch)
        with pytest.raises(RunFolderError, match=r"state\.pt: cannot be written: (No space|Input|Permission)"):
            storage.write("state.pt", b"new")
    assert storage.read("state.pt") == b"old and whole"
    assert sorted(os.listdir(tmp_path)) == ["state.pt"]  # nothing aside is left


def test_an_interrupt_while_writing_leaves_the_old_file(tmp_path, monkeypatch):
    storage = local(tmp_path)
    storage.write("state.pt", b"old")

    def replace(source, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        storage.write("state.pt", b"new")
    assert os.listdir(tmp_path) == ["state.pt"] and storage.read("state.pt") == b"old"


def test_the_new_file_is_on_disk_before_the_old_one_goes(tmp_path, monkeypatch):
    storage, order = local(tmp_path), []
    storage.write("x", b"old")
    real_fsync, real_replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda d: (order.append("fsync"), real_fsync(d))[1])

    def replace(source, target):
        with open(source, "rb") as stream:
            order.append(("replace", stream.read(), storage.read("x")))
        real_replace(source, target)

    monkeypatch.setattr(os, "replace", replace)
    storage.write("x", b"new")
    assert order == ["fsync", ("replace", b"new", b"old")] and storage.read("x") == b"new"


def test_a_file_in_the_way_of_the_folder(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(RunFolderError, match="cannot be written"):
        local(tmp_path / "file").write("x", b"1")


@pytest.mark.parametrize("uri", ["nonsense://bucket/x", "://", "s3://bucket name/x"])
def test_uris_that_cannot_be_understood(uri):
    with pytest.raises(RunFolderError, match="storage "):
        Storage(uri)


def test_a_name_behind_the_options_is_refused_with_the_right_order():
    for options in ("endpoint_override=127.0.0.1:9", "scheme=http&endpoint_override=127.0.0.1:9"):
        with pytest.raises(RunFolderError) as caught:
            Storage(f"s3://bucket/runs?{options}/mine/model.pt")
        right = str(caught.value).rpartition(": ")[2]
        assert Storage(right).root == "bucket/runs/mine/model.pt" and right.endswith(options)


SERVER = "endpoint_override=127.0.0.1:9&scheme=http"


@pytest.mark.parametrize(
    ("place", "below", "above"),
    [
        ("runs/digits", "runs/digits/a b.pt", "runs"),
        ("runs/digits/", "runs/digits/a b.pt", "runs"),
        ("model.pt", "model.pt/a b.pt", "."),
        ("/runs/what?", "/runs/what?/a b.pt", "/runs"),
        (f"s3://b/r/x?{SERVER}", f"s3://b/r/x/a%20b.pt?{SERVER}", f"s3://b/r?{SERVER}"),
        (f"s3://b/r/x/?{SERVER}", f"s3://b/r/x/a%20b.pt?{SERVER}", f"s3://b/r?{SERVER}"),
    ],
)
def test_below_and_above_are_the_places_that_their_names_say(place, below, above):
    storage = Storage(place)
    for found, uri in ((storage / "a b.pt", below), (storage.parent, above)):
        again = Storage(uri)
        assert (found.uri, found.root) == (uri, again.root) and found.name == again.name
    assert (storage / "a b.pt").parent.root == storage.root


def test_credentials_are_not_shown():
    uris = [
        f"s3://KEY:hush@bucket/x?{SERVER}",
        f"s3://KEY:hu/sh@bucket/x?{SERVER}",
        "abfs://:hush@account.blob.core.windows.net/c",
        "abfs://c@account.dfs.core.windows.net/x?client_secret=hush&tenant_id=t",
    ]
    for uri in uris:
        text = without_secrets(f"cannot parse '{uri}'")
        assert "hu" not in text and "***" in text and ("bucket/x" in text or "account" in text), text
    place = Storage(uris[0])
    assert "hush" not in f"{place} {place / 'model.pt'}" and "hush" in (place / "model.pt").uri
    for uri in (f"s3://bucket/x?{SERVER}", "abfs://c@account.dfs.core.windows.net/x", "runs/a@b:c"):
        assert without_secrets(uri) == uri


def test_a_fetched_file_is_local_and_goes(storage):
    storage.write("sub/model.pt", b"weights")
    with (storage / "sub/model.pt").fetch() as file:
        assert file.read_bytes() == b"weights" and file.name == "model.pt"
    assert file.exists() == storage.is_local  # a local file is itself, and stays
    if not storage.is_local:
        with pytest.raises(RunFolderError, match=r"absent\.pt: cannot be read"), (storage / "absent.pt").fetch():
            pass


@pytest.mark.slow
def test_the_home_folder_is_understood_wherever_a_path_is_given(tmp_path, monkeypatch):
    """One rule: a shell does not expand --storage=~/runs, nor what stands in a file."""
    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir()
    here.mkdir()
    (home / "grid.yaml").write_text("name: g\nbase: ~/runs/digits/config.yaml\nseeds: [0]\n")
    small = ["training.epochs=1", "data.train_examples=200", "data.test_examples=20", "data.validation_examples=20",
             "global_learner.warmup_epochs=null", "base_learners.linf.attack.num_steps=1",
             "evaluation.attack.num_steps=1"]  # fmt: skip
    lines = [
        ["train", "--runtime=local", "--storage=~/runs", *small],
        ["train", "--runtime=local", "--config=~/runs/digits/config.yaml", "--name=again", "--storage=~/runs"],
        ["evaluate", "~/runs/digits", "--attacks=pgd20", "--examples=10", "--output=~/judged"],
        ["evaluate", "~/runs/digits", "--save-mixture=0.5", "--output=~/mixed"],
        ["export", "~/runs/digits", "--layout=onnx", "--output=~/m.onnx"],
        ["report", "~/runs", "--output=~/report", "--format=csv", "--no-gallery"],
        ["tune", "~/grid.yaml", "--dry-run", "--storage=~/runs"],
    ]
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    for line in lines:
        assert main(line) == 0, line
    assert not list(here.iterdir())
    found = {str(path.relative_to(home)) for path in home.rglob("*") if path.name in ("results.json", "report.json")}
    assert {"runs/digits/results.json", "runs/again/results.json", "judged/results.json", "report/report.json"} <= found
    assert (home / "m.onnx").is_file() and list((home / "mixed").glob("*.pt"))


# --- run folder ----------------------------------------------------------------------------------------------------


def test_place_of_a_run(tmp_path):
    for storage in (str(tmp_path), f"{tmp_path}/", tmp_path.as_uri(), f"{tmp_path.as_uri()}/"):
        RunFolder(storage, "mine").write_results({"storage": storage})
        assert storage in (tmp_path / "mine" / "results.json").read_text()


def test_place_of_a_run_behind_a_uri_with_options():
    """pyarrow's way of naming a region or a MinIO endpoint: options stand after the path."""
    uri = "s3://bucket/prefix?region=eu-west-1&endpoint_override=127.0.0.1:9000&scheme=http"
    storage = RunFolder(uri, "mine").storage
    assert storage.path("config.yaml") == "bucket/prefix/mine/config.yaml"
    assert storage.filesystem.region == "eu-west-1"


def state(step, learners=("natural", "linf")):
    rng = np.random.default_rng(step)
    return {
        "step": step,
        "next_window": step // 10,
        "learners": {
            name: {
                "step": step,
                "weights": rng.random(5).astype(np.float32),
                "counters": np.array([step]),
                "optimizer": {"momentum_buffer": rng.random(3).astype(np.float32), "step": np.array(float(step))},
            }
            for name in learners
        },
        "theta_g": {"step": step, "weights": rng.random(5).astype(np.float32), "counters": np.array([step])},
        "best": None,
        "books": '{"records": []}',
    }


def write(folder, step, keep):
    folder.write_state(step, encode_state(state(step)), keep)


def equal(a, b):
    if isinstance(a, dict):
        return set(a) == set(b) and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and np.array_equal(a, b)
    return type(a) is type(b) and a == b


def test_newest_state_comes_back_as_it_was(tmp_path):
    folder = RunFolder(str(tmp_path), "run")
    assert folder.read_newest_state() is None
    for step in (5, 900, 1_000_000):  # 1000000 sorts after 900
        write(folder, step, keep=3)
    assert equal(folder.read_newest_state(), state(1_000_000))


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_keep(tmp_path, keep):
    folder = RunFolder(str(tmp_path), "run")
    for step in range(10, 60, 10):
        write(folder, step, keep)
        assert folder.read_newest_state()["step"] == step
    left = sorted(os.listdir(tmp_path / "run" / "checkpoints"))
    assert left == [f"state-{s:09d}.pt" for s in range(10, 60, 10)[-keep:]]


def test_the_old_state_goes_only_when_the_new_one_is_in_place(tmp_path, monkeypatch):
    folder = RunFolder(str(tmp_path), "run")
    write(folder, 10, 1)
    fail_while_flushing(monkeypatch)
    with pytest.raises(RunFolderError):
        write(folder, 20, 1)
    assert folder.read_newest_state()["step"] == 10


def test_other_files_among_the_checkpoints_are_left_alone(tmp_path):
    folder = RunFolder(str(tmp_path), "run")
    folder.storage.write("checkpoints/state-000000099.pt.tmp-ab12cd34", b"half")
    folder.storage.write("checkpoints/notes.txt", b"mine")
    write(folder, 10, 1)
    write(folder, 20, 1)
    assert folder.read_newest_state()["step"] == 20
    assert set(folder.storage.names("checkpoints")) == {
        "notes.txt",
        "state-000000020.pt",
        "state-000000099.pt.tmp-ab12cd34",
    }


def damages(whole):
    """Cut at every sixteenth, single bits flipped all over, and a few that are no checkpoint at all."""
    yield from (whole[: len(whole) * part // 16] for part in range(16))
    rng = random.Random(0)
    for at in [
        *range(0, len(whole), len(whole) // 40),
        len(whole) - 1,
        *(rng.randrange(len(whole)) for _ in range(40)),
    ]:
        yield whole[:at] + bytes([whole[at] ^ 1 << rng.randrange(8)]) + whole[at + 1 :]
    yield from (whole[:-1], whole + b"x", b"not a checkpoint\n", bytes(1000))


def test_damaged_states_are_named_and_the_one_before_is_used(tmp_path):
    folder, said = RunFolder(str(tmp_path), "run"), []
    write(folder, 10, 2)
    write(folder, 20, 2)
    path = tmp_path / "run" / "checkpoints" / "state-000000020.pt"
    tried = 0
    for data in damages(path.read_bytes()):
        path.write_bytes(data)
        assert equal(folder.read_newest_state(said.append), state(10))
        assert said.pop().startswith(f"warning: {path}: not a readable checkpoint: its checksum ")
        assert not said
        tried += 1
    assert tried > 95
    (tmp_path / "run" / "checkpoints" / "state-000000010.pt").unlink()
    with pytest.raises(CheckpointError, match=f"no whole checkpoint is left: {path}"):
        folder.read_newest_state()


def test_a_damaged_newer_state_does_not_cost_an_older_one(tmp_path):
    """The run went back behind a damaged checkpoint: what it writes next is not the newest by name."""
    folder = RunFolder(str(tmp_path), "run")
    for step in (10, 20, 30):
        write(folder, step, 3)
    for step in (20, 30):
        (tmp_path / "run" / "checkpoints" / f"state-0000000{step}.pt").write_bytes(b"damaged")
    write(folder, 15, 1)
    assert folder.read_newest_state()["step"] == 15


@pytest.mark.parametrize("content", [{"format": "genray-state/9", "step": 1}, [1, 2], {"step": 1}])
def test_a_state_of_another_kind_is_refused(tmp_path, content):
    folder = RunFolder(str(tmp_path), "run")
    folder.storage.write("checkpoints/state-000000010.pt", sealed(content))
    with pytest.raises(CheckpointError, match="state-000000010.pt"):
        folder.read_newest_state()


def sealed(content):
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return seal(buffer)


MEMORY = """
import re, sys
import numpy as np
from genray.recording.run_folder import RunFolder, decode_state, encode_state

def resident(name):
    return int(re.search(rf"{name}:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024

def cost(call):
    open("/proc/self/clear_refs", "w").write("5")  # forgets the peak so far
    before = resident("VmRSS")
    kept = call()
    print(resident("VmHWM") - before)
    return kept

folder = RunFolder(sys.argv[1], "run")
encode_state({"step": np.ones(1)})
state = {"step": 1, "learners": {str(i): np.ones(25 * 2**18, np.float32) for i in range(8)}}
data = cost(lambda: encode_state(state))
cost(lambda: folder.write_state(1, data, 1))
del state
cost(lambda: decode_state(data))
del data
cost(folder.read_newest_state)
"""


@pytest.mark.slow
def test_memory_of_a_checkpoint(tmp_path):
    """Of 200 MiB: one copy to encode it, none to write it, one to decode it; its bytes and one copy to read it."""
    command = [sys.executable, "-c", MEMORY, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    encode, write, decode, read = (float(line) / 200 for line in done.stdout.split())
    assert (encode, write, decode) == pytest.approx((1, 0, 1), abs=0.2)
    assert 1 <= read <= 2.2  # memory freed just before may be counted as used, or taken again


class Harmful:
    """An object that makes a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def test_a_state_cannot_run_code(tmp_path):
    folder = RunFolder(str(tmp_path), "run")
    folder.storage.write("checkpoints/state-000000010.pt", sealed({"x": Harmful(tmp_path / "made")}))
    with pytest.raises(CheckpointError, match="state-000000010.pt"):
        folder.read_newest_state()
    assert not (tmp_path / "made").exists()


def test_model_is_a_plain_file(tmp_path):
    folder = RunFolder(str(tmp_path), "run")
    folder.write_model("model.pt", {"w": torch.arange(3.0)}, {"architecture": {"name": "x"}, "epoch": 3})
    content = torch.load(tmp_path / "run" / "model.pt", weights_only=True)
    assert content["state_dict"]["w"].tolist() == [0, 1, 2]
    assert content["metadata"] == {"architecture": {"name": "x"}, "epoch": 3}


def test_metrics_are_written_anew(tmp_path):
    folder = RunFolder(str(tmp_path), "run")
    assert folder.read_metrics() == []
    rest = {"wall_s": 1.5, "redistributions": 0, "learners": {}, "mixing_weights": {}, "global": None, "best_epoch": 1}
    epochs = [{"epoch": epoch, **rest, "x": [0.5]} for epoch in (1, 2, 3)]
    folder.write_metrics(epochs)
    folder.write_metrics(epochs[:2])
    assert folder.read_metrics() == epochs[:2]
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2


# --- opening -------------------------------------------------------------------------------------------------------


IDENTITY = {"train": {"examples": 3, "fingerprint": "a"}, "test": {"examples": 2, "fingerprint": "b"}}


@pytest.fixture
def created(tmp_path):
    folder = RunFolder(str(tmp_path), "digits")
    folder.check_free()
    folder.create(load_config(), ["cpu"], IDENTITY)
    return folder


def test_a_second_run_is_refused(created):
    with pytest.raises(RunFolderError, match="digits: a run of this name exists.*--resume"):
        created.check_free()


def test_config_is_written_resolved_and_with_versions(created):
    stored = yaml.safe_load(created.storage.read("config.yaml"))
    assert load_config(f"{created.location}/config.yaml") == load_config(stored) == load_config()
    versions = stored["versions"]
    assert versions["torch"] and versions["python"].startswith("3.") and versions["devices"] == ["cpu"]


def test_the_same_configuration_resumes(created):
    created.check_resumable(load_config())


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("training.epochs=31", "training.epochs was 30, is 31"),
        ("seed=1", "seed was 0, is 1"),
        ("base_learners.linf.attack.epsilon=8/255", "base_learners.linf.attack.epsilon was 0.2, is 8/255"),
        ("global_learner.decay=0.9", "global_learner.decay was 0.99, is 0.9"),
        ("base_learners.linf.optimizer.momentum=0.5", "base_learners.linf.optimizer.momentum was 0.9, is 0.5"),
    ],
)
def test_another_configuration_is_refused_by_name(created, override, words):
    with pytest.raises(RunFolderError, match="cannot resume with another configuration") as caught:
        created.check_resumable(load_config(overrides=[override]))
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "override",
    ["device=cpu", "runtime.startup_timeout_s=9", "base_learners.linf.resources.num_cpus=2", "checkpoint.keep=5"],
)
def test_what_does_not_change_the_result_may_differ(created, override):
    assert load_config(overrides=[override]) != load_config()
    created.check_resumable(load_config(overrides=[override]))


def test_other_data_are_refused_by_part(created):
    created.check_data(IDENTITY)
    other = IDENTITY | {"test": {"examples": 2, "fingerprint": "c"}}
    with pytest.raises(
        RunFolderError, match=r"not those the run began with: test had 2 images \(b\), has 2 images \(c"
    ):
        created.check_data(other)
    created.storage.delete("data.json")  # a run of an older genray
    created.check_data(other)


def test_a_learner_with_an_unlucky_name_is_compared_all_the_same(tmp_path):
    """Fields that may differ are skipped by name; a learner can have that name."""
    data = to_dict(load_config())
    for part in ("base_learners", "global_learner"):
        section = data[part] if part == "base_learners" else data[part]["mixing_weights"]
        section["device"] = section.pop("natural")
    folder = RunFolder(str(tmp_path), "digits")
    folder.create(load_config(data), ["cpu"], IDENTITY)
    with pytest.raises(RunFolderError, match=r"base_learners\.device\.lr"):
        folder.check_resumable(load_config(data, ["base_learners.device.lr=0.5"]))


HOSTILE = "name: !!python/object/apply:os.mkdir [made-by-yaml]\n"


@pytest.mark.parametrize("text", ["", "[1, 2]", "a: [", "name: digits\n", "just words", "\x00", HOSTILE])
def test_a_broken_config_in_the_folder_is_the_folders_error(tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    folder = RunFolder(str(tmp_path), "digits")
    folder.storage.write("config.yaml", text.encode())
    with pytest.raises(RunFolderError, match="config.yaml"):
        folder.check_resumable(load_config())
    assert os.listdir(tmp_path) == ["digits"]


# --- the final table -----------------------------------------------------------------------------------------------


def results(selected_on):
    record = {"value": 0.975, "low": 0.953, "high": 0.987, "examples": 360}
    protocol = {"examples": 360, "interval": "95 % Wilson", "selected_on": selected_on, "norm": "linf"}
    models = {name: {"natural": record, "pgd20": record} for name in ("global", "global_last", "linf")}
    return {"models": models, "protocol": protocol | {"threat_model": "linf 0.2 (0.2)"}, "best_epoch": 27}


def test_the_table_names_models_intervals_and_a_selection_on_test():
    table = results_table(results("validation"))
    lines = table.splitlines()
    assert lines[2].startswith("theta_g, epoch 27 (best on validation)") and "97.50 [95.3, 98.7]" in lines[2]
    assert lines[3].startswith("theta_g, last epoch") and lines[4].startswith("base learner linf")
    assert "NOTE" not in table
    assert "NOTE: the checkpoint was chosen on the test images" in results_table(results("test"))


def test_a_notebook_shows_the_table_and_a_program_has_the_dictionary():
    shown = Results(results("test") | {"folder": "runs/<digits>"})
    assert repr(shown) == results_table(shown) and shown["best_epoch"] == 27 and isinstance(shown, dict)
    html = shown._repr_html_()
    assert all(part in html for part in ("theta_g, last epoch", "97.50", "95.3, 98.7", "runs/&lt;digits&gt;"))
    assert html.count("<tr") == 4 and "<digits>" not in html
