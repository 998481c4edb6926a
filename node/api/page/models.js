// Models, block by block: how many peers serve each block, who serves which, and the command that would cover a gap.

import { getJson } from "./api.js";
import { commandLine, el, find, onChange, svg } from "./dom.js";
import { blocks, bytes, plural } from "./format.js";

const MAX_LANES = 12;
const LANE = 17;
// Anybody may announce models and spans of them: what is drawn is bounded.
const MAX_MODELS = 20;
const MAX_CELLS = 128;
const MAX_GAPS = 3;
const MAX_COMMANDS = 100;

const commands = new Map();

/** Draw all models. `gaps`: of `/swarm/status`. */
export const drawModels = onChange((models, peers, gaps) => {
  const drawAll = (list) => list.map((model) => drawModel(model, peers, gaps.filter((gap) => gap.model === model.model)));
  const rank = (model) => 2 * model.complete + model.local;
  const all = models.filter(isServed).sort((a, b) => rank(b) - rank(a));
  const served = all.slice(0, MAX_MODELS);
  const cached = models.filter((model) => !isServed(model));
  const list = drawAll(served);
  if (!list.length) list.push(el("p", { class: "empty" }, "No peer serves a model yet."));
  if (all.length > served.length) list.push(el("p", { class: "muted" }, `and ${plural(all.length - served.length, "more model")}`));
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
  const missing = named(model.uncovered.map(([start, end]) => `${start}-${end}`));
  const label = `Coverage of ${name}: ${coverageText(model)}${missing ? `; nobody serves ${missing}` : ""}`;
  const step = Math.ceil(total / MAX_CELLS);
  const cells = [];
  for (let start = 0; start < model.coverage.length; start += step) {
    const part = model.coverage.slice(start, start + step);
    const least = Math.min(...part);
    const which = part.length === 1 ? `block ${start}: ` : `blocks ${start}-${start + part.length}: at least `;
    cells.push(svg("rect", {
      class: `cover-${Math.min(3, least)}`, y: 1, height: 16, rx: 2,
      x: `${(100 * (start + 0.06 * step)) / total}%`, width: `${(100 * (part.length - 0.12 * step)) / total}%`,
    }, svg("title", {}, `${which}${plural(least, "peer")}`)));
  }
  return svg("svg", { class: "blocks", role: "img", "aria-label": label }, ...cells);
}

/** Return a few of some texts, and how many more there are. */
function named(texts) {
  const more = texts.length > MAX_LANES ? ` and ${texts.length - MAX_LANES} more` : "";
  return texts.slice(0, MAX_LANES).join(", ") + more;
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
  const text = named(held.map(([peer, span]) => `${peer.label} ${blocks(span)}`));
  return svg("svg", {
    class: "lanes", height: bars.length * LANE, role: "img", "aria-label": `Who serves what: ${text || "nobody"}`,
  }, ...bars);
}

function suggestions(model, gaps) {
  if (model.complete) return [];
  const wanted = gaps.length ? gaps : [{ serve: model.name || model.model, memory_bytes: null }];
  return wanted.slice(0, MAX_GAPS).map((gap) => {
    const what = gap.end ? `Blocks ${blocks(gap)} are missing` : "Nobody serves it";
    const memory = gap.memory_bytes ? `, on a machine with ${bytes(gap.memory_bytes)} of memory to spare` : "";
    const box = el("div", { class: "gap" }, el("span", { class: "bad" }, `${what}. `), `This would cover them${memory}:`);
    if (model.local || commands.has(gap.serve)) showCommand(box, gap.serve);
    else {
      const show = el("button", { type: "button", onclick: () => { show.remove(); showCommand(box, gap.serve); } }, "Show the command");
      box.append(" ", show);
    }
    return box;
  });
}

async function showCommand(box, serve) {
  try {
    if (commands.size > MAX_COMMANDS) commands.clear();
    if (!commands.has(serve)) commands.set(serve, await getJson(`/swarm/join?serve=${encodeURIComponent(serve)}`));
    const { here, elsewhere } = commands.get(serve);
    box.append(commandLine(elsewhere ?? here ?? `metaswarm node --serve ${serve}`));
  } catch (error) {
    box.append(el("p", { class: "muted" }, error.message));
  }
}
