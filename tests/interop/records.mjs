// Signed records and observations, from "Records" of docs/protocol.md.

import { Buffer } from 'node:buffer'
import { createHash, createPublicKey, verify } from 'node:crypto'
import { peerIdFromPublicKey, peerIdFromString } from '@libp2p/peer-id'
import { publicKeyFromRaw } from '@libp2p/crypto/keys'
import { decodeCanonical, encode, Float } from './msgpack.mjs'
import { array, ascending, blocks, boolean, bytes, dictionary, envelope as envelopeBytes, float, integer, map, name, one, orNil, peer, refuse, text, tuple } from './shapes.mjs'

const MAX_INTEGER = Number.MAX_SAFE_INTEGER
const MAX_RECORD_BYTES = 16384
const MAX_CLOCK_SKEW_S = 60
const MAX_RECORD_LIFETIME_S = 172800
export const MAX_OBSERVATION_AGE_S = 2592000
const MAX_SECONDS = 1e9
const MAX_VOCABULARY = 4194304
const MAX_POSITIONS = 1048576
const MAX_ROWS_PER_TOKEN = 64

export const sha256 = data => createHash('sha256').update(data).digest()

function signatureIsRight (publicKey, data, signature) {
  const key = createPublicKey({
    key: { kty: 'OKP', crv: 'Ed25519', x: Buffer.from(publicKey).toString('base64url') }, format: 'jwk'
  })
  return verify(null, data, key, signature)
}

const envelopeOf = map({ kind: name(256), payload: value => value, public_key: bytes(32), signature: bytes(64) })

/** Return kind, payload and signer of an envelope whose form and signature are right. */
function openEnvelope (envelope, kind) {
  if (envelope.length > MAX_RECORD_BYTES) refuse('the envelope is too large')
  const fields = envelopeOf(decodeCanonical(envelope))
  if (fields.kind !== kind) refuse(`of kind ${fields.kind}, not ${kind}`)
  if (!(fields.payload instanceof Uint8Array)) refuse('the payload is not bytes')
  const signed = Buffer.concat([Buffer.from(`metaswarm/1/${kind}\n`), fields.payload])
  if (!signatureIsRight(fields.public_key, signed, fields.signature)) refuse('the signature is wrong')
  const signer = peerIdFromPublicKey(publicKeyFromRaw(fields.public_key)).toString()
  return { payload: fields.payload, signer }
}

/** Return the envelope of a payload, signed with a libp2p private key. */
export async function seal (kind, payload, privateKey) {
  const data = encode(payload)
  const signature = await privateKey.sign(Buffer.concat([Buffer.from(`metaswarm/1/${kind}\n`), data]))
  return encode({ kind, payload: data, public_key: privateKey.publicKey.raw, signature })
}

// Records that expire

const load = map({
  sessions: integer(0, MAX_INTEGER),
  queued_rows: integer(0, MAX_INTEGER),
  free_positions: integer(0, MAX_INTEGER),
  step_s: float(0, MAX_SECONDS)
})

const figure = high => value => float(0, high)(value) > 0 ? value.value : refuse('a figure is 0')

const throughput = map({
  'memory_read_bytes_per_s?': figure(1e15),
  'fp32_flop_per_s?': figure(1e19),
  'bf16_flop_per_s?': figure(1e19),
  'int8_op_per_s?': figure(1e19)
})

const processorFields = map({
  architecture: name(64),
  model: name(1024),
  logical_cores: integer(1, 65536),
  physical_cores: integer(1, 65536),
  instruction_sets: array(name(64), 0, 32),
  throughput,
  'threads?': integer(1, 65536)
})

function processor (value) {
  const found = processorFields(value)
  if (found.physical_cores > found.logical_cores) refuse('more physical than logical cores')
  // The names are ordered as text is in this document: by their UTF-8 bytes.
  const names = found.instruction_sets.map(each => Buffer.from(each).toString('hex'))
  return ascending(names) ? found : refuse('instruction sets do not ascend')
}

function memory (value) {
  const found = map({ total_bytes: integer(1, 2 ** 50), available_bytes: integer(0, 2 ** 50) })(value)
  return found.available_bytes <= found.total_bytes ? found : refuse('more memory available than there is')
}

