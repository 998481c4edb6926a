"""Every bound on what a remote peer may send. A remote integer is compared with one of these before use."""

from typing import Final

MAX_FRAME_BYTES: Final = 1 << 20
"""Body of any frame on a job, blob or sync stream."""

MAX_CONTROL_BYTES: Final = 64 << 10
"""Body of a control frame, and of the header of a step frame: what is decoded with msgpack."""

MAX_STEP_BYTES: Final = 64 << 20
"""Tensor payload of one step, all its chunks together."""

MAX_WINDOW_BYTES: Final = MAX_STEP_BYTES
"""The most a peer may offer in `Hello.window_bytes`: step payload of one session that is sent and not yet consumed."""

MAX_SLICES: Final = 256
"""Slices in one step frame."""

MAX_SESSIONS: Final = 1024
"""Sessions that one job stream carries at a time."""

MAX_PINGS: Final = 16
"""Pings on one job stream that await their Pong."""

MAX_POSITIONS: Final = 1 << 20
"""Positions (tokens) of one session: prompt and output together."""

MAX_BLOCKS: Final = 1024
"""Transformer blocks of one model."""

MAX_STAGES: Final = 64
"""Stages of one route."""

MAX_WIDTH: Final = 1 << 16
"""Elements of one row of a tensor (the hidden size)."""

MAX_VOCABULARY: Final = 1 << 22
"""Token ids are below this."""

MAX_TEXT_BYTES: Final = 1024
"""UTF-8 bytes of a human-readable string such as a refusal's message; names are shorter still."""

MAX_NAME_BYTES: Final = 256
"""UTF-8 bytes of a name: a method, an agent, a switch."""

MAX_BALLOTS: Final = MAX_STAGES + 1
"""Ballots about the method of one job: of every stage, and the coordinator's."""

MAX_VOTES: Final = 128
"""Methods in one vote."""

MAX_CONTEXT: Final = 64
"""Names in a task context that votes are about."""

MAX_NUMBER: Final = 1e18
"""A number in a task context, either sign."""

PAGE_POSITIONS: Final = 32
"""Positions of one page of a KV cache: what a prefix hash stands for."""

PREFIX_HASH_BYTES: Final = 16
"""The hash of one page of a prompt and of everything before it."""

MAX_PREFIX_BYTES: Final = 32 << 10
"""The prefix hashes of one prompt."""

MAX_DRAFTS: Final = 16
"""Guessed tokens that travel beside one slice."""

MAX_STOP_TOKENS: Final = 64
"""Token ids that end a job."""

MAX_LOGIT_BIASES: Final = 300
"""Tokens of one job whose logits are biased, as in the OpenAI API."""

MAX_LOGIT_BIAS: Final = 100.0
"""What is added to a token's logit, either sign, as in the OpenAI API."""

MAX_PENALTY: Final = 100.0
"""A sampling penalty: presence and frequency of either sign, repetition from its inverse on."""

MAX_HISTORY_TOKENS: Final = 8192
"""Token ids in one TokenHistory: 32 KiB, well within a control frame."""

MAX_DEPTH: Final = 6
"""Nesting of maps and arrays in any msgpack value from a peer."""

MAX_ELEMENTS: Final = 4096
"""Elements of one array or map in any msgpack value from a peer."""

MAX_NODES: Final = 8192
"""Values of every kind, nested ones included, in any msgpack value from a peer."""

MAX_RECORD_BYTES: Final = 16 << 10
"""A signed record, envelope included."""

MAX_RECORD_LIFETIME_S: Final = 48 * 3600
"""The latest a record may expire after it was issued."""

MAX_CLOCK_SKEW_S: Final = 60
"""How far in the future a record may have been issued, by our clock."""

MAX_SPANS: Final = 48
"""Spans that one peer announces."""

MAX_ADDRESSES: Final = 16
"""Multiaddrs that one peer announces."""

MAX_MANIFEST_BYTES: Final = 4 << 20
"""A model's manifest."""

MAX_BLOB_BYTES: Final = 64 << 30
"""A file served by the blob protocol."""

MAX_INTEGER: Final = (1 << 53) - 1
"""Counters, sequence numbers and times that have no tighter bound: what every language's numbers hold exactly."""

MAX_UINT64: Final = (1 << 64) - 1
"""Seeds and nonces, which nobody calculates with."""

MAX_SECONDS: Final = 1e9
"""A duration."""

MAX_SCORE: Final = 1e9
"""A method's score in a vote, either sign."""

MAX_TEMPERATURE: Final = 100.0
"""A sampling temperature."""

MAX_OBSERVATION_AGE_S: Final = 30 * 24 * 3600
"""How far in the past an observation may have been issued, by our clock; the history reaches back as far."""

MAX_SWITCHES: Final = 16
"""Switches of a method, and of the stages' policy."""

MAX_SWITCH_BYTES: Final = 64
"""Characters of a switch's name or value."""

MAX_HARDWARE_BYTES: Final = 64
"""UTF-8 bytes of a stage's hardware class."""

MAX_SOFTWARE: Final = 16
"""Programs and libraries whose versions an observation tells."""

MAX_PARALLEL_JOBS: Final = 1 << 16
"""Jobs under way at a time on one stage."""

MAX_ROWS_PER_TOKEN: Final = 64
"""Rows a stage computes for each token of prompt and output, the rejected guesses of a speculation included."""

MAX_TOKENS_PER_S: Final = 1e9
"""Tokens a second, of all jobs that were measured together."""

MAX_LOG_RATIO: Final = 20.0
"""Natural logarithm of a ratio of costs, either sign."""

MAX_BUCKET: Final = (1 << 32) - 1
"""A time bucket: an hour, counted from Unix time 0."""

MAX_COUNT: Final = 1 << 32
"""Observations of a history, more than any store holds."""

MAX_LISTED: Final = 512
"""Ids that one answer on a sync stream lists: 16 KiB."""

MAX_QUERIES: Final = 64
"""Prefixes that one message on a sync stream asks about."""

MAX_GET: Final = 512
"""Envelopes that one message on a sync stream asks for, or carries."""

MAX_BUSY_S: Final = 3600
"""The longest a busy peer sends another away on a sync stream."""

MAX_PARTS: Final = 128
"""Prefixes whose digests a peer publishes; with them the record stays well within its bound."""

MAX_BATCH_BYTES: Final = 32 << 10
"""A gossip message of observations: larger ones get lost more often, and hold up what is behind them."""

MAX_BATCH_ENVELOPES: Final = 128
"""Observations in one gossip message."""

MAX_HEARTBEAT_INTERVAL_MS: Final = 300_000
"""The longest that a peer may be silent between two heartbeats."""

MAX_RATE: Final = 1e9
"""Tokens a second that a peer may say that it passes."""

MAX_PRESENT: Final = 10_000
"""Heartbeats that one answer on a presence stream hands on."""

MAX_LOCATOR: Final = 40
"""Statements by which a peer says on a chain stream how far it stands."""

MAX_HAVE: Final = 7000
"""Records of late that a peer says on a chain stream that it holds."""

MAX_CHAIN_ITEMS: Final = 256
"""Envelopes that one message on a chain stream carries."""

MAX_PART_MEMBERS: Final = 320
"""Members, or expelled peers, in one part of a state on a chain stream."""

MAX_PART_CELLS: Final = 64
"""Cells in one part of a state on a chain stream."""

MAX_CELL_REPLICAS: Final = 16
"""Readings of one cell."""

SIGNATURE_BYTES: Final = 64
"""An Ed25519 signature."""
