#!/usr/bin/env bash
# Everything that must hold: set-up, linters, types, then the whole test suite. Runs on a bare Debian or Ubuntu machine.
#   bash scripts/test.sh              all of it
#   bash scripts/test.sh tests/data   one part of the suite; further words go to pytest
set -euo pipefail
source "$(dirname "$0")/environment.sh"
make_environment
install_system_packages nginx-light
install_ffcv
# a real SLURM, which tests of engines start and end; without it they are skipped
install_system_packages slurm-wlm munge || echo "warning: SLURM is not installed; its tests are skipped" >&2
export HF_HUB_OFFLINE=1 WANDB_MODE=offline WANDB_SILENT=true TOKENIZERS_PARALLELISM=false

if [ $# -eq 0 ]; then
    say "lint"
    ruff check .
    ruff format --check .
    codespell
    say "types"
    mypy
fi
say "tests"
# a file at a time on every core: most of the suite is real runs that start a process or two
python -m pytest -n "$(nproc)" --dist loadfile --no-loadscope-reorder --durations=15 "$@"