const neighbour = map({
  peer,
  'round_trip_s?': figure(60),
  'upload_bytes_per_s?': figure(1e15),
  'download_bytes_per_s?': figure(1e15)
})

const capabilitiesOf = map({
  processor,
  memory,
  software: map({
    metaswarm: name(64), python: name(64), 'torch?': name(64), 'onnxruntime?': name(64), 'transformers?': name(64)
  }),
  accelerators: array(map({
    kind: one('cuda', 'rocm', 'mps'),
    name: name(1024),
    memory_bytes: integer(1, 2 ** 50),
    compute_capability: text(64),
    throughput
  }), 0, 64),
  'disk_read_bytes_per_s?': figure(1e15),
  links: map({
    'upload_bytes_per_s?': figure(1e15),
    'download_bytes_per_s?': figure(1e15),
    neighbours: array(neighbour, 0, 16)
  }),
  'price?': float(0, 1e6)
})

function multiaddr (value) {
  return name(256)(value).startsWith('/') ? value : refuse('an address does not begin with /')
}

export const prefix = (low, high) => value =>
  new RegExp(`^[0-9a-f]{${low},${high}}$`).test(text(high)(value)) ? value : refuse(`not ${low} to ${high} digits`)

const MAX_COUNT = 2 ** 32

const reachability = map({
  verdict: one('public', 'private', 'unknown'),
  observed: array(multiaddr, 0, 4),
  endpoint_dependent: boolean,
  port_mapped: boolean,
  relays: array(peer, 0, 4),
  relay_bytes_per_s: float(0, 1e15)
}, { open: true })

const kinds = {
  span: { model: bytes(32), blocks: array(blocks, 0, 48) },
  heartbeat: {
    interval_ms: integer(1, 300_000),
    multiaddrs: array(multiaddr, 0, 16),
    agent: name(256),
    spans: array(map({ model: bytes(32), blocks, load }), 0, 48),
    placements: array(map({ model: bytes(32), blocks, rate: float(0, 1e9), movable: boolean }), 0, 48),
    placed_at_ms: integer(0, MAX_INTEGER),
    leaving: boolean,
    'reachability?': reachability
  },
  capability: { version: one(1), capabilities: orNil(capabilitiesOf) },
  history: {
    first_bucket: integer(0, 2 ** 32 - 1),
    count: integer(0, MAX_COUNT),
    digest: bytes(32),
    parts: array(tuple(prefix(0, 8), integer(1, MAX_COUNT), bytes(32)), 0, 128)
  }
}

/** Return the payload and the signer of a record that is valid now; `now_s` is Unix time. */
export function openRecord (kind, envelope, now_s) {
  const { payload, signer } = openEnvelope(envelope, kind)
  const record = map({
    sequence: integer(0, MAX_INTEGER),
    issued_at_s: integer(0, MAX_INTEGER),
    expires_at_s: integer(0, MAX_INTEGER),
    ...kinds[kind]
  }, { open: kind === 'heartbeat' })(decodeCanonical(payload))
  const lifetime_s = record.expires_at_s - record.issued_at_s
  if (lifetime_s <= 0 || lifetime_s > MAX_RECORD_LIFETIME_S) refuse('an impossible lifetime')
  if (record.issued_at_s > now_s + MAX_CLOCK_SKEW_S) refuse('issued in the future')
  if (record.expires_at_s <= now_s) refuse('expired')
  if (kind === 'capability' && record.capabilities !== null) {
    const peers = record.capabilities.links.neighbours.map(each => each.peer)
    if (new Set(peers).size < peers.length || peers.includes(signer)) refuse('a neighbour comes twice, or is the signer')
  }
  if (kind === 'history') {
    const prefixes = record.parts.map(([found]) => found)
    if (!ascending(prefixes) || prefixes.some((each, index) => index > 0 && each.startsWith(prefixes[index - 1]))) {
      refuse('parts overlap or do not ascend')
    }
    if (record.parts.reduce((sum, [, count]) => sum + count, 0) !== record.count) refuse('parts do not add up')
  }
  return { ...record, signer }
}

// The DHT

