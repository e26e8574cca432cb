"""`phisam render k8s`: a run or a sweep as the Kubernetes objects that carry it out, a ConfigMap and a KubeRay RayJob.

The names of claims, secrets and accounts are those of deploy/base. What KubeRay's operator demands beyond its schema:
authOptions needs rayVersion; a RayJob has shutdownAfterJobFinishes or deletionRules, not both; the names of pods, made
from the job's, must stay short.
"""

from __future__ import annotations

import importlib.metadata
import re
from dataclasses import dataclass
from typing import Any

import yaml

import phisam
from ray_jobs.errors import ConfigError

Object = dict[str, Any]

# A head takes its whole cluster along: node autoscalers leave its node alone.
STAYS = {"cluster-autoscaler.kubernetes.io/safe-to-evict": "false", "karpenter.sh/do-not-disrupt": "true"}
RUN_FILE = "/etc/phisam/run.yaml"
MAX_NAME = 47  # KubeRay's own limit for a RayJob: it appends to it, and a label holds 63
GRACE_SECONDS = 120  # what a pod on a node that is taken away gets to end a report that is being written
# Ray's object store carries data sets and progress, no tensors of a step; it must fit into /dev/shm.
RAY_START = {"metrics-export-port": "8080", "object-store-memory": "1000000000"}


@dataclass(frozen=True)
class Cluster:
    """What a run asks of Kubernetes, beside its own description.

    workers: pods, one Ray Train worker each. max_workers: more than `workers` lets Ray's autoscaler add pods up to it.
    queue: a LocalQueue of Kueue. secret: what the names of deploy/base's secrets begin with. spot: workers tolerate
    nodes that may be taken away; the head does not.
    """

    image: str
    workers: int
    max_workers: int
    gpus: int
    cpus: int
    memory_gib: int
    head_memory_gib: int
    namespace: str
    queue: str | None
    deadline_seconds: int
    retries: int
    secret: str
    spot: bool


def default_image() -> str:
    """The image that docker/Dockerfile makes of this version."""
    return f"phisam:{phisam.__version__}"


def object_name(text: str) -> str:
    """A run's name as Kubernetes takes it: "paper/cifar10-frob" -> "paper-cifar10-frob"."""
    name = re.sub("[^a-z0-9]+", "-", text.lower()).strip("-")[:MAX_NAME].strip("-")
    return name if name[:1].isalpha() else f"run-{name}"[:MAX_NAME].strip("-")


def run_job(name: str, description: str, arguments: str, cluster: Cluster) -> list[Object]:
    """The objects that carry out `phisam ARGUMENTS` over a description (YAML text), which lies at RUN_FILE."""
    name = object_name(name)
    if len(description.encode()) > 900_000:
        raise ConfigError("render: the description has more than 900,000 bytes, and a ConfigMap holds 1 MiB")
    configuration = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": _metadata(name, cluster),
        "data": {"run.yaml": description},
    }
    job = {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": _metadata(name, cluster, queued=True),
        "spec": {
            "entrypoint": f"phisam {arguments}",
            "submissionMode": "HTTPMode",  # the operator submits: no extra pod that could be lost
            "activeDeadlineSeconds": cluster.deadline_seconds,
            "backoffLimit": cluster.retries,  # a new cluster each, which goes on with the same run
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": 60,  # GPUs are held until then
            **({"suspend": True} if cluster.queue else {}),  # Kueue starts it when there is room
            "rayClusterSpec": _cluster_spec(cluster, configuration_name=name),
        },
    }
    return [configuration, job]


def interactive(name: str, cluster: Cluster) -> list[Object]:
    """A RayCluster to work on: `kubectl exec` into its head and call phisam there."""
    spec = _cluster_spec(cluster, configuration_name=None)
    metadata = _metadata(object_name(name), cluster, queued=True)
    return [{"apiVersion": "ray.io/v1", "kind": "RayCluster", "metadata": metadata, "spec": spec}]


def as_yaml(objects: list[Object]) -> str:
    """The objects as one stream for `kubectl apply -f -`."""
    return yaml.safe_dump_all(objects, sort_keys=False, width=120)


def _metadata(name: str, cluster: Cluster, queued: bool = False) -> Object:
    labels = {"app.kubernetes.io/part-of": "phisam", "app.kubernetes.io/name": "phisam-run"}
    if queued and cluster.queue:
        labels["kueue.x-k8s.io/queue-name"] = cluster.queue
    return {"name": name, "namespace": cluster.namespace, "labels": labels}


