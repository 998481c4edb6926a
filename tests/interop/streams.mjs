// Frames, the sync protocol and the blob protocol, from docs/protocol.md.

import { Buffer } from 'node:buffer'
import { createHash } from 'node:crypto'
import { decode, encode } from './msgpack.mjs'
import { bucketOf, MAX_OBSERVATION_AGE_S, openObservation, prefix, sha256 } from './records.mjs'
import { array, ascending, boolean, bytes, envelope, integer, map, name, one, refuse, tuple } from './shapes.mjs'

export const CONTROL = 1
export const STEP = 2
export const CHUNK = 3

const MAX_FRAME_BYTES = 1048576
const MAX_CONTROL_BYTES = 65536
const MAX_BLOB_BYTES = 68719476736
const MAX_COUNT = 2 ** 32
const MAX_BUCKET = 2 ** 32 - 1
const MAX_QUERIES = 64
const MAX_GET = 512
const MAX_LISTED = 512

/** A stream of frames. */
export class Frames {
  constructor (stream) {
    this.stream = stream
    this.chunks = stream[Symbol.asyncIterator]()
    this.buffered = Buffer.alloc(0)
  }

  async take (length) {
    while (this.buffered.length < length) {
      const { value, done } = await this.chunks.next()
      if (done) refuse('the stream ended')
      this.buffered = Buffer.concat([this.buffered, value.subarray()])
    }
    const taken = this.buffered.subarray(0, length)
    this.buffered = this.buffered.subarray(length)
    return taken
  }

  /** Return type and body of the next frame. */
  async receive () {
    const head = await this.take(5)
    const [length, type] = [head.readUInt32BE(), head[4]]
    const limit = { [CONTROL]: MAX_CONTROL_BYTES, [STEP]: MAX_FRAME_BYTES, [CHUNK]: MAX_FRAME_BYTES }[type] ?? refuse('no frame')
    if (length < (type === STEP ? 5 : 1) || length > limit) refuse('a frame of an impossible length')
    return { type, body: await this.take(length) }
  }

  /** Return the next message, which is of one of these types: `shapes` has the fields of each. */
  async hear (shapes) {
    const { type, body } = await this.receive()
    if (type !== CONTROL) refuse('no control frame')
    const value = decode(body)
    const kind = value instanceof Map ? value.get('type') : refuse('no map')
    return map({ type: one(...Object.keys(shapes)), ...shapes[kind] })(value)
  }

  async say (message) {
    const body = encode(message)
    const head = Buffer.alloc(5, CONTROL)
    head.writeUInt32BE(body.length)
    if (!this.stream.send(Buffer.concat([head, body]))) await this.stream.onDrain()
  }
}

// Sync

const digest = bytes(32)
const ids = value => {
  if (!(value instanceof Uint8Array) || value.length === 0 || value.length % 32 !== 0) refuse('no ids')
  const found = []
  for (let at = 0; at < value.length; at += 32) found.push(Buffer.from(value.subarray(at, at + 32)).toString('hex'))
  return found.length <= MAX_LISTED && ascending(found) ? found : refuse('ids do not ascend')
}

function answer (value) {
  if (value === null) return { equal: true }
  if (value instanceof Map && value.has('stem')) {
    return map({
      stem: prefix(0, 71),
      parts: array(tuple(prefix(1, 1), integer(1, MAX_COUNT), digest), 1, 16)
    })(value)
  }
  return map({ buckets: array(tuple(integer(0, MAX_BUCKET), ids), 0, MAX_LISTED) })(value)
}

const fromResponder = {
  welcome: { first_bucket: integer(0, MAX_BUCKET), answer },
  busy: { retry_s: integer(0, 3600) },
  answers: { answers: array(answer, 1, MAX_QUERIES) },
  items: { envelopes: array(envelope, 0, MAX_GET), last: boolean },
  taken: { count: integer(0, MAX_GET) }
}

const only = kind => ({ [kind]: fromResponder[kind] })

const bucketDigits = bucket => bucket.toString(16).padStart(8, '0')

/** Observations by their keys. */
export class History {
  constructor () {
    this.envelopes = new Map()
  }

  add (observation, envelope) {
    this.envelopes.set(bucketDigits(bucketOf(observation.issued_at_s)) + observation.id, envelope)
  }

  keys (start) {
    return [...this.envelopes.keys()].filter(key => key.startsWith(start)).sort()
  }

  query (start) {
    const keys = this.keys(start)
    if (start.length >= 8) return [start, keys.length, sha256(Buffer.from(keys.map(key => key.slice(8)).join(''), 'hex'))]
    const buckets = [...new Set(keys.map(key => key.slice(0, 8)))]
    const parts = buckets.map(bucket => Buffer.concat([Buffer.from(bucket, 'hex'), this.query(bucket)[2]]))
    return [start, keys.length, sha256(Buffer.concat(parts))]
  }
}