/** Return the key under which a record stands in the DHT. */
export function wireKey (key) {
  const hash = sha256(key).subarray(0, 24).toString('base64').replaceAll('+', '-').replaceAll('/', '_')
  return Buffer.from(`/metaswarm/${hash}`)
}

/** Return the full key and the envelope in a value that was found under a key of the DHT. */
export function parseWireValue (stored, value) {
  const data = Buffer.from(value)
  if (data.length < 2 || data.length < 2 + data.readUInt16BE()) refuse('truncated')
  const end = 2 + data.readUInt16BE()
  const key = data.subarray(2, end).toString()
  return Buffer.compare(wireKey(key), Buffer.from(stored)) === 0
    ? { key, envelope: data.subarray(end) }
    : refuse('a record of another key')
}

// Observations

const switchText = value => /^[a-z0-9_.+-]{1,64}$/.test(value) ? value : refuse('no switch')
const switches = dictionary(switchText, switchText, 16)
const size = orNil(integer(1, MAX_VOCABULARY))

const statistics = tuple(
  integer(0, MAX_INTEGER), integer(0, MAX_INTEGER), float(0, MAX_SECONDS), float(0, MAX_SECONDS),
  integer(0, MAX_INTEGER), integer(0, MAX_INTEGER)
)

const stageFacts = tuple(
  integer(1, 1024), one('cpu', 'cuda', 'rocm', 'mps'), integer(1, 2 ** 50), integer(1, 65536), integer(0, 65536),
  boolean, boolean, boolean,
  orNil(figure(1e15)), orNil(figure(1e19)), orNil(figure(1e19)), orNil(figure(1e19)),
  orNil(float(0, 60)), orNil(figure(1e15)), float(0, 1e6)
)

const observationOf = map({
  version: one(1, 2),
  observer: peer,
  job: bytes(16),
  kind: one('served', 'probe', 'assigned', 'bench'),
  issued_at_s: integer(0, MAX_INTEGER),
  model: map({
    id: bytes(32),
    architecture: name(256),
    block_count: integer(1, 1024),
    hidden_size: integer(1, 65536),
    vocabulary_size: integer(1, MAX_VOCABULARY),
    max_positions: integer(1, MAX_POSITIONS),
    weight_bytes: integer(0, MAX_INTEGER),
    intermediate_size: size,
    head_count: size,
    kv_head_count: size,
    expert_count: size,
    active_expert_count: size,
    'head_size?': integer(1, MAX_VOCABULARY),
    'block_bytes?': integer(0, MAX_INTEGER),
    'block_parameters?': integer(0, MAX_INTEGER),
    'active_block_parameters?': integer(0, MAX_INTEGER),
    'kv_bytes_per_token?': integer(0, MAX_INTEGER)
  }),
  workload: map({
    prompt_tokens: integer(1, MAX_POSITIONS),
    completion_tokens: integer(0, MAX_POSITIONS),
    cached_tokens: integer(0, MAX_POSITIONS),
    concurrency: integer(1, 65536),
    shared_prefix_share: float(0, 1),
    repetitiveness: float(0, 1),
    link_s: float(0, 1e9),
    objective: one('latency', 'throughput', 'cost'),
    quality: one('exact', 'near', 'any'),
    'task_kind?': one('embed', 'score')
  }),
  method: map({ switches, stage_policy: switches }),
  measurements: map({
    ttft_s: float(0, MAX_SECONDS),
    tpot_s: float(0, MAX_SECONDS),
    total_s: float(1e-6, MAX_SECONDS),
    tokens_per_s: float(0, 1e9),
    log_ratio_to_baseline: orNil(float(-20, 20)),
    replays: integer(0, 64)
  }),
  route: array(
    tuple(peer, blocks, name(64), statistics, orNil(float(0, MAX_SECONDS)), orNil(bytes(64))), 1, 64
  ),
  software: dictionary(name(64), name(64), 16),
  'stage_facts?': array(stageFacts, 1, 32)
})

/** Return the observation in an envelope, with its id; throw ProtocolError for one that must be rejected. */
export function openObservation (envelope, now_s) {
  const { payload, signer } = openEnvelope(envelope, 'observation')
  const observation = observationOf(decodeCanonical(payload))
  if (observation.observer !== signer) refuse('not signed by its observer')
  if (observation.issued_at_s > now_s + MAX_CLOCK_SKEW_S) refuse('issued in the future')
  if (bucketOf(observation.issued_at_s) < bucketOf(now_s - MAX_OBSERVATION_AGE_S)) refuse('issued too long ago')
  checkFigures(observation)
  checkStages(observation)
  return { ...observation, id: sha256(payload).toString('hex') }
}

