#!/usr/bin/env bash
# A pod's last act (preStop): Ray is told that this node is about to go, and trainings are given the time to save and go on without
# it (docs/reliability.md, `ray drain-node`). A node on which no training runs goes at once.
set -euo pipefail
seconds=${GRURCN_LEAVE_SECONDS:-120} # less than terminationGracePeriodSeconds
ray drain-node --reason DRAIN_NODE_REASON_PREEMPTION --reason-message "the pod is being ended" \
    --deadline-remaining-seconds "$seconds"
trains() { grep -qs 'ray::.*TrainWorker' /proc/[0-9]*/cmdline; }
until=$((SECONDS + seconds))
while trains && [ $SECONDS -lt $until ]; do sleep 1; done
