"""A strict JSON schema of the parts of Kubernetes and KubeRay (ray.io/v1, operator 1.6) that manifests here may use.

Names and types are those of the custom resource definitions; unlike a server, it refuses fields that it does not know.
What the manifests do not use is left out: to use more, add it here.
"""

from typing import Any

Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}
NUMBER: Schema = {"type": "integer", "minimum": 0}
TRUTH: Schema = {"type": "boolean"}
TEXTS: Schema = {"type": "object", "additionalProperties": TEXT}
QUANTITY: Schema = {"type": ["string", "integer"], "pattern": r"^[0-9]+(\.[0-9]+)?(m|k|Ki|M|Mi|G|Gi|T|Ti)?$"}
QUANTITIES: Schema = {"type": "object", "additionalProperties": QUANTITY}
NAME: Schema = {"type": "string", "pattern": r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$", "maxLength": 63}


def one_of(*values: str) -> Schema:
    return {"enum": list(values)}


def list_of(item: Schema) -> Schema:
    return {"type": "array", "items": item, "minItems": 1}


def fields(required: str = "", **known: Schema) -> Schema:
    return {
        "type": "object",
        "properties": known,
        "required": required.split(),
        "additionalProperties": False,
    }


METADATA = fields(name=NAME, namespace=NAME, labels=TEXTS, annotations=TEXTS)
CONTAINER_SECURITY = fields(
    allowPrivilegeEscalation=TRUTH,
    capabilities=fields(drop=list_of(TEXT)),
    readOnlyRootFilesystem=TRUTH,
    runAsNonRoot=TRUTH,
    runAsUser=NUMBER,
)
POD_SECURITY = fields(runAsNonRoot=TRUTH, runAsUser=NUMBER, runAsGroup=NUMBER, fsGroup=NUMBER)
CONTAINER = fields(
    "name image resources",
    name=NAME,
    image=TEXT,
    imagePullPolicy=one_of("Always", "IfNotPresent", "Never"),
    env=list_of(fields("name", name=TEXT, value=TEXT)),
    ports=list_of(fields("containerPort", containerPort=NUMBER, name=NAME)),
    resources=fields("requests limits", requests=QUANTITIES, limits=QUANTITIES),
    securityContext=CONTAINER_SECURITY,
    volumeMounts=list_of(fields("name mountPath", name=NAME, mountPath=TEXT, readOnly=TRUTH)),
)
VOLUME = fields(
    "name",
    name=NAME,
    emptyDir=fields(medium=one_of("Memory", ""), sizeLimit=QUANTITY),
    persistentVolumeClaim=fields("claimName", claimName=NAME, readOnly=TRUTH),
)
TOLERATION = fields(
    key=TEXT,
    operator=one_of("Exists", "Equal"),
    value=TEXT,
    effect=one_of("NoSchedule", "PreferNoSchedule", "NoExecute"),
    tolerationSeconds=NUMBER,
)
POD_TEMPLATE = fields(
    "spec",
    metadata=METADATA,
    spec=fields(
        "containers",
        serviceAccountName=NAME,
        securityContext=POD_SECURITY,
        nodeSelector=TEXTS,
        tolerations=list_of(TOLERATION),
        terminationGracePeriodSeconds=NUMBER,
        imagePullSecrets=list_of(fields("name", name=NAME)),
        containers=list_of(CONTAINER),
        volumes=list_of(VOLUME),
    ),
)
RAY_START = TEXTS  # values are strings, numbers too
HEAD_GROUP = fields(
    "rayStartParams template",
    rayStartParams=RAY_START,
    template=POD_TEMPLATE,
    serviceType=one_of("ClusterIP", "NodePort", "LoadBalancer"),
    enableIngress=TRUTH,
    labels=TEXTS,
)
WORKER_GROUP = fields(
    "groupName rayStartParams template minReplicas maxReplicas",
    groupName=NAME,
    replicas=NUMBER,
    minReplicas=NUMBER,
    maxReplicas=NUMBER,
    numOfHosts=NUMBER,
    idleTimeoutSeconds=NUMBER,
    labels=TEXTS,
    resources=TEXTS,
    rayStartParams=RAY_START,
    template=POD_TEMPLATE,
)
CLUSTER_SPEC = fields(
    "headGroupSpec",
    rayVersion=TEXT,
    authOptions=fields(mode=one_of("token", "disabled"), secretName=NAME),
    enableInTreeAutoscaling=TRUTH,
    autoscalerOptions=fields(
        version=one_of("v1", "v2"),
        idleTimeoutSeconds=NUMBER,
        upscalingMode=one_of("Default", "Aggressive", "Conservative"),
        resources=fields(requests=QUANTITIES, limits=QUANTITIES),
    ),
    headGroupSpec=HEAD_GROUP,
    workerGroupSpecs=list_of(WORKER_GROUP),
)
JOB_SPEC = fields(
    "entrypoint rayClusterSpec",
    entrypoint=TEXT,
    runtimeEnvYAML=TEXT,
    submissionMode=one_of("K8sJobMode", "HTTPMode", "SidecarMode", "InteractiveMode"),
    backoffLimit=NUMBER,
    activeDeadlineSeconds=NUMBER,
    preRunningDeadlineSeconds=NUMBER,
    shutdownAfterJobFinishes=TRUTH,
    ttlSecondsAfterFinished=NUMBER,
    suspend=TRUTH,
    rayClusterSpec=CLUSTER_SPEC,
)
SERVICE_SPEC = fields(
    "serveConfigV2 rayClusterConfig",
    serveConfigV2=TEXT,
    upgradeStrategy=fields("type", type=one_of("NewCluster", "NewClusterWithIncrementalUpgrade", "None")),
    excludeHeadPodFromServeSvc=TRUTH,
    rayClusterDeletionDelaySeconds=NUMBER,
    rayClusterConfig=CLUSTER_SPEC,
)
PEER = fields(
    podSelector=fields(matchLabels=TEXTS),
    namespaceSelector=fields(matchLabels=TEXTS),
    ipBlock=fields("cidr", cidr=TEXT),
)
PORT = fields("port", protocol=one_of("TCP", "UDP"), port=NUMBER)
POLICY_SPEC = fields(
    "podSelector policyTypes",
    podSelector=fields(matchLabels=TEXTS),
    policyTypes=list_of(one_of("Ingress", "Egress")),
    ingress=list_of(fields(**{"from": list_of(PEER), "ports": list_of(PORT)})),
)
CLAIM_SPEC = fields(
    "accessModes resources",
    accessModes=list_of(one_of("ReadWriteMany", "ReadWriteOnce", "ReadOnlyMany")),
    storageClassName=NAME,
    resources=fields("requests", requests=QUANTITIES),
)


def _manifest(version: str, **parts: Schema) -> Schema:
    return fields("apiVersion kind metadata", apiVersion=one_of(version), kind=TEXT, metadata=METADATA, **parts)


KINDS: dict[str, Schema] = {
    "RayCluster": _manifest("ray.io/v1", spec=CLUSTER_SPEC),
    "RayJob": _manifest("ray.io/v1", spec=JOB_SPEC),
    "RayService": _manifest("ray.io/v1", spec=SERVICE_SPEC),
    "NetworkPolicy": _manifest("networking.k8s.io/v1", spec=POLICY_SPEC),
    "PersistentVolumeClaim": _manifest("v1", spec=CLAIM_SPEC),
    "ServiceAccount": _manifest("v1", automountServiceAccountToken=TRUTH),
}
