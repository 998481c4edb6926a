"""A switch with delay, for kernels without netem: `switch.py MILLISECONDS INTERFACE...`, in a namespace of its own."""

import heapq
import select
import socket
import sys
import time

OUTGOING = 4
"""The kind of packets that the kernel shows us because we sent them."""


def main(delay_s: float, interfaces: list[str]) -> None:
    sockets = []
    for name in interfaces:
        sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
        sock.bind((name, 0))
        sock.setblocking(False)
        sockets.append(sock)
    waiting: list[tuple[float, int, int, bytes]] = []
    ports: dict[bytes, int] = {}
    """Behind which interface each hardware address is."""
    count = 0
    print("ready", flush=True)
    while True:
        now_s = time.monotonic()
        while waiting and waiting[0][0] <= now_s:
            _, _, origin, frame = heapq.heappop(waiting)
            ports[frame[6:12]] = origin
            known = ports.get(frame[:6])
            for number in range(len(sockets)) if known is None else (known,):
                if number != origin:
                    try:
                        sockets[number].send(frame)
                    except OSError:
                        continue  # its queue is full: the packet is lost
        left_s = max(0.0, waiting[0][0] - now_s) if waiting else 1.0
        for readable in select.select(sockets, [], [], left_s)[0]:
            while True:
                try:
                    frame, address = readable.recvfrom(1 << 16)
                except BlockingIOError:
                    break
                if address[2] != OUTGOING:
                    count += 1
                    heapq.heappush(waiting, (time.monotonic() + delay_s, count, sockets.index(readable), frame))


if __name__ == "__main__":
    main(float(sys.argv[1]) / 1000, sys.argv[2:])
