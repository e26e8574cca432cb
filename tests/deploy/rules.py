"""What no schema sees: rules over the files of docker/ and deploy/. Each gives the problems that it finds, in words."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

Object = dict[str, Any]

SECRET_NAME = re.compile("PASSWORD|SECRET|TOKEN|PASSPHRASE|ACCESS_KEY(?!_ID)")
DEFAULTED = re.compile(r"\$\{([A-Z0-9_]+):?-[^$}]")  # ${NAME:-$(random)} is none

# Docker Compose


def compose_names(compose: Object) -> Iterator[str]:
    """Everything that a service refers to is there, and everything that is declared is used."""
    services = compose["services"]
    for name, service in services.items():
        for other in service.get("depends_on", {}):
            if other not in services:
                yield f"{name} depends on {other}, which is no service"
    for kind in ("secrets", "configs", "networks", "volumes"):
        declared, used = set(compose.get(kind, {})), set()
        for service in services.values():
            for item in service.get(kind, []):
                source = item.partition(":")[0] if isinstance(item, str) else item["source"]
                used |= {source} if not source.startswith((".", "/")) else set()
        yield from (f"{kind}: {name} is used and not declared" for name in sorted(used - declared))
        yield from (f"{kind}: {name} is declared and not used" for name in sorted(declared - used))


def compose_waits_for_what_gets_healthy(compose: Object) -> Iterator[str]:
    """Who waits for service_healthy waits for a service that has a health check, its own or its image's."""
    own_images = re.compile("PHISAM_IMAGE|MLFLOW_IMAGE")  # their Dockerfiles have a HEALTHCHECK
    for name, service in compose["services"].items():
        for other, how in service.get("depends_on", {}).items():
            awaited = compose["services"].get(other, {})
            checked = "healthcheck" in awaited or own_images.search(awaited.get("image", ""))
            if how["condition"] == "service_healthy" and not checked:
                yield f"{name} waits until {other} is healthy, which has no health check"


def compose_listens_on_loopback(compose: Object) -> Iterator[str]:
    """No port of a container on an address of this machine but 127.0.0.1."""
    for name, service in compose["services"].items():
        for port in service.get("ports", []):
            if not str(port).startswith("127.0.0.1:"):
                yield f"{name}: the port {port} is on all interfaces"
        if service.get("network_mode") == "host":
            yield f"{name} is on the host's network"


def compose_is_contained(compose: Object) -> Iterator[str]:
    """No root, no capabilities, no way to more rights. The service `volumes` hands volumes over, and ends."""
    for name, service in compose["services"].items():
        user = str(service.get("user", "0"))
        if user.startswith(("0", "root")) and name != "volumes":
            yield f"{name} runs as root"
        if service.get("cap_drop") != ["ALL"]:
            yield f"{name} keeps capabilities"
        if "no-new-privileges:true" not in service.get("security_opt", []):
            yield f"{name} may gain privileges"
        if service.get("privileged"):
            yield f"{name} is privileged"


def compose_can_write_secrets(compose: Object) -> Iterator[str]:
    """Docker Compose copies secrets that are no files of the host into the container, which must not be read-only."""
    copied = {
        name for kind in ("secrets", "configs") for name, how in compose.get(kind, {}).items() if "file" not in how
    }
    for name, service in compose["services"].items():
        used = {item["source"] for kind in ("secrets", "configs") for item in service.get(kind, [])}
        if service.get("read_only") and used & copied:
            yield f"{name} is read-only, and {sorted(used & copied)} cannot be written into it"


# texts


def default_secrets(text: str) -> Iterator[str]:
    """No secret with a value of its own: as a default in braces, or as NAME=value."""
    for match in DEFAULTED.finditer(text):
        if SECRET_NAME.search(match[1]):
            yield f"{match[1]} has a default"
    for name, value in re.findall(r"^\s*(?:- )?([A-Z][A-Z0-9_]+)[ \t]*[=:][ \t]*(\S+)", text, re.MULTILINE):
        refers = value.startswith(("$", '"$', "/", "{")) or name.endswith(("_FILE", "_PATH"))
        if SECRET_NAME.search(name) and not refers:
            yield f"{name} is {value}"


