// Models, block by block: how many peers serve each block, who serves which, and the command that would cover a gap.

import { getJson } from "./api.js";
import { commandLine, el, find, onChange, svg } from "./dom.js";
import { blocks, bytes, plural } from "./format.js";

const MAX_LANES = 12;
const LANE = 17;

/** Draw all models. `gaps`: of `/swarm/status`. */
export const drawModels = onChange((models, peers, gaps) => {
  const drawAll = (list) => list.map((model) => drawModel(model, peers, gaps.filter((gap) => gap.model === model.model)));
  const served = models.filter(isServed);
  const cached = models.filter((model) => !isServed(model));
  const list = drawAll(served);
  if (!list.length) list.push(el("p", { class: "empty" }, "No peer serves a model yet."));
  if (cached.length) {
    const open = find("model-list").querySelector("details")?.open ?? !served.length;
    const summary = el("summary", {}, `${plural(cached.length, "model")} in the cache of this node that nobody serves`);
    list.push(el("details", { class: "cached", open }, summary, ...drawAll(cached)));
  }
  find("model-list").replaceChildren(...list);
});

/** Return whether any peer serves a part of a model. */
export const isServed = (model) => model.coverage.some((peers) => peers > 0);

function drawModel(model, peers, gaps) {
  const name = model.name || model.model.slice(0, 12);
  const head = el("div", { class: "model-head" },
    el("h3", {}, name),
    el("span", { class: `badge ${model.complete ? "good" : "bad"}` }, model.complete ? "complete" : "incomplete"),
    el("span", { class: "muted" }, coverageText(model)),
    el("code", { class: "muted", title: model.model }, model.model.slice(0, 12)));
  return el("div", { class: "model" }, head, coverageBar(model, name), lanes(model, peers), ...suggestions(model, gaps));
}

function coverageText(model) {
  const { coverage } = model;
  if (!coverage.length) return "no block is known";
  const [least, most] = [Math.min(...coverage), Math.max(...coverage)];
  const each = least === most ? plural(least, "peer") : `${least} to ${plural(most, "peer")}`;
  return `${plural(model.block_count, "block")}, ${each} each`;
}

function coverageBar(model, name) {
  const total = Math.max(1, model.block_count);
  const missing = model.uncovered.map(([start, end]) => `${start}-${end}`).join(", ");
  const label = `Coverage of ${name}: ${coverageText(model)}${missing ? `; nobody serves ${missing}` : ""}`;
  const cells = model.coverage.map((peers, block) => svg("rect", {
    class: `cover-${Math.min(3, peers)}`, y: 1, height: 16, rx: 2,
    x: `${(100 * (block + 0.06)) / total}%`, width: `${88 / total}%`,
  }, svg("title", {}, `block ${block}: ${plural(peers, "peer")}`)));
  return svg("svg", { class: "blocks", role: "img", "aria-label": label }, ...cells);
}

/** Draw a lane for each peer's span, as in a chart of a pipeline. */
function lanes(model, peers) {
  const held = peers.flatMap((peer) => peer.spans.filter((span) => span.model === model.model).map((span) => [peer, span]));
  held.sort(([, a], [, b]) => a.start - b.start || a.end - b.end);
  const total = Math.max(1, model.block_count);
  const bars = held.slice(0, MAX_LANES).map(([peer, span], row) => svg("g", {},
    svg("rect", {
      class: "lane", rx: 3, x: `${(100 * span.start) / total}%`, y: row * LANE + 2,
      width: `${(100 * (span.end - span.start)) / total}%`, height: LANE - 4,
    }),
    svg("text", { x: `${(100 * (span.start + 0.15)) / total}%`, y: row * LANE + 12, dx: 5 }, `${blocks(span)} ${peer.label}`)));
  const text = held.map(([peer, span]) => `${peer.label} ${blocks(span)}`).join(", ");
  return svg("svg", {
    class: "lanes", height: bars.length * LANE, role: "img", "aria-label": `Who serves what: ${text || "nobody"}`,
  }, ...bars);
}

function suggestions(model, gaps) {
  if (model.complete) return [];
  const wanted = gaps.length ? gaps : [{ serve: model.name || model.model, memory_bytes: null }];
  return wanted.map((gap) => {
    const what = gap.end ? `Blocks ${blocks(gap)} are missing` : "Nobody serves it";
    const memory = gap.memory_bytes ? `, on a machine with ${bytes(gap.memory_bytes)} of memory to spare` : "";
    const box = el("div", { class: "gap" }, el("span", { class: "bad" }, `${what}. `), `This would cover them${memory}:`);
    showCommand(box, gap.serve);
    return box;
  });
}

async function showCommand(box, serve) {
  try {
    const { here, elsewhere } = await getJson(`/swarm/join?serve=${encodeURIComponent(serve)}`);
    box.append(commandLine(elsewhere ?? here ?? `metaswarm node --serve ${serve}`));
  } catch (error) {
    box.append(el("p", { class: "muted" }, error.message));
  }
}
