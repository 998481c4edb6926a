"""The peer protocol: values and their encoding, without I/O and without a clock.

Values, which the selector may import: `errors`, `limits`, `identity`, `tensors`; `fields` (checks of single values) and
`schema` (declarations of fields with their bounds); `messages`, `measurements`, `announcements`, `capabilities`.

Wire, from the bottom: `canonical` and `signatures`; `framing`; `codec` and `records` (bytes of messages and of signed
records); `observations`, `consensus`, `reconciliation` and `history`; and the streams without I/O: `states` and
`connection` (jobs), `blobs`, `presence`, `sync` and `chains` (over `conversation`).
"""
