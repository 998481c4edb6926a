// The chat: streams answers of /v1/chat/completions, and tells what each of them cost. Nothing of it is stored.

import { errorOf, readEvents, request } from "./api.js";
import { el, find, setText } from "./dom.js";
import { duration, method, plural, rate } from "./format.js";

const parts = Object.fromEntries(["log", "form", "input", "model", "send", "stop", "retry", "clear", "status", "system",
  "temperature", "max", "quality"].map((name) => [name, find(`chat-${name}`)]));
const turns = [];
let running = null;

/** Offer the complete models. */
export function offerModels(models) {
  const names = models.filter((model) => model.complete).map((model) => model.name || model.model);
  if (parts.model.offered === names.join()) return;
  parts.model.offered = names.join();
  const chosen = parts.model.value;
  parts.model.replaceChildren(...names.map((name) => el("option", { value: name }, name)));
  if (!names.length) parts.model.append(el("option", { value: "" }, "no complete model"));
  if (names.includes(chosen)) parts.model.value = chosen;
  enable();
}

function enable() {
  parts.send.disabled = Boolean(running) || !parts.model.value;
  parts.stop.disabled = !running;
  parts.retry.disabled = Boolean(running) || !turns.length;
  parts.clear.disabled = !turns.length;
}

function showHint() {
  parts.log.replaceChildren(el("p", { class: "hint" }, "Every peer of the route computes its blocks. Watch the map while the answer comes."));
}

/** Ask for the answer to the conversation so far, and show it as it comes. */
async function answer() {
  const turn = { role: "assistant", text: "" };
  const view = addTurn(turn, "assistant");
  const abort = new AbortController();
  running = abort;
  enable();
  setText(parts.status, "The answer is coming");
  const meter = { began_ms: performance.now(), first_ms: 0, tokens: 0 };
  let fault = null;
  try {
    await stream(turn, view, meter, abort.signal);
  } catch (error) {
    if (!abort.signal.aborted) fault = error.message;
  }
  running = null;
  if (view.isConnected) finish(turn, view, costOf(meter, turn.details, abort.signal.aborted), fault); // else: cleared
  enable();
  if (document.activeElement === document.body) parts.input.focus();
}

function finish(turn, view, cost, fault) {
  view.classList.remove("writing");
  setText(view.querySelector(".cost"), cost);
  if (fault) view.append(el("p", { class: "fault", role: "alert" }, fault));
  setText(parts.status, fault ? "The answer failed" : `The answer has ended: ${cost}`);
  if (turn.text || !fault) turns.push(turn);
}

async function stream(turn, view, meter, signal) {
  const messages = turns.map(({ role, text }) => ({ role, content: text }));
  if (parts.system.value.trim()) messages.unshift({ role: "system", content: parts.system.value.trim() });
  const response = await request("/v1/chat/completions", {
    method: "POST",
    signal,
    headers: { "Content-Type": "application/json", "X-Metaswarm": "1" },
    body: JSON.stringify({
      model: parts.model.value, messages, stream: true, stream_options: { include_usage: true },
      temperature: Number(parts.temperature.value), max_tokens: Number(parts.max.value),
      metaswarm: { quality: parts.quality.value },
    }),
  });
  if (!response.ok) throw new Error(await errorOf(response));
  for await (const { data } of readEvents(response)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new Error(chunk.error.message);
    take(chunk, turn, view, meter);
  }
  throw new Error("the connection ended before the answer did");
}

function take(chunk, turn, view, meter) {
  const delta = chunk.choices?.[0]?.delta ?? {};
  if (chunk.metaswarm) turn.details = chunk.metaswarm;
  if (chunk.usage) meter.tokens = chunk.usage.completion_tokens;
  if (!delta.content && !delta.reasoning_content) return;
  meter.first_ms ||= performance.now();
  meter.tokens += 1;
  if (delta.reasoning_content) addReasoning(view, delta.reasoning_content);
  if (delta.content) {
    turn.text += delta.content;
    view.querySelector(":scope > .said").textContent += delta.content;
  }
  setText(view.querySelector(".cost"), costOf(meter, null, false));
  scrollDown();
}

function costOf(meter, details, stopped) {
  const facts = stopped ? ["stopped"] : [];
  if (meter.tokens) facts.push(plural(meter.tokens, "token"));
  const seconds = details ? details.timing.tpot_s : (performance.now() - meter.first_ms) / 1000 / Math.max(1, meter.tokens - 1);
  if (meter.tokens > 1 && seconds > 0) facts.push(`${rate(1 / seconds)} tokens/s`);
  const first_s = details ? details.timing.ttft_s : (meter.first_ms - meter.began_ms) / 1000;
  if (meter.first_ms) facts.push(`first token ${duration(first_s)}`);
  if (details) {
    facts.push(plural(details.route.length, "stage"), method(details.consensus.agreed));
    if (details.replays) facts.push(`${plural(details.replays, "stage")} replaced`);
  }
  return facts.join(" · ");
}

function addTurn(turn, kind) {
  if (parts.log.querySelector(".hint")) parts.log.replaceChildren();
  const who = kind === "user" ? "You" : parts.model.value;
  const view = el("article", { class: `turn ${kind}`, "aria-label": kind === "user" ? "Your message" : `Answer of ${who}` },
    el("p", { class: "who" }, who), el("div", { class: "said" }, turn.text));
  if (kind === "assistant") {
    view.classList.add("writing");
    view.append(el("p", { class: "cost" }));
  }
  parts.log.append(view);
  scrollDown(true);
  return view;
}

function addReasoning(view, text) {
  let box = view.querySelector("details");
  if (!box) {
    box = el("details", {}, el("summary", {}, "Reasoning"), el("div", { class: "said" }));
    view.querySelector(":scope > .said").before(box);
  }
  box.querySelector(".said").textContent += text;
}

/** Follow the text, unless the reader has scrolled up. */
function scrollDown(always = false) {
  const { scrollHeight, scrollTop, clientHeight } = parts.log;
  if (always || scrollHeight - scrollTop - clientHeight < 80) parts.log.scrollTop = scrollHeight;
}

function submit() {
  const text = parts.input.value.trim();
  if (!text || parts.send.disabled) return;
  parts.input.value = "";
  if (turns.at(-1)?.role === "user") turns.pop(); // its answer failed
  const turn = { role: "user", text };
  addTurn(turn, "user");
  turns.push(turn);
  answer();
}

parts.form.addEventListener("submit", (event) => {
  event.preventDefault();
  submit();
});
parts.input.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    submit();
  } else if (event.key === "Escape") running?.abort();
});
parts.stop.addEventListener("click", () => {
  running?.abort();
  parts.input.focus();
});
parts.retry.addEventListener("click", () => {
  if (turns.at(-1).role === "assistant") turns.pop(); // else the answer failed
  parts.log.lastElementChild.remove();
  answer();
});
parts.clear.addEventListener("click", () => {
  running?.abort();
  turns.length = 0;
  setText(parts.status, "The conversation is empty");
  showHint();
  enable();
  parts.input.focus();
});
showHint();
enable();
