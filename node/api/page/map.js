// The map of the swarm: a card for each peer on an ellipse, links with their round-trip time, and the running jobs,
// whose tokens go round their routes.

import { announce, find, reconcile, setText, svg } from "./dom.js";
import { blocks, duration, plural } from "./format.js";
import { inOrder, keyOf, linksOf } from "./swarm.js";

const CARD = { width: 168, height: 62 };
const SMALL = { width: 92, height: 34 };
const MAX_CARDS = 10;
const MAX_PEERS = 40;
const MAX_LABELS = 16;
const LOST_SHOWN_MS = 6000;
const still = matchMedia("(prefers-reduced-motion: reduce)");

const map = find("map");
const layers = Object.fromEntries(["links", "labels", "peers", "packets"].map((name) => {
  const group = svg("g", { class: name, "aria-hidden": "true" });
  map.append(group);
  return [name, group];
}));

let places = new Map();
let routes = [];
const departed = new Map();
let previous = null;

/** Draw peers and links; `models` tells how many blocks there are. */
export function drawMap(peers, models) {
  const now = Date.now();
  tellChanges(peers, now);
  const shown = inOrder([...peers, ...recentlyLost(peers, now)]).slice(0, MAX_PEERS);
  const size = shown.length > MAX_CARDS ? SMALL : CARD;
  places = place(shown, size);
  const links = withRoutes(linksOf(shown.filter((peer) => !peer.lost)));
  drawLinks(links);
  drawLabels(links);
  const count = new Map(models.map((model) => [model.model, model.block_count]));
  reconcile(layers.peers, shown, (peer) => `${peer.id} ${size.width}`, (peer) => createCard(peer, size),
    (node, peer) => updateCard(node, peer, size, count));
  describe(peers, links);
}

/** Show which jobs run: `{ id, peers, rate }`, with the tokens a second that come now. */
export function drawRoutes(running) {
  const phases = new Map(routes.map((route) => [route.id, route.phase]));
  routes = running.filter((job) => job.peers.length > 0).map((job) => ({ ...job, phase: phases.get(job.id) ?? 0 }));
  const active = new Set(hops().map(([a, b]) => keyOf(a, b)));
  for (const [key, line] of layers.links.nodesByKey ?? []) line.classList.toggle("active", active.has(key));
  reconcile(layers.packets, still.matches ? [] : routes, (route) => route.id,
    () => svg("circle", { class: "packet", r: 6 }), () => undefined);
}

/** Return the pairs of peers between which tokens pass now: a route is a cycle. */
function hops() {
  const pairs = routes.flatMap(({ peers }) => peers.map((peer, index) => [peer, peers[(index + 1) % peers.length]]));
  return pairs.filter(([a, b]) => a !== b);
}

/** Add the hops of running jobs whose round trip nobody has announced yet. */
function withRoutes(links) {
  const known = new Map(links.map((link) => [keyOf(link.a, link.b), link]));
  for (const [a, b] of hops()) {
    if (!known.has(keyOf(a, b)) && places.has(a) && places.has(b)) known.set(keyOf(a, b), { a, b, rtt_s: null, announced: true });
  }
  return [...known.values()];
}

function tellChanges(peers, now) {
  const ids = new Set(peers.map((peer) => peer.id));
  if (previous) {
    for (const peer of previous) {
      if (!ids.has(peer.id)) {
        departed.set(peer.id, { peer, until: now + LOST_SHOWN_MS });
        announce(`Peer ${peer.label} is gone`);
      }
    }
    const known = new Set(previous.map((peer) => peer.id));
    for (const peer of peers) if (!known.has(peer.id)) announce(`Peer ${peer.label} joined`);
  }
  previous = peers;
}

/** Return the peers that were lost a moment ago, to be shown as such. */
function recentlyLost(peers, now) {
  for (const [id, { until }] of departed) {
    if (until < now || peers.some((peer) => peer.id === id)) departed.delete(id);
  }
  return [...departed.values()].map(({ peer }) => ({ ...peer, lost: true, load: { ...peer.load, level: "full", words: "lost" } }));
}

function place(peers, size) {
  const width = map.clientWidth || 800;
  const height = map.clientHeight || 350;
  map.setAttribute("viewBox", `0 0 ${width} ${height}`);
  const angles = peers.map((_, index) => (2 * Math.PI * index) / peers.length - Math.PI / 2);
  const across = spread(angles.map(Math.cos), width / 2, Math.min(380, width / 2 - size.width / 2 - 14));
  const down = spread(angles.map(Math.sin), height / 2, height / 2 - size.height / 2 - 18);
  return new Map(peers.map((peer, index) => [peer.id, { x: across[index], y: down[index] }]));
}

/** Spread values evenly over a range around a middle: a triangle, too, fills the whole height. */
function spread(values, middle, reach) {
  const [low, high] = [Math.min(...values), Math.max(...values)];
  if (high - low < 1e-9) return values.map(() => middle);
  return values.map((value) => middle + reach * ((2 * (value - low)) / (high - low) - 1));
}

