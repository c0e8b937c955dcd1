#!/bin/bash
# Trains on machines that are reached by ssh: starts the same command on each of them and waits for all.
#
#   configs/ssh.sh recipe.yaml [--resume] [KEY=VALUE ...]        from a folder that all machines share
#
# Change HOSTS; the first is where they meet, under a name that all of them know. Needs keys without a passphrase.
# Exits with the code of the machine that failed first, or 0. Ctrl-C and SIGTERM ask the run to stop: it is saved after
# its step and the code is 75. The output of all machines comes together here.
HOSTS=(gpu1 gpu2)
PEFTCLI=peftcli # with its path, where a login by ssh does not find it

ID=$(date +%Y%m%d-%H%M%S)-$$
COMMAND=(exec "$PEFTCLI" train "$@" --nnodes "${#HOSTS[@]}" --rdzv-endpoint "${HOSTS[0]}:29500" --rdzv-id "$ID")
CODES=$(mktemp)

stop() { # the oldest process that names this run is its launcher, which passes the signal on
  for HOST in "${HOSTS[@]}"; do ssh -n -o BatchMode=yes "$HOST" "pkill -USR1 -o -f $ID"; done
}
trap stop INT TERM

for HOST in "${HOSTS[@]}"; do
  {
    ssh -n -o BatchMode=yes "$HOST" "cd $(printf %q "$PWD") && $(printf '%q ' "${COMMAND[@]}")"
    echo $? >>"$CODES"
  } &
done
until wait; do :; done # a signal ends `wait` before they have ended

CODE=$(grep -v -x -m 1 0 "$CODES")
rm "$CODES"
exit "${CODE:-0}"