/** Make a history and a peer's equal, as the initiator. Return how many envelopes went each way, or `busy_s`. */
export async function synchronise (stream, history, now_s) {
  const frames = new Frames(stream)
  const outcome = { received: 0, taken: 0, compares: 0, splits: 0 }
  const [, count, whole] = history.query('')
  await frames.say({ type: 'greeting', first_bucket: bucketOf(now_s - MAX_OBSERVATION_AGE_S) + 1, count, digest: whole })
  const welcome = await frames.hear({ ...only('welcome'), ...only('busy') })
  if (welcome.type === 'busy') return { busy_s: welcome.retry_s }
  let compared = [['', welcome.answer]]
  while (true) {
    const next = []
    const lacking = []
    const surplus = []
    for (const [asked, found] of compared) {
      if (found.equal) continue
      if (found.buckets !== undefined) {
        const listed = found.buckets.flatMap(([bucket, theirs]) => theirs.map(id => bucketDigits(bucket) + id))
        if (!ascending(listed) || listed.some(key => !key.startsWith(asked))) refuse('a listing of something else')
        lacking.push(...listed.filter(key => !history.envelopes.has(key)))
        surplus.push(...history.keys(asked).filter(key => !listed.includes(key)))
        continue
      }
      outcome.splits++
      const parts = found.parts.map(([digit, count, digest]) => [found.stem + digit, count, digest])
      if (!found.stem.startsWith(asked) || !ascending(parts.map(part => part[0]))) refuse('a split of something else')
      for (const [part, theirCount, theirDigest] of parts) {
        const [, ownCount, ownDigest] = history.query(part)
        if (ownCount !== theirCount || !ownDigest.equals(Buffer.from(theirDigest))) next.push(part)
      }
      surplus.push(...history.keys(asked).filter(key => !parts.some(([part]) => key.startsWith(part))))
    }
    const before = outcome.received + outcome.taken
    await get(frames, history, lacking, now_s, outcome)
    await put(frames, history, surplus, outcome)
    if (next.length === 0) {
      const [found] = await compare(frames, history, [''], outcome)
      if (found.equal || (outcome.received + outcome.taken === before && compared[0][0] === '')) {
        return { ...outcome, equal: found.equal === true }
      }
      compared = [['', found]]
      continue
    }
    compared = []
    while (next.length > 0) {
      const asked = next.slice(0, MAX_QUERIES)
      const found = await compare(frames, history, asked, outcome)
      compared.push(...found.map((each, index) => [asked[index], each]))
      next.splice(0, found.length)
    }
  }
}

async function compare (frames, history, prefixes, outcome) {
  outcome.compares++
  await frames.say({ type: 'compare', queries: prefixes.map(each => history.query(each)) })
  const { answers } = await frames.hear(only('answers'))
  return answers.length <= prefixes.length ? answers : refuse('more answers than queries')
}

async function get (frames, history, keys, now_s, outcome) {
  const wanted = keys.map(key => key.slice(8)).sort()
  while (wanted.length > 0) {
    const asked = new Set(wanted.splice(0, MAX_GET))
    await frames.say({ type: 'get', ids: Buffer.from([...asked].join(''), 'hex') })
    let last = false
    while (!last) {
      const items = await frames.hear(only('items'))
      last = items.last
      for (const each of items.envelopes) {
        const observation = openObservation(each, now_s)
        if (!asked.delete(observation.id)) refuse('an observation that was not asked for')
        history.add(observation, each)
        outcome.received++
      }
    }
  }
}

async function put (frames, history, keys, outcome) {
  for (const key of keys) {
    await frames.say({ type: 'put', envelopes: [history.envelopes.get(key)] })
    outcome.taken += (await frames.hear(only('taken'))).count
  }
}

// Blobs

const fromServer = {
  found: { size: integer(0, MAX_BLOB_BYTES), length: integer(0, MAX_BLOB_BYTES) },
  missing: {},
  busy: {}
}

/** Fetch a file in ranges of `step` bytes; return its bytes, verified, or undefined where the peer has none. */
export async function fetchFile (stream, hash, step) {
  const frames = new Frames(stream)
  const hashed = createHash('sha256')
  const pieces = []
  let offset = 0
  while (true) {
    await frames.say({ type: 'get', sha256: hash, offset, length: step })
    const head = await frames.hear(fromServer)
    if (head.type !== 'found') return undefined
    if (head.length !== Math.max(0, Math.min(step, head.size - offset))) refuse('a range of another length')
    for (let left = head.length; left > 0;) {
      const { type, body } = await frames.receive()
      if (type !== CHUNK || body.length > left) refuse('no chunk of the range')
      hashed.update(body)
      pieces.push(body)
      left -= body.length
    }
    offset += head.length
    if (offset >= head.size) break
  }
  return hashed.digest('hex') === hash ? Buffer.concat(pieces) : refuse('the file has another sha256')
}

// The job protocol, as far as it takes to know that the other end speaks it

/** Say hello and ping; return the responder's hello. */
export async function greetJobStream (stream, nonce) {
  const frames = new Frames(stream)
  await frames.say({ type: 'hello', agent: 'js-libp2p', window_bytes: 65536 })
  const hello = await frames.hear({ hello: { agent: name(256), window_bytes: integer(1, 67108864) } })
  await frames.say({ type: 'ping', nonce })
  const pong = await frames.hear({ pong: { nonce: integer(0, MAX_COUNT) } })
  return pong.nonce === nonce ? hello : refuse('a pong to another ping')
}
