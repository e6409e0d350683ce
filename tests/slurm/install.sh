#!/bin/bash
# A SLURM of two nodes, n1 and n2, on this machine, to test with; needs root and a Debian or Ubuntu.
#
#   tests/slurm/install.sh FOLDER         install what is missing, write the configuration, start the daemons (again)
#   tests/slurm/install.sh FOLDER stop    stop them
#
# Everything but the packages is in FOLDER. Commands find it by SLURM_CONF=FOLDER/slurm.conf.
set -euo pipefail
folder=$(realpath -m "$1")

stop() { # by the ids that the daemons left in FOLDER
  for daemon in slurmd-n1 slurmd-n2 slurmctld munged; do
    if [ -f "$folder/$daemon.pid" ] && kill "$(cat "$folder/$daemon.pid")" 2>/dev/null; then
      for _ in $(seq 50); do kill -0 "$(cat "$folder/$daemon.pid" 2>/dev/null)" 2>/dev/null || break; sleep 0.1; done
    fi
    rm -f "$folder/$daemon.pid"
  done
}

stop
if [ "${2:-start}" = stop ]; then exit; fi

if ! command -v slurmctld slurmd munged >/dev/null; then
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends slurm-wlm munge
fi

rm -rf "$folder"/{state,spool-n1,spool-n2,munge}
mkdir -p "$folder"/{state,spool-n1,spool-n2,munge}
chmod 0755 "$folder" "$folder/munge"
(umask 077 && head -c 1024 /dev/urandom >"$folder/munge/key")
echo "CgroupPlugin=autodetect" >"$folder/cgroup.conf"
cat >"$folder/slurm.conf" <<CONF
ClusterName=test
SlurmctldHost=$(hostname)(127.0.0.1)
SlurmctldPort=16817
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$folder/munge/socket
CredType=cred/munge
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool-%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd-%n.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
JobRequeue=1
KillWait=5
NodeName=DEFAULT CPUs=$(getconf _NPROCESSORS_ONLN) RealMemory=$(free -m | awk '/^Mem/ {print int($2 * 0.9)}')
NodeName=n1 NodeAddr=127.0.0.1 Port=16818
NodeName=n2 NodeAddr=127.0.0.1 Port=16819
PartitionName=test Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=YES:4
CONF

export SLURM_CONF=$folder/slurm.conf
munged --force --key-file="$folder/munge/key" --socket="$folder/munge/socket" --pid-file="$folder/munged.pid" \
  --log-file="$folder/munge/log" --seed-file="$folder/munge/seed"
slurmctld -c
slurmd -c -N n1
slurmd -c -N n2
for _ in $(seq 100); do
  if [ "$(sinfo --noheader --format=%T 2>/dev/null)" = idle ]; then
    echo "SLURM is ready: export SLURM_CONF=$SLURM_CONF"
    exit
  fi
  sleep 0.2
done
echo "SLURM did not become ready, see $folder/slurmctld.log and $folder/slurmd-*.log" >&2
exit 1
