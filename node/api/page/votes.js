// What the meta-models predicted for one job, how the peers voted, and what was measured.

import { el, find, onChange, setText, svg } from "./dom.js";
import { duration, method, plural, shortPeer } from "./format.js";

const MAX_METHODS = 12;

/** Draw the votes on a job. */
export const drawVotes = onChange((job) => {
  setText(find("votes-job"), job ? `job ${job.job_id.slice(0, 8)}${job.name ? ` · ${job.name}` : ""}` : "");
  find("votes-body").replaceChildren(...(job?.details ? describe(job.details) : [el("p", { class: "empty" }, emptyText(job))]));
});

function emptyText(job) {
  if (!job) return "The votes for a job appear here once it is done.";
  if (job.state === "failed") return job.error ?? "The job failed.";
  if (job.state === "cancelled") return "The job was cancelled before it was measured.";
  return "The job is running. Its votes appear here once it is done.";
}

function describe({ consensus, selection, timing }) {
  return [verdict(consensus, selection, timing), table(consensus, selection, timing)];
}

function verdict(consensus, selection, timing) {
  const by = consensus.epoch === null ? "equal weights" : `${consensus.weighed ? "weighed by" : "not weighed by"} the reputations of epoch ${consensus.epoch}`;
  const facts = [
    el("span", {}, "Agreed: ", el("b", { class: "mono", title: consensus.agreed }, method(consensus.agreed))),
    el("span", {}, `${plural(consensus.votes.length, "vote")}, ${by}`),
    el("span", {}, "Measured: ", el("b", {}, duration(timing.total_s))),
  ];
  if (selection) {
    const error = timing.total_s / selection.predicted_s;
    const basis = selection.basis === "model" ? `meta-model of ${selection.experiences} observations` : "heuristic: no history yet";
    facts.splice(2, 0, el("span", {}, "Predicted: ", el("b", {}, duration(selection.predicted_s)), ` (${basis})`));
    facts.push(el("span", {}, `Measured ÷ predicted: ${error.toFixed(2)}`));
    if (selection.explored) facts.push(el("span", { class: "badge warn" }, "explored"));
  }
  return el("div", { class: "verdict" }, ...facts);
}

function table(consensus, selection, timing) {
  const predictions = selection?.predictions ?? {};
  const names = [...new Set([...Object.keys(predictions), ...consensus.votes.flatMap((vote) => Object.keys(vote.scores))])];
  const worst = Math.max(timing.total_s, ...Object.values(predictions).map((each) => each.cost_s * Math.exp(each.deviation)));
  const shown = names.filter((name, index) => index < MAX_METHODS || name === consensus.agreed);
  const rows = shown.map((name) => {
    const each = predictions[name];
    return el("tr", { class: name === consensus.agreed ? "selected" : null },
      el("th", { scope: "row", class: "method", title: name }, method(name), name === consensus.agreed ? el("span", { class: "good" }, " ✓ agreed") : null),
      el("td", { class: "number" }, each ? duration(each.cost_s) : "–"),
      el("td", {}, each ? range(each, worst, name === consensus.agreed ? timing.total_s : null) : "–"),
      el("td", { class: "number" }, each ? `${each.speedup.toFixed(2)}×` : "–"),
      ...consensus.votes.map((vote) => voteCell(vote, name)),
      el("td", {}, selection?.accepted.includes(name) ? "yes" : "no"));
  });
  const head = el("tr", {},
    el("th", { scope: "col" }, "Method"), el("th", { scope: "col", class: "number" }, "Predicted"),
    el("th", { scope: "col" }, "Uncertainty"), el("th", { scope: "col", class: "number" }, "Speed-up"),
    ...consensus.votes.map((vote) => el("th", { scope: "col", class: "number", title: vote.peer }, `Vote ${shortPeer(vote.peer)}`)),
    el("th", { scope: "col" }, "Accepted here"));
  const hidden = names.length - shown.length;
  const more = hidden ? el("p", { class: "empty" }, `and ${plural(hidden, "more method")}`) : null;
  return el("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Table of votes" },
    el("table", {}, el("thead", {}, head), el("tbody", {}, ...rows)), more);
}

/** A vote is a predicted cost; only its ratio to the peer's best one counts. */
function voteCell(vote, name) {
  const score = vote.scores[name];
  if (score === undefined) return el("td", { class: "number muted", title: "not ready there" }, "–");
  const ratio = Math.exp(score - Math.min(...Object.values(vote.scores)));
  return el("td", { class: `number${ratio < 1.0005 ? " best" : ""}` }, `${ratio.toFixed(2)}×`);
}

function range(prediction, worst, measured_s) {
  const x = (seconds) => Math.min(148, (148 * seconds) / worst);
  const [low, high] = [prediction.cost_s * Math.exp(-prediction.deviation), prediction.cost_s * Math.exp(prediction.deviation)];
  const label = `between ${duration(low)} and ${duration(high)}${measured_s ? `, measured ${duration(measured_s)}` : ""}`;
  return svg("svg", { class: "range", role: "img", "aria-label": label, viewBox: "0 0 150 14" },
    svg("title", {}, label),
    svg("rect", { class: "track", y: 6, width: 150, height: 2 }),
    svg("rect", { class: "spread", x: x(low), y: 3, height: 8, rx: 2, width: Math.max(2, x(high) - x(low)) }),
    svg("circle", { class: "point", cx: x(prediction.cost_s), cy: 7, r: 3.5 }),
    measured_s ? svg("line", { class: "measured", x1: x(measured_s), x2: x(measured_s), y1: 0, y2: 14 }) : null);
}
