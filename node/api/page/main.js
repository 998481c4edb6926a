// Connects the node's events to the parts of the page.

import { follow } from "./api.js";
import { offerModels } from "./chat.js";
import { drawConsensus, drawEpochs } from "./consensus.js";
import { el, find, reconcile, setText } from "./dom.js";
import { count, duration, plural, rate, shortPeer } from "./format.js";
import { clearJobs, drawJobs, runningJobs, takeJobs, whenSelected } from "./jobs.js";
import "./join.js";
import { drawLearning } from "./learning.js";
import { drawMap, drawRoutes } from "./map.js";
import { drawModels, isServed } from "./models.js";
import { drawPeers } from "./peers.js";
import { peersOf } from "./swarm.js";
import "./theme.js";
import { drawVotes } from "./votes.js";

const documents = {};
let state = "connecting";
let isOld = false;

function takeEvent(name, document_) {
  const { agent } = documents.status ?? document_;
  isOld ||= name === "status" && document_.agent !== agent;
  if (isOld) return leave();
  if (name === "jobs") takeJobs(document_.jobs, document_.running);
  else documents[name] = document_;
  draw();
}

function draw() {
  const { status, peers, models, learning } = documents;
  if (!status || !peers || !models) return;
  const swarm = peersOf(status, peers.peers);
  drawNode(status);
  drawFigures(status, models.models);
  drawMap(swarm, models.models);
  drawRoutes(runningJobs());
  drawPeers(swarm);
  drawModels(models.models, swarm.map(({ label, spans }) => ({ label, spans: spans.map(({ model, start, end }) => ({ model, start, end })) })), status.uncovered);
  drawConsensus(status.consensus);
  drawEpochs(status.consensus);
  if (learning) drawLearning(learning, { ...status.selection, trained_ago_s: null }, status.history?.count ?? 0);
  offerModels(models.models);
}

/** Load the page of another release of the node, unless a conversation would be lost. */
function leave() {
  if (document.querySelector(".turn")) throw new Error("the node is of another release than this page");
  location.reload();
}

function drawNode(status) {
  const state_ = status.state === "serving" ? "" : ` · ${status.state}`;
  setText(find("node"), `${shortPeer(status.peer_id)} · ${status.agent} · up ${duration(status.uptime_s)}${state_}`);
  find("node").title = status.peer_id;
}

function drawFigures(status, models) {
  const speed = runningJobs().reduce((sum, job) => sum + job.rate, 0);
  const { jobs, peers, history, consensus } = status;
  const complete = models.filter((model) => model.complete).length;
  const epochs = consensus.map((chain) => chain.epoch).filter((epoch) => epoch !== null);
  const figures = [
    ["Peers", count(peers.reached + 1), peers.known > peers.reached ? `${peers.known - peers.reached} not reached` : "with this one"],
    ["Models", count(complete), `complete, of ${models.filter(isServed).length}`],
    ["Jobs", count(jobs.running), `running · ${count(jobs.done)} done${jobs.failed ? ` · ${count(jobs.failed)} failed` : ""}`],
    ["Tokens/s now", speed ? rate(speed) : "0", "from this node's jobs"],
    ["History", history ? count(history.count) : "–", history ? "observations" : "unreadable"],
    ["Agreed epoch", epochs.length ? String(Math.max(...epochs)) : "–", epochs.length ? plural(epochs.length, "chain") : "no statement yet"],
  ];
  reconcile(find("figures"), figures, ([name]) => name,
    ([name]) => el("div", {}, el("dt", {}, name), el("dd", {}, el("span"), " ", el("small"))),
    (node, [, value, note]) => {
      setText(node.querySelector("span"), value);
      setText(node.querySelector("small"), note);
    });
}

function takeState(now, message = "") {
  if (now === state) return;
  state = now;
  const words = { live: "live", lost: "the node does not answer: trying again", faulty: "this page cannot show what the node says: reload it" };
  const label = find("connection");
  label.className = `connection ${now}`;
  label.title = message;
  setText(label, words[now]);
  document.querySelector("main").classList.toggle("stale", now === "lost");
}

whenSelected(drawVotes);
drawJobs();
follow(clearJobs, takeEvent, takeState);
setInterval(() => {
  drawRoutes(runningJobs());
  if (runningJobs().length) drawJobs();
}, 500);
addEventListener("resize", draw);
