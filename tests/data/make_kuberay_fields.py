"""Writes kuberay_fields.json, the names and types of the fields that cluster/kuberay/ may use.

    git clone --depth 1 --branch v1.7.0 REPOSITORY kuberay        # KubeRay's operator
    python tests/data/make_kuberay_fields.py kuberay/helm-chart/kuberay-operator/crds 1.7.0

Read from the custom resource definitions (RayJob and RayCluster, version v1): a field's path -> its type, its allowed
values where there are few, "!" in front where it is required. "[]" stands for a list's items, "{}" for a map's values.
Left out, so that the file stays small: what a pod can have and ours have not.
"""

import json
import sys
from pathlib import Path

import yaml

LEFT_OUT = """
affinity ephemeralContainers lifecycle livenessProbe readinessProbe startupProbe initContainers dnsConfig
topologySpreadConstraints headService ingressOptions historyServerOptions networkPolicy deletionStrategy
submitterPodTemplate seLinuxOptions windowsOptions appArmorProfile resizePolicy redisUsername redisPassword envFrom
volumeDevices fieldRef resourceFieldRef claims
""".split()
VOLUMES = ("name", "emptyDir", "secret", "configMap", "persistentVolumeClaim")


def fields_of(schema, path="", required=False):
    """Yields (path, description) of a schema and of all that is in it."""
    kind = "int|str" if schema.get("x-kubernetes-int-or-string") else schema.get("type", "any")
    yield path, ("!" if required else "") + "|".join([kind, *(f"={value}" for value in schema.get("enum", []))])
    for name, inner in schema.get("properties", {}).items():
        volume_of_another_kind = path.endswith("volumes[]") and name not in VOLUMES
        if name not in LEFT_OUT and not volume_of_another_kind:
            yield from fields_of(inner, f"{path}.{name}", name in schema.get("required", []))
    if schema.get("type") == "array":
        yield from fields_of(schema["items"], f"{path}[]")
    if isinstance(schema.get("additionalProperties"), dict):
        yield from fields_of(schema["additionalProperties"], path + "{}")


def spec_schema(folder, plural):
    crd = yaml.load((folder / f"ray.io_{plural}.yaml").read_text(), Loader=yaml.CSafeLoader)
    version = next(v for v in crd["spec"]["versions"] if v["name"] == "v1")
    return version["schema"]["openAPIV3Schema"]["properties"]["spec"]


def below(fields, path):
    """The fields in one, with their paths from there."""
    return {name[len(path) :]: kind for name, kind in fields.items() if name.startswith(path + ".")}


def without(fields, path):
    """All but the fields in one; itself stays."""
    return {name: kind for name, kind in fields.items() if not name.startswith(path + ".")}


def main(folder, version):
    folder = Path(folder)
    job, cluster = spec_schema(folder, "rayjobs"), spec_schema(folder, "rayclusters")
    fields = {"RayCluster": dict(fields_of(cluster)), "RayJob": dict(fields_of(job))}
    head, worker = ".headGroupSpec.template", ".workerGroupSpecs[].template"
    assert below(fields["RayJob"], ".rayClusterSpec") == below(fields["RayCluster"], "")
    assert below(fields["RayCluster"], worker) == below(fields["RayCluster"], head)
    fields = {
        "RayJob": without(fields["RayJob"], ".rayClusterSpec"),
        "RayCluster": without(without(fields["RayCluster"], head), worker),
        "Template": below(fields["RayCluster"], head),
    }
    about = "made by make_kuberay_fields.py; RayJob.rayClusterSpec is a RayCluster, each group's template a Template"
    output = Path(__file__).with_name("kuberay_fields.json")
    output.write_text(json.dumps({"about": about, "kuberay": version, **fields}, indent=0) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
