// A peer of the swarm: js-libp2p below, docs/protocol.md above. What it finds out it prints, one JSON document a line.
//
// usage: node peer.mjs MULTIADDR MODEL_ID

import { Buffer } from 'node:buffer'
import { randomBytes } from 'node:crypto'
import { gossipsub, StrictSign } from '@libp2p/gossipsub'
import { identify } from '@libp2p/identify'
import { generateKeyPair } from '@libp2p/crypto/keys'
import { kadDHT, passthroughMapper } from '@libp2p/kad-dht'
import { noise } from '@libp2p/noise'
import { peerIdFromPrivateKey } from '@libp2p/peer-id'
import { ping } from '@libp2p/ping'
import { tcp } from '@libp2p/tcp'
import { yamux } from '@libp2p/yamux'
import { multiaddr } from '@multiformats/multiaddr'
import { createLibp2p } from 'libp2p'
import { encode, Float, ProtocolError } from './msgpack.mjs'
import { openBatch, openObservation, openRecord, parseWireValue, seal, sha256, wireKey } from './records.mjs'
import { fetchFile, greetJobStream, History, synchronise } from './streams.mjs'

const HEARTBEATS = 'metaswarm/1/heartbeats'
const CAPABILITIES = 'metaswarm/1/capabilities'
const OBSERVATIONS = 'metaswarm/1/observations'
const PATIENCE_MS = 60_000

const now_s = () => Date.now() / 1000
const tell = (step, found = {}) => console.log(JSON.stringify({ step, ...found }))
const hex = bytes => Buffer.from(bytes).toString('hex')

function openFromDht (stored, value) {
  const { key, envelope } = parseWireValue(stored, value)
  const [, , kind, owner] = key.split('/')
  const record = openRecord({ cap: 'capability', history: 'history' }[kind] ?? 'span', envelope, now_s())
  if (kind !== 'span' && record.signer !== owner) throw new ProtocolError('a record of somebody else')
  return record
}

const privateKey = await generateKeyPair('Ed25519')
const ownId = peerIdFromPrivateKey(privateKey).toString()

const node = await createLibp2p({
  privateKey,
  transports: [tcp()],
  connectionEncrypters: [noise()],
  streamMuxers: [yamux()],
  services: {
    identify: identify(),
    ping: ping(),
    pubsub: gossipsub({ globalSignaturePolicy: StrictSign, allowPublishToZeroTopicPeers: true }),
    dht: kadDHT({
      protocol: '/ipfs/kad/1.0.0',
      clientMode: true,
      peerInfoMapper: passthroughMapper, // the swarm of the test is on this machine
      validators: { metaswarm: async (key, value) => { openFromDht(key, value) } },
      selectors: {
        metaswarm: (key, values) => {
          const records = values.map(value => openFromDht(key, value))
          return records.reduce((best, each, index) => each.sequence > records[best].sequence ? index : best, 0)
        }
      }
    })
  }
})

// Gossip

/** Give what the first message on a topic that `open` makes something of comes to. */
function hearFrom (topic, open) {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(() => reject(new Error(`nothing came on ${topic}`)), PATIENCE_MS)
    node.services.pubsub.addEventListener('message', ({ detail }) => {
      if (detail.topic !== topic) return
      try {
        const found = open(detail.data, detail.from.toString())
        if (found !== undefined) {
          clearTimeout(timer)
          resolve(found)
        }
      } catch (error) {
        reject(error)
      }
    })
    node.services.pubsub.subscribe(topic)
  })
}

async function inMesh (topic) {
  const deadline_ms = Date.now() + PATIENCE_MS
  while (!node.services.pubsub.getMeshPeers(topic).includes(remote.toString())) {
    if (Date.now() > deadline_ms) throw new Error(`not in the mesh of ${topic}`)
    await new Promise(resolve => setTimeout(resolve, 100))
  }
}

// The DHT

/** Return the record that the daemon itself, and not our own copy, has under a key. */
async function getRecord (key) {
  for await (const event of node.services.dht.get(wireKey(key), { signal: AbortSignal.timeout(PATIENCE_MS) })) {
    if (event.name === 'PEER_RESPONSE' && event.record && event.from.equals(remote)) {
      return openFromDht(wireKey(key), event.record.value)
    }
  }
  throw new Error(`nothing stands under ${key}`)
}

async function putRecord (key, envelope) {
  const full = Buffer.from(key)
  const length = Buffer.alloc(2)
  length.writeUInt16BE(full.length)
  const value = Buffer.concat([length, full, envelope])
  for await (const event of node.services.dht.put(wireKey(key), value, { signal: AbortSignal.timeout(PATIENCE_MS) })) {
    if (event.name === 'QUERY_ERROR') throw event.error
  }
}

// An observation of our own

