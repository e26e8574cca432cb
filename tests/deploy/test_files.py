"""docker/ and deploy/ against schemas, linters and the rules of rules.py; each rule finds a mistake that is planted."""

from __future__ import annotations

import copy
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

import phisam
from ray_jobs import cli, config
from tests.deploy import rules

ROOT = Path(__file__).parents[2]
DOCKER, DEPLOY = ROOT / "docker", ROOT / "deploy"
SCHEMAS = ROOT.parent / "shared" / "schemas" / "kuberay-1.7.0"
BIN = Path(sys.executable).parent

Object = dict[str, Any]


def tool(*command: str, check: bool = True) -> str:
    """What one of the validators of the dev extra says; it fails the test with that."""
    done = subprocess.run([str(BIN / command[0]), *command[1:]], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0 or not check, done.stdout + done.stderr
    return done.stdout + done.stderr


@cache
def _kustomized(overlay: str) -> str:
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("needs kubectl, which builds kustomizations")
    done = subprocess.run([kubectl, "kustomize", str(DEPLOY / overlay)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def kustomized(overlay: str) -> list[Object]:
    return [*yaml.safe_load_all(_kustomized(overlay))]


OVERLAYS = ["base", "overlays/kind", "overlays/gpu"]


def compose() -> Object:
    loaded: Object = yaml.safe_load((DOCKER / "compose.yaml").read_text())
    return loaded


def rendered(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[Object]:
    assert cli.main(["render", "k8s", *arguments]) == 0
    return [*yaml.safe_load_all(capsys.readouterr().out)]


def made_secrets() -> dict[str, set[str]]:
    """The secrets that make-secrets.sh makes, with their keys."""
    text = (DEPLOY / "make-secrets.sh").read_text().replace("\\\n", " ")
    made = {}
    for line in re.findall(r"^\s*create (phisam\S*) (.*)$", text, re.MULTILINE):
        keys = re.findall(r'(?:^|\s)([a-z][a-z_-]+) "\$', line[1])
        made[line[0]] = set(keys)
    return made


# schemas and linters


def test_compose_files_follow_the_specification() -> None:
    tool("check-jsonschema", "--builtin-schema", "vendor.compose-spec", *map(str, DOCKER.glob("compose*.yaml")))


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_kubernetes_objects_follow_their_schema(overlay: str, tmp_path: Path) -> None:
    path = tmp_path / "objects.yaml"
    path.write_text(_kustomized(overlay))
    tool("kubernetes-validate", "--strict", str(path))


def test_dockerfiles_pass_hadolint() -> None:
    tool("hadolint", "--failure-threshold", "info", *map(str, DOCKER.glob("Dockerfile*")))


def test_scripts_pass_shellcheck() -> None:
    scripts = [*DOCKER.rglob("*.sh"), *DEPLOY.rglob("*.sh"), *DEPLOY.rglob("*.sbatch")]
    assert len(scripts) >= 8
    tool("shellcheck", *map(str, scripts))
    for script in scripts:
        assert os.access(script, os.X_OK), script


def test_yaml_files_pass_yamllint() -> None:
    tool("yamllint", "--strict", "-c", str(DEPLOY / ".yamllint"), str(DOCKER), str(DEPLOY))


def ray_up_takes(cluster: Object) -> None:
    import ray.autoscaler

    schema = json.loads((Path(ray.autoscaler.__path__[0]) / "ray-schema.json").read_text())
    jsonschema.validate(cluster, schema)


def test_ray_up_takes_the_cluster_file() -> None:
    cluster = yaml.safe_load((DEPLOY / "ray" / "cluster.yaml").read_text())
    ray_up_takes(cluster)
    with pytest.raises(jsonschema.ValidationError, match="min_workers"):
        ray_up_takes({**cluster, "min_workers": 2})


@cache
def _kuberay(kind: str) -> jsonschema.Draft7Validator | None:
    path = SCHEMAS / f"{kind.lower()}.schema.json"
    return jsonschema.Draft7Validator(json.loads(path.read_text())) if path.exists() else None


def kuberay_takes(item: Object) -> None:
    """Fails if KubeRay's schema, where it is beside this checkout, refuses the object."""
    validator = _kuberay(item["kind"])
    if validator is None:
        pytest.skip("KubeRay's schemas are not beside this checkout")
    validator.validate(item)


@pytest.mark.parametrize("recipe", config.recipe_names())
def test_every_recipe_renders_to_what_kuberay_takes(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    root = ["--set", "data.root=/data"] if config_needs_root(recipe) else []
    configuration, job = rendered(capsys, recipe, "--gpus", "1", "--workers", "2", *root)
    kuberay_takes(job)
    assert [*rules.ray_rules([job], importlib.metadata.version("ray"))] == []
    assert yaml.safe_load(configuration["data"]["run.yaml"])["scaling"]["num_workers"] == 2


def config_needs_root(recipe: str) -> bool:
    return recipe.startswith("paper/")


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("train", []),
        ("train", ["--spot", "--gpus", "1"]),
        ("train", ["--queue", "team-a"]),
        ("sweep", []),
        ("cluster", ["--max-workers", "4"]),
    ],
)
def test_what_is_rendered_fits_the_base(kind: str, options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    run = {"train": ["mnist5k-frob"], "sweep": ["digits-rho"], "cluster": []}[kind]
    objects = rendered(capsys, *run, "--kind", kind, "--workers", "2", *options)
    kuberay_takes(objects[-1])
    problems = [
        *rules.pods_are_contained(objects),
        *rules.pods_say_what_they_need(objects),
        *rules.pods_find_their_parts(objects, kustomized("base"), made_secrets()),
        *rules.ray_rules(objects, importlib.metadata.version("ray")),
        *rules.unpinned(rules.images(objects)),
    ]
    assert problems == []


@pytest.mark.parametrize("path", sorted((DEPLOY / "jobs").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_jobs_that_lie_here_are_what_render_prints(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = path.read_text().splitlines()[0].removeprefix("# phisam ").split(" > ")[0].split()
    assert cli.main(command) == 0
    assert path.read_text().partition("\n")[2] == capsys.readouterr().out


def test_a_small_run_fits_a_laptop_s_quota(capsys: pytest.CaptureFixture[str]) -> None:
    """As the kind overlay says to render it."""
    text = (DEPLOY / "overlays" / "kind" / "kustomization.yaml").read_text()
    told = re.search("phisam render k8s (.*?)(?: \\||$)", text, re.MULTILINE)
    assert told
    objects = kustomized("overlays/kind")
    hard = objects[index(objects, "ResourceQuota", "phisam")]["spec"]["hard"]
    job = rendered(capsys, *told[1].split())[-1]
    group = job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    pods = [pod for _, pod in rules.pods([*objects, job])]
    pods += [group["template"]["spec"]] * (group["replicas"] - 1)
    needed = sum(
        memory_gib(container["resources"]["requests"]["memory"]) for pod in pods for container in rules.containers(pod)
    )
    assert needed <= memory_gib(hard["requests.memory"])


def memory_gib(text: str) -> float:
    return float(text[:-2]) / {"Gi": 1, "Mi": 1024}[text[-2:]]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["mnist5k-frob", "--max-workers", "4"], "--max-workers goes with --kind cluster alone"),
        (["--kind", "cluster", "--max-workers", "4", "--queue", "q"], "--queue or --max-workers"),
        (["--kind", "cluster", "mnist5k-frob"], "--kind cluster takes none"),
        ([], "take a recipe or a file"),
    ],
)
def test_what_cannot_be_rendered_is_said(arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["render", "k8s", *arguments]) == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "change", "check"),
    [
        (
            "compose.yaml",
            ("image: ${S3_IMAGE:?}", "imag: x"),
            ["check-jsonschema", "--builtin-schema", "vendor.compose-spec"],
        ),
        ("Dockerfile", ("FROM ${BASE} AS run", "FROM debian AS run"), ["hadolint", "--failure-threshold", "info"]),
        ("mlflow/serve.sh", ('"$1"', "$1"), ["shellcheck"]),
        (
            "compose.yaml",
            ("  postgres:\n", "   postgres:\n"),
            ["yamllint", "--strict", "-c", str(DEPLOY / ".yamllint")],
        ),
    ],
)
def test_a_linter_sees_a_mistake(name: str, change: tuple[str, str], check: list[str], tmp_path: Path) -> None:
    text = (DOCKER / name).read_text()
    assert change[0] in text
    path = tmp_path / Path(name).name
    path.write_text(text.replace(*change))
    done = subprocess.run([str(BIN / check[0]), *check[1:], str(path)], capture_output=True, timeout=120)
    assert done.returncode != 0


def test_kubernetes_schema_sees_a_mistake(tmp_path: Path) -> None:
    path = tmp_path / "objects.yaml"
    path.write_text(_kustomized("base").replace("containerPort: 5432", "containerport: 5432"))
    done = subprocess.run([str(BIN / "kubernetes-validate"), "--strict", str(path)], capture_output=True, timeout=120)
    assert done.returncode != 0


@pytest.mark.parametrize("kind", ["RayJob", "RayCluster"])
def test_kuberay_s_schema_sees_a_mistake(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    run = ["mnist5k-frob"] if kind == "RayJob" else ["--kind", "cluster"]
    item = rendered(capsys, *run)[-1]
    cluster = item["spec"].get("rayClusterSpec", item["spec"])
    cluster["headGroupSpecs"] = cluster.pop("headGroupSpec")
    with pytest.raises(jsonschema.ValidationError):
        kuberay_takes(item)


# our own rules


RAY, MLFLOW = {"ray.io/is-ray-node": "yes"}, {"app.kubernetes.io/name": "mlflow"}
POSTGRES, BACKUP = {"app.kubernetes.io/name": "postgres"}, {"app.kubernetes.io/name": "postgres-backup"}
FLOWS = [(RAY, RAY, 6379), (RAY, MLFLOW, 5000), (MLFLOW, POSTGRES, 5432), (BACKUP, POSTGRES, 5432)]


def test_what_must_flow_may() -> None:
    assert [*rules.flows_are_open(kustomized("base"), FLOWS)] == []
    s3 = {"app.kubernetes.io/name": "s3"}
    assert [*rules.flows_are_open(kustomized("overlays/kind"), [*FLOWS, (MLFLOW, s3, 7070)])] == []


@pytest.mark.parametrize("name", ["ray", "mlflow", "postgres", "postgres-backup"])
def test_a_policy_that_is_missing_is_found(name: str) -> None:
    objects = kustomized("base")
    del objects[index(objects, "NetworkPolicy", name)]
    assert [*rules.flows_are_open(objects, FLOWS)] != []


def merged(base: Object, over: Object) -> Object:
    """As Docker Compose merges two files, for what ours have: sections by key, all else replaced."""
    both = {**base, **over}
    shared = [key for key in base if key in over and isinstance(base[key], dict)]
    return {**both, **{key: merged(base[key], over[key]) for key in shared}}


@pytest.mark.parametrize("gpu", [False, True])
def test_the_rules_find_nothing_in_compose(gpu: bool) -> None:
    told = compose()
    if gpu:
        told = merged(told, yaml.safe_load((DOCKER / "compose.gpu.yaml").read_text()))
    assert [
        *rules.compose_can_write_secrets(told),
        *rules.compose_names(told),
        *rules.compose_waits_for_what_gets_healthy(told),
        *rules.compose_listens_on_loopback(told),
        *rules.compose_is_contained(told),
        *rules.unpinned(service["image"] for service in told["services"].values()),
    ] == []


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_rules_find_nothing_in_kubernetes(overlay: str) -> None:
    objects = kustomized(overlay)
    assert [
        *rules.pods_are_contained(objects),
        *rules.pods_say_what_they_need(objects),
        *rules.pods_find_their_parts(objects, [], made_secrets()),
        *rules.services_reach_pods(objects),
        *rules.nothing_speaks_by_default(objects),
        *rules.unpinned(rules.images(objects)),
    ] == []


def test_no_file_has_a_default_secret() -> None:
    for path in [*DOCKER.rglob("*"), *DEPLOY.rglob("*")]:
        if path.is_file() and path.suffix in (".yaml", ".sh", ".sbatch", ".example", ".lock"):
            assert [*rules.default_secrets(path.read_text())] == [], path


def _set(path: str, value: object) -> Callable[[Object], None]:
    def plant(tree: Object) -> None:
        *parents, last = path.split("/")
        node: Any = tree
        for part in parents:
            node = node[int(part) if isinstance(node, list) else part]
        if value is None:
            del node[last]
        else:
            node[int(last) if isinstance(node, list) else last] = value

    return plant


COMPOSE_MISTAKES: list[tuple[Callable[[Object], Iterator[str]], str, object]] = [
    (rules.compose_can_write_secrets, "services/mlflow/read_only", True),
    (rules.compose_names, "services/mlflow/depends_on", {"postgress": {"condition": "service_healthy"}}),
    (rules.compose_names, "secrets/ray_token", None),
    (rules.compose_names, "configs/unused", {"content": ""}),
    (rules.compose_waits_for_what_gets_healthy, "services/postgres/healthcheck", None),
    (rules.compose_listens_on_loopback, "services/mlflow/ports", ["5000:5000"]),
    (rules.compose_listens_on_loopback, "services/ray-head/network_mode", "host"),
    (rules.compose_is_contained, "services/s3/user", None),
    (rules.compose_is_contained, "services/ray-worker/cap_drop", None),
    (rules.compose_is_contained, "services/postgres/security_opt", []),
    (rules.compose_is_contained, "services/mlflow/privileged", True),
]


@pytest.mark.parametrize(("rule", "path", "value"), COMPOSE_MISTAKES)
def test_a_mistake_in_compose_is_found(rule: Callable[[Object], Iterator[str]], path: str, value: object) -> None:
    told = copy.deepcopy(compose())
    assert [*rule(told)] == []
    _set(path, value)(told)
    assert [*rule(told)] != []


def index(objects: list[Object], kind: str, name: str) -> int:
    return next(i for i, o in enumerate(objects) if (o["kind"], o["metadata"]["name"]) == (kind, name))


POD = "spec/template/spec"
KUBERNETES_MISTAKES: list[tuple[Callable[..., Iterator[str]], str, str, str, object]] = [
    (rules.pods_are_contained, "Deployment", "mlflow", f"{POD}/securityContext", {"runAsNonRoot": True}),
    (rules.pods_are_contained, "Deployment", "mlflow", f"{POD}/automountServiceAccountToken", None),
    (rules.pods_are_contained, "Deployment", "mlflow", f"{POD}/hostNetwork", True),
    (rules.pods_are_contained, "StatefulSet", "postgres", f"{POD}/containers/0/securityContext/capabilities", {}),
    (
        rules.pods_are_contained,
        "StatefulSet",
        "postgres",
        f"{POD}/volumes/0",
        {"name": "data", "hostPath": {"path": "/"}},
    ),
    (rules.pods_say_what_they_need, "Deployment", "mlflow", f"{POD}/containers/0/resources/requests", {"cpu": "1"}),
    (rules.services_reach_pods, "Service", "mlflow", "spec/selector", {"app.kubernetes.io/name": "mlfow"}),
    (rules.services_reach_pods, "Service", "mlflow", "spec/type", "LoadBalancer"),
    (rules.services_reach_pods, "Service", "mlflow", "spec/ports/0/targetPort", "web"),
    (rules.nothing_speaks_by_default, "NetworkPolicy", "nothing-by-default", "spec/policyTypes", ["Ingress"]),
]


@pytest.mark.parametrize(("rule", "kind", "name", "path", "value"), KUBERNETES_MISTAKES)
def test_a_mistake_in_kubernetes_is_found(
    rule: Callable[..., Iterator[str]], kind: str, name: str, path: str, value: object
) -> None:
    objects = kustomized("base")
    assert [*rule(objects)] == []
    _set(path, value)(objects[index(objects, kind, name)])
    assert [*rule(objects)] != []


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (f"{POD}/serviceAccountName", "default"),
        (f"{POD}/volumes/1/projected/sources/0/secret/name", "phisam-postgress"),
        (f"{POD}/volumes/1/projected/sources/0/secret/items/0/key", "pasword"),
        (f"{POD}/volumes/0/name", "temporary"),
        (f"{POD}/containers/0/env/0", {"name": "POSTGRES_PASSWORD", "value": "hunter2"}),
    ],
)
def test_a_part_that_is_not_there_is_found(path: str, value: object) -> None:
    objects = kustomized("base")
    _set(path, value)(objects[index(objects, "Deployment", "mlflow")])
    assert [*rules.pods_find_their_parts(objects, [], made_secrets())] != []


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("spec/rayClusterSpec/rayVersion", None),
        ("spec/rayClusterSpec/rayVersion", "2.9.0"),
        ("spec/rayClusterSpec/authOptions", {"mode": "disabled"}),
        ("spec/rayClusterSpec/networkPolicy", {}),
        ("spec/rayClusterSpec/headGroupSpec/rayStartParams/num-cpus", "4"),
        ("spec/submissionMode", "K8sJobMode"),
        ("spec/deletionStrategy", {"deletionRules": []}),
        ("spec/backoffLimit", None),
        ("metadata/name", "x" * 48),
    ],
)
def test_a_mistake_in_a_rayjob_is_found(path: str, value: object, capsys: pytest.CaptureFixture[str]) -> None:
    _, job = rendered(capsys, "mnist5k-frob")
    version = importlib.metadata.version("ray")
    assert [*rules.ray_rules([job], version)] == []
    _set(path, value)(job)
    assert [*rules.ray_rules([job], version)] != []


