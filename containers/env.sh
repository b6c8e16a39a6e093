#!/bin/sh
# Write .env from .env.example: the user who runs this, and a random word for each secret. An existing .env is kept.
set -eu
cd "$(dirname "$0")/.."
if [ -e .env ]; then
	echo "error: .env exists, and is kept: edit it, or move it away first" >&2
	exit 2
fi
umask 077
while IFS= read -r line; do
	case $line in
	TOTARGET_USER=*) line=TOTARGET_USER=$(id -u):$(id -g) ;;
	[A-Z]*=) line=$line$(od -An -N24 -tx1 /dev/urandom | tr -d ' \n') ;;
	esac
	printf '%s\n' "$line"
done <.env.example >.env.new
mv .env.new .env
echo "wrote .env, which only you can read"
