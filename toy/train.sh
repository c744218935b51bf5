#!/usr/bin/env bash
# Trains everything in assets/toy but the adapter: toy/train.sh WORK, about 25 minutes on one GPU with 80 GB.
# Environment variables change the numbers of steps.
set -euo pipefail
work=$1 out=$1/assets
mkdir -p "$out"
run() { echo "== $(date +%T) $*"; python -m "toy.$@"; }

run train.tokenizers "$out"
run train.text "$out" "${T5:-2500}" & text=$!
run data.pictures "$work/held" --characters 512 --held-out
run data.pictures "$work/album" --characters "${CHARACTERS:-8000}"
run train.vae "$work/album" "$out" "${VAE:-4000}" & vae=$!
run train.siglip "$work/album" "$out" "${SIGLIP:-700}" & siglip=$!
run train.dinov2 "$work/album" "$out" "${DINOV2:-400}" & dinov2=$!
run train.judge "$work/album" "$out" "${JUDGE:-1000}" & judge=$!
for part in $text $vae $siglip $dinov2 $judge; do wait "$part"; done
run train.flux "$work/album" "$out" "${FLUX_128:-3600}" --side 128
run train.flux "$work/album" "$out" "${FLUX_256:-2800}" --rate 5e-4
run train.flux "$work/album" "$out" "${GUIDED:-350}" --distil
run train.lora "$out" "${LORA:-500}"
run data.dataset "$work/album" "$work/data"