@pytest.mark.parametrize(
    "text", ["a: ${X_PASSWORD:-hunter2}", "RAY_TOKEN=abc", "- MLFLOW_SECRET_KEY: abc", "S3_SECRET_ACCESS_KEY: minio123"]
)
def test_a_default_secret_is_found(text: str) -> None:
    assert [*rules.default_secrets(text)] != []


@pytest.mark.parametrize("image", ["postgres", "postgres:latest", "registry.example.com:5000/phisam"])
def test_an_image_without_a_tag_is_found(image: str) -> None:
    assert [*rules.unpinned([image])] != []


# versions


def locked() -> dict[str, str]:
    lines = (DOCKER / "images.lock").read_text().splitlines()
    return {line.partition("=")[0]: line.partition("=")[2].partition("@")[0] for line in lines if "=" in line[:40]}


def test_versions_are_those_of_the_package() -> None:
    constraints = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    docker, mlflow = ((DOCKER / name).read_text() for name in ("Dockerfile", "Dockerfile.mlflow"))
    assert locked()["RAY_IMAGE"].startswith(f"docker.io/rayproject/ray:{constraints['ray']}-py312-cu")
    assert f"ARG BASE={locked()['RAY_IMAGE']}" in docker
    assert locked()["RAY_CPU_IMAGE"] in docker
    assert f"ARG WHEEL_BASE={locked()['PYTHON_IMAGE']}" in docker
    assert f"ARG BASE={locked()['PYTHON_IMAGE']}" in mlflow
    cuda = ".".join(constraints["nvidia-cuda-runtime"].split(".")[:2])  # what torch brings
    assert f"ARG CUDA_NEEDED={cuda}" in docker
    for path in [DOCKER / ".env.example", *DEPLOY.rglob("*.yaml"), DOCKER / "Dockerfile", DOCKER / "Dockerfile.mlflow"]:
        tags = re.findall(r"phisam(?:-mlflow)?:(\d+\.\d+\.\d+)", path.read_text())
        assert set(tags) <= {phisam.__version__}, path


