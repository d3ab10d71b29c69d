#!/usr/bin/env bash
# Keeps a server under load and fails where it fails a request or its memory grows: clients that read their replies,
# beside 1,000 a round that vanish at any moment. Linux with curl.
#
#   bench/soak.sh MODEL [MINUTES]     60 minutes by default; CLIENTS=8 and PORT=8099 are the defaults
#
# Each round is a line: minutes, resident memory in MB, tokens generated. Memory is flat where the most of the last
# quarter is at most 5 % above the most of the second; in the first, pools and the key-value cache fill.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
model=$1
seconds=$((${2:-60} * 60))
clients=${CLIENTS:-8}
url=http://127.0.0.1:${PORT:-8099}

dotnet build -c Release -v q -nologo src/TinyLlama.Cli
tinyllama=artifacts/bin/TinyLlama.Cli/release/TinyLlama.Cli
"$tinyllama" serve "$model" --port "${url##*:}" --places "$clients" --queue 2000 --chat-template zephyr &
server=$!
trap 'kill $server 2>/dev/null || true' EXIT
curl --silent --retry 60 --retry-delay 1 --retry-connrefused "$url/health" >/dev/null

vanish() {
  seq 1000 | xargs -P 50 -I{} sh -c \
    "curl --silent --max-time 0.\$(({} % 9 + 1)) '$url/v1/completions' -H 'Content-Type: application/json' \
      -d '{\"prompt\":\"client {}\",\"max_tokens\":200,\"stream\":true}' >/dev/null || true"
}

resident() { awk '/^VmRSS/ { printf "%d", $2 / 1000 }' "/proc/$server/status"; }

memory=()
begin=$SECONDS
while ((SECONDS - begin < seconds)); do
  vanish &
  vanishing=$!
  "$tinyllama" bench serve "$url" --clients "$clients" --requests 2 >/dev/null
  wait $vanishing
  memory+=("$(resident)")
  tokens=$(curl --silent "$url/metrics" | awk '/^tinyllama_generated_tokens_total/ { print $2 }')
  printf '%4d min  %6d MB  %s tokens\n' $(((SECONDS - begin) / 60)) "${memory[-1]}" "$tokens"
done

kill $server
wait $server
rounds=${#memory[@]}
most() { printf '%s\n' "${memory[@]:$1:$2}" | sort -n | tail -1; }
quarter=$((rounds / 4))
[ "$quarter" -gt 0 ] || { echo "only $rounds rounds: too few to judge memory by" >&2; exit 2; }
before=$(most $quarter $quarter)
after=$(most $((rounds - quarter)) $quarter)
echo "most of the second quarter $before MB, of the last $after MB"
((after * 100 <= before * 105))
