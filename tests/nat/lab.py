"""A lab of network namespaces: public machines, and homes behind NATs of several kinds, over one delaying switch.

    pub 50.0.0.10, pub2 60.0.0.10 ── switch ── gateway 50.0.1.N | 192.168.1.1 ── home 192.168.1.2

All homes have the same private range. Every name begins with a prefix of this process; nothing outside is touched.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path

HERE = Path(__file__).parent
PUBLIC = {"pub": "50.0.0.10", "pub2": "60.0.0.10"}
"""Public machines, in two ranges."""
HOMES = "abcdefghij"
GATEWAYS = {home: f"{70 + number}.0.0.1" for number, home in enumerate(HOMES)}


class Nat(StrEnum):
    """What is between a home and the internet."""

    OPEN = "open"
    """A public address, and nothing in between."""
    FULL_CONE = "full-cone"
    """A mapped port is open to everybody."""
    RESTRICTED = "restricted"
    """A mapped port is open to whom the home has sent something; other packets are dropped."""
    RESETTING = "resetting"
    """The same, and other packets are refused."""
    SYMMETRIC = "symmetric"
    """Another port for each destination."""


_RULES = """
table ip home {{
  set mapped {{ type inet_service; flags dynamic,timeout; timeout 10m; }}
  chain arriving {{
    type nat hook prerouting priority dstnat;
    {full_cone}
  }}
  chain leaving {{ type nat hook postrouting priority srcnat; oifname "wan" masquerade {random}; }}
  chain own {{
    type filter hook input priority 0;
    iifname "wan" ct state established,related accept
    iifname "wan" ip protocol icmp accept
    iifname "wan" {refuse}
  }}
  chain through {{
    type filter hook forward priority 0;
    iifname "lan" oifname "wan" ip protocol tcp add @mapped {{ tcp sport }}
    iifname "wan" ct state established,related accept
    iifname "wan" ct status dnat accept
    iifname "wan" drop
  }}
}}
"""


def _rules(kind: Nat) -> str:
    return _RULES.format(
        full_cone='iifname "wan" tcp dport @mapped dnat to 192.168.1.2' if kind is Nat.FULL_CONE else "",
        random="fully-random" if kind is Nat.SYMMETRIC else "",
        refuse="ip protocol tcp reject with tcp reset" if kind is Nat.RESETTING else "drop",
    )


_PROBE = """
trap 'ip netns del {probe}' EXIT
ip netns add {probe}
ip -n {probe} link add wan type veth peer name lan
ip netns exec {probe} ethtool -K wan tx off
ip netns exec {probe} sysctl -qw net.ipv4.ip_forward=1
ip netns exec {probe} nft -f - <<'RULES'
{rules}
RULES
"""


def missing() -> str | None:
    """Return what is not installed here that the lab is built with."""
    absent = [program for program in ("ip", "nft", "ethtool", "sysctl") if shutil.which(program) is None]
    return f"{absent[0]} is not installed" if absent else None


def refused() -> str | None:
    """Return why this machine does not let us build the lab."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    script = _PROBE.format(probe=f"nat{os.getpid()}-probe", rules=_rules(Nat.SYMMETRIC))
    tried = subprocess.run(["sh", "-e"], input=script, capture_output=True, text=True, check=False)
    return f"the lab cannot be built here: {tried.stderr.strip().splitlines()[0]}" if tried.returncode else None


def remove_abandoned() -> None:
    """Remove the namespaces of test runs that were killed."""
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    for space in re.findall(r"^nat\d+-\S+", listed, re.MULTILINE):
        if not Path("/proc", space.partition("-")[0].removeprefix("nat")).exists():
            subprocess.run(["ip", "netns", "del", space], check=False, capture_output=True)


