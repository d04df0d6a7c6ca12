# The environment of every node of a Ray cluster, read (sourced) before `ray start`. What is set already stays.

# Only who has the token of ~/.ray/auth_token gets in, whether or not this Ray version asks for it by default.
export RAY_AUTH_MODE=token

# A machine that is gone is noted after 5 s, a cable that is out after 20 s; by Ray's own settings after 14 s and 65 s
# (docs/reliability.md).
export RAY_health_check_initial_delay_ms=${RAY_health_check_initial_delay_ms:-1000}
export RAY_health_check_period_ms=${RAY_health_check_period_ms:-1000}
export RAY_health_check_timeout_ms=${RAY_health_check_timeout_ms:-3000}
export RAY_health_check_failure_threshold=${RAY_health_check_failure_threshold:-5}

# The interface that leads out of the machine: gloo and NCCL may take another one by themselves (docker0, or, where the host's name
# resolves to 127.0.0.1, the loopback), and then wait for peers that cannot answer. NCCL over InfiniBand does not use it for data.
interface=$(awk '$2 == "00000000" { print $1; exit }' /proc/net/route 2> /dev/null || true)
if [ -n "$interface" ]; then
    export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$interface} NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-$interface}
fi
unset interface

# Each worker keeps a few connections and files a shard open, and Ray a few a worker: the usual limit of 1,024 is too low.
ulimit -n 65536 2> /dev/null || ulimit -n "$(ulimit -Hn)"
