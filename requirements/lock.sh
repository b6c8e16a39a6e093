#!/usr/bin/env bash
# Write the lock: exact versions with hashes, for Linux and macOS and Python 3.11 to 3.14. It needs uv and a network.
# Locked versions are kept where pyproject.toml allows them; with --upgrade the newest ones are taken.
set -euo pipefail
cd "$(dirname "$0")"
versions=$(mktemp)
trap 'rm -f "$versions"' EXIT
compile() {
	uv pip compile ../pyproject.toml --universal --python-version 3.11 --fork-strategy fewest \
		--quiet --no-annotate --custom-compile-command 'make lock' "$@" >/dev/null
}
without() { sed -nE 's/^([a-z0-9-]+)==.*/--no-emit-package \1/p' "$@"; }

cat ./*.txt >"$versions"
compile --all-extras --output-file "$versions" "$@"
sed -i.bak 's/ ;.*//' "$versions" && rm "$versions.bak" # each platform must find the same versions
# install.py installs torch. Its CUDA build names the versions of its own packages; the CPU build does not need them.
grep '^torch==' "$versions" >torch.txt
cuda=$(grep -E '^(torch|triton|cuda-.*|nvidia-.*)==' "$versions" | grep -v nvidia-ml-py | without)
compile --generate-hashes --constraints "$versions" $cuda --output-file base.txt
for extra in dev docs postgres s3 team; do
	compile --generate-hashes --constraints "$versions" --extra $extra $cuda $(without base.txt) --output-file $extra.txt
done