export const bucketOf = seconds => Math.floor(seconds / 3600)

export function methodName (method) {
  return Object.keys(method.switches).sort().map(each => `${each}=${method.switches[each]}`).join('|')
}

function checkFigures ({ kind, model, workload, method, measurements }) {
  name(256)(methodName(method))
  const ratioIsThere = measurements.log_ratio_to_baseline !== null
  if (kind === 'served' ? ratioIsThere : kind !== 'bench' && !ratioIsThere) refuse('a ratio too many or too few')
  const { prompt_tokens, completion_tokens, cached_tokens, task_kind } = workload
  if (task_kind === 'embed' ? completion_tokens > 0 : !task_kind && completion_tokens === 0) refuse('tokens of another kind of task')
  if (prompt_tokens + completion_tokens > model.max_positions) refuse('more tokens than positions')
  if (cached_tokens >= prompt_tokens) refuse('all of the prompt was cached')
  if (model.expert_count !== null && model.active_expert_count > model.expert_count) refuse('too many active experts')
  const { ttft_s, tpot_s, total_s, tokens_per_s } = measurements
  if (completion_tokens <= 1 && tpot_s !== 0) refuse('a time per further token without any')
  if (Math.abs(ttft_s + tpot_s * (completion_tokens - 1) - total_s) > 0.01 * total_s + 0.001) refuse('times do not add up')
  const produced = tokens_per_s * total_s
  const counted = completion_tokens || prompt_tokens
  if (produced < 0.99 * counted) refuse('fewer tokens a second than there were')
  if (kind === 'served' && produced > 1.01 * counted) refuse('more tokens a second than there were')
}

function checkStages (observation) {
  const { route, model, workload, kind, measurements, stage_facts } = observation
  if (stage_facts && !(stage_facts.length === route.length && route.every(([, [start, end]], n) => stage_facts[n][0] === end - start))) {
    refuse('facts of other stages')
  }
  if (route.some(([, [start]], index) => index > 0 && start !== route[index - 1][1][1])) refuse('stages do not follow')
  if (kind === 'served' || kind === 'probe') {
    if (route[0][1][0] !== 0 || route.at(-1)[1][1] !== model.block_count) refuse('stages do not cover the model')
  }
  const tokens = workload.prompt_tokens + workload.completion_tokens
  const longest_s = 2 * measurements.total_s + 1
  for (const stage of route) {
    const [steps, rows, compute_s, queue_s] = stage[3]
    if (steps > rows || rows > MAX_ROWS_PER_TOKEN * tokens) refuse('impossible steps or rows')
    if (steps === 0 && (rows > 0 || compute_s > 0)) refuse('work without a step')
    if (compute_s > longest_s || queue_s > longest_s * (steps + 1)) refuse('impossible times')
    if (stage[5] !== null) checkCountersignature(stage, observation)
  }
}

function checkCountersignature ([stagePeer, range, hardware, figures, , countersignature], observation) {
  const [steps, rows, compute_s, queue_s, bytes_in, bytes_out] = figures
  const signed = encode({
    job: observation.job,
    observer: observation.observer,
    model: observation.model.id,
    method: methodName(observation.method),
    blocks: range,
    hardware,
    statistics: [steps, rows, new Float(compute_s), new Float(queue_s), bytes_in, bytes_out]
  })
  const publicKey = peerIdFromString(stagePeer).publicKey.raw
  const prefixed = Buffer.concat([Buffer.from('metaswarm/1/countersignature\n'), signed])
  if (!signatureIsRight(publicKey, prefixed, countersignature)) refuse('a countersignature is wrong')
}

const batchOf = map({ envelopes: array(value => value, 1, 128) })

/** Return the envelopes in a gossip message of observations. */
export function openBatch (data) {
  if (data.length > 32768) refuse('the batch is too large')
  return batchOf(decodeCanonical(data)).envelopes.map(envelopeBytes)
}
