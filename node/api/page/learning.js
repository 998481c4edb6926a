// How the history grows, and how well the choices of methods turn out.

import { curve, figure, scatter } from "./charts.js";
import { find, onChange, setText } from "./dom.js";
import { count, duration, method, plural, timeOfDay } from "./format.js";

/** Draw the charts. `selection`: of `/swarm/status`. */
export const drawLearning = onChange((learning, selection, observations) => {
  const { samples, past } = learning;
  setText(find("learning-note"), noteOf(selection) + lateOf(learning));
  find("charts").replaceChildren(history(samples, observations), outcomes(past), regret(past));
});

function noteOf(selection) {
  const basis = selection.basis === "model"
    ? `meta-model ${selection.model_version}, trained on ${plural(selection.experiences, "observation")}`
    : "no meta-model yet: the heuristic decides";
  return `${basis} · ${plural(selection.explored_jobs, "job")} explored · ${plural(selection.trials, "trial")} · ` +
    `${duration(selection.budget_left_s)} left for trying methods`;
}

function lateOf({ late_predictions: late }) {
  return late ? ` · ${plural(late, "prediction")} came too late for a choice or vote` : "";
}

function history(samples, observations) {
  const points = samples.map((sample) => [sample.at, sample.observations]);
  if (points.length) points.push([Math.max(Date.now() / 1000, points.at(-1)[0]), observations]);
  const label = `History over time: ${plural(observations, "observation")} now`;
  const ends = points.length ? [timeOfDay(points[0][0]).slice(0, 5), "now"] : [];
  return figure("History", plural(observations, "observation"), curve(points, { label, ends, format: tickOf }));
}

function outcomes(past) {
  const points = past.recent.map((each) => ({
    x: each.predicted_s, y: each.actual_s, explored: each.explored,
    title: `${method(each.method)}: predicted ${duration(each.predicted_s)}, measured ${duration(each.actual_s)}`,
  }));
  const error = past.typical_error === null ? "no job yet" : `typical error ${(100 * past.typical_error).toFixed(0)} %`;
  return figure("Predicted and measured", error, scatter(points, {
    label: `Predicted against measured duration of ${plural(points.length, "job")}, ${error}`,
    format: duration, across: "predicted", up: "measured",
  }));
}

function regret(past) {
  let sum = 0;
  const points = [...past.recent].reverse().map((each, index) => [index + 1, (sum += each.regret_s)]);
  if (points.length) points.unshift([0, 0]);
  const mean = past.jobs ? `${duration(past.mean_regret_s)} a job` : "no job yet";
  return figure("Regret, summed", mean, curve(points, {
    label: `Regret summed over the last ${plural(past.recent.length, "job")}: ${duration(sum)}`,
    ends: ["first job", `job ${past.recent.length}`], format: (value) => (value ? duration(value) : "0"),
  }));
}

const tickOf = (value) => (value >= 10000 ? `${Math.round(value / 1000)}k` : count(Math.round(value * 10) / 10));
