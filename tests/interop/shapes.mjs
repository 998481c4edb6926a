// What a value from a peer may be, from "Conventions", "Identifiers" and "Canonical msgpack" of docs/protocol.md. A shape is a
// function that returns the plain value, or throws ProtocolError.

import { Buffer } from 'node:buffer'
import { peerIdFromString } from '@libp2p/peer-id'
import { Float, ProtocolError } from './msgpack.mjs'

export function refuse (message) {
  throw new ProtocolError(message)
}

export const integer = (low, high) => value =>
  Number.isInteger(value) && value >= low && value <= high ? value : refuse(`no integer from ${low} to ${high}`)

export const float = (low, high) => value =>
  value instanceof Float && value.value >= low && value.value <= high ? value.value : refuse(`no float from ${low} to ${high}`)

export const boolean = value => typeof value === 'boolean' ? value : refuse('no boolean')

export const text = limit => value =>
  typeof value === 'string' && Buffer.byteLength(value) <= limit && !/[\u0000-\u001f\u007f-\u009f]/.test(value)
    ? value
    : refuse(`no text of at most ${limit} bytes`)

export const name = limit => value => text(limit)(value) === '' ? refuse('empty') : value

export const one = (...options) => value => options.includes(value) ? value : refuse(`none of ${options}`)

export const bytes = length => value =>
  value instanceof Uint8Array && value.length === length ? value : refuse(`not ${length} bytes`)

export const orNil = shape => value => value === null ? null : shape(value)

export const array = (shape, low, high) => value =>
  Array.isArray(value) && value.length >= low && value.length <= high ? value.map(shape) : refuse(`no array of ${low} to ${high}`)

export const tuple = (...shapes) => value =>
  Array.isArray(value) && value.length === shapes.length
    ? shapes.map((shape, index) => shape(value[index]))
    : refuse(`no array of ${shapes.length}`)

/** A map with exactly these fields; those that end in `?` may be left out. `open`: unknown ones are skipped. */
export const map = (fields, { open = false } = {}) => value => {
  if (!(value instanceof Map)) refuse('no map')
  const left = new Map(value)
  const result = {}
  for (const [field, shape] of Object.entries(fields)) {
    const key = field.replace(/\?$/, '')
    if (left.has(key)) result[key] = shape(left.get(key))
    else if (key === field) refuse(`${key} is missing`)
    left.delete(key)
  }
  return open || left.size === 0 ? result : refuse(`unknown field ${[...left.keys()][0]}`)
}

/** A map from and to these shapes, of at most so many entries. */
export const dictionary = (key, item, high) => value =>
  value instanceof Map && value.size <= high
    ? Object.fromEntries([...value].map(([k, v]) => [key(k), item(v)]))
    : refuse(`no map of at most ${high}`)

export const peer = value => {
  let id
  try {
    id = peerIdFromString(text(52)(value))
  } catch {
    refuse('no peer id')
  }
  return id.type === 'Ed25519' && id.toString() === value ? value : refuse('no peer id of an Ed25519 key')
}

export const blocks = value => {
  const [start, end] = tuple(integer(0, 1024), integer(0, 1024))(value)
  return start < end ? [start, end] : refuse('no range of blocks')
}

export const ascending = values => values.every((value, index) => index === 0 || values[index - 1] < value)

export const envelope = value =>
  value instanceof Uint8Array && value.length >= 1 && value.length <= 16384 ? value : refuse('no envelope')
