#!/usr/bin/env bash
# Runs a command inside a throw-away SLURM cluster on this machine; nothing outlives the command.
#
# Usage: tests/cluster/with_cluster.sh NODES DIR COMMAND...
#   NODES nodes node1, node2, ... of 2 CPUs each, and a controller "ctl" on which COMMAND runs, with
#   sbatch, squeue and scontrol. DIR (made anew) holds the cluster's configuration, logs and state.
#   Needs root, and Debian's slurmctld, slurmd, slurm-client and munge.
#
# The cluster has a PID, mount, network and host name namespace of its own, and so has every node in
# it, on a bridge. When COMMAND ends the kernel ends whatever is left; killing a node's first process
# (its PID is in DIR/run/node1.pid) is that node's power cut.
set -euo pipefail

if [ "${1:-}" != --inside ]; then
  if [ $# -lt 3 ]; then
    sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0" >&2
    exit 2
  fi
  self=$(readlink -f "$0")
  freezer=/sys/fs/cgroup/freezer/throwaway.$$
  mkdir "$freezer" 2>/dev/null || freezer=
  status=0
  unshare --mount --pid --net --uts --fork --kill-child --mount-proc \
    bash "$self" --inside "$freezer" "$@" || status=$?
  [ -z "$freezer" ] || find "$freezer" -depth -type d -exec rmdir {} + || true
  exit "$status"
fi
freezer=$2
shift
nodes=$2
mkdir -p "$3"
dir=$(readlink -f "$3")
shift 3

rm -rf "${dir:?}"/{etc,log,munge,run,spool,state}
mkdir -p "$dir"/{etc,log,munge,run,spool,state}
dd if=/dev/urandom bs=128 count=1 of="$dir/munge/key" status=none
chmod 400 "$dir/munge/key"
chmod 700 "$dir/munge"

hostname ctl
export HOSTNAME=ctl
{
  echo "127.0.0.1 localhost"
  echo "10.77.0.254 ctl"
  for i in $(seq "$nodes"); do echo "10.77.0.$i node$i"; done
} >"$dir/etc/hosts"
mount --bind "$dir/etc/hosts" /etc/hosts
ip link set lo up
ip link add br0 type bridge
ip addr add 10.77.0.254/24 dev br0
ip link set br0 up

# Only a cgroup holds a job's processes together whatever session they move to, and real clusters
# use it; where this machine has none that can be written, it is process groups.
tracking=pgid
if [ -n "$freezer" ]; then
  tracking=cgroup
  mkdir -p "$dir/cgroup/freezer"
  mount --bind "$freezer" "$dir/cgroup/freezer"
  printf '%s\n' CgroupPlugin=cgroup/v1 "CgroupMountpoint=$dir/cgroup" ConstrainCores=no \
    >"$dir/etc/cgroup.conf"
fi

# cred_expire: a requeued job waits until its credentials have expired, 121 s otherwise.
# SrunPortRange: lets a test block every port but SLURM's.
cat >"$dir/etc/slurm.conf" <<END
ClusterName=throwaway
SlurmctldHost=ctl
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$dir/run/munge.sock,cred_expire=5
CredType=cred/munge
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool/%n
SlurmctldPidFile=$dir/run/slurmctld.pid
SlurmdPidFile=$dir/run/slurmd.%n.pid
SlurmctldLogFile=$dir/log/slurmctld.log
SlurmdLogFile=$dir/log/slurmd.%n.log
ProctrackType=proctrack/$tracking
TaskPlugin=task/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MailProg=/bin/true
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,batch_sched_delay=0,sched_interval=2
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout=10
SrunPortRange=60001-63000
KillWait=5
JobRequeue=1
MinJobAge=600
NodeName=node[1-$nodes] CPUs=2 RealMemory=8000 State=UNKNOWN
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP
END
export SLURM_CONF="$dir/etc/slurm.conf"

munged --force --key-file="$dir/munge/key" --socket="$dir/run/munge.sock" \
  --pid-file="$dir/run/munged.pid" --log-file="$dir/munge/munged.log" --seed-file="$dir/munge/seed"
slurmctld -c

# node I: the first process of a node. bash waits for the orphans that it is given.
node() {
  until ip link show eth0 >/dev/null 2>&1; do sleep 0.02; done
  hostname "node$1"
  export HOSTNAME=node$1
  ip link set lo up
  ip addr add "10.77.0.$1/24" dev eth0
  ip link set eth0 up
  echo 32768 59999 >/proc/sys/net/ipv4/ip_local_port_range
  slurmd -N "node$1"
  while :; do
    sleep 3600 &
    wait
  done
}
export -f node

for i in $(seq "$nodes"); do
  mkdir -p "$dir/spool/node$i"
  unshare --mount --pid --net --uts --fork --kill-child --mount-proc \
    bash -c "node $i" </dev/null >"$dir/log/node$i.log" 2>&1 &
  outer=$!
  until first=$(cat "/proc/$outer/task/$outer/children") && [ -n "$first" ]; do sleep 0.02; done
  echo "${first% }" >"$dir/run/node$i.pid"
  ip link add "veth$i" type veth peer name eth0 netns "${first% }"
  ip link set "veth$i" master br0 up
done

idle() { sinfo -h -N -t idle -o %n 2>/dev/null | wc -l; }
for _ in $(seq 100); do
  [ "$(idle)" -lt "$nodes" ] || break
  sleep 0.1
done
if [ "$(idle)" -lt "$nodes" ]; then
  echo "error: the cluster did not start; its logs, in $dir/log, end with:" >&2
  sinfo -N -l >&2 || true
  tail -n 20 "$dir"/log/*.log >&2
  exit 1
fi
"$@"
