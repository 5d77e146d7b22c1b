#!/usr/bin/env bash
# Run the built-in GSM8K recipe on two GPUs of one machine: two processes share every node (docs/devices.md).
# Needs gsm8k/train.jsonl and gsm8k/test.jsonl in the current folder.
set -euo pipefail
torchrun --nproc-per-node 2 -m headwater run gsm8k --arm bridge --device cuda --out "${1:-runs/gsm8k}"
