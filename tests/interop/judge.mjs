// Says of records whether a receiver that knows docs/protocol.md alone takes them: of every line `KIND NOW HEX` on standard input
// `1` or `0`.

import { Buffer } from 'node:buffer'
import { createInterface } from 'node:readline'
import { ProtocolError } from './msgpack.mjs'
import { openBatch, openObservation, openRecord } from './records.mjs'

const openers = {
  batch: data => openBatch(data),
  observation: (data, now_s) => openObservation(data, now_s)
}

for await (const line of createInterface({ input: process.stdin })) {
  const [kind, now, hex] = line.split(' ')
  const open = openers[kind] ?? ((data, now_s) => openRecord(kind, data, now_s))
  try {
    open(Buffer.from(hex, 'hex'), Number(now))
    console.log('1')
  } catch (error) {
    if (!(error instanceof ProtocolError)) throw error
    console.log('0')
  }
}
