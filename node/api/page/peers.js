// The table of peers: what the map shows of each of them, and more, as text.

import { el, find, reconcile, setText } from "./dom.js";
import { blocks, count, duration } from "./format.js";

const body = find("peers").tBodies[0];

/** Fill the table. */
export function drawPeers(peers) {
  reconcile(body, peers, (peer) => peer.id, createRow, updateRow);
}

function createRow(peer) {
  return el("tr", { title: peer.id },
    el("th", { scope: "row" }, el("i", { class: "dot" }), el("span", { class: "mono" })),
    el("td", { class: "wrap" }), ...Array.from({ length: 5 }, () => el("td", { class: "number" })), el("td", { class: "muted" }));
}

function updateRow(row, peer) {
  const { level, words, sessions, queued, step_s } = peer.load;
  row.querySelector(".dot").className = `dot load-${level}`;
  setText(row.querySelector(".mono"), peer.label);
  const jobs = peer.jobs ? `${count(peer.jobs.served)} served${peer.jobs.failed ? `, ${count(peer.jobs.failed)} failed` : ""}` : "–";
  const cells = [
    peer.spans.map((span) => `${span.name || span.model.slice(0, 8)} ${blocks(span)}`).join(", ") || "none",
    peer.own ? "–" : duration(peer.rtt_s),
    sessions ? count(sessions) : words,
    count(queued),
    step_s ? duration(step_s) : "–",
    jobs,
    peer.hardware || "–",
  ];
  cells.forEach((text, index) => setText(row.cells[index + 1], text));
}
