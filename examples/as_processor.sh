#!/usr/bin/env bash
# Runs a Python script as another processor: as_processor.sh PROCESSOR SCRIPT.py [ARGUMENT...]
#
# Says what a graph computes there, not how fast; the script may use onnxruntime, numpy, onnx and tokenizers. docs/processors.md has an example.
#   x86-64   EPYC-Milan, Haswell (AVX2, no VNNI), Nehalem (no AVX): with the packages of $PYTHON, by default python3
#   ARM64    cortex-a72 (no dot product), neoverse-n1 (dot product): with a Python and wheels for ARM64
#
# Needs Linux on x86-64 with apt (Debian or Ubuntu) and pip. The first call fills a cache with QEMU 10 and, for ARM64, 500 MB of packages
# ($AS_PROCESSOR_CACHE, by default ~/.cache/as-processor); installed programs and their configuration are left alone.
set -euo pipefail
[[ $# -ge 2 ]] || { sed -n '2,5p' "$0" >&2; exit 2; }
processor=$1
shift
python=${PYTHON:-python3}
cache=${AS_PROCESSOR_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/as-processor}
mkdir -p "$cache"/{sources,lists,debs}

# apt with lists and sources of its own: Debian 13's, from the mirror that this system uses. Debian 12's QEMU 7 can't run onnxruntime.
debian() {
    apt-get -qq -o Dir::Etc::sourcelist=/dev/null -o Dir::Etc::sourceparts="$cache/sources" -o Dir::State::lists="$cache/lists" \
        -o APT::Architectures::=amd64 -o APT::Architectures::=arm64 -o APT::Sandbox::User= "$@"
}

# unpack FOLDER PACKAGE...: without installing anything.
unpack() {
    local folder=$1
    shift
    rm -rf "$folder.part" "$cache/debs"
    mkdir -p "$folder.part" "$cache/debs"
    (cd "$cache/debs" && debian download "$@" && for deb in *.deb; do dpkg -x "$deb" "$folder.part"; done)
    rm -rf "$cache/debs"
}

emulator() {
    local mirror
    mirror=$(grep -rhE '^(URIs:|deb )' /etc/apt/sources.list /etc/apt/sources.list.d 2>/dev/null | grep -oE -m1 'https?://[^ ]+/debian/?( |$)') || true
    mirror=${mirror:-http://deb.debian.org/debian}
    echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror trixie main" >"$cache/sources/next.list"
    debian update
    unpack "$cache/qemu" qemu-user
    mv "$cache/qemu.part" "$cache/qemu"
}

installed() { "$python" -c "import importlib.metadata as m; print(m.version('$1'))"; }

arm64() {
    unpack "$cache/arm64" {python3.13-minimal,libpython3.13-minimal,libpython3.13-stdlib,libc6,libgcc-s1,libstdc++6}:arm64 \
        {libexpat1,zlib1g,libffi8,libbz2-1.0,liblzma5,libssl3t64,libuuid1,libzstd1}:arm64
    [[ -e $cache/arm64.part/lib ]] || ln -s usr/lib "$cache/arm64.part/lib"
    local wheels=(--only-binary=:all: --platform manylinux_2_28_aarch64 --platform manylinux_2_27_aarch64
        --platform manylinux2014_aarch64 --python-version 3.13 --implementation cp -d "$cache/wheels")
    "$python" -m pip download -q "${wheels[@]}" "onnxruntime==$(installed onnxruntime)" numpy onnx
    "$python" -m pip download -q --no-deps "${wheels[@]}" "tokenizers==$(installed tokenizers)"
    for wheel in "$cache"/wheels/*.whl; do "$python" -m zipfile -e "$wheel" "$cache/arm64.part/site"; done
    rm -rf "$cache/wheels"
    mv "$cache/arm64.part" "$cache/arm64"
}

(
    flock 9 # two tests at once
    [[ -d $cache/qemu ]] || emulator
    case $processor in cortex-* | neoverse-*) [[ -d $cache/arm64 ]] || arm64 ;; esac
) 9>"$cache/lock" >&2

export PYTHONDONTWRITEBYTECODE=1
unset OPENBLAS_CORETYPE # which says what this processor is, not the other one
case $processor in
cortex-* | neoverse-*)
    PYTHONHOME=$cache/arm64/usr PYTHONPATH=$cache/arm64/site exec "$cache/qemu/usr/bin/qemu-aarch64" -cpu "$processor" \
        -L "$cache/arm64" "$cache/arm64/usr/bin/python3.13" "$@"
    ;;
*) exec "$cache/qemu/usr/bin/qemu-x86_64" -cpu "$processor" "$python" "$@" ;;
esac
