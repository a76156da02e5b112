"""By which network interface the ranks of several machines find each other."""

import ipaddress
import socket
from collections.abc import Mapping

import psutil

from sfumato.errors import UserError

# gloo takes a name as it is; NCCL and HCCL take it as the beginning of names, unless "=" stands before it.
FORMS = {"GLOO_SOCKET_IFNAME": "{}", "NCCL_SOCKET_IFNAME": "={}", "HCCL_SOCKET_IFNAME": "={}"}

PORT = 29500
"""Where node 0 listens, if nothing else is said."""


def address(master: str) -> tuple[str, int]:
    """HOST, HOST:PORT, IPv6 as [ADDRESS]:PORT. Raises UserError for anything else."""
    host, colon, port = master.rpartition(":")
    if not colon or master.endswith("]") or (":" in host and not host.startswith("[")):
        host, port = master, str(PORT)
    host = host.removeprefix("[").removesuffix("]")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UserError(f"--master {master}", "that is no HOST[:PORT]", "such as --master node1:29500")
    return host, int(port)


def resolved(host: str, port: int) -> list[str]:
    """The addresses of a host's name; none where it has no known one."""
    try:
        return list(
            dict.fromkeys(str(each[4][0]) for each in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        )
    except (OSError, UnicodeError):
        return []


def toward(host: str) -> str | None:
    """This machine's address on the way to a host, by the system's routes; nothing is sent.

    None where there is no route, or only loopback.
    """
    for address in resolved(host, 9):
        try:
            # Connecting a UDP socket chooses the route and so our own address, and no more.
            with socket.socket(
                socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM
            ) as probe:
                probe.connect((address, 9))
                own = str(probe.getsockname()[0])
        except OSError:
            continue
        if not loopback(own):
            return own
    return None


def loopback(address: str) -> bool:
    return ipaddress.ip_address(address).is_loopback


def variables(env: Mapping[str, str], own: str | None) -> dict[str, str]:
    """What `env` lacks so that gloo, NCCL and HCCL take the interface with this machine's address `own`.

    What the user has set stays. Nothing for loopback, which reaches no other machine.
    """
    if own is None or loopback(own):
        return {}
    for name, addresses in psutil.net_if_addrs().items():
        if own in [each.address.split("%")[0] for each in addresses]:
            return {key: form.format(name) for key, form in FORMS.items() if key not in env}
    return {}
