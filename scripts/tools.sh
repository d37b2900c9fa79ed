#!/usr/bin/env bash
# Builds the pinned linters from source with Go into a cache outside the repository, once.
# usage: scripts/tools.sh           builds what is missing
#        scripts/tools.sh --path    prints the folder, whether or not anything is in it
set -euo pipefail
tools=(helm.sh/helm/v3/cmd/helm@v3.19.5 github.com/rhysd/actionlint/cmd/actionlint@v1.7.12)
bin=${TENFOLD_TOOLS:-${XDG_CACHE_HOME:-${HOME:-/tmp}/.cache}/tenfold/tools}

if [ "${1:-}" = --path ]; then
  echo "$bin"
  exit
fi
command -v go >/dev/null || { echo "Go is needed to build helm and actionlint (or install them by other means)" >&2; exit 2; }
mkdir -p "$bin"
for tool in "${tools[@]}"; do
  name=${tool%@*} name=${name##*/}
  stamp=$bin/.$name-${tool##*@}
  if [ -e "$stamp" ]; then continue; fi
  echo "Building $tool (a few minutes, once)"
  log=$(mktemp)
  if ! GOBIN=$bin go install "$tool" >"$log" 2>&1; then
    cat "$log" >&2
    exit 1
  fi
  rm -f "$log"
  touch "$stamp"
done
