"""Files in `cluster/`: what they name exists, and the programs that read them take them."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml
from prometheus_client.parser import text_string_to_metric_families
from ray._private.runtime_env.packaging import create_package
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.serve.schema import ServeDeploySchema

from mmedpo_ray.config.load import load
from mmedpo_ray.serve.metrics import ServeMetrics

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
KUBERNETES = CLUSTER / "kubernetes"
SCHEMAS = ROOT.parent / "shared" / "kuberay_crds"
CUSTOM = {"RayCluster": "spec", "RayJob": "spec.rayClusterSpec", "RayService": "spec.rayClusterConfig"}
OVERLAYS = ("laptop", "gpu")
LABEL = {"app.kubernetes.io/part-of": "mmedpo-ray"}
needs_kubectl = pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")


def render(overlay: str) -> list[dict[str, Any]]:
    command = ["kubectl", "kustomize", str(KUBERNETES / "overlays" / overlay)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    return list(yaml.safe_load_all(done.stdout))


def strict(schema: Any) -> Any:
    """The schema of a custom resource without room for unknown fields, as JSON Schema."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: strict(value) for key, value in schema.items()}
    if found.pop("x-kubernetes-int-or-string", False):
        return {"type": ["integer", "string"]}
    if "properties" in found and not found.get("x-kubernetes-preserve-unknown-fields"):
        found.setdefault("additionalProperties", False)
    return found


def at(document: dict[str, Any], path: str) -> Any:
    for name in path.split("."):
        document = document[name]
    return document


def groups(document: dict[str, Any]) -> list[dict[str, Any]]:
    """Head and workers of a cluster."""
    cluster = at(document, CUSTOM[document["kind"]])
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]


def overrides_of(words: list[str]) -> list[str]:
    return [word for word in words if "=" in word and not word.startswith("-")]


def check_entrypoint(command: str) -> None:
    """A job's command names a script and a configuration that exist, with settings that load."""
    program, script, *rest = shlex.split(command)
    assert program == "python" and (ROOT / script).is_file()
    config = rest[rest.index("--config") + 1]
    load(str(ROOT / config), overrides_of(rest))


@needs_kubectl
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_overlays_render_to_resources_that_kuberay_takes(overlay: str) -> None:
    if not SCHEMAS.is_dir():
        pytest.skip("no schemas beside the checkout")
    documents = {item["kind"]: item for item in render(overlay)}
    assert set(documents) >= {*CUSTOM, "PersistentVolumeClaim", "NetworkPolicy"}
    for kind in CUSTOM:
        schema = json.loads((SCHEMAS / f"{kind.lower()}_v1.json").read_text())
        spec = strict(schema["properties"]["spec"])
        jsonschema.Draft7Validator(spec).validate(documents[kind]["spec"])


def test_the_check_is_strict() -> None:
    if not SCHEMAS.is_dir():
        pytest.skip("no schemas beside the checkout")
    document = yaml.safe_load((KUBERNETES / "base" / "raycluster.yaml").read_text())
    schema = json.loads((SCHEMAS / "raycluster_v1.json").read_text())
    validator = jsonschema.Draft7Validator(strict(schema["properties"]["spec"]))
    validator.validate(document["spec"])
    document["spec"]["workerGroupSpecs"][0]["idleTimeoutSecond"] = 60
    assert not validator.is_valid(document["spec"])


@needs_kubectl
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_pod_is_of_the_network_runs_the_image_and_sees_the_volume(overlay: str) -> None:
    for document in render(overlay):
        if document["kind"] not in CUSTOM:
            continue
        assert at(document, CUSTOM[document["kind"]])["rayVersion"] == ray.__version__
        for group in groups(document):
            template = group["template"]
            assert template["metadata"]["labels"].items() >= LABEL.items()
            [container] = template["spec"]["containers"]
            assert container["image"].endswith(f":{'gpu' if overlay == 'gpu' else 'cpu'}")
            assert template["spec"]["securityContext"]["runAsNonRoot"] is True
            mounted = {mount["name"] for mount in container["volumeMounts"]}
            assert {"shared"} <= mounted == {volume["name"] for volume in template["spec"]["volumes"]}
            has_gpu = "nvidia.com/gpu" in container["resources"]["limits"]
            assert has_gpu == ("tolerations" in template["spec"])
            if "groupName" in group:
                assert group["minReplicas"] == 0 and group["idleTimeoutSeconds"] > 0


