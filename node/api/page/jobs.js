// Jobs on their way through the stages, and those that ended.

import { el, find, reconcile, setText } from "./dom.js";
import { blocks, count, duration, method, rate, timeOfDay } from "./format.js";

const WINDOW_MS = 2500;
const MAX_KEPT = 200;
const MAX_SHOWN = 40;

const body = find("job-table").tBodies[0];
const jobs = new Map();
const progress = new Map();
let selected = null;
let onSelect = () => undefined;

/** Call a function with the job that is selected, and again when it changes. */
export function whenSelected(callback) {
  onSelect = callback;
}

/**
 * Take the jobs of an event. `running`: the ids of all that run. Of many that ended at a time the node remembers, and
 * tells, only some: the others are forgotten.
 */
export function takeJobs(changed, running) {
  const now = new Set(running);
  for (const job of jobs.values()) {
    if (["opening", "running"].includes(job.state) && !now.has(job.job_id)) forget(job.job_id);
  }
  for (const job of changed) {
    jobs.set(job.job_id, job);
    const seen = progress.get(job.job_id) ?? [];
    seen.push([performance.now(), job.tokens]);
    progress.set(job.job_id, seen.slice(-20));
  }
  for (const id of [...jobs.keys()].slice(0, Math.max(0, jobs.size - MAX_KEPT))) {
    forget(id);
  }
  drawJobs();
}

function forget(id) {
  jobs.delete(id);
  progress.delete(id);
}

/** Forget all jobs: a new connection lists them anew. */
export function clearJobs() {
  jobs.clear();
  progress.clear();
}

/** Return the running jobs for the map: `{ id, peers, rate }`. */
export function runningJobs() {
  const running = [...jobs.values()].filter((job) => job.state === "running");
  return running.map((job) => ({ id: job.job_id, peers: job.route.map((stage) => stage.peer), rate: currentRate(job) }));
}

/** Return the tokens a second that come now. */
function currentRate(job) {
  const now = performance.now();
  const seen = (progress.get(job.job_id) ?? []).filter(([at]) => at > now - WINDOW_MS);
  if (seen.length < 2) return 0;
  const [[began, first], [, last]] = [seen[0], seen.at(-1)];
  return (1000 * (last - first)) / Math.max(250, now - began);
}

/** Fill the table, the newest job first. */
export function drawJobs() {
  const withTrials = find("show-trials").checked;
  const shown = [...jobs.values()]
    .filter((job) => withTrials || !job.trial)
    .sort((a, b) => b.submitted_at - a.submitted_at)
    .slice(0, MAX_SHOWN);
  find("no-jobs").hidden = shown.length > 0;
  reconcile(body, shown, (job) => job.job_id, createRow, updateRow);
  const latest = shown.find((job) => job.details?.consensus.votes.length) ?? shown[0];
  onSelect(jobs.get(selected) ?? latest ?? null);
}
find("show-trials").addEventListener("change", drawJobs);

function createRow(job) {
  const choose = () => {
    selected = job.job_id;
    drawJobs();
  };
  return el("tr", {},
    el("td", {}, el("button", {
      type: "button", class: "plain", onclick: choose, "aria-label": `Show the votes for job ${job.job_id.slice(0, 8)}`,
    }, job.job_id.slice(0, 8)), " ", el("span", { class: "muted" }, timeOfDay(job.submitted_at))),
    el("td"), el("td"), el("td", { class: "number" }), el("td", { class: "number" }), el("td", { class: "number" }),
    el("td", { class: "method" }));
}

const STATES = { opening: "muted", running: "accent", done: "good", failed: "bad", cancelled: "warn" };

function updateRow(row, job) {
  const [, state, stages, tokens, speed, first, how] = row.cells;
  row.classList.toggle("selected", job.job_id === selected);
  row.classList.toggle("running", job.state === "running");
  const timing = job.details?.timing;
  const kind = job.task === "generate" ? "" : `${job.task} `;
  const words = (job.trial ? "trial " : "") + kind + job.state + (job.replays ? `, ${job.replays} replaced` : "");
  if (state.textContent !== words) state.replaceChildren(el("span", { class: `badge ${STATES[job.state]}` }, words));
  state.title = job.error ?? "";
  drawStages(stages, job);
  setText(tokens, `${count(job.prompt_tokens)} + ${count(job.tokens)}`);
  const now = timing ? (timing.tpot_s > 0 ? 1 / timing.tpot_s : 0) : job.state === "running" ? currentRate(job) : 0;
  setText(speed, now ? rate(now) : "–");
  setText(first, timing ? duration(timing.ttft_s) : "–");
  how.title = job.method ?? "";
  how.classList.toggle("bad", Boolean(job.error));
  setText(how, job.error ?? (job.method ? method(job.method) : "–"));
}

/** Draw a job's stages; once it is done, what each of them computed and how long its rows waited. */
function drawStages(cell, job) {
  const measured = job.details?.route;
  const key = JSON.stringify(measured ?? job.route);
  if (cell.drawn === key) return;
  cell.drawn = key;
  const stages = measured ?? job.route;
  const isStated = (stage) => typeof stage.compute_s === "number"; // null: the stage did not say what it cost
  const longest = Math.max(1e-9, ...stages.map((stage) => (stage.compute_s ?? 0) + (stage.queue_s ?? 0)));
  const width = (seconds) => `${Math.round((100 * seconds) / longest)}%`;
  cell.replaceChildren(el("div", { class: "stages" }, ...stages.map((stage) => {
    const times = isStated(stage) ? `compute ${duration(stage.compute_s)}, queue ${duration(stage.queue_s)}` : "";
    const bar = el("div", { class: "bar" });
    if (isStated(stage)) {
      for (const [kind, seconds] of [["compute", stage.compute_s], ["queue", stage.queue_s]]) {
        const part = el("i", { class: `time-${kind}` });
        part.style.width = width(seconds);
        bar.append(part);
      }
    }
    const title = `blocks ${blocks(stage)} on ${stage.peer}${times ? `: ${times}` : ""}`;
    return el("div", { class: "stage", title }, `${blocks(stage)}${isStated(stage) ? ` ${duration(stage.compute_s + stage.queue_s)}` : ""}`,
      bar, el("span", { class: "hidden" }, times));
  })));
}
