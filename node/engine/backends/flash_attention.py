"""FlashAttention 3: reads keys and values in bf16 in place, through page tables, for all rows of a step at once.

It is used where its package is installed beside torch, on the GPUs it is for (NVIDIA's Hopper), and where it gives what
torch's own attention gives; that is tried once. FlashAttention 2 takes pages of 256 positions only.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import cast

import torch

from node.engine.backends.interface import Rows
from node.engine.backends.paged_attention import padded_view
from node.engine.kv_cache import BlockKvCache, SlotMapping

VariableLengthAttention = Callable[..., torch.Tensor]
"""torch's `varlen_attn`."""

_TRIAL_TOLERANCE = 0.02


@dataclass(frozen=True, slots=True)
class FlashAttention:
    """What all rows of a step attend to.

    `starts`: where each session's rows begin, and the end, i32. `lengths`: positions of each with its rows, i32.
    `pages`: of each, padded with any, i32 (sessions, pages), of `page_positions` each.
    """

    attention: VariableLengthAttention
    starts: torch.Tensor
    lengths: torch.Tensor
    pages: torch.Tensor
    page_positions: int
    most_rows: int
    window: int | None

    def attend(self, queries: torch.Tensor, memory: BlockKvCache, scaling: float) -> torch.Tensor:
        """Return the attention of all rows."""
        _, heads, size = queries.shape
        keys, values = (there.view(-1, self.page_positions, *there.shape[1:]) for there in (memory.keys, memory.values))
        attended = self.attention(
            queries.to(keys.dtype).contiguous(),
            keys,
            values,
            self.starts,
            None,
            self.most_rows,
            self.pages.shape[1] * self.page_positions,
            scale=scaling,
            window_size=(-1 if self.window is None else self.window - 1, 0),
            enable_gqa=True,
            seqused_k=self.lengths,
            block_table=self.pages,
        )
        return attended.reshape(-1, heads * size).float()


def flash_view(
    slices: Sequence[Rows], window: int | None, device: torch.device, attention: VariableLengthAttention
) -> FlashAttention:
    """Return what slices attend to."""
    counts = torch.tensor([0, *(len(part.rows) for part in slices)])
    lengths = torch.tensor([part.position + len(part.rows) for part in slices])
    page_positions = slices[0].slots.page_positions
    most = -(-int(lengths.max()) // page_positions)
    pages = torch.stack([_padded(part.slots.pages[:most], most) for part in slices])
    starts, lengths, pages = (each.to(device, torch.int32) for each in (counts.cumsum(0), lengths, pages))
    return FlashAttention(attention, starts, lengths, pages, page_positions, int(counts.max()), window)


def _padded(pages: torch.Tensor, count: int) -> torch.Tensor:
    return torch.cat([pages, pages[:1].expand(count - len(pages))])


@cache
def flash_attention_on(device: torch.device) -> VariableLengthAttention | None:
    """Return FlashAttention 3 where a device has it, and it works."""
    if device.type != "cuda":
        return None
    try:
        from torch.nn.attention import activate_flash_attention_impl, restore_flash_attention_impl
        from torch.nn.attention.varlen import varlen_attn

        activate_flash_attention_impl("FA3")
    except (ImportError, OSError, RuntimeError, ValueError):
        return None
    try:
        attention = cast("VariableLengthAttention", varlen_attn)
        if is_attention(attention, device):
            return attention
    except (RuntimeError, TypeError, ValueError):  # another GPU, another release
        pass
    restore_flash_attention_impl()
    return None


@torch.inference_mode()
def is_attention(attention: VariableLengthAttention, device: torch.device) -> bool:
    """Return whether it gives what torch's own attention gives."""
    heads, groups, size, pages = 4, 2, 64, 8
    generator = torch.Generator().manual_seed(0)

    def random_tensor(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device)

    slices = [
        Rows(torch.zeros(1), SlotMapping([5, 2], 64), 70, 0),
        Rows(torch.zeros(9), SlotMapping([7, 0], 64), 60, 0),
    ]
    memory = BlockKvCache(*(random_tensor(pages * 64, groups, size).bfloat16() for _ in range(2)))
    queries = random_tensor(10, heads, size)
    for window in (None, 20):
        expected = padded_view(slices, 0, window, device).attend(queries, memory, 0.125)
        found = flash_view(slices, window, device, attention).attend(queries, memory, 0.125)
        if not torch.allclose(found, expected, atol=_TRIAL_TOLERANCE, rtol=_TRIAL_TOLERANCE):
            return False
    return True