class Lab:
    """The namespaces of one test."""

    def __init__(self) -> None:
        self._prefix = f"nat{os.getpid()}-"
        remove_abandoned()

    def inside(self, space: str, *command: str) -> list[str]:
        """Return the command that runs another one in a namespace."""
        return ["ip", "netns", "exec", self._prefix + space, *command]

    def forward(self, home: str, port: int) -> None:
        """Forward a port of a home's gateway to it."""
        rule = f"iifname wan tcp dport {port} dnat to 192.168.1.2:{port}"
        subprocess.run(self.inside(f"gate-{home}", "nft", f"add rule ip home arriving {rule}"), check=True)

    @contextmanager
    def built(self, *, delay_ms: float = 5, **kinds: Nat) -> Iterator["Lab"]:
        """Build the lab with homes of these kinds, `a` to `j`; remove it at the end."""
        machines = {**PUBLIC, **{f"gate-{home}": GATEWAYS[home] for home in kinds}}
        spaces = ["switch", *machines, *kinds]
        switch: subprocess.Popen[str] | None = None
        try:
            script = [f"ip netns add {self._prefix}{space}" for space in spaces]
            script += [line for space, host in machines.items() for line in self._on_the_wan(space, host)]
            script += [line for home, kind in kinds.items() for line in self._home(home, kind)]
            subprocess.run(["sh", "-e"], input="\n".join(script), text=True, check=True)
            ports = [f"p-{space}" for space in machines]
            command = self.inside("switch", sys.executable, str(HERE / "switch.py"), str(delay_ms), *ports)
            switch = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
            assert switch.stdout is not None
            assert switch.stdout.readline() == "ready\n"
            yield self
        finally:
            if switch is not None:
                switch.kill()
                switch.communicate()
            for space in spaces:
                subprocess.run(["ip", "netns", "del", self._prefix + space], check=False, capture_output=True)

    def _cable(self, first: tuple[str, str], second: tuple[str, str]) -> Iterator[str]:
        """Yield commands that connect an interface of a namespace with one of another."""
        (a, a_name), (b, b_name) = first, second
        yield (f"ip link add {a_name} netns {self._prefix}{a} type veth peer name {b_name} netns {self._prefix}{b}")
        for space, name in (first, second):
            # The switch sees frames as they are: nothing may be left to hardware that is not there.
            yield f"ip netns exec {self._prefix}{space} ethtool -K {name} tso off gso off gro off tx off > /dev/null"
            yield f"ip -n {self._prefix}{space} link set {name} up"

    def _on_the_wan(self, space: str, host: str) -> Iterator[str]:
        yield from self._cable((space, "wan"), ("switch", f"p-{space}"))
        yield f"ip -n {self._prefix}{space} link set lo up"
        yield f"ip -n {self._prefix}{space} addr add {host}/32 dev wan"
        yield f"ip -n {self._prefix}{space} route add default dev wan"  # all of the internet is one link

    def _home(self, home: str, kind: Nat) -> Iterator[str]:
        gate, inner = f"{self._prefix}gate-{home}", f"{self._prefix}{home}"
        yield from self._cable((f"gate-{home}", "lan"), (home, "eth0"))
        yield f"ip -n {inner} link set lo up"
        yield f"ip -n {gate} addr add 192.168.1.1/24 dev lan"
        yield f"ip netns exec {gate} sysctl -qw net.ipv4.ip_forward=1"
        if kind is Nat.OPEN:
            public = f"{GATEWAYS[home].rpartition('.')[0]}.2"
            yield f"ip netns exec {gate} sysctl -qw net.ipv4.conf.wan.proxy_arp=1 net.ipv4.neigh.wan.proxy_delay=0"
            yield f"ip -n {gate} route add {public}/32 dev lan"
            yield f"ip -n {inner} addr add {public}/32 dev eth0"
            yield f"ip -n {inner} route add 192.168.1.1 dev eth0"
        else:
            yield f"ip -n {inner} addr add 192.168.1.2/24 dev eth0"
            yield f"ip netns exec {gate} nft -f - <<'RULES'\n{_rules(kind)}\nRULES"
        yield f"ip -n {inner} route add default via 192.168.1.1"
