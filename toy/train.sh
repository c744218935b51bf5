#!/usr/bin/env bash
# All of assets/toy but the adapter, from nothing: toy/train.sh WORK, on one GPU with 80 GB, about 25 minutes. Steps may be
# changed by environment.
set -euo pipefail
work=$1 out=$1/assets
mkdir -p "$out"
run() { echo "== $(date +%T) $*"; python -m "toy.$@"; }

run train_tokenizers "$out"
run train_text "$out" "${T5:-2500}" & text=$!
run pictures "$work/held" --looks 512 --held-out
run pictures "$work/album" --looks "${LOOKS:-8000}"
run train_vae "$work/album" "$out" "${VAE:-4000}" & vae=$!
run train_siglip "$work/album" "$out" "${SIGLIP:-700}" & siglip=$!
run train_dinov2 "$work/album" "$out" "${DINOV2:-400}" & dinov2=$!
run judge "$work/album" "$out" "${JUDGE:-1000}" & judge=$!
for part in $text $vae $siglip $dinov2 $judge; do wait "$part"; done
run train_flux "$work/album" "$out" "${FLUX_128:-3600}" --side 128
run train_flux "$work/album" "$out" "${FLUX_256:-2800}" --rate 5e-4
run train_flux "$work/album" "$out" "${GUIDED:-350}" --distil
run train_lora "$out" "${LORA:-500}"
run dataset "$work/album" "$work/data"
