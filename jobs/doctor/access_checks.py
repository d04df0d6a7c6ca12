"""Checks of who can reach a machine: Ray's token, open ports, network interfaces. They ask nothing of any machine."""

import ipaddress
from collections.abc import Sequence

from jobs.doctor.facts import MachineFacts
from jobs.doctor.findings import Finding, error, everywhere, names, ok, warning


def check_access(machines: Sequence[MachineFacts]) -> list[Finding]:
    """Checks for machines with or without a cluster."""
    return [*check_token(machines), *check_interfaces(machines)]


# Who may do what


def check_token(machines: Sequence[MachineFacts]) -> list[Finding]:
    """Nobody else can read Ray's token, and it is the same on all machines."""
    found = []
    for each in machines:
        permissions, source = each.token.file_mode, each.token.source
        if permissions is not None and permissions & 0o077:
            text = f"{each.name}: other users can read {source} (mode {permissions:o}); who has it can run code"
            found.append(warning("token", text, f"chmod 600 {source}"))
    by_digest: dict[str | None, list[MachineFacts]] = {}
    for each in machines:
        by_digest.setdefault(each.token.digest, []).append(each)
    if len(by_digest) > 1:
        if without := by_digest.pop(None, []):
            fix = "copy ~/.ray/auth_token of the head there"
            found.append(error("token", f"there is none on {names(without)}", fix))
        if len(by_digest) > 1:
            text = "not the same on all machines: " + " / ".join(map(names, by_digest.values()))
            found.append(error("token", text, "copy ~/.ray/auth_token of the head to all, then `ray start` again"))
    return found


def check_authentication(machines: Sequence[MachineFacts]) -> list[Finding]:
    """A cluster asks for the token: `ray start` has decided that for its processes."""
    if all(each.token.mode not in ("unset", "disabled") for each in machines):
        return [] if check_token(machines) else [ok("token", f"required by Ray, the same{everywhere(machines)}")]
    fix = "ray get-auth-token --generate && chmod 600 ~/.ray/auth_token && export RAY_AUTH_MODE=token  # then `ray start` again"
    reachable = [each for each in machines if not is_loopback(each.address)]
    if reachable:
        text = f"Ray requires none: who reaches {reachable[0].address} can run code on all machines"
        return [error("token", text, fix)]
    return [warning("token", "Ray requires none: every user of this machine can run code as you", fix)]


def check_port(check: str, server: str, port: int, machine: MachineFacts, fix: str) -> list[Finding]:
    """A server listens at the loopback only."""
    addresses = machine.listening.get(port, ())
    outside = [address for address in addresses if not is_loopback(address)]
    if outside:
        text = f"{server} can be reached from other machines: {machine.name} listens at {outside[0]}:{port}"
        return [warning(check, text, fix)]
    return [ok(check, f"{server} listens at {', '.join(addresses)}:{port}")] if addresses else []


def check_dashboard(machines: Sequence[MachineFacts], address: str | None) -> list[Finding]:
    """Ray's dashboard runs the jobs that are submitted to it, and has no TLS."""
    host, _, port = (address or "").rpartition(":")
    if not host:
        return []
    heads = [
        each for each in machines if host in (each.address, "127.0.0.1", "localhost") and int(port) in each.listening
    ]
    fix = (
        "ray start --head --dashboard-host 127.0.0.1 ...  # then from elsewhere: ssh -L "
        f"{port}:127.0.0.1:{port} HEAD, and submit to http://127.0.0.1:{port}"
    )
    return check_port("dashboard", "Ray's job server", int(port), heads[0], fix) if heads else []


# The network


def check_interfaces(machines: Sequence[MachineFacts]) -> list[Finding]:
    """gloo and NCCL use the address of the host name, on many systems 127.0.0.1, unless an interface is named."""
    found = []
    for each in machines:
        for variable, name in each.named_interfaces.items():
            if not name.startswith("^") and not any(has_interface(each, part) for part in name.lstrip("=").split(",")):
                there = ", ".join(each.interfaces)
                text = f"{each.name}: {variable}={name}, but there is no such interface (found: {there})"
                found.append(error("interface", text, interface_fix(each)))
    if len({each.address for each in machines}) == 1:
        return found
    for each in machines:
        is_named, address = "GLOO_SOCKET_IFNAME" in each.named_interfaces, each.host_address
        if is_named or is_loopback(each.address) or not (address is None or is_loopback(address)):
            continue
        resolves = f"resolves to {address}" if address else "resolves to nothing"
        text = f"{each.name}: its host name {resolves}; gloo would give that to the other machines, not {each.address}"
        found.append(error("interface", text, interface_fix(each)))
    return found or [ok("interface", f"gloo and NCCL can be reached{everywhere(machines)}")]


def has_interface(machine: MachineFacts, name: str) -> bool:
    """NCCL also takes the beginning of a name."""
    return any(each.startswith(name) for each in machine.interfaces)


def interface_fix(machine: MachineFacts) -> str:
    name = next((name for name, addresses in machine.interfaces.items() if machine.address in addresses), "eth0")
    return f"export GLOO_SOCKET_IFNAME={name} NCCL_SOCKET_IFNAME={name}  # there, before `ray start`"


def is_loopback(text: str) -> bool:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return text == "localhost"
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback
