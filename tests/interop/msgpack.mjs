// Canonical msgpack, from "Canonical msgpack" of docs/protocol.md.
//
// A float is a Float, so that 1.0 is not 1; an integer is a number, or a BigInt where a number would not be exact; bytes are a
// Uint8Array; a map is a Map.

import { Buffer } from 'node:buffer'

const MAX_DEPTH = 6
const MAX_ELEMENTS = 4096
const MAX_NODES = 8192

const utf8 = new TextDecoder('utf-8', { fatal: true, ignoreBOM: true })

/** What a remote peer sent is not what the document allows. */
export class ProtocolError extends Error {}

export class Float {
  constructor (value) {
    this.value = value
  }
}

/** Return the value of some bytes; throw ProtocolError for anything the document tells a receiver to reject. */
export function decode (bytes) {
  const reader = new Reader(bytes)
  const value = reader.value(0)
  if (reader.position !== bytes.length) throw new ProtocolError('bytes after the value')
  return value
}

/** The same for what MUST be in canonical form. */
export function decodeCanonical (bytes) {
  const value = decode(bytes)
  if (Buffer.compare(encode(value), bytes) !== 0) throw new ProtocolError('not in canonical form')
  return value
}

class Reader {
  constructor (bytes) {
    this.bytes = Buffer.from(bytes.buffer, bytes.byteOffset, bytes.byteLength)
    this.position = 0
    this.nodes = 0
  }

  take (length) {
    if (length > this.bytes.length - this.position) throw new ProtocolError('truncated')
    this.position += length
    return this.bytes.subarray(this.position - length, this.position)
  }

  unsigned (length) {
    return number(BigInt('0x' + this.take(length).toString('hex')))
  }

  value (depth) {
    if (++this.nodes > MAX_NODES) throw new ProtocolError('too many values')
    const first = this.unsigned(1)
    if (first < 0x80) return first
    if (first < 0x90) return this.map(first & 0x0f, depth)
    if (first < 0xa0) return this.array(first & 0x0f, depth)
    if (first < 0xc0) return this.text(first & 0x1f)
    if (first >= 0xe0) return first - 0x100
    switch (first) {
      case 0xc0: return null
      case 0xc2: return false
      case 0xc3: return true
      case 0xc4: case 0xc5: case 0xc6: return new Uint8Array(this.take(this.unsigned(1 << (first - 0xc4))))
      case 0xca: return finite(this.take(4).readFloatBE())
      case 0xcb: return finite(this.take(8).readDoubleBE())
      case 0xcc: case 0xcd: case 0xce: case 0xcf: return this.unsigned(1 << (first - 0xcc))
      case 0xd0: case 0xd1: case 0xd2: case 0xd3: {
        const bits = 8 << (first - 0xd0)
        return number(BigInt.asIntN(bits, BigInt('0x' + this.take(bits / 8).toString('hex'))))
      }
      case 0xd9: case 0xda: case 0xdb: return this.text(this.unsigned(1 << (first - 0xd9)))
      case 0xdc: case 0xdd: return this.array(this.unsigned(2 << (first - 0xdc)), depth)
      case 0xde: case 0xdf: return this.map(this.unsigned(2 << (first - 0xde)), depth)
      default: throw new ProtocolError('an extension or unknown type')
    }
  }

  text (length) {
    const bytes = this.take(length)
    try {
      return utf8.decode(bytes)
    } catch {
      throw new ProtocolError('text is not UTF-8')
    }
  }

  enter (count, depth) {
    if (count > MAX_ELEMENTS) throw new ProtocolError('too many elements')
    if (depth === MAX_DEPTH) throw new ProtocolError('nested too deep')
  }

  array (count, depth) {
    this.enter(count, depth)
    const result = []
    while (result.length < count) result.push(this.value(depth + 1))
    return result
  }

  map (count, depth) {
    this.enter(count, depth)
    const result = new Map()
    while (result.size < count) {
      const key = this.value(depth + 1)
      if (typeof key !== 'string') throw new ProtocolError('a key is not text')
      if (result.has(key)) throw new ProtocolError('a key comes twice')
      result.set(key, this.value(depth + 1))
    }
    return result
  }
}

function number (big) {
  const small = Number(big)
  return Number.isSafeInteger(small) ? small : big
}

function finite (value) {
  if (!Number.isFinite(value)) throw new ProtocolError('a float is not finite')
  return new Float(value)
}

/** Return the canonical form of a value; a plain object is a map. */
export function encode (value) {
  if (value === null) return Buffer.from([0xc0])
  if (typeof value === 'boolean') return Buffer.from([value ? 0xc3 : 0xc2])
  if (typeof value === 'number' || typeof value === 'bigint') return integer(BigInt(value))
  if (value instanceof Float) {
    const bytes = Buffer.alloc(9, 0xcb)
    bytes.writeDoubleBE(value.value, 1)
    return bytes
  }
  if (typeof value === 'string') {
    const bytes = Buffer.from(value)
    return Buffer.concat([header(bytes.length, 0xa0, 32, [0xd9, 0xda, 0xdb]), bytes])
  }
  if (value instanceof Uint8Array) return Buffer.concat([header(value.length, 0, 0, [0xc4, 0xc5, 0xc6]), value])
  if (Array.isArray(value)) {
    return Buffer.concat([header(value.length, 0x90, 16, [0, 0xdc, 0xdd]), ...value.map(encode)])
  }
  const entries = value instanceof Map ? [...value] : Object.entries(value)
  entries.sort(([a], [b]) => Buffer.compare(Buffer.from(a), Buffer.from(b)))
  return Buffer.concat([header(entries.length, 0x80, 16, [0, 0xde, 0xdf]), ...entries.flat().map(encode)])
}

/** The shortest form of a length: in the first byte below `fixed`, else in 1, 2 or 4 bytes after it, where there is such a form. */
function header (length, base, fixed, forms) {
  if (length < fixed) return Buffer.from([base + length])
  const size = length < 0x100 && forms[0] ? 0 : length < 0x10000 ? 1 : 2
  return Buffer.concat([Buffer.from([forms[size]]), unsigned(length, 1 << size)])
}

function integer (value) {
  if (value >= 0n) {
    if (value < 0x80n) return Buffer.from([Number(value)])
    const size = [0, 1, 2, 3].find(n => value < 1n << BigInt(8 << n))
    return Buffer.concat([Buffer.from([0xcc + size]), unsigned(value, 1 << size)])
  }
  if (value >= -32n) return Buffer.from([Number(0x100n + value)])
  const size = [0, 1, 2, 3].find(n => value >= -(1n << BigInt((8 << n) - 1)))
  return Buffer.concat([Buffer.from([0xd0 + size]), unsigned(BigInt.asUintN(8 << size, value), 1 << size)])
}

function unsigned (value, length) {
  return Buffer.from(BigInt(value).toString(16).padStart(2 * length, '0'), 'hex')
}