def unpinned(images: Iterable[str]) -> Iterator[str]:
    """Every image has a tag or a digest, and none is `latest`. A variable is looked up in images.lock instead."""
    for image in images:
        if image.startswith("${"):
            continue
        name, _, digest = image.partition("@")
        tag = name.rpartition("/")[2].partition(":")[2]
        if (not tag and not digest) or tag == "latest":
            yield f"the image {image} is not pinned"


# Kubernetes


def pods(objects: Iterable[Object]) -> Iterator[tuple[str, Object]]:
    """(whose, pod spec) of every pod that the objects make."""
    for item in objects:
        name, spec = f"{item['kind']} {item['metadata']['name']}", item.get("spec", {})
        if item["kind"] == "CronJob":
            yield name, spec["jobTemplate"]["spec"]["template"]["spec"]
        elif item["kind"] in ("RayJob", "RayCluster"):
            cluster = spec.get("rayClusterSpec", spec)
            for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
                yield f"{name}, {group.get('groupName', 'head')}", group["template"]["spec"]
        elif "template" in spec:
            yield name, spec["template"]["spec"]


def images(objects: Iterable[Object]) -> Iterator[str]:
    """Of all containers."""
    for _, pod in pods(objects):
        yield from (container["image"] for container in containers(pod))


def containers(pod: Object) -> list[Object]:
    """Of all kinds."""
    return [*pod["containers"], *pod.get("initContainers", [])]


def pods_are_contained(objects: Iterable[Object]) -> Iterator[str]:
    """The restricted profile of Pod Security, and no token of Kubernetes' API without need."""
    for name, pod in pods(objects):
        context = pod.get("securityContext", {})
        if not context.get("runAsNonRoot") or context.get("runAsUser", 0) == 0:
            yield f"{name} may run as root"
        if context.get("seccompProfile") != {"type": "RuntimeDefault"}:
            yield f"{name} has no seccomp profile"
        needs_token = name.startswith("Ray") and "serviceAccountName" not in pod  # KubeRay's, for the autoscaler
        if pod.get("automountServiceAccountToken") is not False and not needs_token:
            yield f"{name} gets a token of the Kubernetes API"
        yield from (f"{name} has {key}" for key in ("hostNetwork", "hostPID", "hostIPC") if pod.get(key))
        yield from (f"{name} mounts the host's {v['hostPath']}" for v in pod.get("volumes", []) if "hostPath" in v)
        for container in containers(pod):
            own = container.get("securityContext", {})
            if own.get("capabilities", {}).get("drop") != ["ALL"] or own.get("allowPrivilegeEscalation") is not False:
                yield f"{name}, container {container['name']}, keeps capabilities or may gain privileges"
            if own.get("privileged"):
                yield f"{name}, container {container['name']}, is privileged"


def pods_say_what_they_need(objects: Iterable[Object]) -> Iterator[str]:
    """CPU and memory are requested, and memory is limited."""
    for name, pod in pods(objects):
        for container in containers(pod):
            resources = container.get("resources", {})
            missing = {"cpu", "memory"} - set(resources.get("requests", {}))
            if missing or "memory" not in resources.get("limits", {}):
                yield f"{name}, container {container['name']}, does not say what it needs"


def pods_find_their_parts(objects: list[Object], given: list[Object], secrets: dict[str, set[str]]) -> Iterator[str]:
    """Claims, accounts and configurations are among the objects or those given; secrets and keys are made."""
    there = {(item["kind"], item["metadata"]["name"]) for item in [*objects, *given]}
    for name, pod in pods(objects):
        wanted = [("ServiceAccount", pod["serviceAccountName"])] if "serviceAccountName" in pod else []
        sources: list[Object] = []
        for volume in pod.get("volumes", []):
            if "persistentVolumeClaim" in volume:
                wanted.append(("PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"]))
            if "configMap" in volume:
                wanted.append(("ConfigMap", volume["configMap"]["name"]))
            if "secret" in volume:
                sources.append({"name": volume["secret"]["secretName"], "items": volume["secret"].get("items", [])})
            sources += [part["secret"] for part in volume.get("projected", {}).get("sources", []) if "secret" in part]
        for container in containers(pod):
            for variable in container.get("env", []):
                reference = variable.get("valueFrom", {}).get("secretKeyRef")
                sources += [{"name": reference["name"], "items": [reference]}] if reference else []
                if SECRET_NAME.search(variable["name"]) and variable.get("value", "/")[0] != "/":
                    yield f"{name} has the secret {variable['name']} in the open"
            mounts = {mount["name"] for mount in container.get("volumeMounts", [])}
            yield from (
                f"{name} mounts {volume}, which it has not"
                for volume in sorted(mounts - {volume["name"] for volume in pod.get("volumes", [])})
            )
        yield from (
            f"{name} needs the {kind} {wants}, which is not there"
            for kind, wants in wanted
            if (kind, wants) not in there
        )
        for source in sources:
            keys = {item["key"] for item in source.get("items", [])}
            if source["name"] not in secrets or not keys <= secrets[source["name"]]:
                yield f"{name} needs the secret {source['name']} with {sorted(keys)}, which nobody makes"


