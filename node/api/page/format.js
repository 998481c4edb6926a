// Numbers and names, as they are shown.

/** Return a duration: 12 ms, 3.4 s, 5 min. */
export function duration(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  if (seconds < 0.001) return `${(seconds * 1000).toFixed(2)} ms`;
  if (seconds < 0.01) return `${(seconds * 1000).toFixed(1)} ms`;
  if (seconds < 1) return `${Math.round(seconds * 1000)} ms`;
  if (seconds < 100) return `${seconds.toFixed(seconds < 10 ? 2 : 1)} s`;
  if (seconds < 7200) return `${Math.round(seconds / 60)} min`;
  if (seconds < 172800) return `${Math.round(seconds / 3600)} h`;
  return `${Math.round(seconds / 86400)} days`;
}

/** Return a count with separators. */
export const count = (number) => number.toLocaleString("en");

/** Return a count with its noun: 1 peer, 2 peers. */
export const plural = (number, noun) => `${count(number)} ${noun}${number === 1 ? "" : "s"}`;

/** Return a size: 512 MiB. */
export function bytes(number) {
  if (number < 2 ** 30) return `${Math.max(1, Math.round(number / 2 ** 20))} MiB`;
  return `${(number / 2 ** 30).toFixed(1)} GiB`;
}

/** Return a rate of tokens. */
export const rate = (number) => (number >= 100 ? number.toFixed(0) : number.toFixed(1));

/** Return the end of a peer's id, which is what differs. */
export const shortPeer = (peer) => `…${peer.slice(-6)}`;

/** Return a range of blocks. */
export const blocks = (span) => `${span.start}-${span.end}`;

/** Return a method in short: its engine, and the switches that are on. The full name has all of them. */
export function method(name) {
  const switches = new Map(name.split("|").map((each) => each.split("=")));
  if (!switches.has("engine")) return name.replaceAll("|", " · ").replaceAll("=", " ");
  const { engine, arithmetic, activations, ...rest } = Object.fromEntries(switches);
  const parts = [[engine, arithmetic].filter(Boolean).join(" ")];
  if (activations && activations !== "fp32") parts.push(`${activations} on the wire`);
  for (const [key, value] of Object.entries(rest)) {
    if (value === "on") parts.push(key.replaceAll("_", " "));
    else if (!["off", "none", "auto"].includes(value)) parts.push(`${key.replaceAll("_", " ")} ${value}`);
  }
  return parts.join(" · ");
}

/** Return a time of day. */
export const timeOfDay = (unixSeconds) => new Date(unixSeconds * 1000).toLocaleTimeString("en-GB");
