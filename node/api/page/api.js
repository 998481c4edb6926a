// Requests to the node, with an API key where it requires one, and readers of server-sent events.

import { find, setText } from "./dom.js";

const KEY = "metaswarm-api-key";
const RETRY_FIRST_MS = 500;
const RETRY_MAX_MS = 5000;
// A node that works sends its status every second.
const SILENCE_MS = 10_000;

let asking = null;

/** Send a request; ask for the API key as often as the node refuses it. */
export async function request(path, options = {}) {
  for (;;) {
    const key = sessionStorage.getItem(KEY);
    const headers = new Headers(options.headers);
    if (key) headers.set("Authorization", `Bearer ${key}`);
    const answer = await fetch(path, { ...options, headers });
    if (answer.status !== 401) return answer;
    if (sessionStorage.getItem(KEY) === key) {
      asking ??= askForKey(Boolean(key)).finally(() => (asking = null));
      await asking;
    }
  }
}

/** Return a JSON document. Throws an Error with the node's one line. */
export async function getJson(path) {
  const answer = await request(path);
  if (!answer.ok) throw new Error(await errorOf(answer));
  return answer.json();
}

/** Return the line with which the node explains an error. */
export async function errorOf(answer) {
  try {
    return (await answer.json()).error.message;
  } catch {
    return `the node answered with status ${answer.status}`;
  }
}

function askForKey(wasWrong) {
  const dialog = find("key-dialog");
  const input = find("key-input");
  if (wasWrong) setText(find("key-reason"), "The node does not know this key. Check it, and try again.");
  input.value = "";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => {
      if (input.validity.valid) sessionStorage.setItem(KEY, input.value.trim()); // Escape closes in any case
      resolve();
    }, { once: true });
  });
}

/** Yield the events of an answer: `{ name, data }`. */
export async function* readEvents(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    text += value;
    let end;
    while ((end = text.indexOf("\n\n")) >= 0) {
      const event = parseEvent(text.slice(0, end));
      text = text.slice(end + 2);
      if (event.data !== "") yield event;
    }
  }
}

function parseEvent(lines) {
  const event = { name: "message", data: "" };
  for (const line of lines.split("\n")) {
    if (line.startsWith("event: ")) event.name = line.slice(7);
    else if (line.startsWith("data: ")) event.data += line.slice(6);
  }
  return event;
}

/**
 * Follow the node's events for as long as the page is visible, and connect again whenever the connection ends, or
 * nothing comes. `onOpen` is called for each connection, which begins with every document; `onState` gets "live",
 * "lost", or "faulty" where `onEvent` throws.
 */
export async function follow(onOpen, onEvent, onState) {
  let pause_ms = RETRY_FIRST_MS;
  for (;;) {
    await untilVisible();
    const abort = new AbortController();
    let isHidden = false;
    const stop = () => document.hidden && abort.abort(isHidden = true);
    let silence;
    const listen = () => {
      clearTimeout(silence);
      silence = setTimeout(() => abort.abort(new Error("the node has become silent")), SILENCE_MS);
    };
    document.addEventListener("visibilitychange", stop);
    try {
      const answer = await request("/swarm/events", { signal: abort.signal });
      if (!answer.ok) throw new Error(await errorOf(answer));
      onOpen();
      listen();
      for await (const { name, data } of readEvents(answer)) {
        listen();
        pause_ms = RETRY_FIRST_MS;
        try {
          onEvent(name, JSON.parse(data));
          onState("live");
        } catch (error) {
          console.error(error);
          onState("faulty", error.message);
        }
      }
      throw new Error("the node ended the events");
    } catch (error) {
      if (!isHidden) {
        onState("lost", error.message);
        await new Promise((resolve) => setTimeout(resolve, pause_ms));
        pause_ms = Math.min(2 * pause_ms, RETRY_MAX_MS);
      }
    } finally {
      clearTimeout(silence);
      document.removeEventListener("visibilitychange", stop);
    }
  }
}

function untilVisible() {
  if (!document.hidden) return Promise.resolve();
  return new Promise((resolve) => {
    const check = () => {
      if (document.hidden) return;
      document.removeEventListener("visibilitychange", check);
      resolve();
    };
    document.addEventListener("visibilitychange", check);
  });
}
