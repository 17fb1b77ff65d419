# Sourced by quickstart.sh and test.sh: a virtual environment with the locked packages, made once and reused.
#   VLM_TRAIN_VENV   where it lies (default: .venv in the checkout)
#   PYTHON           the interpreter to make it with (default: the first of python3.11, 3.12, 3.13, python3 that fits)
# After sourcing, `$venv/bin` is on PATH and the checkout is installed in it.

cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv="${VLM_TRAIN_VENV:-$PWD/.venv}"

say() { printf '\n== %s\n' "$*"; }

find_python() {
    local candidate
    for candidate in ${PYTHON:-} python3.11 python3.12 python3.13 python3; do
        if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    echo "error: no Python 3.11, 3.12 or 3.13 found" >&2
    echo "  remedy:  apt-get install python3 python3-venv, or PYTHON=/path/to/python3.11 $0" >&2
    exit 2
}

install_system_packages() {
    local missing=() package
    for package in "$@"; do
        dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing+=("$package")
    done
    [ ${#missing[@]} -eq 0 ] && return
    if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null; then
        echo "warning: cannot install system packages as this user: ${missing[*]}" >&2
        return
    fi
    say "installing system packages: ${missing[*]}"
    apt-get update -q
    DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends "${missing[@]}"
}

make_environment() {
    local python stamp wanted
    python="$(find_python)"
    "$python" -c 'import ensurepip, venv' 2>/dev/null || install_system_packages python3-venv
    stamp="$venv/.installed"
    wanted="$(cat requirements.lock pyproject.toml | sha256sum | cut -d' ' -f1)"
    if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
        say "installing into $venv (a few minutes the first time: PyTorch is large)"
        "$python" -m venv "$venv"
        "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
        "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps -e .
        echo "$wanted" > "$stamp"
    fi
    export PATH="$venv/bin:$PATH"
}

# ffcv, which the tests hold our .beton files against: from source, with the system's OpenCV and libjpeg-turbo. Without
# it those tests are skipped, and nothing else needs it.
install_ffcv() {
    local hash=42766a487c8a659b543d070f24732c4b65aab8d96980f5792c63e91e55511f00
    "$venv/bin/python" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("ffcv") is None)' && return
    if ! install_system_packages g++ pkg-config libopencv-dev libturbojpeg0-dev ||
        ! pkg-config --exists opencv4 libturbojpeg || ! command -v g++ >/dev/null; then
        echo "warning: ffcv is not installed: g++, OpenCV or libjpeg-turbo is missing; its tests are skipped" >&2
        echo "  remedy:  apt-get install g++ pkg-config libopencv-dev libturbojpeg0-dev" >&2
        return
    fi
    say "installing ffcv"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation \
        --require-hashes -r <(echo "ffcv==1.0.2 --hash=sha256:$hash") ||
        echo "warning: ffcv is not installed: it could not be built; its tests are skipped" >&2
}
