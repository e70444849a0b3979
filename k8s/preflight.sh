#!/bin/sh
# Lists what the manifests need and a Kubernetes cluster lacks. It changes nothing.
#
#   k8s/preflight.sh [local|gpu]
#
# Exit code: 0 nothing is missing, 1 something is, 2 it can't tell.
set -u
overlay=${1:-local}
case $overlay in local | gpu) ;; *)
  echo "preflight: expected local or gpu, not $overlay" >&2
  exit 2 ;;
esac
command -v kubectl > /dev/null || { echo "preflight: kubectl is not on PATH" >&2; exit 2; }
kubectl version --request-timeout=10s > /dev/null 2>&1 || {
  echo "preflight: no cluster answers to kubectl (context: $(kubectl config current-context 2> /dev/null || echo none))" >&2
  exit 2
}
missing=0
there() { echo "ok       $1"; }
lacks() { echo "MISSING  $1: $2"; missing=1; }
has() { kubectl get "$@" --request-timeout=10s > /dev/null 2>&1; }

minor=$(kubectl get --raw /version --request-timeout=10s 2> /dev/null | sed -n 's/.*"minor": *"\([0-9]*\).*/\1/p')
if [ "${minor:-0}" -ge 33 ]; then there "Kubernetes 1.33 or newer"
else lacks "Kubernetes 1.33 or newer" "the cluster has ${minor:+1.}${minor:-an unknown version}"; fi

for kind in rayclusters rayjobs raycronjobs; do
  if has crd "$kind.ray.io"; then there "KubeRay's $kind"
  else lacks "KubeRay's $kind" "install the operator's CRDs (RayCronJob came with 1.6)"; fi
done

# The network policy uses the same label. The operator has it whether Helm or kustomize installed it.
operator=$(kubectl get pods -A -l app.kubernetes.io/component=kuberay-operator --request-timeout=10s \
  -o jsonpath='{range .items[*]}{.metadata.namespace}{" "}{.spec.containers[*].args}{" "}{.spec.containers[*].command}{"\n"}{end}' 2> /dev/null)
if [ -z "$operator" ]; then lacks "the KubeRay operator" "install it in the namespace kuberay-system"
else
  space=${operator%% *}
  if [ "$space" = kuberay-system ]; then there "the KubeRay operator in kuberay-system"
  else lacks "the KubeRay operator in kuberay-system" "it runs in $space: change the namespace in k8s/base/network.yaml"; fi
  case $operator in
    *RayCronJob=true*) there "the operator's RayCronJob gate" ;;
    *) lacks "the operator's RayCronJob gate" "start it with --feature-gates=RayCronJob=true, or leave the job nightly out" ;;
  esac
fi

if kubectl get storageclass --request-timeout=10s -o jsonpath='{.items[*].metadata.annotations}' 2> /dev/null | grep -q 'is-default-class":"true"'
then there "a default storage class"
else lacks "a default storage class" "mark one: storageclass.kubernetes.io/is-default-class=true"; fi

if has namespace ray-ddpm; then
  for secret in redis postgres mlflow-storage ray-storage; do
    if has secret "$secret" -n ray-ddpm; then there "the secret $secret"
    else lacks "the secret $secret" "fill in k8s/secrets, then kubectl apply -k k8s/secrets"; fi
  done
else lacks "the namespace ray-ddpm" "kubectl create namespace ray-ddpm"; fi

if [ "$overlay" = gpu ]; then
  if has storageclass shared; then there "the storage class shared"
  else lacks "the storage class shared" "make one that many nodes can mount at once (ReadWriteMany)"; fi
  if kubectl get daemonsets -A --request-timeout=10s 2> /dev/null | grep -q nvidia-device-plugin
  then there "NVIDIA's device plugin"
  else lacks "NVIDIA's device plugin" "install it: without it no node offers nvidia.com/gpu"; fi
fi
[ "$missing" = 0 ] && echo "nothing is missing" || echo "see docs/operations.md"
exit "$missing"
