// js-libp2p as one party of a circuit: the relay, the peer behind it, or the one that dials. Prints a JSON document.
//
// usage: node circuit.mjs relay | node circuit.mjs listen RELAY | node circuit.mjs dial ADDRESS BYTES

import { Buffer } from 'node:buffer'
import { circuitRelayServer, circuitRelayTransport } from '@libp2p/circuit-relay-v2'
import { identify } from '@libp2p/identify'
import { noise } from '@libp2p/noise'
import { tcp } from '@libp2p/tcp'
import { yamux } from '@libp2p/yamux'
import { multiaddr } from '@multiformats/multiaddr'
import { createLibp2p } from 'libp2p'

const ECHO = '/test/echo/1'
const PATIENCE_MS = 30_000

const [role, address, size] = process.argv.slice(2)
const tell = found => console.log(JSON.stringify(found))

const node = await createLibp2p({
  addresses: { listen: { relay: ['/ip4/127.0.0.1/tcp/0'], listen: [`${address}/p2p-circuit`], dial: [] }[role] },
  transports: [tcp(), circuitRelayTransport()],
  connectionEncrypters: [noise()],
  streamMuxers: [yamux()],
  services: { identify: identify(), ...(role === 'relay' ? { relay: circuitRelayServer() } : {}) }
})

await node.handle(ECHO, async stream => {
  for await (const data of stream) {
    if (!stream.send(data)) await stream.onDrain()
  }
  await stream.close()
}, { runOnLimitedConnection: true })

if (role === 'dial') {
  const signal = AbortSignal.timeout(PATIENCE_MS)
  const connection = await node.dial(multiaddr(address), { signal })
  const stream = await connection.newStream(ECHO, { signal, runOnLimitedConnection: true })
  const sent = Buffer.alloc(Number(size), 'circuit')
  if (!stream.send(sent)) await stream.onDrain()
  const received = []
  for await (const data of stream) {
    received.push(data.subarray())
    if (received.reduce((sum, each) => sum + each.length, 0) >= sent.length) break
  }
  tell({
    peer_id: connection.remotePeer.toString(),
    address: connection.remoteAddr.toString(),
    limited: connection.limits != null,
    echoed: Buffer.concat(received).equals(sent)
  })
  await node.stop()
} else {
  const addresses = () => node.getMultiaddrs().map(String)
  const signal = AbortSignal.timeout(PATIENCE_MS)
  while (addresses().length === 0) {
    signal.throwIfAborted()
    await new Promise(resolve => setTimeout(resolve, 50))
  }
  tell({ peer_id: node.peerId.toString(), addresses: addresses() })
  process.stdin.resume()
  process.stdin.on('end', async () => { await node.stop() })
}
