"""Bounds of everything that a remote peer may send. A remote integer is compared with one of these before use."""

from typing import Final

# Frames and msgpack values of any stream
MAX_FRAME_BYTES: Final = 1 << 20  # body of any frame on a job, blob or sync stream
MAX_CONTROL_BYTES: Final = 64 << 10  # body of a control frame, and header of a step frame: what msgpack decodes
MAX_DEPTH: Final = 6  # nesting of maps and arrays in a msgpack value
MAX_ELEMENTS: Final = 4096  # elements of one array or map in a msgpack value
MAX_NODES: Final = 8192  # values of every kind, nested ones included, in a msgpack value
MAX_TEXT_BYTES: Final = 1024  # UTF-8 bytes of a human-readable string, such as a refusal's message
MAX_NAME_BYTES: Final = 256  # UTF-8 bytes of a name: a method, an agent, a switch
MAX_INTEGER: Final = (1 << 53) - 1  # counters, sequence numbers and times: exact in the numbers of every language
MAX_UINT64: Final = (1 << 64) - 1  # seeds and nonces, which are not calculated with
MAX_SECONDS: Final = 1e9  # a duration

# Job streams
MAX_STEP_BYTES: Final = 64 << 20  # tensor payload of one step, all its chunks together
MAX_WINDOW_BYTES: Final = MAX_STEP_BYTES  # `Hello.window_bytes`: step payload of one session, sent and not yet consumed
MAX_SLICES: Final = 256  # slices in one step frame
MAX_SESSIONS: Final = 1024  # concurrent sessions on one job stream
MAX_PINGS: Final = 16  # pings on one job stream that await their pong
MAX_POSITIONS: Final = 1 << 20  # positions (tokens) of one session, prompt and output together
MAX_BLOCKS: Final = 1024  # transformer blocks of one model
MAX_STAGES: Final = 64  # stages of one route
MAX_WIDTH: Final = 1 << 16  # elements of one row of a tensor (the hidden size)
MAX_VOCABULARY: Final = 1 << 22  # token ids are below this
PAGE_POSITIONS: Final = 32  # positions of one page of a KV cache, which a prefix hash identifies
PREFIX_HASH_BYTES: Final = 16  # hash of one page of a prompt and of all pages before it
MAX_PREFIX_BYTES: Final = 32 << 10  # the prefix hashes of one prompt
MAX_DRAFTS: Final = 16  # draft tokens beside one slice
MAX_TIMED_STEPS: Final = 512  # steps in one Timings
MAX_HISTORY_TOKENS: Final = 8192  # token ids in one TokenHistory: 32 KiB, well within a control frame

# Sampling; logit biases as in the OpenAI API
MAX_STOP_TOKENS: Final = 64  # token ids that end a job
MAX_LOGIT_BIASES: Final = 300  # tokens of one job with a logit bias
MAX_LOGIT_BIAS: Final = 100.0  # added to a token's logit, either sign
MAX_PENALTY: Final = 100.0  # presence and frequency penalty of either sign, repetition penalty from its inverse on
MAX_TEMPERATURE: Final = 100.0
MAX_LOGPROBS: Final = 21  # the log probability of a drawn token, and those of up to 20 likeliest tokens
MAX_JSON_SCHEMA_BYTES: Final = 16 << 10  # a JSON Schema that the text of a job follows

# For logs and traces
MAX_REQUEST_ID_BYTES: Final = 128  # the id of the API request that a session is for
MAX_TRACE_PARENT_BYTES: Final = 55  # a `traceparent` of W3C Trace Context

# Votes on the method of a job
MAX_BALLOTS: Final = MAX_STAGES + 1  # ballots on one job: of every stage, and the coordinator's
MAX_VOTES: Final = 128  # methods in one vote
MAX_CONTEXT: Final = 64  # entries of the task context that the stages vote on
MAX_NUMBER: Final = 1e18  # a number in a task context, either sign
MAX_SCORE: Final = 1e9  # a method's score, either sign

# Signed records
SIGNATURE_BYTES: Final = 64  # an Ed25519 signature
MAX_RECORD_BYTES: Final = 16 << 10  # a signed record, envelope included
MAX_RECORD_LIFETIME_S: Final = 48 * 3600  # from issue to expiry
MAX_CLOCK_SKEW_S: Final = 60  # how far in the future a record may have been issued, by our clock
MAX_SPANS: Final = 48  # spans that one peer announces
MAX_ADDRESSES: Final = 16  # multiaddrs that one peer announces
MAX_RELAYS: Final = 4  # relays at which one peer has reservations
MAX_OBSERVED: Final = 4  # addresses at which others see a peer
MAX_HEARTBEAT_INTERVAL_MS: Final = 300_000  # time between two heartbeats of a peer
MAX_RATE: Final = 1e9  # tokens per second through a peer's placement
MAX_PRESENT: Final = 10_000  # heartbeats in one answer on a presence stream

# Observations
MAX_OBSERVATION_AGE_S: Final = 30 * 24 * 3600  # since the issue, by our clock; the history reaches back as far
MAX_SWITCHES: Final = 16  # switches of a method, and of the stages' policy
MAX_SWITCH_BYTES: Final = 64  # characters of a switch's name or value
MAX_HARDWARE_BYTES: Final = 64  # UTF-8 bytes of a stage's hardware class
MAX_SOFTWARE: Final = 16  # programs and libraries with their versions
MAX_PARALLEL_JOBS: Final = 1 << 16  # concurrent jobs on one stage
MAX_ROWS_PER_TOKEN: Final = 64  # rows that a stage computes per token of prompt and output, rejected drafts included
MAX_STAGE_FACTS: Final = 32  # stages of a route whose facts a record carries; of a longer route it has none
MAX_TOKENS_PER_S: Final = 1e9  # of all jobs that were measured together
MAX_LOG_RATIO: Final = 20.0  # natural logarithm of a ratio of costs, either sign

# The history: gossip, digests and sync streams
MAX_BUCKET: Final = (1 << 32) - 1  # a time bucket: an hour, counted from Unix time 0
MAX_COUNT: Final = 1 << 32  # observations of a history, more than any store holds
MAX_LISTED: Final = 512  # ids listed in one answer on a sync stream: 16 KiB
MAX_QUERIES: Final = 64  # prefixes in one query on a sync stream
MAX_GET: Final = 512  # envelopes that one message on a sync stream requests or carries
MAX_BUSY_S: Final = 3600  # the retry delay of a busy peer on a sync stream
MAX_PARTS: Final = 128  # prefixes in a digest record, which then stays well within its bound
MAX_BATCH_BYTES: Final = 32 << 10  # a gossip message of observations: larger ones are lost more often and block others
MAX_BATCH_ENVELOPES: Final = 128  # observations in one gossip message

# Blob streams
MAX_MANIFEST_BYTES: Final = 4 << 20  # a model's manifest
MAX_BLOB_BYTES: Final = 64 << 30  # a file served by the blob protocol

# Chain streams
MAX_LOCATOR: Final = 40  # statements in a locator
MAX_HAVE: Final = 7000  # recent records in an inventory
MAX_CHAIN_ITEMS: Final = 256  # envelopes in one message
MAX_PART_MEMBERS: Final = 320  # members, or expelled peers, in one part of a state
MAX_PART_CELLS: Final = 64  # cells in one part of a state
MAX_CELL_READINGS: Final = 16  # readings of one cell
