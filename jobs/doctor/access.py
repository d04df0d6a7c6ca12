"""Who reaches a machine, and what of it: Ray's token, open ports, and the interface that the other machines know it by. Pure."""

import ipaddress
from collections.abc import Sequence

from jobs.doctor.findings import Finding, everywhere, listed, ok, warning, wrong
from jobs.doctor.machine import Facts


def judge_access(machines: Sequence[Facts]) -> list[Finding]:
    """Of machines, whether they are a cluster or not."""
    return [*token(machines), *interface(machines)]


# Who may do what


def token(machines: Sequence[Facts]) -> list[Finding]:
    """Ray's token, on machines where there is one, or that others can reach."""
    found = []
    for each in machines:
        permissions = each.token.file_mode
        if permissions is not None and permissions & 0o077:
            text = (
                f"{each.name}: {each.token.place} can be read by others (mode {permissions:o}), and lets them run code"
            )
            found.append(warning("token", text, f"chmod 600 {each.token.place}"))
    digests: dict[str | None, list[Facts]] = {}
    for each in machines:
        digests.setdefault(each.token.digest, []).append(each)
    if len(digests) > 1:
        without = digests.pop(None, [])
        if without:
            found.append(
                wrong("token", f"there is none on {listed(without)}", "copy ~/.ray/auth_token of the head there")
            )
        if len(digests) > 1:
            text = "not the same everywhere: " + " / ".join(listed(each) for each in digests.values())
            found.append(wrong("token", text, "copy ~/.ray/auth_token of the head to all, then `ray start` again"))
    return found


def authentication(machines: Sequence[Facts]) -> list[Finding]:
    """Of a cluster, whose processes have the mode that `ray start` decided."""
    reachable = [each for each in machines if not is_loopback(each.address)]
    if all(each.token.mode not in ("unset", "disabled") for each in machines):
        return [] if token(machines) else [ok("token", f"asked for by Ray, the same{everywhere(machines)}")]
    way = "ray get-auth-token --generate && chmod 600 ~/.ray/auth_token && export RAY_AUTH_MODE=token  # then `ray start` again"
    if reachable:
        text = f"Ray asks for none: whoever reaches {reachable[0].address} runs code on all machines"
        return [wrong("token", text, way)]
    return [warning("token", "Ray asks for none: every user of this machine runs code as you", way)]


def open_port(check: str, what: str, port: int, machine: Facts, way: str) -> list[Finding]:
    """A server that should listen at the loopback alone."""
    addresses = machine.listening.get(port, ())
    outside = [address for address in addresses if not is_loopback(address)]
    if outside:
        return [
            warning(
                check, f"{what} can be reached from other machines: {machine.name} listens at {outside[0]}:{port}", way
            )
        ]
    return [ok(check, f"{what} listens at {', '.join(addresses)}:{port}")] if addresses else []


def dashboard(machines: Sequence[Facts], address: str | None) -> list[Finding]:
    """The dashboard runs the jobs that are submitted to it, and speaks without TLS."""
    if not address or ":" not in address:
        return []
    host, _, port = address.rpartition(":")
    heads = [
        each for each in machines if host in (each.address, "127.0.0.1", "localhost") and int(port) in each.listening
    ]
    way = (
        "ray start --head --dashboard-host 127.0.0.1 ...  # then from elsewhere: ssh -L "
        f"{port}:127.0.0.1:{port} HEAD, and submit to http://127.0.0.1:{port}"
    )
    return open_port("dashboard", "Ray's job server", int(port), heads[0], way) if heads else []


# The network


def interface(machines: Sequence[Facts]) -> list[Finding]:
    """gloo and NCCL ask what the host name resolves to, unless an interface is named: on many systems 127.0.0.1."""
    found = []
    for each in machines:
        for variable, name in each.named_interfaces.items():
            if not any(interface_is(each, part) for part in name.lstrip("^=").split(",")) and not name.startswith("^"):
                text = f"{each.name}: {variable}={name}, and there is no such interface (there: {', '.join(each.interfaces)})"
                found.append(wrong("interface", text, name_interface(each)))
    if len({each.address for each in machines}) == 1:
        return found
    trapped = [
        each for each in machines
        if "GLOO_SOCKET_IFNAME" not in each.named_interfaces
        and (each.host_address is None or is_loopback(each.host_address)) and not is_loopback(each.address)
    ]  # fmt: skip
    for each in trapped:
        resolves = f"resolves to {each.host_address}" if each.host_address else "resolves to nothing"
        text = (
            f"{each.name}: its host name {resolves}, so gloo would offer that to the other machines, not {each.address}"
        )
        found.append(wrong("interface", text, name_interface(each)))
    return found or [ok("interface", f"gloo and NCCL can be reached{everywhere(machines)}")]


def interface_is(machine: Facts, name: str) -> bool:
    """NCCL takes the beginning of a name too."""
    return any(each.startswith(name) for each in machine.interfaces)


def name_interface(machine: Facts) -> str:
    name = next((name for name, addresses in machine.interfaces.items() if machine.address in addresses), "eth0")
    return f"export GLOO_SOCKET_IFNAME={name} NCCL_SOCKET_IFNAME={name}  # there, before `ray start`"


def is_loopback(address: str) -> bool:
    try:
        at = ipaddress.ip_address(address)
    except ValueError:
        return address == "localhost"
    mapped = getattr(at, "ipv4_mapped", None)
    return (mapped or at).is_loopback