def test_images_are_those_of_the_lock_file() -> None:
    for overlay in OVERLAYS:
        foreign = {image for image in rules.images(kustomized(overlay)) if image.startswith("docker.io/")}
        assert foreign <= set(locked().values())


def test_every_locked_image_has_a_tag() -> None:
    assert len(locked()) == 5
    assert [*rules.unpinned(locked().values())] == []


def test_constraints_hold_all_that_the_images_install() -> None:
    constraints = {
        name.lower() for name in re.findall("^([^=]+)==", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    }
    told = (
        subprocess.run(
            [sys.executable, str(DOCKER / "requirements.py"), "service"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        + (DOCKER / "mlflow" / "requirements.txt").read_text()
    )
    wanted = {name.lower() for name in re.findall(r"^[\w.-]+", told, re.MULTILINE)}
    assert wanted <= constraints


def test_the_dashboard_and_the_alerts_ask_for_what_there_is() -> None:
    from ray_jobs import meters

    source = Path(meters.__file__).read_text()
    ours = {f"ray_{name}" for name in re.findall('"(phisam_[a-z_]+)"', source)}
    asked = "".join((DEPLOY / "observability" / name).read_text() for name in ("dashboard.json", "alerts.yml"))
    assert set(re.findall("ray_phisam_[a-z_]+", asked)) <= ours


def test_the_lock_file_invents_no_digest() -> None:
    digests = re.findall("@(.*)$", (DOCKER / "images.lock").read_text().partition("=")[2], re.MULTILINE)
    assert all(re.fullmatch("sha256:[0-9a-f]{64}", digest) for digest in digests)


def test_the_image_gets_all_that_the_service_needs() -> None:
    told = subprocess.run(
        [sys.executable, str(DOCKER / "requirements.py"), "service"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    wanted = {line for name in ("service", "sharpness") for line in extras[name] if not line.startswith("phisam")}
    assert wanted <= set(told)
    assert not [line for line in told if line.startswith("phisam")]


# scripts that a person runs


def test_make_env_fills_every_secret_and_keeps_what_is_there(tmp_path: Path) -> None:
    for name in ("make-env.sh", ".env.example"):
        shutil.copy(DOCKER / name, tmp_path)
    subprocess.run([str(tmp_path / "make-env.sh")], check=True, capture_output=True)
    made = tmp_path / ".env"
    assert made.stat().st_mode & 0o777 == 0o600
    values = dict(line.split("=", 1) for line in made.read_text().splitlines() if "=" in line and line[0] != "#")
    secret = [value for name, value in values.items() if rules.SECRET_NAME.search(name)]
    assert len(secret) == 5
    assert all(len(value) == 64 for value in secret)
    assert len(set(secret)) == 5
    before = made.read_bytes()
    assert subprocess.run([str(tmp_path / "make-env.sh")], capture_output=True).returncode == 1
    assert made.read_bytes() == before


def test_lock_images_writes_digests_and_keeps_the_rest(tmp_path: Path) -> None:
    docker = tmp_path / "docker"
    docker.write_text(f'#!/bin/sh\necho "sha256:{"a" * 64}"\n')
    docker.chmod(0o755)
    for name in ("lock-images.sh", "images.lock"):
        shutil.copy(DOCKER / name, tmp_path)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    for _ in range(2):  # again: the old digest is replaced
        subprocess.run([str(tmp_path / "lock-images.sh")], check=True, env=environment)
    lines = (tmp_path / "images.lock").read_text().splitlines()
    before = (DOCKER / "images.lock").read_text().splitlines()
    assert [line.partition("@")[0] for line in lines[2:]] == [line.partition("@")[0] for line in before[2:]]
    assert all(line.endswith("@sha256:" + "a" * 64) for line in lines[2:])


def test_make_secrets_makes_what_the_base_refers_to(tmp_path: Path) -> None:
    """kubectl is one that keeps what it is given."""
    kubectl = tmp_path / "kubectl"
    kubectl.write_text(
        "#!/bin/sh\n"
        'case "$*" in *"get secret"*) exit 1;; *"get namespace"*) exit 0;; esac\n'
        f'cat >> {tmp_path}/made\necho "$*" >> {tmp_path}/arguments\n'
    )
    kubectl.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    subprocess.run([str(DEPLOY / "make-secrets.sh")], check=True, env=environment, capture_output=True)
    made = [json.loads(line) for line in (tmp_path / "made").read_text().splitlines()]
    assert {item["metadata"]["name"]: set(item["data"]) for item in made} == made_secrets()
    assert "create --filename -" in (tmp_path / "arguments").read_text()
