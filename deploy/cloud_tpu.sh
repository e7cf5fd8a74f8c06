#!/usr/bin/env bash
# Training on all hosts of a Cloud TPU slice; jax finds them by itself.
#
#   deploy/cloud_tpu.sh NAME ZONE gs://bucket/run.yaml [more flags of train]
#
# The run's folder (out) must be one that all hosts share, as a mounted bucket. What was started
# here goes on when this terminal is closed; the same command again goes on with the run.
set -euo pipefail

if [ "$#" -lt 3 ]; then
  sed -n '2,7p' "$0" >&2
  exit 2
fi
name=$1 zone=$2 config=$3
shift 3

on_all_hosts() {
  gcloud compute tpus tpu-vm ssh "$name" --zone "$zone" --worker=all --command "$1"
}

gcloud compute tpus tpu-vm scp --recurse --zone "$zone" --worker=all . "$name:llama_jax"
on_all_hosts "cd llama_jax && pip install -q '.[tpu]' && gcloud storage cp '$config' run.yaml"

flags=""
if [ "$#" -gt 0 ]; then flags=$(printf " %q" "$@"); fi
on_all_hosts "cd llama_jax && nohup python main.py train --config run.yaml --restarts 20 \
  --distributed.cluster gcetpu$flags > train.log 2>&1 &"
on_all_hosts "sleep 60; tail -n 5 llama_jax/train.log"
