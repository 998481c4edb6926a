// Small charts in SVG.

import { el, svg } from "./dom.js";

const WIDTH = 360;
const HEIGHT = 150;
const LEFT = 46;
const RIGHT = 10;
const TOP = 8;
const BOTTOM = 18;

function frame(label, ...children) {
  return svg("svg", { class: "chart", viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": label }, ...children);
}

const text = (x, y, content, anchor = "start") => svg("text", { x, y, "text-anchor": anchor }, content);

/** Return a round number at or above a maximum. */
function roundUp(value) {
  if (value <= 0) return 1;
  const step = 10 ** Math.floor(Math.log10(value));
  return step * [1, 2, 3, 4, 5, 6, 8, 10].find((factor) => factor * step >= value);
}

/** Return a figure with a title, a note, and a chart. */
export function figure(title, note, chart) {
  return el("figure", {}, el("figcaption", {}, el("h3", {}, title), el("span", { class: "muted" }, note)), chart);
}

/** Return a curve over points `[x, y]`, x ascending. `ends`: labels of the first and the last x. */
export function curve(points, { label, ends, format }) {
  if (points.length < 2) return frame(label, text(WIDTH / 2, HEIGHT / 2, "no data yet", "middle"));
  const [first, last] = [points[0][0], points.at(-1)[0]];
  const top = roundUp(Math.max(...points.map(([, y]) => y)));
  const x = (value) => LEFT + ((WIDTH - LEFT - RIGHT) * (value - first)) / Math.max(1e-9, last - first);
  const y = (value) => HEIGHT - BOTTOM - ((HEIGHT - TOP - BOTTOM) * value) / top;
  const path = points.map(([a, b], index) => `${index ? "L" : "M"}${x(a).toFixed(1)} ${y(b).toFixed(1)}`).join("");
  return frame(label,
    ...[0, 0.5, 1].flatMap((share) => [
      svg("line", { class: "grid", x1: LEFT, x2: WIDTH - RIGHT, y1: y(top * share), y2: y(top * share) }),
      text(LEFT - 5, y(top * share) + 3.5, format(top * share), "end"),
    ]),
    svg("path", { class: "area", d: `${path}L${x(last)} ${y(0)}L${x(first)} ${y(0)}Z` }),
    svg("path", { class: "curve", d: path }),
    text(LEFT, HEIGHT - 4, ends[0]), text(WIDTH - RIGHT, HEIGHT - 4, ends[1], "end"));
}

/** Return points `{ x, y, title, explored }` on logarithmic axes, and the diagonal on which both are equal. */
export function scatter(points, { label, format, across, up }) {
  if (!points.length) return frame(label, text(WIDTH / 2, HEIGHT / 2, "no data yet", "middle"));
  const values = points.flatMap((point) => [point.x, point.y]).filter((value) => value > 0).map(Math.log10);
  let [low, high] = [Math.min(...values), Math.max(...values)];
  if (high - low < 0.5) [low, high] = [(low + high) / 2 - 0.25, (low + high) / 2 + 0.25];
  [low, high] = [low - 0.06 * (high - low), high + 0.06 * (high - low)];
  const place = (value, from, to) => from + ((to - from) * (Math.log10(value) - low)) / (high - low);
  const x = (value) => place(value, LEFT, WIDTH - RIGHT);
  const y = (value) => place(value, HEIGHT - BOTTOM, TOP);
  const ticks = [low, (low + high) / 2, high].map((power) => 10 ** power);
  return frame(label,
    ...ticks.flatMap((tick, index) => [
      svg("line", { class: "grid", x1: LEFT, x2: WIDTH - RIGHT, y1: y(tick), y2: y(tick) }),
      text(LEFT - 5, y(tick) + (index === 2 ? 8 : 3.5), format(tick), "end"),
      text(x(tick), HEIGHT - 4, index === 1 ? across : format(tick), ["start", "middle", "end"][index]),
    ]),
    text(LEFT + 4, TOP + 10, up),
    svg("line", { class: "ideal", x1: LEFT, y1: HEIGHT - BOTTOM, x2: WIDTH - RIGHT, y2: TOP }),
    ...points.map((point) => svg("circle", {
      class: `point${point.explored ? " explored" : ""}`, cx: x(point.x), cy: y(point.y), r: 3.5,
    }, svg("title", {}, point.title))));
}
