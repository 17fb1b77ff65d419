#!/usr/bin/env bash
# From nothing to a trained model you can search with: environment, data, training, evaluation, pictures, result.
# Takes four to ten minutes of training on two CPU cores. Further words are overrides:
#   bash scripts/quickstart.sh objective=sigmoid
#   bash scripts/quickstart.sh trainer.devices=2 strategy=ddp
set -euo pipefail
source "$(dirname "$0")/environment.sh"
make_environment

say "data: 4,000 drawings with names (a tenth of the names is held out)"
vlm-train data import openmoji data/openmoji

say "training"
vlm-train train experiment=quickstart "$@"

say "searching the held-out drawings, which the model has never seen"
run=runs/quickstart/latest
vlm-train predict run=$run text="green heart" text="eight o'clock" text="a sleepy face" images=data/openmoji/val out=$run/media/search.png

say "result"
cat $run/evals/retrieval.json
echo "report:  $run/report.html"
echo "search:  $run/media/search.png"
