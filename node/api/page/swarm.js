// The swarm as this node sees it: one list of peers, itself included, from the documents of the node.

import { shortPeer } from "./format.js";

/** Return the peers on the map: this node first, then those reached, by their first block. */
export function peersOf(status, peers) {
  const own = {
    id: status.peer_id,
    label: `this node ${shortPeer(status.peer_id)}`,
    own: true,
    spans: status.spans.map((span) => ({ ...span, free_positions: span.kv_positions - span.reserved_positions })),
    leaving: status.state === "draining",
    connected: true,
    rtt_s: null,
    neighbours: {},
    hardware: status.spans.map((span) => span.device).filter(unique).join(", "),
    jobs: null,
    banned: null,
  };
  const others = peers
    .filter((peer) => peer.reached || peer.leaving)
    .map((peer) => ({ ...peer, id: peer.peer_id, label: shortPeer(peer.peer_id), own: false }));
  return inOrder([own, ...others]).map((peer) => ({ ...peer, load: loadOf(peer) }));
}

/** Return peers in the order of the map and the table: this node, then by their first block, as routes go. */
export function inOrder(peers) {
  const order = (peer) => (peer.own ? -1 : peer.spans.length ? peer.spans[0].start : 1e9);
  return peers.toSorted((a, b) => order(a) - order(b) || (a.id < b.id ? -1 : 1));
}

const unique = (value, index, all) => all.indexOf(value) === index;

/** Return how busy a peer is: its class, words for it, and the figures behind it. */
function loadOf(peer) {
  const sessions = peer.spans.reduce((sum, span) => sum + span.sessions, 0);
  const queued = peer.spans.reduce((sum, span) => sum + span.queued_rows, 0);
  const isFull = peer.spans.length > 0 && peer.spans.some((span) => span.free_positions <= 0);
  const step_s = Math.max(0, ...peer.spans.map((span) => span.step_s));
  let level = "idle";
  if (peer.banned || peer.leaving || isFull) level = "full";
  else if (queued > 0) level = "high";
  else if (sessions > 0) level = "low";
  const words = peer.banned ? "banned" : peer.leaving ? "leaving" : isFull ? "full" : sessions ? "busy" : "idle";
  return { level, words, sessions, queued, step_s };
}

/** Return the measured links: `{ a, b, rtt_s, announced }`, ours and those that peers announce. */
export function linksOf(peers) {
  const own = peers[0];
  const known = new Map();
  for (const peer of peers.slice(1)) {
    if (peer.connected) known.set(keyOf(own.id, peer.id), { a: own.id, b: peer.id, rtt_s: peer.rtt_s, announced: false });
  }
  const ids = new Set(peers.map((peer) => peer.id));
  for (const peer of peers.slice(1)) {
    for (const [other, rtt_s] of Object.entries(peer.neighbours)) {
      const key = keyOf(peer.id, other);
      if (ids.has(other) && !known.has(key)) known.set(key, { a: peer.id, b: other, rtt_s, announced: true });
    }
  }
  return [...known.values()];
}

export const keyOf = (a, b) => (a < b ? `${a} ${b}` : `${b} ${a}`);