function drawLinks(links) {
  reconcile(layers.links, links, (link) => keyOf(link.a, link.b), () => svg("line"), (line, link) => {
    const [from, to] = [places.get(link.a), places.get(link.b)];
    for (const [name, value] of Object.entries({ x1: from.x, y1: from.y, x2: to.x, y2: to.y })) {
      line.setAttribute(name, value);
    }
    line.classList.add("link");
    line.classList.toggle("announced", link.announced);
  });
}

function drawLabels(links) {
  const known = links.filter((link) => link.rtt_s !== null);
  reconcile(layers.labels, known.length > MAX_LABELS ? [] : known, (link) => keyOf(link.a, link.b),
    () => svg("g", { class: "rtt" }, svg("rect", { rx: 4, width: 54, height: 17, x: -27, y: -12 }), svg("text")),
    (label, link) => {
      const [from, to] = [places.get(link.a), places.get(link.b)];
      label.setAttribute("transform", `translate(${(from.x + to.x) / 2} ${(from.y + to.y) / 2 + 4})`);
      setText(label.querySelector("text"), duration(link.rtt_s));
    });
}

function createCard(peer, size) {
  const isSmall = size === SMALL;
  return svg("g", { class: "peer" },
    svg("title"),
    svg("rect", { class: "card", rx: 8, width: size.width, height: size.height }),
    svg("rect", { class: "load", rx: 2.5, x: 9, y: 10, width: 5, height: size.height - 20 }),
    svg("text", { class: "name", x: 22, y: isSmall ? 21 : 20 }),
    svg("g", { class: "bar" }),
    isSmall ? null : svg("text", { class: "fact", x: 22, y: 51 }));
}

function updateCard(node, peer, size, count) {
  const { x, y } = places.get(peer.id);
  node.setAttribute("class", `peer${peer.own ? " own" : ""}${peer.lost ? " lost" : ""}`);
  node.style.transform = `translate(${x - size.width / 2}px, ${y - size.height / 2}px)`;
  setText(node.querySelector("title"), `${peer.label}: ${summary(peer)}`);
  node.querySelector(".load").setAttribute("class", `load load-${peer.load.level}`);
  setText(node.querySelector(".name"), size === SMALL ? peer.label.slice(-7) : peer.label);
  const fact = node.querySelector(".fact");
  if (fact) setText(fact, factOf(peer));
  drawSpans(node.querySelector(".bar"), peer, size, count);
}

/** Draw which blocks of its first model a peer holds. */
function drawSpans(bar, peer, size, count) {
  const spans = peer.spans.filter((span) => span.model === peer.spans[0].model);
  const width = size.width - 34;
  const total = Math.max(count.get(spans[0]?.model) ?? 0, ...spans.map((span) => span.end), 1);
  const y = size === SMALL ? 25 : 29;
  bar.replaceChildren(svg("rect", { class: "track", x: 22, y, width, height: 5, rx: 2 }), ...spans.map((span) => svg("rect", {
    class: "held", x: 22 + (width * span.start) / total, y, height: 5, rx: 2,
    width: (width * (span.end - span.start)) / total,
  })));
}

function factOf(peer) {
  if (peer.lost) return "lost";
  if (!peer.spans.length) return "serves no blocks";
  const held = blocks(peer.spans[0]) + (peer.spans.length > 1 ? ` +${peer.spans.length - 1}` : "");
  const { sessions, queued, words } = peer.load;
  const load = queued ? `${plural(queued, "row")} wait` : sessions ? plural(sessions, "session") : words;
  return `${held} · ${load}`;
}

function summary(peer) {
  const spans = peer.spans.map((span) => `${span.name || span.model.slice(0, 8)} blocks ${blocks(span)}`).join(", ");
  return `${spans || "no blocks"}, ${peer.load.words}`;
}

function describe(peers, links) {
  const far = links.filter((link) => link.rtt_s !== null).map((link) => link.rtt_s);
  const range = far.length ? `, round trips up to ${duration(Math.max(...far))}` : "";
  const text = `${plural(peers.length, "peer")}${range}. ${peers.map((peer) => `${peer.label}: ${summary(peer)}`).join(". ")}.`;
  setText(find("map-description"), text);
}

let last_ms = 0;

/** Move each running job's packet along its route: the faster, the more tokens come. */
function animate(now_ms) {
  const passed_s = Math.min(0.1, (now_ms - last_ms) / 1000);
  last_ms = now_ms;
  for (const route of routes) {
    const packet = layers.packets.nodesByKey?.get(route.id);
    const stops = route.peers.map((peer) => places.get(peer)).filter(Boolean);
    if (!packet || stops.length === 0) continue;
    if (route.rate > 0) route.phase = (route.phase + passed_s * Math.min(1.1, 0.3 + route.rate / 50)) % 1;
    const at = route.phase * stops.length;
    const [from, to] = [stops[Math.floor(at) % stops.length], stops[(Math.floor(at) + 1) % stops.length]];
    packet.setAttribute("cx", from.x + (to.x - from.x) * (at % 1));
    packet.setAttribute("cy", from.y + (to.y - from.y) * (at % 1));
  }
  requestAnimationFrame(animate);
}
requestAnimationFrame(animate);