/** Return the envelope of a measurement that this peer's owner asked for, as far as anybody can tell. */
function observe (model, blockCount, software) {
  return seal('observation', {
    version: 1,
    observer: ownId,
    job: randomBytes(16),
    kind: 'bench',
    issued_at_s: Math.floor(now_s()),
    model: {
      id: Buffer.from(model, 'hex'),
      architecture: 'llama',
      block_count: blockCount,
      hidden_size: 576,
      vocabulary_size: 49152,
      max_positions: 8192,
      weight_bytes: 2 ** 40 + 1,
      intermediate_size: 1536,
      head_count: 9,
      kv_head_count: 3,
      expert_count: null,
      active_expert_count: null
    },
    workload: {
      prompt_tokens: 300,
      completion_tokens: 3,
      cached_tokens: 0,
      concurrency: 1,
      shared_prefix_share: new Float(0),
      repetitiveness: new Float(0),
      link_s: new Float(0),
      objective: 'latency',
      quality: 'exact'
    },
    method: { switches: { arithmetic: 'fp32' }, stage_policy: { batching: 'one' } },
    measurements: {
      ttft_s: new Float(1),
      tpot_s: new Float(0.5),
      total_s: new Float(2),
      tokens_per_s: new Float(1.5),
      log_ratio_to_baseline: new Float(-0.25),
      replays: 0
    },
    route: [[ownId, [0, blockCount], 'JavaScript', [3, 302, new Float(0.9), new Float(0), 1200, 12], null, null]],
    software
  }, privateKey)
}

/** Return the envelope of a capability record of ours. */
function describe (name) {
  const issued_at_s = Math.floor(now_s())
  return seal('capability', {
    sequence: Date.now(),
    issued_at_s,
    expires_at_s: issued_at_s + 1800,
    version: 1,
    capabilities: {
      processor: {
        architecture: 'js', model: name, logical_cores: 2, physical_cores: 1, instruction_sets: [], throughput: {}
      },
      memory: { total_bytes: 2 ** 33, available_bytes: 2 ** 32 },
      software: { metaswarm: '0', python: '0' },
      accelerators: [],
      links: { neighbours: [] }
    }
  }, privateKey)
}

const [, , address, model] = process.argv
const identified = new Promise(resolve => {
  node.addEventListener('peer:identify', ({ detail }) => resolve(detail), { once: true })
})
const remote = (await node.dial(multiaddr(address))).remotePeer
tell('connected', { peer_id: ownId })

const heartbeat = hearFrom(HEARTBEATS, (data, from) => {
  const record = openRecord('heartbeat', data, now_s())
  return record.signer === from ? record : undefined
})
// Of the job that is yet to come, and not of those before it, which may still be under way.
const gossiped = hearFrom(OBSERVATIONS, data =>
  openBatch(data).map(each => openObservation(each, now_s())).find(each => each.workload.completion_tokens === 3))
node.services.pubsub.subscribe(CAPABILITIES)

const { agentVersion, protocols } = await identified
tell('identified', { agent: agentVersion, protocols })

// The library pings a peer before it takes it into its routing table, and allows one ping at a time: ours comes after.
const { signer, capabilities } = await getRecord(`/metaswarm/cap/${remote}`)
tell('capability', { signer, capabilities })
const history = await getRecord(`/metaswarm/history/${remote}`)
tell('history', { signer: history.signer, count: history.count })

tell('pinged', { round_trip_ms: await node.services.ping.ping(remote) })

const alive = await heartbeat
tell('heartbeat', {
  signer: alive.signer, agent: alive.agent, spans: alive.spans.map(span => ({ model: hex(span.model), blocks: span.blocks }))
})

const jobs = await node.dialProtocol(remote, '/metaswarm/job/1.0.0')
const hello = await greetJobStream(jobs, 12345)
await jobs.close()
tell('greeted', { agent: hello.agent })

const blobs = await node.dialProtocol(remote, '/metaswarm/blob/1.0.0')
const manifest = await fetchFile(blobs, model, 1000)
const absent = await fetchFile(blobs, hex(sha256('no such file')), 1000)
await blobs.close()
tell('manifest', { manifest: manifest.toString(), absent: absent === undefined })

// From here on whoever started us makes the daemon do a job.
await inMesh(OBSERVATIONS)
tell('listening')
const observation = await gossiped
tell('observation', {
  id: observation.id,
  observer: observation.observer,
  model: hex(observation.model.id),
  workload: observation.workload,
  countersigned: observation.route.every(stage => stage[5] !== null)
})

const own = new History()
const handed = await observe(model, 30, { made: 'for the sync protocol' })
own.add(openObservation(handed, now_s()), handed)
const sync = await node.dialProtocol(remote, '/metaswarm/sync/1.0.0')
const outcome = await synchronise(sync, own, now_s())
await sync.close()
tell('synchronised', { ...outcome, ids: own.keys('').map(key => key.slice(8)), own: sha256Of(handed) })

const published = await observe(model, 30, { made: 'for gossip' })
await node.services.pubsub.publish(OBSERVATIONS, encode({ envelopes: [published] }))
tell('published', { own: sha256Of(published) })

await inMesh(CAPABILITIES)
await node.services.pubsub.publish(CAPABILITIES, await describe('by gossip'))
await putRecord(`/metaswarm/cap/${ownId}`, await describe('in the DHT'))
tell('described', { model: (await getRecord(`/metaswarm/cap/${ownId}`)).capabilities.processor.model })

// Who gossips and goes at once may not have been heard: we stay until our standard input ends.
await process.stdin.resume().toArray()
await node.stop()
process.exit(0)

function sha256Of (envelope) {
  return openObservation(envelope, now_s()).id
}
