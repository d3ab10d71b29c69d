#!/usr/bin/env bash
# Two ranks on two "hosts" of this machine: network namespaces with addresses of their own, joined by a pair of virtual
# cables, and names, shared memory and files of their own where a launcher looks at them. Trains a recipe over them and
# tells the hash of the model; the same recipe with one rank must give the same. As root.
#   bench/two-hosts.sh RECIPE sockets|openmpi|mpich [options of pretrain]
# RATE=1gbit   caps the cable.
# CUT=SECONDS  takes the cable down after so long, and tells how long the ranks took to end and what they said.
# LIMIT=600    seconds after which everything is ended: a hang is a failure.
set -euo pipefail
[ $# -ge 2 ] || { sed -n 2,9p "$0"; exit 2; }
recipe=$(realpath "$1") transport=$2
shift 2
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
program=$repository/artifacts/bin/TinyLlama.Cli/release/TinyLlama.Cli
[ -x "$program" ] || { echo "$program is missing: dotnet build -c Release"; exit 2; }
folder=$(mktemp -d)
hosts=(tl1 tl2)
clean() {
  for host in "${hosts[@]}"; do
    ip netns pids "$host" 2>/dev/null | xargs -r kill -9 2>/dev/null || true
    ip netns del "$host" 2>/dev/null || true
  done
}
trap clean EXIT
clean
printf '127.0.0.1 localhost\n' > "$folder/hosts"
for i in 0 1; do
  ip netns add "${hosts[i]}"
  printf '10.77.0.%d %s\n' $((i + 1)) "${hosts[i]}" >> "$folder/hosts"
done
ip link add veth1 netns tl1 type veth peer name veth2 netns tl2
for i in 0 1; do
  ip -n "${hosts[i]}" addr add "10.77.0.$((i + 1))/24" dev "veth$((i + 1))"
  ip -n "${hosts[i]}" link set "veth$((i + 1))" up
  ip -n "${hosts[i]}" link set lo up
  if [ -n "${RATE:-}" ]; then
    ip netns exec "${hosts[i]}" tc qdisc add dev "veth$((i + 1))" root tbf rate "$RATE" burst 256k latency 50ms
  fi
done

for i in 0 1; do
  until ip -n "${hosts[i]}" -br link show "veth$((i + 1))" | grep -q ' UP '; do sleep 0.1; done
done

# What launchers call in place of ssh: HOST COMMAND…
cat > "$folder/agent" <<AGENT
#!/usr/bin/env bash
while [[ \$1 == -* ]]; do shift; done
host=\${1##*@}
shift
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMPI_MCA_mpi_yield_when_idle=1
exec ip netns exec "\$host" unshare --uts --ipc --mount bash -c "hostname \$host; mount -t tmpfs tmpfs /dev/shm; mount --bind $folder/hosts /etc/hosts; mkdir -p $folder/tmp-\$host; export TMPDIR=$folder/tmp-\$host; cd $folder; \$*"
AGENT
chmod +x "$folder/agent"
command=("$program" pretrain --recipe "$recipe" --out "$folder/run" --threads 1 "$@")
limit=(timeout -k 5 "${LIMIT:-600}")
case $transport in
  sockets)
    for i in 1 0; do
      "${limit[@]}" "$folder/agent" "${hosts[i]}" RANK=$i WORLD_SIZE=2 MASTER_ADDR=10.77.0.1 MASTER_PORT=29500 TERM=dumb "${command[@]}" > "$folder/out$i" 2>&1 &
      pids[i]=$!
    done ;;
  openmpi)
    "${limit[@]}" "$folder/agent" tl1 mpirun.openmpi -n 2 -H tl1:1,tl2:1 --bind-to none --mca plm_rsh_agent "$folder/agent" --mca btl tcp,self \
      --mca btl_tcp_if_include 10.77.0.0/24 --mca oob_tcp_if_include 10.77.0.0/24 "${command[@]}" > "$folder/out0" 2>&1 &
    pids[0]=$! ;;
  mpich)
    "${limit[@]}" "$folder/agent" tl1 mpirun.mpich -n 2 -hosts tl1:1,tl2:1 -launcher ssh -launcher-exec "$folder/agent" "${command[@]}" > "$folder/out0" 2>&1 &
    pids[0]=$! ;;
  *) echo "no such transport: $transport"; exit 2 ;;
esac
start=$SECONDS
if [ -n "${CUT:-}" ]; then
  sleep "$CUT"
  ip -n tl1 link set veth1 down
  start=$SECONDS
  echo "the cable is cut"
fi
for i in "${!pids[@]}"; do
  code=0
  wait "${pids[i]}" || code=$?
  echo "ended after $((SECONDS - start)) s with code $code"
done
for i in "${!pids[@]}"; do
  tr '\r' '\n' < "$folder/out$i" | { grep -v '^ *$' || true; } | tail -n 2
done
tail -qn 2 "$folder"/run/ranks/*.log 2>/dev/null || true
newest=$(find "$folder/run/checkpoints" -name model.safetensors 2>/dev/null | sort | tail -n 1)
[ -z "$newest" ] || sha256sum "$newest"