def services_reach_pods(objects: list[Object]) -> Iterator[str]:
    """A Service has pods behind it and is not open to the outside; its port is one of theirs."""
    templates = [item["spec"]["template"] for item in objects if "template" in item.get("spec", {})]
    for item in objects:
        if item["kind"] != "Service":
            continue
        name, spec = item["metadata"]["name"], item["spec"]
        if spec.get("type", "ClusterIP") != "ClusterIP":
            yield f"the service {name} is open to the outside"
        behind = [t for t in templates if spec["selector"].items() <= t["metadata"]["labels"].items()]
        ports = {port["name"] for t in behind for c in t["spec"]["containers"] for port in c.get("ports", [])}
        if not behind or not {port["targetPort"] for port in spec["ports"]} <= ports:
            yield f"the service {name} has no pod behind it that listens"


def nothing_speaks_by_default(objects: list[Object]) -> Iterator[str]:
    """A policy that selects all pods and allows nothing."""
    for item in objects:
        spec = item.get("spec")
        if item["kind"] == "NetworkPolicy" and spec == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}:
            return
    yield "no policy closes the namespace by default"


def flows_are_open(objects: list[Object], flows: Iterable[tuple[Object, Object, int]]) -> Iterator[str]:
    """For each (labels of a pod, labels of the other, port): a policy lets it out there, and one lets it in here."""
    policies = [item["spec"] for item in objects if item["kind"] == "NetworkPolicy"]

    def selects(selector: Object, labels: Object) -> bool:
        return bool(selector.get("matchLabels", {}).items() <= labels.items())

    def opened(way: str, peer: str, here: Object, there: Object, port: int) -> bool:
        for policy in policies:
            for rule in policy.get(way, []) if selects(policy["podSelector"], here) else []:
                ports = {entry["port"] for entry in rule.get("ports", [])}
                to_pods = [entry["podSelector"] for entry in rule[peer] if "podSelector" in entry]
                if any(selects(selector, there) for selector in to_pods) and (not ports or port in ports):
                    return True
        return False

    for start, end, port in flows:
        if not opened("egress", "to", start, end, port):
            yield f"{start} may not speak to {end} on {port}"
        if not opened("ingress", "from", end, start, port):
            yield f"{end} does not listen to {start} on {port}"


def ray_rules(objects: Iterable[Object], ray_version: str) -> Iterator[str]:
    """What KubeRay's operator refuses although its schema does not, and what a shared cluster needs."""
    for item in objects:
        if item["kind"] not in ("RayJob", "RayCluster"):
            continue
        name, spec = item["metadata"]["name"], item["spec"]
        cluster = spec.get("rayClusterSpec", spec)
        if len(name) > 47:
            yield f"{name} is too long for the names that are made of it"
        if cluster.get("rayVersion") != ray_version:
            yield f"{name} says Ray {cluster.get('rayVersion')}, the package has {ray_version}"
        if cluster.get("authOptions", {}).get("mode") != "token" or "rayVersion" not in cluster:
            yield f"{name} is open to everyone who reaches it"
        yield from (
            f"{name} needs a feature gate for {key}" for key in ("networkPolicy", "tlsOptions") if key in cluster
        )
        if cluster["headGroupSpec"]["rayStartParams"].get("num-cpus") != "0":
            yield f"{name} runs work on its head"
        if item["kind"] == "RayCluster":
            continue
        if spec.get("submissionMode") != "HTTPMode":
            yield f"{name} is not submitted by the operator"
        if spec.get("shutdownAfterJobFinishes") and "deletionRules" in spec.get("deletionStrategy", {}):
            yield f"{name} has two rules for its end"
        missing = {"activeDeadlineSeconds", "backoffLimit"} - set(spec)
        yield from (f"{name} has no {key}" for key in sorted(missing))
