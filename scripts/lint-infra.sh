#!/usr/bin/env bash
# Checks what is not Python with the tools that are there, and says by name what was not checked.
# exit status: 0 nothing wrong in what was checked; 1 something is
set -uo pipefail
cd "$(dirname "$0")/.." || exit
PATH=$PATH:$PWD/.venv/bin:$(scripts/tools.sh --path)
failed=0 unchecked=()

# check WHAT TOOL COMMAND...: runs the command when its tool is there; its output is shown only when it fails.
check() {
  local what=$1 tool=$2 output
  shift 2
  if ! command -v "$tool" >/dev/null; then
    unchecked+=("$what ($tool is not installed)")
  elif output=$("$@" 2>&1); then
    echo "ok: $what"
  else
    printf 'FAILED: %s\n%s\n' "$what" "$output" >&2
    failed=1
  fi
}

# shellcheck disable=SC1090,SC2329 # called by check
compose_config() (
  set -a
  . <(scripts/compose-env.sh -)
  docker compose config --quiet
)
# A version is given: a helm that was built from source takes a very old cluster for granted.
chart=(helm/tenfold --values helm/tenfold/ci/values.yaml --kube-version 1.31.0)

scripts=(.ci/run scripts/*.sh scripts/*/*.sh)
for script in "${scripts[@]}"; do bash -n "$script" || failed=1; done
check "shell scripts" shellcheck shellcheck "${scripts[@]}"
check "GitHub workflows" actionlint actionlint .github/workflows/*.yml
check "Helm chart: lint" helm helm lint --strict --quiet "${chart[@]}"
check "Helm chart: render" helm helm template tenfold "${chart[@]}"
if docker compose version >/dev/null 2>&1; then
  check "Compose file" docker compose_config
else
  unchecked+=("Compose file (docker compose is not installed)")
fi
check "HAProxy configuration" haproxy haproxy -c -q -f observability/haproxy.cfg
for what in "${unchecked[@]}"; do echo "NOT CHECKED: $what" >&2; done
exit $failed