@needs_kubectl
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_job_and_the_endpoint_name_what_exists(overlay: str) -> None:
    documents = {item["kind"]: item for item in render(overlay)}
    check_entrypoint(documents["RayJob"]["spec"]["entrypoint"])
    served = ServeDeploySchema.model_validate(
        yaml.safe_load(documents["RayService"]["spec"]["serveConfigV2"])
    )
    [application] = served.applications
    module, _, name = application.import_path.partition(":")
    assert callable(getattr(__import__(module, fromlist=[name]), name))
    config = load(None, [f"{key}={value}" for key, value in application.args.items()])
    assert config.serve.max_replicas == 4 and config.serve.allowed_hosts == ("mmedpo-endpoint-serve-svc",)
    [engine] = documents["RayService"]["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    mounts = {mount["mountPath"] for mount in engine["template"]["spec"]["containers"][0]["volumeMounts"]}
    assert config.serve.api_keys_file is not None
    assert str(Path(config.serve.api_keys_file).parent) in mounts


def test_the_dashboard_shows_metrics_that_exist() -> None:
    dashboard = json.loads((KUBERNETES / "grafana-dashboard.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    used = set(re.findall(r"\b(?:mmedpo|ray|autoscaler)_\w+", " ".join(queries)))
    metrics = ServeMetrics()
    metrics.requests.labels("chat", "base").inc()
    metrics.rejections.labels("limit").inc()
    metrics.tokens.labels("base", "prompt").inc()
    families = text_string_to_metric_families(metrics.text().decode())
    ours = {sample.name for family in families for sample in family.samples}
    boards = Path(ray.__file__).parent / "dashboard" / "modules" / "metrics" / "dashboards"
    known = set(re.findall(r"\b(?:ray|autoscaler)_\w+", " ".join(p.read_text() for p in boards.glob("*.py"))))
    assert used <= ours | known
    assert {name for name in ours if name.endswith(("_total", "_bucket"))} <= used


@pytest.mark.parametrize("cloud", ["aws", "gcp"])
def test_ray_up_takes_the_file(cloud: str) -> None:
    """Ray's schema and its preparation; nothing is asked of a cloud."""
    config = yaml.safe_load((CLUSTER / f"{cloud}.yaml").read_text())
    prepared = prepare_config(config)
    validate_config(prepared)
    types = prepared["available_node_types"]
    assert types[prepared["head_node_type"]]["resources"].get("GPU", 0) == 0
    workers = {name: kind for name, kind in types.items() if name != prepared["head_node_type"]}
    assert all(kind["min_workers"] == 0 for kind in workers.values())
    assert types["gpu_judge"]["resources"] == types["gpu_judge_on_demand"]["resources"] != {}
    assert prepared["provider"]["use_internal_ips"] and prepared["idle_timeout_minutes"] <= 5


@pytest.mark.parametrize("cloud", ["aws", "gcp"])
def test_commands_in_the_head_of_a_file_exist(cloud: str) -> None:
    text = "".join(
        line.removeprefix("#").replace("\\", " ").strip() + " "
        for line in (CLUSTER / f"{cloud}.yaml").read_text().splitlines()[:6]
    )
    command = re.search(r"-- (python jobs/\S+ .*?run\.folder=\S+)", text)
    assert command is not None
    check_entrypoint(command[1])
    assert "--runtime-env cluster/runtime_env.yaml" in text


def test_a_job_uploads_little(tmp_path: Path) -> None:
    """As Ray packs the working directory with these settings."""
    environment = yaml.safe_load((CLUSTER / "runtime_env.yaml").read_text())
    target = tmp_path / "package.zip"
    create_package(
        str(ROOT), target, include_gitignore=True, excludes=environment["excludes"], include_parent_dir=False
    )
    assert target.stat().st_size < 1_000_000
    names = zipfile.ZipFile(target).namelist()
    tops = {name.split("/")[0] for name in names}
    assert tops >= {"jobs", "configs"} and not tops & {".git", ".venv", "runs", "tests", "mmedpo_ray"}


def test_what_the_image_copies_exists() -> None:
    lines = re.sub(r"\\\n", " ", (CLUSTER / "Dockerfile").read_text()).splitlines()
    let_in = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {word for line in lines if line.startswith("COPY") for word in line.split()[1:-1]}
    assert copied <= let_in and all((ROOT / path).exists() for path in copied | let_in)
    stages = [line.split()[-1] for line in lines if line.startswith("FROM")]
    assert stages == ["base", "gpu", "cpu"]
    assert sum(line == "USER ray" for line in lines) == 2
    assert sum(line.startswith("HEALTHCHECK") for line in lines) == 2
    # Both images hold the jobs that the manifests run.
    assert sum(line == "COPY jobs jobs" for line in lines) == 2
