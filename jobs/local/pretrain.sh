#!/usr/bin/env bash
# Pretrain on this machine with some workers on Ray, which starts for the run and ends with it.
# Usage: jobs/local/pretrain.sh STORE OUT   The same line again resumes.
set -euo pipefail

PRESET=${PRESET:-tiny}         # tiny, small, paper
WORKERS=${WORKERS:-2}          # processes; with GPUs one for each
MORE=${MORE:-}                 # further options, as: --gpus --checkpoint-minutes 5

# shellcheck disable=SC2086
exec annatac pretrain "$1" --out "$2" --preset "$PRESET" --workers "$WORKERS" $MORE
