"""The files under cluster/: Ray and KubeRay would take them, they fit this repository, they open nothing."""

import json
import re
import shlex
import subprocess
from fnmatch import fnmatch
from pathlib import Path

import jsonschema
import pytest
import ray.autoscaler
import yaml

from genray.cli.train import parse_args
from genray.config import load_config
from genray.run.allocation import matches

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
CLOUDS = ["aws", "gcp", "azure"]
RAY_UP = [*CLOUDS, "on_premise"]
MANIFESTS = ["raycluster", "rayjob", "rayjob_kueue"]
JOBS = ["rayjob", "rayjob_kueue"]
KUBERAY = json.loads((ROOT / "tests/data/kuberay.schema.json").read_text())
FILES = sorted(path for path in [*CLUSTER.rglob("*"), ROOT / ".dockerignore"] if path.is_file())
RAY = re.search(r"^ray==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M)[1]


def ray_up(name):
    return yaml.safe_load((CLUSTER / f"{name}.yaml").read_text())


def manifest(name):
    return yaml.safe_load((CLUSTER / f"kuberay/{name}.yaml").read_text())


def cluster_spec(name):
    spec = manifest(name)["spec"]
    return spec.get("rayClusterSpec", spec)


def leaves(value, path=""):
    """(path, scalar) of everything in parsed YAML."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from leaves(inner, f"{path}.{key}")
    elif isinstance(value, list):
        for inner in value:
            yield from leaves(inner, f"{path}[]")
    else:
        yield path, value


# --- ray up --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RAY_UP)
def test_ray_takes_the_file(name):
    """By the schema that Ray carries, and with every command of our own: Ray's defaults install a nightly wheel."""
    config, package = ray_up(name), Path(ray.autoscaler.__file__).parent
    if name not in CLOUDS:
        config.pop("min_workers")  # Ray moves it into a node type that it makes for the machines
    schema = json.loads((package / "ray-schema.json").read_text())
    jsonschema.validate(config, schema)
    with pytest.raises(jsonschema.ValidationError, match="iamge"):
        jsonschema.validate({**config, "docker": {"container_name": "a", "image": "b", "iamge": "c"}}, schema)
    defaults = yaml.safe_load((package / config["provider"]["type"] / "defaults.yaml").read_text())
    assert {key for key in defaults if key.endswith("_commands")} <= set(config)
    if name in CLOUDS:
        types = config["available_node_types"]
        assert config["head_node_type"] in types and types["gpu"]["max_workers"] <= config["max_workers"]
        ours, theirs = (re.findall(r"[\w-]+[=>]=[\d.]+", c["head_setup_commands"][0]) for c in (config, defaults))
        assert ours == theirs  # the cloud's library


@pytest.mark.parametrize("name", CLOUDS)
def test_no_learner_on_the_head_and_gpus_on_demand(name):
    types = ray_up(name)["available_node_types"]
    assert types["head"]["resources"] == {"CPU": 0}
    assert types["gpu"]["min_workers"] == 0
    assert types["gpu"]["resources"]["GPU"] == 1
    spot = {"aws": "spot", "gcp": "SPOT", "azure": "Spot"}[name]
    assert spot in dict(leaves(types["gpu"])).values()
    assert spot not in dict(leaves(types["head"])).values()


@pytest.mark.parametrize("name", RAY_UP)
def test_nodes_want_the_token_and_get_it_from_your_machine(name):
    config = ray_up(name)
    assert "--env RAY_AUTH_MODE=token" in config["docker"]["run_options"]
    assert config["file_mounts"]["/home/ray/.ray/auth_token"] == "~/.ray/auth_token"


@pytest.mark.parametrize("name", RAY_UP)
def test_the_nodes_get_all_that_install_needs(name):
    mounts = {remote: local for remote, local in ray_up(name)["file_mounts"].items() if "/genray/" in remote}
    assert {remote.removeprefix("/home/ray/genray/"): local for remote, local in mounts.items()} == {
        local: local for local in mounts.values()
    }
    assert set(read_by_install()) | {"cluster", "configs"} == set(mounts.values())
    assert all((ROOT / local).exists() for local in mounts.values())


# --- versions ------------------------------------------------------------------------------------------------------


def test_versions_are_ours():
    images = [image for name in RAY_UP for key, image in ray_up(name)["docker"].items() if key.endswith("image")]
    dockerfile = (CLUSTER / "Dockerfile").read_text()
    base = re.search(r"^FROM (\S+)$", dockerfile, re.M)[1]
    arguments = dict(re.findall(r"^ARG (\w+)=(\S+)$", dockerfile, re.M))
    for key, value in arguments.items():
        base = base.replace(f"${{{key}}}", value)
    assert len(images) == 8
    for image in [*images, base]:
        assert re.fullmatch(rf"rayproject/ray:{re.escape(RAY)}-py311-(cpu|cu130)", image)
    assert [str(cluster_spec(name)["rayVersion"]) for name in MANIFESTS] == [RAY] * len(MANIFESTS)
    assert f"Ray {RAY}" in (CLUSTER / "README.md").read_text()
    assert re.search(r"KubeRay (\S+),", KUBERAY["$comment"])[1] in (CLUSTER / "README.md").read_text()
    oldest = re.search(r'requires-python = ">=(\d+)\.(\d+)"', (ROOT / "pyproject.toml").read_text())
    assert (3, 11) >= tuple(map(int, oldest.groups()))


# --- Kubernetes ----------------------------------------------------------------------------------------------------


def check_manifest(kind, spec):
    jsonschema.validate(spec, {**KUBERAY, "$ref": f"#/$defs/{kind}"})


@pytest.mark.parametrize(("name", "kind"), [("raycluster", "RayCluster"), *((name, "RayJob") for name in JOBS)])
def test_kuberay_takes_the_manifest(name, kind):
    document = manifest(name)
    assert (document["apiVersion"], document["kind"]) == ("ray.io/v1", kind)
    check_manifest(kind, document["spec"])
    assert re.fullmatch(r"[a-z]([-a-z0-9]{0,45}[a-z0-9])?", document["metadata"]["name"])


@pytest.mark.parametrize("name", JOBS)
def test_the_operator_would_start_it(name):
    """Rules that KubeRay 1.7 checks in code, not in the resource definition."""
    job = manifest(name)["spec"]
    assert job["submissionMode"] in ("K8sJobMode", "HTTPMode", "SidecarMode")  # backoffLimit needs one of these
    assert job["shutdownAfterJobFinishes"]  # ttlSecondsAfterFinished needs it
    assert job["backoffLimit"] > 0
    spec = job["rayClusterSpec"]
    assert spec["authOptions"]["mode"] == "token"
    for group in [spec["headGroupSpec"], *spec["workerGroupSpecs"]]:
        pod = group["template"]["spec"]
        assert "restartPolicy" not in pod  # autoscaler v2
        assert "labels" not in group["rayStartParams"]  # which are in the group itself
        assert not (group.get("resources") and group["rayStartParams"])
        (shm,) = pod["volumes"]
        assert shm["emptyDir"]["medium"] == "Memory"
        assert {"name": shm["name"], "mountPath": "/dev/shm"} in pod["containers"][0]["volumeMounts"]
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    for gpu in spec["workerGroupSpecs"]:
        assert gpu["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"


def test_two_files_have_one_cluster_that_grows():
    spec = cluster_spec("rayjob")
    assert spec == cluster_spec("raycluster") and spec["enableInTreeAutoscaling"]
    (gpu,) = spec["workerGroupSpecs"]
    assert (gpu["replicas"], gpu["minReplicas"]) == (0, 0)


def test_kueue_takes_the_queued_job():
    """What Kueue asks of a RayJob: https://kueue.sigs.k8s.io/docs/tasks/run/rayjobs, and the nodes of its learners."""
    document = manifest("rayjob_kueue")
    job, spec = document["spec"], document["spec"]["rayClusterSpec"]
    assert document["metadata"]["labels"]["kueue.x-k8s.io/queue-name"]
    assert job["suspend"] and job["shutdownAfterJobFinishes"] and "clusterSelector" not in job
    assert not spec["enableInTreeAutoscaling"] and "autoscalerOptions" not in spec
    groups = spec["workerGroupSpecs"]
    assert len(groups) <= 7, "Kueue's pod sets: at most eight, the head's among them"
    assert all(group["replicas"] == group["minReplicas"] == group["maxReplicas"] for group in groups)
    args = parse_args(shlex.split(job["entrypoint"])[3:])
    config = load_config(str(ROOT / args.config.removeprefix("/home/ray/genray/")), args.overrides)
    for learner in config.base_learners.values():
        selector = learner.resources.label_selector
        assert selector and sum(matches(selector, group["labels"]) for group in groups) == 1
    other = {**manifest("rayjob")["spec"], "suspend": True, "entrypoint": job["entrypoint"]}
    kept = other.keys() - {"rayClusterSpec"}
    assert {key: other[key] for key in kept} == {key: job[key] for key in job if key != "rayClusterSpec"}
    assert spec["headGroupSpec"] == other["rayClusterSpec"]["headGroupSpec"]


@pytest.mark.parametrize("name", JOBS)
def test_the_job_runs_what_genray_takes(name):
    words = shlex.split(manifest(name)["spec"]["entrypoint"])
    assert words[:3] == ["python", "-m", "genray.train"]
    args = parse_args(words[3:])
    config = load_config(str(ROOT / args.config.removeprefix("/home/ray/genray/")), args.overrides)
    assert (args.address, args.resume) == ("auto", True)
    assert args.storage.startswith("s3://")
    assert config.device == "cuda"  # with auto, a cluster without a GPU yet would train on CPUs
    assert config.runtime.startup_timeout_s >= 600


# --- image and scripts ---------------------------------------------------------------------------------------------


def read_by_install():
    return re.findall(r'"\$source/([\w.]+)"', (CLUSTER / "install.sh").read_text())


def test_the_image_gets_all_that_install_needs():
    dockerfile = (CLUSTER / "Dockerfile").read_text()
    copied = " ".join(re.findall(r"^COPY --chown=\S+ (.+) \S+$", dockerfile, re.M)).split()
    assert set(read_by_install()) == {"genray", "pyproject.toml", "README.md", "constraints.txt"}
    assert set(read_by_install()) | {"configs", "cluster/install.sh"} == set(copied)
    ignore = (ROOT / ".dockerignore").read_text().splitlines()
    sent = [line[1:] for line in ignore if line.startswith("!")]
    assert "*" in ignore
    for source in copied:
        assert (ROOT / source).exists()
        assert any(fnmatch(source, pattern) for pattern in sent)
    assert "RUN bash /home/ray/genray/cluster/install.sh /home/ray/genray /home/ray/genray-venv" in dockerfile


@pytest.mark.parametrize("name", ["install.sh", "slurm.sh"])
def test_scripts_are_sound(name):
    text = (CLUSTER / name).read_text()
    assert text.startswith("#!/usr/bin/env bash\n")
    assert "\nset -euo pipefail\n" in text
    done = subprocess.run(["bash", "-n", CLUSTER / name], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_slurm_script_gives_ray_and_genray_their_arguments(tmp_path):
    """With Slurm's own commands and Ray's replaced by ones that print."""
    programs = {"scontrol": "echo node7; echo node8", "srun": 'echo "$RAY_AUTH_MODE ${#RAY_AUTH_TOKEN} $*"'}
    programs["python"] = f"echo {'ab' * 32}"
    (tmp_path / "venv/bin").mkdir(parents=True)
    (tmp_path / "venv/bin/activate").write_text(f"PATH={tmp_path / 'venv/bin'}:$PATH\n")
    for name, body in programs.items():
        (tmp_path / f"venv/bin/{name}").write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / f"venv/bin/{name}").chmod(0o755)
    slurm = {"SUBMIT_DIR": tmp_path, "JOB_NODELIST": "node[7-8]", "JOB_ID": 1234567, "JOB_NUM_NODES": 2}
    slurm |= {"CPUS_PER_TASK": 8, "GPUS_ON_NODE": 1}
    environment = {f"SLURM_{key}": str(value) for key, value in slurm.items()} | {"PATH": "/usr/bin:/bin"}
    line = ["bash", CLUSTER / "slurm.sh", "--config", "a b.yaml"]
    done = subprocess.run(line, env={**environment, "GENRAY_VENV": "venv"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    mode, length, *words = done.stdout.split()
    assert (mode, length) == ("token", "64")
    start, genray = " ".join(words).split(" -- ")
    assert "ray symmetric-run --address node7:24567 --min-nodes 2 --num-cpus 8 --num-gpus 1" in start
    assert genray == "python -m genray.train --address node7:24567 --storage runs --resume --config a b.yaml"


# --- nothing open ---------------------------------------------------------------------------------------------------

OPEN_TO_ALL = re.compile(r"0\.0\.0\.0|::/0|(?:dashboard-host|--node-ip-address)=(?!127\.0\.0\.1)")
EXPOSES = {"hostPort", "hostNetwork", "nodePort", "IpPermissions", "use_external_head_ip", "enableIngress"}


def open_ports_in(config):
    """Keys and values of parsed YAML that let somebody in from outside."""
    found = [f"{path}={value}" for path, value in leaves(config) if OPEN_TO_ALL.search(str(value))]
    found += [path for path, value in leaves(config) if value and EXPOSES & set(re.split(r"[.\[\]]+", path))]
    found += [path for path, value in leaves(config) if str(value) in ("LoadBalancer", "NodePort")]
    if not isinstance(config.get("provider"), dict):
        return found
    kind = config["provider"]["type"]
    nodes = [node["node_config"] for node in config.get("available_node_types", {}).values()]
    if kind == "aws" and not all(node.get("SecurityGroupIds") for node in nodes):
        found.append("a node without SecurityGroupIds: the group that Ray makes opens port 22 to the world")
    if kind == "gcp" and not all(node.get("networkInterfaces") for node in nodes):
        found.append("a node without networkInterfaces: the default network opens port 22 to the world")
    if kind == "azure" and not config["provider"].get("use_internal_ips"):
        found.append("public addresses: the rule that Ray makes opens port 22 to the world")
    return found


@pytest.mark.parametrize("path", [p for p in FILES if p.suffix == ".yaml"], ids=lambda path: path.stem)
def test_no_open_port(path):
    assert open_ports_in(yaml.safe_load(path.read_text())) == []


def test_only_the_namespace_and_the_operator_reach_the_pods():
    (rule,) = manifest("network_policy")["spec"]["ingress"]
    assert [next(iter(peer)) for peer in rule["from"]] == ["podSelector", "namespaceSelector"]
    assert all("ipBlock" not in peer for peer in rule["from"])
    names = {manifest(name)["metadata"]["namespace"] for name in [*MANIFESTS, "network_policy"]}
    assert names == {"genray"}


# --- the page ------------------------------------------------------------------------------------------------------
