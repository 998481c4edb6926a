"""Capabilities of machines that tests talk about."""

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from protocol.capabilities import (
    Accelerator,
    AcceleratorKind,
    Capabilities,
    Links,
    Memory,
    Neighbour,
    Processor,
    Software,
    Throughput,
)
from protocol.identity import PeerId, peer_id_from_public_key

GIB = 1 << 30


def key_of(number: int) -> Ed25519PrivateKey:
    return Ed25519PrivateKey.from_private_bytes(number.to_bytes(32, "big"))


def peer_of(number: int) -> PeerId:
    return peer_id_from_public_key(key_of(number).public_key().public_bytes_raw())


EPYC = Capabilities(
    processor=Processor(
        architecture="x86_64",
        model="AMD EPYC 9354 32-Core Processor",
        physical_cores=2,
        logical_cores=4,
        instruction_sets=("avx2", "avx512_bf16", "avx512f"),
        throughput=Throughput(memory_read_bytes_per_s=31e9, fp32_flop_per_s=190e9, bf16_flop_per_s=410e9),
    ),
    memory=Memory(total_bytes=25_276_502_016, available_bytes=20 * GIB),
    software=Software(metaswarm="0.1.0", python="3.11.7", torch="2.13.0+cpu", transformers="5.23.0"),
    disk_read_bytes_per_s=1.2e9,
    links=Links(
        upload_bytes_per_s=5e6, neighbours=(Neighbour(peer=peer_of(77), round_trip_s=0.02, upload_bytes_per_s=5e6),)
    ),
)

H100 = Accelerator(
    kind=AcceleratorKind.CUDA,
    name="NVIDIA H100 80GB HBM3",
    memory_bytes=85_029_158_912,
    compute_capability="9.0",
    throughput=Throughput(
        memory_read_bytes_per_s=3e12, fp32_flop_per_s=51e12, bf16_flop_per_s=700e12, int8_op_per_s=1.3e15
    ),
)
