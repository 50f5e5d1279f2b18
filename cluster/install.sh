#!/usr/bin/env bash
# Installs genray, Ray and everything they need, in our versions, into an environment of their own, and puts it first
# on PATH. Run by the Dockerfile and by the nodes of `ray up`: the image's own packages stay as they are, so that
# nothing of it can disagree with constraints.txt. Doing it again costs seconds.
#
#   bash cluster/install.sh SOURCE TARGET      SOURCE: this repository; TARGET: the environment to make
set -euo pipefail

source=$(cd "$1" && pwd)
target=$2
profile="export PATH=$target/bin:\$PATH"

# pip writes beside pyproject.toml, and SOURCE may be somebody else's or read-only.
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT
cp -r "$source/genray" "$source/pyproject.toml" "$source/README.md" "$source/constraints.txt" "$build/"

test -x "$target/bin/python" || python -m venv "$target"
"$target/bin/pip" install --no-cache-dir --quiet -c "$build/constraints.txt" 'ray[default]' "$build"
grep -qsxF "$profile" ~/.bashrc || echo "$profile" >> ~/.bashrc
cd / && "$target/bin/python" -c 'import genray, ray; print("genray", genray.__version__, "ray", ray.__version__)'