def _cluster_spec(cluster: Cluster, configuration_name: str | None) -> Object:
    autoscaled = cluster.max_workers > cluster.workers
    spec: Object = {
        "rayVersion": importlib.metadata.version("ray"),
        "authOptions": {"mode": "token", "secretName": f"{cluster.secret}-ray-token"},
        "headGroupSpec": {
            # No work on the head: a trainer that needs all of its memory must not take the cluster's heart with it.
            "rayStartParams": {"num-cpus": "0", "dashboard-host": "0.0.0.0", **RAY_START},
            "template": _pod(cluster, "ray-head", 1, cluster.head_memory_gib, 0, configuration_name, spot=False),
        },
        "workerGroupSpecs": [
            {
                "groupName": "workers",
                "replicas": cluster.workers,
                "minReplicas": cluster.workers,
                "maxReplicas": cluster.max_workers,
                "rayStartParams": RAY_START,
                "template": _pod(
                    cluster, "ray-worker", cluster.cpus, cluster.memory_gib, cluster.gpus, None, spot=cluster.spot
                ),
            }
        ],
    }
    if autoscaled:
        spec["enableInTreeAutoscaling"] = True
        spec["autoscalerOptions"] = {
            "upscalingMode": "Default",
            "idleTimeoutSeconds": 120,
            "resources": {"requests": {"cpu": "200m", "memory": "512Mi"}, "limits": {"memory": "512Mi"}},
            "securityContext": _contained(),
        }
    return spec


def _pod(
    cluster: Cluster, container: str, cpus: int, memory_gib: int, gpus: int, configuration_name: str | None, spot: bool
) -> Object:
    resources = {"cpu": str(cpus), "memory": f"{memory_gib}Gi", "ephemeral-storage": "5Gi"}
    accelerators = {"nvidia.com/gpu": str(gpus)} if gpus else {}
    volumes, mounts = _volumes(cluster, configuration_name)
    labels = {"app.kubernetes.io/part-of": "phisam", "app.kubernetes.io/name": container}
    pod: Object = {
        "serviceAccountName": "phisam-run",
        # The autoscaler, beside the head, asks Kubernetes for pods, with an account of KubeRay's making.
        "automountServiceAccountToken": False,
        "terminationGracePeriodSeconds": GRACE_SECONDS,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": 1000,
            "runAsGroup": 100,
            "fsGroup": 100,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [
            {
                "name": container,
                "image": cluster.image,
                "imagePullPolicy": "IfNotPresent",
                "env": _environment(),
                "ports": _ports(container),
                "resources": {
                    "requests": {**resources, **accelerators},
                    "limits": {"memory": resources["memory"], "ephemeral-storage": "40Gi", **accelerators},
                },
                "securityContext": _contained(),
                "volumeMounts": mounts,
            }
        ],
        "volumes": volumes,
    }
    if container == "ray-head" and cluster.max_workers > cluster.workers:
        # KubeRay makes the autoscaler's account, and binds it to what it may do, only where none is named.
        del pod["serviceAccountName"], pod["automountServiceAccountToken"]
        labels["phisam.dev/autoscaler"] = "yes"  # may reach Kubernetes' API: a policy of deploy/base
    tolerations = [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}] if gpus else []
    if spot:  # how GKE, EKS's Karpenter and AKS mark nodes that may be taken away
        tolerations += [
            {"key": "cloud.google.com/gke-spot", "operator": "Exists", "effect": "NoSchedule"},
            {"key": "karpenter.sh/capacity-type", "operator": "Equal", "value": "spot", "effect": "NoSchedule"},
            {
                "key": "kubernetes.azure.com/scalesetpriority",
                "operator": "Equal",
                "value": "spot",
                "effect": "NoSchedule",
            },
        ]
    return {
        "metadata": {"labels": labels, **({"annotations": STAYS} if container == "ray-head" else {})},
        "spec": {**pod, **({"tolerations": tolerations} if tolerations else {})},
    }


def _volumes(cluster: Cluster, configuration_name: str | None) -> tuple[list[Object], list[Object]]:
    """Volumes and where they are mounted; the description is on the head alone, where the driver runs."""
    volumes: list[Object] = [
        {"name": "runs", "persistentVolumeClaim": {"claimName": "runs"}},
        {"name": "data", "persistentVolumeClaim": {"claimName": "data"}},
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "2Gi"}},
        {
            "name": "mlflow",
            "secret": {"secretName": f"{cluster.secret}-mlflow-client", "defaultMode": 0o440},
        },
    ]
    mounts: list[Object] = [
        {"name": "runs", "mountPath": "/runs"},
        {"name": "data", "mountPath": "/data"},
        {"name": "shm", "mountPath": "/dev/shm"},
        {"name": "mlflow", "mountPath": "/home/ray/.mlflow", "readOnly": True},
    ]
    if configuration_name is not None:
        volumes.append({"name": "run", "configMap": {"name": configuration_name}})
        mounts.append({"name": "run", "mountPath": RUN_FILE.rpartition("/")[0], "readOnly": True})
    return volumes, mounts


def _environment() -> list[Object]:
    settings = {
        "PHISAM_HOME": "/runs",
        "MLFLOW_TRACKING_URI": "http://mlflow:5000",  # user and password: the file of the secret, not a variable
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    return [{"name": name, "value": value} for name, value in settings.items()]


def _ports(container: str) -> list[Object]:
    metrics = [{"name": "metrics", "containerPort": 8080}]
    if container == "ray-worker":
        return metrics
    return [{"name": "gcs", "containerPort": 6379}, {"name": "dashboard", "containerPort": 8265}, *metrics]


def _contained() -> Object:
    return {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}, "runAsNonRoot": True}
