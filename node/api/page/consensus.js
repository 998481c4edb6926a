// The chains of agreed statements: the epoch that is under way, and the last statements.

import { el, find, onChange, setText } from "./dom.js";
import { count, plural, shortPeer } from "./format.js";

/** Draw all chains. */
export const drawConsensus = onChange((chains) => {
  const list = chains.map(drawChain);
  const empty = el("p", { class: "empty" }, "No chain yet: it starts where a model is served.");
  find("chains").replaceChildren(...(list.length ? list : [empty]));
});

/** Show how much of the epochs has passed. */
export function drawEpochs(chains) {
  for (const chain of chains) {
    const node = document.querySelector(`[data-chain="${chain.model}"]`);
    if (node) fillEpoch(node, chain, (Date.now() / 1000) % chain.epoch_s);
  }
}

function fillEpoch(node, chain, passed_s) {
  const left_s = Math.round(chain.epoch_s - passed_s);
  setText(node.querySelector(".left"), `Epoch ${chain.current_epoch}: ${chain.phase}, ${left_s} s left`);
  const fills = node.querySelectorAll(".phases b");
  phasesOf(chain).forEach(({ start_s, length_s }, index) => {
    fills[index].style.width = `${100 * Math.min(1, Math.max(0, (passed_s - start_s) / length_s))}%`;
  });
}

/** Return the phases of an epoch in order: `{ name, start_s, length_s }`. */
function phasesOf(chain) {
  const ends = Object.entries(chain.phase_ends_s);
  return ends.map(([name, end_s], index) => {
    const start_s = index ? ends[index - 1][1] : 0;
    return { name, start_s, length_s: end_s - start_s };
  });
}

function drawChain(chain) {
  const agreed = chain.epoch === null ? "no statement yet" : `agreed on epoch ${chain.epoch}`;
  const facts = [
    agreed, plural(chain.members, "member"),
    `${plural(chain.cells, "cell")}, ${count(chain.firm_cells)} with a quorum of measurements`,
    `${plural(chain.measured, "cell")} measured here`,
  ];
  if (chain.weight !== null) facts.push(`reputation of this node ${chain.weight.toFixed(2)}`);
  return el("div", { class: "chain", "data-chain": chain.model },
    el("div", { class: "model-head" }, el("h3", {}, chain.name || chain.model.slice(0, 12)), el("span", { class: "muted" }, facts.join(" · "))),
    el("p", { class: "left" }),
    phaseBar(chain),
    chain.statements.length ? statements(chain.statements) : el("p", { class: "muted" }, "The first statement comes at the end of an epoch in which peers measured."));
}

function phaseBar(chain) {
  return el("div", { class: "phases", "aria-hidden": "true" }, ...phasesOf(chain).map(({ name, length_s }) => {
    const part = el("i", { title: name }, el("b"));
    part.style.flex = `${length_s} 0 0`;
    return part;
  }));
}

function statements(list) {
  const rows = list.map((each) => {
    const changes = [[each.joined, "joined"], [each.left, "left"], [each.expelled, "expelled"]];
    return el("tr", {},
      el("th", { scope: "row" }, String(each.epoch)),
      el("td", {}, el("code", { title: each.statement }, each.statement.slice(0, 12))),
      el("td", { class: "number" }, each.committee ? `${each.signatures} of ${each.committee}` : "–"),
      el("td", { class: "number" }, count(each.members)),
      el("td", {}, changes.filter(([number]) => number).map(([number, what]) => `${number} ${what}`).join(", ") || "–"),
      el("td", { class: "number" }, count(each.commits)),
      el("td", { class: "mono", title: each.proposer }, shortPeer(each.proposer)));
  });
  const heads = [["Epoch"], ["Statement"], ["Signatures", "number"], ["Members", "number"], ["Changes"], ["Commits", "number"], ["Proposer"]];
  return el("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Table of statements" },
    el("table", {},
      el("thead", {}, el("tr", {}, ...heads.map(([name, kind]) => el("th", { scope: "col", class: kind }, name)))),
      el("tbody", {}, ...rows)));
}
